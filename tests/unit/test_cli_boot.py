"""The process that becomes init: what it makes of its environment."""

import os
from contextlib import ExitStack
from pathlib import Path

import pytest

from nexus.abi import Nanos
from nexus.cli import boot
from nexus.cli.boot import UID_BLOCKS, NoUidsLeft, _take_uids, watchdog_of
from nexus.proof.lock import NotPrivate

PID = 4711


def test_the_service_managers_interval_is_taken() -> None:
    interval = Nanos(10_000_000_000)

    assert watchdog_of({"WATCHDOG_USEC": "10000000"}, PID) == interval
    assert watchdog_of({"WATCHDOG_USEC": "10000000", "WATCHDOG_PID": "4711"}, PID) == interval
    assert watchdog_of({"WATCHDOG_USEC": "1000"}, PID) == Nanos(1_000_000)


@pytest.mark.parametrize(
    "interval",
    [
        *("", "0", "000", "1", "999", "-5", "+5000", "5000.0", "5 000", " 5000", "1e6", "5000\n"),
        *("x", "\u0665\u0665\u0665\u0665", "\xb2\xb2\xb2\xb2", str(2**64 - 1), "9" * 5000),
    ],
)
def test_an_interval_that_makes_no_sense_is_no_watchdog(interval: str) -> None:
    assert watchdog_of({"WATCHDOG_USEC": interval}, PID) is None


@pytest.mark.parametrize("pid", ["4712", "", "x", "04711"])
def test_the_watchdog_of_another_process_is_not_ours(pid: str) -> None:
    assert watchdog_of({"WATCHDOG_USEC": "10000000", "WATCHDOG_PID": pid}, PID) is None


def test_without_the_variables_there_is_no_watchdog() -> None:
    assert watchdog_of({}, PID) is None


def test_two_systems_never_have_the_same_user_ids(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if os.getuid() != 0:
        pytest.skip("only root gives services user ids, in a directory of its own")
    locks = tmp_path / "nexus" / "uids"
    with ExitStack() as stack:
        taken = [_take_uids(locks, stack) for _ in UID_BLOCKS]
        assert taken == list(UID_BLOCKS)
        with pytest.raises(NoUidsLeft):
            _ = _take_uids(locks, stack)
    with ExitStack() as stack:
        assert _take_uids(locks, stack) == UID_BLOCKS[0]
    assert locks.stat().st_mode & 0o777 == 0o700

    locks.chmod(0o777)
    with ExitStack() as stack, pytest.raises(NotPrivate):
        _ = _take_uids(locks, stack)

    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with ExitStack() as stack:
        assert _take_uids(tmp_path / "none", stack) is None
    assert not (tmp_path / "none").exists()


def test_the_locks_of_user_ids_are_in_one_place_for_the_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("NEXUS_RUNTIME_DIR", "/somewhere/else")
    assert str(boot.UID_LOCKS) == "/run/nexus/.uids"
