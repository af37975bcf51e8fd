"""Saboteurs on the simulated kernel: each turns exactly its rung red.

Those run as far as the phase of their rung, for time's sake; `make campaign` plants them all
in whole runs.
"""

import os
import select
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Final

import pytest

from nexus.proof.saboteurs import SABOTEURS
from nexus.protocols.ladder import Ground

SIM = sorted(saboteur.rung for saboteur in SABOTEURS if Ground.SIM in saboteur.grounds)
ROOT: Final = Path(__file__).parents[2]
ANSWER_WAIT: Final = 250  # seconds for one run of a few; below the limit of a test

pytestmark = [pytest.mark.sim, pytest.mark.slow]


class Sweeper:
    """The process that plants them, one after the other (tests/sim/sweeper.py)."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._to: IO[str] = process.stdin
        self._back: IO[str] = process.stdout

    def problem(self, number: int) -> str:
        """What is wrong with the verdict on a run with this saboteur, "" if nothing is."""
        _ = self._to.write(f"{number}\n")
        self._to.flush()
        ready, _, _ = select.select((self._back,), (), (), ANSWER_WAIT)
        assert ready, f"no verdict on #{number} in {ANSWER_WAIT} s"
        found, _, problem = self._back.readline().rstrip("\n").partition(" ")
        assert found == str(number), f"the process that plants #{number} has ended"
        return problem


@pytest.fixture(scope="module")
def sweeper(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sweeper]:
    """A process for all runs: they are its forks, and need not import everything again."""
    directory = tmp_path_factory.mktemp("saboteurs")
    with subprocess.Popen(
        [sys.executable, "-m", "tests.sim.sweeper", str(directory)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield Sweeper(process)
        process.terminate()


@pytest.mark.parametrize("number", SIM)
def test_a_saboteur_turns_exactly_its_rung_red(number: int, sweeper: Sweeper) -> None:
    assert sweeper.problem(number) == ""
