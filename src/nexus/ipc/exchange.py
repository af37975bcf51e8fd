"""One link, one request, one answer: the drivers that await traps for the correlator.

`Exchange` is what a bound link offers: `call` on the fast path (one trap), `start` and `finish`
for several calls in flight, `call_many` for many requests in one packet, `ask` for calls that
carry a capability either way. Results are values; nothing here retries.
"""

import struct
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from types import coroutine
from typing import Any, Final, Generic, Protocol, TypeVar

from nexus.abi import (
    MESSAGE_SIZE_MAX,
    NO_WAIT,
    AbiError,
    CapClose,
    LinkId,
    Message,
    Nanos,
    PeerGone,
    Recv,
    Send,
    Slot,
    Status,
    Trap,
)
from nexus.abi import Call as CallTrap
from nexus.ipc.context import Context, Spans
from nexus.ipc.correlate import (
    PENDING_COUNT_MAX,
    RECENT_COUNT,
    Correlator,
    Peer,
    Pending,
    Taker,
    Verdict,
)
from nexus.ipc.deadline import nested_deadline
from nexus.ipc.nonce import NonceMismatchBudget
from nexus.ipc.outcome import (
    CallFailure,
    Closed,
    Malformed,
    MismatchBudgetExceeded,
    Refused,
    Stale,
    TimedOut,
)
from nexus.protocols.meta import PROTOCOL as META
from nexus.wire import (
    BATCH_PREFIX_SIZE_MAX,
    HEADER_SIZE,
    PREFIX_SIZE,
    STATUS_OFFSET,
    Codec,
    RemoteProtocolError,
    ReplyStatus,
    Request,
    encode,
    nonce_of,
    status_of,
)
from nexus.wire import Protocol as WireProtocol

CALL_MISMATCHES: Final = NonceMismatchBudget(64)  # per wait; twice the largest queue of strays
BATCH_FRAME_PREFIX: Final = HEADER_SIZE + BATCH_PREFIX_SIZE_MAX
ECHO: Final = struct.Struct("<QQ24s")  # nonce, deadline, trace and span: what a reply returns
RECENT_MASK: Final = RECENT_COUNT - 1

assert PREFIX_SIZE + ECHO.size == HEADER_SIZE

ReplyT = TypeVar("ReplyT")
ReplyT_co = TypeVar("ReplyT_co", covariant=True)


class Parent(Protocol):
    """A call being served, on whose behalf others are made."""

    deadline: Nanos
    trail: bytes
    """Its trace, and the span that makes the next call: the server's own, or one inside it."""

    @property
    def context(self) -> Context:
        """The same in two."""


@dataclass(frozen=True, slots=True)
class Answer(Generic[ReplyT]):
    """A reply and the capability that moved with it, which is the caller's from now on."""

    reply: ReplyT
    cap: Slot | None


class Caller:
    """What all links of a task share: the inbox, the calls in flight, the trace context.

    `parent` is the request being served now, set by the runtime: calls made meanwhile inherit its
    trace and never outlive its deadline.
    """

    __slots__ = ("correlator", "parent", "spans", "trail")

    def __init__(self, spans: Spans) -> None:
        self.correlator = Correlator()
        self.parent: Parent | None = None
        self.spans = spans
        self.trail = spans.root.trail

    def deadline_within(self, parent: Parent, own: Nanos) -> Nanos:
        """The deadline of a call made while `parent` is served."""
        return nested_deadline(parent.deadline, own)

    async def keep(self, message: Message) -> None:
        """Give a message that was judged a MATCH to whom it belongs.

        That is the taker of a post, or else the call in flight that comes for it later.
        """
        correlator = self.correlator
        pending = correlator.in_flight[nonce_of(message.data)]
        if pending.taker is not None:
            correlator.on_ended(pending)
            await close_if_any(message.cap)
            pending.taker(pending, outcome_of(correlator, message.data, pending))
            return
        for evicted in correlator.buffer.push(pending.nonce, message).evicted:
            await close_if_any(evicted.cap)


@dataclass(frozen=True, slots=True)
class Started(Generic[ReplyT_co]):
    """A call in flight. Give it to `finish`, or to `forget` if its answer no longer matters."""

    pending: Pending


