"""Promise 4: an expired wait ends by itself, never early, and soon.

How late: the median over WAITS waits on an idle CPU is at most the rig's `lateness_max`, a
millisecond for a kernel in real time. The median, because one wait on a machine that does
something else as well says nothing about the kernel; and the best median of several series, because
neither does one series. A kernel that rounds or polls is late in all of them.
"""

from collections.abc import Awaitable, Callable
from statistics import median
from typing import Final

from nexus.abi import (
    AbiError,
    BootImage,
    Call,
    EndpointCreate,
    LinkCreate,
    LinkTerms,
    Nanos,
    Now,
    Recv,
    ReplyRecv,
    Send,
    SleepUntil,
    Slot,
    Spawned,
    Status,
    TaskStats,
    Wait,
)
from nexus.testing.conformance.steps import (
    MS,
    PAST,
    PATIENCE,
    control,
    ended_well,
    gone,
    refused,
    soon,
    start,
    take,
    tell,
)
from nexus.testing.rig import Rig

WAITS: Final = 15
SERIES_MAX: Final = 20  # of so many waits, one of which must end in time
SPANS: Final = (300_000, 1_500_000, 4_000_000)  # ns; below, at and above common timer steps

Waiting = Callable[[Nanos], Awaitable[object]]
MakeWaiting = Callable[[BootImage], Awaitable[Waiting]]


def _ends_in_time(rig: Rig, make: MakeWaiting, status: Status | None, *, tasks: bool) -> None:
    """Measure a wait in root, and in a spawned task as well if it may do it there."""

    async def measure(boot: BootImage) -> None:
        waiting = await make(boot)
        before = (await TaskStats()).timeouts
        waits = 0
        late: list[int] = []
        for span in SPANS:
            for _ in range(SERIES_MAX):
                late = await series(waiting, span)
                waits += WAITS
                if median(late) <= rig.lateness_max:
                    break
            else:
                raise AssertionError(f"waits of {span} ns ended late by {late} ns")
        timeouts = (await TaskStats()).timeouts - before
        assert timeouts == (waits if status is Status.TIMED_OUT else 0)

    async def series(waiting: Waiting, span: int) -> list[int]:
        late: list[int] = []
        for _ in range(WAITS):
            deadline = Nanos(await Now() + span)
            got = None
            try:
                await waiting(deadline)
            except AbiError as error:
                got = error.status
            late.append(await Now() - deadline)
            assert got is status, f"a wait ended with {got}"
        assert min(late) >= 0, f"a wait of {span} ns ended {-min(late)} ns early"
        return late

    async def child(boot: BootImage) -> None:
        await take(boot.endpoint)
        await measure(boot)

    async def root(boot: BootImage) -> None:
        if tasks:
            spawned = await start(boot, "waiter")
            await Send(spawned.slot, b"go")
            await ended_well(spawned)
            await gone(boot.endpoint, spawned.link)
        await measure(boot)

    rig.run(root, programs={"waiter": child})


def test_a_sleep_ends_in_time(rig: Rig) -> None:
    async def make(boot: BootImage) -> Waiting:
        async def waiting(deadline: Nanos) -> None:
            assert await SleepUntil(deadline) >= deadline

        return waiting

    _ends_in_time(rig, make, None, tasks=True)


def test_a_receive_times_out_in_time(rig: Rig) -> None:
    async def make(boot: BootImage) -> Waiting:
        return lambda deadline: Recv((boot.endpoint,), deadline)

    _ends_in_time(rig, make, Status.TIMED_OUT, tasks=True)


def test_a_receive_from_one_link_times_out_in_time(rig: Rig) -> None:
    async def make(boot: BootImage) -> Waiting:
        link = await LinkCreate(boot.endpoint)
        noise = await LinkCreate(boot.endpoint)
        await Send(noise.slot, b"for another day")
        return lambda deadline: Recv((boot.endpoint,), deadline, link=link.link)

    _ends_in_time(rig, make, Status.TIMED_OUT, tasks=True)


def test_a_receive_from_a_wait_set_times_out_in_time(rig: Rig) -> None:
    async def make(boot: BootImage) -> Waiting:
        other = await EndpointCreate()
        _ = await LinkCreate(other)
        return lambda deadline: Recv((boot.endpoint, other), deadline)

    _ends_in_time(rig, make, Status.TIMED_OUT, tasks=True)


def test_a_send_without_room_times_out_in_time(rig: Rig) -> None:
    async def make(boot: BootImage) -> Waiting:
        way = await LinkCreate(boot.endpoint, LinkTerms(1, 100, 0))
        await Send(way.slot, b"full")
        return lambda deadline: Send(way.slot, b"x", deadline=deadline)

    _ends_in_time(rig, make, Status.TIMED_OUT, tasks=True)


def test_an_unanswered_call_times_out_in_time(rig: Rig) -> None:
    async def make(boot: BootImage) -> Waiting:
        target = await EndpointCreate()
        way = await LinkCreate(target, LinkTerms(1, 1000, 0))
        answers = await LinkCreate(boot.endpoint)
        link = answers.link
        assert link is not None

        await Send(way.slot, b"what each takes, so that it finds room")

        async def waiting(deadline: Nanos) -> None:
            _ = await take(target)
            _ = await Call(way.slot, b"x", boot.endpoint, link, deadline)

        return waiting

    _ends_in_time(rig, make, Status.TIMED_OUT, tasks=True)


