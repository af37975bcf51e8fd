import shutil
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nexus.vm.initramfs import Tree, WrongArchive, entries_of, packed


def small_tree() -> Tree:
    tree = Tree()
    tree.file("usr/bin/python3.11", b"\x7fELF", 0o755)
    tree.link("bin", "usr/bin")
    tree.node("dev/urandom", 1, 9, 0o666)
    tree.folder("tmp", 0o1777)
    return tree


def test_what_is_packed_is_read_back_with_its_folders_in_front() -> None:
    found = dict(entries_of(packed(small_tree())))

    assert list(found) == [
        "bin",
        "dev",
        "dev/urandom",
        "tmp",
        "usr",
        "usr/bin",
        "usr/bin/python3.11",
    ]
    assert found["bin"].data == b"usr/bin"
    assert found["dev/urandom"].device == (1, 9)
    assert found["tmp"].mode == 0o041777
    assert found["usr/bin/python3.11"].mode == 0o100755


def test_the_order_in_which_files_were_put_in_does_not_show() -> None:
    first, second = Tree(), Tree()
    first.file("a", b"1")
    first.file("b/c", b"2")
    second.file("b/c", b"2")
    second.file("a", b"1")

    assert packed(first) == packed(second)


def test_an_archive_behind_another_is_read_with_the_padding_between_them() -> None:
    over = Tree()
    over.file("job.json", b"{}")

    found = dict(entries_of(packed(small_tree()) + bytes(512) + packed(over)))

    assert found["job.json"].data == b"{}"
    assert "usr/bin/python3.11" in found


def test_cpio_reads_what_we_write() -> None:
    cpio = shutil.which("cpio")
    if cpio is None:
        pytest.skip("there is no cpio to read it with: apt-get install cpio")

    done = subprocess.run(
        [cpio, "-itv", "--quiet", "--numeric-uid-gid"],
        input=packed(small_tree()),
        stdout=subprocess.PIPE,
        check=True,
    )

    lines = done.stdout.decode().splitlines()
    assert len(lines) == 7
    assert lines[0].startswith("lrwxrwxrwx")
    assert lines[0].endswith("bin -> usr/bin")
    assert lines[2].startswith("crw-rw-rw-")
    assert "1,   9" in lines[2]
    assert all(line.split()[2:4] == ["0", "0"] for line in lines)


@pytest.mark.parametrize(
    "path", ["", ".", "/etc/passwd", "a/../b", "a//b", "a/", "../a", "x" * 5000]
)
def test_a_path_that_means_something_else_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match="is no path in an archive"):
        Tree().file(path, b"")


def test_nothing_can_be_below_a_file() -> None:
    tree = Tree()
    tree.file("etc", b"")

    with pytest.raises(ValueError, match="which is no folder"):
        tree.file("etc/passwd", b"")


@given(st.dictionaries(st.from_regex(r"[a-z]{1,9}", fullmatch=True), st.binary(), max_size=8))
def test_any_content_comes_back(files: dict[str, bytes]) -> None:
    tree = Tree()
    for path, data in files.items():
        tree.file(path, data)

    assert {path: entry.data for path, entry in entries_of(packed(tree))} == files


@given(st.binary(max_size=300), st.integers(0, 400))
def test_a_damaged_archive_is_refused_or_read_and_never_anything_else(
    noise: bytes, at: int
) -> None:
    whole = bytearray(packed(small_tree()))
    whole[at : at + len(noise)] = noise

    try:
        found = list(entries_of(bytes(whole)))
    except (WrongArchive, UnicodeDecodeError):
        return
    assert len(found) <= 8 + len(noise)


def test_an_archive_that_ends_too_early_is_refused() -> None:
    whole = packed(small_tree())

    with pytest.raises(WrongArchive, match=r"cut short|no header"):
        list(entries_of(whole[:150]))
