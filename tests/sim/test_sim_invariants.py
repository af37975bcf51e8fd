"""Random tasks do random things, faults or not: after every step the accounts must add up."""

import contextlib
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from nexus.abi import (
    BLOCK_SIZE,
    NO_WAIT,
    AbiError,
    BlockFlush,
    BlockRead,
    BlockWrite,
    BootImage,
    Call,
    CapClone,
    CapClose,
    CapDerive,
    CapQuery,
    ConsoleWrite,
    EndpointClose,
    EndpointCreate,
    EntropyDraw,
    Event,
    Grants,
    HardwareGrant,
    Kill,
    LinkCreate,
    LinkId,
    LinkTerms,
    Nanos,
    Now,
    Pid,
    PortClose,
    PortSend,
    Program,
    QosClass,
    Recv,
    ReplyRecv,
    Rights,
    Send,
    SetTaskQos,
    Signal,
    SleepUntil,
    Slot,
    Spawn,
    SpawnSpec,
    Status,
    TaskStats,
    Trap,
    VmoCreate,
    VmoMap,
    VmoSeal,
    VmoShare,
    VmoWatch,
    VmoWrite,
    Wait,
)
from nexus.kernel.core import SystemLimits
from nexus.kernel.sim import DEVICE_POINTS, FaultPoint, Faults, Freeze, Plan, SimKernel, SimPeer
from nexus.kernel.sim.objects import DEAD
from nexus.kernel.sim.virtio import DESCRIPTOR_WRITE
from tests.fakes.registers import DATA, DISK, RNG, Driver

MS = 1_000_000
WORKERS = 6
STEPS = 300
ALL_FAULTS = {
    FaultPoint.QUEUE_FULL: 20_000,
    FaultPoint.NO_SPACE: 20_000,
    FaultPoint.TIMED_OUT: 20_000,
    FaultPoint.KILL: 2_000,
    FaultPoint.SLOW_CPU: 20_000,
    FaultPoint.LATE_WAKE: 50_000,
    FaultPoint.LATE_TIMER: 50_000,
    FaultPoint.LATE_DELIVERY: 50_000,
    FaultPoint.LOST_SIGNAL: 50_000,
    **dict.fromkeys(DEVICE_POINTS, 50_000),
}

FREEZES = tuple(
    Freeze(task=f"worker{index}", after=Nanos(MS * (1 + index)), span=Nanos(3 * MS))
    for index in range(WORKERS)
)


BUS = (
    DISK,
    RNG,
    DISK._replace(name="image"),
    RNG._replace(name="generator"),
)
GRANTS = (
    *(Grants(ports=(f"port{index}",)) for index in range(3)),
    Grants(hardware=(HardwareGrant("disk", DISK.kind), HardwareGrant("image", DISK.kind))),
    Grants(hardware=(HardwareGrant("generator", RNG.kind), HardwareGrant("rng", RNG.kind))),
)


class Dice:
    """A seeded generator of a test's own (SplitMix64)."""

    def __init__(self, seed: int) -> None:
        self.state = seed & 0xFFFF_FFFF_FFFF_FFFF

    def roll(self, sides: int) -> int:
        self.state = (self.state + 0x9E3779B97F4A7C15) & 0xFFFF_FFFF_FFFF_FFFF
        mixed = self.state
        mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFF_FFFF_FFFF_FFFF
        mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB & 0xFFFF_FFFF_FFFF_FFFF
        return (mixed ^ mixed >> 31) % sides


def check(kernel: SimKernel) -> None:
    """Everything that must hold between any two traps."""
    used, audited = kernel.heap_audit()
    assert used == audited
    reserved = 0
    for task in kernel.tasks.values():
        if task.state == DEAD:
            assert not task.entries
            assert not task.links
            continue
        size = 0
        for link in task.links.values():
            assert link.endpoint.alive
            assert len(link.queue) <= link.depth
            assert link.queued_size == sum(len(entry[0]) for entry in link.queue) <= link.size
            assert 0 <= link.derived <= link.delegations
            live = [other for other in task.links.values() if other.parent is link]
            assert link.derived == len(live)
            assert not link.queue or link.delayed or link.listed or task.filter is link
            size += link.size
        assert size == task.share.size.used <= task.share.size.total
        assert len(task.endpoints) == task.share.endpoints.used <= task.share.endpoints.total
        assert task.table.used <= 96
        reserved += task.share.size.total
        cost = sum(32 for _ in task.entries)
        cost += sum(
            held.cost for held in {id(h.object): h.object for h in task.entries.values()}.values()
        )
        held_ids = {id(held.object) for held in task.entries.values()}
        cost += sum(vmo.cost for key, (vmo, _) in task.maps.items() if key not in held_ids)
        assert cost == task.budget.used <= task.budget.total
    assert reserved == kernel.shares.size.used <= kernel.shares.size.total
    for name, unit in kernel.bus.units.items():
        held = [device.name for device in unit.holder.devices] if unit.holder else [name]
        assert name in held
        assert unit.holder is None or unit.holder.state != DEAD
        assert unit.holder is not None or not unit.windows
    for cpu in kernel.scheduler.smp:
        for qos, queue in enumerate(cpu.queues):
            assert len(queue) <= 64
            assert bool(queue) == bool(cpu.mask >> qos & 1)
            assert all(task.qos == qos and task.cpu is cpu for task in queue)


