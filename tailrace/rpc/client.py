"""Calls from one member of the cluster to another, in the values of `tailrace.messages`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import grpc
import grpc.aio

from tailrace.errors import (
    InvalidRequestError,
    LayoutMismatchError,
    NotFoundError,
    OverloadedError,
    TailraceError,
    UnauthenticatedError,
    UnavailableError,
    WorkerLostError,
)
from tailrace.kv.layout import KVLayout
from tailrace.messages import (
    BlockOffer,
    KvEventBatch,
    LedgerReport,
    LendDone,
    LendTerms,
    LentBlocks,
    Load,
    StepEvents,
    StoreUsage,
    Submission,
)
from tailrace.rpc import convert
from tailrace.rpc.auth import AUTH_HEADER, control_token
from tailrace.rpc.gen import control_pb2, control_pb2_grpc, kv_pb2, kv_pb2_grpc, worker_pb2, worker_pb2_grpc
from tailrace.rpc.options import CHANNEL_OPTIONS, PEER_LOSS_S
from tailrace.rpc.step_line import LineReader
from tailrace.transfer.endpoints import PeerEndpoints

M = TypeVar("M")
T = TypeVar("T")
MAX_UNSENT = 16_384
"""Commands that one worker may have waiting for it."""
_STATUS: dict[grpc.StatusCode, type[TailraceError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequestError,
    grpc.StatusCode.UNAUTHENTICATED: UnauthenticatedError,
    grpc.StatusCode.NOT_FOUND: NotFoundError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: OverloadedError,
    grpc.StatusCode.FAILED_PRECONDITION: LayoutMismatchError,
}


def error_of(failure: grpc.aio.AioRpcError, address: str) -> TailraceError:
    """What a failed call means; a broken connection means that the peer is lost."""
    kind = _STATUS.get(failure.code(), WorkerLostError)
    return kind(f"{address}: {failure.details() or failure.code().name.lower()}")


class Peer:
    """A channel to one member. Opened lazily by gRPC, shared by all calls; close it when the member is gone."""

    def __init__(self, address: str, secret: bytes) -> None:
        self.address = address
        self._metadata = ((AUTH_HEADER, control_token(secret)),)
        self._channel = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        self._worker = worker_pb2_grpc.WorkerServiceStub(self._channel)
        self._owner = kv_pb2_grpc.KvOwnerServiceStub(self._channel)
        self._store = kv_pb2_grpc.KvStoreServiceStub(self._channel)
        self._control = control_pb2_grpc.ControlServiceStub(self._channel)
        self._membership = control_pb2_grpc.MembershipServiceStub(self._channel)

    async def close(self) -> None:
        await self._channel.close()

    # -- needer -> owner ----------------------------------------------------------------------------------------------

    async def meet(
        self, worker_id: str, epoch: int, layout: KVLayout, transports: tuple[str, ...]
    ) -> tuple[PeerEndpoints, KVLayout]:
        """First contact. Raises LayoutMismatchError, naming the fields, when the owner refuses the layout."""
        request = kv_pb2.MeetRequest(
            worker_id=worker_id, epoch=epoch, layout=convert.layout_to_proto(layout), transports=transports
        )
        response = await self._unary(self._owner.Meet(request, metadata=self._metadata, timeout=PEER_LOSS_S))
        return convert.endpoints_from_proto(response), convert.layout_from_proto(response.layout)

    @asynccontextmanager
    async def lend(self, terms: LendTerms) -> AsyncIterator[AsyncIterator[LentBlocks | LendDone]]:
        """Leaving the block closes the stream, which gives the blocks back."""
        call = self._owner.Lend(convert.terms_to_proto(terms), metadata=self._metadata)
        try:
            yield self._read(call, convert.lend_event_from_proto)
        finally:
            call.cancel()

    # -- worker -> store ----------------------------------------------------------------------------------------------

    async def offer(self, offer: BlockOffer) -> tuple[bytes, ...]:
        """The blocks that the store will pull. Raises LayoutMismatchError when it keeps blocks of another layout."""
        call = self._store.Offer(convert.offer_to_proto(offer), metadata=self._metadata, timeout=PEER_LOSS_S)
        return tuple((await self._unary(call)).wanted)

    # -- operator -> store --------------------------------------------------------------------------------------------

    async def pin(self, owner: str, hashes: Sequence[bytes]) -> int:
        """The number of blocks pinned by all owners. Raises NotFoundError, and pins none, where one is not there;
        OverloadedError where too many would be pinned."""
        request = kv_pb2.PinRequest(owner=owner, block_hashes=hashes)
        response = await self._unary(self._store.Pin(request, metadata=self._metadata, timeout=PEER_LOSS_S))
        return response.num_pinned

    async def unpin(self, owner: str, hashes: Sequence[bytes] = ()) -> int:
        """How many of them, or without any of all, the owner had pinned."""
        request = kv_pb2.UnpinRequest(owner=owner, block_hashes=hashes)
        response = await self._unary(self._store.Unpin(request, metadata=self._metadata, timeout=PEER_LOSS_S))
        return response.num_unpinned

    async def set_quota(self, tenant: str, memory_bytes: int | None, disk_bytes: int | None) -> None:
        """None: as much as there is."""
        request = kv_pb2.SetQuotaRequest(tenant=tenant, memory_bytes=memory_bytes, disk_bytes=disk_bytes)
        await self._unary(self._store.SetQuota(request, metadata=self._metadata, timeout=PEER_LOSS_S))

    async def store_usage(self) -> StoreUsage:
        """Raises WorkerLostError for a store that is not there, or does not know yet what a block is."""
        call = self._store.GetUsage(kv_pb2.GetUsageRequest(), metadata=self._metadata, timeout=PEER_LOSS_S)
        return convert.usage_from_proto(await self._unary(call))

    # -- gateway -> worker --------------------------------------------------------------------------------------------

    def attach(self, gateway_id: str, gateway_epoch: int) -> AttachCall:
        return AttachCall(self, self._worker.Attach(metadata=self._metadata), gateway_id, gateway_epoch)

    async def ledger(self) -> LedgerReport:
        request = control_pb2.GetLedgerRequest()
        call = self._control.GetLedger(request, metadata=self._metadata, timeout=PEER_LOSS_S)
        return convert.ledger_from_proto((await self._unary(call)).ledger)

    async def load(self) -> Load:
        request = control_pb2.GetLoadRequest()
        call = self._control.GetLoad(request, metadata=self._metadata, timeout=PEER_LOSS_S)
        return convert.load_from_proto((await self._unary(call)).load)

    async def drain(self) -> None:
        call = self._control.Drain(control_pb2.DrainRequest(), metadata=self._metadata, timeout=PEER_LOSS_S)
        await self._unary(call)

    async def snapshot(self) -> AsyncIterator[KvEventBatch]:
        """Every cached block, in pieces; `first_sequence` of each is that of the next event to come."""
        call = self._control.Snapshot(control_pb2.SnapshotRequest(), metadata=self._metadata, timeout=30.0)
        async for batch in self._read(call, lambda message: convert.kv_events_from_proto(message.events)):
            yield batch

    # -- worker -> gateway --------------------------------------------------------------------------------------------

    async def join(self, address: str, joined: Callable[[str], None]) -> None:
        """Be a member until the stream ends. Raises TailraceError when it does; `joined` gets the gateway's id."""
        call = self._membership.Join(metadata=self._metadata)
        try:
            await call.write(control_pb2.JoinRequest(address=address))
            async for response in call:
                joined(response.gateway_id)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as failure:
            raise await self._failure(call, failure) from None
        finally:
            call.cancel()
        raise UnavailableError(f"{self.address}: the gateway ended our membership")

    # -- inside -------------------------------------------------------------------------------------------------------

    async def _unary(self, call: grpc.aio.UnaryUnaryCall[Any, M]) -> M:
        try:
            return await call
        except grpc.aio.AioRpcError as failure:
            raise error_of(failure, self.address) from None

    async def _read(
        self, call: grpc.aio.UnaryStreamCall[Any, M] | grpc.aio.StreamStreamCall[Any, M], convert_one: Callable[[M], T]
    ) -> AsyncIterator[T]:
        try:
            async for message in call:
                yield convert_one(message)
        except grpc.aio.AioRpcError as failure:
            raise error_of(failure, self.address) from None
        except asyncio.CancelledError:
            # gRPC raises it as well when somebody else has cancelled the call.
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise WorkerLostError(f"{self.address}: the call was closed on this side") from None

    async def _failure(self, call: grpc.aio.Call, failure: Exception) -> TailraceError:
        """A write to a stream that has ended says nothing of why it ended; its status does."""
        if isinstance(failure, grpc.aio.AioRpcError):
            return error_of(failure, self.address)
        return WorkerLostError(f"{self.address}: {await call.details() or 'the stream is closed'}")


