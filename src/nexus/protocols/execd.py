"""execd protocol: start a program under policy, wait for it, and read why something crashed.

The programs are services of the system file with `start = "demand"`: each has its entry, its
links, its limits and its identity; execd starts them through init, which alone forks. A crash is
an end with a code other than 0, or by a signal, that nobody asked for.

*Source*: services.md 14; ladder 84-94, 129.
"""

from enum import IntEnum
from typing import Annotated, Final, TypeAlias

from nexus.abi import SERVICE_NAME_SIZE_MAX
from nexus.wire import I64, U8, U16, U32, U64, Bool, List, Message, Protocol, Request, Text

PROC_SPAWN: Final = "proc.spawn"  # the right that Exec needs, with the program as its target
CRASH_READ: Final = "crash.read"  # the right that the reports need
ARGUMENTS_MAX: Final = 16  # of one program
ARGUMENT_SIZE_MAX: Final = 128  # characters
ENVIRONMENT_MAX: Final = 8  # variables
KEY_SIZE_MAX: Final = 48  # characters
PROGRAM_ROWS_MAX: Final = 16
REPORT_ROWS_MAX: Final = 8
LAST_RECORDS_MAX: Final = 8  # of a report
LAST_SPANS_MAX: Final = 8
TEXT_SIZE_MAX: Final = 256  # characters of a last record, cut
TRACEBACK_SIZE_MAX: Final = 2048  # characters; the innermost frames
DIGEST_SIZE: Final = 64  # characters
WHY_SIZE_MAX: Final = 200  # characters of a sentence
REPORT_SIZE_MAX: Final = 6 * 1024  # bytes of a whole report; the least important of it is left out


class ExecdStatus(IntEnum):
    """Why execd refuses. The numbers are wire format and are never reused."""

    FAILED = 16  # init could not start it; the reason is in init's record of the service
    NO_PROGRAM = 17  # no service of that name is started on demand
    RUNNING = 18  # an instance runs
    BAD_DIGEST = 19  # the program is not the one of the checked plan
    NOT_FOUND = 20  # no such child, no such report
    OVER_LIMIT = 21  # one child, or one waiting client, more than allowed


class Restart(IntEnum):
    """What execd does after an end."""

    NEVER = 0
    ON_CRASH = 1  # with the back-off and intensity of the entry in the system file


class Variable(Message):
    """A variable of the environment, as the program's settings have it."""

    key: Annotated[str, Text(size_min=1, size_max=KEY_SIZE_MAX, pattern=r"^[A-Z][A-Z0-9_]*\Z")]
    value: Annotated[str, Text(size_max=ARGUMENT_SIZE_MAX)]


class Started(Message):
    """The program runs as this task."""

    pid: Annotated[int, U32()]
    generation: Annotated[int, U32()]


class Exec(Request[Started], op=1, idempotent=False, refuses=ExecdStatus):
    """Start `program`. `requester` is the caller itself, else DENIED, as without proc.spawn.

    *Refuses*: NO_PROGRAM, RUNNING, BAD_DIGEST, FAILED, OVER_LIMIT.
    """

    program: Annotated[str, Text(size_min=1, size_max=SERVICE_NAME_SIZE_MAX)]
    requester: Annotated[str, Text(size_min=1, size_max=SERVICE_NAME_SIZE_MAX)]
    arguments: Annotated[
        list[Annotated[str, Text(size_max=ARGUMENT_SIZE_MAX)]], List(count_max=ARGUMENTS_MAX)
    ]
    environment: Annotated[list[Variable], List(count_max=ENVIRONMENT_MAX)]
    restart: Restart


class Ended(Message):
    """How that instance ended; `signal` is 0 unless one did it. `report` is its crash, or 0."""

    pid: Annotated[int, U32()]
    generation: Annotated[int, U32()]
    code: Annotated[int, I64()]
    signal: Annotated[int, U16()]
    report: Annotated[int, U64()]


class Wait(Request[Ended], op=2, idempotent=True, refuses=ExecdStatus):
    """Answered when the child has ended and is reaped; other clients are served meanwhile.

    Only who started it may wait (else DENIED). *Refuses*: NOT_FOUND, OVER_LIMIT.
    """

    pid: Annotated[int, U32()]


class Reported(Message):
    """The report's number, from 1 on over all boots; 0 if the end was no crash."""

    report: Annotated[int, U64()]


