"""The ladder in a machine: what is planted in it turns its rung red, and a scenario is the same on
three grounds."""

from pathlib import Path
from typing import Final

import pytest

from nexus.proof.compare import as_text, compare, exit_code
from nexus.proof.prove import prove
from nexus.proof.request import Comparison, Request
from nexus.proof.runner import NotRun, make_ready
from nexus.proof.sweep import problem_of
from nexus.proof.verdict import State
from nexus.protocols.ladder import Ground, Phase

pytestmark = [pytest.mark.vm, pytest.mark.slow]

SYSTEM: Final = Path("systems/selftest.toml")
DRIVERS: Final = Path(__file__).parent / "drivers" / "system.toml"
TIMEOUT: Final = 190 * 10**9  # ns, of one boot
BOOTS: Final = 6  # of a whole ladder
PLANTED: Final = (40, 50, 51)
"""What only a machine can get wrong, and a small system shows in a third of a minute: which CPU a
service ran on, and both drivers before devices that are not ours. `make campaign` plants in each
phase."""


@pytest.fixture(scope="module", autouse=True)
def _machine() -> None:
    try:
        make_ready(Ground.VM)
    except NotRun as missing:
        pytest.skip(f"not run: {missing}")


@pytest.mark.timeout(1500)
@pytest.mark.parametrize("smp", [1, 2])
def test_the_ladder_is_climbed_to_its_end(tmp_path: Path, smp: int) -> None:
    request = Request(
        ground=Ground.VM,
        system=SYSTEM,
        smp=smp,
        seed=1,
        require_smp=smp > 1,
        until="",
        timeout=TIMEOUT,
    )

    outcome = prove(request, tmp_path)

    assert outcome.verdict.of(State.RED) == ()
    assert outcome.verdict.exit_code == 0, outcome.verdict.findings
    assert len(outcome.traces) == BOOTS


@pytest.mark.timeout(600)
@pytest.mark.parametrize("number", PLANTED)
def test_a_saboteur_turns_exactly_its_rung_red(tmp_path: Path, number: int) -> None:
    request = Request(
        ground=Ground.VM,
        system=DRIVERS,
        smp=2,
        seed=1,
        phase=Phase.DEVICES,
        until="",
        timeout=TIMEOUT,
        saboteur=number,
    )

    outcome = prove(request, tmp_path)

    assert problem_of(number, outcome.verdict) == ""


@pytest.mark.timeout(600)
def test_a_scenario_shows_every_task_the_same_on_three_grounds() -> None:
    comparison = Comparison(
        grounds=tuple(Ground), scenario="conformance", seed=1, timeout=TIMEOUT, json=False
    )

    results = compare(comparison)

    assert [result.grounds[1] for result in results] == [Ground.LINUX, Ground.VM]
    assert exit_code(results) == 0, as_text(results)
