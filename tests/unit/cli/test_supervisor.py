import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time

import psutil
import pytest

from tailrace.cli import supervisor as module
from tailrace.cli.supervisor import ChildFailedError, ChildSpec, RestartPolicy, Supervisor

FAST = RestartPolicy(first_pause_s=0.01)
SERVE = "print('up', flush=True); import time; time.sleep(60)"


class Recorder:
    def __init__(self):
        self.lines, self.deaths = [], []
        self._news = asyncio.Event()

    def line(self, name, text):
        self.lines.append((name, text))
        self._news.set()

    def died(self, death, pause_s):
        self.deaths.append((death, pause_s))
        self._news.set()

    async def until(self, condition):
        async with asyncio.timeout(10):
            while not condition(self):
                self._news.clear()
                await self._news.wait()


def child(name, code, **options):
    return ChildSpec(name, (sys.executable, "-c", textwrap.dedent(code)), dict(os.environ), **options)


def num_up(count):
    return lambda recorder: [text for _, text in recorder.lines].count("up") >= count


async def test_children_run_until_the_end_of_the_block():
    recorder = Recorder()
    async with Supervisor([child("a", SERVE), child("b", SERVE)], recorder, FAST) as running:
        await recorder.until(num_up(2))
        pids = running.pids
        assert sorted(pids) == ["a", "b"]
        assert all(os.getsid(pid) == pid for pid in pids.values())
    assert not any(psutil.pid_exists(pid) for pid in pids.values())
    assert recorder.deaths == []


async def test_a_dead_child_is_reported_with_its_last_lines_and_started_again_while_the_others_run_on():
    recorder = Recorder()
    async with Supervisor([child("a", SERVE), child("b", SERVE)], recorder, FAST) as running:
        await recorder.until(num_up(2))
        running.mark_ready()
        other, victim = running.pids["a"], running.pids["b"]
        os.kill(victim, signal.SIGKILL)
        await recorder.until(num_up(3))
        assert running.pids["a"] == other
        assert running.pids["b"] != victim
    [(death, pause_s)] = recorder.deaths
    assert (death.name, death.cause, death.last_lines, pause_s) == ("b", "signal SIGKILL", ("up",), 0.01)


async def test_without_restart_a_death_is_only_reported():
    recorder = Recorder()
    async with Supervisor([child("a", SERVE), child("b", SERVE)], recorder, RestartPolicy(enabled=False)) as running:
        await recorder.until(num_up(2))
        running.mark_ready()
        os.kill(running.pids["b"], signal.SIGTERM)
        await recorder.until(lambda recorder: recorder.deaths)
        assert recorder.deaths[0][1] is None
        assert list(running.pids) == ["a"]
        os.kill(running.pids["a"], signal.SIGTERM)
        with pytest.raises(ChildFailedError, match="all processes are dead"):
            await running.during(asyncio.sleep(10))


async def test_a_child_that_keeps_dying_at_the_start_fails_the_whole_with_its_last_lines():
    recorder = Recorder()
    spec = child("bad", "print('no such model'); raise SystemExit(1)")
    with pytest.raises(ChildFailedError, match=r"(?s)bad cannot start.*exit code 1.*no such model"):
        async with Supervisor([spec, child("a", SERVE)], recorder, FAST) as running:
            await running.during(asyncio.sleep(10))
    assert [pause_s for _, pause_s in recorder.deaths] == [0.01]
    assert not running.pids


async def test_a_wrong_configuration_is_not_tried_twice():
    recorder = Recorder()
    with pytest.raises(ChildFailedError, match="exit code 2"):
        async with Supervisor([child("bad", "raise SystemExit(2)")], recorder, FAST) as running:
            await running.during(asyncio.sleep(10))
    assert recorder.deaths == []


async def test_a_program_that_does_not_exist_is_a_failure_not_a_hang():
    with pytest.raises(ChildFailedError, match="nowhere"):
        async with Supervisor([ChildSpec("x", ("/nowhere/at/all",), {})], Recorder(), FAST) as running:
            await running.during(asyncio.sleep(10))


