"""The official client against a real cluster of the real model."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from tokenizers import Tokenizer

from tests.helpers.cluster import MODEL, Cluster

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

CHAT: Any = [{"role": "user", "content": "Name the capital of France, and say one sentence about it."}]
LENGTH = 1024
BLOCK = 16


@pytest.fixture(scope="module")
def cluster(smollm2: Path) -> Iterator[Cluster]:
    options = {"dtype": "float32", "num_blocks": 512, "max_model_len": LENGTH}
    with Cluster(smollm2, gateway={"max_model_len": LENGTH}, **options) as cluster:
        yield cluster.start_workers()


@pytest.fixture
async def client(cluster: Cluster) -> AsyncIterator[openai.AsyncOpenAI]:
    async with cluster.client() as client:
        yield client


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> Tokenizer:
    return Tokenizer.from_file(str(smollm2 / "tokenizer.json"))


async def test_chat_is_the_same_whole_and_streamed(client: openai.AsyncOpenAI) -> None:
    greedy: Any = {"model": MODEL, "messages": CHAT, "temperature": 0, "max_tokens": 32}
    whole = await client.chat.completions.create(**greedy)
    stream = await client.chat.completions.create(**greedy, stream=True, stream_options={"include_usage": True})
    chunks = [chunk async for chunk in stream]
    assert "Paris" in (whole.choices[0].message.content or "")
    assert whole.choices[0].message.role == chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].choices == []
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    counts = "prompt_tokens", "completion_tokens", "total_tokens"
    assert [getattr(chunks[-1].usage, c) for c in counts] == [getattr(whole.usage, c) for c in counts]
    assert len({chunk.id for chunk in chunks}) == 1


async def test_an_answer_ends_by_itself(client: openai.AsyncOpenAI) -> None:
    """Without max_tokens an answer may be as long as the context allows; this one is not."""
    messages: Any = [{"role": "user", "content": "Reply with the single word: yes"}]
    answer = await client.chat.completions.create(model=MODEL, messages=messages, temperature=0)
    assert answer.choices[0].finish_reason == "stop"
    assert "<|im_end|>" not in (answer.choices[0].message.content or "")


async def test_three_choices_that_a_seed_reproduces(client: openai.AsyncOpenAI) -> None:
    async def ask(seed: int) -> list[str | None]:
        answer = await client.chat.completions.create(
            model=MODEL, messages=CHAT, n=3, seed=seed, temperature=1.0, max_tokens=16
        )
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        assert answer.usage is not None
        assert answer.usage.completion_tokens <= 3 * 16
        return [choice.message.content for choice in answer.choices]

    first = await ask(1)
    assert len(set(first)) == 3
    assert await ask(1) == first
    assert await ask(2) != first


async def test_usage_is_exact_and_the_second_time_the_prefix_is_cached(
    client: openai.AsyncOpenAI, tokenizer: Tokenizer
) -> None:
    prompt = tokenizer.encode("A long list of quite different words, none of which matters. " * 20).ids[:100]

    async def ask(tokens: list[int]) -> Any:
        answer = await client.completions.create(model=MODEL, prompt=tokens, max_tokens=10, temperature=0)
        usage = answer.usage
        assert usage is not None
        assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (100, 10, 110)
        assert usage.prompt_tokens_details is not None
        return answer.choices[0].text, usage.prompt_tokens_details.cached_tokens

    text, cached = await ask(prompt)
    assert cached == 0
    # The last token is always computed: 6 of 6 full blocks, for 100 tokens.
    assert await ask(prompt) == (text, (100 - 1) // BLOCK * BLOCK)
    _, cached = await ask([*prompt[:50], *reversed(prompt[50:])])
    assert cached == 48


@pytest.mark.parametrize("num_tokens", [96, 97])
async def test_cached_tokens_at_the_edge_of_a_block(
    client: openai.AsyncOpenAI, tokenizer: Tokenizer, num_tokens: int
) -> None:
    prompt = tokenizer.encode(f"Edge {num_tokens}: " + "one two three four five six seven " * 30).ids[:num_tokens]
    for expected in (0, (num_tokens - 1) // BLOCK * BLOCK):
        answer = await client.completions.create(model=MODEL, prompt=prompt, max_tokens=1, temperature=0)
        assert answer.usage is not None
        assert answer.usage.prompt_tokens_details is not None
        assert answer.usage.prompt_tokens_details.cached_tokens == expected


async def test_log_probabilities(client: openai.AsyncOpenAI) -> None:
    chat = await client.chat.completions.create(
        model=MODEL, messages=CHAT, temperature=0, max_tokens=8, logprobs=True, top_logprobs=3
    )
    assert chat.choices[0].logprobs is not None
    tokens = chat.choices[0].logprobs.content or []
    assert "".join(token.token for token in tokens) == chat.choices[0].message.content
    for token in tokens:
        assert len(token.top_logprobs) == 3
        assert token.top_logprobs[0].token == token.token
        assert token.top_logprobs[0].logprob == pytest.approx(token.logprob, abs=1e-4)
        assert token.logprob <= 0
    text = await client.completions.create(model=MODEL, prompt="One, two,", temperature=0, max_tokens=5, logprobs=2)
    scores = text.choices[0].logprobs
    assert scores is not None
    assert "".join(scores.tokens or []) == text.choices[0].text
    assert len(scores.token_logprobs or []) == 5


async def test_stop_strings_across_tokens(client: openai.AsyncOpenAI) -> None:
    greedy: Any = {"model": MODEL, "prompt": "The first ten numbers: one, two, three,", "temperature": 0}
    full = (await client.completions.create(**greedy, max_tokens=24)).choices[0].text
    # From the middle of a word to the middle of the next: no token begins or ends there.
    middle = full.index(",", 6)
    stop = full[middle - 2 : middle + 4]
    assert len(stop) == 6
    for extra in ({}, {"stream": True}):
        answer = await client.completions.create(**greedy, max_tokens=24, stop=["never", stop], **extra)
        parts = [chunk async for chunk in answer] if extra else [answer]
        assert "".join(part.choices[0].text for part in parts) == full[: full.index(stop)]
        assert parts[-1].choices[0].finish_reason == "stop"


async def test_many_prompts_and_echo(client: openai.AsyncOpenAI) -> None:
    prompts = ["The sky is", "Two plus two is"]
    each = [
        (await client.completions.create(model=MODEL, prompt=p, temperature=0, max_tokens=6)).choices[0].text
        for p in prompts
    ]
    answer = await client.completions.create(model=MODEL, prompt=prompts, temperature=0, max_tokens=6, echo=True)
    assert [choice.text for choice in answer.choices] == [p + text for p, text in zip(prompts, each, strict=True)]


async def test_characters_of_many_bytes_arrive_whole(client: openai.AsyncOpenAI) -> None:
    stream = await client.completions.create(
        model=MODEL, prompt="🎈🐱🎉日本", temperature=1.5, seed=4, max_tokens=48, stream=True
    )
    pieces = [chunk.choices[0].text async for chunk in stream]
    # A replacement character stands for bytes that never became a character, not for a piece of one.
    whole = await client.completions.create(model=MODEL, prompt="🎈🐱🎉日本", temperature=1.5, seed=4, max_tokens=48)
    assert "".join(pieces) == whole.choices[0].text


async def test_sixteen_at_once_are_those_one_by_one(client: openai.AsyncOpenAI) -> None:
    async def ask(number: int) -> str:
        answer = await client.completions.create(
            model=MODEL, prompt=f"Story number {number} begins like this:", temperature=0, max_tokens=12
        )
        return answer.choices[0].text

    together = await asyncio.gather(*map(ask, range(16)))
    assert [await ask(number) for number in (0, 7, 15)] == [together[0], together[7], together[15]]


async def test_models(client: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in client.models.list()] == [MODEL]
    model = await client.models.retrieve(MODEL)
    assert model.model_extra is not None
    assert model.model_extra["max_model_len"] == LENGTH


async def test_errors_are_the_clients_own_kinds(client: openai.AsyncOpenAI) -> None:
    create = client.chat.completions.create
    with pytest.raises(openai.NotFoundError) as unknown:
        await create(model="gpt-unknown", messages=CHAT)
    assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as long:
        await create(model=MODEL, messages=[{"role": "user", "content": "word " * 2000}])
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as many:
        await create(model=MODEL, messages=CHAT, n=1_000_000)
    assert many.value.param == "n"
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("nothing")
