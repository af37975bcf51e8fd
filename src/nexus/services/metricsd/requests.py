"""What services are asked: counted by the spans that their runtime records of each request.

    span of a page ended --named PROTOCOL.Request, not of telling the journal--> counted
    spans of a page lost ------------------------------------------------------> counted as unread

So a service that declares no metric has some. They are its own series and count against no cap;
there are as many services as pages, and of those that ended the table keeps GONE_MAX series.
"""

import re
from typing import Final

from nexus.abi import Nanos
from nexus.protocols.metricsd import Kind, SpanStatus
from nexus.services.metricsd.checks import MAKER_SIZE
from nexus.services.metricsd.export import UNTOLD_MAKERS
from nexus.services.metricsd.series import Instance, Key, Table
from nexus.services.metricsd.spans import Begun

REQUESTS_NAME: Final = "nexus_requests_total"
ERRORS_NAME: Final = "nexus_request_errors_total"
UNREAD_NAME: Final = "nexus_spans_unread_total"
NAMES: Final = frozenset((REQUESTS_NAME, ERRORS_NAME, UNREAD_NAME))
"""Names that are metricsd's to count; a service that wants one of them is refused."""

REQUEST: Final = re.compile(r"[^A-Z]*\.[A-Z][^.]*")
"""What the runtime calls a request's span; a span of a service's own has no word in capitals."""
FAILED: Final = frozenset((SpanStatus.ERROR, SpanStatus.TIMED_OUT, SpanStatus.LOST))


class Requests:
    """Counts them as series in `table`, which appear with their first."""

    def __init__(self, table: Table) -> None:
        self._table = table

    def on_ended(self, begun: Begun, status: SpanStatus, now: Nanos, page_began: Nanos) -> None:
        """A span of a page has ended. What logd and metricsd ask is left out: it comes of telling
        what others did, and a device at rest would look busy. A span may say that it began before
        its page; the series does not."""
        if REQUEST.fullmatch(begun.name) is None or begun.parent[:MAKER_SIZE] in UNTOLD_MAKERS:
            return
        since = max(begun.start, page_began)
        self._count(REQUESTS_NAME, begun.instance, 1, now, since)
        self._count(ERRORS_NAME, begun.instance, int(status in FAILED), now, since)

    def on_unread(self, instance: Instance, count: int, now: Nanos) -> None:
        """So many spans more of a page were overwritten before they were read."""
        if count:
            self._count(UNREAD_NAME, instance, count, now, now)

    def _count(self, name: str, instance: Instance, more: int, now: Nanos, since: Nanos) -> None:
        key = Key(instance.service, Kind.COUNTER, name, ())
        series = self._table.passing(key, instance, since)
        if series is not None:
            series.set_value(series.value + more, now)
