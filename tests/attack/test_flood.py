"""A client that sends past its account: the wall of its own link stops it, and nobody else."""

import errno
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import pytest

from nexus.abi import (
    NO_WAIT,
    AbiError,
    BootImage,
    Call,
    EndpointCreate,
    LinkCreate,
    LinkTerms,
    Nanos,
    Now,
    Recv,
    Send,
    Status,
    TaskStats,
)
from nexus.kernel.linux.frames import TRAILER_SIZE
from nexus.kernel.linux.truesize import TRUESIZE_SLACK
from nexus.testing.conformance.steps import ended_well, start, take
from nexus.testing.rig import Rig
from tests.attack.hostile import errno_of, socket_of

pytestmark = pytest.mark.linux

SKB_LEAST: Final = 768  # bytes Linux charges for a smallest message (linux.md section 4)
FLOOD_TIME: Final = 1_000_000_000  # nanoseconds
CALL_DEADLINE: Final = 10_000_000_000  # nanoseconds; much on a busy machine
CALL_MAX: Final = 250_000_000  # nanoseconds of nine calls of ten; 20 times a slow round trip
MEMORY_GROWTH_MAX: Final = 1 << 20  # bytes; the interpreter's own arenas come in 256 KiB and 1 MiB


def _flood(sock: socket.socket, size: int) -> tuple[int, int]:
    """Send until Linux refuses: how many went, and the errno."""
    count = 0
    while True:
        error = errno_of(lambda: sock.send(bytes(size), socket.MSG_DONTWAIT))
        if error:
            return count, error
        count += 1


@pytest.mark.parametrize("size", [1, 100, 1000, 4000])
def test_the_wall_stops_a_raw_flood(linux: Rig, size: int) -> None:
    terms = LinkTerms(8, 4096, 0)

    async def hostile(boot: BootImage) -> None:
        given = await take(boot.endpoint)
        assert given.cap is not None
        assert boot.control is not None
        sock = socket_of(given.cap)
        count, error = _flood(sock, size)
        again = errno_of(lambda: sock.send(b"x" * size, socket.MSG_DONTWAIT))
        await Send(boot.control, b"%d %d %d" % (count, error, again))
        await take(boot.endpoint)

    async def root(boot: BootImage) -> Any:
        target = await EndpointCreate()
        spawned = await start(boot, "hostile")
        link = await LinkCreate(target, terms)
        other = await LinkCreate(target, terms)
        await Send(spawned.slot, b"flood", move=link.slot)
        told = (await take(boot.endpoint)).data.split()
        for _ in range(8):
            await Send(other.slot, b"others have their own queue")
        received = 0
        try:
            while True:
                message = await Recv((target,), NO_WAIT)
                received += message.link == link.link
        except AbiError as error:
            assert error.status is Status.QUEUE_EMPTY
        await Send(spawned.slot, b"end")
        await ended_well(spawned)
        return [int(word) for word in told], received

    (count, error, again), received = linux.run(root, programs={"hostile": hostile})

    assert error == again == errno.EAGAIN
    assert received == count
    charge = 2 * terms.size + 2 * TRAILER_SIZE * terms.depth + TRUESIZE_SLACK * (terms.depth + 1)
    # A message is admitted while less than the wall is used, so one goes beyond it.
    assert count <= charge // max(SKB_LEAST, size) + 2, (count, charge)


def test_a_link_that_a_service_made_has_linux_own_wall(linux: Rig) -> None:
    """Only init may set SO_SNDBUF, so a link made by a service has the system's default: wider
    than its terms, but a bound, and the maker's own."""

    async def server(boot: BootImage) -> None:
        from_root = (await take(boot.endpoint)).link
        inbox = await LinkCreate(boot.endpoint, LinkTerms(8, 4096, 0))
        assert boot.control is not None
        await Send(boot.control, b"my inbox", move=inbox.slot)
        # What the flood brings stays queued.
        await take(boot.endpoint, link=from_root)

    async def hostile(boot: BootImage) -> None:
        given = await take(boot.endpoint)
        assert given.cap is not None
        assert boot.control is not None
        sock = socket_of(given.cap)
        wall = sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
        count, error = _flood(sock, 1)
        await Send(boot.control, b"%d %d %d" % (wall, count, error))

    async def root(boot: BootImage) -> Any:
        serving = await start(boot, "server")
        await Send(serving.slot, b"make one")
        inbox = await take(boot.endpoint, link=serving.link)
        assert inbox.cap is not None
        spawned = await start(boot, "hostile")
        await Send(spawned.slot, b"flood", move=inbox.cap)
        told = await take(boot.endpoint, link=spawned.link)
        await ended_well(spawned)
        await Send(serving.slot, b"end")
        await ended_well(serving)
        return [int(word) for word in told.data.split()]

    wall, count, error = linux.run(root, programs={"server": server, "hostile": hostile})

    assert error == errno.EAGAIN
    assert wall == int(Path("/proc/sys/net/core/wmem_default").read_text())
    assert count <= wall // SKB_LEAST + 1


