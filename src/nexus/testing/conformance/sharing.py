"""Promise 12, what is read without a message: shared memory objects, fences and clocks.

A shared object has one writer for ever, a length that cannot change, and as many who watch it as
were given it; what it says outlives whoever wrote it.
"""

from nexus.abi import (
    PAGE_SIZE,
    BootImage,
    CapClone,
    CapClose,
    CapDerive,
    CapKind,
    CapQuery,
    ClockMap,
    Fence,
    Kill,
    LinkCreate,
    LinkId,
    Nanos,
    Now,
    Rights,
    Send,
    SleepUntil,
    Slot,
    Status,
    TaskStats,
    VmoCreate,
    VmoMap,
    VmoSeal,
    VmoShare,
    VmoWatch,
    VmoWrite,
)
from nexus.ipc.bulk import BulkFault, accept_bulk
from nexus.testing.conformance.steps import (
    MS,
    ended,
    ended_well,
    holdings,
    refused,
    soon,
    start,
    take,
    tell,
)
from nexus.testing.rig import Rig

SIZE = 5000  # bytes; not whole pages
LENGTH = 2 * PAGE_SIZE


async def _watched(boot: BootImage, link: LinkId | None = None) -> memoryview:
    """The view of the shared object that comes next; its slot is closed."""
    message = await take(boot.endpoint, link=link)
    assert message.cap is not None
    view = await VmoWatch(message.cap)
    await CapClose(message.cap)
    return view


async def _charged() -> tuple[int, int]:
    """Bytes of memory objects held, and of the budget used."""
    stats = await TaskStats()
    return stats.vmo_size, stats.budget_used


def test_what_is_written_into_a_shared_vmo_is_seen_by_who_watches_it(rig: Rig) -> None:
    async def watcher(boot: BootImage) -> None:
        view = await _watched(boot)
        assert bytes(view[:6]) == b"before", "written before it was shared"
        assert len(view) == LENGTH
        assert view.readonly
        for word in (b"first", b"other"):
            await tell(boot, b"watching")
            _ = await take(boot.endpoint)
            assert bytes(view[SIZE : SIZE + 5]) == word
        view.release()

    async def root(boot: BootImage) -> None:
        watchers = [await start(boot, name, program="watcher") for name in ("one", "two")]
        vmo = await VmoCreate(SIZE)
        await VmoWrite(vmo, 0, b"before")
        view = await VmoShare(vmo)
        assert (len(view), view.readonly, view.format) == (LENGTH, False, "B")
        for each in watchers:
            await Send(each.slot, b"look", move=await CapClone(vmo))
        for word in (b"first", b"other"):
            for each in watchers:
                _ = await take(boot.endpoint, link=each.link)
            view[SIZE : SIZE + 5] = word
            for each in watchers:
                await Send(each.slot, b"written")
        for each in watchers:
            await ended_well(each)
        view.release()

    rig.run(root, programs={"watcher": watcher})


def test_a_vmo_is_shared_once_and_then_written_through_its_view_alone(rig: Rig) -> None:
    async def root(boot: BootImage) -> None:
        vmo = await VmoCreate(100)
        alias = await CapClone(vmo)
        view = await VmoShare(vmo)
        for slot in (vmo, alias):
            await refused(VmoShare(slot), Status.PERMISSION_DENIED)
            await refused(VmoWrite(slot, 0, b"x"), Status.PERMISSION_DENIED)
            await refused(VmoSeal(slot), Status.PERMISSION_DENIED)
        view.release()
        await refused(VmoShare(vmo), Status.PERMISSION_DENIED)

        seen = await VmoWatch(vmo)

        assert bytes(seen) == bytes(PAGE_SIZE)
        seen.release()

    rig.run(root)


def test_a_sealed_vmo_is_not_shared(rig: Rig) -> None:
    async def root(boot: BootImage) -> None:
        vmo = await VmoCreate(100)
        await VmoSeal(vmo)

        await refused(VmoShare(vmo), Status.PERMISSION_DENIED)

        view = await VmoMap(vmo)
        assert view.readonly
        view.release()

    rig.run(root)


def test_only_a_shared_vmo_is_watched_and_it_is_never_mapped(rig: Rig) -> None:
    async def root(boot: BootImage) -> None:
        unsealed = await VmoCreate(100)
        sealed = await VmoCreate(100)
        await VmoSeal(sealed)
        shared = await VmoCreate(100)
        view = await VmoShare(shared)
        before = await TaskStats()

        await refused(VmoWatch(unsealed), Status.PERMISSION_DENIED)
        await refused(VmoWatch(sealed), Status.PERMISSION_DENIED)
        await refused(VmoMap(shared), Status.PERMISSION_DENIED)

        assert await TaskStats() == before
        await VmoWrite(unsealed, 0, b"still mine")
        view.release()

    rig.run(root)


