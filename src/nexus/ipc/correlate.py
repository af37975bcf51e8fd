"""Which call does a reply answer? Decided without I/O, from what the kernel stamped on it.

    in flight --match---------------------------------> answered
    in flight --on_abandoned (deadline, cut off)------> abandoned

A reply to an abandoned or forgotten call is stale, a second reply to an answered one is a
duplicate, and a reply with the right nonce that came by another link, or from another service
than the one asked, is foreign. None of them is ever taken for the answer; each is counted.
"""

from collections.abc import Callable
from enum import Enum
from typing import Final, TypeAlias

from nexus.abi import LinkId, LinkTerms, Message, Nanos, Sender, ServiceId, Slot
from nexus.ipc.buffer import ReplyBuffer
from nexus.ipc.nonce import NonceGen
from nexus.ipc.outcome import CallFailure, Refused, Stale, Unknown
from nexus.wire import FRAME_KIND, HEADER_SIZE, OP_INDEX, REPLY_BIT, Codec, nonce_of

NONCE_START: Final = 1  # stable, so that runs compare; a nonce authenticates nobody
PENDING_COUNT_MAX: Final = 64  # calls in flight of one task
BUFFER_COUNT_MAX: Final = 16  # replies kept for calls nobody waits for yet
BUFFER_SIZE_MAX: Final = 32 * 1024  # bytes of them; four largest messages
GENERATION_ANY: Final = 0  # of a peer whose first reply tells it; generations count from 1
RECENT_COUNT: Final = 64  # issued nonces remembered to tell duplicate from stale; a power of 2

assert RECENT_COUNT & (RECENT_COUNT - 1) == 0


class Peer:
    """One link to a service, and the link it answers over. Replaced as a whole on a rebind.

    `inbox` and `link` say where its replies arrive; `service` and `generation` who may send them.
    """

    __slots__ = (
        "alive",
        "generation",
        "held",
        "inbox",
        "link",
        "name",
        "reply_terms",
        "sender",
        "service",
        "slot",
        "terms",
    )

    def __init__(
        self,
        name: str,
        *,
        slot: Slot,
        inbox: Slot,
        link: LinkId,
        service: ServiceId,
        generation: int,
        terms: LinkTerms,
        reply_terms: LinkTerms,
    ) -> None:
        self.name = name
        self.slot = slot
        self.inbox = inbox
        self.link = link
        self.service = service
        self.generation = generation
        self.terms = terms
        self.reply_terms = reply_terms
        self.alive = True
        self.held = True  # `slot` is ours to close; afterwards it may name something else
        self.sender: Sender | None = None  # the last one recognised; kernels give it again

    def is_sent_by(self, sender: Sender) -> bool:
        """Whether the kernel's stamp is that of the instance this link leads to."""
        if sender.service != self.service or sender.generation != self.generation:
            return False
        self.sender = sender
        return True


class Pending:
    """A call in flight: what was asked of whom, until when; `early` is set if it has ended.

    `echo` are the header bytes behind the prefix, which a reply returns unchanged; `count` is the
    number of requests of a batch, 0 for a single one. `taker` gets the outcome of a posted request,
    for which nobody waits, from whoever meets it.
    """

    __slots__ = ("codec", "count", "deadline", "early", "echo", "nonce", "peer", "taker")

    def __init__(
        self,
        nonce: int,
        peer: Peer,
        codec: Codec,
        deadline: Nanos,
        echo: bytes,
        count: int,
        taker: "Taker | None" = None,
    ) -> None:
        self.nonce = nonce
        self.peer = peer
        self.codec = codec
        self.deadline = deadline
        self.echo = echo
        self.count = count
        self.taker = taker
        self.early: CallFailure | Refused | None = None


Taker: TypeAlias = Callable[[Pending, object], None]
"""Told once how a posted request ended: its reply, Refused, or a CallFailure."""


class Verdict(Enum):
    """What a received message is."""

    MATCH = "match"  # the answer to a call in flight
    STALE_PEER = "stale peer"  # from the right service, another instance of it
    STALE = "stale"
    DUPLICATE = "duplicate"
    FOREIGN = "foreign"
    UNREADABLE = "unreadable"  # not a reply frame at all


