"""Directories of instances, their locks, and which of them a command means."""

import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from nexus.cli.errors import CommandFailed, UsageError
from nexus.cli.places import (
    RECORD_NAME,
    Running,
    all_running,
    base_dirs,
    make_dirs,
    places_of,
    the_running,
    title_of,
)
from nexus.loader.main import LOCK_NAME as LOADER_LOCK
from nexus.proof import lock

FILE = Path("/srv/pump/system.toml")
NONE = (None, None, None)


def test_root_has_the_machine_s_directories() -> None:
    assert base_dirs({"XDG_RUNTIME_DIR": "/x"}, 0) == (
        Path("/var/lib/nexus"),
        Path("/run/nexus"),
        Path("/var/log/nexus"),
    )


def test_a_user_has_the_xdg_ones_or_those_of_a_home() -> None:
    xdg = {"HOME": "/home/u", "XDG_RUNTIME_DIR": "/run/x", "XDG_STATE_HOME": "/st"}
    assert base_dirs(xdg, 1234) == (Path("/st/nexus"), Path("/run/x/nexus"), Path("/st/nexus/log"))
    assert base_dirs({"HOME": "/home/u"}, 987_654) == (
        Path("/home/u/.local/state/nexus"),
        Path("/tmp/nexus-987654"),
        Path("/home/u/.local/state/nexus/log"),
    )


def test_the_environment_wins() -> None:
    environ = {"NEXUS_STATE_DIR": "/a", "NEXUS_RUNTIME_DIR": "/b", "NEXUS_LOG_DIR": "/c"}
    for uid in (0, 1234):
        assert base_dirs(environ, uid) == (Path("/a"), Path("/b"), Path("/c"))


def test_instances_have_directories_side_by_side() -> None:
    one = places_of("pump", None, FILE, NONE, {}, 0)
    two = places_of("pump", "b", FILE, NONE, {}, 0)
    assert (one.title, two.title) == ("pump", "pump@b")
    assert {one.home, one.state, one.log}.isdisjoint({two.home, two.state, two.log})


def test_declared_directories_are_beside_the_system_file() -> None:
    declared = ("state", "/run/own", None)
    one = places_of("pump", None, FILE, declared, {}, 0)
    two = places_of("pump", "b", FILE, declared, {}, 0)
    assert (one.state, one.runtime, one.log) == (
        Path("/srv/pump/state"),
        Path("/run/own"),
        Path("/var/log/nexus/pump"),
    )
    assert one.home == Path("/run/nexus/pump")
    assert (two.state, two.runtime) == (Path("/srv/pump/state@b"), Path("/run/own@b"))


@pytest.mark.parametrize("instance", ["", "a/b", "..", "a b", "x" * 33, "é"])
def test_an_instance_has_a_plain_name(instance: str) -> None:
    with pytest.raises(UsageError, match=r"is no name: use letters"):
        _ = title_of("pump", instance)


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    return {
        name: str(tmp_path / name)
        for name in ("NEXUS_STATE_DIR", "NEXUS_RUNTIME_DIR", "NEXUS_LOG_DIR")
    }


def test_directories_are_made_for_their_user_only(environ: dict[str, str]) -> None:
    places = places_of("pump", None, FILE, NONE, environ, os.getuid())
    make_dirs(places, os.getuid(), ["operator"])
    assert all(
        path.stat().st_mode & 0o777 == 0o700 for path in (places.home, places.state, places.log)
    )


def test_a_directory_that_others_can_write_is_refused(environ: dict[str, str]) -> None:
    places = places_of("pump", None, FILE, NONE, environ, os.getuid())
    places.home.mkdir(parents=True)
    places.home.chmod(0o777)
    with pytest.raises(CommandFailed, match=r"only this user can write: remove it"):
        make_dirs(places, os.getuid(), ["operator"])


def test_a_directory_that_is_a_link_is_refused(environ: dict[str, str], tmp_path: Path) -> None:
    places = places_of("pump", None, FILE, NONE, environ, os.getuid())
    places.home.parent.mkdir(parents=True)
    places.home.symlink_to(tmp_path)
    with pytest.raises(CommandFailed, match=r"only this user can write"):
        make_dirs(places, os.getuid(), ["operator"])


