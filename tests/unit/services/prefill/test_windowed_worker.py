"""A prefill worker of a model with a window, in a pool shorter than its prompt: what it says of who gave way."""

from collections.abc import Iterator

from services.prefill.worker import PrefillWorker
from tailrace.worker.report import LendProgress, StepReport
from tests.helpers.decode_world import make_request
from tests.helpers.prefill_world import PrefillWorld
from tests.helpers.values import make_layout

TOKENS = list(range(100, 131))
FIRST, SECOND = 1, 2


def steps(worker: PrefillWorker, world: PrefillWorld) -> Iterator[StepReport]:
    """Two prompts, of which the second finds what the first has computed. Nobody pulls the first for 15 steps."""
    for at in range(100):
        if at in (0, 3):
            request_id, tokens = (FIRST, TOKENS[:17]) if at == 0 else (SECOND, TOKENS)
            worker.submit(make_request(request_id, tokens, block_size=4), f"r{request_id}")
        report = worker.finish(worker.launch())
        yield report
        if at == 15:
            worker.drop(FIRST)
        if any(done.handle == SECOND for done in report.reports):
            return


def make_worker() -> tuple[PrefillWorker, PrefillWorld]:
    """A pool of 7 blocks, for a second prompt of 8."""
    world = PrefillWorld(num_blocks=7, window=12, budget=4, max_model_len=64)
    return PrefillWorker(world.runner, world.scheduler, world.pool, make_layout(), pool_address=0), world


def test_whoever_gave_way_and_came_back_is_not_told_that_its_own_work_was_cached() -> None:
    worker, world = make_worker()
    admissions: list[int] = []
    for report in steps(worker, world):
        job = world.scheduler.job(SECOND)
        if job is not None and (not admissions or admissions[-1] != job.num_cached_tokens):
            admissions.append(job.num_cached_tokens)
        last = report
    assert admissions == [16, 28], "it gave way once, and found what it had computed"
    [done] = last.reports
    assert (done.cached_tokens, done.cached_by_tier) == (16, {"worker": 16})
    [lent] = [lend for lend in last.lends if lend.done is not None]
    assert lent.done.cached_tokens == 16


def test_nothing_is_lent_of_a_table_that_is_not_finished() -> None:
    worker, world = make_worker()
    told: list[tuple[int, int, LendProgress]] = []
    for report in steps(worker, world):
        job = world.scheduler.job(SECOND)
        told += [(len(job.blocks), job.num_ready, lend) for lend in report.lends if lend.request_id == SECOND]
    unfinished = [(ready, lend.ready) for num_blocks, ready, lend in told if num_blocks < 8]
    assert any(ready > blocks.first_index for ready, blocks in unfinished), "it had blocks to tell of"
    assert all(not blocks.blocks for _, blocks in unfinished)
    finished = [lend.ready for num_blocks, _, lend in told if num_blocks == 8]
    assert [block for blocks in finished for block in blocks.blocks]
