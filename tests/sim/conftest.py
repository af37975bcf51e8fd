"""Whole proof runs that several tests read."""

from pathlib import Path

import pytest

from nexus.proof.prove import Outcome, prove
from nexus.proof.request import Request
from nexus.protocols.ladder import Ground

ROOT = Path(__file__).parents[2]
SYSTEM = ROOT / "systems" / "selftest.toml"
PROVEN_SEED = 5
PROVEN_LOG = "log"  # beside the record


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
