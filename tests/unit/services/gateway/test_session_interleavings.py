"""Whatever the order in which workers speak, die and are replaced: no token twice, none missing, none out of order."""

import asyncio
from dataclasses import dataclass, field

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.gateway import dispatcher as dispatcher_module
from tailrace.errors import ErrorCode, OverloadedError, TailraceError, WorkerLostError
from tailrace.lifecycle import RequestState
from tailrace.messages import LegReport
from tailrace.types import FinishReason, SamplingParams
from tests.helpers.fake_members import (
    ChoiceEnded,
    FakeCall,
    FakeCluster,
    FakeWorker,
    Heard,
    Tokens,
    fake_cluster,
    settle,
    until,
)

PROMPT = [1, 2, 3, 4, 5]
MAX_TOKENS = 5
POISON = 666


def token(choice: int, index: int) -> int:
    """What every worker draws: tokens are a function of choice and position."""
    return 1000 * (choice + 1) + index


@dataclass
class Play:
    """Chooses what happens next; `draw` is hypothesis's."""

    cluster: FakeCluster
    session: object
    draw: object
    told: dict[tuple[int, int], int] = field(default_factory=dict)
    """By (handle, choice): generated tokens that the leg has reached."""
    stopped: set[int] = field(default_factory=set)

    def legs(self) -> list[tuple[FakeWorker, FakeCall, object]]:
        workers = [*self.cluster.prefills, *self.cluster.decodes]
        return [(w, call, s) for w in workers for call in w.calls for s in call.submissions if call.is_open]

    async def step(self) -> None:
        legs = self.legs()
        moves = [self.speak, self.speak, self.speak, self.lie, self.refuse, self.die, self.stop_choice]
        move = self.draw(st.sampled_from(moves))
        worker, call, submission = self.draw(st.sampled_from(legs))
        await move(worker, call, submission)
        if self.draw(st.booleans()):
            await settle()

    def is_cancelled(self, call: FakeCall, submission: object) -> bool:
        return (submission.handle, ()) in call.cancels

    async def speak(self, worker: FakeWorker, call: FakeCall, submission: object) -> None:
        """The next tokens of one choice of a leg: the first ones only, of a prefill leg."""
        if self.is_cancelled(call, submission) or call is not worker.call:
            return
        choice = self.draw(st.sampled_from(submission.choices))
        begun = len(submission.tokens) - len(PROMPT)
        done = self.told.get((submission.handle, choice), begun)
        is_prefill = worker in self.cluster.prefills
        last = begun + 1 if is_prefill else MAX_TOKENS
        if done >= min(last, MAX_TOKENS):
            return
        count = self.draw(st.integers(1, min(last, MAX_TOKENS) - done))
        self.told[submission.handle, choice] = done + count
        await worker.tokens(
            [token(choice, index) for index in range(done, done + count)],
            choice=choice,
            position=len(PROMPT) + done,
            handle=submission.handle,
            report=LegReport(0, prefill_s=0.01) if self.draw(st.booleans()) else None,
            reason=FinishReason.LENGTH if done + count == MAX_TOKENS else None,
        )

    async def lie(self, worker: FakeWorker, call: FakeCall, submission: object) -> None:
        """A leg that was replaced goes on speaking."""
        if self.is_cancelled(call, submission) and call is worker.call:
            choice = self.draw(st.sampled_from(submission.choices))
            position = len(PROMPT) + self.draw(st.integers(0, MAX_TOKENS))
            await worker.tokens([POISON], choice=choice, position=position, handle=submission.handle)

    async def refuse(self, worker: FakeWorker, call: FakeCall, submission: object) -> None:
        if call is worker.call:
            error = self.draw(st.sampled_from([WorkerLostError("lost"), OverloadedError("full")]))
            await worker.fail(error, handle=submission.handle)

    async def die(self, worker: FakeWorker, call: FakeCall, submission: object) -> None:
        if call is worker.call:
            await worker.die()
            if self.draw(st.booleans()):
                await until(lambda: len(self.cluster.members.all()) == 4)

    async def stop_choice(self, worker: FakeWorker, call: FakeCall, submission: object) -> None:
        choice = self.draw(st.integers(0, self.session.request.num_choices - 1))
        self.stopped.add(choice)
        self.session.finish_choice(choice)


async def play(data: st.DataObject, num_choices: int, num_steps: int) -> None:
    # Nothing here may depend on the time that passes: the same draws must give the same play.
    async with fake_cluster(prefill=2, decode=2, reattach_s=0) as cluster:
        sampling = SamplingParams(max_tokens=MAX_TOKENS, seed=1)
        session = await cluster.submit(PROMPT, num_choices=num_choices, sampling=sampling)
        heard = Heard(session)
        act = Play(cluster, session, data.draw)
        for _ in range(num_steps):
            if session.is_over or not act.legs():
                break
            await act.step()
        await settle()
        if data.draw(st.booleans()):
            await session.aclose()
        assert heard.has_ended.is_set() == (session.life.state in {RequestState.FINISHED, RequestState.FAILED})
        await session.aclose()
        check(session, heard.events, act.stopped, heard.error)
        await settle()


def check(session: object, heard: list[object], stopped: set[int], error: TailraceError | None) -> None:
    tokens: dict[int, list[int]] = {choice: [] for choice in range(session.request.num_choices)}
    ended: set[int] = set()
    for event in heard:
        if isinstance(event, Tokens):
            assert event.choice not in ended, "nothing comes after the end of a choice"
            assert event.position == len(PROMPT) + len(tokens[event.choice])
            tokens[event.choice] += event.token_ids
        elif isinstance(event, ChoiceEnded):
            assert len(tokens[event.choice]) == MAX_TOKENS
            ended.add(event.choice)
    for choice, ids in tokens.items():
        assert ids == [token(choice, index) for index in range(len(ids))]
    if error is not None:
        assert error.code in {ErrorCode.WORKER_LOST, ErrorCode.OVERLOADED, ErrorCode.UNAVAILABLE}, error
    if session.life.state is RequestState.FINISHED:
        assert ended | stopped == set(tokens)
        assert heard[-1].usage.completion_tokens == sum(map(len, tokens.values()))
    times = [at for _, at in session.life.moves]
    assert times == sorted(times)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data(), num_choices=st.integers(1, 3), num_steps=st.integers(1, 30), retries=st.sampled_from([0, 2, 50]))
def test_any_interleaving_gives_each_token_once_and_in_order(data, num_choices, num_steps, retries):
    before = dispatcher_module.MAX_RETRIES
    dispatcher_module.MAX_RETRIES = retries
    try:
        asyncio.run(play(data, num_choices, num_steps))
    finally:
        dispatcher_module.MAX_RETRIES = before
