"""A new device: a first set in slot a, the trust anchor, and the record that says so.

The record comes last: cut off anywhere, there is none, and the device is provisioned once more.
Over an older record the same holds, for what the old one says of slot a is not true any more.
Nothing is verified here; whoever provisions has verified the update against the anchor.
"""

from hashlib import sha256
from typing import Final, Protocol

from nexus.abi import BLOCK_SIZE
from nexus.bootctl.contract import BootControl
from nexus.bootctl.record import BootRecord, SlotInfo, provisioned
from nexus.drivers import BlockDevice, DeviceFault
from nexus.drivers.block import Fault

PIECE_SIZE: Final = 1 << 20  # bytes copied at a time, and in memory

assert PIECE_SIZE % BLOCK_SIZE == 0


class Source(Protocol):
    """The set file."""

    @property
    def size(self) -> int:
        """Bytes of it."""
        ...

    async def read_at(self, offset: int, size: int) -> bytes:
        """Exactly `size` bytes, within the file."""
        ...


async def provision(
    control: BootControl,
    slot_a: BlockDevice,
    source: Source,
    info: SlotInfo,
    anchor: bytes,
    *,
    wall: int = 0,
) -> BootRecord:
    """Make a device boot this set from slot a and trust this root.json; the record in force.

    `info` is of the set, with its size and digest; `wall` is ns since 1970, or 0. Raises
    DeviceFault, also if the slot is too small or other bytes come back.
    """
    if source.size != info.size or info.size > slot_a.block_count * BLOCK_SIZE:
        raise DeviceFault(
            Fault.NO_SPACE,
            f"the set has {source.size} bytes, slot a has {slot_a.block_count * BLOCK_SIZE}",
        )
    for offset in range(0, info.size, PIECE_SIZE):
        piece = await source.read_at(offset, min(PIECE_SIZE, info.size - offset))
        await slot_a.write(offset // BLOCK_SIZE, piece + bytes(-len(piece) % BLOCK_SIZE))
    await slot_a.flush()
    if await _digest(slot_a, info.size) != info.digest:
        raise DeviceFault(Fault.IO, "slot a does not hold what was written to it")
    await control.write_anchor(anchor)
    return await control.create(provisioned(info, wall=wall))


async def _digest(device: BlockDevice, size: int) -> bytes:
    digest = sha256()
    for offset in range(0, size, PIECE_SIZE):
        count = min(PIECE_SIZE, size - offset)
        data = await device.read(offset // BLOCK_SIZE, -(-count // BLOCK_SIZE))
        digest.update(memoryview(data)[:count])
    return digest.digest()
