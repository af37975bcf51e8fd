"""The evidence behind the rungs about execd: what the kernel itself recorded of the tasks that
execd started, beside what execd, its children and the journal say of them."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

from nexus.abi import Event, EventKind, Nanos, SpawnReason, service_id
from nexus.proof.checks import KILLED, healthy, hex_of, measured
from nexus.proof.trace import FAIL_WORD, Line, Trace
from nexus.proof.verdict import Case, Check, demand, demand_equal
from nexus.protocols.execd import ExecdStatus
from nexus.protocols.ladder import SELFTEST, rung
from nexus.protocols.policyd import Reason, Verdict
from nexus.protocols.testsvc import LAST_LINE
from nexus.services.selftest.exec_rungs import (
    ALTERED,
    CODE,
    COPY,
    CRASH_EVENT,
    EXECD_NAME,
    EXIT0,
    EXIT42,
    HELLO,
    SPAWN_RIGHT,
)
from nexus.services.selftest.policy_rungs import SPOOFED
from nexus.wire import ReplyStatus

MILLISECOND: Final = 1_000_000  # ns
REAP_MARGIN: Final = Nanos(500_000_000)  # ns between an end and its record, on a busy host

Evidence = Mapping[str, Any]


def _id(name: str) -> str:
    """A service's id as evidence shows it."""
    return f"{service_id(name):016x}"


def _spawn_of(trace: Trace, name: str, told: Evidence) -> tuple[int, Event]:
    """Place and event of the start of this instance, which got this pid."""
    found = [
        (at, event)
        for at, event in trace.spawns(name)
        if event.fields["generation"] == told["generation"]
    ]
    demand_equal(len(found), 1, f"starts of {name} generation {told['generation']}")
    demand_equal(found[0][1].pid, told["pid"], f"pid of {name}, by the kernel")
    return found[0]


def _exit_of(trace: Trace, name: str, told: Evidence) -> tuple[int, Event]:
    """Place and event of the end of that instance, by the kernel that reaped it."""
    _ = _spawn_of(trace, name, told)
    return _end_by_kernel(trace, {"name": name, **told})


def _end_by_kernel(trace: Trace, told: Evidence) -> tuple[int, Event]:
    """Place and event of the end of the instance that is told of."""
    who = (told["name"], int(told["generation"]))
    found = [
        (at, event)
        for at, event in trace.of_kind(EventKind.EXIT)
        if (event.fields["name"], event.fields["generation"]) == who
    ]
    demand_equal(len(found), 1, f"ends of {who[0]} generation {who[1]}, by the kernel")
    demand_equal(found[0][1].pid, int(told["pid"]), "pid, by the kernel")
    return found[0]


def _is_of_plan(case: Case, event: Event) -> None:
    """The kernel started what the plan has under this name, which execd starts on demand."""
    planned = case.plan.by_name[str(event.fields["name"])]
    demand_equal(planned.by, EXECD_NAME, f"who starts {planned.name} by the plan")
    demand_equal(event.fields["program"], planned.program, "program")
    demand_equal(event.fields["digest"], planned.program_digest, "program digest")
    demand_equal(hex_of(event.fields["service"]), _id(planned.name), "service id")


def execd_ready(case: Case, trace: Trace, line: Line) -> None:
    """#37: its program table is the plan's, name by name and digest by digest.

    What it answers is told once the whole system is up: where it does not get there another rung is
    red.
    """
    _ = healthy(case, trace, line)
    services = case.plan.services
    planned = {each.name: each.program_digest for each in services if each.by == EXECD_NAME}
    demand(planned, "the plan has no program that execd starts")
    demand_equal(line.evidence["programs"], planned, "program table, as it says itself")
    if any(each.printer == SELFTEST and not FAIL_WORD.search(each.text) for each in trace.lines):
        told = measured(trace, 37)
        demand_equal(sorted(map(tuple, told["programs"])), sorted(planned.items()), "program table")
        demand_equal(told["total"], len(planned), "rows of the program table")


def routing_execd(_case: Case, trace: Trace, line: Line) -> None:
    """#55: init counted one route, and made a link into execd for it and into nobody else."""
    evidence = line.evidence
    demand_equal(evidence["counters"], {"ok": 1}, "growth of init's route counters")
    before = [event for at, event in trace.spawns(EXECD_NAME) if at < line.place]
    demand(before, "the kernel recorded no start of execd before the line")
    demand_equal(evidence["generation"], before[-1].fields["generation"], "generation of execd")
    since = max(
        (
            each.place
            for each in trace.lines
            if each.printer == SELFTEST and each.place < line.place
        ),
        default=0,
    )
    owners = {
        str(event.fields["owner"])
        for at, event in trace.of_kind(EventKind.LINK)
        if since < at < line.place
    }
    demand(
        EXECD_NAME in owners, f"the kernel made links into {owners} since the client's last line"
    )
    demand(owners <= {EXECD_NAME, SELFTEST}, f"the kernel made links into {owners}")


