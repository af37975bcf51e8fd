"""The boot-control record in a U-Boot environment, for boards whose boot loader counts the tries.

The redundant environment as U-Boot and its tools keep it: twice CRC-32 (of the data alone), a flags
byte that the newer copy has one higher, and `name=value` with a zero byte behind each. The record
is in variables of its own (boot-format.md), as text that U-Boot's scripts, fw_printenv and
fw_setenv read and write; all other variables stay as they are.

Source: doc/usage/environment.rst and env/common.c of U-Boot; uboot_env.c of libubootenv.
"""

import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Final, NamedTuple

from nexus.abi import BLOCK_SIZE
from nexus.bootctl.anchor import ANCHOR_COPIES, read_anchor, write_anchor, write_back
from nexus.bootctl.contract import BOOT_BLOCKS_MIN, NoBootRecord
from nexus.bootctl.record import (
    COUNT_MAX,
    COUNTER_LAST,
    DETAIL_SIZE_MAX,
    DIGEST_SIZE,
    NAME_SIZE_MAX,
    NO_DIGEST,
    NO_TRACE,
    REASONS_MAX,
    TAIL_SIZE_MAX,
    TRACE_SIZE,
    BootRecord,
    Cause,
    Counted,
    Reason,
    SlotInfo,
    SlotName,
    SlotState,
    problem_of,
)
from nexus.drivers import BlockDevice, DeviceFault, Fault

ENVIRONMENT_BLOCKS: Final = 32  # 16 KiB of each copy, a usual CONFIG_ENV_SIZE
ENVIRONMENT_COPIES: Final = (0, 32)  # blocks where they begin
ENVIRONMENT_SIZE: Final = ENVIRONMENT_BLOCKS * BLOCK_SIZE
DATA_AT: Final = 5  # bytes: CRC-32, little-endian as the machine's own, and flags
DATA_SIZE: Final = ENVIRONMENT_SIZE - DATA_AT
PREFIX: Final = "nexus_"
FORMAT: Final = "1"  # of the variables

assert ENVIRONMENT_COPIES[0] + ENVIRONMENT_BLOCKS <= ENVIRONMENT_COPIES[1]
assert ENVIRONMENT_COPIES[1] + ENVIRONMENT_BLOCKS <= ANCHOR_COPIES[0]

Variables = dict[str, str]

_NUMBER: Final = re.compile(r"0|[1-9][0-9]{0,18}")
_ESCAPED: Final = re.compile(r"\\(\\|n|x[0-9a-f]{2})")
_CONTROL: Final = re.compile(r"[\\\x00-\x1f\x7f]")


class _Strange(Exception):
    """A variable that is missing or says what none of ours says."""


class Copy(NamedTuple):
    """A copy of the environment whose checksum is right."""

    flags: int
    variables: Variables


def encode_environment(flags: int, variables: Mapping[str, str]) -> bytes:
    """A copy with these variables. Raises ValueError if they do not fit."""
    data = b"".join(
        f"{name}={value}".encode("latin-1") + b"\0" for name, value in sorted(variables.items())
    )
    if len(data) >= DATA_SIZE:
        raise ValueError(f"{len(data)} bytes of variables")
    data = data.ljust(DATA_SIZE, b"\0")
    return zlib.crc32(data).to_bytes(4, "little") + bytes([flags]) + data


def decode_environment(copy: bytes) -> Copy | str:
    """The variables of a copy, or in what way it is none. As in U-Boot the last of a name counts.

    They are text of single bytes: what U-Boot does not look into comes back to the byte.
    """
    assert len(copy) == ENVIRONMENT_SIZE, f"a copy of {len(copy)} bytes"
    data = copy[DATA_AT:]
    if int.from_bytes(copy[:4], "little") != zlib.crc32(data):
        return "its checksum is wrong"
    variables: Variables = {}
    for entry in data.split(b"\0"):
        if not entry:
            break  # an empty one is the end
        name, is_one, value = entry.decode("latin-1").partition("=")
        if is_one and name:
            variables[name] = value
    return Copy(copy[4], variables)


