"""The needer's end of `nixl`: first contact, and reads that are judged by a second read of the stamps."""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tailrace.errors import TransferError
from tailrace.transfer.endpoints import NixlEndpoint, PeerEndpoints
from tailrace.transfer.frames import TORN_STAMP
from tailrace.transfer.nixl_driver import NONCE_BYTES, AgentError, Descriptor, NixlDriver, Peer
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

_PROMPT_READS = 32
"""In a row, at first contact."""
_MAX_SLOW_READS = 8


@dataclass(frozen=True, slots=True)
class OneSided:
    """What the kernel says about a pair, before NIXL is asked. `reason` is why reads would not be one-sided, or ''."""

    reason: str
    attach: bool = False
    """By cross-memory attach, where reads end as soon as they are posted; not by RDMA."""


def prove_one_sided(driver: NixlDriver, owner: NixlEndpoint) -> OneSided:
    """A shared RDMA device, or the owner's nonce read by process_vm_readv(2)."""
    if set(owner.rdma_devices) & set(driver.rdma_devices):
        return OneSided("")
    if "vram" in (owner.memory, driver.memory.memory):
        return OneSided("reads of GPU memory are one-sided over a shared RDMA device; there is no other proof yet")
    if not owner.boot_id or owner.boot_id != boot_id():
        return OneSided("the owner is on another host, and the two share no RDMA device")
    if not driver.can_attach:
        return OneSided("UCX_TLS leaves out cma, so that NIXL would read over TCP")
    try:
        nonce = read_process(owner.pid, owner.nonce_address, NONCE_BYTES)
    except OSError as error:
        return OneSided(f"the owner's nonce cannot be read by process_vm_readv: {error.strerror or error}")
    if nonce != owner.nonce:
        return OneSided("the nonce read by process_vm_readv is not the owner's: its pid means another process here")
    return OneSided("", attach=True)


async def open_nixl(driver: NixlDriver, peer: PeerEndpoints, owner: NixlEndpoint, timeout_s: float) -> "NixlLink":
    """Prove one-sidedness, then the connection itself by reading the nonce through it.

    Raises TransferError naming the proof that failed. The owner must be making progress meanwhile (Owner.note_meeting).
    """
    proof = prove_one_sided(driver, owner)
    if proof.reason:
        raise TransferError(proof.reason)
    contact = _FirstContact(driver, owner, proof.attach, asyncio.get_running_loop())
    driver.submit(contact.begin)
    try:
        await asyncio.wait({contact.met}, timeout=timeout_s)
    finally:
        if not contact.met.done():
            contact.met.cancel()
            driver.submit(contact.abandon)
    if contact.met.cancelled():
        raise TransferError(f"the owner's nonce did not arrive through nixl within {timeout_s:g} s")
    return NixlLink(driver, contact.met.result(), peer)


class _FirstContact:
    """Runs on the driver's thread; `met` belongs to the event loop.

    The owner's nonce is read again and again: the first read waits for the connection, and one of those after it (the
    8th to the 13th, measured) for another round trip, when UCX settles on its lanes. From then on a read by
    cross-memory attach is over as soon as it is posted, and one emulated over TCP never is: it needs the owner's help.
    """

    def __init__(self, driver: NixlDriver, owner: NixlEndpoint, attach: bool, loop: asyncio.AbstractEventLoop) -> None:
        self._driver = driver
        self._owner = owner
        self._loop = loop
        self._peer: Peer | None = None
        self._attach = attach
        self._num_wanted = _PROMPT_READS if attach else 1
        self._num_prompt = 0
        self._num_slow = 0
        self.met: asyncio.Future[Peer] = loop.create_future()

    def begin(self) -> None:
        try:
            self._peer = self._driver.introduce(self._owner)
        except AgentError as error:
            self._finish(str(error))
            return
        self._read_on(self._peer)

    def abandon(self) -> None:
        if self._peer is not None:
            self._driver.give_up(self._peer, "first contact took too long")

    def _read_on(self, peer: Peer) -> None:
        while self._num_prompt < self._num_wanted:
            error = self._read_promptly(peer)
            if error is None:
                return
            if error:
                self._finish(error)
                return
            self._num_prompt += 1
        self._finish("")

    def _read_promptly(self, peer: Peer) -> str | None:
        """None when the read was not over as soon as it was posted: `_slow` goes on once it is."""
        ends: list[str] = []
        posting = True
        self._read_nonce(peer, lambda error: ends.append(error) if posting else self._slow(peer, error))
        posting = False
        return ends[0] if ends else None

    def _slow(self, peer: Peer, error: str) -> None:
        self._num_slow += 1
        self._num_prompt = 0
        if error or not self._attach:
            self._finish(error)
        elif self._num_slow > _MAX_SLOW_READS:
            self._finish("nixl does not read by cross-memory attach, though the kernel allows it")
        else:
            self._read_on(peer)

    def _read_nonce(self, peer: Peer, on_end: Callable[[str], None]) -> None:
        if not self._driver.free_proofs:
            on_end("too many first contacts are still in flight")
            return
        row = self._driver.free_proofs.pop()
        landing = self._driver.proofs[row]
        landing[:] = 0

        def ended(error: str) -> None:
            self._driver.free_proofs.append(row)
            wrong = not error and landing.tobytes() != self._owner.nonce
            on_end("the nonce read through nixl is not the owner's" if wrong else error)

        local = Descriptor(int(landing.ctypes.data), NONCE_BYTES)
        self._driver.read(peer, [local], [Descriptor(self._owner.nonce_address, NONCE_BYTES)], ended)

    def _finish(self, error: str) -> None:
        if error and self._peer is not None:
            self._driver.give_up(self._peer, error)
        try:
            self._loop.call_soon_threadsafe(self._resolve, error)
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
