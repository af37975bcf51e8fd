"""Sends a task's log lines to logd: queued here, posted when the task is at leisure, counted.

    no logd --slots configured, or routed--> bound --its instance is gone--> no logd
    waiting --posted--> outstanding --answer--> acknowledged, refused
    waiting (keeps_refused) <--RATE_LIMITED-- outstanding

Writing a line is a plain function that never waits and never raises. `flush` sends without
waiting for an answer; the one thing it waits for, under a bound and not often, is the way to logd.
Not one line is lost without being counted under the reason.
"""

from collections import Counter, deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

from nexus.abi import AbiError, CapClone, CapClose, CapQuery, Nanos, Now, Slot, Status
from nexus.ipc import (
    CallFailure,
    Client,
    Closed,
    Denied,
    Exchange,
    NotFound,
    OneShots,
    Peers,
    Posted,
    Poster,
    Refused,
    RetryBudget,
    RetryTokens,
    Routed,
    RouteFailure,
    TimedOut,
    deadline_after,
)
from nexus.log.line import FieldValue, make_line
from nexus.protocols.logd import PROTOCOL, RATE_WINDOW_NS, Append, Level, LogdStatus

LOGD_NAME: Final = "logd"
QUEUE_MAX: Final = 64  # lines that wait in the task; of at most 1 KiB each
ANSWER_WAIT: Final = Nanos(1_000_000_000)  # ns until a line without an answer counts as lost
DISCOVERY_WAIT: Final = Nanos(50_000_000)  # ns of one search for logd; nothing else is waited for
LOOK_PAUSE: Final = Nanos(100_000_000)  # ns between two searches, doubling
LOOK_PAUSE_MAX: Final = Nanos(2_000_000_000)  # ns; about as long as logd's restart takes at worst
DENIED_PAUSE: Final = Nanos(30_000_000_000)  # ns; a route that is denied comes with a new policy
FULL_PAUSE: Final = Nanos(5_000_000)  # ns until a full logd is tried again
RATE_PAUSE: Final = Nanos(RATE_WINDOW_NS)  # ns; the window that refused is over then
ROUTE_ATTEMPTS_MAX: Final = 3  # of one search
ROUTE_BACKOFF: Final = Nanos(5_000_000)  # ns


@dataclass(frozen=True, slots=True, kw_only=True)
class LogCounts:
    """What became of the lines of one task.

    written = acknowledged + refused_* + lost_* + waiting + outstanding, always. `filtered` lines
    were below the level and are not written; `cut` ones were sent shortened; `bound` is how often
    a way to logd was found.
    """

    written: int
    acknowledged: int
    refused_invalid_args: int
    refused_over_limit: int
    refused_rate_limited: int
    refused_other: int
    lost_full: int
    lost_unreachable: int
    lost_unknown: int
    lost_late: int
    waiting: int
    outstanding: int
    filtered: int
    cut: int
    bound: int

    @property
    def refused(self) -> int:
        """Lines that logd had and did not keep."""
        return (
            self.refused_invalid_args
            + self.refused_over_limit
            + self.refused_rate_limited
            + self.refused_other
        )

    @property
    def lost(self) -> int:
        """Lines that logd never acknowledged."""
        return self.lost_full + self.lost_unreachable + self.lost_unknown + self.lost_late


class _Entry(NamedTuple):
    """A line in the order of writing; heads of the queue are the oldest."""

    number: int
    request: Append


