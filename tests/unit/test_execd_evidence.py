"""The evidence of a crash: of that very task alone, the last of it, and what is missing is said."""

from collections.abc import Sequence
from typing import Any

import pytest

from nexus.abi import Nanos, service_id
from nexus.ipc import Refused
from nexus.protocols.execd import LAST_RECORDS_MAX, LAST_SPANS_MAX, LastRecord, ReportExit
from nexus.protocols.logd import Field, LastRecords, Level, Record, Records
from nexus.protocols.metricsd import SPAN_ROWS_MAX, GetSpans, Span, SpanPage, SpanStatus
from nexus.services.execd.evidence import SPAN_LOOKS_MAX, gather
from nexus.wire import ReplyStatus
from tests.unit.test_execd_keeping import run

PUMP = service_id("pump")
UNTIL = Nanos(10**9)
END = ReportExit(
    "pump",
    7,
    2,
    code=1,
    signal=0,
    started=10,
    ended=20,
    digest="d",
    reason="exit",
    action="not started again",
    asked=False,
    again=False,
    lost=0,
)


class Journal:
    """logd with these last records, or none."""

    name = "logd"

    def __init__(self, records: Sequence[Record] | None) -> None:
        self.records = records
        self.why = "TimedOut"

    async def ask(self, request: Any, _until: Nanos) -> Any:
        assert isinstance(request, LastRecords)
        assert (request.service, request.pid, request.generation) == (PUMP, 7, 2)
        if self.records is None:
            return None
        return Records(1, 1, 1, 0, list(self.records))


class Spans:
    """metricsd with these spans, in pages."""

    name = "metricsd"

    def __init__(self, spans: Sequence[Span] | Refused) -> None:
        self.spans = spans
        self.why = "refused, DENIED"
        self.asked = 0

    async def ask(self, request: Any, _until: Nanos) -> Any:
        assert isinstance(request, GetSpans)
        assert (request.service, request.pid) == (PUMP, 7)
        self.asked += 1
        if isinstance(self.spans, Refused):
            return self.spans
        found = [each for each in self.spans if each.number >= request.since]
        rest = found[request.count :]
        return SpanPage(rest[0].number if rest else 0, found[: request.count])


def record(text: str, *fields: tuple[str, str], pid: int = 7, generation: int = 2) -> Record:
    return Record(
        record=1,
        boot=0,
        at=1_000,
        written=400,
        wall=10_000,
        trace=bytes(16),
        span=bytes(8),
        level=Level.INFO,
        service=PUMP,
        pid=pid,
        generation=generation,
        scope="pump",
        text=text,
        fields=[Field(key, value) for key, value in fields],
    )


def span(number: int, *, status: SpanStatus = SpanStatus.OK, generation: int = 2) -> Span:
    return Span(
        number=number,
        trace=b"t" * 16,
        span=b"s" * 8,
        parent=bytes(8),
        service=PUMP,
        pid=7,
        generation=generation,
        name=f"span.{number}",
        start=number,
        end=number + 1,
        wall=1_000 + number,
        status=status,
        attributes=[],
    )


def gathered(journal: Journal, spans: Spans) -> Any:
    return run(gather(journal, spans, END, UNTIL))  # type: ignore[arg-type]


def test_the_last_records_are_shown_with_their_fields_and_when_they_were_written() -> None:
    found = gathered(Journal([record("first"), record("last", ("token", "4711"))]), Spans([]))

    assert found.records[-1] == LastRecord(10_000 - 600, Level.INFO, "last token=4711")
    assert found.last == "last token=4711"
    assert found.missing == []


def test_records_of_another_instance_are_nobodys_evidence() -> None:
    journal = Journal([record("other pid", pid=8), record("former", generation=1), record("own")])

    assert [each.text for each in gathered(journal, Spans([])).records] == ["own"]


def test_no_more_records_than_a_report_takes_and_the_last_ones() -> None:
    journal = Journal([record(str(index)) for index in range(16)])

    found = gathered(journal, Spans([]))

    assert [each.text for each in found.records] == [
        str(16 - LAST_RECORDS_MAX + i) for i in range(8)
    ]


def test_the_parts_of_a_traceback_are_put_together_and_the_error_is_the_last_record() -> None:
    words = [
        record(
            "ValueError: stuck",
            ("event", "exception.v1"),
            ("type", "ValueError"),
            ("place", "pump.py:7 turn"),
            ("traceback", f"part {index}"),
            ("part", f"{index}/2"),
        )
        for index in (1, 2)
    ]

    found = gathered(Journal([record("own"), *words]), Spans([]))

    assert [each.text for each in found.records] == ["own", "ValueError: stuck at pump.py:7 turn"]
    assert found.traceback == "part 1\npart 2"


@pytest.mark.parametrize("count", [0, 1, SPAN_ROWS_MAX, SPAN_ROWS_MAX + 1, 500, 65_536])
@pytest.mark.parametrize("first", [1, 1_000_003])
def test_the_last_spans_are_found_among_however_many(count: int, first: int) -> None:
    spans = Spans([span(first + 3 * index) for index in range(count)])

    found = gathered(Journal([]), spans)

    numbers = [first + 3 * index for index in range(count)][-LAST_SPANS_MAX:]
    assert [each.name for each in found.spans] == [f"span.{number}" for number in numbers]
    assert spans.asked <= SPAN_LOOKS_MAX
    assert found.trace == ((b"t" * 16).hex() if count else "")


def test_spans_that_their_task_did_not_end_come_last_and_have_no_end() -> None:
    found = gathered(
        Journal([]), Spans([span(1, status=SpanStatus.LOST), span(2), span(3, generation=1)])
    )

    assert [(each.name, each.start, each.end) for each in found.spans] == [
        ("span.2", 1_002, 1_003),
        ("span.1", 1_001, 0),
    ]


def test_what_is_missing_is_said_with_the_reason() -> None:
    found = gathered(Journal(None), Spans(Refused(ReplyStatus.DENIED)))

    assert found.missing == ["records: logd, TimedOut", "spans: metricsd, refused, DENIED"]
    assert (found.records, found.spans, found.traceback, found.trace) == ([], [], "", "")
