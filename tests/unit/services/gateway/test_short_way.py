"""The short way of plain tokens: nothing is lost, told twice or told late, whichever way a token goes."""

import asyncio
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import uvloop

from services.gateway.outlet import Board, Outlet
from tailrace.errors import WorkerLostError
from tailrace.lifecycle import RequestState
from tailrace.messages import LegReport, StepEvents, TokenColumns
from tailrace.types import FinishReason, SamplingParams
from tests.helpers.fake_dispatcher import FakeDispatcher, Script
from tests.helpers.fake_members import FakeCluster, Heard, fake_cluster, make_request, settle, until
from tests.helpers.gateway_app import EOS, MODEL, ids, make_app, served
from tests.helpers.outlets import Client

LENGTH = FinishReason.LENGTH
PART = 239
"""A token that is no whole character."""


def told(heard: Heard) -> list[int]:
    return [token for event in heard.events for token in getattr(event, "token_ids", [])]


async def diverted(cluster: FakeCluster, client: Client, **fields: object) -> tuple[Any, Heard]:
    """A session whose first token was told by both legs."""
    session = await cluster.submit(**fields)
    heard = Heard(session)
    await cluster.prefill.tokens([11], report=LegReport(0, prefill_s=0.1))
    session.divert(0, client.outlet)
    await cluster.decode.tokens([11, 12])
    return session, heard


async def test_the_first_token_of_decode_is_told_and_the_rest_is_taken() -> None:
    async with fake_cluster() as cluster:
        client = Client()
        session, heard = await diverted(cluster, client)
        await cluster.decode.tokens([13, 14], position=7)
        assert (told(heard), client.tokens()) == ([11, 12], [13, 14])
        assert session.released(0) == [11, 12, 13, 14]
        assert session.life.state is RequestState.DECODING
        await cluster.decode.tokens([15], position=9, reason=LENGTH)
        assert client.tokens() == [13, 14, 15]
        assert session.usage.completion_tokens == 5


async def test_what_is_not_taken_is_told_in_its_place() -> None:
    async with fake_cluster() as cluster:
        client = Client()
        session, heard = await diverted(cluster, client)
        await cluster.decode.tokens([13], position=7)
        await cluster.decode.tokens([PART, 15], position=8)
        await cluster.decode.tokens([16], position=10, reason=LENGTH)
        assert (told(heard), client.tokens()) == ([11, 12, PART, 15], [13, 16])
        assert session.released(0) == [11, 12, 13, PART, 15, 16]


async def test_old_tokens_are_taken_once_and_a_gap_is_an_error() -> None:
    async with fake_cluster() as cluster:
        client = Client()
        _, heard = await diverted(cluster, client)
        await cluster.decode.tokens([12, 13], position=6)
        assert (told(heard), client.tokens()) == ([11, 12], [13])
        await cluster.decode.tokens([99], position=42)
        assert "token 42 came before token 8" in str(heard.error)
        assert client.tokens() == [13]


async def test_more_tokens_are_released_than_an_outlet_remembers() -> None:
    async with fake_cluster() as cluster:
        client = Client()
        session, heard = await diverted(cluster, client, sampling=SamplingParams(max_tokens=400, seed=7))
        tokens = [3 + i % 90 for i in range(300)]
        for i, token in enumerate(tokens):
            await cluster.decode.tokens([token], position=7 + i)
            client.read()
        assert session.released(0) == [11, 12, *tokens]
        assert told(heard) == [11, 12, tokens[128], tokens[257]], "a full one leaves the next token to the whole way"
        assert len(client.tokens()) == 298
        await session.aclose()


async def test_a_leg_of_several_choices_has_no_short_way() -> None:
    async with fake_cluster() as cluster:
        client = Client()
        session, heard = await diverted(cluster, client, num_choices=2)
        await cluster.decode.tokens([13], position=7)
        assert (told(heard), client.tokens()) == ([11, 12, 13], [])
        await session.aclose()


