"""How long a process of the cluster lives: its epoch, what ends it, and its last goodbye."""

import asyncio
import logging
import os
import signal
import sys
import time
from typing import NoReturn

from tailrace.rpc.options import PEER_LOSS_S

log = logging.getLogger(__name__)


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