# ---------------------------------------------------------------- starts


def elf_loaded(case: Case, trace: Trace, line: Line) -> None:
    """#84: the kernel started demo.hello with the digest of the plan; the program whose file had
    one byte changed it did not start at all."""
    told = measured(trace, 84)
    demand_equal(told["altered"], ALTERED, "the program with one byte changed")
    demand_equal(told["refused"], ExecdStatus.BAD_DIGEST.name, "EXEC of that program")
    client = _line_of(trace, 84)
    started = [event.pid for at, event in trace.spawns(ALTERED) if at < client.place]
    demand_equal(started, [], f"starts of {ALTERED}")
    demand_equal(line.evidence["program"], HELLO, "program that execd took")
    demand_equal(
        line.evidence["digest"],
        case.plan.by_name[HELLO].program_digest,
        "digest that execd checked",
    )
    at, event = _spawn_of(trace, HELLO, told)
    _is_of_plan(case, event)
    demand(at < client.place, f"{HELLO} was started after execd's answer")


def _line_of(trace: Trace, number: int) -> Line:
    """The client's own line about what it measured for a rung."""
    text = f"{SELFTEST}: measured #{number}"
    return next(each for each in trace.lines if (each.printer, each.text) == (SELFTEST, text))


def _printed_itself(case: Case, trace: Trace, line: Line, number: int, name: str) -> Evidence:
    """The stamped sender of the line is the pid that execd answered, and the task that the kernel
    started under this name; what the client measured."""
    told = measured(trace, number)
    demand_equal((line.printer, line.pid), (name, told["pid"]), "printer and its stamped pid")
    demand_equal(line.generation, told["generation"], "generation of the printer")
    at, event = _spawn_of(trace, name, told)
    _is_of_plan(case, event)
    demand(at < line.place, f"{name} was started after its line")
    return told


def child_hello(case: Case, trace: Trace, line: Line) -> None:
    """#85: the program itself printed it, and it is execd's child in init's task list."""
    told = _printed_itself(case, trace, line, 85, HELLO)
    demand_equal(told["row"], [told["pid"], told["generation"]], "its row in the task list")


def exec_elf(_case: Case, trace: Trace, line: Line) -> None:
    """#86: the child that answered is the one that the kernel started and, told to, ended."""
    evidence = line.evidence
    demand_equal(evidence["stamped"], evidence["pid"], "pid that came back from the kernel")
    started, _ = _spawn_of(trace, HELLO, evidence)
    ended, end = _exit_of(trace, HELLO, evidence)
    demand(_line_of(trace, 85).place < started, "it was started for another rung")
    demand(ended < line.place, "it was not ended")
    demand_equal(end.fields["signal"], KILLED, "how it ended, having answered")


# ---------------------------------------------------------------- ends


def child_exit0(case: Case, trace: Trace, line: Line) -> None:
    """#87: as #85, for demo.exit0."""
    _ = _printed_itself(case, trace, line, 87, EXIT0)


def child_exited(_case: Case, trace: Trace, line: Line) -> None:
    """#88: what the line says is the end that the kernel had recorded before; and while execd
    waited for another child it served another client."""
    values = values_of(line.text)
    at, event = _end_by_kernel(trace, values)
    demand(at < line.place, "the kernel recorded the end after the line")
    demand_equal(values["code"], str(event.fields["code"]), "code on the line")
    of_exit0 = [
        each for each in _said_by_execd(trace, EXITED) if _is_first(values_of(each.text), EXIT0)
    ]
    demand_equal(len(of_exit0), 1, f"lines about the end of {EXIT0}")
    if line == of_exit0[0]:
        _exit0_reaped(trace, line, values)


def _exit0_reaped(trace: Trace, line: Line, values: Mapping[str, str]) -> None:
    told, started = measured(trace, 88), measured(trace, 87)
    demand_equal(told["code"], 0, "code that WAIT gave")
    wanted = [str(started["pid"]), str(started["generation"])]
    demand_equal([str(told["pid"]), str(told["generation"])], wanted, "child that WAIT gave")
    demand_equal([values["pid"], values["generation"]], wanted, "child on the line")
    demand(_own_line(trace, EXIT0).place < line.place, f"{EXIT0} had not begun")
    demand_equal(told["served"], int(ReplyStatus.OK), "what the other client was answered")
    running, killed, signal, generation = told["waited_for"]
    demand_equal([running, signal], [killed, KILLED], "the child that execd waited for meanwhile")
    ended, event = _exit_of(trace, HELLO, {"pid": killed, "generation": generation})
    demand_equal(event.fields["signal"], KILLED, "how that child ended")
    demand(line.place < ended < _line_of(trace, 88).place, "execd did not wait for it")


