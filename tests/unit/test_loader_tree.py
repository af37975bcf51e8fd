import json
import os
import sys
from collections.abc import Callable
from hashlib import sha256
from importlib.util import cache_from_source
from pathlib import Path
from types import SimpleNamespace

import pytest

import nexus
from nexus.bootctl import TAIL_SIZE_MAX, BootRecord, SlotInfo, SlotName, provisioned
from nexus.drivers import finished
from nexus.loader.boots import INTERPRETER, errors_of, tail_of
from nexus.loader.tree import NoTree, is_whole, tree_of
from nexus.runtime.stamp import MODULE, UNSTAMPED, Stamp, read_stamp
from nexus.sets import About, Base, BytesSource, Content, Manifest, read_manifest, write

A, B = SlotName.A, SlotName.B
MAIN = "python/app/main.py"
FILES = {
    MAIN: b"ANSWER = 42\n",
    "python/app/__init__.py": b"",
    "python/app/wrong.py": b"def (\n",
    "system/s.toml": b"[system]\n",
    "sbom.cdx.json": b"{}",
    "tool": b"#!/bin/sh\n",
}


def a_set(version: int, **files: bytes) -> bytes:
    about = About(
        version=version,
        name=f"{version}.0.0",
        system="system/s.toml",
        sbom="sbom.cdx.json",
        health=1,
        base=Base(python="3.11", distributions={}),
        services={},
        schemas={},
    )
    content = {
        path: Content(data=data, executable=path == "tool")
        for path, data in {**FILES, **files}.items()
    }
    return write(about, content)


def manifest_of(data: bytes) -> Manifest:
    return finished(read_manifest(BytesSource(data)))


def info_of(data: bytes) -> SlotInfo:
    return SlotInfo(version=1, name="1", digest=sha256(data).digest(), size=len(data))


def record_of(a: bytes, b: bytes = b"") -> BootRecord:
    record = provisioned(info_of(a))
    return record.with_slot(B, info_of(b)) if b else record


def make(state: Path, record: BootRecord, name: SlotName, data: bytes) -> Path:
    return tree_of(state, record, name, manifest_of(data), BytesSource(data))


def compiled_of(tree: Path, path: str = MAIN) -> Path:
    return tree / cache_from_source(path)


def test_a_tree_holds_the_sets_files_their_stamp_and_what_was_compiled(tmp_path: Path) -> None:
    data = a_set(1)

    tree = make(tmp_path, record_of(data), A, data)

    assert tree == tmp_path / "slots" / f"a-{sha256(data).hexdigest()[:12]}"
    assert {path: (tree / path).read_bytes() for path in FILES} == FILES
    assert (tree / "tool").stat().st_mode & 0o777 == 0o755
    assert (tree / MAIN).stat().st_mode & 0o777 == 0o644
    assert compiled_of(tree).exists()
    assert not compiled_of(tree, "python/app/wrong.py").exists()
    stamp: dict[str, object] = {}
    exec((tree / "python" / f"{MODULE}.py").read_text(), stamp)
    assert (stamp["VERSION"], stamp["NAME"]) == (1, "1.0.0")
    assert stamp["DIGEST"] == sha256(data).hexdigest()


def test_what_was_compiled_names_the_place_where_it_runs(tmp_path: Path) -> None:
    data = a_set(1)

    tree = make(tmp_path, record_of(data), A, data)

    assert str(tree / MAIN).encode() in compiled_of(tree).read_bytes()


def test_a_tree_that_is_whole_is_left_alone(tmp_path: Path) -> None:
    data = a_set(1)
    tree = make(tmp_path, record_of(data), A, data)
    before = (tree / MAIN).stat().st_ino

    assert make(tmp_path, record_of(data), A, data) == tree
    assert (tree / MAIN).stat().st_ino == before


SPOILERS: dict[str, Callable[[Path], object]] = {
    "a file of the set changed": lambda tree: (tree / MAIN).write_bytes(b"ANSWER = 43\n"),
    "a file of the set is longer": lambda tree: (tree / MAIN).write_bytes(FILES[MAIN] + b"\n"),
    "a file of the set is not empty": lambda tree: (tree / "python/app/__init__.py").write_bytes(
        b"import os\n"
    ),
    "a file of the set is empty": lambda tree: (tree / MAIN).write_bytes(b""),
    "a file of the set is gone": lambda tree: (tree / "system" / "s.toml").unlink(),
    "a compiled file changed": lambda tree: compiled_of(tree).write_bytes(b"x"),
    "a compiled file is gone": lambda tree: compiled_of(tree).unlink(),
    "the stamp changed": lambda tree: (tree / "python" / "nexus_set.py").write_bytes(b""),
    "a module more": lambda tree: (tree / "python" / "msgspec.py").write_bytes(b""),
    "a link": lambda tree: (tree / "python" / "json").symlink_to("/"),
    "a link to a file": lambda tree: (tree / "python" / "json.py").symlink_to("/etc/passwd"),
    "the sums are gone": lambda tree: (tree / "tree.json").unlink(),
    "the sums are no sums": lambda tree: (tree / "tree.json").write_bytes(b"[]"),
    "the sums are of another Python": lambda tree: (tree / "tree.json").write_text(
        (tree / "tree.json").read_text().replace(sys.version[:4], "2.7.")
    ),
}


