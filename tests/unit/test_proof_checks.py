"""Each check of a kernel's or init's line: true evidence passes, each way to lie is red."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from nexus.abi import (
    HEAP_SIZE,
    INIT_NAME,
    Event,
    EventKind,
    Nanos,
    Pid,
    QosClass,
    service_id,
)
from nexus.init.plan import Plan, PlannedLink, PlannedService
from nexus.proof.checks import CHECKS
from nexus.proof.expected import Scope
from nexus.proof.trace import Trace
from nexus.proof.verdict import Case, Mismatch
from nexus.protocols.ladder import KERNEL, RUNGS, SELFTEST, Ground, rung
from nexus.protocols.policy import Policy, Right


def _service(name: str, *uses: PlannedLink) -> PlannedService:
    return PlannedService(
        name=name,
        service=service_id(name),
        program=name,
        program_digest=f"digest of {name}",
        qos=QosClass.NORMAL,
        cpu=None,
        budget=0,
        owner_size=0,
        endpoints=2,
        capabilities=(),
        uses=uses,
        backoff=Nanos(1),
        health_deadline=Nanos(1_000_000),
        settings=(),
        reserved_size=0,
        slots=0,
        delegations=0,
    )


LINK = PlannedLink(
    client=SELFTEST,
    server="timed",
    depth=8,
    size=4096,
    delegations=2,
    reply_depth=8,
    reply_size=4096,
)
PLAN = Plan(
    name="test",
    smp=2,
    total_size=0,
    root_size=0,
    ends_with=None,
    services=(_service("timed"), _service(SELFTEST, LINK)),
)
POLICY = Policy(services=["policyd"], allow={"policyd": [Right("policy.authority", "f", 1)]})
JOURNAL = replace(_service("logd"), settings=(("records", 128), ("size", 16_384)))
WATCHED = replace(_service("demo.testsvc"), probe_every=Nanos(500), probe_answer=Nanos(1_000))
LARGER = replace(PLAN, policy=POLICY, services=(_service("policyd"), JOURNAL, WATCHED))


class Bench:
    """One rung with what a true run would leave behind, to be falsified in one place."""

    def __init__(self, number: int, evidence: dict[str, Any], *before: Event) -> None:
        self.number = number
        self.evidence = evidence
        self.events = list(before)
        self.after: list[Event] = []
        self.ground = Ground.SIM
        self.printer_pid = Pid(1)
        self.plan = PLAN

    def check(self) -> None:
        row = rung(self.number)
        fields: dict[str, object] = {"line": row.marker, "evidence": self.evidence}
        if row.printer == KERNEL:
            line = Event(Nanos(100), EventKind.KERNEL, Pid(0), fields)
        else:
            fields |= {"name": row.printer, "generation": 1}
            line = Event(Nanos(100), EventKind.CONSOLE, self.printer_pid, fields)
        trace = Trace((*self.events, line, *self.after))
        scope = Scope(ground=self.ground, smp=2, services=("timed", SELFTEST))
        case = Case(scope=scope, plan=self.plan, checks=CHECKS)
        printed = next(each for each in trace.lines if each.text == row.marker)
        CHECKS[self.number](case, trace, printed)


def _event(kind: EventKind, pid: int = 0, **fields: object) -> Event:
    return Event(Nanos(10), kind, Pid(pid), fields)


def _spawn(name: str, pid: int = 5) -> Event:
    return _event(
        EventKind.SPAWN,
        pid,
        name=name,
        generation=1,
        program=name,
        digest=f"digest of {name}",
        service=f"{service_id(name):016x}",
    )


def _ready(number: int, name: str, facts: dict[str, int]) -> Bench:
    """A service that says it is ready, and init's record of its first answer."""
    bench = Bench(number, {"seen": 1}, _spawn(name))
    bench.printer_pid = Pid(5)
    bench.plan = LARGER
    answered = {"generation": 1, "nonce": 9, "facts": facts}
    said: dict[str, object] = {"line": f"init: health {name} ok", "evidence": answered}
    bench.after.append(_event(EventKind.CONSOLE, 1, name=INIT_NAME, generation=1, **said))
    return bench


def _rejected(number: int, reason: str, measured: dict[str, Any]) -> Bench:
    """A line of logd about a refused record, and what the client measured."""
    sender = f"0x{service_id(SELFTEST):016x}"
    bench = Bench(number, {"sender": sender, "reason": reason, "count": 1}, _spawn("logd"))
    bench.printer_pid = Pid(5)
    said = {"line": f"{SELFTEST}: measured #{number}", "evidence": measured}
    bench.after.append(_event(EventKind.CONSOLE, 6, name=SELFTEST, generation=1, **said))
    return bench


