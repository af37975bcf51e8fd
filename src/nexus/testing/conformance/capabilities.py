"""The capability table: 96 slots, rights derived downwards, refusals that change nothing."""

from typing import Any, Final

from nexus.abi import (
    NO_WAIT,
    SLOTS_MAX,
    AbiError,
    BootImage,
    Call,
    CapClone,
    CapClose,
    CapDerive,
    CapQuery,
    EndpointClose,
    EndpointCreate,
    LinkCreate,
    LinkTerms,
    Recv,
    ReplyRecv,
    Rights,
    Send,
    Slot,
    Status,
    TaskStats,
    Trap,
    VmoCreate,
    VmoMap,
    VmoSeal,
    VmoShare,
    VmoWatch,
    VmoWrite,
)
from nexus.testing.conformance.steps import (
    PAST,
    ended_well,
    gone,
    nothing_queued,
    refused,
    start,
    take,
)
from nexus.testing.rig import Rig

NO_SLOTS: Final = (Slot(-1), Slot(40), Slot(SLOTS_MAX - 1), Slot(SLOTS_MAX), Slot(1 << 31))


def test_a_task_has_96_slots(rig: Rig) -> None:
    async def child(boot: BootImage) -> None:
        await fill_table(boot, 2)

    async def root(boot: BootImage) -> None:
        await ended_well(await start(boot, "filler"))

    async def fill_table(boot: BootImage, used: int) -> None:
        assert (await TaskStats()).slots == used
        link = await LinkCreate(boot.endpoint)
        for _ in range(SLOTS_MAX - used - 1):
            await CapClone(link.slot)
        before = await TaskStats()
        assert before.slots == SLOTS_MAX
        for trap in (
            CapClone(link.slot),
            CapDerive(link.slot, Rights.SEND),
            EndpointCreate(),
            LinkCreate(boot.endpoint),
            VmoCreate(1),
        ):
            await refused(trap, Status.NO_SPACE)
        assert await TaskStats() == before
        await CapClose(Slot(50))
        assert await CapClone(link.slot) == Slot(50)

    rig.run(root, programs={"filler": child})


def _traps_on(slot: Slot, endpoint: Slot) -> tuple[Trap[Any], ...]:
    """Every trap that takes a slot, with this one."""
    reply_recv = ReplyRecv((slot,), PAST)
    nested = ReplyRecv((slot, endpoint), NO_WAIT)
    return (
        EndpointClose(slot),
        LinkCreate(slot),
        Send(slot, b"x"),
        Recv((slot,), NO_WAIT),
        Recv((slot,), PAST),
        Recv((endpoint, slot), PAST),
        reply_recv,
        nested,
        CapClone(slot),
        CapDerive(slot, Rights.SEND),
        CapClose(slot),
        CapQuery(slot),
        VmoWrite(slot, 0, b"x"),
        VmoSeal(slot),
        VmoMap(slot),
        VmoShare(slot),
        VmoWatch(slot),
    )


def test_every_trap_refuses_a_slot_that_holds_nothing(rig: Rig) -> None:
    async def sweep(boot: BootImage) -> None:
        link = await LinkCreate(boot.endpoint)
        assert link.link is not None
        await Send(link.slot, b"queued")
        before = await TaskStats()
        for slot in NO_SLOTS:
            for trap in _traps_on(slot, boot.endpoint):
                await refused(trap, Status.INVALID_ARGUMENT)
            call = Call(slot, b"x", boot.endpoint, link.link, PAST)
            await refused(call, Status.INVALID_ARGUMENT)
            assert call.sent is False
        assert await TaskStats() == before
        assert (await take(boot.endpoint)).data == b"queued"

    async def root(boot: BootImage) -> None:
        spawned = await start(boot, "sweeper")
        await ended_well(spawned)
        await gone(boot.endpoint, spawned.link)
        await sweep(boot)

    rig.run(root, programs={"sweeper": sweep})


