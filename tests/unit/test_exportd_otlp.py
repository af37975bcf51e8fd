"""Spans and series as OTLP: what a collector is told, without one."""

import json
from typing import Any

from nexus.protocols.metricsd import Kind, Label, Series, Span, SpanStatus
from nexus.services.exportd.otlp import Origin, metrics, traces

ORIGIN = Origin({7: "pump"}, "boot-1", "0")
TRACE = bytes(range(1, 17))
PARENT = bytes(range(8))


def span(number: int, **changes: Any) -> Span:
    values: dict[str, Any] = {
        "number": number,
        "trace": TRACE,
        "span": number.to_bytes(8, "big"),
        "parent": bytes(8),
        "service": 7,
        "pid": 70,
        "generation": 2,
        "name": "work",
        "start": 100,
        "end": 130,
        "wall": 5_000,
        "status": SpanStatus.OK,
        "attributes": [],
    }
    return Span(**{**values, **changes})


def counter(at: int) -> Series:
    return Series(
        series=1,
        service=7,
        generation=2,
        kind=Kind.COUNTER,
        name="hits",
        unit="",
        labels=[Label("way", "in")],
        value=3,
        count=0,
        sum=0,
        bounds=[],
        buckets=[],
        at=at,
        live=True,
        since=15,
    )


def told(spans: list[Span], size_max: int = 100_000) -> list[dict[str, Any]]:
    bodies = traces(spans, ORIGIN, size_max)
    scopes = [
        scope
        for body in bodies
        for resource in json.loads(body.data)["resourceSpans"]
        for scope in resource["scopeSpans"]
    ]
    return [each for scope in scopes for each in scope["spans"]]


def test_a_span_that_is_open_is_not_told_yet() -> None:
    assert [each["spanId"] for each in told([span(1), span(2, end=0)])] == [f"{1:016x}"]


def test_a_span_has_its_parent_and_one_that_begins_a_trace_has_none() -> None:
    first, second = told([span(1), span(2, parent=PARENT)])

    assert "parentSpanId" not in first
    assert second["parentSpanId"] == PARENT.hex()
    assert first["traceId"] == second["traceId"] == TRACE.hex()


def test_a_span_that_timed_out_or_was_lost_is_an_error_that_says_so() -> None:
    late, lost = told([span(1, status=SpanStatus.TIMED_OUT), span(2, status=SpanStatus.LOST)])

    assert late["status"] == {"code": 2, "message": "never ended"}
    assert lost["status"] == {"code": 2, "message": "its task ended before it did"}


def test_times_are_those_of_the_wall_clock() -> None:
    (one,) = told([span(1)])
    (body,) = metrics([counter(at=40)], ORIGIN, 1_000, 100_000)
    (resource,) = json.loads(body.data)["resourceMetrics"]
    (point,) = resource["scopeMetrics"][0]["metrics"][0]["sum"]["dataPoints"]

    assert (one["startTimeUnixNano"], one["endTimeUnixNano"]) == ("5000", "5030")
    assert (point["startTimeUnixNano"], point["timeUnixNano"]) == ("1015", "1040")
    assert point["asInt"] == "3"


def test_bodies_are_as_large_as_they_may_be_and_lose_nothing() -> None:
    spans = [span(number) for number in range(1, 51)]

    bodies = traces(spans, ORIGIN, 4_000)

    assert len(bodies) > 1
    assert all(len(body.data) <= 4_000 for body in bodies)
    assert sum(body.items for body in bodies) == 50
    assert len(told(spans, 4_000)) == 50
