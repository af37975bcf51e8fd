"""Promise 10, stream ports: bytes in and out, bounded, and a peer's pace holds nobody up."""

from typing import Final

from nexus.abi import (
    MESSAGE_SIZE_MAX,
    NO_WAIT,
    OUTSIDE,
    PORT_PEERS_MAX,
    STREAM_PORTS_MAX,
    STREAM_QUEUE_SIZE,
    UID_UNKNOWN,
    AbiError,
    BootImage,
    Grants,
    LinkId,
    Message,
    Nanos,
    Now,
    PeerIdentity,
    Pid,
    PortClose,
    PortDial,
    PortPeer,
    PortSend,
    QosClass,
    Recv,
    Send,
    Sender,
    SleepUntil,
    Slot,
    Spawn,
    SpawnLastError,
    SpawnReason,
    SpawnSpec,
    Status,
    StreamGrant,
    StreamRole,
    TaskStats,
)
from nexus.testing.conformance.steps import (
    MS,
    PATIENCE,
    ended_well,
    gone,
    nothing_queued,
    refused,
    soon,
    start,
    take,
    tell,
)
from nexus.testing.outside import LOOPBACK, Listener, Stream
from nexus.testing.rig import Rig

DOOR: Final = "flow"  # name of the stream port of a case
UNIX: Final = StreamGrant(DOOR, StreamRole.UNIX)
LINUX_QUEUES_MAX: Final = 64 * 1024 * 1024  # bytes; what Linux itself may hold is far below it
PIECE: Final = 8192


def _grants(*streams: StreamGrant, ports: tuple[str, ...] = ()) -> Grants:
    return Grants(ports=ports, stream_ports=streams)


def _pattern(start: int, size: int) -> bytes:
    """Bytes of a stream by their place in it."""
    return bytes((start + index) * 31 % 251 for index in range(size))


async def _bytes(port: Slot, size: int, link: LinkId | None = None) -> tuple[bytes, LinkId]:
    """So many bytes of one connection, in whatever messages they come."""
    message = await take(port, link=link)
    came = message.data
    while len(came) < size:
        came += (await take(port, link=message.link)).data
    return came, message.link


async def _data(port: Slot) -> Message:
    """The next message that is not empty."""
    while not (message := await take(port)).data:
        pass
    return message


async def _read(peer: Stream, size: int) -> bytes:
    """So many bytes as the peer reads them."""
    came = b"".join(peer.take())
    give_up = await Now() + PATIENCE
    while len(came) < size:
        now = await SleepUntil(Nanos(await Now() + MS))
        assert now < give_up, f"{len(came)} of {size} bytes have come"
        came += b"".join(peer.take())
    return came


async def _closed(peer: Stream) -> None:
    """Wait until the other end has ended the connection."""
    give_up = await Now() + PATIENCE
    while not peer.closed:
        assert await SleepUntil(Nanos(await Now() + MS)) < give_up, "the connection is open"


async def _accepted(listener: Listener) -> Stream:
    give_up = await Now() + PATIENCE
    while (peer := listener.accept()) is None:
        assert await SleepUntil(Nanos(await Now() + MS)) < give_up, "nobody dialled"
    return peer


async def _turn(boot: BootImage) -> None:
    await tell(boot, b"your turn")
    assert (await take(boot.endpoint)).data == b"go on"


async def _its_turn(boot: BootImage, slot: Slot | None = None) -> None:
    if slot is not None:
        await Send(slot, b"go on")
    assert (await take(boot.endpoint)).data == b"your turn"


