"""The boot device and the slots on Linux, for the loader: images or device nodes, by plain calls.

No service runs while the loader works, but the last holder of the boot device may be dying: the
lock that the kernel backend takes for it is waited for. A look beside a running system takes none
and writes nothing; of the record's two copies one is whole at any time.
"""

import errno
import fcntl
import os
import stat
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Event as Pause
from typing import Final

from nexus.abi import BLOCK_SIZE
from nexus.bootctl import SlotName
from nexus.drivers.block import BlockDevice, DeviceFault, Fault, check_range, whole_blocks

IMAGE_SUFFIX: Final = ".img"  # as nexus.kernel.linux.hardware names an image
BOOT_NAME: Final = "boot"
LOCK_WAIT: Final = (
    5_000_000_000  # ns for a killed holder to be gone; it is a matter of milliseconds
)
LOCK_POLL: Final = 0.005  # seconds; flock has no deadline
FLAGS: Final = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY


def boot_path(state: Path) -> Path:
    """Where the boot device of a system is that keeps its things in `state`."""
    return state / f"{BOOT_NAME}{IMAGE_SUFFIX}"


def slot_path(state: Path, name: SlotName) -> Path:
    """Where a slot is."""
    return state / f"slot-{name.value}{IMAGE_SUFFIX}"


class FileBlock:
    """drivers.BlockDevice on a descriptor. Its coroutines never wait."""

    def __init__(self, descriptor: int, *, writable: bool) -> None:
        self._descriptor = descriptor
        self.writable = writable
        self.block_count = os.lseek(descriptor, 0, os.SEEK_END) // BLOCK_SIZE

    async def read(self, block: int, count: int) -> bytes:
        """`count` blocks from `block` on."""
        check_range(block, count, self.block_count)
        size = count * BLOCK_SIZE
        parts = []
        while size:
            offset = (block + count) * BLOCK_SIZE - size
            try:
                part = os.pread(self._descriptor, size, offset)
            except OSError as error:
                raise _fault(error) from error
            if not part:
                raise DeviceFault(Fault.IO, "it ends earlier than it said")
            parts.append(part)
            size -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def write(
        self, block: int, data: bytes | bytearray | memoryview, *, durable: bool = False
    ) -> None:
        """Write whole blocks."""
        check_range(block, whole_blocks(data), self.block_count)
        if not self.writable:
            raise DeviceFault(Fault.READ_ONLY)
        rest = memoryview(data).cast("B")
        offset = block * BLOCK_SIZE
        try:
            while rest:
                written = os.pwrite(self._descriptor, rest, offset)
                offset += written
                rest = rest[written:]
        except OSError as error:
            raise _fault(error) from error
        if durable:
            await self.flush()

    async def flush(self) -> None:
        """Everything written before survives a power cut on return."""
        try:
            os.fdatasync(self._descriptor)
        except OSError as error:
            raise _fault(error) from error


@contextmanager
def opened(path: Path, *, writable: bool = False) -> Iterator[FileBlock]:
    """A device, held alone if it is to be written. Raises DeviceFault.

    One that is worn out or write-protected is opened all the same, and says what it is when it is
    written.
    """
    descriptor, can_write = _open(path, writable=writable)
    try:
        mode = os.fstat(descriptor).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            raise DeviceFault(Fault.REFUSED, f"{path} is neither a file nor a block device")
        if writable:
            _hold(descriptor, path)
        yield FileBlock(descriptor, writable=can_write)
    finally:
        os.close(descriptor)


def _open(path: Path, *, writable: bool) -> tuple[int, bool]:
    """A descriptor, and whether it can be written."""
    try:
        if not writable:
            return os.open(path, FLAGS | os.O_RDONLY), False
        try:
            return os.open(path, FLAGS | os.O_RDWR), True
        except OSError as error:
            if error.errno != errno.EROFS:
                raise
            return os.open(path, FLAGS | os.O_RDONLY), False
    except OSError as error:
        raise _fault(error, path) from error


class Missing:
    """drivers.BlockDevice in place of one that cannot be opened."""

    block_count: Final = 0
    writable: Final = False

    def __init__(self, fault: DeviceFault) -> None:
        self._fault = fault

    async def read(self, block: int, count: int) -> bytes:
        """Why it is missing."""
        del block, count
        raise self._fault

    async def write(
        self, block: int, data: bytes | bytearray | memoryview, *, durable: bool = False
    ) -> None:
        """Why it is missing."""
        del block, data, durable
        raise self._fault

    async def flush(self) -> None:
        """Why it is missing."""
        raise self._fault


@contextmanager
def opened_slot(path: Path) -> Iterator[BlockDevice]:
    """A slot to read; one that cannot be opened is no reason not to boot the other one."""
    with ExitStack() as stack:
        try:
            device: BlockDevice = stack.enter_context(opened(path))
        except DeviceFault as fault:
            device = Missing(fault)
        yield device


def _hold(descriptor: int, path: Path) -> None:
    deadline = time.monotonic_ns() + LOCK_WAIT
    pause = Pause()
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic_ns() >= deadline:
                raise DeviceFault(Fault.REFUSED, f"another system uses {path}") from error
            _ = pause.wait(LOCK_POLL)
        else:
            return


def _fault(error: OSError, path: Path | None = None) -> DeviceFault:
    fault = Fault.NO_SPACE if error.errno in (errno.ENOSPC, errno.EDQUOT) else Fault.IO
    where = "" if path is None else f"{path}: "
    return DeviceFault(fault, f"{where}{error.strerror or error}")
