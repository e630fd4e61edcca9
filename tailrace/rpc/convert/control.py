"""The ledger: how many blocks are in which state, and who holds what."""

from collections.abc import Iterable

from tailrace.errors import InvalidRequestError
from tailrace.messages import Holding, HoldingState, LedgerReport
from tailrace.rpc.gen import control_pb2

_STATES = {state.value: state for state in HoldingState}


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
    for message in messages:
        if message.state not in _STATES:
            raise InvalidRequestError(f"unknown state {message.state!r} of a holding", param="state")
        yield Holding(message.holder, _STATES[message.state], tuple(message.blocks), message.age_s)
