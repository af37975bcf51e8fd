"""The strict reader: what it takes, what it refuses and by which rule, and how little it needs."""

import json
import random  # noqa: TID251 (bytes that do not pack, the same in each run)
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest
from backports import zstd

from fuzz.sets import (
    CHUNKS_AT,
    FILES_AT,
    PATHS,
    SBOM_AT,
    SERVICES_AT,
    SYSTEM_AT,
    Kept,
    Parts,
    about,
    assemble,
    small,
)
from nexus.bootctl import COUNT_MAX
from nexus.drivers import finished
from nexus.drivers.crc import crc32c
from nexus.sets import (
    CHUNK_SIZE,
    MANIFEST_SIZE_MAX,
    SET_SIZE_MAX,
    UNPACKED_SIZE_MAX,
    Base,
    BytesSource,
    CallSource,
    Content,
    Known,
    PartSource,
    Pass,
    SetRefused,
    SetStatus,
    Verified,
    read_file,
    read_manifest,
    unmet,
    unpack,
    verify,
    write,
)
from nexus.sets.manifest import FILES_MAX, HEALTH_MAX, PATH_SIZE_MAX
from nexus.sets.reader import END, HEADER, MAGIC

MIB: Final = 1 << 20
SMALL: Final = write(about(), small())
LARGE: Final = write(
    about(),
    small() | {"data/large": Content(data=bytes(range(256)) * 2048 + bytes(CHUNK_SIZE) * 2)},
)


def refused(data: bytes) -> SetStatus:
    """Why `unpack` refuses it; `verify` has to agree."""
    with pytest.raises(SetRefused) as by_unpack:
        _ = finished(unpack(BytesSource(data), Kept()))
    with pytest.raises(SetRefused) as by_verify:
        _ = finished(verify(BytesSource(data)))
    assert (by_verify.value.status, by_verify.value.detail) == (
        by_unpack.value.status,
        by_unpack.value.detail,
    )
    assert str(by_verify.value).isprintable()
    return by_verify.value.status


def crafted(change: Callable[[Parts], Any], of: bytes = SMALL) -> bytes:
    """A set with one thing changed and every digest around it made right."""
    parts = Parts.of(of)
    _ = change(parts)
    return parts.joined()


def with_chunk(stored: bytes, content: bytes, *, size: int | None = None) -> bytes:
    """A set whose first chunk is stored so, under the right digest of `content`."""

    def change(parts: Parts) -> None:
        parts.chunks[0] = stored
        entry = parts.manifest[CHUNKS_AT][0]
        entry[:] = [len(stored), len(content) if size is None else size, sha256(content).digest()]
        for file in parts.manifest[FILES_AT]:
            if file[3] == [0]:
                file[2] = entry[1]

    return crafted(change)


# ---------------------------------------------------------------- what it takes


def test_what_was_written_comes_out_of_unpack() -> None:
    kept = Kept()

    verified = finished(unpack(BytesSource(SMALL), kept))

    assert kept.files == small()
    assert verified == finished(verify(BytesSource(SMALL)))
    assert (verified.size, verified.sha256) == (len(SMALL), sha256(SMALL).digest())
    assert verified.manifest == finished(read_manifest(BytesSource(SMALL)))


def test_one_file_is_read_without_the_others() -> None:
    source = BytesSource(LARGE)
    manifest = finished(read_manifest(source))

    data = finished(read_file(source, manifest, "data/large", MIB * 2))

    assert data == bytes(range(256)) * 2048 + bytes(CHUNK_SIZE) * 2
    with pytest.raises(SetRefused) as too_large:
        _ = finished(read_file(source, manifest, "data/large", len(data) - 1))
    assert too_large.value.status is SetStatus.OVERSIZED
    with pytest.raises(SetRefused) as absent:
        _ = finished(read_file(source, manifest, "data/other", MIB))
    assert absent.value.status is SetStatus.MISSING


def test_a_set_in_the_middle_of_something_is_the_same_set() -> None:
    around = BytesSource(b"before" + LARGE + b"behind")

    verified = finished(verify(PartSource(around, 6, len(LARGE))))

    assert verified == finished(verify(BytesSource(LARGE)))


