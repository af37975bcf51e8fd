"""What a slot names that holds a device of the bus map: the side of its holder.

A block device is a descriptor that init opened, an entropy source is one or none (getrandom), a
window is memory whose accesses are a device's business. Reads and writes go to the calling
process's own descriptor: no message, and nobody else who could look.
"""

import ctypes
import errno
import mmap
import os
from collections.abc import Callable
from time import monotonic_ns
from typing import Final, NamedTuple

from nexus.abi import (
    BLOCK_SIZE,
    BLOCK_TRANSFER_MAX,
    ENTROPY_SIZE_MAX,
    PAGE_SIZE,
    AbiError,
    CapKind,
    DeviceInfo,
    DmaArea,
    HardwareKind,
    Nanos,
    Status,
)
from nexus.kernel.linux.mmio import Mapped
from nexus.kernel.linux.native import at_address

FILE: Final = "file"
NODE: Final = "node"
HWRNG: Final = "hwrng"
GETRANDOM: Final = "getrandom"
WINDOW: Final = "virtio-mmio"

WORD_SIZE: Final = 4  # bytes of a register

# What a write says where there is no room for it; EFBIG is a limit of the file system's.
FULL_ERRORS: Final = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
READ_ONLY_ERRORS: Final = frozenset((errno.EROFS, errno.EBADF, errno.EPERM, errno.EACCES))
# What pwritev2(2) says where the file or the kernel knows no RWF_DSYNC.
NO_DSYNC_ERRORS: Final = frozenset((errno.EOPNOTSUPP, errno.ENOSYS))


class Granted(NamedTuple):
    """A device as init hands it over: with a descriptor, or `mapped` in memory that its holder
    inherits; getrandom is neither."""

    name: str
    kind: HardwareKind
    backing: str
    block_count: int
    writable: bool
    mapped: Mapped | None = None

    @property
    def described(self) -> bool:
        """Whether it has a descriptor."""
        return self.backing != GETRANDOM and self.mapped is None

    @property
    def info(self) -> DeviceInfo:
        """The answer to DeviceQuery."""
        return DeviceInfo(self.name, self.backing, self.block_count, self.writable)


