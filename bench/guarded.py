"""The two services of bench/guarded.toml: one that asks before it answers, and one that times it.

`GuardedEcho` serves a request unguarded or behind `authority.require`. `Timer` calls it in
three ways and says what each took on the console, one line per round and way.
"""

import time
from typing import Annotated, Final

import msgspec

from bench.echo import BENCH_DATA
from bench.measure import WARMUP_NS, summarise
from nexus.abi import ConsoleWrite, Nanos
from nexus.ipc import Client, deadline_after
from nexus.protocols.policyd import TARGET_SIZE_MAX
from nexus.runtime import Call
from nexus.runtime.program import Context
from nexus.wire import Blob, Bool, Message, Protocol, ReplyStatus, Request, Text

RIGHT: Final = "bench.read"
DATA_SIZE_MAX: Final = 64  # bytes
CALL_NS_MAX: Final = Nanos(2_000_000_000)  # ns for one call; a loaded machine answers within it
MILLISECOND: Final = 1_000_000  # ns
SAMPLE_LINE: Final = "bench.timer: sample"
DONE_LINE: Final = "bench.timer: done"

UNGUARDED: Final = "unguarded"
KEPT: Final = "kept decision"
ASKED: Final = "policyd asked each time"
WAYS: Final = (UNGUARDED, KEPT, ASKED)


class Found(Message):
    """What was found."""

    data: Annotated[bytes, Blob(size_max=DATA_SIZE_MAX)]


class Look(Request[Found], op=1, idempotent=True):
    """Read `target`; `guarded` has the service ask first whether the caller may."""

    guarded: Annotated[bool, Bool()]
    target: Annotated[str, Text(size_max=TARGET_SIZE_MAX)]


PROTOCOL: Final = Protocol("bench-guarded", number=1001, version=1, requests=(Look,))


class Order(msgspec.Struct, frozen=True):
    """What to measure: so many rounds of all three ways, each of `span` ms."""

    rounds: int
    span: int


class GuardedEcho:
    """Answers with the same bytes each time."""

    def __init__(self, context: Context) -> None:
        self._authority = context.authority

    async def handle(self, call: Call, request: Look) -> Found:
        """The bytes, if the caller may have them."""
        if request.guarded:
            await self._authority.require(call, RIGHT, request.target)
        return Found(BENCH_DATA)


class Timer:
    """Measures once, when it is ready; it answers nobody meanwhile."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._order = context.settings_as(Order)
        self._client: Client | None = None
        self._asked = 0

    async def start(self) -> None:
        """Find the service."""
        self._client = await self._context.client("bench.guarded", PROTOCOL)

    def handle(self, call: Call, _request: Look) -> Found:
        """It serves nothing."""
        raise call.refuse(ReplyStatus.BUSY)

    def next_time(self) -> Nanos | None:
        """At once, and never again."""
        return None if self._client is None else self._context.boot.now

    async def on_time(self, _now: Nanos) -> None:
        """Take all samples."""
        client, self._client = self._client, None
        assert client is not None, "called when next_time said so"
        for number in range(self._order.rounds):
            for way in WAYS if number % 2 == 0 else reversed(WAYS):
                await self._sample(client, way)
        await ConsoleWrite(DONE_LINE)

    def _request(self, way: str) -> Look:
        if way == ASKED:
            self._asked += 1  # a target that nobody has asked about: nothing is kept of it
            return Look(guarded=True, target=f"target {self._asked:08d}")
        return Look(guarded=way == KEPT, target="target 00000000")

    async def _sample(self, client: Client, way: str) -> None:
        clock = time.perf_counter_ns
        samples: list[int] = []
        start = clock()
        end = start + WARMUP_NS + self._order.span * MILLISECOND
        while (before := clock()) < end:
            deadline = deadline_after(await self._context.now(), CALL_NS_MAX)
            request = self._request(way)
            called = clock()
            reply = await client.call(request, deadline)
            if before >= start + WARMUP_NS:
                samples.append(clock() - called)
            assert type(reply) is Found, f"{way}: {reply}"
        sample = summarise(samples, end - start - WARMUP_NS, 0, 1)
        evidence = {"way": way, "count": sample.count, "p50": sample.p50_ns, "p99": sample.p99_ns}
        await ConsoleWrite(SAMPLE_LINE, msgspec.json.encode(evidence))
