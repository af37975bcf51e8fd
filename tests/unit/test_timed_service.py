"""timed as a task on the simulated kernel: what its clients see."""

from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import pytest

from nexus.abi import (
    INIT_NAME,
    BootImage,
    CapClose,
    Event,
    LinkCreate,
    LinkTerms,
    Nanos,
    NewLink,
    Now,
    Program,
    QosClass,
    Recv,
    Send,
    SleepUntil,
    Slot,
    Spawn,
    Spawned,
    SpawnSpec,
    Trap,
    service_id,
)
from nexus.ipc import CallFailure, Exchange, Peers, Refused, Way
from nexus.kernel.sim.kernel import SimKernel
from nexus.protocols.meta import GetStatus
from nexus.protocols.timed import (
    AHEAD_MAX,
    PROTOCOL,
    TIMERS_PER_OWNER_MAX,
    Cancel,
    Cancelled,
    Fired,
    Register,
    Seen,
    Sleep,
    TimedStatus,
    Timer,
    Wait,
    Whoami,
    Woken,
)
from nexus.runtime import ServiceConfig
from nexus.services.timed import main as timed_main
from nexus.wire import ReplyStatus, Request

MS = 1_000_000
SECOND = 1_000 * MS
TERMS = LinkTerms(8, 16384, 0)
ReplyT = TypeVar("ReplyT")
Main = Callable[[BootImage], Coroutine[Trap[Any], Any, int | None]]


class Rig:
    """timed, its spawner (this test, of class Normal), and calls to timed."""

    def __init__(self, boot: BootImage, timed: Spawned, link: Exchange) -> None:
        self.boot = boot
        self.spawned = timed
        self.link = link

    async def ask(self, request: Request[ReplyT], wait: int = 2 * SECOND) -> Any:
        return await self.link.call(request, Nanos(await Now() + wait))

    async def reply(self, request: Request[ReplyT], kind: type[ReplyT]) -> ReplyT:
        outcome = await self.ask(request)
        assert isinstance(outcome, kind), outcome
        return outcome

    async def facts(self) -> dict[str, int]:
        status = await self.ask(GetStatus())
        return {fact.name: fact.value for fact in status.facts}

    async def start(self, name: str, qos: QosClass) -> Spawned:
        """A client task with a link to timed, which it takes from its endpoint."""
        child = await Spawn(SpawnSpec(name=name, program=name, control=self.boot.endpoint, qos=qos))
        link = await LinkCreate(self.spawned.slot, TERMS)
        await Send(child.slot, b"\x01link", move=link.slot)
        return child


async def bound(boot: BootImage, slot: Slot, generation: int) -> Exchange:
    peers = Peers(boot, bytes(16))
    outcome = await peers.bind(
        Way(
            slot=slot,
            protocol=PROTOCOL,
            name="timed",
            service=service_id("timed"),
            generation=generation,
            terms=TERMS,
            reply_terms=TERMS,
        ),
        Nanos(await Now() + SECOND),
    )
    assert isinstance(outcome, Exchange), outcome
    return outcome


def run(test: Callable[[Rig], Coroutine[Trap[Any], Any, Any]], **clients: Main) -> Any:
    """The result of `test`, run as the root task next to timed."""
    results: list[Any] = []

    async def root(boot: BootImage) -> int:
        config = ServiceConfig(uses=[], posts=[], settings={}, trace_seed=bytes(16))
        timed = await Spawn(
            SpawnSpec(
                name="timed",
                program="timed",
                control=boot.endpoint,
                argument=config.encoded(),
                delegations=8,
            )
        )
        link = await bound(boot, timed.slot, timed.generation)
        results.append(await test(Rig(boot, timed, link)))
        return 0

    programs = {
        name: Program(name=name, main=main, digest="")
        for name, main in {"timed": timed_main, **clients}.items()
    }
    events: list[Event] = []
    kernel = SimKernel(programs, seed=1, recorder=events.append)
    ended = kernel.run(
        Program(name=INIT_NAME, main=root, digest=""), b"", until=Nanos(kernel.now + 60 * SECOND)
    )
    assert kernel.crashes == []
    assert ended.code == 0
    return results[0]


async def taken_link(boot: BootImage) -> Exchange:
    """In a client task: the link to timed that the spawner sent."""
    message = await Recv((boot.endpoint,), Nanos(await Now() + SECOND))
    assert message.cap is not None
    return await bound(boot, message.cap, 1)


def test_a_sleep_ends_at_the_coalesced_deadline_and_never_before() -> None:
    async def test(rig: Rig) -> tuple[int, Woken, int]:
        deadline = await Now() + 20 * MS + MS // 2
        woken = await rig.reply(Sleep(deadline), Woken)
        return deadline, woken, await Now()

    deadline, woken, now = run(test)

    assert woken.deadline % (4 * MS) == 0
    assert 0 <= woken.deadline - deadline < 4 * MS
    assert woken.deadline <= woken.now <= now


