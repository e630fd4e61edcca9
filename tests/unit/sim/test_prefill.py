from tailrace.sim.prefill import PrefillJob, PrefillNode
from tailrace.sim.profile import PROFILES
from tailrace.sim.workload import SimRequest, block_name

H100 = PROFILES["h100"]
BLOCK = 512


def make_node(num_blocks: int = 100) -> PrefillNode:
    return PrefillNode("p0", num_blocks, BLOCK, H100)


def make_job(number: int, *blocks: int) -> PrefillJob:
    request = SimRequest(0.0, len(blocks) * BLOCK, 1, tuple(map(block_name, blocks)))
    return PrefillJob(number, request, "d0")


def run_step(node: PrefillNode) -> list[int]:
    """Numbers of those that it computed."""
    assert node.start(0.0) is not None
    return [job.number for job in node.finish()]


def test_a_prompt_whose_prefix_is_fetched_keeps_its_place() -> None:
    node = make_node()
    first, second = make_job(1, 10, 11, 12), make_job(2, 20)
    landing = node.begin_landing(first.request.hashes, 2)
    assert landing is not None
    node.accept(first, lands=True)
    node.accept(second)
    assert node.start(0.0) is None, "it is waited for"
    assert node.view().num_waiting == 2
    node.landed(landing, first)
    assert run_step(node) == [1, 2]
    assert (first.hit_tokens, first.fetched_tokens) == (0, 2 * BLOCK)
    for job in (first, second):
        node.give_back(job)
    node.pool.check_integrity()
    assert node.pool.ledger().cached == 4


def test_only_what_is_missing_is_fetched() -> None:
    node = make_node()
    old, new = make_job(1, 10, 11), make_job(2, 10, 11, 12, 13)
    node.accept(old)
    run_step(node)
    node.give_back(old)
    landing = node.begin_landing(new.request.hashes, 3)
    assert landing is not None
    assert (len(landing.own), len(landing.blocks)) == (2, 1)
    node.accept(new, lands=True)
    node.landed(landing, new)
    run_step(node)
    assert (new.hit_tokens, new.fetched_tokens) == (2 * BLOCK, BLOCK)
    assert node.begin_landing(new.request.hashes, 3) is None, "all of it is here"


def test_without_room_nothing_is_fetched_and_nothing_held() -> None:
    node = make_node(num_blocks=4)
    running = make_job(1, 1, 2, 3)
    node.accept(running)
    assert node.start(0.0) is not None
    assert node.begin_landing(make_job(2, 10, 11).request.hashes, 2) is None
    node.finish()
    node.give_back(running)
    node.pool.check_integrity()


def test_prompts_of_one_step_do_not_find_each_others_blocks() -> None:
    node = make_node()
    twins = [make_job(number, 1, 2) for number in (1, 2)]
    for job in twins:
        node.accept(job)
    assert run_step(node) == [1, 2]
    assert [job.hit_tokens for job in twins] == [0, 0]
