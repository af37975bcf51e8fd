"""Stream ports, attacked: who has no grant gets no connection, and who has one gets no other."""

import errno
import socket
import struct
from typing import Any, Final

import pytest

from nexus.abi import (
    BootImage,
    Grants,
    LinkId,
    Nanos,
    Now,
    PortDial,
    Send,
    SleepUntil,
    StreamGrant,
    StreamRole,
)
from nexus.kernel.linux import channel as wire
from nexus.testing.conformance.steps import MS, ended_well, start, take, tell
from nexus.testing.outside import LOOPBACK, Listener
from nexus.testing.rig import Rig
from tests.attack.hostile import call, driver

pytestmark = pytest.mark.linux

NANOSLEEP: Final = 35  # x86_64
SOCKET: Final = 41
CONNECT: Final = 42
SENDTO: Final = 44
SENDMSG: Final = 46
BIND: Final = 49
LISTEN: Final = 50
ASKED: Final = 200  # times, without reading an answer; Linux's queue to init holds some more
UNREAD_MOST: Final = 32  # sockets that init hands to who reads none


def grants(port: int) -> Grants:
    return Grants(stream_ports=(StreamGrant("far", StreamRole.DIAL, LOOPBACK, port),))


def channel() -> socket.socket:
    """The kernel channel, behind the driver's back."""
    found: socket.socket = driver()._port._sock
    return found


def address(port: int) -> bytes:
    """struct sockaddr_in."""
    return struct.pack("=H", socket.AF_INET) + struct.pack(">H4s8x", port, bytes((127, 0, 0, 1)))


async def pause() -> None:
    _ = await SleepUntil(Nanos(await Now() + 50 * MS))


def accepted(listener: Listener) -> int:
    count = 0
    while listener.accept() is not None:
        count += 1
    return count


def raw_attempts(descriptor: int, port: int) -> dict[str, int]:
    """Every way to another address that Linux has for a socket at hand: their errors."""
    to = address(port)
    fast = int(socket.MSG_FASTOPEN)
    return {
        "socket": call(SOCKET, socket.AF_INET, socket.SOCK_STREAM, 0),
        "connect": call(CONNECT, descriptor, to, len(to)),
        "fast open": call(SENDTO, descriptor, b"x", 1, fast, to, len(to)),
        "fast open by sendmsg": call(SENDMSG, descriptor, bytes(56), fast),
        "bind": call(BIND, descriptor, to, len(to)),
        "listen": call(LISTEN, descriptor, 1),
    }


def test_who_dials_reaches_the_declared_address_and_no_other(linux: Rig) -> None:
    with linux.place() as place:

        async def hostile(boot: BootImage) -> None:
            (port,) = boot.ports
            link: LinkId = await PortDial(port)
            assert (await take(port)).data == b""
            descriptor = driver().links[link].fileno
            elsewhere = int((await take(boot.endpoint)).data)
            found = raw_attempts(descriptor, elsewhere)
            await tell(boot, b"ready")
            assert (await take(boot.endpoint)).data == b"it has ended"
            ended = raw_attempts(descriptor, elsewhere)  # a socket that may connect again
            for name in ("other", f"{LOOPBACK} {elsewhere}", "", "far\0"):
                _ = channel().send(bytes((wire.DIAL,)) + name.encode())
            await pause()
            assert set(found.values()) == set(ended.values()) == {errno.EPERM}, (found, ended)

        async def root(boot: BootImage) -> Any:
            declared, elsewhere = (place.outside.free_tcp_port() for _ in range(2))
            near, far = (place.outside.listen_tcp(number) for number in (declared, elsewhere))
            spawned = await start(boot, "hostile", grants=grants(declared))
            await Send(spawned.slot, b"%d" % elsewhere)
            assert (await take(boot.endpoint)).data == b"ready"
            peer = near.accept()
            assert peer is not None
            peer.close()
            await Send(spawned.slot, b"it has ended")
            await ended_well(spawned)
            assert accepted(near) == 0
            assert accepted(far) == 0
            near.close()
            far.close()

        linux.run(root, programs={"hostile": hostile}, place=place)


def test_without_the_grant_init_dials_for_nobody(linux: Rig) -> None:
    with linux.place() as place:

        async def hostile(boot: BootImage) -> None:
            for name in ("far", "", "x" * 4000):
                _ = channel().send(bytes((wire.DIAL,)) + name.encode())
            await pause()
            answers = driver()._port._dialled
            assert answers == [], answers

        async def honest(boot: BootImage) -> None:
            (port,) = boot.ports
            _ = await PortDial(port)
            assert (await take(port)).data == b""

        async def root(boot: BootImage) -> None:
            number = place.outside.free_tcp_port()
            listener = place.outside.listen_tcp(number)
            await ended_well(await start(boot, "hostile"))
            assert accepted(listener) == 0
            await ended_well(await start(boot, "honest", grants=grants(number)))
            assert accepted(listener) == 1
            listener.close()

        linux.run(root, programs={"hostile": hostile, "honest": honest}, place=place)


def test_who_asks_and_reads_no_answer_takes_few_sockets(linux: Rig) -> None:
    with linux.place() as place:

        async def hostile(boot: BootImage) -> None:
            assert len(boot.ports) == 1
            for _ in range(ASKED):
                _ = channel().send(bytes((wire.DIAL,)) + b"far")
            await tell(boot, b"asked")
            # Past the driver, which would read the answers while it waits.
            assert call(NANOSLEEP, struct.pack("=qq", 0, 500 * MS), None) == 0

        async def honest(boot: BootImage) -> None:
            (port,) = boot.ports
            _ = await PortDial(port)
            assert (await take(port)).data == b""

        async def root(boot: BootImage) -> None:
            number, other = (place.outside.free_tcp_port() for _ in range(2))
            greedy, modest = (place.outside.listen_tcp(each) for each in (number, other))
            spawned = await start(boot, "hostile", grants=grants(number))
            assert (await take(boot.endpoint)).data == b"asked"
            await pause()
            await pause()
            assert 0 < accepted(greedy) <= UNREAD_MOST
            await ended_well(await start(boot, "honest", grants=grants(other)))
            assert accepted(modest) == 1
            await ended_well(spawned)
            greedy.close()
            modest.close()

        linux.run(root, programs={"hostile": hostile, "honest": honest}, place=place)


def test_a_listening_port_alone_lets_nobody_out(linux: Rig) -> None:
    with linux.place() as place:

        async def hostile(boot: BootImage) -> None:
            (port,) = boot.ports
            link = (await take(port)).link
            elsewhere = int((await take(boot.endpoint)).data)
            found = raw_attempts(driver().links[link].fileno, elsewhere)
            assert set(found.values()) == {errno.EPERM}, found

        async def root(boot: BootImage) -> None:
            number, elsewhere = (place.outside.free_tcp_port() for _ in range(2))
            far = place.outside.listen_tcp(elsewhere)
            listening = StreamGrant("web", StreamRole.TCP, LOOPBACK, number)
            spawned = await start(boot, "hostile", grants=Grants(stream_ports=(listening,)))
            peer = place.outside.connect_tcp(number)
            await Send(spawned.slot, b"%d" % elsewhere)
            await ended_well(spawned)
            assert accepted(far) == 0
            peer.close()
            far.close()

        linux.run(root, programs={"hostile": hostile}, place=place)
