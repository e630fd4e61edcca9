"""`Attach`, both ways: submissions down, one message a step up."""

import math

from tailrace.errors import InvalidRequestError
from tailrace.kv.hashing import MAX_SALT_LENGTH
from tailrace.messages import (
    ChoiceFinished,
    Fetch,
    KvSource,
    LegFailed,
    LegReport,
    LinkCount,
    Load,
    OwnerRate,
    PrefixSource,
    StepEvents,
    Submission,
    TokenColumns,
    WorkerInfo,
)
from tailrace.rpc.convert.errors import error_from_proto, error_to_proto
from tailrace.rpc.convert.layout import kv_events_from_proto, kv_events_to_proto, layout_from_proto, layout_to_proto
from tailrace.rpc.convert.sampling import (
    logprob_from_proto,
    logprob_to_proto,
    reason_from_proto,
    reason_to_proto,
    sampling_from_proto,
    sampling_to_proto,
)
from tailrace.rpc.gen import generation_pb2, worker_pb2
from tailrace.types import FinishReason, Role

MAX_CHOICES = 1024
"""No worker takes more choices of one request, whatever its gateway allows."""
MAX_PREFIX_SOURCES = 64
"""Of one request."""
MAX_OWNERS = 4096
"""Whose rates one worker tells; what it tells beyond is not read."""
_ROLES = {
    worker_pb2.WORKER_ROLE_PREFILL: Role.PREFILL,
    worker_pb2.WORKER_ROLE_DECODE: Role.DECODE,
    worker_pb2.WORKER_ROLE_KVSTORE: Role.KVSTORE,
}
_ROLE_NUMBERS = {role: number for number, role in _ROLES.items()}


# -- gateway -> worker ------------------------------------------------------------------------------------------------


def submission_to_proto(submission: Submission) -> worker_pb2.Submit:
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
        source=_source_to_proto(submission.source) if submission.source is not None else None,
        prefix_sources=[
            worker_pb2.PrefixSource(
                source=_source_to_proto(piece.source), first_block=piece.first_block, num_blocks=piece.num_blocks
            )
            for piece in submission.prefix_sources
        ],
    )


def _source_to_proto(source: KvSource) -> worker_pb2.KvSource:
    return worker_pb2.KvSource(
        worker_id=source.worker_id, epoch=source.epoch, address=source.address, ticket=source.ticket
    )


def _source_from_proto(message: worker_pb2.KvSource) -> KvSource:
    return KvSource(message.worker_id, message.epoch, message.address, message.ticket)


def submission_from_proto(message: worker_pb2.Submit) -> Submission:
    if not 1 <= message.num_prompt_tokens <= len(message.token_ids):
        raise InvalidRequestError(
            f"num_prompt_tokens={message.num_prompt_tokens} with {len(message.token_ids)} token ids",
            param="num_prompt_tokens",
        )
    if not 1 <= message.num_choices <= MAX_CHOICES:
        raise InvalidRequestError(f"num_choices={message.num_choices}, not 1 to {MAX_CHOICES}", param="num_choices")
    if not (math.isfinite(message.deadline_s) and message.deadline_s >= 0):
        raise InvalidRequestError(f"deadline_s={message.deadline_s}, not 0 or more seconds", param="deadline_s")
    if len(message.cache_salt) > MAX_SALT_LENGTH:
        raise InvalidRequestError(
            f"cache_salt: at most {MAX_SALT_LENGTH} characters, not {len(message.cache_salt)}", param="cache_salt"
        )
    if len(message.prefix_sources) > MAX_PREFIX_SOURCES:
        raise InvalidRequestError(
            f"{len(message.prefix_sources)} prefix sources, not 0 to {MAX_PREFIX_SOURCES}", param="prefix_sources"
        )
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
        source=_source_from_proto(message.source) if message.HasField("source") else None,
        prefix_sources=tuple(
            PrefixSource(_source_from_proto(piece.source), piece.first_block, piece.num_blocks)
            for piece in message.prefix_sources
        ),
        traceparent=message.trace.traceparent,
        tracestate=message.trace.tracestate,
    )


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
        prefill_curve_s=load.prefill_curve_s,
        decode_base_s=load.decode_base_s,
        decode_row_s=load.decode_row_s,
        owners=_owners_to_proto(load.owners) if load.owners is not None else None,
        links=[
            worker_pb2.LinkCount(transport=link.transport, why_not_nixl=link.why_not_nixl, num=link.num)
            for link in load.links
        ],
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
        prefill_curve_s=message.prefill_curve_s,
        decode_base_s=message.decode_base_s,
        decode_row_s=message.decode_row_s,
        owners=_owners_from_proto(message.owners) if message.HasField("owners") else None,
        links=tuple(LinkCount(link.transport, link.why_not_nixl, link.num) for link in message.links),
    )


def _owners_to_proto(owners: tuple[OwnerRate, ...]) -> worker_pb2.OwnerRates:
    rates = [worker_pb2.OwnerRate(owner_id=each.owner_id, bytes_per_s=each.bytes_per_s) for each in owners]
    return worker_pb2.OwnerRates(rates=rates)


def _owners_from_proto(message: worker_pb2.OwnerRates) -> tuple[OwnerRate, ...]:
    return tuple(OwnerRate(rate.owner_id, rate.bytes_per_s) for rate in message.rates[:MAX_OWNERS])


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
        fetches=[
            worker_pb2.Fetch(
                holder_id=fetch.holder_id,
                num_asked=fetch.num_asked,
                num_blocks=fetch.num_blocks,
                num_bytes=fetch.num_bytes,
                seconds=fetch.seconds,
            )
            for fetch in report.fetches
        ],
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
        fetches=tuple(
            Fetch(fetch.holder_id, fetch.num_asked, fetch.num_blocks, fetch.num_bytes, fetch.seconds)
            for fetch in message.fetches
        ),
    )
