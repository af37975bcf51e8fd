"""demo.testsvc: the slow, hostile or dying peer of the proof ladder, on command.

Owns nothing that must survive. Trusts its caller to be the ladder's client; has no right beyond
its own links, which is the point: whatever it manages to do, any service could do. What it never
does is decide whether an attack worked: it reports, and the client compares with other evidence.
"""

from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import Any, Final, TypeAlias, TypeVar, assert_never

from nexus.abi import (
    AbiError,
    BootImage,
    CapClose,
    ConsoleWrite,
    EndpointClose,
    EndpointCreate,
    Exit,
    LinkCreate,
    LinkTerms,
    Nanos,
    Now,
    Pid,
    Recv,
    Send,
    SleepUntil,
    Slot,
    Status,
    service_id,
)
from nexus.ipc import (
    GENERATION_ANY,
    CallFailure,
    Client,
    Exchange,
    Peers,
    Refused,
    RetryBudget,
    Way,
    call_until,
)
from nexus.log import LOGD_NAME, Logger
from nexus.protocols.execd import PROTOCOL as EXECD
from nexus.protocols.execd import GetPrograms
from nexus.protocols.init import GetPolicy, GetTasks, LeaveSafeMode, Restart, Shutdown
from nexus.protocols.keystored import PROTOCOL as KEYSTORED
from nexus.protocols.keystored import Get as KeyGet
from nexus.protocols.logd import EVERY_RECORD, Query
from nexus.protocols.logd import PROTOCOL as LOGD
from nexus.protocols.metricsd import PROTOCOL as METRICSD
from nexus.protocols.metricsd import Add
from nexus.protocols.statefsd import PROTOCOL as STATEFSD
from nexus.protocols.statefsd import Durability
from nexus.protocols.statefsd import Put as StatePut
from nexus.protocols.testsvc import (
    HELD_COUNT_MAX,
    LAST_LINE,
    PROTOCOL,
    Answered,
    AskedInit,
    AskExecd,
    AskInit,
    Attack,
    AttackResult,
    Die,
    Echo,
    Echoed,
    FillLink,
    FloodReport,
    FloodTimed,
    Forge,
    ForgeReport,
    Hang,
    Hold,
    Hung,
    LastWords,
    LogdAnswer,
    Place,
    Placed,
    RawSession,
    ReadLog,
    Release,
    Released,
    SeenBy,
    SessionDone,
    SessionStep,
    Silent,
    Step,
    TestsvcRequest,
    TestsvcStatus,
    UseKeys,
    UseLink,
    UseMetrics,
    UseState,
)
from nexus.protocols.timed import PROTOCOL as TIMED
from nexus.protocols.timed import Seen, Whoami
from nexus.runtime import Call, Deferred, Server, ServiceConfig
from nexus.runtime.server import told_if_crashed
from nexus.wire import HEADER_SIZE, NONCE_OFFSET, ReplyStatus, Request, encode, status_of
from nexus.wire import Protocol as WireProtocol

CONNECT_BUDGET: Final = Nanos(10_000_000_000)  # ns; as long as a whole system may take to start
CONNECT_ATTEMPTS_MAX: Final = 64
CONNECT_BACKOFF: Final = Nanos(1_000_000)
FLOOD_SENDS_MAX: Final = 2_000_000  # tries of one flood; more than any kernel takes in 5 s
FLOOD_CLOCK_EVERY: Final = 32  # tries between two looks at the clock
FLOOD_ANSWERS_MAX: Final = 64  # more than both queues of the link hold
FLOOD_QUIET: Final = Nanos(10_000_000)  # ns without an answer: the flood is answered
FILL_SENDS_MAX: Final = 300  # more than the deepest link holds
USE_ATTEMPTS_MAX: Final = 3
PROTOCOLS: Final[Mapping[str, WireProtocol]] = {
    "timed": TIMED,
    "statefsd": STATEFSD,
    "keystored": KEYSTORED,
}
LAST_WORDS: Final = "last words"  # how the line begins; its token follows
SILENCE: Final = Nanos(60_000_000_000)  # ns behind them; whoever asked ends this task before
HELLO: Final = b"\x01session"  # the first message of a raw session; carries the link
COUNTED: Final = "testsvc.counted"  # the counter of UseMetrics
MILLISECOND: Final = 1_000_000  # ns

