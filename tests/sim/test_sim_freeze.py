"""A task that is stopped for a while and goes on, as SIGSTOP and SIGCONT do it."""

from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from nexus.abi import (
    NEVER,
    NO_WAIT,
    AbiError,
    BootImage,
    Event,
    EventKind,
    Kill,
    Nanos,
    Now,
    PeerGone,
    Program,
    QosClass,
    Recv,
    Send,
    SetTaskQos,
    SleepUntil,
    Spawn,
    Spawned,
    SpawnSpec,
    Status,
    Trap,
    Wait,
)
from nexus.kernel.sim import Faults, Freeze, Plan, SimKernel

Main = Callable[[BootImage], Coroutine[Trap[Any], Any, int | None]]
MS = 1_000_000
STEP = 100_000  # ns; a few resumes


def run(
    main: Callable[[BootImage, SimKernel], Coroutine[Trap[Any], Any, int | None]],
    *,
    seed: int = 1,
    cpu_count: int = 1,
    plan: Plan | None = None,
    **programs: Main,
) -> tuple[SimKernel, list[Event]]:
    events: list[Event] = []
    table = {name: Program(name=name, main=task, digest=name) for name, task in programs.items()}
    faults = Faults(plan) if plan is not None else None
    kernel = SimKernel(table, seed=seed, recorder=events.append, cpu_count=cpu_count, faults=faults)
    root = Program(name="root", main=lambda boot: main(boot, kernel), digest="root")
    end = kernel.run(root, b"", until=Nanos(kernel.now + 60_000 * MS))
    assert kernel.crashes == []
    assert end.code == 0
    assert set(kernel.resources().values()) == {0}
    return kernel, events


async def child_of(boot: BootImage, name: str) -> Spawned:
    return await Spawn(SpawnSpec(name, name, boot.endpoint))


async def ended(child: Spawned) -> int:
    return (await Wait(child.pid, Nanos(await Now() + 1000 * MS))).code


@pytest.mark.parametrize("cpu_count", [1, 2])
@pytest.mark.parametrize("seed", range(5))
def test_a_busy_task_makes_no_step_while_it_is_frozen_and_loses_none(
    seed: int, cpu_count: int
) -> None:
    times: list[int] = []

    async def busy(boot: BootImage) -> None:
        for _ in range(2000):
            times.append(await Now())  # noqa: PERF401 (each is to be seen as it comes)

    async def main(boot: BootImage, kernel: SimKernel) -> None:
        child = await child_of(boot, "busy")
        await SleepUntil(Nanos(boot.now + 3 * MS))
        begun = await Now()
        assert kernel.freeze("busy", Nanos(boot.now + 9 * MS))
        await SleepUntil(Nanos(boot.now + 8 * MS))
        made = len(times)
        await Now()
        assert len(times) == made, "others run, it does not"
        assert await ended(child) == 0
        stopped = [time for time in times if begun + STEP < time < boot.now + 9 * MS]
        assert stopped == []
        assert any(boot.now + 9 * MS <= time < boot.now + 9 * MS + STEP for time in times)

    run(main, seed=seed, cpu_count=cpu_count, busy=busy)

    assert len(times) == 2000
    assert times == sorted(times)


def test_what_comes_while_a_task_is_frozen_waits_for_it_and_wins_over_its_deadline() -> None:
    async def server(boot: BootImage) -> None:
        deadline = Nanos(boot.now + 5 * MS)
        message = await Recv((boot.endpoint,), deadline)
        assert message.data == b"while you were out"
        assert message.now >= boot.now + 19 * MS > deadline

    async def main(boot: BootImage, kernel: SimKernel) -> None:
        child = await child_of(boot, "server")
        await SleepUntil(Nanos(boot.now + MS))
        assert kernel.freeze("server", Nanos(boot.now + 20 * MS))
        await SleepUntil(Nanos(boot.now + 2 * MS))
        await Send(child.slot, b"while you were out")
        assert await ended(child) == 0

    run(main, server=server)


def test_a_wait_that_ran_out_while_frozen_ends_after_the_thaw_and_not_before() -> None:
    async def sleeper(boot: BootImage) -> None:
        until = Nanos(boot.now + 5 * MS)
        assert await SleepUntil(until) >= boot.now + 29 * MS
        with pytest.raises(AbiError) as refusal:
            await Recv((boot.endpoint,), Nanos(until + MS))
        assert refusal.value.status is Status.TIMED_OUT

    async def main(boot: BootImage, kernel: SimKernel) -> None:
        child = await child_of(boot, "sleeper")
        await SleepUntil(Nanos(boot.now + MS))
        assert kernel.freeze("sleeper", Nanos(boot.now + 30 * MS))
        assert await ended(child) == 0
        assert await Now() >= boot.now + 30 * MS

    run(main, sleeper=sleeper)


