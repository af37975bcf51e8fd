"""The audit of decisions on its way to logd: posted, acknowledged, posted again; not awaited.

    put --in its asker's share--> waiting --posted--> open --acknowledged with an id--> audited
    put --beyond it--> dropped             open --refused for now, no answer, peer gone--> waiting
                                           open --refused for good--> dropped, told by a sum of one

`allowed + denied = audited + dropped + waiting` holds after every event, where waiting counts the
open ones and dropped those that a sum tells instead of a record of their own (shares.py). So every
decision is told once: by its record or by one sum. Records of malformed requests and of sums are
no decisions: they have places of their own and count in none of these. What waits is given up
never, for its places bound it (ADR 0011). A record whose answer was lost may be in the journal
twice, never not at all; its number tells.
"""

from bisect import insort
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from nexus.abi import Nanos, ServiceId, service_id
from nexus.ipc import Client, Posted, Poster, Refused, deadline_after
from nexus.protocols.logd import FIELDS_SIZE_MAX, Append, Appended, Field, Level, LogdStatus
from nexus.services.policyd.shares import Kind, Share, Shares, Suppressed
from nexus.wire import ReplyStatus

POLICYD_NAME: Final = "policyd"
POLICYD: Final = service_id(POLICYD_NAME)
SCOPE: Final = "policyd.audit"
TEXT: Final = "audit"
POSTS_MAX: Final = 8  # posts of one turn, so that a turn has a bound: about 0.1 ms
POST_PAUSE: Final = Nanos(1_000_000)  # ns from a decision to its post: the reply goes first
ANSWER_PAUSE: Final = Nanos(2_000_000)  # ns between two looks after answers, doubling
ANSWER_PAUSE_MAX: Final = Nanos(64_000_000)  # ns
ANSWER_MAX: Final = Nanos(1_000_000_000)  # ns an answer may take to count
RATE_PAUSE: Final = Nanos(250_000_000)  # ns; a fourth of logd's window
LOOK_MAX: Final = Nanos(20_000_000)  # ns for one search for logd, in an idle moment
LOOK_PAUSE: Final = Nanos(20_000_000)  # ns between two searches, doubling; logd starts next
LOOK_PAUSE_MAX: Final = Nanos(2_000_000_000)  # ns
NAME_SIZE_MAX: Final = 48  # bytes of a service's name
ACTION_SIZE_MAX: Final = 64  # bytes that a record keeps of an action
TARGET_SIZE_MAX: Final = 128  # bytes that a record keeps of a target
OTHERS_SIZE_MAX: Final = 160  # bytes of the keys, the two bytes each, and the short values

assert 2 * NAME_SIZE_MAX + ACTION_SIZE_MAX + TARGET_SIZE_MAX + OTHERS_SIZE_MAX <= FIELDS_SIZE_MAX

FOR_NOW: Final = frozenset({LogdStatus.RATE_LIMITED, ReplyStatus.BUSY, ReplyStatus.EXPIRED})
"""Refusals that another time may not meet."""

Look = Callable[[Nanos], Awaitable[Client | None]]
"""Finds logd, at most until the given time."""


@dataclass(eq=False, slots=True)
class Entry:
    """One record: its place in the order, the share it takes a place of, and which kind of place.

    `number` is the decision's, 0 if it is of none, or of one that is counted as dropped.
    """

    place: int
    share: Share
    kind: Kind
    request: Append
    number: int
    denied: bool


