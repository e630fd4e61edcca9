"""Where Redis is, and how to get in. Needs no Redis library: a configuration is checked before anything is opened."""

from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import ParseResult, parse_qsl, unquote, urlparse

MAX_NODES = 16
DEFAULT_PORT = 6379
_FILES = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
_CHOICES = {"ssl_check_hostname": ("true", "false"), "ssl_cert_reqs": ("required", "none")}


@dataclass(frozen=True, slots=True)
class RedisUrl:
    """`redis[s]://[user:password@]host[:port][,host[:port]...][/db][?ssl_ca_certs=FILE&...]`

    Several hosts are nodes of one Redis Cluster: the first that answers tells of the others.
    """

    nodes: tuple[tuple[str, int], ...]
    tls: bool = False
    db: int = 0
    username: str = ""
    password: str = field(default="", repr=False)
    tls_options: tuple[tuple[str, str], ...] = ()

    @classmethod
    def parse(cls, text: str) -> "RedisUrl":
        """Raises ValueError, which never repeats the URL: it may hold a password."""
        try:
            url = urlparse(text)
            if url.scheme not in ("redis", "rediss"):
                raise ValueError("must begin with redis:// or rediss://")
            user, _, hosts = url.netloc.rpartition("@")
            username, colon, password = user.partition(":")
            return cls(
                nodes=_nodes(hosts),
                tls=url.scheme == "rediss",
                db=_db(url.path),
                username=unquote(username),
                password=unquote(password) if colon else "",
                tls_options=_tls_options(url),
            )
        except UnicodeError:
            raise ValueError("must be redis://[user:password@]host:port[/db]") from None

    @property
    def address(self) -> str:
        """For logs: without credentials."""
        return ",".join(f"{host}:{port}" for host, port in self.nodes)


def _nodes(hosts: str) -> tuple[tuple[str, int], ...]:
    names = hosts.split(",")
    if len(names) > MAX_NODES:
        raise ValueError(f"names {len(names)} nodes; at most {MAX_NODES}")
    return tuple(_node(name) for name in names)


def _node(name: str) -> tuple[str, int]:
    host, port = name, ""
    if not name.endswith("]") and ":" in name:
        host, _, port = name.rpartition(":")
    if not host or (":" in host and not host.startswith("[")):
        raise ValueError("must name a host, as in redis://127.0.0.1:6379")
    if port and not (port.isdecimal() and 0 < int(port) < 65536):
        raise ValueError("the port must be a number from 1 to 65535")
    return host.strip("[]"), int(port or DEFAULT_PORT)


def _db(path: str) -> int:
    number = path.strip("/")
    if number and not (number.isdecimal() and int(number) < 65536):
        raise ValueError("the path must be the number of a database, as in redis://127.0.0.1:6379/0")
    return int(number or 0)


def _tls_options(url: ParseResult) -> tuple[tuple[str, str], ...]:
    options = tuple(parse_qsl(url.query, keep_blank_values=True))
    if options and url.scheme != "rediss":
        raise ValueError(f"option {options[0][0]} is for rediss:// only")
    for name, value in options:
        if name in _FILES and not Path(value).is_file():
            raise ValueError(f"option {name}: no such file")
        if name in _CHOICES and value not in _CHOICES[name]:
            raise ValueError(f"option {name} must be {' or '.join(_CHOICES[name])}")
        if name not in _FILES and name not in _CHOICES:
            raise ValueError(f"unknown option {name}; known are {', '.join((*_FILES, *_CHOICES))}")
    return options