class EnvironmentBoot:
    """BootControl in a redundant U-Boot environment.

    U-Boot's tools write one copy by turns, and so does this: a copy that rots later costs the
    latest change. The texts of reasons go, the oldest first, where other variables leave no room.
    """

    def __init__(self, device: BlockDevice) -> None:
        self._device = device
        self._loaded: int | None = None  # sequence

    async def load(self) -> BootRecord:
        """The record in force. Raises NoBootRecord."""
        self._loaded = None
        _, copy = await self._current()
        record = _record_of(copy.variables)
        if isinstance(record, str):
            raise NoBootRecord(record)
        self._loaded = record.sequence
        return record

    async def store(self, record: BootRecord) -> BootRecord:
        """Make the loaded record's successor the one in force, as BootControl says."""
        assert self._loaded is not None, "a record is loaded before its successor is stored"
        assert record.sequence == self._loaded, "the successor of another record"
        self._loaded = None  # until it is known which one is in force
        try:
            index, copy = await self._current()  # with what others have set since
        except NoBootRecord as error:  # it was there a moment ago
            raise DeviceFault(Fault.IO, str(error)) from error
        return await self._put(index, copy, replace(record, sequence=record.sequence + 1))

    async def is_there(self) -> bool:
        """Whether an environment stands on the device, with a record in it or without."""
        try:
            _ = await self._current()
        except NoBootRecord:
            return False
        return True

    async def create(self, record: BootRecord) -> BootRecord:
        """Put the record into the environment that is there, or into a new one."""
        try:
            index, copy = await self._current()
        except NoBootRecord:
            index, copy = 1, Copy(0, {})
        known = copy.variables.get(f"{PREFIX}sequence", "")
        sequence = int(known) + 1 if _NUMBER.fullmatch(known) and int(known) < COUNTER_LAST else 1
        return await self._put(index, copy, replace(record, sequence=sequence))

    async def read_anchor(self) -> bytes:
        """The trust anchor. Raises NoAnchor."""
        return await read_anchor(self._device)

    async def write_anchor(self, data: bytes) -> None:
        """Make this the trust anchor."""
        await write_anchor(self._device, data)

    async def _current(self) -> tuple[int, Copy]:
        """The copy in force, as U-Boot's tools choose it. Raises NoBootRecord."""
        if self._device.block_count < BOOT_BLOCKS_MIN:
            raise NoBootRecord(f"a boot device has {BOOT_BLOCKS_MIN} blocks, this one has fewer")
        found: list[Copy | str] = []
        for block in ENVIRONMENT_COPIES:
            try:
                data = await self._device.read(block, ENVIRONMENT_BLOCKS)
            except DeviceFault as fault:
                found.append(str(fault))
            else:
                found.append(decode_environment(data))
        match found:
            case [Copy() as first, Copy() as second]:
                index = 1 if _is_newer(second, first) else 0
                return index, (first, second)[index]
            case [Copy() as first, _]:
                return 0, first
            case [_, Copy() as second]:
                return 1, second
            case _:
                raise NoBootRecord("; ".join(f"copy {at}: {it}" for at, it in enumerate(found, 1)))

    async def _put(self, current: int, old: Copy, record: BootRecord) -> BootRecord:
        others = {
            name: value for name, value in old.variables.items() if not name.startswith(PREFIX)
        }
        flags = (old.flags + 1) & 0xFF
        for stored in _shortened(record):
            try:
                data = encode_environment(flags, {**others, **variables_of(stored)})
            except ValueError:
                continue
            await write_back(self._device, ENVIRONMENT_COPIES[1 - current], data)
            self._loaded = stored.sequence
            return stored
        raise DeviceFault(Fault.NO_SPACE, "other variables leave no room for a record")


def _is_newer(second: Copy, first: Copy) -> bool:
    """Whether the second copy is in force, of two whole ones (libuboot_load of libubootenv).

    The flags byte is outside of the checksum. So a copy whose record has the lower sequence is
    never the newer one: of its successor's write nothing but that byte arrived.
    """
    sequences = [_sequence(each) for each in (first, second)]
    if None not in sequences and sequences[0] != sequences[1]:
        return max(sequences, key=lambda each: each or 0) == sequences[1]
    if (first.flags, second.flags) in ((0xFF, 0), (0, 0xFF)):
        return second.flags == 0
    return second.flags > first.flags


