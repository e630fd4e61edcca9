"""Configuration: the one file that reads the environment (`TAILRACE_*`), and the one place of every bound.

Sources, strongest first: keyword arguments (the command line), the environment, one TOML file (`TAILRACE_CONFIG`).
The file's keys are the field names below, for all roles together; each role takes those that it knows. A name that no
role knows is refused, with the nearest known one. A configuration never changes after it is made; what is found out
at run time (the number of blocks, the port that the kernel chose) lives elsewhere.
"""

import difflib
import os
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from tailrace.config_values import (
    Address,
    Addresses,
    BlockSize,
    Device,
    File,
    IndexBytes,
    Names,
    NumBytes,
    Port,
    RedisSecret,
    RoutingPolicy,
    Secret,
    Secrets,
    Transport,
)
from tailrace.cores import this_machine
from tailrace.errors import ConfigError
from tailrace.index.redis_url import RedisUrl

PREFIX = "TAILRACE_"
CONFIG_FILE_VARIABLE = "TAILRACE_CONFIG"
DEFAULT_MODEL = "smollm2-135m-instruct"
_LOOPBACK = ("127.", "localhost", "::1", "[::1]")


class CommonConfig(BaseSettings):
    """What every role has. Raises ConfigError, whose `param` names the field."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, frozen=True, extra="forbid", env_ignore_empty=True, use_attribute_docstrings=True
    )

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["auto", "text", "json"] = "auto"
    """auto: text; in colour on a terminal."""
    secret: Secret = SecretStr("")
    """Shared by the gateway and the workers of one cluster. Empty: none, which is allowed on the loopback interface
    only, and with which no KV moves between workers."""
    cache_dir: Path | None = None
    """Where fetched and converted models are kept; None: tailrace in the user's cache directory."""
    parent_pid: int | None = Field(default=None, ge=1)
    """End when this process is gone."""
    redis: RedisSecret = SecretStr("")
    """redis:// or rediss:// URL of the Redis or Redis Cluster that gateways and workers share, or redis+sentinel:// URL
    of the Sentinels that know it; empty: none (docs/redis.md)."""
    redis_namespace: str = Field(default="tailrace", pattern=r"^[A-Za-z0-9_.-]{1,32}$")
    """What the names of our keys begin with: clusters that share a Redis take different ones."""

    def __init__(self, **values: Any) -> None:
        refuse_unknown_variables(os.environ)
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise _readable(error) from None

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, _FileSource(settings_cls)

    @classmethod
    def or_exit(cls, **values: Any) -> Self:
        """Like the constructor, for a `main()`: a wrong setting is one line on stderr and exit code 2."""
        try:
            return cls(**values)
        except ConfigError as error:
            print(f"tailrace: {error.message}", file=sys.stderr)
            raise SystemExit(2) from None

    @property
    def redis_url(self) -> RedisUrl | None:
        return RedisUrl.parse(text) if (text := self.redis.get_secret_value()) else None

    @property
    def hidden(self) -> tuple[str, ...]:
        """What no log may show."""
        url = self.redis_url
        passwords = (url.password, url.sentinel_password) if url else ()
        return (self.secret.get_secret_value(), self.redis.get_secret_value(), *filter(None, passwords))

    def to_environment(self) -> dict[str, str]:
        """The variables with which a child process makes an equal configuration. Holds secrets: never log it."""
        values = {name: getattr(self, name) for name in type(self).model_fields}
        defaults = {name: field.default for name, field in type(self).model_fields.items()}
        return {f"{PREFIX}{name.upper()}": _to_text(value) for name, value in values.items() if value != defaults[name]}


class ModelConfigFields(CommonConfig):
    """Which model is served, and under which names."""

    model: str = Field(default=DEFAULT_MODEL, min_length=1, max_length=1024)
    """A directory, a built-in name, or org/name on the Hugging Face hub."""
    revision: str | None = Field(default=None, max_length=256)
    served_model_name: Names = Field(default=(), max_length=16)
    """Names that requests may use; empty: the name of the model."""
    max_model_len: int | None = Field(default=None, ge=16, le=10_000_000)
    """Tokens of prompt and output together; None: what the model was made for."""

    @property
    def model_names(self) -> tuple[str, ...]:
        return self.served_model_name or (self.model,)


