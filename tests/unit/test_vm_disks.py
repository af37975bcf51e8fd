import os
import shutil
from pathlib import Path

import pytest

from nexus.init.plan import Plan, load_plan
from nexus.vm import disks
from nexus.vm.disks import bring_home, check_tools, disks_of
from nexus.vm.packages import NotHad

SELFTEST = Path(__file__).parents[2] / "systems/selftest.toml"
MINIMAL = Path(__file__).parents[2] / "systems/minimal.toml"
SMALL = 4 * 1024 * 1024  # bytes
FUTURE = 4_000_000_000  # seconds; in 2096

try:
    check_tools()
except NotHad as missing:
    pytest.skip(str(missing), allow_module_level=True)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Plan:
    monkeypatch.setattr(disks, "PERSIST_SIZE", SMALL)
    return load_plan(MINIMAL)


def written_by_guest(state: Path, name: str, text: str) -> None:
    """As if a boot had written a file."""
    disk = state / "persist.img"
    is_there = any(each.name == name for each in disks._listed(disk, ["/state"]))
    _ = (state / ".text").write_text(text)
    words = ["cd /state", *([f"rm {name}"] if is_there else []), f"write .text {name}"]
    _ = disks._debugfs(disk, words, cwd=state, writable=True)


@pytest.fixture
def left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for what a guest shall have left, and beside it a run's directory with a file."""
    monkeypatch.setattr(disks, "PERSIST_SIZE", SMALL)
    (tmp_path / "run").mkdir()
    _ = (tmp_path / "run/old").write_text("host's")
    (tmp_path / "guest/state").mkdir(parents=True)
    return tmp_path / "guest/state"


def as_guest_left(left: Path, *options: str) -> Path:
    """The run's directory with a disk that holds what is in the folder."""
    run = left.parents[1] / "run"
    with (run / "persist.img").open("wb") as disk:
        _ = disk.truncate(disks.PERSIST_SIZE)
    root = str(left.parent)
    _ = disks._run(
        "mkfs.ext4", "-q", "-F", "-m", "0", *options, "-d", root, str(run / "persist.img")
    )
    return run


def renamed_on_disk(run: Path, old: bytes, new: bytes) -> None:
    """As a guest can that writes to the disk and not to the file system."""
    content = (run / "persist.img").read_bytes()
    assert content.count(old) == 1
    assert len(old) == len(new)
    _ = (run / "persist.img").write_bytes(content.replace(old, new))


def test_each_disk_of_a_plan_is_made_but_for_the_one_of_the_old_layout(tmp_path: Path) -> None:
    found = disks_of(load_plan(SELFTEST), tmp_path)

    assert [each.name for each in found] == ["persist", "disk", "boot", "slot-a", "slot-b", "stick"]
    assert found[1].file.stat().st_size == 8 * 1024 * 1024
    assert [each.name for each in found if each.read_only] == ["stick"]


def test_a_disk_that_is_there_keeps_its_content(tmp_path: Path) -> None:
    _ = (tmp_path / "disk.img").write_bytes(b"mine")

    _ = disks_of(load_plan(SELFTEST), tmp_path)

    assert (tmp_path / "disk.img").read_bytes() == b"mine"


def test_what_the_directory_holds_is_on_the_disk_at_the_first_boot(
    tmp_path: Path, small: Plan
) -> None:
    (tmp_path / "secrets/keystored").mkdir(parents=True, mode=0o700)
    _ = (tmp_path / "secrets/keystored/secret").write_text("first")
    _ = disks_of(small, tmp_path)
    shutil.rmtree(tmp_path / "secrets")

    bring_home(tmp_path)

    assert (tmp_path / "secrets/keystored/secret").read_text() == "first"


def test_what_a_boot_wrote_and_removed_is_so_in_the_directory(tmp_path: Path, small: Plan) -> None:
    _ = (tmp_path / "old").write_text("gone")
    _ = disks_of(small, tmp_path)
    written_by_guest(tmp_path, "boot-memory", "one boot")
    _ = disks._debugfs(tmp_path / "persist.img", ["rm /state/old"], writable=True)

    bring_home(tmp_path)

    assert (tmp_path / "boot-memory").read_text() == "one boot"
    assert not (tmp_path / "old").exists()


def test_what_the_host_writes_between_two_boots_is_on_the_disk(tmp_path: Path, small: Plan) -> None:
    _ = disks_of(small, tmp_path)
    written_by_guest(tmp_path, "boot-memory", "one boot")
    bring_home(tmp_path)
    _ = (tmp_path / "ended.json").write_text("{}")

    _ = disks_of(small, tmp_path)

    (tmp_path / "ended.json").unlink()
    bring_home(tmp_path)
    assert (tmp_path / "ended.json").read_text() == "{}"
    assert (tmp_path / "boot-memory").read_text() == "one boot"


