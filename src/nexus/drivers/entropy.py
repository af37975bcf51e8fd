"""What an entropy device is to the code that draws from it."""

from typing import Final, Protocol

from nexus.abi import ENTROPY_SIZE_MAX, PAGE_SIZE, Nanos
from nexus.drivers.block import DeviceFault, Fault

DRAW_SIZE_MAX: Final = 256  # bytes of one draw; every source delivers as much at once
DRAW_MAX: Final = Nanos(250_000_000)
"""ns a device may take for one draw. The reference has 80 ms (services.md 7.5); but a virtio-rng
with a rate limit gives nothing for the rest of its period: 100 ms where this was measured."""
SHORT_MAX: Final = 8  # deliveries that may come short while one buffer is filled

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


async def fill(device: EntropyDevice, buffer: bytearray, until: Nanos) -> int:
    """Fill `buffer` with fresh bytes of `device`; how many deliveries that took.

    What a short delivery lacks is drawn anew, never padded or repeated. Raises DeviceFault: the
    device's own, TIMED_OUT at `until`, IO when more than SHORT_MAX deliveries come short. What then
    stands in the buffer is the caller's to wipe, as always.
    """
    done = deliveries = short = 0
    while done < len(buffer):  # ends: each turn brings a byte nearer the end, or a short one more
        asked = min(DRAW_SIZE_MAX, len(buffer) - done)
        drawn = await device.draw(asked, until)
        size = len(drawn)
        assert size <= asked, "a driver gives no more than was asked for"
        buffer[done : done + size] = drawn
        drawn[:] = bytes(size)
        done += size
        deliveries += 1
        short += size < asked
        if short > SHORT_MAX:
            raise DeviceFault(Fault.IO, f"{short} deliveries came short")
    return deliveries
