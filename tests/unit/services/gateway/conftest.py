import pytest

from services.gateway import members as members_module
from services.gateway import watch as watch_module


class Clock:
    """Stands in for the time of both modules."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(members_module, "time", clock)
    monkeypatch.setattr(watch_module, "time", clock)
    return clock
