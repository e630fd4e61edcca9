"""Random lives of a prefill worker in small pools: in order, computed right, and nothing held at the end."""

import random
from collections.abc import Sequence

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tailrace.kv.window import Window
from tailrace.types import SamplingParams
from tests.helpers.prefill_world import PrefillWorld

BLOCK = 4
FAMILIES = [[family * 100 + at for at in range(64)] for family in range(3)]


class PrefillMachine(RuleBasedStateMachine):
    """Hypothesis picks who does what; `teardown` lets everything end."""

    @initialize(
        num_blocks=st.integers(1, 14),
        max_num_seqs=st.integers(1, 4),
        budget=st.integers(1, 24),
        caching=st.booleans(),
        overlap=st.booleans(),
        window=st.sampled_from((0, 0, 1, 2, 5, 8, 13, 20)),
    )
    def begin(
        self, num_blocks: int, max_num_seqs: int, budget: int, caching: bool, overlap: bool, window: int = 0
    ) -> None:
        self.world = PrefillWorld(
            num_blocks=num_blocks,
            block_size=BLOCK,
            max_num_seqs=max_num_seqs,
            budget=budget,
            prefix_caching=caching,
            overlap=overlap,
            window=window,
            max_model_len=60 if Window(window, BLOCK).least_held(60) <= num_blocks else num_blocks * BLOCK,
        )

    @rule(
        family=st.integers(0, 2),
        length=st.integers(1, 56),
        replayed=st.integers(0, 3),
        max_tokens=st.integers(1, 5),
        choices=st.integers(1, 3),
        priority=st.integers(-1, 1),
        elsewhere=st.lists(st.builds(range, st.integers(0, 6), st.integers(0, 20)), max_size=3),
    )
    def submit(
        self,
        family: int,
        length: int,
        replayed: int,
        max_tokens: int,
        choices: int,
        priority: int,
        elsewhere: Sequence[range] = (),
    ) -> None:
        tokens = FAMILIES[family][: max(1, min(length, self.world.max_model_len - 1))]
        self.world.submit(
            tokens,
            num_prompt_tokens=max(1, len(tokens) - replayed),
            sampling=SamplingParams(max_tokens=replayed + max_tokens, seed=len(self.world.requests)),
            choices=tuple(range(choices)),
            priority=priority,
            elsewhere=elsewhere,
        )

    @rule(pick=st.integers(0, 7), num_in_flight=st.integers(0, 3))
    def drop(self, pick: int, num_in_flight: int = 0) -> None:
        """Any of those who are there: waiting, fetching, running or held; now and then one that is gone already."""
        live = [request_id for request_id in self.world.requests if request_id not in self.world.dropped]
        if live or self.world.requests:
            known = live or list(self.world.requests)
            self.world.drop(known[pick % len(known)], num_in_flight)

    @rule(pick=st.integers(0, 7), count=st.integers(1, 4), at=st.integers(0, 3))
    def land(self, pick: int, count: int, at: int) -> None:
        if reads := list(self.world.reads):
            self.world.land(reads[pick % len(reads)], count, at)

    @rule(pick=st.integers(0, 7), num_in_flight=st.integers(0, 2))
    def end_fetch(self, pick: int, num_in_flight: int) -> None:
        if reads := list(self.world.reads):
            self.world.end_fetch(reads[pick % len(reads)], num_in_flight)

    @rule(pick=st.integers(0, 7))
    def settle(self, pick: int) -> None:
        if self.world.late:
            self.world.settle_late(pick % len(self.world.late))

    @rule(pick=st.integers(0, 7))
    def pull(self, pick: int) -> None:
        held = [job.request.id for job in self.world.scheduler.jobs() if job.is_computed]
        if held:
            self.world.drop(held[pick % len(held)])

    @rule(count=st.integers(1, 4))
    def steps(self, count: int) -> None:
        for _ in range(count):
            self.world.step()
            self.world.pool.check_integrity()

    @invariant()
    def adds_up(self) -> None:
        if hasattr(self, "world"):
            self.world.pool.check_integrity()
            self.world.write_late()
            self.world.check_findable()
            for job in self.world.scheduler.jobs():
                self.world.check_ready_blocks(job)

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.run_to_end()
            self.world.pool.check_integrity()
            self.world.check_answers()
            self.world.check_empty()


