"""Reads and writes of a slab file, on threads of their own: nobody who decides ever waits for the disk."""

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from tailrace.kvstore.slab_file import Entry, SlabFile
from tailrace.kvstore.slots import StoredBlock

MAX_WRITES = 4
"""Posted at once: more would only wait, each with a memory slot that cannot be given up."""
MAX_READS = 64
"""Posted at once, over all loans."""
NUM_READERS = 4
_JOIN_S = 2.0
"""For what is posted when all ends: with what a store takes to flush and to leave, less than its supervisor waits."""


@dataclass(slots=True, eq=False)
class WriteJob:
    block: StoredBlock
    memory_slot: int
    disk_slot: int
    entry: Entry
    data: memoryview
    checksum: int = 0
    is_good: bool = False
    """Set by whoever books it."""
    error: OSError | None = None

    def run(self, file: SlabFile) -> None:
        try:
            self.checksum = file.write(self.disk_slot, self.entry, self.data)
        except OSError as error:
            self.error = error


@dataclass(slots=True, eq=False)
class ReadJob:
    block: StoredBlock
    memory_slot: int
    disk_slot: int
    checksum: int
    target: memoryview
    is_good: bool = False
    error: OSError | None = None

    def run(self, file: SlabFile) -> None:
        try:
            self.is_good = file.read(self.disk_slot, self.block.block_hash, self.checksum, self.target)
        except OSError as error:
            self.error = error


Job = TypeVar("Job", WriteJob, ReadJob)


class _Lane(Generic[Job]):
    """Jobs of one kind, in order; at most `limit` that are not taken back."""

    def __init__(self, file: SlabFile, name: str, limit: int, num_threads: int, on_done: Callable[[], None]) -> None:
        self._file = file
        self._limit = limit
        self._on_done = on_done
        self._todo: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self.num_open = 0
        """Posted, and not taken back yet."""
        self._threads = [threading.Thread(target=self._run, name=name, daemon=True) for _ in range(num_threads)]
        for thread in self._threads:
            thread.start()

    @property
    def is_full(self) -> bool:
        return self.num_open >= self._limit

    def post(self, job: Job) -> None:
        """Raises ValueError when the lane is full."""
        if self.is_full:
            raise ValueError(f"{self.num_open} jobs are posted; at most {self._limit} may be")
        self.num_open += 1
        self._todo.put(job)

    def take_done(self, timeout_s: float = 0.0) -> list[Job]:
        """What has ended; waits for one of them where there is none."""
        done: list[Job] = []
        try:
            done.append(self._done.get(timeout=timeout_s) if timeout_s and self.num_open else self._done.get_nowait())
            while True:
                done.append(self._done.get_nowait())
        except queue.Empty:
            self.num_open -= len(done)
            return done

    def end(self) -> None:
        """Its threads end with what is posted."""
        for _ in self._threads:
            self._todo.put(None)

    def has_ended(self, deadline: float) -> bool:
        """Waits until then (monotonic). A thread that a dead disk holds does not end."""
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _run(self) -> None:
        while (job := self._todo.get()) is not None:
            job.run(self._file)
            self._done.put(job)
            self._on_done()


class DiskIo:
    """Reads never wait behind writes. `on_done` is called on one of the threads whenever a job has ended."""

    def __init__(self, file: SlabFile, on_done: Callable[[], None]) -> None:
        self.writes: _Lane[WriteJob] = _Lane(file, "disk-write", MAX_WRITES, 1, on_done)
        self.reads: _Lane[ReadJob] = _Lane(file, "disk-read", MAX_READS, NUM_READERS, on_done)

    def close(self) -> bool:
        """Whether nothing touches the file and the memory any more."""
        deadline = time.monotonic() + _JOIN_S
        self.writes.end()
        self.reads.end()
        return self.writes.has_ended(deadline) and self.reads.has_ended(deadline)
