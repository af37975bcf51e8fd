"""One kill in each phase of an update; `make campaign` has a hundred (docs/reference)."""

import pytest

from tests.linux.slot_kills import PHASES, campaign

pytestmark = [pytest.mark.linux, pytest.mark.slow]


def test_a_system_killed_at_any_moment_of_an_update_boots_one_whole_verified_slot() -> None:
    said: list[str] = []

    counts = campaign(range(len(PHASES)), 6, said.append)

    assert {phase.name: counts[phase.name] for phase in PHASES} == dict.fromkeys(
        (phase.name for phase in PHASES), 1
    ), said
