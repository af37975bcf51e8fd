"""Links and endpoints on the simulated kernel: every promise and every refusal."""

from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import pytest

from nexus.abi import (
    CONTROL_LINK_SIZE,
    LINK_SIZE_MAX,
    MESSAGE_SIZE_MAX,
    NEVER,
    NO_WAIT,
    AbiError,
    BootImage,
    Call,
    CapClone,
    CapClose,
    CapDerive,
    CapQuery,
    EndpointClose,
    EndpointCreate,
    Event,
    EventKind,
    Exit,
    Kill,
    LinkCreate,
    LinkId,
    LinkTerms,
    Message,
    Nanos,
    NewLink,
    Now,
    PeerGone,
    Program,
    Recv,
    ReplyRecv,
    Rights,
    Send,
    SleepUntil,
    Slot,
    Spawn,
    Spawned,
    SpawnSpec,
    Status,
    TaskStats,
    Trap,
    VmoCreate,
    VmoSeal,
    VmoWrite,
    Wait,
    service_id,
)
from nexus.kernel.sim import SimKernel

Main = Callable[[BootImage], Coroutine[Trap[Any], Any, int | None]]
MS = 1_000_000


def run(main: Main, *, seed: int = 1, cpu_count: int = 1, **programs: Main) -> list[Event]:
    """Run a root task to its end; a failed assertion in any task fails the test."""
    events: list[Event] = []
    table = {name: Program(name=name, main=task, digest=name) for name, task in programs.items()}
    kernel = SimKernel(table, seed=seed, recorder=events.append, cpu_count=cpu_count)
    root = Program(name="root", main=main, digest="root")
    kernel.run(root, b"", until=Nanos(kernel.now + 60_000 * MS))
    assert kernel.crashes == []
    assert set(kernel.resources().values()) == {0}
    return events


async def refused(trap: Awaitable[Any]) -> Status:
    try:
        answer = await trap
    except AbiError as refusal:
        return refusal.status
    raise AssertionError(f"not refused, but answered {answer!r}")


async def later(span: int) -> Nanos:
    return Nanos(await Now() + span)


async def loop(terms: LinkTerms = LinkTerms()) -> tuple[Slot, NewLink]:  # noqa: B008
    """An endpoint of one's own and a link into it."""
    endpoint = await EndpointCreate()
    return endpoint, await LinkCreate(endpoint, terms)


async def start(boot: BootImage, program: str, delegations: int = 4) -> Spawned:
    return await Spawn(SpawnSpec(program, program, boot.endpoint, delegations=delegations))


# ---- queues


def test_a_queue_holds_exactly_its_depth_in_messages() -> None:
    async def main(boot: BootImage) -> None:
        endpoint, link = await loop(LinkTerms(depth=3, size=1000))

        for number in range(3):
            await Send(link.slot, bytes([number]))

        assert await refused(Send(link.slot, b"x")) is Status.QUEUE_FULL
        got = [(await Recv((endpoint,), NO_WAIT)).data for _ in range(3)]
        assert got == [b"\x00", b"\x01", b"\x02"]
        assert await refused(Recv((endpoint,), NO_WAIT)) is Status.QUEUE_EMPTY

    run(main)


def test_a_queue_holds_exactly_its_size_in_bytes() -> None:
    async def main(boot: BootImage) -> None:
        _, link = await loop(LinkTerms(depth=8, size=100))

        await Send(link.slot, b"a" * 60)
        assert await refused(Send(link.slot, b"b" * 41)) is Status.NO_SPACE
        await Send(link.slot, b"c" * 40)

        counters = await TaskStats()
        assert (counters.queued, counters.queued_size) == (2, 100)
        assert await refused(Send(link.slot, b"d")) is Status.NO_SPACE

    run(main)


def test_a_message_that_never_fits_is_no_space_even_with_a_deadline() -> None:
    async def main(boot: BootImage) -> None:
        _, link = await loop(LinkTerms(depth=8, size=100))
        before = await Now()

        status = await refused(Send(link.slot, b"x" * 101, deadline=await later(5 * MS)))

        assert status is Status.NO_SPACE
        assert await Now() - before < MS

    run(main)


