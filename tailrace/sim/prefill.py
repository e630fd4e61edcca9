"""A prefill worker under virtual time: its own BlockPool, and one prompt after another, as they came.

A real worker computes prompts in chunks and may mix them; their sum takes as long. A head of the queue whose fetch is
still under way is waited for.
"""

from collections import deque
from dataclasses import dataclass, field

from tailrace.index.prefix_index import PrefixIndex
from tailrace.kv.block_pool import BlockPool
from tailrace.policy.estimates import PrefillFit
from tailrace.policy.routing import WorkerView
from tailrace.sim.profile import HardwareProfile
from tailrace.sim.workload import SimRequest
from tailrace.types import Role

EPOCH = 1
LAYOUT = b"simulated"


@dataclass(slots=True, eq=False)
class PrefillJob:
    """One request on its way through a prefill worker."""

    number: int
    request: SimRequest
    decode_id: str
    fetch_depth: int = 0
    """Leading blocks that are there once the fetch has landed; 0: no fetch."""
    fetch_tier: str = ""
    fetched_at_s: float = 0.0
    # When it is started.
    blocks: list[int] = field(default_factory=list)
    hit_tokens: int = 0
    fetched_tokens: int = 0
    compute_s: float = 0.0


class PrefillNode:
    """Event loop: `accept`, then `start` whenever `is_idle`, then `finish` at the time that `start` named."""

    def __init__(self, worker_id: str, num_blocks: int, block_tokens: int, profile: HardwareProfile) -> None:
        self.worker_id = worker_id
        self.pool = BlockPool(num_blocks, epoch=EPOCH)
        self.busy_s = 0.0
        self.next_sequence = 0
        self._profile = profile
        self._block_tokens = block_tokens
        self._waiting: deque[PrefillJob] = deque()
        self._running: PrefillJob | None = None
        self._fit = PrefillFit()
        self._view: WorkerView | None = None

    @property
    def is_idle(self) -> bool:
        return self._running is None

    def accept(self, job: PrefillJob) -> None:
        self._waiting.append(job)
        self._view = None

    def start(self, now_s: float) -> float | None:
        """Begins the first that waits; returns when it will be computed, None when none can begin now."""
        if self._running is not None or not self._waiting:
            return None
        job = self._waiting[0]
        if not self._take_blocks(job):
            return None
        self._waiting.popleft()
        self._running = job
        self._view = None
        begin_s = max(now_s, job.fetched_at_s) if job.fetched_tokens else now_s
        prompt = job.request.num_prompt_tokens
        cached = min(job.hit_tokens + job.fetched_tokens, prompt - 1)
        job.compute_s = self._profile.prefill_s(cached, prompt)
        self._fit.add(cached, prompt, job.compute_s)
        self.busy_s += job.compute_s
        return begin_s + job.compute_s

    def finish(self) -> PrefillJob:
        """The running job, computed. Its blocks stay until `give_back`."""
        job = self._running
        if job is None:
            raise AssertionError(f"{self.worker_id} computes nothing that could finish")
        self._running = None
        self._view = None
        # A partial last block without a name is not found again.
        for block, name in zip(job.blocks, job.request.hashes, strict=False):
            if self.pool.hash_of(block) is None:
                self.pool.register(block, name)
        return job

    def publish(self, index: PrefixIndex) -> None:
        """Tells the index what changed in the cache, as a worker does after each step."""
        if events := self.pool.drain_events():
            index.apply(self.worker_id, EPOCH, self.next_sequence, events)
            self.next_sequence += len(events)

    def give_back(self, job: PrefillJob) -> None:
        self.pool.release(job.blocks)
        self._view = None

    def view(self) -> WorkerView:
        """What the worker's load report and this router's measurements say."""
        if self._view is None:
            ledger = self.pool.ledger()
            self._view = WorkerView(
                worker_id=self.worker_id,
                role=Role.PREFILL,
                fingerprint=LAYOUT,
                num_waiting=len(self._waiting),
                num_running=int(self._running is not None),
                free_blocks=ledger.free,
                cached_blocks=ledger.cached,
                total_blocks=ledger.total,
                prefill_tokens_per_s=self._fit.tokens_per_s,
                prefill_curve_s=self._fit.curve_s,
                max_num_seqs=64,
            )
        return self._view

    def _take_blocks(self, job: PrefillJob) -> bool:
        hashes = job.request.hashes
        found = self.pool.find_prefix(hashes)
        self.pool.acquire(found)
        needed = -(-job.request.num_prompt_tokens // self._block_tokens)
        rest = self.pool.allocate(needed - len(found))
        if rest is None:
            self.pool.release(found)
            return False
        job.blocks = found + rest
        job.hit_tokens = self._tokens(job, len(found))
        job.fetched_tokens = max(0, self._tokens(job, job.fetch_depth) - job.hit_tokens)
        return True

    def _tokens(self, job: PrefillJob, num_blocks: int) -> int:
        return min(num_blocks * self._block_tokens, job.request.num_prompt_tokens)
