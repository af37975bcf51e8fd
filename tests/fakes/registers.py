"""A driver in the hands of a test: single registers, raw descriptors, no care taken."""

import struct
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Final

from nexus.abi import (
    BLOCK_SIZE,
    PAGE_SIZE,
    BootImage,
    DeviceDma,
    DeviceMap,
    DmaArea,
    Event,
    EventKind,
    Grants,
    HardwareGrant,
    HardwareKind,
    Kill,
    Nanos,
    Now,
    Program,
    RegisterWindow,
    SleepUntil,
    Slot,
    Spawn,
    Spawned,
    SpawnSpec,
    Trap,
    Wait,
)
from nexus.kernel.core import Hardware
from nexus.kernel.sim import SimKernel
from nexus.kernel.sim.virtio import (
    DESCRIPTOR,
    DESCRIPTOR_NEXT,
    DESCRIPTOR_WRITE,
    DeviceStatus,
    Register,
)

BLOCKS: Final = 256
DISK: Final = Hardware("disk", HardwareKind.BLOCK, size=BLOCKS * BLOCK_SIZE)
RNG: Final = Hardware("rng", HardwareKind.ENTROPY)
EMPTY: Final = Hardware("empty", HardwareKind.EMPTY)
OLD: Final = Hardware("old", HardwareKind.ENTROPY, legacy=True)
BUS: Final = (DISK, RNG, EMPTY, OLD)

VERSION_1: Final = 1 << 32
FLUSH: Final = 1 << 9
AGREED: Final = DeviceStatus.ACKNOWLEDGE | DeviceStatus.DRIVER | DeviceStatus.FEATURES_OK
LIVE: Final = AGREED | DeviceStatus.DRIVER_OK
NUM: Final = 8
DESC, AVAIL, USED = 0, 0x200, 0x400  # offsets of the rings in the first page
DATA: Final = PAGE_SIZE  # offset of the rest
MS: Final = 1_000_000

Main = Callable[[BootImage], Coroutine[Trap[Any], Any, Any]]
Piece = tuple[int, int, int]  # offset in the area or address of the bus, bytes, flags

REQUEST: Final = struct.Struct("<IIQ")


