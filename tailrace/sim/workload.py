"""What a simulation is run on: requests with the names of their prompts' blocks. Read from a trace, or generated."""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO

from tailrace.errors import InvalidRequestError
from tailrace.kv.hashing import HASH_BYTES
from tailrace.sim.profile import HardwareProfile

MAX_REQUESTS = 5_000_000
MAX_TOKENS = 10_000_000
MAX_TIMESTAMP_MS = 1e12
MAX_LINE_BYTES = 1 << 24
MAX_BLOCK_ID = (1 << 64) - 1
GZIP = b"\x1f\x8b"


class WorkloadError(InvalidRequestError):
    """A trace that cannot be simulated; `param` names the field."""


@dataclass(frozen=True, slots=True)
class SimRequest:
    arrival_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    hashes: tuple[bytes, ...]
    """One a block of the prompt, chained: equal hashes mean equal prefixes. A partial last block may have one."""
    answer_hashes: tuple[bytes, ...] = ()
    """Of the full blocks after the prompt's full ones, once the answer is written. A trace does not name them."""

    def full_hashes(self, block_tokens: int) -> tuple[bytes, ...]:
        """Of the prompt's full blocks: a worker finds no other."""
        return self.hashes[: self.num_prompt_tokens // block_tokens]


@dataclass(frozen=True, slots=True)
class Workload:
    requests: Sequence[SimRequest]
    """At least one, in the order of arrival."""
    block_tokens: int

    @property
    def duration_s(self) -> float:
        return self.requests[-1].arrival_s - self.requests[0].arrival_s

    @property
    def num_prompt_tokens(self) -> int:
        return sum(request.num_prompt_tokens for request in self.requests)

    def at_load(self, load: float, num_workers: int, profile: HardwareProfile) -> "Workload":
        """Arrivals moved closer or apart until the prefill seconds of all prompts, with no cache, are `load` of the
        workers' time. One instant of arrivals has no duration to stretch, and stays."""
        if not self.duration_s:
            return self
        offered_s = sum(profile.prefill_s(0, request.num_prompt_tokens) for request in self.requests)
        factor = offered_s / (num_workers * load) / self.duration_s
        begin = self.requests[0].arrival_s
        moved = [replace(request, arrival_s=(request.arrival_s - begin) * factor) for request in self.requests]
        return Workload(moved, self.block_tokens)

    def with_blocks_of(self, block_tokens: int) -> "Workload":
        """The same prefixes shared in blocks that are smaller, and prompts that are as much shorter. Raises
        WorkloadError for larger blocks."""
        if not 1 <= block_tokens <= self.block_tokens:
            raise WorkloadError(f"block_tokens: must be from 1 to {self.block_tokens}, got {block_tokens}")
        scaled = []
        for request in self.requests:
            full, rest = divmod(request.num_prompt_tokens, self.block_tokens)
            tokens = full * block_tokens + rest * block_tokens // self.block_tokens
            scaled.append(replace(request, num_prompt_tokens=max(1, tokens)))
        return Workload(scaled, block_tokens)

    def oracle_hit_rate(self, *, answers: bool = False) -> float:
        """Share of prompt tokens that `oracle_hits` finds."""
        return sum(self.oracle_hits(answers=answers)) / self.num_prompt_tokens

    def oracle_hits(self, *, answers: bool = False) -> Iterator[int]:
        """Tokens of each prompt that one infinite cache would have, each prompt being there the moment it has arrived,
        with `answers` its answer too. As in workers, full blocks are found, and at least one token is computed."""
        seen: set[bytes] = set()
        for request in self.requests:
            most = (request.num_prompt_tokens - 1) // self.block_tokens
            yield (
                next((i for i, name in enumerate(request.hashes[:most]) if name not in seen), most) * self.block_tokens
            )
            seen.update(request.full_hashes(self.block_tokens))
            if answers:
                seen.update(request.answer_hashes)


def read_trace(path: Path, block_tokens: int = 512) -> Workload:
    """A trace in Mooncake's format: a JSON object a line, with `timestamp` (ms), `input_length`, `output_length` and
    `hash_ids`, one a block of the prompt. Raises WorkloadError, which names the line and the field."""
    try:
        with path.open("rb") as file:
            requests = [_parse(line, number, block_tokens) for number, line in _numbered(file)]
    except OSError as error:
        raise WorkloadError(f"trace {path}: {error}", param="trace") from None
    if not requests:
        raise WorkloadError(f"trace {path}: no requests in it", param="trace")
    return Workload(sorted(requests, key=lambda request: request.arrival_s), block_tokens)


def block_name(number: int) -> bytes:
    """A block's hash from its number in a trace: spread over all bits, as the product's are."""
    return blake2b(number.to_bytes(8, "little"), digest_size=HASH_BYTES).digest()


def _numbered(file: BinaryIO) -> Iterable[tuple[int, bytes]]:
    for number, line in enumerate(iter(partial(file.readline, MAX_LINE_BYTES + 1), b""), start=1):
        if number > MAX_REQUESTS:
            raise WorkloadError(f"trace line {number}: at most {MAX_REQUESTS} requests", param="trace")
        if len(line) > MAX_LINE_BYTES:
            raise WorkloadError(f"trace line {number}: at most {MAX_LINE_BYTES} bytes", param="trace")
        if line.startswith(GZIP):
            raise WorkloadError(f"trace line {number}: compressed by gzip; unpack it first", param="trace")
        if line.strip():
            yield number, line


def _parse(line: bytes, number: int, block_tokens: int) -> SimRequest:
    try:
        record = json.loads(line.decode())
    except (ValueError, RecursionError) as error:
        # ValueError: no JSON, no UTF-8, or an integer of thousands of digits.
        raise WorkloadError(f"trace line {number}: not JSON: {error}", param="trace") from None
    if not isinstance(record, dict):
        raise WorkloadError(f"trace line {number}: must be a JSON object", param="trace")
    prompt = _whole(record, "input_length", number, 1, MAX_TOKENS)
    ids = _field(record, "hash_ids", number)
    whole, most = prompt // block_tokens, math.ceil(prompt / block_tokens)
    if not isinstance(ids, list) or not whole <= len(ids) <= most:
        got = f"{len(ids)}" if isinstance(ids, list) else repr(ids)
        rule = f"must be a list of {most} ids ({prompt} tokens in blocks of {block_tokens})"
        raise _bad(number, "hash_ids", rule, got)
    for value in ids:
        if type(value) is not int or not 0 <= value <= MAX_BLOCK_ID:
            raise _bad(number, "hash_ids", f"must be integers from 0 to {MAX_BLOCK_ID}", repr(value))
    return SimRequest(
        # Less than a nanosecond between two arrivals could not be stretched by any load.
        arrival_s=round(_milliseconds(record, number) / 1e3, 9),
        num_prompt_tokens=prompt,
        num_output_tokens=_whole(record, "output_length", number, 0, MAX_TOKENS),
        hashes=tuple(map(block_name, ids)),
    )


def _milliseconds(record: dict[str, Any], number: int) -> float:
    value = _field(record, "timestamp", number)
    if type(value) not in (int, float) or not 0 <= value <= MAX_TIMESTAMP_MS:
        raise _bad(number, "timestamp", f"must be milliseconds from 0 to {MAX_TIMESTAMP_MS:g}", repr(value))
    return float(value)


def _whole(record: dict[str, Any], name: str, number: int, least: int, most: int) -> int:
    value = _field(record, name, number)
    if type(value) is not int or not least <= value <= most:
        raise _bad(number, name, f"must be an integer from {least} to {most}", repr(value))
    return value


def _field(record: dict[str, Any], name: str, number: int) -> Any:
    if name not in record:
        raise _bad(number, name, "is missing", "")
    return record[name]


def _bad(number: int, name: str, rule: str, got: str) -> WorkloadError:
    return WorkloadError(f"trace line {number}: {name} {rule}{f', got {got[:80]}' if got else ''}", param=name)
