"""How a call or the search for a route can end. Values, never exceptions: look at them."""

from dataclasses import dataclass
from enum import IntEnum
from typing import TypeAlias

from nexus.abi import LinkTerms, ServiceId, Slot


@dataclass(frozen=True, slots=True)
class CallFailure:
    """Base of the ways in which a call ends without an answer of the service."""


@dataclass(frozen=True, slots=True)
class TimedOut(CallFailure):
    """The deadline passed. If the request was sent, its effect is not known."""


@dataclass(frozen=True, slots=True)
class Malformed(CallFailure):
    """The peer answered with what its protocol does not allow; nothing of it was used."""


@dataclass(frozen=True, slots=True)
class MismatchBudgetExceeded(CallFailure):
    """More replies to something else arrived than the budget allows."""


@dataclass(frozen=True, slots=True)
class Closed(CallFailure):
    """There is no peer: the request was not sent, or surely not processed."""


@dataclass(frozen=True, slots=True)
class Unknown(CallFailure):
    """The peer was cut off after the request was sent: whether it acted is not known."""


@dataclass(frozen=True, slots=True)
class Stale(CallFailure):
    """The kept route led to an instance that is gone. The next call looks for the new one."""


@dataclass(frozen=True, slots=True)
class Refused:
    """The service said no: a ReplyStatus or a status of its own protocol."""

    status: IntEnum


@dataclass(frozen=True, slots=True)
class Routed:
    """A fresh link to the service; `slot` is None only for the caller's own inbox.

    `terms` are the link's, `reply_terms` those planned for the link into the caller's inbox.
    """

    slot: Slot | None
    service: ServiceId
    generation: int
    terms: LinkTerms
    reply_terms: LinkTerms


@dataclass(frozen=True, slots=True)
class Denied:
    """The caller's entry in the system file does not name this service."""


@dataclass(frozen=True, slots=True)
class NotFound:
    """No service has this name."""


RouteFailure: TypeAlias = Denied | NotFound | Malformed | TimedOut | MismatchBudgetExceeded | Closed
RouteRetryOutcome: TypeAlias = Routed | RouteFailure
