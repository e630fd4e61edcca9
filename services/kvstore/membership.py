"""The store as gateways see it: a member that keeps blocks and computes nothing."""

import itertools
from collections.abc import Awaitable, Callable

from services.kvstore.storage import Storage
from tailrace import __version__
from tailrace.config import KvStoreConfig
from tailrace.errors import InvalidRequestError, UnavailableError
from tailrace.kv.events import KVEvents
from tailrace.messages import Load, WorkerInfo
from tailrace.types import Role
from tailrace.worker.attach import Attachments, Leg
from tailrace.worker.member import Identity, Membership
from tailrace.worker.report import StepReport

NO_BLOCKS_YET = "this store has no blocks yet; it learns what a block is from the first offer"
_ANY_LENGTH = (1 << 31) - 1
"""A submission is refused for what it is, whatever its length."""


class _Refusal:
    """What a store does with legs."""

    def begin(self, leg: Leg) -> None:
        raise InvalidRequestError("this is a store of KV blocks; it takes no submissions", param="worker_id")

    def cancel(self, leg: Leg, choices: tuple[int, ...]) -> None:
        """None was begun."""


class StoreMembership:
    """Nobody's member before it is known what a block is. Event loop only."""

    def __init__(self, config: KvStoreConfig, identity: Identity, address: str) -> None:
        """`address`: host:port of the gRPC server, as others reach it."""
        self._config = config
        self._identity = identity
        self._address = address
        self._attachments: Attachments | None = None
        self._cached: Callable[[], Awaitable[KVEvents]] | None = None
        self._membership: Membership | None = None

    def begin(self, storage: Storage, load: Load) -> None:
        """From here on gateways may attach. What changes afterwards must be told."""
        turns = itertools.count(1)
        # A store has no steps. Whoever hears from it hears from the loop that does its work, so the counter goes on.
        self._attachments = Attachments(self._info(storage), _Refusal(), steps=lambda: next(turns))
        self.tell(StepReport(load=load))
        self._join()

    def serve(self, cached: Callable[[], Awaitable[KVEvents]]) -> None:
        """The server answers, so that gateways can be joined. `cached`: publications of all that the store has."""
        self._cached = cached
        self._join()

    def _join(self) -> None:
        if self._attachments is not None and self._cached is not None:
            secret = self._identity.secret
            self._membership = Membership(self._config, self._attachments, secret, cached=self._cached)

    @property
    def attachments(self) -> Attachments:
        """Raises UnavailableError before it is known what a block is."""
        if self._attachments is None:
            raise UnavailableError(NO_BLOCKS_YET)
        return self._attachments

    @property
    def sequence(self) -> int:
        """Number of the next KV event."""
        return self._attachments.kv_sequence if self._attachments is not None else 0

    def tell(self, report: StepReport) -> None:
        if self._attachments is not None:
            # They stand for a worker's own drain, which goes past its reports.
            self._attachments.is_draining = report.load.draining
            self._attachments.deliver(report)

    async def close(self) -> None:
        if self._membership is not None:
            await self._membership.close()

    def _info(self, storage: Storage) -> WorkerInfo:
        store = storage.store
        return WorkerInfo(
            worker_id=self._identity.worker_id,
            epoch=self._identity.epoch,
            role=Role.KVSTORE,
            layout=storage.layout,
            model="",
            max_model_len=_ANY_LENGTH,
            max_num_seqs=0,
            # Of both tiers: as many different blocks may be told of.
            num_blocks=store.memory.num_slots + (store.disk.slots.num_slots if store.disk is not None else 0),
            address=self._address,
            version=__version__,
        )
