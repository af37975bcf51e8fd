"""What a set says of itself, and the limits of what it may say.

The types bound each value, so the decoder refuses one out of bounds before anything is kept;
`check` says whether the tables fit each other. Nothing in a manifest is believed of the bytes
behind it: they are compared, chunk by chunk (reader.py).
"""

import re
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Annotated, Final

import msgspec

from nexus.sets.errors import SetRefused, SetStatus
from nexus.wire import U32, U64, Blob, Bool, List, RemoteProtocolError, Text, encode, strict_decoder

DIGEST_SIZE: Final = 32  # bytes of SHA-256
CHUNK_SIZE: Final = 256 * 1024  # bytes of every chunk of a file but its last; one is in memory
MANIFEST_SIZE_MAX: Final = 1024 * 1024  # bytes; the reference's index
UNPACKED_SIZE_MAX: Final = 2 * 1024**3  # bytes of all files together; twice what is measured
FILES_MAX: Final = 4096  # nine times what a system of Nexus's own programs has
CHUNKS_MAX: Final = UNPACKED_SIZE_MAX // CHUNK_SIZE + FILES_MAX  # a last, shorter one per file
PATH_SIZE_MAX: Final = 240  # characters, all of them one byte; leaves room for the folder above
PARTS_MAX: Final = 32  # folders inside each other; bounds what a path costs to check
NAME_SIZE_MAX: Final = 48  # characters of a version's name
SERVICES_MAX: Final = 256  # the reference's bundles per set
SERVICE_NAME_SIZE_MAX: Final = 48
AREAS_MAX: Final = 64
AREA_SIZE_MAX: Final = 128
DISTRIBUTIONS_MAX: Final = 128
VERSION_MAX: Final = (1 << 63) - 1  # as nexus.bootctl counts
HEALTH_MAX: Final = 3600_000_000_000  # ns; a boot that takes an hour to get well is not well

_NAMED: Final = r"(?!\.{1,2}(/|\Z))[A-Za-z0-9_+@=,.-]+"
PATH: Final = re.compile(rf"{_NAMED}(/{_NAMED})*")
"""What is the same path below the same folder on every file system: no blank, no control, no NUL,
no backslash, nothing absolute, and no part that is empty, "." or ".."."""

_PATH: Final = Text(size_min=1, size_max=PATH_SIZE_MAX)  # the rest is `check`'s, by its own name
_DIGEST: Final = Blob(size_min=DIGEST_SIZE, size_max=DIGEST_SIZE)
_VISIBLE: Final = r"^[!-~]+\Z"


