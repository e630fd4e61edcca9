"""Which workers there are, as Redis tells it: each says again and again that it lives, and Redis forgets the silent.

How long a registration lasts is said relative to its arrival, so no clock of a worker or gateway is compared with
another's. Registrations are signed with the cluster's secret: whoever can write to Redis cannot make a gateway, which
presents that secret, call an address of his choice.
"""

import hashlib
import hmac
import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from enum import IntEnum

from tailrace.index.keys import VERSION, KeySpace, Life
from tailrace.index.redis_client import Command, RedisClient, ScriptCall
from tailrace.index.scripts import FENCED, IS_FULL, LEAVE, REGISTER, WAS_MISSING
from tailrace.index.trouble import RedisTroubleError

log = logging.getLogger(__name__)

TTL_S = 6.0
"""A worker that says nothing for so long is gone."""
BEAT_S = 2.0
MAX_WORKERS = 4096
MAX_BYTES = 4096
"""Of one registration."""
MAX_ENDLESS = 1 << 63


@dataclass(frozen=True, slots=True)
class Registration:
    """What a worker says of itself."""

    worker_id: str
    epoch: int
    edition: int
    """Of its entries: see `Life`."""
    role: str
    address: str
    """host:port of its gRPC server."""
    model_digest: str
    num_blocks: int
    sequence: int
    """Number of its next event."""

    @property
    def life(self) -> Life:
        return Life(self.worker_id, self.epoch, self.edition)

    def signed(self, secret: bytes) -> bytes:
        """As it stands in Redis."""
        said = asdict(self)
        return json.dumps({**said, "signature": _signature(said, secret)}).encode()

    @classmethod
    def read(cls, value: bytes, secret: bytes) -> "Registration":
        """Raises ValueError for what no worker of this cluster wrote."""
        if len(value) > MAX_BYTES:
            raise ValueError(f"{len(value)} bytes, more than {MAX_BYTES}")
        said = json.loads(value)
        if not isinstance(said, dict):
            raise ValueError("not an object")
        signature = said.pop("signature", "")
        if not hmac.compare_digest(str(signature).encode(), _signature(said, secret).encode()):
            raise ValueError("signed with another secret, or changed")
        if said.keys() != {field.name for field in fields(cls)}:
            raise ValueError(f"fields {', '.join(sorted(said))}")
        for name in ("epoch", "edition", "num_blocks", "sequence"):
            if type(said[name]) is not int or not 0 <= said[name] < MAX_ENDLESS:
                raise ValueError(f"{name}: {said[name]!r}")
        return cls(**said)


def _signature(said: Mapping[str, object], secret: bytes) -> str:
    text = "tailrace registration v1\0" + json.dumps(said, sort_keys=True)
    return hmac.new(secret, text.encode(), hashlib.sha256).hexdigest()


class Standing(IntEnum):
    """What became of a registration."""

    RENEWED = 1
    NEW = 2
    """Redis did not have it: this is the first, or Redis has forgotten what it had."""


async def check_version(client: RedisClient, keys: KeySpace) -> None:
    """Raises RedisTroubleError, naming it, where another version's keys are."""
    _check_version(await client.one("GET", keys.version), client, keys)


def _check_version(found: bytes | None, client: RedisClient, keys: KeySpace) -> None:
    if found is not None and found != VERSION:
        name, told = keys.version.decode(), found[:32].decode(errors="replace")
        raise RedisTroubleError(
            f"Redis at {client.url.address}: {name} says {told!r}, and this Tailrace keeps key space version "
            f"{VERSION.decode()}: run one version, or set another redis_namespace"
        )


