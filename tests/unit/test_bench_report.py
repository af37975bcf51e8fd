"""One part of the benchmarks measured anew: the page keeps what was not measured."""

from typing import Final

import msgspec
import pytest

from bench.pairing import Spread
from bench.report import (
    Machine,
    Report,
    SimResult,
    Target,
    UpdateResult,
    UpdateRow,
    refreshed,
    render,
    targets_table,
)

HERE: Final = Machine(system="here", cpu_count=2, python="3.11", packages={}, load=0.0)


def target(name: str, value: float) -> Target:
    return Target(name, 10.0, at_most=True, measured=Spread.of([value]), unit=" s")


def report(name: str, value: float, rate: float) -> Report:
    rates = Spread.of([rate])
    sim = SimResult(rounds=1, rate=rates, bare_rate=rates, cpu_us=rates, bare_cpu_us=rates)
    return Report(machine=HERE, sim=sim, targets=[target(name, value)])


def test_a_refreshed_part_replaces_its_section_and_the_targets_of_its_names() -> None:
    old = report("ours", 1.0, 1111.0)
    old.targets.append(target("theirs", 2.0))
    fresh = report("ours", 99.0, 2222.0)

    page = refreshed(render(old), fresh, "sim")

    assert "1 111" not in page
    assert "2 222" in page
    rows = [line for line in page.splitlines() if line.startswith(("| ours", "| theirs"))]
    assert [row.rsplit("|", 2)[1].strip() for row in rows] == ["MISSED", "met"]
    assert page.count("Measured apart from the rest: here, 2 CPUs") == 1
    assert refreshed(page, fresh, "sim") == page


def test_a_part_that_did_not_run_leaves_the_former_section_and_adds_no_other() -> None:
    old = render(report("ours", 1.0, 1111.0))
    absent = msgspec.structs.replace(report("new", 3.0, 2222.0), sim=None)

    page = refreshed(old, absent, "sim")

    assert "1 111" in page
    assert "Measured apart" not in page
    assert "| new |" in page


@pytest.mark.parametrize(
    ("bound", "shown"),
    [(1.15, "1.15"), (0.05, "0.05"), (10.0, "10.0"), (1.4, "1.4"), (1500.0, "1 500")],
)
def test_a_bound_is_shown_as_it_is_and_not_rounded(bound: float, shown: str) -> None:
    row = targets_table([Target("ours", bound, at_most=True, measured=Spread.of([1.0]))])[-1]

    assert row.split("|")[2].strip() == f"at most {shown}"


def test_the_section_about_updates_has_times_in_ms_and_what_a_large_set_takes() -> None:
    one, two = Spread.of([0.1, 0.2, 0.3]), Spread.of([0.05])
    ratios = Spread.of([1.6]), Spread.of([2.5])
    row = UpdateRow("bytes that do not pack", 67_100_000, one, one, two, two, *ratios)
    result = UpdateResult(3, [row], 1 << 30, 40 << 20, 44 << 20, 2.94, 1.11)

    page = render(Report(machine=HERE, update=result))

    cells = "67.1 | 200 [100-300] | 200 [100-300] | 50 [50-50] | 50 [50-50] | 1.60 [1.60-1.60]"
    assert f"| bytes that do not pack | {cells} | 2.50 [2.50-2.50] |" in page
    assert "A set of 1 024 MiB: staged in 2.94 s, copied and hashed in 1.11 s." in page
    assert "40.0 MiB resident before and 44.0 MiB at most, 4.0 MiB more" in page
