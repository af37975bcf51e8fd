"""The trust anchor on the boot device: the root metadata a device was provisioned with.

It stands outside of every set and slot, in two copies behind the record's (boot-format.md), is
written when a device is provisioned and only read from then on.
"""

from struct import Struct
from typing import Final

from nexus.abi import BLOCK_SIZE
from nexus.bootctl.contract import BOOT_BLOCKS_MIN
from nexus.drivers import BlockDevice, DeviceFault, Fault
from nexus.drivers.crc import crc32c

ANCHOR_MAGIC: Final = b"NXTA"
ANCHOR_VERSION: Final = 1
ANCHOR_COPIES: Final = (64, 96)  # blocks where they begin
ANCHOR_BLOCKS: Final = 32  # of each
_HEAD: Final = Struct("<4sIII")  # magic, CRC, version, size
_CRC_END: Final = 8
ANCHOR_SIZE_MAX: Final = ANCHOR_BLOCKS * BLOCK_SIZE - _HEAD.size  # bytes

assert ANCHOR_COPIES[0] + ANCHOR_BLOCKS <= ANCHOR_COPIES[1]
assert ANCHOR_COPIES[1] + ANCHOR_BLOCKS <= BOOT_BLOCKS_MIN


class NoAnchor(Exception):
    """The device holds no trust anchor: it trusts nothing, and takes no update."""


def encode_anchor(data: bytes) -> bytes:
    """One copy of an anchor."""
    assert 0 < len(data) <= ANCHOR_SIZE_MAX, f"an anchor of {len(data)} bytes"
    head = _HEAD.pack(ANCHOR_MAGIC, 0, ANCHOR_VERSION, len(data))
    copy = (head + data).ljust(ANCHOR_BLOCKS * BLOCK_SIZE, b"\0")
    return copy[:4] + crc32c(copy[_CRC_END:]).to_bytes(4, "little") + copy[_CRC_END:]


def decode_anchor(copy: bytes) -> bytes | str:
    """The anchor in a copy, or in what way it is none."""
    magic, checksum, version, size = _HEAD.unpack_from(copy)
    if magic != ANCHOR_MAGIC:
        return "there is none"
    if checksum != crc32c(copy[_CRC_END:]):
        return "its checksum is wrong"
    if version != ANCHOR_VERSION:
        return f"its format is {version}, not {ANCHOR_VERSION}"
    data = copy[_HEAD.size : _HEAD.size + size]
    if not 0 < size <= ANCHOR_SIZE_MAX or encode_anchor(data) != copy:
        return "it is none that is ever written"
    return data


async def read_anchor(device: BlockDevice) -> bytes:
    """The anchor of a boot device, from whichever copy is whole. Raises NoAnchor."""
    problems = []
    for number, block in enumerate(ANCHOR_COPIES, 1):
        try:
            found = decode_anchor(await device.read(block, ANCHOR_BLOCKS))
        except DeviceFault as fault:
            found = str(fault)
        if isinstance(found, bytes):
            return found
        problems.append(f"copy {number}: {found}")
    raise NoAnchor("; ".join(problems))


async def write_anchor(device: BlockDevice, data: bytes) -> None:
    """Write both copies, durably, and read them back. Raises DeviceFault."""
    copy = encode_anchor(data)
    for block in ANCHOR_COPIES:
        await write_back(device, block, copy)


async def write_back(device: BlockDevice, block: int, data: bytes) -> None:
    """Write durably and read back. Raises DeviceFault, also if other bytes come back."""
    await device.write(block, data, durable=True)
    if await device.read(block, len(data) // BLOCK_SIZE) != data:
        raise DeviceFault(Fault.IO, f"what was written at block {block} does not come back")
