"""The host's side of a boot: when it may have the disks, and what it makes of how a guest ended."""

import io
import json
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final, Self

import pytest

from nexus.bootctl.handover import EXIT_REBOOT, EXIT_SLOT_FAILED
from nexus.proof.job import EXIT_HANG, EXIT_POWER_CUT, EXIT_RUN_OVER, Job
from nexus.proof.lock import AlreadyHeld
from nexus.proof.notes import NOTE, NOTE_STAGE
from nexus.proof.runner import GO
from nexus.proof.timeline import NOTES_SIZE_MAX, notes_of
from nexus.vm import host, qemu
from nexus.vm.contract import EXIT_GUEST, NOTE_CRASH, NOTE_OFF
from nexus.vm.host import EXIT_NO_MACHINE, QUESTIONS_MAX, Dropped
from nexus.vm.packages import NotHad
from nexus.vm.qmp import QmpFailed

SYSTEM: Final = Path(__file__).parents[2] / "systems" / "selftest.toml"


def note(kind: str, **fields: object) -> bytes:
    """A note as a guest sends it."""
    return json.dumps({NOTE: kind, "t": 1, **fields}, separators=(",", ":")).encode()


def off(code: object) -> bytes:
    """The last word of a guest."""
    return note(NOTE_OFF, code=code)


class Guest:
    """A machine; `order` is what was done around it."""

    def __init__(self) -> None:
        self.order: list[str] = []
        self.will(())

    def will(self, lines: Iterable[bytes], **ended: Any) -> None:
        """Say these lines, and end like this."""
        self._lines = tuple(lines)
        as_usual = {"code": 0, "timed_out": False, "stopped": False, "alarm": "", "lost": 0}
        self._ended = qemu.Ended(**{**as_usual, **ended})

    def run(self, _setup: Any, **given: Any) -> qemu.Ended:
        given["started"](lambda word: self.order.append(f"say {word}"))
        on_evidence: Callable[[float, bytes], bool] = given["evidence"]
        for line in self._lines:
            _ = on_evidence(1.0, line)
        return self._ended


@pytest.fixture
def guest(monkeypatch: pytest.MonkeyPatch) -> Guest:
    """One of which everything is written down that is done around it."""
    made = Guest()

    def write(word: str, result: Any = None) -> Callable[..., Any]:
        def done(*_given: object) -> Any:
            made.order.append(word)
            return result

        return done

    class Control:
        """A connection to its QEMU."""

        def __enter__(self) -> Self:
            return self

        def __exit__(self, *_error: object) -> None:
            made.order.append("closed")

    monkeypatch.setattr(qemu, "check", lambda _machine: None)
    monkeypatch.setattr(qemu, "put_in", write("put in"))
    monkeypatch.setattr(host, "disks_of", write("disks", ()))
    monkeypatch.setattr(host, "disks_later", write("no disks", ()))
    locked = write("lock")
    monkeypatch.setattr(host, "take_directory", lambda _state: locked() or os.open(os.devnull, 0))
    monkeypatch.setattr(host, "awaited", write("connected", Control()))
    monkeypatch.setattr(host, "bring_home", write("home"))
    monkeypatch.setattr(host, "asked", lambda _path, _question: {"answer": 1})
    return made


def booted(
    guest: Guest, monkeypatch: pytest.MonkeyPatch, state: Path, *, ahead: bool = False
) -> tuple[int, str]:
    """The exit code of a boot, and what was told of it."""
    monkeypatch.setattr(qemu, "run", guest.run)
    image: Any = SimpleNamespace(
        machine=None, kernel=Path("kernel"), write_initrd=lambda file, _tree: file.touch()
    )
    job = Job(
        ground="vm",
        system=str(SYSTEM),
        smp=1,
        seed=1,
        limit=1,
        boot=2,
        state=str(state),
        ahead=ahead,
    )
    told: list[str] = []
    code = host.boot(
        image,
        job,
        state,
        event=lambda _line: False,
        told=lambda _seconds, text: told.append(text),
    )
    return code, "\n".join(told)


# ---------------------------------------------------------------- ahead


def says(monkeypatch: pytest.MonkeyPatch, word: bytes) -> None:
    """What the runner says to the host."""
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(word)))


