"""Lost blocks pulled back from a store: whatever it does, each swap ends once, and says what may still be written."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from services.decode.fetch import LocalFetches
from tailrace.errors import TailraceError, WorkerLostError
from tailrace.kv.events import Tier
from tailrace.messages import KvSource
from tailrace.transfer import ReadOutcome
from tailrace.worker.prefix_fetch import PulledPrefix
from tailrace.worker.report import PrefixDestination
from tests.helpers.prefix_holders import FakeHolder, FakeHolders
from tests.helpers.values import make_layout
from tests.helpers.waiting import until

CHAIN = [bytes([number]) * 16 for number in range(6)]
SWAP = PrefixDestination(7, CHAIN, (50, 51, 52, 53), 1, 0.2)
"""Its first block is here still; three are read into."""


@dataclass(eq=False)
class Worker:
    """A decode worker, and its engine's thread."""

    landed: list[tuple[int, ...]] = field(default_factory=list)
    settled: list[tuple[int, ...]] = field(default_factory=list)
    ended: list[tuple[PulledPrefix, list[int]]] = field(default_factory=list)

    def post(self, function: Callable[..., None], *args: object) -> None:
        function(*args)

    def swap_landed(self, swap_id: int, blocks: tuple[int, ...]) -> None:
        assert swap_id == 7
        self.landed.append(blocks)

    def settle(self, blocks: tuple[int, ...]) -> None:
        self.settled.append(blocks)

    def end_swap(self, swap_id: int, pulled: PulledPrefix, in_flight: list[int]) -> None:
        assert swap_id == 7
        self.ended.append((pulled, in_flight))


class Store(FakeHolders):
    """Peers, one of whom is the store."""

    def __init__(self, holder: FakeHolder) -> None:
        super().__init__(holder)
        self.holder = holder
        self.num_found = 0
        self.failure: TailraceError | None = None

    async def find(self, address: str) -> KvSource:
        assert address == "store:1"
        self.num_found += 1
        if self.failure is not None:
            raise self.failure
        return self.holder.source().source


def make(**options: object) -> tuple[LocalFetches, Worker, Store]:
    worker = Worker()
    store = Store(FakeHolder("store", CHAIN, **{"held": range(6), "tier": Tier.CPU, **options}))  # type: ignore[arg-type]
    return LocalFetches(worker, worker, store, make_layout(), store="store:1"), worker, store  # type: ignore[arg-type]


async def test_what_was_lost_comes_back_and_the_store_is_looked_up_once() -> None:
    swaps, worker, store = make()
    for number in (1, 2):
        swaps.begin(SWAP)
        await until(lambda number=number: len(worker.ended) == number)
    assert worker.landed == [(51, 52, 53)] * 2
    pulled, in_flight = worker.ended[0]
    assert (pulled.tiers, in_flight) == (dict.fromkeys((1, 2, 3), Tier.CPU), [])
    assert (store.num_found, store.holder.num_open) == (1, 0)
    await swaps.close()


async def test_a_store_that_has_only_some_of_it_brings_that() -> None:
    swaps, worker, _ = make(held=range(3))
    swaps.begin(SWAP)
    await until(lambda: worker.ended)
    assert worker.landed == [(51, 52)]
    assert list(worker.ended[0][0].tiers) == [1, 2]


@pytest.mark.parametrize("failure", [None, WorkerLostError("it is gone")])
async def test_a_store_that_is_gone_is_looked_up_again_the_next_time(failure: WorkerLostError | None) -> None:
    swaps, worker, store = make(unreachable=None if failure else WorkerLostError("another epoch"))
    store.failure = failure
    for number in (1, 2):
        swaps.begin(SWAP)
        await until(lambda number=number: len(worker.ended) == number)
    assert [(pulled.tiers, in_flight) for pulled, in_flight in worker.ended] == [({}, [])] * 2
    assert store.num_found == 2


async def test_a_silent_store_costs_the_swap_its_patience() -> None:
    swaps, worker, store = make(is_silent=True)
    swaps.begin(SWAP)
    await until(lambda: worker.ended)
    assert worker.ended[0][1] == []
    assert store.holder.num_open == 0


async def test_blocks_that_a_late_read_may_still_write_are_named_and_settle_when_it_ends() -> None:
    swaps, worker, store = make(outcome=None)
    swaps.begin(SWAP)
    await until(lambda: worker.ended)
    assert (worker.landed, worker.ended[0][1]) == ([], [51, 52, 53])
    store.holder.finish(ReadOutcome.GOOD)
    await until(lambda: worker.settled)
    assert worker.settled == [(51, 52, 53)]
    assert worker.landed == []


async def test_a_worker_that_stops_ends_its_swaps() -> None:
    swaps, worker, store = make(is_silent=True)
    swaps.begin(SWAP)
    await until(lambda: store.holder.num_open == 1)
    await swaps.close()
    await asyncio.sleep(0)
    assert len(worker.ended) == 1
    assert store.holder.num_open == 0