def test_sharing_needs_manage_and_watching_needs_map(rig: Rig) -> None:
    async def root(boot: BootImage) -> None:
        vmo = await VmoCreate(100)
        map_only = await CapDerive(vmo, Rights.MAP)
        manage_only = await CapDerive(vmo, Rights.MANAGE)

        await refused(VmoShare(map_only), Status.PERMISSION_DENIED)
        view = await VmoShare(manage_only)
        await refused(VmoWatch(manage_only), Status.PERMISSION_DENIED)

        seen = await VmoWatch(map_only)
        view[7] = 7
        assert seen[7] == 7
        seen.release()
        view.release()

    rig.run(root)


def test_what_is_no_vmo_is_neither_shared_nor_watched(rig: Rig) -> None:
    async def root(boot: BootImage) -> None:
        link = await LinkCreate(boot.endpoint)
        for slot in (link.slot, boot.endpoint, Slot(70), Slot(-1)):
            await refused(VmoShare(slot), Status.INVALID_ARGUMENT)
            await refused(VmoWatch(slot), Status.INVALID_ARGUMENT)

    rig.run(root)


def test_nobody_writes_through_what_he_watches(rig: Rig) -> None:
    async def watcher(boot: BootImage) -> None:
        message = await take(boot.endpoint)
        assert message.cap is not None
        await refused(VmoWrite(message.cap, 0, b"x"), Status.PERMISSION_DENIED)
        await refused(VmoShare(message.cap), Status.PERMISSION_DENIED)
        await refused(VmoSeal(message.cap), Status.PERMISSION_DENIED)
        await refused(CapDerive(message.cap, Rights.MAP | Rights.MANAGE), Status.PERMISSION_DENIED)
        view = await VmoWatch(message.cap)
        try:
            view[0] = 1
        except TypeError:
            await tell(boot, b"read only")
        view.release()

    async def root(boot: BootImage) -> None:
        spawned = await start(boot, "watcher")
        vmo = await VmoCreate(100)
        view = await VmoShare(vmo)
        await Send(spawned.slot, b"look", move=await CapClone(vmo))
        assert (await take(boot.endpoint)).data == b"read only"
        await ended_well(spawned)
        assert bytes(view) == bytes(PAGE_SIZE)
        view.release()

    rig.run(root, programs={"watcher": watcher})


def test_a_shared_vmo_moves_with_map_only_and_on_to_the_next(rig: Rig) -> None:
    async def middle(boot: BootImage) -> None:
        message = await take(boot.endpoint)
        assert message.cap is not None
        info = await CapQuery(message.cap)
        assert (info.kind, info.rights, info.length) == (CapKind.VMO, Rights.MAP, LENGTH)
        await tell(boot, b"on", move=message.cap)
        await refused(VmoWatch(message.cap), Status.INVALID_ARGUMENT)

    async def root(boot: BootImage) -> None:
        spawned = await start(boot, "middle")
        vmo = await VmoCreate(SIZE)
        view = await VmoShare(vmo)
        await Send(spawned.slot, b"look", move=vmo)
        await refused(CapQuery(vmo), Status.INVALID_ARGUMENT)
        back = await take(boot.endpoint)
        assert back.cap is not None
        view[:4] = b"live"

        seen = await VmoWatch(back.cap)

        assert bytes(seen[:4]) == b"live"
        seen.release()
        view.release()
        await ended_well(spawned)

    rig.run(root, programs={"middle": middle})


def test_a_closed_slot_ends_no_mapping(rig: Rig) -> None:
    async def root(boot: BootImage) -> None:
        vmo = await VmoCreate(100)
        written = await VmoShare(vmo)
        seen = await VmoWatch(vmo)

        await CapClose(vmo)

        written[:4] = b"kept"
        assert bytes(seen[:4]) == b"kept"
        written.release()
        assert bytes(seen[:4]) == b"kept"
        seen.release()

    rig.run(root)


def test_the_last_words_of_a_dead_writer_are_read(rig: Rig) -> None:
    async def writer(boot: BootImage) -> None:
        vmo = await VmoCreate(100)
        view = await VmoShare(vmo)
        await tell(boot, b"watch", move=await CapClone(vmo))
        _ = await take(boot.endpoint)
        view[:10] = b"last words"
        await tell(boot, b"written")
        _ = await take(boot.endpoint)

    async def root(boot: BootImage) -> None:
        before = await TaskStats()
        for killed in (True, False):
            spawned = await start(boot, "writer")
            seen = await _watched(boot, spawned.link)
            await Send(spawned.slot, b"write")
            _ = await take(boot.endpoint, link=spawned.link)
            if killed:
                await Kill(spawned.pid)
                assert (await ended(spawned)).signal
            else:
                await Send(spawned.slot, b"end")
                await ended_well(spawned)
            await CapClose(spawned.slot)

            assert bytes(seen[:10]) == b"last words"

            seen.release()
        assert (await TaskStats()).vmo_size == before.vmo_size

    rig.run(root, programs={"writer": writer})


