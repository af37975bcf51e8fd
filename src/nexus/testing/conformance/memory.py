"""Memory objects: bounds, sealing, mapping and the budget they are charged to."""

from nexus.abi import (
    BUDGET_SIZE_DEFAULT,
    PAGE_SIZE,
    VMO_SIZE_MAX,
    AbiError,
    BootImage,
    CapClone,
    CapClose,
    CapDerive,
    CapKind,
    CapQuery,
    EndpointCreate,
    LinkCreate,
    Rights,
    Send,
    Slot,
    Status,
    TaskStats,
    VmoCreate,
    VmoMap,
    VmoSeal,
    VmoWrite,
)
from nexus.testing.conformance.steps import ended_well, refused, start, take
from nexus.testing.rig import Rig


def test_a_vmo_has_a_length_in_whole_pages(rig: Rig) -> None:
    async def root(boot: BootImage) -> None:
        for size, length in ((1, 4096), (4096, 4096), (4097, 8192), (VMO_SIZE_MAX, VMO_SIZE_MAX)):
            before = (await TaskStats()).vmo_size
            vmo = await VmoCreate(size)
            info = await CapQuery(vmo)
            assert (info.kind, info.length) == (CapKind.VMO, length)
            assert info.rights == Rights.MAP | Rights.MANAGE
            assert (await TaskStats()).vmo_size == before + length
            await CapClose(vmo)
            assert (await TaskStats()).vmo_size == before

    rig.run(root)


def test_vmo_sizes_outside_the_limits_are_refused(rig: Rig) -> None:
    async def root(boot: BootImage) -> None:
        before = await TaskStats()
        for size in (0, -1, VMO_SIZE_MAX + 1):
            await refused(VmoCreate(size), Status.INVALID_ARGUMENT)
        assert await TaskStats() == before

    rig.run(root)


def test_writes_outside_the_length_are_refused(rig: Rig) -> None:
    async def root(boot: BootImage) -> None:
        vmo = await VmoCreate(PAGE_SIZE)
        for offset, data in (
            (-1, b"x"),
            (PAGE_SIZE, b"x"),
            (PAGE_SIZE - 1, b"xy"),
            (1 << 40, b"x"),
        ):
            await refused(VmoWrite(vmo, offset, data), Status.INVALID_ARGUMENT)
        await VmoWrite(vmo, PAGE_SIZE - 1, b"x")
        await VmoWrite(vmo, 0, b"start")
        await VmoSeal(vmo)

        view = await VmoMap(vmo)

        assert bytes(view) == b"start" + bytes(PAGE_SIZE - 6) + b"x"
        view.release()

    rig.run(root)


def test_only_a_sealed_vmo_is_mapped(rig: Rig) -> None:
    async def root(boot: BootImage) -> None:
        vmo = await VmoCreate(100)

        await refused(VmoMap(vmo), Status.PERMISSION_DENIED)
        await VmoSeal(vmo)

        view = await VmoMap(vmo)
        assert view.readonly
        assert len(view) == PAGE_SIZE
        view.release()

    rig.run(root)


def test_a_sealed_vmo_is_not_written(rig: Rig) -> None:
    async def root(boot: BootImage) -> None:
        vmo = await VmoCreate(100)
        await VmoWrite(vmo, 0, b"for ever")
        await VmoSeal(vmo)

        await refused(VmoWrite(vmo, 0, b"changed"), Status.PERMISSION_DENIED)

        view = await VmoMap(vmo)
        assert bytes(view[:8]) == b"for ever"
        view.release()

    rig.run(root)


def test_memory_without_the_right_is_refused(rig: Rig) -> None:
    async def root(boot: BootImage) -> None:
        vmo = await VmoCreate(100)
        map_only = await CapDerive(vmo, Rights.MAP)
        manage_only = await CapDerive(vmo, Rights.MANAGE)

        await refused(VmoWrite(map_only, 0, b"x"), Status.PERMISSION_DENIED)
        await refused(VmoSeal(map_only), Status.PERMISSION_DENIED)
        await VmoWrite(manage_only, 0, b"x")
        await VmoSeal(manage_only)
        await refused(VmoMap(manage_only), Status.PERMISSION_DENIED)
        await refused(CapQuery(manage_only), Status.PERMISSION_DENIED)

        view = await VmoMap(map_only)
        assert view[0] == ord("x")
        view.release()

    rig.run(root)


