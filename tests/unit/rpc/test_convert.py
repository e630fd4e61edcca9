"""What goes on the wire comes off it alike; what no peer of ours could have sent is refused by name."""

from typing import TypeVar

import pytest
from google.protobuf.message import Message
from hypothesis import given
from hypothesis import strategies as st

from tailrace import errors
from tailrace.errors import ErrorCode, InvalidRequestError, TailraceError
from tailrace.kv.events import KVEvent, KVEventKind, KVEvents, Tier
from tailrace.kv.layout import LayerGroup
from tailrace.messages import (
    ChoiceFinished,
    Fetch,
    FirstToken,
    Holding,
    HoldingState,
    KvEventBatch,
    LedgerReport,
    LegFailed,
    LegReport,
    LendDone,
    LendTerms,
    LentBlocks,
    LinkCount,
    Load,
    OwnerRate,
    PrefixSource,
    StepEvents,
    Submission,
    TokenColumns,
)
from tailrace.rpc import convert
from tailrace.rpc.gen import control_pb2, error_pb2, kv_pb2, worker_pb2
from tailrace.transfer.endpoints import NixlEndpoint, PeerEndpoints, StreamEndpoint
from tailrace.types import FinishReason, Role, SamplingParams, TokenLogprob
from tests.helpers.values import make_info, make_layout, make_source, make_submission

M = TypeVar("M", bound=Message)
u32 = st.integers(0, 2**32 - 1)
u64 = st.integers(0, 2**64 - 1)
f32 = st.floats(width=32, allow_nan=False)
f64 = st.floats(allow_nan=False)
text = st.text(max_size=8)
block_hashes = st.binary(min_size=16, max_size=16)
kv_event = st.builds(KVEvent, st.just(KVEventKind.PUBLISH), block_hashes, st.sampled_from(Tier)) | st.builds(
    KVEvent, st.just(KVEventKind.RETRACT), block_hashes
)
logprobs = st.builds(TokenLogprob, f32, st.lists(st.tuples(u32, f32), max_size=3).map(tuple))
sampling = st.builds(
    SamplingParams,
    max_tokens=u32,
    temperature=f32,
    top_k=u32,
    top_p=f32,
    min_p=f32,
    repetition_penalty=f32,
    presence_penalty=f32,
    frequency_penalty=f32,
    logit_bias=st.dictionaries(u32, f32, max_size=3).map(lambda bias: tuple(sorted(bias.items()))),
    min_tokens=u32,
    ignore_eos=st.booleans(),
    stop_token_ids=st.lists(u32, max_size=3).map(tuple),
    logprobs=st.none() | st.integers(0, 20),
    seed=u64,
)


def wired(message: M) -> M:
    """Through bytes, as a peer gets it."""
    return type(message).FromString(message.SerializeToString())


# -- errors and sampling ----------------------------------------------------------------------------------------------

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, TailraceError)]


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_keeps_its_meaning(kind: type[TailraceError]) -> None:
    back = convert.error_from_proto(wired(convert.error_to_proto(kind("what", param="field", retry_after_s=1.5))))
    assert (back.code, back.message, back.param, back.retry_after_s) == (kind.code, "what", "field", 1.5)
    assert back.retryable == kind.retryable


def test_every_code_has_an_error_and_no_param_stays_none() -> None:
    for code in ErrorCode:
        back = convert.error_from_proto(error_pb2.Error(code=int(code)))  # type: ignore[arg-type]
        assert (back.code, back.param) == (code, None)


@pytest.mark.parametrize("code", [0, 999])
def test_an_unknown_error_is_an_internal_one(code: int) -> None:
    assert convert.error_from_proto(error_pb2.Error(code=code)).code is ErrorCode.INTERNAL  # type: ignore[arg-type]


@given(sampling)
def test_sampling(params: SamplingParams) -> None:
    assert convert.sampling_from_proto(wired(convert.sampling_to_proto(params))) == params