def test_a_reply_recv_times_out_in_time(rig: Rig) -> None:
    async def make(boot: BootImage) -> Waiting:
        return lambda deadline: ReplyRecv((boot.endpoint,), deadline)

    _ends_in_time(rig, make, Status.TIMED_OUT, tasks=True)


def test_a_wait_for_a_task_times_out_in_time(rig: Rig) -> None:
    async def make(boot: BootImage) -> Waiting:
        spawned = await start(boot, "living", program="waiter")
        return lambda deadline: Wait(spawned.pid, deadline)

    _ends_in_time(rig, make, Status.TIMED_OUT, tasks=False)


def test_a_passed_deadline_ends_a_wait_at_once(rig: Rig) -> None:
    async def root(boot: BootImage) -> None:
        before = await Now()
        assert await SleepUntil(PAST) >= before
        assert await SleepUntil(before) >= before
        await refused(Recv((boot.endpoint,), PAST), Status.TIMED_OUT)
        way = await LinkCreate(boot.endpoint, LinkTerms(1, 100, 0))
        await Send(way.slot, b"there is room", deadline=PAST)
        await refused(Send(way.slot, b"there is none", deadline=PAST), Status.TIMED_OUT)
        assert await Now() - before < PATIENCE // 2, "nothing was waited for"

    rig.run(root)


def test_a_message_wakes_a_receiver_before_its_deadline(rig: Rig) -> None:
    async def child(boot: BootImage) -> None:
        request = await take(boot.endpoint)
        await SleepUntil(Nanos(request.now + 5 * MS))
        await tell(boot, b"late news")

    async def root(boot: BootImage) -> None:
        spawned = await start(boot, "messenger")
        before = await Now()
        await Send(spawned.slot, b"go")

        message = await take(boot.endpoint)

        assert message.data == b"late news"
        assert 5 * MS <= await Now() - before < PATIENCE // 2
        await ended_well(spawned)

    rig.run(root, programs={"messenger": child})


async def until_full(spawned: Spawned) -> None:
    """Give a task a way aside, and wait until it says there that its link is full. Some time is
    left to it for its next step, which is to wait for room; it may as well begin later."""
    endpoint = await EndpointCreate()
    link = await LinkCreate(endpoint)
    await Send(spawned.slot, b"say when", move=link.slot)
    assert (await take(endpoint)).data == b"full"
    _ = await SleepUntil(Nanos(await Now() + 5 * MS))


async def aside(boot: BootImage) -> Slot:
    """The way that a task was given by `until_full`."""
    given = (await take(boot.endpoint)).cap
    assert given is not None
    return given


def test_room_wakes_a_sender_before_its_deadline(rig: Rig) -> None:
    async def child(boot: BootImage) -> None:
        for _ in range(8):
            await Send(control(boot), b"x")
        await refused(Send(control(boot), b"x"), Status.QUEUE_FULL)
        await Send(await aside(boot), b"full")
        await Send(control(boot), b"waited", deadline=await soon())

    async def root(boot: BootImage) -> None:
        spawned = await start(boot, "sender")
        await until_full(spawned)
        before = await Now()

        messages = [await take(boot.endpoint) for _ in range(9)]

        assert messages[-1].data == b"waited"
        assert await Now() - before < PATIENCE // 2
        await ended_well(spawned)

    rig.run(root, programs={"sender": child})


def test_room_in_bytes_wakes_a_sender_before_its_deadline(rig: Rig) -> None:
    async def child(boot: BootImage) -> None:
        await Send(control(boot), bytes(2000))
        await Send(control(boot), bytes(2000))
        await refused(Send(control(boot), bytes(2000)), Status.NO_SPACE)
        await Send(await aside(boot), b"full")
        await Send(control(boot), bytes(2001), deadline=await soon())

    async def root(boot: BootImage) -> None:
        spawned = await start(boot, "sender")
        await until_full(spawned)

        sizes = [len((await take(boot.endpoint)).data) for _ in range(3)]

        assert sizes == [2000, 2000, 2001]
        await ended_well(spawned)

    rig.run(root, programs={"sender": child})


def test_the_clock_is_monotonic_and_one_for_all(rig: Rig) -> None:
    async def child(boot: BootImage) -> None:
        request = await take(boot.endpoint)
        now = await Now()
        assert int(request.data) <= now
        assert boot.now <= now
        await tell(boot, b"%d" % now)

    async def root(boot: BootImage) -> None:
        times = [await Now() for _ in range(50)]
        assert times == sorted(times)
        assert times[0] >= boot.now
        spawned = await start(boot, "clock")
        await Send(spawned.slot, b"%d" % await Now())
        told = await take(boot.endpoint)
        assert times[-1] <= int(told.data) <= await Now()
        await ended_well(spawned)

    rig.run(root, programs={"clock": child})
