"""What is missing is said in one sentence that names the Debian package."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

SCRIPT: Final = Path(__file__).resolve().parents[2] / "tools" / "prerequisites.sh"


def check(what: str, path: Path, **extra: str) -> subprocess.CompletedProcess[str]:
    """Run the check with a PATH of one folder, and no other environment."""
    return subprocess.run(
        ["/bin/sh", str(SCRIPT), what],
        env={"PATH": str(path)} | extra,
        capture_output=True,
        text=True,
        timeout=30,
    )


def program(path: Path, name: str, script: str) -> None:
    """A command `name` in the folder `path`."""
    (path / name).write_text(f"#!/bin/sh\n{script}\n")
    (path / name).chmod(0o755)


@pytest.mark.parametrize("what", ["python", "compiler"])
def test_an_empty_path_gives_one_sentence_and_exit_2(tmp_path: Path, what: str) -> None:
    done = check(what, tmp_path)

    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("nexus: ")
    assert done.stderr.count("\n") == 1


def test_no_python_names_the_packages(tmp_path: Path) -> None:
    done = check("python", tmp_path)

    assert done.stderr == (
        "nexus: Python 3.11 or newer is missing: "
        "install the Debian packages python3 and python3-venv.\n"
    )


def test_a_machine_without_the_programs_of_a_board_names_their_packages(tmp_path: Path) -> None:
    done = check("vm", tmp_path)

    assert done.returncode == 2
    assert done.stderr.startswith("nexus: make vm needs the Debian packages qemu-system-arm ")
    for package in ("mtools", "libubootenv-tool"):  # the others may be in folders of root's path
        assert f" {package}" in done.stderr


def test_a_python_that_is_too_old_counts_as_none(tmp_path: Path) -> None:
    program(tmp_path, "python3", "exit 1")

    done = check("python", tmp_path)

    assert "Python 3.11 or newer is missing" in done.stderr


@pytest.mark.parametrize("name", ["python3", "python3.12"])
def test_a_python_without_venv_names_its_own_package(tmp_path: Path, name: str) -> None:
    program(tmp_path, name, 'case "$2" in *ensurepip*) exit 1 ;; esac')

    done = check("python", tmp_path)

    assert done.returncode == 2
    assert done.stderr == (
        f"nexus: {name} has no venv module: install the Debian package {name}-venv.\n"
    )


def test_a_complete_python_is_taken_before_an_incomplete_one(tmp_path: Path) -> None:
    program(tmp_path, "python3", 'case "$2" in *ensurepip*) exit 1 ;; esac')
    program(tmp_path, "python3.12", "exit 0")

    done = check("python", tmp_path)

    assert (done.returncode, done.stdout) == (0, f"{tmp_path}/python3.12\n")


def test_a_python_chosen_by_hand_is_the_only_candidate(tmp_path: Path) -> None:
    program(tmp_path, "python3", "exit 0")

    done = check("python", tmp_path, PYTHON="python3.99")

    assert done.returncode == 2
    assert "PYTHON=python3.99 is not Python 3.11 or newer" in done.stderr


def test_this_python_would_do(tmp_path: Path) -> None:
    done = check("python", Path("/nonexistent"), PYTHON=sys.executable)

    assert (done.returncode, done.stdout) == (0, f"{sys.executable}\n")


def test_no_compiler_names_the_package(tmp_path: Path) -> None:
    done = check("compiler", tmp_path)

    assert "install the Debian packages gcc and libc6-dev" in done.stderr


def test_make_stops_before_it_builds_anything(tmp_path: Path) -> None:
    # make and the shell are found by their full paths; everything else is missing.
    root = SCRIPT.parents[1]
    for name in ("Makefile", "pyproject.toml"):
        (tmp_path / name).write_bytes((root / name).read_bytes())
    for folder in ("tools", "requirements"):
        (tmp_path / folder).symlink_to(root / folder)
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("make", "sh"):
        found = next(
            Path(folder, name) for folder in os.defpath.split(":") if Path(folder, name).exists()
        )
        (tools / name).symlink_to(found)

    done = subprocess.run(
        [tools / "make", "run"],
        cwd=tmp_path,
        env={"PATH": str(tools)},
        capture_output=True,
        text=True,
        timeout=30,
    )

    assert done.returncode == 2
    assert "nexus: Python 3.11 or newer is missing" in done.stderr
    assert not (tmp_path / ".venv").exists()
