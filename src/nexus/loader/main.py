"""The loader's process: `python -P -m nexus.loader.main JOB`, started by `nexus up --slots`.

    fork -> the child chooses a slot and becomes its init -> wait for its end -> again, or end

    ends with EXIT_REBOOT, EXIT_SLOT_FAILED .......... again
    a trial that is not judged yet ends otherwise .... again; its try is counted already
    a trial gives no verdict by its deadline ......... killed, and again, judged or not
    anything else .................................... the end of the system

It is small on purpose, in what it does and in memory: it stays beside init as long as a system
runs. Everything that can go wrong with a set goes wrong in a child.
"""

import fcntl
import json
import os
import select
import signal
import stat
import sys
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

# Those of nexus.bootctl.handover, which a test compares: importing it here would cost as much
# memory as everything else of this process.
EXIT_REBOOT: Final = 3
EXIT_SLOT_FAILED: Final = 4
EXIT_ENDED: Final = 5
EXIT_STOPPED: Final = 6
EXIT_OK: Final = 0
EXIT_FAILED: Final = 1
ENDED: Final = {EXIT_STOPPED: EXIT_OK, EXIT_ENDED: EXIT_FAILED}
"""Exit codes of an init that somebody told to end, and what the loader makes of them."""
JUDGED, OPEN, FAILING = 0, 1, 2  # of a trial: committed or given up, not yet, init says it failed
SIGNAL_BASE: Final = 128  # exit code of a system whose init was killed, as a shell counts
LOCK_NAME: Final = "loader.lock"  # in the instance's directory
LOCK_TRIES: Final = 30
LOCK_PAUSE: Final = 0.01  # seconds
REFUSED: Final = "refused"  # nexus.cli.boot
BOOTING: Final = "booting"  # kind of what the watching command is told when a boot begins
START_SIZE_MAX: Final = 512  # bytes of what a child tells of its boot

PREPARE_MAX: Final = 600.0  # seconds to choose and unpack; the largest set takes a tenth of it
ASK_MAX: Final = 30.0  # seconds for a look at the boot device
MARGIN: Final = 2.0  # seconds beyond a trial's deadline: an init that works has its verdict then
END_MAX: Final = 25.0  # seconds to end in order after it; init kills what lives after 20
PR_SET_PDEATHSIG: Final = 1  # prctl(2)


class End(NamedTuple):
    """How a child ended."""

    code: int
    signal: int
    is_hung: bool = False
    errors: int = -1  # where its words on standard error begin; -1 where that is no file

    @property
    def seen(self) -> dict[str, Any]:
        """For nexus.loader.boots."""
        return self._asdict()

    @property
    def exit_code(self) -> int:
        """As a shell counts."""
        return SIGNAL_BASE + self.signal if self.signal else self.code


class Start(NamedTuple):
    """What a child said before it became init."""

    slot: str = ""
    trial: bool = False
    deadline: float = 0.0  # seconds