def test_a_timer_fires_for_a_waiter_and_leaves_the_table() -> None:
    async def test(rig: Rig) -> tuple[Timer, Fired, int, dict[str, int]]:
        timer = await rig.reply(Register(await Now() + 10 * MS), Timer)
        fired = await rig.reply(Wait(timer.timer_id), Fired)
        return timer, fired, await Now(), await rig.facts()

    timer, fired, now, facts = run(test)

    assert (fired.timer_id, fired.deadline) == (timer.timer_id, timer.deadline)
    assert timer.deadline <= fired.now <= now
    assert (facts["timers"], facts["kept"]) == (0, 0)


def test_a_timer_fires_when_nobody_waits_and_a_later_wait_learns_of_it() -> None:
    async def test(rig: Rig) -> tuple[Timer, Fired, Any]:
        timer = await rig.reply(Register(await Now() + MS), Timer)
        await SleepUntil(Nanos(await Now() + 20 * MS))
        fired = await rig.reply(Wait(timer.timer_id), Fired)
        return timer, fired, await rig.ask(Wait(timer.timer_id))

    timer, fired, again = run(test)

    assert timer.deadline <= fired.now < timer.deadline + MS
    assert again == Refused(TimedStatus.NOT_FOUND)


def test_a_deadline_in_the_past_fires_at_once() -> None:
    async def test(rig: Rig) -> int:
        before = await Now()
        await rig.reply(Sleep(1), Woken)
        return await Now() - before

    assert run(test) < MS


@pytest.mark.covers("timed.INVALID_ARGS")
def test_a_timer_more_than_an_hour_ahead_is_refused() -> None:
    async def test(rig: Rig) -> Any:
        return await rig.ask(Register(await Now() + AHEAD_MAX + SECOND))

    assert run(test) == Refused(TimedStatus.INVALID_ARGS)


def test_a_sleep_that_outlives_its_call_is_refused_at_once() -> None:
    async def test(rig: Rig) -> tuple[Any, int]:
        before = await Now()
        outcome = await rig.ask(Sleep(before + 50 * MS), wait=20 * MS)
        return outcome, await Now() - before

    outcome, took = run(test)

    assert outcome == Refused(TimedStatus.INVALID_ARGS)
    assert took < 5 * MS


def test_a_65th_timer_is_over_the_limit_and_a_cancelled_one_makes_room() -> None:
    async def test(rig: Rig) -> tuple[Any, Any, dict[str, int]]:
        far = await Now() + 10 * SECOND
        timers = [await rig.reply(Register(far), Timer) for _ in range(TIMERS_PER_OWNER_MAX)]
        refused = await rig.ask(Register(far))
        await rig.reply(Cancel(timers[0].timer_id), Cancelled)
        accepted = await rig.ask(Register(far))
        return refused, accepted, await rig.facts()

    refused, accepted, facts = run(test)

    assert refused == Refused(TimedStatus.OVER_LIMIT)
    assert isinstance(accepted, Timer)
    assert facts["timers"] == TIMERS_PER_OWNER_MAX


def test_an_unknown_timer_is_not_found() -> None:
    async def test(rig: Rig) -> tuple[Any, Any]:
        return await rig.ask(Cancel(7)), await rig.ask(Wait(0))

    assert run(test) == (Refused(TimedStatus.NOT_FOUND), Refused(TimedStatus.NOT_FOUND))


def test_a_waiter_whose_timer_is_cancelled_hears_of_it() -> None:
    async def test(rig: Rig) -> tuple[Any, Any]:
        timer = await rig.reply(Register(await Now() + SECOND), Timer)
        deadline = Nanos(await Now() + 2 * SECOND)
        waiting = await rig.link.start(Wait(timer.timer_id), deadline)
        cancelled = await rig.link.start(Cancel(timer.timer_id), deadline)
        return await rig.link.finish(cancelled), await rig.link.finish(waiting)

    cancelled, waited = run(test)

    assert isinstance(cancelled, Cancelled)
    assert waited == Refused(TimedStatus.CANCELLED)


def test_a_second_wait_takes_the_place_of_the_first() -> None:
    async def test(rig: Rig) -> tuple[Any, Any]:
        timer = await rig.reply(Register(await Now() + 10 * MS), Timer)
        deadline = Nanos(await Now() + 2 * SECOND)
        first = await rig.link.start(Wait(timer.timer_id), deadline)
        second = await rig.link.start(Wait(timer.timer_id), deadline)
        return await rig.link.finish(first), await rig.link.finish(second)

    first, second = run(test)

    assert first == Refused(TimedStatus.CANCELLED)
    assert isinstance(second, Fired)