class Driver:
    """The registers and the memory of one device."""

    def __init__(self, window: RegisterWindow, area: DmaArea) -> None:
        self.window = window
        self.area = area
        self.available = 0

    @classmethod
    async def of(cls, slot: Slot) -> "Driver":
        """Map what a slot names."""
        return cls(await DeviceMap(slot), await DeviceDma(slot))

    def read(self, register: Register) -> int:
        return self.window.read(register)

    def write(self, register: Register, value: int) -> None:
        self.window.write(register, value)

    @property
    def status(self) -> DeviceStatus:
        return DeviceStatus(self.read(Register.STATUS))

    def address(self, offset: int) -> int:
        """The bus address of an offset in the area."""
        return self.area.addresses[offset // PAGE_SIZE] + offset % PAGE_SIZE

    def accept(self, features: int) -> DeviceStatus:
        """Reset, accept features, and say so."""
        self.write(Register.STATUS, 0)
        self.available = 0
        self.area.view[:PAGE_SIZE] = bytes(PAGE_SIZE)
        self.write(Register.STATUS, DeviceStatus.ACKNOWLEDGE)
        self.write(Register.STATUS, DeviceStatus.ACKNOWLEDGE | DeviceStatus.DRIVER)
        for half in (0, 1):
            self.write(Register.DRIVER_FEATURES_SELECT, half)
            self.write(Register.DRIVER_FEATURES, features >> 32 * half & 0xFFFF_FFFF)
        self.write(Register.STATUS, AGREED)
        return self.status

    def place(self, register: Register, address: int) -> None:
        """Set a ring's address, by halves."""
        self.write(register, address & 0xFFFF_FFFF)
        self.write(Register(register + 4), address >> 32)

    def queue(self, num: int = NUM) -> None:
        """Set up the queue in the first page."""
        self.write(Register.QUEUE_SELECT, 0)
        self.write(Register.QUEUE_NUM, num)
        self.place(Register.QUEUE_DESC_LOW, self.address(DESC))
        self.place(Register.QUEUE_DRIVER_LOW, self.address(AVAIL))
        self.place(Register.QUEUE_DEVICE_LOW, self.address(USED))
        self.write(Register.QUEUE_READY, 1)

    def begin(self, features: int = VERSION_1) -> None:
        """Bring the device up."""
        assert self.accept(features) == AGREED
        self.queue()
        self.write(Register.STATUS, LIVE)
        assert self.status == LIVE

    def describe(self, index: int, address: int, size: int, flags: int, following: int) -> None:
        """Write one descriptor."""
        DESCRIPTOR.pack_into(
            self.area.view, DESC + DESCRIPTOR.size * index, address, size, flags, following
        )

    def chain(self, pieces: Sequence[Piece], first: int = 0) -> None:
        """Describe pieces of the area, one behind another, from a descriptor on."""
        for number, (offset, size, flags) in enumerate(pieces):
            last = number == len(pieces) - 1
            index = first + number
            more = 0 if last else DESCRIPTOR_NEXT
            self.describe(index, self.address(offset), size, flags | more, 0 if last else index + 1)

    def offer(self, head: int) -> None:
        """Make a chain available, and notify."""
        struct.pack_into("<H", self.area.view, AVAIL + 4 + 2 * (self.available % NUM), head)
        self.available += 1
        self.publish(self.available)

    def publish(self, index: int) -> None:
        """Set the index of the driver's ring, and notify."""
        struct.pack_into("<H", self.area.view, AVAIL + 2, index & 0xFFFF)
        self.write(Register.QUEUE_NOTIFY, 0)

    @property
    def used(self) -> list[tuple[int, int]]:
        """What the device has put into its ring, the last NUM of it: head and bytes written."""
        (count,) = struct.unpack_from("<H", self.area.view, USED + 2)
        return [
            struct.unpack_from("<II", self.area.view, USED + 4 + 8 * (index % NUM))
            for index in range(max(0, count - NUM), count)
        ]

    def bytes_at(self, offset: int, size: int) -> bytes:
        return bytes(self.area.view[offset : offset + size])

    # ---- virtio-blk

    def request(self, kind: int, sector: int, data: bytes = b"", wanted: int = 0) -> None:
        """Offer a request in one piece: header, data, and a status byte of 0xEE behind."""
        header = REQUEST.pack(kind, 0, sector) + data
        self.area.view[DATA : DATA + len(header)] = header
        self.area.view[2 * DATA : 2 * DATA + wanted + 1] = bytes(wanted) + b"\xee"
        self.chain([(DATA, len(header), 0), (2 * DATA, wanted + 1, DESCRIPTOR_WRITE)])
        self.offer(0)

    async def done(self, kind: int, sector: int, data: bytes = b"", wanted: int = 0) -> int:
        """The status of a request, after it has been given time."""
        self.request(kind, sector, data, wanted)
        await pause(5 * MS)
        return self.area.view[2 * DATA + wanted]


async def pause(span: int = MS) -> None:
    """Let the device work."""
    _ = await SleepUntil(Nanos(await Now() + span))


class Bench:
    """One run of one kernel whose root starts holders of devices and sees how they end."""

    def __init__(self, *hardware: Hardware, seed: int = 1, **options: Any) -> None:
        self.events: list[Event] = []
        self._programs: dict[str, Program] = {}
        self.kernel = SimKernel(
            self._programs,
            seed=seed,
            recorder=self.events.append,
            hardware=hardware or BUS,
            **options,
        )

    def run(self, *holders: Main, on: str = "", grants: Grants | None = None) -> None:
        """Run holders of a device one after another, each to its end without an exception."""
        granted = self.grants(on) if grants is None else grants

        async def root(boot: BootImage) -> None:
            for number, _ in enumerate(holders):
                spawned = await self.start(boot, f"holder{number}", granted)
                end = await Wait(spawned.pid, Nanos(await Now() + 60_000 * MS))
                assert (end.code, end.signal) == (0, 0), self.kernel.crashes

        for number, holder in enumerate(holders):
            self.add(f"holder{number}", holder)
        self.run_root(root)

    def run_root(self, root: Main) -> None:
        """Run a root to its end; afterwards all came back."""
        end = self.kernel.run(
            Program(name="root", main=root, digest="r"),
            b"",
            until=Nanos(self.kernel.now + 600_000 * MS),
        )
        assert self.kernel.crashes == []
        assert (end.code, end.signal) == (0, 0)
        assert set(self.kernel.resources().values()) == {0}
        used, audited = self.kernel.heap_audit()
        assert used == audited == 0

    def add(self, name: str, main: Main) -> None:
        """Give the kernel a program."""
        self._programs[name] = Program(name=name, main=main, digest=name)

    def grants(self, *names: str) -> Grants:
        """A grant of devices of this bus."""
        by_name = {each.name: each for each in self.kernel.bus.map}
        return Grants(
            hardware=tuple(HardwareGrant(name, by_name[name].kind) for name in names if name)
        )

    async def start(self, boot: BootImage, name: str, grants: Grants) -> Spawned:
        """Spawn the program of a name."""
        return await Spawn(SpawnSpec(name, name, boot.endpoint, grants=grants))

    async def kill(self, spawned: Spawned) -> None:
        """Kill a task and see it gone."""
        await Kill(spawned.pid)
        _ = await Wait(spawned.pid, Nanos(await Now() + MS))

    def told(self, kind: EventKind = EventKind.DEVICE) -> list[dict[str, object]]:
        """The fields of the events of a kind."""
        return [dict(event.fields) for event in self.events if event.kind is kind]
