import pytest

from tailrace.lifecycle import TRANSITIONS, InvalidTransitionError, Lifecycle, RequestState

S = RequestState
ENDS = [S.FINISHED, S.FAILED, S.CANCELLED]
WAY = [S.ROUTED, S.QUEUED, S.PREFILLING, S.TRANSFERRING, S.DECODING, S.FINISHED]


def test_the_usual_way_is_timed_at_each_move() -> None:
    life = Lifecycle.begin(10.0)
    for at, state in enumerate(WAY, start=1):
        life.move(state, 10.0 + at * at)
    assert life.is_over
    assert [life.spent_s(state) for state in (S.RECEIVED, *WAY)] == [1.0, 3.0, 5.0, 7.0, 9.0, 11.0, 0.0]


def test_a_lost_worker_sends_it_back_and_both_stays_count() -> None:
    life = Lifecycle.begin(0.0)
    for at, state in enumerate([S.ROUTED, S.QUEUED, S.PREFILLING, S.ROUTED, S.QUEUED, S.FAILED], start=1):
        life.move(state, float(at))
    assert life.spent_s(S.QUEUED) == 2.0


def test_a_wrong_move_changes_nothing() -> None:
    life = Lifecycle.begin(0.0)
    with pytest.raises(InvalidTransitionError, match="received -> decoding"):
        life.move(S.DECODING, 1.0)
    assert (life.state, len(life.moves)) == (S.RECEIVED, 1)


@pytest.mark.parametrize("end", ENDS)
def test_an_end_is_an_end(end: RequestState) -> None:
    assert TRANSITIONS[end] == frozenset()


@pytest.mark.parametrize("state", [state for state in S if state not in ENDS])
def test_whatever_has_not_ended_may_fail_or_be_cancelled(state: RequestState) -> None:
    assert {S.FAILED, S.CANCELLED} <= TRANSITIONS[state]


def test_the_table_names_every_state() -> None:
    assert TRANSITIONS.keys() == set(S)