def test_of_several_freezes_the_last_to_end_thaws() -> None:
    async def sleeper(boot: BootImage) -> None:
        assert await SleepUntil(Nanos(boot.now + 2 * MS)) >= boot.now + 39 * MS

    async def main(boot: BootImage, kernel: SimKernel) -> None:
        child = await child_of(boot, "sleeper")
        await SleepUntil(Nanos(boot.now + MS))
        for until in (40, 10, 20):
            assert kernel.freeze("sleeper", Nanos(boot.now + until * MS))
        assert await ended(child) == 0

    run(main, sleeper=sleeper)


def test_a_watchdog_kills_the_frozen_and_the_next_instance_is_not_frozen() -> None:
    async def server(boot: BootImage) -> None:
        assert boot.control is not None
        while True:
            message = await Recv((boot.endpoint,), NEVER)
            await Send(boot.control, message.data)

    async def main(boot: BootImage, kernel: SimKernel) -> None:
        async def probe(child: Spawned) -> bool:
            await Send(child.slot, b"ping")
            try:
                await Recv((boot.endpoint,), Nanos(await Now() + 5 * MS), link=child.link)
            except PeerGone:
                raise
            except AbiError as refusal:
                assert refusal.status is Status.TIMED_OUT
                return False
            return True

        child = await child_of(boot, "server")
        assert await probe(child)
        assert kernel.freeze("server", Nanos(boot.now + 500 * MS))
        assert not await probe(child)
        await Kill(child.pid)
        end = await Wait(child.pid, NO_WAIT)
        assert end.signal == 9
        again = await child_of(boot, "server")
        for _ in range(3):
            assert await probe(again)
        await SleepUntil(Nanos(boot.now + 600 * MS))  # past the thaw of the dead one
        assert await probe(again)
        await Kill(again.pid)
        await Wait(again.pid, NO_WAIT)

    run(main, server=server)


def test_the_class_of_a_frozen_task_can_be_changed() -> None:
    async def sleeper(boot: BootImage) -> None:
        for _ in range(100):
            await Now()

    async def main(boot: BootImage, kernel: SimKernel) -> None:
        child = await child_of(boot, "sleeper")
        assert kernel.freeze("sleeper", Nanos(boot.now + 10 * MS))
        await SleepUntil(Nanos(boot.now + MS))
        await SetTaskQos(child.pid, QosClass.IDLE)
        assert await ended(child) == 0
        assert await Now() >= boot.now + 10 * MS

    run(main, sleeper=sleeper)


def test_nobody_is_frozen_under_a_name_that_no_task_has() -> None:
    async def main(boot: BootImage, kernel: SimKernel) -> None:
        assert not kernel.freeze("nobody", Nanos(boot.now + MS))

    run(main)


def test_planned_freezes_are_reached_counted_and_recorded_and_stop_with_the_plan() -> None:
    async def sleeper(boot: BootImage) -> None:
        await SleepUntil(Nanos(boot.now + 50 * MS))

    async def main(boot: BootImage, kernel: SimKernel) -> None:
        child = await child_of(boot, "sleeper")
        assert await ended(child) == 0
        assert kernel.faults is not None
        assert kernel.faults.counts()["freeze"] == (3, 1)

    freezes = (
        Freeze(task="sleeper", after=Nanos(10 * MS), span=Nanos(5 * MS)),
        Freeze(task="nobody", after=Nanos(10 * MS), span=Nanos(5 * MS)),
        Freeze(task="sleeper", after=Nanos(30 * MS), span=Nanos(5 * MS)),
    )
    kernel, events = run(main, plan=Plan(freeze=freezes, span=Nanos(20 * MS)), sleeper=sleeper)

    (fault,) = [event for event in events if event.kind is EventKind.FAULT]
    assert (fault.fields["point"], fault.fields["name"]) == ("freeze", "sleeper")
    text = "\n".join(kernel.log_lines())
    assert text.count(" frozen ") == text.count(" thawed ") == 1


def test_one_seed_gives_one_log_with_freezes_too() -> None:
    async def busy(boot: BootImage) -> None:
        for _ in range(500):
            await Now()

    async def main(boot: BootImage, kernel: SimKernel) -> None:
        children = [await Spawn(SpawnSpec(n, "busy", boot.endpoint)) for n in ("one", "two")]
        for child in children:
            assert await ended(child) == 0

    def lines(seed: int) -> list[str]:
        freezes = tuple(
            Freeze(task=name, after=Nanos(at * MS), span=Nanos(3 * MS))
            for name, at in (("one", 1), ("two", 2), ("one", 3))
        )
        kernel, _ = run(main, seed=seed, cpu_count=2, plan=Plan(freeze=freezes), busy=busy)
        return list(kernel.log_lines())

    assert lines(3) == lines(3)
    assert lines(3) != lines(4)
