"""Several routers over the same workers, which tell one another what they have in flight."""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from statistics import mean

import pytest

from tailrace.index.memory import MemoryIndex
from tailrace.policy.other_routers import (
    MAX_MARKS,
    MAX_ROUTERS,
    InFlight,
    OtherRouters,
    RouterNews,
    mark_depths,
    marks_of,
)
from tailrace.policy.router import Router
from tailrace.policy.routing import Route, RouteRequest, WorkerView
from tailrace.types import Role

RATE = 1000.0
BLOCK = 16
WORKERS = [WorkerView(f"p{n}", Role.PREFILL, b"", prefill_tokens_per_s=RATE) for n in range(8)]
DECODES = [WorkerView("d0", Role.DECODE, b"", decode_step_s=0.01, max_num_seqs=1000)]


def chain(num_blocks: int, seed: int = 0) -> list[bytes]:
    return [random.Random(f"{seed} {n}").randbytes(16) for n in range(num_blocks)]


def decide(
    router: Router, hashes: Sequence[bytes], now_s: float = 0.0, workers: Sequence[WorkerView] = WORKERS
) -> Route:
    request = RouteRequest(BLOCK * len(hashes) + 1, BLOCK)
    route = router.route(request, hashes, workers, DECODES, bytes_per_token=1, now_s=now_s)
    assert route is not None
    return route


def tell(teller: Router, hearer: Router, now_s: float = 0.0, ttl_s: float = 1.0) -> None:
    hearer.hear("other", teller.news({}, now_s), now_s, ttl_s)


def queue_s(route: Route, worker_id: str) -> float:
    return next(terms.queue_s for terms in route.terms if terms.prefill_id == worker_id)


def spread(num_routers: int, num_prompts: int, *, share: bool, seed: int) -> float:
    """Largest over mean seconds of prefill that a burst of 0.4 s gives the workers; news takes 10 ms."""
    chance = random.Random(seed)
    routers = [Router(MemoryIndex()) for _ in range(num_routers)]
    given: Counter[str] = Counter()
    under_way: list[tuple[float, int, RouterNews]] = []
    for number, now_s in enumerate(sorted(chance.uniform(0.0, 0.4) for _ in range(num_prompts))):
        for sent_at, teller, news in [it for it in under_way if it[0] <= now_s - 0.01]:
            for hearer in set(range(num_routers)) - {teller}:
                routers[hearer].hear(f"r{teller}", news, sent_at + 0.01, 1.0)
        under_way = [it for it in under_way if it[0] > now_s - 0.01]
        mine = chance.randrange(num_routers)
        if share:
            routers[mine].share(f"r{mine}", lambda: None)
        route = decide(routers[mine], chain(chance.randint(90, 110), seed=number), now_s)
        routers[mine].hold(route, number, now_s, len(WORKERS))
        given[route.prefill_id or ""] += route.chosen.prefill_s
        if share:
            under_way.append((now_s, mine, routers[mine].news({}, now_s)))
    return max(given.values()) / (sum(given.values()) / len(WORKERS))


@pytest.mark.parametrize(("num_routers", "num_prompts"), [(2, 8), (4, 16), (8, 16), (8, 32)])
def test_a_burst_over_several_routers_spreads_nearly_as_over_one(num_routers: int, num_prompts: int) -> None:
    alone = mean(spread(1, num_prompts, share=False, seed=seed) for seed in range(8))
    together = mean(spread(num_routers, num_prompts, share=True, seed=seed) for seed in range(8))
    apart = mean(spread(num_routers, num_prompts, share=False, seed=seed) for seed in range(8))
    assert alone < 1.15
    assert together < 1.45
    assert apart > 1.9, "what sharing is for"


def test_what_another_has_in_flight_is_in_the_price_until_its_time_is_over() -> None:
    one, other = Router(MemoryIndex()), Router(MemoryIndex())
    route = decide(one, chain(100))
    one.hold(route, 1, 0.0, 8)
    tell(one, other, ttl_s=1.0)
    assert other.num_others(0.5) == 1
    assert queue_s(decide(other, chain(10, 1), 0.5), "p0") == pytest.approx(1.601)
    assert decide(other, chain(10, 1), 0.5).prefill_id != route.prefill_id
    assert queue_s(decide(other, chain(10, 1), 1.0), "p0") == 0.0, "a router that died takes it along"
    assert other.num_others(1.0) == 0


