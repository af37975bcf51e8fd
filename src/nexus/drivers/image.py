"""The content of a disk as a device that is only read, for a look at it without a kernel."""

from collections.abc import Callable
from typing import Final

from nexus.abi import BLOCK_SIZE
from nexus.drivers.block import DeviceFault, Fault


class Image:
    """BlockDevice over what `read_at` gives, from an offset so many bytes, of `size` altogether."""

    writable: Final = False

    def __init__(self, read_at: Callable[[int, int], bytes], size: int) -> None:
        self._read_at = read_at
        self.block_count = size // BLOCK_SIZE

    async def read(self, block: int, count: int) -> bytes:
        """`count` blocks from `block` on."""
        if block < 0 or block + count > self.block_count:
            raise DeviceFault(Fault.OUT_OF_RANGE)
        try:
            data = self._read_at(block * BLOCK_SIZE, count * BLOCK_SIZE)
        except OSError as error:
            raise DeviceFault(Fault.IO, error.strerror or str(error)) from error
        if len(data) != count * BLOCK_SIZE:
            raise DeviceFault(Fault.IO, "it ends earlier than it said")
        return data

    async def write(
        self, block: int, data: bytes | bytearray | memoryview, *, durable: bool = False
    ) -> None:
        """Nothing is written."""
        del block, data, durable
        raise DeviceFault(Fault.READ_ONLY)

    async def flush(self) -> None:
        """Nothing was written."""
        raise DeviceFault(Fault.READ_ONLY)
