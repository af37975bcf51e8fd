"""A service killed 200 times under load: every call has an outcome, and nothing is left behind.

Neither in init nor in the clients that outlive the service. The measure is anonymous memory:
private dirty memory also counts every page that a forked child has stopped sharing.
"""

import dataclasses
import errno
import fcntl
import mmap
import os
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import pytest

from nexus.abi import (
    AbiError,
    BootImage,
    Call,
    CapClose,
    EndpointCreate,
    EventKind,
    Kill,
    LinkCreate,
    LinkId,
    LinkTerms,
    Message,
    Nanos,
    Now,
    PeerGone,
    Recv,
    ReplyRecv,
    Send,
    SleepUntil,
    Slot,
    Spawned,
    Status,
    TaskTable,
    Wait,
)
from nexus.testing.conformance.steps import ended_well, holdings, soon, start, take
from nexus.testing.rig import Rig, children_of, linux_rigs

pytestmark = [pytest.mark.linux, pytest.mark.slow]

KILLS: Final = 200
WARM_KILLS: Final = 20  # the interpreter's caches and arenas are filled by then
CLIENTS: Final = ("one", "two")
CALL_DEADLINE: Final = 10_000_000_000  # nanoseconds; much on a busy machine: a call lost is late
WORST_MAX: Final = 1_000_000_000  # nanoseconds of one call of hundreds, beside a flood
LATE_MAX: Final = 50_000_000  # nanoseconds over a deadline, on a machine shared with other tests
LIFE_LEAST: Final = 2_000_000  # nanoseconds between a server's wiring and its death
LIFE_STEP: Final = 700_000
MEMORY_GROWTH_MAX: Final = 512 << 10  # bytes of init's anonymous memory in 180 kills; 80 K seen
CLIENT_GROWTH_MAX: Final = 256 << 10  # bytes of anonymous memory of one client in 180 kills
LEAK_KILLS: Final = 30
LEAK_SIZE: Final = 200_000  # bytes for each lost link; 9 lost links after the warm-up are 1.8 MB
CLIENT_LINKS: Final = 1  # its control link; those it had into its endpoint are gone
DELEGATIONS: Final = len(CLIENTS)
LINK: Final = LinkTerms(8, 8192, 0)


@pytest.fixture(params=linux_rigs(), ids=lambda rig: rig.name)
def linux(request: pytest.FixtureRequest) -> Rig:
    """Linux as whoever runs the tests, and as an ordinary user too if that is root."""
    rig: Rig = request.param
    # What the rig records would be taken for growth of the kernel.
    return dataclasses.replace(rig, kinds=frozenset((EventKind.CONSOLE,)))


def _anonymous(pid: int) -> int:
    """Resident anonymous memory of a task; finer figures of another are for its tracer alone."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssAnon line")


def _descriptor_count() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def _own_descriptors() -> int:
    """Open descriptors of a confined process, which cannot see /proc."""
    count = 0
    for descriptor in range(1024):
        try:
            fcntl.fcntl(descriptor, fcntl.F_GETFD)
        except OSError as error:
            assert error.errno == errno.EBADF
        else:
            count += 1
    return count


async def _server(boot: BootImage) -> None:
    """Echo: each client's first message brings the link for its answers."""
    replies: dict[LinkId, Slot] = {}
    trap = ReplyRecv((boot.endpoint,), await soon())
    while True:
        trap.deadline = await soon()
        try:
            message = await trap
        except PeerGone as error:
            trap.slot = None
            await CapClose(replies.pop(error.link))
            continue
        trap.slot = None
        if message.cap is not None:
            replies[message.link] = message.cap
        else:
            trap.slot, trap.data = replies[message.link], message.data


