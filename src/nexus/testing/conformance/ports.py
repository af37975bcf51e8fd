"""Promise 10, ports: doors for processes outside, each message stamped with who is there."""

from typing import Any, Final

from nexus.abi import (
    MESSAGE_SIZE_MAX,
    NO_WAIT,
    OUTSIDE,
    PORT_PEERS_MAX,
    PORTS_MAX,
    THREADS_MAX,
    AbiError,
    BootImage,
    Call,
    CapClone,
    CapClose,
    CapDerive,
    CapQuery,
    DeviceGrant,
    EndpointClose,
    EndpointCreate,
    EventKind,
    Grants,
    Isolation,
    Kill,
    LinkCreate,
    LinkId,
    ListenGrant,
    Nanos,
    Now,
    PeerIdentity,
    Pid,
    PortClose,
    PortPeer,
    PortSend,
    QosClass,
    Recv,
    ReplyRecv,
    Rights,
    Send,
    Sender,
    Slot,
    Spawn,
    SpawnLastError,
    SpawnReason,
    SpawnSpec,
    Status,
    TaskStats,
    TaskTable,
    Trap,
    VmoCreate,
    VmoMap,
)
from nexus.kernel.core import BOOT_BUDGET_SIZE
from nexus.testing.conformance.steps import (
    MS,
    PAST,
    control,
    ended,
    ended_well,
    gone,
    nothing_queued,
    refused,
    soon,
    start,
    take,
    tell,
)
from nexus.testing.outside import Outside, Peer
from nexus.testing.rig import Rig

DOOR: Final = "door"  # name of the port of a case
WITH_DOOR: Final = Grants(ports=(DOOR,))
QUEUED_MIN: Final = 4  # messages of any size that a connection holds while its peer reads nothing
QUEUED_MAX: Final = 4096  # and it is full long before
NO_ONE: Final = LinkId(999_999)


async def _turn(boot: BootImage) -> None:
    """Tell the root task that it is its turn, and wait for mine."""
    await tell(boot, b"your turn")
    assert (await take(boot.endpoint)).data == b"go on"


async def _go_on(boot: BootImage, slot: Slot) -> None:
    await Send(slot, b"go on")
    assert (await take(boot.endpoint)).data == b"your turn"


def _refuses_connections(outside: Outside) -> bool:
    """Whether nobody is behind the port any more."""
    try:
        peer = outside.connect(DOOR)
    except (ConnectionRefusedError, FileNotFoundError):
        return True
    return peer.closed


def test_a_message_from_outside_is_stamped_with_its_process(rig: Rig) -> None:
    with rig.place() as place:

        async def child(boot: BootImage) -> None:
            (port,) = boot.ports
            before = await TaskStats()
            message = await take(port)
            sender = Sender(OUTSIDE, Pid(place.outside.pid), 0, QosClass.NORMAL)
            assert (message.data, message.sender) == (b"\xf7hello", sender)
            assert (message.cap, message.source) == (None, port)
            identity = PeerIdentity(place.outside.pid, place.outside.uid)
            assert await PortPeer(port, message.link) == identity
            await PortSend(port, message.link, b"\xffanswer")
            await PortSend(port, message.link, bytearray(b"second"))
            after = await TaskStats()
            assert (after.received, after.received_size) == (
                before.received + 1,
                before.received_size + 6,
            )
            assert (after.sent, after.sent_size) == (before.sent + 2, before.sent_size + 13)
            await tell(boot, b"done")
            await gone(port, message.link)

        async def root(boot: BootImage) -> None:
            assert boot.ports == ()
            spawned = await start(boot, "child", grants=WITH_DOOR)
            peer = place.outside.connect(DOOR)
            assert peer.send(b"\xf7hello")
            assert (await take(boot.endpoint)).data == b"done"
            assert peer.take() == [b"\xffanswer", b"second"]
            assert not peer.closed
            peer.close()
            await ended_well(spawned)

        rig.run(root, programs={"child": child}, place=place)


