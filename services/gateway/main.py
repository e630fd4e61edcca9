"""The gateway's process: HTTP for clients, gRPC for clients and workers."""

import asyncio
import os
import secrets
import socket
import sys
import time
from pathlib import Path

import uvicorn
from prometheus_client import CollectorRegistry
from setproctitle import setproctitle

from services.gateway.app import Readiness, Views, create_app
from services.gateway.discovery import open_mirror
from services.gateway.dispatcher import PairDispatcher
from services.gateway.generate import HttpOptions
from services.gateway.generation import Dispatcher
from services.gateway.http_server import HttpServer
from services.gateway.inference import Inference, InferenceOptions
from services.gateway.members import Members
from services.gateway.observer import Observer, open_tracer
from services.gateway.outlet import load_step_writer
from services.gateway.prepare import RequestLimits, ServedModel
from services.gateway.servicer import PUBLIC_SERVICES, add_to
from services.gateway.sharing import open_exchange
from services.gateway.tokenizer import Tokenizer
from tailrace.checkpoint.cache_dir import default_cache_dir
from tailrace.checkpoint.model_config import ModelConfig, load_model_config
from tailrace.checkpoint.resolve import resolve_model
from tailrace.config import GatewayConfig
from tailrace.errors import ConfigError, TailraceError
from tailrace.index.compact import IndexLimits, open_index
from tailrace.kv.chains import open_chains
from tailrace.kv.layout import KVLayout
from tailrace.rpc.server import Server
from tailrace.telemetry.log import configure_logging
from tailrace.telemetry.metrics import GatewayMetrics, IndexSample, RedisSample, WorkerSample, render
from tailrace.types import Role

DRAIN_S = 5
"""Streams that are still open when we are told to stop get this long."""


def main() -> None:
    setproctitle("tailrace gateway")
    config = GatewayConfig.or_exit()
    hidden = (*config.hidden, *(key.get_secret_value() for key in config.api_key))
    configure_logging(role="gateway", level=config.log_level, style=config.log_format, secrets=hidden)
    try:
        directory = resolve_model(config.model, revision=config.revision, cache_dir=config.cache_dir)
        model = load_model_config(directory)
        # uvloop where there is one: it costs less a token, and sends what one turn of the loop wrote at once.
        with asyncio.Runner(loop_factory=uvicorn.Config(app="").get_loop_factory()) as runner:
            runner.run(run(Gateway(config, serve_model(config, directory, model), model.digest)))
    except TailraceError as error:
        sys.exit(f"tailrace gateway: {error.message}")


def serve_model(config: GatewayConfig, directory: Path, model: ModelConfig) -> ServedModel:
    """Raises CheckpointError for a directory without a usable tokenizer, ConfigError for a length beyond the model."""
    longest = model.max_position_embeddings
    if (config.max_model_len or 0) > longest:
        raise ConfigError(f"max_model_len: at most {longest} for this model, got {config.max_model_len}")
    return ServedModel(
        names=config.model_names,
        tokenizer=Tokenizer.load(directory),
        max_model_len=config.max_model_len or longest,
        vocab_size=model.vocab_size,
        eos_token_ids=frozenset(model.eos_token_ids),
        created=int(time.time()),
    )


