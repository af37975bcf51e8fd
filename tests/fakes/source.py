"""An entropy source without a device: good bytes, and whatever a test makes of them."""

import hashlib
from collections.abc import Callable

from nexus.abi import Nanos, Now, SleepUntil
from nexus.drivers import DRAW_SIZE_MAX, DeviceFault, Fault

Lie = Callable[[bytes], bytes]
"""What the source delivers instead of these bytes."""


class ScriptedSource:
    """Delivers a fixed stream that looks random. `lie` changes each delivery, `fault` is raised
    instead of one, `delay` ns pass before each."""

    def __init__(self) -> None:
        self.backing = "scripted"
        self.drawn = 0  # deliveries
        self.delivered = 0  # bytes
        self.stream = b""  # of all deliveries
        self.lie: Lie | None = None
        self.fault: Fault | None = None
        self.delay = 0

    async def draw(self, size: int, deadline: Nanos) -> bytearray:
        assert 1 <= size <= DRAW_SIZE_MAX
        if self.delay:
            due = Nanos(await Now() + self.delay)
            _ = await SleepUntil(min(due, deadline))
            if due > deadline:
                raise DeviceFault(Fault.TIMED_OUT)
        if self.fault is not None:
            raise DeviceFault(self.fault)
        self.drawn += 1
        data = good(self.drawn, size)
        if self.lie is not None:
            data = self.lie(data)
        self.stream += data
        self.delivered += len(data)
        return bytearray(data)


def good(number: int, size: int) -> bytes:
    """The bytes of the delivery with that number: the same in each run."""
    return hashlib.shake_256(number.to_bytes(8, "little")).digest(size)
