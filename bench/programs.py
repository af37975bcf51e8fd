"""The programs of our own variants, the same on both kernels.

`root` starts an echo server and a client where the placement says, brings them together and
hands on what the client measured. It reads the CPU time of both when the client says so, which
a confined task cannot do itself.

The client of the bare exchange and its server await ABI traps and nothing else. The typed ones
are a service and its client as in production: runtime and ipc, with nothing switched off. The
calls of a run share one absolute deadline, which is checked at both ends like any other.
"""

import os
import time
from collections.abc import Callable, Coroutine
from typing import Any, Final

import msgspec

from bench.echo import BENCH_DATA, BENCH_KEY, PROTOCOL, Data, Read
from bench.measure import (
    PAYLOAD_SIZE,
    WARMUP_NS,
    Placement,
    Sample,
    cpu_time_ns,
    summarise,
)
from nexus.abi import (
    NEVER,
    BootImage,
    Call,
    Kill,
    LinkCreate,
    LinkTerms,
    Nanos,
    Now,
    PeerGone,
    Program,
    Recv,
    ReplyRecv,
    Send,
    Spawn,
    SpawnSpec,
    Trap,
    Wait,
    service_id,
)
from nexus.ipc import Client, Exchange, Peers, RetryTokens, Way
from nexus.metrics import METRICSD_NAME, Metrics
from nexus.runtime import Call as RuntimeCall
from nexus.runtime import Server

TERMS: Final = LinkTerms()  # depth 8 and the largest share, as a link of a plan has by default
SETUP_NS: Final = 20_000_000_000  # ns; a machine under load still starts two tasks within it
BATCH_COUNT: Final = 64  # requests of one packet
TRACE_SEED: Final = bytes(16)
DIGEST: Final = "0" * 64  # a benchmark has no file of its own
VIRTUAL_PER_WALL_MAX: Final = 10  # a simulated clock runs that much faster at most
SERVER: Final = "bench.server"
CLIENT: Final = "bench.client"


def run_deadline(now: Nanos, seconds: float) -> Nanos:
    """When a run of so many seconds of wall-clock time is over on any kernel's clock."""
    return Nanos(now + SETUP_NS + int(seconds * 1e9) * VIRTUAL_PER_WALL_MAX)


class Order(msgspec.Struct, frozen=True):
    """What the client is told: how long to measure, in wall-clock seconds."""

    seconds: float


Main = Callable[[BootImage], Coroutine[Trap[Any], Any, int | None]]
"""The main function of a task."""


def program(name: str, main: Main) -> Program:
    """A program table entry."""
    return Program(name=name, main=main, digest=DIGEST)


async def bare_server(boot: BootImage) -> int:
    """Answer every message with itself, over the link that came with the first one."""
    exchange = ReplyRecv((boot.endpoint,), NEVER)
    reply_slot = None
    while True:
        try:
            data, _, _, cap, _, _ = await exchange
        except PeerGone:
            exchange.slot = None
            continue
        if cap is not None:
            reply_slot = cap
            exchange.slot = None
            continue
        exchange.slot = reply_slot
        exchange.data = data


async def bare_client(boot: BootImage) -> int:
    """Time `Call` of 64 bytes against the server's `ReplyRecv`."""
    order = msgspec.msgpack.decode(boot.argument, type=Order)
    assert boot.control is not None
    go = await Recv((boot.endpoint,), Nanos(await Now() + SETUP_NS))
    assert go.cap is not None
    reply = await LinkCreate(boot.endpoint, TERMS)
    assert reply.link is not None
    await Send(go.cap, b"bind", move=reply.slot, deadline=Nanos(await Now() + SETUP_NS))
    payload = bytes(PAYLOAD_SIZE)
    call = Call(go.cap, payload, boot.endpoint, reply.link, Nanos(0))
    clock = time.perf_counter_ns
    end = clock() + WARMUP_NS
    call.deadline = run_deadline(await Now(), order.seconds)
    while clock() < end:
        await call
    samples: list[int] = []
    keep = samples.append
    await tell(boot, b"start")
    start = last = clock()
    end = start + int(order.seconds * 1e9)
    while last < end:
        await call
        now = clock()
        keep(now - last)
        last = now
    await tell(boot, b"stop")
    await report(boot, summarise(samples, last - start, 0, 1))
    return 0


class EchoService:
    """Serves bench.echo: a service like any other, whose work is next to nothing."""

    def handle(self, _call: RuntimeCall, request: Read) -> Data:
        """Answer with as many fields as were asked with."""
        return Data(request.size > 0, BENCH_DATA)


async def typed_server(boot: BootImage) -> int:
    """The production runtime around EchoService."""
    return await Server(EchoService(), PROTOCOL, boot).run()


class ObservedService(EchoService):
    """The same, counting each request and how large its offset was."""

    def __init__(self, metrics: Metrics) -> None:
        self.requests = metrics.counter("requests_total")
        self.offsets = metrics.histogram("offsets")

    def handle(self, call: RuntimeCall, request: Read) -> Data:
        """As EchoService.handle."""
        self.requests.inc()
        self.offsets.observe(request.offset)
        return super().handle(call, request)


async def observed_server(boot: BootImage) -> int:
    """As typed_server, with a page: each request is a span, two updates beside it."""
    metrics = Metrics(Peers(boot, TRACE_SEED), (METRICSD_NAME,))
    service = ObservedService(metrics)
    await metrics.begin()
    assert metrics.recorder.page is not None
    for word, series in ((0, service.requests), (1, service.offsets)):
        series.place(metrics.recorder.page, word)
    return await Server(service, PROTOCOL, boot, recorder=metrics.recorder).run()


