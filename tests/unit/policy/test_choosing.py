"""Which pair is taken, by each policy, and whom it fetches from."""

import dataclasses
from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailrace.kv.events import Tier
from tailrace.policy import choosing
from tailrace.policy.choosing import POLICIES, choose
from tailrace.policy.pricing import microseconds
from tailrace.policy.routing import CostTerms, Held, Live, Preferred, PrefixRange, Route, RouteRequest, Way, WorkerView
from tests.helpers.routing import BLOCK, BYTES_PER_TOKEN, VIEWS, Rates, make_decode, make_prefill, named, with_rates

# -- what changes with every request ----------------------------------------------------------------------------------


def live_route(live: Live, *prefills: WorkerView, hits: Mapping[str, int] | None = None, policy: str = "cost") -> Route:
    request = RouteRequest(1600, BLOCK)
    found = choose(request, prefills, [make_decode()], hits or {}, BYTES_PER_TOKEN, live=live, policy=policy)
    assert found is not None
    return found


def test_a_known_backlog_takes_the_place_of_reserved_tokens() -> None:
    live = Live(backlog_s={"p0": 0.25})
    assert live_route(live, make_prefill(reserved_tokens=9000)).chosen.queue_s == 0.25
    # Other gateways have sent what is beyond this one's.
    assert live_route(live, make_prefill(waiting_tokens=9000)).chosen.queue_s == 9.25
    own = dataclasses.replace(live, backlog_tokens={"p0": 8500.0})
    assert live_route(own, make_prefill(waiting_tokens=9000)).chosen.queue_s == 0.75
    assert live_route(own, make_prefill(waiting_tokens=7000)).chosen.queue_s == 0.25


def test_attention_makes_a_long_prefill_cost_more_than_its_tokens() -> None:
    view = make_prefill(prefill_curve_s=1e-6)
    assert live_route(Live(), view).chosen.prefill_s == pytest.approx(1.6 + 1e-6 * 1600**2)
    assert live_route(Live(), view, hits={"p0": 50}).chosen.prefill_s == pytest.approx(0.8 + 1e-6 * (1600**2 - 800**2))


def test_computing_where_others_wait_costs_their_time_too() -> None:
    live = Live(waiting={"p0": 2.0}, backlog_s={"p0": 0.0, "p1": 1.0})
    found = live_route(live, make_prefill("p0"), make_prefill("p1"))
    assert found.prefill_id == "p1"
    crowded = next(terms for terms in found.terms if terms.prefill_id == "p0")
    assert crowded.crowding_s == pytest.approx(3.2)


def test_a_prefix_is_fetched_where_that_beats_computing_it() -> None:
    fast = {("p1", "p0"): 1e7, ("p0", "p1"): 1e7}
    live = Live(ways=Rates(fast), held=[Held("p1", 50)], backlog_s={"p0": 0.0, "p1": 5.0})
    found = live_route(live, make_prefill("p0"), make_prefill("p1"), hits={"p1": 50})
    chosen = found.chosen
    assert (found.prefill_id, chosen.hit_blocks, chosen.fetch_blocks, chosen.holder_id) == ("p0", 0, 50, "p1")
    assert chosen.fetch_s == pytest.approx(50 * BLOCK * BYTES_PER_TOKEN / 1e7)
    assert chosen.prefill_s == pytest.approx(0.8)


def test_a_decode_worker_fetches_a_prefix_and_computes_a_short_rest_itself() -> None:
    fast = {("p0", "d0"): 1e8, ("p0", "d1"): 1e8}
    live = Live(ways=Rates(fast), held=[Held("p0", 96)], backlog_s={"p0": 1.0})
    found = live_route(live, make_prefill("p0"), hits={"p0": 96})
    chosen = found.chosen
    assert (found.prefill_id, found.decode_id) == (None, "d0")
    assert (chosen.hit_blocks, chosen.fetch_blocks, chosen.holder_id) == (0, 96, "p0")
    assert chosen.fetch_s == pytest.approx(96 * BLOCK * BYTES_PER_TOKEN / 1e8)
    assert (chosen.prefill_s, chosen.transfer_s) == (pytest.approx(0.064), 0.0)
    assert found.sources == (PrefixRange("p0", 0, 96),)


def test_a_rest_longer_than_a_step_is_not_computed_on_decode_whatever_can_be_fetched() -> None:
    """A step of 0.1 s is as long as 100 tokens take to compute."""
    live = Live(ways=Rates({("p0", "d0"): 1e8}), held=[Held("p0", 93)], backlog_s={"p0": 9.0})
    assert live_route(live, make_prefill("p0"), hits={"p0": 93}).prefill_id == "p0"


