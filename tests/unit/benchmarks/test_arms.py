import os
import sys
from pathlib import Path

import psutil
import pytest

from benchmarks.arms import Arm, ArmFailedError, ArmSpec

PEERS = Path(__file__).parents[3] / "benchmarks" / "peers"
ECHO = """
import sys
sys.path.insert(0, {peers!r})
from arm import claim_stdout, serve
answers = claim_stdout()
print("a library speaks")
def generate(prompts, output_tokens):
    if output_tokens == 13:
        sys.exit("no thirteen")
    return [[sum(prompt)] * output_tokens for prompt in prompts]
serve(answers, generate, name="echo", packages=("pytest",), settings={{"threads": 1}})
"""


@pytest.fixture
def arm(tmp_path):
    script = tmp_path / "echo.py"
    script.write_text(ECHO.format(peers=str(PEERS)))
    cores = tuple(os.sched_getaffinity(0))[:1]
    arm = Arm(ArmSpec("echo", (sys.executable, str(script)), cores), tmp_path / "log")
    yield arm
    arm.end()


def test_an_arm_says_what_it_is_and_answers(arm):
    assert arm.about == {"name": "echo", "versions": {"pytest": pytest.__version__}, "settings": {"threads": 1}}
    answer = arm.ask([[1, 2], [3, 4]], 3)
    assert (answer.output_tokens, answer.tokens) == (6, (3, 3, 3))
    assert answer.wall_s > 0
    assert answer.other_cores >= 0


def test_an_arm_is_stopped_while_it_is_not_asked_and_keeps_to_its_cores(arm):
    process = psutil.Process(arm._process.pid)
    assert process.status() == psutil.STATUS_STOPPED
    assert tuple(process.cpu_affinity()) == arm.spec.cores
    arm.ask([[1]], 1)
    assert process.status() == psutil.STATUS_STOPPED


def test_an_arm_that_ends_says_why(arm):
    with pytest.raises(ArmFailedError, match=r"echo ended: .*no thirteen"):
        arm.ask([[1]], 13)


def test_an_arm_that_does_not_start_says_why(tmp_path):
    spec = ArmSpec("lame", (sys.executable, "-c", "import no_such_engine"), tuple(os.sched_getaffinity(0)))
    with pytest.raises(ArmFailedError, match="No module named 'no_such_engine'"):
        Arm(spec, tmp_path / "log")
