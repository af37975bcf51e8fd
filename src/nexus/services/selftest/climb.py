"""What the rungs share: the services under test, init's tables, raw sessions, the clock."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeVar

from nexus.abi import (
    SLOTS_MAX,
    AbiError,
    BootImage,
    CapClose,
    CapQuery,
    EndpointClose,
    EndpointCreate,
    LinkCreate,
    LinkId,
    LinkTerms,
    Nanos,
    Now,
    PeerGone,
    Recv,
    Sender,
    SleepUntil,
    Slot,
    Status,
)
from nexus.ipc import (
    Answer,
    CallFailure,
    Client,
    Context,
    Exchange,
    Peers,
    Refused,
    RetryBudget,
    RetryTokens,
    Started,
    retry_until,
)
from nexus.metrics import Metrics
from nexus.protocols.execd import Ended
from nexus.protocols.execd import Started as Child
from nexus.protocols.init import (
    AuditRows,
    GetAudit,
    GetLinks,
    GetRouteCounts,
    GetService,
    GetTasks,
    LinkRow,
    LinkRows,
    Restart,
    Restarting,
    RouteCounts,
    ServiceRecord,
    TaskRow,
    TaskRows,
    TaskState,
)
from nexus.protocols.logd import TRACE_SIZE
from nexus.protocols.meta import GetStatus, ServiceStatus
from nexus.protocols.testsvc import RawSession, SessionDone, SessionStep, Step
from nexus.runtime import ServiceConfig
from nexus.services.selftest.own_memory import OwnRing
from nexus.services.selftest.rung import RungFailed, expect, status_of_trap
from nexus.wire import Request

if TYPE_CHECKING:
    from nexus.services.selftest.stick import Stick

CALL_WAIT: Final = Nanos(2_000_000_000)  # ns; a local call takes microseconds
RESTART_WAIT: Final = Nanos(10_000_000_000)  # ns; back-off, fork, bind, and room for a slow host
RESTART_POLLS_MAX: Final = 10  # with doubling pauses: 5 ms to 2.5 s
RESTART_PAUSE: Final = Nanos(5_000_000)  # ns
SESSION_WAIT_MS: Final = 4_000
GONE_WAIT: Final = Nanos(1_000_000_000)  # ns; for the end of a link whose holder has closed it

ReplyT = TypeVar("ReplyT")


@dataclass(frozen=True, slots=True)
class Session:
    """A raw session with demo.testsvc: `slot` leads to its endpoint, answers come to `endpoint`
    over `link`; `started` is the call that ends with the script."""

    slot: Slot
    endpoint: Slot
    link: LinkId
    sender: Sender
    started: Started[SessionDone]


class Climb:
    """The services the client uses, and the questions it asks of init."""

    def __init__(
        self, boot: BootImage, config: ServiceConfig, peers: Peers, control: Exchange
    ) -> None:
        self.boot = boot
        self.config = config
        self.peers = peers
        self.control = control
        self.clients: dict[str, Client] = {}
        self.own_ring: OwnRing | None = None
        self.metrics = Metrics(peers, config.uses)
        self.services: frozenset[str] = frozenset()  # of the system, on demand or not
        self.children: dict[str, Child] = {}  # started by execd for this client, the latest by name
        self.ends: dict[str, Ended] = {}  # how those ended that were waited for
        self.stick: Stick | None = None  # the updates that the runner gave, once it is opened
        self.refused_unproven = ""  # with what staging was refused while a new set was on trial
        self.held_at_ready: dict[str, int] = {}
        self.lacking: list[
            str
        ] = []  # links of others that were awaited in vain, as "client-server"
        self.planned: list[int] = []
        self.passed: list[int] = []
        self.failed: list[int] = []

    def client(self, name: str) -> Client:
        """The client of a service of this system."""
        return self.clients[name]

    @property
    def ring(self) -> OwnRing:
        """The log ring of this task, in a system with logd."""
        assert self.own_ring is not None, "made when logd was found"
        return self.own_ring

    @property
    def timed(self) -> Client:
        """timed, which every system under test has."""
        return self.clients["timed"]

    @property
    def testsvc(self) -> Client:
        """The peer that misbehaves on command."""
        return self.clients["demo.testsvc"]

    def new_context(self) -> Context:
        """A trace that begins here, and its first span."""
        trail = self.peers.caller.spans.next_trail()
        return Context(trail[:TRACE_SIZE], trail[TRACE_SIZE:])

    async def ahead(self, span: Nanos) -> Nanos:
        """The absolute time `span` from now."""
        return Nanos(await Now() + span)

    async def pause(self, span: Nanos) -> Nanos:
        """Do nothing for so long."""
        return await SleepUntil(await self.ahead(span))

    async def call(
        self, exchange: Exchange, request: Request[ReplyT], wait: Nanos = CALL_WAIT
    ) -> ReplyT:
        """Call and take the reply; anything else fails the rung."""
        outcome = await exchange.call(request, await self.ahead(wait))
        if isinstance(outcome, Refused | CallFailure):
            raise RungFailed(f"{type(request).__name__} ended with {outcome!r}")
        return outcome

    async def finish(self, exchange: Exchange, started: Started[ReplyT]) -> ReplyT:
        """The reply of a started call; anything else fails the rung."""
        outcome = await exchange.finish(started)
        if isinstance(outcome, Refused | CallFailure):
            raise RungFailed(f"a started call ended with {outcome!r}")
        return outcome

    async def status(self, client: Client) -> ServiceStatus:
        """The counters of a service."""
        return await self.call(client, GetStatus())

    # ------------------------------------------------------------------ init's tables

    async def tasks(self) -> TaskRows:
        """init's task list, which is the kernel's with init's states."""
        return await self.call(self.control, GetTasks())

    async def task(self, name: str) -> TaskRow:
        """The row of one service."""
        rows = [row for row in (await self.tasks()).rows if row.name == name]
        expect(len(rows), 1, f"rows of {name} in the task list")
        return rows[0]

    async def links_page(self, first: int = 0) -> LinkRows:
        """The link table from row `first` on, and how many links and grants there are."""
        return await self.call(self.control, GetLinks(first))

    async def links(self) -> list[LinkRow]:
        """The whole link table."""
        rows: list[LinkRow] = []
        page = await self.links_page()
        rows += page.rows
        for _ in range(page.total):
            if len(rows) >= page.total:
                break
            rows += (await self.links_page(len(rows))).rows
        return rows

    async def route_counts(self) -> RouteCounts:
        """How init answered this client's Route requests so far."""
        return await self.call(self.control, GetRouteCounts(self.boot.name))

    async def record(self, name: str) -> ServiceRecord:
        """init's record of a service."""
        return await self.call(self.control, GetService(name))

    async def restart(self, name: str) -> Restarting:
        """Have init kill a service."""
        return await self.call(self.control, Restart(name))

    async def up_again(self, name: str, generation: int) -> ServiceRecord:
        """init's record once the instance `generation` of a service is up."""
        deadline = await self.ahead(RESTART_WAIT)
        budget = RetryBudget(
            attempts_max=RESTART_POLLS_MAX, backoff=RESTART_PAUSE, deadline=deadline
        )
        record = await retry_until(
            lambda: self.record(name),
            lambda seen: seen.generation != generation or seen.state is not TaskState.UP,
            budget,
            RetryTokens(),
        )
        expect(record.generation, generation, f"generation of {name} after its restart")
        expect(record.state, TaskState.UP, f"state of {name} after its restart")
        return record

    # ------------------------------------------------------------------ the kernel's audit

    async def qos_audit(self) -> list[str]:
        """The kernel's QoS audit lines about this task."""
        mine = f"caller_pid={self.boot.pid} "
        lines: list[str] = []
        page = await self.call(self.control, GetAudit(0))
        while page.lines:
            lines += [line for line in page.lines if mine in f"{line} "]
            page = await self._audit_after(page)
        return lines

    async def _audit_after(self, page: AuditRows) -> AuditRows:
        return await self.call(self.control, GetAudit(page.first + len(page.lines)))

    async def qos_held_by_kernel(self) -> int:
        """The class of this task in the kernel's list."""
        return int((await self.task(self.boot.name)).qos)

    # ------------------------------------------------------------------ a failed rung

    async def used_slots(self) -> set[Slot]:
        """The slots of this task that hold something."""
        slots = map(Slot, range(SLOTS_MAX))
        empty = Status.INVALID_ARGUMENT
        return {slot for slot in slots if await status_of_trap(CapQuery(slot)) is not empty}

    async def let_go(self, before: set[Slot]) -> None:
        """Close what a failed rung made, so that its failure is not charged to the others."""
        inbox = await self.peers.inbox()
        kept = before | {inbox} | {client.peer.slot for client in self.clients.values()}
        for slot in sorted(await self.used_slots() - kept):
            await CapClose(slot)

    # ------------------------------------------------------------------ raw sessions

    async def start_session(
        self, endpoint: Slot, script: list[SessionStep], *, depth: int = 8
    ) -> Session:
        """Have demo.testsvc play `script` against `endpoint`."""
        way = await LinkCreate(endpoint, LinkTerms(depth=depth))
        assert way.link is not None, "the endpoint is ours"
        deadline = await self.ahead(Nanos(SESSION_WAIT_MS * 1_000_000))
        started = await self.testsvc.start(
            RawSession(depth, SESSION_WAIT_MS, script), deadline, move=way.slot
        )
        try:
            hello = await Recv((endpoint,), deadline, link=way.link)
        except AbiError as error:
            raise RungFailed(f"no raw session: {error}") from error
        if hello.cap is None:
            raise RungFailed("the session's first message carries no link")
        return Session(hello.cap, endpoint, way.link, hello.sender, started)

    async def echo_session(self, count: int) -> Session:
        """A session that returns `count` messages unchanged, to an endpoint of its own."""
        script = [SessionStep(step, b"") for step in (Step.RECEIVE, Step.ECHO)] * count
        return await self.start_session(await EndpointCreate(), script)

    async def end_session(self, session: Session, *, keep_endpoint: bool = False) -> SessionDone:
        """The session's end: its script was played; both ends are let go."""
        done = await self.finish(self.testsvc, session.started)
        await CapClose(session.slot)
        if keep_endpoint:
            await self.see_gone(session.endpoint, session.link)
        else:
            await EndpointClose(session.endpoint)
        return done

    async def see_gone(self, endpoint: Slot, link: LinkId) -> None:
        """Receive the end of a link, so that its share is given back."""
        try:
            message = await Recv((endpoint,), await self.ahead(GONE_WAIT), link=link)
        except PeerGone as gone:
            expect(gone.link, link, "the link that ended")
            return
        except AbiError as error:
            if error.status is Status.NO_SUCH_ENDPOINT:
                return  # the library met the end while it waited for an answer
            raise RungFailed(f"link {link} did not end: {error}") from error
        raise RungFailed(f"a message of {len(message.data)} bytes instead of the end of a link")

    async def moved(self, exchange: Exchange, request: Request[ReplyT], slot: Slot) -> ReplyT:
        """Call with a capability that moves with the request."""
        outcome = await exchange.ask(request, await self.ahead(CALL_WAIT), move=slot)
        if not isinstance(outcome, Answer):
            raise RungFailed(f"{type(request).__name__} ended with {outcome!r}")
        return outcome.reply
