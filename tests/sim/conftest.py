"""Whole proof runs that several tests read, and those that run beside the tests."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nexus.proof.prove import Outcome, prove
from nexus.proof.request import Request
from nexus.protocols.ladder import Ground

ROOT = Path(__file__).parents[2]
SYSTEM = ROOT / "systems" / "selftest.toml"
PROVEN_SEED = 5
PROVEN_LOG = "log"  # beside the record
SABOTEURS = "test_prove_saboteurs.py"
AT_A_TIME = 2  # processes that plant saboteurs; CI has two cores


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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Ask about the saboteurs last of all: by then most of their runs are over."""
    items.sort(key=lambda item: item.path.name == SABOTEURS)


@pytest.fixture(scope="session", autouse=True)
def sweep(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Sweep | None]:
    """The saboteurs that this session asks about, begun with the first test of this folder.

    No test from here on measures time, and the boots wait on virtual clocks alone.
    """
    numbers = [
        item.callspec.params["number"]
        for item in request.session.items
        if item.path.name == SABOTEURS and isinstance(item, pytest.Function)
    ]
    asked = [number for number in numbers if isinstance(number, int)]
    if not asked:
        yield None
        return
    sweep = Sweep(asked, tmp_path_factory.mktemp("saboteurs"))
    yield sweep
    sweep.close()


@pytest.fixture(scope="session")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """One run of the selftest system on two simulated CPUs, for those who only read what it left:
    they copy what they change."""
    folder = tmp_path_factory.mktemp("run")
    request = Request(
        ground=Ground.SIM,
        system=SYSTEM,
        smp=2,
        seed=PROVEN_SEED,
        record=folder / "record",
        log=folder / PROVEN_LOG,
    )
    return prove(request, folder)