@pytest.mark.parametrize("size", [1, 8192, MESSAGE_SIZE_MAX])
def test_bytes_arrive_as_they_were_sent(size: int) -> None:
    async def main(boot: BootImage) -> None:
        endpoint, link = await loop()
        data = bytes(index % 239 for index in range(size))

        await Send(link.slot, bytearray(data))
        message = await Recv((endpoint,), NO_WAIT)

        assert message.data == data
        assert isinstance(message.data, bytes)
        counters = await TaskStats()
        assert counters.sent_size == counters.received_size == size

    run(main)


def test_a_sent_buffer_may_be_changed_afterwards() -> None:
    async def main(boot: BootImage) -> None:
        endpoint, link = await loop()
        buffer = bytearray(b"first")

        await Send(link.slot, buffer)
        buffer[:] = b"later"

        assert (await Recv((endpoint,), NO_WAIT)).data == b"first"

    run(main)


@pytest.mark.parametrize("data", [b"", b"x" * (MESSAGE_SIZE_MAX + 1), b"\xf0", b"\xffabc"])
def test_a_misshapen_message_is_invalid(data: bytes) -> None:
    async def main(boot: BootImage) -> None:
        _, link = await loop()

        assert await refused(Send(link.slot, data)) is Status.INVALID_ARGUMENT
        assert (await TaskStats()).sent == 0

    run(main)


def test_the_queues_of_two_holders_are_apart() -> None:
    async def main(boot: BootImage) -> None:
        endpoint, first = await loop(LinkTerms(depth=2))
        second = await LinkCreate(endpoint, LinkTerms(depth=2))

        await Send(first.slot, b"1")
        await Send(first.slot, b"2")

        assert await refused(Send(first.slot, b"3")) is Status.QUEUE_FULL
        await Send(second.slot, b"4")

    run(main)


def test_links_are_served_in_rotation() -> None:
    async def main(boot: BootImage) -> None:
        endpoint, first = await loop()
        second = await LinkCreate(endpoint)
        for data in (b"a1", b"a2", b"a3"):
            await Send(first.slot, data)
        for data in (b"b1", b"b2"):
            await Send(second.slot, data)

        got = [(await Recv((endpoint,), NO_WAIT)).data for _ in range(5)]

        assert got == [b"a1", b"b1", b"a2", b"b2", b"a3"]

    run(main)


def test_no_source_of_a_wait_set_starves() -> None:
    async def main(boot: BootImage) -> None:
        one, first = await loop()
        two, second = await loop()
        for _ in range(4):
            await Send(first.slot, b"a")
        await Send(second.slot, b"b")

        got = [await Recv((one, two), NO_WAIT) for _ in range(2)]

        assert sorted(message.data for message in got) == [b"a", b"b"]
        assert {message.source for message in got} == {one, two}

    run(main)


def test_a_filtered_receive_takes_from_its_link_only_and_keeps_the_rest() -> None:
    async def main(boot: BootImage) -> None:
        endpoint, first = await loop()
        second = await LinkCreate(endpoint)
        await Send(first.slot, b"a")
        await Send(second.slot, b"b")

        message = await Recv((endpoint,), NO_WAIT, link=second.link)

        assert (message.data, message.link) == (b"b", second.link)
        status = await refused(Recv((endpoint,), NO_WAIT, link=second.link))
        assert status is Status.QUEUE_EMPTY
        assert (await Recv((endpoint,), NO_WAIT)).data == b"a"

    run(main)


def test_a_message_for_a_filtered_wait_that_is_refused_is_seen_by_everybody() -> None:
    async def main(boot: BootImage) -> None:
        spawned = await start(boot, "sender")
        deadline = await later(5 * MS)

        status = await refused(Recv((boot.endpoint,), deadline, link=spawned.link, size_max=2))

        assert status is Status.INVALID_ARGUMENT
        assert (await Recv((boot.endpoint,), NO_WAIT)).data == b"long"

    async def sender(boot: BootImage) -> None:
        assert boot.control is not None
        await Send(boot.control, b"long")

    run(main, sender=sender)


@pytest.mark.parametrize("link", [LinkId(-1), LinkId(99)])
def test_a_filter_that_names_no_live_link_is_no_such_endpoint(link: LinkId) -> None:
    async def main(boot: BootImage) -> None:
        status = await refused(Recv((boot.endpoint,), NO_WAIT, link=link))

        assert status is Status.NO_SUCH_ENDPOINT

    run(main)