def _sequence(copy: Copy) -> int | None:
    text = copy.variables.get(f"{PREFIX}sequence", "")
    return int(text) if _NUMBER.fullmatch(text) else None


# ---------------------------------------------------------------- the record as variables


def variables_of(record: BootRecord) -> Variables:
    """The record's variables: numbers in decimal, digests in hexadecimal, names in small letters.

    What is empty or absent has no variable, for an environment keeps no empty ones.
    """
    problem = problem_of(record)
    assert problem is None, problem
    named = {f"{PREFIX}{name}": value for name, value in _pairs(record)}
    return {name: value for name, value in named.items() if value}


def _pairs(record: BootRecord) -> Iterator[tuple[str, str]]:
    yield "format", FORMAT
    yield "sequence", str(record.sequence)
    yield "active", record.active.value
    yield "trying", "" if record.trying is None else record.trying.value
    yield "boots", str(record.boots)
    yield "floor", str(record.floor)
    yield "snapshot", str(record.snapshot)
    yield "restore", str(int(record.restore))
    yield "counted", "" if record.counted is None else str(record.counted.boots)
    yield "booting", "" if record.counted is None else record.counted.slot.value
    for name in SlotName:
        info = record.slot(name)
        yield f"{name}_state", info.state.name.lower()
        yield f"{name}_tries", str(info.tries_left)
        yield f"{name}_attempts", str(info.attempts)
        yield f"{name}_version", str(info.version)
        yield f"{name}_name", _escaped(info.name)
        yield f"{name}_digest", "" if info.digest == NO_DIGEST else info.digest.hex()
        yield f"{name}_size", str(info.size)
        yield f"{name}_floor", str(info.floor)
    for number, reason in enumerate(reversed(record.reasons), 1):
        yield f"reason_{number}_cause", reason.cause.name.lower()
        yield f"reason_{number}_slot", reason.slot.value
        yield f"reason_{number}_version", str(reason.version)
        yield f"reason_{number}_boot", str(reason.boot)
        yield f"reason_{number}_wall", str(reason.wall)
        yield f"reason_{number}_trace", "" if reason.trace == NO_TRACE else reason.trace.hex()
        yield f"reason_{number}_service", _escaped(reason.service)
        yield f"reason_{number}_detail", _escaped(reason.detail)
        yield f"reason_{number}_tail", _escaped(reason.tail)


class _Read:
    """Variables without their prefix. Each method raises _Strange."""

    def __init__(self, variables: Mapping[str, str]) -> None:
        self._variables = variables

    def has(self, name: str) -> bool:
        return PREFIX + name in self._variables

    def number(self, name: str) -> int:
        text = self._variables.get(PREFIX + name, "")
        if not _NUMBER.fullmatch(text) or int(text) > COUNT_MAX:
            raise _Strange(f"{PREFIX}{name} is {text[:40]!r}, not a number")
        return int(text)

    def one_of(self, name: str, known: Mapping[str, object]) -> str:
        text = self._variables.get(PREFIX + name, "")
        if text not in known:
            raise _Strange(f"{PREFIX}{name} is {text[:40]!r}, not one of {', '.join(known)}")
        return text

    def octets(self, name: str, size: int) -> bytes:
        text = self._variables.get(PREFIX + name, "")
        if not text:
            return bytes(size)
        if not re.fullmatch(f"[0-9a-f]{{{2 * size}}}", text):
            raise _Strange(f"{PREFIX}{name} is {text[:80]!r}, not {size} bytes in hexadecimal")
        return bytes.fromhex(text)

    def text(self, name: str, size_max: int) -> str:
        raw = self._variables.get(PREFIX + name, "").encode("latin-1")
        try:
            text = _plain(raw.decode())
        except UnicodeDecodeError as error:
            raise _Strange(f"{PREFIX}{name} is no text") from error
        if len(text.encode()) > size_max:
            raise _Strange(f"{PREFIX}{name} has more than {size_max} bytes")
        return text


