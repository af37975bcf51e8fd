"""The pytest plugin: a device in the simulator for every test that asks for one. ::

    def test_the_pump_stops_without_its_sensor(simulate):
        simulate("system.toml", scenario)

`--seed N` runs each such test with that seed, `--seeds N` with N of them from the base seed on. A
failure prints the line that repeats it.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from nexus.testing.device import RUN_MAX, Run, Scenario
from nexus.testing.device import simulate as run_in_simulator

SEED_DEFAULT: Final = 1
SEED_MAX: Final = 2**63 - 1
SEEDS_MAX: Final = 10_000  # of one pytest run; more is a campaign

Simulate = Callable[..., Run]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare the options."""
    group = parser.getgroup("nexus", "Nexus simulator")
    group.addoption(
        "--seed", type=int, default=None, help=f"seed of simulated runs (default {SEED_DEFAULT})"
    )
    group.addoption(
        "--seeds", type=int, default=1, help="run each simulated test with so many seeds"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Refuse numbers that make no sense before anything is collected."""
    seed, seeds = _options(config)
    if not 0 <= seed <= SEED_MAX:
        raise pytest.UsageError(f"--seed takes 0 to {SEED_MAX}, not {seed}")
    if not 1 <= seeds <= SEEDS_MAX:
        raise pytest.UsageError(f"--seeds takes 1 to {SEEDS_MAX}, not {seeds}")


def _options(config: pytest.Config) -> tuple[int, int]:
    seed: int | None = config.getoption("--seed")
    seeds: int = config.getoption("--seeds")
    return SEED_DEFAULT if seed is None else seed, seeds


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One run for each seed."""
    if "nexus_seed" in metafunc.fixturenames:
        first, count = _options(metafunc.config)
        metafunc.parametrize(
            "nexus_seed", range(first, first + count), ids=lambda seed: f"seed{seed}"
        )


@pytest.fixture
def simulate(nexus_seed: int, request: pytest.FixtureRequest) -> Simulate:
    """`simulate(system_file, scenario, within="10min", rights=())`: boots the system file, whose
    path is relative to the test's own file, in the simulator and runs the scenario in it. Returns
    its Run."""

    def run(
        system: str | Path,
        scenario: Scenario,
        *,
        within: str = RUN_MAX,
        rights: tuple[str, ...] = (),
    ) -> Run:
        file = request.path.parent / system
        return run_in_simulator(file, scenario, seed=nexus_seed, within=within, rights=rights)

    return run


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Next to a failure, the line that repeats it."""
    outcome: Any = yield
    report = outcome.get_result()
    callspec = getattr(item, "callspec", None)
    if report.when == "call" and report.failed and callspec is not None:
        seed = callspec.params.get("nexus_seed")
        if seed is not None:
            name = item.nodeid.partition("[")[0]
            report.sections.append(("replay", f"pytest '{name}' --seed {seed}"))
