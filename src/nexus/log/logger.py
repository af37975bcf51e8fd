"""The log of a task: lines go into its own ring, which logd drains; or by message, where they must.

    no ring --begin--> ring --OpenStream--> drained by logd --its instance is gone--> ring
    written --put--> in the ring --Drained--> accepted, refused, overwritten
    written --slots configured, or no memory for a ring--> waiting --Append--> acknowledged, refused

Writing a line is a plain function that never waits and never raises: a store into the task's own
memory, which logd still reads when the task has died. `flush` opens the stream and rings logd's
doorbell without waiting for an answer; the one thing it waits for, under a bound and not often,
is the way to logd. Not one line is lost without being counted under the reason.
"""

from collections import Counter, deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Final, NamedTuple

from nexus.abi import (
    AbiError,
    CapClone,
    CapClose,
    CapQuery,
    Clock,
    ClockMap,
    Nanos,
    Slot,
    Status,
    VmoCreate,
    VmoShare,
)
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
from nexus.log.line import FieldValue, Line, make_line
from nexus.log.payload import head_of, pack_into, packed, sendable, unpack
from nexus.protocols.logd import (
    FIELDS_SIZE_MAX,
    PROTOCOL,
    RATE_WINDOW_NS,
    RING_SIZE_MAX,
    TEXT_SIZE_MAX,
    Append,
    Drain,
    Drained,
    Level,
    OpenStream,
)
from nexus.telemetry.ring import RingWriter
from nexus.wire import ReplyStatus

LOGD_NAME: Final = "logd"
RING_SIZE_DEFAULT: Final = 64 * 1024  # bytes; about 500 lines, more than a burst of a start
QUEUE_MAX: Final = 64  # lines that wait in the task for a message; of at most 1 KiB each
SURE_SIZE: Final = 240  # bytes of a payload so small that no part of it can be too large
SURE_KEYS: Final = 10  # fields that are not too large even if a byte of each is shown with 24
HEADS_MAX: Final = 256  # kept ready; a program has as many as lines of code
BELL_PAUSE: Final = Nanos(10_000_000)  # ns between two doorbells, doubling while nothing moves
BELL_PAUSE_MAX: Final = Nanos(1_000_000_000)  # ns; as rare as the health probe wakes us anyway
ANSWER_WAIT: Final = Nanos(1_000_000_000)  # ns until a line without an answer counts as lost
DISCOVERY_WAIT: Final = Nanos(50_000_000)  # ns of one search for logd; nothing else is waited for
LOOK_PAUSE: Final = Nanos(100_000_000)  # ns between two searches, doubling
LOOK_PAUSE_MAX: Final = Nanos(2_000_000_000)  # ns; about as long as logd's restart takes at worst
DENIED_PAUSE: Final = Nanos(30_000_000_000)  # ns; a route that is denied comes with a new policy
FULL_PAUSE: Final = Nanos(5_000_000)  # ns until a full logd is tried again
RATE_PAUSE: Final = Nanos(RATE_WINDOW_NS)  # ns; the window that refused is over then
ROUTE_ATTEMPTS_MAX: Final = 3  # of one search
ROUTE_BACKOFF: Final = Nanos(5_000_000)  # ns

UNSURE: Final = (KeyError, UnicodeEncodeError, OverflowError, TypeError, RecursionError)
"""What the short way raises: keys that are new, half a surrogate pair, a number of more than 64
bits, a value that is none of FieldValue."""

ERROR, WARN, INFO, DEBUG, TRACE = (int(each) for each in Level)

assert RING_SIZE_DEFAULT <= RING_SIZE_MAX
assert SURE_SIZE <= TEXT_SIZE_MAX
assert SURE_SIZE + SURE_KEYS * (24 - 1 + 2) <= FIELDS_SIZE_MAX