class EngineFields(ModelConfigFields):
    """What a prefill and a decode worker need alike, and `tailrace up` passes on to them."""

    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    quantization: Literal["none", "int8"] = "none"
    """int8: the matrices of the layers and the head are rounded to 8 bits as they load, and on a CPU multiplied in 8
    bits: faster, and a little less exact (docs/adr/0012-int8-weights.md). All workers of a cluster must agree."""
    load_format: Literal["auto", "safetensors", "dummy"] = "auto"
    device: Device = "auto"
    block_size: BlockSize = 16
    """Tokens a KV block."""
    kv_cache_memory: NumBytes = 1 << 30
    """Bytes of KV blocks a worker keeps ("1GiB")."""
    num_blocks: int | None = Field(default=None, ge=8, le=1 << 31)
    """Overrides kv_cache_memory."""
    max_num_seqs: int = Field(default=64, ge=1, le=4096)
    """Sequences in one batch."""
    max_num_batched_tokens: int = Field(default=512, ge=16, le=1 << 20)
    """Tokens of one engine step; longer prompts are computed in chunks."""
    prefix_caching: bool = True
    threads: int = Field(default=0, ge=0, le=1024)
    """Compute threads a worker; 0: as many as it has cores."""
    native_kernels: bool = True
    """On a CPU, compile kernels for it at first use; false: torch's own operations, several times slower."""
    enforce_eager: bool = False
    """On a GPU, launch each operation of a decode step by itself instead of replaying CUDA graphs."""
    overlap_scheduling: Literal["auto", "on", "off"] = "auto"
    """Schedule a step while the one before it still computes. auto: on a GPU; on a CPU it gains nothing
    (docs/adr/0013-overlapped-steps.md)."""
    transport: Transport = "auto"
    """How KV moves. nixl: refuse pairs where a read is not one-sided; stream: TCP only."""
    net_device: str = Field(default="lo", min_length=1, max_length=256)
    """Interfaces or RDMA devices that NIXL's UCX may use (the meaning of UCX_NET_DEVICES)."""
    tls_cert: File | None = None
    tls_key: File | None = None
    tls_ca: File | None = None

    @model_validator(mode="after")
    def _tls_is_complete(self) -> Self:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key must be given together")
        return self


class WorkerConfig(EngineFields):
    """A prefill or decode worker."""

    worker_id: str = Field(default="", pattern=r"^[A-Za-z0-9_.-]{0,64}$")
    """Empty: the worker draws one."""
    host: str = Field(default="127.0.0.1", min_length=1, max_length=255)
    """Interface of the gRPC server."""
    port: Port = 0
    """0: the kernel chooses."""
    advertise: str = Field(default="", max_length=300)
    """host or host:port that gateways and peers dial; empty: host and the bound port."""
    join: Addresses = ()
    """gRPC addresses of the gateways to join."""
    data_host: str = Field(default="", max_length=255)
    """Interface of the stream transport; empty: host."""
    store: Address | None = None
    """gRPC address of the store on this machine; a worker offers it what it has computed."""
    offer_low_water: float = Field(default=0.1, ge=0, le=0.5)
    """Share of the pool: when fewer blocks are free, those that would be evicted next are offered to the store."""

    @model_validator(mode="after")
    def _secret_where_reachable(self) -> Self:
        _require_secret(self.secret, host=self.host)
        return self

    @property
    def num_threads(self) -> int:
        return self.threads or this_machine().num_usable


class GatewayConfig(ModelConfigFields):
    """The gateway: HTTP for clients, gRPC for clients (Generate) and workers (Join)."""

    host: str = Field(default="127.0.0.1", min_length=1, max_length=255)
    port: Port = 8000
    grpc_host: str = Field(default="127.0.0.1", min_length=1, max_length=255)
    grpc_port: Port = 0
    workers: Addresses = ()
    """gRPC addresses of workers that do not join by themselves."""
    api_key: Secrets = Field(default=(), max_length=1000)
    """Any of these opens the HTTP and gRPC APIs; none: open to everyone who can connect."""
    max_body_bytes: NumBytes = 16 << 20
    max_choices: int = Field(default=128, ge=1, le=4096)
    """Largest `n` of a request."""
    deadline_s: float = Field(default=600.0, gt=0, le=86_400)
    """Of a request that names none."""
    max_concurrent_requests: int = Field(default=1024, ge=1, le=1_000_000)
    routing_policy: RoutingPolicy = "cost"
    """How workers are chosen: by predicted time, or by one of the others to compare with."""
    index_memory: IndexBytes = 512 << 20
    """Bytes of the gateway's prefix index at most: 14 to 18 for each block and worker that holds it. What comes beyond
    is not taken up, and costs hits."""
    index_blocks_per_worker: int = Field(default=1 << 23, ge=1024, le=(1 << 32) - 1)
    """Blocks of one worker in it at most."""

    @model_validator(mode="after")
    def _secret_where_reachable(self) -> Self:
        _require_secret(self.secret, host=self.grpc_host)
        return self


