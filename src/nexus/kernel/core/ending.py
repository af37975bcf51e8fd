"""How a task ends: its exit code, and the end of its coroutine."""

import contextlib
import ctypes
import sys
from collections.abc import Coroutine
from typing import Any, Final

EXIT_CODE_MAX: Final = 255  # what a process can say
EXIT_CRASH: Final = 70  # EX_SOFTWARE of sysexits.h: the program raised

# What a coroutine's own code may raise while it is ended. Not here: KeyboardInterrupt and what a
# kernel raises into a task on purpose, which are about more than the task.
_LAST_WORDS: Final = (Exception, GeneratorExit, SystemExit)


class NoExitCode(Exception):
    """A program returned what is no exit code: a crash of that task."""


def exit_code(value: object) -> int:
    """The exit code that a program's return value stands for. Raises NoExitCode."""
    if value is None:
        return 0
    if isinstance(value, int) and 0 <= value <= EXIT_CODE_MAX:
        return int(value)
    what = f"{value:#x}" if isinstance(value, int) else type(value).__name__
    raise NoExitCode(f"main returned {what}; an exit code is None or 0 to {EXIT_CODE_MAX}")


def end_coroutine(coroutine: Coroutine[Any, Any, Any]) -> None:
    """End a coroutine for good; its task's exit is decided, and nothing it does changes that.

    Only code of the task runs in here, so no fault of a kernel is dropped with its last words.
    """
    if getattr(coroutine, "cr_frame", coroutine) is None:
        return  # it has returned or raised
    unraisable: list[BaseException | None] = []
    former = sys.unraisablehook
    sys.unraisablehook = lambda told: unraisable.append(told.exc_value)
    try:
        with contextlib.suppress(*_LAST_WORDS):
            coroutine.close()
    finally:
        sys.unraisablehook = former
    if getattr(coroutine, "cr_frame", None) is not None:
        # It awaits on in spite of GeneratorExit, and would be closed again, with a complaint on
        # stderr, whenever it is collected. So it never is: one leaked frame for each such task.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(coroutine))
    for error in unraisable:
        if error is not None and not isinstance(error, _LAST_WORDS):
            raise error