def test_what_is_no_vmo_is_not_treated_as_one(rig: Rig) -> None:
    async def root(boot: BootImage) -> None:
        link = await LinkCreate(boot.endpoint)
        # What a slot holds is looked at before its rights, as VmoMap says.
        for slot in (link.slot, boot.endpoint, Slot(70), Slot(-1)):
            await refused(VmoMap(slot), Status.INVALID_ARGUMENT)
            await refused(VmoWrite(slot, 0, b"x"), Status.INVALID_ARGUMENT)
            await refused(VmoSeal(slot), Status.INVALID_ARGUMENT)

    rig.run(root)


def test_a_mapping_outlives_its_slot(rig: Rig) -> None:
    async def root(boot: BootImage) -> None:
        vmo = await VmoCreate(100)
        await VmoWrite(vmo, 0, b"kept")
        await VmoSeal(vmo)
        view = await VmoMap(vmo)

        await CapClose(vmo)

        assert bytes(view[:4]) == b"kept"
        view.release()

    rig.run(root)


def test_an_alias_of_a_vmo_is_the_same_memory_and_is_charged_once(rig: Rig) -> None:
    async def root(boot: BootImage) -> None:
        before = await TaskStats()
        vmo = await VmoCreate(10_000)
        one = await TaskStats()
        alias = await CapClone(vmo)
        two = await TaskStats()
        assert one.vmo_size == two.vmo_size == before.vmo_size + 12_288
        await VmoWrite(alias, 0, b"through the alias")
        await CapClose(alias)
        await VmoSeal(vmo)
        view = await VmoMap(vmo)
        assert bytes(view[:17]) == b"through the alias"
        view.release()
        await CapClose(vmo)
        assert await TaskStats() == before

    rig.run(root)


def test_a_vmo_over_the_budget_is_refused_and_the_request_kept(rig: Rig) -> None:
    async def child(boot: BootImage) -> None:
        before = await TaskStats()
        assert before.budget_total == 40_000
        assert before.budget_used + before.budget_free == 40_000
        assert (before.refused_size, before.refused_align) == (0, 0)

        await refused(VmoCreate(40_000), Status.NO_SPACE)

        after = await TaskStats()
        assert after.refused_size == 40_000
        assert after.refused_align == PAGE_SIZE
        assert after._replace(refused_size=0, refused_align=0) == before
        vmo = await VmoCreate(32_768)
        assert (await TaskStats()).budget_used >= before.budget_used + 32_768
        await refused(VmoCreate(8192), Status.NO_SPACE)
        await CapClose(vmo)
        assert (await TaskStats()).budget_used == before.budget_used
        await VmoCreate(32_768)

    async def root(boot: BootImage) -> None:
        assert (await TaskStats()).budget_total == BUDGET_SIZE_DEFAULT
        await ended_well(await start(boot, "hungry", budget=40_000))

    rig.run(root, programs={"hungry": child})


def test_endpoints_and_links_are_charged_to_the_budget(rig: Rig) -> None:
    async def child(boot: BootImage) -> None:
        made = []
        try:
            while True:
                made.append(await EndpointCreate())
        except AbiError as error:
            assert error.status is Status.NO_SPACE
        stats = await TaskStats()
        assert 0 < len(made) < 80, "the budget and not the endpoint limit refused"
        assert stats.refused_size > stats.budget_free
        for slot in made:
            await CapClose(slot)
        assert (await TaskStats()).budget_used < stats.budget_used

    async def root(boot: BootImage) -> None:
        await ended_well(await start(boot, "maker", budget=8000))

    rig.run(root, programs={"maker": child})


def test_a_moved_vmo_is_charged_to_its_new_holder(rig: Rig) -> None:
    async def child(boot: BootImage) -> None:
        before = await TaskStats()
        message = await take(boot.endpoint)
        assert message.cap is not None
        assert (await TaskStats()).vmo_size == before.vmo_size + 8192
        await CapClose(message.cap)
        assert (await TaskStats()).vmo_size == before.vmo_size

    async def root(boot: BootImage) -> None:
        spawned = await start(boot, "taker")
        before = await TaskStats()
        vmo = await VmoCreate(8000)
        await VmoSeal(vmo)

        await Send(spawned.slot, b"yours", move=vmo)

        after = await TaskStats()
        assert (after.vmo_size, after.budget_used) == (before.vmo_size, before.budget_used)
        await ended_well(spawned)

    rig.run(root, programs={"taker": child})
