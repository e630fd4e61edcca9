"""`tailrace bench reuse`: the first token of a prompt whose prefix is kept somewhere, beside one that nobody has seen.

Two clusters on this machine, each with a store: one whose memory holds every prefix, and one whose memory holds hardly
one, so that the others lie on its disk. The workers' pools are so small that a prefix has left them before it is asked
for again. Each turn asks for a prompt that is new, for a kept prefix with a new end, and at once for the same prefix
with another end, which is then in the prefill worker's own memory. Where the tokens of an answer were found is read
from its usage; an answer that was not served from where it should have been is counted apart, and not timed.
"""

import asyncio
import itertools
import random
import statistics
import tempfile
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tailrace.cli.bench.load import FIRST_ORDINARY_TOKEN, Asker, completion_body
from tailrace.cli.bench.report import Spread, header, print_footer, served
from tailrace.cli.bench.run import measure_and_show
from tailrace.cli.cluster import running_cluster
from tailrace.cli.console import ClusterConsole
from tailrace.cli.model import fetch_model
from tailrace.config import UpConfig
from tailrace.errors import UnavailableError

LOANS_SHARE = 10
"""A worker lends a store a tenth of its pool at most: a pool of so many prompts lends one whole."""
MIN_PREFIXES = 8
"""With the prompts that are new in between, so many prefixes do not fit such a pool."""
_VOCABULARY = 40_000
_MISS, _KEPT, _HIT = "miss", "kept", "hit"


@dataclass(frozen=True, slots=True)
class ReuseOptions:
    prefix_tokens: int = 1024
    new_tokens: int = 64
    prefixes: int = MIN_PREFIXES
    rounds: int = 3
    """Counted turns of every prefix on each tier."""
    settle_s: float = 0.2
    """Between two requests, so that the store has taken what it was offered."""
    threads: int = 1
    """Compute threads a worker."""
    cpu_memory: str = "1GiB"
    """Of the store that keeps all in memory."""
    nvme_memory: str = "28MiB"
    """Of the store that keeps nearly all on disk."""
    disk_bytes: str = "2GiB"
    directory: str = ""
    """Where the store's file is made; empty: that of temporary files."""
    seed: int = 0

    @property
    def num_tokens(self) -> int:
        return self.prefix_tokens + self.new_tokens


@dataclass(slots=True)
class TierTimes:
    """Of one cluster: TTFT in seconds, an entry an answer; and answers that were served from elsewhere."""

    ttft: dict[str, list[float]] = field(default_factory=lambda: {arm: [] for arm in (_MISS, _KEPT, _HIT)})
    elsewhere: dict[str, list[Mapping[str, int]]] = field(
        default_factory=lambda: {arm: [] for arm in (_MISS, _KEPT, _HIT)}
    )

    def add(self, arm: str, ttft_s: float, found: Mapping[str, int], *, is_expected: bool) -> None:
        if is_expected:
            self.ttft[arm].append(ttft_s)
        else:
            self.elsewhere[arm].append(dict(found))

    def summary(self) -> dict[str, Any]:
        return {
            arm: {
                "ttft_ms": asdict(Spread.of_ms(times)) if times else None,
                "num_answers": len(times),
                "served_from_elsewhere": self.elsewhere[arm],
            }
            for arm, times in self.ttft.items()
        }


def run_reuse(config: UpConfig, options: ReuseOptions, *, as_json: bool) -> None:
    """Prints a table, or one JSON object on stdout. Raises ConfigError or ChildFailedError when no cluster starts."""
    model = fetch_model(config.model, config.revision, config.cache_dir)
    measure_and_show(_measure(config, options, model), _print, as_json=as_json)


def tier_configs(config: UpConfig, options: ReuseOptions, directory: Path) -> dict[str, UpConfig]:
    """A cluster for each tier of a store."""
    blocks = LOANS_SHARE * -(-(options.num_tokens + 1) // config.block_size)
    shared = config.model_dump() | {
        "port": 0,
        "prefill": 1,
        "decode": 1,
        "threads": options.threads,
        "num_blocks": blocks,
    }
    on_disk = {"store_disk": directory / "store.slab", "store_disk_size": options.disk_bytes}
    return {
        "cpu": UpConfig(**shared | {"store_memory": options.cpu_memory}),
        "nvme": UpConfig(**shared | {"store_memory": options.nvme_memory} | on_disk),
    }


async def _measure(config: UpConfig, options: ReuseOptions, model: Path) -> dict[str, Any]:
    head = {**header("reuse"), "served": served(config)}
    listener = ClusterConsole(Console(stderr=True), quiet=True)
    times: dict[str, TierTimes] = {}
    async with AsyncExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=options.directory or None)))
        arms: dict[str, Asking] = {}
        for tier, tier_config in tier_configs(config, options, directory).items():
            cluster = await stack.enter_async_context(running_cluster(tier_config, model, listener))
            asker = await stack.enter_async_context(Asker(cluster.api_url))
            times[tier] = TierTimes()
            arms[tier] = Asking(asker, config.model_names[0], tier, options, times[tier])
        for turn, prefix in itertools.product(range(1 + options.rounds), range(options.prefixes)):
            for tier in sorted(arms, reverse=(turn + prefix) % 2 == 0):
                await arms[tier].turn(prefix, is_counted=turn > 0)
    return _report(head, options, times)


