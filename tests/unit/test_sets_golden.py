"""A golden set of every format version: it is read, and what is written now is what it is.

Each file names its version, the zstd it was written with, what the set holds, and its bytes. To
write the one of a new version: `python -m tests.unit.test_sets_golden`.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from backports import zstd

from fuzz.sets import Kept, about, small
from nexus.drivers import finished
from nexus.sets import BytesSource, Content, SetStatus, manifest, reader, unpack, verify, write

FOLDER: Final = Path(__file__).parent.parent / "golden"
GOLDEN: Final = sorted(FOLDER.glob("set-*.hex"))
PAGE: Final = Path(__file__).parents[2] / "docs" / "reference" / "set-format.md"


def lines(data: bytes, files: dict[str, Content]) -> Iterator[str]:
    yield f"version {reader.FORMAT}"
    yield f"zstd {zstd.zstd_version}"
    for path, content in sorted(files.items()):
        mode = "x" if content.executable else "-"
        yield f"file {path} {mode} {content.data.hex()}".rstrip()
    for at in range(0, len(data), 48):
        yield f"at {at} {data[at : at + 48].hex()}"


def read(path: Path) -> tuple[int, str, dict[str, Content], bytes]:
    words = [line.split(" ") for line in path.read_text("ascii").splitlines()]
    files = {
        rest[0]: Content(data=bytes.fromhex("".join(rest[2:])), executable=rest[1] == "x")
        for kind, *rest in words
        if kind == "file"
    }
    data = b"".join(bytes.fromhex(rest[1]) for kind, *rest in words if kind == "at")
    return int(words[0][1]), words[1][1], files, data


def test_every_format_version_has_its_golden_set() -> None:
    assert [read(path)[0] for path in GOLDEN] == list(range(1, reader.FORMAT + 1))


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_a_golden_set_holds_what_it_held(path: Path) -> None:
    _, _, files, data = read(path)
    kept = Kept()

    verified = finished(unpack(BytesSource(data), kept))

    assert kept.files == files
    told = verified.manifest
    assert (told.version, told.name, told.system) == (7, "1.2.0", "system/system.toml")
    assert (told.health, told.schemas) == (60_000_000_000, {"/state/plant/": 2})
    assert told.services == {"timed": bytes(range(32)), "valve": bytes(32)}


def test_what_is_written_now_is_what_this_version_writes() -> None:
    path = FOLDER / f"set-{reader.FORMAT}.hex"
    _, packer, files, data = read(path)
    written = write(about(), small())

    assert files == small()
    if packer == zstd.zstd_version:
        assert list(lines(written, small())) == path.read_text("ascii").splitlines(), (
            "the format has changed: raise FORMAT, keep the old set, describe both"
        )
    else:  # frames may differ, and with them what a chunk takes; nothing else may
        old, new = (finished(verify(BytesSource(each))).manifest for each in (data, written))
        assert (old.files, old.services) == (new.files, new.services)
        assert [c.sha256 for c in old.chunks] == [c.sha256 for c in new.chunks]


def test_the_page_that_describes_the_format_is_of_this_version() -> None:
    page = PAGE.read_text()

    assert f"version {reader.FORMAT}" in page
    limits = (
        "CHUNK_SIZE",
        "MANIFEST_SIZE_MAX",
        "UNPACKED_SIZE_MAX",
        "FILES_MAX",
        "CHUNKS_MAX",
        "PATH_SIZE_MAX",
        "PARTS_MAX",
        "SERVICES_MAX",
        "AREAS_MAX",
        "DISTRIBUTIONS_MAX",
    )
    for name in limits:
        [told] = re.findall(rf"`{name}` = ([0-9 ]+)", page)
        assert int(told.replace(" ", "")) == getattr(manifest, name), name
    for status in SetStatus:
        assert f"| {status.value} | {status.name} |" in page


if __name__ == "__main__":
    text = "\n".join(lines(write(about(), small()), small()))
    _ = (FOLDER / f"set-{reader.FORMAT}.hex").write_text(f"{text}\n", "ascii")
