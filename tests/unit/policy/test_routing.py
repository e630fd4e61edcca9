import dataclasses
import math
from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailrace.policy import pricing
from tailrace.policy.choosing import choose
from tailrace.policy.routing import CostTerms, Live, Route, RouteRequest, WorkerView
from tests.helpers.routing import BLOCK, BYTES_PER_TOKEN, VIEWS, make_decode, make_prefill, named, with_rates


def route(
    prefills: Sequence[WorkerView],
    decodes: Sequence[WorkerView],
    *,
    num_prompt_tokens: int = 1600,
    num_choices: int = 1,
    hits: Mapping[str, int] | None = None,
    rates: Mapping[tuple[str, str], float] | None = None,
) -> Route | None:
    request = RouteRequest(num_prompt_tokens, BLOCK, num_choices)
    return choose(request, prefills, with_rates(decodes, rates or {}), hits or {}, BYTES_PER_TOKEN)


def pair_of(found: Route | None) -> tuple[str | None, str]:
    assert found is not None
    return found.prefill_id, found.decode_id


def only_terms(found: Route | None) -> CostTerms:
    assert found is not None
    (terms,) = found.terms
    return terms


# -- terms ------------------------------------------------------------------------------------------------------------


def test_terms_of_an_idle_pair() -> None:
    terms = only_terms(route([make_prefill()], [make_decode()], rates={("p0", "d0"): 1e7}))
    assert terms[:2] == ("d0", "p0")
    assert terms.queue_s == 0.0
    assert terms.prefill_s == pytest.approx(1.6)
    assert terms.transfer_s == pytest.approx(0.16)
    # One step to join, and a share of one for how full that makes it: 101 of 1000 blocks (1 of 10 sequences is less).
    assert terms.decode_load_s == pytest.approx(0.1101)
    assert terms.total_s == pytest.approx(1.8701)


def test_terms_of_a_pair_with_work_and_hits() -> None:
    prefill = make_prefill(waiting_tokens=300, reserved_tokens=200)
    decode = make_decode(num_running=2, num_waiting=1, reserved_sequences=1)
    hits = {"p0": 60, "d0": 50}
    terms = only_terms(route([prefill], [decode], hits=hits, rates={("p0", "d0"): 1e6}))
    assert terms.queue_s == pytest.approx(0.5)
    assert terms.prefill_s == pytest.approx(0.64)
    assert terms.transfer_s == pytest.approx(0.8)
    assert terms.decode_load_s == pytest.approx(0.15)


def test_the_last_token_is_computed_even_when_all_is_cached() -> None:
    terms = only_terms(route([make_prefill()], [make_decode()], hits={"p0": 100, "d0": 10}))
    assert terms.prefill_s == pytest.approx(0.001)


def test_a_partial_last_block_is_moved_whole() -> None:
    found = route([make_prefill()], [make_decode(waiting_tokens=9000)], num_prompt_tokens=17, rates={("p0", "d0"): 1e6})
    assert found is not None
    terms = found.chosen
    assert terms.prefill_id == "p0"
    assert terms.transfer_s == pytest.approx(2 * BLOCK * BYTES_PER_TOKEN / 1e6)


def test_every_candidate_is_explained() -> None:
    found = route([make_prefill("p0"), make_prefill("p1")], [make_decode("d0"), make_decode("d1")])
    assert found is not None
    assert {terms[:2] for terms in found.terms} == {("d0", "p0"), ("d0", "p1"), ("d1", "p0"), ("d1", "p1")}


# -- the choice -------------------------------------------------------------------------------------------------------


def test_a_hit_wins_between_equals() -> None:
    found = route([make_prefill("p0"), make_prefill("p1")], [make_decode()], hits={"p1": 50})
    assert pair_of(found) == ("p1", "d0")


def test_a_long_queue_outweighs_a_deep_hit() -> None:
    busy = make_prefill("p1", waiting_tokens=900)
    assert pair_of(route([make_prefill("p0"), busy], [make_decode()], hits={"p1": 50})) == ("p0", "d0")
    assert pair_of(route([make_prefill("p0"), busy], [make_decode()], hits={"p1": 60})) == ("p1", "d0")


def test_what_this_gateway_just_sent_counts_before_it_is_reported() -> None:
    found = route([make_prefill("p0", reserved_tokens=1), make_prefill("p1")], [make_decode()])
    assert pair_of(found) == ("p1", "d0")