def test_a_pass_goes_on_one_chunk_at_a_time() -> None:
    reading = Pass(BytesSource(LARGE))
    seen = []
    verified: Verified | None = None
    while verified is None:
        before = reading.done
        verified = finished(reading.step())
        seen.append(reading.done - before)

    head = HEADER.size + HEADER.unpack_from(LARGE)[2]
    assert seen[0] == head
    assert max(seen[1:-1]) <= CHUNK_SIZE
    assert sum(seen) == len(LARGE)


def test_no_read_asks_for_more_than_the_manifest_or_a_chunk() -> None:
    asked: list[int] = []

    def read_at(offset: int, size: int) -> bytes:
        asked.append(size)
        return LARGE[offset : offset + size]

    _ = finished(unpack(CallSource(read_at, len(LARGE)), Kept()))

    assert max(asked) <= max(CHUNK_SIZE, HEADER.unpack_from(LARGE)[2])


# ---------------------------------------------------------------- damage


def test_a_flipped_bit_at_each_byte_of_a_small_set_is_refused() -> None:
    statuses = set()
    for at in range(len(SMALL)):
        for bit in range(8):
            data = bytearray(SMALL)
            data[at] ^= 1 << bit
            with pytest.raises(SetRefused) as error:
                _ = finished(verify(BytesSource(bytes(data))))
            statuses.add(error.value.status)

    assert statuses >= {SetStatus.NOT_A_SET, SetStatus.VERSION, SetStatus.CHECKSUM}


def test_the_manifest_alone_refuses_a_flipped_bit_of_header_and_manifest() -> None:
    head = HEADER.size + HEADER.unpack_from(SMALL)[2]
    for at in range(head):
        data = bytearray(SMALL)
        data[at] ^= 1 << at % 8
        with pytest.raises(SetRefused):
            _ = finished(read_manifest(BytesSource(bytes(data))))


def test_a_stream_that_ends_early_is_refused_at_each_length() -> None:
    found = {refused(SMALL[:size]) for size in range(1, len(SMALL))}

    assert found == {SetStatus.TRUNCATED}
    assert refused(b"") is SetStatus.NOT_A_SET


def test_a_source_that_gives_less_than_it_says_is_refused_at_each_length() -> None:
    for size in range(len(SMALL)):
        cut = BytesSource(SMALL[:size])
        cut.size = len(SMALL)
        with pytest.raises(SetRefused) as error:
            _ = finished(verify(cut))
        assert error.value.status in {SetStatus.TRUNCATED, SetStatus.NOT_A_SET}


@pytest.mark.parametrize("more", [b"\0", SMALL], ids=["a byte", "another set"])
def test_a_set_that_goes_on_behind_its_end_is_refused(more: bytes) -> None:
    assert refused(SMALL + more) is SetStatus.TRAILING


def test_the_bits_of_a_frame_that_mean_nothing_are_covered_by_the_whole() -> None:
    head = HEADER.size + HEADER.unpack_from(SMALL)[2]
    silent = 0
    for at in range(head, len(SMALL) - 32):
        for bit in range(8):
            data = bytearray(SMALL[:-32])
            data[at] ^= 1 << bit
            try:
                _ = finished(verify(BytesSource(bytes(data) + sha256(data).digest())))
            except SetRefused:
                continue
            silent += 1

    assert silent, "then the digest of the whole would be of no use, and could go"


def test_a_wrong_digest_of_a_chunk_is_refused() -> None:
    def change(parts: Parts) -> None:
        parts.manifest[CHUNKS_AT][1][2] = sha256(b"something else").digest()

    assert refused(crafted(change)) is SetStatus.CHECKSUM


def test_two_chunks_in_each_others_place_are_refused() -> None:
    def change(parts: Parts) -> None:
        parts.chunks[0], parts.chunks[1] = parts.chunks[1], parts.chunks[0]
        table = parts.manifest[CHUNKS_AT]
        table[0][0], table[1][0] = table[1][0], table[0][0]

    assert refused(crafted(change)) in {SetStatus.CHECKSUM, SetStatus.COMPRESSION, SetStatus.LAYOUT}


def test_a_wrong_digest_of_the_whole_is_refused() -> None:
    assert refused(SMALL[:-32] + sha256(b"something else").digest()) is SetStatus.CHECKSUM


def test_a_wrong_end_under_a_right_digest_is_refused() -> None:
    whole = SMALL[: -32 - len(END)] + b"NXFIN\0\0\0"

    assert refused(whole + sha256(whole).digest()) is SetStatus.CHECKSUM


