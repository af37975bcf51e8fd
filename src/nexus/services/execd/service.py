"""execd: starts programs under policy, says how they end, and keeps the story of each crash.

Owns the table of children and the crash reports. It forks nothing: init starts and reaps, and tells
execd of every end that nobody asked for. Trusts init alone; a client is who the kernel says, and
may start what policyd allows it, wait for its own children and end them. Waiting blocks nobody.
Decision: docs/adr/0019.

    Exec: the requester is the sender, has proc.spawn for the program --> init's Launch
    ReportExit, from init: --> the child's end is told, who waits is answered
                           --> a crash: evidence of logd and metricsd, a record, a durable report
"""

import json
from collections import OrderedDict, deque
from collections.abc import Mapping
from enum import IntEnum
from typing import Any, Final, TypeAlias, assert_never

import msgspec

from nexus.abi import (
    INIT_NAME,
    AbiError,
    Clock,
    ClockMap,
    ConsoleWrite,
    LinkId,
    Nanos,
    Now,
    ServiceId,
    service_id,
)
from nexus.ipc import Exchange, Refused, deadline_after, nested_deadline
from nexus.log import LOGD_NAME
from nexus.protocols.execd import (
    CRASH_READ,
    PROC_SPAWN,
    PROGRAM_ROWS_MAX,
    PROTOCOL,
    REPORT_ROWS_MAX,
    WHY_SIZE_MAX,
    Crash,
    Crashes,
    Ended,
    Exec,
    ExecdRequest,
    ExecdStatus,
    GetCrashes,
    GetPrograms,
    GetReport,
    Kill,
    Killed,
    ProgramRow,
    ProgramRows,
    Report,
    Reported,
    ReportExit,
    Restart,
    Started,
    Wait,
)
from nexus.protocols.init import (
    Ending,
    EndTask,
    GetLaunched,
    InitStatus,
    Launch,
    Launched,
    LaunchedRows,
    NoteDenied,
)
from nexus.protocols.logd import PROTOCOL as LOGD
from nexus.protocols.meta import SETTINGS_SIZE_MAX
from nexus.protocols.metricsd import PROTOCOL as METRICSD
from nexus.protocols.policyd import PROTOCOL as POLICYD
from nexus.protocols.policyd import Exec as MayExec
from nexus.protocols.statefsd import PROTOCOL as STATEFSD
from nexus.runtime import Call, Deferred
from nexus.runtime.program import POLICYD_NAME, Context, program_of
from nexus.runtime.ways import Ways
from nexus.services.execd.asked import Asked
from nexus.services.execd.children import Children
from nexus.services.execd.config import Settings, check_settings
from nexus.services.execd.evidence import Evidence, gather
from nexus.services.execd.keeping import Keeping, fitted
from nexus.wire import ReplyStatus, Request

METRICSD_NAME: Final = "metricsd"
STATEFSD_NAME: Final = "statefsd"
INIT: Final = service_id(INIT_NAME)
LAUNCH_MAX: Final = Nanos(3_000_000_000)  # ns for init's answer: it asks policyd once per grant
INIT_MAX: Final = Nanos(500_000_000)  # ns for anything else that init is asked
OPEN_MAX: Final = Nanos(2_000_000_000)  # ns for finding whom it asks; init still starts others
LOAD_MAX: Final = Nanos(1_500_000_000)  # ns for reading the kept reports; below the ready deadline
REPORT_MAX: Final = Nanos(2_000_000_000)  # ns for all the evidence of a crash, and keeping it
SEEN_MAX: Final = 128  # ends that are told apart from their repetition
LINES_MAX: Final = 32  # lines for a console that is full
LINE_AGAIN: Final = Nanos(20_000_000)  # ns
ADOPT_AGAIN: Final = Nanos(500_000_000)  # ns between two questions to init about the children
LAST_SIZE_MAX: Final = 96  # characters of the last record, in the short record of a crash
EVENT: Final = "crash.v1"
MILLISECOND: Final = 1_000_000  # ns
LOADED_LINE: Final = "execd: elf load ok"

