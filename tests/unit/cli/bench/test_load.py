import asyncio
import json

import httpx
import pytest

from tailrace.cli.bench.load import Asker, RequestTimes, at_rate, completion_body, in_parallel, token_prompts
from tailrace.errors import UnavailableError


def sse(*events):
    return b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events) + b"data: [DONE]\n\n"


def content(text, **more):
    return {"choices": [{"index": 0, "text": text, **more}]}


USAGE = {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 3}}


async def answer(body, status=200):
    """The body comes in pieces that end anywhere."""

    async def pieces():
        for start in range(0, len(body), 7):
            yield body[start : start + 7]

    transport = httpx.MockTransport(lambda _: httpx.Response(status, content=pieces()))
    async with Asker("http://x/v1", transport=transport) as asker:
        return await asker.ask(completion_body("m", [1, 2], 3))


def test_times_of_a_request():
    times = RequestTimes(sent_at=1.0, chunks_at=[1.5, 1.7, 2.5], ended_at=2.5, output_tokens=5)
    assert times.ttft_s == 0.5
    assert times.tpot_s == 0.25
    assert times.gaps_s == pytest.approx([0.2, 0.8])


def test_a_single_token_has_no_tpot_and_no_gaps():
    times = RequestTimes(sent_at=1.0, chunks_at=[1.5], ended_at=9.0, output_tokens=1)
    assert (times.tpot_s, times.gaps_s) == (0.0, [])


async def test_chunks_with_content_are_timed_and_tokens_come_from_usage():
    times = await answer(sse(content(""), content("a"), content("", finish_reason="length"), content("bc"), USAGE))
    assert len(times.chunks_at) == 2
    assert (times.prompt_tokens, times.output_tokens, times.error) == (7, 3, "")
    assert times.sent_at < times.chunks_at[0] <= times.chunks_at[1] <= times.ended_at


async def test_with_logprobs_a_token_that_prints_nothing_is_a_chunk_too():
    times = await answer(
        sse(content("", logprobs={"tokens": ["\ufffd"]}), content("a", logprobs={"tokens": ["a"]}), USAGE)
    )
    assert len(times.chunks_at) == 2


@pytest.mark.parametrize(
    ("body", "status", "error"),
    [
        (b'{"error": {"message": "full"}}', 429, "HTTP 429"),
        (sse(content("a"), {"error": {"message": "the worker is gone"}}), 200, "the worker is gone"),
        (sse(USAGE), 200, "no content"),
    ],
)
async def test_every_failure_is_an_error_of_its_request(body, status, error):
    times = await answer(body, status)
    assert error in times.error
    assert times.begun.is_set()


async def test_nobody_there_is_an_error_too():
    def refuse(request):
        raise httpx.ConnectError("refused")

    async with Asker("http://x/v1", transport=httpx.MockTransport(refuse)) as asker:
        assert (await asker.ask(completion_body("m", "hi", 3))).error == "ConnectError: refused"
        with pytest.raises(UnavailableError, match="refused"):
            await asker.model()


def test_prompts_are_drawn_anew_for_each_and_alike_for_one_seed():
    one, other = (list(token_prompts(3, 8, 5000, seed=seed)) for seed in (1, 2))
    assert one == list(token_prompts(3, 8, 5000, seed=1))
    assert one != other
    assert len({tuple(prompt) for prompt in one}) == 3


async def test_concurrency_is_kept_and_order_too():
    open_now, most = 0, 0

    async def ask(body):
        nonlocal open_now, most
        open_now += 1
        most = max(most, open_now)
        await asyncio.sleep(0.01 / body["n"])
        open_now -= 1
        return RequestTimes(body["n"])

    done = await in_parallel([{"n": n} for n in range(1, 10)], ask, 3)
    assert [times.sent_at for times in done] == list(range(1, 10))
    assert most == 3


async def test_a_rate_waits_for_nobody():
    started = asyncio.Event()
    count = 0

    async def ask(body):
        nonlocal count
        count += 1
        if count == 4:
            started.set()
        await started.wait()
        return RequestTimes(0.0)

    async with asyncio.timeout(5):
        assert len(await at_rate([{}] * 4, ask, 200.0, seed=1)) == 4
