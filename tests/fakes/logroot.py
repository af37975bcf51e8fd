"""logd and its clients as real tasks of any kernel, under a root that only knows routes.

A client's body runs in its own task, which is another process on linux: it asserts there, and what
the test wants to see it hands over as JSON on the console.
"""

import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import msgspec

from nexus.abi import (
    AbiError,
    BootImage,
    ConsoleWrite,
    EventKind,
    Kill,
    LinkCreate,
    LinkTerms,
    Nanos,
    Now,
    Recv,
    Send,
    Spawn,
    Spawned,
    SpawnSpec,
    Status,
    TaskStats,
    Wait,
    service_id,
)
from nexus.ipc import Client, Exchange, Peer, Peers, RetryBudget
from nexus.ipc.exchange import ECHO
from nexus.log import LOGD_NAME, Logger
from nexus.protocols.init import PROTOCOL as INIT
from nexus.protocols.init import REPLY_NAME, InitStatus, Route, Routed
from nexus.protocols.logd import (
    EVERY_RECORD,
    THIS_BOOT,
    GetStats,
    Query,
    Record,
    Records,
    Stats,
)
from nexus.protocols.logd import PROTOCOL as LOGD
from nexus.runtime import Call, Server, serve
from nexus.services.logd.config import Settings
from nexus.services.logd.service import Logd
from nexus.testing.rig import Rig, Run
from nexus.wire import Protocol, answer, encode
from tests.fakes.adder import ADDER, Adder
from tests.fakes.gate import ListGate
from tests.fakes.pair import SEED

MS = 1_000_000
SECOND = 1_000 * MS
PATIENCE = 20 * SECOND  # for what takes a moment on a free machine
TERMS = LinkTerms(8, 16 * 1024, 0)
STEP = 50 * MS
OWNER_SIZE = 160 * 1024  # bytes of links of each task, so that six of them fit the default total
RESTART = "restart-logd"  # a route nobody has: the root starts logd again instead
READER = "client"  # the one that may read
BESIDE = "beside"  # the one that runs while the others do
RESULT = "result"

NO_STATS = msgspec.convert([0] * (len(Stats.__struct_fields__) - 1) + [[]], Stats)  # all zero
Body = Callable[["Task"], Awaitable[object]]


def query(since: int, count: int = 16) -> Query:
    """Every record of this boot from `since` on."""
    return Query(THIS_BOOT, since, count, EVERY_RECORD)


async def ahead(span: int) -> Nanos:
    return Nanos(await Now() + span)


class Task:
    """What a client's body works with."""

    def __init__(self, boot: BootImage) -> None:
        self.boot = boot
        self.peers = Peers(boot, SEED)
        self.log = Logger(self.peers, [LOGD_NAME])

    async def client(self, name: str = LOGD_NAME, protocol: Protocol = LOGD) -> Client:
        budget = RetryBudget(attempts_max=20, backoff=Nanos(MS), deadline=await ahead(PATIENCE))
        client = await self.peers.connect(name, protocol, budget)
        assert isinstance(client, Client), client
        return client

    async def ask(self, link: Exchange, request: Any) -> Any:
        return await link.call(request, await ahead(PATIENCE))

    async def settle(self, log: Logger | None = None) -> None:
        """Flush until nothing is due any more."""
        log = self.log if log is None else log
        until = await ahead(PATIENCE)
        while log.due and await Now() < until:
            await log.flush()
            await self.pause(MS)

    async def pause(self, span: int) -> None:
        """Let others run, without sleeping in a test: nobody ever sends to this endpoint."""
        try:
            _ = await Recv((self.boot.endpoint,), await ahead(span))
        except AbiError:
            return

    async def restart_logd(self) -> None:
        control = await self.peers.control(await ahead(PATIENCE))
        assert isinstance(control, Exchange)
        _ = await self.ask(control, Route(RESTART))

    async def stats(self, logd: Client) -> Stats:
        """STATS as the mission probes it: a moved reply capability into the shared inbox."""
        peers = self.peers
        inbox = await peers.inbox()
        way = await LinkCreate(inbox, TERMS)
        assert way.link is not None
        peer = Peer(
            logd.name,
            slot=logd.peer.slot,
            inbox=inbox,
            link=way.link,
            service=logd.peer.service,
            generation=logd.peer.generation,
            terms=TERMS,
            reply_terms=TERMS,
        )
        probe = Exchange(peers.caller, LOGD, peer)
        outcome = await probe.ask(GetStats(), await ahead(PATIENCE), move=way.slot)
        assert not isinstance(outcome, Exchange)
        reply = getattr(outcome, "reply", None)
        assert isinstance(reply, Stats), outcome
        return reply

    async def forged_stats(self) -> bytes:
        """A reply to the next request of this task that says zero everywhere."""
        nonce = self.peers.caller.correlator.nonces.take() + 1
        codec = LOGD.codecs[GetStats]
        header = codec.prefix + ECHO.pack(nonce, 0, bytes(24))
        return bytes(answer(header, 0, encode(NO_STATS)))

    async def have_sent(self, by: str, frame: bytes) -> None:
        """Let another task put `frame` into this task's inbox; it lies there afterwards."""
        other = await self.client(by, ADDER)
        before = (await TaskStats()).queued
        way = await LinkCreate(await self.peers.inbox(), TERMS)
        await Send(other.peer.slot, b"\x01" + frame, move=way.slot)
        while (await TaskStats()).queued == before:
            await self.pause(MS)

    async def records(self, logd: Client) -> list[Record]:
        """Everything that is kept, by paging."""
        found: list[Record] = []
        at = 1
        while True:
            page = await self.ask(logd, query(at))
            assert isinstance(page, Records), page
            found += page.records
            if page.next > page.total:
                return found
            at = page.next


