"""Saboteurs on the simulated kernel: each turns exactly its rung red.

Those run as far as the phase of their rung, for time's sake; `make campaign` plants them all
in whole runs. They run beside all other tests (tests/sim/sweep.py), and are asked about last.
"""

import pytest

from nexus.proof.saboteurs import SABOTEURS
from nexus.protocols.ladder import Ground
from tests.sim.sweep import Sweep

SIM = sorted(saboteur.rung for saboteur in SABOTEURS if Ground.SIM in saboteur.grounds)

pytestmark = [pytest.mark.sim, pytest.mark.slow]


@pytest.mark.parametrize("number", SIM)
def test_a_saboteur_turns_exactly_its_rung_red(number: int, sweep: Sweep) -> None:
    assert sweep.problem(number) == ""
