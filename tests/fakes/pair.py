"""A service and its client on the tiny kernel, bound to each other."""

from collections.abc import Awaitable, Callable
from typing import Any

from nexus.abi import INIT_NAME, BootImage, LinkTerms, Nanos, Slot
from nexus.ipc import Exchange, Peers, Way
from nexus.runtime import Server
from nexus.wire import Protocol
from tests.fakes.adder import ADDER, Adder
from tests.fakes.tinykernel import Task, TinyKernel

FAR = Nanos(30_000_000_000)
SEED = b"0123456789abcdef"
TERMS = LinkTerms(8, 16 * 1024, 0)


class Pair:
    """`server` is the adder's; `client()` runs a coroutine as a client bound to it."""

    def __init__(self, service: Any = None, protocol: Protocol = ADDER) -> None:
        self.kernel = TinyKernel()
        self.service = Adder() if service is None else service
        self.protocol = protocol
        self.serving, self.boot, self.server = self.add_server("adder")
        self.peers: dict[str, Peers] = {}

    def add_server(self, name: str) -> tuple[Task, BootImage, Server]:
        task = self.kernel.task(name)
        boot = self.kernel.boot(task)
        peers = Peers(boot, SEED)
        server = Server(self.service, self.protocol, boot, peers.caller)
        self.kernel.start(task, server.run())
        return task, boot, server

    def add_client(
        self,
        body: Callable[[Exchange], Awaitable[Any]],
        *,
        name: str = INIT_NAME,
        server: Task | None = None,
        terms: LinkTerms = TERMS,
        reply_terms: LinkTerms = TERMS,
    ) -> Task:
        server = self.serving if server is None else server
        task = self.kernel.task(name)
        boot = self.kernel.boot(task)
        slot = self.kernel.link(self.kernel.endpoint_of(server), task, terms)
        peers = self.peers[name] = Peers(boot, SEED)
        target = server

        async def main() -> Any:
            exchange = await self.bind(peers, slot, target, terms, reply_terms)
            return await body(exchange)

        return self.kernel.start(task, main())

    async def bind(
        self, peers: Peers, slot: Slot, server: Task, terms: LinkTerms, reply_terms: LinkTerms
    ) -> Exchange:
        way = Way(
            slot=slot,
            protocol=self.protocol,
            name=server.name,
            service=server.sender.service,
            generation=server.sender.generation,
            terms=terms,
            reply_terms=reply_terms,
        )
        bound = await peers.bind(way, FAR)
        assert isinstance(bound, Exchange), bound
        return bound

    def client(self, body: Callable[[Exchange], Awaitable[Any]], **options: Any) -> Any:
        """The result of `body`, run as a client."""
        return self.kernel.run(self.add_client(body, **options))
