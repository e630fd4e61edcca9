import json

import httpx
import pytest

from tailrace.cli import chat as module
from tailrace.cli.chat import Conversation
from tailrace.cli.doctor import token_finding, transfer_finding
from tailrace.cli.machine_checks import Verdict
from tailrace.cli.openai_stream import Breakdown, ChatClient, ChatOptions, breakdown
from tailrace.errors import InvalidRequestError, TailraceError, UnavailableError

OPTIONS = ChatOptions("http://127.0.0.1:1/v1", model="m")
USAGE = {
    "prompt_tokens": 10,
    "completion_tokens": 5,
    "prompt_tokens_details": {"cached_tokens": 3},
    "tailrace": {"transfer_ms": 4.0, "transfer_bytes": 8_000_000, "transport": "nixl"},
}


def sse(*chunks):
    return "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"


def delta(text):
    return {"choices": [{"delta": {"content": text}}]}


def client_for(handler, options=OPTIONS):
    return ChatClient(options, transport=httpx.MockTransport(handler))


async def collect(client):
    return [event async for event in client.stream([{"role": "user", "content": "hi"}])]


async def test_an_answer_comes_in_pieces_and_its_figures_last():
    bodies = []

    def handler(request):
        bodies.append(json.loads(request.content))
        role = {"choices": [{"delta": {"role": "assistant", "content": ""}}], "usage": None}
        return httpx.Response(200, text=sse(role, delta("Hel"), delta("lo"), {"choices": [], "usage": USAGE}))

    *pieces, figures = await collect(client_for(handler))
    assert pieces == ["Hel", "lo"]
    assert (figures.completion_tokens, figures.cached_tokens, figures.transport) == (5, 3, "nixl")
    assert figures.transfer_bytes_per_s == pytest.approx(2e9)
    assert bodies[0] == {
        "model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip


async def test_the_first_listed_model_is_the_default():
    def handler(request):
        assert request.url.path == "/v1/models"
        return httpx.Response(200, json={"data": [{"id": "first"}, {"id": "second"}]})

    assert await client_for(handler, ChatOptions("http://127.0.0.1:1/v1/")).model() == "first"


async def test_no_listed_model_is_an_error():
    client = client_for(lambda request: httpx.Response(200, json={"data": []}), ChatOptions("http://127.0.0.1:1/v1"))
    with pytest.raises(UnavailableError, match="lists no model"):
        await client.model()


async def test_an_error_of_the_api_keeps_its_words():
    client = client_for(lambda request: httpx.Response(401, json={"error": {"message": "wrong key"}}))
    with pytest.raises(InvalidRequestError, match="HTTP 401: wrong key"):
        await collect(client)


async def test_an_error_in_the_middle_of_an_answer_is_raised():
    text = sse(delta("Hel"), {"error": {"message": "worker lost"}})
    client = client_for(lambda request: httpx.Response(200, text=text))
    with pytest.raises(TailraceError, match="worker lost"):
        await collect(client)


async def test_nobody_there_says_what_to_do():
    def handler(request):
        raise httpx.ConnectError("refused")

    with pytest.raises(UnavailableError, match="tailrace up"):
        await collect(client_for(handler))


async def test_a_failed_question_is_forgotten(monkeypatch, capsys):
    answers = iter(
        [httpx.Response(503, json={"error": {"message": "busy"}}), httpx.Response(200, text=sse(delta("yes")))]
    )
    monkeypatch.setattr(module, "ChatClient", lambda options: client_for(lambda request: next(answers)))
    conversation = Conversation(OPTIONS, system="Be brief.")
    with pytest.raises(TailraceError, match="busy"):
        await conversation.ask("first")
    await conversation.ask("second")
    assert [message["content"] for message in conversation.messages] == ["Be brief.", "second", "yes"]
    assert capsys.readouterr().out == "yes\n"


def test_tpot_leaves_the_first_token_out():
    assert breakdown({"completion_tokens": 5}, ttft_s=1.0, latency_s=3.0).tpot_s == 0.5
    assert breakdown({"completion_tokens": 1}, ttft_s=1.0, latency_s=1.0).tpot_s == 0.0
    assert breakdown({}, ttft_s=0.0, latency_s=0.0).transfer_bytes_per_s == 0.0


def figures(**usage) -> Breakdown:
    return breakdown({"tailrace": usage}, ttft_s=0.0, latency_s=0.0)


def test_doctor_fails_when_no_kv_was_pulled():
    assert transfer_finding([figures(transport=None), figures(transport=None)]).verdict is Verdict.FAIL


def test_doctor_names_the_fastest_hand_off():
    slow = figures(transport="nixl", transfer_ms=10.0, transfer_bytes=10**6)
    fast = figures(transport="nixl", transfer_ms=1.0, transfer_bytes=10**6)
    finding = transfer_finding([slow, figures(transport=None), fast])
    assert (finding.verdict, finding.detail) == (Verdict.PASS, "2 of 3 prompts; 1.00 MB over nixl, 1.00 GB/s")


def test_doctor_shows_the_first_answer_that_differs():
    assert token_finding(["a", "b"], ["a", "b"]).verdict is Verdict.PASS
    wrong = token_finding(["a", "b", "c"], ["a", "x", "y"])
    assert wrong.verdict is Verdict.FAIL
    assert wrong.detail.startswith("2 of 3 greedy answers differ; P/D: 'b', one process: 'x'")
