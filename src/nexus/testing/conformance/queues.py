"""Promise 3: queues are bounded in messages and bytes, exactly, and by reservation."""

from collections import deque
from typing import Final

from nexus.abi import (
    CONTROL_LINK_SIZE,
    ENDPOINTS_PER_OWNER_MAX,
    LINK_DEPTH_MAX,
    LINK_SIZE_MAX,
    MESSAGE_KIND_RESERVED,
    MESSAGE_SIZE_MAX,
    NO_WAIT,
    OWNER_SIZE_DEFAULT,
    AbiError,
    BootImage,
    CapClone,
    CapClose,
    EndpointClose,
    EndpointCreate,
    LinkCreate,
    LinkTerms,
    Recv,
    Send,
    SpawnLastError,
    SpawnReason,
    Status,
    TaskStats,
)
from nexus.kernel.core.limits import SystemLimits
from nexus.testing.conformance.steps import (
    ended,
    ended_well,
    fill,
    gone,
    nothing_queued,
    refused,
    soon,
    start,
    take,
    tell,
)
from nexus.testing.rig import Rig

_MULTIPLIER: Final = 6364136223846793005  # Knuth's MMIX generator: the same walk everywhere
_INCREMENT: Final = 1442695040888963407


class _Walk:
    """A fixed pseudo-random walk; no test may ask the machine for luck."""

    def __init__(self, seed: int) -> None:
        self._state = seed

    def below(self, bound: int) -> int:
        self._state = (self._state * _MULTIPLIER + _INCREMENT) % (1 << 64)
        return (self._state >> 33) % bound


def test_queue_full_comes_at_exactly_the_depth(rig: Rig) -> None:
    async def root(boot: BootImage) -> None:
        for depth in (1, 2, 8, 63, LINK_DEPTH_MAX):
            link = await LinkCreate(boot.endpoint, LinkTerms(depth, LINK_SIZE_MAX, 0))

            assert await fill(link.slot) == (depth, Status.QUEUE_FULL)

            await take(boot.endpoint, link=link.link)
            assert await fill(link.slot) == (1, Status.QUEUE_FULL)
            await CapClose(link.slot)
            for _ in range(depth):
                await take(boot.endpoint, link=link.link)
            await gone(boot.endpoint, link.link)

    rig.run(root)


def test_no_space_comes_at_exactly_the_size(rig: Rig) -> None:
    async def root(boot: BootImage) -> None:
        link = await LinkCreate(boot.endpoint, LinkTerms(8, 100, 0))
        await Send(link.slot, b"x" * 60)

        await refused(Send(link.slot, b"x" * 41), Status.NO_SPACE)
        await Send(link.slot, b"x" * 40)
        await refused(Send(link.slot, b"x"), Status.NO_SPACE)

        assert len((await take(boot.endpoint)).data) == 60
        await refused(Send(link.slot, b"x" * 61), Status.NO_SPACE)
        await Send(link.slot, b"x" * 60)

    rig.run(root)


def test_a_message_larger_than_its_link_never_fits(rig: Rig) -> None:
    async def root(boot: BootImage) -> None:
        link = await LinkCreate(boot.endpoint, LinkTerms(1, 1000, 0))

        await refused(Send(link.slot, b"x" * 1001), Status.NO_SPACE)
        await Send(link.slot, b"x" * 1000)
        # Not even when the queue is full as well, and no wait would help.
        await refused(Send(link.slot, b"x" * 1001), Status.NO_SPACE)
        await refused(Send(link.slot, b"x" * 1001, deadline=await soon()), Status.NO_SPACE)

        assert len((await take(boot.endpoint)).data) == 1000

    rig.run(root)


def test_a_largest_link_takes_its_bytes_exactly(rig: Rig) -> None:
    async def root(boot: BootImage) -> None:
        link = await LinkCreate(boot.endpoint, LinkTerms(256, LINK_SIZE_MAX, 0))
        await Send(link.slot, bytes(MESSAGE_SIZE_MAX))
        rest = LINK_SIZE_MAX - MESSAGE_SIZE_MAX

        await refused(Send(link.slot, bytes(rest + 1)), Status.NO_SPACE)
        await Send(link.slot, bytes(rest))
        await refused(Send(link.slot, b"\x00"), Status.NO_SPACE)

        assert [len((await take(boot.endpoint)).data) for _ in range(2)] == [MESSAGE_SIZE_MAX, rest]

    rig.run(root)


