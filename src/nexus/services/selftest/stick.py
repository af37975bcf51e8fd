"""What the runner puts on the block device `stick`: updates, good ones and others, and where each
begins."""

from typing import Final

import msgspec

from nexus.abi import BLOCK_SIZE, DeviceQuery, Slot
from nexus.drivers import BlockDevice, DeviceFault, open_block
from nexus.services.selftest.climb import Climb
from nexus.services.selftest.rung import RungFailed

STICK: Final = "stick"
INDEX_BLOCKS: Final = 16  # 8 KiB at the beginning: the index as JSON, and zeros
READ_BLOCKS: Final = 128  # of one read: 64 KiB
GOOD: Final = "good"
LOW: Final = "below the floor"
BAD: Final = "bad"  # one of its services never becomes ready


class Update(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An update on the stick: block and size of its metadata, and of its set (0 bytes if there is
    none to be sent). `refused` is the name of the status that updated has for it, "" for none."""

    metadata: tuple[int, int]
    content: tuple[int, int]
    version: int
    name: str
    digest: str
    refused: str = ""


Index = dict[str, Update]


def encode_index(index: Index) -> bytes:
    """The first blocks of a stick."""
    data = msgspec.json.encode(index)
    assert len(data) <= INDEX_BLOCKS * BLOCK_SIZE, f"an index of {len(data)} bytes"
    return data.ljust(INDEX_BLOCKS * BLOCK_SIZE, b"\0")


def decode_index(data: bytes) -> Index:
    """The index in the first blocks of a stick. Raises msgspec.DecodeError."""
    return msgspec.json.decode(data.rstrip(b"\0"), type=Index)


class Stick:
    """The stick, as this client reads it."""

    def __init__(self, device: BlockDevice, index: Index) -> None:
        self._device = device
        self.index = index

    async def metadata(self, name: str) -> bytes:
        """The metadata of an update."""
        return await self._read(*self.index[name].metadata)

    async def content(self, name: str, offset: int, size: int) -> bytes:
        """`size` bytes of an update's set from `offset` on, a multiple of the block size."""
        block, whole = self.index[name].content
        first, rest = divmod(offset, BLOCK_SIZE)
        assert not rest, "whole blocks"
        return await self._read(block + first, min(size, whole - offset))

    async def _read(self, block: int, size: int) -> bytes:
        count = -(-size // BLOCK_SIZE)
        data = bytearray()
        try:
            for at in range(0, count, READ_BLOCKS):
                data += await self._device.read(block + at, min(READ_BLOCKS, count - at))
        except DeviceFault as fault:
            raise RungFailed(f"the stick cannot be read: {fault}") from fault
        return bytes(data[:size])


async def device_named(climb: Climb, name: str) -> Slot | None:
    """The device of this client that has this name; None where the ground has none."""
    for slot in climb.boot.hardware:
        if (await DeviceQuery(slot)).name == name:
            return slot
    return None


async def open_stick(climb: Climb) -> Stick:
    """The stick, which is kept. Fails the rung if it cannot be read."""
    if climb.stick is None:
        slot = await device_named(climb, STICK)
        if slot is None:
            raise RungFailed("no stick was granted")
        try:
            device = await open_block(slot)
            index = decode_index(await device.read(0, INDEX_BLOCKS))
        except (DeviceFault, msgspec.DecodeError) as error:
            raise RungFailed(f"the stick holds no index: {error}") from error
        climb.stick = Stick(device, index)
    return climb.stick
