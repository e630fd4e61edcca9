"""The hardware profile of a running cluster, for the simulator: from prompts to idle workers, then to all at once, from
what these fetch from one another, and from answers of one batch at a time."""

import asyncio
import statistics
from collections import defaultdict
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from tailrace.checkpoint.model_config import ModelConfig
from tailrace.cli.bench.load import Asker, RequestTimes, completion_body, token_prompts
from tailrace.cli.bench.replay import Served
from tailrace.config import UpConfig
from tailrace.cores import this_machine
from tailrace.sim.calibrate import DecodeSample, FetchSample, PrefillSample, calibrated, with_decode, with_fetches
from tailrace.sim.profile import PROFILES, HardwareProfile

LENGTHS = (32, 64, 128, 256, 512, 768, 1024, 1536, 2048)
"""Tokens of the prompts that one idle worker computes."""
AFTER_PREFIX = (
    (64, 64),
    (256, 64),
    (512, 64),
    (512, 256),
    (1024, 16),
    (1024, 64),
    (1024, 256),
    (1536, 512),
    (1984, 64),
)
"""(Tokens found cached, tokens computed after them). All workers but the first fetch what is cached."""
MAX_LOAN_TOKENS = 1600
"""A tenth of a pool of 1,000 blocks of 16 tokens: what is fetched in one loan."""
PAIRED_LENGTHS = (256, 512, 1024)
"""Of those that all workers compute at once."""
BATCHES = ((64, 1), (1536, 1), (64, 4), (64, 8))
"""(Tokens of each prompt, number of prompts) that are decoded together."""
DECODED_TOKENS = 24
SETTLED_TOKENS = 8
"""The last ones of each answer, by when all of a batch decode."""


