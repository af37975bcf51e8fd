"""Virtio devices behind registers, true to the specification unless told to lie, and who drives
the driver: a clock, the device and nothing else.

The simulated bus has a device model of its own; this one is for what a real device never does.
"""

import struct
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from nexus.abi import (
    BLOCK_SIZE,
    DMA_PAGES,
    PAGE_SIZE,
    CapInfo,
    CapKind,
    CapQuery,
    DeviceDma,
    DeviceMap,
    DmaArea,
    Nanos,
    Now,
    Rights,
    SleepUntil,
    Slot,
    Trap,
)
from nexus.drivers import virtio

SLOT: Final = Slot(5)  # of the window, where a driver opens it
BASE: Final = 0x4_0000_0000  # above 4 GiB, so that both halves of an address count
START: Final = Nanos(1_000_000)
VERSION_1: Final = virtio.VERSION_1
FLUSH_FEATURE: Final = 1 << 9
READ_ONLY_FEATURE: Final = 1 << 5
RUN_MAX: Final = 100_000  # traps of one run

ResultT = TypeVar("ResultT")


@dataclass
class Lies:
    """What a device does wrong. Each is one thing; nothing by default."""

    magic: int = virtio.MAGIC
    version: int = virtio.VERSION
    device_id: int | None = None
    drops_features_ok: bool = False  # and takes DRIVER_OK all the same
    never_resets: bool = False
    queue_in_use: bool = False
    does_not_start: bool = False
    never_completes: bool = False
    needs_reset: bool = False  # instead of completing
    extra_completions: int = 0  # the index goes further by so many
    stale_completion: bool = False  # what was lost by the last reset completes with the next
    id_offset: int = 0
    length: Callable[[int], int] = lambda size: size
    status: int | None = None
    status_untouched: bool = False
    restless: bool = False  # its configuration changes with every look


@dataclass
class Request:
    """A request as the device found it."""

    head: int
    readable: bytes
    writable: list[tuple[int, int]]  # offset in memory, size

    @property
    def room(self) -> int:
        return sum(size for _, size in self.writable)


