"""The decode worker's process."""

from services.decode.fetch import LocalFetches
from services.decode.service import DecodeService
from services.decode.worker import DecodeWorker
from tailrace.config import WorkerConfig
from tailrace.engine.engine import Engine
from tailrace.kv.block_pool import BlockPool
from tailrace.policy.decode_scheduler import DecodeScheduler
from tailrace.rpc.server import Server
from tailrace.types import Role
from tailrace.worker.attach import Attachments
from tailrace.worker.engine_thread import EngineThread
from tailrace.worker.host import Parts, Wiring, die, load_parts, make_offers, open_plane, serve, worker_info
from tailrace.worker.life import run_process
from tailrace.worker.member import Identity
from tailrace.worker.requests import RequestMaker


def main() -> None:
    run_process(Role.DECODE, WorkerConfig, lambda config: run(config, *load_parts(config, Role.DECODE)))


async def run(config: WorkerConfig, identity: Identity, engine: Engine, pool: BlockPool) -> None:
    """Wire the role up and serve."""
    server = Server(identity.secret)
    port = server.bind(config.host, config.port)
    parts = Parts(config, identity, engine, pool, await open_plane(config, identity, engine, pool))
    offered, swap_cost = parts.offer_policy(), parts.swap_cost()
    scheduler = DecodeScheduler(
        pool,
        block_size=engine.layout.block_size,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        stop=parts.stop_rule,
        window=engine.layout.window,
        offers=offered,
        swap_cost=swap_cost,
    )
    worker = DecodeWorker(
        parts.step_runner(),
        scheduler,
        pool,
        block_bytes=engine.layout.block_bytes,
        block_tokens=engine.layout.block_size,
        offers=offered,
        swap_cost=swap_cost,
    )
    peers = parts.owner_peers()
    offers = make_offers(parts, port)
    requests = RequestMaker(engine.layout, engine.config.vocab_size)
    service = DecodeService(worker, requests, peers, offers)
    thread = EngineThread(
        worker, deliver=service.deliver, died=die, overlap=parts.overlap, chore=engine.cache.touch_more
    )
    info, links = worker_info(config, identity, engine, port), parts.transfer.needer.links
    attachments = Attachments(info, service, steps=lambda: thread.num_steps, owners=peers.rates, links=links)
    service.connect(thread, attachments, LocalFetches(worker, thread, peers, engine.layout, store=config.store))
    try:
        await serve(parts, Wiring(thread, attachments, worker, offers=offers), server)
    finally:
        await service.close()
        await peers.close()


if __name__ == "__main__":
    main()
