import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nexus.vm.writelog import (
    ENTRY,
    MAGIC,
    SUPERBLOCK,
    Cut,
    Entry,
    Kind,
    WrongLog,
    count_of,
    cuts,
    entries_of,
    lasting,
    rebuilt,
)

SECTOR = 512
FLUSH = Entry(Kind.FLUSH, 0, 0, b"")


PLAIN = Kind(0)


def write(number: int, letter: bytes, kind: Kind = PLAIN) -> Entry:
    """A sector full of a letter."""
    return Entry(kind, number * SECTOR, SECTOR, letter * SECTOR)


def log_of(*entries: Entry) -> bytes:
    """As QEMU writes it."""
    out = SUPERBLOCK.pack(MAGIC, 1, len(entries), SECTOR).ljust(SECTOR, b"\0")
    for entry in entries:
        head = ENTRY.pack(entry.offset // SECTOR, entry.size // SECTOR, entry.kind, 0)
        out += head.ljust(SECTOR, b"\0") + entry.data
    return out


def shown(cut: Cut) -> tuple[int, tuple[int, ...], str]:
    """The first letter of each sector, a dot for zeros."""
    letters = cut.image[::SECTOR].replace(b"\0", b".").decode()
    return cut.after, cut.dropped, letters


def test_a_log_is_read_back(tmp_path: Path) -> None:
    entries = [write(0, b"a"), FLUSH, Entry(Kind.DISCARD, SECTOR, 2 * SECTOR, b"")]
    file = tmp_path / "log"
    _ = file.write_bytes(log_of(*entries))

    assert list(entries_of(file)) == entries
    assert count_of(file) == 3


def test_a_log_that_has_no_head_yet_has_no_entries(tmp_path: Path) -> None:
    _ = (tmp_path / "empty").write_bytes(b"")

    assert count_of(tmp_path / "empty") == 0
    assert count_of(tmp_path / "missing") == 0


def test_an_entry_beyond_the_count_is_not_read(tmp_path: Path) -> None:
    data = bytearray(log_of(write(0, b"a"), write(1, b"b")))
    struct.pack_into("<Q", data, 16, 1)
    _ = (tmp_path / "log").write_bytes(data)

    assert list(entries_of(tmp_path / "log")) == [write(0, b"a")]


@pytest.mark.parametrize("size", [10, 600, 1030])
def test_a_log_that_is_cut_off_is_refused(size: int, tmp_path: Path) -> None:
    _ = (tmp_path / "log").write_bytes(log_of(write(0, b"a"))[:size])

    with pytest.raises(WrongLog, match=r"too short|cut off"):
        list(entries_of(tmp_path / "log"))


def test_what_was_flushed_is_in_every_later_disk_and_what_was_not_may_be_missing() -> None:
    entries = [write(0, b"a"), FLUSH, write(1, b"b"), write(2, b"c"), FLUSH]

    found = [shown(cut) for cut in cuts(bytes(3 * SECTOR), entries)]

    assert found == [
        (0, (), "..."),
        (1, (0,), "..."),
        (2, (), "a.."),
        (4, (2,), "a.c"),
        (4, (3,), "ab."),
        (4, (2, 3), "a.."),
        (5, (), "abc"),
    ]


def test_what_was_written_through_is_never_dropped() -> None:
    entries = [write(0, b"a"), write(0, b"b", Kind.FUA), write(1, b"c")]

    found = [shown(cut) for cut in cuts(bytes(2 * SECTOR), entries)]

    assert found == [(0, (), ".."), (3, (0,), "bc"), (3, (2,), "b."), (3, (0, 2), "b.")]


def test_a_discard_is_a_write_of_zeros() -> None:
    assert rebuilt(b"x" * SECTOR, [Entry(Kind.DISCARD, 0, SECTOR, b"")]) == bytes(SECTOR)


def test_what_lasts_is_what_came_before_the_last_flush_that_is_known() -> None:
    entries = [write(0, b"a"), FLUSH, write(1, b"b"), FLUSH]

    assert [lasting(entries, known) for known in range(5)] == [0, 0, 2, 2, 4]


def test_a_write_that_reached_the_disk_in_part_is_there_in_part() -> None:
    image = rebuilt(bytes(2 * SECTOR), [write(0, b"a")], b"bb", SECTOR)

    assert image == b"a" * SECTOR + b"bb" + bytes(SECTOR - 2)


def test_a_write_behind_the_end_of_the_disk_is_refused() -> None:
    with pytest.raises(WrongLog, match="a write ends at 1024, and the disk at 512"):
        rebuilt(bytes(SECTOR), [write(1, b"a")])


@given(
    st.lists(
        st.one_of(
            st.just(FLUSH), st.builds(write, st.integers(0, 3), st.sampled_from([b"a", b"b"]))
        ),
        max_size=12,
    )
)
def test_every_disk_is_the_flushed_one_with_some_later_writes(entries: list[Entry]) -> None:
    blank = bytes(4 * SECTOR)

    for cut in cuts(blank, entries):
        kept = lasting(entries, cut.after)
        assert all(kept <= each < cut.after for each in cut.dropped)
        done = [entry for at, entry in enumerate(entries[: cut.after]) if at not in cut.dropped]
        assert cut.image == rebuilt(blank, done)
