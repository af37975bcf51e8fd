"""The loader's loop, with children that follow a script in place of boots."""

import json
import os
import select
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from nexus.loader import boots
from nexus.loader.choose import NothingBootable
from nexus.loader.main import (
    EXIT_ENDED,
    EXIT_FAILED,
    EXIT_REBOOT,
    EXIT_SLOT_FAILED,
    EXIT_STOPPED,
    FAILING,
    JUDGED,
    OPEN,
    SIGNALS,
    Loader,
    main,
)

SHORT = 0.05  # seconds
LAST_WORDS = b"boot\n"  # of each boot on standard error
ERRORS = "init.err"
SAID = len(LAST_WORDS)
HUNG = {"code": 0, "signal": signal.SIGKILL, "is_hung": True, "errors": 0}


class Life(NamedTuple):
    """A boot: how its init ends, whether it is a trial, and what becomes of that."""

    code: int = 0
    signal: int = 0
    trial: bool = False
    verdict: int = OPEN
    hangs: bool = False
    asks: int = 0  # signal that comes to the loader while it lives


class Script:
    """Plays boots one after the other; each is a process, so it is told by files."""

    def __init__(self, folder: Path, lives: Sequence[Life]) -> None:
        self._folder = folder
        self._lives = lives

    @property
    def seen(self) -> list[dict[str, Any] | None]:
        """What each boot was told of the one before."""
        return [json.loads(path.read_text()) for path in sorted(self._folder.glob("boot-*"))]

    @property
    def noted(self) -> list[dict[str, Any]]:
        """What was kept of an end that no boot follows."""
        return [json.loads(path.read_text()) for path in self._folder.glob("note")]

    @property
    def said(self) -> str:
        """All that came to standard error."""
        return (self._folder / ERRORS).read_text()

    def become(self, _job: Any, seen: dict[str, Any] | None, told: int) -> None:
        number = len(self.seen)
        _ = (self._folder / f"boot-{number}").write_text(json.dumps(seen))
        if number == len(self._lives):
            raise NothingBootable("the script is over")
        life = self._lives[number]
        _ = os.write(sys.stderr.fileno(), LAST_WORDS)
        start = {"trial": life.trial, "deadline": SHORT * 1e9, "slot": "b"}
        _ = os.write(told, json.dumps(start).encode())
        os.close(told)
        if life.asks:
            _ = signal.signal(life.asks, signal.SIG_IGN)  # as an init that is told once and goes on
            os.kill(os.getppid(), life.asks)
        if life.hangs:
            signal.pause()
        if life.signal:
            os.kill(os.getpid(), life.signal)
        os._exit(life.code)

    def verdict(self, _job: Any) -> int:
        return self._lives[len(self.seen) - 1].verdict

    def note(self, _job: Any, seen: dict[str, Any]) -> None:
        _ = (self._folder / "note").write_text(json.dumps(seen))

    def run(self, monkeypatch: pytest.MonkeyPatch) -> int:
        for name in ("become", "verdict", "note"):
            monkeypatch.setattr(boots, name, getattr(self, name))
        with (self._folder / ERRORS).open("w", buffering=1) as errors:
            monkeypatch.setattr(sys, "stderr", errors)
            return Loader({"watcher": -1}, SHORT).run()


@pytest.mark.parametrize(
    ("lives", "code", "count"),
    [
        ([Life()], 0, 1),
        ([Life(code=1)], 1, 1),
        ([Life(signal=signal.SIGKILL)], 137, 1),
        ([Life(code=EXIT_REBOOT), Life()], 0, 2),
        ([Life(code=EXIT_REBOOT), Life(code=EXIT_REBOOT), Life(code=7)], 7, 3),
        ([Life(code=EXIT_SLOT_FAILED, trial=True), Life()], 0, 2),
        ([Life(code=70, trial=True), Life()], 0, 2),
        ([Life(signal=signal.SIGKILL, trial=True), Life()], 0, 2),
        ([Life(code=70, trial=True, verdict=JUDGED)], 70, 1),
        ([Life(code=EXIT_REBOOT, trial=True, verdict=JUDGED), Life()], 0, 2),
        ([Life(trial=True), Life()], 0, 2),
        ([Life(code=EXIT_STOPPED, trial=True)], 0, 1),
        ([Life(code=EXIT_STOPPED)], 0, 1),
        ([Life(code=EXIT_ENDED, trial=True)], 1, 1),
        ([Life(code=EXIT_ENDED)], 1, 1),
    ],
)
def test_what_is_booted_again_and_what_ends_the_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lives: list[Life], code: int, count: int
) -> None:
    script = Script(tmp_path, lives)

    assert script.run(monkeypatch) == code
    assert len(script.seen) == count


def test_each_boot_is_told_how_the_one_before_it_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = Script(
        tmp_path,
        [Life(code=EXIT_REBOOT), Life(code=9, trial=True), Life(signal=9, trial=True), Life()],
    )

    assert script.run(monkeypatch) == 0
    assert script.seen == [
        None,
        {"code": EXIT_REBOOT, "signal": 0, "is_hung": False, "errors": 0},
        {"code": 9, "signal": 0, "is_hung": False, "errors": SAID},
        {"code": 0, "signal": 9, "is_hung": False, "errors": 2 * SAID},
    ]


def test_a_trial_without_a_verdict_is_killed_after_its_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = Script(tmp_path, [Life(trial=True, hangs=True), Life()])

    assert script.run(monkeypatch) == 0
    assert script.seen[1] == HUNG


