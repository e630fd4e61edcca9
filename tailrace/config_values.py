"""What single settings may be: sizes, addresses, secrets, files. Each refuses what is wrong with a ValueError."""

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr
from pydantic_settings import NoDecode

from tailrace.index.redis_url import RedisUrl

MIN_SECRET_BYTES = 16
BLOCK_SIZES = (16, 32, 64, 128)
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", re.IGNORECASE)
_ADDRESS = re.compile(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9_.-]+):(\d{1,5})")


def parse_bytes(value: object) -> object:
    """Bytes of "1GiB", "512MiB", "2GB" or "1048576"; what is not a string is returned as it is."""
    if not isinstance(value, str):
        return value
    match = _SIZE.fullmatch(value.strip())
    if match is None:
        raise ValueError("must be a number of bytes, or one with a unit like 512MiB or 1GiB")
    number, unit, binary = match.groups()
    exponent = " KMGT".index(unit.upper()) if unit else 0
    return int(float(number) * (1024 if binary else 1000) ** exponent)


def _split(value: object) -> object:
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value


def _block_size(value: int) -> int:
    if value not in BLOCK_SIZES:
        raise ValueError(f"must be one of {', '.join(map(str, BLOCK_SIZES))}")
    return value


def _device(value: str) -> str:
    if value.startswith("cuda:"):
        raise ValueError("must be cuda: a worker uses one GPU, the first that it sees; CUDA_VISIBLE_DEVICES says which")
    if value not in ("auto", "cpu", "cuda"):
        raise ValueError("must be auto, cpu or cuda")
    return value


def _address(value: str) -> str:
    match = _ADDRESS.fullmatch(value)
    if match is None or not 0 < int(match[2]) < 65536:
        raise ValueError("must be host:port")
    return value


def _secret(value: SecretStr) -> SecretStr:
    if 0 < len(value.get_secret_value().encode()) < MIN_SECRET_BYTES:
        raise ValueError(f"must have at least {MIN_SECRET_BYTES} bytes")
    return value


def _redis(value: SecretStr) -> SecretStr:
    if text := value.get_secret_value():
        RedisUrl.parse(text)
    return value


def _readable_file(value: Path) -> Path:
    if not value.is_file():
        raise ValueError("no such file")
    return value


Address = Annotated[str, AfterValidator(_address)]
Addresses = Annotated[tuple[Address, ...], NoDecode, BeforeValidator(_split)]
Names = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)]
Secrets = Annotated[tuple[SecretStr, ...], NoDecode, BeforeValidator(_split)]
Port = Annotated[int, Field(ge=0, le=65535)]
NumBytes = Annotated[int, BeforeValidator(parse_bytes), Field(ge=1 << 20, le=1 << 46)]
IndexBytes = Annotated[int, BeforeValidator(parse_bytes), Field(ge=16 << 20, le=64 << 30)]
File = Annotated[Path, AfterValidator(_readable_file)]
Transport = Literal["auto", "nixl", "stream"]
RoutingPolicy = Literal["cost", "round-robin", "least-loaded", "prefix"]
BlockSize = Annotated[int, AfterValidator(_block_size)]
Device = Annotated[str, AfterValidator(_device)]
Secret = Annotated[SecretStr, AfterValidator(_secret)]
RedisSecret = Annotated[SecretStr, AfterValidator(_redis)]
