"""One kill in each phase of an update; `make campaign` has a hundred (docs/reference)."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest

from nexus.bootctl import BootRecord, SlotName, SlotState, provisioned
from tests.fakes.bootrecords import a_set
from tests.linux.slot_kills import (
    PHASES,
    Wrong,
    campaign,
    check_first_boot,
    check_rollback,
    check_stage,
    check_switch,
    check_taken_back,
)

pytestmark = pytest.mark.linux


@pytest.mark.slow
def test_a_system_killed_at_any_moment_of_an_update_boots_one_whole_verified_slot() -> None:
    said: list[str] = []

    counts = campaign(range(len(PHASES)), 6, said.append)

    assert {phase.name: counts[phase.name] for phase in PHASES} == dict.fromkeys(
        (phase.name for phase in PHASES), 1
    ), said


@dataclass
class Told:
    """An act of which only the answer counts: what the command was told, what the console says."""

    acknowledged: bool = False
    begun: int = 0
    device: "Told | None" = None
    console: "Told | None" = None

    def read_bytes(self) -> bytes:
        return b"init: health ok (slot b)"


COMMITTED = Told(device=Told(console=Told()))
STAGED = provisioned(a_set(1)).with_slot(SlotName.B, replace(a_set(2), state=SlotState.STAGED))
TRIED = replace(STAGED, trying=SlotName.B)
BACK = replace(STAGED, active=SlotName.B)


@pytest.mark.parametrize(
    ("check", "act", "record", "text"),
    [
        (check_stage, Told(), TRIED, "began a trial"),
        (check_stage, Told(acknowledged=True), provisioned(a_set(1)), "is not staged"),
        (check_switch, Told(acknowledged=True), STAGED, "switch is forgotten"),
        (check_first_boot, COMMITTED, TRIED, "committed, and it is not"),
        (check_rollback, Told(), BACK, "never ran was committed"),
        (check_taken_back, Told(acknowledged=True), BACK, "rollback is forgotten"),
    ],
)
def test_what_may_not_be_is_found(
    check: Callable[[Any, BootRecord], object], act: Told, record: BootRecord, text: str
) -> None:
    with pytest.raises(Wrong, match=text):
        _ = check(act, record)
