"""A worker's whole transfer side: owner and needer, and a NIXL agent for each."""

import asyncio
from collections.abc import Sequence

from tailrace.errors import TransferError
from tailrace.transfer.lend import Owner
from tailrace.transfer.memory import PoolMemory
from tailrace.transfer.nixl import start_nixl
from tailrace.transfer.nixl_driver import NixlDriver
from tailrace.transfer.options import TransferOptions
from tailrace.transfer.pull import Needer


class TransferPlane:
    """`owner` lends this pool, `needer` reads others into it. Made by `open_transfer` on the loop that uses it."""

    def __init__(self, owner: Owner, needer: Needer, drivers: Sequence[NixlDriver]) -> None:
        self.owner = owner
        self.needer = needer
        self._drivers = drivers

    async def close(self) -> bool:
        """Whether nothing is in flight any more, so that the pool may be unmapped. Idempotent."""
        await self.needer.close()
        await self.owner.close()
        return all(await asyncio.gather(*(asyncio.to_thread(driver.close) for driver in self._drivers)))


async def open_transfer(memory: PoolMemory, options: TransferOptions) -> TransferPlane:
    """Start what the options ask for and this machine can do.

    Raises TransferError when nixl is demanded and cannot start, ConfigError for a port or a file that cannot be used.
    """
    drivers, why_not = await _start_nixl(memory, options)
    lends, reads = drivers or (None, None)
    owner = Owner(memory, options, lends)
    try:
        await owner.start()
    except BaseException:
        for driver in drivers:
            driver.close()
        raise
    return TransferPlane(owner, Needer(memory, options, reads, why_not), drivers)


async def _start_nixl(memory: PoolMemory, options: TransferOptions) -> tuple[list[NixlDriver], str]:
    """The driver that lends and the one that reads; none, and why."""
    if options.preference == "stream":
        return [], "the options ask for a stream"
    try:
        return await asyncio.to_thread(_start_both, memory, options), ""
    except TransferError as error:
        if options.preference == "nixl":
            raise
        return [], error.message


def _start_both(memory: PoolMemory, options: TransferOptions) -> list[NixlDriver]:
    lends = start_nixl(memory, options, "lends")
    try:
        return [lends, start_nixl(memory, options, "reads")]
    except BaseException:
        lends.close()
        raise
