"""logd, the log and the posts between processes of the Linux kernel."""

import pytest

from nexus.protocols.logd import RATE_MAX
from nexus.testing.rig import linux_rig
from tests.fakes.logbodies import (
    BURST,
    FLOOD,
    calm,
    restarts,
    ring_flood,
    sinks,
    slots_then_routes,
    stats_probe,
    three_lines,
)
from tests.fakes.logroot import observe

pytestmark = pytest.mark.linux


def test_the_stats_probe_is_exact_next_to_a_forged_zero_and_an_answer_not_taken() -> None:
    seen, _ = observe(linux_rig(), other=three_lines, client=stats_probe)

    assert sum(seen["sent"].values()) == BURST + 2 * (BURST // 4)
    assert seen["sent"]["accepted"] >= RATE_MAX, "a busy host may take more than one window"
    assert seen["others"] == ["one", "two", "three"]
    assert seen["foreign"] == 2


def test_lines_go_over_slots_and_over_routes_and_no_capability_is_left_behind() -> None:
    seen, _ = observe(linux_rig(), client=sinks)

    assert seen["refused"] == [False] * 7
    assert seen["taken"] is True
    assert seen["acknowledged"] == [10, 1]
    assert seen["found"] == ["over slots"] * 10 + ["over routes"]


def test_a_killed_logd_is_found_again_and_every_line_is_accounted_for() -> None:
    seen, _ = observe(linux_rig(), client=restarts)

    assert seen["texts"][-1] == ["after", "3"]
    assert seen["waiting"] == 0


def test_configured_slots_whose_logd_is_gone_give_way_to_routing() -> None:
    seen, _ = observe(linux_rig(), client=slots_then_routes)

    assert seen["taken"] == [True, True]
    assert (seen["acknowledged"], seen["found"]) == (2, ["over routes"])


def test_a_million_records_of_one_task_are_accounted_for_and_cost_nobody_else_anything() -> None:
    """The default budgets: 1024 records in 256 KiB, and 4096 of a sender's stream in a second."""
    seen, _ = observe(linux_rig(), beside=calm, other=three_lines, client=ring_flood)

    assert seen["sent"] == sum(seen["ours"]) == sum(seen["theirs"]) == FLOOD
    assert seen["ours"] == seen["theirs"]
    assert seen["ours"][2] > 0, "it was faster than logd has to be"
    assert seen["last"] == [str(FLOOD - 1)]
    assert seen["others"] == ["one", "two", "three"]
    assert seen["used"][0]
    assert seen["used"][1] <= seen["capacity"] == 256 * 1024
    assert seen["total"][0] == seen["total"][1]