@dataclass(frozen=True, slots=True, kw_only=True)
class LogCounts:
    """What became of the lines of one task.

    written = acknowledged + refused_* + lost_* + waiting + outstanding, always. `acknowledged` are
    in the journal; `waiting` ones are in the ring, or in the queue for messages. `filtered` lines
    were below the level and are not written; `cut` ones were shortened; `bound` is how often a way
    to logd was found.
    """

    written: int
    acknowledged: int
    refused_invalid_args: int
    refused_over_limit: int
    refused_rate_limited: int
    refused_other: int  # those of the ring: logd's own account says why
    lost_full: int
    lost_overwritten: int  # in the ring, before logd had read them
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
        """Lines that logd never took in."""
        return (
            self.lost_full
            + self.lost_overwritten
            + self.lost_unreachable
            + self.lost_unknown
            + self.lost_late
        )


class _Settled(NamedTuple):
    """What became of the lines of the ring, and how far logd has come in it."""

    taken: int = 0  # bytes
    sequence: int = 0
    accepted: int = 0
    refused: int = 0

    def after(self, drained: Drained) -> "_Settled":
        """With what a stream that was opened here has come to."""
        return _Settled(
            drained.taken,
            drained.sequence,
            self.accepted + drained.accepted,
            self.refused + drained.refused,
        )


class _Tag(Enum):
    """What is posted besides lines."""

    OPEN = "the stream is opened"
    BELL = "there is something in the ring"


