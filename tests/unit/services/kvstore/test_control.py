"""What a store answers its operator."""

from typing import Any

import pytest

from services.kvstore import control
from services.kvstore.storage import Storage
from tests.helpers.stores import chain_of, make_store, put
from tests.helpers.values import make_layout

NOBODY: Any = None


def test_tenants_with_a_quota_come_first_and_the_others_by_what_they_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "MAX_TENANTS", 3)
    storage = Storage(make_layout(), store := make_store(slots=16), NOBODY, "", NOBODY)
    for number, tenant in enumerate(("one", "two", "three", "four"), start=1):
        put(store, chain_of(tenant, number), tenant)
    control.set_quota(storage, "none yet", 2 * make_layout().block_bytes, None)
    told = control.usage(storage).tenants
    assert [(each.tenant, each.memory_blocks, each.memory_quota) for each in told] == [
        ("none yet", 0, 2),
        ("four", 4, None),
        ("three", 3, None),
    ]
