"""The evidence of a crash: the last records and spans of that very task, and its last words.

Asked for by the task's id, pid and generation, so that nothing of another instance, nor of another
service, can be taken for its own. Whatever is missing is said, and why.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from nexus.abi import Nanos, service_id
from nexus.log.lastwords import EVENT_KEY, PART_KEY, PLACE_KEY, TRACE_KEY, is_last_word
from nexus.protocols.execd import (
    LAST_RECORDS_MAX,
    LAST_SPANS_MAX,
    TEXT_SIZE_MAX,
    TRACEBACK_SIZE_MAX,
    LastRecord,
    LastSpan,
    ReportExit,
)
from nexus.protocols.logd import PAGE_MAX, LastRecords, Record, Records
from nexus.protocols.metricsd import SPAN_ROWS_MAX, GetSpans, Span, SpanPage, SpanStatus
from nexus.services.execd.asked import Asked

SPAN_LOOKS_MAX: Final = 64  # questions for the last page; half of them find a number of 32 bits
HIDDEN: Final = frozenset({EVENT_KEY, PART_KEY})  # fields of a last word that say nothing to people


@dataclass(slots=True)
class Evidence:
    """What is known of a task that is gone."""

    records: list[LastRecord] = field(default_factory=list)
    spans: list[LastSpan] = field(default_factory=list)
    traceback: str = ""
    trace: str = ""
    missing: list[str] = field(default_factory=list)

    @property
    def last(self) -> str:
        """The last thing it wrote."""
        return self.records[-1].text if self.records else ""


async def gather(logd: Asked, metricsd: Asked, end: ReportExit, until: Nanos) -> Evidence:
    """Everything that can be had about this task."""
    found = Evidence()
    await _take_records(found, logd, end, until)
    await _take_spans(found, metricsd, end, until)
    return found


async def _take_records(found: Evidence, logd: Asked, end: ReportExit, until: Nanos) -> None:
    request = LastRecords(service_id(end.name), end.pid, end.generation, PAGE_MAX)
    page = await logd.ask(request, until)
    if not isinstance(page, Records):
        found.missing.append(f"records: {logd.name}, {logd.why}")
        return
    own = [record for record in page.records if _is_of(record, end)]
    found.records = [_shown(record) for record in own if not is_last_word(record.fields)]
    found.records += _ending(own)
    found.records = found.records[-LAST_RECORDS_MAX:]
    found.traceback = _traceback(own)
    found.trace = next((each.trace.hex() for each in reversed(own) if any(each.trace)), "")


def _is_of(record: Record, end: ReportExit) -> bool:
    """Whether the kernel stamped this task on what brought the record."""
    who = (record.service, record.pid, record.generation)
    return who == (service_id(end.name), end.pid, end.generation)


def _shown(record: Record) -> LastRecord:
    fields = "".join(
        f" {each.key}={each.value}" for each in record.fields if each.key not in HIDDEN
    )
    return LastRecord(_written(record), record.level, f"{record.text}{fields}"[:TEXT_SIZE_MAX])


def _written(record: Record) -> int:
    """When it was written, in ns since 1970: logd may have found it much later."""
    late = record.at - record.written if 0 < record.written <= record.at else 0
    return max(0, record.wall - late)


def _ending(own: Sequence[Record]) -> list[LastRecord]:
    """The exception that ended it, as its last record."""
    words = [record for record in own if is_last_word(record.fields)]
    if not words:
        return []
    fields = {each.key: each.value for each in words[-1].fields}
    text = f"{words[-1].text} at {fields.get(PLACE_KEY, '')}"
    return [LastRecord(_written(words[-1]), words[-1].level, text[:TEXT_SIZE_MAX])]


def _traceback(own: Sequence[Record]) -> str:
    """The parts of the traceback, put together; the innermost frames if it is too long."""
    parts = [
        each.value
        for record in own
        if is_last_word(record.fields)
        for each in record.fields
        if each.key == TRACE_KEY
    ]
    return "\n".join(parts)[-TRACEBACK_SIZE_MAX:]


async def _take_spans(found: Evidence, metricsd: Asked, end: ReportExit, until: Nanos) -> None:
    """The spans that were open, and the last that ended."""
    spans = await _last_spans(metricsd, end, until)
    if spans is None:
        found.missing.append(f"spans: {metricsd.name}, {metricsd.why}")
        return
    kept = _latest([each for each in spans if each.generation == end.generation])
    found.spans = [_span(each) for each in kept]
    if not found.trace:
        found.trace = next((each.trace.hex() for each in reversed(kept) if any(each.trace)), "")


async def _last_spans(metricsd: Asked, end: ReportExit, until: Nanos) -> list[Span] | None:
    """The last page of the task's spans. No more are coming, so it is found by halving: behind
    `low` there is more than a page, from `top` on there is no more than one."""
    low, look, step = -1, 0, SPAN_ROWS_MAX
    top: int | None = None
    last: list[Span] | None = None
    for _ in range(SPAN_LOOKS_MAX):
        request = GetSpans(look, SPAN_ROWS_MAX, b"", service_id(end.name), end.pid, "")
        page = await metricsd.ask(request, until)
        if not isinstance(page, SpanPage):
            return last
        if page.next:
            low = look
        else:
            top, last = look, page.spans
        if top is None:
            look, step = look + step, 2 * step
        elif low + 1 < top:
            look = (low + top) // 2
        else:
            break
    return last


def _latest(spans: Sequence[Span]) -> list[Span]:
    """The last that ended and then those that were open, as many as a report takes."""
    order = sorted(spans, key=lambda each: (_was_open(each), each.end or each.start))
    return order[-LAST_SPANS_MAX:]


def _was_open(span: Span) -> bool:
    """Whether its task ended before it did."""
    return not span.end or span.status is SpanStatus.LOST


def _span(span: Span) -> LastSpan:
    return LastSpan(
        span.name, span.wall, 0 if _was_open(span) else span.wall + span.end - span.start
    )
