"""A block device on the model of a disk, for code that stores things and no kernel around it."""

from nexus.abi import BLOCK_SIZE
from nexus.drivers import DeviceFault, Fault
from nexus.kernel.sim.disk import Disk, DiskError, DiskErrorKind

FAULTS = {
    DiskErrorKind.IO: Fault.IO,
    DiskErrorKind.NO_SPACE: Fault.NO_SPACE,
    DiskErrorKind.READ_ONLY: Fault.READ_ONLY,
    DiskErrorKind.OUT_OF_RANGE: Fault.OUT_OF_RANGE,
}


class DiskDevice:
    """drivers.BlockDevice; counts what it was asked. `writable` is what it says of itself."""

    def __init__(self, disk: Disk, *, writable: bool = True) -> None:
        self.disk = disk
        self.writable = writable
        self.reads = 0
        self.writes = 0
        self.flushes = 0

    @property
    def block_count(self) -> int:
        return self.disk.block_count

    async def read(self, block: int, count: int) -> bytes:
        self.reads += 1
        try:
            return bytes(self.disk.read(block, count))
        except DiskError as error:
            raise DeviceFault(FAULTS[error.kind]) from error

    async def write(
        self, block: int, data: bytes | bytearray | memoryview, *, durable: bool = False
    ) -> None:
        if not self.writable:
            raise DeviceFault(Fault.READ_ONLY)
        assert len(data) % BLOCK_SIZE == 0
        self.writes += 1
        try:
            self.disk.write(block, bytes(data), durable=durable)
        except DiskError as error:
            raise DeviceFault(FAULTS[error.kind]) from error

    async def flush(self) -> None:
        if not self.writable:
            raise DeviceFault(Fault.READ_ONLY)
        self.flushes += 1
        try:
            self.disk.flush()
        except DiskError as error:
            raise DeviceFault(FAULTS[error.kind]) from error
