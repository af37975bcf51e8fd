"""`pytest --beside`: what becomes of the other pytests is told by the first."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from tests.beside import LADDERS, Part

ROOT: Final = Path(__file__).parents[2]
TIME_MAX: Final = 120  # seconds of four pytests with a test each
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
    reporter = session.config.pluginmanager.get_plugin("reporter")
    if reporter is not None and reporter.part is beside.Part.WHOSE:
        LAST
"""
PASSES: Final = "import os\n\n\ndef test_it():\n    assert os.sched_getscheduler(0) == {}\n"
HERE: Final = os.sched_getscheduler(0)  # where this test may be run beside others itself
FAILS: Final = "def test_it():\n    raise LookupError('no such pump')\n"


FOLDERS: Final = {
    Part.MEASURED: "linux",
    Part.PATIENT: "guide",
    Part.SIMULATED: "sim",
    Part.PURE: "unit",
}


def test_the_longest_file_is_there() -> None:
    assert (ROOT / LADDERS).is_file()


def beside(
    place: Path, last: str, whose: Part, *, there: str = "", end_wait: float = TIME_MAX
) -> tuple[int, str]:
    """The exit code and the words of a session in which that pytest does this at its end, and has
    this test; the others have one that passes if it is scheduled as it should be."""
    (place / "pytest.ini").write_text("[pytest]\naddopts = --import-mode=importlib\n")
    (place / "conftest.py").write_text(
        CONFTEST.replace("LAST", last)
        .replace("= END_WAIT", f"= {end_wait}")
        .replace("WHOSE", whose.name)
    )
    for part, folder in FOLDERS.items():
        passes = PASSES.format(HERE if part is Part.MEASURED else part.policy)
        (place / "tests" / folder).mkdir(parents=True)
        (place / "tests" / folder / f"test_{folder}.py").write_text(
            there if part is whose and there else passes
        )
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


def test_four_pytests_that_end_well_are_one_each_scheduled_in_its_way(tmp_path: Path) -> None:
    code, said = beside(tmp_path, "pass", Part.PURE)

    assert (code, "4 passed" in said) == (0, True), said


@pytest.mark.parametrize("whose", [Part.PATIENT, Part.PURE])
def test_a_test_that_fails_in_another_fails_the_session_as_a_test(
    whose: Part, tmp_path: Path
) -> None:
    code, said = beside(tmp_path, "pass", whose, there=FAILS)

    assert (code, "1 failed, 3 passed" in said) == (1, True), said
    assert "no such pump" in said


@pytest.mark.parametrize(
    ("last", "told"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "the pytest of pure tests ended with -9"),
        ("raise ValueError('after its last test')", "after its last test"),
    ],
    ids=["signal", "internal error"],
)
def test_another_pytest_that_ends_badly_fails_the_session(
    last: str, told: str, tmp_path: Path
) -> None:
    code, said = beside(tmp_path, last, Part.PURE)

    assert (code, "4 passed" in said, told in said) == (1, True, True), said


def test_another_pytest_that_does_not_end_is_killed_and_fails_the_session(tmp_path: Path) -> None:
    stays = "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(1000)"

    code, said = beside(tmp_path, stays, Part.PATIENT, end_wait=2.0)

    assert (code, "the pytest of patient tests does not end" in said) == (1, True), said