class KvStoreConfig(CommonConfig):
    """A store of KV blocks for the workers of its machine. What a block is, it learns from its file or first offer."""

    worker_id: str = Field(default="", pattern=r"^[A-Za-z0-9_.-]{0,64}$")
    """Empty: the store draws one."""
    host: str = Field(default="127.0.0.1", min_length=1, max_length=255)
    """Interface of the gRPC server."""
    port: Port = 0
    """0: the kernel chooses."""
    advertise: str = Field(default="", max_length=300)
    """host or host:port that peers dial; empty: host and the bound port."""
    join: Addresses = ()
    """gRPC addresses of the gateways to join, once it is known what a block is."""
    data_host: str = Field(default="", max_length=255)
    """Interface of the stream transport; empty: host."""
    transport: Transport = "auto"
    """How KV moves. nixl: refuse pairs where a read is not one-sided; stream: TCP only."""
    net_device: str = Field(default="lo", min_length=1, max_length=256)
    """Interfaces or RDMA devices that NIXL's UCX may use (the meaning of UCX_NET_DEVICES)."""
    tls_cert: File | None = None
    tls_key: File | None = None
    tls_ca: File | None = None
    cpu_memory: NumBytes = 1 << 30
    """Bytes of blocks that are kept in memory ("1GiB")."""
    disk_path: Path | None = None
    """The file of the disk tier, best on NVMe; none: no disk tier. Made at once in its full size."""
    disk_bytes: NumBytes = 8 << 30
    """Size of that file."""
    metrics_port: int | None = Field(default=None, ge=0, le=65535)
    """Prometheus metrics over HTTP on this port of host; none: not served. 0: the kernel chooses."""

    @model_validator(mode="after")
    def _tls_is_complete(self) -> Self:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key must be given together")
        return self

    @model_validator(mode="after")
    def _secret_where_reachable(self) -> Self:
        _require_secret(self.secret, host=self.host)
        return self


class UpConfig(EngineFields):
    """`tailrace up`: one gateway and its workers on this machine."""

    prefill: int = Field(default=1, ge=0, le=64)
    """0: the decode workers prefill by themselves."""
    decode: int = Field(default=1, ge=1, le=64)
    host: str = Field(default="127.0.0.1", min_length=1, max_length=255)
    port: Port = 8000
    api_key: Secrets = Field(default=(), max_length=1000)
    max_body_bytes: NumBytes = 16 << 20
    max_choices: int = Field(default=128, ge=1, le=4096)
    deadline_s: float = Field(default=600.0, gt=0, le=86_400)
    max_concurrent_requests: int = Field(default=1024, ge=1, le=1_000_000)
    routing_policy: RoutingPolicy = "cost"
    """How workers are chosen: by predicted time, or by one of the others to compare with."""
    store_memory: NumBytes | None = None
    """Run a store, too, which keeps computed prompts in so much memory ("2GiB")."""
    store_disk: Path | None = None
    """Run a store, too, which keeps them in this file as well, over a restart; its memory is 1GiB where not given."""
    store_disk_size: NumBytes = 8 << 30
    """Size of that file, which is made at once."""
    index_memory: IndexBytes = 512 << 20
    index_blocks_per_worker: int = Field(default=1 << 23, ge=1024, le=(1 << 32) - 1)
    restart: bool = True
    """Start a dead child again, with growing pauses."""
    pin_cores: bool = True
    """Keep each worker to cores of its own, where there are enough for all compute threads."""

    @property
    def has_store(self) -> bool:
        return self.store_memory is not None or self.store_disk is not None

    def store(self, **values: Any) -> KvStoreConfig:
        sizes = {"disk_path": self.store_disk, "disk_bytes": self.store_disk_size}
        if self.store_memory is not None:
            sizes["cpu_memory"] = self.store_memory
        return KvStoreConfig(**{**_shared(self, KvStoreConfig), "host": "127.0.0.1", "port": 0, **sizes, **values})

    def gateway(self, **values: Any) -> GatewayConfig:
        return GatewayConfig(**{**_shared(self, GatewayConfig), **values})

    def worker(self, **values: Any) -> WorkerConfig:
        """`host` and `port` are the gateway's here, so they are not passed on."""
        return WorkerConfig(**{**_shared(self, WorkerConfig), "host": "127.0.0.1", "port": 0, **values})