def test_what_the_host_keeps_for_itself_is_not_on_the_disk(tmp_path: Path, small: Plan) -> None:
    for name in ("console-0.log", "guest-0.jsonl", ".hidden", "disk.img"):
        _ = (tmp_path / name).write_text("host's")

    _ = disks_of(small, tmp_path)

    for name in ("console-0.log", "guest-0.jsonl", ".hidden", "disk.img"):
        (tmp_path / name).unlink()
    bring_home(tmp_path)
    assert not any((tmp_path / name).exists() for name in ("console-0.log", "disk.img"))


@pytest.mark.parametrize(
    "name", ["x\ndump payload pwned.py\n#", "two words", 'a"b', "-w", "_x", "\udcff", "\u00e9"]
)
def test_a_name_of_the_guest_that_is_not_plain_does_not_come_home(left: Path, name: str) -> None:
    _ = (left / "payload").write_text("guest's")
    _ = (left / name).write_text("")
    os.utime(left / name, (FUTURE, FUTURE))
    run = as_guest_left(left)

    with pytest.raises(NotHad, match=r"no plain name|no line"):
        bring_home(run)

    assert [each.name for each in run.iterdir() if each.name != "persist.img"] == ["old"]


def test_a_name_of_two_lines_hides_nothing_from_the_count(left: Path) -> None:
    (left / "folder/x\ny").mkdir(parents=True)
    run = as_guest_left(left)

    with pytest.raises(NotHad, match="no line"):
        bring_home(run)

    assert (run / "old").read_text() == "host's"


def test_a_name_of_the_host_that_is_not_plain_is_refused(tmp_path: Path, small: Plan) -> None:
    _ = disks_of(small, tmp_path)
    _ = (tmp_path / "x\ndump boot-memory pwned.py\n#").write_text("")

    with pytest.raises(NotHad, match="no plain name"):
        _ = disks_of(small, tmp_path)


def test_a_date_in_the_future_is_no_change_by_the_host(left: Path, small: Plan) -> None:
    _ = (left / "boot-memory").write_text("one boot")
    os.utime(left / "boot-memory", (FUTURE, FUTURE))
    run = as_guest_left(left)
    bring_home(run)
    written_by_guest(run, "boot-memory", "two boots")

    _ = disks_of(small, run)

    bring_home(run)
    assert (run / "boot-memory").read_text() == "two boots"


def test_what_the_host_writes_over_a_date_in_the_future_is_carried(left: Path, small: Plan) -> None:
    _ = (left / "boot-memory").write_text("one boot")
    os.utime(left / "boot-memory", (FUTURE, FUTURE))
    run = as_guest_left(left)
    bring_home(run)
    _ = (run / "boot-memory").write_text("no boots")

    _ = disks_of(small, run)

    (run / "boot-memory").unlink()
    bring_home(run)
    assert (run / "boot-memory").read_text() == "no boots"


def test_what_the_host_wrote_is_carried_once(tmp_path: Path, small: Plan) -> None:
    _ = disks_of(small, tmp_path)
    _ = (tmp_path / "order").write_text("host's")
    _ = disks_of(small, tmp_path)
    written_by_guest(tmp_path, "order", "guest's")

    _ = disks_of(small, tmp_path)  # after a boot of which nothing came home

    bring_home(tmp_path)
    assert (tmp_path / "order").read_text() == "guest's"


def test_a_stamp_of_another_version_makes_all_files_new(tmp_path: Path, small: Plan) -> None:
    _ = (tmp_path / "order").write_text("host's")
    _ = disks_of(small, tmp_path)
    written_by_guest(tmp_path, "order", "guest's")
    _ = (tmp_path / ".persist-equal").write_text("1763846868000000000")

    _ = disks_of(small, tmp_path)

    bring_home(tmp_path)
    assert (tmp_path / "order").read_text() == "host's"


def test_a_file_of_holes_larger_than_the_disk_does_not_come_home(left: Path) -> None:
    with (left / "holes").open("wb") as file:
        _ = file.truncate(3 * 1024 * 1024 * 1024)
    run = as_guest_left(left)

    with pytest.raises(NotHad, match="more than the host takes"):
        bring_home(run)

    assert (run / "old").read_text() == "host's"


def test_debugfs_writes_no_file_larger_than_the_disk(left: Path) -> None:
    with (left / "holes").open("wb") as file:
        _ = file.truncate(disks.PERSIST_SIZE + 1)
    run = as_guest_left(left)

    with pytest.raises(NotHad, match=r"debugfs says .* of persist\.img"):
        _ = disks._debugfs(run / "persist.img", ["dump /state/holes holes"], cwd=run)

    assert (run / "holes").stat().st_size <= disks.PERSIST_SIZE


