"""Generated workloads: the same seed gives the same requests. Arrivals are Poisson; a load then stretches them."""

import math
from collections.abc import Callable, Iterator
from itertools import count
from random import Random

from tailrace.sim.workload import MAX_REQUESTS, SimRequest, Workload, WorkloadError, block_name

MEAN_GAP_S = 0.25
"""Between requests, before a load stretches it."""
MAX_PROMPT_TOKENS = 131_072


class _Blocks:
    """Names of blocks that nobody had before."""

    def __init__(self, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        self._numbers = count()

    def prompt(self, prefix: tuple[bytes, ...], num_tokens: int) -> tuple[bytes, ...]:
        """Of a prompt that begins with the full blocks `prefix` and goes on as no other does."""
        fresh = math.ceil(num_tokens / self._block_tokens) - len(prefix)
        return prefix + tuple(block_name(next(self._numbers)) for _ in range(max(0, fresh)))


def generate(kind: str, num_requests: int, block_tokens: int, seed: int) -> Workload:
    """`kind`: one of GENERATORS. Raises WorkloadError for another, and for a count beyond its limit."""
    if kind not in GENERATORS:
        raise WorkloadError(f"workload: must be one of {', '.join(GENERATORS)}, got {kind!r}", param="workload")
    if not 1 <= num_requests <= MAX_REQUESTS:
        raise WorkloadError(f"num_requests: must be from 1 to {MAX_REQUESTS}, got {num_requests}")
    requests = list(GENERATORS[kind](Random(seed), num_requests, block_tokens))  # noqa: S311 - no secret hangs on it
    return Workload(sorted(requests, key=lambda request: request.arrival_s), block_tokens)


def _shared_prefixes(random: Random, num_requests: int, block_tokens: int) -> Iterator[SimRequest]:
    """Groups that share a prefix of 1,000 to 8,000 tokens, the first group being asked most (Zipf), each request with
    500 tokens of its own on average: documents, agents, few-shot prompts."""
    blocks = _Blocks(block_tokens)
    num_groups = max(min(8, num_requests), num_requests // 60)
    lengths = [random.randint(1000, 8000) // block_tokens for _ in range(num_groups)]
    groups = [blocks.prompt((), length * block_tokens) for length in lengths]
    weights = [1 / (rank + 1) for rank in range(num_groups)]
    arrival_s = 0.0
    for group in random.choices(groups, weights, k=num_requests):
        arrival_s += random.expovariate(1 / MEAN_GAP_S)
        num_tokens = len(group) * block_tokens + 1 + int(random.expovariate(1 / 500))
        yield SimRequest(arrival_s, num_tokens, 1 + int(random.expovariate(1 / 200)), blocks.prompt(group, num_tokens))


def _chat(random: Random, num_requests: int, block_tokens: int) -> Iterator[SimRequest]:
    """Conversations of some five turns below one system prompt of 1,500 tokens. Each turn's prompt is all that was said
    before, answers included, and 200 tokens more; a reader takes 30 s on average."""
    blocks = _Blocks(block_tokens)
    system = blocks.prompt((), 1500 // block_tokens * block_tokens)
    begin_s = 0.0
    left = num_requests
    while left:
        begin_s += random.expovariate(1 / (5 * MEAN_GAP_S))
        now_s, context, known = begin_s, len(system) * block_tokens, system
        turns = min(left, 1 + int(random.expovariate(1 / 4)))
        left -= turns
        for _ in range(turns):
            prompt = min(MAX_PROMPT_TOKENS, context + 1 + int(random.expovariate(1 / 200)))
            answer = 1 + int(random.expovariate(1 / 400))
            full, context = prompt // block_tokens, prompt + answer
            hashes = blocks.prompt(known[:full], prompt)
            known = blocks.prompt(hashes[:full], context)[: context // block_tokens]
            yield SimRequest(now_s, prompt, answer, hashes, known[full:])
            now_s += random.expovariate(1 / 30)


def _sharegpt(random: Random, num_requests: int, block_tokens: int) -> Iterator[SimRequest]:
    """Prompts and answers as long as ShareGPT's are said to be (log-normal, means of some 200 and 350 tokens), which
    share nothing but a system prompt of 512 tokens."""
    blocks = _Blocks(block_tokens)
    system = blocks.prompt((), 512 // block_tokens * block_tokens)
    arrival_s = 0.0
    for _ in range(num_requests):
        arrival_s += random.expovariate(1 / MEAN_GAP_S)
        prompt = len(system) * block_tokens + 1 + min(MAX_PROMPT_TOKENS, int(random.lognormvariate(4.6, 1.2)))
        answer = 1 + min(8192, int(random.lognormvariate(5.3, 1.1)))
        yield SimRequest(arrival_s, prompt, answer, blocks.prompt(system, prompt))


GENERATORS: dict[str, Callable[[Random, int, int], Iterator[SimRequest]]] = {
    "shared-prefix": _shared_prefixes,
    "chat": _chat,
    "sharegpt": _sharegpt,
}