# ---- slots and rights


@pytest.mark.parametrize("slot", [Slot(-1), Slot(5), Slot(96), Slot(1 << 40)])
def test_a_slot_that_holds_nothing_is_invalid_in_every_trap(slot: Slot) -> None:
    async def main(boot: BootImage) -> None:
        link = await LinkCreate(boot.endpoint)
        reply = ReplyRecv((slot,), NO_WAIT)
        assert link.link is not None
        traps: list[Trap[Any]] = [
            Send(slot, b"x"),
            Send(link.slot, b"x", move=slot),
            Recv((slot,), NO_WAIT),
            Recv((boot.endpoint, slot), NO_WAIT),
            Recv((), NO_WAIT),
            Call(slot, b"x", boot.endpoint, link.link, NO_WAIT),
            Call(link.slot, b"x", slot, link.link, NO_WAIT),
            reply,
            EndpointClose(slot),
            LinkCreate(slot),
            CapClone(slot),
            CapDerive(slot, Rights.SEND),
            CapClose(slot),
            CapQuery(slot),
            VmoSeal(slot),
            VmoWrite(slot, 0, b""),
        ]
        for trap in traps:
            status = await refused(trap)
            expected = Status.INVALID_ARGUMENT
            if isinstance(trap, Call) and trap.inbox == slot:
                expected = status  # the link is not one of that inbox either
            assert status is expected, type(trap).__name__
        assert await refused(Recv((boot.endpoint,), NO_WAIT)) is Status.QUEUE_EMPTY

    run(main)


def test_a_slot_without_the_right_is_permission_denied() -> None:
    async def main(boot: BootImage) -> None:
        link = await LinkCreate(boot.endpoint)
        memory = await VmoCreate(1)
        assert link.link is not None

        assert await refused(Send(boot.endpoint, b"x")) is Status.PERMISSION_DENIED
        assert await refused(Send(memory, b"x")) is Status.PERMISSION_DENIED
        assert await refused(Recv((link.slot,), NO_WAIT)) is Status.PERMISSION_DENIED
        assert await refused(EndpointClose(link.slot)) is Status.PERMISSION_DENIED
        assert await refused(CapQuery(link.slot)) is Status.PERMISSION_DENIED
        assert await refused(CapQuery(boot.endpoint)) is Status.PERMISSION_DENIED
        assert await refused(CapClone(boot.endpoint)) is Status.PERMISSION_DENIED
        assert await refused(LinkCreate(memory)) is Status.PERMISSION_DENIED
        await Send(link.slot, b"still works")

    run(main)


def test_rights_are_derived_only_downwards() -> None:
    async def main(boot: BootImage) -> None:
        memory = await VmoCreate(5000)

        map_only = await CapDerive(memory, Rights.MAP)

        assert (await CapQuery(map_only)).rights == Rights.MAP
        assert await refused(CapDerive(map_only, Rights.MAP | Rights.MANAGE)) is (
            Status.PERMISSION_DENIED
        )
        assert await refused(CapDerive(map_only, Rights(16))) is Status.PERMISSION_DENIED
        assert await refused(VmoSeal(map_only)) is Status.PERMISSION_DENIED
        await VmoSeal(memory)

    run(main)


def test_the_last_of_several_slots_closes_a_link() -> None:
    async def main(boot: BootImage) -> None:
        endpoint, link = await loop()
        clone = await CapClone(link.slot)
        await Send(clone, b"by the clone")

        await CapClose(link.slot)
        await Send(clone, b"still open")
        await CapClose(clone)

        assert (await Recv((endpoint,), NO_WAIT)).link == link.link
        assert (await Recv((endpoint,), NO_WAIT)).data == b"still open"
        with pytest.raises(PeerGone) as gone:
            await Recv((endpoint,), NO_WAIT)
        assert gone.value.link == link.link
        assert await refused(Recv((endpoint,), NO_WAIT)) is Status.QUEUE_EMPTY

    run(main)


# ---- links, shares, delegations


@pytest.mark.parametrize(
    "terms",
    [(0, 1, 0), (257, 1, 0), (1, 0, 0), (1, LINK_SIZE_MAX + 1, 0), (1, 1, -1), (-1, 1, 0)],
)
def test_terms_outside_the_limits_are_invalid(terms: tuple[int, int, int]) -> None:
    async def main(boot: BootImage) -> None:
        status = await refused(LinkCreate(boot.endpoint, LinkTerms(*terms)))

        assert status is Status.INVALID_ARGUMENT

    run(main)


