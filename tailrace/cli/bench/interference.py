"""`tailrace bench interference`: how evenly sequences decode while long prompts arrive.

Three clusters on the same two cores, a worker a core: two workers that each do both, with prompts computed whole; the
same with prompts computed in chunks; one prefill and one decode worker. They take turns.
"""

import asyncio
import itertools
import random
from collections.abc import Iterator
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tailrace.checkpoint.model_config import load_model_config
from tailrace.cli.bench.load import Asker, Body, RequestTimes, completion_body, token_prompts
from tailrace.cli.bench.report import Spread, header, percentile, print_footer
from tailrace.cli.bench.run import measure_and_show
from tailrace.cli.cluster import running_cluster
from tailrace.cli.console import ClusterConsole
from tailrace.cli.model import fetch_model
from tailrace.config import UpConfig
from tailrace.errors import UnavailableError

ARMS = ("unchunked", "chunked", "pd")
_DECODER_PROMPT_TOKENS = 64
_PROMPT_OUTPUT_TOKENS = 8
"""More than one, so that the KV of every prompt moves to the decode worker."""
_UNCHUNKED_TOKENS = 1 << 16
_START_S = 60.0


@dataclass(frozen=True, slots=True)
class InterferenceOptions:
    decoders: int = 16
    """Sequences that decode all the time."""
    prompt_tokens: int = 1024
    prompts_per_s: float = 1.2
    """Poisson, the same arrivals for every arm; at much less, fewer than one gap in a hundred meets a prompt."""
    seconds: float = 15.0
    """Of one turn of one arm."""
    rounds: int = 2
    seed: int = 0


@dataclass(slots=True)
class ArmGaps:
    """`gaps`: seconds between two tokens of one decoder, a list a round."""

    gaps: list[list[float]] = field(default_factory=list)
    prompts_ttft: list[float] = field(default_factory=list)

    def percentile(self, share: float) -> float:
        return percentile(list(itertools.chain(*self.gaps)), share)

    def summary(self) -> dict[str, Any]:
        return {
            "icl_p50_ms": round(self.percentile(0.5) * 1e3, 2),
            "icl_p99_ms": round(self.percentile(0.99) * 1e3, 2),
            "icl_p99_ms_of_rounds": [round(percentile(gaps, 0.99) * 1e3, 2) for gaps in self.gaps],
            "icl_p999_ms": round(self.percentile(0.999) * 1e3, 2),
            "icl_max_ms": round(max(itertools.chain(*self.gaps)) * 1e3, 2),
            "num_gaps": sum(map(len, self.gaps)),
            "prompt_ttft_ms": asdict(Spread.of_ms(self.prompts_ttft)) if self.prompts_ttft else None,
            "num_prompts": len(self.prompts_ttft),
        }


def run_interference(config: UpConfig, options: InterferenceOptions, *, as_json: bool) -> None:
    """Prints a table, or one JSON object on stdout. Raises ConfigError or ChildFailedError when no cluster starts."""
    model = fetch_model(config.model, config.revision, config.cache_dir)
    measure_and_show(_measure(config, options, model), _print, as_json=as_json)


def arm_configs(config: UpConfig) -> dict[str, UpConfig]:
    shared = config.model_copy(update={"port": 0, "threads": 1, "prefix_caching": False})
    return {
        "unchunked": shared.model_copy(update={"prefill": 0, "decode": 2, "max_num_batched_tokens": _UNCHUNKED_TOKENS}),
        "chunked": shared.model_copy(update={"prefill": 0, "decode": 2}),
        "pd": shared.model_copy(update={"prefill": 1, "decode": 1}),
    }


async def _measure(config: UpConfig, options: InterferenceOptions, model: Path) -> dict[str, Any]:
    head = header("interference")
    vocab_size = load_model_config(model).vocab_size
    listener = ClusterConsole(Console(stderr=True), quiet=True)
    arms = {arm: ArmGaps() for arm in ARMS}
    async with AsyncExitStack() as stack:
        askers: dict[str, Asker] = {}
        for arm, arm_config in arm_configs(config).items():
            cluster = await stack.enter_async_context(running_cluster(arm_config, model, listener))
            askers[arm] = await stack.enter_async_context(Asker(cluster.api_url))
        for turn in range(options.rounds):
            for arm in ARMS[turn % 3 :] + ARMS[: turn % 3]:
                phase = _Phase(askers[arm], config.model_names[0], options, vocab_size, turn)
                await phase.run(arms[arm])
    return report(head, options, config, arms)


