"""A request as its handler sees it: who asks, until when, in which trace."""

from collections.abc import Callable
from enum import IntEnum
from typing import Any, Final

from nexus.abi import LinkId, Message, Nanos, Sender, Slot
from nexus.ipc import Context, Spans
from nexus.ipc.context import NO_TRACE, TRACE_SIZE, first_trail, next_trail
from nexus.telemetry import Called, SpanWriter
from nexus.wire import (
    HEADER_SIZE,
    NONCE_OFFSET,
    SPAN_OFFSET,
    TRACE_OFFSET,
    Codec,
    ReplyStatus,
    answer,
    encode,
    nonce_of,
)

NOTES_MAX: Final = 16  # facts of one call

NOT_FOR_HANDLERS: Final = (ReplyStatus.OK, ReplyStatus.REFUSED_ITEM)


class Refusal(Exception):
    """A refusal on its way from a handler to the runtime, which makes it a status."""

    def __init__(self, status: IntEnum) -> None:
        super().__init__(status.name)
        self.status = status


class Deferred:
    """A reply that is given later. Exactly one of `reply` and `refuse` is called, once.

    Whether the caller still lives and listens is the runtime's business.
    """

    __slots__ = (
        "_codec",
        "_done",
        "_post",
        "deadline",
        "header",
        "link",
        "sender",
        "slot",
        "span",
    )

    def __init__(
        self,
        message: Message,
        deadline: Nanos,
        codec: Codec,
        post: "Callable[[Deferred, bytearray], None]",
    ) -> None:
        self.header = message.data[:HEADER_SIZE]
        self.sender = message.sender
        self.link = message.link
        self.slot: Slot | None = None  # a one-shot reply link, if the request brought one
        self.deadline = deadline
        self.span = -1  # the unit of the request's span, which is open until the reply is given
        self._codec = codec
        self._post = post
        self._done = False

    def reply(self, reply: Any) -> None:
        """Answer the request."""
        assert type(reply) is self._codec.reply_type, f"{reply!r} is no reply to it"
        self._give(answer(self.header, ReplyStatus.OK, encode(reply)))

    def refuse(self, status: IntEnum) -> None:
        """Refuse the request."""
        check_declared(self._codec, status)
        self._give(answer(self.header, status))

    def _give(self, frame: bytearray) -> None:
        assert not self._done, "a deferred reply is given once"
        self._done = True
        self._post(self, frame)


class DeferredItem(Deferred):
    """The reply to one request of a batch, given before the service's `on_batch` returns."""

    __slots__ = ("outcome",)

    def __init__(
        self,
        message: Message,
        deadline: Nanos,
        codec: Codec,
        post: "Callable[[Deferred, bytearray], None]",
    ) -> None:
        super().__init__(message, deadline, codec, post)
        self.outcome: Any = None  # the reply, or the status of the refusal

    def reply(self, reply: Any) -> None:
        """Answer the request."""
        assert type(reply) is self._codec.reply_type, f"{reply!r} is no reply to it"
        self._settle(reply)

    def refuse(self, status: IntEnum) -> None:
        """Refuse the request."""
        check_declared(self._codec, status)
        self._settle(status)

    def _settle(self, outcome: Any) -> None:
        assert self.outcome is None, "a deferred reply is given once"
        self.outcome = outcome