def test_a_burst_is_spread_evenly() -> None:
    prefills = {name: make_prefill(name) for name in ("p0", "p1", "p2")}
    decodes = {name: make_decode(name) for name in ("d0", "d1")}
    taken: list[str] = []
    for _ in range(12):
        prefill_id, decode_id = pair_of(route(list(prefills.values()), list(decodes.values())))
        assert prefill_id is not None
        for views, chosen in ((prefills, prefill_id), (decodes, decode_id)):
            view = views[chosen]
            views[chosen] = dataclasses.replace(
                view, reserved_tokens=view.reserved_tokens + 1600, reserved_sequences=view.reserved_sequences + 1
            )
            taken.append(chosen)
    assert {name: taken.count(name) for name in sorted(set(taken))} == {"d0": 6, "d1": 6, "p0": 4, "p1": 4, "p2": 4}


def test_the_faster_prefill_worker_wins() -> None:
    found = route([make_prefill("p0"), make_prefill("p1", prefill_tokens_per_s=2000.0)], [make_decode()])
    assert pair_of(found) == ("p1", "d0")


def test_the_faster_link_wins() -> None:
    found = route(
        [make_prefill()], [make_decode("d0"), make_decode("d1")], rates={("p0", "d0"): 1e6, ("p0", "d1"): 1e7}
    )
    assert pair_of(found) == ("p0", "d1")


def test_blocks_the_decode_worker_has_need_no_transfer() -> None:
    rates = {("p0", "d0"): 1e6, ("p0", "d1"): 1e6}
    assert pair_of(route([make_prefill()], [make_decode("d0"), make_decode("d1")], hits={"d1": 9}, rates=rates)) == (
        "p0",
        "d1",
    )


@pytest.mark.parametrize(
    "load",
    [
        {"num_running": 3},
        {"num_waiting": 3},
        {"reserved_sequences": 3},
        {"booked_blocks": 950},
        {"free_blocks": 10, "cached_blocks": 20},
        {"reserved_tokens": 950 * BLOCK},
        {"decode_step_s": 0.2},
    ],
)
def test_the_less_loaded_decode_worker_wins(load: dict[str, float]) -> None:
    assert pair_of(route([make_prefill()], [make_decode("d0", **load), make_decode("d1")])) == ("p0", "d1")


def test_cached_blocks_are_room() -> None:
    cached = make_decode("d0", free_blocks=0, cached_blocks=1000)
    assert pair_of(route([make_prefill()], [cached, make_decode("d1")])) == ("p0", "d0")


def test_a_full_decode_worker_costs_far_more_than_a_nearly_full_one() -> None:
    def load_s(num_running: int, num_choices: int = 1) -> float:
        decode = make_decode(num_running=num_running)
        return only_terms(route([make_prefill()], [decode], num_choices=num_choices)).decode_load_s

    assert load_s(9) == pytest.approx(0.2)
    assert load_s(10) == pytest.approx(0.2 + 0.1 * pricing.TURNOVER_STEPS / 10)
    assert load_s(7, num_choices=4) == load_s(10)


def test_a_decode_worker_without_room_for_the_prompt_costs_the_wait_for_it() -> None:
    decode = make_decode(free_blocks=1, booked_blocks=0)
    terms = only_terms(route([make_prefill()], [decode]))
    # 100 blocks of prompt and one to write into, one is free.
    assert terms.decode_load_s == pytest.approx(0.1 * (2 + 100 / 1000 * pricing.TURNOVER_STEPS))


def test_ties_go_to_the_least_loaded_then_to_the_lowest_ids() -> None:
    decodes = [make_decode("d1"), make_decode("d0")]
    assert pair_of(route([make_prefill("p1"), make_prefill("p0")], decodes)) == ("p0", "d0")
    # Running prefills do not change the predicted time, but they are load.
    assert pair_of(route([make_prefill("p1"), make_prefill("p0", num_running=1)], decodes)) == ("p1", "d0")


# -- who is a candidate -----------------------------------------------------------------------------------------------


def test_nobody_is_no_route() -> None:
    assert route([], []) is None
    assert route([make_prefill()], []) is None
    assert route([make_prefill()], [make_decode(draining=True)]) is None


def test_draining_workers_get_nothing() -> None:
    prefills = [make_prefill("p0", draining=True), make_prefill("p1", waiting_tokens=9000)]
    decodes = [make_decode("d0", draining=True), make_decode("d1", num_running=9)]
    assert pair_of(route(prefills, decodes)) == ("p1", "d1")


def test_workers_of_different_layouts_are_never_paired() -> None:
    prefills = [make_prefill("p0", fingerprint=b"other"), make_prefill("p1", waiting_tokens=10**6)]
    found = route(prefills, [make_decode("d0")], hits={"p0": 99})
    assert pair_of(found) == ("p1", "d0")
    assert only_terms(found).prefill_id == "p1"


def test_each_layout_is_paired_within_itself() -> None:
    prefills = [make_prefill("p0", fingerprint=b"other"), make_prefill("p1")]
    found = route(prefills, [make_decode("d0"), make_decode("d1", fingerprint=b"other")])
    assert found is not None
    assert {terms[:2] for terms in found.terms} == {("d0", "p1"), ("d1", "p0")}