class _Phase:
    """One turn of one arm."""

    def __init__(self, asker: Asker, model: str, options: InterferenceOptions, vocab_size: int, turn: int) -> None:
        self._asker = asker
        self._model = model
        self._options = options
        self._vocab_size = vocab_size
        self._seed = options.seed + turn

    async def run(self, into: ArmGaps) -> None:
        await self._asker.ask(next(self._bodies(1, self._options.prompt_tokens, _PROMPT_OUTPUT_TOKENS, seed=-1)))
        decoders = [RequestTimes(0.0) for _ in range(self._options.decoders)]
        bodies = self._bodies(len(decoders), _DECODER_PROMPT_TOKENS, 1 << 12, seed=self._seed)
        tasks = [
            asyncio.create_task(self._asker.ask(body, times)) for body, times in zip(bodies, decoders, strict=True)
        ]
        try:
            await _all_decode(decoders)
            began = self._asker.now()
            prompts = await self._send_prompts()
            ended = self._asker.now()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        into.gaps.append([gap for times in decoders for gap in gaps_between(times.chunks_at, began, ended)])
        into.prompts_ttft += [times.ttft_s for times in prompts]

    async def _send_prompts(self) -> list[RequestTimes]:
        """Raises UnavailableError when a prompt fails: what it would have disturbed was not disturbed."""
        options = self._options
        times = arrivals(options.prompts_per_s, options.seconds, seed=self._seed)
        bodies = self._bodies(len(times), options.prompt_tokens, _PROMPT_OUTPUT_TOKENS, seed=self._seed)
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._ask_at(at, body)) for at, body in zip(times, bodies, strict=True)]
            await asyncio.sleep(options.seconds)
        results = [task.result() for task in tasks]
        if errors := {result.error for result in results if result.error}:
            raise UnavailableError("; ".join(errors))
        return results

    async def _ask_at(self, at: float, body: Body) -> RequestTimes:
        await asyncio.sleep(at)
        return await self._asker.ask(body)

    def _bodies(self, count: int, num_tokens: int, output_tokens: int, *, seed: int) -> Iterator[Body]:
        # With logprobs every token is told of, also one that prints nothing yet.
        for prompt in token_prompts(count, num_tokens, self._vocab_size, seed=seed):
            yield completion_body(self._model, prompt, output_tokens, logprobs=0)


async def _all_decode(decoders: list[RequestTimes]) -> None:
    """Raises UnavailableError when one does not begin."""
    try:
        async with asyncio.timeout(_START_S):
            await asyncio.gather(*(times.begun.wait() for times in decoders))
    except TimeoutError:
        raise UnavailableError(f"not every decoder began within {_START_S:g} s") from None
    if errors := [times.error for times in decoders if times.error]:
        raise UnavailableError(f"a decoder failed: {errors[0]}")


def gaps_between(chunks_at: list[float], began: float, ended: float) -> list[float]:
    """Of the gaps those that end in the time given."""
    return [b - a for a, b in itertools.pairwise(chunks_at) if began <= b <= ended]


def arrivals(per_s: float, seconds: float, *, seed: int) -> list[float]:
    """Of a Poisson process, the first one at once."""
    draw = random.Random(seed)  # noqa: S311 - test data
    times = [0.0]
    while (at := times[-1] + draw.expovariate(per_s)) < seconds:
        times.append(at)
    return times


def report(
    head: dict[str, Any], options: InterferenceOptions, config: UpConfig, arms: dict[str, ArmGaps]
) -> dict[str, Any]:
    pd = arms["pd"].percentile(0.99)
    return {
        **head,
        "options": asdict(options) | {"chunk_tokens": config.max_num_batched_tokens, "transport": config.transport},
        **{arm: gaps.summary() for arm, gaps in arms.items()},
        "icl_p99_unchunked_over_pd": round(arms["unchunked"].percentile(0.99) / pd, 3),
        "icl_p99_chunked_over_pd": round(arms["chunked"].percentile(0.99) / pd, 3),
    }


def _print(result: dict[str, Any]) -> None:
    options = result["options"]
    title = f"{options['decoders']} decoders, {options['prompts_per_s']}/s prompts of {options['prompt_tokens']} tokens"
    table = Table("", "ICL p50, ms", "p99", "max", "p99 over P/D", "TTFT of a prompt, ms", title=title)
    for arm in ARMS:
        said = result[arm]
        ratio = "" if arm == "pd" else f"{result[f'icl_p99_{arm}_over_pd']:.2f}"
        ttft = str(Spread(**said["prompt_ttft_ms"])) if said["prompt_ttft_ms"] else "-"
        cells = (f"{said[name]:.1f}" for name in ("icl_p50_ms", "icl_p99_ms", "icl_max_ms"))
        table.add_row(arm, *cells, ratio, ttft)
    console = Console()
    console.print(table)
    print_footer(console, result)
