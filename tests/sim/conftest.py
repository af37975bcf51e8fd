"""Whole proof runs beside the tests: each is a process of its own, under a clock of its own."""

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from nexus.proof.prove import Outcome, prove
from nexus.proof.request import Request
from nexus.protocols.ladder import Ground

SYSTEM = Path(__file__).parents[2] / "systems" / "selftest.toml"
PROVEN_SEED = 5
PROVEN_LOG = "log"  # beside the record
AT_A_TIME = 2  # runs; CI has two cores
BEHIND = 10  # of Linux's niceness: a test that runs in the foreground goes first

Problem = Callable[[int, Path], str]
SABOTEURS = "test_prove_saboteurs.py"


class Sweep:
    """Plants saboteurs in the background, each in a run of its own, and has what came of them."""

    def __init__(self, problem: Problem, numbers: list[int], directory: Path) -> None:
        self._pool = ThreadPoolExecutor(AT_A_TIME, initializer=_go_behind)
        self.problems: Mapping[int, Future[str]] = {
            number: self._pool.submit(partial(problem, number, directory)) for number in numbers
        }

    def close(self) -> None:
        """Begin no further run, and wait for those that were begun."""
        self._pool.shutdown(cancel_futures=True)


def _go_behind() -> None:
    """Linux's niceness is a thread's, and what the thread starts inherits it."""
    os.setpriority(os.PRIO_PROCESS, 0, BEHIND)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Ask about the saboteurs last of this folder: by then most of their runs are over."""
    here = [index for index, item in enumerate(items) if item.path.parent == Path(__file__).parent]
    ordered = sorted((items[index] for index in here), key=lambda item: item.path.name == SABOTEURS)
    for index, item in zip(here, ordered, strict=True):
        items[index] = item


@pytest.fixture(scope="session", autouse=True)
def sweep(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Sweep | None]:
    """The outcome of every saboteur that this session asks about, as they come in; begun with the
    first test of this folder. These tests measure no time: what runs beside them changes nothing.
    """
    asked = [
        item
        for item in request.session.items
        if item.path.name == SABOTEURS and isinstance(item, pytest.Function)
    ]
    numbers = [item.callspec.params["number"] for item in asked]
    if not numbers:
        yield None
        return
    sweep = Sweep(
        asked[0].module.problem,
        [number for number in numbers if isinstance(number, int)],
        tmp_path_factory.mktemp("saboteurs"),
    )
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
