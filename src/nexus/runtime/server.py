"""What every service runs in: receive, check, decode, handle, encode, count, answer.

Order per message: frame, strict decode, deadline, handler, encode, reply. The fast path serves a
plain request on a bound link without another object than the request and its reply; everything
else (meta requests, batches, capabilities, refusals, deferred replies) takes the slow path, which
checks the same things in the same order.

A reply is sent without waiting. A caller that does not read its replies loses them, counted; it
never holds up the service or another caller.
"""

import contextlib
import hashlib
import inspect
import json
import struct
from collections.abc import Callable, Coroutine, Generator
from enum import IntEnum
from types import coroutine
from typing import Any, Final, NamedTuple, Protocol

import msgspec

from nexus.abi import (
    INIT_NAME,
    MESSAGE_SIZE_MAX,
    NEVER,
    NO_WAIT,
    SLOTS_MAX,
    AbiError,
    BootImage,
    CapClose,
    ConsoleWrite,
    LinkId,
    Message,
    Nanos,
    Now,
    PeerGone,
    ReplyRecv,
    Send,
    Sender,
    Slot,
    Status,
    TaskStats,
    Trap,
    service_id,
)
from nexus.ipc import Caller, Peers, Spans
from nexus.ipc.context import NO_TRACE
from nexus.ipc.exchange import close_if_any
from nexus.log import FieldValue
from nexus.log.lastwords import Writer, write_last_words
from nexus.metrics import Recorder
from nexus.metrics.spans import ERROR as SPAN_ERROR
from nexus.metrics.spans import OK as SPAN_OK
from nexus.protocols.logd import Level
from nexus.protocols.meta import (
    FACTS_MAX,
    PROBES_MAX,
    Bind,
    Bound,
    Configure,
    Configured,
    Fact,
    GetStatus,
    Health,
    Healthy,
    LogProbe,
    MetaStatus,
    Probed,
    ServiceStatus,
    Stop,
    Stopping,
)
from nexus.protocols.meta import PROTOCOL as META
from nexus.protocols.metricsd import NAME_SIZE_MAX as SPAN_NAME_SIZE_MAX
from nexus.runtime.account import Account
from nexus.runtime.call import Call, Deferred, DeferredItem, Refusal
from nexus.runtime.stamp import STAMP
from nexus.telemetry import called
from nexus.wire import (
    DEADLINE_OFFSET,
    FRAME_KIND,
    HEADER_SIZE,
    OP_INDEX,
    PREFIX_SIZE,
    REPLY_BIT,
    TRACE_OFFSET,
    Codec,
    RemoteProtocolError,
    ReplyStatus,
    answer,
    encode,
    nonce_of,
    status_of,
)
from nexus.wire import Protocol as WireProtocol

BINDS_MAX: Final = 56  # reply links kept, one per link into the endpoint
ONE_SHOTS_MAX: Final = 8  # reply links of deferred one-shot requests
OWN_SLOTS: Final = 32  # of the table for the service itself, and one message on its way
REMARKS_MAX: Final = 32  # refused calls remembered with their notes
SETTINGS_ERROR_MAX: Final = 200  # characters of a sentence in a record
LOG_PAUSE_LEAST: Final = Nanos(5_000_000)  # ns between two looks after lines that wait
LOG_PAUSE_MAX: Final = Nanos(1_000_000_000)  # ns; as rare as the health probe wakes us anyway
PROBE_TEXT: Final = "log probe"  # of the record that a probe asks for
DEADLINE: Final = struct.Struct(f"<{DEADLINE_OFFSET}xQ")
INIT: Final = service_id(INIT_NAME)

assert BINDS_MAX + ONE_SHOTS_MAX + OWN_SLOTS <= SLOTS_MAX


class Service(Protocol):
    """What a service offers to the runtime; the hooks in `Hooks` are optional."""

    def handle(self, call: Call, request: Any) -> Any:
        """The reply to `request`, or `call.defer()`; raises `call.refuse(status)`.

        A plain function or a coroutine function.
        """