class _Client:
    """Calls without a pause; asks for a new link whenever the old one is dead."""

    def __init__(self, boot: BootImage) -> None:
        assert boot.control is not None
        self.boot = boot
        self.control = boot.control
        self.outcomes: Counter[str] = Counter()
        self.late = 0
        self.slot: Slot | None = None
        self.inbox: LinkId | None = None
        self.leak_size = 0
        self.leaked: list[mmap.mmap] = []

    async def from_root(self) -> Message | None:
        """The next message of root; ends of old inboxes come in between."""
        while True:
            try:
                return await Recv((self.boot.endpoint,), await soon())
            except PeerGone:
                self.outcomes["ends"] += 1

    async def rebind(self) -> bool:
        """Ask for a link to the living server; False when it is time to stop."""
        if self.slot is not None:
            await CapClose(self.slot)
            self.slot = None
            if self.leak_size:
                # Of Linux itself, and written to: malloc may have room left of the time before the
                # fork, whose pages are counted as this process's already.
                leak = mmap.mmap(-1, self.leak_size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
                _ = leak.write(b"x" * self.leak_size)
                self.leaked.append(leak)
        await Send(self.control, b"bind", deadline=await soon())
        message = await self.from_root()
        while message is not None and message.cap is None:
            if message.data == b"stop":
                return False
            message = await self.from_root()
        assert message is not None
        assert message.cap is not None
        self.slot = message.cap
        inbox = await LinkCreate(self.boot.endpoint, LINK)
        self.inbox = inbox.link
        try:
            await Send(self.slot, b"answer here", move=inbox.slot)
        except AbiError as error:
            assert error.status is Status.NO_SUCH_ENDPOINT
            await CapClose(inbox.slot)
            self.outcomes["dead at once"] += 1
            return await self.rebind()
        self.outcomes["rebinds"] += 1
        return True

    async def run(self) -> None:
        number = 0
        bound = await self.rebind()
        while bound:
            number += 1
            data = b"call %d of %s" % (number, self.boot.name.encode())
            assert self.slot is not None
            assert self.inbox is not None
            deadline = Nanos(await Now() + CALL_DEADLINE)
            call = Call(self.slot, data, self.boot.endpoint, self.inbox, deadline)
            outcome = "answered"
            try:
                answer = await call
                assert answer.data == data, f"{answer.data!r} for {data!r}"
            except PeerGone as error:
                assert error.link == self.inbox
                outcome = "cut off" if call.sent else "closed"
            except AbiError as error:
                outcome = f"{error.status.name} {'sent' if call.sent else 'unsent'}"
            self.late = max(self.late, await Now() - deadline)
            self.outcomes[outcome] += 1
            if outcome != "answered":
                bound = await self.rebind()


async def _client(boot: BootImage) -> None:
    await _reporting(_Client(boot))


async def _leaking_client(boot: BootImage) -> None:
    client = _Client(boot)
    client.leak_size = LEAK_SIZE
    await _reporting(client)


async def _reporting(client: _Client) -> None:
    boot = client.boot
    before = _own_descriptors()
    await client.run()
    await _settle(boot)
    held = await holdings()
    descriptors = _own_descriptors() - before
    outcomes = ",".join(f"{name}={count}" for name, count in client.outcomes.items())
    text = f"{descriptors};{client.late};{held.slots};{held.links};{outcomes}"
    await Send(client.control, b"report " + text.encode())
    await take(boot.endpoint)


async def _settle(boot: BootImage) -> None:
    """Take the ends of inboxes that nobody holds any more."""
    while True:
        try:
            await Recv((boot.endpoint,), Nanos(await Now() + 20_000_000))
        except PeerGone:
            continue
        except AbiError as error:
            assert error.status is Status.TIMED_OUT
            return


class _Root:
    """Starts the server, wires clients to it when they ask, kills it, and starts again."""

    def __init__(self, boot: BootImage) -> None:
        self.boot = boot
        self.server: Spawned | None = None
        self.clients: dict[int, Spawned] = {}
        self.waiting: set[int] = set()
        self.reports: dict[int, str] = {}

    async def listen(self, deadline: Nanos) -> bool:
        """One message of a client; False when none came in time."""
        try:
            message = await Recv((self.boot.endpoint,), deadline)
        except PeerGone:
            return True
        except AbiError as error:
            assert error.status is Status.TIMED_OUT
            return False
        if message.data == b"bind":
            self.waiting.add(message.sender.pid)
        else:
            self.reports[message.sender.pid] = message.data.decode().partition(" ")[2]
        return True

    async def wire(self) -> None:
        """Give each client that asked a link to the living server."""
        assert self.server is not None
        for pid in sorted(self.waiting):
            link = await LinkCreate(self.server.slot, LINK)
            await Send(self.clients[pid].slot, b"link", move=link.slot)
        self.waiting.clear()

    async def all_asked(self) -> None:
        """Until each client has asked for a link; then none does anything but wait."""
        while len(self.waiting) < len(self.clients):
            assert await self.listen(await soon()), "a client did not ask again"

    async def one_life(self, number: int) -> None:
        self.server = await start(self.boot, "server", delegations=DELEGATIONS)
        await self.all_asked()
        await self.wire()
        await SleepUntil(Nanos(await Now() + LIFE_LEAST + number % 10 * LIFE_STEP))
        await Kill(self.server.pid)
        info = await Wait(self.server.pid, await soon())
        assert info.signal == 9, "the server did not die of anything else"
        await CapClose(self.server.slot)
        # The end of its control link, and whatever clients ask meanwhile.
        while await self.listen(Nanos(await Now() + 1)):
            pass


async def _lives(boot: BootImage, kills: int, warm_kills: int) -> Mapping[str, Any]:
    """Root: that many lives of the server; what was held after the warm-up and at the end."""
    conductor = _Root(boot)
    for name in CLIENTS:
        client = await start(boot, name, program="client")
        conductor.clients[client.pid] = client
    baseline: dict[str, Any] = {}
    for number in range(kills):
        await conductor.one_life(number)
        if number == warm_kills:
            baseline = await _all_footprints(conductor)
    end = await _all_footprints(conductor)
    for client in conductor.clients.values():
        await Send(client.slot, b"stop")
    while len(conductor.reports) < len(CLIENTS):
        assert await conductor.listen(await soon())
    for client in conductor.clients.values():
        await Send(client.slot, b"end")
        await ended_well(client)
    assert [row.pid for row in await TaskTable()] == [boot.pid]
    return {"baseline": baseline, "end": end, "reports": list(conductor.reports.values())}


async def _all_footprints(conductor: _Root) -> dict[str, Any]:
    await conductor.all_asked()
    return await _footprint() | {"clients": [_anonymous(pid) for pid in sorted(conductor.clients)]}


def _grown(outcome: Mapping[str, Any]) -> list[int]:
    """By how many bytes each client has grown since the warm-up."""
    pairs = zip(outcome["baseline"]["clients"], outcome["end"]["clients"], strict=True)
    return [end - begin for begin, end in pairs]


def test_a_service_killed_200_times_under_load_leaves_nothing_behind(linux: Rig) -> None:
    async def root(boot: BootImage) -> Mapping[str, Any]:
        return await _lives(boot, KILLS, WARM_KILLS)

    begin = time.monotonic_ns()
    outcome = linux.run(root, programs={"server": _server, "client": _client})
    seconds = (time.monotonic_ns() - begin) / 1e9

    grown = _grown(outcome)
    assert len(grown) == len(CLIENTS)
    assert max(grown) <= CLIENT_GROWTH_MAX, outcome
    baseline, end = outcome["baseline"], outcome["end"]
    del baseline["clients"], end["clients"]
    memory, memory_end = baseline.pop("memory"), end.pop("memory")
    assert end == baseline
    assert memory_end - memory <= MEMORY_GROWTH_MAX, (memory, memory_end)
    for report in outcome["reports"]:
        descriptors, late, slots, links, counts = report.split(";")
        outcomes = {
            name: int(count) for name, _, count in (c.partition("=") for c in counts.split(","))
        }
        assert int(descriptors) <= 0, report
        assert int(late) <= LATE_MAX, report
        assert int(slots) <= 3, report
        assert int(links) == CLIENT_LINKS, report
        assert outcomes["answered"] > KILLS, report
        defined = {"answered", "cut off", "closed", "NO_SUCH_ENDPOINT unsent"}
        marks = {"rebinds", "ends", "dead at once"}
        assert set(outcomes) <= defined | marks, report
        assert outcomes["rebinds"] + outcomes.get("dead at once", 0) >= KILLS, report
        assert outcomes.get("cut off", 0) > 0, "a call was cut off, so the load was real"
    assert seconds < 60


def test_a_client_that_leaks_for_each_lost_link_is_caught(linux: Rig) -> None:
    async def root(boot: BootImage) -> Mapping[str, Any]:
        return await _lives(boot, LEAK_KILLS, WARM_KILLS)

    outcome = linux.run(root, programs={"server": _server, "client": _leaking_client})

    assert min(_grown(outcome)) > CLIENT_GROWTH_MAX, outcome


async def _footprint() -> dict[str, Any]:
    held = await holdings()
    return {
        "descriptors": _descriptor_count(),
        "children": len(children_of(os.getpid())),
        "tasks": len(await TaskTable()),
        "held": tuple(held),
        "memory": _anonymous(os.getpid()),
    }


def test_one_flooding_client_does_not_delay_another_nor_grow_memory(linux: Rig) -> None:
    """A flooder that keeps to the ABI: QueueFull stops it, and turns are taken by link."""

    async def flooder(boot: BootImage) -> None:
        given = await take(boot.endpoint)
        assert given.cap is not None
        assert boot.control is not None
        sent = refusals = 0
        end = await Now() + 1_500_000_000
        while await Now() < end:
            try:
                await Send(given.cap, bytes(200))
                sent += 1
            except AbiError as error:
                assert error.status is Status.QUEUE_FULL
                refusals += 1
        await Send(boot.control, b"%d %d" % (sent, refusals))
        await take(boot.endpoint)

    async def client(boot: BootImage) -> None:
        given = await take(boot.endpoint)
        assert given.cap is not None
        assert boot.control is not None
        inbox = await LinkCreate(boot.endpoint, LINK)
        assert inbox.link is not None
        await Send(given.cap, b"answer here", move=inbox.slot)
        worst = count = 0
        end = await Now() + 1_500_000_000
        while (begin := await Now()) < end:
            deadline = Nanos(begin + CALL_DEADLINE)
            await Call(given.cap, b"call", boot.endpoint, inbox.link, deadline)
            worst = max(worst, await Now() - begin)
            count += 1
        await Send(boot.control, b"%d %d" % (count, worst))
        await take(boot.endpoint)

    async def root(boot: BootImage) -> Mapping[str, Any]:
        target = await EndpointCreate()
        tasks = {name: await start(boot, name) for name in ("flooder", "client")}
        for spawned in tasks.values():
            link = await LinkCreate(target, LINK)
            await Send(spawned.slot, b"go", move=link.slot)
        told: dict[int, list[int]] = {}
        reply: Slot | None = None
        received = 0
        before: dict[str, Any] = {}
        while len(told) < len(tasks):
            message = await Recv((target, boot.endpoint), await soon())
            if message.source == boot.endpoint:
                told[message.sender.pid] = [int(word) for word in message.data.split()]
            elif message.cap is not None:
                reply = message.cap
            elif message.sender.pid == tasks["client"].pid:
                assert reply is not None
                await Send(reply, message.data)
            else:
                received += 1
                if received >= 1000 and reply is not None and not before:
                    before = await _footprint()  # the client's way back is there by now
        after = await _footprint()
        for spawned in tasks.values():
            await Send(spawned.slot, b"end")
            await ended_well(spawned)
        flood, calls = told[tasks["flooder"].pid], told[tasks["client"].pid]
        return {"before": before, "after": after, "flood": flood, "calls": calls}

    outcome = linux.run(root, programs={"flooder": flooder, "client": client})

    sent, refusals = outcome["flood"]
    count, worst = outcome["calls"]
    assert sent > 1000, "it did flood"
    assert refusals > 0, "its queue did fill"
    assert count > 100
    assert worst < WORST_MAX
    growth = outcome["after"]["memory"] - outcome["before"]["memory"]
    assert growth <= MEMORY_GROWTH_MAX, outcome
    assert outcome["after"]["descriptors"] == outcome["before"]["descriptors"]
