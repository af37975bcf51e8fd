"""The ladder on real processes: green but for the rung where a saboteur sits.

`make prove`, the other half of `make test`, climbs all of it without one. Here stand the saboteurs
of what only this kernel can get wrong. A run ends with the phase of its saboteur's rung, or with
that of IPC, for time's sake; `make campaign` plants all, in whole runs.
"""

from pathlib import Path

import pytest

from nexus.proof.prove import prove
from nexus.proof.request import Request
from nexus.proof.sweep import problem_of
from nexus.protocols.ladder import Ground, Phase, rung

SYSTEM = Path(__file__).parents[2] / "systems" / "selftest.toml"
PHASES = tuple(Phase)
SABOTEURS = (2, 63, 68, 95, 104, 106)

pytestmark = [pytest.mark.linux, pytest.mark.slow]


def request(record: Path, saboteur: int, phase: Phase) -> Request:
    """A run of the selftest system on real processes."""
    return Request(
        ground=Ground.LINUX,
        system=SYSTEM,
        smp=2,
        seed=3,
        timeout=60 * 10**9,
        saboteur=saboteur,
        record=record,
        phase=phase,
    )


@pytest.mark.parametrize("number", SABOTEURS)
def test_a_saboteur_turns_exactly_its_rung_red(number: int, tmp_path: Path) -> None:
    phase = max(rung(number).phase, Phase.IPC, key=PHASES.index)
    outcome = prove(request(tmp_path / "record.jsonl", number, phase), tmp_path)

    assert problem_of(number, outcome.verdict) == ""
