"""Asking an OpenAI-compatible API, token by token, with the figures of each answer."""

import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from tailrace.errors import InvalidRequestError, TailraceError, UnavailableError

Message = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class ChatOptions:
    url: str
    """With /v1."""
    api_key: str = field(default="", repr=False)
    model: str = ""
    """Empty: the first that the API lists."""
    max_tokens: int | None = None
    temperature: float | None = None


@dataclass(frozen=True, slots=True)
class Breakdown:
    """Where one answer's time went; the server's share is zero where it does not tell. Legs overlap."""

    ttft_s: float
    """First content minus send, seen from here."""
    tpot_s: float
    """(latency - TTFT) / (output tokens - 1); 0 for a single token."""
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    queue_s: float
    prefill_s: float
    transfer_s: float
    transfer_bytes: int
    transport: str
    decode_s: float

    @property
    def transfer_bytes_per_s(self) -> float:
        return self.transfer_bytes / self.transfer_s if self.transfer_s > 0 else 0.0


class ChatClient:
    """One connection to one API. Raises UnavailableError when nobody answers, TailraceError with the API's words."""

    def __init__(self, options: ChatOptions, transport: httpx.AsyncBaseTransport | None = None) -> None:
        headers = {"Authorization": f"Bearer {options.api_key}"} if options.api_key else {}
        self._options = options
        self._http = httpx.AsyncClient(
            base_url=options.url.rstrip("/"),
            headers=headers,
            timeout=httpx.Timeout(600.0, connect=5.0),
            # Whoever names a proxy for the internet does not mean this machine's own ports.
            trust_env=not _is_local(options.url),
            transport=transport,
        )

    async def aclose(self) -> None:
        await self._http.aclose()

    async def model(self) -> str:
        return self._options.model or str((await self.models())[0]["id"])

    async def models(self) -> list[dict[str, Any]]:
        """What /models says, at least one."""
        models: list[dict[str, Any]] = (await self._checked("GET", "/models"))["data"]
        if not models:
            raise UnavailableError(f"{self._options.url} lists no model")
        return models

    async def complete(self, **body: Any) -> dict[str, Any]:
        """One answer of /completions, as a whole."""
        return await self._checked("POST", "/completions", {"model": await self.model(), **body})

    async def stream(self, messages: Sequence[Message]) -> AsyncIterator[str | Breakdown]:
        """The answer in pieces; last, its figures."""
        body = {
            "model": await self.model(),
            "messages": list(messages),
            "max_tokens": self._options.max_tokens,
            "temperature": self._options.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        sent_at = time.perf_counter()
        first_at = 0.0
        usage: dict[str, Any] = {}
        async for chunk in self._chunks({name: value for name, value in body.items() if value is not None}):
            usage = chunk.get("usage") or usage
            for choice in chunk.get("choices", ()):
                if text := choice["delta"].get("content"):
                    first_at = first_at or time.perf_counter()
                    yield text
        yield breakdown(usage, ttft_s=max(0.0, first_at - sent_at), latency_s=time.perf_counter() - sent_at)

    async def _chunks(self, body: Mapping[str, Any]) -> AsyncIterator[dict[str, Any]]:
        try:
            async with self._http.stream("POST", "/chat/completions", json=body) as response:
                if response.is_error:
                    await response.aread()
                    raise _error_of(response)
                async for line in response.aiter_lines():
                    data = line.removeprefix("data:").strip() if line.startswith("data:") else ""
                    if data and data != "[DONE]":
                        chunk = json.loads(data)
                        if "error" in chunk:
                            raise TailraceError(str(chunk["error"].get("message", "the answer broke off")))
                        yield chunk
        except httpx.TransportError as error:
            raise _unreachable(self._options.url, error) from None

    async def _checked(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        try:
            response = await self._http.request(method, path, json=body)
        except httpx.TransportError as error:
            raise _unreachable(self._options.url, error) from None
        if response.is_error:
            raise _error_of(response)
        answer: dict[str, Any] = response.json()
        return answer


def breakdown(usage: Mapping[str, Any], *, ttft_s: float, latency_s: float) -> Breakdown:
    """From an OpenAI `usage` object, with what this server adds under "tailrace"."""
    ours = usage.get("tailrace") or {}
    num_tokens = int(usage.get("completion_tokens", 0))
    return Breakdown(
        ttft_s=ttft_s,
        tpot_s=(latency_s - ttft_s) / (num_tokens - 1) if num_tokens > 1 else 0.0,
        prompt_tokens=int(usage.get("prompt_tokens", 0)),
        completion_tokens=num_tokens,
        cached_tokens=int((usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)),
        queue_s=ours.get("queue_ms", 0.0) / 1e3,
        prefill_s=ours.get("prefill_ms", 0.0) / 1e3,
        transfer_s=ours.get("transfer_ms", 0.0) / 1e3,
        transfer_bytes=int(ours.get("transfer_bytes", 0)),
        transport=ours.get("transport") or "",
        decode_s=ours.get("decode_ms", 0.0) / 1e3,
    )


def _is_local(url: str) -> bool:
    return httpx.URL(url).host in ("localhost", "127.0.0.1", "::1")


def _unreachable(url: str, error: Exception) -> UnavailableError:
    return UnavailableError(f"no answer from {url} ({error or type(error).__name__}); `tailrace up` starts a server")


def _error_of(response: httpx.Response) -> TailraceError:
    try:
        message = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = response.text[:500] or response.reason_phrase
    kind = InvalidRequestError if response.is_client_error else TailraceError
    return kind(f"HTTP {response.status_code}: {message}")