def _itself(message: worker_pb2.AttachResponse) -> worker_pb2.AttachResponse:
    return message


class AttachCall:
    """One `Attach` stream.

    Commands go through a queue and one writer: a gRPC write whose caller is cancelled would take the whole stream, and
    with it everybody's requests, along.
    """

    def __init__(
        self,
        peer: Peer,
        call: grpc.aio.StreamStreamCall[worker_pb2.AttachRequest, worker_pb2.AttachResponse],
        gateway_id: str,
        gateway_epoch: int,
    ) -> None:
        self._peer = peer
        self._call = call
        self._commands: asyncio.Queue[worker_pb2.AttachRequest] = asyncio.Queue(MAX_UNSENT)
        self._line: LineReader | None = None
        self._is_open = True
        self._send(
            worker_pb2.AttachRequest(greeting=worker_pb2.Greeting(gateway_id=gateway_id, gateway_epoch=gateway_epoch))
        )

    async def events(self, direct: Callable[[StepEvents], None] | None = None) -> AsyncGenerator[StepEvents, None]:
        """Yields what the worker says until the stream ends. Raises TailraceError when it breaks.

        `direct`: what the worker offers to say over a line of its own is taken from there, and given to `direct` as it
        comes, in its place among the rest. What `direct` raises is raised here.
        """
        writer = asyncio.create_task(self._write_all(), name=f"commands to {self._peer.address}")
        num_taken = 0
        try:
            async for message in self._peer._read(self._call, _itself):
                if direct is not None and message.HasField("line"):
                    self._line = self._open_line(message.line, direct)
                yield convert.step_events_from_proto(message)
                num_taken += 1
                if self._line is not None:
                    self._line.release(num_taken)
        except TailraceError:
            if self._line is not None and self._line.failure is not None:
                raise self._line.failure from None
            raise
        finally:
            self._is_open = False
            writer.cancel()
            if self._line is not None:
                self._line.close()

    def _open_line(self, line: worker_pb2.StepLine, direct: Callable[[StepEvents], None]) -> LineReader:
        def take(message: worker_pb2.AttachResponse) -> None:
            direct(convert.step_events_from_proto(message))

        return LineReader(self._peer.address, line, take, self.close)

    @property
    def has_dumb_line(self) -> bool:
        """A line was opened, and nothing came over it: whatever is in between does not let it through."""
        return self._line is not None and self._line.is_dumb

    @property
    def uses_line(self) -> bool:
        """What the worker says comes over a line of its own; else all of it comes over gRPC."""
        return self._line is not None and self._line.is_in_use

    def submit(self, submission: Submission) -> None:
        """Raises WorkerLostError when the stream is gone, or the worker does not read."""
        self._send(worker_pb2.AttachRequest(submit=convert.submission_to_proto(submission)))

    def cancel(self, handle: int, choices: tuple[int, ...] = ()) -> None:
        """Raises WorkerLostError when the stream is gone, or the worker does not read."""
        self._send(worker_pb2.AttachRequest(cancel=worker_pb2.Cancel(handle=handle, choices=choices)))

    def close(self) -> None:
        self._is_open = False
        self._call.cancel()

    def _send(self, command: worker_pb2.AttachRequest) -> None:
        if not self._is_open:
            raise WorkerLostError(f"{self._peer.address}: the stream is closed")
        try:
            self._commands.put_nowait(command)
        except asyncio.QueueFull:
            raise WorkerLostError(f"{self._peer.address} does not read: {MAX_UNSENT} commands wait") from None

    async def _write_all(self) -> None:
        """Ends with the stream, whose reader says why."""
        try:
            while True:
                await self._call.write(await self._commands.get())
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            self._is_open = False
