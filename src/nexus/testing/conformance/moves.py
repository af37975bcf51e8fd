"""Promise 2: a capability moves with a message that was sent, and only then."""

from collections.abc import Awaitable, Callable

from nexus.abi import (
    NO_WAIT,
    SLOTS_MAX,
    BootImage,
    CapClone,
    CapClose,
    CapQuery,
    EndpointClose,
    EndpointCreate,
    Kill,
    LinkCreate,
    LinkTerms,
    Nanos,
    NewLink,
    Now,
    Recv,
    Rights,
    Send,
    Slot,
    Status,
    TaskStats,
    VmoCreate,
    VmoMap,
    VmoSeal,
    VmoWrite,
    service_id,
)
from nexus.testing.conformance.steps import (
    MS,
    ended,
    ended_well,
    fill,
    gone,
    holdings,
    nothing_queued,
    refused,
    soon,
    start,
    take,
    tell,
)
from nexus.testing.rig import Rig


async def _works(endpoint: Slot, link: NewLink) -> None:
    """Assert that the capability of a link is still held and still leads to its endpoint."""
    await Send(link.slot, b"still mine")
    message = await take(endpoint, link=link.link)
    assert message.data == b"still mine"


def test_a_moved_capability_leaves_the_sender_and_arrives(rig: Rig) -> None:
    async def root(boot: BootImage) -> None:
        way = await LinkCreate(boot.endpoint)
        target = await EndpointCreate()
        cap = await LinkCreate(target)

        await Send(way.slot, b"take it", move=cap.slot)

        await refused(Send(cap.slot, b"gone"), Status.INVALID_ARGUMENT)
        message = await take(boot.endpoint)
        assert message.data == b"take it"
        assert message.cap is not None
        await Send(message.cap, b"through it")
        assert (await take(target)).link == cap.link

    rig.run(root)


def test_a_moved_capability_lands_in_the_lowest_free_slot(rig: Rig) -> None:
    async def root(boot: BootImage) -> None:
        way = await LinkCreate(boot.endpoint)
        cap = await LinkCreate(boot.endpoint)
        fillers = [await CapClone(way.slot) for _ in range(6)]
        used = {boot.endpoint, way.slot, *fillers}
        await Send(way.slot, b"m", move=cap.slot)
        for filler in (fillers[4], fillers[1]):
            await CapClose(filler)
            used.remove(filler)

        message = await take(boot.endpoint)

        assert message.cap == min(set(range(SLOTS_MAX)) - used)

    rig.run(root)


