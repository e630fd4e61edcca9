"""Simulating what a cluster was really asked, at the pace that its calibrations had."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import accumulate, pairwise

from tailrace.cli.bench.replay import Served
from tailrace.config import UpConfig
from tailrace.kv.hashing import HASH_BYTES
from tailrace.sim.profile import HardwareProfile
from tailrace.sim.simulator import Pace, SimOptions, Simulator
from tailrace.sim.workload import Workload

WARM_UP = "warm-up"
CALIBRATION = "calibration"
PASSES = 3
"""At another pace others wait and share cores, so a pace is found in a few simulations."""


@dataclass(frozen=True, slots=True)
class Case:
    """One workload in the workers' own blocks."""

    name: str
    seed: int
    workload: Workload


@dataclass(frozen=True, slots=True)
class Replay:
    case: Case
    policy: str
    began_s: float
    served: Sequence[Served]

    @property
    def is_compared(self) -> bool:
        return self.case.name not in (WARM_UP, CALIBRATION)


def joined(replays: Sequence[Replay]) -> Workload:
    """What one cluster was asked, one replay after the other, each with blocks of its own: its router and its workers
    remember what was before."""
    requests = []
    for one in replays:
        salt = f"{one.case.name} {one.case.seed} ".encode()
        shift_s = one.began_s - replays[0].began_s - one.case.workload.requests[0].arrival_s
        requests += [
            replace(
                request,
                arrival_s=request.arrival_s + shift_s,
                hashes=tuple(blake2b(salt + name, digest_size=HASH_BYTES).digest() for name in request.hashes),
            )
            for request in one.case.workload.requests
        ]
    return Workload(requests, replays[0].case.workload.block_tokens)


@dataclass(frozen=True, slots=True)
class Simulated:
    replay: Replay
    served: Sequence[Served]
    """What would have become of its requests."""
    pace: Pace


def simulate(replays: Sequence[Replay], config: UpConfig, profile: HardwareProfile, *, fetch: bool) -> list[Simulated]:
    """All replays of one cluster, in order, each at the mean pace of the calibrations around it."""
    assert config.num_blocks is not None, "set by the command"
    options = SimOptions(
        config.prefill,
        profile,
        num_decode=config.decode,
        blocks_per_worker=config.num_blocks,
        policy=replays[0].policy,
        fetch=fetch,
        knows_rates=False,
    )
    workload = joined(replays)
    ends = [0, *accumulate(len(one.served) for one in replays)]
    paces = [Pace(one.began_s - replays[0].began_s) for one in replays]
    for _ in range(PASSES):
        said = _simulated(workload, replace(options, paces=paces), ends)
        paces = _spread(replays, [_corrected(*each, profile) for each in zip(paces, replays, said, strict=True)])
    said = _simulated(workload, replace(options, paces=paces), ends)
    return [Simulated(*each) for each in zip(replays, said, paces, strict=True)]


def _simulated(workload: Workload, options: SimOptions, ends: Sequence[int]) -> list[list[Served]]:
    served = [Served.simulated(record) for record in Simulator(workload, options).run().records]
    return [served[begin:end] for begin, end in pairwise(ends)]


def _corrected(pace: Pace, one: Replay, said: Sequence[Served], profile: HardwareProfile) -> Pace:
    """By how much longer everything really took. Of prefills: over what idle workers take for what each had to compute,
    for it may have found another prefix."""
    return replace(
        pace,
        prefill=pace.prefill * _prefill_cost(one.served, profile) / _prefill_cost(said, profile),
        decode=pace.decode * _ratio(_decode_s(one.served), _decode_s(said)),
    )


def _prefill_cost(served: Sequence[Served], profile: HardwareProfile) -> float:
    alone_s = math.fsum(profile.prefill_s(one.cached_tokens, one.prompt_tokens) for one in served)
    return math.fsum(one.prefill_s for one in served) / alone_s


def _decode_s(served: Sequence[Served]) -> float:
    return math.fsum(one.tpot_s for one in served)


def _ratio(real: float, simulated: float) -> float:
    """1 where nothing was decoded."""
    return real / simulated if simulated > 0.0 else 1.0


def _spread(replays: Sequence[Replay], measured: Sequence[Pace]) -> list[Pace]:
    """What calibrations have measured, and for all others the mean of the ones before and after them."""
    known = [number for number, one in enumerate(replays) if one.case.name == CALIBRATION]
    paces = list(measured)
    for number, pace in enumerate(measured):
        if number not in known:
            before = max((k for k in known if k < number), default=known[0])
            after = min((k for k in known if k > number), default=known[-1])
            prefill = (measured[before].prefill + measured[after].prefill) / 2
            paces[number] = replace(
                pace, prefill=prefill, decode=(measured[before].decode + measured[after].decode) / 2
            )
    return paces
