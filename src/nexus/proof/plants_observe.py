"""Saboteurs of metricsd's rungs, of streams, series and spans: 11, 12, 31, 114, 115, 118-128."""

# ruff: noqa: SLF001 (saboteurs break what is private)

from functools import partial
from typing import Any, Final

import msgspec

from nexus.abi import Nanos, service_id
from nexus.ipc import Client
from nexus.proof.plants_init import missing, withheld
from nexus.proof.sabotage import Saboteur, replace
from nexus.protocols.ladder import SELFTEST, Ground
from nexus.protocols.logd import Field
from nexus.protocols.metricsd import Kind, OpenPage, Span
from nexus.runtime.program import Context
from nexus.services.logd.service import Logd
from nexus.services.logd.streams import Stream, Streams
from nexus.services.metricsd import export
from nexus.services.metricsd.config import Settings
from nexus.services.metricsd.recovery import Recovery
from nexus.services.metricsd.senders import Row
from nexus.services.metricsd.series import Key, Series, Table
from nexus.services.metricsd.service import Metricsd
from nexus.services.metricsd.spans import Begun
from nexus.services.metricsd.store import Job, Store
from nexus.services.selftest import stream_rungs
from nexus.services.selftest.climb import Climb
from nexus.services.selftest.log_rungs import append
from nexus.services.selftest.metric_rungs import SPAN
from nexus.telemetry import WORD_MAX, PageReader

BOTH: Final = frozenset(Ground)
METRICSD: Final = "metricsd"
CLIENT: Final = service_id(SELFTEST)
TIMED: Final = "timed"
CLOSED: Final = 1_500_000_000  # ns that a refused sender's window stays closed: as good as for ever


def _limits_compiled_in() -> None:
    """#31: the limit that no other rung comes near is not the file's."""

    def settings_as(context: Context, kind: type) -> Any:
        found = original(context, kind)
        if not isinstance(found, Settings):
            return found
        default = Settings()
        return msgspec.structs.replace(found, spans_open=default.spans_open)

    original = replace(Context, "settings_as", settings_as)


def _openings_unlimited() -> None:
    """#114."""
    _ = replace(Logd, "_opens_too_fast", lambda _logd, _row, _now: False)


def _overwritten_not_counted() -> None:
    """#115."""

    def account(streams: Streams, stream: Stream, row: Any) -> None:
        stream.unread = stream.reader.overwritten
        original(streams, stream, row)

    original = replace(Streams, "_account", account)


def _probe_by_selftest() -> None:
    """#118: what timed is asked to write, the client writes itself."""

    async def ask(climb: Climb, client: Client, token: str) -> None:
        if client.name == TIMED:
            _ = await climb.call(climb.client("logd"), append("log probe", Field("token", token)))
        else:
            await original(climb, client, token)

    original = replace(stream_rungs, "ask_for_probe", ask)


def _foreign_spans_taken() -> None:
    """#119."""
    _ = replace(Metricsd, "_is_bound", lambda _metricsd, _span, _instance: True)


def _cap_of_seventeen() -> None:
    """#120."""

    def count_of_metric(table: Table, key: Key) -> int:
        count: int = original(table, key)
        return max(0, count - 1)

    original = replace(Table, "count_of_metric", count_of_metric)


def _openings_not_counted() -> None:
    """#121: opening a page uses up nothing, and is never too much."""

    async def take(metricsd: Metricsd, call: Any, request: Any) -> Any:
        metricsd.opens = isinstance(request, OpenPage)  # type: ignore[attr-defined]
        return await original(metricsd, call, request)

    def check_rate(metricsd: Metricsd, call: Any, row: Row) -> None:
        if not metricsd.opens:  # type: ignore[attr-defined]
            original_check(metricsd, call, row)

    original = replace(Metricsd, "_take", take)
    original_check = replace(Metricsd, "_check_rate", check_rate)


