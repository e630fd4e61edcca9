"""One Redis, or a Redis Cluster, behind the few calls that this room makes. The Redis library is imported on opening.

Nothing here tries again: whoever calls knows whether that is worth it, and has a backoff.
"""

import asyncio
import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from tailrace.index.redis_url import RedisUrl
from tailrace.index.scripts import Script
from tailrace.index.trouble import RedisTroubleError, explain

if TYPE_CHECKING:
    from redis.asyncio import Redis, RedisCluster
    from redis.asyncio.cluster import ClusterNode

TIMEOUT_S = 1.5
"""For a connection, and for an answer: slower is as good as away."""
BLOCK_SHARE = 0.6
"""A read of a stream waits for so much of TIMEOUT_S: a Redis that answers nothing at all is noticed."""
MAX_CONNECTIONS = 32
"""To one node."""

Command = Sequence[bytes | str | int]
Node: TypeAlias = "ClusterNode | None"
"""None: a single Redis."""


class ScriptCall:
    """A script as a command: by its hash first, by its text where Redis does not know it."""

    def __init__(self, script: Script, keys: Sequence[bytes], args: Sequence[bytes | int]) -> None:
        self._script, self._rest = script, (len(keys), *keys, *args)

    @property
    def by_hash(self) -> Command:
        return ("EVALSHA", self._script.sha, *self._rest)

    @property
    def by_text(self) -> Command:
        return ("EVAL", self._script.source, *self._rest)


