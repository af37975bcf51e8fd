"""Mutated system sets against the strict reader.

Two kinds of mutation: bytes anywhere, and, since digests would stop almost all of those at the
door, manifests, headers and chunks whose digests are made right again. Whatever the bytes, `unpack`
ends in SetRefused with one printable line, or hands out exactly the files that the manifest names,
within a bound of time and of memory; and what it accepts, a writer given these files writes again.

    python -m fuzz.sets --sets 5000 --seed 1
"""

import argparse
import random  # noqa: TID251 (a fuzzer has a seeded generator of its own)
import sys
import time
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, Final

import msgspec
from backports import zstd

from fuzz.decoders import mutate as mutate_bytes
from nexus.drivers import finished
from nexus.sets import (
    CHUNK_SIZE,
    UNPACKED_SIZE_MAX,
    About,
    Base,
    BytesSource,
    Content,
    File,
    SetRefused,
    SetStatus,
    Verified,
    encode_manifest,
    read_manifest,
    unpack,
    verify,
    write,
)
from nexus.sets.manifest import DIGEST_SIZE
from nexus.sets.reader import END, FORMAT, HEADER, MAGIC

SETS_DEFAULT: Final = 5_000
SPAN_MAX: Final = 2.0  # s of CPU for one set
MEMORY_MAX: Final = 16 * 1024 * 1024  # bytes for one set; the largest manifest takes half of it
PATHS: Final = (
    "/etc/passwd",
    "../x",
    "a/../../x",
    "a//b",
    "./a",
    "a/.",
    "",
    "a\0b",
    "a\nb",
    "C:\\x",
    "A",
    "a/b/c",
    "python",
    "ä",
    "x" * 300,
)
NUMBERS: Final = (0, 1, 2, 255, 256, 65_535, CHUNK_SIZE - 1, CHUNK_SIZE, 2**31, 2**32 - 1, 2**63)


@dataclass(slots=True)
class Counts:
    """What became of the sets; `slowest` is s of CPU, `largest` bytes of memory."""

    accepted: int = 0
    refused: int = 0
    slowest: float = 0.0
    largest: int = 0
    statuses: set[SetStatus] = field(default_factory=set)


class Kept:
    """A Sink in memory that holds the reader to its promises."""

    def __init__(self) -> None:
        self.files: dict[str, Content] = {}
        self._parts: list[bytes] | None = None

    async def begin(self, file: File) -> None:
        """The next file."""
        assert self._parts is None, "the last file has not ended"
        assert file.path not in self.files
        self._parts = []

    async def write(self, data: bytes) -> None:
        """Its next bytes."""
        assert self._parts is not None, "no file has begun"
        assert 0 < len(data) <= CHUNK_SIZE
        self._parts.append(data)

    async def end(self, file: File) -> None:
        """It is whole."""
        assert self._parts is not None, "no file has begun"
        data = b"".join(self._parts)
        assert len(data) == file.size
        self.files[file.path] = Content(data=data, executable=file.executable)
        self._parts = None


def about(version: int = 7) -> About:
    """What a small set says of itself."""
    return About(
        version=version,
        name="1.2.0",
        system="system/system.toml",
        sbom="sbom.cdx.json",
        health=60_000_000_000,
        base=Base(python="3.11", distributions={"h11": "0.16.0", "msgspec": "0.22.0"}),
        services={"timed": bytes(range(32)), "valve": bytes(32)},
        schemas={"/state/plant/": 2},
    )


def small() -> dict[str, Content]:
    """The files of a small set: an empty one, an executable, one content twice, one that packs."""
    return {
        "python/nexus/__init__.py": Content(data=b""),
        "python/nexus/a.py": Content(data=b"same = 1\n"),
        "python/nexus/b.py": Content(data=b"same = 1\n"),
        "python/run": Content(data=b"#!python\n", executable=True),
        "sbom.cdx.json": Content(data=b'{"bomFormat": "CycloneDX"}\n' * 8),
        "system/system.toml": Content(data=b'[system]\nname = "fuzzed"\n' * 4),
    }


def seeds() -> list[bytes]:
    """A small set, and one with files of several chunks."""
    large = random.Random(1).randbytes(CHUNK_SIZE + 1000)
    files = small() | {"data/large": Content(data=large + bytes(CHUNK_SIZE * 2))}
    return [write(about(), small()), write(about(8), files)]


