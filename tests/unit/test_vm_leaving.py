"""A boot that the runner has seen enough of: what it was asked to fetch is fetched first."""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import pytest

from nexus.proof.job import Job
from nexus.proof.notes import NOTE
from nexus.services.selftest.export_rungs import SCRAPE_LINE
from nexus.vm import host, qemu
from nexus.vm.contract import NOTE_OFF, SCRAPE_WORD, STOP_WORD

SYSTEM: Final = Path(__file__).parents[2] / "systems" / "selftest.toml"
SCRAPE: Final = json.dumps({"k": "console", "f": {"line": SCRAPE_LINE}}).encode()
MARKER: Final = b'{"k":"console","f":{"line":"SELFTEST: export scrape ok"}}'
OFF: Final = json.dumps({NOTE: NOTE_OFF, "t": 1, "code": 0}, separators=(",", ":")).encode()
ENDED: Final = qemu.Ended(code=0, timed_out=False, stopped=False, alarm="", lost=0)


class Guest:
    """A machine that says these lines, and keeps what it was told and which of them ended it."""

    def __init__(self, lines: tuple[bytes, ...]) -> None:
        self._lines = lines
        self.told: list[str] = []
        self.ended_at: bytes | None = None

    def run(self, _setup: Any, **given: Any) -> qemu.Ended:
        given["started"](self.told.append)
        on_evidence: Callable[[float, bytes], bool] = given["evidence"]
        self.ended_at = next((line for line in self._lines if on_evidence(1.0, line)), None)
        return ENDED


@pytest.fixture(autouse=True)
def _no_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qemu, "check", lambda _machine: None)
    monkeypatch.setattr(host, "disks_of", lambda _plan, _state: ())
    monkeypatch.setattr(host, "bring_home", lambda _state: None)
    monkeypatch.setattr(signal, "signal", lambda _number, _handler: None)


def booted(guest: Guest, monkeypatch: pytest.MonkeyPatch, state: Path) -> int:
    """The exit code of a boot whose runner reads no further than the marker."""
    monkeypatch.setattr(qemu, "run", guest.run)
    image: Any = SimpleNamespace(
        machine=None, kernel=Path("kernel"), write_initrd=lambda file, _tree: file.touch()
    )
    job = Job(ground="vm", system=str(SYSTEM), smp=1, seed=1, limit=1, boot=2, state=str(state))
    return host.boot(
        image, job, state, event=lambda line: line != SCRAPE, told=lambda _seconds, _text: None
    )


def test_who_fetches_a_page_goes_off_in_order_before_it_is_left(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    guest = Guest((SCRAPE, MARKER, MARKER, OFF))

    code = booted(guest, monkeypatch, tmp_path)

    assert (code, guest.ended_at) == (0, None)
    assert guest.told == [f"{SCRAPE_WORD} metrics 2", STOP_WORD]


def test_who_fetches_nothing_is_left_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    guest = Guest((MARKER, OFF))

    _ = booted(guest, monkeypatch, tmp_path)

    assert (guest.ended_at, guest.told) == (MARKER, [])
