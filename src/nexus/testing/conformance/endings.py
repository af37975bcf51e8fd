"""Promise 5: an end wakes every waiter, after what was said before; nothing leaks."""

from typing import Final

from nexus.abi import (
    NO_WAIT,
    BootImage,
    Call,
    CapClone,
    CapClose,
    EndpointClose,
    EndpointCreate,
    Kill,
    LinkCreate,
    LinkTerms,
    PeerGone,
    Recv,
    Send,
    Slot,
    Status,
    TaskTable,
    VmoCreate,
)
from nexus.testing.conformance.steps import (
    control,
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

CYCLES: Final = 200


def test_what_the_dead_had_sent_is_received_before_its_end(rig: Rig) -> None:
    async def child(boot: BootImage) -> None:
        for index in range(5):
            await tell(boot, b"%d" % index)
        await take(boot.endpoint)

    async def root(boot: BootImage) -> None:
        spawned = await start(boot, "talker")
        assert (await take(boot.endpoint)).data == b"0"
        await Send(spawned.slot, b"end")
        await ended_well(spawned)

        assert [(await take(boot.endpoint)).data for _ in range(4)] == [b"1", b"2", b"3", b"4"]
        await gone(boot.endpoint, spawned.link)

    rig.run(root, programs={"talker": child})


def test_what_the_killed_had_sent_is_received_before_its_end(rig: Rig) -> None:
    async def child(boot: BootImage) -> None:
        for index in range(5):
            await tell(boot, b"%d" % index)
        done = await take(boot.endpoint)
        assert done.cap is not None
        await Send(done.cap, b"all said")
        elsewhere = await EndpointCreate()
        await take(elsewhere)

    async def root(boot: BootImage) -> None:
        spawned = await start(boot, "talker")
        aside = await EndpointCreate()
        done = await LinkCreate(aside)
        await Send(spawned.slot, b"say when", move=done.slot)
        assert (await take(aside)).data == b"all said"
        # Unread messages in the victim's queue must not swallow what it had sent.
        await Send(spawned.slot, b"unread")

        await Kill(spawned.pid)

        assert (await ended(spawned)).signal == 9
        messages = [await take(boot.endpoint) for _ in range(5)]
        assert [message.data for message in messages] == [b"0", b"1", b"2", b"3", b"4"]
        await gone(boot.endpoint, spawned.link)
        await refused(Send(spawned.slot, b"anybody?"), Status.NO_SUCH_ENDPOINT)

    rig.run(root, programs={"talker": child})


def test_an_end_is_told_once_for_each_link(rig: Rig) -> None:
    async def root(boot: BootImage) -> None:
        links = [await LinkCreate(boot.endpoint) for _ in range(3)]
        await Send(links[0].slot, b"last words")
        for link in links:
            await CapClose(link.slot)

        ends = set()
        words = []
        for _ in range(4):
            try:
                words.append((await take(boot.endpoint)).data)
            except PeerGone as error:
                assert error.status is Status.NO_SUCH_ENDPOINT
                ends.add(error.link)

        assert words == [b"last words"]
        assert ends == {link.link for link in links}
        await nothing_queued(boot.endpoint)

    rig.run(root)


def test_an_end_comes_to_a_receive_from_its_link_alone(rig: Rig) -> None:
    async def root(boot: BootImage) -> None:
        first, second = await LinkCreate(boot.endpoint), await LinkCreate(boot.endpoint)
        await Send(second.slot, b"words")
        await CapClose(first.slot)
        await CapClose(second.slot)

        assert (await take(boot.endpoint, link=second.link)).data == b"words"
        assert second.link is not None
        await gone(boot.endpoint, second.link, only=True)
        await gone(boot.endpoint, first.link)

    rig.run(root)


def test_a_link_ends_when_its_last_slot_is_closed(rig: Rig) -> None:
    async def root(boot: BootImage) -> None:
        link = await LinkCreate(boot.endpoint)
        alias = await CapClone(link.slot)
        await CapClose(link.slot)
        await nothing_queued(boot.endpoint)
        await Send(alias, b"still there")
        await take(boot.endpoint)

        await CapClose(alias)

        await gone(boot.endpoint, link.link)

    rig.run(root)


def test_a_closed_endpoint_is_gone_for_its_senders(rig: Rig) -> None:
    async def child(boot: BootImage) -> None:
        assert (await take(boot.endpoint)).data == b"close"
        await EndpointClose(boot.endpoint)
        await tell(boot, b"closed")
        elsewhere = await EndpointCreate()
        await refused(Recv((elsewhere,), NO_WAIT), Status.QUEUE_EMPTY)

    async def root(boot: BootImage) -> None:
        spawned = await start(boot, "closer")
        await Send(spawned.slot, b"close")
        assert (await take(boot.endpoint)).data == b"closed"

        await refused(Send(spawned.slot, b"x"), Status.NO_SUCH_ENDPOINT)
        await refused(Send(spawned.slot, b"x", deadline=await soon()), Status.NO_SUCH_ENDPOINT)
        await refused(LinkCreate(spawned.slot, LinkTerms(1, 1, 0)), Status.NO_SUCH_ENDPOINT)

        # The dead capability stays in its slot until it is closed.
        await CapClose(spawned.slot)
        await refused(Send(spawned.slot, b"x"), Status.INVALID_ARGUMENT)
        await ended_well(spawned)

    rig.run(root, programs={"closer": child})


def test_a_closed_endpoint_is_told_before_a_full_queue(rig: Rig) -> None:
    async def root(boot: BootImage) -> None:
        endpoint = await EndpointCreate()
        link = await LinkCreate(endpoint, LinkTerms(1, 100, 0))
        await Send(link.slot, b"full")
        await EndpointClose(endpoint)

        for size in (1, 100, 101):
            await refused(Send(link.slot, bytes(size)), Status.NO_SUCH_ENDPOINT)
            late = Send(link.slot, bytes(size), deadline=await soon())
            await refused(late, Status.NO_SUCH_ENDPOINT)

    rig.run(root)


def test_the_slot_of_a_closed_endpoint_is_empty(rig: Rig) -> None:
    async def root(boot: BootImage) -> None:
        for close in (EndpointClose, CapClose):
            endpoint = await EndpointCreate()
            link = await LinkCreate(endpoint)
            await Send(link.slot, b"dropped with its queue")

            await close(endpoint)

            await refused(Recv((endpoint,), NO_WAIT), Status.INVALID_ARGUMENT)
            await refused(Send(link.slot, b"x"), Status.NO_SUCH_ENDPOINT)
            await CapClose(link.slot)

    rig.run(root)


def test_closing_an_endpoint_needs_manage_on_it(rig: Rig) -> None:
    async def root(boot: BootImage) -> None:
        link = await LinkCreate(boot.endpoint)

        await refused(EndpointClose(link.slot), Status.PERMISSION_DENIED)
        await refused(EndpointClose(Slot(77)), Status.INVALID_ARGUMENT)

        await Send(link.slot, b"still open")
        assert (await take(boot.endpoint)).data == b"still open"

    rig.run(root)


def _waiters_wake(rig: Rig, *, how: str) -> None:
    """Two tasks wait for room at a third; its end by `how` must wake both."""

    async def sender(boot: BootImage) -> None:
        given = await take(boot.endpoint)
        assert given.cap is not None
        count, _ = await fill(given.cap)
        assert count == 2
        await tell(boot, b"waiting")
        await refused(Send(given.cap, b"x", deadline=await soon()), Status.NO_SUCH_ENDPOINT)
        await tell(boot, b"woken")

    async def receiver(boot: BootImage) -> None:
        elsewhere = await EndpointCreate()
        cue = await LinkCreate(elsewhere)
        await tell(boot, b"cue", move=cue.slot)
        await take(elsewhere)
        if how == "close":
            await EndpointClose(boot.endpoint)
            await take(elsewhere)

    async def root(boot: BootImage) -> None:
        serving = await start(boot, "receiver", delegations=2)
        cue = (await take(boot.endpoint)).cap
        assert cue is not None
        senders = []
        for name in ("one", "two"):
            spawned = await start(boot, name, program="sender")
            link = await LinkCreate(serving.slot, LinkTerms(2, 100, 0))
            await Send(spawned.slot, b"fill it", move=link.slot)
            assert (await take(boot.endpoint, link=spawned.link)).data == b"waiting"
            senders.append(spawned)

        if how == "kill":
            await Kill(serving.pid)
        else:
            await Send(cue, b"now")

        for spawned in senders:
            assert (await take(boot.endpoint, link=spawned.link)).data == b"woken"
            await ended_well(spawned)
        if how == "close":
            await Send(cue, b"done")
        exit_info = await ended(serving)
        assert exit_info.signal == (9 if how == "kill" else 0)

    rig.run(root, programs={"sender": sender, "receiver": receiver})


def test_closing_an_endpoint_wakes_both_senders_that_wait_for_room(rig: Rig) -> None:
    _waiters_wake(rig, how="close")


def test_the_exit_of_a_receiver_wakes_both_senders_that_wait_for_room(rig: Rig) -> None:
    _waiters_wake(rig, how="exit")


def test_the_kill_of_a_receiver_wakes_both_senders_that_wait_for_room(rig: Rig) -> None:
    _waiters_wake(rig, how="kill")


def test_the_kill_of_a_server_wakes_two_callers(rig: Rig) -> None:
    async def caller(boot: BootImage) -> None:
        given = await take(boot.endpoint)
        assert given.cap is not None
        inbox = await LinkCreate(boot.endpoint)
        assert inbox.link is not None
        await Send(given.cap, b"answer here", move=inbox.slot)
        try:
            answer = await Call(given.cap, b"ask", boot.endpoint, inbox.link, await soon())
        except PeerGone as error:
            assert error.link == inbox.link
        else:
            raise AssertionError(f"a killed server answered {answer!r}")
        await tell(boot, b"woken")

    async def server(boot: BootImage) -> None:
        messages = [await take(boot.endpoint) for _ in range(4)]
        assert sorted(message.data for message in messages)[2:] == [b"ask", b"ask"]
        await tell(boot, b"both asked")
        elsewhere = await EndpointCreate()
        await take(elsewhere)

    async def root(boot: BootImage) -> None:
        serving = await start(boot, "server", delegations=2)
        callers = []
        for name in ("one", "two"):
            spawned = await start(boot, name, program="caller")
            link = await LinkCreate(serving.slot, LinkTerms(4, 100, 0))
            await Send(spawned.slot, b"ask it", move=link.slot)
            callers.append(spawned)
        assert (await take(boot.endpoint, link=serving.link)).data == b"both asked"

        await Kill(serving.pid)

        for spawned in callers:
            assert (await take(boot.endpoint, link=spawned.link)).data == b"woken"
            await ended_well(spawned)
        await ended(serving)

    rig.run(root, programs={"caller": caller, "server": server})


def test_the_end_of_a_peer_wakes_a_receive_from_a_wait_set(rig: Rig) -> None:
    async def child(boot: BootImage) -> None:
        await take(boot.endpoint)

    async def root(boot: BootImage) -> None:
        other = await EndpointCreate()
        spawned = await start(boot, "brief")
        await Send(spawned.slot, b"end")
        try:
            message = await Recv((other, boot.endpoint), await soon())
        except PeerGone as error:
            assert error.link == spawned.link
        else:
            raise AssertionError(f"received {message!r}")
        await ended_well(spawned)

    rig.run(root, programs={"brief": child})


def test_spawning_and_exiting_returns_to_the_baseline(rig: Rig) -> None:
    async def child(boot: BootImage) -> int:
        endpoint = await EndpointCreate()
        link = await LinkCreate(endpoint)
        await Send(link.slot, b"left in the queue")
        await VmoCreate(10_000)
        inbox = await LinkCreate(boot.endpoint)
        await tell(boot, b"take it", move=inbox.slot)
        return 7

    async def root(boot: BootImage) -> None:
        baseline = None
        for cycle in range(CYCLES):
            spawned = await start(boot, f"mayfly{cycle % 3}", program="mayfly")
            message = await take(boot.endpoint, link=spawned.link)
            assert message.cap is not None
            assert spawned.generation == cycle // 3 + 1
            assert (await ended(spawned)).code == 7
            await gone(boot.endpoint, spawned.link)
            await refused(Send(message.cap, b"x"), Status.NO_SUCH_ENDPOINT)
            await CapClose(message.cap)
            await CapClose(spawned.slot)
            assert len(await TaskTable()) == 1
            held = await holdings()
            baseline = baseline or held
            assert held == baseline, f"after cycle {cycle}"

    rig.run(root, programs={"mayfly": child})


def test_making_and_closing_endpoints_returns_to_the_baseline(rig: Rig) -> None:
    async def root(boot: BootImage) -> None:
        before = await holdings()
        for _ in range(500):
            endpoint = await EndpointCreate()
            link = await LinkCreate(endpoint)
            await Send(link.slot, b"unread")
            await EndpointClose(endpoint)
            await CapClose(link.slot)
        assert await holdings() == before

    rig.run(root)


def test_a_task_that_ends_closes_what_it_holds(rig: Rig) -> None:
    async def child(boot: BootImage) -> None:
        held = [await take(boot.endpoint) for _ in range(4)]
        assert all(message.cap is not None for message in held)
        await Send(control(boot), b"have them")

    async def root(boot: BootImage) -> None:
        links = [await LinkCreate(boot.endpoint) for _ in range(4)]
        spawned = await start(boot, "keeper")
        for link in links:
            await Send(spawned.slot, b"keep", move=link.slot)
        assert (await take(boot.endpoint)).data == b"have them"
        await ended_well(spawned)

        ends = {await gone(boot.endpoint, None) for _ in range(5)}

        assert ends == {spawned.link, *(link.link for link in links)}
        await nothing_queued(boot.endpoint)

    rig.run(root, programs={"keeper": child})
