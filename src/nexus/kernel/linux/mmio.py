"""Register windows on a machine that has some to give: a page of registers that no driver of
Linux's holds, and memory that its device reads and writes.

Only for a machine of our own, where init is process 1: it takes /dev/mem. What a service gets is
two mappings and no descriptor: init makes them just before the fork and unmaps its own just after,
so of all processes the holder alone has the window. That mapping is the capability.

The memory stays init's for as long as the system runs, locked, with its addresses looked up for
each holder: whatever a device still writes when its holder is dead, it writes there. Linux may
move even locked pages to make room for large ones, unless it is told not to
(vm.compact_unevictable_allowed = 0): that is up to whoever hands a page over.

Source: vm.md 10; Documentation/admin-guide/mm/pagemap.rst.
"""

import ctypes
import mmap
import os
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Final, NamedTuple

from nexus.abi import DMA_PAGES, PAGE_SIZE, HardwareKind
from nexus.kernel.linux.native import at_address, lock_memory, map_for_child, map_shared, unmap

MEMORY: Final = "/dev/mem"
PAGEMAP: Final = "/proc/self/pagemap"
PRESENT: Final = 1 << 63  # of an entry of the page map
FRAME: Final = (1 << 55) - 1
_ENTRY: Final = struct.Struct("=Q")

MAGIC_AT, VERSION_AT, DEVICE_ID_AT = 0, 4, 8  # registers of a virtio-mmio transport
WORD_SIZE: Final = 4


class MmioPage(NamedTuple):
    """A page of registers that may be handed over. `name` is of the one device of the bus map that
    it is for; without one it is for any device of that kind that has no path."""

    kind: HardwareKind
    address: int  # physical
    name: str = ""


class Mapped(NamedTuple):
    """What a holder inherits: where its registers and its device's memory are mapped, and the
    device's addresses of the pages of that memory."""

    registers: int
    length: int
    memory: int
    addresses: tuple[int, ...]


class Identity(NamedTuple):
    """What a transport says it is."""

    magic: int
    version: int
    device_id: int


class Mmio:
    """Init's side of one page."""

    __slots__ = ("_kept", "_memory", "page")

    def __init__(self, page: MmioPage) -> None:
        assert page.address % PAGE_SIZE == 0, "a page is handed over whole"
        self.page = page
        self._memory = -1  # a memfd, once there has been a holder
        self._kept: object = None  # init's own mapping of it, which keeps its pages locked

    def look(self) -> Identity:
        """Read what it is; changes nothing. Raises OSError."""
        with _opened() as memory:
            array = map_shared(memory, PAGE_SIZE, self.page.address)
        words = (ctypes.c_uint32 * (PAGE_SIZE // WORD_SIZE)).from_buffer(array)
        read = (words[at // WORD_SIZE] for at in (MAGIC_AT, VERSION_AT, DEVICE_ID_AT))
        return Identity(*read)

    def open(self, undo: ExitStack) -> Mapped:
        """Map it for the child that is forked next; `undo` unmaps it here. Raises OSError."""
        if self._memory < 0:
            self._make_memory()
        size = DMA_PAGES * PAGE_SIZE
        with _opened() as memory:
            registers = map_for_child(memory, PAGE_SIZE, self.page.address)
        _ = undo.callback(unmap, registers, PAGE_SIZE)
        area = map_for_child(self._memory, size, 0)
        _ = undo.callback(unmap, area, size)
        # Of the mapping that goes to the child: the pages are the same ones.
        return Mapped(registers, PAGE_SIZE, area, _addresses(area))

    def close(self) -> None:
        """No more holders."""
        if self._memory >= 0:
            os.close(self._memory)
            self._memory, self._kept = -1, None

    def _make_memory(self) -> None:
        size = DMA_PAGES * PAGE_SIZE
        descriptor = os.memfd_create("dma", os.MFD_CLOEXEC)
        try:
            os.ftruncate(descriptor, size)
            kept = map_shared(descriptor, size, 0)
            lock_memory(kept)  # which also has every page there
        except OSError:
            os.close(descriptor)
            raise
        self._memory, self._kept = descriptor, kept


@contextmanager
def _opened() -> Iterator[int]:
    descriptor = os.open(MEMORY, os.O_RDWR | os.O_SYNC | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _addresses(area: int) -> tuple[int, ...]:
    """The physical addresses of the memory's pages. Raises OSError."""
    _touch(area)
    descriptor = os.open(PAGEMAP, os.O_RDONLY | os.O_CLOEXEC)
    try:
        data = os.pread(descriptor, DMA_PAGES * _ENTRY.size, area // PAGE_SIZE * _ENTRY.size)
    finally:
        os.close(descriptor)
    entries = [entry for (entry,) in _ENTRY.iter_unpack(data)]
    if len(entries) != DMA_PAGES or not all(entry & PRESENT for entry in entries):
        raise OSError("a page of the device's memory is not there")
    if not any(entry & FRAME for entry in entries):
        raise OSError("Linux does not say where the device's memory is")
    return tuple((entry & FRAME) * PAGE_SIZE for entry in entries)


def _touch(area: int) -> None:
    """Have every page of a mapping in the page table: the map knows no others."""
    array = at_address(area, DMA_PAGES * PAGE_SIZE)
    for page in range(DMA_PAGES):
        _ = array[page * PAGE_SIZE]


assert mmap.PAGESIZE == PAGE_SIZE, "a page of the ABI is one of Linux's here"
