"""The service of bench/stated.toml that times statefsd as a client of it does.

One line per round and way on the console. Times include the client, two passages through the
kernel, the decision that is kept, the store, and for a durable write the device.
"""

import time
from collections.abc import Awaitable, Callable
from typing import Final

import msgspec

from bench.measure import WARMUP_NS, summarise
from nexus.abi import ConsoleWrite, Nanos
from nexus.ipc import Client, deadline_after
from nexus.protocols import statefsd
from nexus.protocols.statefsd import Durability, Get, Put, Stored, Value
from nexus.runtime import Call
from nexus.runtime.program import Context
from nexus.wire import Message, Protocol, ReplyStatus, Request

CALL_NS_MAX: Final = Nanos(2_000_000_000)  # ns for one call; a loaded disk answers within it
MILLISECOND: Final = 1_000_000  # ns
VALUE: Final = bytes(range(100))  # as the engine's own part of the benchmark
KEYS: Final = 1000  # keys that are put and got in turn
GROUP: Final = 64
SAMPLE_LINE: Final = "bench.stated: sample"
DONE_LINE: Final = "bench.stated: done"

DURABLE: Final = "durable put"
ACCEPTED: Final = "accepted put"
TOGETHER: Final = "durable put, 64 at once (per put)"
GOT: Final = "get"
WAYS: Final = (DURABLE, ACCEPTED, TOGETHER, GOT)


class Nothing(Message):
    """It serves nothing."""


class Ask(Request[Nothing], op=1, idempotent=True):
    """It serves nothing."""


PROTOCOL: Final = Protocol("bench-stated", number=1002, version=1, requests=(Ask,))


class Order(msgspec.Struct, frozen=True):
    """What to measure: so many rounds of all ways, each of `span` ms."""

    rounds: int
    span: int


class Timer:
    """Measures once, when it is ready; it answers nobody meanwhile."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._order = context.settings_as(Order)
        self._client: Client | None = None
        self._count = 0

    async def start(self) -> None:
        """Find statefsd."""
        self._client = await self._context.client("statefsd", statefsd.PROTOCOL)

    def handle(self, call: Call, _request: Ask) -> Nothing:
        """It serves nothing."""
        raise call.refuse(ReplyStatus.BUSY)

    def next_time(self) -> Nanos | None:
        """At once, and never again."""
        return None if self._client is None else self._context.boot.now

    async def on_time(self, _now: Nanos) -> None:
        """Take all samples."""
        client, self._client = self._client, None
        assert client is not None, "called when next_time said so"
        for number in range(KEYS):
            await self._put(client, Durability.ACCEPTED, number)
        for number in range(self._order.rounds):
            for way in WAYS if number % 2 == 0 else reversed(WAYS):
                await self._sample(client, way)
        await ConsoleWrite(DONE_LINE)

    async def _sample(self, client: Client, way: str) -> None:
        once, puts = self._way(client, way)
        clock = time.perf_counter_ns
        samples: list[int] = []
        start = clock()
        end = start + WARMUP_NS + self._order.span * MILLISECOND
        while (before := clock()) < end:
            self._count += 1
            called = clock()
            await once()
            if before >= start + WARMUP_NS:
                samples.append(clock() - called)
        sample = summarise(samples, end - start - WARMUP_NS, 0, puts)
        evidence = {
            "way": way,
            "count": sample.count,
            "p50": sample.p50_ns / puts,
            "p99": sample.p99_ns / puts,
        }
        await ConsoleWrite(SAMPLE_LINE, msgspec.json.encode(evidence))

    def _way(self, client: Client, way: str) -> tuple[Callable[[], Awaitable[None]], int]:
        """One call of a way, and how many requests are in it."""
        match way:
            case "durable put":
                return lambda: self._put(client, Durability.DURABLE, self._count), 1
            case "accepted put":
                return lambda: self._put(client, Durability.ACCEPTED, self._count), 1
            case "get":
                return lambda: self._get(client), 1
            case _:
                return lambda: self._together(client), GROUP

    async def _put(self, client: Client, durability: Durability, number: int) -> None:
        deadline = deadline_after(await self._context.now(), CALL_NS_MAX)
        reply = await client.call(self._request(durability, number), deadline)
        assert type(reply) is Stored, reply
        assert reply.durable or durability is Durability.ACCEPTED

    async def _together(self, client: Client) -> None:
        deadline = deadline_after(await self._context.now(), CALL_NS_MAX)
        started = [
            await client.start(self._request(Durability.DURABLE, self._count + index), deadline)
            for index in range(GROUP)
        ]
        for each in started:
            reply = await client.finish(each)
            assert type(reply) is Stored, reply
            assert reply.durable

    async def _get(self, client: Client) -> None:
        deadline = deadline_after(await self._context.now(), CALL_NS_MAX)
        reply = await client.call(Get(self._key(self._count)), deadline)
        assert type(reply) is Value, reply

    def _request(self, durability: Durability, number: int) -> Put:
        return Put(self._key(number), VALUE, durability, 0)

    def _key(self, number: int) -> bytes:
        return b"/state/bench/%06d" % (number % KEYS)