class Registry:
    """Who is registered. Event loop only."""

    def __init__(self, client: RedisClient, keys: KeySpace, secret: bytes) -> None:
        self._client, self._keys, self._secret = client, keys, secret
        self._names: list[str] = []
        self.by_mark: dict[bytes, str] = {}
        """Worker ids by the mark of their entries: whose mark is not here, is nobody's."""
        self.workers: dict[str, Registration] = {}
        self.num_refused = 0
        """Registrations last read that are not ours: of another cluster, or no registrations at all."""

    # -- being there --------------------------------------------------------------------------------------------------

    def beat_commands(self, registration: Registration) -> list[Command | ScriptCall]:
        """What says that a worker lives; `standing` reads the answers."""
        keys = (self._keys.names, self._keys.worker(registration.worker_id))
        said = registration.signed(self._secret)
        args = (registration.worker_id.encode(), registration.epoch, said, _ms(TTL_S), MAX_WORKERS)
        return [*self._claim(), ScriptCall(REGISTER, keys, args)]

    def standing(self, registration: Registration, answers: list[object]) -> Standing:
        """Of the answers to `beat_commands`. Raises RedisTroubleError when the worker is refused."""
        _, version, number = answers
        _check_version(version if isinstance(version, bytes) else None, self._client, self._keys)
        who = f"Redis at {self._client.url.address}: {registration.worker_id}"
        if number == FENCED:
            raise RedisTroubleError(f"{who} is registered by a newer process; give one of them another worker_id")
        if number == IS_FULL:
            raise RedisTroubleError(f"{who} is one too many: {MAX_WORKERS} workers are registered")
        return Standing.NEW if number == WAS_MISSING else Standing.RENEWED

    async def beat(self, registration: Registration) -> Standing:
        """Raises RedisTroubleError."""
        return self.standing(registration, await self._client.all(self.beat_commands(registration)))

    async def leave(self, registration: Registration) -> None:
        """Its entries are nobody's from now on. Raises RedisTroubleError."""
        keys = (self._keys.names, self._keys.worker(registration.worker_id))
        await self._client.all([ScriptCall(LEAVE, keys, (registration.worker_id.encode(), registration.epoch))])

    def _claim(self) -> list[Command]:
        return [("SET", self._keys.version, VERSION, "NX"), ("GET", self._keys.version)]

    # -- looking ------------------------------------------------------------------------------------------------------

    async def visit(self, gateway_id: str) -> None:
        """`read`, and a write: a gateway wants to know whether workers can write. Raises RedisTroubleError."""
        sign: Command = ("SET", self._keys.gateway(gateway_id), b"", "PX", _ms(TTL_S))
        _, version, _, *rest = await self._client.all([*self._claim(), sign, *self.read_commands()])
        _check_version(version, self._client, self._keys)
        await self.take(rest)

    async def read(self) -> None:
        """Raises RedisTroubleError."""
        await self.take(await self._client.all(self.read_commands()))

    def read_commands(self) -> list[Command]:
        """One round trip for the names and the registrations of those known before."""
        commands: list[Command] = [("SMEMBERS", self._keys.names)]
        if self._names:
            commands.append(("MGET", *map(self._keys.worker, self._names)))
        return commands

    async def take(self, answers: list[object]) -> None:
        """The answers to `read_commands`. Raises RedisTroubleError."""
        known, found = self._names, answers[1] if len(answers) > 1 else []
        values = dict(zip(known, found if isinstance(found, list) else [], strict=False))
        names = _readable(answers[0] if isinstance(answers[0], Iterable) else [])
        if newcomers := [name for name in names if name not in values]:
            told = await self._client.one("MGET", *map(self._keys.worker, newcomers))
            values.update(zip(newcomers, told, strict=True))
        self._names = names
        self._settle({name: values[name] for name in names if values[name] is not None})

    def _settle(self, values: Mapping[str, bytes]) -> None:
        before, workers = self.num_refused, {}
        reasons: list[str] = []
        for name, value in values.items():
            try:
                registration = Registration.read(value, self._secret)
                if registration.worker_id != name:
                    raise ValueError(f"of {registration.worker_id}")
                workers[name] = registration
            except (ValueError, TypeError, KeyError) as error:
                reasons.append(f"{name}: {error}")
        self.workers, self.num_refused = workers, len(reasons)
        self.by_mark = {registration.life.mark: name for name, registration in workers.items()}
        if len(reasons) > before:
            log.warning("registrations in Redis are not of this cluster: %s", "; ".join(reasons[:4]))


def _readable(names: Iterable[object]) -> list[str]:
    """At most as many as may be registered; the rest is not ours."""
    texts = sorted(name.decode(errors="replace") for name in names if isinstance(name, bytes))
    return texts[:MAX_WORKERS]


def _ms(seconds: float) -> int:
    return int(seconds * 1000)