def test_a_share_is_taken_when_a_link_is_made_and_given_back_with_its_peer_gone() -> None:
    async def main(boot: BootImage) -> None:
        terms = LinkTerms(size=LINK_SIZE_MAX)
        made = [await LinkCreate(boot.endpoint, terms) for _ in range(16)]  # 256 KiB in all
        assert await refused(LinkCreate(boot.endpoint, terms)) is Status.NO_SPACE
        assert (await TaskStats()).reserved_size == 16 * LINK_SIZE_MAX

        await CapClose(made[0].slot)
        assert await refused(LinkCreate(boot.endpoint, LinkTerms(size=LINK_SIZE_MAX))) is (
            Status.NO_SPACE
        )
        with pytest.raises(PeerGone):
            await Recv((boot.endpoint,), NO_WAIT)
        again = await LinkCreate(boot.endpoint, LinkTerms(size=LINK_SIZE_MAX))
        assert again.link not in [link.link for link in made], "an id is never used twice"

    run(main)


def test_closing_an_endpoint_gives_the_shares_of_its_links_back() -> None:
    async def main(boot: BootImage) -> None:
        endpoint, link = await loop()
        await Send(link.slot, b"dropped")

        await EndpointClose(endpoint)

        counters = await TaskStats()
        assert (counters.reserved_size, counters.links, counters.queued) == (0, 0, 0)
        assert await refused(Send(link.slot, b"x")) is Status.NO_SUCH_ENDPOINT
        assert await refused(LinkCreate(link.slot)) is Status.NO_SUCH_ENDPOINT
        await CapClose(link.slot)  # the dead capability stayed until now
        assert await refused(CapClose(link.slot)) is Status.INVALID_ARGUMENT

    run(main)


def test_links_derived_without_manage_are_no_larger_and_derive_nothing() -> None:
    async def main(boot: BootImage) -> None:
        endpoint, link = await loop(LinkTerms(4, 1000, 2))

        for terms in (LinkTerms(5, 1000, 0), LinkTerms(4, 1001, 0), LinkTerms(4, 1000, 1)):
            assert await refused(LinkCreate(link.slot, terms)) is Status.PERMISSION_DENIED
        first = await LinkCreate(link.slot, LinkTerms(4, 1000, 0))
        await LinkCreate(link.slot, LinkTerms(1, 1, 0))

        assert await refused(LinkCreate(link.slot, LinkTerms(1, 1, 0))) is Status.NO_SPACE
        await CapClose(first.slot)
        assert await refused(LinkCreate(link.slot, LinkTerms(1, 1, 0))) is Status.NO_SPACE
        with pytest.raises(PeerGone):
            await Recv((endpoint,), NO_WAIT)
        await LinkCreate(link.slot, LinkTerms(1, 1, 0))

    run(main)


def test_the_spawner_makes_links_of_any_terms_into_its_child() -> None:
    async def main(boot: BootImage) -> None:
        spawned = await start(boot, "idle", delegations=1)

        link = await LinkCreate(spawned.slot, LinkTerms(64, LINK_SIZE_MAX, 5))

        assert link.link is None, "the id is the receiver's business"
        assert await refused(LinkCreate(spawned.slot)) is Status.NO_SPACE
        await LinkCreate(link.slot, LinkTerms(64, LINK_SIZE_MAX, 0))

    async def idle(boot: BootImage) -> None:
        await Recv((boot.endpoint,), NEVER)

    run(main, idle=idle)


def test_one_owner_has_at_most_its_endpoints() -> None:
    async def main(boot: BootImage) -> None:
        made = 1
        while True:
            try:
                await EndpointCreate()
            except AbiError as refusal:
                assert refusal.status is Status.NO_SPACE
                break
            made += 1
        assert made == 96

    run(main)


# ---- moving capabilities


