"""States of slots, and the books about them."""

import random

import pytest

from tailrace.kvstore.slots import SlotState, SlotTable, StoredBlock


def block(name: str, moment: int = 0, tenant: str = "") -> StoredBlock:
    return StoredBlock(name.encode(), 0, tenant, moment)


def fill(table: SlotTable, *blocks: StoredBlock) -> list[int]:
    slots = []
    for each in blocks:
        taken = table.take(each.tenant)
        assert taken is not None
        table.landed(taken.slot, each)
        slots.append(taken.slot)
    return slots


def test_a_slot_goes_from_free_to_landing_to_cached_to_lent_and_back() -> None:
    table = SlotTable(2)
    taken = table.take("")
    assert taken is not None
    assert (taken.slot, taken.evicted, str(table.ledger())) == (0, None, "free=1 landing=1")
    table.landed(0, block("a"))
    table.hold(0)
    table.hold(0)
    table.release(0)
    assert str(table.ledger()) == "free=1 lent=1"
    table.release(0)
    assert str(table.ledger()) == "free=1 cached=1"
    table.drop(0)
    assert str(table.ledger()) == "free=2"
    table.check_integrity()


def test_every_handing_out_has_a_generation_of_its_own_in_the_epoch() -> None:
    table = SlotTable(1, epoch=9)
    fill(table, block("a"))
    before = table.generation(0)
    assert before >> 32 == 9
    fill(table, block("b", 1))
    assert table.generation(0) == before + 1


def test_only_what_nobody_reads_is_given_up() -> None:
    table = SlotTable(2)
    first, second = fill(table, block("a", 1), block("b", 2))
    table.hold(first)
    taken = table.take("")
    assert taken is not None
    assert taken.evicted is not None
    assert (taken.slot, taken.evicted.block_hash) == (second, b"b")
    assert table.take("") is None
    table.check_integrity()


def test_a_block_dropped_while_it_is_read_frees_its_slot_at_the_end_of_the_read() -> None:
    table = SlotTable(1)
    fill(table, block("a"))
    table.hold(0)
    table.drop(0)
    assert table.state(0) is SlotState.LENT
    assert table.blocks() == {}
    table.check_integrity()
    table.release(0)
    assert table.state(0) is SlotState.FREE
    table.check_integrity()


def test_a_quarantined_slot_is_nobodys_until_its_read_has_ended() -> None:
    table = SlotTable(1)
    table.take("")
    table.quarantine(0)
    assert table.take("") is None
    assert str(table.ledger()) == "quarantined=1"
    table.abandon(0)
    assert str(table.ledger()) == "free=1"


def test_a_tenant_at_its_quota_replaces_its_own_blocks_only() -> None:
    table = SlotTable(4)
    table.set_quota("t", 2)
    fill(table, block("other", 0), block("t1", 1, "t"), block("t2", 2, "t"))
    assert table.room_for("t") == 2
    taken = table.take("t")
    assert taken is not None
    assert taken.evicted is not None
    assert taken.evicted.block_hash == b"t1"
    assert table.num_used("t") == 2
    table.hold(2)
    assert table.take("t") is None
    assert table.room_for("") == 2
    table.check_integrity()


def test_a_pinned_block_is_not_given_up() -> None:
    table = SlotTable(1)
    pinned = block("a")
    fill(table, pinned)
    pinned.num_pins = 1
    table.update(0)
    assert table.take("") is None
    table.check_integrity()
    pinned.num_pins = 0
    table.update(0)
    assert table.take("") is not None


def test_a_restored_table_hands_out_the_empty_slots_first() -> None:
    table = SlotTable(3)
    table.restore({1: block("a")})
    table.check_integrity()
    assert [taken.slot for taken in (table.take(""), table.take(""), table.take("")) if taken] == [0, 2, 1]
    with pytest.raises(ValueError, match="before it is used"):
        table.restore({})


@pytest.mark.parametrize("call", ["landed", "hold", "release", "drop", "abandon", "quarantine"])
def test_a_wrong_state_is_refused_and_nothing_is_done(call: str) -> None:
    table = SlotTable(1)
    arguments = (0, block("a")) if call == "landed" else (0,)
    with pytest.raises(ValueError, match="slot 0: it is free"):
        getattr(table, call)(*arguments)
    with pytest.raises(ValueError, match="slot 7 is not one of 0 to 0"):
        getattr(table, call)(7, *arguments[1:])
    table.check_integrity()


def test_books_stay_right_whatever_happens() -> None:
    rng = random.Random(11)
    table = SlotTable(6)
    table.set_quota("b", 2)
    landing: list[int] = []
    held: list[int] = []
    for moment in range(3000):
        action = rng.randrange(6)
        if action <= 1 and (taken := table.take(rng.choice(["", "a", "b"]))) is not None:
            landing.append(taken.slot)
        elif action == 2 and landing:
            slot = landing.pop()
            table.landed(slot, block(f"x{moment}", moment, table._tenants[slot] or ""))
        elif action == 3 and landing:
            table.abandon(landing.pop())
        elif action == 4 and (cached := list(table.blocks())):
            held.append(rng.choice(cached))
            table.hold(held[-1])
        elif action == 5 and held:
            table.release(held.pop(rng.randrange(len(held))))
        table.check_integrity()
        assert table.num_used("b") <= 2
