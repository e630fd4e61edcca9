import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailrace.index.memory import MemoryIndex
from tailrace.index.prefix_index import PrefixHit
from tailrace.kv.events import KVEvent, KVEventKind, Tier

A, B, C, D, X = (letter.encode() for letter in "abcdx")
CHAIN = [A, B, C, D]


def publish(*hashes: bytes) -> list[KVEvent]:
    return [KVEvent(KVEventKind.PUBLISH, block_hash) for block_hash in hashes]


def retract(*hashes: bytes) -> list[KVEvent]:
    return [KVEvent(KVEventKind.RETRACT, block_hash) for block_hash in hashes]


# -- lookup -----------------------------------------------------------------------------------------------------------


def test_each_worker_is_named_with_its_own_depth() -> None:
    index = MemoryIndex()
    index.publish("p0", 1, CHAIN)
    index.publish("p1", 1, [A, B])
    index.publish("p2", 1, [B, C, D])
    index.publish("d0", 1, [A, C])
    assert index.longest_prefix(CHAIN) == {"p0": 4, "p1": 2, "d0": 1}
    assert index.longest_prefix([A, X]) == {"p0": 1, "p1": 1, "d0": 1}
    assert index.longest_prefix([X, A]) == {}
    assert index.longest_prefix([]) == {}


def test_retracted_blocks_end_the_prefix() -> None:
    index = MemoryIndex()
    index.publish("p0", 1, CHAIN)
    index.retract("p0", 1, [C, X])
    assert index.longest_prefix(CHAIN) == {"p0": 2}
    index.publish("p0", 1, [C])
    assert index.longest_prefix(CHAIN) == {"p0": 4}


def test_one_workers_retraction_leaves_the_others() -> None:
    index = MemoryIndex()
    index.publish("p0", 1, CHAIN)
    index.publish("p1", 1, CHAIN)
    index.retract("p0", 1, CHAIN)
    assert index.longest_prefix(CHAIN) == {"p1": 4}


def test_a_dropped_worker_is_forgotten_and_its_place_reused() -> None:
    index = MemoryIndex()
    index.publish("p0", 1, CHAIN)
    index.publish("p1", 1, [A])
    index.drop_worker("p0")
    index.drop_worker("never seen")
    assert index.longest_prefix(CHAIN) == {"p1": 1}
    index.publish("p2", 1, [A, B])
    assert index.longest_prefix(CHAIN) == {"p1": 1, "p2": 2}
    index.drop_worker("p1")
    index.drop_worker("p2")
    assert repr(index) == "<MemoryIndex 0 blocks: >"


def test_tiers_are_counted_and_a_block_that_moves_is_counted_where_it_is() -> None:
    index = MemoryIndex()
    index.publish("s0", 1, CHAIN, Tier.CPU)
    index.apply("s0", 1, 0, [KVEvent(KVEventKind.PUBLISH, B, Tier.NVME), *retract(D)])
    index.publish("p0", 1, [A])
    assert index.longest_prefix_by_tier(CHAIN) == {"s0": PrefixHit(3, (0, 2, 1)), "p0": PrefixHit(1, (1, 0, 0))}


# -- epochs -----------------------------------------------------------------------------------------------------------


def test_a_new_epoch_replaces_what_the_old_one_held() -> None:
    index = MemoryIndex()
    index.publish("p0", 1, CHAIN)
    index.publish("p0", 2, [A])
    assert index.longest_prefix(CHAIN) == {"p0": 1}


def test_an_old_epoch_is_ignored() -> None:
    index = MemoryIndex()
    index.publish("p0", 2, [A, B])
    index.publish("p0", 1, [C])
    index.retract("p0", 1, [A])
    index.reset("p0", 1, [], 9)
    assert index.apply("p0", 1, 0, retract(A))
    assert index.longest_prefix(CHAIN) == {"p0": 2}


# -- numbered events --------------------------------------------------------------------------------------------------


def test_events_apply_in_order() -> None:
    index = MemoryIndex()
    assert index.apply("p0", 1, 0, publish(A, B))
    assert index.apply("p0", 1, 2, [*publish(C), *retract(B), *publish(B)])
    assert index.apply("p0", 1, 5, [])
    assert index.longest_prefix(CHAIN) == {"p0": 3}


def test_a_gap_is_refused_and_changes_nothing_until_a_reset() -> None:
    index = MemoryIndex()
    assert index.apply("p0", 1, 0, publish(A))
    assert not index.apply("p0", 1, 2, publish(B))
    assert not index.apply("p0", 1, 2, [])
    assert index.longest_prefix(CHAIN) == {"p0": 1}
    index.reset("p0", 1, [A, B, C], 7)
    assert not index.apply("p0", 1, 8, publish(D))
    assert index.apply("p0", 1, 7, publish(D))
    assert index.longest_prefix(CHAIN) == {"p0": 4}


def test_repeated_and_overlapping_events_apply_once() -> None:
    index = MemoryIndex()
    index.apply("p0", 1, 0, [*publish(A), *retract(A)])
    assert index.apply("p0", 1, 0, publish(A))
    assert index.longest_prefix([A]) == {}
    assert index.apply("p0", 1, 1, [*retract(A), *publish(A)])
    assert index.longest_prefix([A]) == {"p0": 1}
    assert index.apply("p0", 1, 3, publish(B))