def test_a_moved_link_leaves_the_sender_and_arrives_in_the_lowest_free_slot() -> None:
    async def main(boot: BootImage) -> None:
        endpoint, link = await loop()
        target, moved = await loop()

        await Send(link.slot, b"with", move=moved.slot)

        assert await refused(Send(moved.slot, b"x")) is Status.INVALID_ARGUMENT
        message = await Recv((endpoint,), NO_WAIT)
        assert message.cap == moved.slot, "the slot just emptied is the lowest free one"
        await Send(message.cap, b"over the moved link")
        assert (await Recv((target,), NO_WAIT)).link == moved.link, "it moved as it was"

    run(main)


def test_a_used_link_moves_as_a_fresh_one_and_its_old_one_ends() -> None:
    async def main(boot: BootImage) -> None:
        endpoint, link = await loop()
        target, used = await loop(LinkTerms(2, 500, 1))
        await Send(used.slot, b"before")

        await Send(link.slot, b"with", move=used.slot)

        assert await refused(CapClose(used.slot)) is Status.INVALID_ARGUMENT
        cap = (await Recv((endpoint,), NO_WAIT)).cap
        assert cap is not None
        await Send(cap, b"after")
        first = await Recv((target,), NO_WAIT)
        assert (first.data, first.link) == (b"before", used.link)
        second = await Recv((target,), NO_WAIT)
        assert (second.data, second.link != used.link) == (b"after", True)
        with pytest.raises(PeerGone) as gone:
            await Recv((target,), NO_WAIT)
        assert gone.value.link == used.link

    run(main)


def test_a_link_held_under_two_slots_keeps_the_other_one() -> None:
    async def main(boot: BootImage) -> None:
        endpoint, link = await loop()
        target, shared = await loop(LinkTerms(2, 500, 1))
        clone = await CapClone(shared.slot)

        await Send(link.slot, b"with", move=clone)

        await Send(shared.slot, b"kept")
        cap = (await Recv((endpoint,), NO_WAIT)).cap
        assert cap is not None
        await Send(cap, b"given")
        got = [await Recv((target,), NO_WAIT) for _ in range(2)]
        assert [message.data for message in got] == [b"kept", b"given"]
        assert got[0].link != got[1].link

    run(main)


def test_a_used_link_without_delegations_does_not_move_and_stays() -> None:
    async def main(boot: BootImage) -> None:
        endpoint, link = await loop()
        _, used = await loop()
        await Send(used.slot, b"used")

        assert await refused(Send(link.slot, b"with", move=used.slot)) is Status.NO_SPACE

        await Send(used.slot, b"still here")
        assert await refused(Recv((endpoint,), NO_WAIT)) is Status.QUEUE_EMPTY

    run(main)


def test_a_failed_send_leaves_the_capability_where_it_was() -> None:
    async def main(boot: BootImage) -> None:
        endpoint, link = await loop(LinkTerms(depth=1, size=50))
        target, moved = await loop()
        await Send(link.slot, b"full")
        before = await TaskStats()

        queue_full = await refused(Send(link.slot, b"x", move=moved.slot))
        timed_out = await refused(Send(link.slot, b"x", move=moved.slot, deadline=await later(MS)))
        past = await refused(Send(link.slot, b"x", move=moved.slot, deadline=Nanos(1)))
        await EndpointClose(endpoint)
        closed = await refused(Send(link.slot, b"x", move=moved.slot))

        assert queue_full is Status.QUEUE_FULL
        assert timed_out is past is Status.TIMED_OUT
        assert closed is Status.NO_SUCH_ENDPOINT
        after = await TaskStats()
        assert (after.slots, after.timeouts) == (before.slots - 1, before.timeouts + 2)
        await Send(moved.slot, b"works")
        assert (await Recv((target,), NO_WAIT)).link == moved.link

    run(main)


def test_what_does_not_move() -> None:
    async def main(boot: BootImage) -> None:
        endpoint, link = await loop()
        clone = await CapClone(link.slot)
        memory = await VmoCreate(10)
        managed = await CapDerive(memory, Rights.MANAGE)

        expected = {
            endpoint: Status.PERMISSION_DENIED,
            link.slot: Status.INVALID_ARGUMENT,
            clone: Status.INVALID_ARGUMENT,
            memory: Status.PERMISSION_DENIED,  # not sealed
            managed: Status.PERMISSION_DENIED,  # no MAP
        }
        for slot, status in expected.items():
            assert await refused(Send(link.slot, b"x", move=slot)) is status
        assert await refused(Recv((endpoint,), NO_WAIT)) is Status.QUEUE_EMPTY

    run(main)


