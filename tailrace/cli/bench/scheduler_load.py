"""What the decode scheduler costs with many sequences running: steps whose tokens nobody computes."""

import time

from tailrace.kv.block_pool import BlockPool
from tailrace.plan import StepOutput, StepPlan
from tailrace.policy.decode_scheduler import DecodeScheduler
from tailrace.policy.request import Request, StopRule, blocks_for
from tailrace.types import SamplingParams

_BLOCK_SIZE = 16
_PROMPT_TOKENS = 128


def time_scheduler(num_sequences: int, *, num_steps: int = 256) -> list[float]:
    """Seconds of `schedule` and `finish` together, for each of the steps in which everybody decodes."""
    scheduler = _full_scheduler(num_sequences, num_steps)
    while scheduler.num_waiting or scheduler.waiting_tokens:
        plan = scheduler.schedule()
        scheduler.finish(plan, _drawn(plan))
    return [_time_step(scheduler) for _ in range(num_steps)]


def _full_scheduler(num_sequences: int, num_steps: int) -> DecodeScheduler:
    max_tokens = num_sequences + num_steps + 2
    blocks = num_sequences * blocks_for(_PROMPT_TOKENS + max_tokens, _BLOCK_SIZE)
    scheduler = DecodeScheduler(
        BlockPool(blocks, epoch=1),
        block_size=_BLOCK_SIZE,
        max_num_seqs=num_sequences,
        max_num_batched_tokens=num_sequences + _PROMPT_TOKENS,
        stop=StopRule(frozenset(), _PROMPT_TOKENS + max_tokens),
    )
    for number in range(num_sequences):
        tokens = [number] * _PROMPT_TOKENS
        scheduler.submit_local(Request(number, tokens, _PROMPT_TOKENS, SamplingParams(max_tokens=max_tokens)))
    return scheduler


def _time_step(scheduler: DecodeScheduler) -> float:
    begun = time.perf_counter()
    plan = scheduler.schedule()
    scheduled = time.perf_counter()
    out = _drawn(plan)
    drawn = time.perf_counter()
    scheduler.finish(plan, out)
    return (scheduled - begun) + (time.perf_counter() - drawn)


def _drawn(plan: StepPlan) -> StepOutput:
    slots = [*plan.decode, *(chunk.slot for chunk in plan.chunks for _ in chunk.choices)]
    return StepOutput(slots, [0] * len(slots), [0] * len(slots), [5] * len(slots))