TestPrefillMachine = PrefillMachine.TestCase
TestPrefillMachine.settings = settings(max_examples=50, stateful_step_count=40, deadline=None)


def play(seed: int, *, overlap: bool, window: int = 0) -> PrefillWorld:
    rng = random.Random(seed)
    machine = PrefillMachine()
    sizes = rng.randint(1, 14), rng.randint(1, 4), rng.choice((1, 3, 8, 24))
    machine.begin(*sizes, rng.random() < 0.8, overlap, window)
    actions = [
        (4, lambda: machine.steps(rng.randint(1, 3))),
        (4, lambda: submit(machine, rng)),
        (2, lambda: machine.pull(rng.randint(0, 7))),
        (1, lambda: machine.drop(rng.randint(0, 7), rng.randint(0, 2))),
        (4, lambda: machine.land(rng.randint(0, 7), rng.randint(1, 4), rng.randint(0, 2))),
        (2, lambda: machine.end_fetch(rng.randint(0, 7), rng.choice((0, 0, 1, 2)))),
        (1, lambda: machine.settle(rng.randint(0, 7))),
    ]
    weights = [weight for weight, _ in actions]
    for _ in range(120):
        rng.choices([action for _, action in actions], weights)[0]()
        machine.adds_up()
    machine.teardown()
    return machine.world


def submit(machine: PrefillMachine, rng: random.Random) -> None:
    lengths = (rng.randint(1, 40), rng.randint(0, 3), rng.randint(1, 4))
    elsewhere = [range(start, start + rng.randint(1, 9)) for start in rng.choices((0, 0, 2, 4), k=rng.randint(0, 2))]
    machine.submit(rng.randint(0, 2), *lengths, rng.randint(1, 3), rng.randint(-1, 1), elsewhere)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("seed", range(30))
def test_long_lives_end_with_every_prompt_right_and_no_block_held(seed: int, overlap: bool) -> None:
    world = play(seed, overlap=overlap)
    assert world.done, "nobody was computed: the life was empty"


def test_fetches_begin_before_their_turn_and_take_nothing_from_those_before_them() -> None:
    """The world checks each of them."""
    assert sum(play_behind_a_queue(seed).num_fetched_ahead for seed in range(20)) > 100


def play_behind_a_queue(seed: int) -> PrefillWorld:
    """More room and less budget than above, and much that others hold."""
    rng = random.Random(seed)
    machine = PrefillMachine()
    machine.begin(rng.randint(20, 60), rng.randint(1, 4), rng.choice((1, 3, 8)), True, rng.random() < 0.5)
    actions = [
        (4, lambda: machine.steps(rng.randint(1, 3))),
        (
            3,
            lambda: machine.world.submit(
                [rng.randint(0, 9) for _ in range(rng.randint(1, 30))], [range(rng.randint(0, 7))]
            ),
        ),
        (2, lambda: machine.pull(rng.randint(0, 7))),
        (0.5, lambda: machine.drop(rng.randint(0, 7), rng.randint(0, 2))),
        (4, lambda: machine.land(rng.randint(0, 7), rng.randint(1, 4), rng.randint(0, 2))),
        (2, lambda: machine.end_fetch(rng.randint(0, 7), rng.choice((0, 0, 1, 2)))),
    ]
    weights = [weight for weight, _ in actions]
    for _ in range(120):
        rng.choices([action for _, action in actions], weights)[0]()
        machine.adds_up()
    machine.teardown()
    return machine.world


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("window", [1, 3, 4, 9, 14])
def test_long_lives_with_a_window(window: int, overlap: bool) -> None:
    """FakeRunner sees to it that whatever is in the window of a token is held and right when it is read."""
    assert all(play(seed, overlap=overlap, window=window).done for seed in range(8))
