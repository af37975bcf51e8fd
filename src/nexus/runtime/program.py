"""A service of one's own: a class with `handle`, and the context it works in. ::

    class Valve:
        PROTOCOL = valve.PROTOCOL

        def __init__(self, context: Context) -> None:
            self._context = context

        async def start(self) -> None:
            self._pump = await self._context.client("pump", pump.PROTOCOL)

        async def handle(self, call: Call, request: Open) -> Opened: ...

`program_of(Valve, PROTOCOL)` is its `main`. Order: the class is made, init's Bind is answered,
`start` is awaited, then requests are served; init's health probe is answered with OK only
afterwards, and with that the console says `NAME: ready`.
"""

import importlib
import inspect
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, suppress
from typing import Any, Final, Protocol, TypeVar

import msgspec

from nexus.abi import AbiError, BootImage, ConsoleWrite, LinkId, Nanos, Now, ServiceId, Trap
from nexus.ipc import (
    Caller,
    CallFailure,
    Client,
    Denied,
    NotFound,
    Peers,
    Refused,
    RetryBudget,
    RouteFailure,
    deadline_after,
    nested_deadline,
)
from nexus.ipc import Context as Trace
from nexus.log import LOGD_NAME, Logger
from nexus.metrics import Metrics, TaskTrail, Tracing
from nexus.protocols.logd import Level
from nexus.protocols.policyd import PROTOCOL as POLICYD
from nexus.runtime.authority import Authority, Outcome
from nexus.runtime.call import Call, Deferred, Refusal
from nexus.runtime.config import ServiceConfig
from nexus.runtime.server import LOG_PAUSE_MAX, Server, tell_of_crash, told_if_crashed
from nexus.wire import Protocol as WireProtocol
from nexus.wire import ReplyStatus, Request

CONNECT_MAX: Final = Nanos(2_000_000_000)  # ns for one connection; the default readiness deadline
CONNECT_ATTEMPTS_MAX: Final = 20  # with doubling pauses from CONNECT_BACKOFF on
CONNECT_BACKOFF: Final = Nanos(2_000_000)  # ns; a core service is up within a few of them
PREPARE_MAX: Final = Nanos(1_500_000_000)  # ns for policyd: up before all others, or down
BIND_MAX: Final = Nanos(2_000_000_000)  # ns that init's Bind may take to come
OPEN_MAX: Final = Nanos(500_000_000)  # ns for logd to answer; one that is not there costs nothing
POLICYD_NAME: Final = "policyd"
EXIT_UNREACHABLE: Final = 1  # a service it uses was not there in time; init starts it again
EXIT_SETTINGS: Final = 2  # its settings in the system file are not what it takes
EXIT_UNUSABLE: Final = 3  # a person has to put something right first
SENTENCE_SIZE_MAX: Final = 300  # characters of an explanation; a console line has 512 bytes

HANDED_ON: Final = (
    "on_time",
    "on_gone",
    "on_other",
    "evidence",
    "ready",
    "stands_on",
    "on_ready",
    "on_malformed",
    "busy",
    "on_idle",
    "on_stop",
)
"""Hooks of a class of one's own that the runtime calls as they are."""

SettingsT = TypeVar("SettingsT")
ReplyT = TypeVar("ReplyT")
ResultT = TypeVar("ResultT")
Main = Callable[[BootImage], Coroutine[Trap[Any], Any, int]]


class Unreachable(Refusal):
    """A service could not be connected in time: for people, and BUSY for who is being served.

    In `start` it ends the program, whose supervisor tries again later; who can do without the
    service catches it.
    """

    def __init__(self, name: str, outcome: RouteFailure | None) -> None:
        super().__init__(ReplyStatus.BUSY)
        self.name = name
        self.outcome = outcome

    def __str__(self) -> str:
        match self.outcome:
            case None | Denied():
                return (
                    f"may not call {self.name}: its entry in the system file does not have it "
                    f"under `uses`, or has it with `sync = false`"
                )
            case NotFound():
                return f"cannot reach {self.name}: the system has no service of that name"
            case outcome:
                return f"cannot reach {self.name}: {type(outcome).__name__}"


class SettingsFault(Exception):
    """The settings of the system file are not what the program takes; the text says where."""