class Audit:
    """The queue of records, and what became of them. With `look` None there is no logd to look for.

    Time is an argument; the only waits are those of `look`, which are bounded by LOOK_MAX.
    """

    def __init__(self, look: Look | None, shares: Shares) -> None:
        self.audited = 0
        self.dropped = 0
        self._shares = shares
        self._look = look
        self._logd: Client | None = None
        self._poster: Poster[Entry] | None = None
        self._waiting: list[Entry] = []  # by place
        self._open = 0  # posted, not acknowledged
        self._decisions = 0  # of both
        self._places = 0
        self._now = Nanos(0)
        self._wake = None if look is None else Nanos(0)  # the planned link is taken first
        self._not_before = Nanos(0)  # a search or a post makes no sense earlier
        self._look_pause = LOOK_PAUSE
        self._answer_pause = ANSWER_PAUSE

    @property
    def waiting(self) -> int:
        """Decisions without an acknowledgement."""
        return self._decisions

    def put(
        self,
        fields: dict[str, str],
        now: Nanos,
        *,
        asker: ServiceId,
        kind: Kind,
        number: int,
        denied: bool,
    ) -> None:
        """Queue a record, or add it to its asker's sum; `number` is 0 if it is of no decision."""
        share = self._shares.of(asker, fields["asked_by"])
        taken = share.take(kind, now)
        if taken is None:
            share.suppress(kind, number, denied=denied)
            self.dropped += number > 0
            self._wake_by(share.due)
            return
        self._queue(share, taken, appended(fields, denied=denied), number, denied=denied)
        self._decisions += number > 0
        self._wake_by(max(Nanos(now + POST_PAUSE), self._not_before))

    def say(self, level: Level, text: str, fields: dict[str, str]) -> bool:
        """Queue a record of policyd's own, which is of no decision; whether it has a place."""
        share = self._shares.of(POLICYD, POLICYD_NAME)
        taken = share.take(Kind.MALFORMED, self._now)
        if taken is None:
            return False  # what policyd says of itself takes no place of a decision
        told = [Field(key, value) for key, value in fields.items()]
        self._queue(share, taken, Append(level, SCOPE, text, told), 0, denied=False)
        self._wake_by(max(self._now, self._not_before))
        return True

    async def hurry(self, now: Nanos) -> None:
        """Post the record just put if nothing is before it: in logd's queue it outlives us.

        Never waits; what cannot be posted now is posted in an idle moment.
        """
        if self._poster is None or not self._poster.exchange.peer.alive:
            return
        if len(self._waiting) == 1 and self._not_before <= now:
            self._now = now
            _ = await self._post(self._poster, self._waiting[0], now)

    def next_time(self) -> Nanos | None:
        """When there is something to do."""
        return self._wake

    async def on_time(self, now: Nanos) -> None:
        """Take answers, post what waits, look for logd: each a little, and when to go on."""
        self._now = now
        self._wake = None
        settled = self.audited + self.dropped
        if self._poster is not None:
            await self._poster.take(now)
        self._close_sums(now)
        if self._not_before <= now:
            await self._go_on(now)
        if self.audited + self.dropped > settled or not (self._waiting or self._open):
            self._answer_pause = ANSWER_PAUSE
        if self._waiting or self._open:
            self._wake_by(self._later(now))
            self._answer_pause = Nanos(min(2 * self._answer_pause, ANSWER_PAUSE_MAX))
        elif self._look is not None and self._logd is None:
            self._wake_by(self._not_before)
        for share in self._shares.growing():
            self._wake_by(max(share.due or now, Nanos(now + POST_PAUSE)))

    def _wake_by(self, when: Nanos | None) -> None:
        """There is something to do at `when`."""
        if when is not None:
            self._wake = when if self._wake is None else min(self._wake, when)

    def _close_sums(self, now: Nanos) -> None:
        """Queue the sums whose second is over."""
        for share in self._shares.growing():
            closed = share.close(now)
            if closed is not None:
                denied = bool(closed.denied or closed.malformed)
                request = appended(closed.fields(share.name), denied=denied)
                self._queue(share, Kind.SUM, request, 0, denied=denied)

    def _queue(
        self, share: Share, kind: Kind, request: Append, number: int, *, denied: bool
    ) -> None:
        self._places += 1
        self._waiting.append(Entry(self._places, share, kind, request, number, denied))

    def _later(self, now: Nanos) -> Nanos:
        """The next moment: for answers soon, for what waits not before it makes sense."""
        again = deadline_after(now, self._answer_pause)
        return again if self._open else max(again, self._not_before)

    async def _go_on(self, now: Nanos) -> None:
        poster = await self._found(now)
        if poster is None:
            self._not_before = deadline_after(now, self._look_pause)
            self._look_pause = Nanos(min(2 * self._look_pause, LOOK_PAUSE_MAX))
            return
        self._look_pause = LOOK_PAUSE
        for entry in self._waiting[:POSTS_MAX]:
            if await self._post(poster, entry, now) is not Posted.SENT:
                return

    async def _post(self, poster: Poster[Entry], entry: Entry, now: Nanos) -> Posted:
        posted = await poster.post(entry.request, now, entry)
        if posted is Posted.SENT:
            self._waiting.remove(entry)
            self._open += 1
        return posted

    async def _found(self, now: Nanos) -> Poster[Entry] | None:
        """The way to the present instance of logd; a new one is looked for if that is gone."""
        if self._look is None:
            return None
        until = deadline_after(now, LOOK_MAX)
        if self._logd is None:
            self._logd = await self._look(until)
            if self._logd is None:
                return None
            self._poster = Poster(self._logd, self._on_ended, wait=ANSWER_MAX)
        if not self._logd.peer.alive and await self._logd.renew(until) is not None:
            return None
        return self._poster

    def _on_ended(self, entry: Entry, outcome: object) -> None:
        """What logd did with one record."""
        self._open -= 1
        if isinstance(outcome, Appended) and outcome.record > 0:
            self.audited += self._settled(entry)
            entry.share.give_back(entry.kind)
        elif not _is_final(outcome):
            if isinstance(outcome, Refused):
                self._not_before = deadline_after(self._now, RATE_PAUSE)
            insort(self._waiting, entry, key=_place)
        elif entry.number > 0:
            entry.request = _reduced(entry)
            self.dropped += self._settled(entry)
            insort(self._waiting, entry, key=_place)
        else:
            entry.share.give_back(entry.kind)

    def _settled(self, entry: Entry) -> int:
        """The decisions, one or none, that have just stopped waiting with this record."""
        decisions = int(entry.number > 0)
        entry.number = 0
        self._decisions -= decisions
        return decisions


def appended(fields: dict[str, str], *, denied: bool) -> Append:
    """A record as logd takes it."""
    level = Level.WARN if denied else Level.INFO
    return Append(level, SCOPE, TEXT, [Field(key, value) for key, value in fields.items()])


def _reduced(entry: Entry) -> Append:
    """What is left to tell of a decision whose record logd never takes: a sum of it alone."""
    alone = Suppressed(Nanos(0))
    alone.add(entry.kind, entry.number, denied=entry.denied)
    return appended(alone.fields(entry.share.name), denied=entry.denied)


def cut(text: str, size_max: int) -> str:
    """`text`, or as much of it as fits `size_max` bytes of UTF-8 with an ellipsis."""
    data = text.encode()
    if len(data) <= size_max:
        return text
    return data[: size_max - 3].decode(errors="ignore") + "\u2026"


def _is_final(outcome: object) -> bool:
    """Whether another attempt would end the same way."""
    return isinstance(outcome, Refused) and outcome.status not in FOR_NOW


def _place(entry: Entry) -> int:
    return entry.place
