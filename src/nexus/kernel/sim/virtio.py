"""The registers of a modern virtio-mmio device, and the queue in its driver's memory.

A hostile driver is the ordinary case: every address, length, index and chain is checked, and
what cannot be makes the device ask for a reset (NEEDS_RESET) and do nothing until it gets one.
Nothing happens inside a register write but the register: a notified queue is looked at later.
Source: Virtual I/O Device (VIRTIO) version 1.2, sections 2.1, 2.7 (split queues) and 4.2.2.
"""

import struct
from collections.abc import Callable, Iterator
from enum import IntEnum, IntFlag
from typing import Final, NamedTuple, Protocol

from nexus.abi import DMA_PAGES, PAGE_SIZE, Nanos
from nexus.kernel.core import VIRTIO_MAGIC, VIRTIO_VERSION, WINDOW_SIZE
from nexus.kernel.sim.clock import Clock

VENDOR_ID: Final = 0x5358_454E  # "NEXS"; a driver makes no use of it
LEGACY_VERSION: Final = 1
CONFIG: Final = 0x100  # where a device's own configuration begins
NOTIFY_DELAY: Final = Nanos(2_000)  # ns between a notification and the device's look at its queue
DMA_SIZE: Final = DMA_PAGES * PAGE_SIZE  # bytes
WORD: Final = 0xFFFF_FFFF

FEATURE_VERSION_1: Final = 1 << 32
FEATURE_WORDS: Final = 2  # a device's features are 64 bits, read and written by halves

DESCRIPTOR: Final = struct.Struct("<QIHH")  # address, length, flags, next
USED_ELEMENT: Final = struct.Struct("<II")  # head of the chain, bytes the device wrote
RING_HEADER_SIZE: Final = 4  # flags and index, in front of either ring
EVENT_SIZE: Final = 2  # the event index behind either ring
DESCRIPTOR_NEXT: Final = 1
DESCRIPTOR_WRITE: Final = 2
DESCRIPTOR_INDIRECT: Final = 4
INTERRUPT_USED: Final = 1
INTERRUPT_CONFIG: Final = 2


class Register(IntEnum):
    """Offsets in the window."""

    MAGIC = 0x000
    VERSION = 0x004
    DEVICE_ID = 0x008
    VENDOR_ID = 0x00C
    DEVICE_FEATURES = 0x010
    DEVICE_FEATURES_SELECT = 0x014
    DRIVER_FEATURES = 0x020
    DRIVER_FEATURES_SELECT = 0x024
    QUEUE_SELECT = 0x030
    QUEUE_NUM_MAX = 0x034
    QUEUE_NUM = 0x038
    QUEUE_READY = 0x044
    QUEUE_NOTIFY = 0x050
    INTERRUPT_STATUS = 0x060
    INTERRUPT_ACK = 0x064
    STATUS = 0x070
    QUEUE_DESC_LOW = 0x080
    QUEUE_DESC_HIGH = 0x084
    QUEUE_DRIVER_LOW = 0x090
    QUEUE_DRIVER_HIGH = 0x094
    QUEUE_DEVICE_LOW = 0x0A0
    QUEUE_DEVICE_HIGH = 0x0A4
    CONFIG_GENERATION = 0x0FC


_IDENTITY: Final = frozenset(
    {Register.MAGIC, Register.VERSION, Register.DEVICE_ID, Register.VENDOR_ID}
)
_RING_HALVES: Final = {
    Register.QUEUE_DESC_LOW: (0, 0),
    Register.QUEUE_DESC_HIGH: (0, 32),
    Register.QUEUE_DRIVER_LOW: (1, 0),
    Register.QUEUE_DRIVER_HIGH: (1, 32),
    Register.QUEUE_DEVICE_LOW: (2, 0),
    Register.QUEUE_DEVICE_HIGH: (2, 32),
}
"""Which of a queue's three rings a register gives, and by how much its half is shifted."""

_RING_ALIGNS: Final = (16, 2, 4)  # bytes; descriptors, driver's ring, device's ring


class DeviceStatus(IntFlag):
    """Bits of the status register."""

    ACKNOWLEDGE = 1
    DRIVER = 2
    DRIVER_OK = 4
    FEATURES_OK = 8
    NEEDS_RESET = 64
    FAILED = 128


class BadMemory(Exception):
    """A driver named memory that it was not granted."""


class Broken(Exception):
    """A driver gave its device what no device can make sense of."""


