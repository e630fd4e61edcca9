import dataclasses
from collections.abc import Sequence

import pytest

from tailrace.config import GatewayConfig
from tailrace.index.memory import MemoryIndex
from tailrace.kv.events import Tier
from tailrace.policy.choosing import POLICIES
from tailrace.policy.router import Lenders, Router
from tailrace.policy.routing import Route, RouteRequest, Way, WorkerView
from tailrace.types import Role

PREFILLS = [WorkerView(f"p{n}", Role.PREFILL, b"", prefill_tokens_per_s=1000.0) for n in range(3)]
DECODES = [WorkerView("d0", Role.DECODE, b"", decode_step_s=0.01, max_num_seqs=1000)]
CHAIN = [b"a", b"b", b"c", b"d"]


class Instant:
    """Every fetch takes no time."""

    def way(self, holder_id: str, needer_id: str, tier: Tier) -> Way:
        return Way(0.0, 0.0)


def decide(
    router: Router,
    hashes: Sequence[bytes] = CHAIN,
    now_s: float = 0.0,
    prefills: Sequence[WorkerView] = PREFILLS,
) -> Route:
    request = RouteRequest(16 * len(hashes) + 1, 16)
    route = router.route(request, hashes, prefills, DECODES, bytes_per_token=1, now_s=now_s)
    assert route is not None
    return route


def test_the_next_turn_finds_the_worker_that_still_computes_the_last_one() -> None:
    router = Router(MemoryIndex())
    turn = [f"{n}".encode() for n in range(64)]
    first = decide(router, turn)
    router.hold(first, 1, 0.0, 3)
    later = decide(router, [*turn, b"next"], now_s=0.9)
    assert (later.prefill_id, later.chosen.hit_blocks) == (first.prefill_id, 64)
    # At once, the wait for it costs more than the 64 blocks elsewhere.
    assert decide(router, [*turn, b"next"], now_s=0.0).prefill_id != first.prefill_id


def test_a_burst_of_equal_requests_does_not_herd() -> None:
    router = Router(MemoryIndex())
    taken = []
    for handle in range(6):
        route = decide(router, [f"{handle}".encode()])
        router.hold(route, handle, 0.0, 3)
        taken.append(route.prefill_id)
    assert sorted(taken) == ["p0", "p0", "p1", "p1", "p2", "p2"]


def test_what_is_released_counts_no_more() -> None:
    router = Router(MemoryIndex())
    route = decide(router)
    router.hold(route, 1, 0.0, 3)
    assert route.prefill_id is not None
    router.release(route.prefill_id, 1, 0.01)
    after = decide(router, now_s=0.01)
    assert all(terms.hit_blocks == 0 and terms.queue_s == 0.0 for terms in after.terms)


def test_what_is_only_expected_is_no_source_of_a_fetch() -> None:
    router = Router(MemoryIndex())
    router.hold(decide(router), 1, 0.0, 3)
    route = router.route(
        RouteRequest(65, 16),
        CHAIN,
        PREFILLS,
        DECODES,
        bytes_per_token=1,
        now_s=0.0,
        lenders=Lenders(Instant()),
    )
    assert route is not None
    assert {terms.fetch_blocks for terms in route.terms} == {0}


def test_with_a_window_a_hit_whose_head_is_gone_is_seen_and_one_without_its_end_is_not() -> None:
    """A token sees 17, so that two blocks are needed to go on behind one."""
    index = MemoryIndex()
    index.publish("p1", 1, CHAIN[1:3])
    index.publish("p2", 1, [CHAIN[0], CHAIN[3]])
    index.publish("store", 1, CHAIN[2:3], Tier.CPU)
    index.publish("store", 1, CHAIN[3:], Tier.NVME)
    request = RouteRequest(65, 16, window=17)
    assert request.span == 1
    request = RouteRequest(65, 16, window=18)
    assert request.span == 2
    route = Router(index).route(
        request,
        CHAIN,
        PREFILLS,
        DECODES,
        bytes_per_token=1,
        now_s=0.0,
        lenders=Lenders(Instant(), store_ids=frozenset({"store"})),
    )
    assert route is not None
    by_worker = {
        terms.prefill_id: (terms.hit_blocks, terms.fetch_blocks, terms.fetch_disk_blocks) for terms in route.terms
    }
    # p1 goes on from its third block, and lacks one of the two that end at the fourth.
    assert {name: by_worker[name] for name in ("p0", "p1", "p2")} == {"p0": (0, 2, 1), "p1": (3, 1, 1), "p2": (1, 2, 1)}
    assert [(piece.holder_id, piece.first_block + piece.num_blocks) for piece in route.sources] == [("store", 4)]


def waiting(*tokens: int) -> list[WorkerView]:
    return [dataclasses.replace(view, waiting_tokens=n) for view, n in zip(PREFILLS, tokens, strict=False)]


def test_those_who_wait_for_the_same_prefix_are_no_queue_of_whole_prompts() -> None:
    """A worker says that it has their tokens: it has not looked yet for what it has cached."""
    router = Router(MemoryIndex())
    document = [f"{n}".encode() for n in range(64)]
    first = decide(router, document)
    router.hold(first, 0, 0.0, 3)
    for handle in range(1, 6):
        question = [*document, f"question {handle}".encode()]
        route = decide(router, question, now_s=0.5, prefills=waiting(1041 * handle - 16))
        assert route.prefill_id == first.prefill_id
        assert route.chosen.queue_s == pytest.approx(0.525 + 0.017 * (handle - 1))
        router.hold(route, handle, 0.5, 3)


def test_what_others_sent_to_a_worker_is_beyond_what_it_was_sent_from_here() -> None:
    router = Router(MemoryIndex())
    mine = decide(router)
    router.hold(mine, 0, 0.0, 3)
    (queue_s,) = {terms.queue_s for terms in decide(router, prefills=waiting(65 + 300)).terms}
    assert queue_s == pytest.approx(0.065 + 0.3)


def test_predictions_by_a_rate_that_nobody_has_measured_are_not_remembered_as_load() -> None:
    router = Router(MemoryIndex())
    unmeasured = [dataclasses.replace(view, prefill_tokens_per_s=0.0) for view in PREFILLS]
    for handle in range(9):
        route = decide(router, [f"{handle}".encode()], now_s=float(handle), prefills=unmeasured)
        assert route.chosen.crowding_s == 0.0
        router.hold(route, handle, float(handle), 3)
        router.release(route.prefill_id or "", handle, handle + 0.5)
    assert decide(router, now_s=9.0).chosen.crowding_s == 0.0
    for handle in (9, 10):
        router.hold(decide(router, now_s=float(handle)), handle, float(handle), 3)
    assert any(terms.crowding_s > 0.0 for terms in decide(router, now_s=11.0).terms)


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(ValueError, match="policy: must be one of cost, round-robin, least-loaded, prefix, got 'best'"):
        Router(MemoryIndex(), "best")


def test_the_configuration_knows_every_policy() -> None:
    for policy in POLICIES:
        assert GatewayConfig(routing_policy=policy).routing_policy == policy