class Block:
    """A block device over a file or a device node.

    Once a sync has failed it is `failed` for good, and answers nothing but DeviceFailed: Linux
    tells such an error once and then takes the lost pages for written, so no later success of
    this descriptor would mean anything. Whoever opens the device afresh sees what is there.
    """

    __slots__ = ("_dsync", "descriptor", "failed", "granted", "on_failure")

    kind: Final = CapKind.BLOCK
    length: Final = 0

    def __init__(self, granted: Granted, descriptor: int) -> None:
        self.granted = granted
        self.descriptor = descriptor
        self.failed = ""  # why it answers nothing any more
        self.on_failure: Callable[[str], None] = _nobody_asks
        self._dsync = True  # until Linux says that it cannot

    def read(self, block: int, count: int, deadline: Nanos) -> bytes:
        """Refuses as BlockRead."""
        self._check_range(block, count)
        self._check_alive()
        self._check_time(deadline)
        offset, left = block * BLOCK_SIZE, count * BLOCK_SIZE
        parts = []
        while left:
            try:
                part = os.pread(self.descriptor, left, offset)
            except OSError as error:
                raise _refusal(error) from None
            if not part:
                raise AbiError(Status.DEVICE_FAILED, "it has become shorter than its blocks")
            parts.append(part)
            left, offset = left - len(part), offset + len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def write(
        self, block: int, data: bytes | bytearray | memoryview, deadline: Nanos, *, durable: bool
    ) -> None:
        """Refuses as BlockWrite."""
        view = memoryview(data).cast("B")
        if len(view) % BLOCK_SIZE:
            raise AbiError(Status.INVALID_ARGUMENT, f"{len(view)} bytes are no whole blocks")
        self._check_range(block, len(view) // BLOCK_SIZE)
        self._check_writable()
        self._check_alive()
        self._check_time(deadline)
        offset = block * BLOCK_SIZE
        if durable and self._dsync and self._write_through(view, offset):
            return
        self._write_back(view, offset)
        if durable:
            self._sync()

    def flush(self, deadline: Nanos) -> None:
        """Refuses as BlockFlush."""
        self._check_alive()
        self._check_time(deadline)
        self._sync()

    def close(self) -> None:
        """No slot names it any more."""
        os.close(self.descriptor)

    def _check_alive(self) -> None:
        if self.failed:
            raise AbiError(Status.DEVICE_FAILED, self.failed)

    def _check_range(self, block: int, count: int) -> None:
        if not 1 <= count <= BLOCK_TRANSFER_MAX // BLOCK_SIZE:
            raise AbiError(Status.INVALID_ARGUMENT, f"{count} blocks in one transfer")
        if not 0 <= block <= self.granted.block_count - count:
            raise AbiError(
                Status.INVALID_ARGUMENT,
                f"blocks {block} to {block + count} of {self.granted.block_count}",
            )

    def _check_writable(self) -> None:
        if not self.granted.writable:
            raise AbiError(Status.PERMISSION_DENIED, f"{self.granted.name} is read only")

    def _check_time(self, deadline: Nanos) -> None:
        if monotonic_ns() >= deadline:
            raise AbiError(Status.TIMED_OUT, "the deadline had passed")

    def _write_back(self, view: memoryview, offset: int) -> None:
        while view:
            try:
                written = os.pwrite(self.descriptor, view, offset)
            except OSError as error:
                raise _refusal(error) from None
            view, offset = view[written:], offset + written

    def _write_through(self, view: memoryview, offset: int) -> bool:
        """Write so that each piece is durable when its call returns; False where Linux cannot
        do that here, with nothing written."""
        while view:
            try:
                written = os.pwritev(self.descriptor, (view,), offset, os.RWF_DSYNC)
            except OSError as error:
                if error.errno in NO_DSYNC_ERRORS:
                    self._dsync = False
                    return False
                if error.errno in FULL_ERRORS:
                    # The one call writes and syncs. Without the sync: is it the write that fails?
                    self._write_back(view, offset)
                elif error.errno in READ_ONLY_ERRORS:
                    raise _refusal(error) from None
                raise self._fail(error) from None
            view, offset = view[written:], offset + written
        return True

    def _sync(self) -> None:
        try:
            os.fdatasync(self.descriptor)
        except OSError as error:
            raise self._fail(error) from None

    def _fail(self, error: OSError) -> AbiError:
        """A sync has failed: nothing is known of what was written before, now and later."""
        self.failed = f"{self.granted.name} could not be synced: {error.strerror}"
        self.on_failure(errno.errorcode.get(error.errno or 0, str(error.errno)))
        return AbiError(Status.DEVICE_FAILED, self.failed)


class Source:
    """An entropy source: a device node that init opened, or Linux's own generator."""

    __slots__ = ("descriptor", "granted")

    kind: Final = CapKind.ENTROPY
    length: Final = 0

    def __init__(self, granted: Granted, descriptor: int) -> None:
        self.granted = granted
        self.descriptor = descriptor  # -1 for getrandom

    def draw(self, size: int) -> bytes:
        """Refuses as EntropyDraw."""
        if not 1 <= size <= ENTROPY_SIZE_MAX:
            raise AbiError(Status.INVALID_ARGUMENT, f"{size} bytes of entropy")
        try:
            if self.descriptor < 0:
                return os.getrandom(size, os.GRND_NONBLOCK)
            return os.read(self.descriptor, size)
        except BlockingIOError:
            return b""  # none at hand
        except OSError as error:
            raise AbiError(Status.DEVICE_FAILED, f"{self.granted.name}: {error.strerror}") from None

    def close(self) -> None:
        """No slot names it any more."""
        if self.descriptor >= 0:
            os.close(self.descriptor)


class Window:
    """A register window of a device, over a mapping that its holder has, and the memory that the
    device reads and writes, over another one.

    No device of a Linux host has one; in a virtual machine of ours init hands them over.
    """

    __slots__ = ("_area", "_registers", "granted", "length")

    kind: Final = CapKind.DEVICE

    def __init__(
        self, granted: Granted, registers: "ctypes.Array[ctypes.c_ubyte]", area: DmaArea
    ) -> None:
        assert len(registers) % PAGE_SIZE == 0, "a window is whole pages"
        self.granted = granted
        self.length = len(registers)  # bytes
        self._registers = registers
        self._area = area

    def map(self, offset: int, *, execute: bool) -> "Registers":
        """Refuses as DeviceMap."""
        if offset % PAGE_SIZE:
            raise AbiError(Status.INVALID_ARGUMENT, f"offset {offset} is inside a page")
        if execute:
            raise AbiError(Status.PERMISSION_DENIED, "registers are not executed")
        if not 0 <= offset < self.length:
            raise AbiError(Status.PERMISSION_DENIED, f"offset {offset} of {self.length}")
        return Registers(self._registers, offset)

    def dma(self) -> DmaArea:
        """The area, the same each time."""
        return self._area

    def close(self) -> None:
        """No slot names it any more; mappings that are out stay until they are let go."""


class Registers:
    """abi.RegisterWindow over a shared mapping. Each access is one load or store of 32 bits:
    ctypes copies four aligned bytes, which compilers make a single instruction of."""

    __slots__ = ("_words", "length")

    def __init__(self, array: "ctypes.Array[ctypes.c_ubyte]", offset: int = 0) -> None:
        self.length = len(array) - offset
        words = (ctypes.c_uint32 * (self.length // WORD_SIZE)).from_buffer(array, offset)
        self._words: ctypes.Array[ctypes.c_uint32] | None = words

    def read(self, offset: int) -> int:
        """A register's value. Raises ValueError."""
        words, index = self._at(offset)
        value: int = words[index]
        return value

    def write(self, offset: int, value: int) -> None:
        """Set a register. Raises ValueError, also for a value that is no 32-bit word."""
        words, index = self._at(offset)
        if not 0 <= value < 1 << 8 * WORD_SIZE:
            raise ValueError(f"{value:#x} is no 32-bit word")
        words[index] = value

    def end(self) -> None:
        """Give the window back; every later access is a ValueError."""
        self._words = None

    def _at(self, offset: int) -> "tuple[ctypes.Array[ctypes.c_uint32], int]":
        if self._words is None:
            raise ValueError("the mapping has ended")
        if offset % WORD_SIZE or not 0 <= offset < self.length:
            raise ValueError(f"no register at {offset:#x} of {self.length:#x}")
        return self._words, offset // WORD_SIZE


Device = Block | Source | Window
"""What a slot of the bus map's kinds can name."""


def adopt_device(granted: Granted, descriptor: int) -> Device:
    """The object behind a slot, made by its holder; `descriptor` is -1 where there is none."""
    if granted.mapped is not None:
        registers, length, memory, addresses = granted.mapped
        view = memoryview(at_address(memory, len(addresses) * PAGE_SIZE)).cast("B")
        return Window(granted, at_address(registers, length), DmaArea(view, addresses))
    if granted.kind is HardwareKind.BLOCK:
        return Block(granted, descriptor)
    assert granted.kind is HardwareKind.ENTROPY, "init hands over no other kind"
    return Source(granted, descriptor)


def _refusal(error: OSError) -> AbiError:
    """The status of a failed read or write."""
    text = error.strerror or str(error)
    if error.errno in FULL_ERRORS:
        return AbiError(Status.NO_SPACE, text)
    if error.errno in READ_ONLY_ERRORS:
        return AbiError(Status.PERMISSION_DENIED, text)
    return AbiError(Status.DEVICE_FAILED, text)


def _nobody_asks(_error: str) -> None:
    """Until there is a port to tell init by."""


assert BLOCK_TRANSFER_MAX >= mmap.PAGESIZE, "a transfer is at least a page of the cache"