@pytest.mark.parametrize("spoil", list(SPOILERS.values()), ids=list(SPOILERS))
def test_a_tree_that_is_not_as_it_was_made_is_made_anew(
    tmp_path: Path, spoil: Callable[[Path], object]
) -> None:
    data = a_set(1)
    record = record_of(data)
    tree = make(tmp_path, record, A, data)

    _ = spoil(tree)

    assert not is_whole(tree, manifest_of(data), record.slot(A).digest)
    assert make(tmp_path, record, A, data) == tree
    assert is_whole(tree, manifest_of(data), record.slot(A).digest)
    assert {path: (tree / path).read_bytes() for path in FILES} == FILES


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("python/sitecustomize.py", b"print('mine')\n"),
        ("python/nexus_set.py", b"VERSION = 9\n"),
    ],
)
def test_no_sum_makes_a_file_that_the_loader_never_wrote_part_of_a_tree(
    tmp_path: Path, name: str, text: bytes
) -> None:
    data = a_set(1)
    tree = make(tmp_path, record_of(data), A, data)
    _ = (tree / name).write_bytes(text)
    sums = json.loads((tree / "tree.json").read_text())
    sums["files"][name] = sha256(text).hexdigest()
    _ = (tree / "tree.json").write_text(json.dumps(sums))

    assert not is_whole(tree, manifest_of(data), sha256(data).digest())


def test_a_pipe_in_a_tree_is_not_waited_for(tmp_path: Path) -> None:
    data = a_set(1)
    tree = make(tmp_path, record_of(data), A, data)
    (tree / MAIN).unlink()
    os.mkfifo(tree / MAIN)

    again = make(tmp_path, record_of(data), A, data)

    assert (again / MAIN).read_bytes() == FILES[MAIN]


def test_sums_too_deep_to_decode_are_none(tmp_path: Path) -> None:
    data = a_set(1)
    tree = make(tmp_path, record_of(data), A, data)
    _ = (tree / "tree.json").write_text("[" * 100_000)

    assert not is_whole(tree, manifest_of(data), sha256(data).digest())


def test_a_tree_of_another_set_is_never_taken_for_this_ones(tmp_path: Path) -> None:
    first, second = a_set(1), a_set(2)
    tree = make(tmp_path, record_of(first), A, first)

    assert not is_whole(tree, manifest_of(second), sha256(second).digest())
    assert not is_whole(tree, manifest_of(first), sha256(second).digest())


def test_trees_of_sets_that_are_in_no_slot_any_more_are_removed(tmp_path: Path) -> None:
    sets = [a_set(version) for version in (1, 2, 3)]
    a = make(tmp_path, record_of(sets[0]), A, sets[0])
    b = make(tmp_path, record_of(sets[0], sets[1]), B, sets[1])
    (tmp_path / "slots" / "b-0123.new").mkdir()
    assert sorted((tmp_path / "slots").iterdir()) == [a, tmp_path / "slots" / "b-0123.new", b]

    c = make(tmp_path, record_of(sets[2], sets[1]), A, sets[2])

    assert sorted((tmp_path / "slots").iterdir()) == sorted([b, c])


def test_what_did_not_change_is_compiled_once(tmp_path: Path) -> None:
    first, second = a_set(1), a_set(2, **{"python/app/more.py": b"MORE = 1\n"})
    a = make(tmp_path, record_of(first), A, first)
    mark = compiled_of(a).read_bytes()

    b = make(tmp_path, record_of(first, second), B, second)

    assert compiled_of(b).read_bytes() == mark, "it names the other tree: it was taken over"
    assert compiled_of(b, "python/app/more.py").exists()
    assert is_whole(b, manifest_of(second), sha256(second).digest())


@pytest.mark.parametrize("spoil", ["source", "compiled"])
def test_of_a_spoiled_tree_nothing_is_taken_over(tmp_path: Path, spoil: str) -> None:
    first, second = a_set(1), a_set(2)
    a = make(tmp_path, record_of(first), A, first)
    if spoil == "source":
        _ = (a / MAIN).write_bytes(b"ANSWER = 43\n")
    else:
        data = compiled_of(a).read_bytes()
        _ = compiled_of(a).write_bytes(data.replace(b"ANSWER", b"ANSWEX"))

    b = make(tmp_path, record_of(first, second), B, second)

    assert str(b / MAIN).encode() in compiled_of(b).read_bytes()
    assert b"ANSWEX" not in compiled_of(b).read_bytes()


