"""An entropy source that the kernel drives: hardware, or getrandom, on linux."""

from typing import Final

from nexus.abi import AbiError, DeviceInfo, EntropyDraw, Nanos, Slot, Status
from nexus.drivers.block import DeviceFault, Fault
from nexus.drivers.entropy import DRAW_SIZE_MAX

FAULTS: Final = {Status.DEVICE_FAILED: Fault.IO, Status.TIMED_OUT: Fault.TIMED_OUT}


class KernelEntropy:
    """drivers.EntropyDevice on the trap EntropyDraw.

    The trap's bytes are a `bytes`, which CPython cannot wipe: it is dropped at once, and its memory
    is given to whatever comes next.
    """

    def __init__(self, slot: Slot, info: DeviceInfo) -> None:
        self._slot = slot
        self.backing: Final = info.backing

    async def draw(self, size: int, deadline: Nanos) -> bytearray:
        """At most `size` bytes; see drivers.EntropyDevice. The kernel bounds the wait."""
        assert 1 <= size <= DRAW_SIZE_MAX
        del deadline
        try:
            drawn = bytearray(await EntropyDraw(self._slot, size))
        except AbiError as error:
            fault = FAULTS.get(error.status)
            if fault is None:
                raise  # no source to draw from by this slot: a bug
            raise DeviceFault(fault, str(error)) from error
        if len(drawn) > size:
            raise DeviceFault(Fault.IO, f"it delivered {len(drawn)} bytes of {size}")
        return drawn
