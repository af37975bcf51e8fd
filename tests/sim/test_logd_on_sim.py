"""logd, the log and the posts of real tasks on the simulated kernel."""

from typing import Any

import pytest

from nexus.abi import EventKind
from nexus.protocols.logd import RATE_MAX
from nexus.services.logd.config import Settings
from nexus.testing.rig import Rig, sim_rig
from tests.fakes.logbodies import (
    BURST,
    flood,
    restarts,
    sinks,
    slots_then_routes,
    stats_probe,
    three_lines,
)
from tests.fakes.logroot import evidence_of, observe

pytestmark = pytest.mark.sim

RIGS = [sim_rig(seed=1, cpu_count=1), sim_rig(seed=2, cpu_count=2)]


@pytest.fixture(params=RIGS, ids=lambda rig: rig.name)
def rig(request: Any) -> Rig:
    chosen: Rig = request.param
    return chosen


def test_the_stats_probe_is_exact_next_to_a_forged_zero_and_an_answer_not_taken(rig: Rig) -> None:
    seen, run = observe(rig, other=three_lines, client=stats_probe)

    assert seen["sent"] == {
        "accepted": RATE_MAX,
        "invalid_args": BURST // 4,
        "over_limit": BURST // 4,
        "rate_limited": BURST - RATE_MAX,
    }
    assert seen["others"] == ["one", "two", "three"]
    assert seen["foreign"] == 2
    lines = [
        (str(fields["line"]), evidence_of(fields)["count"])
        for fields in run.fields(EventKind.CONSOLE)
        if str(fields["line"]).startswith("logd: reject")
    ]
    assert sorted(lines) == [
        ("logd: reject invalid_args", 1),
        ("logd: reject over_limit", 1),
        ("logd: reject rate_limited", 1),
    ]


def test_lines_go_over_slots_and_over_routes_and_no_capability_is_left_behind(rig: Rig) -> None:
    seen, _ = observe(rig, client=sinks)

    assert seen["refused"] == [False] * 7
    assert seen["nothing"] == 1
    assert seen["taken"] is True
    assert seen["acknowledged"] == [10, 1]
    assert seen["found"] == ["over slots"] * 10 + ["over routes"]


def test_a_killed_logd_is_found_again_and_every_line_is_accounted_for(rig: Rig) -> None:
    seen, _ = observe(rig, client=restarts)

    assert seen["texts"][-1] == ["after", "3"]
    assert seen["waiting"] == 0


def test_configured_slots_whose_logd_is_gone_give_way_to_routing(rig: Rig) -> None:
    seen, _ = observe(rig, client=slots_then_routes)

    assert seen["taken"] == [True, True], "slots are looked at; that logd is gone shows later"
    assert (seen["acknowledged"], seen["bound"], seen["found"]) == (2, 3, ["over routes"])


def test_a_flood_pushes_out_its_own_records_before_those_of_others(rig: Rig) -> None:
    """Of a full ring a quarter stays with the others; the three lines are less than that."""
    settings = Settings(records=RATE_MAX + 10)
    seen, _ = observe(rig, settings, other=three_lines, client=flood)

    assert seen["kept"] == [3, 3]
    assert seen["other"] == [3, 0]
    assert seen["dropped"] == 2 * RATE_MAX + 3 - (RATE_MAX + 10)