ReplyT = TypeVar("ReplyT")
RawAttack: TypeAlias = Callable[[Pid], Awaitable[AttackResult]]
ATTACKS: Mapping[str, RawAttack] = {}
"""Attacks by raw system calls. A proof run on a ground that has system calls puts them here."""


class Testsvc:
    """Serves nexus.protocols.testsvc. `uses` are the services its plan lets it ask for."""

    def __init__(self, peers: Peers, uses: Collection[str] = ("timed",), boot: int = 0) -> None:
        self._peers = peers
        self._boot = boot
        self._uses = uses
        self._held: dict[int, Deferred] = {}
        self.log: Logger | None = None  # where its plan gives it a way to logd
        self.server: Server
        self.clients: dict[str, Client] = {}

    @property
    def timed(self) -> Client | None:
        """The client of timed, once it was found."""
        return self.clients.get("timed")

    @timed.setter
    def timed(self, client: Client) -> None:
        self.clients["timed"] = client

    def ready(self) -> bool:
        """Whether every service that it uses was found."""
        return self.clients.keys() >= set(self._uses)

    def facts(self) -> dict[str, int]:
        """How many answers are held back."""
        return {"held": len(self._held)}

    async def handle(self, call: Call, request: TestsvcRequest) -> Any:
        match request:
            case Echo():
                return Echoed(request.data)
            case Hold():
                return self._hold(call, request)
            case Release():
                return self._release(call, request)
            case Place():
                return await self._place(call, request)
            case RawSession():
                return await self._raw_session(call, request)
            case UseLink():
                return await self._use_link(call, request)
            case FloodTimed():
                return await self._flood_timed(call, request)
            case FillLink():
                return await self._fill_link(call, request)
            case Die():
                await Exit(request.code)
                raise AssertionError("Exit does not return")
            case Forge():
                return await self._forge(call, request)
            case Attack():
                return await self._attack(call, request)
            case ReadLog():
                return await self._read_log(call)
            case Hang():
                _ = await SleepUntil(Nanos(call.now + request.for_ms * MILLISECOND))
                return Hung()
            case AskInit():
                return await self._ask_init(call, request)
            case UseState():
                put = StatePut(request.key, request.value, Durability.ACCEPTED, 0)
                return await self._use(call, "statefsd", put)
            case UseKeys():
                return await self._use(call, "keystored", KeyGet(request.name))
            case AskExecd():
                return await self._ask_execd(call)
            case LastWords():
                return await self._last_words(call, request)
            case UseMetrics():
                return await self._use_metrics(call)
            case _:
                assert_never(request)

    def _hold(self, call: Call, request: Hold) -> Deferred:
        if len(self._held) >= HELD_COUNT_MAX or request.token in self._held:
            raise call.refuse(TestsvcStatus.TOO_MANY_HELD)
        deferred = call.defer()
        self._held[request.token] = deferred
        return deferred

    def _release(self, call: Call, request: Release) -> Released:
        if not set(request.tokens) <= self._held.keys():
            raise call.refuse(TestsvcStatus.NOT_HELD)
        for token in request.tokens:
            self._held.pop(token).reply(Released(1))
        return Released(len(request.tokens))

    async def _place(self, call: Call, request: Place) -> Placed:
        slot = self.server.reply_slot(call.link)
        assert slot is not None, "the request came by a bound link"
        sent = 0
        for frame in request.frames:
            try:
                await Send(slot, frame, deadline=call.deadline)
            except AbiError:
                break
            sent += 1
        return Placed(sent, len(request.frames) - sent)

    async def _raw_session(self, call: Call, request: RawSession) -> SessionDone:
        way_back = call.take_cap()
        if way_back is None:
            raise call.refuse(TestsvcStatus.NO_CAPABILITY)
        until = Nanos(min(call.deadline, call.now + request.wait_ms * MILLISECOND))
        endpoint = await EndpointCreate()
        session = _Session(endpoint, way_back, until)
        try:
            link = await LinkCreate(endpoint, LinkTerms(depth=request.depth))
            await Send(way_back, HELLO, move=link.slot, deadline=until)
            for step in request.script:
                await session.take(step)
        except AbiError as error:
            call.note("status", error.status.name)
            raise call.refuse(TestsvcStatus.SESSION_BROKEN) from error
        finally:
            await session.close()
        return SessionDone(len(request.script), session.received)

    async def _use_link(self, call: Call, request: UseLink) -> SeenBy:
        claim = Whoami(request.claimed_pid, request.claimed_name)
        seen = await self._over_given_link(call, "timed", TIMED, claim)
        if isinstance(seen, Refused | CallFailure):
            raise call.refuse(TestsvcStatus.SESSION_BROKEN)
        return SeenBy(seen.pid, seen.service, seen.generation)

    async def _read_log(self, call: Call) -> LogdAnswer:
        oldest = Query(self._boot, 0, 1, EVERY_RECORD)
        answer = await self._over_given_link(call, "logd", LOGD, oldest)
        if isinstance(answer, CallFailure):
            raise call.refuse(TestsvcStatus.SESSION_BROKEN)
        if isinstance(answer, Refused):
            return LogdAnswer(int(answer.status), 0)
        return LogdAnswer(int(ReplyStatus.OK), len(answer.records))

    async def _ask_execd(self, call: Call) -> Answered:
        answer = await self._over_given_link(call, "execd", EXECD, GetPrograms(0))
        if isinstance(answer, CallFailure):
            raise call.refuse(TestsvcStatus.SESSION_BROKEN)
        return Answered(int(answer.status if isinstance(answer, Refused) else ReplyStatus.OK))

    async def _use_metrics(self, call: Call) -> Answered:
        answer = await self._over_given_link(call, "metricsd", METRICSD, Add(COUNTED, [], 1))
        if isinstance(answer, CallFailure):
            raise call.refuse(TestsvcStatus.SESSION_BROKEN)
        return Answered(int(answer.status if isinstance(answer, Refused) else ReplyStatus.OK))

    async def _last_words(self, call: Call, request: LastWords) -> Silent:
        if self.log is None:
            raise call.refuse(TestsvcStatus.SESSION_BROKEN)
        words = f"{LAST_WORDS} {request.token}"
        self.log.info(words, token=request.token)
        await ConsoleWrite(LAST_LINE)
        _ = await SleepUntil(Nanos(call.now + SILENCE))  # in which the log is not flushed
        raise call.refuse(TestsvcStatus.SESSION_BROKEN)

    async def _over_given_link(
        self, call: Call, name: str, protocol: WireProtocol, request: Request[ReplyT]
    ) -> ReplyT | Refused | CallFailure:
        """What the service at the other end of the link that came along answers."""
        slot = call.take_cap()
        if slot is None:
            raise call.refuse(TestsvcStatus.NO_CAPABILITY)
        bound = await self._peers.bind(
            Way(
                slot=slot,
                protocol=protocol,
                name=name,
                service=service_id(name),
                generation=GENERATION_ANY,
                terms=LinkTerms(),
                reply_terms=LinkTerms(),
            ),
            call.deadline,
        )
        if not isinstance(bound, Exchange):
            await CapClose(slot)
            raise call.refuse(TestsvcStatus.SESSION_BROKEN)
        answer = await bound.call(request, call.deadline, call.context)
        await self._peers.discard(bound.peer)
        return answer

    async def _flood_timed(self, call: Call, request: FloodTimed) -> FloodReport:
        timed = await self._timed(call)
        flood = Send(timed.peer.slot, _stray_frame(Whoami(0, "flood")))
        until = call.now + request.duration_ms * MILLISECOND
        met = {Status.QUEUE_FULL: 0, Status.NO_SPACE: 0}
        sent = 0
        for count in range(FLOOD_SENDS_MAX):
            if count % FLOOD_CLOCK_EVERY == 0 and await Now() >= until:
                break
            refused = await _refused(flood)
            if refused is None:
                sent += 1
            elif refused in met:
                met[refused] += 1
            else:
                raise call.refuse(TestsvcStatus.SESSION_BROKEN)
        await _drop_answers(timed)
        return FloodReport(sent, met[Status.QUEUE_FULL], met[Status.NO_SPACE])

    async def _fill_link(self, call: Call, request: FillLink) -> FloodReport:
        slot = call.take_cap()
        if slot is None:
            raise call.refuse(TestsvcStatus.NO_CAPABILITY)
        fill = Send(slot, b"\x01" + bytes(request.size - 1))
        sent = 0
        refused = None
        for _ in range(FILL_SENDS_MAX):
            refused = await _refused(fill)
            if refused is not None:
                break
            sent += 1
        await CapClose(slot)
        return FloodReport(sent, int(refused is Status.QUEUE_FULL), int(refused is Status.NO_SPACE))

    async def _forge(self, call: Call, request: Forge) -> ForgeReport:
        timed = await self._timed(call)
        claim = Whoami(request.claimed_pid, request.claimed_name)
        seen = await timed.call(claim, call.deadline, call.context)
        if not isinstance(seen, Seen):
            raise call.refuse(TestsvcStatus.SESSION_BROKEN)
        try:
            await Send(timed.peer.slot, request.header + encode(claim), deadline=call.deadline)
            answer = await Recv((timed.peer.inbox,), call.deadline, link=timed.peer.link)
        except AbiError as error:
            raise call.refuse(TestsvcStatus.SESSION_BROKEN) from error
        return ForgeReport([status_of(answer.data)], seen.pid, seen.service)

    async def _attack(self, call: Call, request: Attack) -> AttackResult:
        attack = ATTACKS.get(request.name)
        if attack is None:
            raise call.refuse(TestsvcStatus.NO_SUCH_ATTACK)
        return await attack(Pid(request.target_pid))

    async def _ask_init(self, call: Call, request: AskInit) -> AskedInit:
        control = await self._peers.control(call.deadline)
        if not isinstance(control, Exchange):
            raise call.refuse(TestsvcStatus.SESSION_BROKEN)
        statuses: list[int] = []
        asked: tuple[Request[Any], ...] = (
            GetTasks(),
            GetPolicy(),
            Restart(request.name),
            LeaveSafeMode(),
            Shutdown(),  # last: whoever is allowed to ends the system
        )
        for one in asked:
            answer = await control.call(one, call.deadline, call.context)
            if isinstance(answer, CallFailure):
                raise call.refuse(TestsvcStatus.SESSION_BROKEN)
            statuses.append(int(answer.status if isinstance(answer, Refused) else ReplyStatus.OK))
            if statuses[-1] != ReplyStatus.DENIED:
                break
        return AskedInit(statuses)

    async def _use(self, call: Call, name: str, request: Request[Any]) -> Answered:
        """What a service answers demo.testsvc itself. A link to an instance that has ended is
        exchanged by the first attempt, which then says so."""
        client = self.clients.get(name)
        if client is None:
            raise call.refuse(TestsvcStatus.SESSION_BROKEN)
        for _ in range(USE_ATTEMPTS_MAX):
            answer = await client.call(request, call.deadline, call.context)
            if isinstance(answer, Refused):
                return Answered(int(answer.status))
            if not isinstance(answer, CallFailure):
                return Answered(int(ReplyStatus.OK))
        raise call.refuse(TestsvcStatus.SESSION_BROKEN)

    async def _timed(self, call: Call) -> Client:
        """The client of timed, bound to its present instance."""
        if self.timed is None:
            raise call.refuse(TestsvcStatus.SESSION_BROKEN)
        budget = RetryBudget(
            attempts_max=CONNECT_ATTEMPTS_MAX, backoff=CONNECT_BACKOFF, deadline=call.deadline
        )
        if not isinstance(await call_until(self.timed, Whoami(0, ""), budget), Seen):
            raise call.refuse(TestsvcStatus.SESSION_BROKEN)
        return self.timed