def base_environment() -> dict[str, str]:
    """The environment without this product's own variables, to start children from."""
    return {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}


def otlp_protocol() -> str:
    """The protocol over which OpenTelemetry's own variables want spans sent, "grpc" unless they say; empty: none."""
    exporters = os.environ.get("OTEL_TRACES_EXPORTER", "")
    endpoints = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
    if exporters:
        is_wanted = "otlp" in (name.strip() for name in exporters.split(","))
    else:
        is_wanted = any(os.environ.get(name) for name in endpoints)
    if not is_wanted or os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return ""
    protocols = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
    return next((os.environ[name] for name in protocols if os.environ.get(name)), "grpc")


def known_fields() -> frozenset[str]:
    return frozenset(
        name for role in (GatewayConfig, WorkerConfig, KvStoreConfig, UpConfig) for name in role.model_fields
    )


def refuse_unknown_variables(environment: Mapping[str, str]) -> None:
    """Raises ConfigError for a `TAILRACE_*` variable that no role has."""
    known = {f"{PREFIX}{name.upper()}" for name in known_fields()} | {CONFIG_FILE_VARIABLE}
    for name in environment:
        if name.startswith(PREFIX) and name not in known:
            raise ConfigError(f"unknown environment variable {name}{_nearest(name, known)}", param=name)


def read_file(path: Path) -> dict[str, object]:
    """The settings of a TOML file. Raises ConfigError when it cannot be read or has a key that no role knows."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"config file {path}: {error}", param="config") from None
    named = {name.replace("-", "_"): value for name, value in values.items()}
    for name in named:
        if name not in known_fields():
            raise ConfigError(f"config file {path}: unknown key {name}{_nearest(name, known_fields())}", param=name)
    return named


class _FileSource(PydanticBaseSettingsSource):
    """The file that TAILRACE_CONFIG names, if any."""

    def get_field_value(self, field: Any, field_name: str) -> tuple[Any, str, bool]:
        raise NotImplementedError("values are given as a whole by __call__")

    def __call__(self) -> dict[str, Any]:
        path = os.environ.get(CONFIG_FILE_VARIABLE)
        values = read_file(Path(path)) if path else {}
        return {name: value for name, value in values.items() if name in self.settings_cls.model_fields}


def _shared(config: CommonConfig, role: type[CommonConfig]) -> dict[str, object]:
    return {name: getattr(config, name) for name in type(config).model_fields if name in role.model_fields}


def _to_text(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(_to_text(part) for part in value)
    return value.get_secret_value() if isinstance(value, SecretStr) else str(value)


def _nearest(name: str, known: frozenset[str] | set[str]) -> str:
    near = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.0)
    return f"; did you mean {near[0]}?" if near else ""


def _require_secret(secret: SecretStr, host: str) -> None:
    if not secret.get_secret_value() and not host.startswith(_LOOPBACK):
        raise ValueError(f"secret: needed where others can connect ({host}); set {PREFIX}SECRET to the same on all")


def _readable(error: ValidationError) -> ConfigError:
    first = error.errors(include_url=False, include_context=False)[0]
    name = str(first["loc"][0]) if first["loc"] else ""
    message = first["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    message = message.replace("Extra inputs are not permitted", "no such setting")
    if not name:
        return ConfigError(message, param=message.partition(":")[0] if ":" in message else None)
    got = "" if name in ("secret", "api_key", "redis") else f", got {first['input']!r}"
    return ConfigError(f"{name}: {message}{got}", param=name)
