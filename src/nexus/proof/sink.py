"""The recorder of a booted system: events as JSON lines into a pipe to the runner.

It never blocks and never raises: what the pipe does not take at once waits in a bounded buffer,
and what does not fit there is lost and counted. A lost event turns the run red.
"""

import fcntl
import os
import stat
from collections import deque
from threading import Event as Pause
from typing import Final

from nexus.abi import Event, Nanos
from nexus.proof.record import encode_event

PIPE_SIZE: Final = 1024 * 1024  # bytes; what an ordinary user may ask for
WAITING_SIZE_MAX: Final = 16 * 1024 * 1024  # bytes kept while the runner is slow
DRAIN_POLL: Final = 0.002  # seconds between two tries to hand over the rest at the end
DRAIN_TRIES: Final = 5000  # 10 s; a runner that reads nothing for so long is gone


class EventSink:
    """Owns the write end of the pipe. `record` is an abi.Recorder."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._waiting: deque[bytes] = deque()
        self._waiting_size = 0
        self.dropped = 0
        self.latest = Nanos(0)
        os.set_blocking(descriptor, False)
        os.set_inheritable(descriptor, False)
        if not stat.S_ISFIFO(os.fstat(descriptor).st_mode):
            return  # a port of a virtual machine, which has no size to set
        try:
            _ = fcntl.fcntl(descriptor, fcntl.F_SETPIPE_SZ, PIPE_SIZE)
        except PermissionError:  # over the user's pipe budget: the buffer below does the rest
            return

    def record(self, event: Event) -> None:
        """Take one event."""
        self.latest = event.time
        self.send(encode_event(event) + b"\n")

    def send(self, line: bytes) -> None:
        """Take one line as it is."""
        if self._waiting_size + len(line) > WAITING_SIZE_MAX:
            self.dropped += 1
            return
        self._waiting.append(line)
        self._waiting_size += len(line)
        _ = self._flush()

    def close(self) -> None:
        """Hand over what still waits, say how much was lost, and close the pipe."""
        self.end()
        os.close(self._descriptor)

    def end(self) -> None:
        """Hand over what still waits, and say how much was lost."""
        pause = Pause()
        for _ in range(DRAIN_TRIES):
            if self._flush():
                break
            _ = pause.wait(DRAIN_POLL)
        self._waiting.append(b'{"dropped":%d}\n' % self.dropped)
        _ = self._flush()

    def _flush(self) -> bool:
        """Write until the pipe is full. Whether nothing waits any more."""
        while self._waiting:
            line = self._waiting[0]
            try:
                written = os.write(self._descriptor, line)
            except BlockingIOError:
                return False
            except BrokenPipeError:  # the runner is gone, nobody is left to tell
                self._waiting.clear()
                self._waiting_size = 0
                return True
            self._waiting_size -= written
            if written < len(line):
                self._waiting[0] = line[written:]
            else:
                _ = self._waiting.popleft()
        return True
