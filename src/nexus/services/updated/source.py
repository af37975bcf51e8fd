"""A set file in a slot, as nexus.sets reads it."""

from typing import Final

from nexus.abi import BLOCK_SIZE
from nexus.drivers import BlockDevice

WINDOW_SIZE: Final = 1024 * 1024  # bytes read ahead: one transfer of the kernel's


class SlotSource:
    """nexus.sets.Source over the first `size` bytes of a slot. Raises DeviceFault.

    It keeps one window in memory, so that reading on in small pieces costs a few transfers.
    """

    def __init__(self, device: BlockDevice, size: int) -> None:
        assert 0 <= size <= device.block_count * BLOCK_SIZE, "the set is inside the slot"
        self.size = size
        self._device = device
        self._start = 0
        self._window = b""

    async def read_at(self, offset: int, size: int) -> bytes:
        """As Source."""
        size = min(size, max(0, self.size - offset))
        at = offset - self._start
        if at >= 0 and at + size <= len(self._window):
            return self._window[at : at + size]
        if size == 0:
            return b""
        first = offset // BLOCK_SIZE
        until = min(max(offset + size, first * BLOCK_SIZE + WINDOW_SIZE), self.size)
        self._window = await self._device.read(first, -(-until // BLOCK_SIZE) - first)
        self._start = first * BLOCK_SIZE
        at = offset - self._start
        return self._window[at : at + size]
