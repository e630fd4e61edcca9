"""The only translator between protobuf messages and the values of `tailrace.messages`.

What comes off the wire is checked here: a message that no peer of ours could have sent raises InvalidRequestError,
naming the field.
"""

from collections.abc import Iterable

from tailrace import errors
from tailrace.errors import ErrorCode, InvalidRequestError, TailraceError
from tailrace.kv.events import KVEvent, KVEventKind
from tailrace.kv.layout import KVLayout, LayerGroup
from tailrace.messages import (
    ChoiceFinished,
    FirstToken,
    Holding,
    HoldingState,
    KvEventBatch,
    KvSource,
    LedgerReport,
    LegFailed,
    LegReport,
    LendDone,
    LendTerms,
    LentBlocks,
    Load,
    StepEvents,
    Submission,
    TokenColumns,
    WorkerInfo,
)
from tailrace.rpc.gen import control_pb2, error_pb2, generation_pb2, kv_pb2, worker_pb2
from tailrace.transfer.endpoints import NixlEndpoint, PeerEndpoints, StreamEndpoint
from tailrace.types import FinishReason, Role, SamplingParams, TokenLogprob

_ROLES = {
    worker_pb2.WORKER_ROLE_PREFILL: Role.PREFILL,
    worker_pb2.WORKER_ROLE_DECODE: Role.DECODE,
}
_ROLE_NUMBERS = {role: number for number, role in _ROLES.items()}
_EVENT_KINDS = {
    kv_pb2.KvEvent.KIND_PUBLISH: KVEventKind.PUBLISH,
    kv_pb2.KvEvent.KIND_RETRACT: KVEventKind.RETRACT,
}
_EVENT_NUMBERS = {kind: number for number, kind in _EVENT_KINDS.items()}
_ERRORS: dict[ErrorCode, type[TailraceError]] = {
    ErrorCode.INVALID_REQUEST: errors.InvalidRequestError,
    ErrorCode.UNAUTHENTICATED: errors.UnauthenticatedError,
    ErrorCode.NOT_FOUND: errors.NotFoundError,
    ErrorCode.OVERLOADED: errors.OverloadedError,
    ErrorCode.UNAVAILABLE: errors.UnavailableError,
    ErrorCode.DEADLINE_EXCEEDED: errors.DeadlineExceededError,
    ErrorCode.CANCELLED: errors.CancelledByClientError,
    ErrorCode.WORKER_LOST: errors.WorkerLostError,
    ErrorCode.TRANSFER_FAILED: errors.TransferError,
    ErrorCode.LAYOUT_MISMATCH: errors.LayoutMismatchError,
    ErrorCode.INTERNAL: errors.InternalError,
}


# -- errors -----------------------------------------------------------------------------------------------------------


def error_to_proto(error: TailraceError) -> error_pb2.Error:
    return error_pb2.Error(
        code=error_pb2.ErrorCode.ValueType(int(error.code)),
        retryable=error.retryable,
        retry_after_s=error.retry_after_s,
        message=error.message,
        param=error.param or "",
    )


def error_from_proto(message: error_pb2.Error) -> TailraceError:
    """An unknown code, from a newer peer, is an internal error."""
    known = message.code in list(ErrorCode)
    kind = _ERRORS[ErrorCode(message.code)] if known else errors.InternalError
    return kind(message.message, param=message.param or None, retry_after_s=message.retry_after_s)


# -- sampling and tokens ----------------------------------------------------------------------------------------------


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
    return TokenLogprob(message.logprob, tuple(zip(message.top_ids, message.top_logprobs, strict=True)))


def reason_to_proto(reason: FinishReason | None) -> generation_pb2.FinishReason.ValueType:
    return generation_pb2.FinishReason.ValueType(int(reason) if reason is not None else 0)


def reason_from_proto(number: int) -> FinishReason | None:
    return FinishReason(number) if number else None


# -- layout and events ------------------------------------------------------------------------------------------------


