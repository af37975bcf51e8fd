"""An init that only knows routes, on the tiny kernel; and a system around it."""

from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

from nexus.abi import INIT_NAME, Nanos, Now, ServiceId, SleepUntil
from nexus.ipc import Peers
from nexus.protocols.init import PROTOCOL as INIT
from nexus.protocols.init import REPLY_NAME, InitStatus, Route, Routed
from nexus.runtime import Call, Server
from nexus.wire import Protocol
from tests.fakes.adder import ADDER, Adder
from tests.fakes.pair import SEED, TERMS
from tests.fakes.tinykernel import Link, Task, TinyKernel


class RouteInit:
    """Serves Route for the tasks of a system."""

    def __init__(self, system: "System") -> None:
        self._system = system
        self.asked: Counter[str] = Counter()
        self.down: Counter[str] = Counter()  # so many answers are ROUTE_DOWN
        self.denied: set[str] = set()
        self.reply_of: ServiceId | None = None  # whose inbox `@reply` is said to be, if not theirs
        self.dying: Counter[str] = Counter()  # so many routes lead to an instance that dies

    def handle(self, call: Call, request: Route) -> Routed:
        name = request.name
        self.asked[name] += 1
        if name == REPLY_NAME:
            sender = call.sender
            service = sender.service if self.reply_of is None else self.reply_of
            return Routed(service, sender.generation, *TERMS, TERMS.depth, TERMS.size)
        if name in self.denied:
            raise call.refuse(InitStatus.ROUTE_DENIED)
        if name not in self._system.services:
            raise call.refuse(InitStatus.ROUTE_NOT_FOUND)
        if self.down[name]:
            self.down[name] -= 1
            raise call.refuse(InitStatus.ROUTE_DOWN)
        server = self._system.services[name]
        kernel = self._system.kernel
        call.give_cap(kernel.link(kernel.endpoint_of(server), self._system.init, TERMS))
        if self.dying[name]:
            self.dying[name] -= 1
            self._system.kill(name)
            self._system.start(name)
        return Routed(
            server.sender.service, server.sender.generation, *TERMS, TERMS.depth, TERMS.size
        )


class System:
    """init, adders by name, and clients that know them through init only."""

    def __init__(self, *names: str) -> None:
        self.kernel = TinyKernel()
        self.services: dict[str, Task] = {}
        self.servers: dict[str, Server] = {}
        self.adders: dict[str, Adder] = {}
        self.late: dict[str, Nanos] = {}  # how long a service does not serve after its start
        self.init = self.kernel.task(INIT_NAME)
        boot = self.kernel.boot(self.init)
        self.router = RouteInit(self)
        self.init_server = Server(self.router, INIT, boot)
        self.kernel.start(self.init, self.init_server.run())
        for name in names:
            self.start(name)

    def start(self, name: str) -> Task:
        """Start (again) the service `name`."""
        task = self.kernel.task(name)
        boot = self.kernel.boot(task, self.init)
        service, protocol = self.make(name)
        self.servers[name] = Server(service, protocol, boot)
        self.services[name] = task
        return self.kernel.start(task, self._serve(self.servers[name], self.late.get(name)))

    async def _serve(self, server: Server, late: Nanos | None) -> int:
        if late is not None:
            _ = await SleepUntil(Nanos(await Now() + late))
        return await server.run()

    def make(self, name: str) -> tuple[Any, Protocol]:
        """A new instance of the service `name`, and what it speaks."""
        self.adders[name] = Adder()
        return self.adders[name], ADDER

    def kill(self, name: str) -> None:
        self.kernel.end(self.services[name])

    def close_reply_links(self, name: str) -> None:
        """Let a service lose its ways back, as one that cheats could."""
        task = self.services[name]
        for slot, cap in list(task.table.items()):
            if isinstance(cap.target, Link) and cap.target.endpoint.owner is not self.init:
                self.kernel.close(task, slot)
        self.servers[name]._replies.clear()

    def add_client(self, body: Callable[[Peers], Awaitable[Any]], name: str = "client") -> Task:
        task = self.kernel.task(name)
        peers = Peers(self.kernel.boot(task, self.init), SEED)

        async def main() -> Any:
            return await body(peers)

        return self.kernel.start(task, main())

    def client(self, body: Callable[[Peers], Awaitable[Any]], name: str = "client") -> Any:
        """The result of `body`, run as a client."""
        return self.kernel.run(self.add_client(body, name))