class Asking:
    """One cluster and its prefixes."""

    def __init__(self, asker: Asker, model: str, tier: str, options: ReuseOptions, times: TierTimes) -> None:
        self._asker, self._model, self._tier, self._options, self._times = asker, model, tier, options, times
        self._random = random.Random(f"{options.seed} {tier}")  # noqa: S311 - test data
        self._prefixes = [self._draw(options.prefix_tokens) for _ in range(options.prefixes)]

    def _draw(self, num_tokens: int) -> list[int]:
        return [self._random.randrange(FIRST_ORDINARY_TOKEN, _VOCABULARY) for _ in range(num_tokens)]

    async def turn(self, prefix: int, *, is_counted: bool) -> None:
        options = self._options
        prompts = {
            _MISS: self._draw(options.num_tokens),
            _KEPT: [*self._prefixes[prefix], *self._draw(options.new_tokens)],
            _HIT: [*self._prefixes[prefix], *self._draw(options.new_tokens)],
        }
        wanted = {_MISS: "", _KEPT: self._tier, _HIT: "worker"}
        for arm, prompt in prompts.items():
            # With logprobs every token makes a chunk, also one that prints nothing yet.
            answer = await self._asker.ask(completion_body(self._model, prompt, 2, logprobs=0))
            if answer.error:
                raise UnavailableError(f"{self._tier}, {arm}: {answer.error}")
            if is_counted:
                found = answer.cached_by_tier
                is_expected = comes_from(found, wanted[arm], options.prefix_tokens)
                self._times.add(arm, answer.ttft_s, found, is_expected=is_expected)
            await asyncio.sleep(options.settle_s)


def comes_from(found: Mapping[str, int], tier: str, prefix_tokens: int) -> bool:
    """All of the prefix, nine tenths of it from the tier; no tier: nothing at all."""
    if not tier:
        return sum(found.values()) == 0
    return sum(found.values()) >= prefix_tokens and found.get(tier, 0) >= 0.9 * prefix_tokens


def _report(head: dict[str, Any], options: ReuseOptions, times: Mapping[str, TierTimes]) -> dict[str, Any]:
    def ratio(tier: str, arm: str) -> float | None:
        """Of medians in one cluster."""
        miss, other = times[tier].ttft[_MISS], times[tier].ttft[arm]
        return round(statistics.median(miss) / statistics.median(other), 2) if miss and other else None

    return {
        **head,
        "options": asdict(options),
        "tiers": {tier: found.summary() for tier, found in times.items()},
        "miss_over_hit": {tier: ratio(tier, _HIT) for tier in times},
        "recompute_over_tier": {tier: ratio(tier, _KEPT) for tier in times},
    }


def _print(result: dict[str, Any]) -> None:
    options = result["options"]
    table = Table(title=f"TTFT in ms, median (min-max): {options['prefix_tokens']} + {options['new_tokens']} tokens")
    for column in ("", "store in memory", "store on disk"):
        table.add_column(column, justify="left" if not column else "right")
    tiers = [result["tiers"][tier] for tier in ("cpu", "nvme")]
    for arm, text in ((_MISS, "computed"), (_KEPT, "fetched from the store"), (_HIT, "in the worker's memory")):
        cells = [_cell(tier[arm]) for tier in tiers]
        table.add_row(text, *cells)
    for name, text in (("miss_over_hit", "computed over memory"), ("recompute_over_tier", "computed over store")):
        table.add_row(text, *(str(result[name][tier]) for tier in ("cpu", "nvme")))
    console = Console()
    console.print(table)
    print_footer(console, result)


def _cell(found: dict[str, Any]) -> str:
    text = str(Spread(**found["ttft_ms"])) if found["ttft_ms"] else "-"
    strays = len(found["served_from_elsewhere"])
    return f"{text}, {strays} from elsewhere" if strays else text