class _Session:
    """The steps of a raw session, and what they use."""

    def __init__(self, endpoint: Slot, way_back: Slot, until: Nanos) -> None:
        self._endpoint: Slot | None = endpoint
        self._way_back = way_back
        self._until = until
        self._last = b""
        self.received = 0

    async def take(self, step: SessionStep) -> None:
        """Take one step; AbiError if the kernel refuses it."""
        match Step(step.step):
            case Step.RECEIVE:
                assert self._endpoint is not None, "a script receives before it closes"
                self._last = (await Recv((self._endpoint,), self._until)).data
                self.received += len(self._last)
            case Step.ECHO:
                await self._send(self._last)
            case Step.SEND:
                await self._send(step.data)
            case Step.ANSWER:
                echo = self._last[NONCE_OFFSET:HEADER_SIZE]
                await self._send(step.data[:NONCE_OFFSET] + echo + step.data[HEADER_SIZE:])
            case Step.CLOSE:
                await self.close_endpoint()

    async def _send(self, data: bytes) -> None:
        await Send(self._way_back, data, deadline=self._until)

    async def close_endpoint(self) -> None:
        """Close the endpoint once."""
        if self._endpoint is not None:
            await EndpointClose(self._endpoint)
            self._endpoint = None

    async def close(self) -> None:
        """Let go of both ends."""
        await self.close_endpoint()
        await CapClose(self._way_back)


