"""The independent evidence behind every line of init, the kernel and the services.

Each check recomputes a claim in the runner's process from what came with the line, from the
kernel's events around it, and from the plan made here from the same system file. A line without
a check is red (nexus.proof.verdict), so a statement alone never passes.
"""

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

import msgspec

from nexus.abi import (
    ENDPOINTS_PER_OWNER_MAX,
    HEAP_SIZE,
    INIT_NAME,
    SLOTS_MAX,
    Event,
    EventKind,
    Isolation,
    QosClass,
    SpawnReason,
    service_id,
)
from nexus.init.grants import wanted_by
from nexus.init.plan import PlannedLink, PlannedService
from nexus.proof.expected import is_bad
from nexus.proof.trace import Line, Trace
from nexus.proof.verdict import Case, Check, Mismatch, demand, demand_equal
from nexus.proof.walls import disagreements, rows_of, unfounded
from nexus.protocols.ladder import KERNEL, SELFTEST, Ground, rung
from nexus.services.logd.config import Settings as LogdSettings

SENTINEL_CYCLES: Final = 64  # spawn and exit cycles of #2
QUEUE_CAPACITY: Final = 64  # entries of a class queue (core.md 1.1)
COUNTERFACTUAL_TICKS: Final = 200_000  # ladder #41
CPUS_POSSIBLE: Final = 4
REASONS: Final = (
    SpawnReason.OOM,
    SpawnReason.CAP_TABLE_FULL,
    SpawnReason.ENDPOINT_QUOTA,
    SpawnReason.MAP_FAILED,
    SpawnReason.INVALID_PAYLOAD,
)
Evidence = Mapping[str, Any]


def _before(trace: Trace, line: Line, kind: EventKind) -> list[Event]:
    return [event for at, event in trace.of_kind(kind) if at < line.place]


# ---------------------------------------------------------------- the kernel's self-test


def spawn_reasons(_case: Case, _trace: Trace, line: Line) -> None:
    """#1: each of the five reasons came from a refused spawn, was told once, left no task."""
    demand_equal(set(line.evidence), {reason.name.lower() for reason in REASONS}, "reasons")
    for reason in REASONS:
        told = line.evidence[reason.name.lower()]
        demand_equal(told["code"], int(reason), f"code of {reason.name}")
        demand_equal(told["again"], 0, f"{reason.name} read again")
        demand_equal(told["tasks_after"], told["tasks"], f"tasks after {reason.name}")


def resource_sentinel(case: Case, _trace: Trace, line: Line) -> None:
    """#2: both tables were really full, and after 64 cycles every counter is back."""
    evidence = line.evidence
    demand_equal(evidence["slots"], SLOTS_MAX, "slots at the first NoSpace")
    demand_equal(evidence["endpoints"], ENDPOINTS_PER_OWNER_MAX, "endpoints at the first NoSpace")
    demand(evidence["cycles"] >= SENTINEL_CYCLES, f"only {evidence['cycles']} cycles")
    counters = {"slots", "endpoints", "queued_size", "tasks"}
    if case.scope.ground is not Ground.SIM:
        counters |= {"descriptors", "children"}
    missing = counters - evidence["before"].keys()
    demand(not missing, f"not counted: {sorted(missing)}")
    demand_equal(evidence["after"], evidence["before"], "counters afterwards")


def heap_report(case: Case, _trace: Trace, line: Line) -> None:
    """#3: the report adds up, is the sum over the live objects, and names the request."""
    evidence = line.evidence
    used, free, total = (evidence[f"heap_budget_{part}"] for part in ("used", "free", "total"))
    demand_equal(used + free, total, "used + free")
    demand_equal(used, evidence["audited"], "used, against the sum over the live objects")
    demand_equal(evidence["size"], evidence["request"], "size in the report")
    align = evidence["align"]
    demand(align > 0 and align & (align - 1) == 0, f"alignment {align} is no power of two")
    demand(evidence["request"] > free, "the request would have fitted")
    demand(0 < evidence["granted"] < evidence["request"], "no smaller request succeeded")
    if case.scope.ground is Ground.SIM:
        demand_equal(total, HEAP_SIZE, "size of the kernel heap")


