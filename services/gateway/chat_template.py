"""Chat templates, rendered as transformers renders them, with control tokens that no message can forge.

The model's special tokens are written into the template's own source as aliases with a random part. Only an alias
becomes a control token when the result is tokenized; the same characters inside a message stay text, whatever the
template does with them. So an alias must never reach a client, in an error message for instance.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tailrace.errors import CheckpointError, InvalidRequestError

# What a sandboxed template can raise on messages of a shape that it was not written for.
_TEMPLATE_FAULTS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)
_PROBE = ({"role": "user", "content": "a"},)


class _GenerationBlock(Extension):
    """`{% generation %}` marks what the assistant wrote, for training; here its body is just rendered."""

    tags = {"generation"}  # noqa: RUF012 (the base class has it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML, which a prompt does not want."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _any_of(words: Iterable[str]) -> re.Pattern[str]:
    """Matches any of the words, the longest first; nothing when there are none."""
    return re.compile("|".join(map(re.escape, sorted(words, key=len, reverse=True))) or r"(?!)")


class ChatTemplate:
    def __init__(self, source: str, *, aliases: Mapping[str, str], variables: Mapping[str, str]) -> None:
        """`aliases`: special token -> its alias. `variables`: bos_token and its like, as the template names them.

        Raises CheckpointError when the template does not compile, or builds control tokens out of parts.
        """
        markers = _any_of(aliases)
        self._tokens = {alias: token for token, alias in aliases.items()}
        self._variables = {name: aliases.get(token, token) for name, token in variables.items()}
        try:
            self._template = _environment().from_string(markers.sub(lambda match: aliases[match[0]], source))
        except jinja2.TemplateError as error:
            raise CheckpointError(f"the chat template does not compile: {error}", param="chat_template") from error
        self._check(markers)

    def _check(self, markers: re.Pattern[str]) -> None:
        try:
            text = self.render(_PROBE)
        except InvalidRequestError:
            return  # it wants another conversation than this one
        if match := markers.search(text):
            message = f"the chat template builds the control token {match[0]!r} out of parts, which is not supported"
            raise CheckpointError(message, param="chat_template")

    def render(self, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any] | None = None) -> str:
        """The prompt with aliases for control tokens, ready for the assistant to answer.

        `options`: further variables of the template. Raises InvalidRequestError when the template refuses.
        """
        variables = {**(options or {}), **self._variables, "messages": messages, "add_generation_prompt": True}
        try:
            return self._template.render({"tools": None, "documents": None, **variables})
        except _TEMPLATE_FAULTS as error:
            reason = _any_of(self._tokens).sub(lambda match: self._tokens[match[0]], str(error))
            raise InvalidRequestError(f"the chat template refuses these messages: {reason}", param="messages") from None
