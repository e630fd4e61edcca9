"""Pins, quotas and usage over the wire and from the command line, with a real store process."""

import asyncio
import json
import os
import sys
from pathlib import Path

import pytest

from tailrace.config import base_environment
from tailrace.errors import InvalidRequestError, NotFoundError, OverloadedError, UnauthenticatedError, WorkerLostError
from tailrace.kv.hashing import chain_seed, hash_blocks
from tailrace.rpc.client import Peer
from tests.helpers.store_process import LAYOUT, StoreProcess, store_process, until, worker
from tests.helpers.stores import chain_of
from tests.helpers.values import SECRET

TAKEN = 'tailrace_store_blocks_total{what="taken"}'
WRITTEN = 'tailrace_store_blocks_total{what="written"}'
NUM_SLOTS = (1 << 20) // LAYOUT.block_bytes
A, B = chain_of("a", 6), chain_of("b", 6)


async def tailrace_store(store: StoreProcess, command: str, *arguments: str, secret: bytes = SECRET) -> tuple[int, str]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tailrace.cli.main", "store", command, "--address", store.address, *arguments),
        env={**base_environment(), "TAILRACE_SECRET": secret.decode(), "PYTHONPATH": os.environ.get("PYTHONPATH", "")},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    said, _ = await asyncio.wait_for(process.communicate(), 60)
    return process.returncode or 0, said.decode()


async def test_pins_hold_against_what_comes_and_quotas_bound_a_tenant(tmp_path: Path) -> None:
    async with store_process(tmp_path / "slab") as store, worker() as peer:
        control = Peer(store.address, SECRET)
        with pytest.raises(WorkerLostError, match="learns what a block is from the first offer"):
            await control.store_usage()
        peer.cache(A)
        await peer.offer(store, A)
        await until(store, TAKEN, 6)
        assert await control.pin("me", A) == 6
        with pytest.raises(NotFoundError, match="block_hashes: 6 of 6 are not here"):
            await control.pin("me", B)
        await control.set_quota("greedy", 2 * LAYOUT.block_bytes, 3 * LAYOUT.block_bytes + 1)
        num_taken = 6
        for name in "cdefghig":
            chain = chain_of(name, 10)
            peer.cache(chain)
            num_taken += len(await peer.offer(store, chain, "greedy" if name == "c" else ""))
            await until(store, TAKEN, num_taken)
        assert num_taken > NUM_SLOTS
        await until(store, WRITTEN, num_taken)
        assert await store.metric('tailrace_store_blocks_total{what="hits_disk"}') == 0
        assert await peer.pull(store, A) == 6
        assert await store.metric('tailrace_store_blocks_total{what="hits_disk"}') == 0, "they are still in memory"
        usage = await control.store_usage()
        assert (usage.layout, usage.memory.total, usage.pinned, usage.pin_limit) == (
            LAYOUT,
            NUM_SLOTS,
            {"me": 6},
            NUM_SLOTS // 2,
        )
        [greedy] = [each for each in usage.tenants if each.tenant == "greedy"]
        assert greedy.memory_blocks <= 2
        assert greedy.disk_blocks <= 3
        assert (greedy.memory_quota, greedy.disk_quota) == (2, 3)
        with pytest.raises(OverloadedError, match="block_hashes: 4 too many; 6 blocks of at most 32 are pinned"):
            await control.pin("you", [block for name in "ghi" for block in chain_of(name, 10)])
        assert await control.unpin("me", A[:2]) == 2
        assert await control.unpin("me") == 4
        assert (await control.store_usage()).pinned == {}
        await control.set_quota("greedy", None, None)
        assert [each.memory_quota for each in (await control.store_usage()).tenants] == [None, None]
        await control.close()


async def test_bad_input_is_refused_by_its_field() -> None:
    async with store_process() as store, worker() as peer:
        peer.cache(A)
        await peer.offer(store, A)
        control, stranger = Peer(store.address, SECRET), Peer(store.address, b"another secret of 16")
        for call, said in (
            (control.pin("", A), "owner: 1 to 64 characters"),
            (control.pin("o" * 65, A), "owner: 1 to 64 characters"),
            (control.pin("me", [b"short"]), "block_hashes: each has 16 bytes"),
            (control.unpin("me", [A[0], A[0]]), "each may be named once"),
            (control.set_quota("t" * 65, 1, None), "tenant: at most 64 bytes"),
            (control.set_quota("t", 1 << 50, None), "memory_bytes: at most"),
        ):
            with pytest.raises(InvalidRequestError, match=said):
                await call
        for call in (
            stranger.pin("me", A),
            stranger.unpin("me"),
            stranger.set_quota("t", 1, 1),
            stranger.store_usage(),
        ):
            with pytest.raises(UnauthenticatedError):
                await call
        await control.close()
        await stranger.close()


async def test_the_command_line(tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.json"
    tokens.write_text(json.dumps(list(range(40))))
    chain = hash_blocks(list(range(40)), LAYOUT.block_size, chain_seed(LAYOUT.fingerprint, "", "salt"))
    async with store_process() as store, worker() as peer:
        peer.cache([*chain, *A])
        await peer.offer(store, chain)
        await peer.offer(store, A)
        await until(store, TAKEN, 8)
        status, said = await tailrace_store(store, "pin", "--owner", "ops", "--tokens", str(tokens), "--salt", "salt")
        assert (status, said) == (0, "2 blocks pinned by ops; 2 are pinned in all\n")
        assert (await tailrace_store(store, "pin", "--owner", "ops", A[0].hex()))[0] == 0
        status, said = await tailrace_store(store, "quota", "--salt", "salt", "--memory", "1MiB")
        assert (status, said) == (0, "tenant '2e3b6ab7edb43725': memory 1MiB, disk unbounded\n")
        assert (await tailrace_store(store, "quota", "--tenant", "", "--memory", "512KiB"))[0] == 0
        status, said = await tailrace_store(store, "quota", "--salt", "salt", "--tenant", "t")
        assert (status, "name the tenant by --tenant or by --salt, not by both" in said) == (2, True)
        status, said = await tailrace_store(store, "usage", "--json")
        found = json.loads(said)
        assert (status, found["pinned"], found["memory"]["cached"]) == (0, {"ops": 3}, 8)
        quotas = {each["tenant"]: each["memory_quota"] for each in found["tenants"]}
        assert quotas == {"2e3b6ab7edb43725": NUM_SLOTS, "": NUM_SLOTS // 2}
        assert "requests without a salt: 8 of" in (await tailrace_store(store, "usage"))[1]
        status, said = await tailrace_store(store, "pin", "--owner", "ops", "xyz")
        assert (status, "hashes: 'xyz' is not 32 hexadecimal digits" in said) == (2, True)
        status, said = await tailrace_store(store, "usage", secret=b"another secret of 16")
        assert (status, "wrong or no cluster secret" in said, "Traceback" in said) == (1, True, False)
        assert (await tailrace_store(store, "unpin", "--owner", "ops"))[1] == "3 blocks unpinned by ops\n"
