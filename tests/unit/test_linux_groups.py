"""Control groups: what is written to one and read from one, over files that stand for Linux's."""

from pathlib import Path

import pytest

from nexus.abi import QosClass
from nexus.kernel.linux.groups import COMMON_SPARE, Group, Groups, Spent, Taken, delegated, usable

FILES = {
    "cgroup.procs": "",
    "memory.current": "5000000\n",
    "memory.max": "max\n",
    "memory.peak": "7000000\n",
    "memory.events": "low 0\nhigh 0\nmax 12\noom 1\noom_kill 0\noom_group_kill 0\n",
    "cpu.weight": "100\n",
    "cpu.max": "90000 100000\n",
    "cpu.stat": "usage_usec 1500\nuser_usec 1000\nsystem_usec 500\nnr_periods 9\nnr_throttled 3\n",
    "pids.events": "max 2\n",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        _ = (tmp_path / name).write_text(text)
    return tmp_path


def test_a_group_is_bounded_from_what_its_service_has_taken_by_then(folder: Path) -> None:
    group = Group(folder)

    group.bound(64)

    assert (folder / "memory.max").read_text().startswith(str(5_000_000 + COMMON_SPARE + 64))


def test_a_share_is_that_part_of_one_cpu_in_each_period(folder: Path) -> None:
    group = Group(folder)

    group.bound(64)
    assert (folder / "cpu.max").read_text() == "90000 100000\n"
    group.bound(64, share=150)

    assert (folder / "cpu.max").read_text().startswith("150000 100000")


def test_what_a_service_was_made_to_wait_and_refused_is_read_from_its_group(folder: Path) -> None:
    group = Group(folder)

    assert (group.spent(), group.refusals()) == (Spent(usage=1500, throttled=3), 2)


def test_a_group_shares_its_cpu_by_the_class_of_its_service(folder: Path) -> None:
    group = Group(folder)

    group.weigh(QosClass.INTERACTIVE)

    assert (folder / "cpu.weight").read_text().strip() == "300"


def test_a_group_is_told_a_class_that_it_has_not_got_alone(folder: Path) -> None:
    group = Group(folder)
    (folder / "cpu.weight").unlink()

    group.weigh(QosClass.NORMAL)

    with pytest.raises(FileNotFoundError):
        group.weigh(QosClass.IDLE)


def test_what_a_service_had_is_read_from_its_group(folder: Path) -> None:
    _ = (folder / "memory.max").write_text("7000000\n")
    _ = (folder / "memory.events").write_text("oom 1\noom_kill 1\noom_group_kill 1\n")

    group = Group(folder)
    assert (group.kills(), group.taken()) == (1, Taken(7_000_000, 7_000_000, 1))


def test_an_unbounded_group_has_no_total(folder: Path) -> None:
    assert Group(folder).taken() == Taken(7_000_000, None, 0)


def test_used_and_free_of_a_report_are_its_total() -> None:
    fields = Taken(peak=90, total=100, kills=1).fields("demo.faulty")

    assert fields == {
        "account": "memory of demo.faulty",
        "heap_budget_used": 90,
        "heap_budget_free": 10,
        "heap_budget_total": 100,
        "size": "unknown",
        "align": "unknown",
    }


def test_a_peak_over_the_bound_leaves_nothing_free() -> None:
    fields = Taken(peak=110, total=100, kills=1).fields("demo.faulty")

    assert (fields["heap_budget_used"], fields["heap_budget_free"]) == (100, 0)


def a_tree(folder: Path) -> Path:
    """A delegated group with two processes in it."""
    for name, text in {
        "cgroup.type": "domain\n",
        "cgroup.controllers": "cpu memory pids\n",
        "cgroup.subtree_control": "",
        "cgroup.procs": "7\n12\n",
        "init/cgroup.procs": "",
        "nexus/cgroup.subtree_control": "",
    }.items():
        (folder / name).parent.mkdir(exist_ok=True)
        _ = (folder / name).write_text(text)
    return folder


def test_who_is_in_a_delegated_group_goes_into_one_beside_those_of_the_services(
    tmp_path: Path,
) -> None:
    tree = a_tree(tmp_path)

    Groups(tree).begin()

    assert (tree / "init/cgroup.procs").read_text() == "12"  # of a file, the last one written
    assert (tree / "cgroup.subtree_control").read_text() == "+memory +pids +cpu"


def test_in_the_root_of_the_whole_tree_everybody_stays(tmp_path: Path) -> None:
    tree = a_tree(tmp_path)
    (tree / "cgroup.type").unlink()

    Groups(tree).begin()

    assert (tree / "init/cgroup.procs").read_text() == ""


def test_a_group_is_ours_where_somebody_has_named_it(tmp_path: Path) -> None:
    tree = a_tree(tmp_path)

    assert delegated({}) is None
    assert delegated({"NEXUS_CGROUP": str(tree)}) == tree


def test_a_named_group_that_is_of_no_use_is_refused_and_nothing_takes_its_place(
    tmp_path: Path,
) -> None:
    tree = a_tree(tmp_path)
    _ = (tree / "cgroup.controllers").write_text("cpu pids\n")

    with pytest.raises(OSError, match=r"NEXUS_CGROUP=.*: no memory controller at "):
        _ = delegated({"NEXUS_CGROUP": str(tree)})
    with pytest.raises(OSError, match="NEXUS_CGROUP=own: no cgroup v2 at "):
        _ = delegated({"NEXUS_CGROUP": "own"}, tmp_path / "nowhere")


def test_a_tree_without_a_controller_is_of_no_use(tmp_path: Path) -> None:
    _ = (tmp_path / "cgroup.controllers").write_text("cpu io pids\n")

    assert usable(tmp_path) == f"no memory controller at {tmp_path}"


def test_a_folder_that_is_no_tree_is_of_no_use(tmp_path: Path) -> None:
    assert usable(tmp_path).startswith(f"no cgroup v2 at {tmp_path}: ")


def test_without_a_part_of_the_tree_no_service_has_a_group() -> None:
    groups = Groups(None)

    groups.begin()

    assert groups.make("policyd", 1, tasks=1, room=1) is None
    groups.end()
