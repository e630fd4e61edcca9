"""The life of a process of the cluster: its start, its epoch, what ends it, and its last goodbye."""

import asyncio
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn, TypeVar

from setproctitle import setproctitle

from tailrace.config import KvStoreConfig, WorkerConfig
from tailrace.errors import ConfigError, TailraceError
from tailrace.rpc.options import PEER_LOSS_S
from tailrace.telemetry.log import configure_logging
from tailrace.types import Role

log = logging.getLogger(__name__)
C = TypeVar("C", WorkerConfig, KvStoreConfig)


def run_process(role: Role, kind: type[C], work: Callable[[C], Coroutine[Any, Any, None]]) -> NoReturn:
    """A `main()`: from the configuration to the last goodbye.

    `work` is called before there is an event loop, and what it returns runs on one. An error of ours is a line on
    stderr; exit code 2 says that it will be the same the next time, 1 that it may not.
    """
    setproctitle(f"tailrace {role}")
    config = kind.or_exit()
    configure_logging(
        role=role, worker_id=config.worker_id, level=config.log_level, style=config.log_format, secrets=config.hidden
    )
    try:
        asyncio.run(work(config))
    except TailraceError as error:
        print(f"tailrace {role}: {error.message}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, ConfigError) else 1) from None
    leave()


def new_epoch() -> int:
    """Eighths of a second since late 2023: fits 32 bits for 17 years, and no worker starts twice in one."""
    return max(1, int((time.time() - 1_700_000_000) * 8) & 0xFFFFFFFF)


async def until_told(parent_pid: int | None) -> None:
    """Returns at SIGTERM or SIGINT, or when the process that started us is gone."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    while not stop.is_set():
        try:
            async with asyncio.timeout(PEER_LOSS_S if parent_pid else None):
                await stop.wait()
        except TimeoutError:
            if parent_pid is not None and os.getppid() != parent_pid:
                log.warning("the process that started this one is gone; stopping")
                return


def leave() -> NoReturn:
    """Everything is closed. What is left, torch's and UCX's own farewell, takes seconds and helps nobody."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
