import asyncio
import signal

import httpx
import uvicorn

from services.gateway.http_server import HttpServer


async def app(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"here"})


async def started(server):
    while not server.started:  # noqa: ASYNC110 - uvicorn has no event for it
        await asyncio.sleep(0.01)
    [listener] = server.servers
    return f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"


async def test_it_serves_with_a_date_and_a_signal_ends_it_at_once():
    server = HttpServer(uvicorn.Config(app, port=0, lifespan="off", log_config=None))
    serving = asyncio.create_task(server.serve())
    async with asyncio.timeout(10):
        url = await started(server)
        async with httpx.AsyncClient(trust_env=False) as http:
            answer = await http.get(url)
        assert (answer.text, "date" in answer.headers) == ("here", True)
        await asyncio.sleep(0.05)
        began = asyncio.get_running_loop().time()
        server.handle_exit(signal.SIGTERM, None)
        server._captured_signals.clear()  # else it is raised again, at the end, in this very process
        await serving
    assert asyncio.get_running_loop().time() - began < 0.8


async def test_between_two_looks_at_the_clock_it_sleeps(monkeypatch):
    server = HttpServer(uvicorn.Config(app, port=0, lifespan="off", log_config=None))
    ticks = []

    async def tick(counter):
        ticks.append(counter)
        return server.should_exit

    monkeypatch.setattr(server, "on_tick", tick)
    looping = asyncio.create_task(server.main_loop())
    await asyncio.sleep(0.5)
    assert ticks == [0]
    server.handle_exit(signal.SIGTERM, None)
    async with asyncio.timeout(10):
        await looping
    assert len(ticks) == 2
