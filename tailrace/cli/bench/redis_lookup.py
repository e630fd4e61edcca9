"""`tailrace bench redis`: looking a prompt up in Redis, beside the library's pipelined GETs of the same keys.

The keys are written under a namespace of their own, and taken away afterwards. The arms take turns on one connection
each. Both GETs read every block's entries; they neither decode them nor know who is alive. The lookup reads some ten
of them in a script, on a Cluster in one on each node.
"""

import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from tailrace.cli.bench.report import Spread, header, print_footer
from tailrace.cli.bench.run import measure_and_show
from tailrace.index.keys import KeySpace
from tailrace.index.redis import RedisIndex
from tailrace.index.redis_client import RedisClient
from tailrace.index.redis_url import RedisUrl
from tailrace.index.registry import Registration, Registry
from tailrace.kv.hashing import HASH_BYTES

PACKAGES = ("tailrace", "redis", "hiredis")
ARMS = ("lookup", "get_asyncio", "get_blocking", "ping")
"""The last: one command that does nothing, sent as the lookup is on a single Redis; none on a Cluster."""
_WARM_UPS = 20


@dataclass(frozen=True, slots=True)
class RedisLookupOptions:
    num_hashes: int = 256
    num_workers: int = 1
    """Holders of each block."""
    rounds: int = 200


def run_redis(url: RedisUrl, options: RedisLookupOptions, *, as_json: bool) -> None:
    """Prints a table, or one JSON object on stdout. Raises RedisTroubleError."""
    measure_and_show(measure(url, options), _print, as_json=as_json)


async def measure(url: RedisUrl, options: RedisLookupOptions) -> dict[str, Any]:
    """Times in microseconds. Raises RedisTroubleError."""
    head = header("redis", packages=PACKAGES)
    client, keys = RedisClient(url), KeySpace(f"tailrace-bench-{secrets.token_hex(4)}")
    await client.open()
    try:
        return {**head, **await _measure(client, keys, options)}
    finally:
        await client.close()


async def _measure(client: RedisClient, keys: KeySpace, options: RedisLookupOptions) -> dict[str, Any]:
    secret = secrets.token_bytes(16)
    hashes = [secrets.token_bytes(HASH_BYTES) for _ in range(options.num_hashes)]
    registry = Registry(client, keys, secret)
    index = RedisIndex(client, keys, registry)
    workers = [_worker(number) for number in range(options.num_workers)]
    try:
        for worker in workers:
            await registry.beat(worker)
            await index.publish(worker.life, hashes)
        found = await index.longest_prefix(hashes)
        assert found == {worker.worker_id: len(hashes) for worker in workers}, "the lookup finds what was written"
        spent = await _take_turns(client, keys.blocks(hashes), lambda: index.longest_prefix(hashes), options)
    finally:
        await client.all([("DEL", key) for key in (*keys.blocks(hashes), keys.version)])
        for worker in workers:
            await registry.leave(worker)
    times = {arm: Spread.of([s * 1e6 for s in seconds], digits=1) for arm, seconds in spent.items()}
    ratios = {arm: round(times["lookup"].median / times[arm].median, 3) for arm in times if arm != ARMS[0]}
    return {
        "options": asdict(options),
        "is_cluster": client.is_cluster,
        "microseconds": {arm: asdict(spread) for arm, spread in times.items()},
        "lookup_over": ratios,
    }


async def _take_turns(
    client: RedisClient, keys: list[bytes], look_up: Callable[[], Awaitable[object]], options: RedisLookupOptions
) -> dict[str, list[float]]:
    arms = ARMS[:-1] if client.is_cluster else ARMS
    spent: dict[str, list[float]] = {arm: [] for arm in arms}
    with client.blocking() as blocking:
        for number in range(_WARM_UPS + options.rounds):
            for arm in arms:
                began = time.perf_counter()
                if arm == "lookup":
                    await look_up()
                elif arm == "get_asyncio":
                    await _get_all(client.library, keys).execute()
                elif arm == "ping":
                    await client.all([("PING",)], [None])
                else:
                    _get_all(blocking, keys).execute()
                if number >= _WARM_UPS:
                    spent[arm].append(time.perf_counter() - began)
    return spent


def _get_all(library: Any, keys: list[bytes]) -> Any:
    pipeline = library.pipeline(transaction=False)
    for key in keys:
        pipeline.get(key)
    return pipeline


def _worker(number: int) -> Registration:
    return Registration(
        worker_id=f"worker-{number}",
        epoch=1,
        edition=0,
        role="prefill",
        address="127.0.0.1:1",
        model_digest="",
        num_blocks=0,
        sequence=0,
    )


def _print(result: dict[str, Any]) -> None:
    num_hashes = result["options"]["num_hashes"]
    where = "a Redis Cluster" if result["is_cluster"] else "a single Redis"
    table = Table("", "median us", "lookup over it", title=f"A prompt of {num_hashes} blocks, looked up in {where}")
    for arm, spread in result["microseconds"].items():
        table.add_row(arm, f"{spread['median']:.0f}", f"{result['lookup_over'].get(arm, 1.0):.3f}")
    console = Console()
    console.print(table)
    print_footer(console, result)