def test_a_decode_worker_computes_what_would_take_longer_to_fetch() -> None:
    for rate, fetched in ((1.1e6, 20), (0.9e6, 0)):
        live = Live(ways=Rates({("d1", "d0"): rate}), held=[Held("d1", 20)])
        decodes = [make_decode("d0", num_running=9), make_decode("d1", draining=True)]
        found = choose(RouteRequest(640, BLOCK), [], decodes, {"d1": 20}, BYTES_PER_TOKEN, live=live)
        assert found is not None
        assert (found.decode_id, found.chosen.fetch_blocks) == ("d0", fetched)
        assert found.chosen.crowding_s == pytest.approx(9 * (0.32 if fetched else 0.64))


def test_with_a_window_the_last_blocks_of_what_is_found_are_fetched_and_priced() -> None:
    """A fetch of a block takes half as long as computing it."""
    request = RouteRequest(1600, BLOCK, window=50)
    held = [Held("s", 90, is_store=True, on_disk=3), Held("p1", 80)]
    live = Live(ways=Rates({("s", "p0"): 2e6, ("p1", "p0"): 2e6}), held=held)
    for own, fetched, computed_s in ((0, 4, 0.16), (88, 2, 0.16), (95, 0, 0.08)):
        found = choose(request, [make_prefill()], [make_decode()], {"p0": own}, BYTES_PER_TOKEN, live=live)
        assert found is not None
        chosen = found.chosen
        assert (chosen.hit_blocks, chosen.fetch_blocks) == (own, fetched)
        assert chosen.fetch_s == pytest.approx(fetched * BLOCK * BYTES_PER_TOKEN / 2e6)
        assert chosen.prefill_s == pytest.approx(computed_s)
        on_disk = min(3, fetched)
        assert chosen.fetch_disk_blocks == on_disk
        wanted = (PrefixRange("s", 90 - fetched, fetched, is_store=True, on_disk=on_disk),)
        assert found.sources == (wanted if fetched else ())


@pytest.mark.parametrize("curve_s", [float("nan"), float("inf"), float("-inf"), -1e-6, -1e308, 1e308])
def test_an_impossible_curve_counts_for_nothing(curve_s: float) -> None:
    found = live_route(Live(waiting={"p0": 2.0}), make_prefill(prefill_curve_s=curve_s))
    assert found.chosen.prefill_s == pytest.approx(1.6)


def test_a_worker_of_another_layout_fetches_nothing_by_these_hashes() -> None:
    live = Live(ways=Rates({("p1", "p0"): 1e7}), held=[Held("p1", 50)])
    workers = [make_prefill("p0", fingerprint=b"B")], [make_decode(fingerprint=b"B")]
    for fingerprint, num_blocks in ((b"B", 50), (b"", 50), (b"A", 0)):
        request = RouteRequest(1600, BLOCK, fingerprint=fingerprint)
        found = choose(request, *workers, {}, BYTES_PER_TOKEN, live=live)
        assert found is not None
        assert found.chosen.fetch_blocks == num_blocks


def test_a_slow_link_or_none_leaves_it_to_be_computed() -> None:
    for rates in ({("p1", "p0"): 1e5}, {("p1", "p0"): 0.0}, {("p1", "p9"): 1e9}):
        live = Live(ways=Rates(rates), held=[Held("p1", 50)])
        chosen = live_route(live, make_prefill("p0")).chosen
        assert (chosen.fetch_blocks, chosen.holder_id, chosen.prefill_s) == (0, "", 1.6)


def test_a_fetch_is_hidden_by_the_queue() -> None:
    live = Live(ways=Rates({("s", "p0"): 1e6}), held=[Held("s", 50)], backlog_s={"p0": 0.5})
    assert live_route(live, make_prefill("p0")).chosen.fetch_s == pytest.approx(0.3)


def test_a_tier_of_its_own_node_is_priced_however_many_hold_more() -> None:
    held = [*(Held(f"x{number}", 60) for number in range(9)), Held("p0/cpu", 40)]
    live = Live(ways=Rates({("p0/cpu", "p0"): 1e9}), held=held, beside={"p0": ["p0/cpu"]})
    chosen = live_route(live, make_prefill("p0")).chosen
    assert (chosen.holder_id, chosen.fetch_blocks) == ("p0/cpu", 40)


