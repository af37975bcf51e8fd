"""timed protocol: timers that fire, sleeps that block nobody, and an echo of the caller.

Deadlines are absolute times of the kernel's clock. timed rounds each one up to a multiple of
the window of the caller's scheduling class, which the kernel says and the caller does not.
"""

from enum import IntEnum
from typing import Annotated, Final, TypeAlias

from nexus.abi import SERVICE_NAME_SIZE_MAX, Nanos, QosClass
from nexus.wire import U32, U64, Message, Protocol, Request, Text

TIMERS_PER_OWNER_MAX: Final = 64  # live timers and sleeps of one service (core.md 9)
TIMERS_MAX: Final = 1024  # live timers and sleeps in all
AHEAD_MAX: Final = Nanos(3_600_000_000_000)  # ns; an hour: longer plans belong to a schedule
TIMER_ID_MAX: Final = 0xFFFF_FFFF
WINDOWS: Final = {  # ns; a deadline is rounded up to a multiple (core.md 1.1)
    QosClass.IDLE: Nanos(8_000_000),
    QosClass.NORMAL: Nanos(4_000_000),
    QosClass.INTERACTIVE: Nanos(1_000_000),
    QosClass.PERF_BURST: Nanos(0),  # not rounded
}

assert TIMERS_PER_OWNER_MAX <= TIMERS_MAX < TIMER_ID_MAX
assert set(WINDOWS) == set(QosClass)


class TimedStatus(IntEnum):
    """Why timed refuses. The numbers are wire format and are never reused."""

    INVALID_ARGS = 16  # more than AHEAD_MAX ahead, or a sleep that outlives its own call
    OVER_LIMIT = 17  # the caller's timers, or all timers
    NOT_FOUND = 18  # no such timer of this caller
    CANCELLED = 19  # to a waiter: its timer was cancelled, or a later Wait took its place


class Timer(Message):
    """A live timer: its id, never 0 and not given again while it lives, and its coalesced
    deadline."""

    timer_id: Annotated[int, U32(minimum=1)]
    deadline: Annotated[int, U64()]


class Register(Request[Timer], op=1, idempotent=False, refuses=TimedStatus):
    """Set a timer. A deadline in the past fires at once.

    It fires whether or not somebody waits: a fired timer leaves the table, and its last firings
    are kept for a Wait that comes later, 64 per owner.
    *Refuses*: INVALID_ARGS, OVER_LIMIT.
    """

    deadline: Annotated[int, U64()]


class Cancelled(Message):
    """The timer that is gone."""

    timer_id: Annotated[int, U32(minimum=1)]


class Cancel(Request[Cancelled], op=2, idempotent=False, refuses=TimedStatus):
    """Drop a timer of one's own that has not fired. *Refuses*: NOT_FOUND."""

    timer_id: Annotated[int, U32()]


class Woken(Message):
    """The coalesced deadline, and the clock when timed woke the sleeper."""

    deadline: Annotated[int, U64()]
    now: Annotated[int, U64()]


class Sleep(Request[Woken], op=3, idempotent=True, refuses=TimedStatus):
    """Answered at the coalesced deadline; counts as a timer until then.

    *Refuses*: INVALID_ARGS, OVER_LIMIT.
    """

    deadline: Annotated[int, U64()]


class Fired(Message):
    """A timer's firing: its coalesced deadline, and the clock when it fired."""

    timer_id: Annotated[int, U32(minimum=1)]
    deadline: Annotated[int, U64()]
    now: Annotated[int, U64()]


class Wait(Request[Fired], op=4, idempotent=False, refuses=TimedStatus):
    """Answered when the timer fires, at once if it already has. A firing is given once.

    *Refuses*: NOT_FOUND; CANCELLED when the timer is cancelled or another Wait for it comes.
    """

    timer_id: Annotated[int, U32()]


class Seen(Message):
    """The sender as timed's kernel said it, and nothing of what the payload claimed."""

    pid: Annotated[int, U32()]
    service: Annotated[int, U64()]
    generation: Annotated[int, U32()]
    qos: QosClass


class Whoami(Request[Seen], op=5, idempotent=True):
    """Who is asking? The claims are there to be ignored."""

    claimed_pid: Annotated[int, U32()]
    claimed_name: Annotated[str, Text(size_max=SERVICE_NAME_SIZE_MAX)]


TimedRequest: TypeAlias = Register | Cancel | Sleep | Wait | Whoami
PROTOCOL: Final = Protocol(
    "timed", number=2, version=1, requests=(Register, Cancel, Sleep, Wait, Whoami)
)