def test_manage_does_not_move() -> None:
    async def main(boot: BootImage) -> None:
        spawned = await start(boot, "idle", delegations=9)
        _, link = await loop()

        await Send(link.slot, b"x", move=spawned.slot)
        cap = (await Recv((Slot(link.slot - 1),), NO_WAIT)).cap

        assert cap is not None
        await LinkCreate(cap, LinkTerms(8, CONTROL_LINK_SIZE, 0))
        status = await refused(LinkCreate(cap, LinkTerms(9, CONTROL_LINK_SIZE, 0)))
        assert status is Status.PERMISSION_DENIED

    async def idle(boot: BootImage) -> None:
        await Recv((boot.endpoint,), NEVER)

    run(main, idle=idle)


def test_a_full_table_keeps_the_message_first_until_a_slot_is_free() -> None:
    async def main(boot: BootImage) -> None:
        endpoint, link = await loop()
        _, moved = await loop()
        await Send(link.slot, b"with", move=moved.slot)
        await Send(link.slot, b"second")
        clones = []
        while True:
            try:
                clones.append(await CapClone(link.slot))
            except AbiError as refusal:
                assert refusal.status is Status.NO_SPACE
                break

        for _ in range(2):
            assert await refused(Recv((endpoint,), await later(MS))) is Status.NO_SPACE
        assert (await TaskStats()).queued == 2
        await CapClose(clones[7])
        message = await Recv((endpoint,), NO_WAIT)

        assert (message.data, message.cap) == (b"with", clones[7])
        assert (await Recv((endpoint,), NO_WAIT)).data == b"second"

    run(main)


def test_with_a_full_table_messages_without_capability_of_other_links_still_come() -> None:
    async def main(boot: BootImage) -> None:
        endpoint, link = await loop()
        other = await LinkCreate(endpoint)
        _, moved = await loop()
        await Send(link.slot, b"with", move=moved.slot)
        await Send(other.slot, b"plain")
        while True:
            try:
                await CapClone(link.slot)
            except AbiError:
                break

        assert (await Recv((endpoint,), NO_WAIT)).data == b"plain"
        assert await refused(Recv((endpoint,), NO_WAIT)) is Status.NO_SPACE

    run(main)


def test_a_receive_into_too_small_a_buffer_loses_nothing() -> None:
    async def main(boot: BootImage) -> None:
        endpoint, link = await loop()
        _, moved = await loop()
        await Send(link.slot, b"x" * 17, move=moved.slot)

        for _ in range(2):
            status = await refused(Recv((endpoint,), NO_WAIT, size_max=16))
            assert status is Status.INVALID_ARGUMENT
        message = await Recv((endpoint,), NO_WAIT, size_max=17)

        assert message.data == b"x" * 17
        assert message.cap == moved.slot

    run(main)


def test_a_capability_in_a_dropped_message_is_closed_for_its_owner() -> None:
    async def main(boot: BootImage) -> None:
        endpoint, link = await loop()
        target, moved = await loop()
        await Send(link.slot, b"with", move=moved.slot)

        await EndpointClose(endpoint)

        with pytest.raises(PeerGone) as gone:
            await Recv((target,), NO_WAIT)
        assert gone.value.link == moved.link

    run(main)


# ---- waiting


def test_a_receive_with_a_past_deadline_times_out_at_once_but_a_message_wins() -> None:
    async def main(boot: BootImage) -> None:
        endpoint, link = await loop()

        assert await refused(Recv((endpoint,), Nanos(1))) is Status.TIMED_OUT
        await Send(link.slot, b"queued")

        assert (await Recv((endpoint,), Nanos(1))).data == b"queued"
        assert (await TaskStats()).timeouts == 1

    run(main)


def test_a_deadline_fires_exactly_with_nobody_else_about() -> None:
    async def main(boot: BootImage) -> None:
        deadline = await later(50 * MS)

        assert await refused(Recv((boot.endpoint,), deadline)) is Status.TIMED_OUT

        assert 0 < await Now() - deadline < 30_000  # one resume after it

    events = run(main)
    assert [event.kind for event in events] == [EventKind.SPAWN, EventKind.EXIT]