def test_ports_stand_behind_the_first_two_slots_and_are_no_endpoints(rig: Rig) -> None:
    with rig.place() as place:

        async def child(boot: BootImage) -> None:
            assert boot.ports == (Slot(2), Slot(3))
            stats = await TaskStats()
            assert (stats.slots, stats.endpoints, stats.links) == (4, 1, 1)
            for port in boot.ports:
                await nothing_queued(port)

        async def root(boot: BootImage) -> None:
            grants = Grants(ports=("one", "two"))
            await ended_well(await start(boot, "child", grants=grants))

        rig.run(root, programs={"child": child}, place=place)


def test_what_a_peer_had_sent_is_received_before_its_end(rig: Rig) -> None:
    with rig.place() as place:

        async def child(boot: BootImage) -> None:
            (port,) = boot.ports
            await _turn(boot)
            messages = [await take(port) for _ in range(3)]
            assert [message.data for message in messages] == [b"1", b"2", b"3"]
            (link,) = {message.link for message in messages}
            assert await gone(port, None) == link
            for trap in (PortSend(port, link, b"x"), PortClose(port, link), PortPeer(port, link)):
                await refused(trap, Status.NO_SUCH_ENDPOINT)
            await refused(Recv((port,), NO_WAIT, link=link), Status.NO_SUCH_ENDPOINT)
            await nothing_queued(port)

        async def root(boot: BootImage) -> None:
            spawned = await start(boot, "child", grants=WITH_DOOR)
            assert (await take(boot.endpoint)).data == b"your turn"
            peer = place.outside.connect(DOOR)
            for data in (b"1", b"2", b"3"):
                assert peer.send(data)
            peer.close()
            await Send(spawned.slot, b"go on")
            await ended_well(spawned)

        rig.run(root, programs={"child": child}, place=place)


def test_a_peer_that_never_sent_anything_is_told_gone_too(rig: Rig) -> None:
    with rig.place() as place:

        async def child(boot: BootImage) -> None:
            (port,) = boot.ports
            await _turn(boot)
            first = await gone(port, None)
            second = await gone(port, None)
            assert first != second
            await nothing_queued(port)

        async def root(boot: BootImage) -> None:
            spawned = await start(boot, "child", grants=WITH_DOOR)
            assert (await take(boot.endpoint)).data == b"your turn"
            for _ in range(2):
                place.outside.connect(DOOR).close()
            await Send(spawned.slot, b"go on")
            await ended_well(spawned)

        rig.run(root, programs={"child": child}, place=place)


def test_a_closed_peer_is_known_until_its_end_was_received(rig: Rig) -> None:
    with rig.place() as place:

        async def child(boot: BootImage) -> None:
            (port,) = boot.ports
            links = [(await take(port)).link for _ in range(2)]
            await _turn(boot)
            for link in links:
                await refused(PortSend(port, link, b"x"), Status.NO_SUCH_ENDPOINT)
                assert (await PortPeer(port, link)).uid == place.outside.uid
            await PortClose(port, links[0])
            assert await gone(port, None) == links[1]
            await nothing_queued(port)

        async def root(boot: BootImage) -> None:
            spawned = await start(boot, "child", grants=WITH_DOOR)
            peers = [place.outside.connect(DOOR) for _ in range(2)]
            for peer in peers:
                assert peer.send(b"hello")
            assert (await take(boot.endpoint)).data == b"your turn"
            for peer in peers:
                peer.close()
            await Send(spawned.slot, b"go on")
            await ended_well(spawned)

        rig.run(root, programs={"child": child}, place=place)