_SLOTS: Final = {name.value: name for name in SlotName}
_STATES: Final = {state.name.lower(): state for state in SlotState}
_CAUSES: Final = {cause.name.lower(): cause for cause in Cause}


def _record_of(variables: Mapping[str, str]) -> BootRecord | str:
    """The record in these variables, or in what way there is none."""
    read = _Read(variables)
    try:
        _ = read.one_of("format", {FORMAT: None})
        record = _decode(read)
    except _Strange as strange:
        return str(strange)
    return problem_of(record) or record


def _decode(read: _Read) -> BootRecord:
    numbers = [number for number in range(REASONS_MAX, 0, -1) if read.has(f"reason_{number}_cause")]
    return BootRecord(
        sequence=read.number("sequence"),
        active=_SLOTS[read.one_of("active", _SLOTS)],
        trying=_SLOTS[read.one_of("trying", _SLOTS)] if read.has("trying") else None,
        slots=(_slot(read, "a_"), _slot(read, "b_")),
        boots=read.number("boots"),
        floor=read.number("floor"),
        snapshot=read.number("snapshot"),
        restore=read.one_of("restore", {"0": None, "1": None}) == "1",
        reasons=tuple(_reason(read, f"reason_{number}_") for number in numbers),
        counted=_counted(read),
    )


def _counted(read: _Read) -> Counted | None:
    """What the boot loader's script has set; a count alone says nothing of this boot."""
    if not read.has("booting"):
        return None
    boots = read.number("counted") if read.has("counted") else 0
    return Counted(boots=boots, slot=_SLOTS[read.one_of("booting", _SLOTS)])


def _slot(read: _Read, prefix: str) -> SlotInfo:
    return SlotInfo(
        state=_STATES[read.one_of(f"{prefix}state", _STATES)],
        tries_left=read.number(f"{prefix}tries"),
        attempts=read.number(f"{prefix}attempts"),
        version=read.number(f"{prefix}version"),
        name=read.text(f"{prefix}name", NAME_SIZE_MAX),
        digest=read.octets(f"{prefix}digest", DIGEST_SIZE),
        size=read.number(f"{prefix}size"),
        floor=read.number(f"{prefix}floor"),
    )


def _reason(read: _Read, prefix: str) -> Reason:
    return Reason(
        cause=_CAUSES[read.one_of(f"{prefix}cause", _CAUSES)],
        slot=_SLOTS[read.one_of(f"{prefix}slot", _SLOTS)],
        version=read.number(f"{prefix}version"),
        boot=read.number(f"{prefix}boot"),
        wall=read.number(f"{prefix}wall"),
        trace=read.octets(f"{prefix}trace", TRACE_SIZE),
        service=read.text(f"{prefix}service", NAME_SIZE_MAX),
        detail=read.text(f"{prefix}detail", DETAIL_SIZE_MAX),
        tail=read.text(f"{prefix}tail", TAIL_SIZE_MAX),
    )


def _shortened(record: BootRecord) -> Iterator[BootRecord]:
    """The record, and what is left of it when there is less and less room."""
    yield record
    for index in range(len(record.reasons)):
        record = _with_reason(record, index, replace(record.reasons[index], tail=""))
        yield record
    while record.reasons:
        record = replace(record, reasons=record.reasons[1:])
        yield record


def _with_reason(record: BootRecord, index: int, reason: Reason) -> BootRecord:
    reasons = (*record.reasons[:index], reason, *record.reasons[index + 1 :])
    return replace(record, reasons=reasons)


def _escaped(text: str) -> str:
    """A text in one line of single bytes; UTF-8 as U-Boot passes it on."""

    def escape(found: re.Match[str]) -> str:
        character = found[0]
        if character == "\\":
            return "\\\\"
        return "\\n" if character == "\n" else f"\\x{ord(character):02x}"

    return _CONTROL.sub(escape, text).encode().decode("latin-1")


def _plain(text: str) -> str:
    """What was escaped; anything else stays as somebody wrote it."""

    def plain(found: re.Match[str]) -> str:
        code = found[1]
        if code in ("\\", "n"):
            return "\\" if code == "\\" else "\n"
        return chr(int(code[1:], 16))

    return _ESCAPED.sub(plain, text)