async def test_work_that_ends_first_gives_its_result():
    async def work():
        return 7

    async with Supervisor([child("a", SERVE)], Recorder(), FAST) as running:
        assert await running.during(work()) == 7


async def test_a_child_that_ignores_sigterm_is_killed(monkeypatch):
    monkeypatch.setattr(module, "STOP_S", 0.2)
    recorder = Recorder()
    deaf = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN);" + SERVE
    async with Supervisor([child("deaf", deaf)], recorder, FAST) as running:
        await recorder.until(num_up(1))
        pid = running.pids["deaf"]
        began = time.monotonic()
    assert 0.15 < time.monotonic() - began < 5
    assert not psutil.pid_exists(pid)


async def test_what_stops_first_has_ended_before_the_others_are_asked():
    recorder = Recorder()
    code = """
        import signal, sys, time
        def end(*_):
            time.sleep({pause})
            print("{name} ends", flush=True)
            sys.exit()
        signal.signal(signal.SIGTERM, end)
        print("up", flush=True)
        time.sleep(60)
    """
    slow = child("front", code.format(name="front", pause=0.3), stops_first=True)
    quick = child("back", code.format(name="back", pause=0))
    async with Supervisor([slow, quick], recorder, FAST):
        await recorder.until(num_up(2))
    assert [text for _, text in recorder.lines if text != "up"] == ["front ends", "back ends"]
    assert recorder.deaths == []


async def test_kill_does_not_wait():
    recorder = Recorder()
    deaf = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN);" + SERVE
    async with Supervisor([child("deaf", deaf)], recorder, FAST) as running:
        await recorder.until(num_up(1))
        running.kill()
        began = time.monotonic()
    assert time.monotonic() - began < module.STOP_S / 2
    assert recorder.deaths == []


async def test_grandchildren_end_with_their_parent():
    recorder = Recorder()
    code = """
        import subprocess, sys, time
        print(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]).pid, flush=True)
        time.sleep(60)
    """
    async with Supervisor([child("a", code)], recorder, FAST):
        await recorder.until(lambda recorder: recorder.lines)
        grandchild = psutil.Process(int(recorder.lines[0][1]))
    _, alive = psutil.wait_procs([grandchild], timeout=5)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs PR_SET_PDEATHSIG")
def test_no_orphan_stays_when_the_supervisor_is_killed():
    code = f"""
        import asyncio, os, sys
        from tailrace.cli.supervisor import ChildSpec, Supervisor

        class Silent:
            def line(self, name, text): print(list(running.pids.values())[0], flush=True)
            def died(self, death, pause_s): ...

        async def main():
            global running
            spec = ChildSpec("a", (sys.executable, "-c", {SERVE!r}), dict(os.environ))
            async with Supervisor([spec], Silent()) as running:
                await asyncio.sleep(60)

        asyncio.run(main())
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    ) as parent:
        orphan = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    _, alive = psutil.wait_procs([orphan], timeout=5)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs core affinity")
async def test_a_child_keeps_to_its_cores():
    recorder = Recorder()
    core = min(os.sched_getaffinity(0))
    code = "import os; print(sorted(os.sched_getaffinity(0)), flush=True);" + SERVE
    async with Supervisor([child("a", code, cores=(core,))], recorder, FAST):
        await recorder.until(num_up(1))
    assert recorder.lines[0] == ("a", f"[{core}]")


async def test_endless_lines_come_in_pieces():
    recorder = Recorder()
    code = "import sys; sys.stdout.write('x' * 200_000 + '\\n'); sys.stdout.flush();" + SERVE
    async with Supervisor([child("a", code)], recorder, FAST):
        await recorder.until(num_up(1))
    assert sum(len(text) for _, text in recorder.lines[:-1]) == 200_000


def test_pauses_double_up_to_a_limit():
    policy = RestartPolicy(first_pause_s=0.5, longest_pause_s=30)
    assert [policy.pause_s(n) for n in (1, 2, 3, 7, 1000)] == [0.5, 1, 2, 30, 30]


def test_an_environment_does_not_show():
    assert "hunter2" not in repr(ChildSpec("a", ("x",), {"TAILRACE_SECRET": "hunter2"}))
