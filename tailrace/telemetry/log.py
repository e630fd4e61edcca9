"""Logging of a service: one line an event, as text for people or as JSON for machines, with the role and worker id."""

import json
import logging
import sys
import time
from collections.abc import Sequence
from typing import Any, TextIO

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}
_COLOURS = {logging.WARNING: "\x1b[33m", logging.ERROR: "\x1b[31m", logging.CRITICAL: "\x1b[31m"}
_RESET = "\x1b[0m"
_MIN_SECRET = 4
"""Shorter "secrets" would blot out ordinary words."""


def configure_logging(
    *,
    role: str,
    worker_id: str = "",
    level: str = "info",
    style: str = "auto",
    secrets: Sequence[str] = (),
    stream: TextIO | None = None,
) -> None:
    """Send all logging of this process to `stream` (stderr). `style` is auto, text or json; `secrets` never appear."""
    target = stream or sys.stderr
    handler = logging.StreamHandler(target)
    formatter: _Redacting = JsonFormatter(role, worker_id, secrets)
    if style != "json":
        formatter = TextFormatter(role, worker_id, secrets, in_colour=style == "auto" and target.isatty())
    handler.setFormatter(formatter)
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for chatty in ("httpx", "httpcore", "grpc", "asyncio", "redis"):
        logging.getLogger(chatty).setLevel(max(logging.WARNING, logging.getLevelName(level.upper())))


class _Redacting(logging.Formatter):
    def __init__(self, role: str, worker_id: str, secrets: Sequence[str]) -> None:
        super().__init__()
        self.who = worker_id or role
        self.role = role
        self.worker_id = worker_id
        self._secrets = tuple(secret for secret in secrets if len(secret) >= _MIN_SECRET)

    def redact(self, line: str) -> str:
        for secret in self._secrets:
            line = line.replace(secret, "***")
        return line


class TextFormatter(_Redacting):
    """`12:00:01.250 INFO    decode-1 tailrace.transfer.pull: message key=value`"""

    def __init__(self, role: str, worker_id: str, secrets: Sequence[str] = (), *, in_colour: bool = False) -> None:
        super().__init__(role, worker_id, secrets)
        self._colours = _COLOURS if in_colour else {}

    def format(self, record: logging.LogRecord) -> str:
        clock = f"{time.strftime('%H:%M:%S', time.localtime(record.created))}.{int(record.msecs):03d}"
        extra = "".join(f" {name}={value}" for name, value in _extra(record).items())
        line = f"{clock} {record.levelname:<7} {self.who} {record.name}: {record.getMessage()}{extra}"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        colour = self._colours.get(record.levelno, "")
        return self.redact(f"{colour}{line}{_RESET if colour else ''}")


class JsonFormatter(_Redacting):
    """One object a line; what a call passes as `extra` become fields."""

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = {
            "time": record.created,
            "level": record.levelname.lower(),
            "role": self.role,
            "worker": self.worker_id,
            "logger": record.name,
            "message": record.getMessage(),
            **_extra(record),
        }
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return self.redact(json.dumps(fields, default=str))


def _extra(record: logging.LogRecord) -> dict[str, Any]:
    return {name: value for name, value in vars(record).items() if name not in _STANDARD}