def test_every_trap_refuses_a_slot_without_its_right(rig: Rig) -> None:
    async def root(boot: BootImage) -> None:
        link = await LinkCreate(boot.endpoint)
        vmo = await VmoCreate(10)
        await VmoSeal(vmo)
        before = await TaskStats()
        for trap in (
            Send(boot.endpoint, b"x"),
            Send(vmo, b"x"),
            Recv((link.slot,), PAST),
            Recv((vmo,), PAST),
            ReplyRecv((link.slot,), PAST),
            EndpointClose(link.slot),
            LinkCreate(vmo, LinkTerms(1, 1, 0)),
            CapQuery(link.slot),
            CapQuery(boot.endpoint),
            CapClone(boot.endpoint),
            CapDerive(link.slot, Rights.SEND | Rights.MANAGE),
            CapDerive(link.slot, Rights.RECV),
            CapDerive(vmo, Rights.MAP | Rights.SEND),
            CapDerive(boot.endpoint, Rights.SEND),
        ):
            await refused(trap, Status.PERMISSION_DENIED)
        assert await TaskStats() == before

    rig.run(root)


def test_rights_unknown_to_the_abi_are_not_derived(rig: Rig) -> None:
    async def root(boot: BootImage) -> None:
        link = await LinkCreate(boot.endpoint)

        await refused(CapDerive(link.slot, Rights(16 | 1)), Status.PERMISSION_DENIED)

    rig.run(root)


def test_derived_rights_are_a_subset_and_act_like_one(rig: Rig) -> None:
    async def child(boot: BootImage) -> None:
        await take(boot.endpoint)

    async def root(boot: BootImage) -> None:
        spawned = await start(boot, "server", delegations=4)
        send_only = await CapDerive(spawned.slot, Rights.SEND)
        # MANAGE frees from the terms of the link; without it they bind.
        await LinkCreate(spawned.slot, LinkTerms(9, 5000, 1))
        await refused(LinkCreate(send_only, LinkTerms(9, 100, 0)), Status.PERMISSION_DENIED)
        await LinkCreate(send_only, LinkTerms(8, 4096, 0))
        await refused(CapDerive(send_only, Rights.SEND | Rights.MANAGE), Status.PERMISSION_DENIED)
        await Send(send_only, b"go")
        await ended_well(spawned)

    rig.run(root, programs={"server": child})


def test_a_clone_has_the_rights_of_its_original(rig: Rig) -> None:
    async def root(boot: BootImage) -> None:
        vmo = await VmoCreate(100)
        map_only = await CapDerive(vmo, Rights.MAP)
        for slot in (vmo, map_only):
            clone = await CapClone(slot)
            assert await CapQuery(clone) == await CapQuery(slot)
        assert (await CapQuery(map_only)).rights == Rights.MAP

    rig.run(root)


def test_a_closed_slot_is_the_next_to_be_used(rig: Rig) -> None:
    async def root(boot: BootImage) -> None:
        link = await LinkCreate(boot.endpoint)
        slots = [await CapClone(link.slot) for _ in range(10)]
        for index in (7, 2, 5):
            await CapClose(slots[index])
        assert [await CapClone(link.slot) for _ in range(3)] == [slots[2], slots[5], slots[7]]

    rig.run(root)


def test_a_slot_closes_once(rig: Rig) -> None:
    async def root(boot: BootImage) -> None:
        link = await LinkCreate(boot.endpoint)
        await CapClose(link.slot)
        await refused(CapClose(link.slot), Status.INVALID_ARGUMENT)
        await gone(boot.endpoint, link.link)
        await nothing_queued(boot.endpoint)

    rig.run(root)


def test_a_trap_object_may_be_awaited_again(rig: Rig) -> None:
    async def root(boot: BootImage) -> None:
        link = await LinkCreate(boot.endpoint, LinkTerms(2, 100, 0))
        send = Send(link.slot, b"first")
        recv = Recv((boot.endpoint,), NO_WAIT)
        await send
        send.data = b"second"
        await send
        await refused(send, Status.QUEUE_FULL)
        assert [(await recv).data, (await recv).data] == [b"first", b"second"]
        await refused(recv, Status.QUEUE_EMPTY)
        await send
        assert (await recv).data == b"second"

    rig.run(root)


def test_nothing_but_a_status_is_raised_by_a_refusal(rig: Rig) -> None:
    async def root(boot: BootImage) -> None:
        for trap in _traps_on(Slot(55), boot.endpoint):
            try:
                await trap
            except AbiError as error:
                assert isinstance(error.status, Status)
                assert not isinstance(error, OSError)
            else:
                raise AssertionError(f"{type(trap).__name__} was not refused")

    rig.run(root)