class Unusable(Exception):
    """What the service cannot work without is there and cannot be used, such as its device; the
    text is a sentence that says what to do. In `start` it ends the program (EXIT_UNUSABLE)."""


class Own(Protocol):
    """What a class of one's own is made of; `start` and runtime.Hooks' methods are optional."""

    def __init__(self, context: "Context") -> None: ...

    def handle(self, call: Any, request: Any) -> Any:
        """As runtime.Service.handle."""


class Context:
    """What a service finds when it starts. Nothing here waits without a deadline."""

    def __init__(
        self,
        boot: BootImage,
        config: ServiceConfig,
        tracing: Callable[[Caller], Tracing] | None = None,
    ) -> None:
        """`tracing` is where spans find what they are part of, if not in calls being served."""
        self.boot = boot
        self.config = config
        self.peers = Peers(boot, config.trace_seed)
        self.log = Logger(self.peers, config.uses, ring_size=config.log_ring)
        self.metrics = Metrics(
            self.peers,
            config.uses,
            page_size=config.metrics_page,
            tracing=None if tracing is None else tracing(self.peers.caller),
        )
        policyd = POLICYD_NAME in config.uses and POLICYD_NAME not in config.posts
        self.authority = Authority(self._policyd if policyd else None, self.log)
        self._clients: dict[str, Client] = {}
        self._server: Server | None = None

    @property
    def name(self) -> str:
        """The name of the service in the system file."""
        return self.boot.name

    @property
    def generation(self) -> int:
        """Which start of the service this is, from 1."""
        return self.boot.generation

    @property
    def settings(self) -> dict[str, Any]:
        """The table [service.NAME.settings] as it stands."""
        return self.config.settings

    def serve_by(self, server: Server) -> None:
        """The runtime's word on what serves the service."""
        self._server = server

    async def send_given(self) -> None:
        """Send the deferred replies given so far: a handler is about to wait for somebody."""
        if self._server is not None:
            await self._server.send_given()

    def settings_as(self, kind: type[SettingsT]) -> SettingsT:
        """The settings as the service's own msgspec.Struct.

        A fault ends the program with a sentence on the console (EXIT_SETTINGS).
        """
        try:
            return self.config.settings_as(kind)
        except msgspec.ValidationError as error:
            raise SettingsFault(str(error)) from error

    async def now(self) -> Nanos:
        """The kernel's clock. While a request is served `call.now` is there without a trap."""
        return await Now()

    async def after(self, span: Nanos) -> Nanos:
        """The deadline `span` ns from now."""
        return deadline_after(await Now(), span)

    async def client(
        self, name: str, protocol: WireProtocol, deadline: Nanos | None = None
    ) -> Client:
        """A client of a service this one uses, made once; it follows the service's restarts.

        Raises Unreachable when there is no route within CONNECT_MAX, or until `deadline`, or the
        deadline of the request being served.
        """
        client = self._clients.get(name)
        if client is None:
            if name not in self.config.uses or name in self.config.posts:
                raise Unreachable(name, None)
            until = deadline_after(await Now(), CONNECT_MAX)
            if deadline is not None:
                until = nested_deadline(deadline, until)
            parent = self.peers.caller.parent
            if parent is not None:
                until = nested_deadline(parent.deadline, until)
            found = await self._connect(name, protocol, until)
            if not isinstance(found, Client):
                raise Unreachable(name, found)
            client = self._clients[name] = found
        assert client.protocol is protocol, f"{name} is connected with another protocol"
        return client

    async def take_links(self) -> None:
        """Take the planned links that nobody asks for by name: policyd's, and with the first line
        of the log logd's. The system is ready when every planned link exists. logd has the ring
        then, so that what the service writes from now on is there whatever ends it."""
        _ = await self.authority.prepare(deadline_after(await Now(), PREPARE_MAX))
        if LOGD_NAME in self.config.uses:
            self.log.info("started", generation=self.boot.generation)
            _ = await self.log.open(deadline_after(await Now(), OPEN_MAX))

    async def _connect(
        self, name: str, protocol: WireProtocol, until: Nanos
    ) -> Client | RouteFailure:
        budget = RetryBudget(
            attempts_max=CONNECT_ATTEMPTS_MAX, backoff=CONNECT_BACKOFF, deadline=until
        )
        return await self.peers.connect(name, protocol, budget)

    async def _policyd(self, until: Nanos) -> Client | RouteFailure:
        """The one way to policyd: the service's own questions take it too."""
        found: Client | RouteFailure | None = self._clients.get(POLICYD_NAME)
        if found is None:
            found = await self._connect(POLICYD_NAME, POLICYD, until)
            if isinstance(found, Client):
                self._clients[POLICYD_NAME] = found
        spoken = found.protocol if isinstance(found, Client) else POLICYD
        assert spoken is POLICYD, "policyd is connected with another protocol"
        return found