def test_a_link_does_as_a_counter_of_messages_and_bytes_for_any_walk(rig: Rig) -> None:
    async def root(boot: BootImage) -> None:
        for seed, depth, size in ((1, 3, 300), (2, 8, 2000), (3, 20, 900), (4, 2, 16384)):
            walk = _Walk(seed)
            link = await LinkCreate(boot.endpoint, LinkTerms(depth, size, 0))
            model: deque[int] = deque()
            for step in range(250):
                if walk.below(5) < 3:
                    length = 1 + walk.below(min(2 * size // depth, MESSAGE_SIZE_MAX))
                    expected = None
                    if len(model) == depth:
                        expected = Status.QUEUE_FULL
                    elif sum(model) + length > size:
                        expected = Status.NO_SPACE
                    got = None
                    try:
                        await Send(link.slot, bytes(length))
                    except AbiError as error:
                        got = error.status
                    if len(model) == depth and sum(model) + length > size:
                        assert got in {Status.QUEUE_FULL, Status.NO_SPACE}
                    else:
                        assert got is expected, f"step {step} of walk {seed}: {got}"
                    if got is None:
                        model.append(length)
                elif model:
                    message = await Recv((boot.endpoint,), NO_WAIT)
                    assert len(message.data) == model.popleft()
                else:
                    await nothing_queued(boot.endpoint)
            await CapClose(link.slot)
            for length in model:
                assert len((await take(boot.endpoint)).data) == length
            await gone(boot.endpoint, link.link)

    rig.run(root)


def test_one_link_does_not_use_up_the_share_of_another(rig: Rig) -> None:
    async def root(boot: BootImage) -> None:
        greedy = await LinkCreate(boot.endpoint, LinkTerms(4, 4000, 0))
        modest = await LinkCreate(boot.endpoint, LinkTerms(4, 4000, 0))

        assert await fill(greedy.slot, bytes(1000)) == (4, Status.QUEUE_FULL)

        assert await fill(modest.slot, bytes(1000)) == (4, Status.QUEUE_FULL)

    rig.run(root)


def test_links_of_two_tasks_are_bounded_apart(rig: Rig) -> None:
    async def child(boot: BootImage) -> None:
        given = await take(boot.endpoint)
        assert given.cap is not None
        count, reason = await fill(given.cap, boot.name.encode())
        await tell(boot, b"%d %d" % (count, reason))
        await take(boot.endpoint)
        count, reason = await fill(given.cap, boot.name.encode())
        await tell(boot, b"%d %d" % (count, reason))

    async def root(boot: BootImage) -> None:
        target = await EndpointCreate()
        children = [await start(boot, name, program="child") for name in ("a", "b")]
        links = []
        for spawned, depth in zip(children, (3, 5), strict=True):
            link = await LinkCreate(target, LinkTerms(depth, 100, 0))
            await Send(spawned.slot, b"fill it", move=link.slot)
            links.append(link)
        for spawned, depth in zip(children, (3, 5), strict=True):
            told = await take(boot.endpoint, link=spawned.link)
            assert told.data == b"%d %d" % (depth, Status.QUEUE_FULL)
        await take(target, link=links[0].link)
        await take(target, link=links[0].link)
        for spawned, count in zip(children, (2, 0), strict=True):
            await Send(spawned.slot, b"again")
            told = await take(boot.endpoint, link=spawned.link)
            assert told.data == b"%d %d" % (count, Status.QUEUE_FULL)
            await ended_well(spawned)

    rig.run(root, programs={"child": child})


def test_terms_outside_the_limits_are_refused(rig: Rig) -> None:
    async def root(boot: BootImage) -> None:
        before = await TaskStats()
        for terms in (
            LinkTerms(0, 100, 0),
            LinkTerms(-1, 100, 0),
            LinkTerms(LINK_DEPTH_MAX + 1, 100, 0),
            LinkTerms(8, 0, 0),
            LinkTerms(8, -1, 0),
            LinkTerms(8, LINK_SIZE_MAX + 1, 0),
            LinkTerms(8, 100, -1),
        ):
            await refused(LinkCreate(boot.endpoint, terms), Status.INVALID_ARGUMENT)
        assert await TaskStats() == before

    rig.run(root)


def test_messages_outside_the_limits_are_refused(rig: Rig) -> None:
    async def root(boot: BootImage) -> None:
        link = await LinkCreate(boot.endpoint)
        for data in (b"", bytes(MESSAGE_SIZE_MAX + 1), bytes([MESSAGE_KIND_RESERVED]), b"\xffx"):
            await refused(Send(link.slot, data), Status.INVALID_ARGUMENT)
        await nothing_queued(boot.endpoint)

        largest = bytes([MESSAGE_KIND_RESERVED - 1]) + bytes(range(256)) * 32 + b"tail"
        assert len(largest) <= MESSAGE_SIZE_MAX
        await Send(link.slot, largest)
        await Send(link.slot, bytearray(b"\x00"))

        assert (await take(boot.endpoint)).data == largest
        last = await take(boot.endpoint)
        assert last.data == b"\x00"
        assert isinstance(last.data, bytes)

    rig.run(root)


def test_a_sent_buffer_may_be_used_again_at_once(rig: Rig) -> None:
    async def root(boot: BootImage) -> None:
        link = await LinkCreate(boot.endpoint)
        buffer = bytearray(b"first ")
        await Send(link.slot, buffer)
        buffer[:] = b"second"
        await Send(link.slot, buffer)

        assert (await take(boot.endpoint)).data == b"first "
        assert (await take(boot.endpoint)).data == b"second"

    rig.run(root)


def test_an_owner_cannot_reserve_more_than_its_share(rig: Rig) -> None:
    async def child(boot: BootImage) -> None:
        before = await TaskStats()
        assert before.reserved_size == CONTROL_LINK_SIZE
        fits = await LinkCreate(boot.endpoint, LinkTerms(8, 5000, 0))
        await refused(LinkCreate(boot.endpoint, LinkTerms(8, 1001, 0)), Status.NO_SPACE)
        assert (await TaskStats()).reserved_size == CONTROL_LINK_SIZE + 5000
        exact = await LinkCreate(boot.endpoint, LinkTerms(8, 1000, 0))
        await refused(LinkCreate(boot.endpoint, LinkTerms(1, 1, 0)), Status.NO_SPACE)
        assert (await TaskStats()).links == before.links + 2
        for slot in (fits.slot, exact.slot):
            await Send(slot, b"works")

    async def root(boot: BootImage) -> None:
        spawned = await start(boot, "owner", owner_size=CONTROL_LINK_SIZE + 6000)
        await ended_well(spawned)

    rig.run(root, programs={"owner": child})


def test_a_share_comes_back_when_the_owner_has_received_the_end_of_its_link(rig: Rig) -> None:
    async def child(boot: BootImage) -> None:
        link = await LinkCreate(boot.endpoint, LinkTerms(8, 6000, 0))
        await CapClose(link.slot)
        await refused(LinkCreate(boot.endpoint, LinkTerms(8, 6000, 0)), Status.NO_SPACE)

        await gone(boot.endpoint, link.link)

        await LinkCreate(boot.endpoint, LinkTerms(8, 6000, 0))

    async def root(boot: BootImage) -> None:
        spawned = await start(boot, "owner", owner_size=CONTROL_LINK_SIZE + 6000)
        await ended_well(spawned)

    rig.run(root, programs={"owner": child})


def test_a_share_comes_back_when_the_owner_closes_the_endpoint(rig: Rig) -> None:
    async def child(boot: BootImage) -> None:
        for _ in range(20):
            endpoint = await EndpointCreate()
            link = await LinkCreate(endpoint, LinkTerms(8, 6000, 0))
            await EndpointClose(endpoint)
            await CapClose(link.slot)
        assert (await TaskStats()).reserved_size == CONTROL_LINK_SIZE

    async def root(boot: BootImage) -> None:
        spawned = await start(boot, "owner", owner_size=CONTROL_LINK_SIZE + 6000)
        await ended_well(spawned)

    rig.run(root, programs={"owner": child})


def test_a_spawn_reserves_its_share_from_the_total(rig: Rig) -> None:
    limits = SystemLimits(
        total_size=OWNER_SIZE_DEFAULT + 20_000, root_size=OWNER_SIZE_DEFAULT, endpoints=384
    )

    async def child(boot: BootImage) -> None:
        await take(boot.endpoint)

    async def root(boot: BootImage) -> None:
        first = await start(boot, "first", program="child", owner_size=12_000)

        await refused_spawn(boot, owner_size=8_001)
        second = await start(boot, "second", program="child", owner_size=8_000)
        await refused_spawn(boot, owner_size=CONTROL_LINK_SIZE)

        for spawned in (first, second):
            await Send(spawned.slot, b"go")
            await ended_well(spawned)
        await gone(boot.endpoint, None)
        await gone(boot.endpoint, None)
        third = await start(boot, "third", program="child", owner_size=20_000)
        await Send(third.slot, b"go")
        await ended_well(third)

    async def refused_spawn(boot: BootImage, *, owner_size: int) -> None:
        before = await TaskStats()
        try:
            await start(boot, "excess", program="child", owner_size=owner_size)
        except AbiError as error:
            assert error.status is Status.NO_SPACE
        else:
            raise AssertionError("a spawn beyond the total was not refused")
        assert await SpawnLastError() is SpawnReason.OOM
        assert await TaskStats() == before

    rig.run(root, programs={"child": child}, limits=limits)


def test_endpoints_are_reserved_from_the_total_at_spawn(rig: Rig) -> None:
    limits = SystemLimits(endpoints=20, root_endpoints=4)

    async def child(boot: BootImage) -> None:
        await take(boot.endpoint)

    async def root(boot: BootImage) -> None:
        first = await start(boot, "first", program="child", endpoints=10)
        try:
            await start(boot, "excess", program="child", endpoints=7)
        except AbiError as error:
            assert error.status is Status.NO_SPACE
        else:
            raise AssertionError("a spawn beyond the endpoints of the system was not refused")
        assert await SpawnLastError() is SpawnReason.ENDPOINT_QUOTA
        second = await start(boot, "second", program="child", endpoints=6)
        for spawned in (first, second):
            await Send(spawned.slot, b"go")
            await ended_well(spawned)
        third = await start(boot, "third", program="child", endpoints=16)
        await Send(third.slot, b"go")
        await ended_well(third)

    rig.run(root, programs={"child": child}, limits=limits)


def test_an_owner_has_at_most_96_endpoints(rig: Rig) -> None:
    async def root(boot: BootImage) -> None:
        # Root's control slot is empty, so the table has room for exactly 96 endpoints.
        made = [await EndpointCreate() for _ in range(ENDPOINTS_PER_OWNER_MAX - 1)]
        assert (await TaskStats()).endpoints == ENDPOINTS_PER_OWNER_MAX

        await refused(EndpointCreate(), Status.NO_SPACE)
        await EndpointClose(made[10])

        again = await EndpointCreate()
        assert again == made[10]
        await refused(EndpointCreate(), Status.NO_SPACE)

    rig.run(root)


def test_a_task_has_the_endpoints_of_its_spawn_and_no_more(rig: Rig) -> None:
    async def child(boot: BootImage) -> None:
        made = [await EndpointCreate() for _ in range(3)]
        before = await TaskStats()
        await refused(EndpointCreate(), Status.NO_SPACE)
        assert await TaskStats() == before
        await CapClose(made[0])
        await EndpointCreate()
        await refused(EndpointCreate(), Status.NO_SPACE)

    async def root(boot: BootImage) -> None:
        await ended_well(await start(boot, "owner", endpoints=4))

    rig.run(root, programs={"owner": child})


def test_delegations_are_counted_where_they_are_given(rig: Rig) -> None:
    async def holder(boot: BootImage) -> None:
        given = await take(boot.endpoint)
        assert given.cap is not None
        first = await LinkCreate(given.cap, LinkTerms(2, 100, 0))
        assert first.link is None
        await LinkCreate(given.cap, LinkTerms(4, 400, 0))
        before = await TaskStats()
        await refused(LinkCreate(given.cap, LinkTerms(1, 1, 0)), Status.NO_SPACE)
        assert await TaskStats() == before
        await Send(first.slot, b"derived")
        await CapClose(first.slot)
        await refused(LinkCreate(given.cap, LinkTerms(1, 1, 0)), Status.NO_SPACE)
        await tell(boot, b"closed one")
        assert (await take(boot.endpoint)).data == b"its end was received"
        third = await LinkCreate(given.cap, LinkTerms(2, 100, 0))
        await refused(LinkCreate(given.cap, LinkTerms(1, 1, 0)), Status.NO_SPACE)
        await Send(third.slot, b"third")
        await take(boot.endpoint)  # so that its other links do not end meanwhile

    async def root(boot: BootImage) -> None:
        target = await EndpointCreate()
        spawned = await start(boot, "holder")
        link = await LinkCreate(target, LinkTerms(4, 400, 2))
        await Send(spawned.slot, b"two to derive", move=link.slot)
        assert (await take(boot.endpoint)).data == b"closed one"
        derived = await take(target)
        assert derived.data == b"derived"
        assert derived.sender.service == spawned.service
        await gone(target, derived.link)

        await Send(spawned.slot, b"its end was received")

        assert (await take(target)).data == b"third"
        await Send(spawned.slot, b"end")
        await ended_well(spawned)

    rig.run(root, programs={"holder": holder})


def test_terms_derived_without_manage_do_not_exceed_those_held(rig: Rig) -> None:
    async def holder(boot: BootImage) -> None:
        given = await take(boot.endpoint)
        assert given.cap is not None
        before = await TaskStats()
        for terms in (LinkTerms(5, 100, 0), LinkTerms(1, 401, 0), LinkTerms(1, 1, 1)):
            await refused(LinkCreate(given.cap, terms), Status.PERMISSION_DENIED)
        for terms in (LinkTerms(0, 100, 0), LinkTerms(LINK_DEPTH_MAX + 1, 100, 0)):
            await refused(LinkCreate(given.cap, terms), Status.INVALID_ARGUMENT)
        assert await TaskStats() == before
        derived = await LinkCreate(given.cap, LinkTerms(4, 400, 0))
        assert await fill(derived.slot, b"x" * 100) == (4, Status.QUEUE_FULL)

    async def root(boot: BootImage) -> None:
        spawned = await start(boot, "holder")
        target = await EndpointCreate()
        link = await LinkCreate(target, LinkTerms(4, 400, 1))
        await Send(spawned.slot, b"derive", move=link.slot)
        await ended_well(spawned)

    rig.run(root, programs={"holder": holder})


def test_the_spawner_derives_links_of_any_terms_from_its_own(rig: Rig) -> None:
    async def server(boot: BootImage) -> None:
        for _ in range(6):
            await take(boot.endpoint)
        await tell(boot, b"six")

    async def root(boot: BootImage) -> None:
        spawned = await start(boot, "server", delegations=1)
        link = await LinkCreate(spawned.slot, LinkTerms(6, 12_000, 3))
        assert link.link is None
        await refused(LinkCreate(spawned.slot, LinkTerms(1, 1, 0)), Status.NO_SPACE)

        for _ in range(6):
            await Send(link.slot, bytes(2000), deadline=await soon())

        assert (await take(boot.endpoint)).data == b"six"
        await ended_well(spawned)

    rig.run(root, programs={"server": server})


def test_a_link_derived_to_oneself_is_told_its_id(rig: Rig) -> None:
    async def child(boot: BootImage) -> None:
        given = await take(boot.endpoint)
        assert given.cap is not None
        derived = await LinkCreate(given.cap, LinkTerms(2, 100, 0))
        await Send(derived.slot, b"to myself")
        message = await take(boot.endpoint)
        assert message.data == b"to myself"
        assert message.link == derived.link

    async def root(boot: BootImage) -> None:
        own = await LinkCreate(boot.endpoint, LinkTerms(2, 100, 1))
        derived = await LinkCreate(own.slot, LinkTerms(2, 100, 0))
        await Send(derived.slot, b"to root")
        assert (await take(boot.endpoint)).link == derived.link != own.link
        spawned = await start(boot, "child", delegations=1)
        link = await LinkCreate(spawned.slot, LinkTerms(2, 100, 1))
        assert link.link is None
        await Send(spawned.slot, b"a way to yourself", move=link.slot)
        await ended_well(spawned)

    rig.run(root, programs={"child": child})


def test_an_alias_shares_the_queue_of_its_link(rig: Rig) -> None:
    async def root(boot: BootImage) -> None:
        link = await LinkCreate(boot.endpoint, LinkTerms(4, 400, 0))
        alias = await CapClone(link.slot)
        await Send(link.slot, b"1")
        await Send(alias, b"2")
        await Send(link.slot, b"3")
        await Send(alias, b"4")

        await refused(Send(link.slot, b"5"), Status.QUEUE_FULL)
        await refused(Send(alias, b"5"), Status.QUEUE_FULL)

        messages = [await take(boot.endpoint) for _ in range(4)]
        assert [message.data for message in messages] == [b"1", b"2", b"3", b"4"]
        assert {message.link for message in messages} == {link.link}

    rig.run(root)


def test_links_are_served_in_rotation(rig: Rig) -> None:
    async def root(boot: BootImage) -> None:
        links = [await LinkCreate(boot.endpoint) for _ in range(3)]
        for link in links:
            for index in range(4):
                await Send(link.slot, b"%d" % index)

        order = [await take(boot.endpoint) for _ in range(12)]

        for start_index in (0, 3, 6, 9):
            turn = order[start_index : start_index + 3]
            assert len({message.link for message in turn}) == 3, [m.link for m in order]
        for link in links:
            mine = [message.data for message in order if message.link == link.link]
            assert mine == [b"0", b"1", b"2", b"3"]

    rig.run(root)


def test_the_account_of_a_task_counts_what_it_holds_and_did(rig: Rig) -> None:
    async def root(boot: BootImage) -> None:
        empty = await TaskStats()
        link = await LinkCreate(boot.endpoint, LinkTerms(8, 1000, 0))
        for size in (10, 20, 30):
            await Send(link.slot, bytes(size))
        await take(boot.endpoint)

        stats = await TaskStats()

        assert stats.slots == empty.slots + 1
        assert stats.links == empty.links + 1
        assert stats.reserved_size == empty.reserved_size + 1000
        assert (stats.queued, stats.queued_size) == (2, 50)
        assert (stats.sent, stats.sent_size) == (3, 60)
        assert (stats.received, stats.received_size) == (1, 10)
        assert stats.budget_used > empty.budget_used
        assert stats.budget_used + stats.budget_free == stats.budget_total
        await CapClose(link.slot)
        await take(boot.endpoint)
        await take(boot.endpoint)
        await gone(boot.endpoint, link.link)
        after = await TaskStats()
        assert after.budget_used == empty.budget_used
        assert after._replace(sent=0, sent_size=0, received=0, received_size=0) == empty

    rig.run(root)


def test_what_a_dead_task_had_reserved_is_free_again(rig: Rig) -> None:
    limits = SystemLimits(total_size=OWNER_SIZE_DEFAULT + 50_000)

    async def owner(boot: BootImage) -> int:
        endpoints = [await EndpointCreate() for _ in range(3)]
        for endpoint in endpoints:
            await LinkCreate(endpoint, LinkTerms(8, 10_000, 0))
        return 3

    async def root(boot: BootImage) -> None:
        for _ in range(3):
            spawned = await start(boot, "owner", owner_size=50_000)
            assert (await ended(spawned)).code == 3
            await gone(boot.endpoint, spawned.link)

    rig.run(root, programs={"owner": owner}, limits=limits)