def test_a_directory_that_cannot_be_made_is_told(environ: dict[str, str]) -> None:
    environ["NEXUS_RUNTIME_DIR"] = "/proc/no-such"
    places = places_of("pump", None, FILE, NONE, environ, os.getuid())
    with pytest.raises(CommandFailed, match=r"cannot be made: .*; set NEXUS_STATE_DIR"):
        make_dirs(places, os.getuid(), ["operator"])


def test_a_path_too_long_for_a_socket_is_told(environ: dict[str, str], tmp_path: Path) -> None:
    environ["NEXUS_RUNTIME_DIR"] = str(tmp_path / ("x" * 90))
    places = places_of("pump", None, FILE, NONE, environ, os.getuid())
    with pytest.raises(CommandFailed, match=r"too long a name for a socket"):
        make_dirs(places, os.getuid(), ["operator"])


@pytest.fixture
def holders() -> Iterator[list["subprocess.Popen[str]"]]:
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        process.kill()
        _ = process.wait()
        assert process.stdout is not None
        process.stdout.close()


HOLD = """
import sys
from pathlib import Path
from nexus.proof import lock
held = lock.take(Path(sys.argv[1])), lock.take_directory(Path(sys.argv[1]).parent)
print("held", flush=True)
sys.stdin.read() or __import__("signal").pause()
"""