Reply: TypeAlias = Started | Ended | Deferred | Reported | ProgramRows | Crashes | Report | Killed
Line: TypeAlias = tuple[str, Mapping[str, Any]]

_REFUSALS: Final[Mapping[IntEnum, ExecdStatus]] = {
    InitStatus.RUNS: ExecdStatus.RUNNING,
    InitStatus.BAD_PROGRAM: ExecdStatus.BAD_DIGEST,
    InitStatus.ROUTE_NOT_FOUND: ExecdStatus.NO_PROGRAM,
    InitStatus.NOT_ON_DEMAND: ExecdStatus.NO_PROGRAM,
}
"""What init's refusals of a launch are to the requester; any other is FAILED."""


class Execd:
    """Serves nexus.protocols.execd."""

    def __init__(self, context: Context, settings: Settings) -> None:
        self._context = context
        self._told = settings.told
        self._programs = dict(sorted(context.config.starts.items()))
        self._children: Children[Deferred] = Children()
        self._logd = Asked(context, LOGD_NAME, LOGD)
        self._metricsd = Asked(context, METRICSD_NAME, METRICSD)
        self._policyd = Asked(context, POLICYD_NAME, POLICYD)
        self._keeping = Keeping(Asked(context, STATEFSD_NAME, STATEFSD), settings, self._boot)
        self._clock: Clock | None = None
        self._seen: OrderedDict[tuple[str, int, int], int] = OrderedDict()
        self._lines: deque[Line] = deque(maxlen=LINES_MAX)
        self._line_at: Nanos | None = None
        self._adopt_at: Nanos | None = None
        wanted = {LOGD_NAME: LOGD, METRICSD_NAME: METRICSD, POLICYD_NAME: POLICYD}
        self._ways = Ways(context, wanted)
        self._loaded_told = False
        self._init_lost = 0
        self._started = 0
        self._denied = 0
        self._forged = 0
        self._crashes = 0

    @property
    def _boot(self) -> int:
        return self._context.config.boot

    async def start(self) -> None:
        """Read the kept reports, and find the children that an earlier instance has started."""
        self._clock = await ClockMap()
        await self._ways.start(OPEN_MAX)
        await self._keeping.load(await self._context.after(LOAD_MAX))
        await self._adopt()

    async def handle(self, call: Call, request: ExecdRequest) -> Reply:
        """The reply."""
        match request:
            case Exec():
                return await self._exec(call, request)
            case Wait():
                return self._wait(call, request)
            case ReportExit():
                return await self._report_exit(call, request)
            case GetPrograms():
                return self._program_rows(request)
            case GetCrashes():
                return await self._get_crashes(call, request)
            case GetReport():
                return await self._get_report(call, request)
            case Kill():
                return await self._kill(call, request)
            case _:
                assert_never(request)

    def next_time(self) -> Nanos | None:
        """When a line, a report or the table of children is to be tried again."""
        own = (self._line_at, self._keeping.next_time(), self._adopt_at)
        times = (*own, self._ways.next_time())
        return min((time for time in times if time is not None), default=None)

    async def on_time(self, now: Nanos) -> None:
        """Try again what could not be done."""
        if self._line_at is not None and now >= self._line_at:
            await self._flush_lines(now)
        if self._adopt_at is not None and now >= self._adopt_at:
            await self._adopt()
        await self._ways.on_time(now)
        await self._keeping.on_time(now, deadline_after(now, INIT_MAX))

    def on_gone(self, link: LinkId) -> None:
        """The holder of a link is gone, and waits no longer."""
        self._children.forget_link(link)

    def evidence(self) -> dict[str, Any]:
        """With the line that says it is ready: what it can start."""
        return {"programs": self._programs, "reports": len(self._keeping)}

    def facts(self) -> dict[str, int]:
        """What runs, what is kept, and what was refused or lost."""
        return {
            "children": len(self._children),
            "waiting": self._children.waiting,
            "reports": len(self._keeping),
            "reports_unsaved": self._keeping.unsaved,
            "started_total": self._started,
            "denied_total": self._denied,
            "forged_total": self._forged,
            "crashes_total": self._crashes,
            "gave_way_total": self._keeping.gave_way,
            "damaged_total": self._keeping.damaged,
            "unread_total": self._keeping.unread,
        }

    # ------------------------------------------------------------------ starting

    async def _exec(self, call: Call, request: Exec) -> Started:
        await self._authorise(call, request)
        digest = self._programs.get(request.program)
        if digest is None:
            raise call.refuse(ExecdStatus.NO_PROGRAM)
        child = self._children.named(request.program)
        if child is not None and child.is_between:
            await self._adopt()  # init may have given it up
        if self._children.named(request.program) is not None:
            raise call.refuse(ExecdStatus.RUNNING)
        settings = _settings(request)
        if len(settings) > SETTINGS_SIZE_MAX or not self._children.has_room(call.sender.service):
            raise call.refuse(ExecdStatus.OVER_LIMIT)
        starter = call.sender.service
        launched = await self._launch(call, request, digest, settings)
        self._started += 1
        self._children.on_started(request.program, starter, launched.pid, launched.generation)
        await self._tell_loaded(request.program, launched)
        return Started(launched.pid, launched.generation)

    async def _authorise(self, call: Call, request: Exec) -> None:
        """The requester is the sender, and policyd lets it start this program; else DENIED, before
        anything is started. init's record of the program says so, and so does policyd's audit."""
        if not self._is_requester(call, request):
            _ = await self._policyd.ask(MayExec(request.requester, request.program), call.deadline)
            call.note("reason", "identity")
            await self._deny(call, request)
        outcome = await self._context.authority.check(
            call.sender.service, PROC_SPAWN, request.program, call.deadline, call.context
        )
        if not outcome.allowed:
            call.note("reason", outcome.reason.name.lower())
            await self._deny(call, request)

    def _is_requester(self, call: Call, request: Exec) -> bool:
        """Whether the name in the request is the sender's, by the kernel's word."""
        return request.requester.isascii() and service_id(request.requester) == call.sender.service

    async def _deny(self, call: Call, request: Exec) -> None:
        self._denied += 1
        if request.program in self._programs:
            _ = await self._at_init(NoteDenied(request.program), INIT_MAX, call)
        raise call.refuse(ReplyStatus.DENIED)

    async def _launch(self, call: Call, request: Exec, digest: str, settings: bytes) -> Launched:
        """Have init start it. An answer that is not known is looked for afterwards."""
        launch = Launch(
            name=request.program,
            requester=request.requester,
            digest=digest,
            settings=settings,
            restarts=request.restart is Restart.ON_CRASH,
        )
        outcome = await self._at_init(launch, LAUNCH_MAX, call)
        if isinstance(outcome, Launched):
            return outcome
        if not isinstance(outcome, Refused):
            self._adopt_at = call.now
            call.note("init", type(outcome).__name__)
            raise call.refuse(ExecdStatus.FAILED)
        call.note("init", outcome.status.name)
        if outcome.status in (ReplyStatus.DENIED, ReplyStatus.BUSY):
            self._denied += outcome.status is ReplyStatus.DENIED
            raise call.refuse(outcome.status)
        raise call.refuse(_REFUSALS.get(outcome.status, ExecdStatus.FAILED))

    async def _at_init(self, request: Request[Any], span: Nanos, call: Call | None = None) -> Any:
        """init's answer, Refused, or a CallFailure."""
        until = await self._context.after(span)
        if call is not None:
            until = nested_deadline(call.deadline, until)
        control = await self._context.peers.control(until)
        if not isinstance(control, Exchange):
            return control
        return await control.call(request, until)

    async def _adopt(self) -> None:
        """What init says has been started for us: of an earlier instance, or unknown to us."""
        self._adopt_at = None
        rows = await self._at_init(GetLaunched(), INIT_MAX)
        if isinstance(rows, Refused):
            return  # without the right there are no children either
        if not isinstance(rows, LaunchedRows):
            self._adopt_at = await self._context.after(ADOPT_AGAIN)
            return
        self._children.keep_only(row.name for row in rows.rows)
        for row in rows.rows:
            if self._children.named(row.name) is None:
                starter = service_id(row.requester)
                self._children.on_started(row.name, starter, row.pid, row.generation)

    async def _tell_loaded(self, program: str, launched: Launched) -> None:
        """Say once that a program was started whose digest is the plan's."""
        if self._loaded_told or program != self._told:
            return
        self._loaded_told = True
        evidence = {
            "program": program,
            "pid": launched.pid,
            "generation": launched.generation,
            "digest": launched.digest,
            "planned": self._programs[program],
        }
        await self._say(LOADED_LINE, evidence)

    # ------------------------------------------------------------------ waiting and ending

    def _wait(self, call: Call, request: Wait) -> Ended | Deferred:
        over = self._children.over(request.pid)
        if over is not None:
            self._check_starter(call, over.starter)
            return over.ended
        child = self._children.living(request.pid)
        if child is None:
            raise call.refuse(ExecdStatus.NOT_FOUND)
        self._check_starter(call, child.starter)
        if not self._children.may_wait(call.link, call.now):
            raise call.refuse(ExecdStatus.OVER_LIMIT)
        deferred = call.defer()
        child.waiters.append(deferred)
        return deferred

    def _check_starter(self, call: Call, starter: ServiceId) -> None:
        """A child is the business of who had it started."""
        if call.sender.service != starter:
            raise call.refuse(ReplyStatus.DENIED)

    async def _kill(self, call: Call, request: Kill) -> Killed:
        child = self._children.living(request.pid)
        over = self._children.over(request.pid)
        if child is None and over is not None:
            self._check_starter(call, over.starter)
            raise call.refuse(ExecdStatus.NOT_FOUND)
        if child is None:
            raise call.refuse(ExecdStatus.NOT_FOUND)
        self._check_starter(call, child.starter)
        outcome = await self._at_init(EndTask(child.name, child.generation), INIT_MAX, call)
        if isinstance(outcome, Ending):
            return Killed()
        if isinstance(outcome, Refused):
            raise call.refuse(ExecdStatus.NOT_FOUND)  # it has just ended
        raise call.refuse(ReplyStatus.BUSY)

    # ------------------------------------------------------------------ ends

    async def _report_exit(self, call: Call, request: ReportExit) -> Reported:
        if not self._is_parent(call):
            self._forged += 1
            raise call.refuse(ReplyStatus.DENIED)
        self._init_lost = max(self._init_lost, request.lost)
        key = (request.name, request.pid, request.generation)
        number = self._seen.get(key)
        if number is None:
            number = await self._on_exit(call, request)
            self._seen[key] = number
            while len(self._seen) > SEEN_MAX:
                _ = self._seen.popitem(last=False)
        return Reported(number)

    def _is_parent(self, call: Call) -> bool:
        """Whether init says so, whose children all tasks are."""
        return call.sender.service == INIT

    async def _on_exit(self, call: Call, end: ReportExit) -> int:
        """Tell of an end, and of the crash if it is one; the report's number or 0."""
        if self._children.named(end.name) is not None:
            await self._say(f"execd: child exited {_end_text(end)}", _end_evidence(end))
        is_crash = not end.asked and bool(end.code or end.signal)
        number = await self._on_crash(call, end) if is_crash else 0
        ended = Ended(end.pid, end.generation, end.code, end.signal, number)
        for waiter in self._children.on_ended(end.name, ended, again=end.again):
            waiter.reply(ended)
        return number

    async def _on_crash(self, call: Call, end: ReportExit) -> int:
        """Gather the evidence, write the record, keep the report; its number."""
        self._crashes += 1
        until = nested_deadline(call.deadline, deadline_after(call.now, REPORT_MAX))
        found = await gather(self._logd, self._metricsd, end, until)
        number = self._keeping.number()
        report = fitted(self._report(number, end, found))
        kept = await self._keeping.keep(report, call.now, until)
        self._write_record(report, found)
        await self._say(
            f"execd: crash report {_end_text(end)}",
            {
                **_end_evidence(end),
                "report": number,
                "kept": kept,
                "records": len(report.records),
                "spans": len(report.spans),
                "missing": found.missing,
            },
        )
        return number

    def _report(self, number: int, end: ReportExit, found: Evidence) -> Report:
        assert self._clock is not None, "start comes before the first request"
        late = self._clock.monotonic() - end.ended
        return Report(
            crash=Crash(
                report=number,
                boot=self._boot,
                wall=max(0, self._clock.wall() - late),
                name=end.name,
                pid=end.pid,
                generation=end.generation,
                code=end.code,
                signal=end.signal,
                duration=max(0, end.ended - end.started),
                digest=end.digest,
                reason=end.reason,
                action=end.action,
            ),
            records=found.records,
            spans=found.spans,
            traceback=found.traceback,
            trace=found.trace,
            missing="; ".join(found.missing)[:WHY_SIZE_MAX],
            kept=False,
        )

    def _write_record(self, report: Report, found: Evidence) -> None:
        """The crash in short, where everybody looks first: the log."""
        crash = report.crash
        self._context.log.error(
            "crash",
            event=EVENT,
            pid=crash.pid,
            code=crash.code,
            signal=crash.signal,
            name=crash.name,
            build=crash.digest,
            duration_ms=crash.duration // MILLISECOND,
            report=crash.report,
            last=found.last[-LAST_SIZE_MAX:],
        )

    # ------------------------------------------------------------------ reading

    def _program_rows(self, request: GetPrograms) -> ProgramRows:
        rows = [ProgramRow(name, digest) for name, digest in self._programs.items()]
        return ProgramRows(len(rows), rows[request.first : request.first + PROGRAM_ROWS_MAX])

    async def _get_crashes(self, call: Call, request: GetCrashes) -> Crashes:
        await self._context.authority.require(call, CRASH_READ)
        found = [report.crash for report in self._keeping.since(request.since, request.name)]
        rows = found[:REPORT_ROWS_MAX]
        following = rows[-1].report + 1 if len(found) > len(rows) else 0
        lost = self._keeping.gave_way + self._keeping.damaged + self._init_lost
        return Crashes(following, lost, rows)

    async def _get_report(self, call: Call, request: GetReport) -> Report:
        await self._context.authority.require(call, CRASH_READ)
        report = self._keeping.get(request.report)
        if report is None:
            raise call.refuse(ExecdStatus.NOT_FOUND)
        return report

    # ------------------------------------------------------------------ the console

    async def _say(self, line: str, evidence: Mapping[str, Any]) -> None:
        """Print a line, in the order of the calls; a full console is tried again later."""
        self._lines.append((line, evidence))
        await self._flush_lines(await Now())

    async def _flush_lines(self, now: Nanos) -> None:
        self._line_at = None
        while self._lines:
            line, evidence = self._lines[0]
            try:
                await ConsoleWrite(line, json.dumps(evidence).encode())
            except AbiError:
                self._line_at = Nanos(now + LINE_AGAIN)
                return
            _ = self._lines.popleft()


def _settings(request: Exec) -> bytes:
    """What the program finds in its settings, as init's Launch carries it."""
    environment = {variable.key: variable.value for variable in request.environment}
    table = {"arguments": request.arguments, "environment": environment}
    return msgspec.msgpack.encode(table)


def _end_text(end: ReportExit) -> str:
    """An end in words that no other end of this boot has: the kernel gives a pid again."""
    signal = f" signal={end.signal}" if end.signal else ""
    return f"pid={end.pid} code={end.code} name={end.name} generation={end.generation}{signal}"


def _end_evidence(end: ReportExit) -> dict[str, Any]:
    return {
        "name": end.name,
        "pid": end.pid,
        "generation": end.generation,
        "code": end.code,
        "signal": end.signal,
        "reason": end.reason,
        "ran_ns": end.ended - end.started,
    }


def made(context: Context) -> Execd:
    """execd as the system file wants it."""
    return Execd(context, check_settings(context.settings_as(Settings)))


main: Final = program_of(made, PROTOCOL)
