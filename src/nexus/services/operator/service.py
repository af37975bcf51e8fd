"""operator: the door through which a person's commands reach a running system.

Owns the port "operator", where commands connect, and what is in flight for them. It believes the
kernel about who is at the other end, passes frames on under its own identity, so that the policy
decides about it as about any service, and writes down who asked for what. A command that acts is a
span of its trace, around those of the services it is passed on to. No link ever reaches a command's
process, and no client can make it wait for another.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, NoReturn, Protocol, assert_never

from nexus.abi import (
    INIT_NAME,
    NEVER,
    AbiError,
    CapClose,
    LinkId,
    Message,
    Nanos,
    Now,
    PeerIdentity,
    PortClose,
    PortPeer,
    PortSend,
    Slot,
)
from nexus.ipc import Peer, deadline_after, offer_bulk
from nexus.ipc.exchange import close_if_any
from nexus.log import FieldValue
from nexus.metrics import Recorder
from nexus.metrics.spans import ERROR, OK
from nexus.protocols.exportd import PROTOCOL as EXPORTD
from nexus.protocols.init import PROTOCOL as INIT
from nexus.protocols.init import (
    SYSTEM_CONTROL,
    SYSTEM_OBSERVE,
    LeaveSafeMode,
    ReloadSettings,
    Restart,
    Shutdown,
)
from nexus.protocols.logd import LOG_READ, Follow, GetStats, Query
from nexus.protocols.logd import PROTOCOL as LOGD
from nexus.protocols.meta import PROTOCOL as META
from nexus.protocols.meta import GetStatus, Health
from nexus.protocols.metricsd import PROTOCOL as METRICSD
from nexus.protocols.metricsd import GetHistory, GetSeries, GetSpans
from nexus.protocols.operator import (
    PROTOCOL,
    RELAY_FRAME_SIZE_MAX,
    RELAY_TIME_MAX_NS,
    RELAYED_TO_INIT,
    OperatorRequest,
    OperatorStatus,
    PartTaken,
    PolicyReloaded,
    PutPolicyPart,
    Relay,
    Relayed,
    ReloadPolicy,
)
from nexus.protocols.policy import POLICY_SIZE_MAX, RELOAD
from nexus.protocols.policyd import PROTOCOL as POLICYD
from nexus.protocols.policyd import PolicydStatus, ReloadBulk
from nexus.protocols.updated import PROTOCOL as UPDATED
from nexus.protocols.updated import ChunkInline, GetReasons, GetUpdate, PutMetadata
from nexus.protocols.updated import GetHistory as GetUpdateHistory
from nexus.runtime import Call
from nexus.services.operator.relay import Ended, Spanned
from nexus.services.operator.relay import Refusal as RelayRefusal
from nexus.services.operator.relay import Relay as Relaying
from nexus.telemetry import called
from nexus.wire import (
    DEADLINE_OFFSET,
    FLAGS_INDEX,
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
    status_of,
)

NEEDS: Final = (SYSTEM_OBSERVE, SYSTEM_CONTROL, LOG_READ, RELOAD)
"""The rights its entry in the system file gives operator, for all that it is asked for."""

IDLE_MAX: Final = Nanos(120_000_000_000)  # ns; a connection that asks for nothing gives its place
POLICY_SERVICE: Final = "policyd"
ROOT_UID: Final = 0
ANY_UID: Final = -1
META_PASSED: Final = frozenset(META.codecs[each].prefix for each in (Health, GetStatus))
INIT_PASSED: Final = frozenset(INIT.codecs[each].prefix for each in RELAYED_TO_INIT)
INIT_ACTS: Final = frozenset(
    INIT.codecs[each].prefix for each in (Restart, Shutdown, LeaveSafeMode, ReloadSettings)
)
UPDATED_LOOKS: Final = (GetUpdate, GetReasons, GetUpdateHistory)
UPDATED_PIECES: Final = (PutMetadata, ChunkInline)
LOOKS: Final = (
    (INIT_PASSED - INIT_ACTS)
    | META_PASSED
    | frozenset(LOGD.codecs[each].prefix for each in (Query, Follow, GetStats))
    | frozenset(METRICSD.codecs[each].prefix for each in (GetSeries, GetHistory, GetSpans))
    | frozenset(UPDATED.codecs[each].prefix for each in (*UPDATED_LOOKS, *UPDATED_PIECES))
)
"""Requests that change nothing, and the pieces of an update, whose Begin and Finish count. A
command that follows the log asks twice a second: of these the first of a connection is audited, the
others are counted; and no span is made of them, so that the latest trace is that of the latest
command and not that of the look at it."""

KNOWN: Final = (
    META.dispatch
    | INIT.dispatch
    | LOGD.dispatch
    | POLICYD.dispatch
    | METRICSD.dispatch
    | EXPORTD.dispatch
    | UPDATED.dispatch
)
META_NUMBER: Final = META.number.to_bytes(2, "little")
PROTOCOL_OFFSET: Final = 4


class Log(Protocol):
    """The part of nexus.log.Logger that operator writes to."""

    def info(self, text: str, /, **fields: FieldValue) -> None:
        """Write a line, without waiting."""

    def warning(self, text: str, /, **fields: FieldValue) -> None:
        """Write a line that matters more."""


@dataclass(eq=False, slots=True)
class Visitor:
    """One connection: who it is by the kernel's word, and what it has under way."""

    link: LinkId
    peer: PeerIdentity
    idle_due: Nanos
    busy: bool = False
    parts: bytearray = field(default_factory=bytearray)
    looked: set[bytes] = field(default_factory=set)


