"""The update file, `.nxu`: TUF metadata and, behind it, the set that it names.

    0   6  "NXUPD" and a zero
    6   2  format version, 1
    8   4  size of the metadata, at most METADATA_SIZE_MAX
    12     MessagePack, a map: file name -> bytes
    then   the set file, to the end

Numbers are little-endian. Nothing here is trusted: what the file says is checked by its signatures,
and the set by the length and the digest that they cover.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Final, Protocol

import msgspec

from nexus.trust.limits import (
    METADATA_SIZE_MAX,
    ROOT_SIZE_MAX,
    ROOTS_MAX,
    SNAPSHOT_SIZE_MAX,
    TARGETS_SIZE_MAX,
    TIMESTAMP_SIZE_MAX,
)
from nexus.trust.status import TrustStatus, Untrusted

UPDATE_MAGIC: Final = b"NXUPD\0"
UPDATE_VERSION: Final = 1
_HEADER: Final = struct.Struct("<6sHI")
UPDATE_HEADER_SIZE: Final = _HEADER.size  # bytes
TIMESTAMP: Final = "timestamp.json"
SNAPSHOT: Final = "snapshot.json"
TARGETS: Final = "targets.json"
FILES_MAX: Final = ROOTS_MAX + 3
FILE_NAME_MAX: Final = 32  # bytes; the longest is the number of a root and ".root.json"
_ROOT_SUFFIX: Final = ".root.json"
# MessagePack: how a map begins.
_FIXMAP: Final = 0x80
_FIXMAP_MASK: Final = 0x0F
_MAP_16: Final = 0xDE
_MAP_32: Final = 0xDF
_SIZES: Final = {
    TIMESTAMP: TIMESTAMP_SIZE_MAX,
    SNAPSHOT: SNAPSHOT_SIZE_MAX,
    TARGETS: TARGETS_SIZE_MAX,
}

_Name = Annotated[str, msgspec.Meta(max_length=FILE_NAME_MAX)]


class Source(Protocol):
    """A file that is read here and there; nexus.sets has the same."""

    @property
    def size(self) -> int:
        """Bytes in all."""
        ...

    async def read_at(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset` on; fewer only where the file ends."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """An update file: its metadata, and where in it the set is."""

    metadata: Mapping[str, bytes]
    set_offset: int
    set_size: int


async def read_update(source: Source) -> Update:
    """Read and bound the metadata; the set behind it is not looked at."""
    header = await source.read_at(0, min(UPDATE_HEADER_SIZE, source.size))
    offset = UPDATE_HEADER_SIZE + metadata_size(header)
    if source.size < offset:
        raise Untrusted(TrustStatus.TRUNCATED, "the update file ends within its metadata")
    section = await source.read_at(UPDATE_HEADER_SIZE, offset - UPDATE_HEADER_SIZE)
    if len(section) < offset - UPDATE_HEADER_SIZE:
        raise Untrusted(TrustStatus.TRUNCATED, "the update file ends earlier than it said")
    return Update(
        metadata=decode_metadata(section), set_offset=offset, set_size=source.size - offset
    )


def metadata_size(header: bytes) -> int:
    """How many bytes of metadata follow this header."""
    if len(header) < UPDATE_HEADER_SIZE:
        raise Untrusted(TrustStatus.TRUNCATED, "the update file ends within its header")
    magic, version, size = _HEADER.unpack_from(header)
    if magic != UPDATE_MAGIC:
        raise Untrusted(TrustStatus.MALFORMED, "this is no update file")
    if version != UPDATE_VERSION:
        raise Untrusted(TrustStatus.MALFORMED, f"an update file of format {version}")
    if size > METADATA_SIZE_MAX:
        raise Untrusted(TrustStatus.TOO_LARGE, f"{size} bytes of metadata")
    return int(size)


def decode_metadata(section: bytes) -> dict[str, bytes]:
    """The metadata files by name: only known names, each within its limit."""
    if len(section) > METADATA_SIZE_MAX:
        raise Untrusted(TrustStatus.TOO_LARGE, f"{len(section)} bytes of metadata")
    count = _count(section)
    if count > FILES_MAX:
        raise Untrusted(TrustStatus.TOO_MANY, f"{count} files of metadata")
    try:
        files = _DECODER.decode(section)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise Untrusted(TrustStatus.MALFORMED, f"the metadata section: {error}") from error
    if len(files) < count:
        raise Untrusted(TrustStatus.DUPLICATE, "the metadata section has a name twice")
    if encode_metadata(files) != section:  # not sorted, or a size in more bytes than it needs
        raise Untrusted(TrustStatus.MALFORMED, "the metadata section is not in its one form")
    check_files(files)
    return files


def encode_metadata(files: Mapping[str, bytes]) -> bytes:
    """The section, in the one form that is accepted: sorted by name."""
    return msgspec.msgpack.encode(dict(sorted(files.items())))


def encode_update(files: Mapping[str, bytes]) -> bytes:
    """Header and metadata of an update file; the set's bytes go behind them."""
    section = encode_metadata(files)
    _ = decode_metadata(section)  # what we write can be read
    return _HEADER.pack(UPDATE_MAGIC, UPDATE_VERSION, len(section)) + section


def check_files(files: Mapping[str, bytes]) -> None:
    """Names and sizes, before anything is parsed."""
    if len(files) > FILES_MAX:
        raise Untrusted(TrustStatus.TOO_MANY, f"{len(files)} files of metadata")
    roots = len(files.keys() - _SIZES.keys())
    if roots > ROOTS_MAX:
        raise Untrusted(TrustStatus.TOO_MANY, f"{roots} roots")
    for name, data in files.items():
        check_file(name, data)
    for name in _SIZES:
        if name not in files:
            raise Untrusted(TrustStatus.MALFORMED, f"there is no {name}")


def check_file(name: str, data: bytes) -> None:
    """The name and the size of one file."""
    size_max = _SIZES.get(name)
    if size_max is None:
        _ = root_version(name)
        size_max = ROOT_SIZE_MAX
    if len(data) > size_max:
        raise Untrusted(TrustStatus.TOO_LARGE, f"{name} has {len(data)} bytes")


def root_name(version: int) -> str:
    """The file of a root of this version."""
    return f"{version}{_ROOT_SUFFIX}"


def root_version(name: str) -> int:
    """The version in the name of a root's file; a name in its one form."""
    digits = name.removesuffix(_ROOT_SUFFIX)
    if digits.isascii() and digits.isdigit() and len(digits) <= 19:
        version = int(digits)
        if version > 0 and root_name(version) == name:
            return version
    raise Untrusted(TrustStatus.MALFORMED, f"a file {name!r}")


def _count(section: bytes) -> int:
    """How many files the section says it has, before any of them is made."""
    first = section[0] if section else 0
    if _FIXMAP <= first <= _FIXMAP | _FIXMAP_MASK:
        return first & _FIXMAP_MASK
    if first == _MAP_16:
        return int.from_bytes(section[1:3], "big")
    if first == _MAP_32:
        return int.from_bytes(section[1:5], "big")
    raise Untrusted(TrustStatus.MALFORMED, "the metadata section is no map")


_DECODER: Final = msgspec.msgpack.Decoder(dict[_Name, bytes])
