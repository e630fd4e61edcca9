import pytest

from tailrace.cli.machine_checks import Verdict, core_finding
from tailrace.config import UpConfig
from tailrace.cores import Machine


def test_cores_that_suffice_pass():
    finding = core_finding(UpConfig(), Machine((0, 1)))
    assert finding.verdict is Verdict.PASS
    assert finding.detail == "2 usable; compute threads of 2 workers: 1, 1"


@pytest.mark.parametrize(("values", "remedy"), [({"threads": 2}, "fewer --threads"), ({"decode": 2}, "fewer workers")])
def test_more_compute_threads_than_cores_are_warned_of_with_a_remedy(values, remedy):
    finding = core_finding(UpConfig(**values), Machine((0, 1)))
    assert finding.verdict is Verdict.WARN
    assert remedy in finding.detail


def test_a_quota_is_named():
    detail = core_finding(UpConfig(), Machine(tuple(range(8)), 2.5)).detail
    assert detail.startswith(
        "2 usable of 8: a control group grants the time of 2.5; compute threads of 2 workers: 1, 1"
    )
