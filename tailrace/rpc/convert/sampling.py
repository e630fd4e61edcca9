"""How tokens are drawn, and what is said of a drawn one."""

from tailrace.errors import InvalidRequestError
from tailrace.rpc.gen import generation_pb2
from tailrace.types import FinishReason, SamplingParams, TokenLogprob

_REASONS = frozenset(int(reason) for reason in FinishReason)


def sampling_to_proto(params: SamplingParams) -> generation_pb2.Sampling:
    return generation_pb2.Sampling(
        max_tokens=params.max_tokens,
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        logit_bias=dict(params.logit_bias),
        min_tokens=params.min_tokens,
        ignore_eos=params.ignore_eos,
        stop_token_ids=params.stop_token_ids,
        logprobs=params.logprobs,
        seed=params.seed,
    )


def sampling_from_proto(message: generation_pb2.Sampling, *, seed: int = 0, max_tokens: int = 16) -> SamplingParams:
    """`seed` and `max_tokens` are for a message that leaves them unset."""
    return SamplingParams(
        max_tokens=message.max_tokens if message.HasField("max_tokens") else max_tokens,
        temperature=message.temperature if message.HasField("temperature") else 1.0,
        top_k=message.top_k,
        top_p=message.top_p if message.HasField("top_p") else 1.0,
        min_p=message.min_p,
        repetition_penalty=message.repetition_penalty if message.HasField("repetition_penalty") else 1.0,
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        logit_bias=tuple(sorted(message.logit_bias.items())),
        min_tokens=message.min_tokens,
        ignore_eos=message.ignore_eos,
        stop_token_ids=tuple(message.stop_token_ids),
        logprobs=message.logprobs if message.HasField("logprobs") else None,
        seed=message.seed if message.HasField("seed") else seed,
    )


def logprob_to_proto(value: TokenLogprob | None) -> generation_pb2.TokenLogprob:
    if value is None:
        return generation_pb2.TokenLogprob()
    return generation_pb2.TokenLogprob(
        logprob=value.logprob, top_ids=[i for i, _ in value.top], top_logprobs=[p for _, p in value.top]
    )


def logprob_from_proto(message: generation_pb2.TokenLogprob) -> TokenLogprob:
    if len(message.top_ids) != len(message.top_logprobs):
        raise InvalidRequestError("top_ids and top_logprobs differ in length", param="logprobs")
    return TokenLogprob(message.logprob, tuple(zip(message.top_ids, message.top_logprobs, strict=True)))


def reason_to_proto(reason: FinishReason | None) -> generation_pb2.FinishReason.ValueType:
    return generation_pb2.FinishReason.ValueType(int(reason) if reason is not None else 0)


def reason_from_proto(number: int) -> FinishReason | None:
    """None for "not over". An unknown reason, from a newer peer, is a stop: the choice is over all the same."""
    if not number:
        return None
    return FinishReason(number) if number in _REASONS else FinishReason.STOP
