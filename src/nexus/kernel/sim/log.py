"""The event log: every trap and every scheduling decision, cheap to write, equal to the byte.

A record is three integers (clock, what and who, detail), appended to a list and packed when a
chunk is full. Text is made only when somebody reads it. All records enter a running SHA-256;
those beyond a named cap are counted and no longer kept.
"""

import hashlib
import json
from array import array
from collections.abc import Iterator, Mapping
from typing import Final

from nexus.abi import Event, Status

RECORD_FIELDS: Final = 3  # integers in a record
CHUNK_RECORDS: Final = 8_192  # records packed at a time; 1.5 MB while they are Python integers
KEPT_RECORDS_MAX: Final = 1_000_000  # 24 MB; about 20 s of a busy system
KEPT_EVENTS_MAX: Final = 100_000  # of the evidence stream; a ladder run makes some hundreds

# Layout of the second integer: pid << 16 | CPU << 8 | code; from PICKED up a task was resumed
# from a run queue with this outcome, below it the task had kept its CPU. The detail of a trap is
# 0, a refusal's status with a minus, or what was received: the link's number << 16 | bytes.
PICKED: Final = 0x80
SENT: Final = 0x60
GONE: Final = 0x62
START: Final = 0x63
END: Final = 0x64
TIMER: Final = 0x65
EVENT: Final = 0x66
STEAL: Final = 0x67
ONLINE: Final = 0x68
RESCHED_REQUEST: Final = 0x69
RESCHED_SENT: Final = 0x6A
RESCHED_TAKEN: Final = 0x6B
RESCHED_ACKNOWLEDGED: Final = 0x6C
OVERFLOW: Final = 0x6D
YIELD: Final = 0x6E
SIGNAL: Final = 0x6F
PORT_OPEN: Final = 0x70
PORT_END: Final = 0x71
PORT_SENT: Final = 0x72
POLICY: Final = 0x73
NOTICE: Final = 0x74
BOOT_MEMORY: Final = 0x75
FROZEN: Final = 0x76
THAWED: Final = 0x77

NAMES: Final[Mapping[int, str]] = {
    SENT: "sent",
    GONE: "gone",
    START: "start",
    END: "end",
    TIMER: "timer",
    EVENT: "event",
    STEAL: "steal",
    ONLINE: "online",
    RESCHED_REQUEST: "resched-request",
    RESCHED_SENT: "resched-sent",
    RESCHED_TAKEN: "resched-taken",
    RESCHED_ACKNOWLEDGED: "resched-acknowledged",
    OVERFLOW: "overflow",
    YIELD: "yield",
    SIGNAL: "signal",
    PORT_OPEN: "port-open",
    PORT_END: "port-end",
    PORT_SENT: "port-sent",
    POLICY: "policy",
    NOTICE: "notice",
    BOOT_MEMORY: "boot-memory",
    FROZEN: "frozen",
    THAWED: "thawed",
}
CRASH_KEY: Final = "crash"  # event field with a traceback: file paths, so not in the text

_STATUS_NAMES: Final = {0: "OK", **{int(status): status.name for status in Status}}


class EventLog:
    """What happened, in order. `records` is the open chunk: hot paths add three integers."""

    __slots__ = ("_dropped", "_events_text", "_kept", "_packed", "_trap_names", "digest", "records")

    def __init__(self, trap_names: tuple[str, ...]) -> None:
        assert len(trap_names) < SENT, "a code for each trap below the other codes"
        self.records: list[int] = []
        self.digest = hashlib.sha256()
        self._packed: list[bytes] = []
        self._kept = 0
        self._dropped = 0
        self._events_text: dict[int, str] = {}  # position in the evidence stream -> text
        self._trap_names = trap_names

    def event(self, event: Event, number: int) -> None:
        """Enter an event of the evidence stream as its text."""
        fields = {key: value for key, value in event.fields.items() if key != CRASH_KEY}
        text = f"{event.kind.value} {json.dumps(fields, sort_keys=True, default=str)}"
        self.digest.update(text.encode())
        if number < KEPT_EVENTS_MAX:
            self._events_text[number] = text
        self.records += (event.time, event.pid << 16 | EVENT, number)

    def pack(self) -> None:
        """Close the open chunk; call when it holds CHUNK_RECORDS or before reading."""
        packed = array("q", self.records).tobytes()
        self.digest.update(packed)
        count = len(self.records) // RECORD_FIELDS
        del self.records[:]
        if self._kept + count <= KEPT_RECORDS_MAX:
            self._packed.append(packed)
            self._kept += count
        else:
            self._dropped += count

    def lines(self) -> Iterator[str]:
        """The kept records as text, then how many were not kept, then the digest of all."""
        self.pack()
        for packed in self._packed:
            numbers = array("q")
            numbers.frombytes(packed)
            for index in range(0, len(numbers), RECORD_FIELDS):
                yield self._line(*numbers[index : index + RECORD_FIELDS])
        yield f"records kept={self._kept} dropped={self._dropped}"
        yield f"sha256 {self.digest.hexdigest()}"

    def _line(self, time: int, what: int, detail: int) -> str:
        pid, cpu, code = what >> 16, what >> 8 & 0xFF, what & 0xFF
        if code & PICKED or code < SENT:
            name = self._trap_names[code & ~PICKED]
            how = "picked" if code & PICKED else "kept"
            if detail > 0:
                return f"{time} cpu{cpu} pid{pid} {how} {name} took {_message(detail)}"
            return f"{time} cpu{cpu} pid{pid} {how} {name} {_STATUS_NAMES[-detail]}"
        if code == EVENT:
            text = self._events_text.get(detail, "not kept")
            return f"{time} pid{pid} event {detail} {text}"
        if code in (SENT, PORT_SENT):
            return f"{time} pid{pid} {NAMES[code]} {_message(detail)}"
        return f"{time} cpu{cpu} pid{pid} {NAMES[code]} {detail}"


def _message(detail: int) -> str:
    return f"link{detail >> 16} {detail & 0xFFFF}B"
