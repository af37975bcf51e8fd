"""The services a task calls: routes and reply links, made once, kept, and found again.

    no route --route, bind--> bound --the instance is gone--> stale --next call--> no route
             --no answer to Bind in time--> late --next search--> bound, late, or no route
                                            late --for LATE_MAX, or forgotten--> no route

One inbox endpoint takes the replies of all services. Each service gets one SEND link into it,
moved to it by Bind when the link to it is new.
"""

from dataclasses import dataclass
from typing import Final

from nexus.abi import (
    CONTROL_LINK_SIZE,
    INIT_NAME,
    NEVER,
    NO_WAIT,
    AbiError,
    BootImage,
    CapClose,
    EndpointCreate,
    LinkCreate,
    LinkTerms,
    Nanos,
    Now,
    PeerGone,
    Recv,
    ServiceId,
    Slot,
    Status,
    service_id,
)
from nexus.ipc.context import Spans
from nexus.ipc.correlate import GENERATION_ANY, Peer, Pending, Verdict
from nexus.ipc.exchange import CALL_MISMATCHES, Caller, Exchange, close_if_any
from nexus.ipc.outcome import (
    CallFailure,
    Closed,
    MismatchBudgetExceeded,
    Refused,
    Routed,
    RouteFailure,
    RouteRetryOutcome,
    TimedOut,
)
from nexus.ipc.retry import RetryBudget, RetryTokens
from nexus.ipc.route import ROUTE_MISMATCHES, route_with_nonce_budgeted
from nexus.protocols.init import PROTOCOL as INIT
from nexus.protocols.init import REPLY_NAME
from nexus.protocols.meta import Bind, Bound
from nexus.wire import Protocol

CONTROL_TERMS: Final = LinkTerms(8, CONTROL_LINK_SIZE, 0)  # of links to and from init
REBIND_ATTEMPTS_MAX: Final = 8  # with doubling pauses: 5 ms to 0.64 s, about a restart's back-off
BIND_ATTEMPTS_MAX: Final = 3  # routes that die before they are bound; a late one counts as a try
LATE_MAX: Final = Nanos(30_000_000_000)  # ns; longer than any planned start, or a full queue, lasts
END_WAIT: Final = Nanos(20_000_000)  # ns; a live server closes its end of a closed link at once
REBIND_BACKOFF: Final = Nanos(5_000_000)


class Client(Exchange):
    """A service known by name: when its instance is gone, the next call finds the new one."""

    def __init__(self, peers: "Peers", protocol: Protocol, peer: Peer, tokens: RetryTokens) -> None:
        super().__init__(peers.caller, protocol, peer)
        self._peers = peers
        self.name = peer.name
        self.tokens = tokens
        self.rebinds = 0

    async def renew(self, deadline: Nanos) -> CallFailure | None:
        """If the instance is gone, look for the new one now; for who posts and never calls.

        What the old one had answered is taken first; what it had not has ended as Unknown.
        """
        peer = self.peer
        if peer.alive:
            return None
        await self.take(peer.reply_terms.depth)
        self._correlator.on_gone(peer.link)
        return await self._revive(deadline)

    async def _revive(self, _deadline: Nanos) -> CallFailure | None:
        """One bounded search for the service's new instance."""
        await self._peers.discard(self.peer)
        budget = RetryBudget(
            attempts_max=REBIND_ATTEMPTS_MAX, backoff=REBIND_BACKOFF, deadline=_deadline
        )
        found = await self._peers.find(self.name, self.protocol, budget, self.tokens)
        if isinstance(found, Peer):
            self.use(found)
            self.rebinds += 1
            return None
        return found if isinstance(found, CallFailure) else Closed()


@dataclass(frozen=True, kw_only=True, slots=True)
class Way:
    """A held link to a service, which is to be made answerable, and what both directions take."""

    slot: Slot
    protocol: Protocol
    name: str
    service: ServiceId
    generation: int
    terms: LinkTerms
    reply_terms: LinkTerms


@dataclass(slots=True)
class Binding:
    """A Bind that was sent; `ended` has its outcome, one at most, when there is one."""

    exchange: Exchange
    posted: Pending
    ended: list[object]
    late_since: Nanos | None = None  # the deadline that it missed first