class File(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One regular file. A set has no other kind, so there are no links."""

    path: Annotated[str, _PATH]
    executable: Annotated[bool, Bool()]
    size: Annotated[int, U64()]
    chunks: Annotated[list[Annotated[int, U32()]], List(count_max=UNPACKED_SIZE_MAX // CHUNK_SIZE)]
    """Indexes into Manifest.chunks: all of CHUNK_SIZE bytes, but the last one. Their digests are
    the file's: one of its own would be a second truth, and a second hash of every byte."""


class Chunk(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Bytes that one or more files consist of. Stored as they are if `stored` equals `size`, as
    one zstd frame if it is less."""

    stored: Annotated[int, U32(minimum=1, maximum=CHUNK_SIZE)]
    size: Annotated[int, U32(minimum=1, maximum=CHUNK_SIZE)]
    sha256: Annotated[bytes, _DIGEST]  # of the `size` bytes


class Base(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the set needs of the system below the slots, which updates do not touch."""

    python: Annotated[str, Text(size_max=16, pattern=r"^[0-9]+\.[0-9]+\Z")]
    distributions: Annotated[
        dict[
            Annotated[str, Text(size_min=1, size_max=64, pattern=r"^[a-z0-9]+(-[a-z0-9]+)*\Z")],
            Annotated[str, Text(size_min=1, size_max=48, pattern=_VISIBLE)],
        ],
        List(count_max=DISTRIBUTIONS_MAX),
    ]
    """Version by normalised name."""


class Manifest(
    msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, kw_only=True
):
    """The first part of a set. Its tables are in ascending order, so one content has one form."""

    version: Annotated[int, U64(minimum=1)]  # what is compared; a higher one is newer
    name: Annotated[str, Text(size_min=1, size_max=NAME_SIZE_MAX, pattern=_VISIBLE)]
    """What people call the version, as 1.2.0; compared with nothing."""
    system: Annotated[str, _PATH]  # the system file, one of `files`
    sbom: Annotated[str, _PATH]  # CycloneDX, one of `files`
    health: Annotated[int, U64(minimum=1)]  # ns a trial boot has, from its start, to prove well
    base: Base
    services: Annotated[
        dict[
            Annotated[str, Text(size_min=1, size_max=SERVICE_NAME_SIZE_MAX, pattern=_VISIBLE)],
            Annotated[bytes, _DIGEST],
        ],
        List(count_max=SERVICES_MAX),
    ]
    """Digest of its program by service, as init's plan has it."""
    schemas: Annotated[
        dict[
            Annotated[
                str, Text(size_min=2, size_max=AREA_SIZE_MAX, pattern=r"^/state/([!-.0-~]+/)*\Z")
            ],
            Annotated[int, U32()],
        ],
        List(count_max=AREAS_MAX),
    ]
    """Version of the data by area of statefs, as /state/app/."""
    files: Annotated[list[File], List(count_max=FILES_MAX, count_min=1)]
    chunks: Annotated[list[Chunk], List(count_max=CHUNKS_MAX)]

    @property
    def unpacked_size(self) -> int:
        """Bytes of all files together."""
        return sum(file.size for file in self.files)

    @property
    def stored_size(self) -> int:
        """Bytes of all chunks together, as they are stored."""
        return sum(chunk.stored for chunk in self.chunks)

    def offsets(self) -> list[int]:
        """Where each chunk begins, in bytes behind the manifest."""
        sizes = [chunk.stored for chunk in self.chunks]
        return list(accumulate(sizes, initial=0))[:-1]


def unmet(needed: Base, python: str, installed: Mapping[str, str]) -> list[str]:
    """What a system below the slots has not: a sentence each, none if the set can run there.

    `installed` are versions by normalised name. Versions are compared for equality: another one is
    another combination than the one that was built and tested.
    """
    found = []
    if needed.python != python:
        found.append(f"python {needed.python}, here it is {python}")
    for name, version in needed.distributions.items():
        here = installed.get(name)
        if here != version:
            found.append(f"{name} {version}, here it is {here or 'not installed'}")
    return found


_decode: Final = strict_decoder(Manifest)


def encode_manifest(manifest: Manifest) -> bytes:
    """The one form of a manifest. Raises SetRefused for one that a reader would not take."""
    check(manifest)
    data = encode(manifest)
    if len(data) > MANIFEST_SIZE_MAX:
        raise SetRefused(
            SetStatus.OVERSIZED, f"a manifest of {len(data)} bytes, {MANIFEST_SIZE_MAX} at most"
        )
    _ = decode_manifest(data)  # what is written can be read
    return data


def decode_manifest(data: bytes) -> Manifest:
    """The manifest in `data`, its tables checked. Raises SetRefused."""
    if len(data) > MANIFEST_SIZE_MAX:
        raise SetRefused(
            SetStatus.OVERSIZED, f"a manifest of {len(data)} bytes, {MANIFEST_SIZE_MAX} at most"
        )
    try:
        manifest: Manifest = _decode(data)
    except RemoteProtocolError as error:
        raise SetRefused(SetStatus.MANIFEST, str(error)) from error
    check(manifest)
    return manifest


def check(manifest: Manifest) -> None:
    """Raises SetRefused unless the tables of a manifest fit each other."""
    if manifest.version > VERSION_MAX:
        raise SetRefused(SetStatus.OVERSIZED, f"version {manifest.version}")
    if manifest.health > HEALTH_MAX:
        raise SetRefused(SetStatus.OVERSIZED, f"{manifest.health} ns to get well")
    for name, table in (
        ("distributions", manifest.base.distributions),
        ("services", manifest.services),
        ("schemas", manifest.schemas),
    ):
        if list(table) != sorted(table):
            raise SetRefused(SetStatus.MANIFEST, f"its {name} are not in ascending order")
    _check_paths([file.path for file in manifest.files])
    _check_chunks(manifest)
    paths = {file.path for file in manifest.files}
    for path in (manifest.system, manifest.sbom):
        if path not in paths:
            raise SetRefused(SetStatus.MISSING, f"{path!r}, which the manifest names")


def _check_paths(paths: Sequence[str]) -> None:
    """Plain, ascending, no two that are one path where case does not count, none below a file."""
    seen: dict[str, str] = {}
    last = ""
    for path in paths:
        if PATH.fullmatch(path) is None or path.count("/") >= PARTS_MAX:
            raise SetRefused(SetStatus.PATH, repr(path))
        folded = path.casefold()
        if folded in seen:
            raise SetRefused(SetStatus.DUPLICATE, f"{path!r} and {seen[folded]!r}")
        if path < last:
            raise SetRefused(SetStatus.MANIFEST, "its files are not in ascending order")
        seen[folded] = last = path
    for path in paths:
        folded = path.casefold()
        at = folded.find("/")
        while at >= 0:
            if (above := seen.get(folded[:at])) is not None:
                raise SetRefused(SetStatus.CLASH, f"{above!r} is a file, and above {path!r}")
            at = folded.find("/", at + 1)


def _check_chunks(manifest: Manifest) -> None:
    """Every file is cut in the one way there is; every chunk is used, in order of first use."""
    unpacked = manifest.unpacked_size
    if unpacked > UNPACKED_SIZE_MAX:
        raise SetRefused(
            SetStatus.OVERSIZED, f"{unpacked} bytes unpacked, {UNPACKED_SIZE_MAX} at most"
        )
    if len({chunk.sha256 for chunk in manifest.chunks}) != len(manifest.chunks):
        raise SetRefused(SetStatus.DUPLICATE, "a chunk is in the table twice")
    for chunk in manifest.chunks:
        if chunk.stored > chunk.size:
            raise SetRefused(SetStatus.LAYOUT, "a chunk is stored in more bytes than it has")
    used = 0
    for file in manifest.files:
        full, rest = divmod(file.size, CHUNK_SIZE)
        sizes = [CHUNK_SIZE] * full + [rest] * (rest > 0)
        if len(file.chunks) != len(sizes):
            raise SetRefused(SetStatus.LAYOUT, f"{file.path!r}: {len(file.chunks)} chunks")
        for index, size in zip(file.chunks, sizes, strict=True):
            if index > used or index >= len(manifest.chunks):
                raise SetRefused(SetStatus.LAYOUT, f"{file.path!r}: chunk {index} comes too early")
            used = max(used, index + 1)
            if manifest.chunks[index].size != size:
                raise SetRefused(SetStatus.LAYOUT, f"{file.path!r}: chunk {index} does not fit")
    if used != len(manifest.chunks):
        raise SetRefused(SetStatus.LAYOUT, f"{len(manifest.chunks) - used} chunks of no file")
