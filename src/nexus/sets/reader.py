"""Reads a set strictly: nothing is allocated that a limit did not allow, nothing is believed.

Layout, little-endian: header (magic, format, size and SHA-256 of the manifest), the manifest, the
chunks one behind the other, then the end: a marker and the SHA-256 of everything before the digest.
A set ends there. Whom it comes from is not asked here: nexus.trust knows that of its SHA-256.
"""

import struct
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from hashlib import sha256
from typing import Final, Protocol

from backports import zstd

from nexus.drivers.crc import extend
from nexus.sets.errors import SetRefused, SetStatus
from nexus.sets.manifest import (
    CHUNK_SIZE,
    CHUNKS_MAX,
    DIGEST_SIZE,
    MANIFEST_SIZE_MAX,
    Chunk,
    File,
    Manifest,
    decode_manifest,
)

MAGIC: Final = b"NXSET\0"
FORMAT: Final = 1
HEADER: Final = struct.Struct(f"<6sHI{DIGEST_SIZE}s")
END: Final = b"NXEND\0\0\0"
END_SIZE: Final = len(END) + DIGEST_SIZE
WINDOW_LOG_MAX: Final = 18  # a frame may refer back over one chunk, so this much is allocated
SET_SIZE_MAX: Final = HEADER.size + MANIFEST_SIZE_MAX + CHUNKS_MAX * CHUNK_SIZE + END_SIZE  # bytes

_OPTIONS: Final[dict[int, int]] = {zstd.DecompressionParameter.window_log_max: WINDOW_LOG_MAX}

assert CHUNK_SIZE == 1 << WINDOW_LOG_MAX