@dataclass
class FakeVirtio:
    """A device of the modern transport. Its pages are in no order of addresses."""

    device_id: int
    features: int = VERSION_1
    entries_max: int = 64
    lies: Lies = field(default_factory=Lies)
    delay: int = 0  # ns until a request is answered
    reset_delay: int = 0  # ns until a reset is done

    def __post_init__(self) -> None:
        self.memory = bytearray(DMA_PAGES * PAGE_SIZE)
        order = [(7 * page + 3) % DMA_PAGES for page in range(DMA_PAGES)]
        self.addresses = tuple(BASE + 2 * PAGE_SIZE * place for place in order)
        self.area = DmaArea(memoryview(self.memory), self.addresses)
        self.now = START
        self.written: list[tuple[int, int]] = []  # every register write
        self.requests: list[Request] = []
        self.pending: list[tuple[int, Request]] = []
        self.lost: list[Request] = []  # by a reset
        self.registers: dict[int, int] = {}
        self.queue: dict[int, int] = {}
        self.seen = 0  # of the available ring
        self.used = 0
        self.resetting_until = 0
        self.generation = 0

    # ------------------------------------------------------------ the window

    @property
    def length(self) -> int:
        return PAGE_SIZE

    def read(self, offset: int) -> int:
        assert offset % 4 == 0
        lies = self.lies
        match offset:
            case virtio.MAGIC_VALUE:
                return lies.magic
            case virtio.VERSION_VALUE:
                return lies.version
            case virtio.DEVICE_ID:
                return self.device_id if lies.device_id is None else lies.device_id
            case virtio.DEVICE_FEATURES:
                shift = 32 * self.registers.get(virtio.DEVICE_FEATURES_SELECT, 0)
                return (self.features >> shift) & 0xFFFF_FFFF
            case virtio.QUEUE_COUNT_MAX:
                return self.entries_max
            case virtio.QUEUE_READY:
                return int(lies.queue_in_use)
            case virtio.STATUS:
                return self._status()
            case virtio.CONFIG_GENERATION:
                self.generation += lies.restless
                return self.generation
            case _:
                assert offset >= virtio.CONFIG, f"the driver reads register {offset:#x}"
                return self.config(offset - virtio.CONFIG)

    def write(self, offset: int, value: int) -> None:
        assert offset % 4 == 0
        assert 0 <= value <= 0xFFFF_FFFF
        self.written.append((offset, value))
        self.registers[offset] = value
        if offset == virtio.STATUS:
            self._on_status(value)
        elif offset == virtio.QUEUE_NOTIFY:
            self._on_notify()

    def config(self, offset: int) -> int:
        """A word of the device's configuration."""
        raise AssertionError(f"the driver reads configuration {offset:#x}")

    @property
    def statuses(self) -> list[int]:
        """What was written to the status register, in order."""
        return [value for offset, value in self.written if offset == virtio.STATUS]

    def _status(self) -> int:
        if self.lies.never_resets and virtio.STATUS in self.registers:
            return self.registers[virtio.STATUS] or virtio.ACKNOWLEDGE
        if self.now < self.resetting_until:
            return virtio.ACKNOWLEDGE
        return self.registers.get(virtio.STATUS, 0)

    def _on_status(self, value: int) -> None:
        if not value:
            self.lost += [request for _, request in self.pending]
            self.pending.clear()
            self.seen = self.used = 0
            self.resetting_until = self.now + self.reset_delay
        agreeing = value & (virtio.FEATURES_OK | virtio.DRIVER_OK) == virtio.FEATURES_OK
        if agreeing and self.lies.drops_features_ok:
            self.registers[virtio.STATUS] = value & ~virtio.FEATURES_OK
        if value & virtio.DRIVER_OK and self.lies.does_not_start:
            self.registers[virtio.STATUS] = value | virtio.NEEDS_RESET

    # ------------------------------------------------------------ the queue

    @property
    def entries(self) -> int:
        return self.registers[virtio.QUEUE_COUNT]

    def _place(self, register: int) -> int:
        low, high = self.registers[register], self.registers[register + 4]
        return self._offset(low | high << 32)

    def _offset(self, address: int) -> int:
        """Where a device address is in memory; KeyError outside the pages."""
        pages = {base: page for page, base in enumerate(self.addresses)}
        return pages[address - address % PAGE_SIZE] * PAGE_SIZE + address % PAGE_SIZE

    def _on_notify(self) -> None:
        assert self.registers[virtio.STATUS] & virtio.DRIVER_OK, "notified before DRIVER_OK"
        available = self._place(virtio.QUEUE_DRIVER)
        (index,) = struct.unpack_from("<H", self.memory, available + 2)
        while self.seen != index:
            at = available + 4 + 2 * (self.seen % self.entries)
            (head,) = struct.unpack_from("<H", self.memory, at)
            self.seen = (self.seen + 1) % (1 << 16)
            request = self._chain(head)
            self.requests.append(request)
            self.pending.append((self.now + self.delay, request))
        self.on_time()

    def _chain(self, head: int) -> Request:
        request = Request(head, b"", [])
        table, entry = self._place(virtio.QUEUE_DESCRIPTORS), head
        for _ in range(self.entries):
            at = table + 16 * entry
            address, size, flags, following = struct.unpack_from("<QIHH", self.memory, at)
            offset = self._offset(address)
            assert offset % PAGE_SIZE + size <= PAGE_SIZE, "pages do not follow one another"
            if flags & virtio.DEVICE_WRITES:
                request.writable.append((offset, size))
            else:
                assert not request.writable, "what the device writes comes last"
                request.readable += self.memory[offset : offset + size]
            if not flags & virtio.NEXT:
                return request
            entry = following
        raise AssertionError("a chain without end")

    def on_time(self) -> None:
        """Answer what is due."""
        while self.pending and self.pending[0][0] <= self.now:
            if self.lies.never_completes:
                return
            _, request = self.pending.pop(0)
            if self.lies.needs_reset:
                self.registers[virtio.STATUS] |= virtio.NEEDS_RESET
                return
            if self.lies.stale_completion and self.lost:
                request = self.lost.pop()
            written = self.act(request)
            self.complete(request.head + self.lies.id_offset, self.lies.length(written))

    def complete(self, head: int, written: int) -> None:
        """Put a completion into the used ring."""
        used = self._place(virtio.QUEUE_DEVICE)
        for _ in range(1 + self.lies.extra_completions):
            at = used + 4 + 8 * (self.used % self.entries)
            struct.pack_into("<II", self.memory, at, head, written)
            self.used = (self.used + 1) % (1 << 16)
        struct.pack_into("<H", self.memory, used + 2, self.used)

    def act(self, request: Request) -> int:
        """Do what is asked; the bytes written."""
        raise NotImplementedError

    def scatter(self, request: Request, data: bytes) -> None:
        """Write `data` into the request's writable pieces."""
        for offset, size in request.writable:
            self.memory[offset : offset + len(data[:size])] = data[:size]
            data = data[size:]