def test_a_connection_that_is_closed_here_ends_for_both(rig: Rig) -> None:
    with rig.place() as place:

        async def child(boot: BootImage) -> None:
            (port,) = boot.ports
            link = (await take(port)).link
            await PortSend(port, link, b"last words")
            await _turn(boot)  # two more messages are queued then
            await PortClose(port, link)
            for trap in (PortSend(port, link, b"x"), PortClose(port, link), PortPeer(port, link)):
                await refused(trap, Status.NO_SUCH_ENDPOINT)
            await nothing_queued(port)
            await _turn(boot)
            await nothing_queued(port)

        async def root(boot: BootImage) -> None:
            spawned = await start(boot, "child", grants=WITH_DOOR)
            peer = place.outside.connect(DOOR)
            assert peer.send(b"hello")
            assert (await take(boot.endpoint)).data == b"your turn"
            assert peer.send(b"unread")
            assert peer.send(b"unread")
            await _go_on(boot, spawned.slot)
            assert peer.take() == [b"last words"]
            assert peer.closed
            assert not peer.send(b"too late")
            peer.close()
            await Send(spawned.slot, b"go on")
            await ended_well(spawned)

        rig.run(root, programs={"child": child}, place=place)


def test_port_traps_refuse_what_is_no_port_no_message_and_no_connection(rig: Rig) -> None:
    with rig.place() as place:

        async def child(boot: BootImage) -> None:
            port, other = boot.ports
            link = (await take(port)).link
            vmo = await VmoCreate(1)
            before = await TaskStats()
            for slot in (Slot(-1), Slot(40), Slot(96), boot.endpoint, control(boot), vmo):
                for trap in (
                    PortSend(slot, link, b"x"),
                    PortSend(slot, link, b""),
                    PortClose(slot, link),
                    PortPeer(slot, link),
                ):
                    await refused(trap, Status.INVALID_ARGUMENT)
            for data in (b"", bytes(MESSAGE_SIZE_MAX + 1)):
                await refused(PortSend(port, link, data), Status.INVALID_ARGUMENT)
                await refused(PortSend(port, NO_ONE, data), Status.INVALID_ARGUMENT)
            for slot, number in ((port, NO_ONE), (port, LinkId(0)), (other, link)):
                strange: tuple[Trap[Any], ...] = (
                    PortSend(slot, number, b"x"),
                    PortClose(slot, number),
                    PortPeer(slot, number),
                    Recv((slot,), NO_WAIT, link=number),
                )
                for each in strange:
                    await refused(each, Status.NO_SUCH_ENDPOINT)
            assert await TaskStats() == before
            await PortSend(port, link, bytes(MESSAGE_SIZE_MAX))
            await tell(boot, b"done")

        async def root(boot: BootImage) -> None:
            spawned = await start(boot, "child", grants=Grants(ports=(DOOR, "other")))
            peer = place.outside.connect(DOOR)
            assert peer.send(bytes(MESSAGE_SIZE_MAX - 1) + b"x")
            assert (await take(boot.endpoint)).data == b"done"
            assert [len(data) for data in peer.take()] == [MESSAGE_SIZE_MAX]
            await ended_well(spawned)

        rig.run(root, programs={"child": child}, place=place)


def test_a_port_is_an_endpoint_in_no_other_way(rig: Rig) -> None:
    with rig.place() as place:

        async def child(boot: BootImage) -> None:
            (port,) = boot.ports
            own = await LinkCreate(boot.endpoint)
            assert own.link is not None
            before = await TaskStats()
            traps: tuple[Trap[Any], ...] = (
                Send(port, b"x"),
                Send(own.slot, b"x", move=port),
                EndpointClose(port),
                LinkCreate(port),
                CapClone(port),
                CapDerive(port, Rights.RECV),
                CapQuery(port),
            )
            for trap in traps:
                await refused(trap, Status.PERMISSION_DENIED)
            await refused(VmoMap(port), Status.INVALID_ARGUMENT)
            call = Call(own.slot, b"x", port, own.link, PAST)
            await refused(call, Status.INVALID_ARGUMENT)
            assert call.sent is False
            assert await TaskStats() == before
            await nothing_queued(port)

        async def root(boot: BootImage) -> None:
            await ended_well(await start(boot, "child", grants=WITH_DOOR))

        rig.run(root, programs={"child": child}, place=place)


