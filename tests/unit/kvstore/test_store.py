"""What a store keeps, lends and gives up, with and without a disk behind it."""

import random
from pathlib import Path

import pytest

from tailrace.kv.events import Tier
from tailrace.kvstore import pins, slots
from tailrace.kvstore.pins import PinRefusal
from tailrace.kvstore.store import KvStore
from tests.helpers.stores import PAGED, bytes_of, chain_of, fetch, make_store, num_found, put, put_written
from tests.helpers.values import make_layout

A, B, C = chain_of("a", 4), chain_of("b", 4), chain_of("c", 4)


def test_what_was_put_is_lent_with_its_generations() -> None:
    store = make_store()
    assert put(store, A) == 4
    loan = store.borrow([*A, b"x" * 16])
    assert [lent.index for lent in loan.take_ready()] == [0, 1, 2, 3]
    assert loan.is_complete
    assert [lent.generation for lent in loan.held.values()] == [
        store.memory.generation(lent.slot) for lent in loan.held.values()
    ]
    assert str(store.ledger().memory) == "free=4 lent=4"
    loan.close()
    loan.close()
    assert str(store.ledger().memory) == "free=4 cached=4"
    assert (store.counters.hits_memory, store.counters.misses) == (4, 1)
    store.check_integrity()


def test_a_chain_is_wanted_once_and_only_where_it_is_missing() -> None:
    store = make_store()
    put(store, A[:2])
    wanted = store.wanted(A)
    assert [(piece.block_hash, piece.depth) for piece in wanted] == [(A[2], 2), (A[3], 3)]
    arrivals = store.reserve(wanted)
    assert store.wanted(A) == []
    assert store.find_prefix(A) == [Tier.CPU] * 2
    store.abandon(arrivals)
    assert len(store.wanted(A)) == 2
    assert store.counters.failed_pulls == 2
    store.check_integrity()


def test_no_more_is_wanted_than_can_be_taken() -> None:
    store = make_store(slots=4)
    put(store, A)
    loan = store.borrow(A[:3])
    assert len(store.wanted(B)) == 1
    assert len(store.reserve(store.wanted(B))) == 1
    assert store.reserve(store.wanted(C)) == []
    loan.close()
    store.check_integrity()


def test_without_a_disk_the_root_outlives_the_leaves() -> None:
    store = make_store(slots=6)
    put(store, A)
    put(store, B)
    assert (num_found(store, A), num_found(store, B)) == (2, 4)


@pytest.mark.parametrize("num_others", [0, 2])
def test_the_root_outlives_leaves_that_were_read_after_it(num_others: int) -> None:
    """In several reads, beside which others may come."""
    store = make_store(slots=6)
    wanted = store.wanted(A)
    store.landed(store.reserve(wanted[:2]))
    put(store, B[:num_others])
    store.landed(store.reserve(wanted[2:]))
    put(store, C[: 4 - num_others])
    left = [name for name in A if name in store]
    assert left == A[: len(left)]
    assert 0 < len(left) < len(A)


def test_what_memory_gives_up_is_found_on_disk(tmp_path: Path) -> None:
    store = make_store(tmp_path / "slab", slots=4)
    put_written(store, A)
    put_written(store, B)
    assert store.find_prefix(A) == [Tier.NVME] * 4
    assert num_found(store, A) == 4
    assert (store.counters.hits_disk, store.counters.evicted_memory) == (4, 8)
    assert str(store.ledger().disk) == "free=24 cached=8"
    store.check_integrity()
    store.close()


def test_a_chain_in_both_tiers_is_lent_in_order(tmp_path: Path) -> None:
    store = make_store(tmp_path / "slab", slots=6)
    put_written(store, A)
    put_written(store, B)
    assert store.find_prefix(A) == [Tier.CPU, Tier.CPU, Tier.NVME, Tier.NVME]
    assert num_found(store, A) == 4
    assert (store.counters.hits_memory, store.counters.hits_disk) == (2, 2)
    store.close()


def test_loans_of_one_chain_share_one_read_of_the_disk(tmp_path: Path) -> None:
    store = make_store(tmp_path / "slab", slots=4)
    put_written(store, A)
    put_written(store, B)
    first = store.borrow(A)
    second = fetch(store, A)
    assert len(first.take_ready()) == len(second.held) == 4
    assert store.counters.read == 4
    first.close()
    store.check_integrity()
    second.close()
    store.check_integrity()
    store.close()


def test_a_loan_that_is_closed_while_the_disk_reads_leaves_the_books_right(tmp_path: Path) -> None:
    store = make_store(tmp_path / "slab", slots=4)
    put_written(store, A)
    put_written(store, B)
    loan = store.borrow(A)
    loan.close()
    while store.disk is not None and store.disk.num_open:
        store.pump(5.0)
    store.check_integrity()
    assert str(store.ledger().memory) == "cached=4"
    store.close()


def test_a_loan_longer_than_memory_is_cut_and_not_waited_for(tmp_path: Path) -> None:
    store = make_store(tmp_path / "slab", slots=4)
    long = chain_of("long", 12)
    for end in (4, 8, 12):
        put_written(store, long[:end])
    assert store.find_prefix(long)[:12] == [*store.find_prefix(long)]
    loan = fetch(store, long)
    assert 1 <= loan.num_told <= 4
    loan.close()
    store.check_integrity()
    store.close()


