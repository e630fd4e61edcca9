import pytest

from tailrace.kv.events import KVEvent, KVEventKind, KVEvents, Tier

A, B, C = (letter * 16 for letter in (b"a", b"b", b"c"))
EVENTS = [
    KVEvent(KVEventKind.PUBLISH, A),
    KVEvent(KVEventKind.PUBLISH, B, Tier.NVME),
    KVEvent(KVEventKind.RETRACT, A),
    KVEvent(KVEventKind.PUBLISH, C, Tier.NVME),
]


def test_columns_are_the_events_they_were_made_of() -> None:
    columns = KVEvents.of(EVENTS)
    assert (list(columns), len(columns), columns[-1]) == (EVENTS, 4, EVENTS[-1])
    assert list(columns[1:3]) == EVENTS[1:3]
    assert list(columns[9:]) == []
    assert list(columns[::-2]) == EVENTS[::-2]
    assert list(columns + columns[:1]) == [*EVENTS, EVENTS[0]]
    assert KVEvents.of(columns) is columns
    with pytest.raises(IndexError):
        columns[4]


def test_what_was_published_on_a_tier() -> None:
    assert KVEvents.of(EVENTS).published_on(Tier.NVME) == [B, C]
    assert KVEvents.published([A, B], Tier.CPU).published_on(Tier.CPU) == [A, B]
    assert KVEvents.retracted([A]).published_on(Tier.WORKER) == []


@pytest.mark.parametrize("hashes", [[b"short"], [A + b"x", A[1:]]])
def test_a_hash_of_another_length_is_refused(hashes: list[bytes]) -> None:
    with pytest.raises(ValueError, match=f"a block hash has 16 bytes, not {len(hashes[0])}"):
        KVEvents.published(hashes)


def test_columns_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="hashes: 31 bytes for 2 events; a block hash has 16"):
        KVEvents(b"\1\1", bytes(31))