def test_a_pool_that_can_never_hold_the_prompt_is_no_candidate() -> None:
    # 1600 tokens are 100 blocks; decode writes the next token into one more.
    assert route([], [make_decode(total_blocks=100)]) is None
    assert pair_of(route([make_prefill(total_blocks=100)], [make_decode(total_blocks=101)])) == ("p0", "d0")
    assert pair_of(route([make_prefill(total_blocks=99)], [make_decode()])) == (None, "d0")


def test_before_the_first_load_report_pools_are_taken_to_be_large_enough() -> None:
    fresh = make_decode(total_blocks=0, free_blocks=0)
    assert only_terms(route([make_prefill(total_blocks=0)], [fresh])).decode_load_s == pytest.approx(0.11)


# -- prefill on the decode worker -------------------------------------------------------------------------------------


def test_without_prefill_workers_decode_prefills() -> None:
    decode = make_decode(waiting_tokens=100, reserved_tokens=100)
    terms = only_terms(route([], [decode], hits={"d0": 50}))
    assert terms[:2] == ("d0", None)
    assert terms.queue_s == pytest.approx(0.2)
    assert terms.prefill_s == pytest.approx(0.8)
    assert terms.transfer_s == 0.0


def test_without_an_eligible_prefill_worker_of_its_layout_decode_prefills() -> None:
    assert pair_of(route([make_prefill(draining=True)], [make_decode()])) == (None, "d0")
    assert pair_of(route([make_prefill(fingerprint=b"other")], [make_decode()])) == (None, "d0")


def test_a_rest_of_one_block_is_prefilled_where_it_is_cheaper() -> None:
    prefills, decodes = [make_prefill()], [make_decode()]
    assert pair_of(route(prefills, decodes, hits={"p0": 99, "d0": 99})) == (None, "d0")
    busy = [make_decode(waiting_tokens=1000)]
    assert pair_of(route(prefills, busy, hits={"p0": 99, "d0": 99})) == ("p0", "d0")


def test_a_rest_that_takes_longer_than_a_decode_step_goes_to_prefill_however_busy() -> None:
    prefills = [make_prefill(waiting_tokens=10**6)]
    # A step of 0.1 s is as long as 100 tokens, 6 blocks, take to compute.
    assert pair_of(route(prefills, [make_decode()], hits={"d0": 94})) == (None, "d0")
    found = route(prefills, [make_decode()], hits={"d0": 93})
    assert pair_of(found) == ("p0", "d0")
    assert only_terms(found).prefill_id == "p0"


def test_a_local_prefill_costs_the_running_batch_its_time() -> None:
    hits = {"p0": 96, "d0": 96}
    assert pair_of(route([make_prefill()], [make_decode()], hits=hits)) == (None, "d0")
    found = route([make_prefill()], [make_decode(num_running=3)], hits=hits)
    assert pair_of(found) == ("p0", "d0")
    assert found is not None
    (local,) = [terms for terms in found.terms if terms.prefill_id is None]
    assert local.crowding_s == pytest.approx(3 * 0.064)


def test_a_decode_worker_that_has_never_prefilled_is_not_taken_for_the_best_of_all() -> None:
    unmeasured = make_decode(prefill_tokens_per_s=0.0)
    hits = {"p0": 98, "d0": 98}
    found = route([make_prefill()], [unmeasured], hits=hits)
    assert pair_of(found) == ("p0", "d0")
    assert found is not None
    (local,) = [terms for terms in found.terms if terms.prefill_id is None]
    assert local.prefill_s == pytest.approx(0.032 / pricing.LOCAL_PREFILL_SAFETY)


def test_a_decode_worker_is_priced_by_its_step_at_the_batch_it_would_have() -> None:
    steep = make_decode("d0", num_running=4, decode_base_s=0.02, decode_row_s=0.01)
    terms = only_terms(route([make_prefill()], [steep]))
    assert terms.decode_load_s == pytest.approx((0.02 + 5 * 0.01) * 1.5)
    flat = make_decode("d1", num_running=4, decode_base_s=0.06, decode_row_s=0.0)
    assert pair_of(route([make_prefill()], [steep, flat])) == ("p0", "d1")
    assert pair_of(route([make_prefill()], [dataclasses.replace(steep, num_running=2), flat])) == ("p0", "d0")


def test_a_batch_that_is_full_steps_no_slower_for_those_who_wait() -> None:
    """They wait for a share of a turnover instead."""
    full = make_decode(num_running=10, num_waiting=10, decode_base_s=0.02, decode_row_s=0.01)
    terms = only_terms(route([make_prefill()], [full]))
    assert terms.decode_load_s == pytest.approx((0.02 + 10 * 0.01) * (2 + 1.1 * pricing.TURNOVER_STEPS))