class _Hooked:
    """A class of one's own as the runtime sees it: with the context's facts added to its own."""

    def __init__(self, own: Any, context: Context) -> None:
        self._own = own
        self._context = context
        self.started = False
        self.handle = own.handle
        for name in HANDED_ON:
            if hasattr(own, name):
                setattr(self, name, getattr(own, name))
        if hasattr(own, "next_time"):
            self.next_time = self._next_time
        if hasattr(own, "on_settings"):
            self.on_settings = self._on_settings

    def _next_time(self) -> Nanos | None:
        """The service's own next time, which does not come before its `start` is done."""
        due: Nanos | None = self._own.next_time() if self.started else None
        return due

    async def _on_settings(self, settings: dict[str, Any]) -> None:
        """The service takes its new settings, or raises; only then they are the context's."""
        taken = self._own.on_settings(settings)
        if inspect.isawaitable(taken):
            await taken
        self._context.config = msgspec.structs.replace(self._context.config, settings=settings)

    def facts(self) -> dict[str, int]:
        """What the service says of itself, what its log and its authority say."""
        own = self._own.facts() if hasattr(self._own, "facts") else {}
        context = self._context
        kept = {**context.log.facts(), **context.authority.facts(), **context.metrics.facts()}
        return {**kept, **own}


def program_of(own: Callable[[Context], Own], protocol: WireProtocol | None = None) -> Main:
    """The program of a class of one's own, which serves `protocol` or its own PROTOCOL."""
    spoken = own.PROTOCOL if protocol is None else protocol  # type: ignore[attr-defined]
    assert isinstance(spoken, WireProtocol), f"{own!r} has no PROTOCOL"

    async def main(boot: BootImage) -> int:
        context = Context(boot, ServiceConfig.of(boot))
        running = _told_if_unable(context, _run(own, spoken, context))
        return await told_if_crashed(boot, running, context.log)

    return main


def load(target: str, protocol: str = "") -> Main:
    """The program of the class `target`, as "package.module:Class"; for Program.entry.

    `protocol` is the module whose PROTOCOL it serves; empty if the class has its own.
    """
    own = _found(target)
    return program_of(own, importlib.import_module(protocol).PROTOCOL if protocol else None)


def _found(target: str) -> Any:
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


async def _run(own: Callable[[Context], Own], protocol: WireProtocol, context: Context) -> int:
    """The life of a service of one's own."""
    boot = context.boot
    await context.log.begin()
    await context.metrics.begin()
    service = own(context)
    hooked = _Hooked(service, context)
    sources = boot.ports if hasattr(service, "on_other") else ()
    server = Server(
        hooked,
        protocol,
        boot,
        context.peers.caller,
        sources=sources,
        log=context.log,
        metrics=context.metrics,
    )
    server.starting = True
    context.serve_by(server)
    _ = await server.step(deadline_after(boot.now, BIND_MAX))
    start = getattr(service, "start", None)
    if start is not None:
        await start()
    await context.take_links()
    hooked.started = True
    server.starting = False
    return await server.run()


async def _told_if_unable(context: Context, running: Coroutine[Trap[Any], Any, int]) -> int:
    """The exit code of `running`; what only people can put right is said in a sentence."""
    try:
        return await running
    except (Unreachable, SettingsFault, Unusable) as fault:
        _ = context.log.write(Level.ERROR, str(fault))
        with suppress(AbiError):
            await context.log.flush()
        return await _tell(context.boot, fault)