def test_a_shared_vmo_in_a_queue_outlives_its_writer(rig: Rig) -> None:
    async def writer(boot: BootImage) -> None:
        vmo = await VmoCreate(100)
        view = await VmoShare(vmo)
        view[:5] = b"early"
        await tell(boot, b"watch", move=vmo)
        view[:5] = b"later"

    async def root(boot: BootImage) -> None:
        spawned = await start(boot, "writer")
        await ended_well(spawned)

        seen = await _watched(boot)

        assert bytes(seen[:5]) == b"later"
        seen.release()

    rig.run(root, programs={"writer": writer})


def test_a_shared_vmo_is_no_bulk_data(rig: Rig) -> None:
    async def root(boot: BootImage) -> None:
        before = await holdings()
        vmo = await VmoCreate(100)
        view = await VmoShare(vmo)
        way = await LinkCreate(boot.endpoint)
        await Send(way.slot, b"bulk", move=vmo)
        given = await take(boot.endpoint)

        assert await accept_bulk(given.cap, 0, 100) is BulkFault.NOT_SEALED

        assert given.cap is not None
        await refused(CapQuery(given.cap), Status.INVALID_ARGUMENT)
        view.release()
        assert (await holdings()).vmo_size == before.vmo_size

    rig.run(root)


def test_a_shared_vmo_is_charged_until_the_last_slot_and_view_are_gone(rig: Rig) -> None:
    async def watcher(boot: BootImage) -> None:
        before = await _charged()
        message = await take(boot.endpoint)
        assert message.cap is not None
        first, second = await VmoWatch(message.cap), await VmoWatch(message.cap)
        assert (await _charged())[0] == before[0] + LENGTH
        await CapClose(message.cap)
        viewed = (before[0] + LENGTH, before[1] + LENGTH)
        assert await _charged() == viewed
        first.release()
        assert await _charged() == viewed, "the second view keeps it"
        second.release()
        assert await _charged() == before

    async def root(boot: BootImage) -> None:
        spawned = await start(boot, "watcher")
        before = await _charged()
        vmo = await VmoCreate(SIZE)
        view = await VmoShare(vmo)
        assert (await _charged())[0] == before[0] + LENGTH
        await Send(spawned.slot, b"yours", move=vmo)
        assert await _charged() == (before[0] + LENGTH, before[1] + LENGTH), "the view keeps it"
        await ended_well(spawned)
        view.release()
        assert await _charged() == before

    rig.run(root, programs={"watcher": watcher})


def test_a_part_of_a_view_keeps_the_mapping(rig: Rig) -> None:
    async def root(boot: BootImage) -> None:
        before = await holdings()
        vmo = await VmoCreate(100)
        view = await VmoShare(vmo)
        await CapClose(vmo)
        words = view[8:24].cast("Q")
        view.release()
        words[1] = 1 << 63
        assert (await holdings()).vmo_size == before.vmo_size + PAGE_SIZE
        assert words[1] == 1 << 63
        words.release()
        assert await holdings() == before

    rig.run(root)


def test_what_was_written_before_a_message_is_seen_after_a_fence(rig: Rig) -> None:
    async def watcher(boot: BootImage) -> None:
        view = (await _watched(boot)).cast("Q")  # the second word is never behind the first
        for count in range(1, 20):
            assert (await take(boot.endpoint)).data == b"%d" % count
            await Fence()
            first = view[0]
            await Fence()
            assert view[1] >= first >= count
        view.release()

    async def root(boot: BootImage) -> None:
        spawned = await start(boot, "watcher")
        vmo = await VmoCreate(16)
        view = await VmoShare(vmo)
        await Send(spawned.slot, b"look", move=vmo)
        words = view.cast("Q")
        for count in range(1, 20):
            words[1] = count
            words[0] = count
            await Send(spawned.slot, b"%d" % count, deadline=await soon())
        await ended_well(spawned)
        words.release()
        view.release()

    rig.run(root, programs={"watcher": watcher})


def test_the_mapped_clock_is_the_kernels_and_the_machines_goes_with_it(rig: Rig) -> None:
    async def look(boot: BootImage) -> None:
        clock = await ClockMap()
        for _ in range(3):
            first = await Now()
            middle = clock.monotonic()
            assert first <= middle <= await Now()
        wall, since = clock.wall(), clock.monotonic()
        assert wall > YEAR_2020
        _ = await SleepUntil(Nanos(await Now() + 5 * MS))
        gone = clock.monotonic() - since
        assert gone >= 5 * MS
        assert abs(clock.wall() - wall - gone) < 1000 * MS

    async def root(boot: BootImage) -> None:
        await look(boot)
        await ended_well(await start(boot, "looker"))

    rig.run(root, programs={"looker": look})


YEAR_2020 = 1_577_836_800_000_000_000  # nanoseconds since 1970; no machine of ours is older
