"""`nexus logs`: the journal of a running system, a page at a time by record id; `-f` follows it."""

import re
import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from nexus.abi import service_id
from nexus.cli.ask import Asked
from nexus.cli.client import NANOS, OperatorClient, Unanswered
from nexus.cli.errors import UsageError
from nexus.cli.output import is_lively, say, say_json_line, tell
from nexus.protocols import logd
from nexus.protocols.logd import (
    PAGE_MAX,
    PROTOCOL,
    THIS_BOOT,
    TRACE_SIZE,
    Follow,
    Level,
    Query,
    Record,
    Records,
)
from nexus.protocols.operator import OperatorStatus

LOGD: Final = "logd"
ASK_TIME: Final = 5.0  # seconds for a page
FOLLOW_TIME: Final = 5.0  # seconds that logd may keep a request that waits for a record
BOOTS_BACK_MAX: Final = 1 << 20
LEVEL_STYLES: Final = {Level.ERROR: "\x1b[31m", Level.WARN: "\x1b[33m", Level.DEBUG: "\x1b[2m"}
RESET: Final = "\x1b[0m"
AGO: Final = re.compile(r"([0-9]{1,9})([smhd])")
UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
GONE: Final = (OperatorStatus.CUT_OFF, OperatorStatus.TIMED_OUT)  # logd ended, or starts again


@dataclass(frozen=True, kw_only=True)
class Filter:
    """Which records are wanted, as they are asked for on the command line."""

    level: str = "trace"
    service: str | None = None
    field: str | None = None
    pid: int = 0
    text: str = ""
    trace: str = ""
    since: str = ""
    until: str = ""
    boot: int | None = None

    def asked(self) -> logd.Filter:
        """The same for logd. Raises UsageError."""
        names = {each.name.lower(): each for each in Level}
        if self.level.lower() not in names:
            raise UsageError(f"there is no level {self.level}: it is one of {', '.join(names)}")
        key, equals, value = (self.field or "").partition("=")
        if self.field and not (key and equals):
            raise UsageError(f"--field {self.field!r}: write KEY=VALUE")
        return logd.Filter(
            level=names[self.level.lower()],
            service=service_id(self.service) if self.service else 0,
            pid=self.pid,
            generation=0,
            trace=_trace(self.trace),
            key=key,
            value=value,
            text=self.text,
            since=_time("--since", self.since),
            until=_time("--until", self.until),
        )

    @property
    def boot_asked(self) -> int:
        """The boot's number; 0 and below count back from this one. Raises UsageError."""
        if self.boot is None:
            return THIS_BOOT
        if not -BOOTS_BACK_MAX <= self.boot < THIS_BOOT - BOOTS_BACK_MAX:
            raise UsageError(f"--boot {self.boot}: write a number, or -1 for the boot before this")
        return THIS_BOOT + self.boot if self.boot <= 0 else self.boot


def _trace(text: str) -> bytes:
    """A trace id, as `nexus trace` shows it."""
    try:
        trace = bytes.fromhex(text)
    except ValueError:
        trace = b"?"
    if len(trace) not in (0, TRACE_SIZE):
        raise UsageError(f"--trace {text!r}: write the {2 * TRACE_SIZE} digits of a trace id")
    return trace


def _time(option: str, text: str) -> int:
    """ns since 1970 of "10m" (ago), "12:30", "2026-02-03" or "2026-02-03T12:30"; 0 for nothing."""
    if not text:
        return 0
    now = datetime.now().astimezone()
    ago = AGO.fullmatch(text)
    if ago is not None:
        at = now - timedelta(seconds=int(ago[1]) * UNITS[ago[2]])
    else:
        try:
            at = datetime.fromisoformat(f"{now:%Y-%m-%d}T{text}" if text[2:3] == ":" else text)
        except ValueError:
            raise UsageError(
                f"{option} {text!r}: write 10m, 2h or 3d ago, 12:30, or 2026-02-03T12:30"
            ) from None
    return int(at.astimezone().timestamp() * NANOS)


def logs(asked: Asked, wanted: Filter, *, last: int, follow: bool, as_json: bool) -> None:
    """Print the last records, then new ones as they come. Raises CommandFailed and UsageError."""
    if follow and wanted.boot is not None:
        raise UsageError("--follow: records of an earlier boot come no more; leave out --boot")
    filter_ = wanted.asked()
    boot = wanted.boot_asked
    show = _Show(asked, as_json=as_json)
    with asked.client() as client:
        following = 1
        kept: deque[Record] = deque(maxlen=last)
        for page in _pages(client, boot, filter_, 1):
            kept.extend(page.records)
            following = page.next
        for record in kept:
            show(record)
        if follow:
            _follow(client, filter_, following, show)


def _follow(client: OperatorClient, wanted: logd.Filter, following: int, show: "_Show") -> None:
    """Until it is interrupted. The ids of a logd that was started again go on above."""
    count = PAGE_MAX
    while True:
        request = Follow(following, count, wanted)
        try:
            page = client.relay(LOGD, PROTOCOL, request, FOLLOW_TIME)
        except Unanswered as error:
            if error.status is OperatorStatus.TOO_LARGE and count > 1:
                count = count // 2
            elif error.status not in GONE:
                raise
            continue
        if following < page.oldest and page.oldest > page.total - len(page.records):
            tell("nexus: logd was started again; what it held is gone")
        for record in page.records:
            show(record)
        following = max(following, page.next)


def _pages(client: OperatorClient, boot: int, wanted: logd.Filter, since: int) -> Iterator[Records]:
    """Every page from `since` to the newest record."""
    count = PAGE_MAX
    while True:
        try:
            request = Query(boot, since, count, wanted)
            page = client.relay(LOGD, PROTOCOL, request, ASK_TIME)
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
        self._today = datetime.now().astimezone().date()

    def __call__(self, record: Record) -> None:
        name = self._names.get(record.service) or f"0x{record.service:016x}"  # type: ignore[call-overload]
        at = datetime.fromtimestamp(record.wall / NANOS).astimezone()
        fields = {field.key: field.value for field in record.fields}
        level = record.level.name.lower()
        if self._json:
            say_json_line(
                {
                    "record": record.record,
                    "boot": record.boot,
                    "time": at.isoformat(),
                    "monotonic_ns": record.at,
                    "written_ns": record.written,
                    "trace": record.trace.hex(),
                    "span": record.span.hex(),
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
        if at.date() != self._today:
            clock = f"{at:%Y-%m-%d} {clock}"
        line = f"{clock} {level:<5} {name}  {scope}{record.text}{tail}"
        say(f"{style}{line}{RESET if style else ''}")
        _ = sys.stdout.flush()  # who follows wants it now, also through a pipe


def _quoted(value: str) -> str:
    """A field's value; in quotes where its end could not be seen."""
    return f'"{value}"' if not value or " " in value or "=" in value else value