def _window_stays_closed() -> None:
    """#122: the client was refused once, and is for so long that it is for ever to that rung."""
    refused: list[Nanos] = []

    def charge(row: Row, now: Nanos, rate_max: int) -> bool:
        if row.service == CLIENT and refused and now - refused[0] < CLOSED:
            return False
        taken: bool = original(row, now, rate_max)
        if row.service == CLIENT and not taken and not refused:
            refused.append(now)
        return taken

    original = replace(Row, "charge", charge)


def _export_lags() -> None:
    """#123: a record says what the series was before its last update."""
    told: dict[int, list[int]] = {}

    def metric_fields(series: Series) -> dict[str, str | int]:
        fields: dict[str, str | int] = original(series)
        if series.key.kind is Kind.COUNTER:
            values = told.setdefault(series.number, [0, 0])
            if values[1] != series.value:
                values[:] = [values[1], series.value]
            fields["value"] = values[0]
        return fields

    original = replace(export, "metric_fields", metric_fields)


def _gauges_unsigned() -> None:
    """#124."""

    def gauge(reader: PageReader, word: int) -> int:
        return min(reader._values[word], WORD_MAX)

    _ = replace(PageReader, "gauge", gauge)


def _groups_taken_as_they_are() -> None:
    """#125."""

    def settle(reader: PageReader) -> bool:
        torn, groups = reader.torn, list(reader._torn)
        _ = original(reader)
        for first in groups:
            reader._accept(first)
        reader.torn, reader._torn = torn, []
        return False

    original = replace(PageReader, "settle", settle)


def _span_ends_at_zero() -> None:
    """#126: the client's span of that rung."""

    def ended(begun: Begun, number: int, end: Nanos, *rest: Any) -> Span:
        span: Span = original(begun, number, end, *rest)
        return msgspec.structs.replace(span, end=0) if begun.name == SPAN else span

    original = replace(Begun, "ended", ended)


def _told_when_sent() -> None:
    """#127: the line follows the send of a segment, whatever comes of that."""

    async def post(store: Store, request: Any, now: Nanos, tag: Any) -> bool:
        sent: bool = await original(store, request, now, tag)
        if sent and isinstance(tag, Job) and tag.slot is not None and not store.is_active:
            store.is_active = True
            store._evidence = {"key": tag.key, "size": len(tag.value), "store_sequence": 0}
        return sent

    original = replace(Store, "_post", post)


def _nothing_read_back() -> None:
    """#128."""

    def on_value(recovery: Recovery, key: str, value: bytes) -> None:
        """Leave it where it is."""

    _ = replace(Recovery, "on_value", on_value)


SABOTEURS: Final = (
    Saboteur(rung=11, grounds=BOTH, plant=partial(missing, METRICSD)),
    Saboteur(rung=12, grounds=BOTH, plant=partial(withheld, METRICSD)),
    Saboteur(rung=31, grounds=BOTH, plant=_limits_compiled_in),
    Saboteur(rung=114, grounds=BOTH, plant=_openings_unlimited),
    Saboteur(rung=115, grounds=BOTH, plant=_overwritten_not_counted),
    Saboteur(rung=118, grounds=BOTH, plant=_probe_by_selftest),
    Saboteur(rung=119, grounds=BOTH, plant=_foreign_spans_taken),
    Saboteur(rung=120, grounds=BOTH, plant=_cap_of_seventeen),
    Saboteur(rung=121, grounds=BOTH, plant=_openings_not_counted),
    Saboteur(rung=122, grounds=BOTH, plant=_window_stays_closed),
    Saboteur(rung=123, grounds=BOTH, plant=_export_lags),
    Saboteur(rung=124, grounds=BOTH, plant=_gauges_unsigned),
    Saboteur(rung=125, grounds=BOTH, plant=_groups_taken_as_they_are),
    Saboteur(rung=126, grounds=BOTH, plant=_span_ends_at_zero),
    Saboteur(rung=127, grounds=BOTH, plant=_told_when_sent),
    Saboteur(rung=128, grounds=BOTH, plant=_nothing_read_back),
)