class KindRates:
    """A way of its own by the kind of memory that the blocks are in."""

    def __init__(self, bytes_per_s: Mapping[Tier, float]) -> None:
        self._rates = bytes_per_s

    def way(self, holder_id: str, needer_id: str, tier: Tier) -> Way | None:
        return Way(0.0, 1 / self._rates[tier])


@pytest.mark.parametrize(
    ("worker", "store", "expected"), [(1e8, 1e7, "p9"), (1e7, 1e8, "s")], ids=["workers faster", "stores faster"]
)
def test_workers_and_stores_are_priced_by_the_ways_of_their_own_kind(
    worker: float, store: float, expected: str
) -> None:
    ways = KindRates({Tier.WORKER: worker, Tier.CPU: store, Tier.NVME: 1.0})
    live = Live(ways=ways, held=[Held("p9", 50), Held("s", 50, is_store=True)])
    assert live_route(live, make_prefill("p0")).chosen.holder_id == expected


@pytest.mark.parametrize("is_store", [False, True])
def test_the_deepest_of_the_other_kind_is_priced_however_many_are_deeper(is_store: bool) -> None:
    """Each may have what the other kind lacks: a way at all, for one."""
    others = [Held(f"x{number}", 60, is_store=not is_store) for number in range(9)]
    live = Live(ways=Rates({("y", "p0"): 1e9}), held=[*others, Held("y", 40, is_store=is_store)])
    chosen = live_route(live, make_prefill("p0")).chosen
    assert (chosen.holder_id, chosen.fetch_blocks) == ("y", 40)


# -- the other policies -----------------------------------------------------------------------------------------------


def test_round_robin_takes_turns_whatever_is_cached_or_queued() -> None:
    views = [make_prefill("p0", waiting_tokens=10**6), make_prefill("p1"), make_prefill("p2")]
    taken = [live_route(Live(turn=turn), *views, hits={"p2": 99}, policy="round-robin").prefill_id for turn in range(6)]
    assert taken == ["p0", "p1", "p2", "p0", "p1", "p2"]


def test_least_loaded_looks_at_queues_only() -> None:
    views = [make_prefill("p0", waiting_tokens=2), make_prefill("p1", waiting_tokens=1)]
    assert live_route(Live(), *views, hits={"p0": 99}, policy="least-loaded").prefill_id == "p1"


def test_prefix_takes_the_deepest_match_and_among_equals_the_shortest_queue() -> None:
    views = [make_prefill("p0", waiting_tokens=10**6), make_prefill("p1"), make_prefill("p2", waiting_tokens=5)]
    assert live_route(Live(), *views, hits={"p0": 9, "p1": 8}, policy="prefix").prefill_id == "p0"
    assert live_route(Live(), *views, hits={"p0": 9, "p1": 9, "p2": 9}, policy="prefix").prefill_id == "p1"


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_explains_every_candidate_by_the_same_prices(policy: str) -> None:
    views = [make_prefill("p0"), make_prefill("p1", waiting_tokens=5)]
    found = live_route(Live(), *views, hits={"p1": 3}, policy=policy)
    assert sorted(found.terms) == sorted(live_route(Live(), *views, hits={"p1": 3}).terms)
    assert found.chosen in found.terms


# -- against looking at every pair ------------------------------------------------------------------------------------

HITS = st.dictionaries(st.sampled_from([f"{role}{n}" for role in "pd" for n in range(4)]), st.integers(0, 40))
PAIR_RATES = st.dictionaries(
    st.tuples(st.sampled_from([f"p{n}" for n in range(4)]), st.sampled_from([f"d{n}" for n in range(4)])),
    st.sampled_from([0.0, 1e3, 1e5, 1.001e5, 1e6, 1e12]),
)


def rank(policy: str, terms: CostTerms, views: Mapping[str, WorkerView], turn: int) -> tuple[object, ...]:
    """Of one pair by itself, as the page of each policy says."""
    prefill_id, decode_id = terms.prefill_id, terms.decode_id
    load = views[decode_id].num_sequences + (views[prefill_id].num_sequences if prefill_id is not None else 0)
    ids = (prefill_id or "", decode_id)
    if policy == "round-robin":
        places = []
        for role, worker_id in zip("pd", (prefill_id, decode_id), strict=True):
            ring = sorted(name for name in views if name.startswith(role))
            places.append((ring.index(worker_id) - turn) % len(ring) if worker_id is not None else len(ring))
        return (*places, *ids)
    waiting = microseconds(terms.queue_s) + microseconds(terms.decode_load_s)
    if policy == "prefix":
        return (-terms.hit_blocks, waiting, load, *ids)
    if policy == "least-loaded":
        return (waiting, load, *ids)
    here = microseconds(terms.queue_s + terms.fetch_s + terms.prefill_s + terms.crowding_s)
    return (here + microseconds(terms.decode_load_s + terms.transfer_s), load, *ids)