def qos_rollback(_case: Case, _trace: Trace, line: Line) -> None:
    """#4: refused, and the task is where it was."""
    evidence = line.evidence
    demand_equal(evidence["status"], "QUEUE_FULL", "set_task_qos")
    demand_equal(evidence["interactive"], QUEUE_CAPACITY, "entries of Interactive")
    demand_equal(evidence["class_before"], int(QosClass.NORMAL), "class before")
    demand_equal(evidence["class_after"], int(QosClass.NORMAL), "class afterwards")
    order, index = evidence["order_before"], evidence["index"]
    demand(0 < index < len(order) - 1, f"index {index} is not the middle of {len(order)} tasks")
    demand_equal(evidence["index_after"], index, "index afterwards")
    demand_equal(evidence["order_after"], order, "order of Normal afterwards")


# ---------------------------------------------------------------- several CPUs


def _growth(evidence: Evidence, since: str, until: str) -> list[int]:
    """How much request, sent, taken and acknowledged grew between two readings."""
    pairs = zip(evidence[since], evidence[until], strict=True)
    return [after - before for before, after in pairs]


def cpu_online(case: Case, trace: Trace, _line: Line) -> None:
    """#39: one line per further CPU, and each one's own tick counter grew; of a machine QEMU says
    how many it has."""
    if case.scope.ground is Ground.VM:
        counts = [note.get("answer") for note in trace.notes if note.get("host") == "cpus"]
        demand_equal(counts, [case.scope.smp], "CPUs of the machine, by QEMU")
    lines = [each for each in trace.lines if each.printer == KERNEL]
    online = [each for each in lines if each.text.startswith("KINIT: cpu")]
    texts = [each.text for each in online if each.text != "KINIT: cpu0 online"]
    expected = [f"KINIT: cpu{cpu} online" for cpu in range(1, case.scope.smp)]
    demand_equal(sorted(texts), expected, "lines of further CPUs")
    for each in online:
        demand_equal(f"KINIT: cpu{each.evidence['cpu']} online", each.text, "CPU of the evidence")
        before, after = each.evidence["ticks_before"], each.evidence["ticks"]
        demand(after > before, f"{each.text}: ticks went from {before} to {after}")


def smp_online(case: Case, _trace: Trace, line: Line) -> None:
    """#40: the mask holds every CPU, and another CPU than 0 read it; in a machine, each task that
    was placed on a CPU ran there, by Linux's account."""
    smp = case.scope.smp
    demand_equal(line.evidence["mask"], (1 << smp) - 1, "online mask")
    if case.scope.ground is Ground.SIM:
        demand(1 <= line.evidence["read_on_cpu"] < smp, "it was read on CPU 0")
        return
    placed = {str(cpu): cpu for cpu in range(smp)}
    demand_equal(line.evidence["placed"], placed, "where placed tasks ran")


def counterfactual(_case: Case, _trace: Trace, line: Line) -> None:
    """#41: a request whose send fails is counted as a request and as nothing else."""
    demand_equal(_growth(line.evidence, "before", "after"), [1, 0, 0, 0], "growth")
    demand(line.evidence["ticks"] >= COUNTERFACTUAL_TICKS, "it was not watched for long enough")


def resched(case: Case, _trace: Trace, line: Line) -> None:
    """#42: requested and sent when it was asked for, taken and acknowledged by the target; in a
    machine, both CPUs were interrupted by calls between them, and more often than at rest."""
    evidence = line.evidence
    if case.scope.ground is Ground.SIM:
        demand_equal(_growth(evidence, "before", "asked"), [1, 1, 0, 0], "growth at the sender")
        demand_equal(_growth(evidence, "asked", "after"), [0, 0, 1, 1], "growth at the target")
        demand(evidence["target"] != 0, "the asking CPU took its own request")
        return
    demand(evidence["calls"] >= RESCHED_CALLS, f"{evidence['calls']} calls are too few")
    demand_equal(evidence["cpus"], [0, 1], "CPUs that called each other")
    for cpu in evidence["cpus"]:
        before, after, rested = (evidence[when][cpu] for when in ("before", "after", "rested"))
        demand(after - before > rested - after, f"CPU {cpu}: {before}, {after}, at rest {rested}")


