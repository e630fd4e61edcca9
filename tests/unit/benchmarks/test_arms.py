import os
import subprocess
import sys
import time
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


def until_stopped(process):
    deadline = time.monotonic() + 5
    while process.status() != psutil.STATUS_STOPPED:
        assert time.monotonic() < deadline, process.status()


def test_an_arm_is_stopped_while_it_is_not_asked_and_keeps_to_its_cores(arm):
    process = psutil.Process(arm._process.pid)
    until_stopped(process)
    assert tuple(process.cpu_affinity()) == arm.spec.cores
    arm.ask([[1]], 1)
    until_stopped(process)


def test_an_arm_that_ends_says_why(arm):
    with pytest.raises(ArmFailedError, match=r"echo ended: .*no thirteen"):
        arm.ask([[1]], 13)


def test_an_arm_that_does_not_start_says_why(tmp_path):
    spec = ArmSpec("lame", (sys.executable, "-c", "import no_such_engine"), tuple(os.sched_getaffinity(0)))
    with pytest.raises(ArmFailedError, match="No module named 'no_such_engine'"):
        Arm(spec, tmp_path / "log")


def test_a_stopped_arm_dies_with_whoever_started_it(tmp_path):
    script = tmp_path / "echo.py"
    script.write_text(ECHO.format(peers=str(PEERS)))
    code = (
        "import os, sys; from pathlib import Path; from benchmarks.arms import Arm, ArmSpec\n"
        "script, log = sys.argv[1:]; cores = tuple(os.sched_getaffinity(0))\n"
        "arm = Arm(ArmSpec('echo', (sys.executable, script), cores), Path(log))\n"
        "print(arm._process.pid, flush=True); os.kill(os.getpid(), 9)"
    )
    command = [sys.executable, "-c", code, str(script), str(tmp_path / "log")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=PEERS.parents[1])
    orphan = int(done.stdout)
    deadline = time.monotonic() + 5
    while psutil.pid_exists(orphan) and psutil.Process(orphan).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
