"""Random lives of a decode worker in small pools: nothing is lost, nothing is doubled, everybody is answered."""

import random
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tailrace.kv.window import Window
from tailrace.policy.request import Request
from tailrace.types import SamplingParams
from tests.helpers.decode_world import DecodeWorld, FakeSwap

BLOCK = 4
FAMILIES = [[family * 100 + at for at in range(64)] for family in range(3)]


def prompt(family: int, length: int, world: DecodeWorld) -> list[int]:
    return FAMILIES[family][: max(1, min(length, world.max_model_len - 1))]


def make(world: DecodeWorld, family: int, length: int, *, max_tokens: int, choices: int, priority: int) -> Request:
    tokens = prompt(family, length, world)
    sampling = SamplingParams(max_tokens=max_tokens, seed=len(world.requests), ignore_eos=priority == 0)
    return world.request(tokens, sampling=sampling, choices=tuple(range(choices)), priority=priority)


def longest(num_blocks: int, window: int) -> int:
    """Of sequences that a pool can hold."""
    return 100 if Window(window, BLOCK).least_held(100) <= num_blocks else num_blocks * BLOCK


class DecodeMachine(RuleBasedStateMachine):
    """Hypothesis picks who does what; `teardown` lets everything end."""

    @initialize(
        num_blocks=st.integers(2, 14),
        max_num_seqs=st.integers(1, 4),
        budget=st.integers(1, 24),
        caching=st.booleans(),
        overlap=st.booleans(),
        low_water=st.sampled_from((0.0, 0.3, 1.0)),
        window=st.sampled_from((0, 0, 1, 2, 5, 8, 13, 20)),
    )
    def begin(
        self,
        num_blocks: int,
        max_num_seqs: int,
        budget: int,
        caching: bool,
        overlap: bool,
        low_water: float = 0.3,
        window: int = 0,
    ) -> None:
        self.world = DecodeWorld(
            num_blocks=num_blocks,
            block_size=BLOCK,
            max_num_seqs=max_num_seqs,
            budget=budget,
            max_model_len=longest(num_blocks, window),
            prefix_caching=caching,
            overlap=overlap,
            low_water=low_water,
            window=window,
        )

    @rule(
        family=st.integers(0, 2),
        length=st.integers(1, 40),
        max_tokens=st.integers(1, 12),
        choices=st.integers(1, 3),
        priority=st.integers(-1, 1),
        local=st.booleans(),
        num_named=st.integers(0, 10),
        num_true=st.integers(0, 10),
    )
    def arrive(
        self,
        family: int,
        length: int,
        max_tokens: int,
        choices: int,
        priority: int,
        local: bool,
        num_named: int = 0,
        num_true: int = 0,
    ) -> None:
        request = make(self.world, family, length, max_tokens=max_tokens, choices=choices, priority=priority)
        if local:
            self.world.submit_local(request, [range(num_named)] if num_named else [], num_true)
        else:
            self.world.book(request)

    @rule(pick=st.integers(0, 7))
    def want(self, pick: int) -> None:
        self._of_pulls(pick, self.world.want)

    @rule(pick=st.integers(0, 7), count=st.integers(1, 4))
    def lend(self, pick: int, count: int) -> None:
        self._of_pulls(pick, lambda request_id: self.world.start_read(request_id, count))

    @rule(pick=st.integers(0, 7), at=st.integers(0, 3))
    def land(self, pick: int, at: int) -> None:
        flying = [p for p in [*self.world.pulls.values(), *self.world.ghosts] if p.flights]
        if flying:
            pull = flying[pick % len(flying)]
            self.world.land(pull, at % len(pull.flights))

    @rule(pick=st.integers(0, 7))
    def join(self, pick: int) -> None:
        self._of_pulls(pick, self.world.join)

    @rule(pick=st.integers(0, 7), stalled=st.booleans())
    def fail(self, pick: int, stalled: bool) -> None:
        self._of_pulls(pick, lambda request_id: self.world.fail(request_id, stalled=stalled))

    @rule(pick=st.integers(0, 7))
    def cancel(self, pick: int) -> None:
        if self.world.choices:
            self.world.cancel(sorted(self.world.choices)[-1 - pick % len(self.world.choices)])

    @rule(pick=st.integers(0, 7), choice=st.integers(0, 2))
    def cancel_choice(self, pick: int, choice: int) -> None:
        if self.world.choices:
            request_id = sorted(self.world.choices)[-1 - pick % len(self.world.choices)]
            self.world.cancel_choices(request_id, (choice,))

    @rule(count=st.integers(1, 5))
    def store_takes(self, count: int) -> None:
        self.world.store_takes(count)

    @rule(pick=st.integers(0, 7), count=st.integers(1, 4))
    def read_swap(self, pick: int, count: int) -> None:
        self._of_swaps(pick, lambda swap: self.world.read_swap(swap, count))

    @rule(pick=st.integers(0, 7), at=st.integers(0, 3))
    def land_swap(self, pick: int, at: int) -> None:
        flying = [swap for swap in [*self.world.swaps.values(), *self.world.late_swaps] if swap.flights]
        if flying:
            swap = flying[pick % len(flying)]
            self.world.land_swap(swap, at % len(swap.flights))

    @rule(pick=st.integers(0, 7))
    def end_swap(self, pick: int) -> None:
        self._of_swaps(pick, self.world.end_swap)

    @rule(count=st.integers(1, 5))
    def steps(self, count: int) -> None:
        for _ in range(count):
            self.world.step()
            self.world.check()

    @invariant()
    def adds_up(self) -> None:
        if hasattr(self, "world"):
            self.world.check()

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.run_to_end()
            self.world.check()
            self.world.check_answers()
            self.world.check_empty()

    def _of_swaps(self, pick: int, act: Callable[[FakeSwap], object]) -> None:
        if self.world.swaps:
            act(self.world.swaps[sorted(self.world.swaps)[pick % len(self.world.swaps)]])

    def _of_pulls(self, pick: int, act: Callable[[int], object]) -> None:
        if self.world.pulls:
            act(sorted(self.world.pulls)[pick % len(self.world.pulls)])


