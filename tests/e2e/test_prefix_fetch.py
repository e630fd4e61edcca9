"""A prefill worker pulls what another process holds, over real transports: same tokens, exact counts, whole ledgers."""

import asyncio
import random
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tailrace.messages import KvSource, PrefixSource
from tailrace.rpc.client import Peer
from tests.helpers.cluster import Cluster
from tests.helpers.direct_worker import Answer, DirectWorker, direct

pytestmark = pytest.mark.e2e
NUM_BLOCKS = 32
"""Of 512 KiB: 16 MiB a prompt."""
CACHED = NUM_BLOCKS * 16


def prompt_of(seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(5, 250) for _ in range(CACHED + 10)]


class Mesh:
    """Workers and stores without a gateway: the test takes its place."""

    def __init__(self, cluster: Cluster, stack: AsyncExitStack) -> None:
        self.cluster = cluster
        self._stack = stack

    async def start(self, *names: str, **options: Any) -> list[DirectWorker]:
        """The role is what a name begins with."""
        for name in names:
            self.cluster.start(name.partition("-")[0], name, **options)  # type: ignore[arg-type]
        attached = [direct(self.cluster.address(name), self.cluster.secret) for name in names]
        return [await self._stack.enter_async_context(each) for each in attached]

    async def start_store(self, **options: Any) -> PrefixSource:
        """As a source of the prefix, once it answers."""
        self.cluster.start("kvstore", "store", **options)
        process = self.cluster.process("store")
        self.cluster.wait_until(lambda: "ready on" in process.said(), "the store is there", 30.0)
        peer = Peer(address := self.cluster.address("store"), self.cluster.secret.encode())
        epoch = (await peer.ledger()).epoch
        await peer.close()
        return PrefixSource(KvSource("store", epoch, address, b""), 0, NUM_BLOCKS)


@asynccontextmanager
async def mesh(model: Path, **options: Any) -> AsyncIterator[Mesh]:
    common = {"dtype": "float32", "num_blocks": 400, "max_model_len": 1024, "join": "", **options}
    cluster = Cluster(model, **common)
    try:
        async with AsyncExitStack() as stack:
            yield Mesh(cluster, stack)
    except BaseException:
        print(cluster.logs())
        raise
    finally:
        cluster.__exit__(None, None, None)


def check(answer: Answer, truth: Answer, by_tier: dict[str, int]) -> None:
    assert answer.token == truth.token
    assert answer.logprob == pytest.approx(truth.logprob, abs=1e-4)
    assert answer.report.cached_by_tier == by_tier
    assert answer.report.cached_tokens == sum(by_tier.values())


async def test_prefill_fetches_from_prefill_and_decode(wide_model: Path) -> None:
    async with mesh(wide_model) as world:
        needer, peer, decode = await world.start("prefill-0", "prefill-1", "decode-0")
        for number, holder in enumerate((peer, decode)):
            prompt = prompt_of(number)
            truth = await holder.ask(prompt)
            assert truth.report.cached_tokens == 0
            await holder.until_idle()
            answer = await needer.ask(prompt, holder.holds(NUM_BLOCKS))
            check(answer, truth, {"peer": CACHED})
            [fetch] = answer.report.fetches
            assert (fetch.holder_id, fetch.num_asked, fetch.num_blocks) == (holder.info.worker_id, 32, 32)
            assert fetch.num_bytes == NUM_BLOCKS * needer.info.layout.block_bytes
            assert answer.report.transport == "nixl"
            check(await needer.ask(prompt, holder.holds(NUM_BLOCKS)), truth, {"worker": CACHED})
        await lies(needer, peer)
        for each in (needer, peer, decode):
            await each.until_idle()


async def lies(needer: DirectWorker, peer: DirectWorker) -> None:
    """What an index says wrongly costs a call, and never a token."""
    partly = prompt_of(7)
    await peer.ask(partly[:100])
    nobody = KvSource("nobody", 1, "127.0.0.1:1", b"")
    former = replace(peer.source, epoch=peer.source.epoch - 1)
    for number, source in enumerate([peer.source, former, nobody]):
        prompt = prompt_of(10 + number)
        answer = await needer.ask(prompt, PrefixSource(source, 0, NUM_BLOCKS))
        check(answer, await peer.ask(prompt), {})
    answer = await needer.ask(partly, peer.holds(NUM_BLOCKS))
    check(answer, await peer.ask(partly), {"peer": 96})