def test_a_disk_slower_than_what_comes_costs_the_disk_its_blocks_and_memory_nothing(tmp_path: Path) -> None:
    """Nobody takes back what the disk has done, as if it were never done: memory goes on, with what is newest."""
    store = make_store(tmp_path / "slab", slots=16, disk_slots=64)
    assert store.disk is not None
    store.disk.take_writes = lambda timeout_s=0.0: []  # type: ignore[method-assign]
    for name in "abcdefgh":
        assert put(store, chain_of(name, 4)) == 4
        store.check_integrity()
    assert store.memory.ledger().lent == 4 + 4
    assert store.counters.unwritten == 32 - 16
    assert num_found(store, chain_of("h", 4)) == 4
    del store.disk.take_writes
    assert store.flush(5.0)
    assert store.counters.written == 16
    store.close()


def test_a_full_disk_tier_gives_up_what_is_worth_least(tmp_path: Path) -> None:
    store = make_store(tmp_path / "slab", slots=4, disk_slots=8)
    for chain in (A, B, C):
        put_written(store, chain)
    assert (num_found(store, A), num_found(store, C), num_found(store, B)) == (0, 4, 4)
    assert store.counters.evicted_disk == 4
    store.check_integrity()
    store.close()


@pytest.mark.parametrize("fields", [{}, PAGED], ids=["odd", "paged"])
def test_a_restart_finds_contents_usage_and_tenants(tmp_path: Path, fields: dict[str, int]) -> None:
    layout = make_layout(**fields)
    store = make_store(tmp_path / "slab", layout=layout)
    put_written(store, A, "tenant")
    put_written(store, B)
    for _ in range(3):
        assert num_found(store, A) == 4
    store.close()
    again = make_store(tmp_path / "slab", layout=layout)
    assert (again.counters.restored, again.counters.restored_bad) == (8, 0)
    again.check_integrity()
    block = again._blocks[A[1]]
    assert (block.depth, block.tenant, block.uses) == (1, "tenant", 4)
    assert num_found(again, A) == 4
    assert again.wanted(B) == []
    assert len(again.wanted(C)) == 4
    again.close()


def test_pinned_blocks_outlive_everything(tmp_path: Path) -> None:
    store = make_store(slots=8)
    put(store, A)
    assert store.pin(A) is None
    assert store.pin(B) == PinRefusal(num_missing=4)
    for name in "xyz":
        put(store, chain_of(name, 4))
    assert num_found(store, A) == 4
    assert store.pin(chain_of("z", 4)[:1]) == PinRefusal(num_beyond=1)
    assert store.unpin(A) == 4
    assert store.unpin(A) == 0
    put(store, chain_of("u", 8))
    assert num_found(store, A) == 0
    store.check_integrity()


def test_a_block_is_pinned_until_each_of_its_owners_lets_go(tmp_path: Path) -> None:
    store = make_store(slots=8)
    put(store, A)
    for owner in ("one", "two", "two"):
        assert store.pin(A[:3], owner) is None
    assert store.pins.owners() == {"one": 3, "two": 3}
    assert store.unpin(A, "nobody") == 0
    assert store.unpin(A[:1], "one") == 1
    assert store.unpin(owner="two") == 3
    assert store.pins.owners() == {"one": 2}
    assert store.pins.num_blocks == 2
    store.check_integrity()
    put(store, chain_of("x", 8))
    assert store.find_prefix(A[1:]) == [Tier.CPU] * 2
    assert store.unpin(owner="one") == 2
    assert store.pins.owners() == {}
    store.check_integrity()


def test_a_pinned_block_that_proves_corrupt_is_nobodys(tmp_path: Path) -> None:
    store = make_store(tmp_path / "slab", slots=4)
    put_written(store, A)
    put_written(store, B)
    assert store.find_prefix(A) == [Tier.NVME] * 4
    assert store.pin(A[:2], "one") is None
    assert store.disk is not None
    slot = store._blocks[A[0]].disk_slot
    assert slot is not None
    store.disk._checksums[slot] ^= 1
    assert num_found(store, A) == 0
    assert store.pins.owners() == {"one": 1}
    store.check_integrity()
    store.close()


def test_there_are_only_so_many_owners_and_quotas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pins, "MAX_OWNERS", 2)
    monkeypatch.setattr(slots, "MAX_QUOTAS", 2)
    store = make_store()
    put(store, A)
    assert [store.pin(A[:1], owner) for owner in "abc"] == [None, None, PinRefusal(num_owners=2)]
    assert [store.set_quota(tenant, 1) for tenant in "abc"] == [True, True, False]
    assert store.set_quota("a", None)
    assert store.set_quota("c", 1)


def test_a_tenant_without_blocks_leaves_nothing() -> None:
    store = make_store(slots=4)
    put(store, A[:2], "gone")
    put(store, B, "here")
    assert store.memory.tenants() == {"here": 4}


