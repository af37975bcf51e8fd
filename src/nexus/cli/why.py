"""`nexus why SERVICE`: what happened to it, the evidence, and what was done about it.

init knows how the last instance ended and what the service is now; execd has a report of each crash
with its evidence, also of those before a reboot; logd has the denials. Whatever of these cannot be
asked is said.
"""

import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from nexus.abi import INIT_NAME, SpawnReason
from nexus.cli.ask import Asked
from nexus.cli.client import OperatorClient, ServiceRefused
from nexus.cli.errors import CommandFailed
from nexus.cli.output import say, say_json
from nexus.cli.status import span, word
from nexus.cli.telling import INDENT, clock, labelled
from nexus.cli.why_update import left_for, reasons_of
from nexus.protocols.execd import PROTOCOL as EXECD
from nexus.protocols.execd import Crash, Crashes, GetCrashes, GetReport, Report
from nexus.protocols.init import (
    PROC_SPAWN,
    GetService,
    GetSystem,
    InitStatus,
    ServiceRecord,
    SystemInfo,
    SystemState,
    TaskState,
)
from nexus.protocols.init import PROTOCOL as INIT
from nexus.protocols.logd import EVERY_RECORD, PAGE_MAX, Level, Query, Record
from nexus.protocols.logd import PROTOCOL as LOGD
from nexus.protocols.updated import SERVICE_NAME as UPDATED_NAME
from nexus.wire import ReplyStatus

ASK_TIME: Final = 5.0  # seconds for each question
PAGES_MAX: Final = 64  # pages of crashes: more than execd keeps
DENIALS_MAX: Final = 3  # that are told, the latest
DENIAL_PAGES_MAX: Final = 64  # pages of the journal that are looked through for them
EARLIER_MAX: Final = 5  # crashes before the one that is told whole
NANOS: Final = 1_000_000_000
MILLI: Final = 1_000  # us
EXECD_NAME: Final = "execd"
LOGD_NAME: Final = "logd"

REASONS: Final = {
    "no echo": "it did not answer init's first message in time, and was killed",
    "not ready": "it was not ready in time, twice, and was killed",
    "hang": "it hung: it no longer answered its health probe, and was killed",
    "late": "too many requests expired in its queue, and it was killed",
    "control link closed": "it closed its link to init, and was killed",
    "answers link closed": "it closed its link to init, and was killed",
    "stop deadline": "it did not stop in time, and was killed",
    "second signal": "the system was told to end at once, and it was killed",
    "memory limit": "it took more memory than it may, and was killed for it, alone",
    "asked": "somebody asked for its restart",
    "ended": "who had it started ended it",
    "group": "another service of its group ended",
    "safe mode": "the system went into safe mode",
    "policy": "it had to take a new policy",
    "grant revoked": "a new policy took away a right that it needs for what it was granted",
    "denied": "the policy denies it something that its entry asks for",
    "undecided": "policyd did not say whether it may have what its entry asks for",
    "device": "one of its devices is not there, or not what the system file says",
    "spawn refused": "the kernel refused to start it",
}
"""What init's words for an end, or for no start, mean to a person."""

SIGNALS: Final[Mapping[int, str]] = {
    signal.SIGSYS: "it made a system call that its sandbox denies",
    signal.SIGKILL: "killed from outside: by somebody, or because the machine had no memory left",
    signal.SIGSEGV: "it touched memory that it does not have",
    signal.SIGBUS: "it touched memory behind which there is nothing",
    signal.SIGABRT: "it gave up by itself",
    signal.SIGXCPU: "it used more processor time than it may",
    signal.SIGXFSZ: "it wrote a larger file than it may",
}

SPAWN_REASONS: Final = {
    SpawnReason.OOM: "there is no memory for it",
    SpawnReason.CAP_TABLE_FULL: "a capability table is full",
    SpawnReason.ENDPOINT_QUOTA: "there is no endpoint left",
    SpawnReason.MAP_FAILED: "its memory cannot be mapped",
    SpawnReason.INVALID_PAYLOAD: "its entry is not what the kernel takes",
    SpawnReason.DENIED_BY_POLICY: "the policy denies it",
}


