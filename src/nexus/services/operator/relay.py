"""Raw frames passed on to services and their answers brought back, several at a time.

    reach --link--> send --answer----------------> Answered
                         --the service is gone----> CUT_OFF
                         --deadline---------------> TIMED_OUT

Nothing waits for a service's answer: `on_message`, `on_gone` and `on_time` bring it. Only finding
a link waits, REACH_MAX at most, and after a failure not again for REACH_PAUSE.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

from nexus.abi import (
    INIT_NAME,
    NO_WAIT,
    AbiError,
    LinkId,
    Message,
    Nanos,
    Send,
    Slot,
    Status,
)
from nexus.ipc import Exchange, Peer, Peers, Pending, RetryBudget, RetryTokens, Verdict
from nexus.ipc.exchange import close_if_any
from nexus.protocols.meta import PROTOCOL as META
from nexus.protocols.operator import OperatorStatus
from nexus.wire import (
    HEADER_SIZE,
    PREFIX_SIZE,
    REPLY_BIT,
    STATUS_OFFSET,
    Codec,
    ReplyStatus,
    nonce_of,
)

REACH_MAX: Final = Nanos(150_000_000)  # ns; eight clients at once stay below a health deadline
REACH_PAUSE: Final = Nanos(500_000_000)  # ns; a service that hangs costs one REACH_MAX per pause
LOOK_PAUSE: Final = Nanos(500_000_000)  # ns between looks for a service that nobody asks for
LOOK_GAP: Final = Nanos(1_000_000)  # ns between two such looks; what came meanwhile goes first
AT_ONCE: Final = Nanos(1)  # ns; long past
ONE_TRY: Final = 1  # route requests per search; the command outside asks again

Refusal = OperatorStatus | ReplyStatus


class Spanned(NamedTuple):
    """The span of a command: what it sets off belongs to `trail`; `unit` of the page, or -1."""

    trail: bytes
    unit: int = -1


@dataclass(eq=False, slots=True)
class Passing:
    """A frame on its way: whose it is, what it was, and the call it became.

    `outer` is the client's frame, whose header its answer echoes; `codec` is of the request in it.
    """

    client: LinkId
    outer: bytes
    codec: Codec
    inner: bytes
    pending: Pending
    span: Spanned


@dataclass(frozen=True, slots=True)
class Ended:
    """How a passing ended: the raw answer, or why there is none. `cap` came with what was received
    and is to be closed."""

    passing: Passing
    answer: bytes | None
    status: Refusal
    cap: Slot | None = None


class Known:
    """What is known of one service: the link to it, or when to look for one again."""

    __slots__ = ("again", "look", "peer", "tokens")

    def __init__(self) -> None:
        self.peer: Peer | None = None
        self.tokens = RetryTokens()
        self.again = Nanos(0)  # after a search that failed: not before
        self.look = Nanos(0)  # without being asked


class Relay:
    """Every frame that operator has passed on and that is not answered yet."""

    def __init__(self, peers: Peers, uses: list[str]) -> None:
        self._peers = peers
        self._known = {name: Known() for name in [INIT_NAME, *uses]}
        self._passing: dict[int, Passing] = {}  # by the nonce it has on the way

    def __len__(self) -> int:
        return len(self._passing)

    def is_used(self, service: str) -> bool:
        """Whether there may be a link to the service at all."""
        return service in self._known

    def next_time(self) -> Nanos | None:
        """The earliest deadline of what is on its way, or when to look for a link that lacks; a
        time that is past when something has ended while the task awaited something else."""
        buffer = self._peers.caller.correlator.buffer
        times = [passing.pending.deadline for passing in self._passing.values()]
        if any(nonce in buffer or each.pending.early for nonce, each in self._passing.items()):
            times.append(AT_ONCE)
        times += [known.look for known in self._known.values() if known.peer is None]
        return min(times, default=None)

    async def look(self, now: Nanos) -> None:
        """Find one of the links that lack, so that a command need not wait for it."""
        due = [
            (name, known)
            for name, known in self._known.items()
            if known.peer is None and known.look <= now
        ]
        for index, (name, known) in enumerate(due):
            known.look = Nanos(now + (LOOK_GAP if index else LOOK_PAUSE))
            if index == 0:
                _ = await self.reach(name, now)

    async def reach(self, service: str, now: Nanos) -> Peer | Refusal:
        """A link to the service, found now if there is none yet."""
        known = self._known[service]
        if known.peer is not None and known.peer.alive:
            return known.peer
        if now < known.again:
            return OperatorStatus.UNREACHABLE
        if known.peer is not None:
            await self._peers.discard(known.peer)
            known.peer = None
        known.peer = await self._found(service, known, Nanos(now + REACH_MAX))
        if known.peer is None:
            known.again = Nanos(now + REACH_PAUSE)
            return OperatorStatus.UNREACHABLE
        return known.peer

    async def _found(self, service: str, known: Known, deadline: Nanos) -> Peer | None:
        if service == INIT_NAME:
            control = await self._peers.control(deadline)
            return control.peer if isinstance(control, Exchange) else None
        budget = RetryBudget(attempts_max=ONE_TRY, backoff=REACH_PAUSE, deadline=deadline)
        found = await self._peers.find(service, META, budget, known.tokens)
        return found if isinstance(found, Peer) else None

    async def send(
        self,
        peer: Peer,
        inner: bytes,
        deadline: Nanos,
        *,
        client: LinkId,
        outer: bytes,
        codec: Codec,
        span: Spanned,
        move: Slot | None = None,
    ) -> Refusal | None:
        """Pass `inner` on under a nonce of our own, inside `span`; why that could not be, or None.

        `move` and `span` are still the caller's if it could not.
        """
        correlator = self._peers.caller.correlator
        nonce = correlator.nonces.take()
        echo = nonce.to_bytes(8, "little") + deadline.to_bytes(8, "little") + span.trail
        pending = Pending(nonce, peer, codec, deadline, echo, 0)
        correlator.on_sent(pending)
        try:
            await Send(
                peer.slot,
                inner[:PREFIX_SIZE] + echo + inner[HEADER_SIZE:],
                move=move,
                deadline=NO_WAIT,
            )
        except AbiError as error:
            correlator.on_ended(pending)
            match error.status:
                case Status.NO_SUCH_ENDPOINT:
                    peer.alive = False
                    return OperatorStatus.UNREACHABLE
                case Status.QUEUE_FULL | Status.NO_SPACE:
                    return ReplyStatus.BUSY
                case _:
                    raise
        self._passing[nonce] = Passing(client, outer, codec, inner, pending, span)
        return None

    async def on_message(self, message: Message) -> Iterator[Ended]:
        """A message in the inbox: an answer that is awaited here, or somewhere else in the task."""
        correlator = self._peers.caller.correlator
        if correlator.judge(message) is not Verdict.MATCH:
            await close_if_any(message.cap)
            return self.swept()
        passing = self._passing.pop(nonce_of(message.data), None)
        if passing is None:
            await self._peers.caller.keep(message)
            return self.swept()
        correlator.on_ended(passing.pending)
        return iter((self.read(passing, message),))

    async def arrived(self) -> list[Ended]:
        """What has been answered by now, taken without waiting: the last thing that is done."""
        caller = self._peers.caller
        ended: list[Ended] = []
        for peer in self._known_peers():
            await Exchange(caller, META, peer).take(peer.reply_terms.depth)
            ended += self.swept()  # one link's answers have room to be kept
        return ended

    def _known_peers(self) -> list[Peer]:
        """Those whose reply links are not at their end, however their own links are."""
        open_links = self._peers.caller.correlator.peers
        peers = (known.peer for known in self._known.values())
        return [each for each in peers if each is not None and open_links.get(each.link) is each]

    def on_gone(self, link: LinkId) -> Iterator[Ended]:
        """A reply link has ended: what was asked over it has no answer any more."""
        self._peers.caller.correlator.on_gone(link)
        return self.swept()

    def on_time(self, now: Nanos) -> Iterator[Ended]:
        """What is past its deadline ends; a late answer is stale then."""
        for passing in list(self._passing.values()):
            if passing.pending.deadline <= now:
                yield Ended(passing, None, OperatorStatus.TIMED_OUT, self.forget(passing))

    def forget_client(self, client: LinkId) -> list[Ended]:
        """Nobody waits for this client's answer any more; what was on its way for it."""
        found = [each for each in self._passing.values() if each.client == client]
        return [Ended(each, None, OperatorStatus.CUT_OFF, self.forget(each)) for each in found]

    def forget(self, passing: Passing) -> Slot | None:
        """Nobody waits for this answer any more; the capability of one that is here already."""
        correlator = self._peers.caller.correlator
        kept = correlator.buffer.take(passing.pending.nonce)
        correlator.on_abandoned(passing.pending.nonce)
        correlator.on_ended(passing.pending)
        del self._passing[passing.pending.nonce]
        return None if kept is None else kept.cap

    def swept(self) -> Iterator[Ended]:
        """What ended while another answer was awaited, in finding a link."""
        correlator = self._peers.caller.correlator
        for passing in list(self._passing.values()):
            kept = correlator.buffer.take(passing.pending.nonce)
            if kept is None and passing.pending.early is None:
                continue
            del self._passing[passing.pending.nonce]
            correlator.on_ended(passing.pending)
            if kept is None:
                yield Ended(passing, None, OperatorStatus.CUT_OFF)
            else:
                yield self.read(passing, kept)

    def read(self, passing: Passing, message: Message) -> Ended:
        """The answer, if it is one to what was asked; with the nonce the client gave."""
        inner, data = passing.inner, message.data
        expected = bytearray(inner[:STATUS_OFFSET])
        expected[2] |= REPLY_BIT
        if (
            data[:STATUS_OFFSET] != expected
            or data[PREFIX_SIZE:HEADER_SIZE] != passing.pending.echo
        ):
            return Ended(passing, None, OperatorStatus.BAD_ANSWER, message.cap)
        answer = data[:PREFIX_SIZE] + inner[PREFIX_SIZE:HEADER_SIZE] + data[HEADER_SIZE:]
        return Ended(passing, answer, ReplyStatus.OK, message.cap)
