"""The crash reports: numbered, bounded, kept in statefsd, the oldest give way.

    made --written durably--> kept --COUNT or size exceeded--> gave way, counted
         --statefsd is away--> in memory alone, written again after a pause that doubles

Numbers grow over all boots. Where the kept reports could not be read, those of this boot begin
above what any earlier boot can have used, so that no number is used twice.
"""

from collections import OrderedDict
from collections.abc import Iterable
from typing import Final

from nexus.abi import Nanos
from nexus.protocols.execd import REPORT_SIZE_MAX, Report
from nexus.protocols.statefsd import (
    LIST_MAX,
    Batch,
    Change,
    Changes,
    Durability,
    Get,
    Keys,
    ListKeys,
    Stored,
    Value,
)
from nexus.services.execd.asked import Asked
from nexus.services.execd.config import COUNT_MAX, Settings
from nexus.wire import RemoteProtocolError, encode, strict_decoder

FOLDER: Final = b"/state/observability/crash/"
FORMAT: Final = b"\x01"  # of a kept report: before its encoding
DIGITS: Final = 12  # of a number in a key, so that keys are in the order of numbers
PAGES_MAX: Final = COUNT_MAX // LIST_MAX + 2  # of keys that are read at the start
BOOT_NUMBERS: Final = 1000  # a boot's numbers if the kept ones cannot be read
AGAIN: Final = Nanos(1_000_000_000)  # ns until statefsd is tried again, doubling
AGAIN_MAX: Final = Nanos(60_000_000_000)  # ns
NEXT: Final = Nanos(
    1_000_000
)  # ns until the next of several is written; others are served meanwhile

_decode: Final = strict_decoder(Report)


