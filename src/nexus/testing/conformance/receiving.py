"""Promise 6, and what else Recv, Call and ReplyRecv say: nothing is lost by asking wrongly."""

from nexus.abi import (
    MESSAGE_SIZE_MAX,
    NO_WAIT,
    BootImage,
    Call,
    CapClose,
    EndpointClose,
    EndpointCreate,
    LinkCreate,
    LinkTerms,
    Now,
    PeerGone,
    Recv,
    ReplyRecv,
    Send,
    Slot,
    Status,
    TaskStats,
)
from nexus.testing.conformance.steps import (
    PAST,
    control,
    ended_well,
    gone,
    nothing_queued,
    refused,
    soon,
    start,
    take,
    tell,
)
from nexus.testing.rig import Rig


def _sent(call: Call) -> bool:
    """Read anew: a type checker believes that an attribute stays as it was compared."""
    return call.sent


def test_a_receive_into_too_small_a_buffer_loses_no_message(rig: Rig) -> None:
    async def root(boot: BootImage) -> None:
        link = await LinkCreate(boot.endpoint)
        await Send(link.slot, bytes(100))
        await Send(link.slot, b"next")
        stats = await TaskStats()

        for size_max in (0, 1, 99):
            await refused(
                Recv((boot.endpoint,), NO_WAIT, size_max=size_max), Status.INVALID_ARGUMENT
            )
            await refused(
                Recv((boot.endpoint,), NO_WAIT, link=link.link, size_max=size_max),
                Status.INVALID_ARGUMENT,
            )

        assert await TaskStats() == stats
        assert len((await Recv((boot.endpoint,), NO_WAIT, size_max=100)).data) == 100
        assert (await take(boot.endpoint)).data == b"next"

    rig.run(root)


def test_a_receive_into_too_small_a_buffer_loses_no_capability(rig: Rig) -> None:
    async def child(boot: BootImage) -> None:
        assert (await take(boot.endpoint)).data == b"it is there"
        slots = (await TaskStats()).slots
        for _ in range(3):
            await refused(
                Recv((boot.endpoint,), await soon(), size_max=10), Status.INVALID_ARGUMENT
            )
        assert (await TaskStats()).slots == slots
        message = await take(boot.endpoint)
        assert message.data == bytes(5000)
        assert message.cap is not None
        assert (await TaskStats()).slots == slots + 1
        await Send(message.cap, b"came through")

    async def root(boot: BootImage) -> None:
        spawned = await start(boot, "reader", delegations=1)
        way = await LinkCreate(spawned.slot, LinkTerms(4, 16000, 0))
        target = await EndpointCreate()
        cap = await LinkCreate(target)
        await Send(spawned.slot, b"it is there")
        await Send(way.slot, bytes(5000), move=cap.slot)

        assert (await take(target)).data == b"came through"
        await ended_well(spawned)

    rig.run(root, programs={"reader": child})


def test_a_queued_message_wins_over_a_past_deadline(rig: Rig) -> None:
    async def root(boot: BootImage) -> None:
        link = await LinkCreate(boot.endpoint)
        await Send(link.slot, b"in time")
        await Send(link.slot, b"in time, too")

        assert (await Recv((boot.endpoint,), PAST)).data == b"in time"
        assert (await Recv((boot.endpoint,), PAST, link=link.link)).data == b"in time, too"
        await refused(Recv((boot.endpoint,), PAST), Status.TIMED_OUT)

    rig.run(root)


def test_an_empty_queue_is_told_from_a_passed_deadline(rig: Rig) -> None:
    async def root(boot: BootImage) -> None:
        link = await LinkCreate(boot.endpoint)

        await refused(Recv((boot.endpoint,), NO_WAIT), Status.QUEUE_EMPTY)
        await refused(Recv((boot.endpoint,), NO_WAIT, link=link.link), Status.QUEUE_EMPTY)
        assert (await TaskStats()).timeouts == 0
        await refused(Recv((boot.endpoint,), PAST), Status.TIMED_OUT)
        await refused(Recv((boot.endpoint,), PAST, link=link.link), Status.TIMED_OUT)

        assert (await TaskStats()).timeouts == 2

    rig.run(root)


