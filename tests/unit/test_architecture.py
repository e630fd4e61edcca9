"""What import-linter cannot see: every package that the product imports is one that it asks for."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
COMES_WITH = {"pydantic-core": "pydantic"}


def declared(*extras):
    lines = list(PROJECT["dependencies"])
    for extra in extras:
        lines += PROJECT["optional-dependencies"][extra]
        lines += [line for other in named(extra) for line in PROJECT["optional-dependencies"][other]]
    return {re.split(r"[~=<>;\[ ]", line)[0].lower().replace("_", "-") for line in lines}


def named(extra):
    """Other extras of this project that an extra asks for."""
    lines = " ".join(PROJECT["optional-dependencies"][extra])
    return [name for names in re.findall(r"tailrace\[([\w,]+)\]", lines) for name in names.split(",")]


def imported_by(*folders):
    """Top-level names of third-party packages."""
    names = set()
    for folder in folders:
        paths = [REPOSITORY / folder] if folder.endswith(".py") else (REPOSITORY / folder).rglob("*.py")
        for path in paths:
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    names |= {alias.name for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                    names.add(node.module)
    tops = {name.partition(".")[0] for name in names}
    return tops - sys.stdlib_module_names - {"tailrace", "services", "torch", "triton"}


def undeclared(names, distributions):
    known = packages_distributions()
    missing = set()
    for name in names:
        owners = {owner.lower().replace("_", "-") for owner in known.get(name, [name])}
        if not {COMES_WITH.get(owner, owner) for owner in owners} & distributions:
            missing.add(name)
    return missing


def test_the_base_has_all_that_the_shared_library_and_the_command_line_import():
    command_line = (path.name for path in (REPOSITORY / "tailrace/cli").glob("*.py"))
    rooms = (
        *(f"cli/{name}" for name in command_line),
        "checkpoint",
        "client",
        "index/memory.py",
        "kv",
        "policy",
        "rpc",
        "telemetry/log.py",
        "telemetry/metrics.py",
        "worker",
        "config.py",
    )
    names = imported_by(*(f"tailrace/{room}" for room in rooms))
    assert "gguf" in names
    assert undeclared(names, declared()) == set()


def test_every_room_that_opens_redis_asks_for_it():
    assert "redis" in imported_by("tailrace/index")
    for extra in ("redis", "gateway", "worker", "kvstore"):
        assert undeclared(imported_by("tailrace/index"), declared(extra)) == set()


def test_the_simulator_draws_with_what_the_plot_extra_has_and_needs_no_more_than_the_base():
    names = imported_by("tailrace/sim")
    assert "matplotlib" in names
    assert undeclared(names, declared("plot")) == set()
    assert undeclared(names - {"matplotlib"}, declared()) == set()


def test_benchmarks_import_what_they_measure_and_no_more():
    names = imported_by("tailrace/cli/bench")
    assert "fastapi" in names
    assert undeclared(names, declared("gateway", "worker")) == set()


def test_the_gateway_extra_has_all_that_the_gateway_imports():
    assert undeclared(imported_by("services/gateway"), declared("gateway")) == set()


def test_the_otlp_extra_has_all_that_tracing_imports():
    names = imported_by("tailrace/telemetry/trace.py")
    assert "opentelemetry" in names
    assert undeclared(names, declared("otlp")) == set()


def test_the_worker_extra_has_all_that_workers_import():
    names = imported_by("services/prefill", "services/decode", "tailrace/engine", "tailrace/transfer")
    assert undeclared(names, declared("worker")) == set()
    assert "torch" in declared("worker")
    assert "torch" not in declared("gateway", "client", "kvstore")