class Keeping:
    """Every report there is."""

    def __init__(self, statefsd: Asked, settings: Settings, boot: int) -> None:
        self._statefsd = statefsd
        self._count_max = settings.reports
        self._size_max = settings.reports_size
        self._boot = boot
        self._reports: OrderedDict[int, Report] = OrderedDict()
        self._sizes: dict[int, int] = {}
        self._unsaved: dict[int, None] = {}  # numbers in order: to be written
        self._dropped: dict[int, None] = {}  # to be deleted
        self._again: Nanos | None = None
        self._pause = AGAIN
        self._next = 1
        self.gave_way = 0
        self.damaged = 0
        self.unread = 0  # left where they are, for the next start

    @property
    def unsaved(self) -> int:
        """Reports that are in memory alone."""
        return len(self._unsaved)

    def __len__(self) -> int:
        return len(self._reports)

    async def load(self, until: Nanos) -> None:
        """Read what was kept by earlier boots and instances."""
        numbers = await self._numbers(until)
        if numbers is None:
            self._next = self._boot * BOOT_NUMBERS + 1
            return
        for number in numbers:
            await self._read(number, until)
        self._next = max(numbers, default=0) + 1
        self._make_room()

    async def _numbers(self, until: Nanos) -> list[int] | None:
        """The numbers of the kept reports; None if they cannot be read."""
        numbers: list[int] = []
        after = b""
        for _ in range(PAGES_MAX):
            page = await self._statefsd.ask(ListKeys(FOLDER, after, LIST_MAX), until)
            if not isinstance(page, Keys):
                return None
            numbers += [number for key in page.keys if (number := _number_of(key)) is not None]
            if not page.more or not page.keys:
                break
            after = page.keys[-1]
        return sorted(numbers)

    async def _read(self, number: int, until: Nanos) -> None:
        value = await self._statefsd.ask(Get(_key(number)), until)
        if value is None:  # statefsd has gone, or is slow: the report may be as good as any
            self.unread += 1
            return
        report = _report(value.value) if isinstance(value, Value) else None
        if report is None or report.crash.report != number:
            self.damaged += 1
            self._dropped[number] = None
            return
        self._take(number, report)

    def _take(self, number: int, report: Report) -> None:
        self._reports[number] = report
        self._sizes[number] = len(_value(report))

    def number(self) -> int:
        """The number of the next report."""
        number = self._next
        self._next += 1
        return number

    async def keep(self, report: Report, now: Nanos, until: Nanos) -> bool:
        """Keep a report; whether it is durable already."""
        number = report.crash.report
        self._take(number, report)
        self._unsaved[number] = None
        self._make_room()
        await self._save(now, until)
        return number not in self._unsaved

    def _make_room(self) -> None:
        """The oldest give way until the rest is within its bounds."""
        while len(self._reports) > self._count_max or sum(self._sizes.values()) > self._size_max:
            number, _ = self._reports.popitem(last=False)
            del self._sizes[number]
            self.gave_way += 1
            if number in self._unsaved:
                del self._unsaved[number]
            else:
                self._dropped[number] = None

    async def _save(self, now: Nanos, until: Nanos) -> None:
        """Write one report, and delete what gave way, in one step."""
        number = next(iter(self._unsaved), None)
        dropped = list(self._dropped)[:LIST_MAX]
        changes = [Change(_key(each), None) for each in dropped]
        if number is not None:
            kept = _with_kept(self._reports[number])
            changes.append(Change(_key(number), _value(kept)))
        if not changes:
            return
        request = Batch(bytes(encode(Changes(changes))), Durability.DURABLE, 0)
        stored = await self._statefsd.ask(request, until)
        if not isinstance(stored, Stored) or not stored.durable:
            self._again = Nanos(now + self._pause)
            self._pause = Nanos(min(2 * self._pause, AGAIN_MAX))
            return
        self._pause = AGAIN
        for each in dropped:
            del self._dropped[each]
        if number is not None:
            del self._unsaved[number]
            self._reports[number] = _with_kept(self._reports[number])
        self._again = Nanos(now + NEXT) if self._unsaved or self._dropped else None

    def next_time(self) -> Nanos | None:
        """When statefsd is to be tried again."""
        return self._again

    async def on_time(self, now: Nanos, until: Nanos) -> None:
        """Write what could not be written."""
        if self._again is not None and now >= self._again:
            self._again = Nanos(now + AGAIN)
            await self._save(now, until)

    def get(self, number: int) -> Report | None:
        """One report."""
        return self._reports.get(number)

    def since(self, number: int, name: str) -> Iterable[Report]:
        """The reports from `number` on, of `name` unless empty, in the order of their numbers."""
        for each, report in self._reports.items():
            if each >= number and name in ("", report.crash.name):
                yield report


def _with_kept(report: Report) -> Report:
    """The report as it is written: what is read back was durable."""
    return Report(
        crash=report.crash,
        records=report.records,
        spans=report.spans,
        traceback=report.traceback,
        trace=report.trace,
        missing=report.missing,
        kept=True,
    )


def fitted(report: Report) -> Report:
    """The report within REPORT_SIZE_MAX: the oldest records go first, then the outer frames."""
    while len(encode(report)) > REPORT_SIZE_MAX:
        records, traceback = report.records, report.traceback
        if len(records) > 1:
            records = records[1:]
        else:
            traceback = traceback[len(traceback) // 2 + 1 :]
        assert (records, traceback) != (report.records, report.traceback), "the rest always fits"
        report = Report(
            crash=report.crash,
            records=records,
            spans=report.spans,
            traceback=traceback,
            trace=report.trace,
            missing=report.missing,
            kept=report.kept,
        )
    return report


def _key(number: int) -> bytes:
    return FOLDER + f"{number:0{DIGITS}}".encode()


def _number_of(key: bytes) -> int | None:
    tail = key[len(FOLDER) :]
    return int(tail) if len(tail) == DIGITS and tail.isdigit() else None


def _value(report: Report) -> bytes:
    return FORMAT + bytes(encode(report))


def _report(value: bytes) -> Report | None:
    if value[: len(FORMAT)] != FORMAT:
        return None
    try:
        report: Report = _decode(value[len(FORMAT) :])
    except RemoteProtocolError:
        return None
    return report