def test_a_set_that_cannot_be_unpacked_leaves_no_tree(tmp_path: Path) -> None:
    data = a_set(1)
    rotten = bytearray(data)
    rotten[-100] ^= 1

    with pytest.raises(NoTree, match="the set cannot be unpacked"):
        _ = tree_of(tmp_path, record_of(data), A, manifest_of(data), BytesSource(bytes(rotten)))

    assert not [path for path in (tmp_path / "slots").iterdir() if path.suffix != ".new"]
    assert make(tmp_path, record_of(data), A, data).exists(), "what is left of it is in no way"


def test_a_slot_that_changes_while_it_is_unpacked_leaves_no_tree(tmp_path: Path) -> None:
    data, other = a_set(1), a_set(2)

    with pytest.raises(NoTree, match="the slot changed while it was read"):
        _ = tree_of(tmp_path, record_of(data), A, manifest_of(data), BytesSource(other))

    assert not [path for path in (tmp_path / "slots").iterdir() if path.suffix != ".new"]


def test_a_state_directory_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    data = a_set(1)
    _ = (tmp_path / "slots").write_bytes(b"in the way")

    with pytest.raises(NoTree, match="the set cannot be unpacked"):
        _ = make(tmp_path, record_of(data), A, data)


# ------------------------------------------------------------------ the stamp


def test_a_stamp_counts_only_beside_the_package_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    beside = Path(nexus.__file__).parents[1] / "nexus_set.py"
    stamp = SimpleNamespace(VERSION=3, NAME="3", DIGEST="ab" * 32, __file__=str(beside))

    assert read_stamp() == UNSTAMPED
    monkeypatch.setitem(sys.modules, MODULE, stamp)
    assert read_stamp() == Stamp(3, "3", "ab" * 32)
    stamp.__file__ = "/elsewhere/nexus_set.py"
    assert read_stamp() == UNSTAMPED


# ------------------------------------------------------------------ the tail of a boot

CONSOLE = """\
1.0 loader [booting] boot 6: slot a, version 1 (1.0.0), 012345678901
1.1 init-lite [console] init: start
2.0 loader [booting] boot 7: slot b, version 2 (2.0.0), 123456789012, trial 1, 1 tries left
2.1 init-lite [console] init: start
2.2 app [exit] exit code 70
"""


@pytest.mark.parametrize(
    ("boots", "expected"),
    [
        (7, "2.1 init-lite [console] init: start\n2.2 app [exit] exit code 70"),
        (6, "1.1 init-lite [console] init: start"),
        (8, ""),
        (1, ""),
    ],
)
def test_the_tail_is_of_the_boot_that_is_asked_about(
    tmp_path: Path, boots: int, expected: str
) -> None:
    console = tmp_path / "console.log"
    _ = console.write_text(CONSOLE)

    assert tail_of(console, boots) == expected


def test_the_tail_of_a_boot_that_said_much_is_its_end(tmp_path: Path) -> None:
    console = tmp_path / "console.log"
    lines = [f"2.{number} app [console] {'x' * 100} {number}" for number in range(1000)]
    _ = console.write_text(CONSOLE + "\n".join(lines))

    tail = tail_of(console, 7)
    kept = tail.splitlines()
    assert kept == lines[-len(kept) :]
    assert TAIL_SIZE_MAX - len(lines[0]) < len(tail) <= TAIL_SIZE_MAX


def test_the_last_words_of_the_service_at_fault_are_among_them(tmp_path: Path) -> None:
    console = tmp_path / "console.log"
    lines = [f"2.{number} other [console] {'x' * 100} {number}" for number in range(100)]
    _ = console.write_text(CONSOLE + "\n".join(lines))

    tail = tail_of(console, 7, "app")

    assert "2.2 app [exit] exit code 70" in tail.splitlines()
    assert tail.splitlines()[-1] == lines[-1]


def test_how_inits_interpreter_ended_is_in_the_tail_whatever_came_before(tmp_path: Path) -> None:
    console, errors = tmp_path / "console.log", tmp_path / "init.err"
    lines = [f"2.{number} app [console] {'x' * 100} {number}" for number in range(100)]
    _ = console.write_text(CONSOLE + "\n".join(lines))
    _ = errors.write_text("of an earlier boot\nTraceback:\n  File x\nZeroDivisionError: no\n")
    with errors.open("ab") as file:
        said = errors_of(file.fileno(), len("of an earlier boot\n"))
        assert errors_of(file.fileno(), -1) == []
        assert errors_of(file.fileno(), errors.stat().st_size) == []

    tail = tail_of(console, 7, INTERPRETER, said).splitlines()

    assert tail[-3:] == said
    assert said[-1] == "init [stderr] ZeroDivisionError: no"
    assert "of an earlier boot" not in "".join(said)
    assert lines[-1] in tail


def test_without_a_console_there_is_no_tail(tmp_path: Path) -> None:
    assert tail_of(tmp_path / "console.log", 1) == ""
