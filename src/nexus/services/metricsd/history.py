"""The history of every series, in windows: in memory, and on disk where there is a store."""

from typing import Final

from nexus.abi import Nanos
from nexus.protocols.metricsd import GetHistory, Kind, Resolution, Window, WindowPage
from nexus.services.metricsd.config import Settings
from nexus.services.metricsd.rollup import Rollups
from nexus.services.metricsd.series import Key, Series, sorted_labels
from nexus.wire import encode

KINDS: Final = tuple(Kind)


class History:
    """Rolls readings up and tells them."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._rollups = Rollups(settings.short_ns, settings.long_ns, settings.windows)

    async def start(self, now: Nanos, offset: int) -> None:
        """Begin."""
        self._rollups.begin(now, offset, 0, b"")

    def configure(self, settings: Settings) -> None:
        """Use these from now on."""
        self._settings = settings
        _ = self._rollups.configure(settings.short_ns, settings.long_ns, settings.windows)

    def on_reading(self, series: Series, now: Nanos) -> None:
        """What a series says now."""
        del now
        self._rollups.on_reading(
            series.key, series.instance.generation, series.state, series.bounds, live=series.live
        )

    def next_time(self) -> Nanos | None:
        """When a window is over."""
        return self._rollups.next_time()

    async def on_time(self, now: Nanos) -> None:
        """Close windows."""
        _ = self._rollups.on_time(now)
        for resolution in Resolution:
            _ = self._rollups.expired(resolution)

    def page(self, request: GetHistory, size_max: int) -> WindowPage | None:
        """The windows asked for; None if no such series is known."""
        labels = sorted_labels(request.labels)
        rows: list[Window] = []
        size = 0
        known = False
        for kind in KINDS:
            key = Key(request.service, kind, request.name, labels)  # type: ignore[arg-type]
            if not self._rollups.knows(key):
                continue
            known = True
            for window in self._rollups.windows(key, request.resolution, request.since):
                size += len(encode(window))
                if size > size_max or len(rows) >= request.count:
                    return WindowPage(window.start, rows)
                rows.append(window)
            break
        return WindowPage(0, rows) if known else None

    def losses(self) -> list[tuple[str, int]]:
        """What was lost, as counters of metricsd's own."""
        return []

    def counts(self) -> dict[str, int]:
        """As Stats tells it."""
        closed = self._rollups.closed
        return {
            "segments": 0,
            "segments_max": self._settings.segments,
            "windows_short": len(closed[Resolution.SHORT]),
            "windows_long": len(closed[Resolution.LONG]),
            "windows_max": self._settings.windows,
            "written_today": 0,
            "written_max": self._settings.bytes_max,
            "write_refused": 0,
            "recovered": 0,
            "recovery_lost": 0,
        }