async def test_another_worker_replays_what_was_taken_and_goes_on_the_short_way() -> None:
    async with fake_cluster(decode=2) as cluster:
        client = Client()
        session = await cluster.submit()
        heard = Heard(session)
        session.divert(0, client.outlet)
        _, first = cluster.pair_of(session)
        await first.tokens([11])
        await first.tokens([12, 13], position=6)
        assert (told(heard), client.tokens()) == ([11], [12, 13]), "the first token of a leg is told"
        await cluster.leave(first)
        await until(lambda: cluster.pair_of(session)[1] is not first)
        _, second = cluster.pair_of(session)
        assert second.last.tokens == [1, 2, 3, 4, 5, 11, 12, 13]
        await second.tokens([14], position=8)
        await second.tokens([15, 16], position=9, reason=LENGTH)
        assert (told(heard), client.tokens()) == ([11, 14], [12, 13, 15, 16])
        assert session.released(0) == [11, 12, 13, 14, 15, 16]


@pytest.mark.parametrize("how", ["close", "finish", "fail"])
async def test_nothing_is_taken_after_the_end(how: str) -> None:
    async with fake_cluster() as cluster:
        client = Client()
        session, _ = await diverted(cluster, client)
        handle = cluster.decode.last.handle
        if how == "close":
            await session.aclose()
        elif how == "finish":
            session.finish_choice(0)
        else:
            session.fail(WorkerLostError("lost"))
        assert len(cluster.members.get("d0").board) == 0
        await cluster.decode.tokens([13], position=7, handle=handle)
        assert client.tokens() == []


async def test_a_defect_in_one_short_way_fails_its_own_request_only() -> None:
    async with fake_cluster() as cluster:
        client = Client()
        session, heard = await diverted(cluster, client)
        other = await cluster.dispatcher.submit(make_request())
        broken = mock.Mock(side_effect=ValueError)
        with mock.patch.object(session._choices[0].outlet, "settle", broken), half_sent():
            await cluster.decode.say(two_rows(cluster))
        await settle()
        assert broken.called
        assert "its log says why" in str(heard.error)
        assert other.released(0) == [21]
        await other.aclose()


@contextmanager
def half_sent() -> Iterator[None]:
    """Sockets that take one byte of each chunk."""
    write = Board.write

    def halved(self: Board, columns: TokenColumns) -> list[int]:
        rows = write(self, columns)
        self._outcomes[0] = 1
        return [0, *rows]

    with mock.patch.object(Board, "write", halved):
        yield


def two_rows(cluster: FakeCluster) -> StepEvents:
    event = StepEvents()
    first, second = (submission.handle for submission in cluster.decode.submissions)
    event.tokens.add(first, 0, 7, 13, None)
    event.tokens.add(second, 0, 5, 21, None)
    return event


# -- from the token to the client -------------------------------------------------------------------------------------


@contextmanager
def outlets() -> Iterator[list[bool]]:
    """What outlets answered, token by token."""
    answers: list[bool] = []
    take = Outlet.take

    def spy(self: Outlet, position: int, token_id: int) -> bool:
        answers.append(take(self, position, token_id))
        return answers[-1]

    with mock.patch.object(Outlet, "take", spy):
        yield answers


async def ask(
    dispatcher: FakeDispatcher,
    *,
    read_when: Callable[[], object] = lambda: True,
    then: Callable[[], None] | None = None,
    **fields: Any,
) -> list[dict[str, Any]]:
    """The events of one answer, whose client reads nothing before `read_when`, and everything from then on.

    `then` is called when what lay in the buffers has been read.
    """
    data = bytearray()
    async with served(make_app(dispatcher), send_buffer=16384) as url:
        host, port = url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port), limit=4096)
        content = json.dumps({"model": MODEL, "prompt": "a", "stream": True, **fields}).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(content)}\r\n\r\n"
        )
        writer.write(head.encode() + content)
        await until(read_when)
        reading = asyncio.create_task(read_all(reader, data))
        if then is not None:
            await at_rest(data)
            then()
        await reading
        writer.close()
    assert dispatcher.all_closed()
    return [json.loads(event) for event in events_of(bytes(data))]