def test_unset_sampling_has_the_defaults_of_the_api() -> None:
    message = convert.sampling_to_proto(SamplingParams())
    for name in ("max_tokens", "temperature", "top_p", "repetition_penalty", "seed"):
        message.ClearField(name)  # type: ignore[arg-type]
    assert convert.sampling_from_proto(message, seed=9, max_tokens=77) == SamplingParams(seed=9, max_tokens=77)


@given(logprobs)
def test_logprobs(value: TokenLogprob) -> None:
    assert convert.logprob_from_proto(wired(convert.logprob_to_proto(value))) == value


def test_logprobs_of_different_lengths_are_refused() -> None:
    message = convert.logprob_to_proto(TokenLogprob(-1.0, ((1, -1.0),)))
    message.top_ids.append(5)
    with pytest.raises(InvalidRequestError) as refusal:
        convert.logprob_from_proto(message)
    assert refusal.value.param == "logprobs"


def test_reasons() -> None:
    for reason in (*FinishReason, None):
        assert convert.reason_from_proto(convert.reason_to_proto(reason)) is reason
    assert convert.reason_from_proto(99) is FinishReason.STOP


# -- layouts and events -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"groups": (LayerGroup("full", (0,)), LayerGroup("sliding_window", (1,), 8)), "kv_scales": "s"},
        {"tensor_parallel_rank": 1, "tensor_parallel_size": 2, "quantization": "int4", "kv_dtype": "bfloat16"},
    ],
)
def test_layouts(fields: dict[str, object]) -> None:
    layout = make_layout(**fields)
    message = wired(convert.layout_to_proto(layout))
    assert convert.layout_from_proto(message) == layout
    assert message.fingerprint == layout.fingerprint


def test_a_layout_that_cannot_be_is_refused_by_field() -> None:
    message = convert.layout_to_proto(make_layout())
    message.block_size = 0
    with pytest.raises(TailraceError) as refusal:
        convert.layout_from_proto(message)
    assert refusal.value.param == "block_size"


@given(st.builds(KvEventBatch, u64, u64, st.lists(kv_event).map(KVEvents.of)))
def test_kv_events(batch: KvEventBatch) -> None:
    assert convert.kv_events_from_proto(wired(convert.kv_events_to_proto(batch))) == batch


def test_an_event_of_an_unknown_kind_keeps_its_number() -> None:
    message = convert.kv_events_to_proto(KvEventBatch(1, 5, KVEvents.published([b"x" * 16] * 2)))
    message.kinds = bytes([77]) + message.kinds[1:]
    events = convert.kv_events_from_proto(message).events
    assert [event.kind for event in events] == [KVEventKind.RETRACT, KVEventKind.PUBLISH]


def test_columns_of_different_lengths_are_refused_by_field() -> None:
    message = convert.kv_events_to_proto(KvEventBatch(1, 5, KVEvents.published([b"x" * 16] * 2)))
    message.hashes += b"y"
    with pytest.raises(TailraceError, match="33 bytes for 2 events; a block hash has 16") as refusal:
        convert.kv_events_from_proto(message)
    assert refusal.value.param == "kv_events.hashes"


# -- attach -----------------------------------------------------------------------------------------------------------


sources = st.builds(make_source, worker_id=text, epoch=u64, address=text, ticket=st.binary())


