"""Workers as a router sees them, and ways between them, for tests of routing."""

import dataclasses
from collections.abc import Mapping, Sequence

from hypothesis import strategies as st

from tailrace.kv.events import Tier
from tailrace.messages import OwnerRate
from tailrace.policy.pairs import PairRates
from tailrace.policy.routing import Way, WorkerView
from tailrace.types import Role

BLOCK = 16
BYTES_PER_TOKEN = 1000


def make_prefill(worker_id: str = "p0", **changes: object) -> WorkerView:
    view = WorkerView(
        worker_id,
        Role.PREFILL,
        b"layout",
        free_blocks=1000,
        total_blocks=1000,
        prefill_tokens_per_s=1000.0,
        max_num_seqs=64,
    )
    return dataclasses.replace(view, **changes)


def make_decode(worker_id: str = "d0", **changes: object) -> WorkerView:
    view = WorkerView(
        worker_id,
        Role.DECODE,
        b"layout",
        free_blocks=1000,
        total_blocks=1000,
        prefill_tokens_per_s=1000.0,
        decode_step_s=0.1,
        max_num_seqs=10,
    )
    return dataclasses.replace(view, **changes)


def with_rates(decodes: Sequence[WorkerView], rates: Mapping[tuple[str, str], float]) -> list[WorkerView]:
    """Who tells rates of single pairs, by (prefill, decode), as a gateway sees them."""
    views = []
    for view in decodes:
        told = [OwnerRate(owner, rate) for (owner, needer), rate in rates.items() if needer == view.worker_id]
        pairs = PairRates.of(told)
        usual = pairs.usual or view.transfer_bytes_per_s
        views.append(dataclasses.replace(view, pairs=pairs, transfer_bytes_per_s=usual))
    return views


class Rates:
    """Ways without a fixed cost."""

    def __init__(self, bytes_per_s: Mapping[tuple[str, str], float]) -> None:
        self._rates = bytes_per_s

    def way(self, holder_id: str, needer_id: str, tier: Tier) -> Way | None:
        rate = self._rates.get((holder_id, needer_id))
        return Way(0.0, 1 / rate) if rate else None


VIEWS = st.builds(
    WorkerView,
    worker_id=st.just(""),
    role=st.just(Role.DECODE),
    fingerprint=st.sampled_from([b"a", b"b"]),
    num_waiting=st.integers(0, 50),
    num_running=st.integers(0, 50),
    waiting_tokens=st.integers(0, 10**6),
    free_blocks=st.integers(0, 200),
    cached_blocks=st.integers(0, 200),
    total_blocks=st.integers(0, 400),
    booked_blocks=st.integers(0, 500),
    prefill_tokens_per_s=st.floats(0, 1e6),
    decode_step_s=st.floats(0, 10),
    max_num_seqs=st.integers(1, 64),
    draining=st.booleans(),
    reserved_tokens=st.integers(0, 10**6),
)


def named(role: str, views: list[WorkerView]) -> list[WorkerView]:
    return [dataclasses.replace(view, worker_id=f"{role}{index}") for index, view in enumerate(views)]
