"""What a control group is told before its service is in it, file by file, and how it is ended; over
files that stand for Linux's."""

from pathlib import Path
from typing import Final

import pytest

from nexus.kernel.linux.groups import Group, Groups

FILES: Final = {
    "cgroup.procs": "",
    "cgroup.kill": "",
    "memory.max": "",
    "memory.swap.max": "",
    "memory.oom.group": "",
    "pids.max": "",
    "cpu.max": "",
}
ROOM: Final = 96 * 1024 * 1024


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A part of the tree that is ours, with the files of two groups that are made there. Linux
    makes those with the folder, so `make` finds them and makes none itself."""
    _ = (tmp_path / "cgroup.subtree_control").write_text("")
    for name in ("policyd.3", "policyd.4"):
        folder = tmp_path / "nexus" / name
        folder.mkdir(parents=True)
        for file, text in FILES.items():
            _ = (folder / file).write_text(text)
    _ = (tmp_path / "nexus/cgroup.subtree_control").write_text("")
    return tmp_path


def told(root: Path, name: str = "policyd.3") -> dict[str, str]:
    """What was written to each file of a group, without those that were left alone."""
    texts = {file: (root / "nexus" / name / file).read_text() for file in FILES}
    return {file: text for file, text in texts.items() if text}


def made(root: Path, *, tasks: int = 1, room: int | None = ROOM) -> Group:
    group = Groups(root).make("policyd", 3, tasks=tasks, room=room)
    assert group is not None
    return group


def test_a_group_is_bounded_in_everything_before_its_service_is_in_it(root: Path) -> None:
    _ = made(root)

    assert told(root) == {
        "memory.max": "100663296",
        "memory.swap.max": "0",
        "memory.oom.group": "1",
        "pids.max": "1",
        "cpu.max": "90000 100000",
    }


@pytest.mark.parametrize(("tasks", "share"), [(1, "90000"), (2, "180000"), (9, "810000")])
def test_a_service_may_have_so_many_tasks_and_for_each_most_of_a_cpu(
    tasks: int, share: str, root: Path
) -> None:
    _ = made(root, tasks=tasks)

    assert (told(root)["pids.max"], told(root)["cpu.max"]) == (str(tasks), f"{share} 100000")


def test_our_own_code_is_bounded_later_in_its_memory_and_now_in_all_else(root: Path) -> None:
    _ = made(root, room=None)

    assert told(root).keys() == {"memory.swap.max", "memory.oom.group", "pids.max", "cpu.max"}


def test_a_service_that_may_have_no_byte_is_bounded_nonetheless(root: Path) -> None:
    _ = made(root, room=0)

    assert told(root)["memory.max"] == "0"


SWAPS: Final = "Filename Type Size Used Priority\n"


@pytest.mark.parametrize(
    ("swaps", "written"),
    [(SWAPS, None), (f"{SWAPS}/dev/vdb partition 9 0 -2\n", "0"), (None, None)],
)
def test_nothing_of_a_service_is_swapped_out_where_there_is_anything_to_swap_to(
    swaps: str | None, written: str | None, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = root / "swaps"
    if swaps is not None:
        _ = file.write_text(swaps)
    monkeypatch.setattr(
        "nexus.kernel.linux.groups.Path", lambda path: file if path == "/proc/swaps" else Path(path)
    )
    groups = Groups(root)

    groups.begin()
    _ = groups.make("policyd", 3, tasks=1, room=ROOM)

    assert told(root).get("memory.swap.max") == written


@pytest.mark.parametrize("missing", ["memory.max", "memory.oom.group", "pids.max", "cpu.max"])
def test_a_group_that_cannot_be_told_its_bound_is_not_made(missing: str, root: Path) -> None:
    (root / "nexus/policyd.3" / missing).unlink()

    with pytest.raises(FileNotFoundError, match=missing):
        _ = made(root)


def test_each_generation_of_a_service_has_a_group_of_its_own(root: Path) -> None:
    group = made(root)

    assert group.place == b"/nexus/policyd.3\n"
    assert told(root, "policyd.4") == {}


def test_the_folder_of_a_group_is_made_where_there_is_none(root: Path) -> None:
    with pytest.raises(FileNotFoundError):  # the files in it are Linux's to make
        _ = Groups(root).make("rngd", 1, tasks=1, room=ROOM)

    assert (root / "nexus/rngd.1").is_dir()


def test_who_is_in_a_group_is_killed_when_it_is_ended_and_nobody_before(root: Path) -> None:
    group = made(root)
    assert "cgroup.kill" not in told(root)

    group.end()

    assert told(root)["cgroup.kill"] == "1"
    assert told(root, "policyd.4") == {}


def test_a_child_enters_its_group_by_the_descriptor_that_it_was_made_with(root: Path) -> None:
    group = made(root)

    with open(group.processes, "w", closefd=False) as opened:
        _ = opened.write("0")

    assert told(root)["cgroup.procs"] == "0"
