"""Saboteurs on the simulated kernel: each turns exactly its rung red."""

from pathlib import Path

import pytest

from nexus.proof.prove import prove
from nexus.proof.request import Request
from nexus.proof.saboteurs import SABOTEURS
from nexus.proof.sweep import problem_of
from nexus.protocols.ladder import Ground

SYSTEM = Path(__file__).parents[2] / "systems" / "selftest.toml"
SIM = sorted(saboteur.rung for saboteur in SABOTEURS if Ground.SIM in saboteur.grounds)

pytestmark = [pytest.mark.sim, pytest.mark.slow]


@pytest.mark.parametrize("number", SIM)
def test_a_saboteur_turns_exactly_its_rung_red(number: int, tmp_path: Path) -> None:
    request = Request(
        ground=Ground.SIM,
        system=SYSTEM,
        smp=2,
        seed=3,
        timeout=120 * 10**9,
        saboteur=number,
        record=tmp_path / "record.jsonl",
    )

    outcome = prove(request, tmp_path)

    assert problem_of(number, outcome.verdict) == ""