def layout_to_proto(layout: KVLayout) -> kv_pb2.KvLayout:
    return kv_pb2.KvLayout(
        fingerprint=layout.fingerprint,
        model_digest=layout.model_digest,
        weights_digest=layout.weights_digest,
        quantization=layout.quantization,
        numerics_version=layout.numerics_version,
        num_layers=layout.num_layers,
        num_kv_heads=layout.num_kv_heads,
        head_dim=layout.head_dim,
        block_size=layout.block_size,
        kv_dtype=layout.kv_dtype,
        kv_scales=layout.kv_scales,
        tensor_parallel_rank=layout.tensor_parallel_rank,
        tensor_parallel_size=layout.tensor_parallel_size,
        groups=[kv_pb2.LayerGroup(kind=g.kind, layers=g.layers, window=g.window) for g in layout.groups],
    )


def layout_from_proto(message: kv_pb2.KvLayout) -> KVLayout:
    """Raises ConfigError, naming the field, for a layout that cannot be."""
    return KVLayout(
        model_digest=message.model_digest,
        weights_digest=message.weights_digest,
        quantization=message.quantization,
        numerics_version=message.numerics_version,
        num_layers=message.num_layers,
        num_kv_heads=message.num_kv_heads,
        head_dim=message.head_dim,
        block_size=message.block_size,
        kv_dtype=message.kv_dtype,
        kv_scales=message.kv_scales,
        tensor_parallel_rank=message.tensor_parallel_rank,
        tensor_parallel_size=message.tensor_parallel_size,
        groups=tuple(LayerGroup(g.kind, tuple(g.layers), g.window) for g in message.groups),
    )


def kv_events_to_proto(batch: KvEventBatch) -> kv_pb2.KvEvents:
    return kv_pb2.KvEvents(
        epoch=batch.epoch,
        first_sequence=batch.first_sequence,
        events=[kv_pb2.KvEvent(block_hash=e.block_hash, kind=_EVENT_NUMBERS[e.kind]) for e in batch.events],
    )


def kv_events_from_proto(message: kv_pb2.KvEvents) -> KvEventBatch:
    """An event of a kind that we do not know is taken for a retract: hints may be missing, but their numbers may not."""
    events = [KVEvent(_EVENT_KINDS.get(e.kind, KVEventKind.RETRACT), e.block_hash) for e in message.events]
    return KvEventBatch(message.epoch, message.first_sequence, events)


# -- gateway -> worker ------------------------------------------------------------------------------------------------


def submission_to_proto(submission: Submission) -> worker_pb2.Submit:
    source = submission.source
    return worker_pb2.Submit(
        handle=submission.handle,
        request_id=submission.request_id,
        attempt=submission.attempt,
        token_ids=submission.tokens,
        num_prompt_tokens=submission.num_prompt_tokens,
        sampling=sampling_to_proto(submission.sampling),
        first_choice=submission.choices[0],
        num_choices=len(submission.choices),
        priority=submission.priority,
        deadline_s=submission.deadline_s,
        trace=generation_pb2.TraceContext(traceparent=submission.traceparent, tracestate=submission.tracestate),
        ticket=submission.ticket,
        cache_salt=submission.cache_salt,
        source=None
        if source is None
        else worker_pb2.KvSource(
            worker_id=source.worker_id, epoch=source.epoch, address=source.address, ticket=source.ticket
        ),
    )


def submission_from_proto(message: worker_pb2.Submit) -> Submission:
    if not 1 <= message.num_prompt_tokens <= len(message.token_ids):
        raise InvalidRequestError(
            f"num_prompt_tokens={message.num_prompt_tokens} with {len(message.token_ids)} token ids",
            param="num_prompt_tokens",
        )
    if not 1 <= message.num_choices <= MAX_CHOICES:
        raise InvalidRequestError(f"num_choices={message.num_choices}, not 1 to {MAX_CHOICES}", param="num_choices")
    source = message.source
    return Submission(
        handle=message.handle,
        request_id=message.request_id,
        attempt=message.attempt,
        tokens=list(message.token_ids),
        num_prompt_tokens=message.num_prompt_tokens,
        sampling=sampling_from_proto(message.sampling),
        choices=tuple(range(message.first_choice, message.first_choice + message.num_choices)),
        priority=message.priority,
        deadline_s=message.deadline_s,
        ticket=message.ticket,
        cache_salt=message.cache_salt,
        source=KvSource(source.worker_id, source.epoch, source.address, source.ticket)
        if message.HasField("source")
        else None,
        traceparent=message.trace.traceparent,
        tracestate=message.trace.tracestate,
    )


