import pytest

from tailrace.cores import Machine, Share, available_cores, cpu_quota, divide, excess_threads, thread_environment


@pytest.mark.parametrize(
    ("cores", "workers", "shares"),
    [
        ((0, 1), 2, [Share(1, (0,)), Share(1, (1,))]),
        ((4, 5, 6, 7, 8), 2, [Share(3, (4, 5, 6)), Share(2, (7, 8))]),
        ((0, 1), 3, [Share(1), Share(1), Share(1)]),
        ((7,), 1, [Share(1, (7,))]),
        ((0, 1, 2, 3), 1, [Share(4, (0, 1, 2, 3))]),
    ],
)
def test_shares_are_even_or_everybody_may_use_all(cores, workers, shares):
    assert divide(Machine(cores), workers) == shares


def test_fewer_threads_than_cores_leave_room_in_the_share():
    assert divide(Machine((0, 1, 2, 3)), 2, threads=1) == [Share(1, (0, 1)), Share(1, (2, 3))]


def test_more_threads_than_cores_of_a_share_float():
    assert divide(Machine((0, 1)), 2, threads=2) == [Share(2), Share(2)]
    assert divide(Machine((0, 1, 2)), 2, threads=2) == [Share(2), Share(2)]


def test_pinning_can_be_turned_off():
    assert divide(Machine((0, 1)), 2, pin=False) == [Share(1), Share(1)]


@pytest.mark.parametrize(("quota", "usable"), [(None, 8), (3.9, 3), (0.5, 1), (100.0, 8)])
def test_a_quota_counts_like_cores(quota, usable):
    assert Machine(tuple(range(8)), quota).num_usable == usable


def test_with_a_quota_nobody_is_kept_to_cores_that_others_may_have_as_well():
    assert divide(Machine(tuple(range(8)), 4.0), 2) == [Share(2), Share(2)]
    assert divide(Machine(tuple(range(8)), 8.0), 2)[1] == Share(4, (4, 5, 6, 7))


def test_threads_beyond_the_cores_are_counted():
    machine = Machine((0, 1))
    assert excess_threads(machine, divide(machine, 2)) == 0
    assert excess_threads(machine, divide(machine, 2, threads=2)) == 2
    assert excess_threads(machine, divide(machine, 3)) == 1


def test_every_library_that_computes_is_told_how_many_threads():
    environment = thread_environment(3)
    assert {environment[f"{name}_NUM_THREADS"] for name in ("OMP", "MKL", "OPENBLAS")} == {"3"}
    assert environment["OMP_WAIT_POLICY"] == "PASSIVE"


def test_this_machine_has_cores():
    assert available_cores()


def group(root, name, **files):
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    for file, text in files.items():
        (folder / file.replace("_", ".", 1)).write_text(f"{text}\n")


def membership(tmp_path, *lines):
    path = tmp_path / "membership"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_the_least_of_our_groups_and_those_above_counts(tmp_path):
    root = tmp_path / "cgroup"
    group(root, "a", cpu_max="400000 100000")
    group(root, "a/b", cpu_max="max 100000")
    group(root, "other", cpu_max="100000 100000")
    assert cpu_quota(membership(tmp_path, "0::/a/b"), root) == 4.0


def test_in_a_container_the_root_of_what_is_mounted_is_ours(tmp_path):
    group(tmp_path / "cgroup", ".", cpu_max="150000 100000")
    assert cpu_quota(membership(tmp_path, "0::/docker/0123"), tmp_path / "cgroup") == 1.5


def test_the_first_version_has_a_file_for_each_number(tmp_path):
    root = tmp_path / "cgroup"
    group(root, "cpu,cpuacct/pod", cpu_cfs_quota_us="250000", cpu_cfs_period_us="100000")
    group(root, "memory/pod", cpu_max="1 100000")
    assert cpu_quota(membership(tmp_path, "4:memory:/pod", "2:cpu,cpuacct:/pod", "0::/"), root) == 2.5


@pytest.mark.parametrize("text", ["max 100000", "-1 100000", "100000 0", "nonsense", ""])
def test_no_limit_is_none(tmp_path, text):
    group(tmp_path / "cgroup", ".", cpu_max=text)
    assert cpu_quota(membership(tmp_path, "0::/"), tmp_path / "cgroup") is None


def test_no_control_groups_no_quota(tmp_path):
    assert cpu_quota(tmp_path / "missing", tmp_path) is None
