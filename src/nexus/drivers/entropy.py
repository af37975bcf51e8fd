"""What an entropy device is to the code that draws from it."""

from typing import Final, Protocol

from nexus.abi import ENTROPY_SIZE_MAX, PAGE_SIZE, Nanos

DRAW_SIZE_MAX: Final = 256  # bytes of one draw; every source delivers as much at once
DRAW_MAX: Final = Nanos(80_000_000)  # ns a device may take for one draw (services.md 7.5)

assert DRAW_SIZE_MAX <= ENTROPY_SIZE_MAX, "one trap draws it"
assert DRAW_SIZE_MAX <= PAGE_SIZE, "one piece of memory takes it"


class EntropyDevice(Protocol):
    """A source of raw bytes, which nobody has tested yet."""

    @property
    def backing(self) -> str:
        """What delivers them: "virtio-mmio", "hwrng" or "getrandom"."""
        ...

    async def draw(self, size: int, deadline: Nanos) -> bytearray:
        """1..DRAW_SIZE_MAX bytes: as many as it delivers, at most `size`, perhaps none.

        They are the caller's to wipe; the driver keeps none. Raises DeviceFault.
        """
        ...
