"""`nexus metrics`: the series of a running system as metricsd reads them now, and their history."""

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any, Final

from nexus.abi import service_id
from nexus.cli.ask import Asked
from nexus.cli.client import OperatorClient, ServiceRefused, Unanswered
from nexus.cli.errors import CommandFailed, UsageError
from nexus.cli.output import say, say_json, shown
from nexus.protocols.metricsd import (
    PROTOCOL,
    SERIES_ROWS_MAX,
    WINDOW_ROWS_MAX,
    GetHistory,
    GetSeries,
    Kind,
    MetricsdStatus,
    Resolution,
    Series,
    Window,
)
from nexus.protocols.operator import OperatorStatus

METRICSD: Final = "metricsd"
ASK_TIME: Final = 5.0  # seconds for a page
NANOS: Final = 1_000_000_000
QUANTILES: Final = (0.5, 0.9, 0.99)
OWN_NAME: Final = "(metricsd)"  # whose the series of service 0 are
RESOLUTIONS: Final = {each.name.lower(): each for each in Resolution}


def metrics(
    asked: Asked, prefix: str, *, service: str | None, history: str | None, as_json: bool
) -> None:
    """Print the series whose name begins with `prefix`. Raises CommandFailed and UsageError."""
    resolution = None if history is None else RESOLUTIONS.get(history)
    if history is not None and resolution is None:
        raise UsageError(f"--history {history!r}: it is short or long")
    wanted = 0 if service is None else service_id(service)
    with asked.client() as client:
        found = list(_series(client, wanted, prefix))
        windows = (
            {}
            if resolution is None
            else {each.series: list(_windows(client, each, resolution)) for each in found}
        )
    if as_json:
        say_json([_told(asked, each, windows.get(each.series)) for each in found])
        return
    if not found:
        say("no series" + (f" of that name: {prefix}" if prefix else ""))
        return
    rows = [
        (_owner(asked, each), f"{each.name}{_labels(each)}", _value(each), shown(each.unit))
        for each in found
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for row, each in zip(rows, found, strict=True):
        owner, name, value, unit = row
        line = f"{owner:<{widths[0]}}  {name:<{widths[1]}}  {value:>{widths[2]}} {unit}"
        say(f"{line.rstrip()}{'' if each.live else '  (ended)'}")
        for window in windows.get(each.series, ()):
            say(f"    {_window(each, window)}")


def _series(client: OperatorClient, service: int, prefix: str) -> Iterator[Series]:
    """Every series asked for, page by page."""
    since, count = 1, SERIES_ROWS_MAX
    while since:
        request = GetSeries(since, count, service, prefix)
        try:
            page = client.relay(METRICSD, PROTOCOL, request, ASK_TIME)
        except Unanswered as error:
            if error.status is not OperatorStatus.TOO_LARGE or count == 1:
                raise
            count //= 2
            continue
        yield from page.series
        since = page.next


def _windows(client: OperatorClient, series: Series, resolution: Resolution) -> Iterator[Window]:
    """Every window that is kept of one series, oldest first."""
    since = 0
    while True:
        request = GetHistory(
            series.service, series.name, series.labels, resolution, since, WINDOW_ROWS_MAX
        )
        try:
            page = client.relay(METRICSD, PROTOCOL, request, ASK_TIME)
        except ServiceRefused as error:
            if error.status is MetricsdStatus.NOT_FOUND:
                return  # it has not changed since it is there
            raise CommandFailed(f"metricsd refuses the history: {error.status.name}") from error
        yield from page.windows
        since = page.next
        if not since:
            return


def quantile(bounds: Sequence[int], buckets: Sequence[int], share: float) -> float | None:
    """The value below which that share of all lies, taken as spread evenly inside its bucket, as
    Prometheus' histogram_quantile does; the last bound if it is beyond; None without any."""
    count = sum(buckets)
    if not count or not bounds:
        return None
    rank = share * count
    below = 0
    for index, here in enumerate(buckets[: len(bounds)]):
        if here and below + here >= rank:
            low = bounds[index - 1] if index else 0
            return low + (bounds[index] - low) * (rank - below) / here
        below += here
    return float(bounds[-1])


def _value(series: Series) -> str:
    if series.kind is not Kind.HISTOGRAM:
        return str(series.value)
    told = [f"count={series.count}", f"sum={series.sum}"]
    for share in QUANTILES:
        value = quantile(series.bounds, series.buckets, share)
        if value is not None:
            told.append(f"p{share * 100:g}~{value:.0f}")
    return " ".join(told)


def _window(series: Series, window: Window) -> str:
    start = datetime.fromtimestamp(window.start / NANOS, UTC).astimezone()
    when = f"{start:%Y-%m-%d %H:%M:%S} boot {window.boot}"
    match series.kind:
        case Kind.COUNTER:
            return f"{when}  +{window.sum} = {window.last}"
        case Kind.GAUGE:
            mean = window.sum / window.count if window.count else 0
            return f"{when}  {window.min} .. {window.max}, mean {mean:g}, last {window.last}"
        case Kind.HISTOGRAM:
            middle = quantile(series.bounds, window.buckets, 0.5)
            rest = "" if middle is None else f" p50~{middle:.0f}"
            return f"{when}  count={window.count} sum={window.sum}{rest}"


def _owner(asked: Asked, series: Series) -> str:
    if series.service == 0:
        return OWN_NAME
    return asked.names.get(series.service) or f"0x{series.service:016x}"  # type: ignore[call-overload]


def _labels(series: Series) -> str:
    if not series.labels:
        return ""
    told = ",".join(f'{each.key}="{shown(each.value)}"' for each in series.labels)
    return f"{{{told}}}"


def _told(asked: Asked, series: Series, windows: list[Window] | None) -> dict[str, Any]:
    """A series as JSON."""
    found: dict[str, Any] = {
        "series": series.series,
        "service": _owner(asked, series),
        "generation": series.generation,
        "kind": series.kind.name.lower(),
        "name": series.name,
        "labels": {each.key: each.value for each in series.labels},
        "unit": series.unit,
        "live": series.live,
    }
    if series.kind is Kind.HISTOGRAM:
        found |= {
            "count": series.count,
            "sum": series.sum,
            "bounds": series.bounds,
            "buckets": series.buckets,
            "quantiles": {
                f"{share:g}": quantile(series.bounds, series.buckets, share) for share in QUANTILES
            },
        }
    else:
        found["value"] = series.value
    if windows is not None:
        found["history"] = [
            {
                "start_ns": each.start,
                "boot": each.boot,
                "count": each.count,
                "sum": each.sum,
                "min": each.min,
                "max": each.max,
                "last": each.last,
                **({"buckets": each.buckets} if each.buckets else {}),
            }
            for each in windows
        ]
    return found