def reject_target(_case: Case, _trace: Trace, line: Line) -> None:
    """#43: there is no CPU 4."""
    demand_equal(line.evidence["cpu"], CPUS_POSSIBLE, "target")
    demand_equal(line.evidence["status"], "INVALID_ARGUMENT", "status")
    demand_equal(line.evidence["after"], line.evidence["before"], "counters afterwards")


def reject_offline(_case: Case, _trace: Trace, line: Line) -> None:
    """#44: a CPU that is not online is asked for nothing."""
    target = line.evidence["cpu"]
    demand(0 <= target < CPUS_POSSIBLE, f"there is no CPU {target}")
    demand(not line.evidence["online"] >> target & 1, f"CPU {target} is online")
    demand(line.evidence["status"] not in {"OK", ""}, "it was not refused")
    demand_equal(line.evidence["after"], line.evidence["before"], "counters afterwards")


def work_stealing(_case: Case, _trace: Trace, line: Line) -> None:
    """#45: queued on CPU 1, run on CPU 0, counted once."""
    evidence = line.evidence
    demand_equal(evidence["steals"], 1, "steals counted")
    demand_equal((evidence["queued_on"], evidence["ran_on"]), (1, 0), "CPUs")


def steal_bound(_case: Case, _trace: Trace, line: Line) -> None:
    """#46: one task per tick."""
    demand_equal((line.evidence["queued"], line.evidence["left"]), (2, 1), "tasks queued, left")


def steal_class(_case: Case, _trace: Trace, line: Line) -> None:
    """#47: nothing above the thief's class moves."""
    evidence = line.evidence
    demand(evidence["queued"] > 0, "the victim had no task")
    demand_equal(evidence["left"], evidence["queued"], "tasks left to the victim")
    demand_equal(evidence["stolen"], 0, "steals counted")
    demand(evidence["qos"] > evidence["limit"], "the victim's tasks are not above the limit")
    demand_equal(evidence["limit"], int(QosClass.NORMAL), "class of the thief")


# ---------------------------------------------------------------- init


def plan_started(case: Case, _trace: Trace, line: Line) -> None:
    """#5: init runs on the plan that `nexus check` computes from the same file."""
    demand_equal(line.evidence["digest"], case.plan.digest, "plan digest")
    demand_equal(line.evidence["services"], len(case.plan.services), "service count")


def _planned(case: Case, line: Line) -> PlannedService:
    return case.plan.by_name[line.text.rpartition(" ")[2]]


def _first_spawn(trace: Trace, name: str) -> tuple[int, Event]:
    spawns = trace.spawns(name)
    demand(spawns, f"the kernel recorded no start of {name}")
    return spawns[0]


def service_started(case: Case, trace: Trace, line: Line) -> None:
    """#6 and alike: the kernel's spawn of this name follows, with the program of the plan."""
    service = _planned(case, line)
    at, event = _first_spawn(trace, service.name)
    demand(at > line.place, f"{service.name} was started before the line")
    until = _next_start(trace, line, service)
    first = [start for start, _ in trace.spawns(service.name) if start < until]
    demand_equal(len(first), 1, f"starts of {service.name} up to the next line of this kind")
    demand_equal(event.fields["program"], service.program, "program")
    demand_equal(event.fields["digest"], service.program_digest, "program digest")
    demand_equal(event.fields["generation"], 1, "generation")


def _next_start(trace: Trace, line: Line, service: PlannedService) -> int:
    """Where the next `init: start X` or `init: restart X` stands, or the end of the stream. A task
    in an interpreter of its own is there only once that has imported it, when others were started
    meanwhile: its next start is what counts."""
    own = service.grants.isolation is Isolation.EXEC
    starts = (f"init: start {service.name}", f"init: restart {service.name}")
    places = (
        each.place
        for each in trace.lines
        if each.place > line.place
        and each.printer == INIT_NAME
        and (each.text in starts if own else each.text.startswith(STARTS))
    )
    return next(places, len(trace.events))


STARTS: Final = ("init: start ", "init: restart ")