@given(
    st.lists(VIEWS, max_size=4),
    st.lists(VIEWS, max_size=4),
    st.integers(1, 600),
    HITS,
    PAIR_RATES,
    st.sampled_from(sorted(POLICIES)),
    st.integers(0, 7),
)
def test_the_choice_is_that_of_looking_at_every_pair(
    prefills: list[WorkerView],
    decodes: list[WorkerView],
    num_prompt_tokens: int,
    hits: Mapping[str, int],
    rates: Mapping[tuple[str, str], float],
    policy: str,
    turn: int,
) -> None:
    prefills, decodes = named("p", prefills), named("d", decodes)
    views = {view.worker_id: view for view in (*prefills, *decodes)}
    held = [Held(holder, depth) for holder, depth in hits.items()]
    ways = Rates({(a, b): 1e6 for a in hits for b in views if a != b})
    live = Live(ways=ways, held=held, turn=turn, waiting={"p0": 1.5})
    request = RouteRequest(num_prompt_tokens, BLOCK)
    found = choose(request, prefills, with_rates(decodes, rates), hits, BYTES_PER_TOKEN, live=live, policy=policy)
    if found is None:
        return
    best = min(found.terms, key=lambda terms: rank(policy, terms, views, turn))
    assert found.chosen == best


def test_a_dearer_prefill_worker_over_a_faster_link_is_found() -> None:
    """1.6 MB: 1.6 s from the first, 0.16 s from the second, which has 0.5 s to do before."""
    prefills = [make_prefill("p0"), make_prefill("p1", waiting_tokens=500), make_prefill("p2", waiting_tokens=9000)]
    decodes = with_rates([make_decode()], {("p0", "d0"): 1e6, ("p1", "d0"): 1e7, ("p2", "d0"): 1e7})
    found = choose(RouteRequest(1600, BLOCK), prefills, decodes, {}, BYTES_PER_TOKEN)
    assert found is not None
    assert (found.prefill_id, found.chosen.transfer_s) == ("p1", pytest.approx(0.16))


def test_many_equal_workers_are_not_looked_at_pair_by_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    real = choosing.terms_of
    monkeypatch.setattr(choosing, "terms_of", lambda *args: asked.append(args[1].worker_id) or real(*args))
    prefills = [make_prefill(f"p{n:02}") for n in range(64)]
    decodes = [make_decode(f"d{n:02}") for n in range(64)]
    found = choose(RouteRequest(1600, BLOCK), prefills, decodes, {}, BYTES_PER_TOKEN)
    assert found is not None
    assert len(asked) == 1
    assert len(found.terms) == 64 * 64
    assert len(asked) == 1 + 64 * 64


# -- one session ------------------------------------------------------------------------------------------------------


def session_route(
    preferred: Preferred, prefills: Sequence[WorkerView], decodes: Sequence[WorkerView], policy: str = "cost"
) -> tuple[str | None, str]:
    live = Live(preferred=preferred)
    found = choose(RouteRequest(1600, BLOCK), prefills, decodes, {}, BYTES_PER_TOKEN, live=live, policy=policy)
    assert found is not None
    return found.prefill_id, found.decode_id


def test_among_equals_the_session_s_last_pair_is_taken() -> None:
    prefills, decodes = [make_prefill(f"p{n}") for n in range(3)], [make_decode(f"d{n}") for n in range(3)]
    assert session_route(Preferred("p2", "d1"), prefills, decodes) == ("p2", "d1")
    assert session_route(Preferred("p2", "gone"), prefills, decodes) == ("p2", "d0")
    assert session_route(Preferred("gone", "d1"), prefills, decodes) == ("p0", "d1")
    assert session_route(Preferred("", "d1"), prefills, decodes) == ("p0", "d1")
    assert session_route(Preferred("gone", "gone"), prefills, decodes) == ("p0", "d0")


def test_a_session_s_last_pair_is_left_when_it_costs_more_than_the_margin() -> None:
    prefills, decodes = [make_prefill("p0"), make_prefill("p1", waiting_tokens=80)], [make_decode()]
    assert session_route(Preferred("p1", "d0"), prefills, decodes) == ("p1", "d0")
    # 1.6 s of prefill and 0.1 of decode: 0.1 s more is beyond 5 %.
    later = [prefills[0], dataclasses.replace(prefills[1], waiting_tokens=100)]
    assert session_route(Preferred("p1", "d0"), later, decodes) == ("p0", "d0")


