"""Spans as a tree, and as a file in the Trace Event Format."""

from typing import Any, Final

import pytest

from nexus.abi import service_id
from nexus.cli.trace import Trace, chrome_document, forest, span_text, tree_lines
from nexus.protocols.logd import Field, Level, Record
from nexus.protocols.metricsd import Label, Span, SpanStatus
from tests.fakes.traceevents import check_trace_events

TRACE: Final = bytes(range(16))
BEGUN: Final = 1_767_225_600_000_000_000
NAMES: Final = {service_id(name): name for name in ("rngd", "policyd")}
ELSEWHERE: Final = b"outside!"


def span(number: int, name: str, start: int, took: int, parent: int = 0, **changes: Any) -> Span:
    service = name.partition(".")[0]
    values: dict[str, Any] = {
        "number": number,
        "trace": TRACE,
        "span": number.to_bytes(8, "big"),
        "parent": parent.to_bytes(8, "big") if parent else ELSEWHERE,
        "service": int(service_id(service)),
        "pid": 100 + len(service),
        "generation": 1,
        "name": name,
        "start": 5_000 + start,
        "end": 5_000 + start + took if took else 0,
        "wall": BEGUN + start,
        "status": SpanStatus.OK,
        "attributes": [],
    }
    return Span(**(values | changes))


def record(at: int, text: str, under: int) -> Record:
    return Record(
        record=1,
        boot=1,
        at=at,
        written=at,
        wall=BEGUN + at,
        trace=TRACE,
        span=under.to_bytes(8, "big"),
        level=Level.WARN,
        service=int(service_id("rngd")),
        pid=104,
        generation=1,
        scope="rngd",
        text=text,
        fields=[Field("size", "8")],
    )


SPANS: Final = [
    span(1, "rngd.GetEntropy", 0, 2_500_000),
    span(2, "policyd.CheckFor", 400_000, 300_000, 1, attributes=[Label("right", "rng entropy")]),
    span(3, "rngd.GetEntropy", 9_000_000, 700, generation=2, pid=200, status=SpanStatus.ERROR),
]


def test_a_span_stands_under_the_one_that_made_it_and_generations_are_told_apart() -> None:
    trace = Trace(TRACE, SPANS, [record(200_000, "slow", 1)])

    lines = tree_lines(trace, NAMES, lively=False)

    assert lines[0].startswith(f"trace {TRACE.hex()}  3 spans of 2 services, 9.001 ms, ")
    assert [line.split() for line in lines[1:]] == [
        ["rngd.GetEntropy", "rngd#1", "2.500", "ms", "ok"],
        ["├─", "warn:", "slow", "rngd#1", "+200.000", "us", "log", "size=8"],
        ["└─", "policyd.CheckFor", "policyd#1", "300.000", "us", "ok", 'right="rng', 'entropy"'],
        ["rngd.GetEntropy", "rngd#2", "700", "ns", "error"],
    ]


def test_spans_that_name_each_other_as_makers_are_shown_and_end() -> None:
    liars = [span(1, "rngd.A", 0, 10, 2), span(2, "rngd.B", 1, 10, 1), span(3, "rngd.C", 2, 10, 3)]

    roots = forest(liars)

    shown = []
    while roots:
        node = roots.pop()
        shown.append(node.span.number)
        roots += node.children
    assert sorted(shown) == [1, 2, 3]


def test_a_chain_of_spans_longer_than_any_stack_is_shown() -> None:
    chain = [span(number, "rngd.A", number, 10, number - 1) for number in range(1, 3_000)]

    lines = tree_lines(Trace(TRACE, chain), NAMES, lively=False)

    assert len(lines) == len(chain) + 1


def test_the_file_for_perfetto_keeps_to_the_format() -> None:
    crossing = span(4, "rngd.GetEntropy", 1_000_000, 2_000_000)  # neither inside nor behind
    trace = Trace(TRACE, [*SPANS, crossing], [record(200_000, "slow", 1)])

    document = chrome_document([trace], NAMES)

    check_trace_events(document)
    events = {
        event["args"]["span"]: event for event in document["traceEvents"] if event["ph"] == "X"
    }
    first, check = events[f"{1:016x}"], events[f"{2:016x}"]
    assert (first["ts"], first["dur"], first["tid"]) == (0.0, 2_500.0, 1)
    assert (check["ts"], check["dur"]) == (400.0, 300.0)
    assert check["args"]["right"] == "rng entropy"
    assert events[f"{4:016x}"]["tid"] == 2
    names = {
        event["args"]["name"]: event["pid"]
        for event in document["traceEvents"]
        if event["name"] == "process_name"
    }
    assert set(names) == {"rngd (instance 1)", "rngd (instance 2)", "policyd (instance 1)"}


def test_the_check_of_the_format_finds_what_is_wrong() -> None:
    document = chrome_document([Trace(TRACE, SPANS)], NAMES)
    complete = next(each for each in document["traceEvents"] if each["ph"] == "X")

    for key, value in (("pid", "104"), ("ts", -1), ("dur", -5), ("ph", "Q"), ("name", "")):
        original = complete[key]
        complete[key] = value
        with pytest.raises(AssertionError):
            check_trace_events(document)
        complete[key] = original
    check_trace_events(document)


@pytest.mark.parametrize(
    ("nanos", "text"),
    [(0, "0 ns"), (999, "999 ns"), (1_500, "1.500 us"), (2_000_000_000, "2.000 s")],
)
def test_a_span_of_time_has_the_unit_that_fits(nanos: int, text: str) -> None:
    assert span_text(nanos) == text


def test_an_attribute_ends_no_line_and_moves_no_cursor() -> None:
    told = span(1, "rngd.A", 0, 10, attributes=[Label("why", "x\x1b[2J\ntrace \u202e")])

    lines = tree_lines(Trace(TRACE, [told], []), NAMES, lively=False)

    assert lines[1].endswith('why="x\\x1b[2J\\ntrace \\u202e"')
    assert all(line.isprintable() for line in lines)