def test_bytes_go_both_ways_and_are_stamped_with_who_is_there(rig: Rig) -> None:
    with rig.place() as place:

        async def child(boot: BootImage) -> None:
            (port,) = boot.ports
            first = await take(port)
            sender = Sender(OUTSIDE, Pid(place.outside.pid), 0, QosClass.NORMAL)
            assert (first.data, first.sender, first.cap, first.source) == (b"", sender, None, port)
            came, link = await _bytes(port, 20_000, first.link)
            assert came == _pattern(0, 20_000)
            identity = PeerIdentity(place.outside.pid, place.outside.uid)
            assert await PortPeer(port, link) == identity
            await PortSend(port, link, b"an")
            await PortSend(port, link, bytearray(b"swer"))
            await _turn(boot)
            await gone(port, link)
            await refused(PortSend(port, link, b"x"), Status.NO_SUCH_ENDPOINT)

        async def root(boot: BootImage) -> None:
            spawned = await start(boot, "child", grants=_grants(UNIX))
            peer = place.outside.connect_stream(DOOR)
            assert peer.send(_pattern(0, 20_000))
            await _its_turn(boot)
            assert await _read(peer, 6) == b"answer"
            peer.close()
            await Send(spawned.slot, b"go on")
            await ended_well(spawned)

        rig.run(root, programs={"child": child}, place=place)


def test_a_loopback_port_takes_anybody_and_knows_nobody(rig: Rig) -> None:
    with rig.place() as place:

        async def child(boot: BootImage) -> None:
            (port,) = boot.ports
            came, link = await _bytes(port, 5)
            assert came == b"hello"
            assert await PortPeer(port, link) == PeerIdentity(0, UID_UNKNOWN)
            await PortSend(port, link, b"there")
            await _turn(boot)

        async def root(boot: BootImage) -> None:
            number = place.outside.free_tcp_port()
            grants = _grants(StreamGrant(DOOR, StreamRole.TCP, LOOPBACK, number))
            spawned = await start(boot, "child", grants=grants)
            peer = place.outside.connect_tcp(number)
            assert peer.send(b"hello")
            await _its_turn(boot)
            assert await _read(peer, 5) == b"there"
            taken = SpawnSpec("other", "child", boot.endpoint, grants=grants)
            await refused(Spawn(taken), Status.INVALID_ARGUMENT)
            assert await SpawnLastError() is SpawnReason.INVALID_PAYLOAD
            await Send(spawned.slot, b"go on")
            await ended_well(spawned)
            await gone(boot.endpoint, spawned.link)
            try:
                late = place.outside.connect_tcp(number)
            except ConnectionRefusedError:
                pass
            else:
                assert late.closed, "nobody is there any more"

        rig.run(root, programs={"child": child}, place=place)


def test_stream_ports_stand_behind_the_others(rig: Rig) -> None:
    with rig.place() as place:

        async def child(boot: BootImage) -> None:
            assert boot.ports == (Slot(2), Slot(3), Slot(4))
            door, flow, far = boot.ports
            assert (await take(door)).data == b"packet"
            assert (await _bytes(flow, 5))[0] == b"bytes"
            for port in (door, flow):
                await refused(PortDial(port), Status.INVALID_ARGUMENT)
            await nothing_queued(far)

        async def root(boot: BootImage) -> None:
            far = StreamGrant("far", StreamRole.DIAL, LOOPBACK, 9)
            spawned = await start(boot, "child", grants=_grants(UNIX, far, ports=("door",)))
            assert place.outside.connect("door").send(b"packet")
            assert place.outside.connect_stream(DOOR).send(b"bytes")
            await ended_well(spawned)

        rig.run(root, programs={"child": child}, place=place)