class Gateway:
    """The parts that live as long as the process."""

    def __init__(self, config: GatewayConfig, model: ServedModel, model_digest: str) -> None:
        self.config = config
        self.model = model
        self.secret = config.secret.get_secret_value().encode()
        if not self.secret:
            raise ConfigError("secret: set TAILRACE_SECRET to the same value for the gateway and all workers")
        epoch = secrets.randbits(32)
        cache_dir = config.cache_dir or default_cache_dir()
        limits = IndexLimits.of_memory(config.index_memory, config.index_blocks_per_worker)
        self._index = index = open_index(cache_dir, limits)
        gateway_id = f"gateway-{socket.gethostname()}-{os.getpid()}"
        self.step_writer = load_step_writer(cache_dir)
        self.members = Members(
            gateway_id=gateway_id,
            epoch=epoch,
            secret=self.secret,
            index=index,
            model_digest=model_digest,
            step_writer=self.step_writer,
        )
        self.mirror = open_mirror(config, self.members, model_digest)
        """None: no Redis."""
        self.dispatcher = PairDispatcher(
            self.members,
            index,
            open_chains(cache_dir),
            secret=self.secret,
            max_concurrent=config.max_concurrent_requests,
            routing_policy=config.routing_policy,
        )
        self.exchange = open_exchange(config, self.members, self.dispatcher.router)
        """None: no Redis."""
        self.registry = CollectorRegistry()
        self.metrics = GatewayMetrics(self.registry, self._worker_samples, self._index_sample)
        self.observer = Observer(self.metrics, open_tracer(), model.names[0])
        self.dispatcher.on_begun, self.dispatcher.on_ended = self.observer.begun, self.observer.ended
        self.members.on_lost = self.metrics.worker_lost
        self.dispatcher.on_retry = lambda code: self.metrics.replayed(code.name.lower())

    def readiness(self) -> Readiness:
        decodes, prefills = self.members.of(Role.DECODE), self.members.of(Role.PREFILL)
        reasons = [] if decodes else ["no decode worker is attached"]
        if decodes and all(member.load.draining for member in decodes):
            reasons.append("every decode worker is draining")
        for decode in decodes:
            layouts = [member.info.layout.differences(decode.info.layout) for member in prefills]
            if layouts and all(layouts):
                reasons.append(f"{decode.info.worker_id} fits no prefill worker: {'; '.join(layouts[0])}")
        parts = (self.mirror, self.exchange)
        troubles = dict.fromkeys(part.trouble for part in parts if part is not None and part.trouble)
        return Readiness(tuple(reasons), degraded=tuple(troubles))

    def metrics_text(self) -> bytes:
        return render(self.registry)

    def _worker_samples(self) -> list[WorkerSample]:
        return [
            WorkerSample(
                member.info.worker_id,
                member.info.role,
                member.load,
                uses_line=member.call.uses_line,
                indexed_blocks=self._index.num_blocks(member.info.worker_id),
            )
            for member in self.members.all()
        ]

    def _index_sample(self) -> IndexSample:
        feeds, mirror, redis = self.members.feeds, self.mirror, None
        if mirror is not None:
            num_others = self.dispatcher.router.num_others(time.monotonic())
            redis = RedisSample(not mirror.trouble, mirror.num_registered, mirror.num_troubles, num_others)
        return IndexSample(feeds.num_snapshots, redis, feeds.num_replays, feeds.stats())

    def layouts(self) -> list[KVLayout]:
        return [member.info.layout for member in self.members.of(Role.DECODE)]

    async def debug_kv(self) -> object:
        return {"workers": await self.members.ledgers()}

    def inference(self) -> Inference:
        config = self.config
        options = InferenceOptions(
            api_keys=tuple(key.get_secret_value() for key in config.api_key),
            max_request_bytes=config.max_body_bytes,
            deadline_s=config.deadline_s,
            limits=RequestLimits(max_choices_per_prompt=config.max_choices),
        )
        return Inference(self.dispatcher, self.model, options)

    def http_app(self) -> uvicorn.Config:
        config = self.config
        dispatcher: Dispatcher = self.dispatcher
        app = create_app(
            dispatcher=dispatcher,
            model=self.model,
            options=HttpOptions(
                api_keys=tuple(key.get_secret_value() for key in config.api_key),
                max_body_bytes=config.max_body_bytes,
                request_deadline_s=config.deadline_s,
                limits=RequestLimits(max_choices_per_prompt=config.max_choices),
            ),
            views=Views(ready=self.readiness, metrics=self.metrics_text, debug_kv=self.debug_kv, layouts=self.layouts),
            step_writer=self.step_writer,
        )
        return uvicorn.Config(
            app,
            host=config.host,
            port=config.port,
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=DRAIN_S,
            lifespan="off",
            # Nothing here asks who the client is, behind a proxy or not.
            proxy_headers=False,
        )


def listen(host: str, port: int) -> socket.socket:
    """Raises ConfigError when nobody could listen there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ConfigError(f"port: cannot listen on {host}:{port}: {error.strerror or error}", param="port") from None
    return listener


async def run(gateway: Gateway) -> None:
    """Serve until SIGTERM or SIGINT. Raises ConfigError when a port is taken."""
    config = gateway.config
    listener = listen(config.host, config.port)
    server = Server(gateway.secret, public=PUBLIC_SERVICES)
    add_to(server, members=gateway.members, inference=gateway.inference())
    server.bind(config.grpc_host, config.grpc_port)
    await server.start()
    for address in config.workers:
        gateway.members.add(address)
    redis = [asyncio.create_task(part.run()) for part in (gateway.mirror, gateway.exchange) if part is not None]
    try:
        await HttpServer(gateway.http_app()).serve(sockets=[listener])
    finally:
        for task in redis:
            task.cancel()
        await asyncio.gather(*redis, return_exceptions=True)
        await gateway.members.close()
        await server.stop()
        await gateway.observer.close()


if __name__ == "__main__":
    main()