MAX_CHOICES = 1024
"""No worker takes more choices of one request, whatever its gateway allows."""


# -- worker -> gateway ------------------------------------------------------------------------------------------------


def info_to_proto(info: WorkerInfo) -> worker_pb2.WorkerInfo:
    return worker_pb2.WorkerInfo(
        worker_id=info.worker_id,
        epoch=info.epoch,
        role=_ROLE_NUMBERS[info.role],
        layout=layout_to_proto(info.layout),
        model=info.model,
        max_model_len=info.max_model_len,
        max_num_seqs=info.max_num_seqs,
        num_blocks=info.num_blocks,
        address=info.address,
        version=info.version,
        max_choices=MAX_CHOICES,
    )


def info_from_proto(message: worker_pb2.WorkerInfo) -> WorkerInfo:
    if message.role not in _ROLES:
        raise InvalidRequestError(f"worker {message.worker_id} has an unknown role {message.role}", param="role")
    return WorkerInfo(
        worker_id=message.worker_id,
        epoch=message.epoch,
        role=_ROLES[message.role],
        layout=layout_from_proto(message.layout),
        model=message.model,
        max_model_len=message.max_model_len,
        max_num_seqs=message.max_num_seqs,
        num_blocks=message.num_blocks,
        address=message.address,
        version=message.version,
    )


def load_to_proto(load: Load) -> worker_pb2.Load:
    return worker_pb2.Load(
        num_waiting=load.num_waiting,
        num_running=load.num_running,
        waiting_tokens=load.waiting_tokens,
        total_blocks=load.total_blocks,
        free_blocks=load.free_blocks,
        active_blocks=load.active_blocks,
        cached_blocks=load.cached_blocks,
        lent_blocks=load.lent_blocks,
        landing_blocks=load.landing_blocks,
        quarantined_blocks=load.quarantined_blocks,
        booked_blocks=load.booked_blocks,
        prefill_tokens_per_s=load.prefill_tokens_per_s,
        decode_step_s=load.decode_step_s,
        transfer_bytes_per_s=load.transfer_bytes_per_s,
        draining=load.draining,
    )


def load_from_proto(message: worker_pb2.Load) -> Load:
    return Load(
        num_waiting=message.num_waiting,
        num_running=message.num_running,
        waiting_tokens=message.waiting_tokens,
        total_blocks=message.total_blocks,
        free_blocks=message.free_blocks,
        active_blocks=message.active_blocks,
        cached_blocks=message.cached_blocks,
        lent_blocks=message.lent_blocks,
        landing_blocks=message.landing_blocks,
        quarantined_blocks=message.quarantined_blocks,
        booked_blocks=message.booked_blocks,
        prefill_tokens_per_s=message.prefill_tokens_per_s,
        decode_step_s=message.decode_step_s,
        transfer_bytes_per_s=message.transfer_bytes_per_s,
        draining=message.draining,
    )


def step_events_to_proto(events: StepEvents) -> worker_pb2.AttachResponse:
    """One message, however many tokens: columns are packed arrays."""
    columns = events.tokens
    message = worker_pb2.AttachResponse(epoch=events.epoch, step=events.step)
    if events.info is not None:
        message.info.CopyFrom(info_to_proto(events.info))
    if events.load is not None:
        message.load.CopyFrom(load_to_proto(events.load))
    if columns.handles:
        message.tokens.handles.extend(columns.handles)
        message.tokens.choices.extend(columns.choices)
        message.tokens.positions.extend(columns.positions)
        message.tokens.token_ids.extend(columns.token_ids)
        message.tokens.logprobs.extend(logprob_to_proto(value) for value in columns.logprobs or ())
    for finish in events.finished:
        message.finished.add(handle=finish.handle, choice=finish.choice, reason=reason_to_proto(finish.reason))
    for failure in events.failed:
        message.failed.add(handle=failure.handle, error=error_to_proto(failure.error))
    message.reports.extend(report_to_proto(report) for report in events.reports)
    if events.kv_events is not None:
        message.kv_events.CopyFrom(kv_events_to_proto(events.kv_events))
    return message


