"""A pid number never means two services while a message of its former holder can be queued.

As pid 1 of a pid namespace of its own, whose pid_max is Linux's least: after the first 300
numbers every process gets the number 300, so each spawn meets the burned number of the last.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import pytest

pytestmark = [
    pytest.mark.linux,
    pytest.mark.skipif(os.getuid() != 0, reason="a pid namespace is made by root"),
]

ROOT: Final = Path(__file__).resolve().parents[2]
PID_MAX_MINIMUM: Final = 301  # Linux refuses less: RESERVED_PIDS + 1
SPAWNS: Final = 10 * PID_MAX_MINIMUM
DEAF_TURNS: Final = 150  # spawns after which root does not listen: the next meets a burned number
TIME_MAX: Final = 280  # seconds, of 40 on a free machine


def _walk(pid_max: int, spawns: int, deaf_turns: int, *options: str) -> Mapping[str, Any]:
    arguments = [str(pid_max), str(spawns), str(deaf_turns), *options]
    done = subprocess.run(
        [sys.executable, "-m", "tests.attack.pid_walk", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"},
        capture_output=True,
        timeout=TIME_MAX,
        check=False,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout)
    assert outcome["failures"] == [], "\n".join(outcome["failures"])
    result: Mapping[str, Any] = outcome["result"]
    return result


@pytest.mark.slow
def test_a_reused_pid_at_the_least_pid_max_never_changes_who_spoke() -> None:
    outcome = _walk(PID_MAX_MINIMUM, SPAWNS, DEAF_TURNS)

    assert outcome["wrong"] == []
    assert outcome["heard"] == SPAWNS
    assert outcome["refusals"] >= (SPAWNS - PID_MAX_MINIMUM) // DEAF_TURNS - 1, "burned numbers"
    assert outcome["pids"] < PID_MAX_MINIMUM


def test_a_few_numbers_more_are_enough_to_go_on_without_a_refusal() -> None:
    outcome = _walk(PID_MAX_MINIMUM + 20, 360, 1)

    assert outcome["wrong"] == []
    assert outcome["heard"] == 360
    assert outcome["refusals"] == 0


def test_with_numbers_given_again_at_once_the_wrong_name_is_heard() -> None:
    """The control experiment: a table whose rows follow the number at once misattributes."""
    outcome = _walk(PID_MAX_MINIMUM, 330, 2, "reckless")

    assert outcome["refusals"] == 0
    assert len(outcome["wrong"]) >= 5