async def _tell(boot: BootImage, fault: Unreachable | SettingsFault | Unusable) -> int:
    """Say on the console why the program ends; its exit code."""
    sentence = str(fault)
    code = EXIT_UNUSABLE if isinstance(fault, Unusable) else EXIT_UNREACHABLE
    if isinstance(fault, SettingsFault):
        where = f"[service.{boot.name}.settings] in the system file"
        sentence, code = f"settings: {fault}; correct {where}", EXIT_SETTINGS
    printable = "".join(each if each.isprintable() else "?" for each in sentence)
    with suppress(AbiError):
        await ConsoleWrite(f"{boot.name}: {printable[:SENTENCE_SIZE_MAX]}")
    return code


# ------------------------------------------------------------------ ordinary programs


class Task(Protocol):
    """What drives trap coroutines inside somebody else's event loop (kernel.linux.aio)."""

    async def run(self, coroutine: Coroutine[Trap[Any], Any, ResultT]) -> ResultT:
        """The result of a trap coroutine; several may run at the same time."""

    def lock(self) -> AbstractAsyncContextManager[object]:
        """A fresh lock of that event loop."""


OrdinaryMain = Callable[[BootImage, Task], Awaitable[int]]


class OrdinaryClient:
    """As ipc.Client, awaited in an ordinary program."""

    def __init__(self, turns: "_Turns", client: Client) -> None:
        self._turns = turns
        self._client = client

    @property
    def name(self) -> str:
        """The service's name."""
        return self._client.name

    @property
    def generation(self) -> int:
        """Which start of the service the present link leads to."""
        return self._client.generation

    async def call(
        self, request: Request[ReplyT], deadline: Nanos, context: Trace | None = None
    ) -> ReplyT | Refused | CallFailure:
        """As ipc.Exchange.call. It inherits nothing: give `call.deadline` and `call.context`."""

        async def asked() -> ReplyT | Refused | CallFailure:
            return await self._client.call(request, deadline, context)

        return await self._turns.run(asked())

    async def call_many(
        self, requests: list[Request[ReplyT]], deadline: Nanos, context: Trace | None = None
    ) -> list[ReplyT | Refused | CallFailure]:
        """As ipc.Exchange.call_many."""
        return await self._turns.run(self._client.call_many(requests, deadline, context))


class OrdinaryAuthority:
    """As runtime.Authority, awaited in an ordinary program."""

    def __init__(self, turns: "_Turns", authority: Authority) -> None:
        self._turns = turns
        self._authority = authority

    async def require(self, call: Call, right: str, target: str = "") -> None:
        """As Authority.require."""
        await self._turns.run(self._authority.require(call, right, target))

    async def check(
        self,
        subject: ServiceId,
        right: str,
        target: str,
        deadline: Nanos,
        context: Trace | None = None,
    ) -> Outcome:
        """As Authority.check."""
        return await self._turns.run(
            self._authority.check(subject, right, target, deadline, context)
        )


class _Turns:
    """Trap coroutines that share the task's inbox, one after the other."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._lock = task.lock()

    async def run(self, coroutine: Coroutine[Trap[Any], Any, ResultT]) -> ResultT:
        """Wait for the turn of `coroutine`, then for its result."""
        try:
            async with self._lock:
                return await self._task.run(coroutine)
        finally:
            coroutine.close()  # it may have been cancelled before its turn


class _Desk:
    """The service of an ordinary program as the trap side sees it: takes requests, defers them.

    One request at a time: the server is not stepped before the one taken has its reply.
    """

    def __init__(self) -> None:
        self.service: Any = None
        self.taken: tuple[Call, Any, Deferred] | None = None

    def handle(self, call: Call, request: Any) -> Deferred:
        """Keep the request for the event loop's side."""
        if self.service is None:
            raise Refusal(ReplyStatus.BUSY)
        deferred = call.defer()
        self.taken = (call, request, deferred)
        return deferred

    def on_gone(self, link: LinkId) -> None:
        """The holder of a link is gone."""
        if hasattr(self.service, "on_gone"):
            self.service.on_gone(link)

    def facts(self) -> dict[str, int]:
        """The service's facts."""
        return dict(self.service.facts()) if hasattr(self.service, "facts") else {}

    def ready(self) -> bool:
        """Whether the service does its work."""
        return bool(self.service.ready()) if hasattr(self.service, "ready") else True


