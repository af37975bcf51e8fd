"""What the loader takes over from a base system that came compiled."""

import py_compile
from importlib.util import cache_from_source
from pathlib import Path
from py_compile import PycInvalidationMode
from types import SimpleNamespace

import pytest

from nexus.bootctl import SlotName
from nexus.loader import tree
from tests.unit.test_loader_tree import a_set, compiled_of, make, record_of

MODULE = "python/nexus/planted.py"
SOURCE = b"ANSWER = 42\n"
SHOWN = "/where/the/base/system/is/planted.py"  # in what it has compiled


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The package of a base system."""
    package = tmp_path / "base" / "nexus"
    package.mkdir(parents=True)
    namespace = SimpleNamespace(__file__=str(package / "__init__.py"))
    monkeypatch.setattr(tree, "nexus", namespace)
    return package


def compiled_in(base: Path, source: bytes, mode: PycInvalidationMode) -> bytes:
    """Compile the module in the base system; what came of it."""
    file = base / "planted.py"
    _ = file.write_bytes(source)
    target = Path(cache_from_source(str(file)))
    _ = py_compile.compile(
        str(file), cfile=str(target), dfile=SHOWN, doraise=True, invalidation_mode=mode
    )
    return target.read_bytes()


def made(state: Path) -> bytes:
    """What stands compiled in the tree of a set with the module."""
    data = a_set(1, **{MODULE: SOURCE})
    return compiled_of(make(state, record_of(data), SlotName.A, data), MODULE).read_bytes()


def test_what_the_base_system_has_compiled_of_the_same_source_is_taken(
    base: Path, tmp_path: Path
) -> None:
    compiled = compiled_in(base, SOURCE, PycInvalidationMode.UNCHECKED_HASH)

    assert made(tmp_path / "state") == compiled


def test_what_it_has_compiled_of_another_source_is_not(base: Path, tmp_path: Path) -> None:
    compiled = compiled_in(base, b"ANSWER = 43\n", PycInvalidationMode.UNCHECKED_HASH)

    assert made(tmp_path / "state") != compiled


@pytest.mark.parametrize("mode", [PycInvalidationMode.TIMESTAMP, PycInvalidationMode.CHECKED_HASH])
def test_what_python_itself_has_compiled_there_is_not(
    base: Path, tmp_path: Path, mode: PycInvalidationMode
) -> None:
    compiled = compiled_in(base, SOURCE, mode)

    assert SHOWN.encode() in compiled
    assert SHOWN.encode() not in made(tmp_path / "state")


def test_a_tree_with_what_was_taken_is_whole(base: Path, tmp_path: Path) -> None:
    _ = compiled_in(base, SOURCE, PycInvalidationMode.UNCHECKED_HASH)
    data = a_set(1, **{MODULE: SOURCE})
    first = make(tmp_path / "state", record_of(data), SlotName.A, data)
    before = (first / MODULE).stat().st_ino

    again = make(tmp_path / "state", record_of(data), SlotName.A, data)

    assert (again / MODULE).stat().st_ino == before