def test_a_receive_from_one_link_leaves_the_others_alone(rig: Rig) -> None:
    async def root(boot: BootImage) -> None:
        first, second = await LinkCreate(boot.endpoint), await LinkCreate(boot.endpoint)
        await Send(first.slot, b"first")
        await Send(second.slot, b"second")

        assert (await take(boot.endpoint, link=second.link)).data == b"second"
        await refused(Recv((boot.endpoint,), NO_WAIT, link=second.link), Status.QUEUE_EMPTY)
        assert (await take(boot.endpoint)).data == b"first"

    rig.run(root)


def test_a_wait_set_tells_which_endpoint_had_the_message(rig: Rig) -> None:
    async def root(boot: BootImage) -> None:
        other = await EndpointCreate()
        third = await EndpointCreate()
        here, there = await LinkCreate(boot.endpoint), await LinkCreate(other)
        sources = (boot.endpoint, other, third)
        await Send(there.slot, b"there")
        message = await Recv(sources, await soon())
        assert (message.source, message.link, message.data) == (other, there.link, b"there")
        await Send(here.slot, b"here")
        message = await Recv(sources, await soon())
        assert (message.source, message.link, message.data) == (boot.endpoint, here.link, b"here")
        await Send(here.slot, b"not asked for")
        await refused(Recv((other, third), NO_WAIT), Status.QUEUE_EMPTY)

    rig.run(root)


def test_link_ids_are_never_used_twice(rig: Rig) -> None:
    async def root(boot: BootImage) -> None:
        seen = set()
        other = await EndpointCreate()
        for index in range(30):
            source = (boot.endpoint, other)[index % 2]
            link = await LinkCreate(source)
            await Send(link.slot, b"x")
            assert (await take(source)).link == link.link
            seen.add(link.link)
            await Send(link.slot, b"last")
            await take(source)
            await CapClose(link.slot)
            await gone(source, link.link)
        assert len(seen) == 30

    rig.run(root)


def test_a_message_carries_the_time_it_was_taken(rig: Rig) -> None:
    async def root(boot: BootImage) -> None:
        link = await LinkCreate(boot.endpoint)
        await Send(link.slot, b"x")
        before = await Now()
        message = await take(boot.endpoint)
        assert before <= message.now <= await Now()

    rig.run(root)


def test_receiving_needs_the_right_to(rig: Rig) -> None:
    async def root(boot: BootImage) -> None:
        link = await LinkCreate(boot.endpoint)
        await Send(link.slot, b"x")

        await refused(Recv((link.slot,), NO_WAIT), Status.PERMISSION_DENIED)
        await refused(Recv((boot.endpoint, link.slot), NO_WAIT), Status.PERMISSION_DENIED)
        await refused(Recv((Slot(90),), NO_WAIT), Status.INVALID_ARGUMENT)
        await refused(Send(boot.endpoint, b"x"), Status.PERMISSION_DENIED)

        assert (await take(boot.endpoint)).data == b"x"
        await nothing_queued(boot.endpoint)

    rig.run(root)


def test_a_call_returns_the_answer_on_its_own_link(rig: Rig) -> None:
    async def child(boot: BootImage) -> None:
        request = await take(boot.endpoint)
        await tell(boot, request.data.upper())

    async def root(boot: BootImage) -> None:
        noise = await LinkCreate(boot.endpoint)
        await Send(noise.slot, b"noise")
        spawned = await start(boot, "server")
        call = Call(spawned.slot, b"shout", boot.endpoint, spawned.link, await soon())

        answer = await call

        assert _sent(call)
        assert answer.data == b"SHOUT"
        assert answer.link == spawned.link
        assert answer.source == boot.endpoint
        await ended_well(spawned)

    rig.run(root, programs={"server": child})


def test_a_call_says_whether_it_was_sent(rig: Rig) -> None:
    async def root(boot: BootImage) -> None:
        target = await EndpointCreate()
        way = await LinkCreate(target, LinkTerms(1, 10, 0))
        answers = await LinkCreate(boot.endpoint)
        assert answers.link is not None
        call = Call(way.slot, b"x", boot.endpoint, answers.link, PAST)

        await refused(call, Status.TIMED_OUT)
        assert _sent(call)
        await refused(call, Status.QUEUE_FULL)
        assert not _sent(call)
        await take(target)
        call.data = b"x" * 11
        await refused(call, Status.NO_SPACE)
        assert not _sent(call)
        call.data = b""
        await refused(call, Status.INVALID_ARGUMENT)
        call.data, call.slot = b"x", Slot(90)
        await refused(call, Status.INVALID_ARGUMENT)
        call.slot = boot.endpoint
        await refused(call, Status.PERMISSION_DENIED)
        call.slot = way.slot
        await refused(call, Status.TIMED_OUT)
        assert _sent(call)
        await EndpointClose(target)
        await refused(call, Status.NO_SUCH_ENDPOINT)
        assert not _sent(call)

    rig.run(root)


