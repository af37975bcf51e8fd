"""Where a running system's console lines go: a file of bounded size, a watching command, a stream.

A recorder may not block and may not raise: what cannot be written now is counted and left out.
"""

import os
import select
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import msgspec

from nexus.abi import CONSOLE_LINE_SIZE_MAX, INIT_NAME, SERVICE_NAME_SIZE_MAX, Event, EventKind
from nexus.services.logd.escape import escaped

FILE_SIZE_MAX: Final = 1024 * 1024  # bytes of the console file; as much again in its predecessor
STREAM_SIZE_MAX: Final = 4096  # bytes of an event; a pipe that polls ready takes PIPE_BUF
TOLD_SIZE_MAX: Final = 8192  # bytes of a message to the watching command
TEXT_SIZE_MAX: Final = 3584  # bytes of UTF-8 of a Told's text, escaped and indented
WHY_SIZE_MAX: Final = 256  # bytes of UTF-8 of a Told's `why`, escaped
HEAD_SIZE_MAX: Final = 256  # bytes of what stands around the text: time, name, kind, punctuation
JSON_GROWTH_MAX: Final = 2  # bytes for one: text without control characters, \ and " doubled
INDENT: Final = "    "  # before each further line: a line of its own begins with a time
CUT: Final = "..."

assert JSON_GROWTH_MAX * (TEXT_SIZE_MAX + WHY_SIZE_MAX) + HEAD_SIZE_MAX <= TOLD_SIZE_MAX
assert TEXT_SIZE_MAX + HEAD_SIZE_MAX <= STREAM_SIZE_MAX
assert SERVICE_NAME_SIZE_MAX <= HEAD_SIZE_MAX // 2
assert CONSOLE_LINE_SIZE_MAX <= TEXT_SIZE_MAX


class Told(msgspec.Struct, frozen=True, array_like=True):
    """An event on its way to the watching command: kind, name of the service, text.

    The text is the console line, or says how it ended: one line, and further ones, indented, from
    a crash. No character in it ends a line, moves a cursor or turns the direction of text but the
    line feeds between those, and it has TEXT_SIZE_MAX bytes at most. `why` is the reason that init
    gives beside its line, on one line of WHY_SIZE_MAX bytes at most.
    """

    kind: str
    name: str
    text: str
    why: str = ""


def told_of(event: Event) -> Told | None:
    """The event for a person, None if it is not for one."""
    fields = event.fields
    name = str(fields.get("name", ""))
    match event.kind:
        case EventKind.CONSOLE:
            why = _why_of(fields.get("evidence")) if name == INIT_NAME else ""
            return Told(event.kind, name, str(fields["line"]), why)
        case EventKind.EXIT:
            signal = fields["signal"]
            text = f"killed by signal {signal}" if signal else f"exit code {fields['code']}"
            crash = _indented(str(fields.get("crash", "")), TEXT_SIZE_MAX - len(text))
            return Told(event.kind, name, text + crash)
        case EventKind.SPAWN:
            return Told(event.kind, name, f"started, generation {fields['generation']}")
        case EventKind.SPAWN_FAILED:
            detail = str(fields.get("detail", ""))
            why = f"{fields['reason']}, {detail}" if detail else str(fields["reason"])
            return Told(event.kind, name, one_line(f"could not be started: {why}"))
        case EventKind.DEVICE if fields.get("what") == "made":
            text = f"a new image of {fields['size']} zero bytes was made, {fields['path']}"
            return Told(event.kind, name, one_line(text))
        case EventKind.HANG:
            return Told(event.kind, name, "never yields")
        case _:
            return None


def _indented(text: str, room: int) -> str:
    """Each line of `text` after a line feed and an indent, in `room` bytes: the end tells most."""
    if not text.strip():
        return ""
    lines = "".join(f"\n{INDENT}{escaped(line)}" for line in text.rstrip().split("\n"))
    encoded = lines.encode("utf-8", "backslashreplace")
    if len(encoded) <= room:
        return encoded.decode()
    before = f"\n{INDENT}{CUT}"
    return before + encoded[len(before) - room :].decode("utf-8", "ignore")


def _why_of(evidence: object) -> str:
    """init's own word for why: `why` of what it gave up, `reason` of what it did not start."""
    if not isinstance(evidence, Mapping):
        return ""
    return one_line(str(evidence.get("why") or evidence.get("reason") or ""), WHY_SIZE_MAX)


def one_line(text: str, room: int = TEXT_SIZE_MAX) -> str:
    """A text as a Told may have it, whatever it was: one line, its beginning if it is too long."""
    encoded = escaped(text).encode("utf-8", "backslashreplace")
    if len(encoded) <= room:
        return encoded.decode()
    return encoded[: room - len(CUT)].decode("utf-8", "ignore") + CUT


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
        data = msgspec.json.encode(told)
        assert len(data) <= TOLD_SIZE_MAX, "the watching command reads no more"
        try:
            _ = self._watcher.send(data, socket.MSG_DONTWAIT)
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
            if not ready or os.write(self._stream, line) < len(line):
                self.lost += 1
        except OSError:
            self._stream = None
