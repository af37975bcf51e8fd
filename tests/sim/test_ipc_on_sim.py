"""The same client and service code on the simulated kernel: what the tiny kernel cannot show."""

from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from nexus.abi import (
    BootImage,
    Event,
    Kill,
    Nanos,
    Now,
    Program,
    Spawn,
    Spawned,
    SpawnSpec,
    TaskStats,
    Wait,
    service_id,
)
from nexus.ipc import (
    CONTROL_TERMS,
    Bulk,
    Exchange,
    Peers,
    Refused,
    Stale,
    TimedOut,
    Unknown,
    Way,
    accept_bulk,
    deadline_after,
    offer_bulk,
)
from nexus.kernel.sim import SimKernel
from nexus.protocols.meta import GetStatus, Health, Healthy, ServiceStatus, Stop, Stopping
from nexus.runtime import serve
from tests.fakes.adder import ADDER, Add, Adder, AdderStatus, Later, Sum
from tests.fakes.pair import SEED

pytestmark = pytest.mark.sim

SECOND = 1_000_000_000
RUN_SPAN = 60 * SECOND


async def adder_main(boot: BootImage) -> int:
    return await serve(Adder(), ADDER, boot, Peers(boot, SEED))


ADDER_PROGRAM = Program(name="adder", main=adder_main, digest="00" * 32)


class Root:
    """What a test's root task works with."""

    def __init__(self, boot: BootImage) -> None:
        self.boot = boot
        self.peers = Peers(boot, SEED)

    async def spawn(self) -> Spawned:
        return await Spawn(SpawnSpec("adder", "adder", control=self.boot.endpoint))

    async def bound(self, spawned: Spawned) -> Exchange:
        bound = await self.peers.bind(
            Way(
                slot=spawned.slot,
                protocol=ADDER,
                name="adder",
                service=spawned.service,
                generation=spawned.generation,
                terms=CONTROL_TERMS,
                reply_terms=CONTROL_TERMS,
            ),
            await self.ahead(SECOND),
        )
        assert isinstance(bound, Exchange), bound
        return bound

    async def ahead(self, span: int) -> Nanos:
        return deadline_after(await Now(), Nanos(span))


def run(body: Callable[[Root], Awaitable[Any]], *, trace: bool = False) -> tuple[Any, list[Event]]:
    results: list[Any] = []
    events: list[Event] = []

    async def main(boot: BootImage) -> int:
        results.append(await body(Root(boot)))
        return 0

    kernel = SimKernel({"adder": ADDER_PROGRAM}, seed=1, recorder=events.append, trace=trace)
    root = Program(name="init-lite", main=main, digest="11" * 32)
    exit_info = kernel.run(root, b"", until=Nanos(kernel.now + RUN_SPAN))
    assert exit_info.code == 0, [event for event in events if event.kind.value == "exit"]
    return results[0], events


def test_a_typed_call_a_refusal_and_a_deferred_reply() -> None:
    async def body(root: Root) -> Any:
        adder = await root.bound(await root.spawn())
        deadline = await root.ahead(SECOND)
        asleep = await adder.start(Later(5, 10_000_000), deadline)
        outcomes: list[Any] = [
            await adder.call(Add(1, 2), deadline),
            await adder.call(Add(999, 2), deadline),
            *await adder.call_many([Add(1, 1), Add(2, 2)], deadline),
            await adder.finish(asleep),
            await adder.call(Later(1, 4 * SECOND), await root.ahead(1_000_000)),
        ]
        return [*outcomes, adder.generation]

    outcomes, _ = run(body)

    assert outcomes == [
        Sum(3),
        Refused(AdderStatus.TOO_LARGE),
        Sum(2),
        Sum(4),
        Sum(5),
        TimedOut(),
        1,
    ]


def test_meta_is_answered_and_ready_is_printed_once() -> None:
    async def body(root: Root) -> Any:
        adder = await root.bound(await root.spawn())
        deadline = await root.ahead(SECOND)
        health = [await adder.call(Health(), deadline) for _ in range(2)]
        status = await adder.call(GetStatus(), deadline)
        stopping = await adder.call(Stop(), deadline)
        return health, status, stopping

    (health, status, stopping), events = run(body)

    assert all(isinstance(each, Healthy) for each in health)
    assert isinstance(status, ServiceStatus)
    assert [(row.service, row.requests) for row in status.senders] == [(service_id("init-lite"), 4)]
    assert status.counters[0] == 3, "slots: control link, endpoint, one reply link"
    assert stopping == Stopping()
    lines = [event.fields["line"] for event in events if event.kind.value == "console"]
    assert lines == ["adder: ready"]


def test_a_killed_service_is_unknown_in_flight_and_stale_afterwards() -> None:
    async def body(root: Root) -> Any:
        spawned = await root.spawn()
        adder = await root.bound(spawned)
        started = await adder.start(Later(1, 4 * SECOND), await root.ahead(SECOND))
        _ = await adder.call(Add(1, 1), await root.ahead(SECOND))
        before = await TaskStats()
        await Kill(spawned.pid)
        _ = await Wait(spawned.pid, await root.ahead(SECOND))
        cut_off = await adder.finish(started)
        adder.peer.alive = True
        late = await adder.call(Add(1, 1), await root.ahead(SECOND))
        await root.peers.discard(adder.peer)
        return cut_off, late, before, await TaskStats()

    (cut_off, late, before, after), _ = run(body)

    assert (cut_off, late) == (Unknown(), Stale())
    assert after.slots == before.slots - 1
    assert after.links == before.links - 1, "the child's control link ends at our own endpoint"


def test_bulk_bytes_travel_as_a_sealed_vmo() -> None:
    async def body(root: Root) -> Any:
        slot = await offer_bulk(bytes(range(256)) * 64)
        bulk = await accept_bulk(slot, 300, 5)
        assert isinstance(bulk, Bulk)
        data = bytes(bulk.view)
        await bulk.release()
        return data

    data, _ = run(body)

    assert data == bytes(range(44, 49))


def test_a_round_trip_is_one_trap_on_each_side() -> None:
    def traps(count: int) -> Counter[str]:
        async def body(root: Root) -> Any:
            adder = await root.bound(await root.spawn())
            deadline = await root.ahead(30 * SECOND)
            return [await adder.call(Add(1, 2), deadline) for _ in range(count)]

        outcomes, events = run(body, trace=True)
        assert outcomes == [Sum(3)] * count
        return Counter(str(event.fields["trap"]) for event in events if event.kind.value == "trap")

    assert traps(110) - traps(10) == {"Call": 100, "ReplyRecv": 100}