@given(
    st.builds(
        make_submission,
        u64,
        request_id=text,
        attempt=u32,
        tokens=st.lists(u32, min_size=3, max_size=9),
        num_prompt_tokens=st.integers(1, 3),
        sampling=sampling,
        choices=st.tuples(st.integers(0, 5), st.integers(1, 4)).map(lambda c: tuple(range(c[0], c[0] + c[1]))),
        priority=st.integers(-(2**31), 2**31 - 1),
        deadline_s=st.floats(0, 1e6),
        ticket=st.binary(max_size=4),
        cache_salt=text,
        source=st.none() | sources,
        prefix_sources=st.lists(st.builds(PrefixSource, sources, u32, u32), max_size=2).map(tuple),
        traceparent=text,
        tracestate=text,
    )
)
def test_submissions(submission: Submission) -> None:
    assert convert.submission_from_proto(wired(convert.submission_to_proto(submission))) == submission


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_prompt_tokens", 0),
        ("num_prompt_tokens", 11),
        ("num_choices", 0),
        ("num_choices", convert.MAX_CHOICES + 1),
        ("deadline_s", float("nan")),
        ("deadline_s", float("inf")),
        ("deadline_s", -1.0),
        ("cache_salt", "\u00e4" * 1025),
    ],
)
def test_a_submission_that_no_gateway_sends_is_refused_by_field(field: str, value: float | str) -> None:
    message = convert.submission_to_proto(make_submission())
    setattr(message, field, value)
    with pytest.raises(InvalidRequestError) as refusal:
        convert.submission_from_proto(message)
    assert refusal.value.param == field
    assert "\u00e4" not in refusal.value.message, "salts are not for logs"


def test_more_prefix_sources_than_any_gateway_names_are_refused() -> None:
    piece = PrefixSource(make_source(), 0, 1)
    message = convert.submission_to_proto(make_submission(prefix_sources=(piece,) * (convert.MAX_PREFIX_SOURCES + 1)))
    with pytest.raises(InvalidRequestError, match="65 prefix sources, not 0 to 64") as refusal:
        convert.submission_from_proto(message)
    assert refusal.value.param == "prefix_sources"


@pytest.mark.parametrize("role", Role)
def test_worker_info(role: Role) -> None:
    info = make_info(role)
    assert convert.info_from_proto(wired(convert.info_to_proto(info))) == info


def test_a_role_that_we_do_not_know_is_refused() -> None:
    with pytest.raises(InvalidRequestError) as refusal:
        convert.info_from_proto(worker_pb2.WorkerInfo(worker_id="w"))
    assert refusal.value.param == "role"


owners = st.none() | st.lists(st.builds(OwnerRate, text, f64), max_size=3).map(tuple)
links = st.lists(st.builds(LinkCount, st.text(max_size=4), st.text(max_size=4), u32), max_size=2).map(tuple)
loads = st.builds(Load, u32, u32, *[u64] * 9, f64, f64, f64, st.booleans(), f64, f64, f64, owners, links)


@given(loads)
def test_load(load: Load) -> None:
    assert convert.load_from_proto(wired(convert.load_to_proto(load))) == load


rows = st.lists(st.tuples(u64, u32, u32, u32), max_size=4)


@st.composite
def columns(draw: st.DrawFn) -> TokenColumns:
    found = TokenColumns()
    with_logprobs = draw(st.booleans())
    for row in draw(rows):
        found.add(*row, draw(logprobs) if with_logprobs else None)
    return found


reports = st.builds(
    LegReport,
    u64, f64, f64, f64, u64, text, f64, f64, u32, st.dictionaries(text, u32, max_size=2),
    st.lists(st.builds(Fetch, text, u32, u32, u64, f64), max_size=2).map(tuple),
)  # fmt: skip


@given(
    st.builds(
        StepEvents,
        u64,
        u64,
        st.none() | st.just(make_info()),
        st.none() | loads,
        columns(),
        st.lists(st.builds(ChoiceFinished, u64, u32, st.sampled_from(FinishReason)), max_size=2),
        st.just([]),
        st.lists(reports, max_size=2),
        st.none() | st.just(KvEventBatch(1, 2, KVEvents.retracted([b"h" * 16]))),
    )
)
def test_step_events(events: StepEvents) -> None:
    assert convert.step_events_from_proto(wired(convert.step_events_to_proto(events))) == events


def test_failed_legs() -> None:
    error = errors.OverloadedError("full", retry_after_s=2.0)
    events = convert.step_events_from_proto(
        wired(convert.step_events_to_proto(StepEvents(failed=[LegFailed(5, error)])))
    )
    assert [(f.handle, type(f.error), f.error.retry_after_s) for f in events.failed] == [
        (5, errors.OverloadedError, 2.0)
    ]


