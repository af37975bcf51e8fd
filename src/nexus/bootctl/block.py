"""The boot-control record on a block device of its own, in two copies.

A copy is 8 KiB: a header with magic, checksum, version, size and sequence, and the record as
MessagePack (boot-format.md). Of two whole copies the one with the higher sequence is in force. The
next record goes over the other one first, and only when that is durable and was read back over this
one too. So a write that is torn costs the record that was being written, of which nobody was told
yet, never the one before; and a copy that rots later costs nothing.
"""

from dataclasses import fields, replace
from struct import Struct
from typing import Final, NamedTuple

import msgspec

from nexus.abi import BLOCK_SIZE
from nexus.bootctl.anchor import ANCHOR_COPIES, read_anchor, write_anchor, write_back
from nexus.bootctl.contract import BOOT_BLOCKS_MIN, NoBootRecord
from nexus.bootctl.record import COUNTER_LAST, BootRecord, problem_of
from nexus.drivers import BlockDevice, DeviceFault
from nexus.drivers.crc import crc32c

MAGIC: Final = b"NXBC"
FORMAT_VERSION: Final = 1
COPY_BLOCKS: Final = 16  # 8 KiB: four reasons at their longest and everything else take 6.4
COPIES: Final = (0, 16)  # blocks where they begin: a torn physical sector takes one of them
COPY_SIZE: Final = COPY_BLOCKS * BLOCK_SIZE
_HEAD: Final = Struct("<4sIIIQ")  # magic, CRC, version, size, sequence
_CRC_END: Final = 8
BODY_SIZE_MAX: Final = COPY_SIZE - _HEAD.size

assert COPIES[0] + COPY_BLOCKS <= COPIES[1]
assert COPIES[1] + COPY_BLOCKS <= ANCHOR_COPIES[0]

_ENCODER: Final = msgspec.msgpack.Encoder()
_DECODER: Final = msgspec.msgpack.Decoder(BootRecord)
_KEYS: Final = tuple(each.name for each in fields(BootRecord) if each.name != "counted")
"""A boot loader that counts by itself does so in its environment, never here."""


def encode_record(record: BootRecord) -> bytes:
    """A copy of this record."""
    problem = problem_of(record)
    assert problem is None, problem
    assert record.counted is None, "a boot loader counts in its own environment"
    body = _ENCODER.encode({name: getattr(record, name) for name in _KEYS})
    assert len(body) <= BODY_SIZE_MAX, f"a record of {len(body)} bytes"
    head = _HEAD.pack(MAGIC, 0, FORMAT_VERSION, len(body), record.sequence)
    copy = (head + body).ljust(COPY_SIZE, b"\0")
    return copy[:4] + crc32c(copy[_CRC_END:]).to_bytes(4, "little") + copy[_CRC_END:]


class Other(NamedTuple):
    """A copy that cannot be used: why, and its sequence if it is whole and of a newer format."""

    problem: str
    sequence: int = 0

    def __str__(self) -> str:
        return self.problem


def decode_record(copy: bytes) -> BootRecord | Other:
    """The record in a copy, or in what way it is none; what is not ours to the byte is none."""
    assert len(copy) == COPY_SIZE, f"a copy of {len(copy)} bytes"
    magic, checksum, version, size, sequence = _HEAD.unpack_from(copy)
    if magic != MAGIC:
        return Other("there is none")
    if checksum != crc32c(copy[_CRC_END:]):
        return Other("its checksum is wrong")
    if version != FORMAT_VERSION:
        return Other(f"its format is {version}, not {FORMAT_VERSION}", sequence)
    if size > BODY_SIZE_MAX:
        return Other("it is larger than its copy")
    try:
        record = _DECODER.decode(copy[_HEAD.size : _HEAD.size + size])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        return Other(f"it is no record: {error}")
    problem = problem_of(record)
    if problem is not None:
        return Other(problem)
    if record.counted is not None:
        return Other("it is counted by a boot loader, which counts elsewhere")
    if encode_record(record) != copy:
        return Other("it is none that is ever written")
    return record


class BlockBoot:
    """BootControl on a block device."""

    def __init__(self, device: BlockDevice) -> None:
        self._device = device
        self._loaded: tuple[int, int] | None = None  # copy in force, and its sequence

    async def copies(self) -> tuple[BootRecord | Other, BootRecord | Other]:
        """Both copies, as they are."""
        if self._device.block_count < BOOT_BLOCKS_MIN:
            small = Other(f"a boot device has {BOOT_BLOCKS_MIN} blocks, and this one has fewer")
            return small, small
        return await self._copy(0), await self._copy(1)

    async def _copy(self, index: int) -> BootRecord | Other:
        try:
            data = await self._device.read(COPIES[index], COPY_BLOCKS)
        except DeviceFault as fault:
            return Other(str(fault))
        return decode_record(data)

    async def load(self) -> BootRecord:
        """The record in force. Raises NoBootRecord."""
        self._loaded = None
        copies = await self.copies()
        whole = [each for each in copies if isinstance(each, BootRecord)]
        problems = "; ".join(f"copy {at}: {each}" for at, each in enumerate(copies, 1))
        if not whole:
            raise NoBootRecord(problems)
        record = max(whole, key=lambda each: each.sequence)
        if any(isinstance(each, Other) and each.sequence > record.sequence for each in copies):
            # What an older release would read is what a newer one has already changed.
            raise NoBootRecord(problems)
        self._loaded = (copies.index(record), record.sequence)
        return record

    async def store(self, record: BootRecord) -> BootRecord:
        """Make the loaded record's successor the one in force, as BootControl says."""
        assert self._loaded is not None, "a record is loaded before its successor is stored"
        current, sequence = self._loaded
        assert record.sequence == sequence, "the successor of another record than the one in force"
        self._loaded = None  # until it is known which one is in force
        return await self._put(1 - current, replace(record, sequence=sequence + 1))

    async def _put(self, first: int, record: BootRecord) -> BootRecord:
        data = encode_record(record)
        for index in (first, 1 - first):
            await write_back(self._device, COPIES[index], data)
        self._loaded = (first, record.sequence)
        return record

    async def create(self, record: BootRecord) -> BootRecord:
        """Make this the record in force whatever was there, however new."""
        known = max(each.sequence for each in await self.copies())
        sequence = known + 1 if known < COUNTER_LAST else 1
        return await self._put(0, replace(record, sequence=sequence))

    async def read_anchor(self) -> bytes:
        """The trust anchor. Raises NoAnchor."""
        return await read_anchor(self._device)

    async def write_anchor(self, data: bytes) -> None:
        """Make this the trust anchor."""
        await write_anchor(self._device, data)