def test_another_format_is_refused_before_anything_else_of_it_is_read() -> None:
    assert refused(MAGIC + b"\2\0" + SMALL[8:]) is SetStatus.VERSION


def test_a_set_that_was_hashed_before_is_told_from_other_bytes_by_its_crc() -> None:
    known = Known(sha256=sha256(SMALL).digest(), crc=crc32c(SMALL))
    flipped = bytearray(SMALL)
    flipped[-1] ^= 1  # nothing but the digest of the whole covers it

    assert finished(run(Pass(BytesSource(SMALL), known=known))).sha256 == known.sha256
    with pytest.raises(SetRefused) as error:
        _ = finished(run(Pass(BytesSource(bytes(flipped)), known=known)))
    assert error.value.status is SetStatus.CHECKSUM


async def run(reading: Pass) -> Verified:
    while (verified := await reading.step()) is None:
        pass
    return verified


# ---------------------------------------------------------------- paths, duplicates, links


@pytest.mark.parametrize("path", [path for path in PATHS if path not in ("A", "a/b/c", "python")])
def test_a_path_that_leads_elsewhere_is_refused(path: str) -> None:
    def change(parts: Parts) -> None:
        parts.manifest[FILES_AT][0][0] = path

    wanted = SetStatus.PATH if 0 < len(path) <= PATH_SIZE_MAX else SetStatus.MANIFEST
    assert refused(crafted(change)) is wanted


@pytest.mark.parametrize(
    "path",
    [
        "..",
        "a/..",
        "a/../b",
        "/",
        "/a",
        "a/",
        "a\\b",
        "a b",
        "a\x7f",
        "~\u202egpj.py",
        "%2e",
        "a" + "/a" * 32,
    ],
)
def test_every_kind_of_path_trick_is_the_rule_of_paths(path: str) -> None:
    with pytest.raises(SetRefused) as error:
        _ = write(about(), small() | {path: Content(data=b"")})

    assert error.value.status is SetStatus.PATH


def test_names_that_only_look_like_tricks_are_names() -> None:
    files = small() | {".hidden/...": Content(data=b"1"), "a/..b/c..": Content(data=b"2")}

    kept = Kept()
    _ = finished(unpack(BytesSource(write(about(), files)), kept))

    assert kept.files == files


def test_a_file_twice_is_refused() -> None:
    def change(parts: Parts) -> None:
        files = parts.manifest[FILES_AT]
        files.insert(1, list(files[0]))

    assert refused(crafted(change)) is SetStatus.DUPLICATE


def test_two_files_that_differ_in_case_alone_are_refused() -> None:
    with pytest.raises(SetRefused) as error:
        _ = write(about(), small() | {"python/RUN": Content(data=b"other")})

    assert error.value.status is SetStatus.DUPLICATE


@pytest.mark.parametrize("above", ["python", "Python", "python/nexus", "system"])
def test_a_file_where_another_needs_a_folder_is_refused(above: str) -> None:
    with pytest.raises(SetRefused) as error:
        _ = write(about(), small() | {above: Content(data=b"")})

    assert error.value.status is SetStatus.CLASH


def test_a_chunk_twice_in_the_table_is_refused() -> None:
    def change(parts: Parts) -> None:
        parts.manifest[CHUNKS_AT].append(list(parts.manifest[CHUNKS_AT][0]))
        parts.chunks.append(parts.chunks[0])

    assert refused(crafted(change)) is SetStatus.DUPLICATE


def test_there_is_no_way_to_write_a_link_down() -> None:
    """A file has a path, one bit of its mode, a size and chunks; one more field is refused, and so
    is anything but a bool where the bit is, as the type of a tar entry would be."""

    def more(parts: Parts) -> None:
        parts.manifest[FILES_AT][0].append("/etc/passwd")

    def kind(parts: Parts) -> None:
        parts.manifest[FILES_AT][0][1] = "2"

    assert refused(crafted(more)) is SetStatus.MANIFEST
    assert refused(crafted(kind)) is SetStatus.MANIFEST


# ---------------------------------------------------------------- the manifest's one form


def reordered(table: dict[str, Any]) -> None:
    first = next(iter(table))
    table[first] = table.pop(first)