class Hooks(NamedTuple):
    """The optional methods of a service, looked up once."""

    on_time: Callable[[Nanos], Any] | None  # next_time() has come; plain or coroutine
    next_time: Callable[[], Nanos | None] | None
    on_gone: Callable[[LinkId], Any] | None  # the holder of a link is gone; plain or coroutine
    on_other: Callable[[Message], Any] | None  # a message of a further source; plain or coroutine
    facts: Callable[[], dict[str, int]] | None
    evidence: Callable[[], dict[str, Any]] | None  # goes with the line that the service is ready
    ready: Callable[[], bool] | None
    stands_on: Callable[[], str] | None  # in brackets behind the line that the service is ready
    on_ready: Callable[[], Any] | None  # init knows that it is ready; plain or coroutine
    on_malformed: Callable[[Message], None] | None  # a frame was refused as MALFORMED
    busy: Callable[[], bool] | None  # there is work for when no message waits
    on_idle: Callable[[], Any] | None  # busy, and no message waits; plain or coroutine
    on_batch: Callable[[], Any] | None  # gives what a batch deferred; plain or coroutine
    on_stop: Callable[[], Any] | None  # the last thing before the end; plain or coroutine
    on_settings: Callable[[dict[str, Any]], Any] | None
    """New settings, at once and whole; plain or coroutine. Raises msgspec.ValidationError, and then
    the old ones are in force."""


class Log(Writer, Protocol):
    """What the runtime needs of nexus.log.Logger: to be driven in the task's idle moments, and to
    be written into when a log probe comes, or when an error ends the task."""

    @property
    def wake(self) -> Nanos | None:
        """When `flush` has something to do; None if nothing."""

    async def flush(self) -> None:
        """Send and take what can be without waiting."""

    def info(self, text: str, /, *, token: str) -> None:
        """Write one line."""


class MetricsOf(Protocol):
    """What the runtime needs of nexus.metrics.Metrics: to be driven as the log is."""

    due: bool
    next_look: Nanos
    wake: Nanos
    recorder: Recorder

    async def flush(self) -> None:
        """Send and take what can be without waiting."""


class Remark(NamedTuple):
    """A refused call, for people: who, what, which status, and what the service noted."""

    sender: Sender
    request: str
    status: IntEnum
    notes: tuple[tuple[str, object], ...]


