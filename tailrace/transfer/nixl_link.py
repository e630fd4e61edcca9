"""The needer's end of `nixl`: first contact, and reads that are judged by a second read of the stamps."""

import asyncio
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tailrace.errors import TransferError
from tailrace.transfer.endpoints import NixlEndpoint, PeerEndpoints
from tailrace.transfer.frames import TORN_STAMP
from tailrace.transfer.nixl_driver import NONCE_BYTES, POLL_S, PROOF_BYTES, AgentError, Descriptor, NixlDriver, Peer
from tailrace.transfer.proof import boot_id, read_process
from tailrace.transfer.reads import (
    BlockRead,
    PendingRead,
    RateMeter,
    ReadOutcome,
    ReadPlan,
    ReadResult,
    judge,
    plan_read,
)

_NUM_PROOFS = 32
"""Reads that must find the owner asleep: more than UCX takes to settle on its lanes (8 to 13, measured)."""
_MAX_WAKES = 256
"""An owner that was found awake in so many different wakes carries the reads out itself."""


def why_not_one_sided(driver: NixlDriver, owner: NixlEndpoint) -> str:
    """What the kernel says, before NIXL is asked; empty where it allows reads by RDMA or cross-memory attach."""
    if set(owner.rdma_devices) & set(driver.rdma_devices):
        return ""
    if "vram" in (owner.memory, driver.memory.memory):
        return "reads of GPU memory are one-sided over a shared RDMA device; there is no other proof yet"
    if not owner.boot_id or owner.boot_id != boot_id():
        return "the owner is on another host, and the two share no RDMA device"
    if not driver.can_attach:
        return "UCX_TLS leaves out cma, so that NIXL would read over TCP"
    try:
        nonce = read_process(owner.pid, owner.nonce_address, NONCE_BYTES)
    except OSError as error:
        return f"the owner's nonce cannot be read by process_vm_readv: {error.strerror or error}"
    if nonce != owner.nonce:
        return "the nonce read by process_vm_readv is not the owner's: its pid means another process here"
    return ""


async def open_nixl(driver: NixlDriver, peer: PeerEndpoints, owner: NixlEndpoint, timeout_s: float) -> "NixlLink":
    """Prove the connection itself, by reads that the owner does not carry out.

    Raises TransferError naming the proof that failed; ask `why_not_one_sided` before. The owner must be
    making progress meanwhile (Owner.note_meeting).
    """
    contact = _FirstContact(driver, owner, asyncio.get_running_loop())
    driver.submit(contact.begin)
    try:
        await asyncio.wait({contact.met}, timeout=timeout_s)
    finally:
        if not contact.met.done():
            contact.met.cancel()
            driver.submit(contact.abandon)
    if contact.met.cancelled():
        raise TransferError(f"{contact.so_far()} within {timeout_s:g} s")
    return NixlLink(driver, contact.met.result(), peer)


class _FirstContact:
    """Runs on the driver's thread; `met` belongs to the event loop.

    The owner's proof is read again and again. Some of these reads wait for the owner's progress: the first for the
    connection, a later one for UCX to settle on its lanes. But none is proof unless it finds the owner's thread asleep,
    which a read that this thread carries out never does, however quick it is.
    """

    def __init__(self, driver: NixlDriver, owner: NixlEndpoint, loop: asyncio.AbstractEventLoop) -> None:
        self._driver = driver
        self._owner = owner
        self._loop = loop
        self._peer: Peer | None = None
        self._num_asleep = 0
        self._wakes: set[int] = set()
        self.met: asyncio.Future[Peer] = loop.create_future()

    def so_far(self) -> str:
        """Why it is not over yet. The same words each time: who falls back says so once a reason."""
        if not self._wakes and not self._num_asleep:
            return "the owner's nonce did not arrive through nixl"
        return f"fewer than {_NUM_PROOFS} reads through nixl found the owner asleep"

    def begin(self) -> None:
        try:
            self._peer = self._driver.introduce(self._owner)
        except AgentError as error:
            self._finish(str(error))
            return
        self._read(self._peer)

    def abandon(self) -> None:
        if self._peer is not None:
            self._driver.give_up(self._peer, "first contact took too long")

    def _read(self, peer: Peer) -> None:
        if not self._driver.free_proofs:
            self._finish("too many first contacts are still in flight")
            return
        row = self._driver.free_proofs.pop()
        landing = self._driver.proofs[row]
        landing[:] = 0

        def ended(error: str) -> None:
            self._driver.free_proofs.append(row)
            self._judge(peer, error, landing.tobytes())

        local = Descriptor(int(landing.ctypes.data), PROOF_BYTES)
        self._driver.read(peer, [local], [Descriptor(self._owner.nonce_address, PROOF_BYTES)], ended)

    def _judge(self, peer: Peer, error: str, proof: bytes) -> None:
        wakes = int.from_bytes(proof[NONCE_BYTES:], sys.byteorder)
        if error:
            self._finish(error)
        elif proof[:NONCE_BYTES] != self._owner.nonce:
            self._finish("the nonce read through nixl is not the owner's")
        elif not wakes:
            self._finish("the owner does not tell when it sleeps (an older version?), so that no read can prove itself")
        elif wakes % 2:
            self._found_awake(peer, wakes)
        else:
            self._found_asleep(peer)

    def _found_asleep(self, peer: Peer) -> None:
        self._num_asleep += 1
        if self._num_asleep < _NUM_PROOFS:
            self._driver.submit(lambda: self._read(peer))
        else:
            self._finish("")

    def _found_awake(self, peer: Peer, wakes: int) -> None:
        self._wakes.add(wakes)
        if len(self._wakes) < _MAX_WAKES:
            self._tell(self._loop.call_later, POLL_S, self._driver.submit, lambda: self._read(peer))
        else:
            self._finish("nixl reads with the owner's help, as over TCP, though the kernel lets the two do without")

    def _finish(self, error: str) -> None:
        if error and self._peer is not None:
            self._driver.give_up(self._peer, error)
        self._tell(self._resolve, error)

    def _tell(self, callback: Callable[..., object], *arguments: object) -> None:
        try:
            self._loop.call_soon_threadsafe(callback, *arguments)
        except RuntimeError:
            self.abandon()

    def _resolve(self, error: str) -> None:
        if self.met.cancelled():
            return
        if error:
            self.met.set_exception(TransferError(error))
        elif self._peer is not None:
            self.met.set_result(self._peer)


