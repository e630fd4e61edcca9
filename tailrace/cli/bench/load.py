"""Asking an OpenAI API for completions as a stream, and when each chunk came."""

import asyncio
import itertools
import json
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from tailrace.errors import UnavailableError

FIRST_ORDINARY_TOKEN = 1000
Body = dict[str, Any]


@dataclass(slots=True)
class RequestTimes:
    """One request, in seconds since the load began."""

    sent_at: float
    chunks_at: list[float] = field(default_factory=list)
    """Chunks with content."""
    ended_at: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    """As `usage` says."""
    usage: dict[str, Any] = field(default_factory=dict)
    """All of it."""
    headers: dict[str, str] = field(default_factory=dict)
    """Of the answer, names in lower case."""
    error: str = ""
    begun: asyncio.Event = field(default_factory=asyncio.Event)
    """The first content is there, or there will be none."""

    @property
    def cached_by_tier(self) -> dict[str, int]:
        """Of the prompt's tokens, where this product says where they were found."""
        return dict((self.usage.get("tailrace") or {}).get("cached_tokens_by_tier", {}))

    @property
    def ttft_s(self) -> float:
        """First content chunk minus send; only for a request without error."""
        return self.chunks_at[0] - self.sent_at

    @property
    def tpot_s(self) -> float:
        """(latency - TTFT) / (output tokens - 1); 0 for a single token."""
        later = self.output_tokens - 1
        return (self.ended_at - self.sent_at - self.ttft_s) / later if later > 0 else 0.0

    @property
    def gaps_s(self) -> list[float]:
        """Every time between two chunks."""
        return [b - a for a, b in itertools.pairwise(self.chunks_at)]


def completion_body(model: str, prompt: Sequence[int] | str, output_tokens: int, **more: Any) -> Body:
    """Greedy, and exactly as long as asked."""
    return {
        "model": model,
        "prompt": prompt,
        "max_tokens": output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        **more,
    }


def token_prompts(count: int, num_tokens: int, vocab_size: int, *, seed: int) -> Iterator[list[int]]:
    """All different."""
    draw = random.Random(seed)  # noqa: S311 - test data
    first = FIRST_ORDINARY_TOKEN if vocab_size > 2 * FIRST_ORDINARY_TOKEN else 0
    for _ in range(count):
        yield [draw.randrange(first, vocab_size) for _ in range(num_tokens)]


class Asker:
    """One API. Close it with `async with`."""

    def __init__(
        self,
        api_url: str,
        *,
        transport: httpx.AsyncBaseTransport | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """`api_url` ends with /v1; `headers` go with every request."""
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        self._http = httpx.AsyncClient(
            trust_env=False, timeout=600.0, limits=limits, transport=transport, headers=headers
        )
        self._url = api_url.rstrip("/")
        self._began = time.perf_counter()

    async def __aenter__(self) -> "Asker":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def model(self) -> str:
        """The first that the API lists. Raises UnavailableError when nobody answers."""
        try:
            models = (await self._http.get(f"{self._url}/models")).raise_for_status().json()["data"]
            return str(models[0]["id"])
        except (httpx.HTTPError, LookupError, ValueError) as error:
            raise UnavailableError(f"{self._url}/models: {error or type(error).__name__}") from None

    async def ask(self, body: Body, times: RequestTimes | None = None) -> RequestTimes:
        """Every failure is in the `error` of what it returns. `times` may be watched while it is filled."""
        times = times or RequestTimes(0.0)
        times.sent_at = self.now()
        try:
            await self._follow(body, times)
        except httpx.TransportError as error:
            times.error = f"{type(error).__name__}: {error}"
        times.ended_at = self.now()
        if not times.error and not times.chunks_at:
            times.error = "no content"
        times.begun.set()
        return times

    async def _follow(self, body: Body, times: RequestTimes) -> None:
        async with self._http.stream("POST", f"{self._url}/completions", json=body) as response:
            times.headers = dict(response.headers)
            if response.status_code == httpx.codes.OK:
                async for event in _events(response):
                    self._note(times, event)
            else:
                said = (await response.aread())[:200].decode(errors="replace")
                times.error = f"HTTP {response.status_code}: {said}"

    def now(self) -> float:
        return time.perf_counter() - self._began

    def _note(self, times: RequestTimes, event: dict[str, Any]) -> None:
        if "error" in event:
            times.error = str(event["error"].get("message", "the answer broke off"))
        if usage := event.get("usage"):
            times.usage = usage
            times.prompt_tokens, times.output_tokens = usage["prompt_tokens"], usage["completion_tokens"]
        if any(choice.get("text") or choice.get("logprobs") for choice in event.get("choices", ())):
            times.chunks_at.append(self.now())
            times.begun.set()


async def _events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    rest = b""
    async for data in response.aiter_bytes():
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data: {"):
                yield json.loads(line[6:])


async def in_parallel(
    bodies: Sequence[Body], ask: Callable[[Body], Awaitable[RequestTimes]], concurrency: int
) -> list[RequestTimes]:
    """At most `concurrency` at once, the next one as soon as one has ended; results in the order of `bodies`."""
    waiting = iter(enumerate(bodies))
    done: dict[int, RequestTimes] = {}

    async def work() -> None:
        for index, body in waiting:
            done[index] = await ask(body)

    async with asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, len(bodies))):
            group.create_task(work())
    return [done[index] for index in range(len(bodies))]


async def at_rate(
    bodies: Sequence[Body], ask: Callable[[Body], Awaitable[RequestTimes]], requests_per_s: float, *, seed: int
) -> list[RequestTimes]:
    """A Poisson process: sent when their time comes, however many are still open."""
    draw = random.Random(seed)  # noqa: S311 - test data
    tasks: list[asyncio.Task[RequestTimes]] = []
    due = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for body in bodies:
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            tasks.append(group.create_task(_awaited(ask(body))))
            due += draw.expovariate(requests_per_s)
    return [task.result() for task in tasks]


async def _awaited(answer: Awaitable[RequestTimes]) -> RequestTimes:
    return await answer
