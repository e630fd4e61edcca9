"""Leaving out whoever cannot win changes no choice, and leaves few."""

import dataclasses
import math
import random
from collections.abc import Callable, Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tailrace.messages import OwnerRate
from tailrace.policy import choosing
from tailrace.policy.choosing import POLICIES, choose
from tailrace.policy.pairs import PairRates
from tailrace.policy.pricing import Pricing, microseconds, neutral_rates
from tailrace.policy.routing import Held, Live, Preferred, RouteRequest, WorkerView
from tailrace.policy.shortlist import FEW, Shortlist, Traits
from tailrace.types import Role
from tests.helpers.routing import BLOCK, BYTES_PER_TOKEN, Rates, make_decode, make_prefill, with_rates

ODD = (0.0, -1.0, float("nan"), float("inf"), 5e-324)
"""What a report may say of a rate, and does not mean one."""


class World:
    """Workers, what is known of them, and requests, all drawn by a number.

    Some have few differences, so that prices tie; some have rates that nobody measured, or impossible ones.
    """

    def __init__(self, number: int) -> None:
        self.random = random.Random(number)
        self.is_plain = self.random.random() < 0.3
        self.odd_share = self.random.choice((0.0, 0.0, 0.1, 1.0))
        most = self.random.choice((3, FEW + 1, 24))
        self.pair_share = self.random.choice((0.0, 0.1, 0.6, 1.0))
        self.pair_rates = (1e6, 1e7, 1e7, 4e7, 1e8) if self.random.random() < 0.5 else (5e7, 6e7, 6e7)
        self.views = {
            "p": [self.view(f"p{n:02}", Role.PREFILL) for n in range(self.random.randint(1, most))],
            "d": [self.view(f"d{n:02}", Role.DECODE) for n in range(self.random.randint(1, most))],
        }
        self.names = [view.worker_id for views in self.views.values() for view in views] + ["s0", "s1"]

    def rate(self, low: float, high: float) -> float:
        if self.random.random() < self.odd_share:
            return self.random.choice(ODD)
        return high if self.is_plain else self.random.uniform(low, high)

    def view(self, worker_id: str, role: Role) -> WorkerView:
        rand = self.random
        most = 1 if self.is_plain else 50
        total = rand.choice((0, 300, 2000, 2000, 2000))
        return WorkerView(
            worker_id,
            role,
            b"b" if rand.random() < self.odd_share / 10 else b"a",
            num_waiting=rand.randint(0, most),
            num_running=rand.randint(0, most),
            waiting_tokens=rand.choice((0, rand.randint(0, 10**5))),
            free_blocks=rand.randint(0, total),
            cached_blocks=rand.randint(0, total),
            total_blocks=total,
            booked_blocks=rand.choice((0, rand.randint(0, 500))),
            prefill_tokens_per_s=self.rate(1e4, 2e4),
            prefill_curve_s=self.rate(0.0, 1e-8),
            decode_step_s=self.rate(0.01, 0.05),
            decode_base_s=rand.choice((0.0, self.rate(0.005, 0.02))),
            decode_row_s=rand.choice((0.0, self.rate(1e-5, 1e-3))),
            transfer_bytes_per_s=self.rate(1e7, 1e8),
            pairs=self.pairs(),
            max_num_seqs=rand.randint(1, 128),
            draining=rand.random() < 0.1,
            reserved_tokens=rand.choice((0, rand.randint(0, 10**4))),
            reserved_sequences=rand.randint(0, 3),
        )

    def pairs(self) -> PairRates:
        """Of owners that are there, and of some that are not."""
        owners = [f"p{n:02}" for n in range(26) if self.random.random() < self.pair_share]
        if not self.is_plain and self.random.random() < 0.2:
            return PairRates.of(OwnerRate(owner, self.rate(1e7, 1e8)) for owner in owners)
        return PairRates.of(OwnerRate(owner, self.random.choice(self.pair_rates)) for owner in owners)

    def change(self) -> None:
        """Some report anew, and one may be another process by the same name."""
        for views in self.views.values():
            for at in self.random.sample(range(len(views)), k=min(2, len(views))):
                views[at] = self.view(views[at].worker_id, views[at].role)

    def request(self) -> tuple[RouteRequest, Mapping[str, int], Live]:
        rand, prefills = self.random, [view.worker_id for view in self.views["p"]]
        num_tokens = rand.choice((1, BLOCK, rand.randint(1, 200), rand.randint(1, 20_000)))
        blocks = num_tokens // BLOCK
        found = rand.sample(self.names, k=rand.randint(0, min(6, len(self.names))))
        held = [Held(name, rand.randint(0, blocks), name.startswith("s")) for name in found]
        hits = {one.holder_id: rand.randint(one.depth, blocks) for one in held}
        ways = Rates({(a, b): rand.choice((1e6, 1e8, 1e10)) for a in found for b in self.names if rand.random() < 0.8})
        live = Live(
            backlog_s=rand.choice(
                (None, *({name: rand.uniform(0.0, 2.0) for name in names} for names in (self.names[::2], prefills)))
            ),
            backlog_tokens={
                name: rand.choice((math.inf, rand.uniform(0.0, 400.0), rand.uniform(0.0, 30_000.0)))
                for name in self.names[:: rand.randint(1, 3)]
            },
            waiting={name: rand.uniform(0.0, 3.0) for name in self.names[::3]},
            ways=rand.choice((None, ways)),
            held=held,
            beside={name: ["s0"] for name in self.names[::4]},
            turn=rand.randrange(9),
            preferred=rand.choice((None, Preferred(rand.choice(("", *self.names)), rand.choice(self.names)))),
        )
        request = RouteRequest(num_tokens, BLOCK, rand.randint(1, 4), rand.choice((b"", b"a")), rand.random() < 0.8)
        if rand.random() < 0.3:
            request = dataclasses.replace(request, window=rand.choice((BLOCK + 1, 100, 4000)))
        return request, hits, live


