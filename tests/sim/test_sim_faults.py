"""Injected faults: planned and seeded ones, what they may answer, and that they stop."""

from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from nexus.abi import (
    NEVER,
    NO_WAIT,
    AbiError,
    BlockFlush,
    BlockRead,
    BlockWrite,
    BootImage,
    BootMemoryReplace,
    Call,
    CapClone,
    CapDerive,
    ConsoleWrite,
    EndpointCreate,
    EntropyDraw,
    Event,
    EventKind,
    LinkCreate,
    Nanos,
    Now,
    Pid,
    PortSend,
    Program,
    Recv,
    ReplyRecv,
    Rights,
    SecretRead,
    SecretReplace,
    Send,
    SleepUntil,
    Spawn,
    SpawnLastError,
    SpawnReason,
    SpawnSpec,
    Status,
    TaskStats,
    Trap,
    VmoCreate,
    Wait,
)
from nexus.kernel.sim import FAILURES, FaultPoint, Faults, Forge, NthFailure, Plan, SimKernel
from nexus.kernel.sim.faults import DELIVERY_DELAY_MAX, TIMER_DELAY_MAX, WAKE_DELAY_MAX

Main = Callable[[BootImage], Coroutine[Trap[Any], Any, int | None]]
MS = 1_000_000


def run(main: Main, plan: Plan, **programs: Main) -> tuple[Faults, list[Event]]:
    events: list[Event] = []
    table = {name: Program(name=name, main=task, digest=name) for name, task in programs.items()}
    faults = Faults(plan)
    kernel = SimKernel(table, seed=1, recorder=events.append, faults=faults)
    root = Program(name="root", main=main, digest="root")
    kernel.run(root, b"", until=Nanos(kernel.now + 60_000 * MS))
    assert kernel.crashes == []
    assert set(kernel.resources().values()) == {0}
    return faults, events


async def one_child(boot: BootImage) -> None:
    child = await Spawn(SpawnSpec("child", "child", boot.endpoint))
    end = await Wait(child.pid, NEVER)
    assert end.code == 0


async def everything(boot: BootImage) -> list[tuple[type[Trap[Any]], Status]]:
    """One of each trap that may be made to fail; which were refused, and how."""
    answers: list[tuple[type[Trap[Any]], Status]] = []

    async def attempt(trap: Trap[Any]) -> Any:
        try:
            return await trap
        except AbiError as refusal:
            answers.append((type(trap), refusal.status))
            return None

    soon = Nanos(await Now() + MS)
    await attempt(EndpointCreate())
    link = await attempt(LinkCreate(boot.endpoint))
    if link is not None:
        await attempt(CapClone(link.slot))
        await attempt(CapDerive(link.slot, Rights.SEND))
        await attempt(Send(link.slot, b"one", deadline=soon))
        await attempt(Recv((boot.endpoint,), soon))
        trap = Call(link.slot, b"two", boot.endpoint, link.link, soon)
        if await attempt(trap) is None and trap.sent:
            await Recv((boot.endpoint,), NO_WAIT)
        reply = ReplyRecv((boot.endpoint,), soon)
        reply.slot, reply.data = link.slot, b"three"
        try:
            await reply
        except AbiError:
            assert reply.reply_status is not None
        if reply.reply_status is not None:
            answers.append((ReplyRecv, Status(reply.reply_status)))
    await attempt(VmoCreate(1))
    await attempt(ConsoleWrite("line"))
    return answers


SERVICE_FAILURES = [
    (trap, status)
    for trap, statuses in FAILURES.items()
    for status in statuses
    # Traps of the root alone, and those that need a port, a device or a secret: see
    # test_sim_root_traps, test_sim_ports and test_sim_devices.
    if trap not in (Spawn, Wait, BootMemoryReplace, PortSend)
    and trap not in (BlockRead, BlockWrite, BlockFlush, EntropyDraw, SecretRead, SecretReplace)
]


@pytest.mark.parametrize(
    ("trap", "status"),
    SERVICE_FAILURES,
    ids=lambda value: value.name if isinstance(value, Status) else value.__name__,
)
def test_the_nth_failure_of_a_trap_answers_what_was_planned_and_nothing_else(
    trap: type[Trap[Any]], status: Status
) -> None:
    told: list[tuple[type[Trap[Any]], Status]] = []

    async def child(boot: BootImage) -> None:
        told.extend(await everything(boot))

    plan = Plan(nth=(NthFailure(trap=trap, nth=1, status=status),))
    faults, events = run(one_child, plan, child=child)

    assert told[0] == (trap, status)
    assert {kind for kind, _ in told} <= {trap, Recv}, "without its message a receive times out"
    assert faults.counts()["nth"][1] == 1
    fields = next(event.fields for event in events if event.kind is EventKind.FAULT)
    assert fields["trap"] == trap.__name__


def test_the_nth_failure_counts_from_one_and_may_persist() -> None:
    async def child(boot: BootImage) -> None:
        once, ever = [], []
        for _ in range(5):
            try:
                await VmoCreate(1)
                once.append("ok")
            except AbiError:
                once.append("no")
            try:
                await EndpointCreate()
                ever.append("ok")
            except AbiError:
                ever.append("no")
        assert once == ["ok", "ok", "no", "ok", "ok"]
        assert ever == ["ok", "no", "no", "no", "no"]

    plan = Plan(
        nth=(
            NthFailure(trap=VmoCreate, nth=3, status=Status.NO_SPACE),
            NthFailure(trap=EndpointCreate, nth=2, status=Status.NO_SPACE, persistent=True),
        )
    )
    faults, _ = run(one_child, plan, child=child)

    assert faults.occurrences(0) == 5


