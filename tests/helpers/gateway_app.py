"""The gateway's HTTP edge over a fake dispatcher: in process, or behind a real server on a free port."""

import asyncio
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import cache
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI

from services.gateway.app import Readiness, Views, create_app
from services.gateway.generate import HttpOptions
from services.gateway.outlet import StepWriter, load_step_writer
from services.gateway.prepare import ServedModel
from services.gateway.tokenizer import Tokenizer
from tailrace.checkpoint.cache_dir import default_cache_dir
from tailrace.kv.layout import KVLayout
from tests.helpers.fake_dispatcher import FakeDispatcher, Script
from tests.helpers.tiny_tokenizers import CHATML_CONFIG, byte_level

MODEL = "tiny/cat"
EOS = 2
MAX_MODEL_LEN = 100
VOCAB_SIZE = 512
TOKENIZER = Tokenizer(byte_level(), CHATML_CONFIG)


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text)


def saying(text: str, **options: Any) -> FakeDispatcher:
    """Every choice says `text` and ends by itself."""
    return FakeDispatcher(Script([[*ids(text), EOS]], **options))


def served_model() -> ServedModel:
    return ServedModel(
        names=(MODEL, "cat"),
        tokenizer=TOKENIZER,
        max_model_len=MAX_MODEL_LEN,
        vocab_size=VOCAB_SIZE,
        eos_token_ids=frozenset({EOS}),
        created=1_700_000_000,
    )


@cache
def step_writer() -> StepWriter:
    writer = load_step_writer(default_cache_dir())
    assert writer is not None
    return writer


async def no_blocks() -> object:
    return {"workers": []}


def make_app(
    dispatcher: FakeDispatcher,
    options: HttpOptions | None = None,
    *,
    not_ready: Sequence[str] = (),
    model: ServedModel | None = None,
    layouts: Sequence[KVLayout] = (),
) -> FastAPI:
    views = Views(
        lambda: Readiness(tuple(not_ready), retry_after_s=2),
        lambda: b"tailrace_other 1.0\n",
        no_blocks,
        lambda: layouts,
    )
    return create_app(
        dispatcher=dispatcher,
        model=model or served_model(),
        options=options or HttpOptions(),
        views=views,
        step_writer=step_writer(),
    )


def client_of(app: FastAPI) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app, raise_app_exceptions=False), base_url="http://gateway")


async def post(dispatcher: FakeDispatcher, path: str, body: dict[str, Any], **options: Any) -> httpx.Response:
    async with client_of(make_app(dispatcher, **options)) as client:
        return await client.post(path, json={"model": MODEL, **body})


@asynccontextmanager
async def served(app: FastAPI, *, send_buffer: int | None = None) -> AsyncIterator[str]:
    """The URL of a real server on loopback. `send_buffer`: bytes that the kernel may hold for a client."""
    listener = socket.create_server(("127.0.0.1", 0))
    if send_buffer is not None:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off"))
    task = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        while not server.started:  # noqa: ASYNC110 (it tells by a flag only)
            await asyncio.sleep(0.005)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        await task
