"""A writer killed at any instant: what is read of its ring and its page was written so.

x86 keeps stores in their order, so that no barrier is needed here between processes; what weaker
machines may do is tests/property/test_telemetry_weak_memory.py. `make aarch64` runs the same.
"""

from collections import Counter
from dataclasses import replace
from typing import Final

import pytest

from tests.linux import telemetry_smoke
from tests.linux.killed_writers import (
    HISTOGRAMS,
    NEEDED,
    RECORDS,
    PageWatch,
    Plan,
    RingWatch,
    WatchOf,
    Write,
    Wrong,
    campaign,
    no_fence,
    write_page,
    write_page_count_last,
    write_page_state_first,
    write_ring,
    write_ring_commit_first,
)

pytestmark = [pytest.mark.linux, pytest.mark.slow]

PLAN: Final = Plan(kills=300, life_least=0.0005, life_most=0.006, seed=1, fence=no_fence)


def test_a_ring_whose_writer_is_killed_gives_only_what_was_put() -> None:
    counts: Counter[str] = Counter()

    campaign(write_ring, RingWatch, PLAN, counts)

    assert counts[RECORDS] > 10 * PLAN.kills
    assert all(counts[each] for each in NEEDED["ring"]), counts


def test_a_page_whose_writer_is_killed_has_only_true_histograms_and_spans() -> None:
    counts: Counter[str] = Counter()

    campaign(write_page, PageWatch, PLAN, counts)

    assert counts[HISTOGRAMS] > 10 * PLAN.kills
    assert all(counts[each] for each in NEEDED["page"]), counts


@pytest.mark.parametrize(
    ("write", "watch_of"),
    [
        (write_ring_commit_first, RingWatch),
        (write_page_count_last, PageWatch),
        (write_page_state_first, PageWatch),
    ],
)
def test_a_writer_that_stores_in_another_order_is_found(write: Write, watch_of: WatchOf) -> None:
    with pytest.raises(Wrong):
        campaign(write, watch_of, PLAN, Counter())


def test_the_smoke_test_is_not_green_when_nothing_happened(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(telemetry_smoke, "PLAN", replace(PLAN, kills=0))

    assert not telemetry_smoke.honest("ring")
    assert not telemetry_smoke.broken("page, count of a group last")

    honest, broken = capsys.readouterr().out.splitlines()
    assert "NOT TESTED" in honest
    assert "NOT FOUND after 0 kills" in broken


def test_the_smoke_test_is_not_green_when_something_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(telemetry_smoke, "PLAN", PLAN)
    monkeypatch.setitem(telemetry_smoke.HONEST, "ring", (write_ring_commit_first, RingWatch))

    assert not telemetry_smoke.honest("ring")
    assert "ring: WRONG after" in capsys.readouterr().out