class FakeEntropy(FakeVirtio):
    """Counts upwards, so that no two draws are equal."""

    def __init__(self, **options: Any) -> None:
        self.drawn = 0
        super().__init__(device_id=4, **options)

    def act(self, request: Request) -> int:
        assert not request.readable
        data = bytes((self.drawn + place) % 251 for place in range(request.room))
        self.drawn += request.room
        self.scatter(request, data)
        return len(data)


class FakeDisk(FakeVirtio):
    """A disk; what was written after the last flush is in `cached`."""

    def __init__(self, block_count: int = 1024, **options: Any) -> None:
        self.content = bytearray(block_count * BLOCK_SIZE)
        self.flushes = 0
        self.block_count = block_count
        options.setdefault("features", VERSION_1 | FLUSH_FEATURE)
        super().__init__(device_id=2, **options)

    def config(self, offset: int) -> int:
        return {0: self.block_count & 0xFFFF_FFFF, 4: self.block_count >> 32}[offset]

    def act(self, request: Request) -> int:
        kind, _, block = struct.unpack_from("<IIQ", request.readable)
        start = block * BLOCK_SIZE
        status, written = 0, 1
        if kind == 0:
            size = request.room - 1
            self.scatter(request, bytes(self.content[start : start + size]))
            written += size
        elif kind == 1:
            data = request.readable[16:]
            self.content[start : start + len(data)] = data
        elif kind == 4:
            self.flushes += 1
        else:
            status = 2
        if self.lies.status is not None:
            status = self.lies.status
        if not self.lies.status_untouched:
            self.memory[request.writable[-1][0]] = status
        return written


def drive(program: Coroutine[Trap[Any], Any, ResultT], device: FakeVirtio) -> ResultT:
    """Run a driver's coroutine against `device`, whose clock goes on when it sleeps."""
    value: Any = None
    for _ in range(RUN_MAX):
        try:
            trap = program.send(value)
        except StopIteration as stop:
            result: ResultT = stop.value
            return result
        match trap:
            case Now():
                value = device.now
            case SleepUntil():
                assert trap.deadline > device.now, "a sleep that does not sleep"
                device.now = trap.deadline
                device.on_time()
                value = device.now
            case CapQuery():
                assert trap.slot == SLOT
                value = CapInfo(CapKind.DEVICE, Rights.MAP, PAGE_SIZE)
            case DeviceMap():
                value = device
            case DeviceDma():
                value = device.area
            case _:
                raise AssertionError(f"{trap!r} is none of a driver's traps")
    raise AssertionError("a driver that does not end")
