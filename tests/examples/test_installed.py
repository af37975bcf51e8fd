"""The package as `pip install .` leaves it: a wheel, in a virtual environment of its own.

No registry is asked: the builder is among the tools that are pinned, and what the package depends
on is borrowed from the environment that runs the tests.
"""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STEP_TIME = 120  # seconds; a machine with two busy cores


def run(*words: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A command, with nothing of the tree on its import path."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [str(word) for word in words],
        cwd=cwd,
        env={**environment, "PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
        capture_output=True,
        text=True,
        timeout=STEP_TIME,
        check=False,
    )


def ok(*words: str | Path, cwd: Path) -> str:
    """What a command prints that has to do what it was asked."""
    ended = run(*words, cwd=cwd)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.mark.slow
def test_what_pip_installs_makes_and_checks_a_service(tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    build = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet")
    _ = ok(*build, "--wheel-dir", wheels, ROOT, cwd=tmp_path)
    (wheel,) = wheels.glob("nexus_os-*.whl")

    home = tmp_path / "venv"
    _ = ok(sys.executable, "-m", "venv", "--without-pip", home, cwd=tmp_path)
    python = home / "bin" / "python"
    install = (sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--quiet")
    _ = ok(*install, wheel, cwd=tmp_path)
    site = Path(
        ok(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=home)
    )
    borrowed = Path(str(site).strip()) / "borrowed.pth"
    _ = borrowed.write_text(sysconfig.get_path("purelib") + "\n")

    where = ok(python, "-c", "import nexus; print(nexus.__file__)", cwd=tmp_path)
    assert where.startswith(str(home)), "the wheel's, not the tree's"
    nexus = home / "bin" / "nexus"
    made = ok(nexus, "new", "service", "valve", cwd=tmp_path).split()
    assert "valve/src/valve/protocol.py" in made
    assert "valve/tests/test_service.py" in made
    checked = ok(nexus, "check", "valve/system.toml", cwd=tmp_path)
    assert "valve" in checked