class ReportExit(Request[Reported], op=3, idempotent=True, refuses=ExecdStatus):
    """A task has ended. Only its parent may say so, which is init: else DENIED.

    `started` and `ended` are the kernel's clock, `reason` is init's word for why it ended, `action`
    what was done about it. `lost` ends so far could not be reported at all.
    """

    name: Annotated[str, Text(size_min=1, size_max=SERVICE_NAME_SIZE_MAX)]
    pid: Annotated[int, U32()]
    generation: Annotated[int, U32()]
    code: Annotated[int, I64()]
    signal: Annotated[int, U16()]
    started: Annotated[int, U64()]
    ended: Annotated[int, U64()]
    digest: Annotated[str, Text(size_max=DIGEST_SIZE)]
    reason: Annotated[str, Text(size_max=32)]
    action: Annotated[str, Text(size_max=WHY_SIZE_MAX)]
    asked: Annotated[bool, Bool()]  # somebody wanted it to end: it is no crash
    again: Annotated[bool, Bool()]  # it is started again
    lost: Annotated[int, U32()]


class ProgramRow(Message):
    """A program that can be started, and its digest in the checked plan."""

    name: Annotated[str, Text(size_max=SERVICE_NAME_SIZE_MAX)]
    digest: Annotated[str, Text(size_max=DIGEST_SIZE)]


class ProgramRows(Message):
    """Rows from `first` on, by name."""

    total: Annotated[int, U16()]
    rows: Annotated[list[ProgramRow], List(count_max=PROGRAM_ROWS_MAX)]


class GetPrograms(Request[ProgramRows], op=4, idempotent=True):
    """The program table."""

    first: Annotated[int, U16()]


class LastRecord(Message):
    """One of the last records of the crashed task, as logd kept it or found it in its ring.

    `at` is when it was written, in ns since 1970; `text` has its fields too.
    """

    at: Annotated[int, U64()]
    level: Annotated[int, U8()]
    text: Annotated[str, Text(size_max=TEXT_SIZE_MAX)]


class LastSpan(Message):
    """A span that the task had open, or ended last: ns since 1970. `end` 0: it was open."""

    name: Annotated[str, Text(size_max=48)]
    start: Annotated[int, U64()]
    end: Annotated[int, U64()]


class Crash(Message):
    """A crash in short. `wall` is ns since 1970; `digest` is the program's build id."""

    report: Annotated[int, U64()]
    boot: Annotated[int, U32()]
    wall: Annotated[int, U64()]
    name: Annotated[str, Text(size_max=SERVICE_NAME_SIZE_MAX)]
    pid: Annotated[int, U32()]
    generation: Annotated[int, U32()]
    code: Annotated[int, I64()]
    signal: Annotated[int, U16()]
    duration: Annotated[int, U64()]
    digest: Annotated[str, Text(size_max=DIGEST_SIZE)]
    reason: Annotated[str, Text(size_max=32)]
    action: Annotated[str, Text(size_max=WHY_SIZE_MAX)]


class Crashes(Message):
    """Crashes in the order of their numbers; `next` is what to ask for then, 0 at the end."""

    next: Annotated[int, U64()]
    lost: Annotated[int, U32()]  # reports that could not be kept, or gave way
    rows: Annotated[list[Crash], List(count_max=REPORT_ROWS_MAX)]


class GetCrashes(Request[Crashes], op=5, idempotent=True):
    """Crashes with number >= `since`, of `name` unless empty. Needs crash.read."""

    since: Annotated[int, U64()]
    name: Annotated[str, Text(size_max=SERVICE_NAME_SIZE_MAX)]


class Report(Message):
    """The whole report. `records` are the last of that very task, oldest first, `spans` the last
    that ended and then those that were open; `trace` is the trace the task was in, hexadecimal, or
    empty. `missing` says which evidence there is none of, and why; `kept` is that it is durable."""

    crash: Crash
    records: Annotated[list[LastRecord], List(count_max=LAST_RECORDS_MAX)]
    spans: Annotated[list[LastSpan], List(count_max=LAST_SPANS_MAX)]
    traceback: Annotated[str, Text(size_max=TRACEBACK_SIZE_MAX)]
    trace: Annotated[str, Text(size_max=32)]
    missing: Annotated[str, Text(size_max=WHY_SIZE_MAX)]
    kept: Annotated[bool, Bool()]


class GetReport(Request[Report], op=6, idempotent=True, refuses=ExecdStatus):
    """One report. Needs crash.read. *Refuses*: NOT_FOUND."""

    report: Annotated[int, U64()]


class Killed(Message):
    """The child is being ended, as SIGKILL does."""


class Kill(Request[Killed], op=7, idempotent=True, refuses=ExecdStatus):
    """End a child. Only who started it may (else DENIED). *Refuses*: NOT_FOUND."""

    pid: Annotated[int, U32()]


ExecdRequest: TypeAlias = Exec | Wait | ReportExit | GetPrograms | GetCrashes | GetReport | Kill
PROTOCOL: Final = Protocol(
    "execd",
    number=12,
    version=1,
    requests=(Exec, Wait, ReportExit, GetPrograms, GetCrashes, GetReport, Kill),
)