@dataclass(frozen=True, slots=True)
class _Job:
    plan: ReadPlan
    pending: PendingRead
    asked_at: float

    def settle(self, outcome: ReadOutcome, message: str = "") -> None:
        elapsed_s = time.monotonic() - self.asked_at
        self.pending.settle(ReadResult(outcome, elapsed_s, self.plan.num_bytes, message))


class NixlLink:
    """Reads of one owner. All of them go through the process's one driver."""

    transport = "nixl"

    def __init__(self, driver: NixlDriver, peer: Peer, owner: PeerEndpoints) -> None:
        self._driver = driver
        self._peer = peer
        self._owner = owner
        self.rate = RateMeter()

    @property
    def broken(self) -> bool:
        return bool(self._peer.broken)

    def read(self, reads: Sequence[BlockRead]) -> PendingRead:
        plan = plan_read(reads, self._driver.memory)
        job = _Job(plan, PendingRead(asyncio.get_running_loop()), time.monotonic())
        stray = self._stray(plan)
        if stray:
            job.settle(ReadOutcome.FAILED, stray)
        else:
            self._driver.submit(lambda: self._start(job))
        return job.pending

    def abort(self) -> None:
        """No new reads. Those in flight settle when they are over, and then the agent forgets the owner."""
        self._driver.submit(lambda: self._driver.give_up(self._peer, "the needer gave the owner up"))

    def join(self) -> None:
        """The thread is the driver's, and waited for when that is closed."""

    def _stray(self, plan: ReadPlan) -> str:
        """Blocks that are not the owner's: a read of them would fail the whole connection."""
        base, size = self._peer.endpoint.pool_address, self._owner.block_bytes
        for read in plan.reads:
            inside = 0 <= read.source_block < self._owner.num_blocks
            if not inside or read.source_address != base + read.source_block * size:
                return f"block {read.source_block} at {read.source_address:#x} is not in the owner's pool"
        return ""

    def _start(self, job: _Job) -> None:
        pool, owner = self._driver.memory, self._peer.endpoint
        size = pool.block_bytes
        local = [
            Descriptor(pool.address + run.target_block * size, run.num_blocks * size, pool.memory, pool.device)
            for run in job.plan.runs
        ]
        remote = [
            Descriptor(run.source_address, run.num_blocks * size, owner.memory, owner.device) for run in job.plan.runs
        ]
        started = time.monotonic()
        self._driver.read(self._peer, local, remote, lambda error: self._data_over(job, started, error))

    def _data_over(self, job: _Job, started: float, error: str) -> None:
        if error:
            job.settle(ReadOutcome.FAILED, f"nixl read failed: {error}")
            return
        self.rate.add(job.plan.num_bytes, time.monotonic() - started)
        scratch = self._driver.scratch
        scratch[self._targets(job.plan)] = TORN_STAMP
        base = int(scratch.ctypes.data)
        local = [Descriptor(base + 8 * run.target_block, 8 * run.num_blocks) for run in job.plan.runs]
        table = self._peer.endpoint.stamps_address
        remote = [Descriptor(table + 8 * run.source_block, 8 * run.num_blocks) for run in job.plan.runs]
        self._driver.read(self._peer, local, remote, lambda failure: self._stamps_over(job, failure))

    def _stamps_over(self, job: _Job, error: str) -> None:
        if error:
            job.settle(ReadOutcome.FAILED, f"nixl read of the stamps failed: {error}")
            return
        job.settle(*judge(job.plan, self._driver.scratch[self._targets(job.plan)]))

    @staticmethod
    def _targets(plan: ReadPlan) -> list[int]:
        return [read.target_block for read in plan.reads]