def test_a_peer_that_does_not_read_is_queue_full_and_costs_no_message(rig: Rig) -> None:
    with rig.place() as place:

        async def child(boot: BootImage) -> None:
            (port,) = boot.ports
            link = (await take(port)).link
            for data in (b"x", bytes(MESSAGE_SIZE_MAX)):
                count = 0
                while count < QUEUED_MAX:
                    before = await TaskStats()
                    try:
                        await PortSend(port, link, data)
                    except AbiError as error:
                        assert error.status is Status.QUEUE_FULL
                        assert await TaskStats() == before
                        break
                    count += 1
                assert QUEUED_MIN <= count < QUEUED_MAX
                await tell(boot, b"%d" % count)
                assert (await take(boot.endpoint)).data == b"go on"
            await PortSend(port, link, b"room again")
            await tell(boot, b"1")
            await take(boot.endpoint)

        async def root(boot: BootImage) -> None:
            spawned = await start(boot, "child", grants=WITH_DOOR)
            peer = place.outside.connect(DOOR)
            assert peer.send(b"hello")
            for _ in range(3):
                count = int((await take(boot.endpoint)).data)
                assert len(peer.take()) == count
                await Send(spawned.slot, b"go on")
            await ended_well(spawned)

        rig.run(root, programs={"child": child}, place=place)


def test_a_service_that_does_not_read_holds_its_peer_up_and_loses_nothing(rig: Rig) -> None:
    with rig.place() as place:

        async def child(boot: BootImage) -> None:
            (port,) = boot.ports
            await _turn(boot)
            count = int((await take(boot.endpoint)).data)
            for number in range(count):
                assert (await take(port)).data == b"%d" % number
            await nothing_queued(port)

        async def root(boot: BootImage) -> None:
            spawned = await start(boot, "child", grants=WITH_DOOR)
            assert (await take(boot.endpoint)).data == b"your turn"
            peer = place.outside.connect(DOOR)
            count = 0
            while count < QUEUED_MAX and peer.send(b"%d" % count):
                count += 1
            assert QUEUED_MIN <= count < QUEUED_MAX
            await Send(spawned.slot, b"go on")
            await Send(spawned.slot, b"%d" % count)
            await ended_well(spawned)

        rig.run(root, programs={"child": child}, place=place)


def _hello(outside: Outside) -> Peer:
    peer = outside.connect(DOOR)
    assert peer.send(b"hello")
    return peer


def test_a_port_holds_so_many_connections_and_no_more(rig: Rig) -> None:
    with rig.place() as place:

        async def child(boot: BootImage) -> None:
            (port,) = boot.ports
            links = [(await take(port)).link for _ in range(PORT_PEERS_MAX)]
            assert len(set(links)) == PORT_PEERS_MAX
            await _turn(boot)
            # One too many stands at the door: it is turned away, and this is not its message.
            await nothing_queued(port)
            assert (await TaskStats()).refused_links == 1
            await PortClose(port, links[0])
            await _turn(boot)
            fresh = (await take(port)).link
            assert fresh not in links
            await _turn(boot)
            assert await gone(port, None) == links[1]
            await _turn(boot)
            assert (await take(port)).link not in (*links, fresh)
            assert (await TaskStats()).refused_links == 1
            await _turn(boot)

        async def root(boot: BootImage) -> None:
            spawned = await start(boot, "child", grants=WITH_DOOR)
            peers = [_hello(place.outside) for _ in range(PORT_PEERS_MAX)]
            assert (await take(boot.endpoint)).data == b"your turn"
            late = place.outside.connect(DOOR)
            await _go_on(boot, spawned.slot)
            assert late.closed
            assert peers[0].closed
            assert not peers[1].closed
            peers.append(_hello(place.outside))
            await _go_on(boot, spawned.slot)
            peers[1].close()
            await _go_on(boot, spawned.slot)
            peers.append(_hello(place.outside))
            await _go_on(boot, spawned.slot)
            assert not any(peer.closed for peer in peers[2:])
            await Send(spawned.slot, b"go on")
            await ended_well(spawned)
            assert all(peer.closed for peer in peers)

        rig.run(root, programs={"child": child}, place=place)


