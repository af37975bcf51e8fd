"""Where a service's secret is: what init makes and refuses, and what its holder finds there."""

import ctypes
import errno
import functools
import os
import secrets as tokens
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

import pytest

from nexus.abi import SECRET_SIZE_MAX, AbiError, SecretBackend, SpawnReason, Status
from nexus.kernel.core import SpawnRefused
from nexus.kernel.linux import secrets
from nexus.kernel.linux.durable import NEW_SUFFIX
from nexus.kernel.linux.secrets import (
    DIRECTORY,
    KEY_PERMISSIONS,
    NAME,
    NO_SECRET,
    Secret,
    SecretFile,
    SecretKey,
    find_key,
    forget_keys,
    give_directory,
    hold,
    key_name,
    open_directory,
    take_key,
)
from nexus.testing import rig as rigs
from nexus.testing.rig import Outcome

pytestmark = pytest.mark.linux

IS_ROOT: Final = os.geteuid() == 0
STRANGER: Final = 54_321
KEYCTL_REVOKE: Final = 3
KEYCTL_DESCRIBE: Final = 6
KILLS: Final = 20


def status_of(act: Callable[[], object]) -> Status:
    with pytest.raises(AbiError) as refusal:
        act()
    return refusal.value.status


def why_refused(state_dir: Path | None) -> str:
    with ExitStack() as undo, pytest.raises(SpawnRefused) as refusal:
        _ = open_directory(state_dir, "keystored", undo)
    assert refusal.value.reason is SpawnReason.MAP_FAILED
    return str(refusal.value)


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture
def file(state: Path) -> Iterator[SecretFile]:
    with ExitStack() as undo:
        yield SecretFile(open_directory(state, "keystored", undo))


@pytest.fixture
def own(state: Path) -> Path:
    """The directory of the service's secret."""
    return state / DIRECTORY / "keystored"


# ---- the directory