@given(st.integers(0, 10**9))
@settings(max_examples=400)
def test_the_choice_and_its_terms_are_those_of_pricing_everybody(number: int) -> None:
    world, traits = World(number), Traits()
    for _ in range(4):
        request, hits, live = world.request()
        prefills, decodes = world.views["p"], world.views["d"]
        policy = world.random.choice(("cost", "cost", "cost", *POLICIES))

        def decide(**known: Traits) -> choosing.Route | None:
            return choose(request, prefills, decodes, hits, BYTES_PER_TOKEN, live=live, policy=policy, **known)  # noqa: B023

        plain, short = decide(), decide(traits=traits)
        assert short == plain
        if plain is not None:
            assert short.terms == plain.terms
        world.change()


@given(st.integers(0, 10**9))
@settings(max_examples=200)
def test_unmeasured_rates_are_those_of_everybody(number: int) -> None:
    world = World(number)
    prefills, decodes = world.views["p"], world.views["d"]
    assert Traits().of(prefills, decodes).neutral() == neutral_rates(prefills, decodes)


def left_of(
    request: RouteRequest, prefills: list[WorkerView], decodes: list[WorkerView], hits: Mapping[str, int], live: Live
) -> Shortlist:
    prices = Pricing.of(request, prefills, decodes, hits, BYTES_PER_TOKEN, live)
    return Traits().of(prefills, decodes).shortlist(prices)


def ids(views: list[WorkerView]) -> list[str]:
    return [view.worker_id for view in views]


PREFILLS = [make_prefill(f"p{n:02}", waiting_tokens=100 * n) for n in range(20)]
DECODES = [make_decode(f"d{n:02}", num_running=n, free_blocks=10**5, total_blocks=10**5) for n in range(20)]


def test_of_many_different_workers_those_are_left_who_can_win() -> None:
    left = left_of(RouteRequest(8000, BLOCK), PREFILLS, DECODES, {}, Live())
    assert (ids(left.prefills), ids(left.decodes)) == (["p00"], ["d00"])


def test_equal_workers_are_all_left() -> None:
    equal = [make_prefill(f"p{n:02}") for n in range(20)]
    left = left_of(RouteRequest(8000, BLOCK), equal, DECODES, {}, Live())
    assert ids(left.prefills) == ids(equal)


def test_who_might_fetch_a_prefix_is_left() -> None:
    """With p05's 400 blocks, p00 to p04 have less to wait for; nobody behind it can be better."""
    held = [Held("p05", 400)]
    live = Live(ways=Rates({}), held=held)
    left = left_of(RouteRequest(8000, BLOCK), PREFILLS, DECODES, {"p05": 400}, live)
    assert ids(left.prefills)[:6] == ["p00", "p01", "p02", "p03", "p04", "p05"]


def test_the_session_s_last_pair_is_left_however_dear() -> None:
    live = Live(preferred=Preferred("p19", "d19"))
    left = left_of(RouteRequest(8000, BLOCK), PREFILLS, DECODES, {}, live)
    assert (ids(left.prefills), ids(left.decodes)) == (["p00", "p19"], ["d00", "d19"])


