"""Spans and series as OTLP/HTTP JSON, in bodies of a bounded size.

Identifiers are hexadecimal and 64-bit integers are strings, as OTLP says of its JSON (not base64,
as protobuf's own mapping has bytes). Times are ns since 1970; enums are numbers.

*Source*: opentelemetry-proto 1.x, docs/specification.md ("OTLP/HTTP", "JSON Protobuf Encoding").
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final, NamedTuple

from nexus.protocols.metricsd import Kind, Label, Series, Span, SpanStatus
from nexus.services.exportd.exposition import name_of

TRACES_PATH: Final = "/v1/traces"
METRICS_PATH: Final = "/v1/metrics"
SCOPE: Final = "nexus"
SPAN_KIND_SERVER: Final = 2
SPAN_KIND_INTERNAL: Final = 1
STATUS_OK: Final = 1
STATUS_ERROR: Final = 2
CUMULATIVE: Final = 2
NO_PARENT: Final = bytes(8)
STATUSES: Final[Mapping[SpanStatus, dict[str, Any]]] = {
    SpanStatus.UNSET: {},
    SpanStatus.OK: {"code": STATUS_OK},
    SpanStatus.ERROR: {"code": STATUS_ERROR},
    SpanStatus.TIMED_OUT: {"code": STATUS_ERROR, "message": "never ended"},
    SpanStatus.LOST: {"code": STATUS_ERROR, "message": "its task ended before it did"},
}


class Body(NamedTuple):
    """One request to a collector."""

    path: str
    data: bytes
    items: int  # spans or data points


class Origin(NamedTuple):
    """What all resources of this device have in common."""

    names: Mapping[int, str]  # of services, by id
    boot: str  # says which boot it is
    version: str  # of Nexus


def traces(spans: Iterable[Span], origin: Origin, size_max: int) -> list[Body]:
    """Ended spans, grouped by who made them."""
    items = [((each.service, each.generation), _span(each)) for each in spans if each.end]
    return list(_bodies(TRACES_PATH, items, origin, size_max))


def metrics(rows: Iterable[Series], origin: Origin, wall_ahead: int, size_max: int) -> list[Body]:
    """Series as they stand; `wall_ahead` is what the wall clock shows more than the kernel's."""
    items = [((row.service, row.generation), _metric(row, wall_ahead)) for row in rows]
    return list(_bodies(METRICS_PATH, items, origin, size_max))


_WORDS: Final = {
    TRACES_PATH: ("resourceSpans", "scopeSpans", "spans"),
    METRICS_PATH: ("resourceMetrics", "scopeMetrics", "metrics"),
}

Owner = tuple[int, int]  # service and generation


def _bodies(
    path: str, items: list[tuple[Owner, dict[str, Any]]], origin: Origin, size_max: int
) -> Iterator[Body]:
    """Bodies of at most `size_max` bytes, unless one item alone is larger than that."""
    batch: dict[Owner, list[str]] = {}
    size = count = 0
    for owner, item in items:
        text = json.dumps(item, separators=(",", ":"))
        more = len(text) + 1 + (0 if owner in batch else len(_resource(owner, origin)) + 160)
        if count and size + more > size_max:
            yield _body(path, batch, origin, count)
            batch, size, count = {}, 0, 0
            more = len(text) + 1 + len(_resource(owner, origin)) + 160
        batch.setdefault(owner, []).append(text)
        size += more
        count += 1
    if count:
        yield _body(path, batch, origin, count)


def _body(path: str, batch: Mapping[Owner, list[str]], origin: Origin, count: int) -> Body:
    resources, scopes, things = _WORDS[path]
    scope = json.dumps({"name": SCOPE, "version": origin.version})
    parts = [
        f'{{"resource":{_resource(owner, origin)},"{scopes}":[{{"scope":{scope},'
        f'"{things}":[{",".join(texts)}]}}]}}'
        for owner, texts in batch.items()
    ]
    return Body(path, f'{{"{resources}":[{",".join(parts)}]}}'.encode(), count)


def _resource(owner: Owner, origin: Origin) -> str:
    service, generation = owner
    name = name_of(service, origin.names)
    attributes = [
        _text("service.name", name),
        _text("service.instance.id", f"{origin.boot}/{name}/{generation}"),
        _text("service.namespace", SCOPE),
    ]
    return json.dumps({"attributes": attributes}, separators=(",", ":"))


def _text(key: str, value: str) -> dict[str, Any]:
    return {"key": key, "value": {"stringValue": value}}


def _attributes(labels: Iterable[Label]) -> list[dict[str, Any]]:
    return [_text(label.key, label.value) for label in labels]


def _span(span: Span) -> dict[str, Any]:
    item: dict[str, Any] = {
        "traceId": span.trace.hex(),
        "spanId": span.span.hex(),
        "name": span.name,
        "kind": SPAN_KIND_SERVER if "." in span.name else SPAN_KIND_INTERNAL,
        "startTimeUnixNano": str(span.wall),
        "endTimeUnixNano": str(span.wall + span.end - span.start),
        "attributes": [
            *_attributes(span.attributes),
            {"key": "process.pid", "value": {"intValue": str(span.pid)}},
        ],
        "status": STATUSES[span.status],
    }
    if span.parent != NO_PARENT:
        item["parentSpanId"] = span.parent.hex()
    return item


def _metric(row: Series, wall_ahead: int) -> dict[str, Any]:
    point: dict[str, Any] = {
        "attributes": _attributes(row.labels),
        "timeUnixNano": str(row.at + wall_ahead),
    }
    item: dict[str, Any] = {"name": row.name, "unit": row.unit}
    if row.kind is Kind.GAUGE:
        return {**item, "gauge": {"dataPoints": [{**point, "asInt": str(row.value)}]}}
    point["startTimeUnixNano"] = str(row.since + wall_ahead)
    if row.kind is Kind.COUNTER:
        total = {**point, "asInt": str(row.value)}
        sums = {"dataPoints": [total], "aggregationTemporality": CUMULATIVE, "isMonotonic": True}
        return {**item, "sum": sums}
    point |= {
        "count": str(sum(row.buckets)),
        "sum": row.sum,
        "bucketCounts": [str(each) for each in row.buckets],
        "explicitBounds": list(row.bounds),
    }
    histogram = {"dataPoints": [point], "aggregationTemporality": CUMULATIVE}
    return {**item, "histogram": histogram}
