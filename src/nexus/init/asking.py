"""Requests of init to its services: sent without waiting, answered whenever the answer comes.

    asked --answer(nonce, link and sender agree)--> done(reply), or done(None) if it is refused
          --                                            or not what the protocol declares
          --its deadline passed-------------------> done(None)
          --forget (the instance ended)-----------> done(None)

Every question that was sent ends in exactly one `done`: nobody waits for an answer that cannot
come. Only the supervision loop receives; this keeps what is out, and reads what comes back.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final

from nexus.abi import Message, Nanos
from nexus.init.record import Record
from nexus.ipc import NonceGen, Spans
from nexus.protocols.execd import PROTOCOL as EXECD
from nexus.protocols.meta import PROTOCOL as META
from nexus.protocols.policyd import PROTOCOL as POLICYD
from nexus.protocols.updated import PROTOCOL as UPDATED
from nexus.wire import (
    FRAME_KIND,
    HEADER,
    HEADER_SIZE,
    PREFIX_SIZE,
    STATUS_OFFSET,
    Codec,
    Header,
    Protocol,
    RemoteProtocolError,
    ReplyStatus,
    encode,
    unpack_header,
)

NONCE_START: Final = 1
SPOKEN: Final = (META, POLICYD, EXECD, UPDATED)  # what init asks in: everybody, and whom it tells

Done = Callable[[Any, int], Awaitable[None]]
"""Called once, with the reply and the nonce; the reply is None if there is none to use, or the
status of a refusal if that was asked for."""


@dataclass(frozen=True, slots=True)
class Asked:
    """One request that is out: to which instance, until when, what to do with the answer."""

    record: Record
    generation: int
    codec: Codec
    frame: bytes
    deadline: Nanos
    done: Done
    refusals: bool  # whether `done` wants to know which refusal it is


class Asking:
    """Every request that is out, by nonce. Bounded: each instance has at most a few."""

    def __init__(self, spans: Spans) -> None:
        self._out: dict[int, Asked] = {}
        self._nonces = NonceGen(NONCE_START, self._out)
        self._spans = spans
        self.strays = 0  # answers to nothing that is out, or from the wrong place
        self.malformed = 0

    def __len__(self) -> int:
        return len(self._out)

    def begin_trace(self, spans: Spans) -> None:
        """The questions from now on are of this trace: that of the boot, once its id is drawn."""
        self._spans = spans

    @property
    def trace(self) -> bytes:
        """The trace id of init's questions."""
        return self._spans.root.trace

    def frame(
        self,
        record: Record,
        request: Any,
        deadline: Nanos,
        done: Done,
        *,
        refusals: bool = False,
    ) -> tuple[int, bytes]:
        """The frame of a request to the present instance, counted as out; and its nonce."""
        protocol, codec = _BY_REQUEST[type(request)]
        nonce = self._nonces.take()
        header = Header(
            FRAME_KIND,
            protocol.version,
            codec.op,
            0,
            protocol.number,
            ReplyStatus.OK,
            nonce,
            deadline,
            self._spans.root.trace,
            self._spans.next_span(),
        )
        frame = HEADER.pack(*header) + encode(request)
        self._out[nonce] = Asked(record, record.generation, codec, frame, deadline, done, refusals)
        return nonce, frame

    def next_time(self) -> Nanos | None:
        """When the first question expires."""
        return min((asked.deadline for asked in self._out.values()), default=None)

    async def on_time(self, heard: Nanos) -> None:
        """End every question whose deadline has come and whose answer had not, by `heard`."""
        await self._end([n for n, asked in self._out.items() if asked.deadline <= heard])

    async def forget(self, record: Record) -> None:
        """The instance ended: nothing it was asked will be answered."""
        await self._end([n for n, asked in self._out.items() if asked.record is record])

    async def _end(self, nonces: list[int]) -> None:
        ended = [(nonce, self._out.pop(nonce)) for nonce in nonces]
        for nonce, asked in ended:
            await asked.done(None, nonce)

    def withdraw(self, nonce: int) -> None:
        """The request could not be sent: as if it had never been asked."""
        _ = self._out.pop(nonce, None)

    async def on_message(self, message: Message) -> None:
        """Take an answer to what is out; count everything else and drop it."""
        header = unpack_header(message.data)
        asked = None if header is None else self._out.get(header.nonce)
        if header is None or asked is None or not _is_answer(message, asked):
            self.strays += 1
            return
        del self._out[header.nonce]
        try:
            reply = _read(asked.codec, header.status, message.data[HEADER_SIZE:])
        except RemoteProtocolError:
            self.malformed += 1
            reply = None
        if isinstance(reply, IntEnum) and not asked.refusals:
            reply = None
        await asked.done(reply, header.nonce)


_BY_REQUEST: Final[dict[type, tuple[Protocol, Codec]]] = {
    request: (protocol, codec) for protocol in SPOKEN for request, codec in protocol.codecs.items()
}


def _is_answer(message: Message, asked: Asked) -> bool:
    """Whether this instance sent it, on its own link, to this very request."""
    record = asked.record
    return (
        message.link == record.answers
        and record.generation == asked.generation
        and record.is_sender(message.sender)
        and message.data[:STATUS_OFFSET] == asked.codec.reply_prefix[:STATUS_OFFSET]
        and message.data[PREFIX_SIZE:HEADER_SIZE] == asked.frame[PREFIX_SIZE:HEADER_SIZE]
    )


def _read(codec: Codec, status: int, body: bytes) -> Any:
    """The reply, or the status of a declared refusal; RemoteProtocolError for anything else."""
    if status == ReplyStatus.OK:
        return codec.decode_reply(body)
    refusal: IntEnum | None = codec.statuses.get(status)
    if refusal is None or body:
        raise RemoteProtocolError(f"status {status} with {len(body)} bytes")
    return refusal