@pytest.mark.parametrize(
    "change",
    [
        lambda parts: parts.manifest[FILES_AT].reverse(),
        lambda parts: reordered(parts.manifest[SERVICES_AT]),
        lambda parts: reordered(parts.manifest[5][1]),
        lambda parts: parts.manifest.append(0),
        lambda parts: parts.manifest.pop(),
        lambda parts: parts.manifest.__setitem__(0, 0),
        lambda parts: parts.manifest.__setitem__(0, -1),
        lambda parts: parts.manifest.__setitem__(0, "7"),
        lambda parts: parts.manifest.__setitem__(1, ""),
        lambda parts: parts.manifest.__setitem__(1, "x" * 49),
        lambda parts: parts.manifest.__setitem__(1, "1.2\x1b[2J"),
        lambda parts: parts.manifest.__setitem__(4, 0),
        lambda parts: parts.manifest[SERVICES_AT].__setitem__("timed", bytes(31)),
        lambda parts: parts.manifest[7].__setitem__("/etc/", 1),
        lambda parts: parts.manifest[FILES_AT].clear(),
    ],
)
def test_a_manifest_in_any_other_form_is_refused(change: Callable[[Parts], Any]) -> None:
    assert refused(crafted(change)) is SetStatus.MANIFEST


@pytest.mark.parametrize(
    "manifest",
    [b"", b"\xc1", b"\x90", b"{}", b"\xdd\xff\xff\xff\xff", b"\x91" * 500, b"\xdf\xff\xff\xff\xff"],
)
def test_what_is_no_manifest_is_refused(manifest: bytes) -> None:
    assert refused(assemble(manifest, b"")) is SetStatus.MANIFEST


def test_a_number_in_a_longer_form_is_refused() -> None:
    manifest = msgspec.msgpack.encode(Parts.of(SMALL).manifest)
    assert manifest[1] == 7  # the version
    longer = manifest[:1] + b"\xcc\x07" + manifest[2:]

    assert refused(assemble(longer, b"".join(Parts.of(SMALL).chunks))) is SetStatus.MANIFEST


@pytest.mark.parametrize("at", [SYSTEM_AT, SBOM_AT])
def test_a_file_that_the_manifest_names_has_to_be_there(at: int) -> None:
    def change(parts: Parts) -> None:
        parts.manifest[at] = "system/other.toml"

    assert refused(crafted(change)) is SetStatus.MISSING


@pytest.mark.parametrize(
    "change",
    [
        lambda files, _: files[1][3].append(0),  # a chunk too many
        lambda files, _: files[1][3].pop(),  # one too few
        lambda files, _: files[1].__setitem__(2, 8),  # another size than its chunk's
        lambda files, _: files[1].__setitem__(2, CHUNK_SIZE + 1),
        lambda files, _: files[1].__setitem__(3, [1]),  # not in order of first use
        lambda files, _: files[-1].__setitem__(3, [99]),
        lambda _, chunks: chunks[0].__setitem__(0, chunks[0][1] + 1),  # stored in more than it has
        lambda _, chunks: chunks.append([1, 1, bytes(32)]),  # a chunk of no file
    ],
)
def test_tables_that_do_not_fit_are_refused(change: Callable[[Any, Any], Any]) -> None:
    def changed(parts: Parts) -> None:
        change(parts.manifest[FILES_AT], parts.manifest[CHUNKS_AT])
        parts.chunks = [bytes(entry[0]) for entry in parts.manifest[CHUNKS_AT]]

    assert refused(crafted(changed)) is SetStatus.LAYOUT


# ---------------------------------------------------------------- limits


def test_a_manifest_over_its_limit_is_refused_unread() -> None:
    asked: list[int] = []
    header = HEADER.pack(MAGIC, 1, MANIFEST_SIZE_MAX + 1, bytes(32))

    def read_at(offset: int, size: int) -> bytes:
        asked.append(size)
        return (header + bytes(size))[offset : offset + size]

    with pytest.raises(SetRefused) as error:
        _ = finished(read_manifest(CallSource(read_at, SET_SIZE_MAX)))
    assert error.value.status is SetStatus.OVERSIZED
    assert asked == [HEADER.size]


def test_a_set_over_its_limit_is_refused_unread() -> None:
    def read_at(offset: int, size: int) -> bytes:
        raise AssertionError("it is not read")

    with pytest.raises(SetRefused) as error:
        _ = finished(read_manifest(CallSource(read_at, SET_SIZE_MAX + 1)))
    assert error.value.status is SetStatus.OVERSIZED