class Peers:
    """Makes and keeps the links of one task to the services it uses."""

    def __init__(self, boot: BootImage, trace_seed: bytes) -> None:
        self.boot = boot
        self.caller = Caller(Spans(trace_seed, boot.name, boot.generation))
        self._inbox: Slot | None = None
        self._control: Exchange | None = None
        self._late: dict[str, Binding] = {}  # by service, one each

    async def inbox(self) -> Slot:
        """The endpoint that takes all replies; made when first needed."""
        if self._inbox is None:
            self._inbox = await EndpointCreate()
        return self._inbox

    async def control(self, deadline: Nanos) -> Exchange | CallFailure:
        """The link to init, bound when first needed."""
        if self._control is None:
            assert self.boot.control is not None, "init asks itself for no route"
            way = Way(
                slot=self.boot.control,
                protocol=INIT,
                name=INIT_NAME,
                service=service_id(INIT_NAME),
                generation=GENERATION_ANY,
                terms=CONTROL_TERMS,
                reply_terms=CONTROL_TERMS,
            )
            bound = await self.bind(way, deadline)
            if not isinstance(bound, Exchange):
                return bound
            self._control = bound
        return self._control

    async def connect(
        self, name: str, protocol: Protocol, budget: RetryBudget
    ) -> Client | RouteFailure:
        """A client of the service `name`: route, bind, and from then on calls."""
        tokens = RetryTokens()
        found = await self.find(name, protocol, budget, tokens)
        return Client(self, protocol, found, tokens) if isinstance(found, Peer) else found

    async def find(
        self, name: str, protocol: Protocol, budget: RetryBudget, tokens: RetryTokens
    ) -> Peer | RouteFailure:
        """A new link to the service `name`, bound to a new link into the inbox."""
        control = await self.control(budget.deadline)
        if not isinstance(control, Exchange):
            return control if isinstance(control, TimedOut) else Closed()
        for _ in range(BIND_ATTEMPTS_MAX):
            binding: Binding | CallFailure | None = self._late.pop(name, None)
            if binding is None:
                routed = await route_with_nonce_budgeted(
                    control, name, budget, ROUTE_MISMATCHES, tokens
                )
                if not isinstance(routed, Routed):
                    return routed
                binding = await self._begin_routed(name, protocol, routed)
            bound = await self._settled(name, binding, budget.deadline)
            if isinstance(bound, Exchange):
                return bound.peer
            if isinstance(bound, TimedOut):
                return bound
        return Closed()

    async def _begin_routed(
        self, name: str, protocol: Protocol, routed: Routed
    ) -> Binding | CallFailure:
        """Send Bind over a fresh route; if that fails the route is closed."""
        assert routed.slot is not None, "@reply is no service to connect to"
        way = Way(
            slot=routed.slot,
            protocol=protocol,
            name=name,
            service=routed.service,
            generation=routed.generation,
            terms=routed.terms,
            reply_terms=routed.reply_terms,
        )
        binding = await self._begin(way)
        if not isinstance(binding, Binding):
            await CapClose(routed.slot)
        return binding

    async def _settled(
        self, name: str, binding: Binding | CallFailure, deadline: Nanos
    ) -> Exchange | CallFailure:
        """The bound link, its route closed if it cannot be bound; a late one is kept.

        init counts a route as taken from its answer on. One that was let go of because the server
        was late would be missing from this task's share for as long as that server lives. After
        LATE_MAX that is paid: whatever became of this Bind, the server is asked anew.
        """
        if not isinstance(binding, Binding):
            return binding
        self._late[name] = binding
        bound = await self._bound(binding, deadline)
        if isinstance(bound, TimedOut):
            if binding.late_since is None:
                binding.late_since = deadline
            if deadline >= binding.late_since + LATE_MAX:
                await self.forget(name)
            return bound
        del self._late[name]
        if not isinstance(bound, Exchange):
            await CapClose(binding.exchange.peer.slot)
        return bound

    async def forget(self, name: str) -> None:
        """Let go of a late binding of the service, whose answer is nobody's from now on."""
        binding = self._late.pop(name, None)
        if binding is None:
            return
        if not binding.ended:
            binding.exchange.give_up(binding.posted, TimedOut())
        await self.discard(binding.exchange.peer)

    async def bind(self, way: Way, deadline: Nanos) -> Exchange | CallFailure:
        """Make a held link answerable: move a link into the inbox to its other end.

        Its slot stays the caller's, also when this fails. With GENERATION_ANY the instance that
        answers first is taken for the one meant.
        """
        binding = await self._begin(way)
        if not isinstance(binding, Binding):
            return binding
        bound = await self._bound(binding, deadline)
        if isinstance(bound, TimedOut):
            binding.exchange.give_up(binding.posted, bound)
            await self._drain(binding.exchange.peer, NO_WAIT)
        return bound

    async def _begin(self, way: Way) -> Binding | CallFailure:
        """Send Bind with a new link into the inbox; its answer is good whenever it comes."""
        inbox = await self.inbox()
        try:
            link = await LinkCreate(inbox, way.reply_terms)
        except AbiError as error:
            if error.status is Status.NO_SPACE:
                return Closed()
            raise
        assert link.link is not None, "the inbox is ours"
        peer = Peer(
            way.name,
            slot=way.slot,
            inbox=inbox,
            link=link.link,
            service=way.service,
            generation=way.generation,
            terms=way.terms,
            reply_terms=way.reply_terms,
        )
        exchange = Exchange(self.caller, way.protocol, peer)
        ended: list[object] = []
        posted = await exchange.post(
            Bind(), NEVER, lambda _, outcome: ended.append(outcome), move=link.slot
        )
        if isinstance(posted, Pending):
            return Binding(exchange, posted, ended)
        await close_if_any(link.slot)
        await self._drain(peer, NO_WAIT)
        return Closed() if isinstance(posted, Refused) else posted

    async def _bound(self, binding: Binding, deadline: Nanos) -> Exchange | CallFailure:
        """The answer to Bind, waited for until `deadline`; what else comes meanwhile stays."""
        peer = binding.exchange.peer
        correlator = self.caller.correlator
        parent = self.caller.parent
        if parent is not None:
            deadline = self.caller.deadline_within(parent, deadline)
        recv = Recv((peer.inbox,), deadline, link=peer.link)
        met = 0
        while not binding.ended:
            try:
                message = await recv
            except PeerGone as gone:
                correlator.on_gone(gone.link)
            except AbiError as error:
                if error.status not in (Status.TIMED_OUT, Status.QUEUE_EMPTY):
                    raise
                return TimedOut()
            else:
                if correlator.judge(message) is Verdict.MATCH:
                    await self.caller.keep(message)
                else:
                    await close_if_any(message.cap)
                    met += 1
                    if CALL_MISMATCHES.exceeded_by(met):
                        correlator.on_failed(binding.posted, MismatchBudgetExceeded())
        (outcome,) = binding.ended
        if isinstance(outcome, Bound) and peer.alive:
            return binding.exchange
        await self._drain(peer, NO_WAIT)
        return outcome if isinstance(outcome, CallFailure) else Closed()

    async def reply_route(self, budget: RetryBudget, tokens: RetryTokens) -> RouteRetryOutcome:
        """What init says about `@reply`: this task's own inbox, or why not."""
        control = await self.control(budget.deadline)
        if not isinstance(control, Exchange):
            return control if isinstance(control, TimedOut) else Closed()
        return await route_with_nonce_budgeted(
            control, REPLY_NAME, budget, ROUTE_MISMATCHES, tokens
        )

    async def discard(self, peer: Peer) -> None:
        """Let go of a link: close its slot, give its share of the inbox back. Once is enough."""
        if not peer.held:
            return
        peer.held = False
        until = Nanos(await Now() + END_WAIT) if peer.alive else NO_WAIT
        peer.alive = False
        await CapClose(peer.slot)
        await self._drain(peer, until)

    async def _drain(self, peer: Peer, until: Nanos) -> None:
        """Take what is still queued on a reply link, until its end is seen or `until` comes."""
        recv = Recv((peer.inbox,), until, link=peer.link)
        for _ in range(peer.reply_terms.depth + 1):
            try:
                message = await recv
            except PeerGone as gone:
                self.caller.correlator.on_gone(gone.link)
                return
            except AbiError:
                return
            _ = self.caller.correlator.judge(message)
            await close_if_any(message.cap)