def step_events_from_proto(message: worker_pb2.AttachResponse) -> StepEvents:
    return StepEvents(
        epoch=message.epoch,
        step=message.step,
        info=info_from_proto(message.info) if message.HasField("info") else None,
        load=load_from_proto(message.load) if message.HasField("load") else None,
        tokens=columns_from_proto(message.tokens),
        finished=[
            ChoiceFinished(f.handle, f.choice, reason_from_proto(f.reason) or FinishReason.STOP)
            for f in message.finished
        ],
        failed=[LegFailed(f.handle, error_from_proto(f.error)) for f in message.failed],
        reports=[report_from_proto(report) for report in message.reports],
        kv_events=kv_events_from_proto(message.kv_events) if message.HasField("kv_events") else None,
    )


def columns_from_proto(message: worker_pb2.TokenColumns) -> TokenColumns:
    columns = TokenColumns(
        list(message.handles), list(message.choices), list(message.positions), list(message.token_ids)
    )
    lengths = {len(columns.handles), len(columns.choices), len(columns.positions), len(columns.token_ids)}
    if len(lengths) != 1 or len(message.logprobs) not in (0, len(columns.handles)):
        raise InvalidRequestError("token columns of different lengths", param="tokens")
    if message.logprobs:
        columns.logprobs = [logprob_from_proto(value) for value in message.logprobs]
    return columns


def report_to_proto(report: LegReport) -> worker_pb2.LegReport:
    return worker_pb2.LegReport(
        handle=report.handle,
        timing=generation_pb2.Timing(
            queue_s=report.queue_s,
            prefill_s=report.prefill_s,
            transfer_s=report.transfer_s,
            transfer_bytes=report.transfer_bytes,
            transport=report.transport,
            decode_s=report.decode_s,
            join_s=report.join_s,
        ),
        cached_tokens=report.cached_tokens,
        cached_tokens_by_tier=report.cached_by_tier,
    )


def report_from_proto(message: worker_pb2.LegReport) -> LegReport:
    timing = message.timing
    return LegReport(
        handle=message.handle,
        queue_s=timing.queue_s,
        prefill_s=timing.prefill_s,
        transfer_s=timing.transfer_s,
        transfer_bytes=timing.transfer_bytes,
        transport=timing.transport,
        decode_s=timing.decode_s,
        join_s=timing.join_s,
        cached_tokens=message.cached_tokens,
        cached_by_tier=dict(message.cached_tokens_by_tier),
    )


# -- lending ----------------------------------------------------------------------------------------------------------


def endpoints_to_proto(peer: PeerEndpoints, layout: KVLayout) -> kv_pb2.MeetResponse:
    message = kv_pb2.MeetResponse(
        worker_id=peer.worker_id,
        epoch=peer.epoch,
        layout=layout_to_proto(layout),
        block_bytes=peer.block_bytes,
        num_blocks=peer.num_blocks,
    )
    if peer.nixl is not None:
        nixl = peer.nixl
        message.nixl.CopyFrom(
            kv_pb2.NixlEndpoint(
                agent_name=nixl.agent_name,
                agent_metadata=nixl.agent_metadata,
                pool_address=nixl.pool_address,
                stamps_address=nixl.stamps_address,
                nonce_address=nixl.nonce_address,
                nonce=nixl.nonce,
                pid=nixl.pid,
                boot_id=nixl.boot_id,
                memory=nixl.memory,
                device=nixl.device,
                rdma_devices=nixl.rdma_devices,
            )
        )
    if peer.stream is not None:
        stream = peer.stream
        message.stream.CopyFrom(kv_pb2.StreamEndpoint(host=stream.host, port=stream.port, tls=stream.tls))
    return message


def endpoints_from_proto(message: kv_pb2.MeetResponse) -> PeerEndpoints:
    nixl, stream = message.nixl, message.stream
    return PeerEndpoints(
        worker_id=message.worker_id,
        epoch=message.epoch,
        block_bytes=message.block_bytes,
        num_blocks=message.num_blocks,
        nixl=NixlEndpoint(
            agent_name=nixl.agent_name,
            agent_metadata=nixl.agent_metadata,
            pool_address=nixl.pool_address,
            stamps_address=nixl.stamps_address,
            nonce_address=nixl.nonce_address,
            nonce=nixl.nonce,
            pid=nixl.pid,
            boot_id=nixl.boot_id,
            memory=nixl.memory,
            device=nixl.device,
            rdma_devices=tuple(nixl.rdma_devices),
        )
        if message.HasField("nixl")
        else None,
        stream=StreamEndpoint(stream.host, stream.port, stream.tls) if message.HasField("stream") else None,
    )