class Memory:
    """The pages that a device may read and write, at the addresses they have on the bus."""

    __slots__ = ("_pages", "addresses", "data")

    def __init__(self, addresses: tuple[int, ...]) -> None:
        assert len(set(addresses)) == DMA_PAGES, "a page has one address"
        assert all(address % PAGE_SIZE == 0 for address in addresses), "pages are aligned"
        self.addresses = addresses
        self.data = bytearray(DMA_SIZE)
        self._pages = {address: index for index, address in enumerate(addresses)}

    def read(self, address: int, size: int) -> bytes:
        """Bytes at an address of the bus. Raises BadMemory."""
        return b"".join(self.data[at : at + length] for at, length in self._pieces(address, size))

    def write(self, address: int, data: bytes) -> None:
        """Put bytes at an address of the bus. Raises BadMemory; then nothing is written."""
        done = 0
        for at, length in list(self._pieces(address, len(data))):
            self.data[at : at + length] = data[done : done + length]
            done += length

    def check(self, address: int, size: int, align: int = 1) -> None:
        """Raise BadMemory unless all of it was granted, and begins at a multiple of `align`."""
        if address % align:
            raise BadMemory(f"{address:#x} is no multiple of {align}")
        for _ in self._pieces(address, size):
            pass

    def replace(self) -> None:
        """Zero the pages, and let the next owner have fresh ones: old views see nothing of it."""
        self.data[:] = bytes(DMA_SIZE)
        self.data = bytearray(DMA_SIZE)

    def _pieces(self, address: int, size: int) -> Iterator[tuple[int, int]]:
        if size > DMA_SIZE:
            raise BadMemory(f"{size} bytes at {address:#x}, there are {DMA_SIZE}")
        while size > 0:
            offset = address % PAGE_SIZE
            index = self._pages.get(address - offset)
            if index is None:
                raise BadMemory(f"no page at {address:#x}")
            length = min(size, PAGE_SIZE - offset)
            yield index * PAGE_SIZE + offset, length
            address += length
            size -= length


class Chain(NamedTuple):
    """One request in a queue: pieces of memory the device reads, then such that it writes."""

    head: int
    readable: tuple[tuple[int, int], ...]  # address, bytes
    writable: tuple[tuple[int, int], ...]

    @property
    def readable_size(self) -> int:
        """Bytes the device may read."""
        return sum(length for _, length in self.readable)

    @property
    def writable_size(self) -> int:
        """Bytes the device may write."""
        return sum(length for _, length in self.writable)


Finish = Callable[[int | None], None]
"""Told once a request is done: how many bytes were written, None if its driver never hears."""


class Model(Protocol):
    """What stands behind a transport."""

    device_id: int
    features: int
    queue_count_max: int

    @property
    def config(self) -> bytes:
        """The device's own configuration, as it is read from CONFIG on."""
        ...

    def begin(self, chain: Chain, memory: Memory, features: int, finish: Finish) -> None:
        """Take up a request whose memory was checked, and call `finish` from an event of the
        clock. Raises Broken."""
        ...

    def reset(self) -> None:
        """Forget the requests that are not done: nobody is told of them any more."""
        ...


