"""Scheduling: classes, aging, slices, placement, stealing, full queues."""

from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any

from nexus.abi import (
    NEVER,
    AbiError,
    BootImage,
    Event,
    Nanos,
    Now,
    Pid,
    Program,
    QosClass,
    SleepUntil,
    Spawn,
    SpawnLastError,
    SpawnReason,
    SpawnSpec,
    Status,
    Trap,
    Wait,
)
from nexus.kernel.core import SystemLimits
from nexus.kernel.sim import FaultPoint, Faults, Plan, SimKernel
from nexus.kernel.sim.sched import AGING_BOUND, QUEUE_COUNT_MAX, SLICE, TICK

Main = Callable[[BootImage], Coroutine[Trap[Any], Any, int | None]]
MS = 1_000_000
WIDE = SystemLimits(total_size=2 * 1024 * 1024, root_size=1024 * 1024)


def run(
    main: Main, *, cpu_count: int = 1, faults: Faults | None = None, **programs: Main
) -> SimKernel:
    events: list[Event] = []
    table = {name: Program(name=name, main=task, digest=name) for name, task in programs.items()}
    kernel = SimKernel(
        table, seed=1, recorder=events.append, cpu_count=cpu_count, limits=WIDE, faults=faults
    )
    root = Program(name="root", main=main, digest="root")
    kernel.run(root, b"", until=Nanos(kernel.now + 60_000 * MS))
    assert kernel.crashes == []
    return kernel


def spec(boot: BootImage, name: str, program: str, **options: Any) -> SpawnSpec:
    return SpawnSpec(
        name, program, boot.endpoint, owner_size=4096, endpoints=1, **{"budget": 1000, **options}
    )


def test_higher_classes_run_first_and_one_class_in_order() -> None:
    ran: list[str] = []

    async def main(boot: BootImage) -> None:
        children = []
        for qos in QosClass:
            for name in "ab":
                name = f"{qos.name.lower()}-{name}".replace("_", "")
                children.append(await Spawn(spec(boot, name, "note", qos=qos)))
        for child in children:
            await Wait(child.pid, NEVER)

    async def note(boot: BootImage) -> None:
        ran.append(boot.name)

    run(main, note=note)

    order = ["perfburst", "interactive", "normal", "idle"]
    assert ran == [f"{qos}-{name}" for qos in order for name in "ab"]


def test_a_task_that_never_waits_gives_way_after_its_slice() -> None:
    turns: list[str] = []

    async def main(boot: BootImage) -> None:
        for name in "ab":
            await Spawn(spec(boot, name, "spin"))
        await SleepUntil(Nanos(await Now() + 20 * MS))

    async def spin(boot: BootImage) -> None:
        last = await Now()
        while True:
            now = await Now()
            if now - last > SLICE // 2:
                turns.append(boot.name)  # somebody else has run in between
            last = now

    run(main, spin=spin)

    assert turns[:6] == ["a", "b", "a", "b", "a", "b"]


def test_no_class_waits_longer_than_the_aging_bound() -> None:
    waits: list[int] = []

    async def main(boot: BootImage) -> None:
        await Spawn(spec(boot, "hog1", "spin", qos=QosClass.PERF_BURST))
        await Spawn(spec(boot, "hog2", "spin", qos=QosClass.PERF_BURST))
        await Spawn(spec(boot, "poor", "poor", qos=QosClass.IDLE))
        await SleepUntil(Nanos(await Now() + 400 * MS))

    async def spin(boot: BootImage) -> None:
        while True:
            await Now()

    async def poor(boot: BootImage) -> None:
        waits.append(await Now() - boot.now)
        while True:
            asked = Nanos(await Now() + MS)
            waits.append(await SleepUntil(asked) - asked)

    kernel = run(main, spin=spin, poor=poor)

    assert len(waits) >= 5
    assert max(waits) <= AGING_BOUND + 2 * SLICE
    assert kernel.stats()["aged"] >= 5