def test_a_slow_reader_is_bounded_and_told_of_when_there_is_room(rig: Rig) -> None:
    with rig.place() as place:

        async def child(boot: BootImage) -> None:
            (port,) = boot.ports
            _, link = await _bytes(port, 1)
            sent = 0
            while sent < LINUX_QUEUES_MAX:
                try:
                    await PortSend(port, link, _pattern(sent, PIECE))
                except AbiError as error:
                    assert error.status is Status.QUEUE_FULL
                    break
                sent += PIECE
            assert STREAM_QUEUE_SIZE - PIECE <= sent < LINUX_QUEUES_MAX
            await refused(PortSend(port, link, bytes(PIECE)), Status.QUEUE_FULL)
            # Who is served meanwhile is not held up.
            assert (await _data(port)).data == b"quick"
            await nothing_queued(port)
            await tell(boot, b"%d" % sent)
            room = await take(port)
            assert (room.data, room.link) == (b"", link)
            await nothing_queued(port)
            await PortSend(port, link, b"end")
            # Waiting at the port is what passes it on.
            assert (await take(port)).data == b"all read"

        async def root(boot: BootImage) -> None:
            spawned = await start(boot, "child", grants=_grants(UNIX))
            slow = place.outside.connect_stream(DOOR)
            assert slow.send(b"?")
            quick = place.outside.connect_stream(DOOR)
            assert quick.send(b"quick")
            size = int((await take(boot.endpoint)).data)
            came = await _read(slow, size + 3)
            assert came == _pattern(0, size) + b"end"
            assert slow.send(b"all read")
            await ended_well(spawned)

        rig.run(root, programs={"child": child}, place=place)


def test_what_was_queued_is_sent_after_the_end(rig: Rig) -> None:
    with rig.place() as place:

        async def child(boot: BootImage) -> None:
            (port,) = boot.ports
            _, link = await _bytes(port, 1)
            sent = 0
            try:
                while sent < LINUX_QUEUES_MAX:
                    await PortSend(port, link, _pattern(sent, PIECE))
                    sent += PIECE
            except AbiError as error:
                assert error.status is Status.QUEUE_FULL
            await PortClose(port, link)
            for trap in (PortSend(port, link, b"x"), PortClose(port, link), PortPeer(port, link)):
                await refused(trap, Status.NO_SUCH_ENDPOINT)
            await nothing_queued(port)
            await tell(boot, b"%d" % sent)
            assert (await _data(port)).data == b"another"

        async def root(boot: BootImage) -> None:
            spawned = await start(boot, "child", grants=_grants(UNIX))
            peer = place.outside.connect_stream(DOOR)
            assert peer.send(b"?")
            size = int((await take(boot.endpoint)).data)
            assert await _read(peer, size) == _pattern(0, size)
            await _closed(peer)
            assert place.outside.connect_stream(DOOR).send(b"another")
            await ended_well(spawned)

        rig.run(root, programs={"child": child}, place=place)


def test_a_peer_that_sends_no_more_still_gets_its_answer(rig: Rig) -> None:
    with rig.place() as place:

        async def child(boot: BootImage) -> None:
            (port,) = boot.ports
            await _turn(boot)  # everything and the end is there then
            came, link = await _bytes(port, 3)
            assert came == b"ask"
            await PortSend(port, link, _pattern(0, MESSAGE_SIZE_MAX))
            assert await gone(port, None) == link
            await nothing_queued(port)
            await _turn(boot)

        async def root(boot: BootImage) -> None:
            spawned = await start(boot, "child", grants=_grants(UNIX))
            await _its_turn(boot)
            peer = place.outside.connect_stream(DOOR)
            assert peer.send(b"ask")
            peer.half_close()
            await _its_turn(boot, spawned.slot)
            assert await _read(peer, MESSAGE_SIZE_MAX) == _pattern(0, MESSAGE_SIZE_MAX)
            await _closed(peer)
            await Send(spawned.slot, b"go on")
            await ended_well(spawned)

        rig.run(root, programs={"child": child}, place=place)


def test_a_stream_port_holds_so_many_connections_and_no_more(rig: Rig) -> None:
    with rig.place() as place:

        async def child(boot: BootImage) -> None:
            (port,) = boot.ports
            came = [await take(port) for _ in range(2 * PORT_PEERS_MAX)]
            links = list(dict.fromkeys(message.link for message in came))
            assert len(links) == PORT_PEERS_MAX
            await _turn(boot)
            await nothing_queued(port)
            assert (await TaskStats()).refused_links == 1
            await PortClose(port, links[0])
            await _turn(boot)
            assert (await take(port)).link not in links

        async def root(boot: BootImage) -> None:
            spawned = await start(boot, "child", grants=_grants(UNIX))
            peers = [place.outside.connect_stream(DOOR) for _ in range(PORT_PEERS_MAX)]
            for peer in peers:
                assert peer.send(b"hello")
            await _its_turn(boot)
            late = place.outside.connect_stream(DOOR)
            await _its_turn(boot, spawned.slot)
            assert late.closed
            assert not any(peer.closed for peer in peers[1:])
            assert place.outside.connect_stream(DOOR).send(b"hello")
            await Send(spawned.slot, b"go on")
            await ended_well(spawned)

        rig.run(root, programs={"child": child}, place=place)


