"""What metricsd knows, page by page: series as they are now, and the spans since the last time."""

from typing import Final, TypeVar

from nexus.abi import Nanos, Now
from nexus.ipc import CallFailure, Client, Refused, Stale, TimedOut, deadline_after
from nexus.protocols.metricsd import (
    PROTOCOL as METRICSD,
)
from nexus.protocols.metricsd import (
    SERIES_ROWS_MAX,
    SPAN_ROWS_MAX,
    GetSeries,
    GetSpans,
    Series,
    SeriesPage,
    Span,
    SpanPage,
)
from nexus.runtime.program import Context, Unreachable
from nexus.wire import Request

ReplyT = TypeVar("ReplyT")

METRICSD_NAME: Final = "metricsd"
SILENCE: Final = Nanos(1_000_000_000)  # ns without questions after one in vain: probes wait behind
SPANS_MAX: Final = 512  # of one export; the next one goes on where it ended


class NoReading(Exception):
    """metricsd gave none; the text says why."""


async def _told(
    client: Client, request: Request[ReplyT], until: Nanos
) -> ReplyT | Refused | CallFailure:
    """metricsd's answer. After Stale nothing was sent, and there is a way to its next instance."""
    outcome = await client.call(request, until)
    return await client.call(request, until) if isinstance(outcome, Stale) else outcome


class Readings:
    """exportd's questions to metricsd. Each has a deadline."""

    def __init__(self, context: Context, series_max: int) -> None:
        self._context = context
        self._series_max = series_max
        self._silent_until = Nanos(0)
        self._since = 0  # spans with lower numbers were seen
        self._generation = 0  # of the metricsd that counts them

    async def series(self, until: Nanos) -> list[Series]:
        """Every series. Raises NoReading."""
        client = await self._metricsd(until)
        rows: list[Series] = []
        since = 0
        while True:  # each round asks for later series, and for SERIES_MAX of them at most
            page = await _told(client, GetSeries(since, SERIES_ROWS_MAX, 0, ""), until)
            if not isinstance(page, SeriesPage):
                raise await self._none(page)
            rows += page.series
            if len(rows) > self._series_max:
                raise NoReading(f"more than {self._series_max} series")
            if page.next <= since:
                return rows
            since = page.next

    async def spans(self, until: Nanos) -> list[Span]:
        """The spans that have ended since the last time, as many as metricsd tells in time: what
        it has told is not asked for again. Raises NoReading if it tells none."""
        client = await self._metricsd(until)
        generation = client.peer.generation
        if generation != self._generation:
            self._generation, self._since = generation, 0
        found: list[Span] = []
        since = self._since
        while len(found) < SPANS_MAX:
            asked = GetSpans(since, SPAN_ROWS_MAX, b"", 0, 0, "")
            page = await _told(client, asked, until)
            if not isinstance(page, SpanPage):
                fault = await self._none(page)
                if found:
                    return found
                raise fault
            ended = [span for span in page.spans if span.end]
            found += ended
            self._since = max([self._since, *(span.number + 1 for span in ended)])
            if page.next <= since:
                break
            since = page.next
        return found

    async def _none(self, outcome: Refused | CallFailure) -> NoReading:
        """Why there is no page; a silent metricsd is left alone for a while."""
        if isinstance(outcome, TimedOut):
            self._silent_until = deadline_after(await Now(), SILENCE)
        what = outcome.status.name if isinstance(outcome, Refused) else type(outcome).__name__
        return NoReading(f"{METRICSD_NAME}: {what}")

    async def _metricsd(self, until: Nanos) -> Client:
        if await Now() < self._silent_until:
            raise NoReading(f"{METRICSD_NAME}: it has just not answered")
        try:
            return await self._context.client(METRICSD_NAME, METRICSD, until)
        except Unreachable as fault:
            raise NoReading(str(fault)) from fault
