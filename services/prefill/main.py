"""The prefill worker's process."""

from services.prefill.service import PrefillService
from services.prefill.worker import PrefillWorker
from tailrace.config import WorkerConfig
from tailrace.engine.engine import Engine
from tailrace.kv.block_pool import BlockPool
from tailrace.policy.prefill_scheduler import PrefillScheduler
from tailrace.rpc.server import Server
from tailrace.types import Role
from tailrace.worker.attach import Attachments
from tailrace.worker.engine_thread import EngineThread
from tailrace.worker.host import Parts, Wiring, die, load_parts, make_offers, open_plane, serve, worker_info
from tailrace.worker.lending import Lender
from tailrace.worker.life import run_process
from tailrace.worker.member import Identity
from tailrace.worker.requests import RequestMaker


def main() -> None:
    run_process(Role.PREFILL, WorkerConfig, lambda config: run(config, *load_parts(config, Role.PREFILL)))


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
        window=engine.layout.window,
    )
    worker = PrefillWorker(
        parts.step_runner(),
        scheduler,
        pool,
        engine.layout,
        pool_address=engine.cache.address,
        offers=parts.offer_policy(),
    )
    peers = parts.owner_peers()
    offers = make_offers(parts, port)
    requests = RequestMaker(engine.layout, engine.config.vocab_size)
    service = PrefillService(worker, requests, peers, engine.layout, offers)
    thread = EngineThread(
        worker, deliver=service.deliver, died=die, overlap=parts.overlap, chore=engine.cache.touch_more
    )
    info, links = worker_info(config, identity, engine, port), parts.transfer.needer.links
    attachments = Attachments(info, service, steps=lambda: thread.num_steps, owners=peers.rates, links=links)
    lender = Lender(
        secret=identity.secret,
        worker_id=identity.worker_id,
        epoch=identity.epoch,
        ask_progress=service.ask_progress,
        gave_back=service.gave_back,
    )
    service.connect(thread, attachments, lender)
    try:
        await serve(parts, Wiring(thread, attachments, worker, lender, offers), server)
    finally:
        await service.close()
        await peers.close()


if __name__ == "__main__":
    main()