def service_up(case: Case, trace: Trace, line: Line) -> None:
    """#7 and alike: what init published is what the kernel started, and its echo came back."""
    service = _planned(case, line)
    at, event = _first_spawn(trace, service.name)
    evidence = line.evidence
    demand(at < line.place, f"{service.name} was started after the line")
    demand_equal(evidence["pid"], event.pid, "pid")
    demand_equal(evidence["generation"], event.fields["generation"], "generation")
    identity = f"{service_id(service.name):016x}"
    demand_equal(hex_of(evidence["service"]), identity, "service id in the identity table")
    demand_equal(hex_of(event.fields["service"]), identity, "service id in the spawn record")
    demand(evidence["echo_nonce"], "no nonce came back over the control link")
    for stated in _ready_lines(trace, service.name, event.pid):
        demand_equal(evidence["echo_nonce"], stated.evidence["echoed"], "nonce the service echoed")


def _ready_lines(trace: Trace, name: str, pid: int) -> list[Line]:
    """What the service itself says of its start: which nonce of init's it answered. It says so
    when it is ready, which a run that is cut or fails before does not see."""
    ready = f"{name}: ready"  # and for some what it stands on, in brackets
    return [line for line in trace.lines if line.pid == pid and line.text.split(" (")[0] == ready]


def hex_of(value: object) -> str:
    """An identity as sixteen digits, from a number or from any way to write one."""
    return f"{value:016x}" if isinstance(value, int) else str(value).removeprefix("0x").zfill(16)


def system_ready(case: Case, trace: Trace, line: Line) -> None:
    """#29: the links that exist are those of the plan, one by one, and the kernel made them. What
    starts on demand has none yet."""
    links = [link for link in case.plan.links if _starts_at_boot(case, link)]
    planned = sorted(_terms(link) for link in links)
    existing = sorted(tuple(row[:5]) for row in line.evidence["links"])
    demand_equal(existing, planned, "links that exist")
    for row in line.evidence["links"]:
        starts = [len(_started_before(trace, line, name)) for name in row[:2]]
        demand_equal(row[5:], starts, f"generations of the link from {row[0]} to {row[1]}")
    wanted_grants = [
        [service.name, *wanted, "allow"]
        for service in case.plan.services
        if not service.by
        for wanted in wanted_by(service)
    ]
    demand_equal(line.evidence["grants"], wanted_grants, "grants and their decisions")
    made = [
        (str(event.fields["owner"]), int(event.fields["depth"]), int(event.fields["size"]))  # type: ignore[call-overload]
        for event in _before(trace, line, EventKind.LINK)
    ]
    wanted = [(link.server, link.depth, link.size) for link in links]
    absent = _without(wanted, made)
    demand(not absent, f"the kernel made no link into {absent}")


def _starts_at_boot(case: Case, link: PlannedLink) -> bool:
    return not any(case.plan.by_name[name].by for name in (link.client, link.server))


def _started_before(trace: Trace, line: Line, name: str) -> list[Event]:
    """The instances of a service that the kernel started up to this line."""
    return [event for at, event in trace.spawns(name) if at < line.place]


def _terms(link: PlannedLink) -> tuple[str, str, int, int, int]:
    return (link.client, link.server, link.depth, link.size, link.delegations)


def _without(wanted: Sequence[tuple[Any, ...]], found: Iterable[tuple[Any, ...]]) -> list[Any]:
    """What of `wanted` is not in `found`, each as often as it is wanted."""
    rest = list(wanted)
    for item in found:
        if item in rest:
            rest.remove(item)
    return rest


# ---------------------------------------------------------------- services


def healthy(case: Case, trace: Trace, line: Line) -> Mapping[str, int]:
    """That init's probe was answered by this instance in time, with its nonce; its facts."""
    name = line.printer
    _, event = _first_spawn(trace, name)
    demand_equal(line.pid, event.pid, "pid of the printer")
    deadline = event.time + case.plan.by_name[name].health_deadline
    demand(line.time <= deadline, "printed after the readiness deadline")
    probe = of_init(trace, f"init: health {name} ok")
    if probe is None:
        raise Mismatch(f"init got no answer to its health probe of {name}")
    demand_equal(probe.evidence["generation"], line.generation, "generation in init's record")
    demand(probe.evidence["nonce"], "no nonce came back with the answer")
    demand(probe.time <= deadline, "answered after the readiness deadline")
    facts: Mapping[str, int] = probe.evidence["facts"]
    return facts


