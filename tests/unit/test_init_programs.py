"""The digest of a program follows its source and nothing else."""

import sys
from pathlib import Path

import pytest

from nexus.init.programs import PROGRAMS, program_digest, protocols_of


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package `probe_program` with two modules, found by import."""
    folder = tmp_path / "probe_program"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "service.py").write_text("ONE = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    return folder


def digest_now(module: str) -> str:
    program_digest.cache_clear()
    for name in [name for name in sys.modules if name.split(".")[0] == "probe_program"]:
        del sys.modules[name]
    return program_digest(module)


def test_a_changed_line_anywhere_in_a_package_changes_its_digest(package: Path) -> None:
    before = digest_now("probe_program")
    (package / "service.py").write_text("ONE = 2\n")

    assert digest_now("probe_program") != before


def test_a_renamed_file_changes_the_digest(package: Path) -> None:
    before = digest_now("probe_program")
    (package / "service.py").rename(package / "other.py")

    assert digest_now("probe_program") != before


def test_compiled_files_and_the_place_of_a_clone_do_not_count(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = digest_now("probe_program")
    clone = tmp_path / "clone" / "probe_program"
    clone.mkdir(parents=True)
    for file in package.glob("*.py"):
        (clone / file.name).write_bytes(file.read_bytes())
    (clone / "__pycache__").mkdir()
    (clone / "__pycache__" / "service.cpython-311.pyc").write_bytes(b"x")
    monkeypatch.syspath_prepend(clone.parent)

    assert digest_now("probe_program") == before


def test_a_module_counts_as_its_one_file(package: Path) -> None:
    before = digest_now("probe_program.service")
    (package / "__init__.py").write_text("# changed\n")

    assert digest_now("probe_program.service") == before


@pytest.mark.parametrize("name", sorted(PROGRAMS))
def test_every_program_names_protocols_that_exist(name: str) -> None:
    assert all(protocol.requests for protocol in protocols_of(PROGRAMS[name]))