class Logger:
    """The log of one task. `level` is the least important level that is written.

    `uses` are the services it may ask init for; without logd among them only configured slots lead
    there. `ring_size` is bytes, 0 for no ring; without one at most `queue_max` lines wait.
    """

    # Slots, for every line: the interpreter goes a longer way in an object of more than 30 names.
    __slots__ = (
        "_again",
        "_base",
        "_begun",
        "_bell_pause",
        "_bells",
        "_bound",
        "_caller",
        "_clock",
        "_cut",
        "_direct",
        "_elsewhere",
        "_ended",
        "_filtered",
        "_flushing",
        "_heads",
        "_heads_count",
        "_lines",
        "_memory",
        "_missed",
        "_monotonic",
        "_now",
        "_pause",
        "_peers",
        "_poster",
        "_queue_max",
        "_reply_known",
        "_ring",
        "_ring_size",
        "_routed",
        "_rung",
        "_settled",
        "_stream_of",
        "_tokens",
        "_written",
        "level",
        "scope",
    )

    def __init__(
        self,
        peers: Peers,
        uses: Collection[str] = (),
        *,
        scope: str | None = None,
        level: Level = Level.INFO,
        queue_max: int = QUEUE_MAX,
        ring_size: int = RING_SIZE_DEFAULT,
    ) -> None:
        assert queue_max >= 1
        assert 0 <= ring_size <= RING_SIZE_MAX
        self.level = int(level)  # a number, for every line: an enum's comparison takes longer
        self.scope = peers.boot.name if scope is None else scope
        self._peers = peers
        self._caller = peers.caller
        self._routed = LOGD_NAME in uses
        self._queue_max = queue_max
        self._ring_size = ring_size
        self._clock: Clock | None = None
        self._monotonic: Callable[[], int] = int  # the clock's; 0 while there is none
        self._ring: RingWriter | None = None
        self._direct: RingWriter | None = None  # the ring, while lines go straight into it
        self._memory: Slot | None = None  # the ring's, while there is one
        self._begun = False
        self._lines: deque[bytes] = deque()  # payloads that wait for the ring, or for a message
        self._elsewhere: deque[tuple[Level, str, dict[str, FieldValue], str]] = deque()
        # By scope, level and keys, where a short line is put together, and the size of its head,
        # which stays there: so it is one piece at once, for its checksum and for the ring.
        self._heads: dict[str, tuple[dict[tuple[str, ...], tuple[bytearray, int]], ...]] = {}
        self._heads_count = 0
        self._ended: Counter[str] = Counter()  # lines that wait no more, by the name of the count
        self._written = 0
        self._missed = 0  # lines from elsewhere that found no place
        self._filtered = 0
        self._cut = 0
        self._bound = 0
        self._poster: Poster[bytes | _Tag] | None = None
        self._stream_of: object = None  # the peer that drains the ring
        self._base = _Settled()  # what streams of earlier instances had come to
        self._settled = _Settled()
        self._bells = 0  # posts about the stream without an answer
        self._rung = False  # a doorbell is one of them
        self._bell_pause = BELL_PAUSE
        self._tokens = RetryTokens()
        self._reply_known = False
        self._flushing = False
        self._now = Nanos(0)  # when flush was called last
        self._again = Nanos(0)  # flush sends nothing before
        self._pause = LOOK_PAUSE

    # ------------------------------------------------------------------ writing

    # With `/` a field may have any name; and what a call names is not compared with parameters,
    # 20 ns a field.
    def error(self, text: str, /, **fields: FieldValue) -> None:
        """Something is broken, and somebody should look."""
        _ = self._write(ERROR, text, fields, self.scope)

    def warning(self, text: str, /, **fields: FieldValue) -> None:
        """Something is not as it should be; it goes on."""
        _ = self._write(WARN, text, fields, self.scope)

    def info(self, text: str, /, **fields: FieldValue) -> None:
        """What a reader of the log wants to know of an ordinary day."""
        _ = self._write(INFO, text, fields, self.scope)

    def debug(self, text: str, /, **fields: FieldValue) -> None:
        """What helps to find a fault."""
        _ = self._write(DEBUG, text, fields, self.scope)

    def trace(self, text: str, /, **fields: FieldValue) -> None:
        """Every step."""
        _ = self._write(TRACE, text, fields, self.scope)

    def write(
        self,
        level: Level,
        text: str,
        fields: Mapping[str, FieldValue] | None = None,
        *,
        scope: str | None = None,
    ) -> bool:
        """Write one line, cut to what a record may have; whether it is on its way now."""
        return self._write(int(level), text, fields or {}, self.scope if scope is None else scope)

    # One function with everything in it: a line costs less than ten calls of an empty one.
    def _write(self, level: int, text: str, fields: Mapping[str, FieldValue], scope: str) -> bool:
        if level > self.level:
            self._filtered += 1
            return False
        self._written += 1
        parent = self._caller.parent
        ids = b"" if parent is None else parent.context.trace + parent.context.span
        now = self._monotonic  # self._monotonic() would be sought as a method, which it is not
        payload: bytes | bytearray
        try:
            payload, head_size = self._heads[scope][level][tuple(fields)]
            pack_into([now(), text, ids, *fields.values()], payload, head_size)
        except UNSURE:
            payload = self._payload(level, text, fields, scope)
        else:
            if len(payload) > SURE_SIZE:
                payload = self._payload(level, text, fields, scope)
        direct = self._direct
        if direct is not None:
            direct.put(payload)
            return True
        reason = self._no_room()
        if reason is not None:
            self._ended[reason] += 1
            return False
        self._lines.append(bytes(payload))
        return True

    def write_from_elsewhere(
        self, level: Level, text: str, fields: dict[str, FieldValue], scope: str
    ) -> None:
        """As `write`, from another thread of this process: the line is taken by the next flush.

        Nothing but an append to a queue happens here; a line that finds it full is lost. One thread
        at a time: the lock of a logging.Handler sees to that.
        """
        if len(self._elsewhere) < QUEUE_MAX:
            self._elsewhere.append((level, text, fields, scope))
        else:
            self._missed += 1

    def _payload(
        self, level: int, text: str, fields: Mapping[str, FieldValue], scope: str
    ) -> bytes:
        """Any line, cut to what a record may have."""
        line = make_line(Level(level), scope, text, fields)
        self._cut += line.is_cut
        self._learn(fields, line)
        written = self._monotonic()
        parent = self._caller.parent
        if parent is None:
            return packed(line.request, written)
        return packed(line.request, written, parent.context.trace, parent.context.span)

    def _learn(self, fields: Mapping[str, FieldValue], line: Line) -> None:
        """Keep the head of such lines ready if scope and keys are written as they stand."""
        request, names = line.request, tuple(fields)
        known = self._heads[request.scope][request.level] if request.scope in self._heads else {}
        if names in known:
            piece, head_size = known[names]
            del piece[head_size:]  # this line was none of the short ones: its bytes are not kept
            return
        if line.is_cut or len(names) > SURE_KEYS or self._heads_count == HEADS_MAX:
            return
        if [field.key for field in request.fields] == sorted(names):
            head = head_of(request.level, request.scope, names)
            if head is not None:
                heads = self._heads.setdefault(request.scope, tuple({} for _ in Level))
                heads[request.level][names] = (bytearray(head), len(head))
                self._heads_count += 1

    def _no_room(self) -> str | None:
        """Under which count a line that would wait is lost right away; None if it may wait."""
        if self._poster is None and not self._routed:
            return "lost_unreachable"
        if len(self._lines) < self._queue_max:
            return None
        return "lost_full" if self._is_bound or not self._begun else "lost_unreachable"

    @property
    def _by_message(self) -> bool:
        """Whether lines go by message: over slots while they lead anywhere, or without a ring."""
        if self._poster is not None and isinstance(self._poster.exchange, OneShots):
            return self._poster.exchange.peer.alive or self._ring is None
        return self._begun and self._ring is None

    @property
    def _is_bound(self) -> bool:
        return self._poster is not None and self._poster.exchange.peer.alive

    @property
    def _outstanding(self) -> int:
        """Lines that were sent as messages and have no answer."""
        return 0 if self._poster is None else self._poster.outstanding - self._bells

    @property
    def _in_ring(self) -> int:
        """Lines in the ring that logd has not answered for."""
        return 0 if self._ring is None else self._ring.sequence - self._settled.sequence

    # ------------------------------------------------------------------ sending

    @property
    def due(self) -> bool:
        """Whether `flush` has something to do: lines wait, or answers are open."""
        return (
            bool(self._lines or self._elsewhere)
            or (self._in_ring > 0 and not self._by_message)
            or self._outstanding > 0
        )

    @property
    def wake(self) -> Nanos | None:
        """When `flush` has something to do; None if nothing. It may be over."""
        return self._again if self.due else None

    async def begin(self) -> None:
        """Make the ring. Without memory for one lines go by message."""
        if self._begun or not self._routed:
            return
        self._begun = True
        try:
            _ = await self._read_clock()
            if self._ring_size:
                self._memory = await VmoCreate(self._ring_size)
                self._ring = RingWriter(await VmoShare(self._memory))
        except AbiError:
            await self._let_go_of_memory()
            return
        self._direct = self._ring
        self._move_to_ring()

    async def open(self, until: Nanos) -> bool:
        """Find logd and give it the ring, waiting at most until `until`; whether it has it.

        From then on what is written outlives the task, however that ends.
        """
        await self.begin()
        if self._flushing or self._ring is None or self._by_message:
            return False
        self._flushing = True
        try:
            if not self._is_bound and await self._look(until) is not None:
                return False
            assert self._poster is not None, "who was found is bound"
            return await self._open_stream(self._poster, await self._read_clock())
        finally:
            self._flushing = False

    async def flush(self) -> None:
        """Open the stream, ring, post what waits, take the answers that are there."""
        if self._flushing:
            return
        while self._elsewhere:
            level, text, fields, scope = self._elsewhere.popleft()
            _ = self.write(level, text, fields, scope=scope)
        if not self.due:
            return
        self._flushing = True
        try:
            if not self._by_message:
                await self.begin()
            await self._send(await self._read_clock())
        finally:
            self._flushing = False

    async def _read_clock(self) -> Nanos:
        if self._clock is None:
            self._clock = await ClockMap()
            self._monotonic = self._clock.monotonic
        return self._clock.monotonic()

    async def _send(self, now: Nanos) -> None:
        self._now = now
        await self._take(now)
        if now < self._again or not self.due:
            return
        if not await self._ready(now):
            return
        assert self._poster is not None, "ready is bound"
        if not self._by_message and self._ring is not None and self._routed:
            if await self._open_stream(self._poster, now):
                await self._ring_bell(self._poster, now)
            return
        while self._lines:
            payload = self._lines.popleft()
            posted = await self._post(self._poster, sendable(unpack(payload)), payload, now)
            if posted is Posted.SENT:
                continue
            self._lines.appendleft(payload)
            self._again = deadline_after(now, FULL_PAUSE)
            return
        if self._outstanding:
            self._again = deadline_after(now, self._bell_pause)
            self._bell_pause = min(Nanos(2 * self._bell_pause), BELL_PAUSE_MAX)

    async def _post(
        self,
        poster: "Poster[bytes | _Tag]",
        request: Append | Drain | OpenStream,
        tag: bytes | _Tag,
        now: Nanos,
        *,
        move: Slot | None = None,
    ) -> Posted:
        try:
            return await poster.post(request, now, tag, move=move)
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

    def _on_slots_lost(self, poster: "Poster[bytes | _Tag]", error: AbiError) -> None:
        """The owner of configured slots has closed them; for a link of our own it is a bug."""
        if isinstance(poster.exchange, Client):
            raise error
        poster.exchange.peer.alive = False

    def _on_ended(self, tag: bytes | _Tag, outcome: object) -> None:
        """What was posted has its outcome."""
        if isinstance(tag, _Tag):
            self._on_stream(tag, outcome)
            return
        match outcome:
            case Refused(status):
                name = f"refused_{status.name.lower()}"
                self._ended[name if name in _REFUSALS else "refused_other"] += 1
            case TimedOut():
                self._ended["lost_late"] += 1
            case CallFailure():
                self._ended["lost_unknown"] += 1
            case _:
                self._ended["acknowledged"] += 1
        self._bell_pause = BELL_PAUSE

    # ------------------------------------------------------------------ the stream

    async def _open_stream(self, poster: "Poster[bytes | _Tag]", now: Nanos) -> bool:
        """Have this instance of logd drain the ring; whether it was asked to."""
        if self._stream_of is poster.exchange.peer:
            return True
        memory = await self._clone_of_memory()
        posted = Posted.FULL
        if memory is not None:
            request = OpenStream(self._settled.taken, self._settled.sequence)
            posted = await self._post(poster, request, _Tag.OPEN, now, move=memory)
            if posted is not Posted.SENT:
                await CapClose(memory)
        if posted is Posted.SENT:
            self._stream_of = poster.exchange.peer
            self._base = self._settled
            self._bells += 1
            return True
        self._again = deadline_after(now, self._bell_pause)
        return False

    async def _clone_of_memory(self) -> Slot | None:
        """The ring's memory in a slot of its own, which moves; None while there is no slot."""
        assert self._memory is not None
        try:
            return await CapClone(self._memory)
        except AbiError as error:
            if error.status is not Status.NO_SPACE:
                raise
            return None

    async def _ring_bell(self, poster: "Poster[bytes | _Tag]", now: Nanos) -> None:
        """Tell logd that there is something in the ring, if there is."""
        if self._in_ring and not self._rung:
            self._rung = await self._post(poster, Drain(), _Tag.BELL, now) is Posted.SENT
            self._bells += self._rung
        self._again = deadline_after(now, self._bell_pause)
        self._bell_pause = min(Nanos(2 * self._bell_pause), BELL_PAUSE_MAX)

    def _on_stream(self, tag: "_Tag", outcome: object) -> None:
        """logd's answer about the stream, or its end."""
        self._bells -= 1
        if tag is _Tag.BELL:
            self._rung = False
        if isinstance(outcome, Drained):
            settled = self._base.after(outcome)
            if settled.sequence != self._settled.sequence:
                self._bell_pause = BELL_PAUSE
                self._again = min(self._again, deadline_after(self._now, BELL_PAUSE))
            self._settled = settled
        elif isinstance(outcome, Refused) and outcome.status is not ReplyStatus.BUSY:
            self._stream_of = None  # it drains no ring of ours: it is asked again, a little later
            self._again = deadline_after(self._now, RATE_PAUSE)

    async def _let_go_of_memory(self) -> None:
        self._ring = self._direct = None
        memory, self._memory = self._memory, None
        if memory is not None:
            await CapClose(memory)

    # ------------------------------------------------------------------ the way to logd

    async def configure_sink_logd_slots(
        self, logd_send: Slot, reply_send: Slot, reply_recv: Slot
    ) -> bool:
        """Use these for all later lines, independent of routing; the slots stay the caller's.

        `reply_send` is a link into the endpoint `reply_recv` that allows delegations: for each line
        without an answer one way back is derived from it and moved. False, with nothing stored, if
        a slot is missing or of another kind. When that instance of logd is gone the slots are no
        sink any more, and routing is left. Lines that are in the ring by then stay there, and logd
        finds them.
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
        """Take the answers that are there and let go of logd and the ring; lines from now on are
        lost. What is in the ring logd reads to its end, but nobody hears of it."""
        await self._release()
        await self._peers.forget(LOGD_NAME)
        self._routed = False
        self._ended["lost_unknown"] += self._in_ring
        self._ended["lost_unreachable"] += len(self._lines)
        self._lines.clear()
        if self._ring is not None:
            self._ended["acknowledged"] += self._settled.accepted
            self._ended["refused_other"] += self._settled.refused
            self._ended["lost_overwritten"] += self._overwritten
            self._settled = _Settled()
        await self._let_go_of_memory()

    async def _ready(self, now: Nanos) -> bool:
        """Whether there is a way to logd, after one bounded search for it."""
        if self._is_bound:
            return True
        if self._poster is not None and not isinstance(self._poster.exchange, Client):
            await self._release()
        if not self._routed:
            self._ended["lost_unreachable"] += len(self._lines)
            self._lines.clear()
            return False
        self._move_to_ring()
        failure = await self._look(deadline_after(now, DISCOVERY_WAIT))
        if failure is None:
            self._pause = LOOK_PAUSE
            return True
        pause = DENIED_PAUSE if isinstance(failure, Denied | NotFound) else self._pause
        self._pause = min(Nanos(2 * self._pause), LOOK_PAUSE_MAX)
        self._again = deadline_after(await self._read_clock(), pause)
        return False

    def _move_to_ring(self) -> None:
        """What waited for slots that lead nowhere goes the way of all lines."""
        while self._ring is not None and self._lines:
            self._ring.put(self._lines.popleft())

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
        self._direct = None if isinstance(exchange, OneShots) else self._ring
        self._stream_of = None
        self._bound += 1
        self._again = Nanos(0)

    async def _release(self) -> None:
        """Let go of the way to logd that is in use; what has no answer has none for good."""
        poster = self._poster
        if poster is None:
            return
        await self._take(await self._read_clock())
        poster.abandon()
        self._poster = None
        self._direct = self._ring
        self._stream_of = None
        if isinstance(poster.exchange, OneShots):
            poster.exchange.end()
        else:
            await self._peers.discard(poster.exchange.peer)

    # ------------------------------------------------------------------ the account

    @property
    def _overwritten(self) -> int:
        """Lines of the ring that logd never read: all that it had and neither took nor refused."""
        settled = self._settled
        return settled.sequence - settled.accepted - settled.refused

    def counts(self) -> LogCounts:
        """What became of every line so far."""
        ended = Counter(self._ended)
        ended["acknowledged"] += self._settled.accepted
        ended["refused_other"] += self._settled.refused
        ended["lost_overwritten"] += self._overwritten
        ended["lost_full"] += self._missed
        return LogCounts(
            written=self._written + self._missed,
            **{name: ended[name] for name in _ENDS},
            waiting=len(self._lines) + self._in_ring,
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
    "lost_overwritten",
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