def policyd_ready(case: Case, trace: Trace, line: Line) -> None:
    """#8: its policy is the one that the policy files make here."""
    facts = healthy(case, trace, line)
    wanted = int(case.plan.policy.digest[:DIGEST_DIGITS], 16)
    demand_equal(facts["policy_digest"], wanted, "first digits of the policy's digest")


def logd_ready(case: Case, trace: Trace, line: Line) -> None:
    """#30: its journal is as large as the system file says, or else as logd's settings do."""
    facts = healthy(case, trace, line)
    settings = msgspec.convert(dict(case.plan.by_name[line.printer].settings), LogdSettings)
    demand_equal(facts["capacity_records"], settings.records, "capacity_records")
    demand_equal(facts["capacity_size"], settings.size_bytes, "capacity_size")


def timed_ready(case: Case, trace: Trace, line: Line) -> None:
    """#32: it holds no timer."""
    demand_equal(healthy(case, trace, line)["timers"], 0, "live timers")


DIGEST_DIGITS: Final = 15  # hexadecimal digits that a fact has room for


def of_init(trace: Trace, text: str) -> Line | None:
    """The first line of init with this text."""
    lines = (each for each in trace.lines if each.printer == INIT_NAME and each.text == text)
    return next(lines, None)


def fires_exactly(case: Case, _trace: Trace, line: Line) -> None:
    """#60: in simulated time a wait ends at its deadline; what follows is the wake-up's cost."""
    if case.scope.ground is Ground.SIM:
        late = max(map(max, line.evidence["late_ns"]))
        demand(late <= WAKE_COST_MAX, f"a wait ended {late} ns after its deadline")


RESCHED_CALLS: Final = 1000  # of ladder #42 in a machine
WAKE_COST_MAX: Final = 50_000  # ns; two resumes of the cost model


# ---------------------------------------------------------------- policy


def mmio_policy_deny(_case: Case, trace: Trace, line: Line) -> None:
    """#48: DENY for reason policy, in time, counted by policyd, and before any grant."""
    evidence = line.evidence
    wanted = {
        "decision": "deny",
        "reason": "policy",
        "subject": "timed",
        "right": "device.mmio.blk",
        "target": "window blk",
        "grants": 0,
    }
    demand_equal({name: evidence[name] for name in wanted}, wanted, "the decision")
    demand(evidence["nonce"], "no nonce came back with the decision")
    demand(0 < evidence["took_ns"] <= MMIO_ANSWER_MAX, f"it took {evidence['took_ns']} ns")
    growth = evidence["denied_after"] - evidence["denied_before"]
    demand_equal(growth, 1, "growth of policyd's deny counter")
    ready = of_init(trace, "init: ready")
    demand(ready is None or line.place < ready.place, "asked after the grants were made")


MMIO_ANSWER_MAX: Final = 1_000_000_000  # ns; ladder #48


# ---------------------------------------------------------------- hangs and escapes


def sandbox_escape(case: Case, trace: Trace, line: Line) -> None:
    """#95: what init read of that very process from outside, and of every other one, is what
    `nexus doctor` says of this machine. What the doctor calls absent is in the evidence of nobody,
    and is not claimed."""
    pid = line.evidence["pid"]
    spawns = [event for _, event in trace.spawns("demo.testsvc") if event.pid == pid]
    demand_equal(len(spawns), 1, f"starts of the attacker, pid {pid}")
    outside: Any = spawns[0].fields["outside"]
    demand(outside, "init saw nothing of the attacker from outside")
    starts = [
        event.fields for _, event in trace.of_kind(EventKind.SPAWN) if event.fields.get("outside")
    ]
    _founded(95, case)
    wrong = disagreements(rows_of(case.scope.ground), starts)
    more = f", and {len(wrong) - DISAGREEMENTS_TOLD} more" if wrong[DISAGREEMENTS_TOLD:] else ""
    demand(not wrong, f"{'; '.join(wrong[:DISAGREEMENTS_TOLD])}{more}")
    if outside["descriptors"] is not None:
        demand_equal(outside["descriptors"], outside["granted"], "descriptors, seen outside")


DISAGREEMENTS_TOLD: Final = 4  # of one each start and step, some hundred