@dataclass(slots=True)
class Parts:
    """A set taken apart: its manifest in lists, maps and scalars, and its chunks as stored."""

    manifest: list[Any]
    chunks: list[bytes]

    @classmethod
    def of(cls, data: bytes) -> "Parts":
        """The parts of a correct set."""
        manifest = finished(read_manifest(BytesSource(data)))
        first = len(data) - len(END) - DIGEST_SIZE - manifest.stored_size
        stored = [
            data[first + at : first + at + chunk.stored]
            for at, chunk in zip(manifest.offsets(), manifest.chunks, strict=True)
        ]
        return cls(msgspec.msgpack.decode(encode_manifest(manifest)), stored)

    def joined(self) -> bytes:
        """The set again, every digest around the manifest and the whole made right."""
        return assemble(msgspec.msgpack.encode(self.manifest), b"".join(self.chunks))


def assemble(manifest: bytes, chunks: bytes) -> bytes:
    """Header, manifest, chunks and end, their digests right for whatever they are."""
    header = HEADER.pack(MAGIC, FORMAT, len(manifest), sha256(manifest).digest())
    whole = header + manifest + chunks + END
    return whole + sha256(whole).digest()


# where what is in the array of a manifest
SYSTEM_AT, SBOM_AT, SERVICES_AT, SCHEMAS_AT, FILES_AT, CHUNKS_AT = 2, 3, 6, 7, 8, 9


def mutate(rng: random.Random, correct: Sequence[bytes]) -> bytes:
    """One of the sets, changed somewhere."""
    match rng.randrange(4):
        case 0:
            return mutate_bytes(rng, correct)
        case 1:
            parts = Parts.of(rng.choice(correct))
            manifest = mutate_bytes(rng, [msgspec.msgpack.encode(parts.manifest)])
            return assemble(manifest, b"".join(parts.chunks))
        case _:
            parts = Parts.of(rng.choice(correct))
            for _ in range(rng.choice((1, 1, 2, 4))):
                rng.choice(CRAFTS)(rng, parts)
            return parts.joined()


def _craft_number(rng: random.Random, parts: Parts) -> None:
    """A number anywhere in the manifest."""
    table = rng.choice((parts.manifest, *parts.manifest[FILES_AT], *parts.manifest[CHUNKS_AT]))
    places = [at for at, value in enumerate(table) if isinstance(value, int)]
    at = rng.choice(places)
    table[at] = rng.choice((*NUMBERS, max(0, table[at] - 1), min(2**64 - 1, table[at] + 1)))


def _craft_path(rng: random.Random, parts: Parts) -> None:
    """A file at another path, in order or not."""
    files = parts.manifest[FILES_AT]
    rng.choice(files)[0] = rng.choice((*PATHS, rng.choice(files)[0]))
    if rng.randrange(2):
        files.sort(key=lambda file: file[0].encode())


def _craft_files(rng: random.Random, parts: Parts) -> None:
    """A file twice, gone, or in another place."""
    files = parts.manifest[FILES_AT]
    match rng.randrange(3):
        case 0:
            files.insert(rng.randrange(len(files)), list(rng.choice(files)))
        case 1 if len(files) > 1:
            del files[rng.randrange(len(files))]
        case _:
            rng.shuffle(files)


def _craft_indexes(rng: random.Random, parts: Parts) -> None:
    """A file of other chunks."""
    indexes = rng.choice(parts.manifest[FILES_AT])[3]
    if indexes and rng.randrange(2):
        indexes[rng.randrange(len(indexes))] = rng.choice((*range(8), *NUMBERS[:-1]))
    else:
        indexes.append(rng.randrange(8))


def _craft_chunk(rng: random.Random, parts: Parts) -> None:
    """Another chunk behind the same digest, or with one that is right, and a size that may be."""
    at = rng.randrange(len(parts.chunks))
    entry = parts.manifest[CHUNKS_AT][at]
    content = rng.choice((b"", b"x", bytes(CHUNK_SIZE), bytes(20_000_000), rng.randbytes(3000)))
    stored = rng.choice(
        (
            zstd.compress(content),
            zstd.compress(content) + b"x",
            zstd.compress(content)[:-1],
            mutate_bytes(rng, [parts.chunks[at]]),
            content[:CHUNK_SIZE],
        )
    )
    parts.chunks[at] = stored
    entry[0] = len(stored)
    if rng.randrange(2):
        entry[1] = len(content)
        entry[2] = sha256(content).digest()