async def read_all(reader: asyncio.StreamReader, data: bytearray) -> None:
    while piece := await reader.read(1 << 16):
        data += piece


async def at_rest(data: bytearray) -> None:
    """Nothing more comes."""
    size = -1
    while len(data) > size:
        size = len(data)
        await asyncio.sleep(0.3)


def events_of(data: bytes) -> list[str]:
    _, _, rest = data.partition(b"\r\n\r\n")
    body = b""
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        body, rest = body + rest[: int(size, 16)], rest[int(size, 16) + 2 :]
    *events, done, end = body.decode().split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    return [event.removeprefix("data: ") for event in events]


def text_of(events: list[dict[str, Any]]) -> str:
    return "".join(choice["text"] for event in events for choice in event["choices"])


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_plain_text_is_taken_and_parts_of_characters_are_not(loop: Any) -> None:
    text = "the cat sat on the mat 🎈日本 and on the mat"
    script = Script([[*ids(text), EOS]], delay_s=0.001)
    with outlets() as answers, asyncio.Runner(loop_factory=loop) as runner:
        events = runner.run(ask(FakeDispatcher(script), stream_options={"include_usage": True}))
    assert text_of(events) == text
    assert answers.count(True) > answers.count(False) > 2
    assert events[-1]["usage"]["completion_tokens"] == len(ids(text)) + 1
    assert events[-2]["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("fields", [{"stop": ["zzz"]}, {"logprobs": 1}], ids=["stop", "logprobs"])
async def test_what_needs_a_look_at_each_token_goes_the_whole_way(fields: dict[str, Any]) -> None:
    with outlets() as answers:
        events = await ask(FakeDispatcher(Script([[*ids("the cat sat"), EOS]], delay_s=0.001)), **fields)
    assert text_of(events) == "the cat sat"
    assert True not in answers


async def test_a_slow_client_gets_its_pieces_joined_and_single_ones_again_when_it_keeps_pace() -> None:
    """Back-pressure closes the short way, and its end opens it again."""
    text = " the cat sat on the mat" * 1500
    script = Script([[*ids(text), EOS]], hold_at=len(ids(text)) - 100)
    dispatcher = FakeDispatcher(script)
    with outlets() as answers:
        events = await ask(
            dispatcher,
            read_when=lambda: [it.num_events for it in dispatcher.generations] == [script.hold_at],
            then=script.go_on.set,
        )
    assert text_of(events) == text
    first_taken = answers.index(True)
    first_refusal = answers.index(False, first_taken)
    assert first_refusal - first_taken > 10, "until the buffers were full"
    assert True in answers[first_refusal:], "when they were empty again"
    longest = max(len(choice["text"]) for event in events for choice in event["choices"])
    assert longest > 100 * len("the "), "joined while nobody read"


async def test_a_client_that_leaves_in_the_middle_leaves_nothing_behind() -> None:
    dispatcher = FakeDispatcher(Script([ids(" the cat sat on the mat" * 400)], delay_s=0.001))
    with outlets() as answers:
        async with served(make_app(dispatcher)) as url:
            host, port = url.removeprefix("http://").split(":")
            _, writer = await asyncio.open_connection(host, int(port))
            content = json.dumps({"model": MODEL, "prompt": "a", "stream": True}).encode()
            writer.write(
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(content) + content
            )
            await until_taken(answers, 5)
            writer.transport.abort()
            async with asyncio.timeout(5):
                await dispatcher.generations[0].closed.wait()
            count = len(answers)
            await asyncio.sleep(0.02)
    assert len(answers) == count


async def until_taken(answers: list[bool], count: int) -> None:
    async with asyncio.timeout(5):
        while answers.count(True) < count:  # noqa: ASYNC110 - the spy tells nobody
            await asyncio.sleep(0.001)