def test_another_user_gets_no_connection(rig: Rig) -> None:
    with rig.place() as place:

        async def child(boot: BootImage) -> None:
            (port,) = boot.ports
            await _turn(boot)
            assert (await take(port)).data == b"hello"
            expected = int((await take(boot.endpoint)).data)
            assert (await TaskStats()).refused_identity == expected
            await nothing_queued(port)

        async def root(boot: BootImage) -> None:
            spawned = await start(boot, "child", grants=WITH_DOOR)
            assert (await take(boot.endpoint)).data == b"your turn"
            stranger = place.outside.connect_as_stranger(DOOR)  # None: nobody else is at hand
            peer = _hello(place.outside)
            await Send(spawned.slot, b"go on")
            await Send(spawned.slot, b"%d" % (stranger is not None))
            await ended_well(spawned)
            assert peer.closed
            if stranger is not None:
                assert stranger.closed
                assert stranger.take() == []

        rig.run(root, programs={"child": child}, place=place)


def test_a_packet_that_is_no_message_ends_its_connection_alone(rig: Rig) -> None:
    with rig.place() as place:

        async def child(boot: BootImage) -> None:
            (port,) = boot.ports
            polite = (await take(port)).link
            for _ in range(2):
                await _turn(boot)
                message = await take(port)
                assert message.data == b"hello"
                assert await gone(port, None) == message.link
            stats = await TaskStats()
            assert (stats.refused_oversize, stats.received) == (1, 5)
            await PortSend(port, polite, b"still here")
            await _turn(boot)

        async def root(boot: BootImage) -> None:
            spawned = await start(boot, "child", grants=WITH_DOOR)
            polite = _hello(place.outside)
            assert (await take(boot.endpoint)).data == b"your turn"
            rude = _hello(place.outside)
            _ = rude.send(bytes(MESSAGE_SIZE_MAX + 1))
            await _go_on(boot, spawned.slot)
            assert rude.closed
            rude = _hello(place.outside)
            _ = rude.send(b"")
            await _go_on(boot, spawned.slot)
            assert rude.closed
            assert polite.take() == [b"still here"]
            await Send(spawned.slot, b"go on")
            await ended_well(spawned)

        rig.run(root, programs={"child": child}, place=place)


def test_endpoints_and_ports_are_received_from_together(rig: Rig) -> None:
    with rig.place() as place:

        async def child(boot: BootImage) -> None:
            (port,) = boot.ports
            aside = await EndpointCreate()
            await tell(boot, b"say when", move=(await LinkCreate(aside)).slot)
            assert (await take(aside)).data == b"all six are queued"
            sources = (boot.endpoint, port)
            trap = ReplyRecv(sources, await soon())
            came = [await trap for _ in range(2)]
            came += [await Recv(sources, await soon()) for _ in range(4)]
            outside = [m.data for m in came if m.source == port]
            inside = [m.data for m in came if m.source == boot.endpoint]
            assert (outside, inside) == ([b"a", b"b", b"c"], [b"1", b"2", b"3"])
            # Neither waits behind all of the other.
            assert {m.source for m in came[:3]} == set(sources)
            await refused(Recv(sources, NO_WAIT), Status.QUEUE_EMPTY)
            link = next(m.link for m in came if m.source == port)
            await PortSend(port, link, b"answer")
            await tell(boot, b"done")
            assert (await Recv(sources, await soon())).data == b"after a wait"

        async def root(boot: BootImage) -> None:
            spawned = await start(boot, "child", grants=WITH_DOOR)
            aside = (await take(boot.endpoint)).cap
            assert aside is not None
            peer = place.outside.connect(DOOR)
            for data in (b"a", b"b", b"c"):
                assert peer.send(data)
            for data in (b"1", b"2", b"3"):
                await Send(spawned.slot, data)
            await Send(aside, b"all six are queued")
            assert (await take(boot.endpoint)).data == b"done"
            assert peer.take() == [b"answer"]
            assert peer.send(b"after a wait")
            await ended_well(spawned)

        rig.run(root, programs={"child": child}, place=place)