class Source(Protocol):
    """Where a set is read from."""

    @property
    def size(self) -> int:
        """Bytes of the set, known from elsewhere than the set itself."""
        ...

    async def read_at(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset` on; fewer only where the source ends."""
        ...


class Sink(Protocol):
    """Where the files of a set go, one after the other, in order of their paths."""

    async def begin(self, file: File) -> None:
        """The next file. Its path is one that `check` allowed, below the sink's own folder."""
        ...

    async def write(self, data: bytes) -> None:
        """The next bytes of the file, each chunk's digest compared already."""
        ...

    async def end(self, file: File) -> None:
        """The file is whole: its size and its SHA-256 are the manifest's."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Verified:
    """A set of which every byte was looked at: `sha256` is that of the whole, `size` bytes."""

    manifest: Manifest
    size: int
    sha256: bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Known:
    """What was found of the very bytes of a set before they came to where they are read now."""

    sha256: bytes
    crc: int  # CRC-32C


class BytesSource:
    """A set in memory."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.size = len(data)

    async def read_at(self, offset: int, size: int) -> bytes:
        """As Source."""
        return self._data[offset : offset + size]


class CallSource:
    """A set that a function reads, as `os.pread` of an open file."""

    def __init__(self, read_at: Callable[[int, int], bytes], size: int) -> None:
        self._read_at = read_at
        self.size = size

    async def read_at(self, offset: int, size: int) -> bytes:
        """As Source."""
        return self._read_at(offset, size)


class PartSource:
    """A set that is a part of something larger, as of an update file or of a slot."""

    def __init__(self, source: Source, offset: int, size: int) -> None:
        self._source = source
        self._offset = offset
        self.size = size

    async def read_at(self, offset: int, size: int) -> bytes:
        """As Source."""
        left = max(0, self.size - offset)
        return await self._source.read_at(self._offset + offset, min(size, left))


async def read_manifest(source: Source) -> Manifest:
    """The manifest alone, its digest compared; of the chunks only that there is room for them.

    Raises SetRefused.
    """
    manifest, _ = await _head(source)
    return manifest


async def verify(source: Source) -> Verified:
    """Look at every byte of a set, in one pass and one chunk at a time. Raises SetRefused."""
    return await _whole(Pass(source))


async def unpack(source: Source, sink: Sink) -> Verified:
    """Hand every file of a set to `sink`, and verify it as `verify` does. Raises SetRefused.

    What the sink got is of use only after this has returned: a set may be found bad at its end.
    """
    return await _whole(Pass(source, sink))


async def read_file(source: Source, manifest: Manifest, path: str, size_max: int) -> bytes:
    """One file of a set whose manifest was read, its chunks compared. Raises SetRefused."""
    file = next((file for file in manifest.files if file.path == path), None)
    if file is None:
        raise SetRefused(SetStatus.MISSING, repr(path))
    if file.size > size_max:
        raise SetRefused(SetStatus.OVERSIZED, f"{path!r} has {file.size} bytes, {size_max} at most")
    first = source.size - END_SIZE - manifest.stored_size
    offsets = manifest.offsets()
    parts = []
    for index in file.chunks:
        chunk = manifest.chunks[index]
        parts.append(plain(chunk, await _exactly(source, first + offsets[index], chunk.stored)))
    return b"".join(parts)


async def _whole(reading: "Pass") -> Verified:
    while (verified := await reading.step()) is None:
        pass
    return verified


class Pass:
    """One pass over a set in small steps, for who has to answer others in between.

    A step takes one chunk: at most CHUNK_SIZE bytes are read, unpacked, hashed and handed on.
    `done` of the source's `size` bytes were looked at so far. After a step has raised SetRefused
    there is no next one.

    With `known` the SHA-256 of the whole is not computed a second time, which takes a third of a
    pass: that these are still the bytes it is of, their CRC-32C says.
    """

    def __init__(
        self, source: Source, sink: Sink | None = None, *, known: Known | None = None
    ) -> None:
        self._source = source
        self._sink = sink
        self._known = known
        self._hash = sha256()
        self._crc = 0
        self._steps = self._run()
        self.done = 0

    async def step(self) -> Verified | None:
        """Go on; what was verified, when it was all. Raises SetRefused."""
        return await anext(self._steps)

    async def _run(self) -> AsyncIterator[Verified | None]:
        manifest, head = await _head(self._source)
        self._taken(head)
        yield None
        offsets = manifest.offsets()
        for file in manifest.files:
            if self._sink is not None:
                await self._sink.begin(file)
            for index in file.chunks:
                at = len(head) + offsets[index]
                first_use = at == self.done
                if self._sink is None and not first_use:
                    continue
                chunk = manifest.chunks[index]
                stored = await _exactly(self._source, at, chunk.stored)
                if first_use:
                    self._taken(stored)
                data = plain(chunk, stored)
                if self._sink is not None:
                    await self._sink.write(data)
                yield None
            if self._sink is not None:
                await self._sink.end(file)
        yield await self._end(manifest)

    async def _end(self, manifest: Manifest) -> Verified:
        marker = await _exactly(self._source, self.done, len(END))
        if marker != END:
            raise SetRefused(SetStatus.CHECKSUM, "its end is not marked")
        self._taken(marker)
        digest = await _exactly(self._source, self.done, DIGEST_SIZE)
        if self._known is None and digest != self._hash.digest():
            raise SetRefused(SetStatus.CHECKSUM, "its bytes are not those it was written with")
        self._taken(digest)
        if self._known is None:
            return Verified(manifest=manifest, size=self.done, sha256=self._hash.digest())
        if self._crc != self._known.crc:
            raise SetRefused(SetStatus.CHECKSUM, "its bytes are not those that came")
        return Verified(manifest=manifest, size=self.done, sha256=self._known.sha256)

    def _taken(self, data: bytes) -> None:
        if self._known is None:
            self._hash.update(data)
        else:
            self._crc = extend(self._crc, data)
        self.done += len(data)


def plain(chunk: Chunk, stored: bytes) -> bytes:
    """The bytes of a chunk, from what is stored of it. Raises SetRefused.

    Never more than `chunk.size` of them and a window of as much are allocated, whatever the frame
    says it unpacks to.
    """
    data = stored if chunk.stored == chunk.size else _unpacked(chunk, stored)
    if sha256(data).digest() != chunk.sha256:
        raise SetRefused(SetStatus.CHECKSUM, f"chunk {chunk.sha256.hex()[:16]}")
    return data


def _unpacked(chunk: Chunk, stored: bytes) -> bytes:
    name = f"chunk {chunk.sha256.hex()[:16]}"
    try:
        if zstd.get_frame_info(stored).decompressed_size != chunk.size:
            raise SetRefused(SetStatus.COMPRESSION, f"{name} does not say it has {chunk.size}")
        unpacker = zstd.ZstdDecompressor(options=_OPTIONS)
        data = unpacker.decompress(stored, chunk.size + 1)
    except zstd.ZstdError as error:
        raise SetRefused(SetStatus.COMPRESSION, f"{name}: {error}") from error
    if not unpacker.eof or unpacker.unused_data or len(data) != chunk.size:
        raise SetRefused(SetStatus.COMPRESSION, f"{name} is not one frame of {chunk.size} bytes")
    return data


async def _head(source: Source) -> tuple[Manifest, bytes]:
    if source.size > SET_SIZE_MAX:
        raise SetRefused(SetStatus.OVERSIZED, f"{source.size} bytes, {SET_SIZE_MAX} at most")
    header = await source.read_at(0, HEADER.size)
    if header[: len(MAGIC)] != MAGIC[: len(header)] or not header:
        raise SetRefused(SetStatus.NOT_A_SET, "it does not begin as a system set does")
    if len(header) < HEADER.size:
        raise SetRefused(SetStatus.TRUNCATED, "it ends within its header")
    _, version, size, digest = HEADER.unpack(header)
    if version != FORMAT:
        raise SetRefused(SetStatus.VERSION, f"format {version}, this reader knows {FORMAT}")
    if size > MANIFEST_SIZE_MAX:
        raise SetRefused(
            SetStatus.OVERSIZED, f"a manifest of {size} bytes, {MANIFEST_SIZE_MAX} at most"
        )
    data = await _exactly(source, HEADER.size, size)
    if sha256(data).digest() != digest:
        raise SetRefused(SetStatus.CHECKSUM, "the manifest is not the one it was")
    manifest = decode_manifest(data)
    whole = HEADER.size + size + manifest.stored_size + END_SIZE
    if source.size < whole:
        raise SetRefused(SetStatus.TRUNCATED, f"{source.size} bytes of {whole}")
    if source.size > whole:
        raise SetRefused(SetStatus.TRAILING, f"{source.size} bytes, the set has {whole}")
    return manifest, header + data


async def _exactly(source: Source, offset: int, size: int) -> bytes:
    data = await source.read_at(offset, size)
    if len(data) != size:
        raise SetRefused(SetStatus.TRUNCATED, f"{len(data)} of {size} bytes at {offset}")
    return data