def terms_to_proto(terms: LendTerms) -> kv_pb2.LendRequest:
    return kv_pb2.LendRequest(
        request_id=terms.request_id,
        attempt=terms.attempt,
        ticket=terms.ticket,
        needer_id=terms.needer_id,
        needer_epoch=terms.needer_epoch,
        skip_blocks=terms.skip_blocks,
        transport=terms.transport,
    )


def terms_from_proto(message: kv_pb2.LendRequest) -> LendTerms:
    if message.block_hashes:
        raise InvalidRequestError("this owner lends by ticket only", param="block_hashes")
    return LendTerms(
        request_id=message.request_id,
        attempt=message.attempt,
        ticket=message.ticket,
        needer_id=message.needer_id,
        needer_epoch=message.needer_epoch,
        transport=message.transport,
        skip_blocks=message.skip_blocks,
    )


def lent_to_proto(lent: LentBlocks) -> kv_pb2.LendResponse:
    return kv_pb2.LendResponse(
        ready=kv_pb2.LendReady(
            first_index=lent.first_index, blocks=lent.blocks, addresses=lent.addresses, generations=lent.generations
        )
    )


def done_to_proto(done: LendDone) -> kv_pb2.LendResponse:
    return kv_pb2.LendResponse(
        done=kv_pb2.LendDone(
            first_tokens=[
                kv_pb2.FirstToken(
                    choice=token.choice,
                    token_id=token.token_id,
                    logprob=None if token.logprob is None else logprob_to_proto(token.logprob),
                    finish_reason=reason_to_proto(token.finish_reason),
                )
                for token in done.first_tokens
            ],
            last_block_tokens=done.last_block_tokens,
            cached_tokens=done.cached_tokens,
            queue_s=done.queue_s,
            prefill_s=done.prefill_s,
        )
    )


def lend_event_from_proto(message: kv_pb2.LendResponse) -> LentBlocks | LendDone:
    if message.HasField("ready"):
        ready = message.ready
        lent = LentBlocks(ready.first_index, list(ready.blocks), list(ready.addresses), list(ready.generations))
        if not len(lent.blocks) == len(lent.addresses) == len(lent.generations):
            raise InvalidRequestError("blocks, addresses and generations differ in length", param="ready")
        return lent
    done = message.done
    return LendDone(
        first_tokens=tuple(_first_token(token) for token in done.first_tokens),
        last_block_tokens=done.last_block_tokens,
        cached_tokens=done.cached_tokens,
        queue_s=done.queue_s,
        prefill_s=done.prefill_s,
    )


def _first_token(message: kv_pb2.FirstToken) -> FirstToken:
    logprob = logprob_from_proto(message.logprob) if message.HasField("logprob") else None
    return FirstToken(message.choice, message.token_id, logprob, reason_from_proto(message.finish_reason))


# -- ledger -----------------------------------------------------------------------------------------------------------


def ledger_to_proto(report: LedgerReport) -> control_pb2.Ledger:
    return control_pb2.Ledger(
        worker_id=report.worker_id,
        epoch=report.epoch,
        total=report.total,
        free=report.free,
        active=report.active,
        cached=report.cached,
        lent=report.lent,
        landing=report.landing,
        quarantined=report.quarantined,
        holdings=[
            control_pb2.Holding(holder=h.holder, state=h.state, blocks=h.blocks, age_s=h.age_s) for h in report.holdings
        ],
    )


def ledger_from_proto(message: control_pb2.Ledger) -> LedgerReport:
    return LedgerReport(
        worker_id=message.worker_id,
        epoch=message.epoch,
        total=message.total,
        free=message.free,
        active=message.active,
        cached=message.cached,
        lent=message.lent,
        landing=message.landing,
        quarantined=message.quarantined,
        holdings=tuple(_holdings(message.holdings)),
    )


def _holdings(messages: Iterable[control_pb2.Holding]) -> Iterable[Holding]:
    return (Holding(h.holder, HoldingState(h.state), tuple(h.blocks), h.age_s) for h in messages)