def forged_identity(case: Case, _trace: Trace, _line: Line) -> None:
    """#63: who a message is from is Linux's to say, and the doctor says that it does."""
    _founded(63, case)


def _founded(number: int, case: Case) -> None:
    if case.scope.ground is not Ground.SIM:
        wrong = unfounded(number, rows_of(case.scope.ground))
        demand(not wrong, "; ".join(wrong))


def watchdog_restart(case: Case, trace: Trace, line: Line) -> None:
    """#96: init's own lines say why and when, the kernel's events that it was a kill."""
    name = "demo.testsvc"
    service = case.plan.by_name[name]
    new = line.evidence["generation"]
    ends = [
        each
        for each in trace.lines
        if each.printer == INIT_NAME
        and each.text == f"init: end of {name}"
        and each.evidence["generation"] == new - 1
    ]
    demand_equal(len(ends), 1, f"ends of the instance before generation {new}")
    (end,) = ends
    demand_equal(end.evidence["reason"], "hang", "reason in init's record")
    demand_equal(end.evidence["signal"], KILLED, "signal of the end")
    declared = service.probe_every + service.probe_answer * service.probe_misses
    demand(
        line.evidence["noticed_ns"] <= declared + NOTICE_MARGIN,
        f"noticed after {line.evidence['noticed_ns']} ns, declared are {declared}",
    )
    started = [event.time for _, event in trace.spawns(name) if event.fields["generation"] == new]
    demand_equal(len(started), 1, f"starts of generation {new}")
    since = started[0] - end.evidence["died"]
    demand(since >= service.backoff, f"restarted {since} ns after its death, before its back-off")
    if {"policyd", "logd"} <= case.plan.by_name.keys():
        _page_of_policyd(case, trace, line.evidence["policyd"])


def _page_of_policyd(case: Case, trace: Trace, evidence: Evidence) -> None:
    """One generation for its death, which was a kill, and one for the next one's health."""
    new = evidence["generation"]
    before, down, up = evidence["pages"]
    raised = before[0] < down[0] <= up[0] and before[0] + 2 <= up[0]
    demand(raised, f"generations of the page: {evidence['pages']}")
    demand_equal([before[1], up[1]], [True, True], "policyd answers before and afterwards")
    old = [start for start in trace.spawns("policyd") if start[1].fields["generation"] == new - 1]
    demand_equal(len(old), 1, f"starts of policyd's generation {new - 1}")
    ((started, instance),) = old
    exits = trace.of_kind(EventKind.EXIT)
    ends = [event for at, event in exits if at > started and event.pid == instance.pid]
    demand(ends, "that instance has not ended")  # and another may have had its pid since
    demand_equal(ends[0].fields["signal"], KILLED, "how that instance ended")
    if case.scope.ground is Ground.SIM:  # where nothing else takes the time
        demand_equal(down[1], False, "the page while there is no policyd")
        demand(evidence["denied"], "nobody was denied while there was no policyd")


NOTICE_MARGIN: Final = (
    500_000_000  # ns; a kill, its reaping and the ladder's looking, on a busy host
)
KILLED: Final = 9


# ---------------------------------------------------------------- the journal


def measured(trace: Trace, number: int) -> Evidence:
    """What selftest-client measured for a rung that logd prints."""
    text = f"{SELFTEST}: measured #{number}"
    lines = [line for line in trace.lines if line.printer == SELFTEST and line.text == text]
    demand_equal(len(lines), 1, f"lines of {SELFTEST} about #{number}")
    return lines[0].evidence


def rejection(line: Line, reason: str) -> None:
    """The service's own line says that it refused the client for this reason."""
    demand_equal(line.evidence["reason"], reason, "reason")
    sender = f"{service_id(SELFTEST):016x}"
    demand_equal(hex_of(line.evidence["sender"]), sender, "sender whose message was refused")


def reject_invalid_args(_case: Case, trace: Trace, line: Line) -> None:
    """#111: the client holds the status, its row of STATS grew by one, no id was used."""
    rejection(line, "invalid_args")
    found = measured(trace, 111)
    demand_equal([found["status"], found["again"]], ["INVALID_ARGS"] * 2, "statuses")
    demand_equal(found["growth"], _growth_of(invalid_args=1), "growth of its row in STATS")
    demand_equal(found["ids"], 0, "record ids that the refused message used")


