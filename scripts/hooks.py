"""Rules of this repository that no linter knows: forbidden words, and the sizes of files and functions.

Run by `make check`. A rule names the files where it does not hold, and its reason is printed with every finding.
"""

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("tailrace", "services")
MAX_FILE_LINES = 450
MAX_FUNCTION_LINES = 80


@dataclass(frozen=True, slots=True)
class Rule:
    pattern: re.Pattern[str]
    reason: str
    allowed: tuple[str, ...] = ()


RULES = (
    Rule(re.compile(r"^\s*(import|from) (pickle|cloudpickle|dill)\b"), "pickle runs code of whoever wrote the bytes"),
    Rule(re.compile(r"\btorch\.load\("), "torch.load unpickles; weights are safetensors"),
    Rule(
        re.compile(r"\btime\.sleep\("),
        "wait on an event; only the transfer thread polls, and only while an operation is in flight",
        ("tailrace/transfer/",),
    ),
    Rule(re.compile(r"^\s*except\s*:"), "a bare except also swallows cancellation and exit"),
    Rule(
        re.compile(r"\bos\.(getenv|environ\b.*TAILRACE)"),
        "tailrace/config.py is the only reader of this product's environment",
        ("tailrace/config.py",),
    ),
)


def findings() -> Iterator[str]:
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            if not name.startswith("tailrace/rpc/gen/"):
                text = path.read_text(encoding="utf-8")
                yield from _forbidden(name, text)
                yield from _too_long(name, text)


def _forbidden(name: str, text: str) -> Iterator[str]:
    for number, line in enumerate(text.splitlines(), start=1):
        for rule in RULES:
            if rule.pattern.search(line) and not name.startswith(rule.allowed or ("\0",)):
                yield f"{name}:{number}: {line.strip()}  ({rule.reason})"


def _too_long(name: str, text: str) -> Iterator[str]:
    num_lines = text.count("\n")
    if num_lines > MAX_FILE_LINES:
        yield f"{name}: {num_lines} lines; more than {MAX_FILE_LINES}"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and "/kernels/" not in name:
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                yield f"{name}:{node.lineno}: {node.name} has {length} lines; more than {MAX_FUNCTION_LINES}"


if __name__ == "__main__":
    found = list(findings())
    print("\n".join(found), end="\n" if found else "")
    sys.exit(1 if found else 0)