def hold(path: Path, holders: list["subprocess.Popen[str]"]) -> int:
    """Another process that holds the lock; its pid."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src")},
    )
    holders.append(process)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process.pid


def test_the_lock_names_its_holder_and_ends_with_it(
    tmp_path: Path, holders: list["subprocess.Popen[str]"]
) -> None:
    path = tmp_path / "up.lock"
    assert lock.holder_of(path) is None
    pid = hold(path, holders)
    assert lock.holder_of(path) == pid
    with pytest.raises(lock.AlreadyHeld) as error:
        _ = lock.take(path, wait=0)
    assert error.value.pid == pid
    holders[0].kill()
    _ = holders[0].wait()
    assert lock.holder_of(path) is None
    os.close(lock.take(path))


def running_at(home: Path, title: str, holders: list["subprocess.Popen[str]"]) -> None:
    """A process that holds the locks of `home`, which is its state directory too."""
    home.mkdir(parents=True)
    pid = hold(home / "up.lock", holders)
    record(home, title, pid, lock.start_of(pid))


def record(home: Path, title: str, pid: int, started: int) -> None:
    running = Running(
        title=title,
        file="f",
        digest="d",
        pid=pid,
        started=started,
        state=str(home),
        runtime=str(home),
        log="l",
    )
    _ = (home / RECORD_NAME).write_bytes(msgspec.json.encode(running))


def test_a_command_means_the_only_one_or_the_one_it_names(
    environ: dict[str, str], tmp_path: Path, holders: list["subprocess.Popen[str]"]
) -> None:
    base = tmp_path / "NEXUS_RUNTIME_DIR"
    with pytest.raises(CommandFailed, match=r"^no system runs here .*: start one with"):
        _ = the_running(None, environ, os.getuid())
    running_at(base / "pump", "pump", holders)
    assert the_running(None, environ, os.getuid()).title == "pump"
    running_at(base / "pump@b", "pump@b", holders)
    with pytest.raises(UsageError, match=r"several systems run here, .* --name: pump, pump@b"):
        _ = the_running(None, environ, os.getuid())
    assert the_running("pump@b", environ, os.getuid()).title == "pump@b"
    with pytest.raises(
        CommandFailed, match=r"no system valve runs here .running are: pump, pump@b"
    ):
        _ = the_running("valve", environ, os.getuid())


def test_what_ended_without_a_word_does_not_run(
    environ: dict[str, str], tmp_path: Path, holders: list["subprocess.Popen[str]"]
) -> None:
    running_at(tmp_path / "NEXUS_RUNTIME_DIR" / "pump", "pump", holders)
    assert [each.title for each in all_running(environ, os.getuid())] == ["pump"]
    holders[0].kill()
    _ = holders[0].wait()
    assert all_running(environ, os.getuid()) == []


def test_a_removed_lock_file_hides_no_system(
    environ: dict[str, str], tmp_path: Path, holders: list["subprocess.Popen[str]"]
) -> None:
    home = tmp_path / "NEXUS_RUNTIME_DIR" / "pump"
    running_at(home, "pump", holders)
    (home / "up.lock").unlink()
    assert the_running("pump", environ, os.getuid()).pid == holders[0].pid
    (home / "up.lock").touch()
    assert the_running("pump", environ, os.getuid()).pid == holders[0].pid


def test_a_process_that_has_the_number_and_not_the_start_is_not_the_system(
    environ: dict[str, str], tmp_path: Path, holders: list["subprocess.Popen[str]"]
) -> None:
    home = tmp_path / "NEXUS_RUNTIME_DIR" / "pump"
    running_at(home, "pump", holders)
    for started in (0, lock.start_of(holders[0].pid) + 1):
        record(home, "pump", holders[0].pid, started)
        assert all_running(environ, os.getuid()) == []


def test_a_process_that_holds_no_lock_is_not_the_system(
    environ: dict[str, str], tmp_path: Path
) -> None:
    home = tmp_path / "NEXUS_RUNTIME_DIR" / "pump"
    home.mkdir(parents=True)
    (home / "up.lock").write_text(f"{os.getpid()} {lock.start_of(os.getpid())}\n")
    record(home, "pump", os.getpid(), lock.start_of(os.getpid()))
    assert all_running(environ, os.getuid()) == []


def test_a_record_that_is_no_text_is_no_system(
    environ: dict[str, str], tmp_path: Path, holders: list["subprocess.Popen[str]"]
) -> None:
    home = tmp_path / "NEXUS_RUNTIME_DIR" / "pump"
    running_at(home, "pump", holders)
    (home / RECORD_NAME).write_bytes(b'{"title": "\xff"}')
    assert all_running(environ, os.getuid()) == []


@pytest.mark.parametrize("level", [".", "pump"])
@pytest.mark.parametrize("fault", ["owner", "mode", "link"])
def test_nothing_is_read_where_another_user_may_write(
    environ: dict[str, str],
    tmp_path: Path,
    holders: list["subprocess.Popen[str]"],
    level: str,
    fault: str,
) -> None:
    base = tmp_path / "NEXUS_RUNTIME_DIR"
    running_at(base / "pump", "pump", holders)
    wrong = base / level
    if fault == "owner":
        if os.getuid() != 0:
            pytest.skip("only root can give a directory away")
        os.chown(wrong, 65534, 65534)
    elif fault == "mode":
        wrong.chmod(0o770)
    else:
        moved = wrong.rename(tmp_path / "moved")
        wrong.symlink_to(moved)

    for read in (
        lambda: all_running(environ, os.getuid()),
        lambda: the_running(None, environ, os.getuid()),
    ):
        with pytest.raises(CommandFailed, match=r"is not a directory that only this user can"):
            _ = read()
    places = places_of("pump", None, FILE, NONE, environ, os.getuid())
    with pytest.raises(CommandFailed, match=r"is not a directory that only this user can"):
        make_dirs(places, os.getuid(), [])


def test_every_folder_made_on_the_way_is_its_users_alone(
    environ: dict[str, str], tmp_path: Path
) -> None:
    former = os.umask(0)
    try:
        environ["NEXUS_STATE_DIR"] = str(tmp_path / "a" / "b")
        make_dirs(places_of("pump", None, FILE, NONE, environ, os.getuid()), os.getuid(), [])
    finally:
        _ = os.umask(former)
    for made in ("a", "a/b", "a/b/pump", "NEXUS_LOG_DIR", "NEXUS_LOG_DIR/pump"):
        assert (tmp_path / made).stat().st_mode & 0o777 == 0o700, made


def test_a_system_between_two_boots_is_told_from_one_that_does_not_run(tmp_path: Path) -> None:
    environ = {"NEXUS_RUNTIME_DIR": str(tmp_path)}
    home = tmp_path / "pump"
    home.mkdir(mode=0o700)
    tmp_path.chmod(0o700)
    with (home / LOADER_LOCK).open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        for title in (None, "pump"):
            with pytest.raises(CommandFailed, match="pump is being booted out of its slots"):
                _ = the_running(title, environ, os.getuid())
    for title in (None, "pump"):
        with pytest.raises(CommandFailed, match=r"runs here|none runs"):
            _ = the_running(title, environ, os.getuid())
