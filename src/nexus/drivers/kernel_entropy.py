"""An entropy source that the kernel drives: hardware, or getrandom, on linux."""

from typing import Final

from nexus.abi import AbiError, DeviceInfo, EntropyDraw, Nanos, Now, SleepUntil, Slot, Status
from nexus.drivers.block import DeviceFault, Fault
from nexus.drivers.entropy import DRAW_MAX, DRAW_SIZE_MAX

FAULTS: Final = {Status.DEVICE_FAILED: Fault.IO, Status.TIMED_OUT: Fault.TIMED_OUT}
PAUSE_LEAST: Final = Nanos(50_000)  # ns; Linux's virtio_rng has its next 64 bytes after 0.2 ms
PAUSE_MAX: Final = Nanos(2_000_000)  # ns between looks at a slow generator; each doubles the last


class KernelEntropy:
    """drivers.EntropyDevice on the trap EntropyDraw.

    The trap waits for nothing: a hardware generator gives what it has at hand, 64 bytes or none.
    So one draw here is as many traps as it takes, with pauses after those that gave nothing.
    Their bytes are `bytes`, which CPython cannot wipe: each is dropped at once, and its memory is
    given to whatever comes next.
    """

    def __init__(self, slot: Slot, info: DeviceInfo) -> None:
        self._slot = slot
        self.backing: Final = info.backing

    async def draw(self, size: int, deadline: Nanos) -> bytearray:
        """At most `size` bytes; see drivers.EntropyDevice. Nothing at all in time is TIMED_OUT."""
        assert 1 <= size <= DRAW_SIZE_MAX
        now = await Now()
        until = min(deadline, Nanos(now + DRAW_MAX))
        gathered, done = bytearray(size), 0
        pause = PAUSE_LEAST
        while done < size:  # ends: by `until`, and each turn without a pause brings a byte
            part = await self._part(size - done)
            gathered[done : done + len(part)] = part
            done += len(part)
            if part:
                pause = PAUSE_LEAST
                continue
            if now >= until:
                break
            now = await SleepUntil(min(until, Nanos(now + pause)))
            pause = min(Nanos(2 * pause), PAUSE_MAX)
        if not done:
            raise DeviceFault(Fault.TIMED_OUT, "no entropy at hand")
        del gathered[done:]
        return gathered

    async def _part(self, size: int) -> bytes:
        """What is at hand, at most `size` bytes."""
        try:
            part = await EntropyDraw(self._slot, size)
        except AbiError as error:
            fault = FAULTS.get(error.status)
            if fault is None:
                raise  # no source to draw from by this slot: a bug
            raise DeviceFault(fault, str(error)) from error
        if len(part) > size:
            raise DeviceFault(Fault.IO, f"it delivered {len(part)} bytes of {size}")
        return part