class Call:
    """The request being served. Valid until the handler returns; one object serves them all.

    `sender` is what the kernel stamped on the message; nothing here is taken from the payload
    but the deadline and the trace context, which are the caller's to choose.
    """

    __slots__ = (
        "_cap",
        "_notes",
        "_notes_of",
        "_post",
        "_spans",
        "_trail",
        "_trail_of",
        "batched",
        "codec",
        "deadline",
        "deferrable",
        "message",
        "moving",
        "number",
        "span",
    )

    def __init__(self, spans: Spans, post: Callable[[Deferred, bytearray], None]) -> None:
        self._spans = spans
        self._post = post
        self._trail = b""
        self._trail_of: Message | None = None
        self._cap: Slot | None = None
        self._notes: list[tuple[str, object]] = []
        self._notes_of: Message | None = None
        self.number = 0  # the id of the request's span, if it is recorded
        self.span = -1  # the unit it is open in, if there is one
        self.batched = False  # one of several in a packet, which is answered as a whole
        self.deferrable = True
        self.moving: Slot | None = None
        self.deadline = Nanos(0)
        self.message: Message
        self.codec: Codec

    @property
    def sender(self) -> Sender:
        """Who asks, by the kernel's word."""
        return self.message.sender

    @property
    def link(self) -> LinkId:
        """The link the request came by; `on_gone` names it when its holder is gone."""
        return self.message.link

    @property
    def now(self) -> Nanos:
        """The kernel's clock when the request was taken from the queue."""
        return self.message.now

    @property
    def nonce(self) -> int:
        """The caller's number for this request."""
        return nonce_of(self.message.data)

    @property
    def parent(self) -> Context:
        """The trace, and the span of the caller."""
        data = self.message.data
        return Context(data[TRACE_OFFSET:SPAN_OFFSET], data[SPAN_OFFSET:HEADER_SIZE])

    @property
    def trail(self) -> bytes:
        """The caller's trace with a span of our own, for calls made on its behalf.

        The span is the one the runtime records for the request, or the one inside it that is open.
        """
        if self._trail_of is not self.message:
            message = self.message
            number = self.number or self._spans.next_number()
            around = message.data[TRACE_OFFSET:HEADER_SIZE]
            if around.startswith(NO_TRACE):
                around = self.begun(number)
            self._trail = next_trail(around[:TRACE_SIZE], number)
            self._trail_of = message
        return self._trail

    @trail.setter
    def trail(self, trail: bytes) -> None:
        self._trail = trail
        self._trail_of = self.message

    @property
    def context(self) -> Context:
        """The same in two."""
        trail = self.trail
        return Context(trail[:TRACE_SIZE], trail[TRACE_SIZE:])

    def note(self, name: str, value: object) -> None:
        """Add a fact to what the runtime remembers of this call if it is refused."""
        if self._notes_of is not self.message:
            self._notes = []
            self._notes_of = self.message
        if len(self._notes) < NOTES_MAX:
            self._notes.append((name, value))

    def notes_of(self, message: Message) -> tuple[tuple[str, object], ...]:
        """What was noted while `message` was served."""
        return tuple(self._notes) if self._notes_of is message else ()

    def refuse(self, status: IntEnum) -> Refusal:
        """The refusal to raise. A status the request does not declare is a bug."""
        check_declared(self.codec, status)
        return Refusal(status)

    def defer(self) -> Deferred:
        """Answer later: return this from the handler.

        In a batch it is given when `on_batch` returns; a service without that defers nothing there.
        """
        if not self.deferrable:
            raise Refusal(ReplyStatus.UNSUPPORTED)
        if self.batched:
            return DeferredItem(self.message, self.deadline, self.codec, self._post)
        deferred = Deferred(self.message, self.deadline, self.codec, self._post)
        deferred.span = self.take_span()
        return deferred

    def take_cap(self) -> Slot | None:
        """The capability that came with the request; the service's own from now on."""
        cap, self._cap = self._cap, None
        return cap

    def give_cap(self, slot: Slot) -> None:
        """Move this capability with the reply; it is closed if the reply is lost."""
        assert self.codec.gives, "the request declares that its reply gives one"
        assert self.moving is None, "one capability moves with a message"
        self.moving = slot

    def open_span(self, spans: SpanWriter, name: Called) -> None:
        """The runtime records the request as a span: it begins when it was taken from the queue."""
        message = self.message
        around = message.data[TRACE_OFFSET:HEADER_SIZE]
        self.number = number = self._spans.next_number()
        if around.startswith(NO_TRACE):
            around = self.begun(number)
        self.span = spans.open(around, number, message.now, name)

    def begun(self, number: int) -> bytes:
        """What is around a request whose caller is in no trace: one that begins with its span."""
        return first_trail(self._spans.trace, number, number)

    def take_span(self) -> int:
        """Whose reply is given now, or later by what takes it: the span's unit, or -1."""
        span, self.span = self.span, -1
        return span

    def begin(self, message: Message, codec: Codec, deadline: Nanos) -> None:
        """The runtime takes up a request off the fast path."""
        self.message = message
        self.codec = codec
        self.deadline = deadline
        self.number = 0
        self._cap = message.cap if codec.moves else None


def check_declared(codec: Codec, status: IntEnum) -> None:
    """A status outside the request's declaration is our bug."""
    assert codec.statuses.get(status) is status, f"{status!r} is not declared"
    assert status not in NOT_FOR_HANDLERS, f"{status!r} is the runtime's"


assert NONCE_OFFSET < TRACE_OFFSET < SPAN_OFFSET