async def act(dice: Dice, boot: BootImage, views: list[memoryview]) -> None:
    """One random trap; most of them are refused."""
    slot = Slot(dice.roll(14))
    other = Slot(dice.roll(14))
    now = await Now()
    soon = Nanos(now + dice.roll(400_000))
    deadline = (NO_WAIT, soon, Nanos(now - 5))[dice.roll(3)]
    data = bytes([dice.roll(0xF2)]) * dice.roll(600)
    device = boot.hardware[dice.roll(2)] if boot.hardware and dice.roll(4) else slot
    match dice.roll(32):
        case 0:
            await EndpointCreate()
        case 1:
            if dice.roll(3) == 0:
                await EndpointClose(slot)
        case 2 | 3:
            terms = LinkTerms(dice.roll(4), dice.roll(1500), dice.roll(3))
            await LinkCreate(slot if dice.roll(2) else boot.endpoint, terms)
        case 4 | 5 | 6:
            await Send(slot, data, deadline=deadline)
        case 7 | 8:
            await Send(slot, data, move=other, deadline=deadline)
        case 9 | 10 | 11:
            sources = (boot.endpoint, slot) if dice.roll(2) else (boot.endpoint,)
            await Recv(sources, deadline, size_max=dice.roll(700))
        case 12:
            await Recv((boot.endpoint,), deadline, link=LinkId(dice.roll(9)))
        case 13:
            await Call(slot, data, boot.endpoint, LinkId(dice.roll(9)), soon)
        case 14:
            trap = ReplyRecv((boot.endpoint,), soon)
            trap.slot, trap.data = slot, data
            await trap
        case 15:
            await CapClone(slot)
        case 16:
            await CapDerive(slot, Rights(dice.roll(16)))
        case 17:
            if slot not in (boot.endpoint, boot.control):
                await CapClose(slot)
        case 18:
            made = await VmoCreate(dice.roll(20_000))
            await VmoWrite(made, 1, b"abc")
            if dice.roll(4):
                await VmoSeal(made)
            elif dice.roll(2):
                views.append(await VmoShare(made))
        case 19:
            views.append(await (VmoMap(slot) if dice.roll(2) else VmoWatch(slot)))
            if len(views) > 2:
                views.pop(0).release()
        case 20:
            await SleepUntil(soon)
        case 21:
            await SetTaskQos(None, dice.roll(5))
        case 22 | 23:
            port = boot.ports[0] if boot.ports else slot
            await Recv((port, boot.endpoint), soon, size_max=dice.roll(9000))
        case 24:
            port = boot.ports[0] if boot.ports else slot
            link = LinkId(dice.roll(30))
            await (PortClose(port, link) if dice.roll(4) == 0 else PortSend(port, link, data))
        case 25 | 26:
            await BlockWrite(
                device, dice.roll(10), bytes(BLOCK_SIZE), soon, durable=dice.roll(2) > 0
            )
        case 27:
            await BlockRead(device, dice.roll(10), dice.roll(3), soon)
        case 28:
            await BlockFlush(device, soon)
        case 29:
            await EntropyDraw(device, dice.roll(40))
        case 30:
            await drive(device)
        case _:
            await CapQuery(slot)


async def drive(slot: Slot) -> None:
    """Bring a device up, ask it for something, and leave it alone."""
    driver = await Driver.of(slot)
    driver.begin()
    driver.chain([(DATA, 16, 0), (2 * DATA, 65, DESCRIPTOR_WRITE)])
    driver.offer(0)


def make_worker(kernel: list[SimKernel]) -> Callable[[BootImage], Coroutine[Trap[Any], Any, int]]:
    async def worker(boot: BootImage) -> int:
        dice = Dice(int.from_bytes(boot.argument, "little"))
        views: list[memoryview] = []
        for _ in range(STEPS):
            with contextlib.suppress(AbiError):
                await act(dice, boot, views)
            check(kernel[0])
        counters = await TaskStats()
        assert counters.budget_used + counters.budget_free == counters.budget_total
        return 0

    return worker