def test_more_files_than_there_may_be_are_refused() -> None:
    def change(parts: Parts, count: int) -> None:
        left = count - len(parts.manifest[FILES_AT])
        parts.manifest[FILES_AT][:0] = [[f"a/{at:04}", False, 0, []] for at in range(left)]

    full = BytesSource(crafted(lambda parts: change(parts, FILES_MAX)))

    assert len(finished(verify(full)).manifest.files) == FILES_MAX
    assert refused(crafted(lambda parts: change(parts, FILES_MAX + 1))) is SetStatus.MANIFEST


def test_a_large_set_is_looked_at_a_chunk_at_a_time() -> None:
    data = write(
        about(), small() | {"data/large": Content(data=random.Random(2).randbytes(8 * MIB))}
    )
    source = BytesSource(data)

    tracemalloc.start()
    try:
        _ = finished(verify(source))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert peak < 4 * CHUNK_SIZE


def test_a_version_that_no_boot_record_counts_is_refused() -> None:
    def change(parts: Parts) -> None:
        parts.manifest[0] = COUNT_MAX + 1

    assert refused(crafted(change)) is SetStatus.OVERSIZED
    assert finished(verify(BytesSource(write(about(COUNT_MAX), small())))).size > 0


def test_a_health_deadline_of_more_than_an_hour_is_refused() -> None:
    def change(parts: Parts) -> None:
        parts.manifest[4] = HEALTH_MAX + 1

    assert refused(crafted(change)) is SetStatus.OVERSIZED


