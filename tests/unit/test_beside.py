"""`pytest --beside`: what becomes of the second pytest is told by the first."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parents[2]
TIME_MAX: Final = 120  # seconds of two pytests with a test each
CONFTEST: Final = """
import os
import signal
import time
import pytest
from tests import beside

beside.END_WAIT = beside.TERM_WAIT = END_WAIT


def pytest_addoption(parser):
    parser.addoption(beside.OPTION, action="store_true")


def pytest_configure(config):
    beside.configure(config)


def pytest_collection_modifyitems(config, items):
    beside.sort(config, items)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session):
    if session.config.pluginmanager.has_plugin("reporter"):
        LAST
"""
PASSES: Final = "def test_it():\n    pass\n"
FAILS: Final = "def test_it():\n    raise LookupError('no such pump')\n"


def beside(
    place: Path, last: str, *, elsewhere: str = PASSES, end_wait: float = TIME_MAX
) -> tuple[int, str]:
    """The exit code and the words of a session whose second pytest does this at its end."""
    (place / "pytest.ini").write_text("[pytest]\naddopts = --import-mode=importlib\n")
    (place / "conftest.py").write_text(
        CONFTEST.replace("LAST", last).replace("= END_WAIT", f"= {end_wait}")
    )
    for folder, text in (("linux", PASSES), ("unit", elsewhere)):
        (place / "tests" / folder).mkdir(parents=True)
        (place / "tests" / folder / f"test_{folder}.py").write_text(text)
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--beside"],
        cwd=place,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'src'}"},
        capture_output=True,
        text=True,
        timeout=TIME_MAX,
        check=False,
    )
    return ended.returncode, ended.stdout


def test_two_pytests_that_end_well_are_one_that_does(tmp_path: Path) -> None:
    code, said = beside(tmp_path, "pass")

    assert (code, "2 passed" in said) == (0, True), said


def test_a_test_that_fails_in_the_second_fails_the_session_as_a_test(tmp_path: Path) -> None:
    code, said = beside(tmp_path, "pass", elsewhere=FAILS)

    assert (code, "1 failed, 1 passed" in said) == (1, True), said
    assert "no such pump" in said


@pytest.mark.parametrize(
    ("last", "told"),
    [
        ("os._exit(3)", "the second pytest ended with 3"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "the second pytest ended with -9"),
        ("raise ValueError('after its last test')", "after its last test"),
    ],
    ids=["code", "signal", "internal error"],
)
def test_a_second_pytest_that_ends_badly_fails_the_session(
    last: str, told: str, tmp_path: Path
) -> None:
    code, said = beside(tmp_path, last)

    assert (code, "2 passed" in said, told in said) == (1, True, True), said


def test_a_second_pytest_that_does_not_end_is_killed_and_fails_the_session(tmp_path: Path) -> None:
    stays = "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(1000)"

    code, said = beside(tmp_path, stays, end_wait=2.0)

    assert (code, "the second pytest does not end" in said) == (1, True), said