class Loader:
    """Boots until the system has ended."""

    def __init__(self, job: Any, margin: float) -> None:
        self._job = job
        self._margin = margin
        self._child = -1  # a pidfd
        self._stopping = False

    def run(self) -> int:
        """The exit code of the whole."""
        seen: dict[str, Any] | None = None
        while True:
            start, end = self._boot(seen)
            if start is None:  # it has said why
                return end.exit_code or EXIT_FAILED
            # Who was killed may have been judged at that moment: what was committed is booted.
            again = end.is_hung or (end.code in (EXIT_REBOOT, EXIT_SLOT_FAILED) and not end.signal)
            is_open = start.trial and self._verdict() != JUDGED
            if self._stopping or not (again or (is_open and end.exit_code not in ENDED)):
                if is_open:
                    _ = self._asked(partial(self._note, end))
                return ENDED.get(end.exit_code, end.exit_code)
            seen = end.seen

    # ------------------------------------------------------------------ a boot

    def _boot(self, seen: dict[str, Any] | None) -> tuple[Start | None, End]:
        """One boot, from the fork to the end of its init; None for one that never began."""
        errors = os.fstat(sys.stderr.fileno())
        said = errors.st_size if stat.S_ISREG(errors.st_mode) else -1
        reader, writer = os.pipe()
        loader = os.getpid()
        pid = os.fork()
        if pid == 0:
            _live(loader, lambda: self._become(seen, writer))
        os.close(writer)
        self._child = os.pidfd_open(pid)
        if self._stopping:  # asked between the last boot and this one
            self._pass_on(signal.SIGTERM)
        start = self._started(reader)
        os.close(reader)
        is_hung = start is not None and start.trial and self._has_hung(start.deadline)
        if start is None or is_hung:
            self._pass_on(signal.SIGKILL)
        _ = self._has_ended(None)
        os.close(self._child)
        self._child = -1
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        return start, End(max(code, 0), max(-code, 0), is_hung, said)

    def _become(self, seen: dict[str, Any] | None, writer: int) -> int:
        """The child's life; it ends here only if nothing could be booted."""
        from nexus.loader import boots

        try:
            boots.become(self._job, seen, writer)
        except boots.CANNOT as error:
            return _refuse(self._job, f"nothing can be booted: {error}")

    def _started(self, reader: int) -> Start | None:
        """What the child says before its exec closes the pipe; None if it ends without a word, or
        takes for ever."""
        text = b""
        poll = select.poll()
        poll.register(reader, select.POLLIN)
        while len(text) <= START_SIZE_MAX and poll.poll(PREPARE_MAX * 1000):
            part = os.read(reader, START_SIZE_MAX)
            if not part:
                break
            text += part
        try:
            told = json.loads(text)
            return Start(told["slot"], told["trial"], told["deadline"] / 1e9)
        except (ValueError, KeyError, TypeError):
            return None

    def _has_hung(self, deadline: float) -> bool:
        """Whether a trial's init lives beyond its deadline and has no verdict, or cannot end."""
        if self._has_ended(deadline + self._margin):
            return False
        verdict = self._verdict()
        if verdict == FAILING:
            return not self._has_ended(END_MAX)
        return verdict == OPEN

    def _has_ended(self, seconds: float | None) -> bool:
        """Whether init ends in time; None is for as long as it takes."""
        poll = select.poll()
        poll.register(self._child, select.POLLIN)
        return bool(poll.poll(None if seconds is None else seconds * 1000))

    # ------------------------------------------------------------------ the boot device

    def _verdict(self) -> int:
        """How it stands with the trial; a boot device that does not say is as good as none."""

        def ask() -> int:
            from nexus.loader import boots

            return boots.verdict(self._job)

        return self._asked(ask)

    def _note(self, end: End) -> int:
        from nexus.loader import boots

        boots.note(self._job, end.seen)
        return EXIT_OK

    def _asked(self, work: Any) -> int:
        """The exit code of a child that does this and nothing else."""
        loader = os.getpid()
        pid = os.fork()
        if pid == 0:
            _live(loader, work)
        child = os.pidfd_open(pid)
        poll = select.poll()
        poll.register(child, select.POLLIN)
        if not poll.poll(ASK_MAX * 1000):
            signal.pidfd_send_signal(child, signal.SIGKILL)
        os.close(child)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    # ------------------------------------------------------------------ signals

    def on_signal(self, number: int, _frame: object) -> None:
        """What the loader is asked, init is asked: to end, or to read its policy again."""
        if number != signal.SIGHUP:
            self._stopping = True
        self._pass_on(number)

    def _pass_on(self, number: int) -> None:
        if self._child < 0:
            return
        try:
            signal.pidfd_send_signal(self._child, number)
        except ProcessLookupError:
            return  # it has ended, and is about to be reaped


SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def _live(loader: int, work: Any) -> None:
    """A forked child's life. It has the signals' old meaning, and dies with the loader: who starts
    another one finds neither its lock held nor a try of the trial taken for nothing."""
    code = EXIT_FAILED
    try:
        _leash(loader, signal.SIGKILL)
        for number in SIGNALS:
            _ = signal.signal(number, signal.SIG_DFL)
        code = work()
    finally:
        error = sys.exc_info()[1]
        if error is not None:
            text = f"nexus: the loader failed: {type(error).__name__}: {error}\n"
            _ = os.write(sys.stderr.fileno(), text.encode("utf-8", "backslashreplace"))
        os._exit(code)


def _refuse(job: Any, why: str) -> int:
    """Say in one sentence why there is no boot, on standard error and to the watching command."""
    from nexus.loader.boots import tell

    _ = sys.stderr.write(f"nexus: {why}\n")
    tell(job, REFUSED, why)
    return EXIT_FAILED


def _leash(parent: int, number: int) -> None:
    """Have the kernel send this signal to this process when its parent ends."""
    import ctypes

    _ = ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:  # it ended before the line above
        os.kill(os.getpid(), number)


def _held(lock: int) -> bool:
    """Take the lock; a command that only looks has it for a moment."""
    for _ in range(LOCK_TRIES):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _ = select.select([], [], [], LOCK_PAUSE)
        else:
            return True
    return False


def main(argv: list[str]) -> int:
    """Be the loader of `JOB` (nexus.cli.slots), to the end of its system."""
    job = json.loads(argv[0])
    settings = job.pop("loader")
    lock = os.open(
        Path(job["home"]) / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600
    )
    if not _held(lock):
        title = job["running"]["title"]
        return _refuse(job, f"another loader boots {title}: end it with `nexus down`")
    if settings["becomes"]:
        from nexus.loader import boots

        try:
            boots.become(job, None, -1)
        except boots.CANNOT as error:
            return _refuse(job, f"nothing can be booted: {error}")
    loader = Loader({**job, "parent": os.getpid(), "leashed": True}, settings["margin"])
    for number in SIGNALS:
        _ = signal.signal(number, loader.on_signal)
    if job["leashed"]:
        _leash(job["parent"], signal.SIGTERM)  # the command
    return loader.run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
