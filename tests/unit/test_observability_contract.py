"""The contract of logs, metrics and traces says what is so: its tests exist, its limits are the
code's, its counters and lines are those of the protocols and the ladder, and no status is missing.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Final, NamedTuple

import pytest

from nexus.protocols import execd, logd, metricsd
from nexus.protocols.ladder import RUNGS, rung
from nexus.services.metricsd import config
from nexus.wire import ReplyStatus

ROOT: Final = Path(__file__).parents[2]
PAGE: Final = ROOT / "docs" / "contracts" / "observability.md"
NONE: Final = "-"
MODULES: Final[dict[str, tuple[ModuleType, ...]]] = {
    "logd": (logd,),
    "metricsd": (metricsd, config),
    "execd": (execd,),
}
STATUSES: Final = {
    "logd": logd.LogdStatus,
    "metricsd": metricsd.MetricsdStatus,
    "execd": execd.ExecdStatus,
}


class Row(NamedTuple):
    """One way to be refused."""

    service: str
    request: str
    when: str
    limit: str
    status: str
    counter: str
    line: str
    number: str
    test: str


def _tables() -> Iterator[list[str]]:
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip().strip("`") for cell in line.strip("|").split(" | ")]
        if line.startswith("| ") and not line.startswith(("| ---", "| service |", "| what |")):
            yield cells


MATRIX: Final = [Row(*cells) for cells in _tables() if cells[0] in STATUSES]
COSTS: Final = [cells for cells in _tables() if cells[0] not in STATUSES]


def _exists(test: str) -> bool:
    path, _, name = test.partition("::")
    file = ROOT / path
    return file.is_file() and f"def {name}(" in file.read_text(encoding="utf-8")


def _constant(service: str, name: str) -> int:
    found = [getattr(each, name) for each in MODULES[service] if hasattr(each, name)]
    assert len(found) == 1, f"{name} of {service}"
    return int(found[0])


def _is_counter(service: str, name: str) -> bool:
    module = MODULES[service][0]
    if not hasattr(module, "SenderRow"):
        return False
    return name in {*module.SenderRow.__struct_fields__, *module.Stats.__struct_fields__}


def test_the_page_has_both_tables() -> None:
    assert len(MATRIX) >= 18
    assert len(COSTS) >= 6


@pytest.mark.parametrize("test", [row.test for row in MATRIX] + [cells[2] for cells in COSTS])
def test_a_named_test_exists(test: str) -> None:
    assert _exists(test), test


@pytest.mark.parametrize("service", STATUSES)
def test_every_status_of_a_protocol_is_in_the_matrix(service: str) -> None:
    told = {row.status for row in MATRIX if row.service == service}

    assert told == {each.name for each in STATUSES[service]} | {ReplyStatus.DENIED.name}


@pytest.mark.parametrize("row", MATRIX, ids=lambda row: f"{row.service} {row.request} {row.status}")
def test_a_row_says_what_the_code_says(row: Row) -> None:
    codecs = MODULES[row.service][0].PROTOCOL.codecs
    requests = {kind.__name__: kind for kind in codecs}

    assert row.request in requests
    if row.limit != NONE:
        found = re.fullmatch(r"([A-Z_]+)` = ([0-9]+)", row.limit)
        assert found is not None, row.limit
        assert _constant(row.service, found[1]) == int(found[2])
    assert row.counter == NONE or _is_counter(row.service, row.counter)
    assert row.line == NONE or row.line in {each.marker for each in RUNGS}
    assert row.line == NONE or row.line == f"{row.service}: reject {row.status.lower()}"


@pytest.mark.parametrize(
    "row", [row for row in MATRIX if row.number != NONE], ids=lambda row: row.number
)
def test_a_rung_that_a_row_names_is_about_that_service(row: Row) -> None:
    named = rung(int(row.number.removeprefix("#")))

    assert row.service in named.services


def test_what_costs_its_sender_is_counted_where_the_page_says() -> None:
    for _what, counter, _test in COSTS:
        assert any(_is_counter(service, counter) for service in STATUSES), counter