async def _connect(boot: BootImage) -> Client:
    """A production client of the server, over a link that root hands out as init would."""
    setup = Nanos(await Now() + SETUP_NS)
    go = await Recv((boot.endpoint,), setup)
    assert go.cap is not None
    peers = Peers(boot, TRACE_SEED)
    bound = await peers.bind(
        Way(
            slot=go.cap,
            protocol=PROTOCOL,
            name=SERVER,
            service=service_id(SERVER),
            generation=1,
            terms=TERMS,
            reply_terms=TERMS,
        ),
        setup,
    )
    assert isinstance(bound, Exchange), f"no connection: {bound}"
    return Client(peers, PROTOCOL, bound.peer, RetryTokens())


async def typed_client(boot: BootImage) -> int:
    """Time `client.call` with a fresh request and a checked reply each time."""
    order = msgspec.msgpack.decode(boot.argument, type=Order)
    client = await _connect(boot)
    deadline = run_deadline(await Now(), order.seconds)
    clock = time.perf_counter_ns
    end = clock() + WARMUP_NS
    offset = 0
    while clock() < end:
        offset += 1
        reply = await client.call(Read(BENCH_KEY, offset, 9), deadline)
        assert type(reply) is Data, f"refused: {reply}"
    samples: list[int] = []
    keep = samples.append
    await tell(boot, b"start")
    start = last = clock()
    end = start + int(order.seconds * 1e9)
    while last < end:
        offset += 1
        reply = await client.call(Read(BENCH_KEY, offset, 9), deadline)
        assert type(reply) is Data
        now = clock()
        keep(now - last)
        last = now
    await tell(boot, b"stop")
    await report(boot, summarise(samples, last - start, 0, 1))
    return 0


async def pipelined_client(boot: BootImage) -> int:
    """Time `client.call_many` with 64 fresh requests, every reply checked."""
    order = msgspec.msgpack.decode(boot.argument, type=Order)
    client = await _connect(boot)
    deadline = run_deadline(await Now(), order.seconds)
    clock = time.perf_counter_ns
    end = clock() + WARMUP_NS
    first = 0
    samples: list[int] = []
    while clock() < end:
        await _call_batch(client, first, deadline)
        first += BATCH_COUNT
    await tell(boot, b"start")
    start = last = clock()
    end = start + int(order.seconds * 1e9)
    while last < end:
        await _call_batch(client, first, deadline)
        first += BATCH_COUNT
        now = clock()
        samples.append(now - last)
        last = now
    await tell(boot, b"stop")
    await report(boot, summarise(samples, last - start, 0, BATCH_COUNT))
    return 0


async def _call_batch(client: Client, first: int, deadline: Nanos) -> None:
    requests = [Read(BENCH_KEY, offset, 9) for offset in range(first, first + BATCH_COUNT)]
    replies = await client.call_many(requests, deadline)
    assert len(replies) == BATCH_COUNT
    for reply in replies:
        assert type(reply) is Data, f"refused: {reply}"


async def tell(boot: BootImage, word: bytes) -> None:
    """Say a word to root and wait until it has acted."""
    assert boot.control is not None
    deadline = Nanos(await Now() + SETUP_NS)
    await Send(boot.control, word, deadline=deadline)
    while (await Recv((boot.endpoint,), deadline)).data != word:
        pass


async def report(boot: BootImage, sample: Sample) -> None:
    """Hand the result to root."""
    assert boot.control is not None
    deadline = Nanos(await Now() + SETUP_NS)
    await Send(boot.control, msgspec.msgpack.encode(sample), deadline=deadline)


class Root:
    """The root task of one measured run. `sample` is set when it has ended well."""

    def __init__(self, placement: Placement | None, seconds: float) -> None:
        self.placement = placement
        self.seconds = seconds
        self.sample: Sample | None = None

    async def main(self, boot: BootImage) -> int:
        """Start both, bring them together, collect the result."""
        deadline = run_deadline(await Now(), self.seconds)
        order = msgspec.msgpack.encode(Order(self.seconds))
        place = self.placement
        server = await Spawn(
            SpawnSpec(
                SERVER,
                SERVER,
                boot.endpoint,
                cpu=None if place is None else place.server,
                delegations=1,
            )
        )
        client = await Spawn(
            SpawnSpec(
                CLIENT, CLIENT, boot.endpoint, order, cpu=None if place is None else place.client
            )
        )
        link = await LinkCreate(server.slot, TERMS)
        await Send(client.slot, b"go", move=link.slot, deadline=deadline)
        # Simulated tasks have no processes: they all run in this one.
        pids = (os.getpid(),) if place is None else (server.pid, client.pid)
        before = spent = 0
        sample: Sample | None = None
        while sample is None:
            message = await Recv((boot.endpoint,), deadline, link=client.link)
            if message.data == b"start":
                before = cpu_time_ns(pids)
            elif message.data == b"stop":
                spent = cpu_time_ns(pids) - before
            else:
                sample = msgspec.msgpack.decode(message.data, type=Sample)
                continue
            await Send(client.slot, message.data, deadline=deadline)
        per_message = spent / (sample.count * sample.messages)
        self.sample = msgspec.structs.replace(sample, cpu_ns=per_message)
        await Wait(client.pid, deadline)
        await Kill(server.pid)
        await Wait(server.pid, deadline)
        return 0
