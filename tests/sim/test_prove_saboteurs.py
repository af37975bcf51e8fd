"""Saboteurs on the simulated kernel: each turns exactly its rung red.

Those of the phases before state run in one boot, for time's sake; `make campaign` plants them all
in whole runs. The runs begin with the first test of this folder, on what the others leave idle.
"""

from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from nexus.proof.prove import prove
from nexus.proof.request import Request
from nexus.proof.saboteurs import SABOTEURS
from nexus.proof.sweep import problem_of
from nexus.protocols.ladder import Ground, Phase, rung

if TYPE_CHECKING:
    from tests.sim.conftest import Sweep

SYSTEM = Path(__file__).parents[2] / "systems" / "selftest.toml"
SIM = sorted(saboteur.rung for saboteur in SABOTEURS if Ground.SIM in saboteur.grounds)
FIRST_BOOT = tuple(Phase)[: tuple(Phase).index(Phase.STATE)]

pytestmark = [pytest.mark.sim, pytest.mark.slow]


def problem(number: int, directory: Path) -> str:
    """Plant the saboteur; what is wrong with the verdict, "" if nothing is."""
    request = Request(
        ground=Ground.SIM,
        system=SYSTEM,
        smp=2,
        seed=3,
        timeout=120 * 10**9,
        saboteur=number,
        phase=Phase.EXEC if rung(number).phase in FIRST_BOOT else Phase.END,
        record=directory / f"record-{number}.jsonl",
    )
    return problem_of(number, prove(request, directory).verdict)


@pytest.fixture(scope="module")
def problems(sweep: "Sweep | None") -> "Iterator[Mapping[int, Future[str]]]":
    """What came of each saboteur; nothing runs on beside the tests of other folders."""
    assert sweep is not None, "these tests are what it runs for"
    yield sweep.problems
    sweep.close()


@pytest.mark.parametrize("number", SIM)
def test_a_saboteur_turns_exactly_its_rung_red(
    number: int, problems: "Mapping[int, Future[str]]"
) -> None:
    assert problems[number].result() == ""
