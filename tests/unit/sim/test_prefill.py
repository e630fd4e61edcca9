from tailrace.index.memory import MemoryIndex
from tailrace.policy.routing import PrefixRange
from tailrace.sim.prefill import FetchedShare, PrefillJob, PrefillNode
from tailrace.sim.profile import PROFILES
from tailrace.sim.workload import SimRequest, block_name

H100 = PROFILES["h100"]
BLOCK = 512


def make_node(num_blocks: int = 100) -> PrefillNode:
    return PrefillNode("p0", num_blocks, BLOCK, H100)


def make_job(number: int, *blocks: int, elsewhere: int = 0) -> PrefillJob:
    """`elsewhere`: blocks that p1 is said to hold."""
    request = SimRequest(0.0, len(blocks) * BLOCK, 1, tuple(map(block_name, blocks)))
    return PrefillJob(number, request, "d0", (PrefixRange("p1", 0, elsewhere),) if elsewhere else ())


def run_step(node: PrefillNode) -> list[int]:
    """Numbers of those that it computed."""
    assert node.start(0.0) is not None
    return [job.number for job in node.finish()]


def end_fetch(node: PrefillNode, job: PrefillJob, *, num_landed: int) -> None:
    ((granted, fetch),) = node.drain_granted()
    assert granted is job
    node.landed(fetch, fetch.blocks[fetch.num_local : fetch.num_local + num_landed])
    node.end_fetch(job, fetch, [FetchedShare("p1", num_landed, 0.1)], "worker")


def test_others_compute_while_a_prompt_fetches_and_it_keeps_its_rank() -> None:
    node = make_node()
    first, second, third = make_job(1, 10, 11, 12, elsewhere=2), make_job(2, 20), make_job(3, *range(30, 36))
    for job in (first, second):
        node.accept(job)
    assert run_step(node) == [2]
    node.accept(third)
    end_fetch(node, first, num_landed=2)
    assert run_step(node) == [1], "before what came later, which gets the rest of the step"
    assert run_step(node) == [3]
    assert (first.hit_tokens, first.fetched_tokens) == (0, 2 * BLOCK)
    for job in (first, second, third):
        node.give_back(job)
    node.pool.check_integrity()


def test_only_what_is_missing_is_fetched_and_what_does_not_come_is_computed() -> None:
    node = make_node()
    old, new, cut = make_job(1, 10, 11), make_job(2, 10, 11, 12, 13, elsewhere=3), make_job(3, 20, 21, 22, elsewhere=2)
    node.accept(old)
    run_step(node)
    node.accept(new)
    assert node.start(0.0) is None
    end_fetch(node, new, num_landed=1)
    run_step(node)
    assert (new.hit_tokens, new.fetched_tokens) == (2 * BLOCK, BLOCK)
    node.accept(cut)
    assert node.start(0.0) is None
    end_fetch(node, cut, num_landed=1)
    assert run_step(node) == [3]
    assert (cut.hit_tokens, cut.fetched_tokens) == (0, BLOCK)


def test_prompts_of_one_step_do_not_find_each_others_blocks() -> None:
    node = make_node()
    twins = [make_job(number, 1, 2) for number in (1, 2)]
    for job in twins:
        node.accept(job)
    assert run_step(node) == [1, 2]
    assert [job.hit_tokens for job in twins] == [0, 0]


def test_a_command_waits_for_the_step_that_runs() -> None:
    node = make_node()
    told: list[float] = []
    node.tell(told.append, 1.0)
    assert told == [1.0], "at once, where nothing is computed"
    node.accept(make_job(1, 1))
    node.start(1.0)
    node.tell(told.append, 2.0)
    assert told == [1.0]
    node.finish()
    assert [command(3.0) for command in node.drain_commands()] == [None]
    assert told == [1.0, 3.0]
    assert node.drain_commands() == []


def test_what_a_step_changed_is_told_when_it_is_over() -> None:
    node, index = make_node(), MemoryIndex(100)
    node.accept(make_job(1, 1, 2))
    assert node.view().waiting_tokens == 0, "a report says so, and there was none since"
    node.start(0.0)
    assert node.view().prefill_tokens_per_s == 0.0
    node.finish()
    node.report(index)
    assert node.view().prefill_tokens_per_s > 0.0
    assert index.longest_prefix([block_name(1), block_name(2)]) == {"p0": 2}