def _growth(**grown: int) -> dict[str, int]:
    return {"accepted": 0, "invalid_args": 0, "over_limit": 0, "rate_limited": 0, **grown}


def _bench(number: int) -> Bench:
    """True evidence of each rung."""
    counters: dict[str, Any]
    told: dict[str, Any]
    match number:
        case 1:
            reasons = ("oom", "cap_table_full", "endpoint_quota", "map_failed", "invalid_payload")
            told = {
                reason: {"code": code, "again": 0, "tasks": 3, "tasks_after": 3}
                for code, reason in enumerate(reasons, start=1)
            }
            return Bench(1, told)
        case 2:
            counters = {"slots": 2, "endpoints": 1, "queued_size": 0, "tasks": 1}
            full = {"slots": 96, "endpoints": 96, "cycles": 64}
            return Bench(2, full | {"before": counters, "after": dict(counters)})
        case 3:
            report = {
                "heap_budget_used": 1000,
                "heap_budget_free": HEAP_SIZE - 1000,
                "heap_budget_total": HEAP_SIZE,
                "size": HEAP_SIZE,
                "align": 4096,
            }
            return Bench(3, report | {"request": HEAP_SIZE, "audited": 1000, "granted": 64})
        case 4:
            order = {"order_before": [4, 5, 6], "order_after": [4, 5, 6]}
            where = {"index": 1, "index_after": 1, "class_before": 1, "class_after": 1}
            return Bench(4, {"status": "QUEUE_FULL", "interactive": 64} | order | where)
        case 39:
            return Bench(39, {"cpu": 1, "ticks_before": 3, "ticks": 9})
        case 40:
            return Bench(40, {"mask": 3, "read_on_cpu": 1})
        case 41:
            return Bench(41, {"before": [0] * 4, "after": [1, 0, 0, 0], "ticks": 200_000})
        case 42:
            asked, after = [1, 1, 0, 0], [1, 1, 1, 1]
            return Bench(42, {"before": [0] * 4, "asked": asked, "after": after, "target": 1})
        case 43:
            counters = {"before": [[0] * 4] * 2, "after": [[0] * 4] * 2}
            return Bench(43, {"cpu": 4, "status": "INVALID_ARGUMENT"} | counters)
        case 44:
            counters = {"before": [[0] * 4] * 2, "after": [[0] * 4] * 2}
            return Bench(44, {"cpu": 1, "status": "UNSUPPORTED", "online": 1} | counters)
        case 45:
            return Bench(45, {"steals": 1, "queued_on": 1, "ran_on": 0})
        case 46:
            return Bench(46, {"queued": 2, "left": 1})
        case 47:
            return Bench(47, {"queued": 2, "left": 2, "stolen": 0, "qos": 2, "limit": 1})
        case 5:
            return Bench(5, {"digest": PLAN.digest, "services": 2})
        case 13:
            bench = Bench(13, {"seen": 1})
            bench.after.append(_spawn("timed"))
            return bench
        case 14:
            told = {"pid": 5, "service": f"{service_id('timed'):016x}", "generation": 1}
            bench = Bench(14, told | {"echo_nonce": 77}, _spawn("timed"))
            said = {"line": "timed: ready", "evidence": {"echoed": 77}}
            bench.after.append(_event(EventKind.CONSOLE, 5, name="timed", generation=1, **said))
            return bench
        case 29:
            made = _event(EventKind.LINK, owner="timed", holder=SELFTEST, depth=8, size=4096)
            started = (_spawn("timed"), _spawn(SELFTEST, 6))
            row = [SELFTEST, "timed", 8, 4096, 2, 1, 1]
            return Bench(29, {"links": [row], "grants": []}, *started, made)
        case 32:
            bench = Bench(32, {"seen": 1}, _spawn("timed"))
            bench.printer_pid = Pid(5)
            answered = {"generation": 1, "nonce": 9, "facts": {"timers": 0}}
            fields: dict[str, object] = {"name": INIT_NAME, "generation": 1}
            fields |= {"line": "init: health timed ok", "evidence": answered}
            bench.after.append(_event(EventKind.CONSOLE, 1, **fields))
            return bench
        case 8:
            return _ready(8, "policyd", {"policy_digest": int(POLICY.digest[:15], 16)})
        case 30:
            return _ready(30, "logd", {"capacity_records": 128, "capacity_size": 16_384})
        case 48:
            about = {"subject": "timed", "right": "device.mmio.blk", "target": "window blk"}
            told = {"decision": "deny", "reason": "policy", "grants": 0, "nonce": 5, **about}
            return Bench(48, told | {"denied_before": 2, "denied_after": 3, "took_ns": 900})
        case 96:
            pages = [[1, True], [2, False], [3, True]]
            told = {"generation": 2, "pages": pages, "denied": True}
            bench = Bench(96, {"generation": 2, "noticed_ns": 1_400, "policyd": told})
            bench.plan = LARGER
            ended = {"generation": 1, "code": 0, "signal": 9, "reason": "hang", "died": 10}
            line = {"line": "init: end of demo.testsvc", "evidence": ended}
            bench.events.append(_event(EventKind.CONSOLE, 1, name=INIT_NAME, generation=1, **line))
            again = _spawn("demo.testsvc", 7)
            fields = dict(again.fields) | {"generation": 2}
            bench.events.append(again._replace(time=Nanos(11), fields=fields))
            bench.events.append(_spawn("policyd", 8))
            bench.events.append(_event(EventKind.EXIT, 8, name="policyd", code=0, signal=9))
            again = _spawn("another", 8)  # has its pid since, and ends well
            bench.events.append(again)
            bench.events.append(_event(EventKind.EXIT, 8, name="another", code=0, signal=0))
            return bench
        case 111:
            statuses = {"status": "INVALID_ARGS", "again": "INVALID_ARGS", "ids": 0}
            return _rejected(111, "invalid_args", statuses | {"growth": _growth(invalid_args=1)})
        case 112:
            told = {"sizes": [512, 513], "statuses": ["OK", "OVER_LIMIT"]}
            told["growth"] = _growth(accepted=1, over_limit=1)
            return _rejected(112, "over_limit", told)
        case 113:
            told = {"statuses": ["OK"] * 24 + ["RATE_LIMITED"], "took_ns": 900_000_000}
            told["growth"] = _growth(accepted=24, rate_limited=1)
            told["policyd"] = _growth(accepted=1)
            return _rejected(113, "rate_limited", told)
        case 143:
            account = {"slots": 4, "endpoints": 2}
            names = ("timed", SELFTEST, INIT_NAME)
            accounts = {name: {"ready": account, "now": dict(account)} for name in names}
            bench = Bench(143, {"accounts": accounts}, _spawn("timed"))
            bench.after.append(_event(EventKind.EXIT, 5, name="timed", code=0, signal=0))
            return bench
        case 60:
            return Bench(60, {"late_ns": [[0, 9_000, 20_000]]})
        case _:
            raise AssertionError(number)


