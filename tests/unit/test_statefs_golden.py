"""Golden images of every format version: they open, and what is written now is what they are.

Each file names its version, what the store holds, and every block that is not all zeros. To write
the one of a new version: `python -m tests.unit.test_statefs_golden`.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from nexus.abi import BLOCK_SIZE
from nexus.drivers import finished
from nexus.kernel.sim.disk import Disk
from nexus.proof.powercut import LIMITS, DiskDevice
from nexus.services.statefsd.engine import FORMAT_VERSION, Change, Store, layout

FOLDER = Path(__file__).parent.parent / "golden"
BLOCKS = 128
GOLDEN = sorted(FOLDER.glob("statefs-*.hex"))


def made() -> tuple[Disk, dict[bytes, bytes]]:
    """A store with a checkpoint, a journal behind it, a batch, a request id, and a seal."""
    disk = Disk(BLOCKS)
    content: dict[bytes, bytes] = {}
    store = finished(Store.open(DiskDevice(disk), LIMITS))
    for number in range(6):
        change(store, content, {b"/state/a/%d" % number: b"value %d" % number * number})
    change(store, content, {b"/state/a/1": None, b"/state/boot/slot": b"A"}, request=77)
    store._begin_build()
    while finished(store.maintain()):
        pass
    change(store, content, {b"/state/a/2": b"changed", b"/state/name": bytes(600)})
    change(store, content, {b"/state/a/3": None}, request=78)
    finished(store.close())
    return disk, content


def change(
    store: Store,
    content: dict[bytes, bytes],
    values: dict[bytes, bytes | None],
    *,
    request: int = 0,
) -> None:
    """A durable batch, and what it comes to."""
    batch = [Change(key, value) for key, value in values.items()]
    _ = store.stage(batch, client=5 if request else 0, request_id=request)
    finished(store.commit(True))
    for key, value in values.items():
        if value is None:
            del content[key]
        else:
            content[key] = value


def lines(disk: Disk, content: dict[bytes, bytes]) -> Iterator[str]:
    yield f"version {FORMAT_VERSION}"
    yield f"blocks {disk.block_count}"
    for key, value in sorted(content.items()):
        yield f"key {key.hex()} {value.hex()}".rstrip()
    for block in range(disk.block_count):
        data = disk.read(block, 1)
        if data.strip(b"\0"):
            yield f"block {block} {data.hex()}"


def read(path: Path) -> tuple[int, Disk, dict[bytes, bytes]]:
    words = [line.split(" ") for line in path.read_text("ascii").splitlines()]
    disk = Disk(int(words[1][1]))
    content = {}
    for kind, *rest in words[2:]:
        if kind == "key":
            content[bytes.fromhex(rest[0])] = bytes.fromhex("".join(rest[1:]))
        else:
            disk.write(int(rest[0]), bytes.fromhex(rest[1]), durable=True)
    return int(words[0][1]), disk, content


def test_every_format_version_has_its_golden_image() -> None:
    versions = [read(path)[0] for path in GOLDEN]

    assert versions == list(range(1, FORMAT_VERSION + 1))


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_a_golden_image_opens_and_holds_what_it_held(path: Path) -> None:
    _, disk, content = read(path)

    store = finished(Store.open(DiskDevice(disk), LIMITS))

    assert store.keys(b"/state/", b"", 100, lambda _: True) == (sorted(content), False)
    for key, value in content.items():
        entry = finished(store.get(key))
        assert entry is not None
        assert entry.value == value
    assert (store.lost_count, store.unfinished) == (0, 0)
    assert [store.applied(5, request) is not None for request in (76, 77, 78)] == [
        False,
        True,
        True,
    ]


def test_what_is_written_now_is_what_this_version_writes() -> None:
    golden = FOLDER / f"statefs-{FORMAT_VERSION}.hex"

    assert list(lines(*made())) == golden.read_text("ascii").splitlines(), (
        "the format has changed: raise FORMAT_VERSION, keep the old image, describe both"
    )


def test_the_page_that_describes_the_format_is_of_this_version() -> None:
    page = (Path(__file__).parents[2] / "docs" / "reference" / "statefs-format.md").read_text()

    assert f"version {FORMAT_VERSION}" in page
    for name in ("BLOCK_SIZE", "SEGMENT_SIZE", "RECORD_HEAD_SIZE", "STORE_BLOCKS_MIN"):
        [told] = re.findall(rf"`{name}` = ([0-9 ]+)", page)
        value = BLOCK_SIZE if name == "BLOCK_SIZE" else getattr(layout, name)
        assert int(told.replace(" ", "")) == value


if __name__ == "__main__":
    _ = (FOLDER / f"statefs-{FORMAT_VERSION}.hex").write_text(
        "\n".join(lines(*made())) + "\n", "ascii"
    )
