"""docs/failure-matrix.md names tests that there are, one at least for each fault."""

import ast
import re
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
ROW = re.compile(r"^\| (?!fault |---)(.+) \|$", re.MULTILINE)
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def names_in(path):
    tree = ast.parse((REPOSITORY / path).read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


def test_every_fault_has_a_test_and_every_test_is_there():
    rows = ROW.findall((REPOSITORY / "docs/failure-matrix.md").read_text())
    assert len(rows) > 30
    for row in rows:
        fault, *_, named = row.split(" | ")
        found = NAMED.findall(named)
        assert found, f"{fault}: no test is named"
        assert NAMED.sub("", named).strip(", ") == "", f"{fault}: {named}"
        for path, name in found:
            assert name in names_in(path), f"{fault}: {path} has no {name}"
