"""Saboteurs on the simulated kernel: each turns exactly its rung red.

Those of the phases before state run in one boot, for time's sake; `make campaign` plants them all
in whole runs.
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from nexus.proof.prove import prove
from nexus.proof.request import Request
from nexus.proof.saboteurs import SABOTEURS
from nexus.proof.sweep import problem_of
from nexus.protocols.ladder import Ground, Phase, rung

SYSTEM = Path(__file__).parents[2] / "systems" / "selftest.toml"
SIM = sorted(saboteur.rung for saboteur in SABOTEURS if Ground.SIM in saboteur.grounds)
FIRST_BOOT = tuple(Phase)[: tuple(Phase).index(Phase.STATE)]
AT_A_TIME = 2  # runs, each a process of its own with a clock of its own; CI has two cores

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
def problems(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[int, Future[str]]]:
    """The outcome of every saboteur that this session asks about, as they come in."""
    directory = tmp_path_factory.mktemp("saboteurs")
    items = (item for item in request.session.items if item.path == request.path)
    numbers = [
        item.callspec.params["number"] for item in items if isinstance(item, pytest.Function)
    ]
    asked = [number for number in numbers if isinstance(number, int)]
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        yield {number: pool.submit(problem, number, directory) for number in asked}
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("number", SIM)
def test_a_saboteur_turns_exactly_its_rung_red(
    number: int, problems: dict[int, Future[str]]
) -> None:
    assert problems[number].result() == ""
