"""`tailrace store`: what a running store keeps, for whom, and what it must not give up."""

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from tailrace.config import CommonConfig
from tailrace.config_values import parse_bytes
from tailrace.errors import ConfigError
from tailrace.kv.hashing import HASH_BYTES, chain_seed, hash_blocks, tenant_name
from tailrace.kv.layout import KVLayout
from tailrace.messages import StoreUsage

if TYPE_CHECKING:
    from tailrace.rpc.client import Peer

T = TypeVar("T")
_HASH = re.compile(rf"[0-9a-fA-F]{{{2 * HASH_BYTES}}}")

store_app = typer.Typer(no_args_is_help=True, help="A running store: what it keeps, pins and quotas (TAILRACE_SECRET).")

Address = Annotated[str, typer.Option(help="host:port of the store's gRPC server.")]
Owner = Annotated[str, typer.Option(help="A name for these pins; a block stays until each of its owners unpins it.")]
Hashes = Annotated[list[str] | None, typer.Argument(help="Block hashes, in hex.", metavar="[HASH]...")]
Tokens = Annotated[
    Path | None, typer.Option(help="Instead of hashes: a JSON list of token ids, whose full blocks are meant.")
]
Salt = Annotated[str, typer.Option(help="The cache salt of the requests that the token ids are of.")]
Tenant = Annotated[str | None, typer.Option(help="The tenant's name; '' for requests without a salt.")]
Size = Annotated[str | None, typer.Option(help="Like 512MiB; not given: as much as there is.")]


@store_app.command()
def usage(address: Address, as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False) -> None:
    """Say what the store keeps, and for whom."""
    found = _ask(address, lambda peer: peer.store_usage())
    print(json.dumps(_described(found)) if as_json else _table(found))


@store_app.command()
def pin(address: Address, owner: Owner, hashes: Hashes = None, tokens: Tokens = None, salt: Salt = "") -> None:
    """Keep blocks that are in the store, whatever comes, until it restarts. All of those named, or none."""

    async def run(peer: "Peer") -> tuple[int, int]:
        names = await _names(peer, hashes, tokens, salt)
        return len(names), await peer.pin(owner, names)

    number, total = _ask(address, run)
    print(f"{number} blocks pinned by {owner}; {total} are pinned in all")


@store_app.command()
def unpin(address: Address, owner: Owner, hashes: Hashes = None, tokens: Tokens = None, salt: Salt = "") -> None:
    """Let go of blocks; without any named, of all that the owner has pinned."""

    async def run(peer: "Peer") -> int:
        wanted = await _names(peer, hashes, tokens, salt) if hashes or tokens else ()
        return await peer.unpin(owner, wanted)

    print(f"{_ask(address, run)} blocks unpinned by {owner}")


@store_app.command()
def quota(
    address: Address,
    tenant: Tenant = None,
    salt: Annotated[str | None, typer.Option(help="Instead of --tenant: the cache salt itself.")] = None,
    memory: Size = None,
    disk: Size = None,
) -> None:
    """Bound what a tenant's blocks take, until the store restarts.

    A tenant's name, which `usage` shows, is a digest of the cache salt of its requests: `printf %s SALT | b2sum -l 64`.
    """
    if (tenant is None) == (salt is None):
        raise ConfigError("name the tenant by --tenant or by --salt, not by both", param="tenant")
    sizes = _size("memory", memory), _size("disk", disk)
    name = tenant_name(salt) if salt is not None else tenant or ""
    _ask(address, lambda peer: peer.set_quota(name, *sizes))
    print(f"{_titled(name)}: memory {memory or 'unbounded'}, disk {disk or 'unbounded'}")


def _titled(tenant: str) -> str:
    return f"tenant {tenant!r}" if tenant else "requests without a salt"


def _ask(address: str, call: "Callable[[Peer], Awaitable[T]]") -> T:
    from tailrace.rpc.client import Peer

    async def run() -> T:
        peer = Peer(address, CommonConfig().secret.get_secret_value().encode())
        try:
            return await call(peer)
        finally:
            await peer.close()

    return asyncio.run(run())


async def _names(peer: "Peer", hashes: Sequence[str] | None, tokens: Path | None, salt: str) -> list[bytes]:
    """Raises ConfigError for what names no block."""
    if bool(hashes) == (tokens is not None):
        raise ConfigError("name blocks by their hashes or by --tokens, not by both", param="hashes")
    if tokens is not None:
        return _chain_of(tokens, (await peer.store_usage()).layout, salt)
    if wrong := [text for text in hashes or () if not _HASH.fullmatch(text)]:
        raise ConfigError(f"hashes: {wrong[0]!r} is not {2 * HASH_BYTES} hexadecimal digits", param="hashes")
    return [bytes.fromhex(text) for text in hashes or ()]


def _chain_of(path: Path, layout: KVLayout, salt: str) -> list[bytes]:
    try:
        ids = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(ids, list) or not all(type(each) is int for each in ids):
            raise ValueError("not a list of token ids")
        names = hash_blocks(ids, layout.block_size, chain_seed(layout.fingerprint, "", salt))
    except (OSError, ValueError) as error:
        raise ConfigError(f"tokens: {path}: {error}", param="tokens") from None
    if not names:
        raise ConfigError(f"tokens: {path}: {len(ids)} fill no block of {layout.block_size}", param="tokens")
    return names


def _size(name: str, text: str | None) -> int | None:
    try:
        size = parse_bytes(text)
    except ValueError as error:
        raise ConfigError(f"{name}: {error}, got {text!r}", param=name) from None
    return size if isinstance(size, int) else None


def _described(found: StoreUsage) -> dict[str, object]:
    return {
        "block_bytes": found.layout.block_bytes,
        "memory": asdict(found.memory),
        "disk": None if found.disk is None else asdict(found.disk),
        "disk_trouble": found.disk_trouble,
        "tenants": [asdict(each) for each in found.tenants],
        "pinned": found.pinned,
        "pin_limit": found.pin_limit,
    }


def _table(found: StoreUsage) -> str:
    lines = [f"blocks of {found.layout.block_bytes} bytes"]
    for name, tier in (("memory", found.memory), ("disk", found.disk)):
        if tier is not None:
            lines.append(f"{name}: " + ", ".join(f"{number} {state}" for state, number in asdict(tier).items()))
    if found.disk_trouble:
        lines.append(f"disk: {found.disk_trouble}")
    lines.append(f"pins: {sum(found.pinned.values())} of {len(found.pinned)} owners; at most {found.pin_limit} blocks")
    lines += [f"  {owner}: {number}" for owner, number in found.pinned.items()]
    for each in found.tenants:
        memory, disk = (f" of {bound}" if bound is not None else "" for bound in (each.memory_quota, each.disk_quota))
        lines.append(
            f"{_titled(each.tenant)}: {each.memory_blocks}{memory} in memory, {each.disk_blocks}{disk} on disk"
        )
    return "\n".join(lines)
