"""A small system around policyd on the tiny kernel: an init that keeps a policy, and a logd."""

from collections.abc import Awaitable, Callable, Iterable, Mapping
from enum import IntEnum
from typing import Any

from nexus.abi import INIT_NAME, BootImage, PolicyRaise, PolicyWord
from nexus.ipc import Bulk, Peers, accept_bulk, offer_bulk
from nexus.protocols.init import PROTOCOL as INIT
from nexus.protocols.init import (
    REPLY_NAME,
    GetPolicy,
    InitStatus,
    PolicyGiven,
    PolicyTaken,
    Route,
    Routed,
    SetPolicy,
)
from nexus.protocols.logd import PROTOCOL as LOGD
from nexus.protocols.logd import Append, Appended, LogdStatus
from nexus.protocols.policy import Policy, decode_policy, parse_right
from nexus.runtime import Call, Deferred, Server, ServiceConfig
from nexus.services.policyd import main as policyd_main
from tests.fakes.pair import SEED, TERMS
from tests.fakes.tinykernel import Task, TinyKernel

SERVICES = ("policyd", "logd", "app", "other", "keystored", "statefsd")


def policy_of(
    rights: Mapping[str, Iterable[str]],
    *,
    services: Iterable[str] = SERVICES,
    routes: Mapping[str, str] | None = None,
) -> Policy:
    """A policy with these rights, each said to stand in base.toml."""
    return Policy(
        services=list(services),
        allow={
            name: [parse_right(right, "base.toml", line) for line, right in enumerate(given, 1)]
            for name, given in rights.items()
        },
        routes=dict(routes or {}),
    )


class FakeInit:
    """Routes for everybody, and the policy as init keeps it.

    `down` are names without a route now; `refuses` answers GetPolicy and SetPolicy; with `silent`
    they are never answered; `garbage` is given instead of the policy's bytes.
    """

    def __init__(self, system: "PolicySystem", policy: Policy) -> None:
        self._system = system
        self.policy = policy
        self.down: set[str] = set()
        self.refuses: IntEnum | None = None
        self.silent = False
        self.loses_answers = False  # a SetPolicy is taken and its answer never comes
        self.garbage: bytes | None = None
        self.asked: list[str] = []

    async def handle(
        self, call: Call, request: Route | GetPolicy | SetPolicy
    ) -> Routed | PolicyGiven | PolicyTaken | Deferred:
        if isinstance(request, Route):
            return self._route(call, request)
        self.asked.append(type(request).__name__)
        if self.silent:
            return call.defer()
        if self.refuses is not None:
            raise call.refuse(self.refuses)
        if isinstance(request, GetPolicy):
            return await self._give(call)
        return await self._take(call, request)

    def _route(self, call: Call, request: Route) -> Routed:
        if request.name == REPLY_NAME:
            own = call.sender
            return Routed(own.service, own.generation, *TERMS, TERMS.depth, TERMS.size)
        server = self._system.services.get(request.name)
        if request.name in self.down or server is None or server.over:
            raise call.refuse(InitStatus.ROUTE_DOWN)
        kernel = self._system.kernel
        call.give_cap(kernel.link(kernel.endpoint_of(server), self._system.init, TERMS))
        sender = server.sender
        return Routed(sender.service, sender.generation, *TERMS, TERMS.depth, TERMS.size)

    async def _give(self, call: Call) -> PolicyGiven:
        data = self.policy.encoded() if self.garbage is None else self.garbage
        slot = await offer_bulk(data)
        assert slot is not None
        call.give_cap(slot)
        return PolicyGiven(len(data), self._system.kernel.page.generation)

    async def _take(self, call: Call, request: SetPolicy) -> PolicyTaken | Deferred:
        bulk = await accept_bulk(call.take_cap(), 0, request.size)
        assert isinstance(bulk, Bulk)
        policy = decode_policy(bytes(bulk.view))
        await bulk.release()
        if policy.services != self.policy.services:
            raise call.refuse(InitStatus.BAD_POLICY)
        self.policy = policy
        word = await PolicyRaise(available=True)
        if self.loses_answers:
            return call.defer()
        return PolicyTaken(word.generation)


class FakeLogd:
    """Keeps what is appended. `accepts` more are taken before RATE_LIMITED; None is no limit.

    With `silent` nothing is answered (and nothing kept); `loses_answers` keeps and does not answer.
    """

    def __init__(self) -> None:
        self.records: list[Append] = []
        self.accepts: int | None = None
        self.limited = 0
        self.refuses: IntEnum | None = None
        self.refuses_op = ""  # whose records alone are refused; empty for all
        self.silent = False
        self.loses_answers = False

    def handle(self, call: Call, request: Append) -> Appended | Deferred:
        if self.silent:
            return call.defer()
        if self.refuses is not None and self.refuses_op in ("", request.fields[0].value):
            raise call.refuse(self.refuses)
        if self.accepts is not None:
            if self.accepts == 0:
                self.limited += 1
                raise call.refuse(LogdStatus.RATE_LIMITED)
            self.accepts -= 1
        self.records.append(request)
        if self.loses_answers:
            return call.defer()
        return Appended(len(self.records), 0)

    def audits(self) -> list[dict[str, str]]:
        """The fields of every record."""
        return [{each.key: each.value for each in record.fields} for record in self.records]


class PolicySystem:
    """init, policyd and logd; clients are tasks by name."""

    def __init__(
        self,
        policy: Policy,
        *,
        uses: tuple[str, ...] = ("logd",),
        policyd: bool = True,
        settings: dict[str, Any] | None = None,
    ) -> None:
        self.kernel = TinyKernel()
        self.services: dict[str, Task] = {}
        self.init = self.kernel.task(INIT_NAME)
        boot = self.kernel.boot(self.init)
        self.keeper = FakeInit(self, policy)
        self.kernel.start(self.init, Server(self.keeper, INIT, boot).run())
        self.uses = uses
        self.settings = settings or {}
        self.logd = self.start_logd()
        if policyd:
            self.start_policyd()
        self.kernel.page = PolicyWord(1, available=True)

    def start_logd(self) -> FakeLogd:
        """Start logd (again), with an empty journal."""
        self.logd = FakeLogd()
        logd = self.logd
        _ = self.start("logd", lambda boot: Server(logd, LOGD, boot).run())
        return self.logd

    def start(self, name: str, run: Callable[[BootImage], Any], argument: bytes = b"") -> Task:
        """Start (again) the service `name`."""
        task = self.kernel.task(name)
        boot = self.kernel.boot(task, self.init, argument)
        self.services[name] = task
        return self.kernel.start(task, run(boot))

    def start_policyd(self) -> Task:
        config = ServiceConfig(
            uses=list(self.uses), posts=[], settings=self.settings, trace_seed=SEED
        )
        return self.start("policyd", policyd_main, config.encoded())

    def kill(self, name: str) -> None:
        self.kernel.end(self.services[name])

    def raise_page(self, *, available: bool) -> None:
        """As PolicyRaise of init."""
        self.kernel.page = self.kernel.page._replace(
            generation=self.kernel.page.generation + 1, available=available
        )

    def add_client(self, body: Callable[[Peers], Awaitable[Any]], name: str = "app") -> Task:
        task = self.kernel.task(name)
        peers = Peers(self.kernel.boot(task, self.init), SEED)

        async def main() -> Any:
            return await body(peers)

        return self.kernel.start(task, main())

    def client(self, body: Callable[[Peers], Awaitable[Any]], name: str = "app") -> Any:
        """The result of `body`, run as the service `name`."""
        return self.kernel.run(self.add_client(body, name))
