"""The devices of the bus map: who holds which, and the traps of their holders.

A device has one holder at a time, from its spawn to its end. When the holder dies its mappings
end, the device is reset, and only then are the pages it could write zeroed and given away.
Those pages are the bus's own, set aside with the device and charged to nobody.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from operator import index
from typing import Final

from nexus.abi import (
    BLOCK_SIZE,
    BLOCK_TRANSFER_MAX,
    DMA_PAGES,
    ENTROPY_SIZE_MAX,
    PAGE_SIZE,
    AbiError,
    BlockFlush,
    BlockRead,
    BlockWrite,
    BusEntry,
    CapKind,
    DeviceInfo,
    DmaArea,
    Grants,
    HardwareKind,
    Rights,
    Slot,
    Status,
)
from nexus.kernel.core import (
    VIRTIO_MAGIC,
    WINDOW_SIZE,
    Hardware,
    check_bus,
    find_hardware,
)
from nexus.kernel.sim.chance import Chance
from nexus.kernel.sim.clock import Clock
from nexus.kernel.sim.disk import Disk
from nexus.kernel.sim.faults import FaultPoint, Faults
from nexus.kernel.sim.heap import Heap
from nexus.kernel.sim.machines import Drive, Source
from nexus.kernel.sim.objects import BLOCKED, WAIT_TIME, Blocked, Device, Task
from nexus.kernel.sim.power import Power
from nexus.kernel.sim.sched import Scheduler
from nexus.kernel.sim.virtio import Memory, Transport, Window

BUS_BASE: Final = 0x0A00_0000  # where QEMU's aarch64 machine has its transports; each in a page
DMA_BASE: Final = 0x1_8000_0000  # above 4 GiB, so that a driver writes both halves of an address
DMA_SPREAD: Final = 4_096  # pages of the bus that a device's own are spread over

MMIO: Final = "virtio-mmio"
BACKINGS: Final[Mapping[HardwareKind, str]] = {
    HardwareKind.BLOCK: "file",
    HardwareKind.ENTROPY: "getrandom",
}
"""What is behind a device that the kernel drives."""

Record = Callable[[Task | None, dict[str, object]], None]
"""Records an event of kind DEVICE, about the task that holds the device."""
OnFault = Callable[[Task | None, str, FaultPoint], None]


class Unit:
    """One device of the bus map: its registers, or how the kernel drives it, and its holder."""

    __slots__ = (
        "backing",
        "base",
        "drive",
        "hardware",
        "holder",
        "memory",
        "source",
        "transport",
        "windows",
    )

    def __init__(self, hardware: Hardware, base: int) -> None:
        self.hardware = hardware
        self.base = base
        self.backing = MMIO
        self.holder: Task | None = None
        self.drive: Drive | None = None
        self.source: Source | None = None
        self.transport: Transport | None = None  # None: the kernel drives it
        self.memory: Memory | None = None  # None without a transport
        self.windows: list[Window] = []  # onto its registers

    @property
    def kind(self) -> CapKind:
        """The kind of the capability that its holder gets."""
        if self.transport is not None:
            return CapKind.DEVICE
        return CapKind.BLOCK if self.drive is not None else CapKind.ENTROPY

    def take_back(self) -> None:
        """Part it from its holder, stop it, and let nothing be seen of what it was used for."""
        for window in self.windows:
            window.end()
        self.windows.clear()
        for machine in (self.drive, self.source, self.transport):
            if machine is not None:
                machine.reset()
        if self.memory is not None:
            self.memory.replace()


class Bus:
    """The devices of a system."""

    def __init__(
        self,
        bus: Sequence[Hardware],
        disks: Mapping[str, Disk],
        kernel_driven: Collection[str],
        *,
        chance: Chance,
        clock: Clock,
        heap: Heap,
        scheduler: Scheduler,
        power: Power,
        faults: Faults | None,
        record: Record,
        on_fault: OnFault,
    ) -> None:
        check_bus(bus)
        names = {each.name for each in bus}
        assert set(kernel_driven) <= names, "the kernel drives what is on the bus"
        assert set(disks) <= names, "a disk is in a device"
        self._clock = clock
        self._heap = heap
        self._scheduler = scheduler
        self._record = record
        self._on_fault = on_fault
        self.map = tuple(bus)
        self.units: dict[str, Unit] = {}
        self.disks: dict[str, Disk] = {}
        for number, each in enumerate(bus):
            unit = self.units[each.name] = Unit(each, BUS_BASE + number * WINDOW_SIZE)
            self._make(unit, disks.get(each.name), chance, power, faults)
            if each.name in kernel_driven:
                assert each.kind is not HardwareKind.EMPTY, "there is nothing to drive"
                unit.backing, unit.base = BACKINGS[each.kind], 0
            else:
                self._expose(unit, chance)

    def _make(
        self, unit: Unit, disk: Disk | None, chance: Chance, power: Power, faults: Faults | None
    ) -> None:
        name, kind = unit.hardware.name, unit.hardware.kind

        def tell(what: str, fields: dict[str, object]) -> None:
            self._record(unit.holder, {"name": name, "what": what, **fields})

        def on_fault(point: FaultPoint) -> None:
            self._on_fault(unit.holder, name, point)

        if kind is HardwareKind.BLOCK:
            count = unit.hardware.size // BLOCK_SIZE
            if disk is None:
                disk = Disk(count)
            assert disk.block_count == count, f"{name}: the disk has another size than the map says"
            self.disks[name] = disk
            unit.drive = Drive(
                name,
                disk,
                power,
                self._clock,
                faults,
                writable=not unit.hardware.read_only,
                tell=tell,
                on_fault=on_fault,
            )
        elif kind is HardwareKind.ENTROPY:
            stream = chance.of_device(name)
            unit.source = Source(name, stream, self._clock, faults, tell=tell, on_fault=on_fault)

    def _expose(self, unit: Unit, chance: Chance) -> None:
        """Put registers in front of a device, and give it memory at odd places of the bus."""
        pages = chance.of_device(f"{unit.hardware.name}.pages").sample(range(DMA_SPREAD), DMA_PAGES)
        unit.memory = Memory(tuple(DMA_BASE + page * PAGE_SIZE for page in pages))

        def tell(what: str, fields: dict[str, object]) -> None:
            self._record(unit.holder, {"name": unit.hardware.name, "what": what, **fields})

        unit.transport = Transport(
            unit.drive or unit.source,
            unit.memory,
            self._clock,
            tell,
            legacy=unit.hardware.legacy,
        )

    # ---- who holds what

    @property
    def held(self) -> int:
        """How many devices have a holder."""
        return sum(unit.holder is not None for unit in self.units.values())

    def find(self, grants: Grants) -> tuple[Hardware, ...]:
        """The devices to grant. Refuses: SpawnRefused."""
        live = {name for name, unit in self.units.items() if unit.holder is not None}
        return find_hardware(grants, self.map, live)

    def grant(self, task: Task, hardware: Hardware) -> Slot:
        """Place a device into the task's lowest free slot. Refuses: NoSpace."""
        unit = self.units[hardware.name]
        assert unit.holder is None, "looked at before the spawn"
        device = Device(hardware.name, unit.kind, WINDOW_SIZE if unit.transport else 0)
        self._heap.charge(task, device.cost)
        try:
            slot = self._heap.hold(task, device, Rights.MAP)
        except AbiError:
            self._heap.refund(device.cost)
            raise
        unit.holder = task
        task.devices.append(device)
        return slot

    def release(self, task: Task) -> None:
        """Take back what a task that has ended holds. Its slots are emptied by others."""
        for device in task.devices:
            unit = self.units[device.name]
            unit.take_back()
            self._record(task, {"name": device.name, "what": "released"})
            unit.holder = None
            self._heap.refund(device.cost)
        task.devices.clear()

    # ---- what the traps do

    def scan(self) -> tuple[BusEntry, ...]:
        """The bus map as it is found, without a change to any device."""
        return tuple(self._entry(unit) for _, unit in sorted(self.units.items()))

    def _entry(self, unit: Unit) -> BusEntry:
        found = unit.transport
        return BusEntry(
            name=unit.hardware.name,
            kind=unit.hardware.kind,
            backing=unit.backing,
            base=unit.base,
            length=WINDOW_SIZE if found else 0,
            magic=VIRTIO_MAGIC if found else 0,
            version=found.version if found else 0,
            device_id=found.device_id if found else 0,
        )

    def query(self, task: Task, slot: Slot) -> DeviceInfo:
        """What a granted device is. Refuses as DeviceQuery."""
        object_ = task.table.get(slot).object
        if not isinstance(object_, Device):
            raise AbiError(Status.INVALID_ARGUMENT, f"slot {slot} is no device")
        _ = task.table.require(slot, Rights.MAP)
        unit = self.units[object_.name]
        if unit.transport is not None:
            return DeviceInfo(object_.name, unit.backing, 0, writable=True)
        if unit.drive is None:
            return DeviceInfo(object_.name, unit.backing, 0, writable=False)
        disk = unit.drive.disk
        return DeviceInfo(object_.name, unit.backing, disk.block_count, unit.drive.writable)

    def map_window(self, task: Task, slot: Slot, offset: int, *, execute: bool) -> Window:
        """The registers of a device. Refuses as DeviceMap."""
        unit = self._unit(task, slot, CapKind.DEVICE)
        if execute:
            raise AbiError(Status.PERMISSION_DENIED, "registers are never executable")
        if index(offset) % PAGE_SIZE:
            raise AbiError(Status.INVALID_ARGUMENT, f"offset {offset} is not aligned")
        if not 0 <= offset < WINDOW_SIZE:
            raise AbiError(Status.PERMISSION_DENIED, f"offset {offset} of {WINDOW_SIZE}")
        assert unit.transport is not None, "a window has registers"
        window = Window(unit.transport, offset)
        unit.windows.append(window)
        return window

    def dma(self, task: Task, slot: Slot) -> DmaArea:
        """The memory of a device. Refuses as DeviceDma."""
        memory = self._unit(task, slot, CapKind.DEVICE).memory
        assert memory is not None, "a device with registers has memory"
        return DmaArea(memoryview(memory.data), memory.addresses)

    def entropy(self, task: Task, slot: Slot, size: int) -> bytes:
        """Bytes of a source that the kernel drives. Refuses as EntropyDraw."""
        source = self._unit(task, slot, CapKind.ENTROPY).source
        if not 1 <= size <= ENTROPY_SIZE_MAX:
            raise AbiError(Status.INVALID_ARGUMENT, f"{size} bytes of entropy")
        assert source is not None, "looked at when it was granted"
        return source.draw(size)

    def block(self, task: Task, trap: BlockRead | BlockWrite | BlockFlush) -> Blocked:
        """An operation of a disk that the kernel drives. Refuses as the trap."""
        unit = self._unit(task, trap.slot, CapKind.BLOCK)
        drive = unit.drive
        assert drive is not None, "looked at when it was granted"
        waiting = Waiting(task, self._scheduler)
        start = _checked(drive, trap, waiting)
        if index(trap.deadline) <= self._clock.now:
            task.timeouts += 1
            raise AbiError(Status.TIMED_OUT, "the deadline had passed")
        start()
        task.deadline = trap.deadline
        task.state = WAIT_TIME
        task.resume = waiting.resume
        self._clock.arm(task)
        return BLOCKED

    def _unit(self, task: Task, slot: Slot, kind: CapKind) -> Unit:
        held = task.table.get(slot)
        if not isinstance(held.object, Device) or held.object.kind is not kind:
            raise AbiError(Status.PERMISSION_DENIED, f"slot {slot} holds no {kind.name.lower()}")
        _ = task.table.require(slot, Rights.MAP)
        return self.units[held.object.name]