SHOWN = (
    *(1, 2, 3, 4, 5, 8, 13, 14, 29, 30, 32, *range(39, 49)),
    *(60, 96, 111, 112, 113, 143),
)


@pytest.mark.parametrize("number", SHOWN)
def test_true_evidence_passes(number: int) -> None:
    _bench(number).check()


Lie = Callable[[dict[str, Any]], object]


def _set(path: str, value: object) -> Lie:
    """A lie: the value at `path`, keys and indices joined by dots, is another one."""

    def lie(evidence: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        target: Any = evidence
        for key in parents:
            target = target[int(key)] if isinstance(target, list) else target[key]
        target[int(last) if isinstance(target, list) else last] = value

    return lie


LIES: tuple[tuple[int, Lie], ...] = (
    (1, _set("cap_table_full.code", 5)),
    (1, _set("oom.again", 1)),
    (1, _set("map_failed.tasks_after", 4)),
    (1, lambda evidence: evidence.pop("endpoint_quota")),
    (2, _set("slots", 95)),
    (2, _set("endpoints", 97)),
    (2, _set("cycles", 63)),
    (2, _set("after.endpoints", 2)),
    (2, lambda evidence: [evidence[key].pop("tasks") for key in ("before", "after")]),
    (3, _set("audited", 1256)),
    (3, _set("heap_budget_used", 999)),
    (3, _set("size", 1)),
    (3, _set("align", 3)),
    (3, _set("granted", 0)),
    (4, _set("index_after", 2)),
    (4, _set("order_after", [4, 6, 5])),
    (4, _set("class_after", 2)),
    (4, _set("interactive", 63)),
    (4, _set("status", "OK")),
    (5, _set("digest", "")),
    (5, _set("services", 3)),
    (14, _set("pid", 6)),
    (14, _set("generation", 2)),
    (14, _set("echo_nonce", 0)),
    (14, _set("service", f"{service_id('logd'):016x}")),
    (29, _set("links", [])),
    (29, _set("links.0.4", 1)),
    (29, _set("links.0.6", 2)),
    (29, _set("grants", [1])),
    (39, _set("ticks", 3)),
    (39, _set("cpu", 2)),
    (40, _set("mask", 1)),
    (40, _set("read_on_cpu", 0)),
    (41, _set("after.1", 1)),
    (41, _set("after.0", 0)),
    (41, _set("ticks", 10)),
    (42, _set("after.3", 0)),
    (42, _set("asked.3", 1)),
    (42, _set("target", 0)),
    (43, _set("cpu", 5)),
    (43, _set("status", "OK")),
    (43, _set("after", [[1, 0, 0, 0], [0, 0, 0, 0]])),
    (44, _set("cpu", 0)),
    (44, _set("status", "")),
    (44, _set("after", [[1, 0, 0, 0], [0, 0, 0, 0]])),
    (45, _set("steals", 0)),
    (45, _set("ran_on", 1)),
    (46, _set("left", 0)),
    (47, _set("left", 1)),
    (47, _set("stolen", 1)),
    (47, _set("qos", 1)),
    (14, _set("echo_nonce", 78)),
    (48, _set("decision", "allow")),
    (48, _set("reason", "unavailable")),
    (48, _set("subject", INIT_NAME)),
    (48, _set("grants", 1)),
    (48, _set("nonce", 0)),
    (48, _set("denied_after", 2)),
    (48, _set("took_ns", 1_000_000_001)),
    (60, _set("late_ns.0.2", 900_000)),
    (96, _set("noticed_ns", 600_000_000)),
    (96, _set("generation", 3)),
    (96, _set("policyd.generation", 3)),
    (96, _set("policyd.pages", [[1, True], [1, True], [3, True]])),
    (96, _set("policyd.pages", [[1, True], [2, False], [2, True]])),
    (96, _set("policyd.pages.1.1", True)),
    (96, _set("policyd.pages.2.1", False)),
    (96, _set("policyd.denied", False)),
    (111, _set("reason", "over_limit")),
    (111, _set("sender", f"0x{service_id('timed'):016x}")),
    (112, _set("sender", "0x1")),
    (113, _set("reason", "invalid_args")),
    (143, _set("accounts.timed.now.slots", 5)),
    (143, lambda evidence: evidence["accounts"].pop("timed")),
)


@pytest.mark.parametrize(("number", "lie"), LIES)
def test_each_lie_in_the_evidence_is_found(number: int, lie: Lie) -> None:
    bench = _bench(number)
    bench.evidence = copy.deepcopy(bench.evidence)
    lie(bench.evidence)

    with pytest.raises(Mismatch):
        bench.check()


OTHERS_LIES: tuple[tuple[int, Lie], ...] = (
    (8, _set("facts.policy_digest", 1)),
    (8, _set("nonce", 0)),
    (30, _set("facts.capacity_records", 129)),
    (30, _set("facts.capacity_size", 0)),
    (30, _set("generation", 2)),
    (111, _set("status", "OK")),
    (111, _set("again", "OVER_LIMIT")),
    (111, _set("ids", 1)),
    (111, _set("growth.invalid_args", 2)),
    (111, _set("growth.accepted", 1)),
    (112, _set("statuses", ["OK", "OK"])),
    (112, _set("sizes", [512, 514])),
    (112, _set("growth.over_limit", 0)),
    (113, _set("statuses", ["OK"] * 25)),
    (113, _set("took_ns", 1_000_000_000)),
    (113, _set("growth.rate_limited", 0)),
    (113, _set("policyd.accepted", 0)),
    (113, _set("policyd.rate_limited", 1)),
)
"""Lies of who did not print the line: the first event after it."""


@pytest.mark.parametrize(("number", "lie"), OTHERS_LIES)
def test_each_lie_of_the_other_side_is_found(number: int, lie: Lie) -> None:
    bench = _bench(number)
    fields = copy.deepcopy(dict(bench.after[0].fields))
    evidence: Any = fields["evidence"]
    lie(evidence)
    bench.after[0] = bench.after[0]._replace(fields=fields)

    with pytest.raises(Mismatch):
        bench.check()


@pytest.mark.parametrize(
    ("lie", "sentence"),
    [
        (_set("reason", "exit"), "reason in init's record"),
        (_set("signal", 0), "signal of the end"),
        (_set("generation", 7), "ends of the instance"),
    ],
)
def test_an_end_that_was_no_hang_is_found(lie: Lie, sentence: str) -> None:
    bench = _bench(96)
    fields = copy.deepcopy(dict(bench.events[0].fields))
    evidence: Any = fields["evidence"]
    lie(evidence)
    bench.events[0] = bench.events[0]._replace(fields=fields)

    with pytest.raises(Mismatch, match=sentence):
        bench.check()


@pytest.mark.parametrize("event", [Event(Nanos(10), EventKind.EXIT, Pid(8), {"signal": 0}), None])
def test_a_policyd_that_was_not_killed_is_found(event: Event | None) -> None:
    bench = _bench(96)
    bench.events[3:] = [] if event is None else [event]

    with pytest.raises(Mismatch, match="that instance"):
        bench.check()


def test_on_a_busy_host_policyd_may_be_back_before_anybody_looked() -> None:
    bench = _bench(96)
    bench.ground = Ground.LINUX
    late = {"pages": [[1, True], [3, True], [3, True]], "denied": False}
    bench.evidence["policyd"] |= late
    bench.check()

    bench.evidence["policyd"] |= {"pages": [[1, True], [1, True], [3, True]]}
    with pytest.raises(Mismatch, match="generations of the page"):
        bench.check()


def test_a_restart_without_its_back_off_is_found() -> None:
    bench = _bench(96)
    bench.events[1] = bench.events[1]._replace(time=Nanos(10))

    with pytest.raises(Mismatch, match="back-off"):
        bench.check()


def test_a_grant_asked_for_after_the_grants_were_made_is_found() -> None:
    bench = _bench(48)
    fields: dict[str, object] = {"name": INIT_NAME, "generation": 1, "evidence": {}}
    bench.events.append(_event(EventKind.CONSOLE, 1, **fields, line="init: ready"))

    with pytest.raises(Mismatch, match="after the grants"):
        bench.check()


@pytest.mark.parametrize("number", [111, 112, 113])
def test_a_rejection_that_nobody_measured_is_found(number: int) -> None:
    bench = _bench(number)
    bench.after.clear()

    with pytest.raises(Mismatch, match="lines of selftest-client"):
        bench.check()


@pytest.mark.parametrize("number", [8, 14, 29, 30, 32, 96])
def test_evidence_that_the_kernels_own_record_does_not_show_is_found(number: int) -> None:
    bench = _bench(number)
    bench.events.clear()

    with pytest.raises(Mismatch):
        bench.check()


def test_a_start_that_never_follows_its_line_is_found() -> None:
    bench = _bench(13)
    bench.after.clear()

    with pytest.raises(Mismatch, match="no start of timed"):
        bench.check()


def test_a_start_before_its_line_is_found() -> None:
    bench = _bench(13)
    bench.events, bench.after = bench.after, []

    with pytest.raises(Mismatch, match="before the line"):
        bench.check()


def test_a_program_that_is_not_the_plans_is_found() -> None:
    bench = _bench(13)
    fields = dict(bench.after[0].fields) | {"digest": "another"}
    bench.after[0] = bench.after[0]._replace(fields=fields)

    with pytest.raises(Mismatch, match="program digest"):
        bench.check()


def test_a_readiness_that_init_has_not_seen_is_found() -> None:
    bench = _bench(32)
    bench.after.clear()

    with pytest.raises(Mismatch, match="no answer"):
        bench.check()


def test_a_readiness_after_its_deadline_is_found() -> None:
    bench = _bench(32)
    bench.events[0] = bench.events[0]._replace(time=Nanos(-10_000_000))

    with pytest.raises(Mismatch, match="deadline"):
        bench.check()


def test_a_readiness_said_by_another_task_is_found() -> None:
    bench = _bench(32)
    bench.printer_pid = Pid(6)

    with pytest.raises(Mismatch, match="pid"):
        bench.check()


def test_a_task_that_never_ended_is_left_behind() -> None:
    bench = _bench(143)
    bench.after.clear()

    with pytest.raises(Mismatch, match="never ended"):
        bench.check()


def test_on_linux_the_sentinel_counts_descriptors_and_children_too() -> None:
    bench = _bench(2)
    bench.ground = Ground.LINUX

    with pytest.raises(Mismatch, match="not counted"):
        bench.check()


def test_every_rung_of_this_issue_that_is_not_selftests_has_a_check() -> None:
    issue = (*range(1, 11), 13, 14, 27, 28, 29, 30, 32, *range(39, 49), 111, 112, 113)

    assert all(number in CHECKS for number in issue)
    looked_at_again = {60, 63, 95, 96, 143}  # the client cannot see these alone
    assert {number for number in CHECKS if rung(number).printer == SELFTEST} == looked_at_again
    assert len(RUNGS) == 144