@dataclass(frozen=True, slots=True)
class MeasuredProfile:
    profile: HardwareProfile
    samples: tuple[PrefillSample, ...]
    """Medians, one of each kind of prompt."""
    fetches: tuple[FetchSample, ...]
    """Medians, one of each length."""
    decodes: tuple[DecodeSample, ...]
    """Medians, one of each kind of batch."""
    fastest: float
    slowest: float
    """Of all single measurements, over the median of their kind."""

    def report(self) -> dict[str, Any]:
        """Costs in the units in which people think of them, and how far the samples are from them."""
        profile = self.profile
        errors = [profile.prefill_s(s.cached_tokens, s.prompt_tokens) / s.seconds - 1.0 for s in self.samples]
        return {
            "prefill_step_ms": round(profile.step_s(()) * 1e3, 3),
            "us_per_token": round(profile.compute_s(0, 1) * 1e6, 2),
            "us_per_token_of_context": round(profile.context_s_per_token * 1e6, 3),
            "prefill_ms": {str(length): round(profile.prefill_s(0, length) * 1e3, 1) for length in (64, 512, 2048)},
            "request_overhead_ms": round(profile.request_overhead_s * 1e3, 2),
            "contention": round(profile.contention, 4),
            "fetch_overhead_ms": round(profile.fetch_overhead_s * 1e3, 2),
            "fetch_gb_per_s": round(profile.link_bytes_per_s / 1e9, 3),
            "fetches_ms": {
                str(s.num_bytes // profile.kv_bytes_per_token): round(s.seconds * 1e3, 1) for s in self.fetches
            },
            "decode_step_ms": round(profile.step_base_s * 1e3, 3),
            "decode_row_ms": round(profile.step_per_row_s * 1e3, 3),
            "decode_us_per_token_of_context": round(profile.step_per_token_s * 1e6, 3),
            "decode_samples_ms": {
                f"{s.num_rows} x {s.num_context // s.num_rows}": round(s.seconds * 1e3, 2) for s in self.decodes
            },
            "handoff_overhead_ms": round(profile.handoff_overhead_s * 1e3, 2),
            "cores": profile.cores,
            "num_samples": len(errors),
            "samples_over_median": [round(self.fastest, 3), round(self.slowest, 3)],
            "fit_error_mean": round(statistics.mean(map(abs, errors)), 4),
            "fit_error_max": round(max(map(abs, errors)), 4),
        }


def unmeasured(model: ModelConfig, config: UpConfig) -> HardwareProfile:
    """What is known of a cluster before anything is measured; prefills and fetches are measured here."""
    value_bytes = 4 if config.dtype == "float32" else 2
    return replace(
        PROFILES["cpu"],
        name="measured",
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        kv_bytes_per_token=2 * model.num_layers * model.num_kv_heads * model.head_dim * value_bytes,
        chunk_tokens=config.max_num_batched_tokens,
        max_num_seqs=config.max_num_seqs,
        cores=this_machine().num_usable,
    )


class ProfileMeter:
    """Takes samples, a round at a time."""

    def __init__(self, asker: Asker, model: str, config: UpConfig, about: ModelConfig) -> None:
        """The cluster's policy must be round-robin."""
        self._base = unmeasured(about, config)
        self._num_workers = config.prefill
        self._limit = min(about.max_position_embeddings, config.max_model_len or about.max_position_embeddings) - 1
        self._ask = _Ask(asker, model, about.vocab_size, config.prefill)
        self._rounds: list[list[Served]] = []
        self._slowdowns: list[float] = []
        self._fetches: dict[int, list[float]] = defaultdict(list)
        """Seconds, by tokens fetched."""
        self._decodes: dict[tuple[int, int], list[float]] = defaultdict(list)
        """Seconds a step, by rows and their context."""
        self._handoffs: list[float] = []

    async def warm_up(self) -> None:
        """The first prompts find nothing warm."""
        for length in (LENGTHS[0], LENGTHS[-1]):
            await self._ask.at_once(min(length, self._limit), self._num_workers)

    async def take_round(self) -> None:
        """The cluster must be idle. Raises UnavailableError when a request fails."""
        alone_ones: list[Served] = []
        for length in filter(self._fits, LENGTHS):
            (alone,) = await self._ask.at_once(length, 1)
            alone_ones.append(alone)
            if length in PAIRED_LENGTHS and self._num_workers > 1:
                await self._take_paired(length, alone.prefill_s)
        for before, rest in AFTER_PREFIX:
            if self._fits(before + rest):
                computing, *fetching, last = await self._ask.after_prefix(before, rest)
                alone_ones.append(last)
                for one in fetching:
                    self._add_fetch(one, computing)
        for length, count in BATCHES:
            if self._fits(length + DECODED_TOKENS):
                self._add_decode(length, await self._ask.together(length, count, DECODED_TOKENS))
        self._rounds.append(alone_ones)

    async def _take_paired(self, length: int, alone_s: float) -> None:
        """Counts only where the router gave one to each worker."""
        together = await self._ask.at_once(length, self._num_workers)
        if len({served.worker for served in together}) == self._num_workers:
            self._slowdowns += [served.prefill_s / alone_s - 1.0 for served in together]

    def _add_fetch(self, one: Served, computing: Served) -> None:
        """What the fetch has added to the time outside of the prefill, of prompts of one length."""
        seconds = (one.ttft_s - one.prefill_s) - (computing.ttft_s - computing.prefill_s)
        if 0 < one.fetched_tokens <= MAX_LOAN_TOKENS and seconds > 0.0:
            self._fetches[one.fetched_tokens].append(seconds)

    def _add_decode(self, length: int, together: list[RequestTimes]) -> None:
        """Steps of the whole batch; what the first one waited for the prompt's KV, where nobody else is in it."""
        settled = [gap for times in together for gap in times.gaps_s[-SETTLED_TOKENS:]]
        if not settled:
            return
        context = len(together) * (length + DECODED_TOKENS - SETTLED_TOKENS // 2)
        self._decodes[len(together), context].append(statistics.mean(settled))
        if len(together) == 1:
            self._handoffs.append(together[0].gaps_s[0] - statistics.mean(settled))

    def _fits(self, length: int) -> bool:
        return length <= self._limit

    def result(self) -> MeasuredProfile:
        """Of all rounds so far; at least one."""
        kinds: dict[tuple[int, int], list[float]] = defaultdict(list)
        for one in chain(*self._rounds):
            kinds[_kind(one)].append(one.prefill_s)
        medians = {kind: statistics.median(seconds) for kind, seconds in kinds.items()}
        samples = tuple(PrefillSample(*kind, seconds) for kind, seconds in medians.items())
        profile = replace(
            calibrated(self._base, samples),
            request_overhead_s=statistics.median(one.ttft_s - one.prefill_s for one in chain(*self._rounds)),
            contention=max(0.0, statistics.median(self._slowdowns)) if self._slowdowns else 0.0,
            handoff_overhead_s=max(0.0, statistics.median(self._handoffs)) if self._handoffs else 0.0,
        )
        token_bytes = profile.kv_bytes_per_token
        fetches = tuple(FetchSample(n * token_bytes, statistics.median(s)) for n, s in self._fetches.items())
        if len(fetches) > 1:
            profile = with_fetches(profile, fetches)
        decodes = tuple(DecodeSample(*kind, statistics.median(s)) for kind, s in self._decodes.items())
        if len(decodes) > 2:
            profile = with_decode(profile, decodes)
        ratios = [one.prefill_s / medians[_kind(one)] for one in chain(*self._rounds)]
        return MeasuredProfile(profile, samples, fetches, decodes, min(ratios), max(ratios))


def _kind(one: Served) -> tuple[int, int]:
    return one.hit_tokens, one.prompt_tokens


class _Ask:
    """Prompts that nobody has seen."""

    def __init__(self, asker: Asker, model: str, vocab_size: int, num_workers: int) -> None:
        self._num_workers = num_workers
        self._asker = asker
        self._model = model
        self._vocab_size = vocab_size
        self._seed = 0

    async def at_once(self, num_tokens: int, count: int) -> list[Served]:
        return await asyncio.gather(*(self._ask(prompt) for prompt in self._prompts(count, num_tokens)))

    async def after_prefix(self, before: int, rest: int) -> list[Served]:
        """A prefix and a token, which each worker is asked for in turn, then `rest` tokens after that prefix."""
        (prefix,), (tail,) = self._prompts(1, before), self._prompts(1, rest)
        asked = [await self._ask([*prefix, tail[0]]) for _ in range(self._num_workers)]
        return [*asked, await self._ask([*prefix, *tail])]

    async def together(self, num_tokens: int, count: int, output_tokens: int) -> list[RequestTimes]:
        """Raises UnavailableError when one fails."""
        bodies = [completion_body(self._model, p, output_tokens, logprobs=0) for p in self._prompts(count, num_tokens)]
        answers = await asyncio.gather(*map(self._asker.ask, bodies))
        for times in answers:
            Served.answered(times)
        return answers

    def _prompts(self, count: int, num_tokens: int) -> list[list[int]]:
        self._seed += 1
        return list(token_prompts(count, num_tokens, self._vocab_size, seed=self._seed))

    async def _ask(self, prompt: list[int]) -> Served:
        return Served.answered(await self._asker.ask(completion_body(self._model, prompt, 1, logprobs=0)))