def test_columns_of_different_lengths_are_refused() -> None:
    for message in (
        worker_pb2.TokenColumns(handles=[1, 2], choices=[0, 0], positions=[3, 3], token_ids=[4]),
        worker_pb2.TokenColumns(
            handles=[1, 2], choices=[0, 0], positions=[3, 3], token_ids=[4, 5], logprobs=[{"logprob": -1.0}]
        ),
    ):
        with pytest.raises(InvalidRequestError) as refusal:
            convert.columns_from_proto(message)
        assert refusal.value.param == "tokens"


# -- lending and ledger -----------------------------------------------------------------------------------------------

NIXL = NixlEndpoint("a", b"m", 2**47, 2**46, 2**45, b"n", 12, "boot", "dram", 1, ("mlx5_0",))


@pytest.mark.parametrize("nixl", [NIXL, None])
@pytest.mark.parametrize("stream", [StreamEndpoint("h", 99, True), None])
def test_endpoints(nixl: NixlEndpoint | None, stream: StreamEndpoint | None) -> None:
    peer = PeerEndpoints("w", 3, 4096, 17, nixl, stream)
    message = wired(convert.endpoints_to_proto(peer, make_layout()))
    assert convert.endpoints_from_proto(message) == peer
    assert convert.layout_from_proto(message.layout) == make_layout()


@given(st.builds(LendTerms, text, u32, st.binary(), text, u64, text, u32))
def test_terms(terms: LendTerms) -> None:
    assert convert.terms_from_proto(wired(convert.terms_to_proto(terms))) == terms


def test_lending_by_hash_is_refused() -> None:
    with pytest.raises(InvalidRequestError) as refusal:
        convert.terms_from_proto(kv_pb2.LendRequest(block_hashes=[b"h"]))
    assert refusal.value.param == "block_hashes"


@given(u32, st.lists(st.tuples(u32, u64, u64, st.sampled_from(Tier)), max_size=4), st.booleans())
def test_lent_blocks(first: int, table: list[tuple[int, int, int, Tier]], has_tiers: bool) -> None:
    tiers = bytes(row[3] for row in table) if has_tiers else b""
    lent = LentBlocks(first, *[[row[at] for row in table] for at in range(3)], tiers)
    assert convert.lend_event_from_proto(wired(convert.lent_to_proto(lent))) == lent


def test_lent_blocks_of_different_lengths_are_refused() -> None:
    for message in (
        kv_pb2.LendReady(blocks=[1, 2], addresses=[1], generations=[1, 2]),
        kv_pb2.LendReady(blocks=[1, 2], addresses=[1, 2], generations=[1, 2], tiers=b"\0"),
    ):
        with pytest.raises(InvalidRequestError) as refusal:
            convert.lend_event_from_proto(kv_pb2.LendResponse(ready=message))
        assert refusal.value.param == "ready"


firsts = st.builds(FirstToken, u32, u32, st.none() | logprobs, st.none() | st.sampled_from(FinishReason))


@given(st.builds(LendDone, st.lists(firsts, max_size=3).map(tuple), u32, u32, f64, f64))
def test_lend_done(done: LendDone) -> None:
    assert convert.lend_event_from_proto(wired(convert.done_to_proto(done))) == done


def test_ledgers() -> None:
    holdings = tuple(Holding(f"r/{state}", state, (1, 2), 0.5) for state in HoldingState)
    report = LedgerReport("w", 7, 10, 1, 2, 3, 1, 1, 2, holdings)
    assert convert.ledger_from_proto(wired(convert.ledger_to_proto(report))) == report


def test_a_holding_in_an_unknown_state_is_refused() -> None:
    with pytest.raises(InvalidRequestError) as refusal:
        convert.ledger_from_proto(control_pb2.Ledger(holdings=[control_pb2.Holding(state="gone")]))
    assert refusal.value.param == "state"