def _is_first(values: Mapping[str, str], name: str) -> bool:
    """Whether a line is about the first instance of this program."""
    return (values["name"], values["generation"]) == (name, "1")


def _own_line(trace: Trace, name: str) -> Line:
    """The first line that a child printed itself."""
    lines = [each for each in trace.lines if each.printer == name]
    demand(lines, f"{name} has printed nothing")
    return lines[0]


def values_of(text: str) -> dict[str, str]:
    """The `name=value` words of a line."""
    return dict(word.split("=", 1) for word in text.split() if "=" in word)


def child_exit(_case: Case, trace: Trace, line: Line) -> None:
    """#89: WAIT gave the pid and the code of the end that the kernel recorded, and nothing of a pid
    that nobody has."""
    evidence = line.evidence
    _, event = _exit_of(trace, EXIT0, evidence)
    demand_equal(evidence["pid"], measured(trace, 87)["pid"], "pid")
    demand_equal((evidence["code"], event.fields["code"]), (0, 0), "code, by WAIT and the kernel")
    demand_equal(event.fields["signal"], 0, "signal, by the kernel")
    demand_equal(evidence["unknown"], ExecdStatus.NOT_FOUND.name, "WAIT for nobody's pid")


def child_exit42(case: Case, trace: Trace, line: Line) -> None:
    """#90: as #85, for demo.exit42."""
    _ = _printed_itself(case, trace, line, 90, EXIT42)


def crash_line(_case: Case, trace: Trace, line: Line) -> None:
    """#91: what the line says is the end that the kernel recorded; and a report of the same child
    by somebody who is not its parent was refused and changed nothing."""
    values = values_of(line.text)
    at, event = _end_by_kernel(trace, values)
    demand(at < line.place, "the kernel recorded the end after the line")
    demand_equal(values["code"], str(event.fields["code"]), "code on the line")
    demand_equal(values.get("signal", "0"), str(event.fields["signal"]), "signal on the line")
    told = measured(trace, 91)
    crashes = [
        each for each in _said_by_execd(trace, CRASHED) if _is_first(values_of(each.text), EXIT42)
    ]
    demand_equal(len(crashes), 1, f"crash lines of {EXIT42}")
    demand(_own_line(trace, EXIT42).place < crashes[0].place, f"{EXIT42} had not begun")
    crash = values_of(crashes[0].text)
    wanted = {"pid": str(told["pid"]), "generation": str(told["generation"]), "code": str(CODE)}
    demand_equal({name: crash[name] for name in wanted}, wanted, f"the crash line of {EXIT42}")
    demand_equal(told["code"], CODE, "code that WAIT gave")
    demand_equal(told["forged"], ReplyStatus.DENIED.name, "a report by the client")
    demand_equal(told["reports"], [[told["report"]]] * 2, "reports before and after it")


EXITED: Final = rung(88).marker
CRASHED: Final = rung(91).marker


def _said_by_execd(trace: Trace, text: str) -> list[Line]:
    """The lines of execd that begin so."""
    return [
        line for line in trace.lines if line.printer == EXECD_NAME and line.text.startswith(text)
    ]


def crash_report(case: Case, trace: Trace, line: Line) -> None:
    """#92: the record is execd's, and says of that very task what the kernel and the plan say."""
    evidence = line.evidence
    fields = evidence["fields"]
    pid = int(fields["pid"])
    demand_equal(evidence["service"], _id(EXECD_NAME), "sender of the record")
    demand_equal(pid, measured(trace, 91)["pid"], "pid of the child that crashed")
    who = {"pid": pid, "generation": evidence["generation"]}
    _, started = _spawn_of(trace, EXIT42, who)
    ended, event = _exit_of(trace, EXIT42, who)
    demand(ended < line.place, "the record was read before the child had ended")
    digest = case.plan.by_name[EXIT42].program_digest
    wanted = {
        "event": CRASH_EVENT,
        "code": str(event.fields["code"]),
        "signal": str(event.fields["signal"]),
        "name": EXIT42,
    }
    demand_equal({name: fields.get(name) for name in wanted}, wanted, "the record")
    demand_equal(event.fields["code"], CODE, "code, by the kernel")
    build = fields["build"]
    demand(len(build) >= BUILD_DIGITS and digest.startswith(build), f"build id {build!r}")
    demand_equal(evidence["digest"], digest, "digest in the report")
    lived = event.time - started.time
    for what, found in (
        ("record", int(fields["duration_ms"]) * MILLISECOND),
        ("report", evidence["duration"]),
    ):
        demand(
            abs(found - lived) <= REAP_MARGIN, f"it lived {lived} ns, the {what} says {found} ns"
        )
    demand(evidence["record"] > 0, "the record has no id")