def test_a_waiting_receiver_gets_the_message_and_its_time() -> None:
    async def main(boot: BootImage) -> None:
        spawned = await start(boot, "sender")

        message = await Recv((boot.endpoint,), await later(10 * MS))

        assert message.data == b"late"
        assert message.sender.pid == spawned.pid
        assert message.link == spawned.link
        assert message.now <= await Now()

    async def sender(boot: BootImage) -> None:
        assert boot.control is not None
        await Send(boot.control, b"late")

    run(main, sender=sender)


def test_a_blocked_sender_goes_on_when_there_is_room() -> None:
    async def main(boot: BootImage) -> None:
        await start(boot, "sender")
        got = [(await Recv((boot.endpoint,), await later(10 * MS))).data[0] for _ in range(20)]

        assert got == list(range(20))

    async def sender(boot: BootImage) -> None:
        assert boot.control is not None
        for number in range(20):
            await Send(boot.control, bytes([number]), deadline=NEVER)

    run(main, sender=sender)


def test_a_blocked_sender_wakes_when_the_endpoint_closes() -> None:
    async def main(boot: BootImage) -> None:
        spawned = await start(boot, "owner")
        for _ in range(8):
            await Send(spawned.slot, b"x")
        before = await Now()
        await Send(spawned.slot, b"x", deadline=await later(1000 * MS))  # one was taken

        status = await refused(Send(spawned.slot, b"x", deadline=await later(1000 * MS)))

        assert status is Status.NO_SUCH_ENDPOINT
        assert 5 * MS < await Now() - before < 10 * MS

    async def owner(boot: BootImage) -> None:
        await Recv((boot.endpoint,), NO_WAIT)
        await SleepUntil(await later(6 * MS))
        await EndpointClose(boot.endpoint)

    run(main, owner=owner)


# ---- death


def test_what_a_dead_peer_had_sent_is_received_first_and_under_its_name() -> None:
    async def main(boot: BootImage) -> None:
        spawned = await start(boot, "leaver")
        await Wait(spawned.pid, NEVER)

        first = await Recv((boot.endpoint,), NO_WAIT)
        second = await Recv((boot.endpoint,), NO_WAIT)

        assert (first.data, second.data) == (b"one", b"two")
        for message in (first, second):
            assert message.sender.service == service_id("leaver")
            assert (message.sender.pid, message.sender.generation) == (spawned.pid, 1)
        with pytest.raises(PeerGone) as gone:
            await Recv((boot.endpoint,), NO_WAIT)
        assert gone.value.link == spawned.link
        assert gone.value.status is Status.NO_SUCH_ENDPOINT
        assert await refused(Send(spawned.slot, b"x")) is Status.NO_SUCH_ENDPOINT

    async def leaver(boot: BootImage) -> int:
        assert boot.control is not None
        await Send(boot.control, b"one")
        await Send(boot.control, b"two")
        return 7

    run(main, leaver=leaver)


def test_a_killed_task_wakes_everybody_who_waits_on_it() -> None:
    ended: list[tuple[str, int]] = []

    async def main(boot: BootImage) -> None:
        victim = await start(boot, "victim", delegations=6)
        clients = []
        for name in ("one", "two"):
            link = await LinkCreate(victim.slot, LinkTerms(8, 1024, 0))
            client = await Spawn(SpawnSpec(name, "client", boot.endpoint))
            await Send(client.slot, b"use this", move=link.slot)
            clients.append(client)
        await refused(Recv((boot.endpoint,), await later(5 * MS)))

        await Kill(victim.pid)
        killed = await Now()
        for client in clients:
            assert (await Wait(client.pid, NEVER)).code == 0
        assert (await Wait(victim.pid, NEVER)).signal == 9

        assert sorted(name for name, _ in ended) == ["one", "two"]
        assert all(time - killed < MS for _, time in ended)

    async def victim(boot: BootImage) -> None:
        held = []
        while True:
            message = await Recv((boot.endpoint,), NEVER)
            held.append(message.cap)

    async def client(boot: BootImage) -> None:
        server = (await Recv((boot.endpoint,), NEVER)).cap
        assert server is not None
        inbox = await EndpointCreate()
        back = await LinkCreate(inbox, LinkTerms(1, 100, 0))
        await Send(server, b"bind", move=back.slot)
        assert back.link is not None
        call = Call(server, b"request", inbox, back.link, await later(5000 * MS))
        status = await refused(call)
        assert (status, call.sent) == (Status.NO_SUCH_ENDPOINT, True)
        ended.append((boot.name, await Now()))

    run(main, victim=victim, client=client)


