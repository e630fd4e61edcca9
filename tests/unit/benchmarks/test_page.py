from pathlib import Path

from benchmarks.arms import Answer, ArmSpec
from benchmarks.compare import GroupResult, Sample
from benchmarks.own import GOALS, OwnResult, run_own, server_over_engine
from benchmarks.page import page
from benchmarks.workloads import Group, Workload, plan

WORKLOAD = Workload(2, 8, 4)
MACHINE = {"processor": "P", "cores": 2, "python": "3", "load_before": 0.1}
ABOUT = {"versions": {"a": "1"}, "settings": {"threads": 1}}


def answer(wall_s, tokens=(1, 2, 3, 4), others=0.0):
    return Answer(wall_s, len(tokens) * 2, tuple(tokens), 1.0, others)


def sample(wall_s, **more):
    return Sample.of(WORKLOAD, Answer(0.5, 2, (1,), 1.0, 0.0), answer(wall_s, **more))


def result(own, peer):
    group = Group((0,), (ArmSpec("tailrace", (), (0,)), ArmSpec("peer", (), (0,))), (WORKLOAD,), ("absent",))
    samples = {(WORKLOAD, "peer"): peer, (WORKLOAD, "tailrace"): own}
    return GroupResult(group, {"tailrace": ABOUT, "peer": ABOUT}, {"tailrace": 1.0, "peer": 2.0}, {}, samples)


def text(groups=(), own=()):
    return "\n".join(page("2026-01-01", "m", MACHINE, groups, own))


def row(page_text, start):
    return [cell.strip() for cell in next(line for line in page_text.splitlines() if line.startswith(start)).split("|")]


def test_definitions_of_the_two_rates():
    taken = sample(2.5)
    assert taken.output_tokens_per_s == 8 / 2.5
    assert taken.decode_tokens_per_s == 2 * 3 / 2.0


def test_a_workload_without_first_tokens_has_no_decode_rate():
    whole = Sample.of(WORKLOAD, None, answer(2.0))
    assert whole.decode_tokens_per_s is None
    said = text([result([whole], [whole])])
    assert row(said, "| peer")[2:6] == ["4.0 (4.0-4.0)", "1.00 (1.00-1.00)", "-", ""]


def test_ratios_are_of_rounds_and_a_loss_is_called_one():
    said = text([result([sample(1.0), sample(2.0)], [sample(2.0), sample(4.0)])])
    assert row(said, "| peer")[3] == "2.00 (2.00-2.00)"
    said = text([result([sample(2.0)], [sample(1.0)])])
    assert row(said, "| peer")[3] == "0.50 (0.50-0.50) **loss**"
    assert said.index("| tailrace") < said.index("| peer")


def test_other_load_and_other_tokens_are_shown():
    said = text([result([sample(1.0)], [sample(1.0, others=0.4, tokens=(1, 2, 9, 9))])])
    assert row(said, "| peer")[6:8] == ["0.40 (busy)", "2 of 4"]


def test_who_is_not_there_is_named():
    broken = result([sample(1.0)], [sample(1.0)])
    broken.failures["peer"] = "peer ended: boom"
    said = text([broken])
    assert "- absent: not measured, not set up (`make bench-peers`)" in said
    assert "- peer: not measured to the end: peer ended: boom" in said


def test_goals_are_held_against_what_was_measured():
    own = [
        OwnResult("engine batch 1", "tailrace bench engine", {"mbu_decode": 0.3}),
        OwnResult(
            "gateway",
            "tailrace bench gateway",
            {"gateway": {"cpu_us_per_token": {"median": 9.0}}, "gateway_over_plain": 0.5},
        ),
        OwnResult("handoff", "tailrace bench handoff", None, "no worker"),
    ]
    said = text(own=own)
    assert row(said, "| MBU at batch 1")[2:6] == ["0.3", ">= 0.65", "0.85", "**missed**"]
    assert row(said, "| gateway CPU")[2:6] == ["9", "<= 20", "10", ""]
    assert row(said, "| gateway over")[5] == ""
    assert "- `tailrace bench handoff` failed: no worker" in said
    assert "first token" not in said


def test_every_goal_is_of_a_benchmark_that_is_run():
    from benchmarks.own import COMMANDS

    assert {goal.benchmark for goal in GOALS} <= set(COMMANDS)


def test_the_server_is_held_against_the_engine():
    results = {"serve": {"output_tokens_per_s": 90.0}, "engine batch 32": {"output_tokens_per_s": 100.0}}
    assert server_over_engine(results) == 0.9
    assert server_over_engine({}) is None


def test_a_benchmark_that_fails_says_why():
    said = []
    [done] = run_own("no-such-model", said.append, {"x": ("engine", "--batch", "1")})
    assert done.result is None
    assert "no-such-model" in done.failure
    assert said == ["tailrace bench engine --batch 1 --model no-such-model --json"]


def test_a_peer_is_asked_only_when_its_setup_came_to_the_end(tmp_path):
    for peer in ("vllm", "llama"):
        (tmp_path / peer).mkdir()
    (tmp_path / "llama" / ".ready").touch()
    one, two = plan(Path("m"), tmp_path, (0, 1))
    assert [arm.name for arm in one.arms] == ["tailrace", "llama"]
    assert one.missing == ("vllm", "transformers")
    assert (one.cores, two.cores) == ((1,), (0, 1))
    assert one.arms[1].max_batch == 1
    assert len(plan(Path("m"), tmp_path, (0,))) == 1


def test_prompts_are_the_same_for_everybody_and_new_every_round():
    assert WORKLOAD.prompts(5000, 1) == WORKLOAD.prompts(5000, 1) != WORKLOAD.prompts(5000, 2)
    assert [len(prompt) for prompt in WORKLOAD.prompts(5000, 1)] == [8, 8]