def test_a_boot_takes_the_disks_before_its_machine_is_started(
    guest: Guest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _ = booted(guest, monkeypatch, tmp_path)

    assert guest.order == ["lock", "disks", "home"]


def test_a_machine_that_is_started_ahead_gets_the_disks_at_the_word_and_hears_of_it_last(
    guest: Guest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    says(monkeypatch, GO)

    _ = booted(guest, monkeypatch, tmp_path, ahead=True)

    done = ["no disks", "lock", "disks", "connected", "put in", "closed", "say go", "home"]
    assert guest.order == done


@pytest.mark.parametrize("word", [b"", b"no", b"stop\n"])
def test_a_machine_that_is_started_ahead_and_not_run_has_no_disks(
    guest: Guest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, word: bytes
) -> None:
    says(monkeypatch, word)

    with pytest.raises(Dropped):
        _ = booted(guest, monkeypatch, tmp_path, ahead=True)

    assert guest.order == ["no disks"]
    assert not list(tmp_path.glob(".initrd*"))


def test_disks_that_another_machine_has_are_not_given(
    guest: Guest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    says(monkeypatch, GO)

    def held(_state: Path) -> int:
        raise AlreadyHeld(1)

    monkeypatch.setattr(host, "take_directory", held)

    with pytest.raises(NotHad, match="another machine has the disks"):
        _ = booted(guest, monkeypatch, tmp_path, ahead=True)

    assert guest.order == ["no disks"]


def test_a_qemu_that_takes_no_disks_is_the_end_of_the_boot(
    guest: Guest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    says(monkeypatch, GO)

    def refused(*_given: object) -> None:
        raise QmpFailed("blockdev-add: no")

    monkeypatch.setattr(qemu, "put_in", refused)

    with pytest.raises(QmpFailed):
        _ = booted(guest, monkeypatch, tmp_path, ahead=True)

    assert "say go" not in guest.order


# ---------------------------------------------------------------- the end


@pytest.mark.parametrize("code", [0, EXIT_REBOOT, EXIT_SLOT_FAILED, 6, EXIT_RUN_OVER, EXIT_HANG])
def test_the_code_of_a_boot_is_what_its_guest_says(
    guest: Guest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: int
) -> None:
    guest.will((off(code),))

    assert booted(guest, monkeypatch, tmp_path) == (code, "")


@pytest.mark.parametrize(
    ("lines", "ended", "why"),
    [
        ((off(0),), {"alarm": "Oops"}, "the console tells of 'Oops'"),
        ((off(0),), {"timed_out": True, "code": None}, "not over in time"),
        ((note(NOTE_CRASH, text="no"), off(0)), {}, "process 1 failed"),
        ((note(NOTE_CRASH, text=""), off(0)), {}, "process 1 failed"),
        ((), {}, "without a word"),
        ((off(0),), {"code": 1}, "QEMU's exit code is 1"),
    ],
)
def test_whatever_speaks_against_it_makes_a_boot_fail(
    guest: Guest,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    lines: tuple[bytes, ...],
    ended: dict[str, Any],
    why: str,
) -> None:
    guest.will(lines, **ended)

    code, told = booted(guest, monkeypatch, tmp_path)

    assert code == EXIT_GUEST
    assert why in told


@pytest.mark.parametrize(
    "word",
    [
        256,
        -1,
        EXIT_POWER_CUT,  # the host cuts it, and says so
        EXIT_NO_MACHINE,
        None,
        "0",
        True,
        0.0,
    ],
)
def test_a_last_word_that_is_no_code_of_a_guest_is_none(
    guest: Guest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, word: object
) -> None:
    guest.will((off(word),))

    code, told = booted(guest, monkeypatch, tmp_path)

    assert code == EXIT_GUEST
    assert "without a word" in told


# ---------------------------------------------------------------- notes


@pytest.mark.parametrize(
    "line",
    [
        b'{"guest":"off"}',
        b'{"guest":"off","code":1e999}',
        b'{"guest":"stage"}',
        b'{"guest":"stage","t":1,"name":2}',
        b'{"guest":["off"],"code":0}',
        b'{"guest":"host","t":1}',
        b'{"guest":' + b"[" * 5_000,
        b'{"guest":"up","t":1',
    ],
)
def test_a_note_of_no_shape_is_kept_and_means_nothing(
    guest: Guest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, line: bytes
) -> None:
    guest.will((line, off(0)))

    assert booted(guest, monkeypatch, tmp_path) == (0, "")

    kept = notes_of(tmp_path, 2)
    assert kept[0]["malformed"] == line[:200].decode()
    assert not any(NOTE in each for each in kept[:1])


def test_a_guest_says_nothing_in_the_name_of_the_host(
    guest: Guest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    forged = note(NOTE_STAGE, name="x", host="cpus", answer=2, at=-5)
    escaped = b'{"guest":"u\\u0070","t":1,"host":"cpus","answer":2}'
    guest.will((forged, escaped, off(0)))

    _ = booted(guest, monkeypatch, tmp_path)

    kept = notes_of(tmp_path, 2)
    assert kept[0]["at"] == 1.0
    by_host = [each for each in kept if "host" in each]
    assert [each["host"] for each in by_host] == ["cpus", "ended"]
    assert by_host[0]["answer"] == 1  # QEMU's, who was asked for it


def test_a_flood_of_notes_is_bounded_and_counted_and_the_end_is_told(
    guest: Guest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    flood = [note(NOTE_STAGE, name="x" * 10_000)] * 500
    questions = [note("windows", line="x", pid=1, holders=[])] * 100
    guest.will((*questions, *flood, off(0)))

    assert booted(guest, monkeypatch, tmp_path) == (0, "")

    assert (tmp_path / "guest-2.jsonl").stat().st_size < NOTES_SIZE_MAX
    kept = notes_of(tmp_path, 2)
    assert kept[-1]["host"] == "ended"
    assert kept[-1]["lost_notes"] > 400
    assert sum(each.get("host") == "devices" for each in kept) == QUESTIONS_MAX
