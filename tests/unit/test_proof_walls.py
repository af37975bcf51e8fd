"""The doctor and the ladder have to say the same of a machine: what is planted here differs in one
place each, and that place is named."""

from collections.abc import Mapping
from typing import Any, Final

import pytest

from nexus.kernel.linux import groups_tried
from nexus.kernel.linux.report import STEPS as DOCTORS_STEPS
from nexus.kernel.linux.report import group_rows
from nexus.proof.walls import (
    ABSENT,
    GUEST_NOT_HELD,
    HELD,
    RESTS_ON,
    SEEN,
    STEPS,
    disagreements,
    rows_of,
    unfounded,
)
from nexus.protocols.ladder import Ground, rung

ROWS: Final = rows_of(Ground.VM)
OUTSIDE: Final = {
    "uid": 61_000,
    "no_new_privs": 1,
    "seccomp": 2,
    "cap_eff": 0,
    "cap_prm": 0,
    "dumpable": False,
    "grouped": True,
}
NOT_SEEN: Final[Mapping[str, Mapping[str, Any]]] = {
    "seccomp": {"seccomp": 0},
    "capabilities": {"cap_eff": 1},
    "not_dumpable": {"dumpable": True},
    "cgroup_memory": {"grouped": False},
    "cgroup_tasks": {"grouped": False},
    "cgroup_cpu": {"grouped": False},
}


def start(*degraded: str, name: str = "timed", **outside: object) -> Mapping[str, Any]:
    return {"name": name, "degraded": [*degraded], "outside": OUTSIDE | outside}


def test_a_machine_where_everything_is_held_agrees_with_a_start_that_shows_it() -> None:
    assert disagreements(ROWS, [start(), start(name="logd", uid=61_001)]) == []


@pytest.mark.parametrize("step", STEPS)
def test_a_step_that_init_could_not_take_is_not_held(step: str) -> None:
    (found,) = disagreements(ROWS, [start(step)])

    assert found == f"timed: {step}: the doctor says held, and init could not take it"
    assert disagreements(ROWS | {step: "degraded"}, [start(step)]) == []


@pytest.mark.parametrize("step", STEPS)
def test_a_step_that_the_doctor_calls_absent_is_not_taken(step: str) -> None:
    found = disagreements(ROWS | {step: ABSENT}, [start()])

    assert f"timed: {step}: the doctor says absent, and init says it was taken" in found


@pytest.mark.parametrize("row", SEEN)
def test_what_linux_shows_missing_is_not_held(row: str) -> None:
    found = disagreements(ROWS, [start(**NOT_SEEN[row])])

    assert f"timed: {row}: the doctor says held, and Linux shows it missing" in found
    assert all(f"timed: {name}:" not in str(found) for name in SEEN.keys() - NOT_SEEN_TOO[row])


@pytest.mark.parametrize("row", SEEN)
def test_what_linux_shows_is_not_absent(row: str) -> None:
    found = disagreements(ROWS | {row: ABSENT}, [start()])

    assert f"timed: {row}: the doctor says absent, and Linux shows it" in found


def test_an_import_that_reads_as_root_would_is_no_interpreter_of_its_own() -> None:
    (found,) = disagreements(ROWS, [start("import_reading")])

    assert found == "timed: exec_isolation: the doctor says held, and an import read as root would"


def test_what_linux_does_not_show_is_nobody_s_to_compare() -> None:
    assert disagreements(ROWS, [start(dumpable=None)]) == []
    assert disagreements(ROWS, [{"name": "timed", "degraded": [], "outside": None}]) == []


def test_an_id_that_two_services_have_is_not_held() -> None:
    both = [start(), start(name="logd")]

    assert disagreements(ROWS, both) == [
        "logd: ids: the doctor says held, and uid 61000 is timed's too"
    ]
    assert disagreements(ROWS | {"ids": "degraded"}, both) == []


def test_a_service_that_was_started_again_has_its_id_again() -> None:
    assert disagreements(ROWS, [start(), start()]) == []


@pytest.mark.parametrize("number", RESTS_ON)
def test_a_rung_is_not_claimed_where_what_it_rests_on_is_absent(number: int) -> None:
    assert unfounded(number, ROWS) == []
    for name in RESTS_ON[number]:
        (found,) = unfounded(number, ROWS | {name: ABSENT})
        assert found == f"#{number} is claimed, and the doctor says {name}: absent"
    assert Ground.VM in rung(number).grounds


def test_the_steps_are_the_doctor_s() -> None:
    assert tuple(name for name, _gives, _left in DOCTORS_STEPS) == STEPS


def test_every_row_of_control_groups_says_what_is_left_without_them() -> None:
    rows = group_rows(groups_tried.Tried("no groups", "no groups", "no groups", "no groups"))

    assert [row.state.value for row in rows] == [ABSENT] * 3
    assert all(row.why.endswith("no control groups are used, no groups") for row in rows)
    held = group_rows(groups_tried.Tried("", "", "", ""))
    assert [(row.state.value, row.why) for row in held] == [(HELD, "")] * 3


def test_each_kind_of_group_is_judged_by_its_own_try() -> None:
    tries = groups_tried.Tried("", "", "a bomb", "")

    assert {row.name for row in group_rows(tries) if row.why} == {"cgroup_tasks"}


def test_nothing_that_a_rung_rests_on_is_given_up_in_a_machine_of_ours() -> None:
    assert not GUEST_NOT_HELD.keys() & {*STEPS, *SEEN, *RESTS_ON[63], *RESTS_ON[95]}


NOT_SEEN_TOO: Final = {
    row: {other for other in NOT_SEEN if NOT_SEEN[other] == NOT_SEEN[row]} for row in NOT_SEEN
}
"""The rows that Linux shows by the same word."""