@dataclass(frozen=True, slots=True)
class Story:
    """Everything that is known of a service's ends."""

    service: str
    record: ServiceRecord
    system: SystemInfo
    crashes: tuple[Crash, ...] = ()  # by number
    report: Report | None = None  # of the crash that is told whole
    denials: tuple[Record, ...] = ()
    unknown: tuple[str, ...] = field(default=())  # what could not be asked, and why
    left: tuple[str, ...] = ()  # which system sets were left for its sake

    @property
    def boot(self) -> int:
        """The number of the present boot, as reports have it."""
        return self.system.boots - 1


def why(asked: Asked, service: str, number: int | None, *, as_json: bool) -> None:
    """Print the story. Raises CommandFailed."""
    with asked.client() as client:
        left = _left_for(client, asked, service)
        try:
            story = _story(client, asked, service, number)
        except NoSuchService:
            if not left:
                raise
            story = None  # it is of a set that was left, and not of this one
    if story is None:
        if as_json:
            say_json({"service": service, "state": None, "left": left})
            return
        say(f"{service}: not in this system")
        for line in left:
            say(f"{INDENT}{line}")
        return
    story = replace(story, left=tuple(left))
    if as_json:
        say_json(document(story))
        return
    for line in lines(story):
        say(line)


class NoSuchService(CommandFailed):
    """The system has no service of this name."""


def _left_for(client: OperatorClient, asked: Asked, service: str) -> list[str]:
    """The sets that boot control left for its sake; none where that cannot be asked."""
    if not asked.has(UPDATED_NAME):
        return []
    try:
        return list(left_for(reasons_of(client), service))
    except CommandFailed:
        return []


def _story(client: OperatorClient, asked: Asked, service: str, number: int | None) -> Story:
    try:
        record = client.relay(INIT_NAME, INIT, GetService(service), ASK_TIME)
    except ServiceRefused as error:
        if error.status is InitStatus.ROUTE_NOT_FOUND:
            title = asked.running.title
            raise NoSuchService(
                f"there is no service {service} in {title}: see `nexus status`"
            ) from error
        raise
    system = client.relay(INIT_NAME, INIT, GetSystem(), ASK_TIME)
    unknown: list[str] = []
    crashes: list[Crash] = []
    report = None
    try:
        crashes = list(_crashes(client, service))
        chosen = _chosen(crashes, service, number)
        if chosen is not None:
            report = client.relay(EXECD_NAME, EXECD, GetReport(chosen), ASK_TIME)
    except (ServiceRefused, CommandFailed) as error:
        if number is not None and not crashes:
            raise
        unknown.append(_fault("crash reports", "crash.read", error))
    denials: list[Record] = []
    if record.spawn_reason == SpawnReason.DENIED_BY_POLICY:
        try:
            denials = _denials(client, service)
        except (ServiceRefused, CommandFailed) as error:
            unknown.append(_fault("denials", "log.read", error))
    return Story(service, record, system, tuple(crashes), report, tuple(denials), tuple(unknown))


def _fault(what: str, right: str, error: CommandFailed) -> str:
    denied = isinstance(error, ServiceRefused) and error.status is ReplyStatus.DENIED
    return f"{what}: operator has no right {right}" if denied else f"{what}: {error}"


def _crashes(client: OperatorClient, service: str) -> Iterator[Crash]:
    since = 0
    for _ in range(PAGES_MAX):
        page: Crashes = client.relay(EXECD_NAME, EXECD, GetCrashes(since, service), ASK_TIME)
        yield from page.rows
        if page.next <= since:
            return
        since = page.next


def _chosen(crashes: Sequence[Crash], service: str, number: int | None) -> int | None:
    """The report to tell whole: the one that is asked for, or the last."""
    numbers = [crash.report for crash in crashes]
    if number is None:
        return numbers[-1] if numbers else None
    if number not in numbers:
        listed = ", ".join(map(str, numbers)) or "none"
        raise CommandFailed(f"there is no report {number} of {service}: it has {listed}")
    return number


