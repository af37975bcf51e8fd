"""A whole ladder compared with one that differs in a single line or end, as another ground's."""

from collections.abc import Callable
from dataclasses import replace
from typing import Final

import pytest

from nexus.abi import Event, EventKind
from nexus.proof.prove import Outcome
from nexus.proof.worlds import Pair, compare_two
from nexus.protocols.ladder import Ground

pytestmark = [pytest.mark.sim, pytest.mark.slow]

Change = Callable[[Event], Event | None]
PLACES: Final = (
    (EventKind.CONSOLE, 0, "logd", "logd: ready"),
    (EventKind.CONSOLE, 0, "selftest-client", "SELFTEST: policy deny ok"),
    (EventKind.CONSOLE, 0, "init-lite", "init: mmio policy deny ok"),
    (EventKind.CONSOLE, 2, "selftest-client", "SELFTEST: statefs corruption quarantined ok"),
    (EventKind.CONSOLE, 3, "selftest-client", "SELFTEST: ota switch ok"),
    (EventKind.CONSOLE, 5, "selftest-client", "SELFTEST: ota rollback ok"),
    (EventKind.EXIT, 0, "demo.exit42", ""),
    (EventKind.EXIT, 5, "statefsd", ""),
)
"""One entry of each part of the scenario: kind, boot, who, and the line."""


def in_the_vm(outcome: Outcome, boot: int, change: Change) -> Outcome:
    """The same run as a machine's, with events of one boot changed or left out."""
    traces = list(outcome.traces)
    changed = (change(event) for event in traces[boot].events)
    traces[boot] = replace(traces[boot], events=tuple(event for event in changed if event))
    request = replace(outcome.request, ground=Ground.VM)
    return replace(outcome, request=request, traces=tuple(traces))


def compared(outcome: Outcome, boot: int, change: Change) -> Pair:
    return compare_two(outcome, in_the_vm(outcome, boot, change))


def test_the_same_ladder_is_the_same(outcome: Outcome) -> None:
    pair = compared(outcome, 0, lambda event: event)

    assert (pair.exit_code, pair.grounds) == (0, (Ground.SIM, Ground.VM))
    assert pair.entries > 600


@pytest.mark.parametrize("is_lost", [True, False], ids=["lost", "other"])
@pytest.mark.parametrize(("kind", "boot", "name", "line"), PLACES)
def test_a_difference_that_nobody_declared_is_red(
    outcome: Outcome, kind: EventKind, boot: int, name: str, line: str, *, is_lost: bool
) -> None:
    def change(event: Event) -> Event | None:
        fields = event.fields
        if (event.kind, fields.get("name"), fields.get("line", "")) != (kind, name, line):
            return event
        if is_lost:
            return None
        other = {"line": f"{line}!"} if line else {"signal": 9}
        return event._replace(fields={**fields, **other})

    pair = compared(outcome, boot, change)

    assert pair.exit_code == 1
    assert (pair.red, list(pair.diffs)) == ((), [(boot, name)])
