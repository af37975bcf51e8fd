"""What exportd writes is read by prometheus_client's parsers, whatever the series are called."""

from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.openmetrics.parser import text_string_to_metric_families as read_openmetrics
from prometheus_client.parser import text_string_to_metric_families as read_text

from nexus.protocols.metricsd import Kind, Label, Series
from nexus.services.exportd.exposition import (
    Format,
    canonical,
    chosen,
    decimal,
    exposition,
)

NAMES = {7: "pump"}


def series(
    name: str, kind: Kind = Kind.COUNTER, value: int = 7, *, unit: str = "", **changes: Any
) -> Series:
    labels = [Label(key, text) for key, text in changes.pop("labels", {}).items()]
    values: dict[str, Any] = {
        "series": 1,
        "service": 7,
        "generation": 2,
        "count": 0,
        "sum": 0,
        "bounds": [],
        "buckets": [],
        "at": 0,
        "live": True,
        "since": 0,
    } | changes
    return Series(kind=kind, name=name, unit=unit, labels=labels, value=value, **values)


def histogram(name: str, bounds: list[int], buckets: list[int], total: int, **more: Any) -> Series:
    counts: dict[str, Any] = {"bounds": bounds, "buckets": buckets, "count": sum(buckets)}
    return series(name, Kind.HISTOGRAM, **(counts | {"sum": total} | more))


def parsed(rows: Sequence[Series]) -> dict[str, Any]:
    text = exposition(rows, NAMES, Format.OPENMETRICS).text.decode()
    return {family.name: family for family in read_openmetrics(text)}  # type: ignore[no-untyped-call]


@pytest.mark.parametrize(
    ("unit", "seconds"), [("s", 7.0), ("ms", 7e-3), ("us", 7e-6), ("ns", 7e-9)]
)
def test_a_time_is_told_in_seconds_whatever_its_unit(unit: str, seconds: float) -> None:
    (sample,) = parsed([series("waited", Kind.GAUGE, unit=unit)])["waited_seconds"].samples

    assert sample.value == seconds


def test_a_counter_ends_in_total_and_says_whose_it_is() -> None:
    families = parsed([series("pump.strokes", labels={"valve": 'a"b\\c\nd'})])

    (sample,) = families["pump_strokes"].samples
    assert (families["pump_strokes"].type, sample.name) == ("counter", "pump_strokes_total")
    assert sample.value == 7
    assert sample.labels == {"service": "pump", "instance": "2", "valve": 'a"b\\c\nd'}


def test_a_name_that_ends_in_total_does_not_get_a_second_one() -> None:
    (family,) = parsed([series("strokes_total")]).values()

    assert [sample.name for sample in family.samples] == ["strokes_total"]


def test_units_of_time_become_seconds_without_losing_a_digit() -> None:
    families = parsed([series("wait_ns", Kind.GAUGE, -1_234_567_891, unit="ns")])

    family = families["wait_seconds"]
    assert (family.unit, family.samples[0].value) == ("seconds", -1.234567891)
    assert decimal(-1_234_567_891, 9) == "-1.234567891"


def test_the_buckets_of_a_histogram_are_cumulative_up_to_infinity() -> None:
    rows = [histogram("call", [1_000_000, 10_000_000_000], [2, 3, 4], 5_000_000_000, unit="ns")]

    samples = {
        (sample.name, sample.labels.get("le")): sample.value
        for sample in parsed(rows)["call_seconds"].samples
    }

    assert samples == {
        ("call_seconds_bucket", "0.001"): 2,
        ("call_seconds_bucket", "10.0"): 5,
        ("call_seconds_bucket", "+Inf"): 9,
        ("call_seconds_count", None): 9,
        ("call_seconds_sum", None): 5.0,
    }


@pytest.mark.parametrize(
    ("value", "scale", "text"),
    [(1, 0, "1.0"), (10**6, 0, "1e+06"), (12_500_000, 0, "1.25e+07"), (25, 6, "2.5e-05")],
)
def test_bounds_are_written_as_go_writes_them(value: int, scale: int, text: str) -> None:
    assert canonical(value, scale) == text


def test_a_metric_whose_labels_are_one_once_they_are_valid_is_left_out_beside_itself() -> None:
    rows = [series("a", labels={key: "x"}) for key in ("b.c", "b_c")]

    page = exposition(rows, NAMES, Format.OPENMETRICS)

    assert (page.samples, page.left_out, page.metrics_left_out) == (1, 1, ["a"])


def test_what_cannot_stand_beside_another_family_is_left_out_and_counted() -> None:
    rows = [
        series("a.b"),
        series("a_b", value=8),  # another metric of the same exported name
        series("a.b", value=9),  # the same sample again
        series("a_b_total", Kind.GAUGE),  # its sample has the counter's name
        series("a.b", value=10, generation=3),
    ]

    page = exposition(rows, NAMES, Format.OPENMETRICS)

    assert (page.samples, page.left_out) == (2, 3)
    assert page.metrics_left_out == ["a_b", "a.b", "a_b_total"]
    (family,) = read_openmetrics(page.text.decode())  # type: ignore[no-untyped-call]
    assert [sample.value for sample in family.samples] == [7, 10]


