"""The overlapped loop draws the tokens of the plain one, with a real model and everything that looks at tokens on."""

import functools
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from services.decode.worker import DecodeWorker
from tailrace.engine.engine import Engine, EngineOptions, load_engine
from tailrace.kv.block_pool import BlockPool
from tailrace.kv.hashing import chain_seed, hash_blocks
from tailrace.policy.decode_scheduler import DecodeScheduler
from tailrace.policy.request import Request, StopRule
from tailrace.types import SamplingParams
from tailrace.worker.compute_thread import ComputeThread
from tailrace.worker.report import StepReport
from tailrace.worker.runner import LaunchedStep
from tests.helpers.model_files import MISTRAL_CONFIG

NUM_BLOCKS, BLOCK, MAX_SEQS, MAX_LEN = 28, 4, 5, 100
SEED = chain_seed(b"overlap")


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    directory = tmp_path_factory.mktemp("model")
    (directory / "config.json").write_text(json.dumps({**MISTRAL_CONFIG, "sliding_window": None}))
    options = {"block_size": BLOCK, "num_blocks": NUM_BLOCKS, "max_num_seqs": MAX_SEQS, "max_model_len": MAX_LEN}
    return load_engine(EngineOptions(directory, dtype="float32", load_format="dummy", **options))  # type: ignore[arg-type]


@dataclass
class Traffic:
    """What happens at which turn, the same for both loops."""

    arrivals: dict[int, list[Request]] = field(default_factory=dict)
    cancels: dict[int, list[tuple[int, tuple[int, ...]]]] = field(default_factory=dict)

    @property
    def cancelled(self) -> set[int]:
        return {request_id for cancels in self.cancels.values() for request_id, _ in cancels}


def make_traffic(seed: int) -> Traffic:
    rng = random.Random(seed)
    traffic = Traffic()
    for request_id in range(1, 13):
        turn = rng.randint(0, 25)
        traffic.arrivals.setdefault(turn, []).append(make_request(request_id, rng))
        if rng.random() < 0.3:
            choices = rng.choice(((), (0,), (1,)))
            traffic.cancels.setdefault(turn + rng.randint(1, 12), []).append((request_id, choices))
    return traffic


def make_request(request_id: int, rng: random.Random) -> Request:
    tokens = [7] * rng.choice((0, 8)) + [rng.randrange(20, 100) for _ in range(rng.randint(1, 40))]
    sampling = SamplingParams(
        max_tokens=rng.randint(1, 30),
        temperature=rng.choice((0.0, 0.9, 3.0)),
        top_p=rng.choice((1.0, 0.9)),
        repetition_penalty=rng.choice((1.0, 1.3)),
        presence_penalty=rng.choice((0.0, 0.7)),
        min_tokens=rng.choice((0, 5)),
        stop_token_ids=tuple(rng.sample(range(100), rng.choice((0, 12)))),
        logprobs=rng.choice((None, 2)),
        seed=rng.getrandbits(64),
    )
    hashes = hash_blocks(tokens, BLOCK, SEED)
    choices = tuple(range(rng.choice((1, 1, 2, 3))))
    return Request(request_id, tokens, len(tokens), sampling, choices, rng.randint(0, 1), SEED, hashes)


@dataclass
class Answers:
    tokens: dict[tuple[int, int], list[int]] = field(default_factory=dict)
    logprobs: dict[tuple[int, int], list[float]] = field(default_factory=dict)
    reasons: dict[tuple[int, int], object] = field(default_factory=dict)
    num_preempted: int = 0
    num_rows: int = 0

    def take(self, report: StepReport) -> None:
        assert not report.failed
        columns = report.tokens
        for row, key in enumerate(zip(columns.handles, columns.choices, strict=True)):
            logprob = columns.logprobs[row] if columns.logprobs is not None else None
            assert key not in self.reasons, "a token after the end"
            self.tokens.setdefault(key, []).append(columns.token_ids[row])
            self.logprobs.setdefault(key, []).append(logprob.logprob if logprob is not None else 0.0)
        self.reasons.update({(finish.handle, finish.choice): finish.reason for finish in report.finished})


def serve(engine: Engine, traffic: Traffic, *, overlap: bool) -> Answers:
    pool = BlockPool(NUM_BLOCKS, epoch=1)
    scheduler = DecodeScheduler(
        pool,
        block_size=BLOCK,
        max_num_seqs=MAX_SEQS,
        max_num_batched_tokens=24,
        stop=StopRule(frozenset({3}), MAX_LEN),
    )
    compute = ComputeThread(engine.runner)
    worker = DecodeWorker(compute if overlap else engine.runner, scheduler, pool, block_bytes=1, block_tokens=BLOCK)
    answers = Answers()
    ahead: LaunchedStep | None = None
    for turn in range(1000):
        for request in traffic.arrivals.get(turn, ()):
            worker.submit_local(request, f"request {request.id}")
        for request_id, choices in traffic.cancels.get(turn, ()):
            worker.drop(request_id, choices)
        step = ahead or worker.launch()
        ahead = worker.launch() if overlap and step is not None else None
        report = worker.finish(step)
        answers.num_rows += step is not None and len(step.plan.decode)
        answers.take(report)
        pool.check_integrity()
        if turn > 40 and step is None and not report.load.num_waiting:
            break
    compute.close()
    ledger = pool.ledger()
    assert ledger.free + ledger.cached == ledger.total, "something is still held"
    answers.num_preempted = scheduler.num_preempted
    return answers


@pytest.fixture(scope="module")
def served(engine: Engine) -> Callable[[int, bool], Answers]:
    """By the seed of the traffic, and whether steps overlap; each is served once."""

    @functools.cache
    def serve_once(seed: int, overlap: bool) -> Answers:
        return serve(engine, make_traffic(seed), overlap=overlap)

    return serve_once


@pytest.mark.parametrize("seed", range(12))
def test_tokens_and_ends_are_those_of_the_plain_loop(served: Callable[[int, bool], Answers], seed: int) -> None:
    plain, overlapped = served(seed, False), served(seed, True)
    cancelled = make_traffic(seed).cancelled
    for key in plain.tokens.keys() | overlapped.tokens.keys():
        mine, theirs = overlapped.tokens.get(key, []), plain.tokens.get(key, [])
        if key[0] in cancelled:
            common = min(len(mine), len(theirs))
            assert mine[:common] == theirs[:common]
        else:
            assert mine == theirs
            assert overlapped.reasons[key] == plain.reasons[key]
            # Chunks end elsewhere, and preempted sequences are computed again from elsewhere: sums in another order.
            assert overlapped.logprobs[key] == pytest.approx(plain.logprobs[key], abs=1e-5)
    assert len(plain.reasons) > 5, "nobody was answered"


def test_the_traffic_preempts_and_stops_early(served: Callable[[int, bool], Answers]) -> None:
    """Else the tests above would show nothing."""
    plain = [served(seed, False) for seed in range(12)]
    overlapped = [served(seed, True) for seed in range(12)]
    assert min(sum(run.num_preempted for run in runs) for runs in (plain, overlapped)) > 10
    assert {reason.name for run in plain for reason in run.reasons.values()} == {"STOP", "LENGTH"}  # type: ignore[attr-defined]
    assert sum(run.num_rows for run in overlapped) > sum(run.num_rows for run in plain), "no row was ever dropped"
