"""Locks that survive what is done to their files, and say who holds them."""

import os
from pathlib import Path

import pytest

from nexus.proof import lock
from nexus.proof.lock import AlreadyHeld, NotPrivate, check_private, make_private


def test_a_lock_is_of_the_file_that_has_the_name_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.lock"
    exchanged: list[int] = []
    real = lock.is_same

    def exchange_first(descriptor: int, name: Path) -> bool:
        if not exchanged:  # somebody removed it between its opening and its locking
            exchanged.append(os.fstat(descriptor).st_ino)
            (tmp_path / "kept").hardlink_to(path)  # or its number is given to the next one
            path.unlink()
        return real(descriptor, name)

    monkeypatch.setattr(lock, "is_same", exchange_first)
    held = lock.take(path)

    assert os.fstat(held).st_ino == path.stat().st_ino != exchanged[0]
    assert lock.holder_of(path) == os.getpid()
    os.close(held)


def test_a_directory_is_held_whatever_becomes_of_its_files(tmp_path: Path) -> None:
    assert not lock.is_directory_held(tmp_path)
    held = lock.take_directory(tmp_path)
    with pytest.raises(AlreadyHeld) as error:
        _ = lock.take_directory(tmp_path, wait=0)
    assert error.value.pid == 0
    assert lock.is_directory_held(tmp_path)
    os.close(held)
    assert not lock.is_directory_held(tmp_path)
    os.close(lock.take_directory(tmp_path, wait=0))


@pytest.mark.parametrize("said", ["", "1\n", "OWN 1\n", "x y\n", "999999999 5\n"])
def test_a_holder_that_is_not_the_one_in_the_file_has_no_number(tmp_path: Path, said: str) -> None:
    path = tmp_path / "x.lock"
    held = lock.take(path)
    _ = path.write_text(said.replace("OWN", str(os.getpid())))

    assert lock.holder_of(path) == 0
    os.close(held)
    assert lock.holder_of(path) is None


def test_a_lock_that_is_a_fifo_hangs_nobody(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.lock")

    assert lock.holder_of(tmp_path / "x.lock") is None


def test_a_process_has_a_start_as_long_as_it_lives() -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    assert lock.start_of(os.getpid()) > 0
    _ = os.waitpid(child, 0)
    assert lock.start_of(child) == 0


def test_a_directory_of_another_is_not_ours_and_roots_is_good_enough_to_read(
    tmp_path: Path,
) -> None:
    if os.getuid() != 0:
        pytest.skip("only root can give a directory away")
    os.chown(tmp_path, 1234, 1234)
    check_private(tmp_path, 1234)
    for or_root in (False, True):
        with pytest.raises(NotPrivate, match="only this user can write"):
            check_private(tmp_path, 4321, or_root=or_root)
    os.chown(tmp_path, 0, 0)
    check_private(tmp_path, 4321, or_root=True)
    with pytest.raises(NotPrivate, match="only this user can write"):
        check_private(tmp_path, 4321)


def test_what_lies_between_the_base_and_a_directory_is_checked(tmp_path: Path) -> None:
    base = tmp_path / "base"
    make_private(base / "a" / "b", os.getuid(), base)
    (base / "a").chmod(0o777)
    with pytest.raises(NotPrivate, match=r"/base/a is not a directory"):
        make_private(base / "a" / "b", os.getuid(), base)
    make_private(base / "a" / "b", os.getuid())
