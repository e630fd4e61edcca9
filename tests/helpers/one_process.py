"""The engine without any service: the decode worker's scheduler, driven in this process."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tailrace.engine.engine import EngineOptions, load_engine
from tailrace.kv.block_pool import BlockPool
from tailrace.kv.hashing import chain_seed, hash_blocks
from tailrace.policy.decode_scheduler import DecodeScheduler
from tailrace.policy.request import Request, StopRule
from tailrace.types import SamplingParams


class OneProcess:
    """Generates for all prompts of a call together."""

    def __init__(self, model: Path, *, dtype: str, quantization: str = "none") -> None:
        sizes = {"num_blocks": 512, "max_model_len": 2048}
        self._engine = load_engine(EngineOptions(model, dtype=dtype, quantization=quantization, device="cpu", **sizes))

    def generate(self, prompts: Sequence[Sequence[int]], sampling: SamplingParams) -> list[list[int]]:
        layout = self._engine.layout
        pool = BlockPool(self._engine.cache.num_blocks, epoch=1, prefix_caching=False)
        scheduler = DecodeScheduler(
            pool,
            block_size=layout.block_size,
            max_num_seqs=64,
            max_num_batched_tokens=512,
            stop=StopRule(frozenset(self._engine.config.eos_token_ids), self._engine.max_model_len),
        )
        seed = chain_seed(layout.fingerprint, "", "")
        for number, prompt in enumerate(prompts):
            tokens = list(prompt)
            hashes = hash_blocks(tokens, layout.block_size, seed)
            scheduler.submit_local(Request(number, tokens, len(tokens), replace(sampling), (0,), 0, seed, hashes))
        return self._run(scheduler, len(prompts))

    def _run(self, scheduler: DecodeScheduler, count: int) -> list[list[int]]:
        texts: list[list[int]] = [[] for _ in range(count)]
        num_open = count
        while num_open:
            plan = scheduler.schedule()
            step = scheduler.finish(plan, self._engine.runner.run(plan))
            for handle, token in zip(step.tokens.handles, step.tokens.token_ids, strict=True):
                texts[handle].append(token)
            num_open -= len(step.finished)
        return texts
