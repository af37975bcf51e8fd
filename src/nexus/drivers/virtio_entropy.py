"""A virtio entropy device, driven through its registers.

Memory: page 0 is the queue, page 1 takes the bytes and is wiped after each draw. The driver keeps
no byte. Source: Virtual I/O Device 1.2, 5.4.
"""

from typing import Final

from nexus.abi import PAGE_SIZE, DmaArea, HardwareKind, Nanos, Now, RegisterWindow
from nexus.drivers.entropy import DRAW_MAX, DRAW_SIZE_MAX
from nexus.drivers.virtio import Piece, Virtio, VirtioDevice

DATA_PAGE: Final = 1
DATA_AT: Final = DATA_PAGE * PAGE_SIZE


class VirtioEntropy(VirtioDevice):
    """drivers.EntropyDevice on a register window. A queue of one entry is enough for it."""

    def __init__(self, window: RegisterWindow, area: DmaArea) -> None:
        super().__init__(Virtio(window, area, HardwareKind.ENTROPY, 0, pieces_max=1))

    @classmethod
    async def open(cls, window: RegisterWindow, area: DmaArea) -> "VirtioEntropy":
        """Bring the device up."""
        device = cls(window, area)
        await device._virtio.begin(Nanos(await Now() + DRAW_MAX))
        return device

    async def draw(self, size: int, deadline: Nanos) -> bytearray:
        """At most `size` bytes; see drivers.EntropyDevice."""
        assert 1 <= size <= DRAW_SIZE_MAX
        until = min(deadline, Nanos(await Now() + DRAW_MAX))
        await self._virtio.begin(until)
        room = self._virtio.view[DATA_AT : DATA_AT + size]
        # Wiped before as well: a device that was reset may have written after the last wipe.
        room[:] = bytes(size)
        try:
            written = await self._virtio.perform(
                [Piece(DATA_PAGE, 0, size, device_writes=True)], until
            )
            return bytearray(room[:written])
        finally:
            room[:] = bytes(size)