def test_what_is_computed_is_told_too() -> None:
    one, other = Router(MemoryIndex()), Router(MemoryIndex())
    one.hold(decide(one, chain(100)), 1, 0.0, 8)
    tell(one, other)
    one.release("p0", 1, 0.1)
    tell(one, other, 0.1)
    assert queue_s(decide(other, chain(10, 1), 0.2), "p0") == 0.0
    assert other.num_others(0.2) == 0


def test_what_the_worker_reports_is_not_counted_again() -> None:
    one, other = Router(MemoryIndex()), Router(MemoryIndex())
    one.hold(decide(one, chain(100)), 1, 0.0, 8)
    tell(one, other)
    reported = [replace(WORKERS[0], waiting_tokens=1601, num_waiting=1), *WORKERS[1:]]
    assert queue_s(decide(other, chain(10, 1), 0.1, reported), "p0") == pytest.approx(1.601)


def test_a_worker_s_own_prompts_count_where_others_tell_of_no_prompt_there() -> None:
    router = Router(MemoryIndex())
    told = RouterNews({"p0": InFlight(0.0, 10, 1)})
    router.hear("other", told, 0.0, 1.0)
    reported = [replace(WORKERS[0], waiting_tokens=1601, num_waiting=1), *WORKERS[1:]]
    assert queue_s(decide(router, chain(10, 1), 0.1, reported), "p0") == pytest.approx(1.601)


def test_own_and_others_prefills_add_up() -> None:
    one, other = Router(MemoryIndex()), Router(MemoryIndex())
    for number, router in enumerate((one, other)):
        router.hold(decide(router, chain(100, number)), number, 0.0, 8)
    tell(one, other)
    assert queue_s(decide(other, chain(10, 9)), "p0") == pytest.approx(3.202)


def test_a_prefix_that_another_sent_is_expected_where_it_was_sent() -> None:
    one, other = Router(MemoryIndex()), Router(MemoryIndex())
    shared = chain(100)
    route = decide(one, shared)
    one.hold(route, 1, 0.0, 8)
    tell(one, other)
    hits = {terms.prefill_id: terms.hit_blocks for terms in decide(other, [*shared, *chain(20, 5)]).terms}
    assert hits == {**{f"p{n}": 0 for n in range(8)}, "p0": 96}


def test_what_no_load_report_knows_counts_beside_it() -> None:
    router = Router(MemoryIndex())
    busy = [replace(DECODES[0], worker_id=name, max_num_seqs=8) for name in ("d0", "d1")]

    def choose() -> str:
        route = router.route(RouteRequest(17, 16), [], WORKERS, busy, bytes_per_token=1, now_s=0.0)
        assert route is not None
        return route.decode_id

    assert choose() == "d0"
    router.hear("other", RouterNews({"d0": InFlight(tokens=100, sequences=6)}), 0.0, 1.0)
    assert choose() == "d1"


def test_work_that_others_give_makes_a_worker_as_busy_as_ones_own() -> None:
    whole, halves = Router(MemoryIndex()), [Router(MemoryIndex()), Router(MemoryIndex())]
    for number in range(400):
        now_s = number * 0.01
        route = decide(whole, chain(4, number), now_s)
        whole.hold(route, number, now_s, 8)
        halves[number % 2].hold(route, number, now_s, 8)
        tell(halves[0], halves[1], now_s)
    alone, together = whole._crowding.waiting(), halves[1]._crowding.waiting()
    assert together.keys() == alone.keys()
    assert all(together[name] == pytest.approx(alone[name], rel=0.05) for name in alone)


def test_prefills_are_told_once() -> None:
    router = Router(MemoryIndex())
    router.hold(decide(router, chain(4)), 1, 0.0, 8)
    assert len(router.news({}, 0.0).given) == 1
    assert router.news({}, 0.0).given == ()


def test_marks_name_two_thirds_of_a_chain_at_least() -> None:
    assert list(mark_depths(24)) == [1, 2, 3, 4, 6, 8, 12, 16, 24]
    for length in range(1, 200):
        assert max(mark_depths(length)) >= length * 2 / 3
    assert marks_of([]) == []


def test_news_is_bounded() -> None:
    router = Router(MemoryIndex())
    for number in range(200):
        router.hold(decide(router, chain(64, number)), number, 0.0, 8)
    news = router.news({}, 0.0)
    assert sum(len(there.marks) for there in news.in_flight.values()) <= MAX_MARKS
    others = OtherRouters()
    for number in range(MAX_ROUTERS + 5):
        others.hear(f"r{number}", {"p0": InFlight(1.0)}, 1.0)
    assert others.num_heard(0.0) == MAX_ROUTERS
    assert others.in_flight(0.0)["p0"].prefill_s == MAX_ROUTERS