def test_a_file_of_many_names_counts_once_for_each(left: Path) -> None:
    (left / "folder").mkdir()
    _ = (left / "one").write_bytes(bytes(disks.PERSIST_SIZE // 8))
    for index in range(8):
        os.link(left / "one", left / f"folder/{index}")
    run = as_guest_left(left)

    with pytest.raises(NotHad, match="more than the host takes"):
        bring_home(run)

    assert (run / "old").read_text() == "host's"


def test_more_names_than_the_host_takes_do_not_come_home(
    left: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disks, "HOME_COUNT_MAX", 3)
    for index in range(4):
        _ = (left / f"{index}").write_text("")
    run = as_guest_left(left)

    with pytest.raises(NotHad, match="holds 4 names"):
        bring_home(run)

    assert (run / "old").read_text() == "host's"


def test_folders_too_deep_in_one_another_do_not_come_home(left: Path) -> None:
    left.joinpath(*["in"] * disks.HOME_DEPTH_MAX).mkdir(parents=True)
    run = as_guest_left(left)

    with pytest.raises(NotHad, match="32 deep"):
        bring_home(run)

    assert (run / "old").read_text() == "host's"


def test_a_name_that_leads_out_of_the_folder_does_not_come_home(left: Path) -> None:
    _ = (left / "..Xescaped").write_text("guest's")
    run = as_guest_left(left, "-O", "^metadata_csum")
    renamed_on_disk(run, b"..Xescaped", b"../escaped")

    with pytest.raises(NotHad, match="e2fsck says"):
        bring_home(run)

    assert (run / "old").read_text() == "host's"


def test_a_link_and_a_file_of_one_name_do_not_come_home(left: Path) -> None:
    victim = left.parents[1] / "victim"
    _ = victim.write_text("host's")
    run = as_guest_left(left, "-b", "1024", "-O", "^metadata_csum,^dir_index")
    first, second = "first" + "x" * 95, "other" + "x" * 95
    words = ["cd /state", f"symlink {first} {victim}"]
    words += [f"write old {index:0200d}" for index in range(4)]  # e2fsck compares in one block
    words += [f"write old {second}"]
    _ = disks._debugfs(run / "persist.img", words, cwd=run, writable=True)
    renamed_on_disk(run, second.encode(), first.encode())
    _ = (run / "old").write_text("before")

    with pytest.raises(NotHad, match=r"is twice on persist\.img"):
        bring_home(run)

    assert victim.read_text() == "host's"
    assert (run / "old").read_text() == "before"


@pytest.mark.parametrize("name", ['a"b', "a\nb", "a b", "-f"])
def test_a_run_may_be_in_any_directory(tmp_path: Path, small: Plan, name: str) -> None:
    state = tmp_path / name
    state.mkdir()
    _ = (state / "old").write_text("host's")
    _ = disks_of(small, state)
    written_by_guest(state, "boot-memory", "one boot")
    _ = (state / "ended.json").write_text("{}")
    _ = disks_of(small, state)

    bring_home(state)

    assert (state / "boot-memory").read_text() == "one boot"
    assert (state / "ended.json").read_text() == "{}"
    assert (state / "old").read_text() == "host's"


def test_without_its_folder_on_the_disk_the_directory_stays_as_it_is(left: Path) -> None:
    left.rmdir()
    run = as_guest_left(left)

    with pytest.raises(NotHad, match=r"debugfs says .* of persist\.img"):
        bring_home(run)

    assert (run / "old").read_text() == "host's"


def test_a_command_that_debugfs_fails_at_is_a_failure(left: Path) -> None:
    run = as_guest_left(left)

    with pytest.raises(NotHad, match="File not found by ext2_lookup"):
        _ = disks._debugfs(run / "persist.img", ["cat /state/nothing"])


def test_a_socket_in_the_directory_is_left_where_it_is(tmp_path: Path, small: Plan) -> None:
    os.mkfifo(tmp_path / "pipe")

    _ = disks_of(small, tmp_path)
    bring_home(tmp_path)

    assert (tmp_path / "pipe").is_fifo()


def test_a_disk_that_is_no_file_system_is_refused(tmp_path: Path, small: Plan) -> None:
    _ = (tmp_path / "persist.img").write_bytes(bytes(1024 * 1024))

    with pytest.raises(NotHad, match=r"e2fsck says .* of persist\.img"):
        _ = disks_of(small, tmp_path)


def test_without_the_tools_their_package_is_named(
    tmp_path: Path, small: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(disks, "TOOL_FOLDERS", ())

    with pytest.raises(NotHad, match="try `apt-get install e2fsprogs`"):
        _ = disks_of(small, tmp_path)