def test_a_dialled_connection_stands_or_is_told_gone(rig: Rig) -> None:
    with rig.place() as place:

        async def child(boot: BootImage) -> None:
            (port,) = boot.ports
            nobody = await PortDial(port)
            assert await gone(port, None) == nobody
            await refused(PortSend(port, nobody, b"x"), Status.NO_SUCH_ENDPOINT)
            await _turn(boot)
            link = await PortDial(port)
            assert link != nobody
            stands = await take(port)
            assert (stands.data, stands.link, stands.sender.service) == (b"", link, OUTSIDE)
            assert await PortPeer(port, link) == PeerIdentity(0, UID_UNKNOWN)
            await PortSend(port, link, b"ping")
            assert (await _bytes(port, 4))[0] == b"pong"
            await gone(port, link, only=True)
            early = await PortDial(port)
            await PortSend(port, early, b"early")  # before it is known to stand
            came = await take(port)
            assert (came.data, came.link) == (b"", early)
            await _turn(boot)
            await PortClose(port, early)
            await nothing_queued(port)

        async def root(boot: BootImage) -> None:
            number = place.outside.free_tcp_port()
            grants = _grants(StreamGrant("far", StreamRole.DIAL, LOOPBACK, number))
            spawned = await start(boot, "child", grants=grants)
            await _its_turn(boot)
            listener = place.outside.listen_tcp(number)
            await Send(spawned.slot, b"go on")
            peer = await _accepted(listener)
            assert await _read(peer, 4) == b"ping"
            assert peer.send(b"pong")
            peer.close()
            peer = await _accepted(listener)
            await _its_turn(boot)
            assert await _read(peer, 5) == b"early"
            await Send(spawned.slot, b"go on")
            await _closed(peer)
            listener.close()
            await ended_well(spawned)

        rig.run(root, programs={"child": child}, place=place)


def test_a_task_dials_so_often_and_no_more(rig: Rig) -> None:
    with rig.place() as place:

        async def child(boot: BootImage) -> None:
            (port,) = boot.ports
            links = [await PortDial(port) for _ in range(PORT_PEERS_MAX)]
            await refused(PortDial(port), Status.NO_SPACE)
            await PortClose(port, links.pop())
            links.append(await PortDial(port))
            for link in links:
                assert (await take(port, link=link)).data == b""
            await refused(Recv((port,), NO_WAIT), Status.QUEUE_EMPTY)

        async def root(boot: BootImage) -> None:
            number = place.outside.free_tcp_port()
            listener = place.outside.listen_tcp(number)
            grants = _grants(StreamGrant("far", StreamRole.DIAL, LOOPBACK, number))
            await ended_well(await start(boot, "child", grants=grants))
            listener.close()

        rig.run(root, programs={"child": child}, place=place)


def test_waits_for_one_stream_end_in_time_and_pass_on_what_is_queued(rig: Rig) -> None:
    with rig.place() as place:

        async def child(boot: BootImage) -> None:
            (port,) = boot.ports
            _, link = await _bytes(port, 1)
            deadline = Nanos(await Now() + 5 * MS)
            await refused(Recv((port,), deadline, link=link), Status.TIMED_OUT)
            assert await Now() >= deadline
            sent = 0
            try:
                while sent < LINUX_QUEUES_MAX:
                    await PortSend(port, link, _pattern(sent, PIECE))
                    sent += PIECE
            except AbiError as error:
                assert error.status is Status.QUEUE_FULL
            await tell(boot, b"%d" % sent)
            assert (await Recv((port,), await soon(), link=link)).data == b""
            assert (await Recv((port,), await soon(), link=link)).data == b"all read"

        async def root(boot: BootImage) -> None:
            spawned = await start(boot, "child", grants=_grants(UNIX))
            peer = place.outside.connect_stream(DOOR)
            assert peer.send(b"?")
            size = int((await take(boot.endpoint)).data)
            assert await _read(peer, size) == _pattern(0, size)
            assert peer.send(b"all read")
            await ended_well(spawned)

        rig.run(root, programs={"child": child}, place=place)


