"""The usual way to stream tokens, to hold the gateway against: FastAPI, a pydantic model a chunk, StreamingResponse.

Run by `tailrace bench gateway` as `python -m tailrace.cli.bench.plain_server PORT WORKER`; the rest by environment. Its
tokens come from the same worker over the same stream as the gateway's. It routes nothing, checks little, and knows no
stop strings.
"""

import asyncio
import contextlib
import itertools
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import uvicorn
from fastapi import FastAPI
from fastapi.responses import PlainTextResponse, StreamingResponse
from pydantic import BaseModel
from setproctitle import setproctitle
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from tailrace.checkpoint.resolve import resolve_model
from tailrace.config import WorkerConfig
from tailrace.errors import TailraceError
from tailrace.messages import Submission
from tailrace.rpc.client import AttachCall, Peer
from tailrace.telemetry.log import configure_logging
from tailrace.types import SamplingParams

_REATTACH_S = 0.2


class CompletionRequest(BaseModel):
    model: str
    prompt: str
    max_tokens: int = 16
    temperature: float = 1.0
    ignore_eos: bool = False
    stream: bool = False


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Choice(BaseModel):
    index: int
    text: str
    finish_reason: str | None = None


class Chunk(BaseModel):
    id: str
    object: str = "text_completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage | None = None


class Tokens:
    """The worker's stream, spread over one queue a request."""

    def __init__(self, worker: str, secret: bytes) -> None:
        self._worker = worker
        self._secret = secret
        self._queues: dict[int, asyncio.Queue[int]] = {}
        self._handles = itertools.count(1)
        self._call: AttachCall
        self.is_attached = False

    async def stay_attached(self) -> None:
        while True:
            peer = Peer(self._worker, self._secret)
            try:
                await self._follow(peer)
            except TailraceError:
                self.is_attached = False
            finally:
                await peer.close()
            await asyncio.sleep(_REATTACH_S)

    async def _follow(self, peer: Peer) -> None:
        self._call = peer.attach("plain", 1)
        async for event in self._call.events():
            self.is_attached = True
            columns = event.tokens
            for handle, token_id in zip(columns.handles, columns.token_ids, strict=True):
                if (waiting := self._queues.get(handle)) is not None:
                    waiting.put_nowait(token_id)

    async def ask(self, prompt: list[int], max_tokens: int) -> AsyncIterator[int]:
        handle = next(self._handles)
        waiting = self._queues[handle] = asyncio.Queue()
        sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        self._call.submit(Submission(handle, f"plain-{handle}", 0, prompt, len(prompt), sampling, (0,), 0, 600.0))
        try:
            for _ in range(max_tokens):
                yield await waiting.get()
        finally:
            del self._queues[handle]


def create_app(tokenizer: Tokenizer, worker: str, secret: bytes) -> FastAPI:
    tokens = Tokens(worker, secret)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        attached = asyncio.create_task(tokens.stay_attached())
        yield
        attached.cancel()

    app = FastAPI(lifespan=lifespan)

    @app.get("/ready")
    async def ready() -> PlainTextResponse:
        return PlainTextResponse("", 200 if tokens.is_attached else 503)

    @app.post("/v1/completions")
    async def completions(request: CompletionRequest) -> StreamingResponse:
        prompt = tokenizer.encode(request.prompt).ids
        stream = tokens.ask(prompt, request.max_tokens)
        return StreamingResponse(events(request, len(prompt), stream), media_type="text/event-stream")

    async def events(request: CompletionRequest, prompt_tokens: int, stream: AsyncIterator[int]) -> AsyncIterator[str]:
        chunk_id, created, count = f"cmpl-{time.monotonic_ns()}", int(time.time()), 0
        detokenizer = DecodeStream(skip_special_tokens=True)
        async for token_id in stream:
            count += 1
            text = detokenizer.step(tokenizer, token_id) or ""
            reason = "length" if count == request.max_tokens else None
            choice = Choice(index=0, text=text, finish_reason=reason)
            chunk = Chunk(id=chunk_id, created=created, model=request.model, choices=[choice])
            yield f"data: {chunk.model_dump_json()}\n\n"
        usage = Usage(prompt_tokens=prompt_tokens, completion_tokens=count, total_tokens=prompt_tokens + count)
        last = Chunk(id=chunk_id, created=created, model=request.model, choices=[], usage=usage)
        yield f"data: {last.model_dump_json()}\n\n"
        yield "data: [DONE]\n\n"

    return app


def main(port: int, worker: str) -> None:
    setproctitle("tailrace plain server")
    config = WorkerConfig.or_exit()
    configure_logging(role="plain", level="warning", style=config.log_format, secrets=())
    tokenizer = Tokenizer.from_file(str(resolve_model(config.model) / "tokenizer.json"))
    app = create_app(tokenizer, worker, config.secret.get_secret_value().encode())
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.run(app, host="127.0.0.1", port=port, log_config=None, access_log=False)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