class Logger:
    """The log of one task. `level` is the least important level that is written.

    `uses` are the services it may ask init for; without logd among them only configured slots lead
    there. At most `queue_max` lines wait; with `keeps_refused` a line that came too fast for logd
    waits again instead of being dropped.
    """

    def __init__(
        self,
        peers: Peers,
        uses: Collection[str] = (),
        *,
        scope: str | None = None,
        level: Level = Level.INFO,
        queue_max: int = QUEUE_MAX,
        keeps_refused: bool = False,
    ) -> None:
        assert queue_max >= 1
        self.level = level
        self.scope = peers.boot.name if scope is None else scope
        self._peers = peers
        self._routed = LOGD_NAME in uses
        self._queue_max = queue_max
        self._keeps_refused = keeps_refused
        self._lines: deque[_Entry] = deque()
        self._ended: Counter[str] = Counter()  # lines that wait no more, by the name of the count
        self._written = 0
        self._filtered = 0
        self._cut = 0
        self._bound = 0
        self._poster: Poster[_Entry] | None = None
        self._tokens = RetryTokens()
        self._reply_known = False
        self._flushing = False
        self._now = Nanos(0)  # when flush was called last
        self._again = Nanos(0)  # flush sends nothing before
        self._pause = LOOK_PAUSE

    # ------------------------------------------------------------------ writing

    def error(self, text: str, **fields: FieldValue) -> None:
        """Something is broken, and somebody should look."""
        _ = self.write(Level.ERROR, text, fields)

    def warning(self, text: str, **fields: FieldValue) -> None:
        """Something is not as it should be; it goes on."""
        _ = self.write(Level.WARN, text, fields)

    def info(self, text: str, **fields: FieldValue) -> None:
        """What a reader of the log wants to know of an ordinary day."""
        _ = self.write(Level.INFO, text, fields)

    def debug(self, text: str, **fields: FieldValue) -> None:
        """What helps to find a fault."""
        _ = self.write(Level.DEBUG, text, fields)

    def trace(self, text: str, **fields: FieldValue) -> None:
        """Every step."""
        _ = self.write(Level.TRACE, text, fields)

    def write(
        self,
        level: Level,
        text: str,
        fields: Mapping[str, FieldValue] | None = None,
        *,
        scope: str | None = None,
    ) -> bool:
        """Queue one line, cut to what a record may have; whether it waits to be sent now."""
        if level > self.level:
            self._filtered += 1
            return False
        self._written += 1
        reason = self._no_room()
        if reason is not None:
            self._ended[reason] += 1
            return False
        line = make_line(level, self.scope if scope is None else scope, text, fields)
        self._cut += line.is_cut
        self._lines.append(_Entry(self._written, line.request))
        return True

    def _no_room(self) -> str | None:
        """Under which count a line is lost right away; None if it may wait."""
        if self._poster is None and not self._routed:
            return "lost_unreachable"
        # What was sent may come back to the queue, if refused lines are kept.
        held = len(self._lines) + (self._outstanding if self._keeps_refused else 0)
        if held < self._queue_max:
            return None
        return "lost_full" if self._is_bound else "lost_unreachable"

    @property
    def _is_bound(self) -> bool:
        return self._poster is not None and self._poster.exchange.peer.alive

    @property
    def _outstanding(self) -> int:
        return 0 if self._poster is None else self._poster.outstanding

    # ------------------------------------------------------------------ sending

    @property
    def due(self) -> bool:
        """Whether `flush` has something to do: lines wait, or answers are open."""
        return bool(self._lines) or self._outstanding > 0

    async def flush(self) -> None:
        """Post what waits and take the answers that are there; never waits for either."""
        if self._flushing or not self.due:
            return
        self._flushing = True
        try:
            await self._send(await Now())
        finally:
            self._flushing = False

    async def _send(self, now: Nanos) -> None:
        self._now = now
        await self._take(now)
        while self._lines and now >= self._again and await self._ready(now):
            assert self._poster is not None, "ready is bound"
            entry = self._lines.popleft()
            posted = await self._post(self._poster, entry, now)
            if posted is Posted.SENT:
                continue
            self._put_back(entry)
            if posted is Posted.FULL:
                self._again = max(self._again, deadline_after(now, FULL_PAUSE))

    def _put_back(self, entry: _Entry) -> None:
        """A line waits again, before all that were written later."""
        index = 0
        while index < len(self._lines) and self._lines[index].number < entry.number:
            index += 1
        self._lines.insert(index, entry)

    def _on_ended(self, entry: _Entry, outcome: object) -> None:
        """A line that was sent has its outcome."""
        match outcome:
            case Refused(LogdStatus.RATE_LIMITED) if self._keeps_refused:
                self._put_back(entry)
                self._again = max(self._again, deadline_after(self._now, RATE_PAUSE))
            case Refused(status):
                name = f"refused_{status.name.lower()}"
                self._ended[name if name in _REFUSALS else "refused_other"] += 1
            case TimedOut():
                self._ended["lost_late"] += 1
            case CallFailure():
                self._ended["lost_unknown"] += 1
            case _:
                self._ended["acknowledged"] += 1

    async def _post(self, poster: Poster[_Entry], entry: _Entry, now: Nanos) -> Posted:
        try:
            return await poster.post(entry.request, now, entry)
        except AbiError as error:
            self._on_slots_lost(poster, error)
            return Posted.GONE

    async def _take(self, now: Nanos) -> None:
        """Take the answers that are there."""
        if self._poster is not None:
            try:
                await self._poster.take(now)
            except AbiError as error:
                self._on_slots_lost(self._poster, error)

    def _on_slots_lost(self, poster: Poster[_Entry], error: AbiError) -> None:
        """The owner of configured slots has closed them; for a link of our own it is a bug."""
        if isinstance(poster.exchange, Client):
            raise error
        poster.exchange.peer.alive = False

    # ------------------------------------------------------------------ the way to logd

    async def configure_sink_logd_slots(
        self, logd_send: Slot, reply_send: Slot, reply_recv: Slot
    ) -> bool:
        """Use these for all later lines, independent of routing; the slots stay the caller's.

        `reply_send` is a link into the endpoint `reply_recv` that allows delegations: for each line
        without an answer one way back is derived from it and moved. False, with nothing stored, if
        a slot is missing or of another kind. When that instance of logd is gone the slots are no
        sink any more, and routing is left.
        """
        for probe, slot in ((_is_link, logd_send), (_is_link, reply_send), (_is_inbox, reply_recv)):
            if not await probe(slot):
                return False
        caller = self._peers.caller
        sink = OneShots(caller, PROTOCOL, LOGD_NAME, logd_send, reply_send, reply_recv)
        if not await sink.probe():
            sink.end()
            return False
        await self._release()
        self._use(sink)
        return True

    async def close(self) -> None:
        """Take the answers that are there and let go of logd; lines from now on are lost."""
        await self._release()
        self._routed = False
        self._drop_waiting()

    async def _ready(self, now: Nanos) -> bool:
        """Whether there is a way to logd, after one bounded search for it."""
        if self._is_bound:
            return True
        if self._poster is not None and not isinstance(self._poster.exchange, Client):
            await self._release()
        if not self._routed:
            self._drop_waiting()
            return False
        failure = await self._look(deadline_after(now, DISCOVERY_WAIT))
        if failure is None:
            self._pause = LOOK_PAUSE
            return True
        pause = DENIED_PAUSE if isinstance(failure, Denied | NotFound) else self._pause
        self._pause = min(Nanos(2 * self._pause), LOOK_PAUSE_MAX)
        self._again = deadline_after(await Now(), pause)
        return False

    async def _look(self, until: Nanos) -> RouteFailure | CallFailure | None:
        """Search for logd until `until`; None if it was found."""
        try:
            if self._poster is None:
                return await self._connect(until)
            client = self._poster.exchange
            assert isinstance(client, Client), "slots are never renewed"
            failure = await client.renew(until)
        except AbiError as error:
            if error.status is not Status.NO_SPACE:
                raise
            return Closed()  # this task has no room for another capability now
        self._bound += failure is None
        return failure

    async def _connect(self, until: Nanos) -> RouteFailure | None:
        budget = RetryBudget(attempts_max=ROUTE_ATTEMPTS_MAX, backoff=ROUTE_BACKOFF, deadline=until)
        if not self._reply_known:
            reply = await self._peers.reply_route(budget, self._tokens)
            if not isinstance(reply, Routed):
                return reply
            if reply.service != self._peers.boot.service:
                return NotFound()  # the inbox init knows of is not ours
            self._reply_known = True
        client = await self._peers.connect(LOGD_NAME, PROTOCOL, budget)
        if not isinstance(client, Client):
            return client
        self._use(client)
        return None

    def _use(self, exchange: Exchange) -> None:
        self._poster = Poster(exchange, self._on_ended, wait=ANSWER_WAIT)
        self._bound += 1
        self._again = Nanos(0)

    async def _release(self) -> None:
        """Let go of the way to logd that is in use; what has no answer has none for good."""
        poster = self._poster
        if poster is None:
            return
        await self._take(await Now())
        poster.abandon()
        self._poster = None
        if isinstance(poster.exchange, OneShots):
            poster.exchange.end()
        else:
            await self._peers.discard(poster.exchange.peer)

    def _drop_waiting(self) -> None:
        self._ended["lost_unreachable"] += len(self._lines)
        self._lines.clear()

    # ------------------------------------------------------------------ the account

    def counts(self) -> LogCounts:
        """What became of every line so far."""
        return LogCounts(
            written=self._written,
            **{name: self._ended[name] for name in _ENDS},
            waiting=len(self._lines),
            outstanding=self._outstanding,
            filtered=self._filtered,
            cut=self._cut,
            bound=self._bound,
        )

    def facts(self) -> dict[str, int]:
        """The account in short, for a service's facts; all of it only grows."""
        counts = self.counts()
        return {
            "log_acknowledged_total": counts.acknowledged,
            "log_refused_total": counts.refused,
            "log_lost_total": counts.lost,
        }


_REFUSALS: Final = ("refused_invalid_args", "refused_over_limit", "refused_rate_limited")
_ENDS: Final = (
    "acknowledged",
    *_REFUSALS,
    "refused_other",
    "lost_full",
    "lost_unreachable",
    "lost_unknown",
    "lost_late",
)


async def _is_link(slot: Slot) -> bool:
    """Whether the slot holds what can be sent over: it can be cloned and is no memory."""
    try:
        clone = await CapClone(slot)
    except AbiError:
        return False
    await close_probe(clone)
    try:
        _ = await CapQuery(slot)
    except AbiError:
        return True
    return False


async def _is_inbox(slot: Slot) -> bool:
    """Whether the slot holds an endpoint: it is there, and the one kind that has no clones."""
    try:
        clone = await CapClone(slot)
    except AbiError as error:
        return error.status is Status.PERMISSION_DENIED
    await close_probe(clone)
    return False


async def close_probe(clone: Slot) -> None:
    """The clone was made to see whether there is something, no more (services.md W35)."""
    await CapClose(clone)