def test_a_tenant_stays_within_its_quota_in_both_tiers(tmp_path: Path) -> None:
    store = make_store(tmp_path / "slab", slots=8, disk_slots=16)
    store.set_quota("greedy", 2, 3)
    put_written(store, A, "modest")
    for name in "bcdef":
        put_written(store, chain_of(name, 4), "greedy")
    assert store.memory.num_used("greedy") == 2
    assert store.disk is not None
    assert store.disk.slots.num_used("greedy") <= 3
    assert num_found(store, A) == 4
    store.set_quota("greedy", None)
    assert put(store, B, "greedy") >= 3
    store.check_integrity()
    store.close()


@pytest.mark.parametrize("quota", [None, 3])
def test_a_chain_that_outgrows_its_room_keeps_its_beginning(quota: int | None) -> None:
    """However often it is offered."""
    store = make_store(slots=3 if quota is None else 16)
    store.set_quota("t", quota)
    put(store, B[:2], "t")
    chain = chain_of("long", 8)
    taken = [put(store, chain, "t") for _ in range(4)]
    assert (taken, num_found(store, chain)) == ([3, 0, 0, 0], 3)
    assert put(store, B, "t") == 3, "others of the tenant may replace it"
    store.check_integrity()


def test_a_chain_that_outgrows_memory_goes_on_to_disk(tmp_path: Path) -> None:
    store = make_store(tmp_path / "slab", slots=16)
    store.set_quota("t", 3)
    chain = chain_of("long", 8)
    assert [put_written(store, chain, "t") for _ in range(4)] == [3, 3, 2, 0]
    assert len(store.find_prefix(chain)) == 8
    store.check_integrity()
    store.close()


def test_a_quota_counts_what_was_there_before_it_and_ends_with_it(tmp_path: Path) -> None:
    store = make_store(slots=16)
    put(store, chain_of("a", 4), "t")
    put(store, chain_of("b", 4), "other")
    store.set_quota("t", 2)
    put(store, chain_of("c", 4), "t")
    assert store.memory.tenants() == {"t": 4, "other": 4}, "it takes no more, and keeps what it has"
    assert num_found(store, chain_of("b", 4)) == 4
    store.set_quota("t", None)
    put(store, chain_of("d", 4), "t")
    assert store.memory.tenants() == {"t": 8, "other": 4}
    store.check_integrity()


def test_a_quota_after_a_restart_counts_what_the_file_holds(tmp_path: Path) -> None:
    store = make_store(tmp_path / "slab")
    put_written(store, A, "t")
    put_written(store, B, "other")
    store.close()
    again = make_store(tmp_path / "slab")
    assert again.disk is not None
    assert again.disk.slots.tenants() == {"t": 4, "other": 4}
    again.set_quota("t", None, 4)
    put_written(again, C, "t")
    assert again.disk.slots.tenants() == {"t": 4, "other": 4}
    assert num_found(again, B) == 4
    again.check_integrity()
    again.close()


def test_misuse_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="block_bytes"):
        KvStore(0, 4)
    store = make_store()
    with pytest.raises(ValueError, match="at most 64 bytes"):
        store.wanted(A, "t" * 65)
    with pytest.raises(ValueError, match="negative"):
        store.set_quota("t", -1)


def test_memory_that_there_is_not_is_refused_before_anything_is_made_for_it() -> None:
    with pytest.raises(OSError, match="Cannot allocate"):
        KvStore(1 << 32, 1 << 30)


def test_a_quarantined_arrival_is_forgotten_and_its_slot_comes_back_at_the_end_of_the_read() -> None:
    store = make_store(slots=4)
    arrivals = store.reserve(store.wanted(A))
    store.quarantine(arrivals)
    assert len(store) == 0
    store.check_integrity()
    assert str(store.ledger().memory) == "quarantined=4"
    assert store.wanted(A) == []
    store.abandon(arrivals)
    assert put(store, A) == 4
    assert store.counters.failed_pulls == 4
    store.check_integrity()


def test_random_use_never_serves_wrong_bytes_and_keeps_the_books(tmp_path: Path) -> None:
    rng = random.Random(5)
    store = make_store(tmp_path / "slab", slots=24, disk_slots=40)
    chains = [chain_of(f"c{i}", 6) for i in range(16)]
    loans = []
    for _ in range(400):
        chain = rng.choice(chains)
        match rng.randrange(4):
            case 0:
                put(store, chain[: rng.randint(1, 6)])
            case 1:
                loans.append((chain, store.borrow(chain)))
            case 2 if loans:
                chain, loan = loans.pop(rng.randrange(len(loans)))
                for lent in loan.take_ready():
                    assert store.slot_bytes(lent.slot) == bytes_of(chain[lent.index], store.block_bytes)
                loan.close()
            case _:
                store.pump(0.001)
        if len(loans) > 3:
            loans.pop(0)[1].close()
        store.check_integrity()
    for _, loan in loans:
        loan.close()
    assert store.flush(5.0)
    store.check_integrity()
    assert store.counters.read > 0
    assert store.counters.dropped_corrupt == 0
    assert store.memory.ledger().lent == 0
    store.close()