def _denials(client: OperatorClient, service: str) -> list[Record]:
    """The latest audit records of denied starts of the service."""
    import msgspec

    wanted = msgspec.structs.replace(EVERY_RECORD, key="action", value=PROC_SPAWN)
    boot = client.relay(INIT_NAME, INIT, GetSystem(), ASK_TIME).boots - 1
    found: list[Record] = []
    since = 1
    for _ in range(DENIAL_PAGES_MAX):
        page = client.relay(LOGD_NAME, LOGD, Query(boot, since, PAGE_MAX, wanted), ASK_TIME)
        for record in page.records:
            fields = _fields(record)
            if (fields.get("target"), fields.get("decision")) == (service, "deny"):
                found.append(record)
        if page.next <= since or page.next > page.total:
            break
        since = page.next
    return found[-DENIALS_MAX:]


# ---------------------------------------------------------------- the story for a person


def lines(story: Story) -> Iterator[str]:
    """The story in lines."""
    yield _headline(story)
    yield from _system_lines(story.system)
    yield from _start_lines(story)
    yield from (f"{INDENT}{each}" for each in story.left)
    if story.report is not None:
        yield ""
        yield from _report_lines(story, story.report)
        yield from _earlier_lines(story)
    elif story.record.died:
        yield f"{INDENT}its last instance ended {_when(story)}: {_end_of(story.record)}"
    for each in story.unknown:
        yield f"{INDENT}not known: {each}"


def _headline(story: Story) -> str:
    record = story.record
    state = word(record.state)
    if record.state is TaskState.UP:
        restarts = f", restarted {_times(record.restarts)} in this boot" if record.restarts else ""
        state = f"{state}, health {word(record.health)}, process {record.pid}{restarts}"
    ended = story.crashes or record.died or story.left
    calm = not ended and not record.spawn_reason
    well = "; nothing has happened to it" if calm and not story.unknown else ""
    return f"{story.service}: {state}{well}"


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _system_lines(system: SystemInfo) -> Iterator[str]:
    if system.state is SystemState.SAFE:
        yield f"{INDENT}the system is in safe mode: {system.why}"
        yield f"{INDENT}`nexus safe leave` ends it"


def _start_lines(story: Story) -> Iterator[str]:
    """Why it was not started, or not by everybody who wanted to."""
    record = story.record
    if record.state is TaskState.FAILED and record.reason in REASONS:
        yield f"{INDENT}not started: {REASONS[record.reason]}"
        yield f"{INDENT}its entry and the policy decide what it is granted: see `nexus check`"
    if not record.spawn_refused:
        return
    reason = SPAWN_REASONS.get(SpawnReason(record.spawn_reason), "the kernel gave no reason")
    yield f"{INDENT}a start was refused {_times(record.spawn_refused)}, the last time: {reason}"
    for denial in story.denials:
        fields = _fields(denial)
        who, why_ = fields.get("subject", "?"), fields.get("reason", "?")
        yield f"{INDENT}{clock(denial.wall)}  {who} may not start it, reason {why_}"
        yield f"{INDENT}see `nexus explain {who} {EXECD_NAME} {PROC_SPAWN}:{story.service}`"


def _report_lines(story: Story, report: Report) -> Iterator[str]:
    crash = report.crash
    where = "" if crash.boot == story.boot else f", in boot {crash.boot + 1}, before this one"
    yield f"{clock(crash.wall)}  {story.service} crashed: {_how(crash)}{where}"
    yield labelled("cause", cause(report))
    yield labelled(
        "instance", f"process {crash.pid}, generation {crash.generation}, ran {_ran(crash)}"
    )
    for index, each in enumerate(report.records):
        level = Level(each.level).name.lower() if each.level in set(Level) else "?"
        text = f"{clock(each.at)}  {level:<5} {each.text}"
        yield labelled("last words" if index == 0 else "", text)
    for index, span_ in enumerate(report.spans):
        state = f"took {_short(span_.end - span_.start)}" if span_.end else "was open"
        text = f"{clock(span_.start)}  {span_.name} {state}"
        yield labelled("spans" if index == 0 else "", text)
    for index, frame in enumerate(_frames(report)):
        yield labelled("traceback" if index == 0 else "", frame)
    if report.trace:
        yield labelled("trace", f"{report.trace}  (`nexus trace {report.trace}`)")
    yield labelled("program", f"build {crash.digest[:16]}")
    if report.missing:
        yield labelled("missing", report.missing)
    yield labelled("then", crash.action)
    yield labelled("report", f"{crash.report}{'' if report.kept else ', not yet durable'}")


