"""Everything here starts real processes."""

from tests.helpers.processes import pytest_runtest_makereport, small_model, smollm2, wide_model

__all__ = ["pytest_runtest_makereport", "small_model", "smollm2", "wide_model"]
