"""The run record: JSON lines a reader can check a verdict against, bounded in size.

Line kinds: `run` (header), `event` (what a kernel recorded), `rung` (state and evidence of one
rung), `verdict`. The same event encoding travels from the booted system to the runner.
"""

import json
import os
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from nexus.abi import Event, EventKind, Nanos, Pid

EVENT_SIZE_MAX: Final = 64 * 1024  # bytes of one encoded event; a console line with evidence is 5 K
RECORD_SIZE_MAX: Final = 64 * 1024 * 1024  # bytes; a traced selftest run is a few MiB
RECORDS_KEPT: Final = 16  # files in the runtime directory, oldest removed first


class RecordLost(Exception):
    """The run record cannot be kept, so the run is no evidence; the text is one sentence."""


class MalformedEvent(Exception):
    """A line of the event stream is not an encoded event."""


def encode_event(event: Event) -> bytes:
    """One JSON line without its line break. A value JSON does not know becomes its text."""
    entry = {"t": event.time, "k": event.kind.value, "p": event.pid, "f": dict(event.fields)}
    return json.dumps(entry, separators=(",", ":"), default=_text).encode("utf-8")


def decode_event(line: bytes) -> Event:
    """The event of one line. Raises MalformedEvent."""
    try:
        entry = json.loads(line)
        time, kind, pid, fields = entry["t"], EventKind(entry["k"]), entry["p"], entry["f"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise MalformedEvent(f"{error}: {line[:80]!r}") from error
    if not (isinstance(time, int) and isinstance(pid, int) and isinstance(fields, dict)):
        raise MalformedEvent(f"a field has the wrong type: {line[:80]!r}")
    return Event(Nanos(time), kind, Pid(pid), fields)


class RecordWriter:
    """Writes the record of one run. What does not fit is left out and counted.

    Raises RecordLost when the file cannot be made or written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.left_out = 0
        self._size = 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise RecordLost(f"the record {path} cannot be made: {error.strerror}") from error
        self._file = FileIO(descriptor, "w")

    def event(self, boot: int, line: bytes) -> None:
        """Keep an encoded event as it came."""
        self._write(b'{"kind":"event","boot":%d,"event":%s}\n' % (boot, line))

    def entry(self, kind: str, fields: Mapping[str, Any]) -> None:
        """Keep anything else."""
        text = json.dumps({"kind": kind, **fields}, separators=(",", ":"), default=_text)
        self._write(text.encode("utf-8") + b"\n")

    def _write(self, data: bytes) -> None:
        if self._size + len(data) > RECORD_SIZE_MAX:
            self.left_out += 1
            return
        self._size += len(data)
        left = memoryview(data)
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            raise RecordLost(f"the record {self.path} is lost: {error.strerror}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()


def default_path(directory: Path, ground: str) -> Path:
    """A fresh file in `directory`/records, where only the newest RECORDS_KEPT are kept."""
    records = directory / "records"
    records.mkdir(mode=0o700, exist_ok=True)
    old = sorted(records.glob("*.jsonl"), key=lambda path: path.stat().st_mtime_ns)
    for path in old[: max(0, len(old) - RECORDS_KEPT + 1)]:
        path.unlink(missing_ok=True)
    return records / f"{ground}-{os.getpid()}.jsonl"


def _text(value: object) -> str:
    return value.hex() if isinstance(value, bytes | bytearray) else str(value)
