"""`nexus logs`: the journal of a running system, a page at a time by record id."""

import sys
import time
from collections import deque
from collections.abc import Iterator
from datetime import datetime
from threading import Event as Pause
from typing import Final

from nexus.abi import service_id
from nexus.cli.ask import Asked
from nexus.cli.client import NANOS, OperatorClient, Unanswered
from nexus.cli.errors import UsageError
from nexus.cli.output import is_lively, say, say_json_line, tell
from nexus.protocols.logd import PAGE_MAX, PROTOCOL, Level, Query, Record, Records
from nexus.protocols.operator import OperatorStatus

LOGD: Final = "logd"
ASK_TIME: Final = 5.0  # seconds for a page
POLL: Final = 0.3  # seconds between looks with --follow
LEVEL_STYLES: Final = {Level.ERROR: "\x1b[31m", Level.WARN: "\x1b[33m", Level.DEBUG: "\x1b[2m"}
RESET: Final = "\x1b[0m"


class Filter:
    """Which records are wanted."""

    def __init__(self, level: str, service: str | None, field: str | None) -> None:
        names = {each.name.lower(): each for each in Level}
        if level.lower() not in names:
            raise UsageError(f"there is no level {level}: it is one of {', '.join(names)}")
        key, equals, value = (field or "").partition("=")
        if field and not (key and equals):
            raise UsageError(f"--field {field!r}: write KEY=VALUE")
        self.level = names[level.lower()]
        self.service = service_id(service) if service else 0
        self.key = key
        self.value = value

    def query(self, since: int, count: int) -> Query:
        """The page from record `since` on."""
        return Query(
            since=since,
            count=count,
            level=self.level,
            service=self.service,
            key=self.key,
            value=self.value,
        )


def logs(asked: Asked, wanted: Filter, *, last: int, follow: bool, as_json: bool) -> None:
    """Print the last records, then new ones as they come. Raises CommandFailed."""
    show = _Show(asked, as_json=as_json)
    with asked.client() as client:
        following = 1
        kept: deque[Record] = deque(maxlen=last)
        for page in _pages(client, wanted, 1):
            kept.extend(page.records)
            following = page.next
        for record in kept:
            show(record)
        if follow:
            _follow(client, wanted, following, show)


def _follow(client: OperatorClient, wanted: Filter, following: int, show: "_Show") -> None:
    """Until it is interrupted. A new logd begins to count anew, and so do we."""
    pause = Pause()
    while True:
        for page in _pages(client, wanted, following):
            if page.total + 1 < following:
                tell("nexus: logd was restarted; what it held is gone")
                following = 1
                break
            for record in page.records:
                show(record)
            following = page.next
        _ = pause.wait(POLL)


def _pages(client: OperatorClient, wanted: Filter, since: int) -> Iterator[Records]:
    """Every page from `since` to the newest record."""
    count = PAGE_MAX
    while True:
        try:
            page = client.relay(LOGD, PROTOCOL, wanted.query(since, count), ASK_TIME)
        except Unanswered as error:
            if error.status is not OperatorStatus.TOO_LARGE or count == 1:
                raise
            count = count // 2
            continue
        yield page
        if page.next > page.total or page.next <= since:
            return
        since = page.next


class _Show:
    """Prints records: a line for a person, or JSON lines."""

    def __init__(self, asked: Asked, *, as_json: bool) -> None:
        self._names = asked.names
        self._json = as_json
        self._lively = is_lively()
        # logd's clock is the kernel's; what it was when is known now.
        self._offset = time.clock_gettime_ns(time.CLOCK_REALTIME) - time.monotonic_ns()

    def __call__(self, record: Record) -> None:
        name = self._names.get(record.service) or f"0x{record.service:016x}"  # type: ignore[call-overload]
        at = datetime.fromtimestamp((record.at + self._offset) / NANOS).astimezone()
        fields = {field.key: field.value for field in record.fields}
        level = record.level.name.lower()
        if self._json:
            say_json_line(
                {
                    "record": record.record,
                    "time": at.isoformat(),
                    "monotonic_ns": record.at,
                    "level": level,
                    "service": name,
                    "pid": record.pid,
                    "generation": record.generation,
                    "scope": record.scope,
                    "text": record.text,
                    "fields": fields,
                }
            )
            return
        scope = "" if record.scope == name else f"{record.scope}: "
        tail = "".join(f" {key}={_quoted(value)}" for key, value in fields.items())
        style = LEVEL_STYLES.get(record.level, "") if self._lively else ""
        clock = f"{at:%H:%M:%S}.{at.microsecond // 1000:03}"
        line = f"{clock} {level:<5} {name}  {scope}{record.text}{tail}"
        say(f"{style}{line}{RESET if style else ''}")
        _ = sys.stdout.flush()  # who follows wants it now, also through a pipe


def _quoted(value: str) -> str:
    """A field's value; in quotes where its end could not be seen."""
    return f'"{value}"' if not value or " " in value or "=" in value else value