def test_a_filtered_receive_takes_from_one_connection_alone(rig: Rig) -> None:
    with rig.place() as place:

        async def child(boot: BootImage) -> None:
            (port,) = boot.ports
            first, second = [await take(port) for _ in range(2)]
            assert (first.data, second.data) == (b"hello", b"hello")
            await _turn(boot)
            assert (await take(port, link=second.link)).data == b"two"
            await refused(Recv((port,), NO_WAIT, link=second.link), Status.QUEUE_EMPTY)
            await refused(Recv((port,), PAST, link=second.link), Status.TIMED_OUT)
            elsewhere = Recv((boot.endpoint,), NO_WAIT, link=first.link)
            await refused(elsewhere, Status.NO_SUCH_ENDPOINT)
            assert (await take(port)).data == b"one"
            await _turn(boot)
            await gone(port, second.link, only=True)
            assert await gone(port, None) == first.link

        async def root(boot: BootImage) -> None:
            spawned = await start(boot, "child", grants=WITH_DOOR)
            one, two = [_hello(place.outside) for _ in range(2)]
            assert (await take(boot.endpoint)).data == b"your turn"
            assert one.send(b"one")
            assert two.send(b"two")
            await _go_on(boot, spawned.slot)
            one.close()
            two.close()
            await Send(spawned.slot, b"go on")
            await ended_well(spawned)

        rig.run(root, programs={"child": child}, place=place)


def test_waits_at_a_port_end_in_time_and_small_buffers_lose_nothing(rig: Rig) -> None:
    with rig.place() as place:

        async def child(boot: BootImage) -> None:
            (port,) = boot.ports
            await refused(Recv((port,), NO_WAIT), Status.QUEUE_EMPTY)
            await refused(Recv((port,), PAST), Status.TIMED_OUT)
            deadline = Nanos(await Now() + 5 * MS)
            await refused(Recv((port,), deadline), Status.TIMED_OUT)
            assert await Now() >= deadline
            await _turn(boot)
            await refused(Recv((port,), await soon(), size_max=4), Status.INVALID_ARGUMENT)
            message = await Recv((port,), PAST, size_max=5)  # what is queued wins
            assert message.data == b"hello"

        async def root(boot: BootImage) -> None:
            spawned = await start(boot, "child", grants=WITH_DOOR)
            assert (await take(boot.endpoint)).data == b"your turn"
            peer = _hello(place.outside)
            await Send(spawned.slot, b"go on")
            await ended_well(spawned)
            assert peer.closed

        rig.run(root, programs={"child": child}, place=place)


def test_a_port_ends_with_its_slot_and_with_its_owner(rig: Rig) -> None:
    with rig.place() as place:

        async def closes(boot: BootImage) -> None:
            (port,) = boot.ports
            link = (await take(port)).link
            await PortSend(port, link, b"bye")
            await CapClose(port)
            for trap in (PortSend(port, link, b"x"), Recv((port,), NO_WAIT)):
                await refused(trap, Status.INVALID_ARGUMENT)
            assert (await TaskStats()).slots == 2
            await _turn(boot)

        async def waits(boot: BootImage) -> None:
            (port,) = boot.ports
            await take(port)
            await tell(boot, b"met")
            await take(port)

        async def root(boot: BootImage) -> None:
            spawned = await start(boot, "closes", grants=WITH_DOOR)
            peer = _hello(place.outside)
            assert (await take(boot.endpoint)).data == b"your turn"
            assert peer.take() == [b"bye"]
            assert peer.closed
            assert _refuses_connections(place.outside)
            await Send(spawned.slot, b"go on")
            await ended_well(spawned)
            assert await gone(boot.endpoint, None) == spawned.link
            for _ in range(2):  # the door of a new instance is open again
                spawned = await start(boot, "waits", grants=WITH_DOOR)
                peer = _hello(place.outside)
                assert (await take(boot.endpoint)).data == b"met"
                await Kill(spawned.pid)
                await ended(spawned)
                assert peer.closed
                assert _refuses_connections(place.outside)
                await gone(boot.endpoint, spawned.link)

        rig.run(root, programs={"closes": closes, "waits": waits}, place=place)