def test_who_holds_the_prompt_and_may_prefill_it_alone_is_left() -> None:
    left = left_of(RouteRequest(8000, BLOCK), PREFILLS, DECODES, {"d07": 499}, Live())
    assert ids(left.decodes) == ["d00", "d07"]


def test_who_may_prefill_a_short_prompt_alone_is_left_only_where_that_may_be_cheaper() -> None:
    """All of them may: for d00 it costs no more than the best pair, for the others more the busier they are."""
    left = left_of(RouteRequest(BLOCK, BLOCK), PREFILLS, DECODES, {}, Live())
    assert (ids(left.prefills), ids(left.decodes)) == (["p00"], ["d00"])
    left = left_of(RouteRequest(BLOCK, BLOCK), PREFILLS, DECODES, {}, Live(backlog_s={"p00": 1.0}))
    assert ids(left.decodes) == ["d00", "d01", "d02", "d03"], "p01 would be a tenth of a second later than p00 was"


def with_slow(*pairs: tuple[str, str]) -> list[WorkerView]:
    """All pairs at 1e8 bytes/s, these at 1e7."""
    rates = {(prefill.worker_id, decode.worker_id): 1e8 for prefill in PREFILLS for decode in DECODES}
    return with_rates(DECODES, rates | dict.fromkeys(pairs, 1e7))


def test_where_the_two_best_have_a_slow_link_those_are_left_who_have_a_better_one() -> None:
    decodes = with_slow(("p00", "d00"))
    left = left_of(RouteRequest(8000, BLOCK), PREFILLS, decodes, {}, Live())
    assert (ids(left.prefills), ids(left.decodes)) == (["p00"], ["d00", "d01"])
    found = choose(RouteRequest(8000, BLOCK), PREFILLS, decodes, {}, BYTES_PER_TOKEN, traits=Traits())
    assert found is not None
    assert (found.prefill_id, found.decode_id, found.chosen.transfer_bytes_per_s) == ("p00", "d01", 1e8)


@pytest.mark.parametrize(
    ("slow", "preferred"),
    [(("p01", "d00"), Preferred("p01", "gone")), (("p00", "d01"), Preferred("gone", "d01"))],
)
def test_half_of_a_session_s_last_pair_is_left_with_whom_its_links_make_the_best(
    slow: tuple[str, str], preferred: Preferred
) -> None:
    decodes, live = with_slow(slow), Live(preferred=preferred)
    found = choose(RouteRequest(8000, BLOCK), PREFILLS, decodes, {}, BYTES_PER_TOKEN, live=live, traits=Traits())
    assert found is not None
    assert (found.prefill_id, found.decode_id) == ("p01", "d01")
    assert found == choose(RouteRequest(8000, BLOCK), PREFILLS, decodes, {}, BYTES_PER_TOKEN, live=live)


@pytest.mark.parametrize(
    "change",
    [
        lambda views: views[:FEW],
        lambda views: [dataclasses.replace(view, fingerprint=view.worker_id[-1:].encode()) for view in views],
        lambda views: [dataclasses.replace(view, draining=True) for view in views],
    ],
)
def test_few_workers_several_layouts_and_nobody_who_can_are_left_as_they_are(
    change: Callable[[list[WorkerView]], list[WorkerView]],
) -> None:
    prefills, decodes = change(PREFILLS), change(DECODES)
    left = left_of(RouteRequest(8000, BLOCK), prefills, decodes, {}, Live())
    assert (ids(left.prefills), ids(left.decodes)) == (ids(prefills), ids(decodes))


def test_a_view_is_read_once_and_forgotten_when_its_worker_has_long_left() -> None:
    traits = Traits()
    first = traits.of(PREFILLS, DECODES)
    changed = [dataclasses.replace(PREFILLS[0], waiting_tokens=7), *PREFILLS[1:]]
    second = traits.of(changed, DECODES)
    assert [a is b for a, b in zip(first.prefills, second.prefills, strict=True)] == [False] + [True] * 19
    traits.of(PREFILLS[:3], DECODES[:3])
    assert len(traits._read) == 6


def test_most_are_not_priced(monkeypatch: pytest.MonkeyPatch) -> None:
    priced: list[str] = []
    real = Pricing._price_prefill
    monkeypatch.setattr(
        Pricing, "_price_prefill", lambda prices, view: priced.append(view.worker_id) or real(prices, view)
    )
    found = choose(RouteRequest(8000, BLOCK), PREFILLS, DECODES, {}, BYTES_PER_TOKEN, traits=Traits())
    assert found is not None
    assert priced == ["p00"]
    assert len(found.terms) == 400
    assert min(found.terms, key=lambda terms: microseconds(terms.total_s)) == found.chosen