def test_a_label_that_says_whose_the_series_is_loses_its_name() -> None:
    (family,) = parsed([series("a", labels={"service": "other", "le": "1"})]).values()

    assert family.samples[0].labels == {
        "service": "pump",
        "instance": "2",
        "exported_service": "other",
        "exported_le": "1",
    }


def test_an_old_scraper_gets_what_it_reads() -> None:
    rows = [series("strokes"), histogram("call", [10], [1, 1], 25)]

    text = exposition(rows, NAMES, Format.TEXT).text.decode()

    assert "# EOF" not in text
    assert "# UNIT" not in text
    families = {family.name: family for family in read_text(text)}
    assert families["strokes"].samples[0].value == 7
    assert {sample.value for sample in families["call"].samples} == {1, 2, 25}


NAME = st.from_regex(r"\A[a-zA-Z_][a-zA-Z0-9_.]{0,12}\Z")
LABELS = st.dictionaries(NAME, st.text(max_size=12), max_size=4)
UNIT = st.sampled_from(["", "ns", "ms", "s", "B", "1", "revolutions", "°C"])
U64 = st.integers(0, 2**64 - 1)


@st.composite
def any_series(draw: st.DrawFn) -> Series:
    kind = draw(st.sampled_from(Kind))
    bounds = sorted(draw(st.sets(st.integers(0, 2**63), max_size=4)))
    buckets = draw(st.lists(st.integers(0, 2**40), min_size=len(bounds) + 1, max_size=17))
    return series(
        draw(NAME),
        kind,
        draw(st.integers(-(2**63), 2**63 - 1) if kind is Kind.GAUGE else st.integers(0, 2**63 - 1)),
        unit=draw(UNIT),
        labels=draw(LABELS),
        bounds=bounds,
        buckets=buckets[: len(bounds) + 1],
        sum=draw(U64),
        generation=draw(st.integers(1, 3)),
        service=draw(st.sampled_from([7, 8])),
    )


@given(st.lists(any_series(), max_size=8))
def test_whatever_the_series_are_both_parsers_read_the_page(rows: list[Series]) -> None:
    page = exposition(rows, NAMES, Format.OPENMETRICS)

    families = list(read_openmetrics(page.text.decode()))  # type: ignore[no-untyped-call]
    named = [sample for family in families for sample in family.samples]
    whole = [each for each in named if not each.name.endswith(("_bucket", "_count"))]
    assert page.samples + page.left_out == len(rows)
    assert len({(each.name, *sorted(each.labels.items())) for each in named}) == len(named)
    assert len(whole) >= page.samples
    old = exposition(rows, NAMES, Format.TEXT).text.decode()
    assert sum(len(family.samples) for family in read_text(old)) == len(named)


CLASHING = ("a", "a.total", "a_total", "a_count", "a_sum", "a_bucket", "a_created", "a_seconds")


@given(st.lists(st.tuples(any_series(), st.sampled_from(CLASHING)), max_size=8))
def test_however_names_clash_each_family_is_there_once_and_of_one_type(
    named: list[tuple[Series, str]],
) -> None:
    rows = [msgspec.structs.replace(row, name=name) for row, name in named]
    page = exposition(rows, NAMES, Format.OPENMETRICS)

    families = list(read_openmetrics(page.text.decode()))  # type: ignore[no-untyped-call]
    heads = [line.split()[2] for line in page.text.decode().splitlines() if "# TYPE" in line]
    assert heads == [each.name for each in families]
    assert len(set(heads)) == len(heads)
    assert page.samples + page.left_out == len(rows)
    assert bool(page.metrics_left_out) is bool(page.left_out)
    assert not rows or page.samples, "the first one stands"


@pytest.mark.parametrize(
    ("accept", "found"),
    [
        (None, Format.OPENMETRICS),
        ("*/*", Format.OPENMETRICS),
        ("text/plain", Format.TEXT),
        ("text/plain;version=0.0.4;q=0.5,*/*;q=0.1", Format.TEXT),
        (
            "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1",
            Format.OPENMETRICS,
        ),
        ("application/openmetrics-text;q=0.1, text/plain; q=0.9", Format.TEXT),
        ("application/vnd.google.protobuf", Format.TEXT),
        ("text/plain;q=never", Format.TEXT),
    ],
)
def test_the_client_says_which_format_it_likes_best(accept: str | None, found: Format) -> None:
    assert chosen(accept) is found


@pytest.mark.parametrize(("unit", "first"), [("", (1 << 64) - 3), ("ns", 1 << 60)])
def test_bounds_that_are_one_number_to_a_scraper_are_one_bucket(unit: str, first: int) -> None:
    families = parsed([histogram("wait", [7, first, first + 1], [1, 2, 3, 4], 9, unit=unit)])

    (family,) = families.values()
    buckets = [each.value for each in family.samples if each.name.endswith("_bucket")]
    assert buckets == [1, 6, 10]


def test_a_series_that_is_called_as_its_unit_leaves_the_page_readable() -> None:
    families = parsed([series("seconds", Kind.GAUGE, 5, unit="s"), series("strokes")])

    assert families["seconds_seconds"].samples[0].value == 5
    assert families["strokes"].samples[0].value == 7
