"""Where Redis is, and how to get in. Needs no Redis library: a configuration is checked before anything is opened."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import ParseResult, parse_qsl, unquote, urlparse

MAX_NODES = 16
DEFAULT_PORT = 6379
SENTINEL_PORT = 26379
_SENTINEL = "+sentinel"
_FILES = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
_CHOICES = {"ssl_check_hostname": ("true", "false"), "ssl_cert_reqs": ("required", "none")}
_SENTINEL_OPTIONS = ("sentinel_username", "sentinel_password")
_SERVICE = re.compile(r"[A-Za-z0-9_.-]{1,128}")


@dataclass(frozen=True, slots=True)
class RedisUrl:
    """`redis[s]://[user:password@]host[:port][,host[:port]...][/db][?ssl_ca_certs=FILE&...]`

    Several hosts are nodes of one Redis Cluster: the first that answers tells of the others.

    `redis[s]+sentinel://[user:password@]host[:port][,host[:port]...]/service[/db][?sentinel_password=...&...]`

    The hosts are Sentinels, which say where the service's master is. User and password are the master's.
    """

    nodes: tuple[tuple[str, int], ...]
    tls: bool = False
    db: int = 0
    username: str = ""
    password: str = field(default="", repr=False)
    tls_options: tuple[tuple[str, str], ...] = ()
    service: str = ""
    """Which of the Sentinels' masters; empty: no Sentinels."""
    sentinel_username: str = ""
    sentinel_password: str = field(default="", repr=False)

    @classmethod
    def parse(cls, text: str) -> "RedisUrl":
        """Raises ValueError, which never repeats the URL: it may hold a password."""
        try:
            url = urlparse(text)
            scheme = url.scheme.removesuffix(_SENTINEL)
            if scheme not in ("redis", "rediss"):
                raise ValueError("must begin with redis:// or rediss://, or with redis+sentinel:// for Sentinels")
            service, path = _service(url.path) if url.scheme != scheme else ("", url.path)
            options = dict(_options(url, tls=scheme == "rediss", sentinel=bool(service)))
            user, _, hosts = url.netloc.rpartition("@")
            username, colon, password = user.partition(":")
            return cls(
                nodes=_nodes(hosts, SENTINEL_PORT if service else DEFAULT_PORT),
                tls=scheme == "rediss",
                db=_db(path),
                username=unquote(username),
                password=unquote(password) if colon else "",
                tls_options=tuple(item for item in options.items() if item[0] not in _SENTINEL_OPTIONS),
                service=service,
                sentinel_username=options.get("sentinel_username", ""),
                sentinel_password=options.get("sentinel_password", ""),
            )
        except UnicodeError:
            raise ValueError("must be redis://[user:password@]host:port[/db]") from None

    @property
    def address(self) -> str:
        """For logs: without credentials."""
        hosts = ",".join(f"{host}:{port}" for host, port in self.nodes)
        return f"{hosts}/{self.service}" if self.service else hosts


def _service(path: str) -> tuple[str, str]:
    """The service's name, and the rest of the path."""
    service, _, rest = path.strip("/").partition("/")
    if not _SERVICE.fullmatch(service):
        raise ValueError("must name the service that the Sentinels watch, as in redis+sentinel://10.0.0.5/mymaster")
    return service, rest


def _nodes(hosts: str, default_port: int) -> tuple[tuple[str, int], ...]:
    names = hosts.split(",")
    if len(names) > MAX_NODES:
        raise ValueError(f"names {len(names)} nodes; at most {MAX_NODES}")
    return tuple(_node(name, default_port) for name in names)


def _node(name: str, default_port: int) -> tuple[str, int]:
    host, port = name, ""
    if not name.endswith("]") and ":" in name:
        host, _, port = name.rpartition(":")
    if not host or (":" in host and not host.startswith("[")):
        raise ValueError("must name a host, as in redis://127.0.0.1:6379")
    if port and not (port.isdecimal() and 0 < int(port) < 65536):
        raise ValueError("the port must be a number from 1 to 65535")
    return host.strip("[]"), int(port or default_port)


def _db(path: str) -> int:
    number = path.strip("/")
    if number and not (number.isdecimal() and int(number) < 65536):
        raise ValueError("the path must be the number of a database, as in redis://127.0.0.1:6379/0")
    return int(number or 0)


def _options(url: ParseResult, *, tls: bool, sentinel: bool) -> tuple[tuple[str, str], ...]:
    options = tuple(parse_qsl(url.query, keep_blank_values=True))
    known = (*((*_FILES, *_CHOICES) if tls else ()), *(_SENTINEL_OPTIONS if sentinel else ()))
    for name, value in options:
        if name not in known and name in (*_FILES, *_CHOICES):
            raise ValueError(f"option {name} is for rediss:// only")
        if name not in known:
            raise ValueError(f"unknown option {name}; known are {', '.join(known) or 'none'}")
        if name in _FILES and not Path(value).is_file():
            raise ValueError(f"option {name}: no such file")
        if name in _CHOICES and value not in _CHOICES[name]:
            raise ValueError(f"option {name} must be {' or '.join(_CHOICES[name])}")
    return options