def make_root(
    kernel: list[SimKernel], seed: int
) -> Callable[[BootImage], Coroutine[Trap[Any], Any, int]]:
    async def root(boot: BootImage) -> int:
        dice = Dice(seed)
        pids: list[Pid] = []
        for index in range(WORKERS):
            spec = SpawnSpec(
                f"worker{index}",
                "worker",
                boot.endpoint,
                (seed * 64 + index).to_bytes(8, "little"),
                qos=QosClass(dice.roll(4)),
                owner_size=16 * 1024,
                endpoints=4,
                budget=100_000,
                delegations=3,
                grants=GRANTS[index] if index < len(GRANTS) else Grants(),
            )
            try:
                spawned = await Spawn(spec)
            except AbiError:
                continue
            pids.append(spawned.pid)
            # Everybody gets a way to everybody before it.
            for _ in range(2):
                try:
                    link = await LinkCreate(spawned.slot, LinkTerms(4, 2000, 1))
                    await Send(spawned.slot, b"m", move=link.slot)
                except AbiError:
                    pass
        for _ in range(120):
            try:
                now = await Now()
                match dice.roll(6):
                    case 0:
                        await Recv((boot.endpoint,), Nanos(now + 50_000))
                    case 1:
                        await Send(
                            Slot(dice.roll(12)),
                            b"x" * (1 + dice.roll(300)),
                            move=Slot(dice.roll(12)),
                        )
                    case 2:
                        await LinkCreate(Slot(dice.roll(12)), LinkTerms(2, 500, dice.roll(2)))
                    case 3:
                        await SetTaskQos(pids[dice.roll(len(pids))], dice.roll(4))
                    case 4:
                        await ConsoleWrite(f"step {dice.roll(100)}", b'{"a": 1}')
                    case _:
                        await SleepUntil(Nanos(now + 30_000))
            except AbiError:
                pass
            check(kernel[0])
        await Kill(pids[0])
        for pid in pids:
            now = await Now()
            try:
                end = await Wait(pid, Nanos(now + 10_000_000_000))
            except AbiError as refusal:
                assert refusal.status is not Status.TIMED_OUT
                raise
            assert end.code == 0
        check(kernel[0])
        return 0

    return root


def schedule_the_outside(kernel: SimKernel, dice: Dice) -> None:
    """Processes that connect to ports, send, read and leave, and signals to the root."""
    peers: list[SimPeer] = []

    def act_outside() -> None:
        match dice.roll(8):
            case 0 | 1:
                with contextlib.suppress(ConnectionRefusedError):
                    uid = (0, kernel.uid, 7)[dice.roll(3)]
                    peers.append(kernel.port(f"port{dice.roll(4)}").connect(dice.roll(9), uid))
            case 2 | 3 | 4:
                if peers:
                    peers[dice.roll(len(peers))].send(b"x" * dice.roll(9000))
            case 5:
                if peers:
                    peers[dice.roll(len(peers))].take()
            case 6:
                if peers:
                    peers[dice.roll(len(peers))].close()
            case _:
                kernel.signal(tuple(Signal)[dice.roll(3)])
        check(kernel)

    for _ in range(400):
        kernel.at(Nanos(kernel.now + dice.roll(30_000_000)), act_outside)


def play(seed: int, cpu_count: int, faults: Faults | None) -> tuple[SimKernel, list[Event]]:
    events: list[Event] = []
    kernels: list[SimKernel] = []
    programs = {"worker": Program(name="worker", main=make_worker(kernels), digest="w")}
    limits = SystemLimits(total_size=160 * 1024, root_size=64 * 1024, endpoints=120)
    kernel = SimKernel(
        programs,
        seed=seed,
        recorder=events.append,
        cpu_count=cpu_count,
        limits=limits,
        faults=faults,
        hardware=BUS,
        kernel_driven={"image", "generator"},
    )
    kernels.append(kernel)
    schedule_the_outside(kernel, Dice(seed + 1000))
    root = Program(name="root", main=make_root(kernels, seed), digest="r")
    end = kernel.run(root, b"", until=Nanos(kernel.now + 60_000_000_000))
    assert kernel.crashes == []
    assert end.code == 0
    return kernel, events


@pytest.mark.parametrize("cpu_count", [1, 2, 4])
@pytest.mark.parametrize("seed", range(6))
def test_accounts_add_up_after_every_random_step_and_all_comes_back(
    seed: int, cpu_count: int
) -> None:
    kernel, _ = play(seed, cpu_count, None)

    assert set(kernel.resources().values()) == {0}


@pytest.mark.parametrize("seed", range(100, 110))
def test_accounts_add_up_under_every_fault_and_each_fault_fires(seed: int) -> None:
    faults = Faults(Plan(chances=ALL_FAULTS, freeze=FREEZES))

    kernel, _ = play(seed, 2, faults)

    assert set(kernel.resources().values()) == {0}
    assert all(
        reached
        for point, (reached, _) in faults.counts().items()
        if point not in {"nth", "forge", *DEVICE_POINTS}  # who holds a device may die too early
    )


@pytest.mark.parametrize("seed", range(200, 203))
def test_accounts_add_up_under_every_fault_of_a_device(seed: int) -> None:
    faults = Faults(Plan(chances=dict.fromkeys(DEVICE_POINTS, 600_000)))

    kernel, _ = play(seed, 2, faults)

    assert set(kernel.resources().values()) == {0}
    assert all(faults.fired[point] for point in DEVICE_POINTS)


def test_the_same_seed_gives_the_same_log_and_another_seed_another() -> None:
    first, _ = play(7, 2, Faults(Plan(chances=ALL_FAULTS, freeze=FREEZES)))
    second, _ = play(7, 2, Faults(Plan(chances=ALL_FAULTS, freeze=FREEZES)))
    other, _ = play(8, 2, Faults(Plan(chances=ALL_FAULTS, freeze=FREEZES)))

    lines = list(first.log_lines())

    assert lines == list(second.log_lines())
    assert lines != list(other.log_lines())
