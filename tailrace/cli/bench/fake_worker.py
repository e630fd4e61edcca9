"""A decode worker without an engine: every stream gets a token of a known text, so many times a second.

Run by `tailrace bench gateway` as `python -m tailrace.cli.bench.fake_worker TOKENS_PER_S TOKEN_ID,...`; the rest comes
by environment, as for a worker. It speaks the real protocol through the real code: `Attach`, and `Control`.
"""

import asyncio
import itertools
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from setproctitle import setproctitle

from tailrace import __version__
from tailrace.checkpoint.model_config import load_model_config
from tailrace.checkpoint.resolve import resolve_model
from tailrace.config import WorkerConfig
from tailrace.errors import TailraceError
from tailrace.kv.events import KVEvents
from tailrace.kv.layout import KVLayout, LayerGroup
from tailrace.messages import ChoiceFinished, KvEventBatch, LedgerReport, LegReport, Load, WorkerInfo
from tailrace.rpc.server import Server, add_worker
from tailrace.telemetry.log import configure_logging
from tailrace.types import FinishReason, Role
from tailrace.worker.attach import Attachments, Leg
from tailrace.worker.report import StepReport

NUM_BLOCKS = 1 << 16
BLOCK_SIZE = 16
_EPOCH = 1


@dataclass(slots=True)
class _Stream:
    leg: Leg
    position: int
    remaining: int


class FakeDecode:
    """Is a LegHandler. Event loop only."""

    def __init__(self, token_ids: Sequence[int], tokens_per_s: float) -> None:
        self._text = itertools.cycle(token_ids)
        self._period_s = 1 / tokens_per_s
        self._streams: dict[int, _Stream] = {}
        self.num_steps = 0

    def begin(self, leg: Leg) -> None:
        submission = leg.submission
        self._streams[leg.id] = _Stream(leg, len(submission.tokens), submission.sampling.max_tokens)

    def cancel(self, leg: Leg, choices: tuple[int, ...]) -> None:
        """Streams have one choice here."""
        self._streams.pop(leg.id, None)

    def load(self) -> Load:
        return Load(
            num_running=len(self._streams),
            total_blocks=NUM_BLOCKS,
            free_blocks=NUM_BLOCKS,
            prefill_tokens_per_s=1e5,
            decode_step_s=self._period_s,
        )

    def step(self) -> StepReport:
        self.num_steps += 1
        report = StepReport(computed=True, load=self.load())
        for leg_id, stream in list(self._streams.items()):
            report.tokens.add(leg_id, 0, stream.position, next(self._text), None)
            stream.position += 1
            stream.remaining -= 1
            if not stream.remaining:
                del self._streams[leg_id]
                report.finished.append(ChoiceFinished(leg_id, 0, FinishReason.LENGTH))
                report.reports.append(LegReport(leg_id))
                report.ended.append(leg_id)
        return report

    async def run(self, attachments: Attachments) -> None:
        """A step a period; one that comes late does not move those after it."""
        due = time.monotonic()
        while True:
            due += self._period_s
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            attachments.deliver(self.step())

    # -- Controlled ---------------------------------------------------------------------------------------------------

    def drain(self) -> None:
        """Nothing to finish."""

    async def ledger(self) -> LedgerReport:
        return LedgerReport("fake", _EPOCH, NUM_BLOCKS, NUM_BLOCKS, 0, 0, 0, 0, 0)

    async def snapshot(self) -> AsyncIterator[KvEventBatch]:
        yield KvEventBatch(_EPOCH, 0, KVEvents())


def fake_info(config: WorkerConfig, port: int) -> WorkerInfo:
    """As a worker of this model would say it. Raises CheckpointError."""
    model = load_model_config(resolve_model(config.model))
    layout = KVLayout(
        model_digest=model.digest,
        weights_digest="none",
        quantization="none",
        numerics_version=1,
        num_layers=model.num_layers,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        block_size=BLOCK_SIZE,
        kv_dtype="bfloat16",
        groups=(LayerGroup("full", tuple(range(model.num_layers))),),
    )
    return WorkerInfo(
        worker_id="fake",
        epoch=_EPOCH,
        role=Role.DECODE,
        layout=layout,
        model=config.model_names[0],
        max_model_len=model.max_position_embeddings,
        max_num_seqs=config.max_num_seqs,
        num_blocks=NUM_BLOCKS,
        address=f"{config.host}:{port}",
        version=__version__,
    )


async def serve(config: WorkerConfig, worker: FakeDecode) -> None:
    """Until it is killed, or cancelled."""
    server = Server(config.secret.get_secret_value().encode())
    info = fake_info(config, server.bind(config.host, config.port))
    attachments = Attachments(info, worker, steps=lambda: worker.num_steps)
    add_worker(server, lambda: attachments, worker)
    await server.start()
    try:
        await worker.run(attachments)
    finally:
        await server.stop()


def main(tokens_per_s: float, token_ids: list[int]) -> None:
    setproctitle("tailrace fake worker")
    config = WorkerConfig.or_exit()
    configure_logging(role="fake", level=config.log_level, style=config.log_format, secrets=())
    try:
        asyncio.run(serve(config, FakeDecode(token_ids, tokens_per_s)))
    except TailraceError as error:
        sys.exit(f"tailrace fake worker: {error.message}")


if __name__ == "__main__":
    main(float(sys.argv[1]), [int(token) for token in sys.argv[2].split(",")])
