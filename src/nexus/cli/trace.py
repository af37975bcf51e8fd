"""`nexus trace`: what one command, or one event, set off in which services, as a tree of spans.

The spans are metricsd's, the log lines between them logd's. `--chrome FILE` writes them in the
Trace Event Format, which Perfetto and chrome://tracing open.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec

from nexus.abi import ServiceId, service_id
from nexus.cli.ask import Asked
from nexus.cli.client import NANOS, OperatorClient, Unanswered
from nexus.cli.errors import CommandFailed, UsageError
from nexus.cli.output import is_lively, say, say_json, shown
from nexus.protocols import logd, metricsd
from nexus.protocols.logd import EVERY_RECORD, PAGE_MAX, THIS_BOOT, Query, Record
from nexus.protocols.metricsd import (
    SPAN_ROWS_MAX,
    TRACE_SIZE,
    GetSpans,
    Span,
    SpanStatus,
)
from nexus.protocols.operator import OperatorStatus

METRICSD: Final = "metricsd"
LOGD: Final = "logd"
ASK_TIME: Final = 5.0  # seconds for a page
SPANS_MAX: Final = 65_536  # of one command; metricsd keeps fewer
RECORDS_MAX: Final = 4_096  # log lines of one trace
LEAST_DIGITS: Final = 4  # of a trace id that is not written out
STATUS_STYLES: Final = {
    SpanStatus.ERROR: "\x1b[31m",
    SpanStatus.TIMED_OUT: "\x1b[33m",
    SpanStatus.LOST: "\x1b[33m",
}
RESET: Final = "\x1b[0m"
MICRO: Final = 1_000  # ns

Names = Mapping[ServiceId, str]


@dataclass(slots=True)
class Node:
    """A span, and what it set off."""

    span: Span
    children: "list[Node]" = field(default_factory=list)


class Trace(NamedTuple):
    """The spans of one trace, in the order of their beginnings, and its log lines."""

    trace: bytes
    spans: Sequence[Span]
    records: Sequence[Record] = ()

    @property
    def begun(self) -> int:
        """ns since 1970."""
        return min(span.wall for span in self.spans)

    @property
    def lasted(self) -> int:
        """ns from its first beginning to its last end that is known."""
        return max(_ended(span) for span in self.spans) - self.begun


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """Which traces: one by its id, or the last ones, of one service or of all."""

    trace: str = ""
    last: int = 1
    service: str | None = None
    with_logs: bool = False


def trace(asked: Asked, wanted: Wanted, *, chrome: Path | None, as_json: bool) -> None:
    """Print traces, or write them to a file. Raises CommandFailed and UsageError."""
    prefix = _digits(wanted.trace)
    with asked.client() as client:
        found = _traces(client, wanted, prefix)
        if wanted.with_logs:
            found = [each._replace(records=_records(client, each.trace)) for each in found]
    if not found:
        raise CommandFailed(_nothing(wanted))
    if chrome is not None:
        document = chrome_document(found, asked.names)
        _ = chrome.write_text(json.dumps(document, separators=(",", ":")))
        events = len(document["traceEvents"])
        say(f"{chrome}: {events} events; open it at https://ui.perfetto.dev")
    elif as_json:
        say_json([_document(each, asked.names) for each in found])
    else:
        lively = is_lively()
        for index, each in enumerate(found):
            for line in [""] * bool(index) + tree_lines(each, asked.names, lively=lively):
                say(line)


def _digits(text: str) -> str:
    """A trace id, or how it begins, in lower case."""
    lower = text.lower()
    if not lower:
        return ""
    if not LEAST_DIGITS <= len(lower) <= 2 * TRACE_SIZE or set(lower) - set("0123456789abcdef"):
        raise UsageError(
            f"{text!r} is no trace: write its {2 * TRACE_SIZE} hexadecimal digits, or at least "
            f"its first {LEAST_DIGITS}"
        )
    return lower


def _nothing(wanted: Wanted) -> str:
    if wanted.trace:
        return (
            f"there is no span of the trace {wanted.trace}: metricsd keeps the latest ones only, "
            "and those of services that use it"
        )
    whose = f" of {wanted.service}" if wanted.service else ""
    return f"there is no span{whose} yet: services that use metricsd have them"


# ---------------------------------------------------------------- what is asked for


def _traces(client: OperatorClient, wanted: Wanted, prefix: str) -> list[Trace]:
    whole = bytes.fromhex(prefix) if len(prefix) == 2 * TRACE_SIZE else b""
    by_trace: dict[bytes, list[Span]] = defaultdict(list)
    for span in _spans(client, whole):
        by_trace[span.trace].append(span)
    service = service_id(wanted.service) if wanted.service else None
    found = [
        Trace(each, sorted(spans, key=lambda span: (span.wall, span.number)))
        for each, spans in by_trace.items()
        if each.hex().startswith(prefix)
        if service is None or any(span.service == service for span in spans)
    ]
    found.sort(key=lambda each: each.begun)
    if prefix:
        if len(found) > 1:
            ids = ", ".join(each.trace.hex() for each in found[:3])
            raise UsageError(f"{prefix} is the beginning of several traces: {ids}")
        return found
    return found[len(found) - wanted.last :] if wanted.last < len(found) else found


def _spans(client: OperatorClient, trace: bytes) -> Iterator[Span]:
    """Every span that metricsd keeps, or those of one trace; open ones too, each once."""
    since, count = 0, SPAN_ROWS_MAX
    seen: set[bytes] = set()
    while len(seen) < SPANS_MAX:
        request = GetSpans(since, count, trace, 0, 0, "")
        try:
            page = client.relay(METRICSD, metricsd.PROTOCOL, request, ASK_TIME)
        except Unanswered as error:
            if error.status is not OperatorStatus.TOO_LARGE or count == 1:
                raise
            count = count // 2
            continue
        for span in page.spans:
            if span.span not in seen:
                seen.add(span.span)
                yield span
        if page.next <= since:
            return
        since = page.next


def _records(client: OperatorClient, trace: bytes) -> list[Record]:
    found: list[Record] = []
    since = 1
    wanted = msgspec.structs.replace(EVERY_RECORD, trace=trace)
    while len(found) < RECORDS_MAX:
        request = Query(THIS_BOOT, since, PAGE_MAX, wanted)
        page = client.relay(LOGD, logd.PROTOCOL, request, ASK_TIME)
        found += page.records
        if page.next > page.total or page.next <= since:
            break
        since = page.next
    return found


# ---------------------------------------------------------------- a tree for a person


def forest(spans: Sequence[Span]) -> list[Node]:
    """The spans under those that made them; what nobody here made stands at the top.

    Spans that name each other as their makers, which only a lie can do, are at the top too.
    """
    nodes = {span.span: Node(span) for span in spans}
    roots = []
    for node in nodes.values():
        parent = nodes.get(node.span.parent)
        if parent is None or _is_below(nodes, parent, node):
            roots.append(node)
        else:
            parent.children.append(node)
    return roots


def _is_below(nodes: Mapping[bytes, Node], node: Node, top: Node) -> bool:
    """Whether following the makers of `node` leads to `top`, or in a circle."""
    passed: set[bytes] = set()
    at: Node | None = node
    while at is not None and at.span.span not in passed:
        if at is top:
            return True
        passed.add(at.span.span)
        at = nodes.get(at.span.parent)
    return at is not None


def tree_lines(trace: Trace, names: Names, *, lively: bool) -> list[str]:
    """A line for each span and each log line."""
    services = {span.service for span in trace.spans}
    at = datetime.fromtimestamp(trace.begun / NANOS).astimezone()
    spans = _counted(len(trace.spans), "span")
    clock = f"{at:%Y-%m-%d %H:%M:%S}.{at.microsecond // 1000:03}"
    of = f"{spans} of {_counted(len(services), 'service')}"
    lines = [f"trace {trace.trace.hex()}  {of}, {span_text(trace.lasted)}, {clock}"]
    by_span: dict[bytes, list[Record]] = defaultdict(list)
    own = {span.span for span in trace.spans}
    for record in trace.records:
        by_span[record.span if record.span in own else b""].append(record)
    rows: list[tuple[str, str, str, str, str]] = []
    for root in forest(trace.spans):
        _rows_of(root, names, by_span, trace.begun, rows)
    rows += [_record_row(record, "", names, trace.begun) for record in by_span[b""]]
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(4)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row[:4], widths, strict=True)]
        style = next((s for each, s in STATUS_STYLES.items() if row[3] == status_text(each)), "")
        line = "  ".join([*cells, row[4]]).rstrip()
        lines.append(f"{style}{line}{RESET}" if style and lively else line)
    return lines


def _counted(count: int, thing: str) -> str:
    return f"{count} {thing}{'' if count == 1 else 's'}"


def _rows_of(
    root: Node,
    names: Names,
    records: Mapping[bytes, Sequence[Record]],
    begun: int,
    rows: list[tuple[str, str, str, str, str]],
) -> None:
    """A row for each span below `root`; under it its log lines and what it set off, by time."""
    waiting: list[tuple[Node | Record, str, str]] = [(root, "", "")]
    while waiting:
        thing, lead, below = waiting.pop()
        if isinstance(thing, Record):
            rows.append(_record_row(thing, lead, names, begun))
            continue
        rows.append(_span_row(thing.span, lead, names))
        things: list[tuple[int, Node | Record]] = [
            (each.span.wall, each) for each in thing.children
        ]
        things += [(each.wall, each) for each in records.get(thing.span.span, ())]
        things.sort(key=lambda each: each[0])
        for index, (_, each) in enumerate(reversed(things)):
            branch, deeper = ("├─ ", "│  ") if index else ("└─ ", "   ")
            waiting.append((each, below + branch, below + deeper))


def _span_row(span: Span, lead: str, names: Names) -> tuple[str, str, str, str, str]:
    tail = " ".join(f"{each.key}={_quoted(shown(each.value))}" for each in span.attributes)
    took = span_text(span.end - span.start) if span.end else "open"
    who = f"{_name(span.service, names)}#{span.generation}"
    return (f"{lead}{span.name}", who, took, status_text(span.status), tail)


def _name(service: int, names: Names) -> str:
    return names.get(ServiceId(service)) or f"0x{service:016x}"


def _record_row(
    record: Record, lead: str, names: Names, begun: int
) -> tuple[str, str, str, str, str]:
    who = f"{_name(record.service, names)}#{record.generation}"
    tail = " ".join(f"{each.key}={_quoted(each.value)}" for each in record.fields)
    at = f"+{span_text(max(record.wall - begun, 0))}"
    return (f"{lead}{record.level.name.lower()}: {record.text}", who, at, "log", tail)


def _quoted(value: str) -> str:
    return f'"{value}"' if not value or " " in value or "=" in value else value


def status_text(status: SpanStatus) -> str:
    """A status as people read it."""
    return status.name.lower().replace("_", " ")


def span_text(nanos: int) -> str:
    """A span of time in the unit that leaves few digits before the point."""
    for unit, size in (("s", NANOS), ("ms", 1_000_000), ("us", 1_000)):
        if nanos >= size:
            return f"{nanos / size:.3f} {unit}"
    return f"{nanos} ns"


# ---------------------------------------------------------------- for programs


def _document(trace: Trace, names: Names) -> dict[str, Any]:
    return {
        "trace": trace.trace.hex(),
        "begun_ns": trace.begun,
        "lasted_ns": trace.lasted,
        "spans": [_span_document(span, names) for span in trace.spans],
        "logs": [
            {
                "time_ns": record.wall,
                "span": record.span.hex(),
                "level": record.level.name.lower(),
                "service": _name(record.service, names),
                "generation": record.generation,
                "text": record.text,
                "fields": {each.key: each.value for each in record.fields},
            }
            for record in trace.records
        ],
    }


def _span_document(span: Span, names: Names) -> dict[str, Any]:
    return {
        "span": span.span.hex(),
        "parent": span.parent.hex() if any(span.parent) else None,
        "service": _name(span.service, names),
        "pid": span.pid,
        "generation": span.generation,
        "name": span.name,
        "start_ns": span.wall,
        "duration_ns": span.end - span.start if span.end else None,
        "status": span.status.name.lower(),
        "attributes": {each.key: each.value for each in span.attributes},
    }


def chrome_document(traces: Iterable[Trace], names: Names) -> dict[str, Any]:
    """Spans as complete events, each instance a process, overlapping ones in rows of their own.

    *Source*: "Trace Event Format" (Google, 2016): times are microseconds, and on one thread events
    nest or do not touch.
    """
    kept = list(traces)
    begun = min(each.begun for each in kept)
    spans = sorted((span for each in kept for span in each.spans), key=_longest_first)
    events: list[dict[str, Any]] = []
    rows: dict[int, list[list[int]]] = defaultdict(list)  # by pid: ends that are open, per row
    known: dict[int, tuple[int, int]] = {}
    for span in spans:
        known[span.pid] = (span.service, span.generation)
        events.append(
            {
                "ph": "X",
                "name": span.name,
                "cat": "span",
                "ts": (span.wall - begun) / MICRO,
                "dur": (_ended(span) - span.wall) / MICRO,
                "pid": span.pid,
                "tid": _row(rows[span.pid], span.wall, _ended(span)),
                "args": {
                    "trace": span.trace.hex(),
                    "span": span.span.hex(),
                    "parent": span.parent.hex(),
                    "status": status_text(span.status),
                    **{each.key: each.value for each in span.attributes},
                },
            }
        )
    for each in kept:
        for record in each.records:
            _ = known.setdefault(record.pid, (record.service, record.generation))
            events.append(
                {
                    "ph": "i",
                    "s": "p",
                    "name": record.text or record.level.name.lower(),
                    "cat": "log",
                    "ts": max(record.wall - begun, 0) / MICRO,
                    "pid": record.pid,
                    "tid": 1,
                    "args": {each.key: each.value for each in record.fields},
                }
            )
    heads: list[dict[str, Any]] = []
    for pid, (service, generation) in sorted(known.items()):
        name = _name(service, names)
        shown = f"{name} (instance {generation})"
        heads.append(_named("process_name", pid, 0, shown))
        heads += [
            _named("thread_name", pid, row + 1, name if row == 0 else f"{name} {row + 1}")
            for row in range(max(len(rows[pid]), 1))
        ]
    return {
        "traceEvents": heads + events,
        "displayTimeUnit": "ms",
        "otherData": {"begun_ns_since_1970": str(begun)},
    }


def _named(what: str, pid: int, tid: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": pid, "tid": tid, "args": {"name": name}}


def _longest_first(span: Span) -> tuple[int, int]:
    return (span.wall, -_ended(span))


def _ended(span: Span) -> int:
    """When it ended, ns since 1970; one that is open has no length yet."""
    return span.wall + (span.end - span.start if span.end else 0)


def _row(rows: list[list[int]], begun: int, ended: int) -> int:
    """The first row of a process where the span is inside what is open, or behind all of it."""
    for number, row in enumerate(rows):
        while row and row[-1] <= begun:
            _ = row.pop()
        if not row or ended <= row[-1]:
            row.append(ended)
            return number + 1
    rows.append([ended])
    return len(rows)
