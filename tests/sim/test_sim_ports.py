"""Ports of the simulated kernel: what they cost, what faults do to them, and the host's side."""

from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from nexus.abi import (
    MESSAGE_SIZE_MAX,
    NEVER,
    AbiError,
    BootImage,
    Grants,
    Message,
    Nanos,
    Now,
    PeerGone,
    PortSend,
    Program,
    Recv,
    SleepUntil,
    Spawn,
    SpawnSpec,
    Status,
    TaskStats,
    Trap,
    Wait,
)
from nexus.kernel.sim import FaultPoint, Faults, NthFailure, Plan, SimKernel, SimPeer
from nexus.kernel.sim.heap import CONNECTION_CHARGE
from nexus.kernel.sim.ports import PORT_DEPTH, PORT_QUEUE_SIZE
from nexus.proof.campaign import unaccounted

Main = Callable[[BootImage], Coroutine[Trap[Any], Any, int | None]]
MS = 1_000_000
DOOR = Grants(ports=("door",))


def made(child: Main, **options: Any) -> tuple[SimKernel, Callable[[], None]]:
    """A kernel whose root starts one child with a port, and what runs it to its end."""

    async def main(boot: BootImage) -> None:
        spawned = await Spawn(SpawnSpec("child", "child", boot.endpoint, grants=DOOR))
        assert (await Wait(spawned.pid, NEVER)).code == 0

    program = Program(name="child", main=child, digest="c")
    kernel = SimKernel(
        {"child": program}, seed=options.pop("seed", 1), recorder=lambda _: None, **options
    )

    def run() -> None:
        root = Program(name="root", main=main, digest="r")
        end = kernel.run(root, b"", until=Nanos(kernel.now + 60_000 * MS))
        assert kernel.crashes == []
        assert end.code == 0
        assert set(kernel.resources().values()) == {0}
        assert list(unaccounted(kernel.log_lines())) == []

    return kernel, run


async def from_port(boot: BootImage) -> Message:
    return await Recv(boot.ports, Nanos(await Now() + 100 * MS))


def test_the_host_talks_to_a_port_at_virtual_times_and_the_log_says_so() -> None:
    peers: list[SimPeer] = []

    async def child(boot: BootImage) -> None:
        message = await from_port(boot)
        assert message.now == start + 5 * MS
        await PortSend(message.source, message.link, b"answer")
        with pytest.raises(PeerGone):
            await from_port(boot)

    def call() -> None:
        peers.append(kernel.port("door").connect(99, kernel.uid))
        assert peers[0].send(b"hello")

    kernel, run = made(child)
    start = kernel.now
    kernel.at(Nanos(start + 5 * MS), call)
    kernel.at(Nanos(start + 9 * MS), lambda: peers[0].close())
    run()

    assert peers[0].take() == [b"answer"]
    assert peers[0].closed
    text = "\n".join(kernel.log_lines())
    for word in (" port-open ", " port-sent link", " port-end "):
        assert text.count(word) == 1, word


def test_nobody_has_a_port_before_its_task_and_after_it() -> None:
    async def child(boot: BootImage) -> None:
        assert not kernel.port("door").connect(1, 0).closed
        with pytest.raises(ConnectionRefusedError, match="no task has the port other"):
            kernel.port("other").connect(1, 0)

    kernel, run = made(child)
    with pytest.raises(ConnectionRefusedError):
        kernel.port("door").connect(1, 0)
    run()
    with pytest.raises(ConnectionRefusedError):
        kernel.port("door").connect(1, 0)


def test_only_root_and_the_user_of_the_system_get_a_connection() -> None:
    async def child(boot: BootImage) -> None:
        door = kernel.port("door")
        assert [door.connect(1, uid).closed for uid in (0, 1234, 1235, 65534)] == [
            False, False, True, True,
        ]  # fmt: skip
        assert (await TaskStats()).refused_identity == 2

    kernel, run = made(child, uid=1234)
    run()


def test_every_connection_and_every_message_is_charged_to_the_heap_exactly() -> None:
    async def child(boot: BootImage) -> None:
        budget = (await TaskStats()).budget_used
        base = kernel.heap.account.used
        peers = [kernel.port("door").connect(n, 0) for n in range(3)]
        assert kernel.heap.account.used == base + 3 * CONNECTION_CHARGE
        peers[0].send(b"x" * 100)
        assert kernel.heap.account.used == base + 3 * CONNECTION_CHARGE + 64 + 100
        link = (await from_port(boot)).link
        await PortSend(boot.ports[0], link, b"y" * 10)
        assert kernel.heap.account.used == base + 3 * CONNECTION_CHARGE + 64 + 10
        used, audited = kernel.heap_audit()
        assert used == audited
        assert peers[0].take() == [b"y" * 10]
        await PortSend(boot.ports[0], link, b"unread")
        for peer in peers:
            peer.close()
        for _ in peers:
            with pytest.raises(PeerGone):
                await from_port(boot)
        assert kernel.heap.account.used == base
        assert peers[0].take() == [b"unread"]
        assert peers[0].take() == []
        assert (await TaskStats()).budget_used == budget

    kernel, run = made(child)
    run()