def test_where_the_pair_costs_too_much_its_prefill_worker_is_kept_before_its_decode_worker() -> None:
    """It has computed the last turn. Either half alone costs 0.06 s more than the best, of 1.7 s, and both 0.12 s."""
    prefills = [make_prefill("p0"), make_prefill("p1", waiting_tokens=60)]
    decodes = [make_decode("d0"), make_decode("d1", decode_step_s=0.16)]
    assert session_route(Preferred("p1", "d1"), prefills, decodes) == ("p1", "d0")


def test_other_policies_know_no_sessions() -> None:
    prefills = [make_prefill("p0"), make_prefill("p1")]
    assert session_route(Preferred("p1", "d0"), prefills, [make_decode()], "least-loaded") == ("p0", "d0")


# -- several holders --------------------------------------------------------------------------------------------------


def ranges(held: Sequence[Held], rates: Mapping[tuple[str, str], float], **hits: int) -> tuple[PrefixRange, ...]:
    request = RouteRequest(1600, BLOCK)
    live = Live(ways=Rates(rates), held=held)
    found = choose(request, [make_prefill()], [make_decode()], hits, BYTES_PER_TOKEN, live=live)
    assert found is not None
    assert found.chosen.fetch_blocks == sum(piece.num_blocks for piece in found.sources)
    return found.sources


def test_one_holder_is_asked_for_all_that_is_missing() -> None:
    assert ranges([Held("p1", 60)], {("p1", "p0"): 1e7}, p0=10) == (PrefixRange("p1", 10, 50),)
    assert ranges([], {}) == ()


def test_a_second_holder_is_asked_for_no_more_than_it_has_and_only_where_much_is_gained() -> None:
    held, fast = [Held("p1", 30), Held("s", 60)], {("p1", "p0"): 1e8, ("s", "p0"): 1e7}
    assert ranges(held, fast) == (PrefixRange("p1", 0, 30), PrefixRange("s", 30, 30))
    # A twelfth of the time is saved.
    assert ranges([Held("p1", 5), Held("s", 60)], fast) == (PrefixRange("s", 0, 60),)
    assert ranges(held, fast, p0=30) == (PrefixRange("s", 30, 30),), "it has nothing that is missing"


def test_two_holders_are_asked_at_once_for_as_much_as_each_can_give_in_the_same_time() -> None:
    held = [Held("p1", 30), Held("s", 60)]
    rates = {("p1", "p0"): 1e7, ("s", "p0"): 1e7}
    assert ranges(held, rates) == (PrefixRange("p1", 0, 30), PrefixRange("s", 30, 30))
    fast = {("p1", "p0"): 1e7, ("s", "p0"): 2e7}
    assert ranges(held, fast) == (PrefixRange("p1", 0, 20), PrefixRange("s", 20, 40))


def test_a_second_holder_that_saves_little_is_not_asked() -> None:
    held = [Held("p1", 60), Held("s", 60)]
    assert ranges(held, {("p1", "p0"): 1e6, ("s", "p0"): 1e7}) == (PrefixRange("s", 0, 60),)


def test_a_disk_is_dearer_than_memory() -> None:
    class Tiers:
        def way(self, holder_id: str, needer_id: str, tier: Tier) -> Way:
            return Way(0.1 if tier is Tier.NVME else 0.0, 1e-6 if tier is Tier.NVME else 1e-7)

    def fetch(on_disk: int) -> CostTerms:
        live = Live(ways=Tiers(), held=[Held("s", 50, is_store=True, on_disk=on_disk)])
        found = choose(RouteRequest(1600, BLOCK), [make_prefill()], [make_decode()], {}, BYTES_PER_TOKEN, live=live)
        assert found is not None
        return found.chosen

    block_bytes = BLOCK * BYTES_PER_TOKEN
    assert fetch(0).fetch_s == pytest.approx(50 * block_bytes * 1e-7)
    some = fetch(20)
    assert some.fetch_s == pytest.approx(30 * block_bytes * 1e-7 + 0.1 + 20 * block_bytes * 1e-6)
    assert (some.fetch_blocks, some.fetch_disk_blocks) == (50, 20)
    # All of it from the disk takes longer than computing it.
    assert fetch(50).fetch_blocks == 0