class Refused(Exception):
    """A request from outside is refused with `status`."""

    def __init__(self, status: RelayRefusal) -> None:
        super().__init__(status.name)
        self.status = status


class Operator:
    """Serves nexus.protocols.operator on a port, and nobody on its endpoint."""

    def __init__(
        self, port: Slot, relay: Relaying, log: Log, recorder: Recorder, uid: int = ANY_UID
    ) -> None:
        self._port = port
        self._relay = relay
        self._log = log
        self._recorder = recorder
        self._uid = uid
        self._visitors: dict[LinkId, Visitor] = {}
        self._turned_away = 0
        self._refused = 0
        self._passed = 0
        self._looks = 0

    # ------------------------------------------------------------------ the runtime's side

    def handle(self, call: Call, request: OperatorRequest) -> NoReturn:
        """Services have links of their own, and no business here."""
        del request
        raise call.refuse(ReplyStatus.DENIED)

    def ready(self) -> bool:
        """The port is open from the start; links to services are found when they are asked for."""
        return True

    def facts(self) -> dict[str, int]:
        """Who is here, and what became of what was asked."""
        return {
            "visitors": len(self._visitors),
            "passing": len(self._relay),
            "turned_away_total": self._turned_away,
            "passed_total": self._passed,
            "looks_total": self._looks,
            "refused_total": self._refused,
        }

    async def on_other(self, message: Message) -> None:
        """A frame from outside, or an answer of a service."""
        if message.source == self._port:
            await self._on_frame(message)
            await self._tell(self._relay.swept())
        else:
            await self._tell(await self._relay.on_message(message))

    async def on_gone(self, link: LinkId) -> None:
        """A connection has ended, or a service's reply link."""
        if self._visitors.pop(link, None) is not None:
            await self._forget(link)
        else:
            await self._tell(self._relay.on_gone(link))

    def next_time(self) -> Nanos | None:
        """The next deadline of a request, or of a connection that asks for nothing."""
        dues = [visitor.idle_due for visitor in self._visitors.values() if not visitor.busy]
        deadline = self._relay.next_time()
        return min(dues if deadline is None else [deadline, *dues], default=None)

    async def on_time(self, now: Nanos) -> None:
        """End what is late, and find a link that lacks."""
        await self._tell(self._relay.swept())
        await self._tell(self._relay.on_time(now))
        await self._relay.look(now)
        await self._tell(self._relay.swept())
        for visitor in list(self._visitors.values()):
            if not visitor.busy and visitor.idle_due <= now:
                await self._close(visitor)

    async def on_stop(self) -> None:
        """Hand on what has come: who caused the end, as by a switch that reboots, had an answer
        before it."""
        await self._tell(await self._relay.arrived())

    # ------------------------------------------------------------------ frames from outside

    async def _on_frame(self, message: Message) -> None:
        """Shape, authority, bound, act, account; whatever comes has an answer."""
        visitor = self._visitors.get(message.link) or await self._welcome(message)
        if visitor is None:
            return
        visitor.idle_due = deadline_after(message.now, IDLE_MAX)
        try:
            reply = await self._served(visitor, message)
        except Refused as refused:
            self._refused += 1
            await self._answer(visitor, answer(message.data, refused.status))
            return
        if reply is not None:
            await self._answer(visitor, answer(message.data, ReplyStatus.OK, encode(reply)))

    async def _served(self, visitor: Visitor, message: Message) -> PartTaken | None:
        """The answer, None if it comes later; raises Refused."""
        data = message.data
        codec = PROTOCOL.dispatch.get(data[:PREFIX_SIZE])
        if codec is None or len(data) < HEADER_SIZE:
            raise Refused(self._fault_of(data))
        request = self._decoded(codec, data)
        deadline = self._deadline(data, message.now)
        if visitor.busy:
            raise Refused(ReplyStatus.BUSY)
        return await self._perform(visitor, message, codec, request, deadline)

    async def _welcome(self, message: Message) -> Visitor | None:
        """The kernel says who has connected; whoever may not is turned away."""
        try:
            peer = await PortPeer(self._port, message.link)
        except AbiError:
            return None  # gone already
        visitor = Visitor(message.link, peer, deadline_after(message.now, IDLE_MAX))
        if not self._is_welcome(peer):
            self._turned_away += 1
            self._log.warning("turned away", **_who(peer))
            await self._close(visitor)
            return None
        self._visitors[message.link] = visitor
        return visitor

    def _is_welcome(self, peer: PeerIdentity) -> bool:
        """root, and whom the kernel lets in; the entry may name one user id instead of those."""
        return self._uid in (ANY_UID, peer.uid) or peer.uid == ROOT_UID

    def _fault_of(self, data: bytes) -> ReplyStatus:
        if len(data) < HEADER_SIZE or data[0] != FRAME_KIND or status_of(data):
            return ReplyStatus.MALFORMED
        return ReplyStatus.UNSUPPORTED

    def _decoded(self, codec: Codec, data: bytes) -> Any:
        try:
            return codec.decode_request(data[HEADER_SIZE:])
        except RemoteProtocolError as error:
            raise Refused(ReplyStatus.MALFORMED) from error

    def _deadline(self, data: bytes, now: Nanos) -> Nanos:
        """The request's own deadline, bounded."""
        asked = int.from_bytes(data[DEADLINE_OFFSET:TRACE_OFFSET], "little")
        if asked <= now:
            raise Refused(ReplyStatus.EXPIRED)
        return Nanos(min(asked, now + RELAY_TIME_MAX_NS, NEVER))

    async def _perform(
        self,
        visitor: Visitor,
        message: Message,
        codec: Codec,
        request: OperatorRequest,
        deadline: Nanos,
    ) -> PartTaken | None:
        """The answer, or None when it comes later."""
        match request:
            case Relay():
                await self._pass_on(visitor, message, codec, request, deadline)
                return None
            case PutPolicyPart():
                return self._put_part(visitor, request)
            case ReloadPolicy():
                await self._reload(visitor, message, codec, request, deadline)
                return None
            case _:
                assert_never(request)

    # ------------------------------------------------------------------ what is asked

    async def _pass_on(
        self, visitor: Visitor, message: Message, codec: Codec, request: Relay, deadline: Nanos
    ) -> None:
        inner = request.frame
        if not self._relay.is_used(request.service):
            raise Refused(OperatorStatus.NO_SERVICE)
        if not self._may_pass(request.service, inner):
            raise Refused(OperatorStatus.BAD_FRAME)
        self._audit(visitor, request.service, inner)
        own = int.from_bytes(inner[DEADLINE_OFFSET:TRACE_OFFSET], "little")
        with self._span(message, codec, request.service, inner) as span:
            peer = await self._reached(request.service, message.now)
            until = Nanos(min(own, deadline))
            await self._send(visitor, peer, inner, until, message.data, codec, span)

    def _may_pass(self, service: str, inner: bytes) -> bool:
        """Whether the frame is one plain request that no capability comes of."""
        prefix = inner[:PREFIX_SIZE]
        plain = inner[0] == FRAME_KIND and not inner[OP_INDEX] & REPLY_BIT
        if not plain or inner[FLAGS_INDEX] or status_of(inner):
            return False
        if inner[PROTOCOL_OFFSET : PROTOCOL_OFFSET + 2] == META_NUMBER:
            return prefix in META_PASSED
        return service != INIT_NAME or prefix in INIT_PASSED

    def _put_part(self, visitor: Visitor, request: PutPolicyPart) -> PartTaken:
        if request.offset == 0:
            visitor.parts = bytearray()
        size = request.offset + len(request.data)
        if request.offset != len(visitor.parts) or size > POLICY_SIZE_MAX:
            raise Refused(OperatorStatus.BAD_PART)
        visitor.parts += request.data
        return PartTaken(size)

    async def _reload(
        self,
        visitor: Visitor,
        message: Message,
        codec: Codec,
        request: ReloadPolicy,
        deadline: Nanos,
    ) -> None:
        policy = bytes(visitor.parts)
        if request.size != len(policy):
            raise Refused(OperatorStatus.BAD_PART)
        visitor.parts = bytearray()
        if not self._relay.is_used(POLICY_SERVICE):
            raise Refused(OperatorStatus.NO_SERVICE)
        bulk = POLICYD.codecs[ReloadBulk]
        inner = (
            bulk.prefix + message.data[PREFIX_SIZE:HEADER_SIZE] + encode(ReloadBulk(len(policy)))
        )
        self._audit(visitor, POLICY_SERVICE, inner)
        with self._span(message, codec, POLICY_SERVICE, inner) as span:
            peer = await self._reached(POLICY_SERVICE, message.now)
            vmo = await offer_bulk(policy)
            if vmo is None:
                raise Refused(ReplyStatus.BUSY)
            try:
                data = message.data
                await self._send(visitor, peer, inner, deadline, data, codec, span, move=vmo)
            except Refused:
                await CapClose(vmo)
                raise

    async def _reached(self, service: str, now: Nanos) -> Peer:
        peer = await self._relay.reach(service, now)
        if not isinstance(peer, Peer):
            raise Refused(peer)
        return peer

    async def _send(
        self,
        visitor: Visitor,
        peer: Peer,
        inner: bytes,
        deadline: Nanos,
        outer: bytes,
        codec: Codec,
        span: Spanned,
        *,
        move: Slot | None = None,
    ) -> None:
        if deadline <= await Now():
            raise Refused(OperatorStatus.UNREACHABLE)  # the search took all the time there was
        refusal = await self._relay.send(
            peer,
            inner,
            deadline,
            client=visitor.link,
            outer=outer,
            codec=codec,
            span=span,
            move=move,
        )
        if refusal is not None:
            raise Refused(refusal)
        self._passed += 1
        visitor.busy = True

    def _audit(self, visitor: Visitor, service: str, inner: bytes) -> None:
        """Who asked what of whom; of requests that only look, each kind once per connection."""
        prefix = inner[:PREFIX_SIZE]
        if prefix in LOOKS:
            self._looks += 1
            if prefix in visitor.looked:
                return
            visitor.looked.add(prefix)
        self._log.info("command", request=_name_of(inner), target=service, **_who(visitor.peer))

    @contextmanager
    def _span(
        self, message: Message, codec: Codec, service: str, inner: bytes
    ) -> Iterator[Spanned]:
        """The span of a command, which stays open until it has its answer, unless it is refused."""
        around = inner[TRACE_OFFSET:HEADER_SIZE]
        if inner[:PREFIX_SIZE] in LOOKS or self._recorder.spans is None:
            yield Spanned(around)
            return
        attributes = {"request": _name_of(inner), "target": service}
        name = called(f"{PROTOCOL.name}.{codec.request_type.__name__}", attributes)
        span = Spanned(*self._recorder.open(around, message.now, name))
        try:
            yield span
        except Refused as refused:
            self._recorder.close(span.unit, ERROR, refused.status)
            raise

    def _end_span(self, ended: Ended, told: bytes | bytearray) -> None:
        """A command has its answer, operator's own or that of the service in it."""
        passing = ended.passing
        codec: Codec | None = passing.codec
        code = status_of(told)
        if not code and ended.answer is not None:
            codec, code = KNOWN.get(passing.inner[:PREFIX_SIZE]), status_of(ended.answer)
        refused = codec.statuses.get(code) if code and codec is not None else None
        self._recorder.close(passing.span.unit, ERROR if code else OK, refused)

    async def _forget(self, client: LinkId) -> None:
        """Nobody waits for what this client has asked for."""
        for ended in self._relay.forget_client(client):
            await close_if_any(ended.cap)
            self._recorder.close(ended.passing.span.unit, ERROR)

    # ------------------------------------------------------------------ answers to outside

    async def _tell(self, ended: Iterable[Ended]) -> None:
        """Give each client the answer to what it asked; a capability that came is closed."""
        for each in list(ended):
            await close_if_any(each.cap)
            told = self._told(each)
            self._end_span(each, told)
            visitor = self._visitors.get(each.passing.client)
            if visitor is not None:
                visitor.busy = False
                visitor.idle_due = deadline_after(await Now(), IDLE_MAX)
                await self._answer(visitor, told)

    def _told(self, ended: Ended) -> bytearray:
        """The frame that tells how a passing ended."""
        outer = ended.passing.outer
        status: RelayRefusal = ended.status
        reply: Relayed | PolicyReloaded | None = None
        if ended.answer is not None and ended.passing.codec.request_type is ReloadPolicy:
            status, reply = self._reloaded(ended.answer)
        elif ended.answer is not None and len(ended.answer) > RELAY_FRAME_SIZE_MAX:
            status = OperatorStatus.TOO_LARGE
        elif ended.answer is not None:
            reply = Relayed(ended.answer)
        if reply is None:
            self._refused += 1
            return answer(outer, status)
        return answer(outer, ReplyStatus.OK, encode(reply))

    def _reloaded(self, frame: bytes) -> tuple[RelayRefusal, PolicyReloaded | None]:
        """What policyd's answer to a new policy means outside."""
        match status_of(frame):
            case ReplyStatus.OK:
                try:
                    done = POLICYD.codecs[ReloadBulk].decode_reply(frame[HEADER_SIZE:])
                except RemoteProtocolError:
                    return OperatorStatus.BAD_ANSWER, None
                return ReplyStatus.OK, PolicyReloaded(done.generation, done.digest)
            case ReplyStatus.DENIED:
                return ReplyStatus.DENIED, None
            case PolicydStatus.BAD_POLICY:
                return OperatorStatus.BAD_POLICY, None
            case PolicydStatus.INIT_REFUSED:
                return OperatorStatus.POLICY_NOT_TAKEN, None
            case _:
                return OperatorStatus.BAD_ANSWER, None

    async def _answer(self, visitor: Visitor, frame: bytearray) -> None:
        """Queue a reply without waiting; a client that does not read loses its connection."""
        try:
            await PortSend(self._port, visitor.link, frame)
        except AbiError:
            await self._close(visitor)

    async def _close(self, visitor: Visitor) -> None:
        """End a connection, and what it has under way."""
        _ = self._visitors.pop(visitor.link, None)
        await self._forget(visitor.link)
        try:
            await PortClose(self._port, visitor.link)
        except AbiError:
            return  # it is gone already


def _name_of(inner: bytes) -> str:
    """The request's name, or the numbers of a protocol that operator does not know."""
    codec = KNOWN.get(inner[:PREFIX_SIZE])
    if codec is not None:
        return codec.request_type.__name__
    number = int.from_bytes(inner[PROTOCOL_OFFSET : PROTOCOL_OFFSET + 2], "little")
    return f"protocol {number} op {inner[OP_INDEX]}"


def _who(peer: PeerIdentity) -> dict[str, FieldValue]:
    return {"peer_uid": peer.uid, "peer_pid": peer.pid}
