"""A block device that the kernel drives: a device node or a file on linux."""

from typing import Final, TypeVar

from nexus.abi import (
    BLOCK_SIZE,
    BLOCK_TRANSFER_MAX,
    AbiError,
    BlockFlush,
    BlockRead,
    BlockWrite,
    DeviceInfo,
    Nanos,
    Now,
    Slot,
    Status,
    Trap,
)
from nexus.drivers.block import REQUEST_MAX, DeviceFault, Fault, check_range, whole_blocks

FAULTS: Final = {
    Status.DEVICE_FAILED: Fault.IO,
    Status.TIMED_OUT: Fault.TIMED_OUT,
    Status.NO_SPACE: Fault.NO_SPACE,
    Status.INVALID_ARGUMENT: Fault.OUT_OF_RANGE,  # the device has become smaller
}

ResultT = TypeVar("ResultT")


class KernelBlock:
    """drivers.BlockDevice on the block traps."""

    def __init__(self, slot: Slot, info: DeviceInfo) -> None:
        self._slot = slot
        self._info = info
        self.backing: Final = info.backing

    @property
    def block_count(self) -> int:
        """How many blocks it has."""
        return self._info.block_count

    @property
    def writable(self) -> bool:
        """Whether it can be written at all."""
        return self._info.writable

    async def read(self, block: int, count: int) -> bytes:
        """`count` blocks from `block` on."""
        check_range(block, count, self.block_count)
        parts = []
        for at, size in _transfers(block, count * BLOCK_SIZE):
            blocks = size // BLOCK_SIZE
            part = await _done(BlockRead(self._slot, at, blocks, await _until()))
            assert len(part) == size, "a read is all or nothing"
            parts.append(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def write(
        self, block: int, data: bytes | bytearray | memoryview, *, durable: bool = False
    ) -> None:
        """Write whole blocks. What takes several traps is made durable once, at the end."""
        check_range(block, whole_blocks(data), self.block_count)
        self._check_writable()
        view = memoryview(data).cast("B")
        transfers = _transfers(block, len(view))
        at_once = durable and len(transfers) == 1
        done = 0
        for at, size in transfers:
            part = view[done : done + size]
            await _done(BlockWrite(self._slot, at, part, await _until(), durable=at_once))
            done += size
        if durable and not at_once:
            await self.flush()

    async def flush(self) -> None:
        """Everything written before survives a power cut on return."""
        self._check_writable()
        await _done(BlockFlush(self._slot, await _until()))

    def _check_writable(self) -> None:
        if not self.writable:
            raise DeviceFault(Fault.READ_ONLY)


def _transfers(block: int, size: int) -> list[tuple[int, int]]:
    """First block and bytes of each trap."""
    return [
        (block + done // BLOCK_SIZE, min(BLOCK_TRANSFER_MAX, size - done))
        for done in range(0, size, BLOCK_TRANSFER_MAX)
    ]


async def _until() -> Nanos:
    return Nanos(await Now() + REQUEST_MAX)


async def _done(trap: Trap[ResultT]) -> ResultT:
    """The trap's result, or the fault its refusal stands for."""
    try:
        return await trap
    except AbiError as error:
        if error.status is Status.PERMISSION_DENIED and not isinstance(trap, BlockRead):
            raise DeviceFault(Fault.READ_ONLY) from error
        fault = FAULTS.get(error.status)
        if fault is None:
            raise  # no device to drive by this slot: a bug
        raise DeviceFault(fault, str(error)) from error