def _kept_after(
    rig: Rig, status: Status, attempt: Callable[[Slot, Slot], Awaitable[None]], terms: LinkTerms
) -> None:
    """Run an attempt to move a link and a VMO that must fail and leave both where they were."""

    async def root(boot: BootImage) -> None:
        full = await EndpointCreate()
        way = await LinkCreate(full, terms)
        cap = await LinkCreate(boot.endpoint)
        vmo = await VmoCreate(10)
        await VmoSeal(vmo)
        _, reason = await fill(way.slot, bytes(terms.size // 2))
        assert reason in {Status.QUEUE_FULL, Status.NO_SPACE}
        before = await holdings()

        await attempt(way.slot, cap.slot)
        await attempt(way.slot, vmo)

        assert await holdings() == before, status
        await _works(boot.endpoint, cap)
        assert (await CapQuery(vmo)).rights == Rights.MAP | Rights.MANAGE

    rig.run(root)


def test_a_move_refused_with_queue_full_keeps_the_capability(rig: Rig) -> None:
    async def attempt(way: Slot, cap: Slot) -> None:
        await refused(Send(way, b"x", move=cap), Status.QUEUE_FULL)

    _kept_after(rig, Status.QUEUE_FULL, attempt, LinkTerms(1, 200, 0))


def test_a_move_refused_with_no_space_keeps_the_capability(rig: Rig) -> None:
    async def attempt(way: Slot, cap: Slot) -> None:
        await refused(Send(way, b"x" * 101, move=cap), Status.NO_SPACE)

    _kept_after(rig, Status.NO_SPACE, attempt, LinkTerms(8, 200, 0))


def test_a_move_that_timed_out_keeps_the_capability(rig: Rig) -> None:
    async def attempt(way: Slot, cap: Slot) -> None:
        deadline = Nanos(await Now() + 5 * MS)
        await refused(Send(way, b"x", move=cap, deadline=deadline), Status.TIMED_OUT)

    _kept_after(rig, Status.TIMED_OUT, attempt, LinkTerms(1, 200, 0))


def test_a_move_to_a_closed_endpoint_keeps_the_capability(rig: Rig) -> None:
    async def root(boot: BootImage) -> None:
        closed = await EndpointCreate()
        way = await LinkCreate(closed)
        cap = await LinkCreate(boot.endpoint)
        vmo = await VmoCreate(10)
        await VmoSeal(vmo)
        await EndpointClose(closed)

        await refused(Send(way.slot, b"x", move=cap.slot), Status.NO_SUCH_ENDPOINT)
        await refused(Send(way.slot, b"x", move=vmo), Status.NO_SUCH_ENDPOINT)

        await _works(boot.endpoint, cap)
        assert (await CapQuery(vmo)).length == 4096

    rig.run(root)


def test_a_malformed_send_keeps_the_capability(rig: Rig) -> None:
    async def root(boot: BootImage) -> None:
        way = await LinkCreate(boot.endpoint)
        cap = await LinkCreate(boot.endpoint)

        await refused(Send(way.slot, b"", move=cap.slot), Status.INVALID_ARGUMENT)
        await refused(Send(way.slot, b"\xf0", move=cap.slot), Status.INVALID_ARGUMENT)

        await _works(boot.endpoint, cap)
        await nothing_queued(boot.endpoint)

    rig.run(root)


def test_moving_an_empty_slot_sends_nothing(rig: Rig) -> None:
    async def root(boot: BootImage) -> None:
        way = await LinkCreate(boot.endpoint)

        for slot in (Slot(50), Slot(-1), Slot(SLOTS_MAX)):
            await refused(Send(way.slot, b"x", move=slot), Status.INVALID_ARGUMENT)

        await nothing_queued(boot.endpoint)

    rig.run(root)


def test_a_link_does_not_move_over_itself(rig: Rig) -> None:
    async def root(boot: BootImage) -> None:
        way = await LinkCreate(boot.endpoint)

        await refused(Send(way.slot, b"x", move=way.slot), Status.INVALID_ARGUMENT)

        await _works(boot.endpoint, way)

    rig.run(root)


def test_an_endpoint_does_not_move(rig: Rig) -> None:
    async def root(boot: BootImage) -> None:
        way = await LinkCreate(boot.endpoint)
        endpoint = await EndpointCreate()

        await refused(Send(way.slot, b"x", move=endpoint), Status.PERMISSION_DENIED)

        await nothing_queued(boot.endpoint)
        link = await LinkCreate(endpoint)
        await _works(endpoint, link)

    rig.run(root)


def test_an_unsealed_vmo_does_not_move(rig: Rig) -> None:
    async def root(boot: BootImage) -> None:
        way = await LinkCreate(boot.endpoint)
        vmo = await VmoCreate(10)

        await refused(Send(way.slot, b"x", move=vmo), Status.PERMISSION_DENIED)

        await nothing_queued(boot.endpoint)
        await VmoWrite(vmo, 0, b"mine")

    rig.run(root)


def test_a_sealed_vmo_moves_with_map_only_and_keeps_its_content(rig: Rig) -> None:
    async def child(boot: BootImage) -> None:
        message = await take(boot.endpoint)
        assert message.cap is not None
        info = await CapQuery(message.cap)
        assert info.rights == Rights.MAP
        assert info.length == 8192
        await refused(VmoWrite(message.cap, 0, b"x"), Status.PERMISSION_DENIED)
        await refused(VmoSeal(message.cap), Status.PERMISSION_DENIED)
        view = await VmoMap(message.cap)
        assert bytes(view[5000:5006]) == b"cargo\x00"
        view.release()

    async def root(boot: BootImage) -> None:
        spawned = await start(boot, "reader")
        vmo = await VmoCreate(8000)
        await VmoWrite(vmo, 5000, b"cargo")
        await VmoSeal(vmo)

        await Send(spawned.slot, b"bulk", move=vmo)

        await refused(CapQuery(vmo), Status.INVALID_ARGUMENT)
        await ended_well(spawned)

    rig.run(root, programs={"reader": child})


def test_a_full_table_at_the_receiver_loses_neither_message_nor_capability(rig: Rig) -> None:
    async def root(boot: BootImage) -> None:
        way = await LinkCreate(boot.endpoint)
        other = await LinkCreate(boot.endpoint)
        target = await EndpointCreate()
        cap = await LinkCreate(target)
        await Send(way.slot, b"with cap", move=cap.slot)
        await Send(way.slot, b"behind it")
        clones = [await CapClone(way.slot) for _ in range(SLOTS_MAX - (await TaskStats()).slots)]
        await refused(CapClone(way.slot), Status.NO_SPACE)

        await refused(Recv((boot.endpoint,), NO_WAIT), Status.NO_SPACE)
        await refused(Recv((boot.endpoint,), NO_WAIT, link=way.link), Status.NO_SPACE)
        await Send(other.slot, b"without cap")
        assert (await take(boot.endpoint)).data == b"without cap"
        await refused(Recv((boot.endpoint,), NO_WAIT), Status.NO_SPACE)

        await CapClose(clones[0])
        message = await take(boot.endpoint)
        assert message.data == b"with cap"
        assert message.cap == clones[0]
        assert (await take(boot.endpoint)).data == b"behind it"
        await Send(message.cap, b"works")
        assert (await take(target)).link == cap.link

    rig.run(root)


def test_a_full_table_in_another_task_keeps_the_message_queued(rig: Rig) -> None:
    async def child(boot: BootImage) -> None:
        first = await take(boot.endpoint)
        assert first.cap is not None
        count = SLOTS_MAX - (await TaskStats()).slots
        clones = [await CapClone(first.cap) for _ in range(count)]
        await tell(boot, b"full")
        assert (await take(boot.endpoint)).data == b"go on"
        for _ in range(2):
            await refused(Recv((boot.endpoint,), await soon()), Status.NO_SPACE)
        await CapClose(clones[7])
        second = await take(boot.endpoint)
        assert second.cap == clones[7]
        await Send(second.cap, b"arrived")

    async def root(boot: BootImage) -> None:
        spawned = await start(boot, "full")
        target = await EndpointCreate()
        first, second = await LinkCreate(target), await LinkCreate(target)
        await Send(spawned.slot, b"first", move=first.slot)
        assert (await take(boot.endpoint)).data == b"full"
        await Send(spawned.slot, b"go on")

        await Send(spawned.slot, b"second", move=second.slot)

        arrived = await take(target, link=second.link)
        assert arrived.data == b"arrived"
        assert arrived.sender.service == service_id("full")
        await ended_well(spawned)

    rig.run(root, programs={"full": child})


def test_an_unused_link_moves_as_it_is(rig: Rig) -> None:
    async def root(boot: BootImage) -> None:
        way = await LinkCreate(boot.endpoint)
        target = await EndpointCreate()
        cap = await LinkCreate(target, LinkTerms(3, 1000, 0))  # no delegation to spend
        links = (await TaskStats()).links

        for _ in range(3):
            await Send(way.slot, b"hop", move=cap.slot)
            message = await take(boot.endpoint)
            assert message.cap is not None
            cap = NewLink(message.cap, cap.link)
            await nothing_queued(target)

        assert (await TaskStats()).links == links
        assert await fill(cap.slot) == (3, Status.QUEUE_FULL)
        assert (await take(target)).link == cap.link

    rig.run(root)


def test_a_used_link_needs_a_delegation_to_move(rig: Rig) -> None:
    async def root(boot: BootImage) -> None:
        way = await LinkCreate(boot.endpoint)
        target = await EndpointCreate()
        cap = await LinkCreate(target)
        await Send(cap.slot, b"used")

        await refused(Send(way.slot, b"x", move=cap.slot), Status.NO_SPACE)

        await nothing_queued(boot.endpoint)
        assert (await take(target)).data == b"used"
        await _works(target, cap)

    rig.run(root)


def test_a_used_link_moves_as_a_fresh_one_of_the_same_terms(rig: Rig) -> None:
    async def child(boot: BootImage) -> None:
        message = await take(boot.endpoint)
        assert message.cap is not None
        assert await fill(message.cap, b"abc") == (3, Status.QUEUE_FULL)
        await refused(LinkCreate(message.cap, LinkTerms(3, 9, 0)), Status.NO_SPACE)
        await tell(boot, b"filled")

    async def root(boot: BootImage) -> None:
        spawned = await start(boot, "holder")
        target = await EndpointCreate()
        cap = await LinkCreate(target, LinkTerms(3, 9, 1))
        await Send(cap.slot, b"abc")
        await Send(cap.slot, b"def")

        await Send(spawned.slot, b"yours", move=cap.slot)

        await refused(Send(cap.slot, b"no longer mine"), Status.INVALID_ARGUMENT)
        assert (await take(target, link=cap.link)).data == b"abc"
        assert (await take(target, link=cap.link)).data == b"def"
        await gone(target, cap.link, only=True)
        assert (await take(boot.endpoint)).data == b"filled"
        messages = [await take(target) for _ in range(3)]
        assert {message.sender.service for message in messages} == {service_id("holder")}
        assert len({message.link for message in messages}) == 1
        assert messages[0].link != cap.link
        await ended_well(spawned)

    rig.run(root, programs={"holder": child})


def test_an_aliased_link_moves_as_a_fresh_one_and_the_alias_stays(rig: Rig) -> None:
    async def root(boot: BootImage) -> None:
        way = await LinkCreate(boot.endpoint)
        target = await EndpointCreate()
        cap = await LinkCreate(target, LinkTerms(2, 100, 1))
        alias = await CapClone(cap.slot)

        await Send(way.slot, b"x", move=cap.slot)

        await refused(Send(cap.slot, b"moved"), Status.INVALID_ARGUMENT)
        message = await take(boot.endpoint)
        assert message.cap is not None
        await Send(message.cap, b"over the fresh one")
        fresh = await take(target)
        assert fresh.link != cap.link
        await Send(alias, b"over the old one")
        assert (await take(target)).link == cap.link

    rig.run(root)


def test_an_aliased_link_without_a_delegation_does_not_move(rig: Rig) -> None:
    async def root(boot: BootImage) -> None:
        way = await LinkCreate(boot.endpoint)
        cap = await LinkCreate(boot.endpoint)
        alias = await CapClone(cap.slot)

        await refused(Send(way.slot, b"x", move=cap.slot), Status.NO_SPACE)
        await CapClose(alias)
        await Send(way.slot, b"x", move=cap.slot)

        assert (await take(boot.endpoint)).cap is not None

    rig.run(root)


def test_a_moved_link_survives_its_former_holder(rig: Rig) -> None:
    async def giver(boot: BootImage) -> None:
        inbox = await take(boot.endpoint)
        assert inbox.cap is not None
        await tell(boot, b"pass it on", move=inbox.cap)

    async def root(boot: BootImage) -> None:
        target = await EndpointCreate()
        cap = await LinkCreate(target)
        spawned = await start(boot, "giver")
        await Send(spawned.slot, b"hold this", move=cap.slot)
        await ended_well(spawned)

        message = await take(boot.endpoint)

        assert message.cap is not None
        await Send(message.cap, b"alive")
        back = await take(target)
        assert (back.data, back.link) == (b"alive", cap.link)
        await gone(boot.endpoint, spawned.link)

    rig.run(root, programs={"giver": giver})


def test_a_capability_in_an_unread_message_is_closed_with_its_endpoint(rig: Rig) -> None:
    async def root(boot: BootImage) -> None:
        unread = await EndpointCreate()
        way = await LinkCreate(unread)
        cap = await LinkCreate(boot.endpoint)
        await Send(way.slot, b"never read", move=cap.slot)

        await EndpointClose(unread)

        await gone(boot.endpoint, cap.link)
        await nothing_queued(boot.endpoint)

    rig.run(root)


def test_a_capability_in_flight_to_a_task_that_dies_is_closed(rig: Rig) -> None:
    async def sleeper(boot: BootImage) -> None:
        elsewhere = await EndpointCreate()
        await tell(boot, b"up")
        await take(elsewhere)

    async def root(boot: BootImage) -> None:
        spawned = await start(boot, "sleeper")
        assert (await take(boot.endpoint)).data == b"up"
        cap = await LinkCreate(boot.endpoint)
        await Send(spawned.slot, b"never read", move=cap.slot)

        await Kill(spawned.pid)

        assert (await ended(spawned)).signal == 9
        ends = {await gone(boot.endpoint, None), await gone(boot.endpoint, None)}
        assert ends == {spawned.link, cap.link}

    rig.run(root, programs={"sleeper": sleeper})