def test_a_full_queue_loses_no_wake_up() -> None:
    count = QUEUE_COUNT_MAX + 30
    woken: Counter[str] = Counter()
    at: list[int] = []

    async def main(boot: BootImage) -> None:
        at.append(await Now() + 20 * MS)
        children = []
        for index in range(count):
            children.append(await Spawn(spec(boot, f"t{index}", "sleeper")))
            await SleepUntil(Nanos(await Now() + 30_000))  # it is asleep before the next comes
        for child in children:
            assert (await Wait(child.pid, NEVER)).code == 0

    async def sleeper(boot: BootImage) -> None:
        await SleepUntil(Nanos(at[0]))
        woken[boot.name] += 1

    kernel = run(main, sleeper=sleeper)

    assert len(woken) == count
    assert set(woken.values()) == {1}
    assert kernel.stats()["overflowed"] >= count - QUEUE_COUNT_MAX


def test_a_spawn_into_a_full_run_queue_is_refused_and_undone() -> None:
    async def main(boot: BootImage) -> None:
        pids: list[Pid] = []
        try:
            while True:
                pids.append((await Spawn(spec(boot, f"t{len(pids)}", "leave"))).pid)
        except AbiError as refusal:
            assert refusal.status is Status.NO_SPACE
        assert await SpawnLastError() is SpawnReason.OOM
        assert len(pids) >= QUEUE_COUNT_MAX
        for pid in pids:
            await Wait(pid, NEVER)
        again = await Spawn(spec(boot, "again", "leave"))
        assert again.generation == 1
        await Wait(again.pid, NEVER)

    async def leave(boot: BootImage) -> None:
        return None

    run(main, leave=leave)


def test_declared_placement_holds_and_free_tasks_spread() -> None:
    names: dict[str, str] = {}

    async def main(boot: BootImage) -> None:
        for index in range(4):
            child = await Spawn(spec(boot, f"pinned{index}", "spin", cpu=index))
            names[f"pid{child.pid}"] = f"pinned{index}"
        for index in range(4):
            _ = await Spawn(spec(boot, f"free{index}", "spin"))
        await SleepUntil(Nanos(await Now() + 50 * MS))

    async def spin(boot: BootImage) -> None:
        while True:
            await Now()

    kernel = run(main, cpu_count=4, spin=spin)

    where: dict[str, set[str]] = {}
    for line in kernel.log_lines():
        _, cpu, pid, how, *_ = [*line.split(), "", ""]
        if how == "picked" and pid in names:
            where.setdefault(names[pid], set()).add(cpu)
    assert where == {f"pinned{index}": {f"cpu{index}"} for index in range(4)}
    assert all(cpu.picks > 5 for cpu in kernel.scheduler.smp)


def test_cpus_work_at_the_same_time() -> None:
    def span(cpu_count: int) -> int:
        took: list[int] = []

        async def main(boot: BootImage) -> None:
            start = await Now()
            pids = [(await Spawn(spec(boot, f"w{index}", "work"))).pid for index in range(4)]
            for pid in pids:
                await Wait(pid, NEVER)
            took.append(await Now() - start)

        async def work(boot: BootImage) -> None:
            for _ in range(2000):
                await Now()

        kernel = run(main, cpu_count=cpu_count, work=work)
        stats = kernel.stats()
        assert (
            stats["resched_requests"]
            >= stats["resched_sent"]
            >= stats["resched_taken"]
            >= stats["resched_acknowledged"]
        )
        return took[0]

    one, two, four = span(1), span(2), span(4)

    assert one > 1.8 * two > 3.2 * four


def test_a_lost_signal_costs_a_tick_and_no_task() -> None:
    async def main(boot: BootImage) -> None:
        for index in range(30):
            start = await Now()
            child = await Spawn(spec(boot, f"t{index}", "leave", cpu=1))
            await Wait(child.pid, NEVER)
            assert await Now() - start <= 2 * TICK + 100_000  # there, and the answer back

    async def leave(boot: BootImage) -> None:
        return None

    faults = Faults(Plan(chances={FaultPoint.LOST_SIGNAL: 500_000}))

    kernel = run(main, cpu_count=2, faults=faults, leave=leave)

    assert kernel.stats()["steals"] == 0
    assert faults.counts()["lost_signal"][1] > 5
