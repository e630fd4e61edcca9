"""Command-line flags made from the fields of a configuration: one place says what an option means and its bounds."""

import inspect
import os
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic import SecretStr
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from tailrace.config import (
    CONFIG_FILE_VARIABLE,
    CommonConfig,
    EngineFields,
    GatewayConfig,
    KvStoreConfig,
    ModelConfigFields,
    UpConfig,
    WorkerConfig,
)

_NOT_FLAGS = frozenset({"secret", "parent_pid"})
"""A secret in a command line can be read by every user of the machine."""
_FLAG_NAMES = {"prefix_caching": "enable-prefix-caching"}
_PANELS: tuple[tuple[type[CommonConfig], str], ...] = (
    (CommonConfig, "Logs, files and Redis"),
    (ModelConfigFields, "Model"),
    (EngineFields, "Engine and transfer"),
    (WorkerConfig, "Worker"),
    (KvStoreConfig, "Store"),
    (GatewayConfig, "Gateway"),
    (UpConfig, "Cluster"),
)
_CONFIG_HELP = f"A TOML file with any of these settings (or {CONFIG_FILE_VARIABLE})."

Settings = Mapping[str, Any]


def with_config(role: type[CommonConfig], command: Callable[[Settings], None]) -> Callable[..., None]:
    """`command` as a function with a parameter for each field of `role`, which typer makes into flags.

    It gets what was given on the command line only, so that the environment and the file fill in the rest.
    """

    def run(**values: Any) -> None:
        if (file := values.pop("config")) is not None:
            os.environ[CONFIG_FILE_VARIABLE] = str(file)
        command({name: value for name, value in values.items() if value is not None and value != []})

    fields = {name: field for name, field in role.model_fields.items() if name not in _NOT_FLAGS}
    parameters = [_parameter(name, _flag(role, name, field)) for name, field in fields.items()]
    parameters.append(_parameter("config", Annotated[Path | None, typer.Option("--config", help=_CONFIG_HELP)]))
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.__doc__ = command.__doc__
    return run


def _parameter(name: str, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _flag(role: type[CommonConfig], name: str, field: FieldInfo) -> Any:
    kebab = _FLAG_NAMES.get(name, name.replace("_", "-"))
    kind = _plain_type(field.annotation)
    is_switch, is_list = kind is bool, get_origin(kind) is tuple
    declaration = f"--{kebab}/--no-{kebab}" if is_switch else f"--{kebab}"
    option = typer.Option(
        declaration,
        help=field.description or "",
        metavar=None if is_switch else _metavar(kind),
        show_default=_default(field),
        rich_help_panel=_panel(role, name),
    )
    value: Any = bool if is_switch else list[str] if is_list else str
    return Annotated[value | None, option]


def _plain_type(annotation: Any) -> Any:
    """`int | None` -> int, `Annotated[int, ...]` -> int."""
    if get_origin(annotation) is Annotated:
        return _plain_type(get_args(annotation)[0])
    if get_origin(annotation) in (types.UnionType, typing.Union):
        return _plain_type(next(part for part in get_args(annotation) if part is not type(None)))
    return annotation


def _metavar(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "|".join(map(str, get_args(kind)))
    if get_origin(kind) is tuple:
        return "TEXT,..."
    return {int: "INTEGER", float: "NUMBER", Path: "PATH"}.get(kind, "TEXT")


def _default(field: FieldInfo) -> str | bool:
    if field.default in (None, "", (), PydanticUndefined, SecretStr("")):
        return False
    if isinstance(field.default, bool):
        return "on" if field.default else "off"
    return str(field.default)


def _panel(role: type[CommonConfig], name: str) -> str:
    return next(panel for kind, panel in _PANELS if issubclass(role, kind) and name in kind.model_fields)