class Correlator:
    """The calls of one task in flight, to all services, and the account of what came instead."""

    def __init__(self, start: int = NONCE_START) -> None:
        self.in_flight: dict[int, Pending] = {}
        self.peers: dict[LinkId, Peer] = {}
        self.nonces = NonceGen(start, self.in_flight)
        self.buffer = ReplyBuffer(BUFFER_COUNT_MAX, BUFFER_SIZE_MAX)
        self.recent: list[Peer | None] = [None] * RECENT_COUNT
        self.stale = 0
        self.duplicate = 0
        self.foreign = 0
        self.malformed = 0
        self._abandoned: dict[int, None] = {}

    def on_bound(self, peer: Peer) -> None:
        """Replies of `peer` arrive on its link from now on."""
        self.peers[peer.link] = peer

    def on_sent(self, pending: Pending) -> None:
        """The call is in flight."""
        assert pending.nonce not in self.in_flight
        self.in_flight[pending.nonce] = pending
        self.recent[pending.nonce & (RECENT_COUNT - 1)] = pending.peer

    def on_ended(self, pending: Pending) -> None:
        """The call has its answer, or is over without one."""
        _ = self.in_flight.pop(pending.nonce, None)

    def on_abandoned(self, nonce: int) -> None:
        """Nobody waits for this answer any more; a late one is stale, not a duplicate."""
        self._abandoned[nonce] = None
        if len(self._abandoned) > RECENT_COUNT:
            del self._abandoned[next(iter(self._abandoned))]

    def on_failed(self, pending: Pending, failure: CallFailure) -> None:
        """The call is over without an answer; the first reason stands."""
        self.on_abandoned(pending.nonce)
        if pending.early is None:
            pending.early = failure
            if pending.taker is not None:
                self.on_ended(pending)
                pending.taker(pending, failure)

    def on_gone(self, link: LinkId) -> None:
        """The peer of a reply link is gone: whoever waits for it, or asks it next, learns that."""
        peer = self.peers.pop(link, None)
        if peer is not None:
            peer.alive = False
        for pending in list(self.in_flight.values()):
            if pending.peer.link == link and pending.nonce not in self.buffer:
                self.on_failed(pending, Unknown())

    def judge(self, message: Message) -> Verdict:
        """What `message` is; everything but a match is counted here."""
        data = message.data
        if len(data) < HEADER_SIZE or data[0] != FRAME_KIND or not data[OP_INDEX] & REPLY_BIT:
            self.malformed += 1
            return Verdict.UNREADABLE
        nonce = nonce_of(data)
        pending = self.in_flight.get(nonce)
        if pending is None:
            return self._judge_unasked(nonce, message)
        if self.is_foreign(pending.peer, message):
            self.foreign += 1
            return Verdict.FOREIGN
        if nonce in self.buffer:
            self.duplicate += 1
            return Verdict.DUPLICATE
        if self.is_other_instance(pending.peer, message):
            pending.peer.alive = False
            self.on_failed(pending, Stale())
            return Verdict.STALE_PEER
        return Verdict.MATCH

    def is_foreign(self, peer: Peer, message: Message) -> bool:
        """Whether the kernel says that somebody else than the one asked has sent this."""
        return message.link != peer.link or message.sender.service != peer.service

    def is_other_instance(self, peer: Peer, message: Message) -> bool:
        """Whether another start of the service has sent this than the one the link led to."""
        if peer.generation == GENERATION_ANY:
            peer.generation = message.sender.generation
        return message.sender.generation != peer.generation

    def _judge_unasked(self, nonce: int, message: Message) -> Verdict:
        peer = None
        if 1 <= self.nonces.age(nonce) <= RECENT_COUNT:
            peer = self.recent[nonce & (RECENT_COUNT - 1)]
        if peer is None or nonce in self._abandoned:
            _ = self._abandoned.pop(nonce, None)
            self.stale += 1
            return Verdict.STALE
        if self.is_foreign(peer, message):
            self.foreign += 1
            return Verdict.FOREIGN
        self.duplicate += 1
        return Verdict.DUPLICATE
