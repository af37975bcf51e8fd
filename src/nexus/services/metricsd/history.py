"""The history of every series, in windows: in memory, and on disk where there is a store."""

from collections.abc import Callable
from typing import Final

from nexus.abi import Nanos, ServiceId
from nexus.protocols.metricsd import GetHistory, Kind, Resolution, Window, WindowPage
from nexus.services.metricsd.config import Settings
from nexus.services.metricsd.rollup import Rollups
from nexus.services.metricsd.series import GONE_MAX, OWN_MAX, Key, Series, sorted_labels
from nexus.services.metricsd.store import Connect, Say, Store
from nexus.wire import encode

KINDS: Final = tuple(Kind)
GENERATION_BITS: Final = 32
BOOT_SIZE: Final = 8  # bytes of the number of a boot


class History:
    """Rolls readings up, keeps them, and tells them. Without `connect` nothing outlives it."""

    def __init__(
        self,
        settings: Settings,
        *,
        boot: int = 0,
        boot_id: bytes = b"",
        connect: Connect | None = None,
        log: Say | None = None,
        generation: int = 1,
    ) -> None:
        self._settings = settings
        self._generation = generation
        self._rollups = Rollups(
            settings.short_ns,
            settings.long_ns,
            settings.windows,
            boot,
            boot.to_bytes(BOOT_SIZE, "big") + boot_id,  # a machine without entropy repeats ids
        )
        self._rollups.entries_max = entries_max(settings)
        self._store: Store | None = None
        if connect is not None and log is not None and settings.retention:
            self._store = Store(settings, self._rollups, connect, log, generation=generation)

    def remember(self, is_known: Callable[[Key], bool]) -> None:
        """What a series said is not forgotten as long as it is known so."""
        self._rollups.is_known = is_known

    def start(self, now: Nanos, offset: int) -> None:
        """The clocks are known: without a store windows begin, with one when it was read."""
        self._rollups.offset = offset
        if self._store is None:
            self._rollups.begin(now)

    def configure(self, settings: Settings) -> None:
        """Use these from now on. Whether there is a store at all is for the next start."""
        self._settings = settings
        self._rollups.entries_max = entries_max(settings)
        for resolution, closed in self._rollups.configure(
            settings.short_ns, settings.long_ns, settings.windows
        ):
            if self._store is not None:
                self._store.on_closed(resolution, closed)
        if self._store is not None:
            self._store.configure(settings)

    def on_reading(self, series: Series) -> None:
        """What a series says now; one that passes is not kept."""
        if series.passing:
            return
        life = series.instance.generation
        if not series.paged:  # its value is kept here, and begins anew with us
            life |= self._generation << GENERATION_BITS
        self._rollups.on_reading(series.key, life, series.state, series.bounds, live=series.live)

    def next_time(self) -> Nanos | None:
        """When a window is over, or the store has something to do."""
        due = self._rollups.next_time()
        if self._store is None:
            return due
        wanted = self._store.next_time()
        return wanted if due is None else min(due, wanted)

    def is_window_over(self, now: Nanos) -> bool:
        """Whether a window ends: what was stored until now belongs to it."""
        due = self._rollups.next_time()
        return due is not None and now >= due

    async def on_time(self, now: Nanos) -> None:
        """Close windows that are over, drop those that are too old, write what is due."""
        store = self._store
        for resolution, closed in self._rollups.on_time(now):
            if store is not None:
                store.on_closed(resolution, closed)
        for resolution in Resolution:
            for closed in self._rollups.expired(resolution):
                if store is not None:
                    store.on_expired(resolution, closed)
        if store is not None and (now >= store.next_time() or store.is_first_due):
            await store.on_time(now)
            await store.tell()

    def page(self, request: GetHistory, size_max: int) -> WindowPage | None:
        """The windows asked for; None if no such series is known."""
        labels = sorted_labels(request.labels)
        rows: list[Window] = []
        size = 0
        for kind in KINDS:
            key = Key(ServiceId(request.service), kind, request.name, labels)
            if not self._rollups.knows(key):
                continue
            for window in self._rollups.windows(key, request.resolution, request.since):
                size += len(encode(window))
                if size > size_max or len(rows) >= request.count:
                    return WindowPage(window.start, rows)
                rows.append(window)
            return WindowPage(0, rows)
        return None

    def losses(self) -> list[tuple[str, int]]:
        """What was lost, as counters of metricsd's own."""
        store = self._store
        found = [("nexus_history_readings_refused_total", self._rollups.refused)]
        if store is not None:
            found += [
                ("nexus_retention_writes_refused_total", store.refused),
                ("nexus_retention_failed_total", store.failed),
                ("nexus_retention_windows_dropped_total", store.dropped),
                ("nexus_retention_records_lost_total", store.recovered.lost),
            ]
        return found

    def counts(self) -> dict[str, int]:
        """As Stats tells it."""
        closed = self._rollups.closed
        store = self._store
        return {
            "segments": 0 if store is None else store.segments,
            "segments_max": self._settings.segments,
            "windows_short": len(closed[Resolution.SHORT]),
            "windows_long": len(closed[Resolution.LONG]),
            "windows_max": self._settings.windows,
            "written_today": 0 if store is None else store.written_today,
            "written_max": self._settings.bytes_max,
            "write_refused": 0 if store is None else store.refused,
            "recovered": 0 if store is None else store.recovered.records,
            "recovery_lost": 0 if store is None else store.recovered.lost,
        }


def entries_max(settings: Settings) -> int:
    """Series that one window may have: all that live, those that ended in it, and our own."""
    return settings.series + GONE_MAX + OWN_MAX
