"""A worker's whole transfer side: owner and needer, and the one NIXL agent that they share."""

import asyncio

from tailrace.errors import TransferError
from tailrace.transfer.lend import Owner
from tailrace.transfer.memory import PoolMemory
from tailrace.transfer.nixl import start_nixl
from tailrace.transfer.nixl_driver import NixlDriver
from tailrace.transfer.options import TransferOptions
from tailrace.transfer.pull import Needer


class TransferPlane:
    """`owner` lends this pool, `needer` reads others into it. Made by `open_transfer` on the loop that uses it."""

    def __init__(self, owner: Owner, needer: Needer, nixl: NixlDriver | None) -> None:
        self.owner = owner
        self.needer = needer
        self._nixl = nixl

    async def close(self) -> bool:
        """Whether nothing is in flight any more, so that the pool may be unmapped. Idempotent."""
        await self.needer.close()
        await self.owner.close()
        return await asyncio.to_thread(self._nixl.close) if self._nixl else True


async def open_transfer(memory: PoolMemory, options: TransferOptions) -> TransferPlane:
    """Start what the options ask for and this machine can do.

    Raises TransferError when nixl is demanded and cannot start, ConfigError for a port or a file that cannot be used.
    """
    nixl, why_not = await _start_nixl(memory, options)
    owner = Owner(memory, options, nixl)
    try:
        await owner.start()
    except BaseException:
        if nixl:
            nixl.close()
        raise
    return TransferPlane(owner, Needer(memory, options, nixl, why_not), nixl)


async def _start_nixl(memory: PoolMemory, options: TransferOptions) -> tuple[NixlDriver | None, str]:
    if options.preference == "stream":
        return None, "the options ask for a stream"
    try:
        return await asyncio.to_thread(start_nixl, memory, options), ""
    except TransferError as error:
        if options.preference == "nixl":
            raise
        return None, error.message