class RedisClient:
    """Event loop only. Every call raises RedisTroubleError where Redis does not do what it was asked."""

    def __init__(self, url: RedisUrl, *, timeout_s: float = TIMEOUT_S) -> None:
        self.url = url
        self.timeout_s = timeout_s
        self._redis: Redis | RedisCluster | None = None
        self._node = url.nodes[0]
        """That is asked: the one named, or whom the Sentinels named last."""
        self.is_cluster = False

    def __repr__(self) -> str:
        return f"<RedisClient {self.url.address}{' cluster' if self.is_cluster else ''}>"

    # -- life ---------------------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Connects to the first node that answers, and finds out whether it is one of a Cluster. Idempotent."""
        if self._redis is not None:
            return
        troubles: list[str] = []
        for host, port in [await self._ask_sentinels()] if self.url.service else self.url.nodes:
            try:
                with self._explained(f"{host}:{port}"):
                    self._redis = await self._connect(host, port)
                self._node = host, port
                return
            except RedisTroubleError as error:
                troubles.append(error.message)
        raise RedisTroubleError("; ".join(dict.fromkeys(troubles)))

    async def _ask_sentinels(self) -> tuple[str, int]:
        """Where the master is now. Whoever loses it closes this client and opens it again, which asks anew."""
        from redis.asyncio import sentinel

        make: Any = sentinel.Sentinel
        account = {"username": self.url.sentinel_username or None, "password": self.url.sentinel_password or None}
        with self._explained(self.url.address):
            sentinels = make(self.url.nodes, sentinel_kwargs={**self._options(), **account})
            try:
                host, port = await sentinels.discover_master(self.url.service)
                return host, port
            finally:
                await sentinels.aclose()

    async def close(self) -> None:
        """Whatever comes next connects anew."""
        redis, self._redis = self._redis, None
        if redis is not None:
            with contextlib.suppress(OSError):
                await redis.aclose()

    async def _connect(self, host: str, port: int) -> "Redis | RedisCluster":
        from redis.asyncio import Redis, RedisCluster

        options = self._options()
        redis: Any = Redis(host=host, port=port, db=self.url.db, **options)
        try:
            told = await redis.execute_command("HELLO")
        except BaseException:
            await redis.aclose()
            raise
        self.is_cluster = b"cluster" in (told.values() if isinstance(told, dict) else told)
        if not self.is_cluster:
            return cast("Redis", redis)
        await redis.aclose()
        if self.url.db:
            raise RedisTroubleError(
                f"Redis at {self.url.address}: a Cluster has no databases; leave /{self.url.db} out"
            )
        cluster = RedisCluster(host=host, port=port, **{**options, "max_connections": MAX_CONNECTIONS})
        try:
            return await cluster.initialize()
        except BaseException:
            await cluster.aclose()
            raise

    def _options(self) -> dict[str, Any]:
        from redis.asyncio.retry import Retry
        from redis.backoff import NoBackoff

        options: dict[str, Any] = {
            "username": self.url.username or None,
            "password": self.url.password or None,
            "socket_timeout": self.timeout_s,
            "socket_connect_timeout": self.timeout_s,
            "retry": Retry(NoBackoff(), 0),
            "protocol": 2,
            "max_connections": MAX_CONNECTIONS,
        }
        if self.url.tls:
            tls = dict(self.url.tls_options)
            if "ssl_check_hostname" in tls or tls.get("ssl_cert_reqs") == "none":
                checks = tls.get("ssl_check_hostname", "false") == "true"
                options["ssl_check_hostname"] = checks
            options.update({name: value for name, value in tls.items() if name != "ssl_check_hostname"}, ssl=True)
        return options

    @property
    def library(self) -> Any:
        """The library's own client, for a benchmark that compares with it. Raises RedisTroubleError before `open`."""
        return self._opened()

    @contextlib.contextmanager
    def blocking(self) -> Iterator[Any]:
        """The library's client that is no coroutine, likewise."""
        from redis import Redis, RedisCluster
        from redis.backoff import NoBackoff
        from redis.retry import Retry

        host, port = self._node
        options = {**self._options(), "retry": Retry(NoBackoff(), 0)}
        library: Any = (
            RedisCluster(host=host, port=port, **options)
            if self.is_cluster
            else Redis(host=host, port=port, db=self.url.db, **options)
        )
        with contextlib.closing(library):
            yield library

    def _opened(self) -> "Redis | RedisCluster":
        if self._redis is None:
            raise RedisTroubleError(f"Redis at {self.url.address}: not connected")
        return self._redis

    @contextlib.contextmanager
    def _explained(self, address: str) -> Iterator[None]:
        """The library's errors as ours; and a cancellation, which its pipelines were seen to swallow, is one again."""
        from redis.exceptions import RedisError

        num_before = _num_cancellations()
        try:
            yield
        except (RedisError, OSError, TimeoutError) as error:
            if _num_cancellations() > num_before:
                raise asyncio.CancelledError from error
            raise explain(error, address) from error
        if _num_cancellations() > num_before:
            raise asyncio.CancelledError

    # -- asking -------------------------------------------------------------------------------------------------------

    async def one(self, *command: bytes | str | int) -> Any:
        """The answer to one command."""
        with self._explained(self.url.address):
            return await self._opened().execute_command(*command)

    async def all(self, commands: Sequence[Command | ScriptCall], nodes: Sequence[Node] = ()) -> list[Any]:
        """The answers to all commands, in one round trip to each node that has a part of them.

        A script that a node does not know (it has just started) is sent to it once more, as text. Raises for the first
        command that failed; the others have been carried out. `nodes`: whom to ask each command, in less time.
        """
        from redis.exceptions import NoScriptError

        answers = await self._ask(
            [command.by_hash if isinstance(command, ScriptCall) else command for command in commands], nodes
        )
        unknown = [place for place, answer in enumerate(answers) if isinstance(answer, NoScriptError)]
        if unknown:
            calls = [cast(ScriptCall, commands[place]).by_text for place in unknown]
            again = await self._ask(calls, [nodes[place] for place in unknown] if nodes else ())
            for place, answer in zip(unknown, again, strict=True):
                answers[place] = answer
        for answer in answers:
            if isinstance(answer, Exception):
                raise explain(answer, self.url.address) from answer
        return answers

    async def _ask(self, commands: Sequence[Command], nodes: Sequence[Node]) -> list[Any]:
        with self._explained(self.url.address):
            return await (self._direct(commands, nodes) if nodes else self._pipeline(commands))

    async def _pipeline(self, commands: Sequence[Command]) -> list[Any]:
        redis: Any = self._opened()
        pipeline = redis.pipeline(transaction=None if self.is_cluster else False)
        for command in commands:
            pipeline.execute_command(*command)
        answers: list[Any] = await pipeline.execute(raise_on_error=False)
        return answers

    async def _direct(self, commands: Sequence[Command], nodes: Sequence[Node]) -> list[Any]:
        """Straight over a connection each of the library's pools, all sent before any is waited for.

        Packed by hiredis: the library's own packing costs as much as all the rest.
        """
        import hiredis

        pool: Any = None if self.is_cluster else cast("Redis", self._opened()).connection_pool
        connections: list[Any] = []
        try:
            for command, node in zip(commands, nodes, strict=True):
                connections.append(await pool.get_connection() if node is None else node.acquire_connection())
                await connections[-1].send_packed_command(hiredis.pack_command(cast(Any, tuple(command))))
            return [await _answer(connection) for connection in connections]
        except BaseException:
            # An answer that nobody has read would be taken for that to another command.
            for connection in connections:
                await connection.disconnect(nowait=True)
            raise
        finally:
            for connection, node in zip(connections, nodes, strict=False):
                if node is None:
                    await pool.release(connection)
                else:
                    node.release(connection)

    def owners(self, slots: Sequence[int]) -> list[Node]:
        """Of each slot of a Cluster, the node that has it, as far as is known."""
        known = cast("RedisCluster", self._opened()).nodes_manager.slots_cache
        try:
            return [known[slot][0] for slot in slots]
        except (KeyError, IndexError):
            raise RedisTroubleError(f"Redis at {self.url.address}: not every slot has a node") from None


async def _answer(connection: Any) -> Any:
    from redis.exceptions import ResponseError

    try:
        return await connection.read_response()
    except ResponseError as refusal:
        return refusal


def _num_cancellations() -> int:
    """Of the current task, that nobody has taken back."""
    task = asyncio.current_task()
    return task.cancelling() if task is not None else 0
