"""A virtio block device, driven through its registers.

Memory: page 0 is the queue, page 1 holds a request's header and its status byte, the pages after
it the blocks. Source: Virtual I/O Device 1.2, 5.2.
"""

import struct
from typing import Final

from nexus.abi import (
    BLOCK_SIZE,
    DMA_PAGES,
    PAGE_SIZE,
    DmaArea,
    HardwareKind,
    Nanos,
    Now,
    RegisterWindow,
)
from nexus.drivers.block import REQUEST_MAX, DeviceFault, Fault, check_range, whole_blocks
from nexus.drivers.virtio import ENTRIES_MAX, Piece, Virtio, VirtioDevice

READ_ONLY_FEATURE: Final = 1 << 5
FLUSH_FEATURE: Final = 1 << 9
CAPACITY_AT: Final = 0  # of the configuration: blocks of 512 bytes

READ: Final = 0
WRITE: Final = 1
FLUSH: Final = 4
HEADER: Final = struct.Struct("<IIQ")  # type, reserved, first block
STATUS_SIZE: Final = 1
OK: Final = 0
IO_ERROR: Final = 1
UNSUPPORTED: Final = 2
UNTOUCHED: Final = 0xFF  # no status; what stands there before the device has written one

HEADER_PAGE: Final = 1
HEADER_AT: Final = 0
STATUS_AT: Final = 64
DATA_PAGE: Final = 2
OVERHEAD: Final = 2  # pieces besides the data: header, status
DATA_PAGES_MAX: Final = min(DMA_PAGES - DATA_PAGE, ENTRIES_MAX - OVERHEAD)

assert PAGE_SIZE % BLOCK_SIZE == 0
assert HEADER_AT + HEADER.size <= STATUS_AT
assert DATA_PAGES_MAX >= 1


class VirtioBlock(VirtioDevice):
    """drivers.BlockDevice on a register window.

    It is writable only if it has FLUSH: without, nothing tells when a write is safe.
    """

    def __init__(self, window: RegisterWindow, area: DmaArea) -> None:
        super().__init__(
            Virtio(
                window,
                area,
                HardwareKind.BLOCK,
                FLUSH_FEATURE | READ_ONLY_FEATURE,
                pieces_max=DATA_PAGES_MAX + OVERHEAD,
            )
        )
        self._transfer_max = 0  # bytes of one request
        self._block_count = 0

    @classmethod
    async def open(cls, window: RegisterWindow, area: DmaArea) -> "VirtioBlock":
        """Bring the device up and read its size."""
        device = cls(window, area)
        _ = await device._begin()
        return device

    @property
    def block_count(self) -> int:
        """How many blocks it has."""
        return self._block_count

    @property
    def writable(self) -> bool:
        """Whether it can be written at all."""
        features = self.identity.features
        return bool(features & FLUSH_FEATURE) and not features & READ_ONLY_FEATURE

    async def read(self, block: int, count: int) -> bytes:
        """`count` blocks from `block` on."""
        check_range(block, count, self._block_count)
        parts = []
        for at, size in self._transfers(block, count * BLOCK_SIZE):
            await self._perform(READ, at, size)
            start = DATA_PAGE * PAGE_SIZE
            parts.append(bytes(self._virtio.view[start : start + size]))
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def write(
        self, block: int, data: bytes | bytearray | memoryview, *, durable: bool = False
    ) -> None:
        """Write whole blocks; durable is a flush after them."""
        check_range(block, whole_blocks(data), self._block_count)
        self._check_writable()
        view = memoryview(data).cast("B")
        done = 0
        for at, size in self._transfers(block, len(view)):
            await self._perform(WRITE, at, size, view[done : done + size])
            done += size
        if durable:
            await self._perform(FLUSH, 0, 0)

    async def flush(self) -> None:
        """Everything written before survives a power cut on return."""
        self._check_writable()
        await self._perform(FLUSH, 0, 0)

    def _check_writable(self) -> None:
        if not self.writable:
            why = "" if self.identity.features & READ_ONLY_FEATURE else "it has no FLUSH"
            raise DeviceFault(Fault.READ_ONLY, why)

    def _transfers(self, block: int, size: int) -> list[tuple[int, int]]:
        """First block and bytes of each request."""
        step = self._transfer_max
        return [
            (block + done // BLOCK_SIZE, min(step, size - done)) for done in range(0, size, step)
        ]

    async def _begin(self) -> Nanos:
        """The device is up and the one we know; until when a request may take."""
        until = Nanos(await Now() + REQUEST_MAX)
        known = self._virtio.up
        await self._virtio.begin(until)
        if not known:
            self._learn()
        return until

    def _learn(self) -> None:
        """Read the size of a device that has just been brought up; it may not change."""
        pages = min(self._virtio.entries - OVERHEAD, DATA_PAGES_MAX)
        if pages < 1:
            raise self._virtio.refuse(f"a queue of {self._virtio.entries} takes no block request")
        count = self._virtio.config_u64(CAPACITY_AT)
        if self._block_count not in (0, count):
            raise self._virtio.refuse(f"it had {self._block_count} blocks, and has {count}")
        self._block_count = count
        self._transfer_max = pages * PAGE_SIZE

    async def _perform(
        self, kind: int, block: int, size: int, data: memoryview | None = None
    ) -> None:
        """One request of the device; its blocks are in the data pages before or after."""
        until = await self._begin()
        view = self._virtio.view
        if data is not None:
            view[DATA_PAGE * PAGE_SIZE : DATA_PAGE * PAGE_SIZE + size] = data
        header_at = HEADER_PAGE * PAGE_SIZE + HEADER_AT
        status_at = HEADER_PAGE * PAGE_SIZE + STATUS_AT
        HEADER.pack_into(view, header_at, kind, 0, block)
        view[status_at] = UNTOUCHED
        written = await self._virtio.perform(_pieces(kind, size), until)
        _check(view[status_at], written, size + STATUS_SIZE if kind == READ else STATUS_SIZE)


def _pieces(kind: int, size: int) -> list[Piece]:
    """Header, a piece for each page of data, status."""
    data = [
        Piece(DATA_PAGE + number, 0, min(PAGE_SIZE, size - number * PAGE_SIZE), kind == READ)
        for number in range(-(-size // PAGE_SIZE))
    ]
    return [
        Piece(HEADER_PAGE, HEADER_AT, HEADER.size, device_writes=False),
        *data,
        Piece(HEADER_PAGE, STATUS_AT, STATUS_SIZE, device_writes=True),
    ]


def _check(status: int, written: int, expected: int) -> None:
    """Raises what the device reports. OK counts only with all that was asked for."""
    if status == UNTOUCHED:
        raise DeviceFault(Fault.IO, "it gave no status")
    if status == UNSUPPORTED:
        raise DeviceFault(Fault.REFUSED, "it does not know the request")
    if status == IO_ERROR:
        raise DeviceFault(Fault.IO)
    if status != OK:
        raise DeviceFault(Fault.IO, f"it gave the status {status}")
    if written != expected:
        raise DeviceFault(Fault.IO, f"it says OK, and wrote {written} bytes of {expected}")
