"""First meetings with owners, over real gRPC; the links themselves are fakes."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import cast

import pytest

from tailrace.errors import LayoutMismatchError, TransferError, WorkerLostError
from tailrace.messages import KvSource
from tailrace.rpc.gen import kv_pb2_grpc
from tailrace.rpc.server import KvOwnerServicer, Server
from tailrace.transfer import Needer, reads
from tailrace.transfer.endpoints import PeerEndpoints
from tailrace.transfer.reads import RateMeter
from tailrace.worker import peers as peers_module
from tailrace.worker.peers import OwnerPeers
from tests.helpers.values import SECRET, make_layout, make_source
from tests.helpers.waiting import until


@dataclass(eq=False)
class FakeLink:
    transport: str = "stream"
    broken: bool = False
    rate: RateMeter = field(default_factory=RateMeter)


@dataclass
class FakeNeeder:
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    links: list[FakeLink] = field(default_factory=list)
    refusals: int = 0

    async def connect(self, peer: PeerEndpoints) -> FakeLink:
        await self.gate.wait()
        if self.refusals:
            self.refusals -= 1
            raise TransferError("no transport")
        self.links.append(FakeLink())
        return self.links[-1]


class Owner:
    layout = make_layout()
    epoch = 3

    def meet(self, needer_id: str, needer_epoch: int) -> PeerEndpoints:
        return PeerEndpoints("p", self.epoch, 256, 16, None, None)


@asynccontextmanager
async def world(**layout: object) -> AsyncIterator[tuple[OwnerPeers, FakeNeeder, Owner, KvSource]]:
    owner, needer, server = Owner(), FakeNeeder(), Server(SECRET)
    needer.gate.set()
    kv_pb2_grpc.add_KvOwnerServiceServicer_to_server(KvOwnerServicer(owner), server.grpc)  # type: ignore[arg-type]
    port = server.bind("127.0.0.1", 0)
    await server.start()
    peers = OwnerPeers(cast(Needer, needer), make_layout(**layout), worker_id="d", epoch=9, secret=SECRET)
    try:
        yield peers, needer, owner, make_source(address=f"127.0.0.1:{port}")
    finally:
        await peers.close()
        await server.stop()


async def test_a_pair_meets_once_and_again_when_its_link_breaks() -> None:
    async with world() as (peers, needer, _, source):
        first = await peers.link(source)
        assert await peers.link(source) is first
        needer.links[0].broken = True
        assert await peers.link(source) is not first
        assert len(needer.links) == 2


async def test_those_who_come_together_wait_for_one_meeting_and_one_who_leaves_does_not_end_it() -> None:
    async with world() as (peers, needer, _, source):
        needer.gate.clear()
        waiting = [asyncio.create_task(peers.link(source)) for _ in range(3)]
        await asyncio.sleep(0.02)
        waiting[0].cancel()
        await asyncio.gather(waiting[0], return_exceptions=True)
        needer.gate.set()
        assert await waiting[1] is await waiting[2]
        assert len(needer.links) == 1


async def test_a_failed_meeting_is_told_to_all_who_wait_and_not_kept() -> None:
    async with world() as (peers, needer, _, source):
        needer.refusals = 1
        results = await asyncio.gather(peers.link(source), peers.link(source), return_exceptions=True)
        assert [type(result) for result in results] == [TransferError, TransferError]
        await until(lambda: not peers._meetings)
        await peers.link(source)


async def test_an_owner_that_was_started_again_is_somebody_else() -> None:
    async with world() as (peers, _, owner, source):
        await peers.link(source)
        owner.epoch = 4
        with pytest.raises(WorkerLostError, match="epoch 4 now, not p in epoch 5"):
            await peers.link(make_source(address=source.address, epoch=5))
        await peers.link(make_source(address=source.address, epoch=4))
        assert list(peers._links) == [("p", 4)], "the link to its former life is forgotten"


async def test_it_tells_the_rates_of_links_that_can_be_read_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers_module, "TELL_S", 0.0)
    monkeypatch.setattr(reads, "SAMPLE_S", 0.0)
    async with world() as (peers, needer, _, source):
        assert peers.rates() == ()
        await peers.link(source)
        for _ in range(3):
            needer.links[0].rate.add(10**6, 0.001)
        (rate,) = peers.rates()
        assert (rate.owner_id, rate.bytes_per_s) == ("p", pytest.approx(1e9, rel=0.1))
        assert peers.rates() is peers.rates()
        needer.links[0].broken = True
        assert peers.rates() == ()


async def test_a_layout_of_another_kind_is_refused_by_name() -> None:
    async with world(kv_dtype="bfloat16") as (peers, _, _, source):
        with pytest.raises(LayoutMismatchError, match="kv_dtype: owner=float32 needer=bfloat16"):
            await peers.link(source)


async def test_closing_ends_a_meeting_under_way() -> None:
    async with world() as (peers, needer, _, source):
        needer.gate.clear()
        waiting = asyncio.create_task(peers.link(source))
        await until(lambda: peers._meetings)
        await asyncio.sleep(0.02)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await peers.close()
        await until(lambda: not peers._meetings)