def _frames(report: Report) -> list[str]:
    return [frame for part in report.traceback.splitlines() for frame in part.split(" > ") if frame]


def _earlier_lines(story: Story) -> Iterator[str]:
    """The crashes besides the one that is told whole."""
    assert story.report is not None, "there is one that is told whole"
    others = [each for each in story.crashes if each.report != story.report.crash.report]
    if not others:
        return
    yield ""
    yield f"{len(others)} more on record, `nexus why {story.service} --report N` tells one:"
    for crash in others[-EARLIER_MAX:]:
        yield f"{INDENT}{clock(crash.wall)}  report {crash.report}: {_how(crash)}; {crash.action}"


def cause(report: Report) -> str:
    """Why a task crashed, as far as it can be told, in a sentence."""
    crash = report.crash
    if crash.reason in REASONS:
        return REASONS[crash.reason]
    if report.traceback and report.records:
        return f"an error that nobody expected: {report.records[-1].text}"
    if crash.signal:
        return SIGNALS.get(crash.signal, f"{signal_name(crash.signal)} ended it")
    return f"it ended by itself with code {crash.code}"


def signal_name(number: int) -> str:
    """SIGKILL for 9."""
    return signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"


def _how(crash: Crash) -> str:
    return signal_name(crash.signal) if crash.signal else f"exit code {crash.code}"


def _end_of(record: ServiceRecord) -> str:
    code, number = record.exit_code, record.exit_signal
    how = signal_name(number) if number else f"exit code {code}"
    return f"{how}, {REASONS.get(record.reason, 'by itself')}"


def _when(story: Story) -> str:
    return f"{span((story.system.now - story.record.died) / NANOS)} ago"


def _ran(crash: Crash) -> str:
    return span(crash.duration / NANOS) if crash.duration >= NANOS else _short(crash.duration)


def _short(nanos: int) -> str:
    """A duration below seconds, in ms or in us, to a tenth."""
    micros = max(0, nanos) / 1e3
    return f"{micros:.1f} us" if micros < MILLI else f"{micros / MILLI:.1f} ms"


def _fields(record: Record) -> dict[str, str]:
    return {each.key: each.value for each in record.fields}


# ---------------------------------------------------------------- as JSON


def document(story: Story) -> dict[str, Any]:
    """The story as JSON; times are ns since 1970."""
    record, report = story.record, story.report
    return {
        "service": story.service,
        "state": word(record.state),
        "health": word(record.health),
        "pid": record.pid or None,
        "generation": record.generation,
        "restarts": record.restarts,
        "reason": record.reason,
        "spawn_refused": record.spawn_refused,
        "spawn_reason": SpawnReason(record.spawn_reason).name.lower(),
        "safe_mode": story.system.why if story.system.state is SystemState.SAFE else None,
        "boot": story.system.boots,
        "crashes": [_crash(each) for each in story.crashes],
        "report": None
        if report is None
        else {
            **_crash(report.crash),
            "cause": cause(report),
            "records": report.records,
            "spans": report.spans,
            "traceback": _frames(report),
            "trace": report.trace or None,
            "missing": report.missing or None,
            "kept": report.kept,
        },
        "denials": [
            {"time": each.wall, "record": each.record, **_fields(each)} for each in story.denials
        ],
        "unknown": list(story.unknown),
        "left": list(story.left),
    }


def _crash(crash: Crash) -> dict[str, Any]:
    return {
        "report": crash.report,
        "boot": crash.boot + 1,
        "time": crash.wall,
        "pid": crash.pid,
        "generation": crash.generation,
        "code": crash.code,
        "signal": signal_name(crash.signal) if crash.signal else None,
        "duration_ns": crash.duration,
        "build": crash.digest,
        "reason": crash.reason,
        "action": crash.action,
    }
