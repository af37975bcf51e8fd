"""The examples, as their authors would run them: copied out of the tree, their own pytest."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
LEFT_BEHIND = shutil.ignore_patterns("__pycache__", ".pytest_cache", "*.pyc")


def run_tests(directory: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run the tests of an example in an interpreter of their own."""
    plugin = ("-p", "nexus.testing.plugin") if not is_installed() else ()
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *plugin, *options],
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def is_installed() -> bool:
    """Whether pytest finds the plugin by itself, through the package's entry point."""
    from importlib.metadata import entry_points

    return any(each.value == "nexus.testing.plugin" for each in entry_points(group="pytest11"))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "count"), [("pump", 9), ("gauge", 10)])
def test_the_tests_of_an_example_pass_outside_of_the_tree(
    tmp_path: Path, name: str, count: int
) -> None:
    there = tmp_path / name
    _ = shutil.copytree(EXAMPLES / name, there, ignore=LEFT_BEHIND)

    ended = run_tests(there)

    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert f"{count} passed" in ended.stdout


@pytest.mark.slow
def test_seeds_multiply_the_runs_and_a_failure_says_how_to_repeat_it(tmp_path: Path) -> None:
    there = tmp_path / "pump"
    _ = shutil.copytree(EXAMPLES / "pump", there, ignore=LEFT_BEHIND)
    broken = there / "src" / "pump_station" / "pump.py"
    _ = broken.write_text(
        broken.read_text().replace("if not self._is_fresh(now):", "if self._last is None:")
    )

    ended = run_tests(there, "--seed", "7", "--seeds", "2", "-k", "hangs")

    assert ended.returncode == 1, ended.stdout + ended.stderr
    assert "2 failed" in ended.stdout
    assert (
        "pytest 'tests/test_interlock.py::"
        "test_it_stops_when_the_sensor_hangs_and_may_start_when_it_is_back' --seed 8"
    ) in ended.stdout


@pytest.mark.parametrize(
    ("option", "sentence"),
    [("--seed=-1", "--seed takes 0 to"), ("--seeds=0", "--seeds takes 1 to")],
)
def test_a_seed_that_cannot_be_is_a_usage_error(tmp_path: Path, option: str, sentence: str) -> None:
    ended = run_tests(tmp_path, option)
    assert ended.returncode == 4
    assert sentence in ended.stderr
