"""A chain longer than the store's memory, fetched from its disk over a real transport, round after round."""

from pathlib import Path

from tailrace.kv.events import Tier
from tailrace.messages import KvSource, PrefixSource
from tailrace.rpc.client import Peer
from tailrace.worker.prefix_fetch import PrefixPull, WantedPrefix
from tests.helpers.store_process import LAYOUT, store_process, until, worker
from tests.helpers.stores import bytes_of, chain_of
from tests.helpers.values import SECRET

CHAIN = chain_of("long", 160)
"""The memory holds 64 of them."""
WRITTEN = 'tailrace_store_blocks_total{what="written"}'


async def test_a_chain_longer_than_the_store_s_memory_is_fetched_in_rounds(tmp_path: Path) -> None:
    async with (
        store_process(tmp_path / "slab", cpu_memory="1MiB") as store,
        worker("owner", num_blocks=1600) as owner,
        worker("needer", num_blocks=200) as needer,
    ):
        owner.cache(CHAIN)
        for num_blocks in (60, 120, 160):
            await owner.offer(store, CHAIN[:num_blocks])
            await until(store, WRITTEN, num_blocks)
        peer = Peer(store.address, SECRET)
        source = PrefixSource(KvSource("store", (await peer.ledger()).epoch, store.address, b""), 0, len(CHAIN))
        await peer.close()
        blocks = needer.pool.allocate_landing(len(CHAIN))
        assert blocks is not None
        landed: list[int] = []
        wanted = WantedPrefix(CHAIN, blocks, 0, LAYOUT.block_bytes, LAYOUT.block_size)
        pull = PrefixPull(wanted, [source], landed=landed.extend, settled=landed.clear)
        await pull.run(needer.peers, 10.0)
        assert pull.close() == []
        assert sorted(landed) == sorted(blocks)
        for block, name in zip(blocks, CHAIN, strict=True):
            assert needer.memory.bytes_of(block) == bytes_of(name, LAYOUT.block_bytes)
        assert Tier.NVME in pull.result().tiers.values()
