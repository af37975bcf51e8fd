"""Ladders on two grounds: what differs is found, and what may differ is counted by its name."""

from typing import Final

import pytest

from nexus.abi import Event, EventKind, Nanos, Pid
from nexus.proof.trace import Trace
from nexus.proof.worlds import ALLOWED, PARTS, Pair, as_json, as_text, compare_traces, exit_code
from nexus.protocols.ladder import BAD_BOOT, Ground, rung

SIM_LINUX: Final = (Ground.SIM, Ground.LINUX)
SIM_VM: Final = (Ground.SIM, Ground.VM)


def said(name: str, text: str, pid: int = 3) -> Event:
    return Event(Nanos(1), EventKind.CONSOLE, Pid(pid), {"name": name, "line": text})


def ended(name: str, code: int = 0, signal: int = 0) -> Event:
    return Event(Nanos(2), EventKind.EXIT, Pid(3), {"name": name, "code": code, "signal": signal})


def boot(number: int, *events: Event) -> Trace:
    return Trace(events, number=number)


def compared(
    left: list[Event], right: list[Event], grounds: tuple[Ground, Ground] = SIM_LINUX, at: int = 2
) -> Pair:
    return compare_traces([boot(at, *left)], [boot(at, *right)], grounds)


SAME: Final = [said("timed", "timed: ready"), ended("timed")]


def test_the_same_ladder_is_the_same_whatever_the_pids_are() -> None:
    left = [said("execd", "execd: child exited pid=7 code=0"), *SAME]
    right = [*SAME, said("execd", "execd: child exited pid=99 code=0", pid=5)]

    pair = compared(left, right)

    assert (pair.exit_code, pair.entries, pair.used) == (0, 3, {})
    assert as_text([pair]).endswith("\nthe same\n")


@pytest.mark.parametrize(
    "other",
    [
        [said("timed", "timed: ready")],
        [said("timed", "timed: ready"), ended("timed", signal=9)],
        [said("timed", "timed: ready"), ended("timed", code=1)],
        [ended("timed"), said("timed", "timed: ready")],
        [*SAME, said("timed", "SELFTEST: policy deny ok")],
        [*SAME, ended("logd")],
    ],
)
def test_a_line_an_end_and_an_order_that_differ_are_found(other: list[Event]) -> None:
    pair = compared(SAME, other)

    assert pair.exit_code == 1
    assert "different: " in as_text([pair])
    assert '"exit_code":1' in as_json([pair])


def test_the_same_in_another_boot_is_not_the_same() -> None:
    pair = compare_traces([boot(0, *SAME)], [boot(1, *SAME)], SIM_VM)

    assert set(pair.diffs) == {(0, "timed"), (1, "timed")}


def test_init_hears_of_others_in_any_order_but_of_all_of_them() -> None:
    up, down = said("init-lite", "init: up logd"), said("init-lite", "init: up timed")

    assert compared([up, down], [down, up]).exit_code == 0
    assert compared([up, down], [down, down]).exit_code == 1


NAMED: Final = {
    "rungs": (2, said("selftest-client", "SELFTEST: mmio map ok")),
    "cut": (1, ended("timed")),
    "late": (2, said("init-lite", "init: health logd late")),
    "short-life": (2, said("demo.copy", "demo.copy: ready again")),
    "bad-set": (4, ended("exportd", signal=9)),
    "segment": (3, said("metricsd", "[INFO metricsd] retention wal active")),
}


@pytest.mark.parametrize("name", sorted(NAMED))
def test_what_may_differ_is_counted_by_its_name(name: str) -> None:
    at, event = NAMED[name]

    pair = compared(SAME, [*SAME, event], at=at) if name != "cut" else compared([], [event], at=at)

    assert (pair.exit_code, pair.used) == (0, {name: 1})


def test_every_allowed_difference_has_an_example_here() -> None:
    assert {each.id for each in ALLOWED} == set(NAMED)


def test_what_both_grounds_have_may_not_differ() -> None:
    event = said("selftest-client", "SELFTEST: mmio map ok")

    assert compared(SAME, [*SAME, event], SIM_VM).exit_code == 1
    assert compared([], [ended("timed")], SIM_VM, at=1).exit_code == 1
    assert compared([], [ended("exportd")], SIM_VM, at=3).exit_code == 1


def test_two_red_ladders_that_are_the_same_are_not_green() -> None:
    pair = Pair(grounds=SIM_VM, entries=1, diffs={}, used={}, red=("vm: init: ready",))

    assert exit_code([pair]) == 1
    assert "red      vm: init: ready" in as_text([pair])


def test_one_world_of_three_that_differs_is_red_and_named() -> None:
    pairs = [compared(SAME, SAME), compared(SAME, [*SAME, ended("logd", signal=9)], SIM_VM)]

    text = as_text(pairs)

    assert exit_code(pairs) == 1
    assert (
        "sim and vm: 2 lines and ends compared\ndifferent: logd in boot 2\n--- sim\n+++ vm" in text
    )
    assert text.endswith("\nNOT the same\n")


def test_the_ladder_has_the_scenario_that_is_asked_for_on_every_ground() -> None:
    asked = ["boot", "calls", "denials", "a crash", "state", "update", "rollback"]

    assert [part.what for part in PARTS] == asked
    for part in PARTS:
        assert any(rung(number).grounds == set(Ground) for number in part.rungs)
        assert BAD_BOOT not in part.boots
