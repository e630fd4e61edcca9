"""The wall clock of every machine, Redis's too, jumps a day back and two ahead."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.e2e.test_prefix_index import BLOCK, cached_tokens, is_ready, start
from tests.helpers.redis_servers import RedisServer
from tests.helpers.shifted_clock import ShiftedClock
from tests.helpers.traffic import prompt_of

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(300)]

DAY_S = 86_400
NAMES = ("prefill-0", "decode-0")


def test_the_clock_of_a_process_can_be_moved_at_all(tmp_path: Path) -> None:
    clock = ShiftedClock(tmp_path)
    clock.jump(-DAY_S)
    told = subprocess.run(
        [sys.executable, "-c", "import time; print(time.time())"],
        env=clock.environment,
        check=True,
        capture_output=True,
    )
    assert DAY_S - 60 < time.time() - float(told.stdout) < DAY_S + 60


def test_hits_and_answers_survive_a_clock_that_jumps(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = ShiftedClock(tmp_path)
    for name, value in clock.environment.items():
        monkeypatch.setenv(name, value)
    prompt = prompt_of(20 * BLOCK, 1)
    with RedisServer() as redis, start(small_model, redis=redis.url) as cluster:
        cluster.start_workers(join="", redis=redis.url)
        assert cached_tokens(cluster, prompt) == 0
        text = cluster.complete(prompt, max_tokens=8)

        def serves_as_before() -> None:
            cluster.wait_until(
                lambda: is_ready(cluster) and cluster.metric("tailrace_redis_workers") == 2, "all are registered", 30.0
            )
            assert cached_tokens(cluster, prompt) >= 19 * BLOCK
            assert cluster.complete(prompt, max_tokens=8) == text
            assert cluster.metric("tailrace_workers_lost_total") == num_lost

        num_lost = 0
        for jump in (-DAY_S, DAY_S, -DAY_S):
            clock.jump(jump)
            assert abs(redis.client().time()[0] - time.time() - jump) < 60
            assert cluster.complete(prompt, max_tokens=8) == text, "while it jumps"
            serves_as_before()
        # Renewed under the clock that is behind, the registration ends with its worker.
        cluster.wait_until(lambda: 0 < redis.client().pttl("tailrace:1:{registry}:worker:prefill-0") <= 6000, "a beat")
        cluster.process("prefill-0").kill()
        cluster.wait_for("decode-0")
        cluster.start("prefill", "prefill-0", join=f"127.0.0.1:{cluster.grpc_port}", redis=redis.url)
        cluster.wait_for(*NAMES)
        num_lost = 1
        assert cluster.complete(prompt, max_tokens=8) == text
        cluster.wait_until(
            lambda: cached_tokens(cluster, prompt) >= 19 * BLOCK, "a life that seems older is known as well", 30.0
        )
        serves_as_before()
        assert "Traceback" not in cluster.logs()
