"""Promise 9, what only the root task has: signals, a memory across boots, and sd_notify."""

from typing import Any

from nexus.abi import (
    BOOT_MEMORY_SIZE_MAX,
    KERNEL,
    NO_WAIT,
    NOTIFY_SIZE_MAX,
    BootImage,
    BootMemoryRead,
    BootMemoryReplace,
    LinkCreate,
    LinkId,
    Message,
    Nanos,
    Notify,
    Now,
    Pid,
    QosClass,
    Recv,
    ReplyRecv,
    Send,
    Sender,
    Signal,
    SleepUntil,
    Status,
    TaskStats,
    Trap,
    Wait,
)
from nexus.testing.conformance.steps import (
    MS,
    ended_well,
    nothing_queued,
    refused,
    soon,
    start,
    take,
)
from nexus.testing.rig import Rig

KERNEL_LINK = LinkId(0)
FROM_KERNEL = Sender(KERNEL, Pid(0), 0, QosClass.NORMAL)
LATER = Nanos(30 * MS)


async def _waits(boot: BootImage) -> None:
    """A program that ends on its first message."""
    await take(boot.endpoint)


# ---- signals


def test_a_signal_is_a_message_of_the_kernel(rig: Rig) -> None:
    with rig.place() as place:

        async def root(boot: BootImage) -> None:
            for signal in Signal:
                before = await TaskStats()
                place.outside.signal(signal)

                message = await take(boot.endpoint)

                data = signal.encode()
                told = Message(data, FROM_KERNEL, KERNEL_LINK, None, message.now, boot.endpoint)
                assert message == told
                after = await TaskStats()
                assert after.received == before.received + 1
                assert after.received_size == before.received_size + len(data)
            await nothing_queued(boot.endpoint)

        rig.run(root, place=place)


def test_a_signal_waits_behind_at_most_one_message_of_each_link(rig: Rig) -> None:
    with rig.place() as place:

        async def root(boot: BootImage) -> None:
            links = [await LinkCreate(boot.endpoint) for _ in range(2)]
            for link in links:
                for _ in range(4):
                    await Send(link.slot, b"queued before")
            place.outside.signal(Signal.TERM)
            first = [(await take(boot.endpoint)).data for _ in range(len(links) + 1)]
            assert b"SIGTERM" in first
            rest = [(await take(boot.endpoint)).data for _ in range(6)]
            assert rest == [b"queued before"] * 6

        rig.run(root, place=place)


def test_a_signal_ends_the_wait_of_a_receive(rig: Rig) -> None:
    with rig.place() as place:

        async def root(boot: BootImage) -> None:
            place.outside.signal_after(LATER, Signal.HUP)
            assert (await take(boot.endpoint)).data == b"SIGHUP"
            place.outside.signal_after(LATER, Signal.TERM)
            trap = ReplyRecv((boot.endpoint,), await soon())
            assert (await trap).data == b"SIGTERM"

        rig.run(root, place=place)


def test_a_signal_ends_no_other_wait_and_is_not_lost(rig: Rig) -> None:
    with rig.place() as place:

        async def root(boot: BootImage) -> None:
            spawned = await start(boot, "child")
            link = await LinkCreate(boot.endpoint)

            place.outside.signal_after(LATER, Signal.TERM)
            deadline = Nanos(await Now() + 3 * LATER)
            assert await SleepUntil(deadline) >= deadline
            assert (
                await take(boot.endpoint)
            ).data == b"SIGTERM"  # if it came as planned, from the queue

            place.outside.signal_after(LATER, Signal.TERM)
            deadline = Nanos(await Now() + 3 * LATER)
            await refused(Wait(spawned.pid, deadline), Status.TIMED_OUT)
            assert await Now() >= deadline
            assert (await take(boot.endpoint)).data == b"SIGTERM"

            place.outside.signal_after(LATER, Signal.TERM)
            deadline = Nanos(await Now() + 3 * LATER)
            filtered = Recv((boot.endpoint,), deadline, link=link.link)
            await refused(filtered, Status.TIMED_OUT)
            assert await Now() >= deadline
            assert (await take(boot.endpoint)).data == b"SIGTERM"

            await Send(spawned.slot, b"end")
            await ended_well(spawned)

        rig.run(root, programs={"child": _waits}, place=place)


def test_a_signal_not_received_yet_is_not_told_twice(rig: Rig) -> None:
    with rig.place() as place:

        async def root(boot: BootImage) -> None:
            for signal in (Signal.TERM, Signal.HUP, Signal.TERM, Signal.INT, Signal.HUP):
                place.outside.signal(signal)
            told = [(await Recv((boot.endpoint,), NO_WAIT)).data for _ in Signal]
            assert told == [b"SIGHUP", b"SIGINT", b"SIGTERM"]
            await nothing_queued(boot.endpoint)
            place.outside.signal(Signal.TERM)
            assert (await take(boot.endpoint)).data == b"SIGTERM"

        rig.run(root, place=place)


def test_a_signal_is_taken_by_its_link_and_by_the_size_of_a_buffer(rig: Rig) -> None:
    with rig.place() as place:

        async def root(boot: BootImage) -> None:
            link = await LinkCreate(boot.endpoint)
            await Send(link.slot, b"other")
            await refused(Recv((boot.endpoint,), NO_WAIT, link=KERNEL_LINK), Status.QUEUE_EMPTY)
            place.outside.signal(Signal.TERM)
            small = Recv((boot.endpoint,), NO_WAIT, size_max=3)
            await refused(small, Status.INVALID_ARGUMENT)
            message = await Recv((boot.endpoint,), NO_WAIT, link=KERNEL_LINK)
            assert message.data == b"SIGTERM"
            assert (await take(boot.endpoint)).data == b"other"

        rig.run(root, place=place)