# ---- call and reply


def test_call_and_reply_recv_carry_a_round_trip() -> None:
    async def main(boot: BootImage) -> None:
        server = await start(boot, "echo")
        inbox = await EndpointCreate()
        back = await LinkCreate(inbox)
        assert back.link is not None
        await Send(server.slot, b"bind", move=back.slot)
        call = Call(server.slot, b"", inbox, back.link, NEVER)
        for number in range(50):
            call.data = b"q%d" % number
            message = await call
            assert message.data == b"q%d!" % number
            assert message.sender.service == service_id("echo")
            assert message.source == inbox
        await CapClose(server.slot)
        assert (await Wait(server.pid, NEVER)).code == 50

    async def echo(boot: BootImage) -> int:
        bound = await Recv((boot.endpoint,), NEVER)
        trap = ReplyRecv((boot.endpoint,), NEVER)
        count = 0
        while True:
            try:
                message: Message = await trap
            except PeerGone:
                return count
            count += 1
            trap.slot, trap.data = bound.cap, message.data + b"!"

    for cpu_count in (1, 2):
        run(main, cpu_count=cpu_count, echo=echo)


def was_sent(call: Call) -> bool:
    return call.sent


def test_a_call_that_cannot_be_sent_says_so() -> None:
    async def main(boot: BootImage) -> None:
        endpoint, link = await loop(LinkTerms(depth=1))
        inbox, back = await loop()
        assert back.link is not None
        await Send(link.slot, b"full")
        call = Call(link.slot, b"x", inbox, back.link, await later(MS))

        assert await refused(call) is Status.QUEUE_FULL
        assert not was_sent(call)
        await Recv((endpoint,), NO_WAIT)
        assert await refused(call) is Status.TIMED_OUT
        assert was_sent(call)
        assert (await Recv((endpoint,), NO_WAIT)).data == b"x"
        await CapClose(back.slot)
        call.deadline = NEVER
        with pytest.raises(PeerGone):
            await call
        assert was_sent(call)
        assert await refused(call) is Status.NO_SUCH_ENDPOINT
        assert not was_sent(call), "the link of the answer is no more: nothing is sent"

    run(main)


def test_a_refused_reply_does_not_refuse_the_receive() -> None:
    async def main(boot: BootImage) -> None:
        endpoint, link = await loop(LinkTerms(depth=1))
        _, full = await loop(LinkTerms(depth=1))
        await Send(full.slot, b"full")
        await Send(link.slot, b"request")
        trap = ReplyRecv((endpoint,), NO_WAIT)
        trap.slot, trap.data = full.slot, b"reply"

        message = await trap

        assert message.data == b"request"
        assert trap.reply_status == Status.QUEUE_FULL
        trap.slot = Slot(77)
        assert await refused(trap) is Status.QUEUE_EMPTY
        assert trap.reply_status == Status.INVALID_ARGUMENT
        trap.slot = link.slot
        assert (await trap).data == b"reply"
        assert trap.reply_status is None

    run(main)


# ---- identity


def test_a_moved_link_carries_the_name_of_whoever_sends_over_it() -> None:
    async def main(boot: BootImage) -> None:
        endpoint, link = await loop()
        other = await start(boot, "other")

        await Send(other.slot, b"yours now", move=link.slot)
        message = await Recv((endpoint,), await later(10 * MS))

        assert message.sender.service == service_id("other")
        assert message.sender.pid == other.pid

    async def other(boot: BootImage) -> None:
        cap = (await Recv((boot.endpoint,), NEVER)).cap
        assert cap is not None
        await Send(cap, b"hello")

    run(main, other=other)


def test_exit_ends_a_task_with_its_code_and_nothing_after_it_runs() -> None:
    async def main(boot: BootImage) -> None:
        spawned = await start(boot, "leaver")

        end = await Wait(spawned.pid, NEVER)

        assert (end.code, end.signal) == (42, 0)

    async def leaver(boot: BootImage) -> None:
        assert await refused(Exit(256)) is Status.INVALID_ARGUMENT
        await Exit(42)
        raise AssertionError("not reached")

    run(main, leaver=leaver)
