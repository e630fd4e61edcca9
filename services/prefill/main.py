"""The prefill worker's process."""

import asyncio
import sys

from setproctitle import setproctitle

from services.prefill.service import PrefillService
from services.prefill.worker import PrefillWorker
from tailrace.config import WorkerConfig
from tailrace.engine.engine import Engine
from tailrace.errors import TailraceError
from tailrace.kv.block_pool import BlockPool
from tailrace.policy.prefill_scheduler import PrefillScheduler
from tailrace.rpc.server import Server
from tailrace.telemetry.log import configure_logging
from tailrace.types import Role
from tailrace.worker.attach import Attachments
from tailrace.worker.engine_thread import EngineThread
from tailrace.worker.host import Identity, Parts, Wiring, die, load_parts, make_offers, open_plane, serve, worker_info
from tailrace.worker.lending import Lender
from tailrace.worker.life import leave
from tailrace.worker.requests import RequestMaker


def main() -> None:
    setproctitle("tailrace prefill")
    config = WorkerConfig.or_exit()
    configure_logging(
        role="prefill",
        worker_id=config.worker_id,
        level=config.log_level,
        style=config.log_format,
        secrets=config.hidden,
    )
    try:
        asyncio.run(run(config, *load_parts(config, Role.PREFILL)))
    except TailraceError as error:
        sys.exit(f"tailrace prefill: {error.message}")
    leave()


async def run(config: WorkerConfig, identity: Identity, engine: Engine, pool: BlockPool) -> None:
    """Wire the role up and serve."""
    server = Server(identity.secret)
    port = server.bind(config.host, config.port)
    parts = Parts(config, identity, engine, pool, await open_plane(config, identity, engine, pool))
    scheduler = PrefillScheduler(
        pool,
        block_size=engine.layout.block_size,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        stop=parts.stop_rule,
    )
    worker = PrefillWorker(parts.step_runner(), scheduler, pool, engine.layout, pool_address=engine.cache.address)
    offers = make_offers(parts, port)
    service = PrefillService(worker, RequestMaker(engine.layout, engine.config.vocab_size), offers)
    thread = EngineThread(
        worker, deliver=service.deliver, died=die, overlap=parts.overlap, chore=engine.cache.touch_more
    )
    attachments = Attachments(worker_info(config, identity, engine, port), service, steps=lambda: thread.num_steps)
    lender = Lender(
        secret=identity.secret,
        worker_id=identity.worker_id,
        epoch=identity.epoch,
        ask_progress=service.ask_progress,
        gave_back=service.gave_back,
    )
    service.connect(thread, attachments, lender)
    await serve(parts, Wiring(thread, attachments, worker, lender, offers), server)


if __name__ == "__main__":
    main()