def reject_over_limit(_case: Case, trace: Trace, line: Line) -> None:
    """#112: 512 bytes of fields are taken, 513 refused, and both counted."""
    rejection(line, "over_limit")
    found = measured(trace, 112)
    demand_equal(found["sizes"], [512, 513], "bytes of fields")
    demand_equal(found["statuses"], ["OK", "OVER_LIMIT"], "statuses")
    demand_equal(found["growth"], _growth_of(accepted=1, over_limit=1), "growth of its row")


def reject_rate_limited(_case: Case, trace: Trace, line: Line) -> None:
    """#113: the 25th of one sender is refused, another sender's in the same second is not."""
    rejection(line, "rate_limited")
    found = measured(trace, 113)
    demand_equal(found["statuses"], ["OK"] * 24 + ["RATE_LIMITED"], "statuses")
    demand(found["took_ns"] < 1_000_000_000, "the burst took longer than its window")
    demand_equal(found["growth"], _growth_of(accepted=24, rate_limited=1), "growth of its row")
    demand(found["policyd"]["accepted"] >= 1, "nothing of the other sender was accepted")
    demand_equal(found["policyd"]["rate_limited"], 0, "refusals of the other sender")


def _growth_of(**grown: int) -> dict[str, int]:
    return {"accepted": 0, "invalid_args": 0, "over_limit": 0, "rate_limited": 0, **grown}


# ---------------------------------------------------------------- the end


def nothing_left_behind(case: Case, trace: Trace, line: Line) -> None:
    """#143: at the end of each boot every account is what it was when that boot was ready, and
    every started task has ended. The boot of the bad set is never ready, and its tasks end too."""
    for boot in (*trace.earlier, trace):
        if is_bad(case.scope, boot.number):
            _all_ended(boot)
            continue
        lines = [each for each in boot.lines if (each.printer, each.text) == (SELFTEST, line.text)]
        demand_equal(len(lines), 1, f"lines about it in boot {boot.number}")
        _nothing_left_behind(case, boot, lines[0])


def _nothing_left_behind(case: Case, trace: Trace, line: Line) -> None:
    accounts = line.evidence["accounts"]
    for name, account in accounts.items():
        demand_equal(account["now"], account["ready"], f"account of {name}, boot {trace.number}")
    planned = {service.name for service in case.plan.services if not service.by}
    demand_equal(set(accounts), planned | {INIT_NAME}, "tasks with an account")
    _all_ended(trace)


def _all_ended(trace: Trace) -> None:
    if trace.ending.stopped or trace.ending.cut:
        return
    living = {event.pid for _, event in trace.of_kind(EventKind.SPAWN)}
    for _, event in trace.of_kind(EventKind.EXIT):
        living.discard(event.pid)
    demand(not living, f"tasks that never ended: {sorted(living)}")


_NUMBERED: Final[dict[int, Check]] = {
    1: spawn_reasons,
    2: resource_sentinel,
    3: heap_report,
    4: qos_rollback,
    5: plan_started,
    8: policyd_ready,
    29: system_ready,
    30: logd_ready,
    32: timed_ready,
    39: cpu_online,
    40: smp_online,
    41: counterfactual,
    42: resched,
    43: reject_target,
    44: reject_offline,
    45: work_stealing,
    46: steal_bound,
    47: steal_class,
    48: mmio_policy_deny,
    60: fires_exactly,
    63: forged_identity,
    95: sandbox_escape,
    96: watchdog_restart,
    111: reject_invalid_args,
    112: reject_over_limit,
    113: reject_rate_limited,
    143: nothing_left_behind,
}
_STARTS: Final = dict.fromkeys((6, *range(9, 28, 2)), service_started)
_UPS: Final = dict.fromkeys((7, *range(10, 29, 2)), service_up)

CHECKS: Final[Mapping[int, Check]] = MappingProxyType(_NUMBERED | _STARTS | _UPS)

assert all(rung(number).marker.startswith("init: start ") for number in _STARTS)
assert all(rung(number).marker.startswith("init: up ") for number in _UPS)
