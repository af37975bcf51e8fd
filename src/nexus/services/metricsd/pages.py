"""The pages of other tasks as metricsd reads them: values of series, spans that ended or are open.

What is in a page is its writer's word about itself and about nobody else. A counter that is lower
than it was is not believed; a span that somebody else made, or whose name is none, is left out and
counted; of attributes that may not be told none is told.
"""

from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple

from nexus.abi import AbiError, Fence, Nanos, Status
from nexus.protocols.metricsd import (
    KEY_SIZE_MAX,
    LABELS_MAX,
    LABELS_SIZE_MAX,
    VALUE_SIZE_MAX,
    Kind,
    SpanStatus,
)
from nexus.protocols.metricsd_keys import looks_secret
from nexus.services.metricsd import checks
from nexus.services.metricsd.series import Instance, Series
from nexus.services.metricsd.spans import Begun
from nexus.telemetry import PASSES_MAX, WORD_MAX, PageReader, SpanRecord, decode_span

SPANS_PER_TURN: Final = 512  # taken from one page at a time; then it is the next one's turn
ATTRIBUTES_MAX: Final = 2 * LABELS_MAX  # of a span that has ended
ATTRIBUTES_SIZE_MAX: Final = 2 * LABELS_SIZE_MAX  # bytes

Attributes = tuple[tuple[str, str], ...]


class Ended(NamedTuple):
    """A span that has ended in a page."""

    begun: Begun
    end: Nanos
    status: SpanStatus


class Page:
    """The page of one instance, opened at `now`. Raises NoPage (nexus.telemetry) if there is none
    in `view`."""

    def __init__(self, instance: Instance, view: memoryview, now: Nanos) -> None:
        self.instance = instance
        self.reader = PageReader(view)
        self.began = Nanos(min(self.reader.began or now, now))  # nobody began later than now
        self._view = view
        self._strays = 0  # words without a series that were seen and counted
        self._spans_lost = 0  # counted so far
        self._timed_out: set[bytes] = set()  # spans in slots that were closed for their writer
        self.faulty = 0  # spans and attributes that were left out

    def close(self) -> None:
        """Look at it no more; the mapping ends with its last view."""
        del self.reader
        try:
            self._view.release()
        except BufferError:  # a view of it is still referred to, for a moment
            return

    # ------------------------------------------------------------------ values

    def allot(self, kind: Kind, bounds: int) -> int | None:
        """The first word of a new series, or None if the page has no room for it."""
        if kind is Kind.HISTOGRAM:
            return self.reader.allot_group(bounds + 1)
        return self.reader.allot()

    def give_values(self, own: Iterable[Series], now: Nanos) -> None:
        """Tell the series in this page what was read of them last."""
        for series in own:
            if series.word is None:
                continue
            match series.key.kind:
                case Kind.COUNTER:
                    series.set_value(max(series.value, self.reader.counter(series.word)), now)
                case Kind.GAUGE:
                    series.set_value(self.reader.gauge(series.word), now)
                case Kind.HISTOGRAM:
                    group = self.reader.group(series.word)
                    if group.count >= series.count:
                        series.set_group(group.count, group.sum, group.buckets, now)

    def take_strays(self) -> int:
        """How many more words than before are written and belong to no series."""
        seen, self._strays = self._strays, self.reader.stray
        return max(0, self._strays - seen)

    # ------------------------------------------------------------------ spans

    def take_spans(self) -> Iterator[Ended]:
        """The spans that ended since, SPANS_PER_TURN at most."""
        for payload in self.reader.spans.drain(SPANS_PER_TURN):
            record = decode_span(payload)
            begun = None if record is None else self._begun(record)
            if record is None or begun is None or not record.end:
                self.faulty += 1
                continue
            if begun.span in self._timed_out:
                self._timed_out.remove(begun.span)  # it was told already
                continue
            yield Ended(begun, Nanos(min(record.end, WORD_MAX)), _status_of(record.status))

    def take_spans_lost(self) -> int:
        """How many spans more were overwritten, damaged, or too large for the ring."""
        ring = self.reader.spans
        seen, self._spans_lost = self._spans_lost, ring.overwritten + ring.damaged + ring.lost
        return max(0, self._spans_lost - seen)

    def take_faulty(self) -> int:
        """How many spans and attributes more were left out."""
        seen, self.faulty = self.faulty, 0
        return seen

    def open_spans(self) -> list[Begun]:
        """The spans that are open now, but for those that were closed for their writer."""
        found = []
        still: set[bytes] = set()
        for payload in self.reader.open_spans():
            record = decode_span(payload)
            begun = None if record is None else self._begun(record)
            if begun is None:
                continue
            if begun.span in self._timed_out:
                still.add(begun.span)
            else:
                found.append(begun)
        self._closed_in_slots = still
        return found

    def take_overdue(self, start: Nanos) -> list[Begun]:
        """Spans that began before `start` and are open; they count as closed from now on."""
        overdue = [each for each in self.open_spans() if each.start < start]
        self._timed_out = self._closed_in_slots | {each.span for each in overdue}
        return overdue

    def _begun(self, record: SpanRecord) -> Begun | None:
        """The span as its maker may tell it; None if it may not."""
        if (
            not self._is_own(record.span)
            or record.trace == checks.NO_TRACE
            or checks.name_fault(record.name) is not None
        ):
            return None
        return Begun(
            self.instance,
            record.span,
            record.trace,
            record.parent,
            record.name,
            Nanos(min(record.start, WORD_MAX)),
            self._attributes(record.attributes),
        )

    def _attributes(self, told: list[tuple[str, str]]) -> Attributes:
        """Those that may be told: all of them or none."""
        found = dict(told)
        size = sum(len(key.encode()) + len(value.encode()) for key, value in found.items())
        if (
            len(found) > ATTRIBUTES_MAX
            or size > ATTRIBUTES_SIZE_MAX
            or any(
                checks.KEY.match(key) is None
                or looks_secret(key)
                or len(key) > KEY_SIZE_MAX
                or len(value) > VALUE_SIZE_MAX
                for key, value in found.items()
            )
        ):
            self.faulty += 1
            return ()
        return tuple(found.items())

    def _is_own(self, span: bytes) -> bool:
        return checks.is_bound_to(span, self.instance.service)


def _status_of(number: int) -> SpanStatus:
    """How the writer says a span ended; that it timed out or was lost is not its to say."""
    return SpanStatus(number) if number <= SpanStatus.ERROR else SpanStatus.UNSET


async def read_values(pages: Iterable[Page]) -> None:
    """One round over these pages, words and spans; histograms that are being written are read
    again. Two barriers per pass serve all pages."""
    torn = [page.reader for page in pages]
    for reader in torn:
        reader.begin()
    for _ in range(PASSES_MAX):
        torn = await _passed(torn)
    for reader in torn:
        reader.give_up()


async def _passed(readers: list[PageReader]) -> list[PageReader]:
    """One pass over pages; those with histograms that did not stand still."""
    if not readers:
        return []
    for reader in readers:
        reader.mark()
    await _fence()
    for reader in readers:
        reader.copy()
    await _fence()
    return [reader for reader in readers if reader.settle()]


async def _fence() -> None:
    """A barrier on every CPU. Where the kernel has none, CPUs that keep the order of stores do
    without, and `nexus doctor` says so of the others."""
    try:
        await Fence()
    except AbiError as error:
        if error.status is not Status.UNSUPPORTED:
            raise