def test_a_call_to_a_server_that_ends_without_an_answer_is_told(rig: Rig) -> None:
    async def child(boot: BootImage) -> None:
        await take(boot.endpoint)

    async def root(boot: BootImage) -> None:
        spawned = await start(boot, "mute")
        call = Call(spawned.slot, b"anybody?", boot.endpoint, spawned.link, await soon())
        try:
            answer = await call
        except PeerGone as error:
            assert error.link == spawned.link
        else:
            raise AssertionError(f"a dead server answered {answer!r}")
        assert _sent(call)
        await ended_well(spawned)

    rig.run(root, programs={"mute": child})


def test_reply_recv_sends_and_receives_in_one(rig: Rig) -> None:
    async def server(boot: BootImage) -> None:
        trap = ReplyRecv((boot.endpoint,), await soon())
        for index in range(3):
            request = await trap
            assert request.data == b"ask %d" % index
            assert trap.reply_status is None
            trap.slot, trap.data = control(boot), b"answer %d" % index
        await refused(_late(trap), Status.TIMED_OUT)
        assert trap.reply_status is None

    def _late(trap: ReplyRecv) -> ReplyRecv:
        trap.deadline = PAST
        return trap

    async def root(boot: BootImage) -> None:
        spawned = await start(boot, "server")
        for index in range(3):
            answer = await Call(
                spawned.slot, b"ask %d" % index, boot.endpoint, spawned.link, await soon()
            )
            assert answer.data == b"answer %d" % index
        await ended_well(spawned)

    rig.run(root, programs={"server": server})


def test_a_refused_reply_does_not_refuse_the_receive(rig: Rig) -> None:
    async def root(boot: BootImage) -> None:
        full = await EndpointCreate()
        reply = await LinkCreate(full, LinkTerms(1, 10, 0))
        requests = await LinkCreate(boot.endpoint)
        trap = ReplyRecv((boot.endpoint,), await soon())
        trap.slot, trap.data = reply.slot, b"r"

        expected: tuple[tuple[Slot, bytes, Status | None], ...] = (
            (reply.slot, b"r", None),
            (reply.slot, b"r", Status.QUEUE_FULL),
            (reply.slot, b"", Status.INVALID_ARGUMENT),
            (Slot(90), b"r", Status.INVALID_ARGUMENT),
            (boot.endpoint, b"r", Status.PERMISSION_DENIED),
        )
        for slot, data, status in expected:
            await Send(requests.slot, b"request")
            trap.slot, trap.data = slot, data
            assert (await trap).data == b"request"
            assert trap.reply_status == status
        await take(full)
        await Send(requests.slot, b"request")
        trap.slot, trap.data = reply.slot, b"r" * 11
        assert (await trap).data == b"request"
        assert trap.reply_status == Status.NO_SPACE
        await EndpointClose(full)
        await Send(requests.slot, b"request")
        trap.data = b"r"
        assert (await trap).data == b"request"
        assert trap.reply_status == Status.NO_SUCH_ENDPOINT

    rig.run(root)


def test_a_largest_message_crosses_between_tasks_unchanged(rig: Rig) -> None:
    async def child(boot: BootImage) -> None:
        given = await take(boot.endpoint)
        assert given.cap is not None
        await Send(given.cap, bytes(range(240)) * 34 + bytes(MESSAGE_SIZE_MAX - 240 * 34))

    async def root(boot: BootImage) -> None:
        spawned = await start(boot, "writer")
        inbox = await LinkCreate(boot.endpoint)
        await Send(spawned.slot, b"here", move=inbox.slot)

        message = await take(boot.endpoint, link=inbox.link)

        assert len(message.data) == MESSAGE_SIZE_MAX
        assert message.data.startswith(bytes(range(240)) * 34)
        await ended_well(spawned)

    rig.run(root, programs={"writer": child})
