"""Where a running system's console lines go: a file of bounded size, a watching command, a stream.

A recorder may not block and may not raise: what cannot be written now is counted and left out.
"""

import os
import select
import socket
from pathlib import Path
from typing import Final

import msgspec

from nexus.abi import Event, EventKind

FILE_SIZE_MAX: Final = 1024 * 1024  # bytes of the console file; as much again in its predecessor
STREAM_SIZE_MAX: Final = 4096  # bytes written at once; a pipe that polls ready takes PIPE_BUF
TEXT_KINDS: Final = (
    EventKind.CONSOLE,
    EventKind.SPAWN,
    EventKind.SPAWN_FAILED,
    EventKind.EXIT,
    EventKind.HANG,
)


class Told(msgspec.Struct, frozen=True, array_like=True):
    """An event on its way to the watching command: kind, name of the service, text.

    The text is the console line, or says how it ended.
    """

    kind: str
    name: str
    text: str


def told_of(event: Event) -> Told | None:
    """The event for a person, None if it is not for one."""
    fields = event.fields
    name = str(fields.get("name", ""))
    match event.kind:
        case EventKind.CONSOLE:
            return Told(event.kind, name, str(fields["line"]))
        case EventKind.EXIT:
            signal = fields["signal"]
            text = f"killed by signal {signal}" if signal else f"exit code {fields['code']}"
            crash = str(fields.get("crash", ""))
            return Told(event.kind, name, f"{text}\n{crash}".rstrip())
        case EventKind.SPAWN:
            return Told(event.kind, name, f"started, generation {fields['generation']}")
        case EventKind.SPAWN_FAILED:
            detail = str(fields.get("detail", ""))
            why = f"{fields['reason']}, {detail}" if detail else str(fields["reason"])
            return Told(event.kind, name, f"could not be started: {why}")
        case EventKind.HANG:
            return Told(event.kind, name, "never yields")
        case _:
            return None


class Sink:
    """Takes events; `lost` counts the lines that some place had no room for."""

    def __init__(self, file: Path, watcher: socket.socket | None, stream: int | None) -> None:
        self.lost = 0
        self._path = file
        self._file = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._size = os.fstat(self._file).st_size
        self._watcher = watcher
        self._stream = stream

    def record(self, event: Event) -> None:
        """Take an event."""
        told = told_of(event)
        if told is not None:
            line = f"{event.time / 1e9:.6f} {told.name} [{told.kind}] {told.text}\n".encode()
            self._keep(line)
            self._show(line)
            self.tell(told)

    def tell(self, told: Told) -> None:
        """Let the watching command know, as long as there is one."""
        if self._watcher is None:
            return
        try:
            _ = self._watcher.send(msgspec.json.encode(told), socket.MSG_DONTWAIT)
        except BlockingIOError:
            self.lost += 1
        except OSError:  # nobody watches any more
            self._watcher.close()
            self._watcher = None

    def _keep(self, line: bytes) -> None:
        if self._size + len(line) > FILE_SIZE_MAX:
            self._rotate()
        try:
            self._size += os.write(self._file, line)
        except OSError:
            self.lost += 1

    def _rotate(self) -> None:
        """Begin anew; the file so far is kept as the only predecessor."""
        try:
            _ = self._path.replace(self._path.with_name(f"{self._path.name}.1"))
            fresh = os.open(
                self._path,
                os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC,
                0o600,
            )
        except OSError:
            os.ftruncate(self._file, 0)
        else:
            os.close(self._file)
            self._file = fresh
        self._size = 0

    def _show(self, line: bytes) -> None:
        if self._stream is None:
            return
        ready = select.select([], [self._stream], [], 0)[1]
        try:
            if not ready or os.write(self._stream, line[:STREAM_SIZE_MAX]) < len(line):
                self.lost += 1
        except OSError:
            self._stream = None