def test_grants_that_cannot_be_given_are_refused_and_start_nothing(rig: Rig) -> None:
    device = DeviceGrant("clock", "/dev/null", False)
    listening = ListenGrant("web", "127.0.0.1", 8080)
    apart = Isolation.EXEC
    bad: tuple[Grants, ...] = (
        Grants(ports=("Bad Name",)),
        Grants(ports=("",)),
        Grants(ports=("../up",)),
        Grants(ports=("two", "two")),
        Grants(ports=tuple(f"port{n}" for n in range(PORTS_MAX + 1))),
        Grants(ports=(DOOR,)),  # a live task has it
        Grants(threads=-1),
        Grants(threads=THREADS_MAX + 1),
        Grants(isolation=7),  # type: ignore[arg-type]
        Grants(devices=(device,)),  # these four need an interpreter of their own
        Grants(listen=(listening,)),
        Grants(connect=(80,)),
        Grants(streams=True),
        Grants(isolation=apart, devices=(device._replace(path="null"),)),
        Grants(isolation=apart, devices=(device._replace(path="/dev/../etc/passwd"),)),
        Grants(isolation=apart, devices=(device, device)),
        Grants(isolation=apart, listen=(listening._replace(port=0),)),
        Grants(isolation=apart, connect=(70_000,)),
    )
    with rig.place() as place:

        async def child(boot: BootImage) -> None:
            await take(boot.endpoint)

        async def root(boot: BootImage) -> None:
            spawned = await start(boot, "child", grants=WITH_DOOR)
            before = await TaskStats()
            for grants in bad:
                spec = SpawnSpec("other", "child", boot.endpoint, grants=grants)
                await refused(Spawn(spec), Status.INVALID_ARGUMENT)
                assert await SpawnLastError() is SpawnReason.INVALID_PAYLOAD, grants
            tight = SpawnSpec("other", "child", boot.endpoint, budget=BOOT_BUDGET_SIZE)
            door = tight._replace(grants=Grants(ports=("tight",)))
            await refused(Spawn(door), Status.INVALID_ARGUMENT)
            assert await SpawnLastError() is SpawnReason.INVALID_PAYLOAD
            assert len(await TaskTable()) == 2
            after = await TaskStats()
            assert (after.slots, after.links) == (before.slots, before.links)
            other = await Spawn(tight)
            for each in (spawned, other):
                await Send(each.slot, b"end")
                await ended_well(each)

        rig.run(root, programs={"child": child}, place=place)


def test_grants_are_recorded_with_the_start(rig: Rig) -> None:
    with rig.place() as place:

        async def child(boot: BootImage) -> None:
            assert len(boot.ports) == 1

        async def root(boot: BootImage) -> None:
            await ended_well(await start(boot, "granted", program="child", grants=WITH_DOOR))

        run = rig.observe(root, programs={"child": child}, place=place)

        nothing = {
            "isolation": "fork",
            "threads": 0,
            "ports": [],
            "devices": [],
            "listen": [],
            "connect": [],
            "streams": False,
            "hardware": [],
            "secret": "none",
            "stream_ports": [],
        }
        (granted,) = [f for f in run.fields(EventKind.SPAWN) if f["name"] == "granted"]
        assert granted["grants"] == {**nothing, "ports": [DOOR]}
        others = [f for f in run.fields(EventKind.SPAWN) if f["name"] != "granted"]
        assert all(fields["grants"] == nothing for fields in others)