def test_a_waiter_that_gave_up_leaves_the_firing_for_the_next_wait() -> None:
    async def test(rig: Rig) -> tuple[Any, Any]:
        timer = await rig.reply(Register(await Now() + 30 * MS), Timer)
        gave_up = await rig.ask(Wait(timer.timer_id), wait=5 * MS)
        await SleepUntil(Nanos(await Now() + 50 * MS))
        return gave_up, await rig.ask(Wait(timer.timer_id))

    gave_up, later = run(test)

    assert isinstance(gave_up, CallFailure)
    assert isinstance(later, Fired)


def test_a_sleeper_delays_nobody() -> None:
    async def test(rig: Rig) -> tuple[int, Any]:
        deadline = Nanos(await Now() + 2 * SECOND)
        sleeping = await rig.link.start(Sleep(await Now() + SECOND), deadline)
        before = await Now()
        for _ in range(20):
            await rig.reply(Whoami(0, ""), Seen)
        return await Now() - before, await rig.link.finish(sleeping)

    took, woken = run(test)

    assert took < 20 * MS
    assert isinstance(woken, Woken)


def test_a_sleep_in_a_batch_is_refused_because_it_cannot_wait() -> None:
    async def test(rig: Rig) -> list[Any]:
        now = await Now()
        return await rig.link.call_many([Sleep(now + MS), Sleep(now + MS)], Nanos(now + SECOND))

    assert run(test) == [Refused(ReplyStatus.UNSUPPORTED)] * 2


def test_the_echo_is_the_kernels_word_and_not_the_payloads() -> None:
    async def test(rig: Rig) -> tuple[Seen, BootImage]:
        return await rig.reply(Whoami(4242, "keystored"), Seen), rig.boot

    seen, boot = run(test)

    assert (seen.pid, seen.service, seen.generation) == (boot.pid, boot.service, 1)
    assert seen.qos is QosClass.NORMAL


@pytest.mark.parametrize(
    ("qos", "window"),
    [(QosClass.IDLE, 8), (QosClass.NORMAL, 4), (QosClass.INTERACTIVE, 1), (QosClass.PERF_BURST, 0)],
)
def test_the_window_is_that_of_the_class_the_kernel_holds(qos: QosClass, window: int) -> None:
    results: list[tuple[int, Any]] = []

    async def client(boot: BootImage) -> None:
        link = await taken_link(boot)
        edge = (await Now() // (8 * MS) + 3) * 8 * MS  # a multiple of every window
        timer: Any = await link.call(Register(edge + 1), Nanos(edge + SECOND))
        results.append((edge, timer))

    async def test(rig: Rig) -> None:
        await rig.start("client", qos)
        await SleepUntil(Nanos(await Now() + 50 * MS))

    run(test, client=client)

    ((edge, timer),) = results
    assert isinstance(timer, Timer)
    assert timer.deadline == edge + (window * MS or 1)


def test_a_dead_client_leaves_no_timer_behind_and_cannot_be_cancelled_for() -> None:
    async def client(boot: BootImage) -> None:
        link = await taken_link(boot)
        far = Nanos(await Now() + SECOND)
        for _ in range(3):
            timer: Any = await link.call(Register(far), far)
            assert isinstance(timer, Timer)
        _ = await link.start(Sleep(far - 500 * MS), far)
        await SleepUntil(Nanos(await Now() + 50 * MS))

    async def test(rig: Rig) -> tuple[dict[str, int], Any, dict[str, int]]:
        await rig.start("client", QosClass.NORMAL)
        await SleepUntil(Nanos(await Now() + 30 * MS))
        during = await rig.facts()
        foreign = await rig.ask(Cancel(1))
        await SleepUntil(Nanos(await Now() + 60 * MS))
        return during, foreign, await rig.facts()

    during, foreign, after = run(test, client=client)

    assert (during["timers"], during["sleepers"]) == (4, 1)
    assert foreign == Refused(TimedStatus.NOT_FOUND)
    assert (after["timers"], after["owners"], after["kept"]) == (0, 0, 0)


def test_a_link_that_is_closed_frees_the_timers_set_over_it() -> None:
    async def test(rig: Rig) -> tuple[dict[str, int], dict[str, int]]:
        await rig.reply(Register(await Now() + SECOND), Timer)
        link: NewLink = await LinkCreate(rig.spawned.slot, TERMS)
        second = await bound(rig.boot, link.slot, 1)
        far = Nanos(await Now() + SECOND)
        timer: Any = await second.call(Register(far), far)
        assert isinstance(timer, Timer)
        before = await rig.facts()
        await CapClose(link.slot)
        await SleepUntil(Nanos(await Now() + 10 * MS))
        return before, await rig.facts()

    before, after = run(test)

    assert (before["timers"], after["timers"]) == (2, 1)