class Server:
    """One service on its endpoint.

    `run` serves until Stop. A task with other things to do calls `step` instead, often enough for
    the health probe.
    """

    def __init__(
        self,
        service: Service,
        protocol: WireProtocol,
        boot: BootImage,
        caller: Caller | None = None,
        *,
        sources: tuple[Slot, ...] = (),
        log: Log | None = None,
        metrics: MetricsOf | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        """`metrics` is driven between requests and records them; `recorder` records only."""
        self.boot = boot
        self.account = Account()
        self.remarks: list[Remark] = []
        self.stopping = False
        self.starting = False  # while set, the health probe finds the service not ready
        self._service = service
        self._log = log
        self._metrics = metrics
        self._recorder = recorder if metrics is None else metrics.recorder
        self._span_names = {
            codec: called(f"{protocol.name}.{codec.request_type.__name__}"[:SPAN_NAME_SIZE_MAX])
            for codec in protocol.codecs.values()
        }
        self._handle = service.handle
        self._awaits = inspect.iscoroutinefunction(service.handle)
        self._hooks = Hooks(
            *(getattr(service, name, None) for name in Hooks._fields)  # the optional methods
        )
        assert (self._hooks.on_time is None) is (self._hooks.next_time is None)
        assert (self._hooks.on_idle is None) is (self._hooks.busy is None)
        self._caller = Caller(Spans(b"", boot.name, boot.generation)) if caller is None else caller
        self._dispatch = protocol.dispatch
        self._replies: dict[LinkId, Slot] = {}
        self._one_shots: dict[Slot, Deferred] = {}
        self._outbox: list[tuple[Deferred, bytes | bytearray]] = []
        self._call = Call(self._caller.spans, self._post)
        assert not sources or self._hooks.on_other is not None, "further sources need on_other"
        self._trap = ReplyRecv((boot.endpoint, *sources), NEVER)
        self._probes = 0  # log probes answered
        self._announced = False
        self._echoed = 0  # nonce of init's Bind, told with the line that we are ready
        self._announcing = False
        self._latest = boot.now
        # A batch of anything else is refused as a flag that is not known: UNSUPPORTED.
        self._batches = {
            codec.batch_prefix: codec for codec in protocol.codecs.values() if codec.batches
        }
        self._digest = hashlib.sha256(boot.argument).hexdigest()

    # ------------------------------------------------------------------ the loop

    async def run(self) -> int:
        """Serve until Stop; the exit code."""
        while not self.stopping:
            _ = await self._turn(NEVER)
        if self._hooks.on_stop is not None:
            await _settled(self._hooks.on_stop())
        await self._flush()
        return 0

    async def step(self, deadline: Nanos) -> bool:
        """Serve at most one message, waiting for it until `deadline`; whether there was one."""
        served = await self._turn(deadline)
        while not served and self._latest < deadline:
            served = await self._turn(deadline)
        await self._flush()
        return served

    def reply_slot(self, link: LinkId) -> Slot | None:
        """The way back of a bound link, which stays the runtime's."""
        return self._replies.get(link)

    async def send_given(self) -> None:
        """Send the deferred replies given so far: a handler is about to wait for somebody."""
        await self._flush()

    # A generator and not an async def, as ipc's Exchange.call and for the same reason.
    @coroutine
    def _turn(self, deadline: Nanos) -> Generator[Trap[Any], Any, bool]:
        """Serve messages while they are plain; return after one that is not, or a wake-up.

        Whether a message was served. With a deadline other than NEVER it is one at most.
        """
        trap = self._trap
        call = self._call
        caller = self._caller
        account = self.account
        senders = account.senders
        replies = self._replies
        dispatch = self._dispatch
        handle = self._handle
        awaits = self._awaits
        next_time = self._hooks.next_time
        busy = self._hooks.busy
        log = self._log
        metrics = self._metrics
        recorder = self._recorder
        spans = None if recorder is None else recorder.spans
        span_names = self._span_names
        clock = None if recorder is None or spans is None else recorder.now
        next_number = caller.spans.next_number
        timed = next_time is not None or log is not None or metrics is not None
        forever = deadline == NEVER
        trap.deadline = deadline
        while True:
            if next_time is not None:
                due = next_time()
                if due is not None and due <= self._latest:
                    due = yield from self._ring(next_time).__await__()
                trap.deadline = deadline if due is None else min(due, deadline)
            else:
                trap.deadline = deadline  # it may still be that of another turn
            if log is not None:
                wake = log.wake
                if wake is not None:
                    if wake <= self._latest:
                        yield from self._drive(log).__await__()
                        self._hurry(next_time)
                    elif wake < trap.deadline:
                        trap.deadline = wake
            if metrics is not None and (metrics.due or metrics.next_look <= self._latest):
                yield from self._tend(metrics).__await__()
                self._hurry(next_time)
            if self._outbox:
                yield from self._flush().__await__()
            if busy is not None and busy():
                trap.deadline = NO_WAIT
            try:
                message: Message = yield trap
            except AbiError as error:
                self._check_sent()
                return (yield from self._on_refused_receive(error).__await__())
            if trap.reply_status is not None:
                self._check_sent()
            trap.slot = None
            data, sender, link, cap, now, _ = message
            if timed:
                self._latest = now
            codec = dispatch.get(data[:PREFIX_SIZE])
            slot = replies.get(link)
            if codec is None or slot is None or cap is not None:
                yield from self._serve(message).__await__()
                return True
            row = senders.get(sender[0]) or account.row(sender[0])
            row[0] += 1
            try:
                request = codec.decode_request(data[HEADER_SIZE:])
            except RemoteProtocolError:
                return (yield from self._refuse(slot, message, ReplyStatus.MALFORMED).__await__())
            (until,) = DEADLINE.unpack_from(data)
            if until <= now:
                return (yield from self._refuse(slot, message, ReplyStatus.EXPIRED).__await__())
            call.message = message
            call.codec = codec
            call.deadline = until
            caller.parent = call
            if spans is not None:
                call.number = number = next_number()  # as Call.open_span
                around = data[TRACE_OFFSET:HEADER_SIZE]
                if around.startswith(NO_TRACE):
                    around = call.begun(number)
                call.span = spans.open(around, number, now, span_names[codec])
            try:
                reply = handle(call, request)
                if awaits:
                    reply = yield from reply.__await__()
            except Refusal as refusal:
                caller.parent = None
                status = refusal.status
                self._close_span(status)
                return (yield from self._refuse(slot, message, status, request).__await__())
            caller.parent = None
            if clock is not None and call.span >= 0:  # it is not if the reply is given later
                spans.close(call.span, clock(), SPAN_OK)  # type: ignore[union-attr] # as the clock
                call.span = -1
            if type(reply) is not codec.reply_type or call.moving is not None:
                yield from self._conclude(slot, self._framed(reply)).__await__()
                return True
            frame = codec.reply_prefix + data[PREFIX_SIZE:HEADER_SIZE] + encode(reply)
            if not forever:
                _ = yield from self._send(slot, frame).__await__()
                return True
            account.replies += 1
            trap.slot = slot
            trap.data = frame

    def _hurry(self, next_time: Callable[[], Nanos | None] | None) -> None:
        """Something was awaited behind the service's back: its time may have come with that."""
        due = None if next_time is None else next_time()
        if due is not None and due < self._trap.deadline:
            self._trap.deadline = due

    def _check_sent(self) -> None:
        """The trap's reply did not go out: its caller does not read, or is gone."""
        trap = self._trap
        if trap.slot is not None and trap.reply_status is not None:
            assert trap.reply_status != Status.INVALID_ARGUMENT, "a reply exceeds its bounds"
            self.account.replies -= 1
            self.account.lost += 1
        trap.reply_status = None
        trap.slot = None

    async def _send_held(self) -> None:
        """Send the reply that the trap holds for its next wait: something else comes first."""
        trap = self._trap
        if trap.slot is not None:
            slot, trap.slot = trap.slot, None
            self.account.replies -= 1
            _ = await self._send(slot, trap.data)

    async def _ring(self, next_time: Callable[[], Nanos | None]) -> Nanos | None:
        """Tell the service that its time has come; its next one. No caller waits for that.

        What it asks of others in one such turn, outside of any span, is one trace.
        """
        on_time = self._hooks.on_time
        assert on_time is not None
        await self._send_held()
        root = self._caller.trail
        self._begin_trace(self._caller.spans.next_trail())
        await _settled(on_time(self._latest))
        self._begin_trace(root)
        due = next_time()
        assert due is None or due > self._latest, "on_time has left its time standing"
        return due

    def _begin_trace(self, trail: bytes) -> None:
        """Calls that are made outside of any request and any span belong to `trail`."""
        self._caller.trail = trail
        if self._recorder is not None:
            self._recorder.root = trail

    async def _drive(self, log: Log) -> None:
        """Let the log send and take what it can, and come back for the rest when it says so."""
        await self._send_held()
        await log.flush()
        wake = log.wake
        if wake is not None:
            soonest = Nanos(self._latest + LOG_PAUSE_LEAST)
            self._trap.deadline = min(self._trap.deadline, max(wake, soonest))

    async def _tend(self, metrics: MetricsOf) -> None:
        """As `_drive`, for the metrics, which also look now and then whether metricsd lives."""
        if not metrics.due or metrics.wake <= self._latest:
            await self._send_held()
            await metrics.flush()
        if metrics.due:
            soonest = Nanos(self._latest + LOG_PAUSE_LEAST)
            self._trap.deadline = min(self._trap.deadline, max(metrics.wake, soonest))

    def _close_span(self, refused: IntEnum | None) -> None:
        """The request being served has its reply, or is refused with a status."""
        recorder = self._recorder
        span = self._call.take_span()
        if span >= 0 and recorder is not None:
            status = SPAN_OK if refused is None else SPAN_ERROR
            recorder.close(span, status, refused)

    async def _on_refused_receive(self, error: AbiError) -> bool:
        """A wake-up without a message; what only a bug can cause is raised, never waited out."""
        if isinstance(error, PeerGone):
            await self._on_gone(error.link)
        elif error.status in (Status.TIMED_OUT, Status.QUEUE_EMPTY):
            if self._hooks.busy is not None and self._hooks.busy():
                await self._work()
            self._latest = await Now()
        else:
            raise error
        return False

    async def _work(self) -> None:
        """No message waits and the service has something to do: a step of it."""
        on_idle = self._hooks.on_idle
        assert on_idle is not None
        await _settled(on_idle())

    async def _on_gone(self, link: LinkId) -> None:
        """The holder of a link is gone: nobody reads what would be sent to it."""
        slot = self._replies.pop(link, None)
        if slot is not None:
            await CapClose(slot)
        for held in [each for each, one in self._one_shots.items() if one.link == link]:
            self._one_shots.pop(held).slot = None
            await CapClose(held)
        if self._hooks.on_gone is not None:
            await _settled(self._hooks.on_gone(link))

    # ------------------------------------------------------------------ the slow path

    async def _serve(self, message: Message) -> None:
        """Serve any message: the checks of the fast path, and what it leaves out."""
        if message.source != self.boot.endpoint:
            # Its link was never bound, so the fast path has not touched it.
            assert self._hooks.on_other is not None
            await _settled(self._hooks.on_other(message))
            return
        self.account.row(message.sender.service)[0] += 1
        prefix = message.data[:PREFIX_SIZE]
        codec = self._dispatch.get(prefix) or META.dispatch.get(prefix)
        batch = self._batches.get(prefix) if codec is None else None
        if codec is BIND:
            await self._bind(message)
            return
        one_shot = message.cap is not None and (codec is None or not codec.moves)
        slot = message.cap if one_shot else self._replies.get(message.link)
        if slot is None or self.is_reply(message.data):
            self.account.unanswerable += 1
            await close_if_any(message.cap)
        elif one_shot and len(self._one_shots) >= ONE_SHOTS_MAX:
            _ = await self._send(slot, self._refusal(message, ReplyStatus.BUSY), close=True)
        elif batch is not None:
            _ = await self._send(slot, await self._perform_batch(message, batch), close=one_shot)
        elif codec is not None:
            outcome = await self._perform(message, codec)
            await self._conclude(slot, outcome, one_shot=one_shot)
        else:
            _ = await self._send(
                slot, self._refusal(message, self.fault_of(message)), close=one_shot
            )

    def is_reply(self, data: bytes) -> bool:
        """Whether this is no request at all; answering a reply could go on for ever."""
        return len(data) > OP_INDEX and data[0] == FRAME_KIND and bool(data[OP_INDEX] & REPLY_BIT)

    def fault_of(self, message: Message) -> ReplyStatus:
        """Why a frame whose first bytes are not known is refused."""
        data = message.data
        if len(data) < HEADER_SIZE or data[0] != FRAME_KIND or status_of(data):
            return ReplyStatus.MALFORMED
        return ReplyStatus.UNSUPPORTED

    async def _bind(self, message: Message) -> None:
        """Keep the moved link as the way back for everything that comes by this link."""
        cap, link = message.cap, message.link
        if cap is None:
            await self._refuse_bind(message, self._replies.get(link), ReplyStatus.MALFORMED)
            return
        try:
            _ = BIND.decode_request(message.data[HEADER_SIZE:])
        except RemoteProtocolError:
            await self._refuse_bind(message, cap, ReplyStatus.MALFORMED, close=True)
            return
        (until,) = DEADLINE.unpack_from(message.data)
        if until <= message.now:
            await self._refuse_bind(message, cap, ReplyStatus.EXPIRED, close=True)
            return
        former = self._replies.get(link)
        if former is None and len(self._replies) >= BINDS_MAX:
            self.account.refused_binds += 1
            await self._refuse_bind(message, cap, ReplyStatus.BUSY, close=True)
            return
        bound = answer(message.data, ReplyStatus.OK, encode(Bound(self.boot.generation)))
        if await self._send(cap, bound):
            self._replies[link] = cap
            if message.sender.service == INIT:
                self._echoed = nonce_of(message.data)
            await close_if_any(former)
        else:
            await CapClose(cap)

    async def _refuse_bind(
        self, message: Message, slot: Slot | None, status: ReplyStatus, *, close: bool = False
    ) -> None:
        if slot is None:
            self.account.unanswerable += 1
        else:
            _ = await self._send(slot, self._refusal(message, status), close=close)

    async def _perform(self, message: Message, codec: Codec) -> "bytearray | Deferred":
        """Decode, check the deadline, handle, encode."""
        call = self._call
        try:
            request = codec.decode_request(message.data[HEADER_SIZE:])
        except RemoteProtocolError:
            await close_if_any(message.cap if codec.moves else None)
            return self._refusal(message, ReplyStatus.MALFORMED)
        (until,) = DEADLINE.unpack_from(message.data)
        if until <= message.now:
            await close_if_any(message.cap if codec.moves else None)
            return self._refusal(message, ReplyStatus.EXPIRED)
        call.begin(message, codec, until)
        try:
            reply = await self._handled(codec, request)
        except Refusal as refusal:
            self._close_span(refusal.status)
            return self._refusal(message, refusal.status, request)
        finally:
            await close_if_any(call.take_cap())
        self._close_span(None)
        return self._framed(reply)

    async def _handled(self, codec: Codec, request: Any) -> Any:
        """The handler's reply, made as the request being served."""
        self._caller.parent = self._call
        try:
            if codec.request_type in META.codecs:
                return await self._handle_meta(self._call, request)
            self._open_span(codec)
            reply = self._handle(self._call, request)
            return await reply if self._awaits else reply
        finally:
            self._caller.parent = None

    def _open_span(self, codec: Codec) -> None:
        """The request being served is recorded as a span from now on."""
        if self._recorder is not None and self._recorder.spans is not None:
            self._call.open_span(self._recorder.spans, self._span_names[codec])

    def _framed(self, reply: Any) -> "bytearray | Deferred":
        if isinstance(reply, Deferred):
            return reply
        codec = self._call.codec
        assert type(reply) is codec.reply_type, f"{reply!r} is no {codec.reply_type.__name__}"
        return answer(self._call.message.data, ReplyStatus.OK, encode(reply))

    async def _perform_batch(self, message: Message, codec: Codec) -> bytearray:
        """As `_perform` for every request of a batch, in order; each has its own outcome.

        What the service defers, it gives for all of them at once: one packet is one write.
        """
        call = self._call
        try:
            requests = codec.decode_requests(message.data[HEADER_SIZE:])
        except RemoteProtocolError:
            return self._refusal(message, ReplyStatus.MALFORMED)
        (until,) = DEADLINE.unpack_from(message.data)
        if until <= message.now:
            return self._refusal(message, ReplyStatus.EXPIRED)
        call.begin(message, codec, until)
        call.batched = True
        call.deferrable = self._hooks.on_batch is not None
        handle, awaits, reply_type = self._handle, self._awaits, codec.reply_type
        outcomes: list[Any] = []
        self._caller.parent = call
        self._open_span(codec)
        for request in requests:
            try:
                reply = await handle(call, request) if awaits else handle(call, request)
            except Refusal as refusal:
                reply = refusal.status
            outcomes.append(reply)
        if self._hooks.on_batch is not None and any(
            type(each) is DeferredItem for each in outcomes
        ):
            await _settled(self._hooks.on_batch())
        self._caller.parent = None
        self._close_span(None)
        call.batched = False
        call.deferrable = True
        status = ReplyStatus.OK
        items: list[Any] = []
        for request, given in zip(requests, outcomes, strict=True):
            outcome = given.outcome if type(given) is DeferredItem else given
            if isinstance(outcome, IntEnum):
                status = ReplyStatus.REFUSED_ITEM
                self._on_refused(message, outcome, request)
                outcome = int(outcome)
            else:
                assert type(outcome) is reply_type, f"{outcome!r} is no {reply_type.__name__}"
            items.append(outcome)
        return answer(message.data, status, encode(items))

    async def _conclude(
        self, slot: Slot, outcome: "bytearray | Deferred", *, one_shot: bool = False
    ) -> None:
        """Send the reply, or keep the way back for a deferred one."""
        moving, self._call.moving = self._call.moving, None
        if isinstance(outcome, Deferred):
            assert moving is None, "a deferred reply moves no capability"
            if one_shot:
                outcome.slot = slot
                self._one_shots[slot] = outcome
            return
        _ = await self._send(slot, outcome, move=moving, close=one_shot)
        if self._announcing:
            await self._announce()

    # ------------------------------------------------------------------ replies

    def _refusal(self, message: Message, status: IntEnum, request: Any = None) -> bytearray:
        """The frame that refuses, counted."""
        self._on_refused(message, status, request)
        return answer(message.data, status)

    async def _refuse(
        self, slot: Slot, message: Message, status: IntEnum, request: Any = None
    ) -> bool:
        """Refuse a request; it was served."""
        _ = await self._send(slot, self._refusal(message, status, request))
        return True

    def _on_refused(self, message: Message, status: IntEnum, request: Any) -> None:
        account = self.account
        account.on_refused(status)
        if status is ReplyStatus.EXPIRED:
            account.expired += 1
        elif request is None and status in (ReplyStatus.MALFORMED, ReplyStatus.UNSUPPORTED):
            account.malformed += 1
            if status is ReplyStatus.MALFORMED and self._hooks.on_malformed is not None:
                self._hooks.on_malformed(message)
        if len(self.remarks) >= REMARKS_MAX:
            del self.remarks[0]
        name = "" if request is None else type(request).__name__
        self.remarks.append(Remark(message.sender, name, status, self._call.notes_of(message)))

    async def _send(
        self, slot: Slot, frame: bytes | bytearray, *, move: Slot | None = None, close: bool = False
    ) -> bool:
        """Send without waiting; what cannot be sent is lost, counted and forgotten."""
        sent = await send_reply(slot, frame, move=move)
        self.account.replies += sent
        self.account.lost += not sent
        if close:
            await CapClose(slot)
        return sent

    def _post(self, deferred: Deferred, frame: bytes | bytearray) -> None:
        """A deferred reply is given: it is sent before the next wait."""
        if deferred.span >= 0 and self._recorder is not None:
            self._recorder.close(deferred.span, SPAN_ERROR if status_of(frame) else SPAN_OK)
        self._outbox.append((deferred, frame))

    async def _flush(self) -> None:
        """Send the deferred replies that were given."""
        outbox, self._outbox = self._outbox, []
        for deferred, frame in outbox:
            status = status_of(frame)
            if status:
                self.account.on_refused(status)
            slot = self._replies.get(deferred.link) if deferred.slot is None else deferred.slot
            if slot is None:
                self.account.lost += 1
                continue
            one_shot = deferred.slot is not None
            if one_shot:
                del self._one_shots[slot]
            _ = await self._send(slot, frame, close=one_shot)

    # ------------------------------------------------------------------ meta

    async def _handle_meta(
        self, call: Call, request: Health | GetStatus | Stop | Configure | LogProbe
    ) -> Any:
        match request:
            case Health():
                return self._health(call)
            case GetStatus():
                return await self._status()
            case Stop():
                return self._stop(call)
            case Configure():
                return await self._configure(call, request)
            case LogProbe():
                return self._log_probe(call, request)

    def _health(self, call: Call) -> Healthy:
        if self.starting or (self._hooks.ready is not None and not self._hooks.ready()):
            raise call.refuse(MetaStatus.NOT_READY)
        self._announcing = not self._announced and call.sender.service == INIT
        account = self.account
        return Healthy(
            self.boot.generation,
            self._digest,
            account.requests,
            account.expired,
            STAMP.version,
            STAMP.digest,
        )

    def _stop(self, call: Call) -> Stopping:
        if call.sender.service != INIT:
            raise call.refuse(ReplyStatus.DENIED)
        self.stopping = True
        return Stopping()

    async def _configure(self, call: Call, request: Configure) -> Configured:
        """The system file has other settings; only init says so."""
        if call.sender.service != INIT:
            raise call.refuse(ReplyStatus.DENIED)
        on_settings = self._hooks.on_settings
        if on_settings is None:
            raise call.refuse(MetaStatus.NEEDS_RESTART)
        try:
            await _settled(
                on_settings(msgspec.msgpack.decode(request.settings, type=dict[str, Any]))
            )
        except msgspec.DecodeError as error:  # a ValidationError is one
            if self._log is not None:
                fields: dict[str, FieldValue] = {"error": str(error)[:SETTINGS_ERROR_MAX]}
                _ = self._log.write(Level.WARN, "new settings are not taken", fields)
            raise call.refuse(MetaStatus.BAD_SETTINGS) from error
        return Configured()

    def _log_probe(self, call: Call, request: LogProbe) -> Probed:
        if self._log is None or self._probes >= PROBES_MAX:
            raise call.refuse(ReplyStatus.BUSY)
        self._probes += 1
        self._log.info(PROBE_TEXT, token=request.token)
        return Probed()

    async def _status(self) -> ServiceStatus:
        account = self.account
        facts = {"binds": len(self._replies), "refused_binds": account.refused_binds}
        if self._hooks.facts is not None:
            facts |= self._hooks.facts()
        assert len(facts) <= FACTS_MAX
        return ServiceStatus(
            generation=self.boot.generation,
            requests=account.requests,
            replies=account.replies,
            lost=account.lost,
            malformed=account.malformed,
            expired=account.expired,
            unanswerable=account.unanswerable,
            refusals=account.refusal_rows(),
            senders=account.sender_rows(),
            facts=[Fact(name, value) for name, value in sorted(facts.items())],
            counters=list(await TaskStats()),
        )

    async def _announce(self) -> None:
        """Say once that init found the service healthy; a full console is tried again later."""
        self._announcing = False
        first = self.boot.generation == 1
        line = f"{self.boot.name}: ready" if first else f"{self.boot.name}: ready again"
        if self._hooks.stands_on is not None:
            line = f"{line} ({self._hooks.stands_on()})"
        evidence = {
            "generation": self.boot.generation,
            "digest": self._digest,
            "echoed": self._echoed,
        }
        if self._hooks.evidence is not None:
            evidence |= self._hooks.evidence()
        try:
            await ConsoleWrite(line, json.dumps(evidence).encode())
        except AbiError:
            return
        self._announced = True
        if self._hooks.on_ready is not None:
            await _settled(self._hooks.on_ready())


BIND: Final = META.codecs[Bind]


async def send_reply(slot: Slot, frame: bytes | bytearray, *, move: Slot | None = None) -> bool:
    """Queue a reply without waiting; if it cannot be sent, close what was to move with it.

    Whether it was sent. The caller of a request chooses where its reply goes: no room there,
    nobody there, and a capability that is no link at all are the same, a reply it has lost.
    """
    assert len(frame) <= MESSAGE_SIZE_MAX, "a reply exceeds its bounds"
    try:
        await Send(slot, frame, move=move, deadline=NO_WAIT)
    except AbiError:
        await close_if_any(move)
        return False
    return True


async def _settled(result: Any) -> None:
    """Await what a hook returned, if it is a coroutine function."""
    if inspect.iscoroutine(result):
        await result


async def serve(
    service: Service,
    protocol: WireProtocol,
    boot: BootImage,
    peers: Peers | None = None,
    log: Log | None = None,
    metrics: MetricsOf | None = None,
) -> int:
    """Run `service` on the task's own endpoint until init says Stop; the exit code.

    Calls made through `peers` while a request is served inherit its deadline and trace. `log` and
    `metrics` are driven between requests.
    """
    caller = None if peers is None else peers.caller
    server = Server(service, protocol, boot, caller, log=log, metrics=metrics)
    return await told_if_crashed(boot, server.run(), log)


async def told_if_crashed(
    boot: BootImage, running: Coroutine[Trap[Any], Any, int], log: Log | None = None
) -> int:
    """The outermost frame of a service: the exit code of `running`.

    An error nobody expected ends the task: its last words in the log, one line on the console, and
    the supervisor decides.
    """
    try:
        return await running
    except Exception as error:
        await tell_of_crash(boot, error, log)
        if log is not None:  # so that logd has its ring, should it never have been told of it
            with contextlib.suppress(AbiError):
                await log.flush()
        raise


async def tell_of_crash(boot: BootImage, error: Exception, log: Writer | None = None) -> None:
    """The last words, which are a store into the task's own memory; and a line on the console."""
    if log is not None:
        write_last_words(log, error)
    with contextlib.suppress(AbiError):
        await ConsoleWrite(f"{boot.name}: crashed, {type(error).__name__}")