BUILD_DIGITS: Final = 12  # hexadecimal digits of a digest that name a build


def exec_denied(case: Case, trace: Trace, line: Line) -> None:
    """#93: the audit blames an identity, init's record knows denied-by-policy, and the kernel was
    asked for no start at all since the client's line before."""
    evidence = line.evidence
    demand_equal(evidence["reason"], int(SpawnReason.DENIED_BY_POLICY), "spawn_last_error")
    demand_equal(evidence["live"][1], evidence["live"][0], "live tasks")
    fields = evidence["fields"]
    wanted = {
        "decision": Verdict.DENY.name.lower(),
        "reason": Reason.IDENTITY.name.lower(),
        "action": SPAWN_RIGHT,
    }
    demand_equal({name: fields.get(name) for name in wanted}, wanted, "the audit record")
    demand(evidence["service"] in {_id("policyd"), _id(EXECD_NAME)}, "sender of the audit record")
    demand(SPOOFED in case.plan.by_name, f"{SPOOFED} is not in this system")
    since = max(each.place for each in trace.lines if _earlier_of_client(each, line))
    starts = [
        event.fields["name"]
        for kind in (EventKind.SPAWN, EventKind.SPAWN_FAILED)
        for at, event in trace.of_kind(kind)
        if since < at < line.place
    ]
    demand_equal(starts, [], "starts that the kernel was asked for")


def _earlier_of_client(each: Line, line: Line) -> bool:
    return each.printer == SELFTEST and each.place < line.place


def execd_malformed(case: Case, trace: Trace, line: Line) -> None:
    """#94: since the client's line before the kernel started one child, that of the next EXEC."""
    pid, generation = line.evidence["next"]
    since = max(each.place for each in trace.lines if _earlier_of_client(each, line))
    starts = [event for at, event in trace.of_kind(EventKind.SPAWN) if since < at < line.place]
    found = [(event.fields["name"], event.pid) for event in starts]
    demand_equal(found, [(HELLO, pid)], "starts since the malformed request")
    _is_of_plan(case, starts[0])
    demand_equal(starts[0].fields["generation"], generation, "generation of the next child")


# ---------------------------------------------------------------- last words


def last_words(_case: Case, trace: Trace, line: Line) -> None:
    """#129: the runner killed each copy when it had written its last words; they stand in its
    report, and at least once logd found them in the ring of a task that had been killed already."""
    copies = line.evidence["copies"]
    demand(copies, "no copy was killed")
    demand_equal(len({each["token"] for each in copies}), len(copies), "different tokens")
    late = [_last_words(trace, line, each) for each in copies]
    demand(any(late), "logd had every line before its writer was killed")


def _last_words(trace: Trace, line: Line, told: Evidence) -> bool:
    """What is told of one copy is so; whether its words were read after it was killed."""
    report, pid = told["report"], told["pid"]
    started, spawn = _spawn_of(trace, COPY, told)
    ended, event = _exit_of(trace, COPY, told)
    demand(started < ended < line.place, "the report was read before the death")
    demand_equal(event.fields["signal"], KILLED, "how it died, by the kernel")
    demand_equal(
        (report["pid"], report["signal"], report["name"]), (pid, KILLED, COPY), "the crash report"
    )
    last = [
        each
        for each in trace.lines
        if (each.printer, each.text, each.generation) == (COPY, LAST_LINE, told["generation"])
    ]
    demand_equal(len(last), 1, f"last lines of generation {told['generation']}")
    demand(last[0].place < ended, "its last line came after its death")
    demand_equal(told["service"], _id(COPY), "whose the record is")
    demand(report["last"].endswith(told["token"]), f"the last record: {report['last']!r}")
    written = told["written"]  # a message does not say that; what came by a ring does
    demand(spawn.time < written <= last[0].time, f"written at {written}, killed at {last[0].time}")
    taken: int = told["taken"]
    return taken > last[0].time


CHECKS: Final[Mapping[int, Check]] = MappingProxyType(
    {
        37: execd_ready,
        55: routing_execd,
        84: elf_loaded,
        85: child_hello,
        86: exec_elf,
        87: child_exit0,
        88: child_exited,
        89: child_exit,
        90: child_exit42,
        91: crash_line,
        92: crash_report,
        93: exec_denied,
        94: execd_malformed,
        129: last_words,
    }
)