def test_a_trial_committed_while_it_was_killed_for_its_deadline_is_booted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Late(Script):
        """The commit becomes durable behind the loader's look at the boot device."""

        def verdict(self, job: Any) -> int:
            looked = tmp_path / "looked"
            is_late = looked.exists()
            looked.touch()
            return JUDGED if is_late else super().verdict(job)

    script = Late(tmp_path, [Life(trial=True, hangs=True), Life()])

    assert script.run(monkeypatch) == 0
    assert len(script.seen) == 2


def test_a_trial_that_says_it_failed_has_time_to_end_and_not_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nexus.loader.main.END_MAX", SHORT)
    script = Script(tmp_path, [Life(trial=True, verdict=FAILING, hangs=True), Life()])

    assert script.run(monkeypatch) == 0
    assert script.seen[1] == HUNG


class Signalled(Script):
    """A script whose loader has the signals, as `main` gives them to it."""

    def run(self, monkeypatch: pytest.MonkeyPatch) -> int:
        loader = Loader({"watcher": -1}, SHORT)
        for name in ("become", "verdict", "note"):
            monkeypatch.setattr(boots, name, getattr(self, name))
        before = [signal.signal(number, loader.on_signal) for number in SIGNALS]
        try:
            return loader.run()
        finally:
            for number, handler in zip(SIGNALS, before, strict=True):
                _ = signal.signal(number, handler)


@pytest.mark.parametrize("life", [Life(hangs=True), Life(trial=True, hangs=True, verdict=JUDGED)])
def test_what_is_proven_may_run_as_long_as_it_likes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, life: Life
) -> None:
    script = Signalled(tmp_path, [life])
    later = threading.Timer(8 * SHORT, os.kill, (os.getpid(), signal.SIGTERM))
    later.start()
    try:
        code = script.run(monkeypatch)
    finally:
        later.join()

    assert code == 128 + signal.SIGTERM
    assert len(script.seen) == 1, "who asks it to end ends the loader"


@pytest.mark.parametrize("life", [Life(code=EXIT_REBOOT), Life(code=9, trial=True)])
def test_who_asks_the_loader_to_end_gets_no_other_boot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, life: Life
) -> None:
    script = Signalled(tmp_path, [life._replace(asks=signal.SIGTERM)])

    assert script.run(monkeypatch) == life.code
    assert len(script.seen) == 1
    assert len(script.noted) == life.trial, "how a trial ended is kept"


def test_who_asks_between_two_boots_ends_the_one_that_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = Script(tmp_path, [Life(trial=True, hangs=True)])
    for name in ("become", "verdict", "note"):
        monkeypatch.setattr(boots, name, getattr(script, name))
    loader = Loader({"watcher": -1}, SHORT)
    loader.on_signal(signal.SIGTERM, None)

    assert loader.run() == 128 + signal.SIGTERM, "and not killed for a deadline"


def test_who_asks_for_the_policy_to_be_read_again_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = Signalled(tmp_path, [Life(code=EXIT_REBOOT, asks=signal.SIGHUP), Life()])

    assert script.run(monkeypatch) == 0
    assert len(script.seen) == 2


def test_an_end_of_a_trial_that_nobody_follows_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = Script(tmp_path, [Life(code=EXIT_STOPPED, trial=True)])

    assert script.run(monkeypatch) == 0
    assert script.noted == [{"code": EXIT_STOPPED, "signal": 0, "is_hung": False, "errors": 0}]


def test_an_end_of_a_proven_set_is_nothing_to_keep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = Script(tmp_path, [Life(code=9)])

    assert script.run(monkeypatch) == 9
    assert script.noted == []


def test_a_loader_with_nothing_to_boot_says_so_and_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = Script(tmp_path, [])

    assert script.run(monkeypatch) == EXIT_FAILED
    assert script.said == "nexus: nothing can be booted: the script is over\n"


def test_a_fault_of_the_loader_itself_ends_in_a_child(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = Script(tmp_path, [])

    def broken(*_words: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(script, "become", broken)

    assert script.run(monkeypatch) == EXIT_FAILED
    assert script.said == "nexus: the loader failed: ZeroDivisionError: a bug\n"


def test_a_child_that_still_chooses_ends_with_a_loader_that_is_killed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reader, writer = os.pipe()

    def become(_job: Any, _seen: Any, _told: int) -> None:
        _ = signal.alarm(30)  # it is left behind by nobody, whatever the loader does
        _ = os.write(writer, b"begun")
        signal.pause()

    monkeypatch.setattr(boots, "become", become)
    loader = os.fork()
    if loader == 0:
        os._exit(Loader({"watcher": -1}, SHORT).run())
    os.close(writer)
    begun = os.read(reader, 5)
    os.kill(loader, signal.SIGKILL)
    _ = os.waitpid(loader, 0)
    poll = select.poll()
    poll.register(reader, select.POLLIN)

    assert begun == b"begun"
    assert poll.poll(5_000), "the last holder of the other end is gone"
    assert os.read(reader, 1) == b""
    os.close(reader)


def test_two_loaders_never_boot_one_device(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    import fcntl

    job = {
        "home": str(tmp_path),
        "watcher": -1,
        "running": {"title": "pump"},
        "loader": {"becomes": False, "margin": 1.0},
    }
    with (tmp_path / "loader.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert main([json.dumps(job)]) == EXIT_FAILED
    assert "another loader boots pump" in capfd.readouterr().err
