"""Boots that are started before it is their turn, and runs that end before it comes."""

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest

from nexus.proof import command, prove
from nexus.proof.job import Job
from nexus.proof.lock import STATE_PREFIX
from nexus.proof.record import MalformedEvent
from nexus.proof.request import Request
from nexus.protocols.ladder import Ground

SYSTEM: Final = Path(__file__).parents[2] / "systems" / "selftest.toml"


class Boots:
    """Boots that do what they are told to; `dropped` are those that were not run."""

    def __init__(self) -> None:
        self.dropped: list[int] = []
        self.runs: Callable[[], Any] = lambda: None
        self.is_full = False

    def __call__(self, job: Job) -> "Boots":
        if job.ahead and self.is_full:
            raise OSError(errno.EMFILE, "too many open files")
        made = Boots()
        made.dropped, made.runs, made.number = self.dropped, self.runs, job.boot
        return made

    number = -1

    def run(self, **_given: object) -> Any:
        return self.runs()

    def drop(self) -> None:
        self.dropped.append(self.number)


@pytest.fixture
def boots(monkeypatch: pytest.MonkeyPatch) -> Boots:
    made = Boots()
    monkeypatch.setattr(prove, "Boot", made)
    monkeypatch.setattr(prove, "make_ready", lambda _ground: None)
    monkeypatch.setattr(prove, "slot_devices", lambda _plan: None)
    return made


def request(tmp_path: Path) -> Request:
    return Request(ground=Ground.VM, system=SYSTEM, smp=1, seed=1, record=tmp_path / "record")


def test_a_boot_whose_successor_cannot_be_started_is_dropped(boots: Boots, tmp_path: Path) -> None:
    boots.is_full = True

    with pytest.raises(OSError, match="too many open files"):
        _ = prove.prove(request(tmp_path), tmp_path)

    assert boots.dropped == [0]


def test_what_was_started_ahead_is_dropped_when_a_run_ends_early(
    boots: Boots, tmp_path: Path
) -> None:
    def fail() -> None:
        raise MalformedEvent("garbage")

    boots.runs = fail

    with pytest.raises(MalformedEvent):
        _ = prove.prove(request(tmp_path), tmp_path)

    assert boots.dropped == [0, 1]


def test_a_system_that_says_what_is_no_event_is_red_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_given: object) -> None:
        raise MalformedEvent("garbage{")

    monkeypatch.setattr(command, "prove", fail)

    code = command.main([], {"XDG_RUNTIME_DIR": str(tmp_path)})

    assert code == command.RED
    assert "what was booted says what is no evidence: garbage{" in capsys.readouterr().err


def test_the_state_of_a_run_is_what_the_next_one_would_remove(boots: Boots, tmp_path: Path) -> None:
    found: list[str] = []

    def look() -> Any:
        found.extend(each.name for each in tmp_path.iterdir() if each.is_dir())
        raise KeyboardInterrupt

    boots.runs = look
    with pytest.raises(KeyboardInterrupt):
        _ = prove.prove(request(tmp_path), tmp_path)

    (state,) = found
    assert state.startswith(STATE_PREFIX)
