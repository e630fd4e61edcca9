import os
import time

from tailrace.cli.bench.offers import ArmTurns, OffersOptions, _cpu_s, _loop_s, arm_configs, body_of, report
from tailrace.config import UpConfig


def test_the_arms_differ_in_the_store_alone():
    for role, num_prefill in (("decode", 0), ("prefill", 1)):
        arms = {arm: config.model_dump() for arm, config in arm_configs(UpConfig(), OffersOptions(role=role)).items()}
        assert arms["store"].pop("store_memory") == 256 << 20
        assert arms["none"].pop("store_memory") is None
        assert arms["none"] == arms["store"]
        assert (arms["none"]["prefill"], arms["none"]["decode"], arms["none"]["threads"]) == (num_prefill, 1, 1)


def test_a_prefill_worker_answers_one_token_that_makes_a_chunk():
    assert (body := body_of("m", [1], OffersOptions(role="prefill")))["max_tokens"] == 1
    assert body["logprobs"] == 0
    assert "logprobs" not in body_of("m", [1], OffersOptions())


def test_ratios_are_of_one_round_and_cpu_is_a_mean():
    arms = {
        "none": ArmTurns([4.0, 5.0, 10.0], [100.0] * 3, [1.0, 2.0, 6.0], [0.0] * 3),
        "store": ArmTurns([4.0, 4.0, 9.0], [101.0] * 3, [4.0] * 3, [5.0, 6.0, 10.0]),
    }
    result = report({}, OffersOptions(), arms)
    assert result["store_over_none"] == {"median": 0.9, "min": 0.8, "max": 1.0}
    assert (result["arms"]["none"]["loop_cpu_ms"], result["arms"]["store"]["store_cpu_ms"]) == (3.0, 7.0)


def test_cpu_is_read_of_a_process_and_of_its_first_thread():
    began = time.process_time()
    while time.process_time() - began < 0.05:
        pass
    assert 0.05 <= _loop_s(os.getpid()) <= _cpu_s(os.getpid()) + 0.02
    assert _cpu_s(None) == 0.0