async def test_a_long_prefix_comes_in_rounds_from_small_pools_and_in_parts_from_two(wide_model: Path) -> None:
    """An owner lends a tenth of its pool at a time."""
    async with mesh(wide_model, num_blocks=100) as world:
        needer, first, second = await world.start("prefill-0", "prefill-1", "prefill-2")
        prompt = prompt_of(3)
        truth = await first.ask(prompt)
        assert (await second.ask(prompt)).token == truth.token
        check(await needer.ask(prompt, first.holds(20), second.holds(12, first=20)), truth, {"peer": CACHED})
        for each in (needer, first, second):
            await each.until_idle()


async def test_prefill_fetches_from_the_store_s_memory_and_from_its_disk(wide_model: Path, tmp_path: Path) -> None:
    disk = {"cpu_memory": "48MiB", "disk_path": tmp_path / "slab", "disk_bytes": "64MiB"}
    async with mesh(wide_model) as world:
        held = await world.start_store(**disk)
        needer, peer = await world.start("prefill-0", "prefill-1", store=held.source.address)
        [other] = await world.start("prefill-2")
        prompt = prompt_of(4)
        truth = await peer.ask(prompt)
        await world.cluster.watch("store", lambda ledger: ledger.cached == NUM_BLOCKS)
        check(await needer.ask(prompt, held), truth, {"cpu": CACHED})
        assert world.cluster.process("store").end() == 0
        again = await world.start_store(**disk)
        check(await other.ask(prompt, again), truth, {"nvme": CACHED})
        for each in (needer, peer, other):
            await each.until_idle()


async def test_decode_fetches_for_a_prompt_that_it_computes_itself(wide_model: Path) -> None:
    async with mesh(wide_model) as world:
        held = await world.start_store(cpu_memory="48MiB")
        [peer] = await world.start("prefill-0", store=held.source.address)
        [needer] = await world.start("decode-0")
        for number, source in enumerate((peer.holds(NUM_BLOCKS), held)):
            prompt = prompt_of(30 + number)
            truth = await peer.ask(prompt)
            await world.cluster.watch("store", lambda ledger, n=number: ledger.cached == (n + 1) * NUM_BLOCKS)
            tier = "peer" if source is not held else "cpu"
            answer = await needer.ask(prompt, source)
            check(answer, truth, {tier: CACHED})
            assert answer.report.transfer_bytes == NUM_BLOCKS * needer.info.layout.block_bytes
            check(await needer.ask(prompt, source), truth, {"worker": CACHED})
        nobody = PrefixSource(KvSource("nobody", 1, "127.0.0.1:1", b""), 0, NUM_BLOCKS)
        prompt = prompt_of(40)
        check(await needer.ask(prompt, nobody), await peer.ask(prompt), {})
        for each in (needer, peer):
            await each.until_idle()


@pytest.mark.chaos
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
async def test_a_source_that_dies_in_the_middle_costs_time_alone(wide_model: Path, number: signal.Signals) -> None:
    """Over a stream, where a read of a stopped owner hangs."""
    async with mesh(wide_model, transport="stream") as world:
        needer, peer = await world.start("prefill-0", "prefill-1")
        prompts = [prompt_of(seed) for seed in (20, 21)]
        truths = [await peer.ask(prompt) for prompt in prompts]
        check(await needer.ask(prompts[0], peer.holds(NUM_BLOCKS)), truths[0], {"peer": CACHED})
        asking = asyncio.create_task(needer.ask(prompts[1], peer.holds(NUM_BLOCKS)))
        await world.cluster.watch("prefill-0", lambda ledger: ledger.landing > 0)
        world.cluster.process("prefill-1").signal(number)
        async with asyncio.timeout(5.0):
            answer = await asking
        [fetch] = answer.report.fetches
        check(answer, truths[1], {"peer": fetch.num_blocks * 16} if fetch.num_blocks else {})
        ledger = await needer.ledger()
        states = (ledger.free, ledger.active, ledger.cached, ledger.lent, ledger.landing, ledger.quarantined)
        assert sum(states) == ledger.total
        world.cluster.process("prefill-1").kill()
        await needer.until_idle()
        assert "Traceback" not in world.cluster.process("prefill-0").said()