TestDecodeMachine = DecodeMachine.TestCase
TestDecodeMachine.settings = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


def play(seed: int, *, overlap: bool, window: int = 0) -> DecodeWorld:
    """One long life, everybody busy."""
    rng = random.Random(seed)
    machine = DecodeMachine()
    sizes = rng.randint(2, 14), rng.randint(1, 4), rng.choice((1, 3, 8, 24))
    machine.begin(*sizes, rng.random() < 0.8, overlap, window=window)
    actions = [
        (6, lambda: machine.steps(rng.randint(1, 3))),
        (3, lambda: arrive(machine, rng)),
        (4, lambda: machine.want(rng.randint(0, 7))),
        (4, lambda: machine.lend(rng.randint(0, 7), rng.randint(1, 4))),
        (4, lambda: machine.land(rng.randint(0, 7), rng.randint(0, 3))),
        (4, lambda: machine.join(rng.randint(0, 7))),
        (2, lambda: machine.store_takes(rng.randint(1, 5))),
        (3, lambda: machine.read_swap(rng.randint(0, 7), rng.randint(1, 4))),
        (3, lambda: machine.land_swap(rng.randint(0, 7), rng.randint(0, 3))),
        (2, lambda: machine.end_swap(rng.randint(0, 7))),
        (1, lambda: machine.fail(rng.randint(0, 7), rng.random() < 0.5)),
        (1, lambda: machine.cancel(rng.randint(0, 7))),
        (1, lambda: machine.cancel_choice(rng.randint(0, 7), rng.randint(0, 2))),
    ]
    weights = [weight for weight, _ in actions]
    for _ in range(150):
        rng.choices([action for _, action in actions], weights)[0]()
        machine.world.check()
    machine.teardown()
    return machine.world


def arrive(machine: DecodeMachine, rng: random.Random) -> None:
    machine.arrive(
        rng.randint(0, 2), rng.randint(1, 40), rng.randint(1, 12), rng.choice((1, 1, 2, 3)), rng.randint(-1, 1),
        rng.random() < 0.4, rng.choice((0, 0, 3, 8)), rng.randint(0, 10),
    )  # fmt: skip


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("seed", range(40))
def test_long_lives_end_with_every_answer_right_and_no_block_held(seed: int, overlap: bool) -> None:
    world = play(seed, overlap=overlap)
    assert world.reasons, "nobody was answered: the life was empty"


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("window", [1, 3, 4, 9, 14])
def test_long_lives_with_a_window(window: int, overlap: bool) -> None:
    """FakeRunner sees to it that whatever is in the window of a token is held and right when it is read."""
    assert all(play(seed, overlap=overlap, window=window).reasons for seed in range(6))


def play_in_little_room(seed: int, *, overlap: bool, window: int = 0) -> DecodeWorld:
    """Everybody's answer outgrows the pool again and again; the store takes much of what is offered."""
    rng = random.Random(seed)
    machine = DecodeMachine()
    machine.begin(rng.randint(6, 12), 4, rng.choice((4, 8, 24)), True, overlap, low_water=0.0, window=window)
    world = machine.world
    actions = [
        (12, lambda: machine.steps(rng.randint(1, 3))),
        (2, lambda: arrive_with_a_long_answer(world, rng)),
        (3, lambda: machine.store_takes(rng.randint(1, 6))),
        (5, lambda: machine.read_swap(rng.randint(0, 7), rng.randint(1, 4))),
        (5, lambda: machine.land_swap(rng.randint(0, 7), rng.randint(0, 3))),
        (2, lambda: machine.end_swap(rng.randint(0, 7))),
        (0.2, lambda: machine.cancel(rng.randint(0, 7))),
    ]
    weights = [weight for weight, _ in actions]
    for _ in range(300):
        rng.choices([action for _, action in actions], weights)[0]()
        world.check()
    machine.teardown()
    return world


def arrive_with_a_long_answer(world: DecodeWorld, rng: random.Random) -> None:
    tokens = [rng.randint(0, 5) for _ in range(rng.randint(1, 10))]
    sampling = SamplingParams(max_tokens=rng.randint(6, 4 * world.pool.num_blocks), seed=rng.random(), ignore_eos=True)
    world.submit_local(world.request(tokens, sampling=sampling, choices=tuple(range(rng.choice((1, 1, 2))))))


@pytest.mark.parametrize("overlap", [False, True])
def test_whoever_gives_way_comes_back_by_way_of_the_store_with_the_same_answer(overlap: bool) -> None:
    worlds = [play_in_little_room(seed, overlap=overlap) for seed in range(25)]
    assert sum(world.scheduler.num_preempted for world in worlds) > 100
    assert sum(world.num_swapped_in for world in worlds) > 100, "the store brought next to nothing"


@pytest.mark.parametrize("overlap", [False, True])
def test_answers_longer_than_the_pool_end_and_give_way_to_one_another(overlap: bool) -> None:
    worlds = [play_in_little_room(seed, overlap=overlap, window=9) for seed in range(12)]
    assert sum(world.scheduler.num_preempted for world in worlds) > 20
    longest_one = max(len(answer) for world in worlds for answer in world.answers.values())
    assert longest_one > max(world.pool.num_blocks for world in worlds) * BLOCK // 2