def test_other_tasks_have_no_link_from_the_kernel(rig: Rig) -> None:
    async def child(boot: BootImage) -> None:
        trap = Recv((boot.endpoint,), NO_WAIT, link=KERNEL_LINK)
        await refused(trap, Status.NO_SUCH_ENDPOINT)

    async def root(boot: BootImage) -> None:
        await ended_well(await start(boot, "child"))

    rig.run(root, programs={"child": child})


# ---- boot memory


def test_boot_memory_is_empty_at_first_and_survives_the_boot(rig: Rig) -> None:
    contents = (b"\x00first", bytes(range(256)) * (BOOT_MEMORY_SIZE_MAX // 256), b"", b"last")
    with rig.place() as place:

        async def first(boot: BootImage) -> None:
            assert await BootMemoryRead() == b""
            for content in contents:
                await BootMemoryReplace(content)
                assert await BootMemoryRead() == content

        async def second(boot: BootImage) -> None:
            assert await BootMemoryRead() == b"last"
            await BootMemoryReplace(b"second boot")

        async def third(boot: BootImage) -> None:
            assert await BootMemoryRead() == b"second boot"

        for boot_main in (first, second, third):
            rig.run(boot_main, place=place)


def test_boot_memory_that_does_not_fit_is_refused_and_keeps_what_it_had(rig: Rig) -> None:
    with rig.place() as place:

        async def first(boot: BootImage) -> None:
            await BootMemoryReplace(b"kept")
            too_large = bytes(BOOT_MEMORY_SIZE_MAX + 1)
            await refused(BootMemoryReplace(too_large), Status.INVALID_ARGUMENT)
            assert await BootMemoryRead() == b"kept"
            with place.outside.full_disk():
                await refused(BootMemoryReplace(b"lost"), Status.NO_SPACE)
                await refused(BootMemoryReplace(too_large), Status.INVALID_ARGUMENT)
                assert await BootMemoryRead() == b"kept"
            await BootMemoryReplace(b"kept again")
            with place.outside.full_disk():
                await refused(BootMemoryReplace(b"lost"), Status.NO_SPACE)

        async def second(boot: BootImage) -> None:
            assert await BootMemoryRead() == b"kept again"

        rig.run(first, place=place)
        rig.run(second, place=place)


def test_without_a_state_directory_boot_memory_is_unsupported(rig: Rig) -> None:
    async def root(boot: BootImage) -> None:
        await refused(BootMemoryRead(), Status.UNSUPPORTED)
        await refused(BootMemoryReplace(b"x"), Status.UNSUPPORTED)
        too_large = bytes(BOOT_MEMORY_SIZE_MAX + 1)
        await refused(BootMemoryReplace(too_large), Status.INVALID_ARGUMENT)

    rig.run(root)


# ---- notices


def test_notices_reach_the_service_manager_in_order(rig: Rig) -> None:
    with rig.place() as place:

        async def root(boot: BootImage) -> None:
            longest = "x" * NOTIFY_SIZE_MAX
            sent = ["READY=1\nSTATUS=up", "WATCHDOG=1", "STATUS=é", longest]
            for text in sent:
                await Notify(text)
            await Notify("")  # nothing worth telling
            assert place.outside.notices() == sent

        rig.run(root, place=place)


def test_a_notice_outside_the_limits_is_refused(rig: Rig) -> None:
    with rig.place() as place:

        async def root(boot: BootImage) -> None:
            before = await TaskStats()
            for text in ("x" * (NOTIFY_SIZE_MAX + 1), "é" * (NOTIFY_SIZE_MAX // 2 + 1), "\ud800"):
                await refused(Notify(text), Status.INVALID_ARGUMENT)
            assert await TaskStats() == before
            assert place.outside.notices() == []

        rig.run(root, place=place)


def test_without_a_service_manager_a_notice_goes_nowhere(rig: Rig) -> None:
    async def root(boot: BootImage) -> None:
        await Notify("READY=1")
        await refused(Notify("x" * (NOTIFY_SIZE_MAX + 1)), Status.INVALID_ARGUMENT)

    rig.run(root)


# ---- and nobody else


def test_what_the_root_task_has_is_refused_to_others(rig: Rig) -> None:
    with rig.place() as place:

        async def child(boot: BootImage) -> None:
            traps: tuple[Trap[Any], ...] = (
                BootMemoryRead(),
                BootMemoryReplace(b"x"),
                BootMemoryReplace(bytes(BOOT_MEMORY_SIZE_MAX + 1)),
                Notify("READY=1"),
                Notify("x" * (NOTIFY_SIZE_MAX + 1)),
            )
            before = await TaskStats()
            for trap in traps:
                await refused(trap, Status.PERMISSION_DENIED)
            assert await TaskStats() == before

        async def root(boot: BootImage) -> None:
            await BootMemoryReplace(b"mine")
            await ended_well(await start(boot, "child"))
            assert await BootMemoryRead() == b"mine"
            assert place.outside.notices() == []

        rig.run(root, programs={"child": child}, place=place)
