"""The host-side guard against a task that computes for ever.

The processor time of this process is looked at in periods. A task that stays inside one and the
same step for a number of whole periods is interrupted where it spins. Nothing else is touched,
so a run without a hang is the same with and without the guard. Signals reach the main thread
only: a kernel that runs in another thread has no guard.

The guard also remembers an exception that the host's SIGINT raised, wherever it came up: a task's
own KeyboardInterrupt is a crash of that task, the host's ends the run.
"""

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Final

PERIODS: Final = 5  # looks at one and the same step before it is called a hang


class Spinning(BaseException):
    """Raised inside the coroutine that spins. Not an Exception: no service may swallow it."""


class Watchdog:
    """Guards a block of code; `progress` is a value that changes with every step."""

    __slots__ = (
        "_armed",
        "_interrupt",
        "_looks",
        "_on_interrupt",
        "_period",
        "_previous",
        "_progress",
        "_seen",
    )

    def __init__(self, progress: Callable[[], object], limit_s: float) -> None:
        assert limit_s > 0, "a limit in seconds of processor time"
        self._progress = progress
        self._period = limit_s / PERIODS
        self._seen: object = None
        self._looks = 0
        self._armed = False
        self._previous: object = None
        self._on_interrupt: object = None
        self._interrupt: BaseException | None = None

    def __enter__(self) -> None:
        """Start looking, if signals reach this thread."""
        self._armed = threading.current_thread() is threading.main_thread()
        if self._armed:
            self._previous = signal.signal(signal.SIGVTALRM, self._look)
            _ = signal.setitimer(signal.ITIMER_VIRTUAL, self._period, self._period)
            self._on_interrupt = signal.getsignal(signal.SIGINT)
            if callable(self._on_interrupt):
                _ = signal.signal(signal.SIGINT, self._interrupted)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop looking and give the signal back."""
        if self._armed:
            _ = signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            _ = signal.signal(signal.SIGVTALRM, self._previous)  # type: ignore[arg-type]
            if callable(self._on_interrupt):
                _ = signal.signal(signal.SIGINT, self._on_interrupt)

    def pass_on(self) -> None:
        """Raise again what the host's SIGINT raised, if it did."""
        if self._interrupt is not None:
            raise self._interrupt

    def _interrupted(self, number: int, frame: FrameType | None) -> None:
        assert callable(self._on_interrupt), "only such a handler is wrapped"
        try:
            _ = self._on_interrupt(number, frame)
        except BaseException as error:  # remembered so that no task swallows it, and goes on
            self._interrupt = error
            raise

    def _look(self, _number: int, frame: FrameType | None) -> None:
        seen = self._progress()
        if seen != self._seen:
            self._seen = seen
            self._looks = 0
            return
        self._looks += 1
        # Never interrupt the kernel itself: only code that a step of a task has entered.
        if self._looks >= PERIODS and frame is not None and not _in_kernel(frame):
            self._looks = 0
            raise Spinning


def _in_kernel(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__", "")).startswith("nexus.kernel.sim")
