"""How much of the audit each asker may have: places, a rate, and one sum of what exceeds them.

    decision --a place is free, the rate is not used up, no sum of decisions begun--> its own record
             --else-----------------------------------------------------------------> in the sum
    sum      begun --its second over, none of this asker's on its way--> a record: op=suppressed
             begun --its second over, one on its way-------------------> begun, and growing

While a sum grows every decision of its asker goes into it. So it tells exactly those decisions of
its asker with numbers from `first` to `last` that have no record of their own, and `count` is how
many these are; only reloads that were allowed may have one in between.

Nobody can take another's places, and no asker's table grows: there is one sum that grows and one
that is on its way, whatever happens. No clock, no messages.
"""

from dataclasses import dataclass, field
from enum import Enum
from typing import Final, NamedTuple

import msgspec

from nexus.abi import Nanos, ServiceId
from nexus.protocols.init import SERVICES_MAX
from nexus.services.policyd.judge import INIT

RATE_DEFAULT: Final = 64  # records of an asker in a second; eight askers are logd's core rate
RATE_MAX: Final = 65536
PLACES_DEFAULT: Final = RATE_DEFAULT  # so a logd that is away for a second costs no record
PLACES_MAX: Final = 1024
WINDOW: Final = Nanos(1_000_000_000)  # ns of a rate, and at most from a sum's first to its record
ASKERS_MAX: Final = SERVICES_MAX + 1  # init asks too; no system has more
OTHERS: Final = "others"  # the share of ids beyond those, which no kernel has stamped so far


class Kind(Enum):
    """What a record is of, and so whose places it takes."""

    DECISION = "a decision"
    RELOAD = "a reload that was allowed"
    MALFORMED = "a request that made no sense, and is no decision"
    SUM = "what had no record of its own"


class Limit(NamedTuple):
    """Records that wait at one time, and records begun in one window."""

    places: int
    rate: int


RELOADS: Final = Limit(places=8, rate=8)  # of one asker: a policy every 125 ms is a mistake
MALFORMED: Final = Limit(places=16, rate=16)  # of one asker: enough to see what it does wrong
INITS: Final = Limit(places=256, rate=256)  # init asks once per grant; a boot makes a few

assert (ASKERS_MAX + 1) * (PLACES_MAX + RELOADS.places) + INITS.places < 2**16, "Counts has a U16"


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[service.policyd.settings]: of each asker, records in a second and records that wait."""

    audit_rate: int = RATE_DEFAULT
    audit_places: int = PLACES_DEFAULT

    def __post_init__(self) -> None:
        """Raises ValueError, which msgspec makes a ValidationError with the place in it."""
        for what, value, most in (
            ("audit_rate", self.audit_rate, RATE_MAX),
            ("audit_places", self.audit_places, PLACES_MAX),
        ):
            if not 1 <= value <= most:
                raise ValueError(f"{what} is {value}: from 1 to {most} is possible")


@dataclass(slots=True)
class Suppressed:
    """A sum: numbers of its first and last decision, 0 without one; how many of which kind."""

    due: Nanos
    first: int = 0
    last: int = 0
    allowed: int = 0
    denied: int = 0
    reloads: int = 0  # of `allowed`
    malformed: int = 0  # no decisions

    @property
    def count(self) -> int:
        """The decisions in it."""
        return self.allowed + self.denied

    def add(self, kind: Kind, number: int, *, denied: bool) -> None:
        """Count one more; numbers only grow."""
        if kind is Kind.MALFORMED:
            self.malformed += 1
            return
        self.first = self.first or number
        self.last = number
        self.denied += denied
        self.allowed += not denied
        self.reloads += kind is Kind.RELOAD

    def fields(self, name: str) -> dict[str, str]:
        """The record of it, for the asker `name`; what did not happen is left out."""
        told = {"op": "suppressed", "asked_by": name, "count": str(self.count)}
        if self.count:
            told |= {"first": str(self.first), "last": str(self.last)}
        counts = {
            "allowed": self.allowed,
            "denied": self.denied,
            "reloads": self.reloads,
            "malformed": self.malformed,
        }
        return told | {key: str(value) for key, value in counts.items() if value}


@dataclass(slots=True, eq=False)
class Share:
    """The account of one asker."""

    name: str
    limits: dict[Kind, Limit]
    waiting: dict[Kind, int] = field(default_factory=lambda: dict.fromkeys(Kind, 0))
    begun: dict[Kind, int] = field(default_factory=lambda: dict.fromkeys(Kind, 0))
    window: Nanos | None = None  # start of the one that `begun` counts
    growing: Suppressed | None = None

    def take(self, kind: Kind, now: Nanos) -> Kind | None:
        """The kind of place that a record of `kind` has from now on; None: it goes into the sum.

        A reload without a place of its own is a decision like any other.
        """
        if self.window is None or now - self.window >= WINDOW:
            self.window = now
            self.begun = dict.fromkeys(Kind, 0)
        for each in (Kind.RELOAD, Kind.DECISION) if kind is Kind.RELOAD else (kind,):
            if self._has_room(each):
                self.begun[each] += 1
                self.waiting[each] += 1
                return each
        return None

    def give_back(self, kind: Kind) -> None:
        """A record waits no more."""
        self.waiting[kind] -= 1

    def suppress(self, kind: Kind, number: int, *, denied: bool) -> None:
        """Sum up what `take` has given no place, in the same window."""
        assert self.window is not None
        if self.growing is None:
            self.growing = Suppressed(Nanos(self.window + WINDOW))
        self.growing.add(kind, number, denied=denied)

    def close(self, now: Nanos) -> Suppressed | None:
        """The sum, if it is to be told now; it takes the one place there is for sums."""
        due = self.due
        if self.growing is None or due is None or now < due:
            return None
        closed, self.growing = self.growing, None
        self.waiting[Kind.SUM] += 1
        return closed

    @property
    def due(self) -> Nanos | None:
        """When the sum is to be told; None while there is none, or another is on its way."""
        if self.growing is None or self.waiting[Kind.SUM]:
            return None
        return self.growing.due

    def _has_room(self, kind: Kind) -> bool:
        if kind is Kind.DECISION and self.growing is not None and self.growing.count:
            return False
        places, rate = self.limits[kind]
        return self.waiting[kind] < places and self.begun[kind] < rate


class Shares:
    """A share for every asker there can be, and one for all others."""

    def __init__(self, settings: Settings) -> None:
        self._each = Limit(settings.audit_places, settings.audit_rate)
        self._shares: dict[ServiceId, Share] = {}
        self._others = self._new(OTHERS, self._each)

    def of(self, asker: ServiceId, name: str) -> Share:
        """The share of an asker; init has its own whoever came before."""
        share = self._shares.get(asker)
        if share is not None:
            return share
        if len(self._shares) - (INIT in self._shares) >= ASKERS_MAX - 1 and asker != INIT:
            return self._others
        share = self._new(name, INITS if asker == INIT else self._each)
        self._shares[asker] = share
        return share

    def growing(self) -> list[Share]:
        """Those with a sum that is to be told at some time."""
        return [each for each in (*self._shares.values(), self._others) if each.due is not None]

    def _new(self, name: str, decisions: Limit) -> Share:
        return Share(
            name, {Kind.DECISION: decisions, Kind.RELOAD: RELOADS, Kind.MALFORMED: MALFORMED}
        )