def test_a_peer_that_says_nothing_is_known_and_can_be_sent_away(rig: Rig) -> None:
    with rig.place() as place:

        async def child(boot: BootImage) -> None:
            (port,) = boot.ports
            await _turn(boot)
            silent = await take(port)
            assert silent.data == b""
            await nothing_queued(port)
            await PortClose(port, silent.link)
            await nothing_queued(port)
            await _turn(boot)

        async def root(boot: BootImage) -> None:
            spawned = await start(boot, "child", grants=_grants(UNIX))
            await _its_turn(boot)
            peer = place.outside.connect_stream(DOOR)
            await _its_turn(boot, spawned.slot)
            await _closed(peer)
            await Send(spawned.slot, b"go on")
            await ended_well(spawned)

        rig.run(root, programs={"child": child}, place=place)


def test_another_user_gets_no_stream(rig: Rig) -> None:
    with rig.place() as place:

        async def child(boot: BootImage) -> None:
            (port,) = boot.ports
            await _turn(boot)
            assert (await _data(port)).data == b"hello"
            expected = int((await take(boot.endpoint)).data)
            assert (await TaskStats()).refused_identity == expected

        async def root(boot: BootImage) -> None:
            spawned = await start(boot, "child", grants=_grants(UNIX))
            await _its_turn(boot)
            stranger = place.outside.connect_stream_as_stranger(DOOR)
            assert place.outside.connect_stream(DOOR).send(b"hello")
            await Send(spawned.slot, b"go on")
            await Send(spawned.slot, b"%d" % (stranger is not None))
            await ended_well(spawned)
            assert stranger is None or stranger.closed

        rig.run(root, programs={"child": child}, place=place)


def test_stream_grants_that_cannot_be_given_start_nothing(rig: Rig) -> None:
    tcp = StreamGrant("web", StreamRole.TCP, LOOPBACK, 8080)
    dial = StreamGrant("far", StreamRole.DIAL, "192.0.2.1", 4318)
    bad: tuple[Grants, ...] = (
        _grants(UNIX._replace(name="Bad Name")),
        _grants(UNIX, UNIX),
        _grants(UNIX, ports=(DOOR,)),
        _grants(*(StreamGrant(f"s{n}", StreamRole.UNIX) for n in range(STREAM_PORTS_MAX + 1))),
        _grants(UNIX._replace(address=LOOPBACK)),
        _grants(tcp._replace(address="0.0.0.0")),
        _grants(tcp._replace(address="localhost")),
        _grants(tcp._replace(port=0)),
        _grants(dial._replace(port=70_000)),
        _grants(dial._replace(address="")),
        _grants(dial._replace(role=7)),  # type: ignore[arg-type]
    )
    with rig.place() as place:

        async def child(boot: BootImage) -> None:
            assert len(boot.ports) == 1

        async def root(boot: BootImage) -> None:
            before = await TaskStats()
            for grants in bad:
                spec = SpawnSpec("other", "child", boot.endpoint, grants=grants)
                await refused(Spawn(spec), Status.INVALID_ARGUMENT)
                assert await SpawnLastError() is SpawnReason.INVALID_PAYLOAD, grants
            after = await TaskStats()
            assert (after.slots, after.links) == (before.slots, before.links)
            await ended_well(await start(boot, "child", grants=_grants(UNIX)))

        rig.run(root, programs={"child": child}, place=place)