def test_a_new_epoch_counts_from_the_beginning() -> None:
    index = MemoryIndex()
    index.apply("p0", 1, 0, publish(A, B))
    assert not index.apply("p0", 2, 2, publish(C))
    assert index.longest_prefix(CHAIN) == {"p0": 2}
    assert index.apply("p0", 2, 0, publish(A))
    assert index.longest_prefix(CHAIN) == {"p0": 1}


def test_a_worker_first_seen_late_needs_a_snapshot() -> None:
    index = MemoryIndex()
    assert not index.apply("p0", 1, 3, publish(D))
    assert index.longest_prefix([D]) == {}


def test_reset_replaces_everything() -> None:
    index = MemoryIndex()
    index.publish("p0", 1, CHAIN)
    index.reset("p0", 1, [A], 5)
    assert index.longest_prefix(CHAIN) == {"p0": 1}


# -- bounds -----------------------------------------------------------------------------------------------------------


def test_beyond_its_limit_a_workers_earliest_block_is_forgotten() -> None:
    index = MemoryIndex(max_blocks_per_worker=2)
    index.publish("p0", 1, [D, A, B])
    index.publish("p1", 1, [D])
    assert index.num_blocks("p0") == 2
    assert index.longest_prefix(CHAIN) == {"p0": 2}
    assert index.longest_prefix([D]) == {"p1": 1}


def test_a_known_pool_size_lowers_the_limit_and_lasts_for_the_epoch() -> None:
    index = MemoryIndex(max_blocks_per_worker=3)
    index.reset("p0", 1, CHAIN, 0, max_blocks=2)
    assert index.num_blocks("p0") == 2
    index.reset("p0", 1, CHAIN, 0)
    assert index.num_blocks("p0") == 2
    index.reset("p0", 2, CHAIN, 0)
    assert index.num_blocks("p0") == 3
    index.reset("p0", 2, CHAIN, 0, max_blocks=9)
    assert index.num_blocks("p0") == 3


def test_publishing_again_takes_no_room() -> None:
    index = MemoryIndex(max_blocks_per_worker=2)
    index.publish("p0", 1, [A, B, A, B])
    assert index.longest_prefix(CHAIN) == {"p0": 2}
    assert index.num_blocks("p1") == 0


def test_an_impossible_limit_is_refused() -> None:
    with pytest.raises(ValueError, match="max_blocks_per_worker must be at least 1"):
        MemoryIndex(0)


def test_a_run_is_found_whatever_became_of_its_head_and_tiers_are_those_of_the_run() -> None:
    index = MemoryIndex()
    index.publish("store", 1, [B, C], Tier.CPU)
    index.publish("store", 1, [D], Tier.NVME)
    index.publish("p0", 1, [A, C])
    assert index.longest_prefix(CHAIN) == {"p0": 1}
    assert index.deepest_runs(CHAIN, 1) == {"store": PrefixHit(4, (0, 0, 1)), "p0": PrefixHit(3, (1, 0, 0))}
    assert index.deepest_runs(CHAIN, 2) == {"store": PrefixHit(4, (0, 1, 1)), "p0": PrefixHit(1, (1, 0, 0))}
    assert index.deepest_runs(CHAIN, 4) == {"p0": PrefixHit(1, (1, 0, 0))}
    assert index.deepest_runs([], 2) == {}


# -- against sets -----------------------------------------------------------------------------------------------------

CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["p0", "p1", "d0"]), st.sampled_from(["publish", "retract", "drop"]), st.sampled_from(CHAIN)
    ),
    max_size=40,
)


def leading(held: set[bytes]) -> int:
    return next((depth for depth, block_hash in enumerate(CHAIN) if block_hash not in held), len(CHAIN))


def deepest(held: set[bytes], span: int) -> int:
    ends = range(len(CHAIN), 0, -1)
    return next((end for end in ends if held.issuperset(CHAIN[max(0, end - span) : end])), 0)


@given(CHANGES)
def test_agrees_with_a_set_for_each_worker(changes: list[tuple[str, str, bytes]]) -> None:
    index, held = MemoryIndex(), dict[str, set[bytes]]()
    for worker_id, change, block_hash in changes:
        if change == "publish":
            index.publish(worker_id, 1, [block_hash])
            held.setdefault(worker_id, set()).add(block_hash)
        elif change == "retract":
            index.retract(worker_id, 1, [block_hash])
            held.get(worker_id, set()).discard(block_hash)
        else:
            index.drop_worker(worker_id)
            held.pop(worker_id, None)
    expected = {worker_id: leading(hashes) for worker_id, hashes in held.items()}
    assert index.longest_prefix(CHAIN) == {worker_id: depth for worker_id, depth in expected.items() if depth}
    for span in (1, 2, 3):
        expected = {worker_id: deepest(hashes, span) for worker_id, hashes in held.items()}
        found = {worker_id: hit.num_blocks for worker_id, hit in index.deepest_runs(CHAIN, span).items()}
        assert found == {worker_id: depth for worker_id, depth in expected.items() if depth}
