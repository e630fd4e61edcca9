"""Offers to a store: newest first, never more than a few, and nothing waits for them."""

import asyncio

import pytest

from tailrace.errors import WorkerLostError
from tailrace.messages import BlockOffer
from tailrace.policy.offers import CachedChain
from tailrace.worker import offering
from tailrace.worker.offering import MAX_LINE, StoreOffers
from tests.helpers.values import SECRET, make_layout, make_source
from tests.helpers.waiting import until


class FakeStore:
    """Stands for the channel."""

    def __init__(self, *failures: str) -> None:
        self.got: list[BlockOffer] = []
        self.failures = list(failures)
        self.open = asyncio.Event()
        self.open.set()

    async def offer(self, offer: BlockOffer) -> tuple[bytes, ...]:
        await self.open.wait()
        if self.failures:
            raise WorkerLostError(self.failures.pop(0))
        self.got.append(offer)
        return ()

    async def close(self) -> None:
        """Nothing is kept."""


def make_offers(store: FakeStore) -> StoreOffers:
    offers = StoreOffers("127.0.0.1:1", SECRET, source=make_source(), layout=make_layout())
    offers._peer = store  # type: ignore[assignment]
    return offers


async def test_a_chain_is_offered_with_where_it_is_lent() -> None:
    store = FakeStore()
    offers = make_offers(store)
    offers.add(CachedChain([b"a", b"b"], "ann"))
    await until(lambda: store.got)
    assert store.got == [BlockOffer(make_source(), make_layout(), (b"a", b"b"), "ann")]
    await offers.close()


async def test_a_store_that_does_not_answer_costs_old_offers_and_nothing_else() -> None:
    store = FakeStore()
    store.open.clear()
    offers = make_offers(store)
    for number in range(10 * MAX_LINE):
        offers.add(CachedChain([number.to_bytes(16, "little")]))
    await asyncio.sleep(0)
    assert len(offers._line) <= MAX_LINE
    store.open.set()
    await until(lambda: len(store.got) >= MAX_LINE)
    assert store.got[0].block_hashes == ((10 * MAX_LINE - 1).to_bytes(16, "little"),)
    await offers.close()


async def test_a_failure_is_said_once_and_the_next_chain_is_offered(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(offering, "RETRY_S", 0.001)
    store = FakeStore("it is gone", "it is gone")
    offers = make_offers(store)
    for name in (b"a", b"b", b"c"):
        offers.add(CachedChain([name]))
    await until(lambda: store.got)
    assert store.got[0].block_hashes == (b"a",)
    assert caplog.text.count("the store takes no offers: it is gone") == 1
    await offers.close()
