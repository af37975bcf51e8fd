"""A system that lives in a process of its own and does one operation after another."""

import dataclasses
import os
import select
import sys
import traceback

from nexus.kernel.core.limits import SystemLimits
from nexus.testing.rig import Rig, kill_tree
from tests.stateful.interpreter import PROGRAM, Operation, child, conductor, encoded

ANSWER_TIME_MAX = 20.0  # seconds; a correct kernel needs milliseconds


class SessionFailed(AssertionError):
    """The system ended, or did not answer in time."""


class Session:
    """A kernel with root and two children, driven from outside."""

    def __init__(self, rig: Rig) -> None:
        self._rig = rig
        inner, self._writer = os.pipe()
        self._reader, outer = os.pipe()
        self._failure_reader, failure = os.pipe()
        sys.stdout.flush()
        self._pid = os.fork()
        if self._pid == 0:
            # Also the pipes of other sessions: a copy here would keep those from ending.
            _close_all_but(inner, outer, failure)
            self._live(rig, inner, outer, failure)
        for theirs in (inner, outer, failure):
            os.close(theirs)
        self._buffer = b""
        self.first = self._answer()

    def _live(self, rig: Rig, reader: int, writer: int, failure: int) -> None:
        text = ""
        try:
            here = dataclasses.replace(rig, forked=False)
            outcome = here.run_here(
                conductor(reader, writer), {PROGRAM: child}, SystemLimits(), b""
            )
            text = "\n".join(outcome.failures)
        except BaseException:  # noqa: BLE001 (nothing may unwind into pytest's copy)
            text = traceback.format_exc()
        finally:
            os.write(failure, text.encode()[:60_000])
            os._exit(1 if text else 0)

    def do(self, who: int, operation: Operation) -> str:
        """One operation by one task: its normalised result."""
        os.write(self._writer, f"{who} {encoded(operation)}\n".encode())
        return self._answer()

    def close(self) -> None:
        """End the system and see that it ended well."""
        os.close(self._writer)
        text = self._last_words()
        _, status = os.waitpid(self._pid, 0)
        os.close(self._reader)
        os.close(self._failure_reader)
        if text or status:
            raise SessionFailed(f"{self._rig.name} ended with {status:#x}: {text}")

    def kill(self) -> None:
        """End the system without ceremony, after a failure."""
        kill_tree(self._pid)
        os.waitpid(self._pid, 0)
        for mine in (self._writer, self._reader, self._failure_reader):
            os.close(mine)

    def _answer(self) -> str:
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([self._reader], [], [], ANSWER_TIME_MAX)
            if not ready:
                raise SessionFailed(f"{self._rig.name} did not answer")
            chunk = os.read(self._reader, 1 << 16)
            if not chunk:
                raise SessionFailed(f"{self._rig.name} ended: {self._last_words()}")
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line.decode()

    def _last_words(self) -> str:
        words = b""
        while True:
            ready, _, _ = select.select([self._failure_reader], [], [], ANSWER_TIME_MAX)
            if not ready:
                return "and did not end"
            chunk = os.read(self._failure_reader, 1 << 16)
            if not chunk:
                return words.decode()
            words += chunk


def _close_all_but(*kept: int) -> None:
    low = 3
    for descriptor in (*sorted(kept), 4096):
        os.closerange(low, descriptor)
        low = descriptor + 1