@pytest.mark.parametrize(
    "files",
    [
        [["/".join(["abcdef"] * 31) + f"/{at:017}", False, 0, []] for at in range(FILES_MAX)],
        [[f"{at:04}", False, 0, list(range(120)) * 2] for at in range(FILES_MAX)],
        [["a", False, 0, [*range(128)] * 64]] * 120,
    ],
    ids=["deep paths", "chunks", "one file"],
)
def test_the_largest_manifest_takes_bounded_memory(files: list[Any]) -> None:
    """What a hostile manifest can make of a megabyte."""
    parts = Parts.of(SMALL)
    parts.manifest[FILES_AT] = files
    manifest = msgspec.msgpack.encode(parts.manifest)
    assert MANIFEST_SIZE_MAX * 0.9 < len(manifest) <= MANIFEST_SIZE_MAX
    data = assemble(manifest, bytes(sum(map(len, parts.chunks))))

    tracemalloc.start()
    try:
        status = refused(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert status in {SetStatus.MISSING, SetStatus.LAYOUT, SetStatus.DUPLICATE, SetStatus.MANIFEST}
    assert peak < 24 * MIB


# ---------------------------------------------------------------- bombs


def test_a_manifest_that_says_10_gb_is_refused() -> None:
    def change(parts: Parts) -> None:
        file = parts.manifest[FILES_AT][1]
        file[2] = 10 * 10**9
        file[3] = [0] * (UNPACKED_SIZE_MAX // CHUNK_SIZE)

    assert refused(crafted(change)) is SetStatus.OVERSIZED


def test_a_chunk_used_until_it_is_10_gb_is_refused() -> None:
    """One chunk of zeros, a dozen bytes stored, behind five files of 2 GiB."""
    data = bytes(CHUNK_SIZE)
    stored = zstd.compress(data)
    parts = Parts.of(write(about(), small() | {"a/0": Content(data=data)}))
    count = UNPACKED_SIZE_MAX // CHUNK_SIZE
    files = [[f"a/{n}", False, count * CHUNK_SIZE, [0] * count] for n in range(5)]
    parts.manifest[FILES_AT][:1] = files
    assert len(stored) < 100

    assert refused(parts.joined()) is SetStatus.OVERSIZED


def unsized(content: bytes) -> bytes:
    """A frame without its content size."""
    packer = zstd.ZstdCompressor(options={zstd.CompressionParameter.window_log: 17})
    frame = packer.compress(content) + packer.flush()
    assert zstd.get_frame_info(frame).decompressed_size is None
    return frame


@pytest.mark.parametrize(
    ("stored", "content", "size"),
    [
        (zstd.compress(bytes(64 * MIB)), bytes(64 * MIB), CHUNK_SIZE),  # says what it is
        (zstd.compress(b"x" * 100) + zstd.compress(bytes(MIB)), b"x" * 100, None),  # two frames
        (zstd.compress(b"x" * 100)[:-1], b"x" * 100, None),  # half of one
        (zstd.compress(b"x" * 100), b"x" * 101, None),  # of another size
        (b"\x50\x2a\x4d\x18\0\0\0\0", b"x" * 100, None),  # a frame to be skipped
        (b"no frame", b"x" * 100, None),
        (unsized(b"x" * 100), b"x" * 100, None),  # of the right size, and does not say so
    ],
    ids=["bomb", "two", "half", "another size", "skipped", "none", "unsized"],
)
def test_a_chunk_that_is_not_its_frame_is_refused(
    stored: bytes, content: bytes, size: int | None
) -> None:
    assert refused(with_chunk(stored, content, size=size)) is SetStatus.COMPRESSION


def test_a_frame_that_looks_back_further_than_a_chunk_is_refused() -> None:
    """What a decoder would have to allocate for is in the frame's header, not in its size."""
    content = bytes(CHUNK_SIZE)
    block = ((CHUNK_SIZE // 2) << 3) | (1 << 1)  # one byte, repeated
    frame = (
        b"\x28\xb5\x2f\xfd"
        + bytes([0x80, (27 - 10) << 3])  # a size of four bytes; a window of 128 MiB
        + CHUNK_SIZE.to_bytes(4, "little")
        + block.to_bytes(3, "little")
        + b"\0"
        + (block | 1).to_bytes(3, "little")
        + b"\0"
    )
    assert zstd.decompress(frame) == content

    assert refused(with_chunk(frame, content)) is SetStatus.COMPRESSION


BOMB: Final = """
import json, resource, sys
from nexus.drivers import finished
from nexus.drivers.crc import crc32c
from nexus.sets import BytesSource, SetRefused, verify
data = open(sys.argv[1], "rb").read()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    finished(verify(BytesSource(data)))
except SetRefused as refused:
    status = refused.status.name
else:
    status = "taken"
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps([status, after - before]))
"""
BOMB_MEMORY_MAX: Final = 4096  # KiB that refusing it may take


def lying_frame(size: int) -> bytes:
    """A frame that says it has one chunk and goes on for `size` bytes: blocks of one byte each,
    repeated 128 KiB times."""
    block = 128 * 1024
    header = b"\x28\xb5\x2f\xfd" + bytes([0xA0]) + CHUNK_SIZE.to_bytes(4, "little")
    repeated = ((block << 3) | (1 << 1)).to_bytes(3, "little") + b"\0"
    last = ((block << 3) | (1 << 1) | 1).to_bytes(3, "little") + b"\0"
    return header + repeated * (size // block - 1) + last


def bomb() -> bytes:
    """A set of two chunks, each of as many repeating blocks as fit: 8.5 GB behind the 256 KiB that
    it says."""
    frame = lying_frame((CHUNK_SIZE // 4 - 10) * 128 * 1024)
    assert CHUNK_SIZE - 100 < len(frame) < CHUNK_SIZE

    def change(parts: Parts) -> None:
        for at in (0, 1):
            parts.chunks[at] = frame
            parts.manifest[CHUNKS_AT][at][:] = [len(frame), CHUNK_SIZE, bytes([at]) * 32]
        for file in parts.manifest[FILES_AT]:
            if file[3] in ([0], [1]):
                file[2] = CHUNK_SIZE

    return crafted(change)


def test_frames_that_lie_about_17_gb_are_refused_in_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "bomb.nxs"
    path.write_bytes(bomb())

    told = subprocess.run(
        [sys.executable, "-c", BOMB, str(path)], capture_output=True, text=True, check=True
    )
    status, taken = json.loads(told.stdout)

    assert status == "COMPRESSION"
    assert taken < BOMB_MEMORY_MAX


# ---------------------------------------------------------------- what it needs below it


def test_a_set_tells_what_the_base_system_has_not() -> None:
    needed = Base(python="3.11", distributions={"h11": "0.16.0", "msgspec": "0.22.0"})

    assert unmet(needed, "3.11", {"h11": "0.16.0", "msgspec": "0.22.0", "more": "1"}) == []
    assert unmet(needed, "3.12", {"h11": "0.16.1"}) == [
        "python 3.11, here it is 3.12",
        "h11 0.16.0, here it is 0.16.1",
        "msgspec 0.22.0, here it is not installed",
    ]
