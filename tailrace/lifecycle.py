"""A request's life: one enum, one transition table, a timestamp at each move."""

from dataclasses import dataclass, field
from enum import StrEnum


class RequestState(StrEnum):
    RECEIVED = "received"
    ROUTED = "routed"
    QUEUED = "queued"
    PREFILLING = "prefilling"
    TRANSFERRING = "transferring"
    DECODING = "decoding"
    FINISHED = "finished"
    FAILED = "failed"
    CANCELLED = "cancelled"


_S = RequestState
_ENDS = frozenset({_S.FINISHED, _S.FAILED, _S.CANCELLED})
TRANSITIONS: dict[RequestState, frozenset[RequestState]] = {
    _S.RECEIVED: frozenset({_S.ROUTED, _S.FAILED, _S.CANCELLED}),
    # A lost worker sends a request back to ROUTED, whatever it was doing.
    _S.ROUTED: frozenset({_S.QUEUED, _S.ROUTED}) | _ENDS,
    _S.QUEUED: frozenset({_S.PREFILLING, _S.ROUTED}) | _ENDS,
    _S.PREFILLING: frozenset({_S.TRANSFERRING, _S.DECODING, _S.ROUTED}) | _ENDS,
    _S.TRANSFERRING: frozenset({_S.DECODING, _S.ROUTED}) | _ENDS,
    _S.DECODING: frozenset({_S.ROUTED}) | _ENDS,
    _S.FINISHED: frozenset(),
    _S.FAILED: frozenset(),
    _S.CANCELLED: frozenset(),
}


class InvalidTransitionError(Exception):
    """A defect of ours: a request was moved along an edge that the table does not have."""


@dataclass(slots=True)
class Lifecycle:
    """`now` is always passed in (monotonic seconds): the table itself has no clock."""

    state: RequestState = RequestState.RECEIVED
    moves: list[tuple[RequestState, float]] = field(default_factory=list)

    @classmethod
    def begin(cls, now: float) -> "Lifecycle":
        return cls(moves=[(RequestState.RECEIVED, now)])

    def move(self, to: RequestState, now: float) -> None:
        """Raises InvalidTransitionError when the table does not allow it; nothing changes then."""
        if to not in TRANSITIONS[self.state]:
            raise InvalidTransitionError(f"{self.state} -> {to}")
        self.state = to
        self.moves.append((to, now))

    @property
    def is_over(self) -> bool:
        return self.state in _ENDS

    def spent_s(self, state: RequestState) -> float:
        """Seconds spent in `state` so far, without the running one."""
        ends = [at for _, at in self.moves[1:]]
        return sum(end - at for (was, at), end in zip(self.moves, ends, strict=False) if was is state)
