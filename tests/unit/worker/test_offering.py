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


def make_offers(store: FakeStore, enough: int = 1) -> StoreOffers:
    offers = StoreOffers("127.0.0.1:1", SECRET, source=make_source(), layout=make_layout(), enough=enough)
    offers._peer = store  # type: ignore[assignment]
    return offers


async def test_a_chain_is_offered_with_where_it_is_lent() -> None:
    store = FakeStore()
    offers = make_offers(store)
    offers.add(CachedChain([b"a", b"b"], "ann"))
    await until(lambda: store.got)
    assert store.got == [BlockOffer(make_source(), make_layout(), ((b"a", b"b"),), "ann")]
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
    await until(lambda: store.got)
    [offer] = store.got
    assert len(offer.chains) == MAX_LINE
    assert offer.chains[0] == ((10 * MAX_LINE - 1).to_bytes(16, "little"),)
    await offers.close()


async def test_a_failure_is_said_once_and_the_next_chain_is_offered(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(offering, "RETRY_S", 0.001)
    store = FakeStore("it is gone", "it is gone")
    offers = make_offers(store)
    for tenant in ("a", "b", "c"):
        offers.add(CachedChain([b"x"], tenant))
    await until(lambda: store.got)
    assert store.got[0].tenant == "a"
    assert caplog.text.count("the store takes no offers: it is gone") == 1
    await offers.close()


async def test_chains_wait_for_one_another_until_they_are_enough() -> None:
    store = FakeStore()
    offers = make_offers(store, enough=3)
    offers.add(CachedChain([b"a", b"b"]))
    await asyncio.sleep(0.02)
    assert not store.got
    offers.add(CachedChain([b"c"]))
    await until(lambda: store.got)
    assert [offer.chains for offer in store.got] == [((b"c",), (b"a", b"b"))]
    await offers.close()


async def test_no_chain_waits_beside_an_urgent_one() -> None:
    store = FakeStore()
    offers = make_offers(store, enough=100)
    offers.add(CachedChain([b"a"]))
    offers.add(CachedChain([b"b"], is_urgent=True))
    await until(lambda: store.got, offering.GATHER_S / 2)
    assert [offer.chains for offer in store.got] == [((b"b",), (b"a",))]
    await offers.close()


async def test_chains_do_not_wait_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offering, "GATHER_S", 0.01)
    store = FakeStore()
    offers = make_offers(store, enough=100)
    for name in (b"a", b"b"):
        offers.add(CachedChain([name]))
        await until(lambda: store.got)
        assert store.got.pop().chains == ((name,),)
    await offers.close()


async def test_an_offer_is_of_one_tenant_and_of_so_many_blocks_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offering, "MAX_BLOCKS", 3)
    store = FakeStore()
    offers = make_offers(store, enough=9)
    for chain in (CachedChain([b"abcd"] * 4), CachedChain([b"e"] * 2, "ann"), *[CachedChain([b"f"] * 2)] * 2):
        offers.add(chain)
    offers.add(CachedChain([b"g"]))
    await until(lambda: len(store.got) == 4)
    assert [(offer.tenant, [len(chain) for chain in offer.chains]) for offer in store.got] == [
        ("", [1, 2]),
        ("", [2]),
        ("ann", [2]),
        ("", [4]),
    ]
    await offers.close()
