"""demo.interactive protocol: what a task of class Interactive sees at timed."""

from enum import IntEnum
from typing import Annotated, Final, TypeAlias

from nexus.abi import QosClass
from nexus.wire import U32, U64, Bool, Message, Protocol, Request


class InteractiveStatus(IntEnum):
    """Why demo.interactive refuses. The numbers are wire format and are never reused."""

    TIMED_UNREACHABLE = 16  # no route, or the call to timed failed
    TIMED_REFUSED = 17  # timed answered with a status of its own
    NO_CAPABILITY = 18  # the request came without its link
    TESTSVC_UNREACHABLE = 19  # the link it brought could not be bound


class Registered(Message):
    """timed's answer to a Register of this task, which was cancelled again."""

    qos: QosClass
    timer_id: Annotated[int, U32()]
    deadline: Annotated[int, U64()]


class RegisterFor(Request[Registered], op=1, idempotent=True, refuses=InteractiveStatus):
    """Register `deadline` at timed, cancel it, and say what was granted."""

    deadline: Annotated[int, U64()]


class Slept(Message):
    """timed's answer to a Sleep of this task, and its own clock after it."""

    qos: QosClass
    deadline: Annotated[int, U64()]
    woken: Annotated[int, U64()]
    now: Annotated[int, U64()]


class SleepFor(Request[Slept], op=2, idempotent=True, refuses=InteractiveStatus):
    """Sleep until `deadline` at timed and say when one woke."""

    deadline: Annotated[int, U64()]


class HoldEnded(Message):
    """How a wait on demo.testsvc ended: cut off by its death, and the clock then."""

    cut_off: Annotated[bool, Bool()]
    noticed: Annotated[int, U64()]


class HoldAt(Request[HoldEnded], op=3, idempotent=False, refuses=InteractiveStatus, moves=True):
    """The request carries a SEND link to demo.testsvc; bind it, call Hold(token), wait.

    *Refuses*: NO_CAPABILITY, TESTSVC_UNREACHABLE (the link could not be bound).
    """

    token: Annotated[int, U32()]


InteractiveRequest: TypeAlias = RegisterFor | SleepFor | HoldAt
PROTOCOL: Final = Protocol(
    "interactive", number=5, version=1, requests=(RegisterFor, SleepFor, HoldAt)
)