def _craft_name(rng: random.Random, parts: Parts) -> None:
    """A file, a service or an area that the manifest names and that may not be."""
    match rng.randrange(3):
        case 0:
            at = rng.choice((SYSTEM_AT, SBOM_AT))
            parts.manifest[at] = rng.choice((*PATHS, parts.manifest[FILES_AT][0][0]))
        case 1:
            parts.manifest[SERVICES_AT][rng.choice(("a", "zz", "", "x" * 60, "a b"))] = bytes(32)
        case _:
            parts.manifest[SCHEMAS_AT][rng.choice(("/state/", "/etc/", "/state/z/", ""))] = 1


Craft = Callable[[random.Random, Parts], None]
CRAFTS: Final[tuple[Craft, ...]] = (
    _craft_number,
    _craft_path,
    _craft_files,
    _craft_indexes,
    _craft_chunk,
    _craft_name,
)


def try_set(data: bytes) -> SetStatus | None:
    """Unpack a set; why it was refused, None if it was not."""
    kept = Kept()
    source = BytesSource(data)
    try:
        verified = finished(unpack(source, kept))
    except SetRefused as refused:
        assert str(refused).isprintable(), str(refused)
        assert _verified(source) is None, "unpack refuses what verify takes"
        return refused.status
    assert _verified(source) == verified
    _check(data, verified, kept.files)
    return None


def _verified(source: BytesSource) -> Verified | None:
    try:
        return finished(verify(source))
    except SetRefused:
        return None


def _check(data: bytes, verified: Verified, files: dict[str, Content]) -> None:
    """What was accepted is what it says it is."""
    manifest = verified.manifest
    assert (verified.size, verified.sha256) == (len(data), sha256(data).digest())
    assert [file.path for file in manifest.files] == sorted(files)
    assert all(
        part not in ("", ".", "..") and part.isprintable()
        for path in files
        for part in path.split("/")
    )
    assert {manifest.system, manifest.sbom} <= files.keys()
    assert sum(len(content.data) for content in files.values()) <= UNPACKED_SIZE_MAX


def campaign(count: int, seed: int) -> Counts:
    """Unpack `count` mutated sets; what became of them."""
    rng = random.Random(f"{seed} sets")
    correct = seeds()
    counts = Counts()
    tracemalloc.start()
    try:
        for _ in range(count):
            data = mutate(rng, correct)
            before = time.process_time()
            tracemalloc.reset_peak()
            held = tracemalloc.get_traced_memory()[0]
            try:
                status = try_set(data)
            except BaseException:
                print(f"fuzz: the set was {data.hex()}", file=sys.stderr)
                raise
            counts.accepted += status is None
            counts.refused += status is not None
            if status is not None:
                counts.statuses.add(status)
            counts.slowest = max(counts.slowest, time.process_time() - before)
            counts.largest = max(counts.largest, tracemalloc.get_traced_memory()[1] - held)
            assert counts.slowest < SPAN_MAX, f"{counts.slowest:.1f} s for one set"
            assert counts.largest < MEMORY_MAX, f"{counts.largest} bytes for one set"
    finally:
        tracemalloc.stop()
    return counts


def main(arguments: Sequence[str] | None = None) -> int:
    """Run and report; 1 if nothing was accepted, or a rule refused nothing."""
    parser = argparse.ArgumentParser(prog="fuzz.sets", description=__doc__)
    parser.add_argument("--sets", type=int, default=SETS_DEFAULT, help="inputs")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    counts = campaign(options.sets, options.seed)
    fault = "" if counts.accepted and counts.statuses == set(SetStatus) else "  NOT TESTED"
    tally = f"accepted {counts.accepted:7d}  refused {counts.refused:7d}"
    rules = f"by {len(counts.statuses)} of {len(SetStatus)} rules"
    size = f"largest {counts.largest >> 10} KiB"
    print(f"{'sets':44s} {tally} {rules}  slowest {counts.slowest * 1000:.0f} ms  {size}{fault}")
    return 1 if fault else 0


if __name__ == "__main__":
    sys.exit(main())
