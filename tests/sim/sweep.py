"""Saboteurs, planted by processes of their own while the tests go on.

They run when nothing else would, so that no test which measures time can tell: most tests of real
processes wait more than they compute, and leave a core or two to this.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]
AT_A_TIME: Final = 2  # processes that plant saboteurs; CI has two cores


class Sweep:
    """Saboteurs, planted by processes of their own while the tests go on."""

    def __init__(self, numbers: list[int], directory: Path) -> None:
        self._found: dict[int, str] = {}
        self._shares = [numbers[first::AT_A_TIME] for first in range(AT_A_TIME)]
        environ = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}
        self._sweepers = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.sim.sweeper", str(directory), *map(str, share)],
                cwd=ROOT,
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                text=True,
            )
            for share in self._shares
        ]

    def problem(self, number: int) -> str:
        """What is wrong with the verdict on a run with this saboteur, "" if nothing is."""
        while number not in self._found:
            self._found.update([self._next(number)])
        return self._found[number]

    def _next(self, number: int) -> tuple[int, str]:
        share = next(index for index, share in enumerate(self._shares) if number in share)
        output = self._sweepers[share].stdout
        assert output is not None
        line = output.readline()
        assert line, f"the process that plants #{number} has ended"
        found, _, problem = line.rstrip("\n").partition(" ")
        return int(found), problem

    def close(self) -> None:
        """Plant no more; their boots end with them."""
        for sweeper in self._sweepers:
            sweeper.terminate()
            _ = sweeper.communicate()
