import pytest

from tailrace.sim.profile import PROFILES


def test_a_prefill_is_its_floating_point_operations() -> None:
    h100 = PROFILES["h100"]
    linear = 2 * 8.03e9 * 1000
    square = 2 * 32 * 4096 * 1000**2
    assert h100.prefill_s(0, 1000) == pytest.approx(0.001 + (linear + square) / (0.5 * 989e12))
    in_two = h100.prefill_s(0, 400) + h100.prefill_s(400, 1000)
    assert in_two == pytest.approx(h100.prefill_s(0, 1000) + h100.step_overhead_s)


def test_kv_and_weights_are_those_of_llama_8b() -> None:
    h100, h200 = PROFILES["h100"], PROFILES["h200"]
    assert h100.kv_bytes_per_token == 2 * 32 * 8 * 128 * 2
    assert h100.step_base_s == pytest.approx(0.001 + 16.06e9 / 2.68e12)
    assert h200.step_per_token_s < h100.step_per_token_s


def test_only_the_last_chunk_of_a_transfer_is_exposed() -> None:
    h100 = PROFILES["h100"].with_link(400)
    assert h100.link_bytes_per_s == 50e9
    assert h100.exposed_transfer_s(100_000) == h100.exposed_transfer_s(2048) == pytest.approx(2048 * 131_072 / 50e9)


def test_the_cpu_profile_says_what_the_engine_benchmark_measured() -> None:
    cpu = PROFILES["cpu"]
    assert cpu.prefill_s(0, 1024) == pytest.approx(1024 / 1625.91, rel=0.05)
    assert cpu.step_base_s == pytest.approx(0.008065, rel=0.05)