def test_a_full_heap_turns_peers_away_and_refuses_their_messages() -> None:
    async def child(boot: BootImage) -> None:
        peer = kernel.port("door").connect(1, 0)
        assert peer.send(b"hello")
        link = (await from_port(boot)).link
        account = kernel.heap.account
        spare = account.free - 10
        account.used += spare
        assert kernel.port("door").connect(2, 0).closed
        assert not peer.send(b"no room")
        with pytest.raises(AbiError) as refusal:
            await PortSend(boot.ports[0], link, b"no room")
        assert refusal.value.status is Status.QUEUE_FULL
        account.used -= spare
        assert peer.send(b"room")
        assert (await from_port(boot)).data == b"room"

    kernel, run = made(child)
    run()


def test_both_queues_of_a_connection_are_bounded_in_messages_and_in_bytes() -> None:
    large = b"x" * MESSAGE_SIZE_MAX

    async def child(boot: BootImage) -> None:
        peer = kernel.port("door").connect(1, 0)
        assert [peer.send(b"x") for _ in range(PORT_DEPTH + 1)] == [True] * PORT_DEPTH + [False]
        messages = [await from_port(boot) for _ in range(PORT_DEPTH)]
        link = messages[0].link
        fits = PORT_QUEUE_SIZE // len(large)
        assert [peer.send(large) for _ in range(fits + 1)] == [True] * fits + [False]
        for data, count in ((b"y", PORT_DEPTH), (large, fits)):
            for _ in range(count):
                await PortSend(boot.ports[0], link, data)
            with pytest.raises(AbiError) as refusal:
                await PortSend(boot.ports[0], link, data)
            assert refusal.value.status is Status.QUEUE_FULL
            assert len(peer.take()) == count

    kernel, run = made(child)
    run()


def test_a_planned_failure_of_a_port_send_sends_nothing() -> None:
    async def child(boot: BootImage) -> None:
        peer = kernel.port("door").connect(1, 0)
        peer.send(b"hello")
        link = (await from_port(boot)).link
        with pytest.raises(AbiError) as refusal:
            await PortSend(boot.ports[0], link, b"first")
        assert refusal.value.status is Status.QUEUE_FULL
        await PortSend(boot.ports[0], link, b"second")
        assert peer.take() == [b"second"]

    failure = NthFailure(trap=PortSend, nth=1, status=Status.QUEUE_FULL)
    kernel, run = made(child, faults=Faults(Plan(nth=(failure,))))
    run()


@pytest.mark.parametrize("seed", range(8))
def test_late_deliveries_and_kills_lose_nothing_and_leave_nothing(seed: int) -> None:
    got: list[bytes] = []

    async def child(boot: BootImage) -> None:
        while len(got) < 50:
            try:
                got.append((await from_port(boot)).data)
            except PeerGone:
                break

    def talk() -> None:
        peer = kernel.port("door").connect(1, 0)
        for number in range(25):
            assert peer.send(b"%d" % number)
        peer.close()

    chances = {FaultPoint.LATE_DELIVERY: 500_000, FaultPoint.LATE_WAKE: 300_000}
    kernel, run = made(child, seed=seed, faults=Faults(Plan(chances=chances)))
    kernel.at(Nanos(kernel.now + 10 * MS), talk)  # the child's first wake-up may be late
    run()

    assert got == [b"%d" % number for number in range(25)]


def test_a_connection_that_is_closed_while_its_message_is_late_stays_closed() -> None:
    async def child(boot: BootImage) -> None:
        with pytest.raises(PeerGone):
            await from_port(boot)
        peer = kernel.port("door").connect(2, 0)
        assert peer.send(b"late")
        peer.close()
        await SleepUntil(Nanos(await Now() + 20 * MS))
        assert (await from_port(boot)).data == b"late"
        with pytest.raises(PeerGone):
            await from_port(boot)
        with pytest.raises(AbiError) as refusal:
            await from_port(boot)
        assert refusal.value.status is Status.TIMED_OUT

    plan = Plan(chances={FaultPoint.LATE_DELIVERY: 1_000_000})
    kernel, run = made(child, faults=Faults(plan))
    kernel.at(Nanos(kernel.now + MS), lambda: kernel.port("door").connect(1, 0).close())
    run()
