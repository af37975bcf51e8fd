"""Bugs as somebody could make them are found by ordinary tests, and as soon as the table in
docs/claims.md says; without them the same searches find nothing."""

from pathlib import Path

import pytest

from tests.sim.planted_bugs import BUGS, Bug, Search
from tools.claims import exists

ROOT = Path(__file__).parents[2]
AREAS = {
    "a missing flush in statefsd",
    "a skipped identity check",
    "a marker printed too early",
    "an unbounded queue",
    "a lost wake-up",
}

pytestmark = [pytest.mark.sim, pytest.mark.slow]


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.plant.__name__.strip("_"))
def test_a_planted_bug_is_found_where_the_table_says(
    bug: Bug, monkeypatch: pytest.MonkeyPatch
) -> None:
    bug.plant(monkeypatch)

    found = bug.search(monkeypatch, bug.within)

    assert found is not None
    assert bug.why in found.why
    assert found.at <= bug.within


@pytest.mark.parametrize(("search", "needed"), {bug.search: bug.needed for bug in BUGS}.items())
def test_without_a_bug_the_same_search_finds_nothing(
    search: Search, needed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert search(monkeypatch, needed) is None


def test_every_area_has_a_bug_and_its_test_is_there() -> None:
    assert {bug.area for bug in BUGS} == AREAS
    assert all(exists(ROOT, bug.found_by) for bug in BUGS)