class Waiting:
    """A disk operation that a task waits for."""

    __slots__ = ("_answer", "_scheduler", "_task", "_waits")

    def __init__(self, task: Task, scheduler: Scheduler) -> None:
        self._task = task
        self._scheduler = scheduler
        self._answer: bytes | Status | None = None
        self._waits = True

    def answer(self, ended: bytes | Status) -> None:
        """The device is done. Nobody may wait any more: the deadline was earlier."""
        self._answer = ended
        if self._waits and self._task.state == WAIT_TIME:
            self._scheduler.ready(self._task)

    def resume(self, task: Task) -> bytes | None:
        """What the trap gives. Refuses: TimedOut, and what the device said."""
        self._waits = False
        ended = self._answer
        if ended is None:
            task.timeouts += 1
            raise AbiError(Status.TIMED_OUT, "the device has not answered")
        if isinstance(ended, Status):
            raise AbiError(ended, "the device reports an error")
        return ended if isinstance(task.trap, BlockRead) else None


def _checked(
    drive: Drive, trap: BlockRead | BlockWrite | BlockFlush, waiting: Waiting
) -> Callable[[], None]:
    """What starts the operation of a trap. Refuses: InvalidArgument, PermissionDenied."""
    if isinstance(trap, BlockFlush):
        return lambda: drive.flush(waiting.answer)
    block = index(trap.block)
    if isinstance(trap, BlockRead):
        count = index(trap.count)
        _check_range(drive, block, count * BLOCK_SIZE)
        return lambda: drive.read(block, count, waiting.answer)
    data = bytes(memoryview(trap.data))  # the kernel's own copy; a number is no data
    _check_range(drive, block, len(data))
    if not drive.writable:
        raise AbiError(Status.PERMISSION_DENIED, "the device is read only")
    durable = bool(trap.durable)
    return lambda: drive.write(block, lambda: data, waiting.answer, durable=durable)


def _check_range(drive: Drive, block: int, size: int) -> None:
    if not 1 <= size <= BLOCK_TRANSFER_MAX or size % BLOCK_SIZE:
        raise AbiError(Status.INVALID_ARGUMENT, f"{size} bytes are no transfer")
    count = size // BLOCK_SIZE
    if block < 0 or block + count > drive.disk.block_count:
        raise AbiError(
            Status.INVALID_ARGUMENT,
            f"{count} blocks from {block} on, of {drive.disk.block_count}",
        )
