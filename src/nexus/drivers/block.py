"""What a block device is to the code that stores things on it."""

from enum import Enum
from typing import Final, Protocol

from nexus.abi import BLOCK_SIZE, Nanos

REQUEST_MAX: Final = Nanos(2_000_000_000)  # ns for one request to a device (services.md 6)


class Fault(Enum):
    """How a device failed."""

    IO = "the device reports an error"
    TIMED_OUT = "the device did not answer in time"
    READ_ONLY = "the device cannot be written"
    NO_SPACE = "there is no room under the device"
    OUT_OF_RANGE = "outside the device"
    REFUSED = "the device is not one this driver drives"
    GONE = "the device was reset under the driver"


class DeviceFault(Exception):
    """A device operation failed. Of a failed write or flush nothing is known."""

    def __init__(self, fault: Fault, detail: str = "") -> None:
        super().__init__(f"{fault.value}: {detail}" if detail else fault.value)
        self.fault = fault


class BlockDevice(Protocol):
    """Blocks of abi.BLOCK_SIZE bytes, numbered from 0. Every method raises DeviceFault."""

    @property
    def block_count(self) -> int:
        """How many blocks it has."""
        ...

    @property
    def writable(self) -> bool:
        """Whether it can be written at all."""
        ...

    async def read(self, block: int, count: int) -> bytes:
        """`count` blocks from `block` on."""
        ...

    async def write(
        self, block: int, data: bytes | bytearray | memoryview, *, durable: bool = False
    ) -> None:
        """Write whole blocks. With `durable` these bytes survive a power cut on return; earlier
        writes still need a flush."""
        ...

    async def flush(self) -> None:
        """Everything written before survives a power cut on return."""
        ...


def whole_blocks(data: bytes | bytearray | memoryview) -> int:
    """How many blocks `data` is; anything else than whole blocks is a bug."""
    size = memoryview(data).nbytes
    assert size % BLOCK_SIZE == 0, f"{size} bytes are no whole blocks"
    return size // BLOCK_SIZE


def check_range(block: int, count: int, block_count: int) -> None:
    """Raises OUT_OF_RANGE unless there are at least one block, and all of them on the device."""
    if block < 0 or count < 1 or block + count > block_count:
        raise DeviceFault(Fault.OUT_OF_RANGE, f"{count} blocks at {block} of {block_count}")