class Sender(Server):
    """An adder that also puts bytes it was given into a link it was given."""

    def is_reply(self, data: bytes) -> bool:
        return data[:1] == b"\x01" or super().is_reply(data)

    async def _serve(self, message: Any) -> None:
        if message.data[:1] == b"\x01" and message.cap is not None:
            await Send(message.cap, message.data[1:])
            return
        await super()._serve(message)


async def mallory_main(boot: BootImage) -> int:
    return await Sender(Adder(), ADDER, boot).run()


class Root:
    """Starts the services, answers routes, and starts logd again when a client asks."""

    def __init__(self, boot: BootImage) -> None:
        self.boot = boot
        self.services: dict[str, Spawned] = {}

    async def start(self, name: str) -> Spawned:
        spec = SpawnSpec(
            name,
            name,
            control=self.boot.endpoint,
            delegations=16,
            endpoints=32,
            owner_size=OWNER_SIZE,
        )
        self.services[name] = await Spawn(spec)
        return self.services[name]

    async def handle(self, call: Call, request: Route) -> Routed:
        if request.name == REPLY_NAME:
            sender = call.sender
            return Routed(sender.service, sender.generation, *TERMS, TERMS.depth, TERMS.size)
        if request.name == RESTART:
            pid = self.services[LOGD_NAME].pid
            await Kill(pid)
            _ = await Wait(pid, await ahead(PATIENCE))
            _ = await self.start(LOGD_NAME)
        spawned = self.services.get(request.name)
        if spawned is None:
            raise call.refuse(InitStatus.ROUTE_NOT_FOUND)
        link = await LinkCreate(spawned.slot, TERMS)
        call.give_cap(link.slot)
        return Routed(spawned.service, spawned.generation, *TERMS, TERMS.depth, TERMS.size)

    async def run(self, clients: list[str]) -> None:
        """Start the services, then one client after the other; the one beside them from then on."""
        for name in (LOGD_NAME, "mallory"):
            _ = await self.start(name)
        server = Server(self, INIT, self.boot)
        started = [await self.start(name) for name in clients if name == BESIDE]
        for name in clients:
            if name != BESIDE:
                await self.see_to_its_end(server, await self.start(name))
        for spawned in started:
            await self.see_to_its_end(server, spawned)

    async def see_to_its_end(self, server: Server, spawned: Spawned) -> None:
        """Answer routes until this client has ended."""
        while not await self.is_over(spawned):
            _ = await server.step(await ahead(STEP))

    async def is_over(self, spawned: Spawned) -> bool:
        try:
            ended = await Wait(spawned.pid, Nanos(0))
        except AbiError as error:
            assert error.status is Status.QUEUE_EMPTY, error
            return False
        assert ended.code == 0, f"a client ended with {ended}"
        return True


def observe(rig: Rig, settings: Settings | None = None, **bodies: Body) -> tuple[Any, Run]:
    """What the reader's body returned, and the run; bodies are run one after the other."""

    async def logd_main(boot: BootImage) -> int:
        gate = ListGate(service_id(READER))
        return await serve(Logd(settings or Settings(), gate), LOGD, boot)

    def main_of(body: Body) -> Any:
        async def main(boot: BootImage) -> int:
            result = await body(Task(boot))
            if boot.name == READER:
                await ConsoleWrite(RESULT, json.dumps({"value": result}).encode())
            return 0

        return main

    async def root(boot: BootImage) -> None:
        await Root(boot).run(list(bodies))

    programs = {LOGD_NAME: logd_main, "mallory": mallory_main}
    programs |= {name: main_of(body) for name, body in bodies.items()}
    run = rig.observe(root, programs=programs)
    return result_of(run), run


def result_of(run: Run) -> Any:
    """What the reader's body handed over."""
    (fields,) = [fields for fields in run.fields(EventKind.CONSOLE) if fields["line"] == RESULT]
    return evidence_of(fields)["value"]


def evidence_of(fields: Mapping[str, object]) -> Any:
    evidence = fields["evidence"]
    return evidence if isinstance(evidence, dict) else json.loads(str(evidence))