def _client_calls(calls: int) -> Any:
    async def client(boot: BootImage) -> None:
        given = await take(boot.endpoint)
        assert given.cap is not None
        assert boot.control is not None
        inbox = await LinkCreate(boot.endpoint)
        assert inbox.link is not None
        await Send(given.cap, b"inbox", move=inbox.slot)
        took = []
        for _ in range(calls):
            begin = await Now()
            deadline = Nanos(begin + CALL_DEADLINE)
            await Call(given.cap, b"call", boot.endpoint, inbox.link, deadline)
            took.append(await Now() - begin)
        await Send(boot.control, b"%d" % sorted(took)[calls * 9 // 10])
        await take(boot.endpoint)

    return client


def private_dirty() -> int:
    """Bytes of memory of this process alone that differ from what it was forked with."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Private_Dirty:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no Private_Dirty line")


def test_a_lasting_raw_flood_delays_no_other_client_and_takes_no_memory(linux: Rig) -> None:
    async def hostile(boot: BootImage) -> None:
        given = await take(boot.endpoint)
        assert given.cap is not None
        assert boot.control is not None
        sock = socket_of(given.cap)
        end = time.monotonic_ns() + FLOOD_TIME
        sent = refusals = 0
        payload = bytes(100)
        while time.monotonic_ns() < end:
            try:
                sock.send(payload, socket.MSG_DONTWAIT)
                sent += 1
            except BlockingIOError:
                refusals += 1
        await Send(boot.control, b"%d %d" % (sent, refusals))
        await take(boot.endpoint)

    outcome = linux.run(
        _server(calls=300, kinds={"flooder": "hostile"}),
        programs={"hostile": hostile, "client": _client_calls(300)},
    )

    sent, _refusals = outcome["flooder"]
    assert sent > 1000, "it did flood"
    assert outcome["served"] >= 300
    assert outcome["slow"] < CALL_MAX
    assert outcome["growth"] < MEMORY_GROWTH_MAX, outcome


def _server(*, calls: int, kinds: Mapping[str, str]) -> Any:
    """Root as a server of one client, with one flooder next to it."""

    async def root(boot: BootImage) -> Mapping[str, Any]:
        target = await EndpointCreate()
        flooder = await start(boot, "flooder", program=kinds["flooder"])
        client = await start(boot, "client")
        for spawned in (flooder, client):
            link = await LinkCreate(target, LinkTerms(8, 4096, 0))
            await Send(spawned.slot, b"go", move=link.slot)
        told: dict[int, list[int]] = {}
        reply = None
        served = flooded = 0
        memory = None
        while len(told) < 2:
            message = await Recv((target, boot.endpoint), Nanos(await Now() + CALL_DEADLINE))
            if message.source == boot.endpoint:
                told[message.sender.pid] = [int(word) for word in message.data.split()]
            elif message.cap is not None:
                reply = message.cap
            elif message.sender.service == client.service:
                assert reply is not None
                await Send(reply, b"answer")
                served += 1
            else:
                flooded += 1
                if flooded == 500:
                    memory = private_dirty()  # warm by now
        growth = private_dirty() - (memory or 0)
        stats = await TaskStats()
        for spawned in (flooder, client):
            await Send(spawned.slot, b"end")
            await ended_well(spawned)
        assert stats.refused_identity == stats.refused_oversize == 0
        return {
            "flooder": told[flooder.pid], "slow": told[client.pid][0], "served": served,
            "flooded": flooded, "growth": growth if memory else -1,
        }  # fmt: skip

    return root


def test_links_thrown_away_by_thousands_leave_nothing_behind(linux: Rig) -> None:
    """Making and dropping pairs costs their maker its own descriptors and no one else's."""

    async def hostile(boot: BootImage) -> None:
        given = await take(boot.endpoint)
        assert given.cap is not None
        assert boot.control is not None
        kept: list[tuple[socket.socket, socket.socket]] = []
        error = 0
        while not error and len(kept) < 10_000:
            try:
                kept.append(socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            except OSError as refusal:
                error = refusal.errno or -1
        await Send(boot.control, b"%d %d" % (len(kept), error))
        await take(boot.endpoint)

    async def root(boot: BootImage) -> Any:
        spawned = await start(boot, "hostile")
        link = await LinkCreate(boot.endpoint)
        await Send(spawned.slot, b"go", move=link.slot)
        count, error = (int(word) for word in (await take(boot.endpoint)).data.split())
        await Send(spawned.slot, b"end")
        await ended_well(spawned)
        return count, error

    count, error = linux.run(root, programs={"hostile": hostile})

    assert error == errno.EMFILE
    assert count < 1024