class Exchange:
    """Calls over one bound link."""

    def __init__(self, caller: Caller, protocol: WireProtocol, peer: Peer) -> None:
        self._caller = caller
        self._correlator = caller.correlator
        self._take_nonce = caller.correlator.nonces.take
        self._recent = caller.correlator.recent
        self._codecs: dict[type, Codec] = {**META.codecs, **protocol.codecs}
        self.protocol = protocol
        self.peer = peer
        self._correlator.on_bound(peer)
        self._trap = CallTrap(peer.slot, b"", peer.inbox, peer.link, Nanos(0))

    def use(self, peer: Peer) -> None:
        """Go on over another link to the same service."""
        self.peer = peer
        self._correlator.on_bound(peer)
        self._trap = CallTrap(peer.slot, b"", peer.inbox, peer.link, Nanos(0))

    @property
    def generation(self) -> int:
        """Which start of the service this link leads to."""
        return self.peer.generation

    # A generator and not an async def: yielding the trap instead of awaiting it saves the
    # iterator that each await makes, 0.15 us of a call of 15.
    @coroutine
    def call(
        self, request: Request[ReplyT], deadline: Nanos, context: Context | None = None
    ) -> Generator[Trap[Any], Any, ReplyT | Refused | CallFailure]:
        """Send one request and wait for its answer, at most until `deadline` (absolute, ns)."""
        caller = self._caller
        if caller.parent is None and context is None:
            trail = caller.trail
        else:
            deadline, trail = self._inherit(deadline, context)
        peer = self.peer
        if not peer.alive:
            failure = yield from self._revive(deadline).__await__()
            if failure is not None:
                return failure
            peer = self.peer
        codec = self._codecs[type(request)]
        nonce = self._take_nonce()
        echo = ECHO.pack(nonce, deadline, trail)
        self._recent[nonce & RECENT_MASK] = peer
        trap = self._trap
        trap.data = codec.prefix + echo + encode(request)
        trap.deadline = deadline
        try:
            message: Message = yield trap
        except AbiError as error:
            pending = Pending(nonce, peer, codec, deadline, echo, 0)
            ended: ReplyT | Refused | CallFailure
            ended = yield from self._call_interrupted(error, pending).__await__()
            return ended
        data, sender, _, cap, _, _ = message
        if (
            data[:HEADER_SIZE] == codec.reply_prefix + echo
            and (sender is peer.sender or peer.is_sent_by(sender))
            and cap is None
        ):
            try:
                reply: ReplyT = codec.decode_reply(data[HEADER_SIZE:])
            except RemoteProtocolError:
                self._correlator.malformed += 1
                return Malformed()
            return reply
        pending = Pending(nonce, peer, codec, deadline, echo, 0)
        outcome: ReplyT | Refused | CallFailure
        outcome = yield from self._settle(message, pending).__await__()
        return outcome

    async def start(
        self,
        request: Request[ReplyT],
        deadline: Nanos,
        context: Context | None = None,
        *,
        move: Slot | None = None,
    ) -> Started[ReplyT]:
        """Send one request; `finish` waits for its answer. Several may be in flight.

        `move` is a capability that moves with it; it stays if the outcome is Closed or Stale.
        """
        pending = await self._launch(request, deadline, context, move)
        return Started(pending)

    def forget(self, started: Started[Any]) -> None:
        """Wait no more; an answer that still comes is stale."""
        self._correlator.on_abandoned(started.pending.nonce)
        self._correlator.on_ended(started.pending)

    async def finish(self, started: Started[ReplyT]) -> ReplyT | Refused | CallFailure:
        """The outcome of a started call; answers to others that arrive meanwhile are kept."""
        answer = await self._answer(started.pending, CALL_MISMATCHES)
        if not isinstance(answer, Message):
            return answer
        outcome: ReplyT | Refused | CallFailure = await self._read(answer, started.pending)
        return outcome

    async def ask(
        self,
        request: Request[ReplyT],
        deadline: Nanos,
        *,
        move: Slot | None = None,
        mismatches: NonceMismatchBudget = CALL_MISMATCHES,
        context: Context | None = None,
    ) -> Answer[ReplyT] | Refused | CallFailure:
        """As `call`, moving the capability `move` with the request, and accepting one back.

        If the outcome is Closed or Stale, `move` is still the caller's.
        """
        pending = await self._launch(request, deadline, context, move)
        message = await self._answer(pending, mismatches)
        if not isinstance(message, Message):
            return message
        reply = await self._read(message, pending, with_cap=True)
        if isinstance(reply, Refused | CallFailure):
            return reply
        return Answer(reply, message.cap)

    async def post(
        self,
        request: Request[Any],
        deadline: Nanos,
        taker: Taker,
        *,
        move: Slot | None = None,
    ) -> Pending | Refused | CallFailure:
        """Send one request without waiting, for room or for its answer; `taker` gets the answer.

        Without a Pending nothing was sent and the taker hears nothing: Refused BUSY if there is no
        room, a CallFailure if there is no peer. Then `move` stays as well.
        """
        if not self.peer.alive:
            return Closed()
        return await self._send_now(self.peer, request, deadline, taker, move)

    async def _send_now(
        self,
        peer: Peer,
        request: Request[Any],
        deadline: Nanos,
        taker: Taker,
        move: Slot | None = None,
    ) -> Pending | Refused | CallFailure:
        """Send a request whose answer `peer` gives; if it is not sent, `move` stays."""
        correlator = self._correlator
        if len(correlator.in_flight) >= PENDING_COUNT_MAX:
            return Refused(ReplyStatus.BUSY)
        codec = self._codecs[type(request)]
        # Of the request being served it has the trace and not the deadline, which is the answer's.
        _, trail = self._inherit(deadline, None)
        nonce = self._take_nonce()
        pending = Pending(nonce, peer, codec, deadline, ECHO.pack(nonce, deadline, trail), 0, taker)
        correlator.on_sent(pending)
        try:
            await Send(peer.slot, codec.prefix + pending.echo + encode(request), move=move)
        except AbiError as error:
            correlator.on_ended(pending)
            failure = self._not_sent(error)
            return Refused(ReplyStatus.BUSY) if isinstance(failure, TimedOut) else failure
        return pending

    def is_in_flight(self, pending: Pending) -> bool:
        """Whether its answer is still to come."""
        return self._correlator.in_flight.get(pending.nonce) is pending

    def give_up(self, posted: Pending, failure: CallFailure) -> None:
        """End a post without its answer, which is stale if it still comes. Its taker is told."""
        self._correlator.on_failed(posted, failure)

    async def take(self, count_max: int) -> None:
        """Take what has arrived over this link, `count_max` messages at most, without waiting.

        Each goes to whom it belongs: an answer to a post to its taker, one to a started call into
        the buffer until `finish`.
        """
        _ = await self._take_from(self.peer, count_max)

    async def _take_from(self, peer: Peer, count_max: int) -> int:
        """Take what has arrived by the reply link of `peer`; how many messages that were."""
        recv = Recv((peer.inbox,), NO_WAIT, link=peer.link)
        for taken in range(count_max):
            if not self._is_open(peer):
                return taken
            try:
                message = await recv
            except PeerGone as gone:
                self._correlator.on_gone(gone.link)
                return taken
            except AbiError as error:
                if error.status in (Status.QUEUE_EMPTY, Status.TIMED_OUT, Status.NO_SPACE):
                    return taken
                raise
            if self._correlator.judge(message) is Verdict.MATCH:
                await self._keep(message)
            else:
                await close_if_any(message.cap)
        return count_max

    def _is_open(self, peer: Peer) -> bool:
        """Whether the end of this reply link is still to be seen."""
        return self._correlator.peers.get(peer.link) is peer

    async def call_many(
        self,
        requests: Sequence[Request[ReplyT]],
        deadline: Nanos,
        context: Context | None = None,
    ) -> list[ReplyT | Refused | CallFailure]:
        """Many requests of one class, as few packets as hold them; one outcome per request.

        Requests that move a capability either way are not sent: each is Refused as UNSUPPORTED.
        """
        if any(not self._codecs[type(each)].batches for each in requests[:1]):
            return [Refused(ReplyStatus.UNSUPPORTED)] * len(requests)
        outcomes: list[ReplyT | Refused | CallFailure] = []
        while len(outcomes) < len(requests):
            outcomes += await self._call_batch(requests, len(outcomes), deadline, context)
        return outcomes

    async def _call_batch(
        self,
        requests: Sequence[Request[Any]],
        first: int,
        deadline: Nanos,
        context: Context | None,
    ) -> list[Any]:
        """One packet of requests from `first` on."""
        deadline, trail = self._inherit(deadline, context)
        if not self.peer.alive:
            failure = await self._revive(deadline)
            if failure is not None:
                return [failure] * (len(requests) - first)
        codec = self._codecs[type(requests[first])]
        count, body = self._batch(requests, first, codec)
        pending = self._pending(codec, deadline, trail, count)
        trap = self._trap
        trap.data = codec.batch_prefix + pending.echo + body
        trap.deadline = deadline
        try:
            message = await trap
        except AbiError as error:
            outcome: Any = await self._call_interrupted(error, pending)
        else:
            outcome = await self._settle(message, pending)
        return outcome if isinstance(outcome, list) else [outcome] * count

    def _batch(self, requests: Sequence[Any], first: int, codec: Codec) -> tuple[int, bytes]:
        """How many requests fit one packet and one reply over these links, and their body."""
        peer = self.peer
        size_max = min(MESSAGE_SIZE_MAX, peer.terms.size) - HEADER_SIZE
        reply_size = min(MESSAGE_SIZE_MAX, peer.reply_terms.size) - BATCH_FRAME_PREFIX
        count = max(1, min(codec.batch_count_max, reply_size // codec.reply_item_size_max))
        batch = list(requests[first : first + count])
        assert all(type(each) is codec.request_type for each in batch), "one class per call_many"
        body = encode(batch)
        while len(body) > size_max:
            assert len(batch) > 1, "a request fits its own link"
            del batch[len(batch) // 2 :]
            body = encode(batch)
        return len(batch), body

    def _inherit(self, deadline: Nanos, context: Context | None) -> tuple[Nanos, bytes]:
        """Deadline and trace of a call: those of the call being served, where there is one."""
        caller = self._caller
        parent = caller.parent
        if parent is not None:
            deadline = caller.deadline_within(parent, deadline)
            if context is None:
                return deadline, parent.trail
        return deadline, caller.trail if context is None else context.trail

    def _pending(self, codec: Codec, deadline: Nanos, trail: bytes, count: int = 0) -> Pending:
        """A new call, not yet sent."""
        nonce = self._take_nonce()
        echo = ECHO.pack(nonce, deadline, trail)
        return Pending(nonce, self.peer, codec, deadline, echo, count)

    async def _revive(self, _deadline: Nanos) -> CallFailure | None:
        """The peer is gone for good, unless a subclass knows the way to a new one."""
        return Closed()

    async def _launch(
        self,
        request: Request[Any],
        deadline: Nanos,
        context: Context | None,
        move: Slot | None,
    ) -> Pending:
        """Send; what keeps it from being sent ends the call early."""
        codec = self._codecs[type(request)]
        deadline, trail = self._inherit(deadline, context)
        failure = None if self.peer.alive else await self._revive(deadline)
        pending = self._pending(codec, deadline, trail)
        if failure is not None:
            pending.early = failure
        elif len(self._correlator.in_flight) >= PENDING_COUNT_MAX:
            pending.early = Refused(ReplyStatus.BUSY)
        else:
            await self._post(pending, codec.prefix + pending.echo + encode(request), move)
        return pending

    async def _post(self, pending: Pending, frame: bytes, move: Slot | None) -> None:
        """Send, waiting for room until the deadline."""
        self._correlator.on_sent(pending)
        try:
            await Send(self.peer.slot, frame, move=move, deadline=pending.deadline)
        except AbiError as error:
            self._correlator.on_ended(pending)
            failure = self._not_sent(error)
            pending.early = Closed() if move is not None and failure == TimedOut() else failure

    def _not_sent(self, error: AbiError) -> CallFailure:
        """What a refused send means; refusals that only a bug can cause are raised."""
        match error.status:
            case Status.NO_SUCH_ENDPOINT:
                self.peer.alive = False
                return Stale()
            case Status.TIMED_OUT | Status.QUEUE_FULL | Status.NO_SPACE:
                return TimedOut()
            case _:
                raise error

    async def _call_interrupted(self, error: AbiError, pending: Pending) -> Any:
        """The Call trap was refused: before or after the request left."""
        if not self._trap.sent:
            if error.status not in (Status.QUEUE_FULL, Status.NO_SPACE):
                return self._not_sent(error)
            await self._post(pending, bytes(self._trap.data), None)
            return await self._conclude(pending)
        self._correlator.on_sent(pending)
        self._on_refused_receive(error, pending)
        return await self._conclude(pending)

    async def _settle(self, message: Message, pending: Pending) -> Any:
        """The Call trap gave a message that is not plainly the answer."""
        self._correlator.on_sent(pending)
        return await self._conclude(pending, message)

    async def _conclude(self, pending: Pending, message: Message | None = None) -> Any:
        """Wait for the answer on the peer's own link and read it."""
        answer = await self._answer(pending, CALL_MISMATCHES, pending.peer.link, message)
        return await self._read(answer, pending) if isinstance(answer, Message) else answer

    async def _answer(
        self,
        pending: Pending,
        mismatches: NonceMismatchBudget,
        link: LinkId | None = None,
        message: Message | None = None,
    ) -> Message | Refused | CallFailure:
        """Wait for the message that answers `pending`, which is then no longer in flight.

        `message` is one already received. With `link` only that link is looked at.
        """
        correlator = self._correlator
        kept = correlator.buffer.take(pending.nonce)
        if kept is not None:
            correlator.on_ended(pending)
            return kept
        recv = Recv((pending.peer.inbox,), pending.deadline, link=link)
        met = 0
        while pending.early is None:
            if message is None:
                try:
                    message = await recv
                except AbiError as error:
                    self._on_refused_receive(error, pending)
                    continue
            verdict = correlator.judge(message)
            if verdict is Verdict.MATCH:
                if nonce_of(message.data) == pending.nonce:
                    correlator.on_ended(pending)
                    return message
                await self._keep(message)
            else:
                await close_if_any(message.cap)
                met += 1
                if mismatches.exceeded_by(met):
                    correlator.on_failed(pending, MismatchBudgetExceeded())
            message = None
        correlator.on_ended(pending)
        return pending.early

    def _on_refused_receive(self, error: AbiError, pending: Pending) -> None:
        """What a refused receive means for a call that was sent; bugs of ours are raised."""
        if isinstance(error, PeerGone):
            self._correlator.on_gone(error.link)
        elif error.status in (Status.TIMED_OUT, Status.QUEUE_EMPTY):
            self._correlator.on_failed(pending, TimedOut())
        else:
            raise error

    async def _keep(self, message: Message) -> None:
        """An answer to another call in flight."""
        await self._caller.keep(message)

    async def _read(self, message: Message, pending: Pending, *, with_cap: bool = False) -> Any:
        """The outcome a matched answer stands for. Fails closed: Malformed, nothing used."""
        outcome = self._outcome(message.data, pending)
        if not with_cap or isinstance(outcome, Refused | CallFailure):
            await close_if_any(message.cap)
        return outcome

    def _outcome(self, data: bytes, pending: Pending) -> Any:
        return outcome_of(self._correlator, data, pending)


def outcome_of(correlator: Correlator, data: bytes, pending: Pending) -> Any:
    """What a matched answer says: the reply or replies, Refused, or Malformed (counted)."""
    codec = pending.codec
    prefix = codec.batch_reply_prefix if pending.count else codec.reply_prefix
    echoed = data[PREFIX_SIZE:HEADER_SIZE] == pending.echo
    if not echoed or data[:STATUS_OFFSET] != prefix[:STATUS_OFFSET]:
        correlator.malformed += 1
        return Malformed()
    try:
        return _decoded(codec, status_of(data), data[HEADER_SIZE:], pending.count)
    except RemoteProtocolError:
        correlator.malformed += 1
        return Malformed()


def _decoded(codec: Codec, status: int, body: bytes, count: int) -> Any:
    """The reply or replies, or Refused; RemoteProtocolError for what is neither."""
    if status == ReplyStatus.OK:
        return codec.decode_replies(body, count) if count else codec.decode_reply(body)
    if status == ReplyStatus.REFUSED_ITEM and count:
        return [
            Refused(item) if isinstance(item, IntEnum) else item
            for item in codec.decode_items(body, count)
        ]
    declared = codec.statuses.get(status)
    if declared is None or declared is ReplyStatus.REFUSED_ITEM or body:
        raise RemoteProtocolError(f"status {status} with {len(body)} bytes")
    return Refused(declared)


async def close_if_any(cap: Slot | None) -> None:
    """Close a capability that nobody wants."""
    if cap is not None:
        await CapClose(cap)