def test_a_planned_failure_of_the_root_needs_its_name() -> None:
    async def main(boot: BootImage) -> None:
        spec = SpawnSpec("child", "child", boot.endpoint)
        with pytest.raises(AbiError):
            await Spawn(spec)
        assert await SpawnLastError() is SpawnReason.OOM
        child = await Spawn(spec)
        await Wait(child.pid, NEVER)

    async def child(boot: BootImage) -> None:
        return None

    failure = NthFailure(trap=Spawn, nth=1, status=Status.NO_SPACE, task="init-lite")
    _, events = run(main, Plan(nth=(failure,)), child=child)

    assert sum(event.kind is EventKind.SPAWN_FAILED for event in events) == 1


def test_a_forged_stamp_is_refused_and_counted_at_the_receiver() -> None:
    async def main(boot: BootImage) -> None:
        child = await Spawn(SpawnSpec("child", "child", boot.endpoint))
        got = [(await Recv((boot.endpoint,), Nanos(await Now() + 10 * MS))).data for _ in range(3)]
        assert got == [b"0", b"1", b"2"]
        with pytest.raises(AbiError) as empty:
            await Recv((boot.endpoint,), Nanos(await Now() + MS), link=child.link)
        assert empty.value.status in (Status.NO_SUCH_ENDPOINT, Status.TIMED_OUT)
        assert (await TaskStats()).refused_identity == 2
        await Wait(child.pid, NEVER)

    async def child(boot: BootImage) -> None:
        assert boot.control is not None
        for number in range(3):
            await Send(boot.control, b"%d" % number)

    plan = Plan(
        forge=(
            Forge(task="child", nth=1, pid=Pid(0)),
            Forge(task="child", nth=2, pid=Pid(9999), receiver="init-lite"),
        )
    )
    _, events = run(main, plan, child=child)

    reasons = [event.fields["reason"] for event in events if event.kind is EventKind.REFUSED]
    assert reasons == ["identity", "identity"]


def test_after_stop_at_nothing_fires() -> None:
    async def child(boot: BootImage) -> None:
        refused = 0
        start = await Now()
        while await Now() < start + 10 * MS:
            try:
                await ConsoleWrite("line")
            except AbiError as refusal:
                assert refusal.status is Status.QUEUE_FULL
                refused += 1
                assert await Now() < start + 6 * MS
        assert refused > 10

    plan = Plan(chances={FaultPoint.QUEUE_FULL: 500_000}, span=Nanos(5 * MS))
    faults, _ = run(one_child, plan, child=child)

    reached, fired = faults.counts()["queue_full"]
    assert reached > 2 * fired > 0


def test_a_send_that_is_made_to_time_out_waits_for_its_deadline() -> None:
    async def child(boot: BootImage) -> None:
        assert boot.control is not None
        deadline = Nanos(await Now() + 3 * MS)
        with pytest.raises(AbiError) as refusal:
            await Send(boot.control, b"x", deadline=deadline)
        assert refusal.value.status is Status.TIMED_OUT
        assert deadline <= await Now() < deadline + MS
        await Send(boot.control, b"x")  # without a deadline it cannot time out

    run(one_child, Plan(chances={FaultPoint.TIMED_OUT: 1_000_000}), child=child)


def test_timers_and_wake_ups_are_late_within_their_bounds_and_never_early() -> None:
    late: list[int] = []

    async def child(boot: BootImage) -> None:
        for _ in range(50):
            asked = Nanos(await Now() + MS)
            late.append(await SleepUntil(asked) - asked)

    both = {FaultPoint.LATE_TIMER: 500_000, FaultPoint.LATE_WAKE: 500_000}
    run(one_child, Plan(chances=both), child=child)

    assert min(late) == 0
    assert MS // 10 < max(late) <= TIMER_DELAY_MAX + WAKE_DELAY_MAX + MS // 10


def test_a_late_delivery_keeps_order_and_loses_nothing() -> None:
    async def main(boot: BootImage) -> None:
        child = await Spawn(SpawnSpec("child", "child", boot.endpoint))
        for number in range(100):
            message = await Recv((boot.endpoint,), Nanos(await Now() + 2 * DELIVERY_DELAY_MAX))
            assert message.data[0] == number
        await Wait(child.pid, NEVER)

    async def child(boot: BootImage) -> None:
        assert boot.control is not None
        for number in range(100):
            await Send(boot.control, bytes([number]), deadline=NEVER)

    faults, _ = run(main, Plan(chances={FaultPoint.LATE_DELIVERY: 300_000}), child=child)

    assert faults.counts()["late_delivery"][1] > 5


def test_a_kill_at_a_trap_hits_only_the_named_tasks_and_never_the_root() -> None:
    async def main(boot: BootImage) -> None:
        signals = {}
        for name in ("victim", "spared"):
            child = await Spawn(SpawnSpec(name, "child", boot.endpoint))
            signals[name] = (await Wait(child.pid, NEVER)).signal
        assert signals == {"victim": 9, "spared": 0}

    async def child(boot: BootImage) -> None:
        for _ in range(10):
            await Now()

    plan = Plan(chances={FaultPoint.KILL: 1_000_000}, tasks=frozenset({"victim"}))
    faults, _ = run(main, plan, child=child)

    assert faults.counts()["kill"] == (1, 1)