class OrdinaryContext:
    """As Context, for a program that runs under an event loop of its own.

    The names are the same. Calls take turns: while one waits for its answer the next one waits
    for its turn. Requests are handled one at a time; a batch and requests that carry capabilities
    are not for ordinary programs.
    """

    def __init__(self, boot: BootImage, task: Task, protocol: WireProtocol) -> None:
        self._task = task
        self._turns = _Turns(task)
        self._inner = Context(boot, ServiceConfig.of(boot), TaskTrail)
        self._clients: dict[str, OrdinaryClient] = {}
        self._desk = _Desk()
        # Requests are taken and answered beside the program's own calls: they share the ids.
        caller = Caller(self._inner.peers.caller.spans)
        recorder = self._inner.metrics.recorder
        self._server = Server(self._desk, protocol, boot, caller, recorder=recorder)
        self._server.starting = True
        self._protocol = protocol
        self.boot = boot
        self.config = self._inner.config
        self.log = self._inner.log
        self.metrics = self._inner.metrics
        self.authority = OrdinaryAuthority(self._turns, self._inner.authority)

    @property
    def name(self) -> str:
        """The name of the service in the system file."""
        return self.boot.name

    @property
    def generation(self) -> int:
        """Which start of the service this is, from 1."""
        return self.boot.generation

    @property
    def settings(self) -> dict[str, Any]:
        """The table [service.NAME.settings] as it stands."""
        return self.config.settings

    def settings_as(self, kind: type[SettingsT]) -> SettingsT:
        """As Context.settings_as."""
        return self._inner.settings_as(kind)

    async def now(self) -> Nanos:
        """The kernel's clock."""
        return await self._task.run(self._inner.now())

    async def after(self, span: Nanos) -> Nanos:
        """The deadline `span` ns from now."""
        return await self._task.run(self._inner.after(span))

    async def client(self, name: str, protocol: WireProtocol) -> OrdinaryClient:
        """As Context.client."""
        found = await self._turns.run(self._inner.client(name, protocol))
        return self._clients.setdefault(name, OrdinaryClient(self._turns, found))

    def descriptor(self, name: str) -> int:
        """The file descriptor of a granted device or listening socket; KeyError if none is."""
        return dict(self.boot.descriptors)[name]

    async def serve(self, service: Any, protocol: WireProtocol | None = None) -> int:
        """Serve until init says Stop; from now on the health probe finds the service ready."""
        assert protocol in (None, self._protocol), "the system file names another protocol"
        self._desk.service = service
        self._server.starting = False
        while not self._server.stopping:
            _ = await self._task.run(self._server.step(await self._next_wake()))
            taken, self._desk.taken = self._desk.taken, None
            if taken is not None:
                await self._handle(*taken)
            if self.log.due:
                await self._turns.run(self.log.flush())
            if self.metrics.is_due(await self.now()):
                await self._turns.run(self.metrics.flush())
        return 0

    async def begin(self) -> None:
        """Answer init's Bind and take the planned links, before anything else is done."""
        await self._task.run(self.log.begin())
        await self._task.run(self.metrics.begin())
        until = deadline_after(self.boot.now, BIND_MAX)
        _ = await self._task.run(self._server.step(until))
        await self._turns.run(self._inner.take_links())

    async def _next_wake(self) -> Nanos:
        """How long to wait for a request: lines of other tasks may come to the log meanwhile."""
        return deadline_after(await self.now(), LOG_PAUSE_MAX)

    async def _handle(self, call: Call, request: Any, deferred: Deferred) -> None:
        tracing = self.metrics.recorder.caller
        before, tracing.trail = tracing.trail, call.trail
        try:
            reply = self._desk.service.handle(call, request)
            if inspect.isawaitable(reply):
                reply = await reply
        except Refusal as refusal:
            deferred.refuse(refusal.status)
        else:
            deferred.reply(reply)
        finally:
            tracing.trail = before


def load_ordinary(target: str, protocol: str) -> OrdinaryMain:
    """The ordinary program `target`, "package.module:main" of `async def main(context) -> int`."""
    own = _found(target)
    spoken = importlib.import_module(protocol).PROTOCOL

    async def main(boot: BootImage, task: Task) -> int:
        context = OrdinaryContext(boot, task, spoken)
        try:
            await context.begin()
            code: int = await own(context)
        except (Unreachable, SettingsFault) as fault:
            return await task.run(_tell(boot, fault))
        except Exception as error:  # told to the console, and goes on: the crash is the exit
            await task.run(tell_of_crash(boot, error, context.log))
            raise
        return code

    return main