class Transport:
    """The registers of one device.

    `tell` hears of each write of the status register and of what the device makes of it.
    """

    __slots__ = (
        "_available",
        "_clock",
        "_device_select",
        "_driver_features",
        "_driver_select",
        "_interrupts",
        "_memory",
        "_model",
        "_num",
        "_queue_select",
        "_ready",
        "_rings",
        "_tell",
        "_used",
        "status",
        "version",
    )

    def __init__(
        self,
        model: Model | None,
        memory: Memory,
        clock: Clock,
        tell: Callable[[str, dict[str, object]], None],
        *,
        legacy: bool,
    ) -> None:
        self.version = LEGACY_VERSION if legacy else VIRTIO_VERSION
        self._model = model
        self._memory = memory
        self._clock = clock
        self._tell = tell
        self._forget()

    def _forget(self) -> None:
        self.status = DeviceStatus(0)
        self._device_select = 0
        self._driver_select = 0
        self._driver_features = [0] * FEATURE_WORDS
        self._queue_select = 0
        self._num = 0
        self._ready = False
        self._rings = [0, 0, 0]  # addresses of descriptors, driver's ring, device's ring
        self._available = 0  # entries of the driver's ring that were taken, modulo 2^16
        self._used = 0  # entries put into the device's ring, modulo 2^16
        self._interrupts = 0

    def reset(self) -> None:
        """Forget everything: what the driver set, and the requests that are not done."""
        self._forget()
        if self._model is not None:
            self._model.reset()

    @property
    def device_id(self) -> int:
        """What the device is; 0 for a transport with none behind it."""
        return 0 if self._model is None else self._model.device_id

    @property
    def offered(self) -> int:
        """The features that the device offers."""
        if self._model is None:
            return 0
        if self.version == LEGACY_VERSION:
            return self._model.features & WORD
        return self._model.features | FEATURE_VERSION_1

    @property
    def accepted(self) -> int:
        """The features that its driver has accepted."""
        low, high = self._driver_features
        return high << 32 | low

    @property
    def live(self) -> bool:
        """Whether it serves its queue."""
        stopped = DeviceStatus.FAILED | DeviceStatus.NEEDS_RESET
        return bool(self.status & DeviceStatus.DRIVER_OK) and not self.status & stopped

    # ---- registers

    def read(self, offset: int) -> int:
        """The value of the register at an aligned offset of the window."""
        if self._model is None and offset not in _IDENTITY:
            return 0
        if offset >= CONFIG:
            return self._config(offset - CONFIG)
        match offset:
            case Register.MAGIC:
                return VIRTIO_MAGIC
            case Register.VERSION:
                return self.version
            case Register.DEVICE_ID:
                return self.device_id
            case Register.VENDOR_ID:
                return VENDOR_ID
            case Register.DEVICE_FEATURES:
                return self._half(self.offered, self._device_select)
            case Register.QUEUE_NUM_MAX:
                return self._num_max()
            case Register.QUEUE_READY:
                return int(self._ready and self._queue_select == 0)
            case Register.INTERRUPT_STATUS:
                return self._interrupts
            case Register.STATUS:
                return int(self.status)
            case _:
                return 0  # cannot be read, or is none

    def write(self, offset: int, value: int) -> None:
        """Set the register at an aligned offset of the window; those that cannot be stay."""
        if offset == Register.STATUS:
            self._tell("status", {"value": value})
        if self._model is None:
            return
        match offset:
            case Register.STATUS:
                self._set_status(value)
            case Register.DEVICE_FEATURES_SELECT:
                self._device_select = value
            case Register.DRIVER_FEATURES_SELECT:
                self._driver_select = value
            case Register.DRIVER_FEATURES:
                self._accept(value)
            case Register.QUEUE_SELECT:
                self._queue_select = value
            case Register.QUEUE_NUM | Register.QUEUE_READY:
                self._set_queue(offset, value)
            case Register.QUEUE_NOTIFY:
                self._notified(value)
            case Register.INTERRUPT_ACK:
                self._interrupts &= ~value
            case _ if offset in _RING_HALVES:
                self._set_ring(Register(offset), value)
            case _:
                pass  # cannot be written, or is none

    def _config(self, offset: int) -> int:
        assert self._model is not None, "looked at before"
        return int.from_bytes(self._model.config[offset : offset + 4], "little")

    def _half(self, features: int, select: int) -> int:
        return features >> 32 * select & WORD if select < FEATURE_WORDS else 0

    def _num_max(self) -> int:
        modern = self._model is not None and self.version == VIRTIO_VERSION
        if not modern or self._queue_select:
            return 0
        assert self._model is not None, "looked at before"
        return self._model.queue_count_max

    # ---- status and features

    def _set_status(self, value: int) -> None:
        if not value:
            self.reset()
            return
        # A driver only ever adds bits, and NEEDS_RESET is not one of its own.
        added = DeviceStatus(value & 0xFF) & ~self.status & ~DeviceStatus.NEEDS_RESET
        if added & DeviceStatus.FEATURES_OK and not self._agrees():
            added &= ~DeviceStatus.FEATURES_OK
        if added & DeviceStatus.DRIVER_OK and not self.status & DeviceStatus.FEATURES_OK:
            added &= ~DeviceStatus.DRIVER_OK
        self.status |= added
        if added & DeviceStatus.DRIVER_OK and self.live:
            assert self._model is not None, "looked at before"
            self._tell(
                "live",
                {
                    "version": self.version,
                    "device": self.device_id,
                    "features": self.accepted,
                    "config": self._model.config.hex(),
                },
            )

    def _agrees(self) -> bool:
        modern = self.accepted & FEATURE_VERSION_1
        return bool(modern) and not self.accepted & ~self.offered

    def _accept(self, value: int) -> None:
        if self.status & DeviceStatus.FEATURES_OK:
            return  # agreed on
        if self._driver_select < FEATURE_WORDS:
            self._driver_features[self._driver_select] = value

    def _needs_reset(self, why: str) -> None:
        self.status |= DeviceStatus.NEEDS_RESET
        self._interrupts |= INTERRUPT_CONFIG
        self._tell("needs_reset", {"why": why})

    # ---- the queue

    def _set_queue(self, offset: int, value: int) -> None:
        if self._queue_select or not self.status & DeviceStatus.FEATURES_OK:
            return
        if offset == Register.QUEUE_NUM:
            if not self._ready:
                self._num = value
        elif value & 1:
            self._enable()
        else:
            self._ready = False

    def _set_ring(self, register: Register, value: int) -> None:
        if self._queue_select or self._ready or not self.status & DeviceStatus.FEATURES_OK:
            return
        ring, shift = _RING_HALVES[register]
        kept = self._rings[ring] & ~(WORD << shift)
        self._rings[ring] = kept | value << shift

    def _enable(self) -> None:
        if self._ready or self.status & DeviceStatus.NEEDS_RESET:
            return
        num = self._num
        if not 1 <= num <= self._num_max() or num & (num - 1):
            self._needs_reset(f"a queue of {num} entries")
            return
        sizes = (
            DESCRIPTOR.size * num,
            RING_HEADER_SIZE + 2 * num + EVENT_SIZE,
            RING_HEADER_SIZE + USED_ELEMENT.size * num + EVENT_SIZE,
        )
        try:
            for address, size, align in zip(self._rings, sizes, _RING_ALIGNS, strict=True):
                self._memory.check(address, size, align)
        except BadMemory as error:
            self._needs_reset(str(error))
            return
        self._ready = True
        self._available = self._used = 0

    def _notified(self, queue: int) -> None:
        if queue == 0 and self._ready and self.live:
            self._clock.call(Nanos(self._clock.now + NOTIFY_DELAY), self._look)

    def _look(self) -> None:
        """Take up everything that the driver has made available; nothing after a reset."""
        if not self._ready or not self.live:
            return
        try:
            for _ in range(self._waiting()):
                self._take_up()
        except (BadMemory, Broken) as error:
            self._needs_reset(str(error))

    def _waiting(self) -> int:
        ring = self._rings[1]
        index = int.from_bytes(self._memory.read(ring + 2, 2), "little")
        count = index - self._available & 0xFFFF
        if count > self._num:
            raise Broken(f"{count} requests in a queue of {self._num}")
        return count

    def _take_up(self) -> None:
        assert self._model is not None, "it was notified"
        entry = self._rings[1] + RING_HEADER_SIZE + 2 * (self._available % self._num)
        head = int.from_bytes(self._memory.read(entry, 2), "little")
        chain = self._chain(head)
        self._available = self._available + 1 & 0xFFFF
        self._model.begin(chain, self._memory, self.accepted, lambda size: self._done(chain, size))

    def _chain(self, head: int) -> Chain:
        readable: list[tuple[int, int]] = []
        writable: list[tuple[int, int]] = []
        index, size = head, 0
        for _ in range(self._num):
            if index >= self._num:
                raise Broken(f"descriptor {index} of {self._num}")
            place = self._rings[0] + DESCRIPTOR.size * index
            address, length, flags, index = DESCRIPTOR.unpack(
                self._memory.read(place, DESCRIPTOR.size)
            )
            if flags & DESCRIPTOR_INDIRECT:
                raise Broken("an indirect descriptor, which was not agreed on")
            self._memory.check(address, length)
            size += length
            if size > DMA_SIZE:
                raise Broken("a chain that describes more memory than there is")
            if flags & DESCRIPTOR_WRITE:
                writable.append((address, length))
            elif writable:
                raise Broken("a piece to read behind one to write")
            else:
                readable.append((address, length))
            if not flags & DESCRIPTOR_NEXT:
                return Chain(head, tuple(readable), tuple(writable))
        raise Broken("a chain without an end")

    def _done(self, chain: Chain, size: int | None) -> None:
        if size is None or not self._ready or not self.live:
            return
        try:
            place = self._rings[2] + RING_HEADER_SIZE
            place += USED_ELEMENT.size * (self._used % self._num)
            self._memory.write(place, USED_ELEMENT.pack(chain.head, size))
            self._used = self._used + 1 & 0xFFFF
            self._memory.write(self._rings[2] + 2, self._used.to_bytes(2, "little"))
        except BadMemory as error:
            raise AssertionError("the ring was looked at when it was set up") from error
        self._interrupts |= INTERRUPT_USED


class Window:
    """The registers of a device, from an offset on, as a task has them mapped."""

    __slots__ = ("_base", "_transport")

    def __init__(self, transport: Transport, base: int) -> None:
        self._transport: Transport | None = transport
        self._base = base

    @property
    def length(self) -> int:
        """Bytes."""
        return WINDOW_SIZE - self._base

    def read(self, offset: int) -> int:
        """A register's value. Raises ValueError."""
        return self._mapped(offset).read(self._base + offset)

    def write(self, offset: int, value: int) -> None:
        """Set a register. Raises ValueError, also for a value that is no 32-bit word."""
        transport = self._mapped(offset)
        if not 0 <= value <= WORD:
            raise ValueError(f"{value:#x} is no 32-bit word")
        transport.write(self._base + offset, value)

    def end(self) -> None:
        """Take the mapping away."""
        self._transport = None

    def _mapped(self, offset: int) -> Transport:
        if self._transport is None:
            raise ValueError("the mapping has ended")
        if not 0 <= offset < self.length or offset % 4:
            raise ValueError(f"no register at {offset:#x}")
        return self._transport