async def _refused(send: Send) -> Status | None:
    """Why a send was refused, None if it was not."""
    try:
        await send
    except AbiError as error:
        return error.status
    return None


async def _drop_answers(timed: Client) -> None:
    """Receive the answers to the flood that found room, until none comes any more."""
    for _ in range(FLOOD_ANSWERS_MAX):
        quiet = Nanos(await Now() + FLOOD_QUIET)
        try:
            _ = await Recv((timed.peer.inbox,), quiet, link=timed.peer.link)
        except AbiError:
            return


def _stray_frame(request: Whoami) -> bytes:
    """A request frame with nonce 0, which no call in flight has: its answer is stale."""
    prefix = TIMED.codecs[type(request)].prefix
    far = (1 << 62).to_bytes(8, "little")
    return prefix + bytes(8) + far + bytes(24) + encode(request)


async def main(boot: BootImage) -> int:
    """The program: answer init's Bind, find timed, serve."""
    config = ServiceConfig.of(boot)
    peers = Peers(boot, config.trace_seed)
    uses = [name for name in PROTOCOLS if name in config.uses]
    service = Testsvc(peers, uses, config.boot)
    if LOGD_NAME in config.uses:
        service.log = Logger(peers, config.uses)
        service.log.info("started", generation=boot.generation)
    server = Server(service, PROTOCOL, boot, peers.caller, log=service.log)
    service.server = server
    until = Nanos(boot.now + CONNECT_BUDGET)
    _ = await server.step(until)
    budget = RetryBudget(attempts_max=CONNECT_ATTEMPTS_MAX, backoff=CONNECT_BACKOFF, deadline=until)
    for name in uses:
        client = await peers.connect(name, PROTOCOLS[name], budget)
        if not isinstance(client, Client):
            return 1
        service.clients[name] = client
    return await told_if_crashed(boot, server.run(), service.log)
