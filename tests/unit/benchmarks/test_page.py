from pathlib import Path

import pytest

from benchmarks.arms import Answer, ArmSpec
from benchmarks.compare import GroupResult, Sample
from benchmarks.goals import GOALS, PEER_GOALS
from benchmarks.limits import Limits
from benchmarks.own import COMMANDS, OwnResult, run_own
from benchmarks.page import Heading, load_notes, page
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


def text(groups=(), own=(), notes=None):
    return "\n".join(page(Heading("2026-01-01", "make bench", "m", MACHINE, notes or {}), groups, own))


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


def test_int8_is_no_peer_that_one_loses_to_and_has_its_goal():
    goal = PEER_GOALS[2]
    rounds = {"tailrace": 2.0, "tailrace-int8": 1.0, "vllm": 2.5}
    samples = {
        (goal.workload, name): [Sample.of(goal.workload, None, Answer(wall_s, 64, (1,), 1.0, 0.0))]
        for name, wall_s in rounds.items()
    }
    group = Group((1,), tuple(ArmSpec(name, (), (1,)) for name in rounds), (goal.workload,))
    said = text([GroupResult(group, {}, {}, {}, samples)])
    assert row(said, "| tailrace-int8")[3] == "0.50 (0.50-0.50)"
    assert row(said, f"| {goal.what}")[2:6] == ["2.5", ">= 1.6", "2.5", "aim met"]


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
        OwnResult("engine batch 1", "tailrace bench engine", {"mbu_decode": 0.3, "versions": {"tailrace": "9"}}),
        OwnResult(
            "gateway",
            "tailrace bench gateway",
            {"gateway": {"cpu_us_per_token": {"median": 9.0, "min": 8.0, "max": 9.5}}, "gateway_over_plain": 0.5},
            other_cores=0.5,
        ),
        OwnResult("handoff", "tailrace bench handoff", None, "no worker"),
    ]
    said = text(own=own, notes={"MBU at batch 1": "packing is next"})
    assert row(said, "| MBU at batch 1")[2:7] == ["0.3", ">= 0.65", "0.85", "**missed**", "packing is next"]
    assert row(said, "| gateway CPU a token, 32")[2:6] == ["9 (8-9.5)", "<= 20", "10", "aim met"]
    assert row(said, "| gateway CPU a token over")[5] == "met"
    assert row(said, "| first token of")[2] == "not measured: handoff was not run to its end"
    assert "- `tailrace bench handoff` failed (0.00 cores of others): no worker" in said
    assert "0.50 cores of others (busy)" in said
    assert "tailrace 9." in said
    assert "idle" not in said


def test_a_benchmark_that_leaves_a_figure_out_is_not_measured():
    said = text(own=[OwnResult("transfer", "tailrace bench transfer", {"stream_over_socket": 0.9})])
    assert row(said, "| pull over nixl")[2].startswith("not measured")
    assert row(said, "| pull over a stream")[5] == "met"


def test_peers_are_held_against_goals_by_rounds():
    goal = PEER_GOALS[0]
    slow, fast = (Sample.of(goal.workload, None, Answer(wall_s, 64, (1,), 1.0, 0.0)) for wall_s in (3.0, 2.0))
    group = Group((1,), (ArmSpec("tailrace", (), (1,)), ArmSpec("vllm", (), (1,))), (goal.workload,))
    samples = {(goal.workload, "tailrace"): [fast, fast], (goal.workload, "vllm"): [slow, fast]}
    said = text([GroupResult(group, {}, {}, {}, samples)])
    assert row(said, f"| {goal.what}")[2:6] == ["1.25 (1-1.5)", ">= 1.3", "1.6", "**missed**"]
    assert "not measured" in row(said, f"| {PEER_GOALS[1].what}")[2]


def test_limits_from_above_and_below():
    assert [Limits(0.5, 0.8).verdict(v) for v in (0.4, 0.5, 0.8)] == ["**missed**", "met", "aim met"]
    assert [Limits(20, 10, at_most=True).verdict(v) for v in (21, 20, 10)] == ["**missed**", "met", "aim met"]


def test_a_note_of_a_row_that_there_is_not_is_refused(tmp_path):
    assert load_notes(tmp_path / "none.toml") == {}
    (tmp_path / "n.toml").write_text('"MBU at batch 1" = "why"\n')
    assert load_notes(tmp_path / "n.toml") == {"MBU at batch 1": "why"}
    (tmp_path / "n.toml").write_text('"MBU" = "why"\n')
    with pytest.raises(ValueError, match="no such rows: MBU"):
        load_notes(tmp_path / "n.toml")


def test_every_goal_is_of_a_benchmark_that_is_run():
    assert {goal.benchmark for goal in GOALS} <= set(COMMANDS)


def test_a_benchmark_that_fails_says_why():
    said = []
    [done] = run_own("no-such-model", said.append, {"x": ("engine", "--batch", "1")})
    assert done.result is None
    assert "no-such-model" in done.failure
    assert said[0] == "tailrace bench engine --batch 1 --model no-such-model --json"


def test_a_peer_is_asked_only_when_its_setup_came_to_the_end(tmp_path):
    for peer in ("vllm", "llama"):
        (tmp_path / peer).mkdir()
    (tmp_path / "llama" / ".ready").touch()
    one, two = plan(Path("m"), tmp_path, (0, 1))
    assert [arm.name for arm in one.arms] == ["tailrace", "tailrace-int8", "llama"]
    assert [arm.command[-1] for arm in one.arms[:2]] == ["none", "int8"]
    assert [arm.name for arm in two.arms] == ["tailrace"]
    assert one.missing == ("vllm", "transformers")
    assert (one.cores, two.cores) == ((1,), (0, 1))
    assert one.arms[2].max_batch == 1
    assert len(plan(Path("m"), tmp_path, (0,))) == 1


def test_prompts_are_the_same_for_everybody_and_new_every_round():
    assert WORKLOAD.prompts(5000, 1) == WORKLOAD.prompts(5000, 1) != WORKLOAD.prompts(5000, 2)
    assert [len(prompt) for prompt in WORKLOAD.prompts(5000, 1)] == [8, 8]