def test_a_decode_worker_pulls_at_its_own_rate_where_no_pair_is_measured() -> None:
    slow, fast = make_decode("d0", transfer_bytes_per_s=1e6), make_decode("d1", transfer_bytes_per_s=1e7)
    found = route([make_prefill()], [slow, fast])
    assert pair_of(found) == ("p0", "d1")
    assert found is not None
    assert found.chosen.transfer_s == pytest.approx(0.16)


# -- rates ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unknown", [0.0, -1.0, math.nan, math.inf])
def test_before_any_measurement_neutral_rates_stand_in(unknown: float) -> None:
    prefill = make_prefill(prefill_tokens_per_s=unknown)
    decode = make_decode(prefill_tokens_per_s=unknown, decode_step_s=unknown)
    terms = only_terms(route([prefill], [decode], rates={("p0", "d0"): unknown}))
    assert terms.prefill_s == pytest.approx(1600 / pricing.NEUTRAL_PREFILL_TOKENS_PER_S)
    assert terms.transfer_s == pytest.approx(1600 * BYTES_PER_TOKEN / pricing.NEUTRAL_PAIR_BYTES_PER_S)
    assert terms.decode_load_s == pytest.approx(1.101 * pricing.NEUTRAL_DECODE_STEP_S)


def test_a_newcomer_is_taken_to_be_as_good_as_the_best() -> None:
    prefills = [make_prefill("p0", prefill_tokens_per_s=50_000.0), make_prefill("p1", prefill_tokens_per_s=0.0)]
    decodes = [make_decode("d0", decode_step_s=0.01), make_decode("d1", decode_step_s=0.0)]
    found = route(prefills, decodes, rates={("p0", "d0"): 1e6})
    assert found is not None
    assert len({terms[2:] for terms in found.terms}) == 1
    assert len(found.terms) == 4


def test_a_worker_that_reports_no_capacity_breaks_nothing() -> None:
    assert pair_of(route([make_prefill(max_num_seqs=0)], [make_decode(max_num_seqs=0)])) == ("p0", "d0")


@pytest.mark.parametrize("field", ["num_prompt_tokens", "block_size", "num_choices"])
def test_impossible_requests_are_refused(field: str) -> None:
    values = {"num_prompt_tokens": 1, "block_size": 1, "num_choices": 1} | {field: 0}
    with pytest.raises(ValueError, match=f"{field} must be at least 1"):
        RouteRequest(**values)


# -- always -----------------------------------------------------------------------------------------------------------


@given(st.lists(VIEWS, max_size=3), st.lists(VIEWS, max_size=3), st.integers(1, 5000))
def test_the_choice_is_eligible_cheapest_and_independent_of_order(
    prefills: list[WorkerView], decodes: list[WorkerView], num_prompt_tokens: int
) -> None:
    prefills, decodes = named("p", prefills), named("d", decodes)
    found = route(prefills, decodes, num_prompt_tokens=num_prompt_tokens)
    shuffled = route(prefills[::-1], decodes[::-1], num_prompt_tokens=num_prompt_tokens)
    if found is None:
        assert shuffled is None
        return
    assert pair_of(found) == pair_of(shuffled)
    views = {view.worker_id: view for view in (*prefills, *decodes)}
    for terms in found.terms:
        members = [views[worker_id] for worker_id in terms[:2] if worker_id is not None]
        assert not any(view.draining for view in members)
        assert len({view.fingerprint for view in members}) == 1
        assert min(terms[2:8]) >= 0
    (chosen,) = [terms for terms in found.terms if terms[:2] == (found.decode_id, found.prefill_id)]
    # Beyond the highest price all are as dear.
    highest_s = pricing.MAX_PRICE_US / 1e6
    assert min(chosen.total_s, highest_s) <= min(terms.total_s for terms in found.terms) + 1e-5


def test_a_rate_that_is_next_to_nothing_divides_by_nothing() -> None:
    workers = [make_prefill(prefill_tokens_per_s=5e-324)], [make_decode(prefill_tokens_per_s=0.0)]
    assert route(*workers) is not None


def test_with_a_window_the_last_blocks_of_a_prompt_are_moved_whoever_has_its_first() -> None:
    request = RouteRequest(16_000, 16, window=4096)
    views = [make_decode("d0"), make_decode("d1"), make_decode("d2")]
    prices = pricing.Pricing.of(request, [], views, {"d0": 500, "d1": 900}, BYTES_PER_TOKEN, Live())
    assert [prices.decode(view).missing_bytes // (16 * BYTES_PER_TOKEN) for view in views] == [256, 100, 256]
