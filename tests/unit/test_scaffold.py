"""`nexus new service`: the files it writes, and what it refuses."""

import subprocess
import sys
from pathlib import Path

import pytest

from nexus.cli.scaffold import NAME_SIZE_MAX, ScaffoldError, scaffold
from nexus.init.plan import load_plan


def test_the_system_file_of_a_new_service_is_right(tmp_path: Path) -> None:
    files = scaffold("water-valve", tmp_path / "water-valve")

    plan = load_plan(tmp_path / "water-valve" / "system.toml")

    assert tmp_path / "water-valve" / "src" / "water_valve" / "service.py" in files
    assert plan.by_name["water-valve"].program == "water_valve.service:WaterValve"
    assert {
        name: [right.name for right in rights] for name, rights in plan.policy.allow.items()
    } == {
        "policyd": ["ipc.core", "policy.authority"],
        "logd": ["ipc.core", "policy.delegate"],
        "operator": [
            *("ipc.core", "port.operator", "log.read", "system.observe", "system.control"),
            *("policy.reload", "water-valve.greet"),
        ],
        "water-valve": ["ipc.core", "policy.delegate"],
    }
    assert plan.policy.routes == {}


@pytest.mark.slow
def test_the_tests_of_a_new_service_pass_outside_of_the_tree(tmp_path: Path) -> None:
    _ = scaffold("water-valve", tmp_path / "water-valve")

    ended = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "nexus.testing.plugin",
            "-p",
            "no:cacheprovider",
        ],
        cwd=tmp_path / "water-valve",
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )

    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "4 passed" in ended.stdout


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("Valve", "is no name of a service"),
        ("9lives", "is no name of a service"),
        ("a/../b", "is no name of a service"),
        ("x" * (NAME_SIZE_MAX + 1), "is no name of a service"),
        ("logd", "one of Nexus' own names"),
        ("class", "a word of Python's own"),
    ],
)
def test_a_name_that_cannot_be_is_refused(tmp_path: Path, name: str, sentence: str) -> None:
    with pytest.raises(ScaffoldError, match=sentence):
        _ = scaffold(name, tmp_path / "there")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["json", "types", "enum", "test", "msgspec", "pytest"])
def test_a_name_that_another_package_has_is_refused_before_anything_is_written(
    tmp_path: Path, name: str
) -> None:
    with pytest.raises(ScaffoldError) as error:
        _ = scaffold(name, tmp_path / "there")
    assert str(error.value).startswith(
        f'"{name}" cannot be the name of a service: expected a package name that neither Python '
        "nor an installed package has, found "
    )
    assert list(tmp_path.iterdir()) == []


def test_nothing_that_exists_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(ScaffoldError, match="exists: take another name"):
        _ = scaffold("valve", tmp_path / "there")
    assert list((tmp_path / "there").iterdir()) == []


def test_a_directory_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no directory")
    with pytest.raises(ScaffoldError, match="cannot be written"):
        _ = scaffold("valve", tmp_path / "file" / "valve")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