def test_the_directories_are_closed_to_everybody_else(file: SecretFile, state: Path) -> None:
    for path in (state, state / DIRECTORY, state / DIRECTORY / "keystored"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    file.replace(b"x")
    assert stat.S_IMODE((state / DIRECTORY / "keystored" / NAME).stat().st_mode) == 0o600


def test_a_directory_that_others_could_look_into_is_refused(state: Path) -> None:
    with ExitStack() as undo:
        open_directory(state, "keystored", undo)
    for path in (state / DIRECTORY / "keystored", state / DIRECTORY):
        path.chmod(0o710)
        assert "is open to others (mode 0710)" in why_refused(state)
        path.chmod(0o700)


def test_a_directory_that_is_somewhere_else_is_refused(state: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    state.mkdir()
    (state / DIRECTORY).symlink_to(elsewhere)
    assert "secret of keystored: " in why_refused(state)
    (state / DIRECTORY).unlink()
    (state / DIRECTORY).mkdir(mode=0o700)
    (state / DIRECTORY / "keystored").symlink_to(elsewhere)
    assert "secret of keystored: " in why_refused(state)
    assert list(elsewhere.iterdir()) == []
    assert "no state directory" in why_refused(None)


def test_a_directory_of_another_user_is_refused(state: Path) -> None:
    if not IS_ROOT:
        pytest.skip("only root can make one")
    with ExitStack() as undo:
        open_directory(state, "keystored", undo)
    os.chown(state / DIRECTORY, STRANGER, STRANGER)

    assert f"{DIRECTORY} belongs to another user" in why_refused(state)


def test_the_service_gets_its_directory_with_what_is_in_it(file: SecretFile, own: Path) -> None:
    if not IS_ROOT:
        pytest.skip("only root gives files away")
    file.replace(b"x")
    (own / (NAME + NEW_SUFFIX)).write_bytes(b"half")

    give_directory(file.directory, STRANGER)

    for path in (own, own / NAME, own / (NAME + NEW_SUFFIX)):
        assert path.stat().st_uid == path.stat().st_gid == STRANGER
    assert own.parent.stat().st_uid == 0


@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_root_gives_away_no_file_that_has_another_name(
    link: Callable[[Path, Path], None], file: SecretFile, own: Path, tmp_path: Path
) -> None:
    """The last holder may have been hostile: its filter lets it make no link, and this is the
    wall behind that."""
    if not IS_ROOT:
        pytest.skip("only root gives files away")
    foreign = tmp_path / "foreign"
    foreign.write_bytes(b"root's")
    for name in (NAME, NAME + NEW_SUFFIX):
        link(foreign, own / name)
        with pytest.raises(OSError, match="is no file of its own"):
            give_directory(file.directory, STRANGER)
        (own / name).unlink()
    assert foreign.stat().st_uid == own.stat().st_uid == 0


# ---- a secret in a file


def test_a_secret_is_what_was_stored_last(file: SecretFile) -> None:
    assert file.read() == b""
    for data in (b"x", bytes(SECRET_SIZE_MAX), b"last"):
        file.replace(data)
        assert file.read() == data
    assert hold(SecretBackend.FILE, Secret(file.directory)) is not None
    assert hold(SecretBackend.NONE, NO_SECRET) is None


@pytest.mark.parametrize("content", [b"", bytes(SECRET_SIZE_MAX + 1)], ids=["empty", "too long"])
def test_a_file_of_a_wrong_size_is_damage_that_its_holder_sees_and_not_taken_for_none(
    content: bytes, file: SecretFile, own: Path
) -> None:
    (own / NAME).write_bytes(content)

    assert 1 <= len(file.read()) <= SECRET_SIZE_MAX


def test_a_file_that_leads_elsewhere_is_not_followed(
    file: SecretFile, own: Path, tmp_path: Path
) -> None:
    (tmp_path / "foreign").write_bytes(b"foreign")
    (own / NAME).symlink_to(tmp_path / "foreign")
    assert status_of(file.read) is Status.DEVICE_FAILED
    (own / (NAME + NEW_SUFFIX)).symlink_to(tmp_path / "foreign")

    file.replace(b"mine")

    assert file.read() == b"mine"
    assert (tmp_path / "foreign").read_bytes() == b"foreign"


def test_a_directory_in_its_place_is_a_failure(file: SecretFile, own: Path) -> None:
    (own / NAME).mkdir()

    assert status_of(file.read) is Status.DEVICE_FAILED
    assert status_of(lambda: file.replace(b"x")) is Status.DEVICE_FAILED
    assert [path.name for path in own.iterdir()] == [NAME]


@pytest.mark.parametrize(
    ("number", "status"),
    [
        (errno.ENOSPC, Status.NO_SPACE),
        (errno.EDQUOT, Status.NO_SPACE),
        (errno.EIO, Status.DEVICE_FAILED),
        (errno.EROFS, Status.DEVICE_FAILED),
    ],
)
@pytest.mark.parametrize("call", ["write", "fsync", "rename"])
def test_a_replacement_that_fails_leaves_the_old_secret(
    number: int,
    status: Status,
    call: str,
    file: SecretFile,
    own: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file.replace(b"old")

    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as failing:
        failing.setattr(os, call, fail)
        assert status_of(lambda: file.replace(b"new")) is status

    assert file.read() == b"old"
    assert [path.name for path in own.iterdir()] == [NAME]


def test_every_step_is_synced_in_order(file: SecretFile, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    for name in ("write", "fsync", "rename"):
        real = getattr(os, name)

        def noted(*words: object, _name: str = name, _real: Callable[..., object] = real, **more):  # type: ignore[no-untyped-def] # noqa: ANN003, ANN202
            done.append("sync directory" if words[0] == file.directory else _name)
            return _real(*words, **more)

        monkeypatch.setattr(os, name, noted)

    file.replace(b"x")

    assert done == ["write", "fsync", "rename", "sync directory"]


REPLACES: Final = """
import os, sys
from nexus.kernel.linux.secrets import SecretFile
file = SecretFile(os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECTORY))
number = 0
while True:
    number += 1
    file.replace(b"%d " % number * 400)
    os.write(1, b"%d\\n" % number)
"""


def test_a_holder_that_is_killed_leaves_a_whole_secret(file: SecretFile, own: Path) -> None:
    """The last one that it had acknowledged, or the one it was at."""
    for kill in range(KILLS):
        (own / NAME).unlink(missing_ok=True)
        holder = subprocess.Popen(
            [sys.executable, "-c", REPLACES, str(own)], stdout=subprocess.PIPE
        )
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"1\n"
        time.sleep(kill / 4000)  # noqa: TID251 (another moment each time)
        holder.send_signal(signal.SIGKILL)
        _ = holder.wait()
        acknowledged = int([b"1", *holder.stdout.read().split()][-1])
        holder.stdout.close()
        words = set(file.read().split())
        assert len(words) == 1
        assert int(words.pop()) in (acknowledged, acknowledged + 1)


# ---- a secret in a key


KEYRINGS: Final = pytest.mark.skipif(
    not Path("/proc/key-users").exists(), reason="this Linux kernel has no keyrings"
)


def apart(test: Callable[..., None]) -> Callable[..., None]:
    """A test in a process of its own, for it takes another session keyring."""

    @functools.wraps(test)
    def forked(*words: object, **named: object) -> None:
        def work() -> Outcome:
            test(*words, **named)
            return Outcome()

        outcome = rigs._in_a_fork(work, user=None)
        assert outcome.failures == [], "\n".join(outcome.failures)

    return forked


@contextmanager
def a_key(state: Path) -> Iterator[SecretKey]:
    try:
        yield SecretKey(take_key(key_name(state, "keystored")))
    finally:
        forgotten = forget_keys(state)
    assert forgotten == 1


@KEYRINGS
@apart
def test_a_key_keeps_what_was_stored_last(state: Path) -> None:
    with a_key(state) as key:
        assert key.read() == b""
        for data in (b"x", b"\0", bytes(SECRET_SIZE_MAX), tokens.token_bytes(32)):
            key.replace(data)
            assert key.read() == data


@KEYRINGS
@apart
def test_the_key_is_found_again_and_another_system_has_another(state: Path, tmp_path: Path) -> None:
    with a_key(state) as key:
        key.replace(b"kept")

        assert take_key(key_name(state, "keystored")) == key.key
        assert SecretKey(key.key).read() == b"kept"
        others = (key_name(tmp_path / "other", "keystored"), key_name(state, "rngd"))
        assert [find_key(name) for name in others] == [0, 0]
        assert forget_keys(tmp_path / "other") == 0


@KEYRINGS
@apart
def test_only_who_possesses_a_key_reads_it(state: Path) -> None:
    with a_key(state) as key:
        key.replace(b"kept")
        (line,) = [
            line
            for line in Path("/proc/keys").read_text().splitlines()
            if line.startswith(f"{key.key:08x} ")
        ]
        assert f" {KEY_PERMISSIONS:08x} " in line
        possessor, user, group, other = KEY_PERMISSIONS.to_bytes(4, "big")
        view, read, write, search, link, set_attributes = (1 << bit for bit in range(6))
        assert possessor == view | read | write | search
        assert user == view | search | link
        assert (group, other) == (0, 0)
        assert not (possessor | user) & set_attributes

        secrets.leave_keys()  # out of the session that has it

        assert status_of(key.read) is Status.DEVICE_FAILED
        assert status_of(lambda: key.replace(b"other")) is Status.DEVICE_FAILED


@pytest.mark.skipif(not IS_ROOT, reason="only root can become somebody else")
@KEYRINGS
@apart
def test_another_user_does_not_even_find_the_key(state: Path) -> None:
    with a_key(state) as key:
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                secrets.leave_keys()
                os.setgroups([])
                os.setresgid(STRANGER, STRANGER, STRANGER)
                os.setresuid(STRANGER, STRANGER, STRANGER)
                number = find_key(key_name(state, "keystored"))
                seen = 0
                try:
                    _ = secrets._keyctl(KEYCTL_DESCRIBE, ctypes.c_int(key.key), None, 0)
                except OSError as error:
                    seen = error.errno or 0
                os.write(writer, f"{number} {seen}".encode())
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        found = os.read(reader, 100).decode()
        os.close(reader)
        os.close(writer)

        assert found == f"0 {errno.EACCES}"


@KEYRINGS
@apart
def test_a_key_that_is_gone_or_foreign_is_a_failure_and_not_an_empty_one(state: Path) -> None:
    with a_key(state) as key:
        assert status_of(SecretKey(0).read) is Status.DEVICE_FAILED, "a kernel without keyrings"
        assert status_of(lambda: SecretKey(0).replace(b"x")) is Status.DEVICE_FAILED
        content = ctypes.create_string_buffer(b"\2foreign")
        _ = secrets._keyctl(
            secrets.KEYCTL_UPDATE, ctypes.c_int(key.key), content, ctypes.c_size_t(8)
        )
        assert status_of(key.read) is Status.DEVICE_FAILED
        _ = secrets._keyctl(KEYCTL_REVOKE, ctypes.c_int(key.key))
        assert status_of(key.read) is Status.DEVICE_FAILED
        assert status_of(lambda: key.replace(b"x")) is Status.DEVICE_FAILED


@KEYRINGS
@apart
def test_a_key_without_room_keeps_the_old_secret(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Injected: a quota is the whole user's."""
    with a_key(state) as key:
        key.replace(b"old")

        def full(*_: object) -> int:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

        with monkeypatch.context() as failing:
            failing.setattr(secrets, "syscall", full)
            assert status_of(lambda: key.replace(b"new")) is Status.NO_SPACE

        assert key.read() == b"old"
