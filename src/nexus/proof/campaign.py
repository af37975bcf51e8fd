"""`nexus campaign`: many seeds with faults on, and what must hold in every one of them.

Each run boots a small system (timed, demo.testsvc, two clients, a judge) on the simulated kernel,
with faults at named points until a stated time. No promise may be broken meanwhile, every call
has a known outcome inside its deadline, and after the faults the system is healthy within a
stated time. A fault that never fired, or a recovery that was never reached, is red: it was not
tested. The sweep fails the first, second, third... occurrence of every trap in turn; which traps
there are it learns from a run without faults.
"""

import argparse
import json
import re
import sys
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from random import Random  # noqa: TID251 (faults are drawn from the seed of the run)
from typing import Any, Final, NamedTuple

from nexus.abi import INIT_NAME, NEVER, NO_WAIT, Event, EventKind, Nanos, Pid, Program, Status, Trap
from nexus.abi import traps as abi_traps
from nexus.init.ground import init_program, limits_of, programs_of
from nexus.init.plan import Plan as SystemPlan
from nexus.init.plan import make_plan
from nexus.init.system import parse
from nexus.kernel.core import Hang, RunOver
from nexus.kernel.sim import (
    DEVICE_POINTS,
    FAILURES,
    FaultPoint,
    Faults,
    Forge,
    Freeze,
    NthFailure,
    Plan,
    SimKernel,
)
from nexus.proof import workload

FAULTS_SPAN: Final = Nanos(400_000_000)  # ns of virtual time in which faults fire
FREEZE_SPAN_MIN: Final = Nanos(5_000_000)  # ns; nobody notices
FREEZE_AFTER_MAX: Final = Nanos(100_000_000)  # ns; it begins early enough to end with the faults
FREEZE_SPAN_MAX: Final = Nanos(
    290_000_000
)  # ns; longer than every interval and deadline of a probe
SWEEP_SPAN: Final = Nanos(60_000_000)  # ns; one failure is planned, and early
HEALTHY_WITHIN: Final = Nanos(12_000_000_000)  # ns after the faults; testsvc tries 10 s to start
assert FREEZE_AFTER_MAX + FREEZE_SPAN_MAX < FAULTS_SPAN, "nobody is frozen when a run ends"
RUN_LIMIT: Final = Nanos(40_000_000_000)  # ns of virtual time; a run that needs it hangs
SWEEP_NTH_MAX: Final = 60  # occurrences failed one by one; a later one is like an earlier one
PROBLEMS_SHOWN_MAX: Final = 20
SHRINK: Final = 6  # problems kept of one run
GREEN, RED, USAGE = 0, 1, 2

CLIENTS: Final = ("campaign.one", "campaign.two")
SERVICES: Final = ("timed", "demo.testsvc", "policyd")
JUDGE: Final = "campaign.judge"
SIGNAL_LINK: Final = "0"  # by which the kernel tells the root task of signals
STRANGER: Final = Pid(60_000)  # no task of a run has this number

_SYSTEM: Final = """
[system]
name = "campaign"
smp = 2
total_size = "8MiB"
owner_size = "512KiB"

[group.storm] # what a run provokes is more than a real system takes before it gives up
restarts = 1000
within = "60s"
exceeded = "give-up"

[service.policyd]
program = "policyd"
group = "storm"
restart = {{ backoff = "50ms", backoff_max = "400ms" }}
health = {{ deadline = "500ms", every = "50ms", answer = "100ms" }}
capabilities = ["policy.authority"]

[service.timed]
program = "timed"
group = "storm"
restart = {{ backoff = "50ms", backoff_max = "400ms" }}
health = {{ deadline = "500ms", every = "100ms", answer = "100ms" }}

[service."demo.testsvc"]
program = "demo.testsvc"
group = "storm"
restart = {{ backoff = "50ms", backoff_max = "400ms" }}
health = {{ deadline = "500ms" }}
endpoints = 16
uses = [{{ name = "timed" }}]
"""
_CLIENT: Final = """
[service."{name}"]
program = "selftest-client"
group = "storm"
restart = {{ backoff = "50ms", backoff_max = "400ms" }}
health = {{ deadline = "500ms" }}
capabilities = ["proof.control", "policy.delegate"]
uses = [{{ name = "timed" }}, {{ name = "demo.testsvc" }}, {{ name = "policyd" }}]
settings = {{ judge = {judge}, faults = {faults}, healthy_within = {healthy} }}
"""

CHANCES: Final[Mapping[FaultPoint, tuple[int, int]]] = {
    FaultPoint.QUEUE_FULL: (100, 4_000),
    FaultPoint.NO_SPACE: (100, 4_000),
    FaultPoint.TIMED_OUT: (100, 2_000),
    FaultPoint.KILL: (50, 1_000),
    FaultPoint.SLOW_CPU: (1_000, 50_000),
    FaultPoint.LATE_WAKE: (1_000, 50_000),
    FaultPoint.LATE_TIMER: (10_000, 500_000),
    FaultPoint.LATE_DELIVERY: (1_000, 50_000),
    FaultPoint.LOST_SIGNAL: (10_000, 500_000),
}
"""Parts of a million per reach of a point, least and most; each run draws within."""

INJECTED: Final = "injected"  # how the text of an injected refusal ends
GAVE_UP: Final = "task that gave up at an injected refusal, ended and started again"

RECOVERIES: Final = (
    "service restarted",
    "spawn refused, tried again",
    "new instance found",
    "call answered after one that failed",
    "deadline met an unanswered call",
    "call cut off by a death told as Unknown",
    "forged identity refused",
    "denied while policyd did not answer",
    "allowed after a denial for want of policyd",
    GAVE_UP,
    "healthy after the faults",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunReport:
    """One run: what was wrong (nothing, if all held), and what was seen."""

    name: str
    problems: tuple[str, ...]
    reached: Mapping[str, int]
    fired: Mapping[str, int]
    recoveries: Mapping[str, int]
    calls: Mapping[str, int]
    healthy_after: int | None  # ns from the end of the faults


@dataclass(kw_only=True)
class Campaign:
    """Everything a campaign adds up."""

    seeds: int = 0
    sweep_runs: int = 0
    sweep_rows: int = 0
    sweep_ends: int = 0  # rows whose last occurrence was failed too
    sweep_fired: Counter[str] = field(default_factory=Counter)  # by row
    makers: Mapping[str, Sequence[str]] = field(default_factory=dict)  # tasks, by trap
    problems: list[str] = field(default_factory=list)
    reached: Counter[str] = field(default_factory=Counter)
    fired: Counter[str] = field(default_factory=Counter)
    recoveries: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)
    healthy_after_max: int = 0
    seconds: float = 0.0

    def add(self, report: RunReport) -> None:
        """Count a run in."""
        self.problems += [f"{report.name}: {problem}" for problem in report.problems]
        self.reached.update(report.reached)
        self.fired.update(report.fired)
        self.recoveries.update(report.recoveries)
        self.calls.update(report.calls)
        self.healthy_after_max = max(self.healthy_after_max, report.healthy_after or 0)

    @property
    def never(self) -> list[str]:
        """Faults that never fired, recoveries that were never reached, traps nobody made."""
        points = [point for point in FaultPoint if point not in DEVICE_POINTS]
        never = [point.value for point in points if not self.fired[point.value]]
        never += [name for name in RECOVERIES if not self.recoveries[name]]
        never += [f"sweep {row}" for row, fired in self.sweep_fired.items() if not fired]
        if self.makers:
            expected = [trap.__name__ for trap in TRAPS if trap not in SELDOM]
            never += [f"trap {trap}" for trap in expected if not self.makers[trap]]
        return never

    @property
    def exit_code(self) -> int:
        """0 if nothing was broken and everything was tested."""
        return RED if self.problems or self.never else GREEN


# ---------------------------------------------------------------- one run


def system_plan(faults: Nanos) -> SystemPlan:
    """The plan of a campaign system whose judge waits for so long."""
    text = _SYSTEM.format()
    for name in (*CLIENTS, JUDGE):
        judge = "true" if name == JUDGE else "false"
        text += _CLIENT.format(name=name, judge=judge, faults=faults, healthy=HEALTHY_WITHIN)
    return make_plan(parse(text.encode(), Path("campaign.toml")))


def drawn_faults(seed: int) -> Plan:
    """The fault plan of a seed: some points, each with a chance of its own, two forgeries, and
    services that are stopped for a while."""
    source = Random(f"nexus.campaign.{seed}")  # noqa: S311 (a choice of tests, not keys)
    chances = {
        point: source.randint(*bounds) for point, bounds in CHANCES.items() if source.random() < 0.5
    }
    forge = tuple(
        Forge(task=CLIENTS[0], nth=source.randint(5, 60), pid=pid, receiver=receiver)
        for pid, receiver in ((Pid(0), "timed"), (STRANGER, "demo.testsvc"))
        if source.random() < 0.5
    )
    tasks = frozenset((*CLIENTS, *SERVICES))
    # Services alone: a client that is stopped sees its own outcomes late, and rightly says so.
    freeze = tuple(
        Freeze(
            task=task,
            after=Nanos(source.randrange(FREEZE_AFTER_MAX)),
            span=Nanos(source.randint(FREEZE_SPAN_MIN, FREEZE_SPAN_MAX)),
        )
        for task in SERVICES
        if source.random() < 0.5
    )
    return Plan(forge=forge, freeze=freeze, chances=chances, tasks=tasks, span=FAULTS_SPAN)


class Observer:
    """The recorder of one run. At each console line the kernel's heap is audited."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.problems: list[str] = []
        self.kernel: SimKernel | None = None

    def __call__(self, event: Event) -> None:
        """Take an event."""
        self.events.append(event)
        if event.kind is EventKind.CONSOLE and self.kernel is not None:
            heap = self.kernel.heap
            held = heap.audit(list(self.kernel.tasks.values()))
            if held != heap.account.used:
                self.problems.append(f"heap holds {held} bytes and says {heap.account.used}")


def run(
    name: str,
    plan: SystemPlan,
    faults_plan: Plan,
    seed: int,
    smp: int,
    *,
    witness: "Witness | None" = None,
) -> RunReport:
    """Boot, let the faults fire, and check everything that must hold."""
    faults = Faults(faults_plan)
    observer = Observer()
    kernel = SimKernel(
        _programs(plan),
        seed=seed,
        recorder=observer,
        cpu_count=smp,
        limits=limits_of(plan),
        faults=faults,
        hardware=plan.hardware,
    )
    observer.kernel = kernel
    if witness is not None:
        witness.watch(kernel)
    problems = observer.problems
    try:
        ended = kernel.run(
            init_program(plan, smp), plan.digest.encode(), until=Nanos(kernel.now + RUN_LIMIT)
        )
    except (Hang, RunOver) as over:
        problems.append(f"no end: {over}")
    else:
        if ended.code or ended.signal:
            problems.append(f"init ended with code {ended.code}, signal {ended.signal}")
    crashes = [crash.strip().rpartition("\n")[2] for crash in kernel.crashes]
    problems += [crash for crash in crashes if not crash.endswith(INJECTED)]
    problems += _leaks(kernel)
    problems += unaccounted(kernel.log_lines())
    seen = _Seen(observer.events)
    forged = faults.fired[FaultPoint.FORGE]
    if seen.dropped > forged:
        problems.append(f"{seen.dropped} messages dropped for their sender, {forged} were forged")
    seen.recoveries[GAVE_UP] += sum(crash.endswith(INJECTED) for crash in crashes)
    problems += seen.problems
    counts = faults.counts()
    return RunReport(
        name=name,
        problems=tuple(problems[:SHRINK]),
        reached={point: reached for point, (reached, _) in counts.items()},
        fired={point: fired for point, (_, fired) in counts.items()},
        recoveries=seen.recoveries,
        calls=seen.calls,
        healthy_after=seen.healthy_after,
    )


def _programs(plan: SystemPlan) -> Mapping[str, Program]:
    """The plan's programs, with the campaign's client in the place of the selftest client."""
    source = Path(workload.__file__).read_bytes()
    client = Program(name="selftest-client", main=workload.main, digest=sha256(source).hexdigest())
    return {**programs_of(plan), client.name: client}


def _leaks(kernel: SimKernel) -> Iterator[str]:
    """What a kernel still holds when everything has ended."""
    shares = kernel.shares
    held = {
        "heap bytes": kernel.heap.account.used,
        "link bytes": shares.size.used,
        "endpoints": shares.endpoints.used,
        "tasks": shares.tasks.used + len(kernel.tasks),
    }
    return (f"{count} {what} left behind" for what, count in held.items() if count)


_MESSAGE: Final = re.compile(
    r"\d+ (?:cpu\d+ )?pid\d+ (?:(?:picked|kept) \w+ )?(sent|took) link(\d+) (\d+)B\Z"
)


def unaccounted(lines: Iterator[str]) -> Iterator[str]:
    """Messages received that were not sent, twice, or out of order, by the kernel's event log.

    A forged copy is neither sent nor received in it: it is dropped at the receiver, and those
    are counted. Signals come in an order of their own.
    """
    queued: dict[str, deque[str]] = defaultdict(deque)
    for line in lines:
        match = _MESSAGE.match(line)
        if match is None or match[2] == SIGNAL_LINK:
            continue
        link, size = match[2], match[3]
        if match[1] == "sent":
            queued[link].append(size)
        elif not queued[link] or queued[link].popleft() != size:
            yield f"link {link}: {size} bytes were received that were not next in its queue"
            return


class _Seen:
    """What the events of a run tell: calls, recoveries, and broken promises."""

    def __init__(self, events: Sequence[Event]) -> None:
        self.problems: list[str] = []
        self.calls: Counter[str] = Counter()
        self.recoveries: Counter[str] = Counter()
        self.healthy_after: int | None = None
        self.dropped = 0  # messages whose sender the kernel does not know
        last: dict[tuple[str, int], Mapping[str, Any]] = {}
        for event in events:
            if event.kind is EventKind.CONSOLE:
                self._read_line(event, last)
            elif event.kind is EventKind.REFUSED and event.fields.get("reason") == "identity":
                self.recoveries["forged identity refused"] += 1
                self.dropped += 1
            elif event.kind is EventKind.HANG:
                self.problems.append(f"{event.fields.get('name')} never yields")
        for (name, generation), told in last.items():
            self._read_outcomes(f"{name} {generation}", told)
        if self.healthy_after is None:
            self.problems.append("not healthy in the stated time after the faults")

    def _read_line(self, event: Event, last: dict[tuple[str, int], Mapping[str, Any]]) -> None:
        line, name = str(event.fields["line"]), str(event.fields["name"])
        evidence: Any = event.fields.get("evidence") or {}
        if line == "campaign: outcomes":
            generation = event.fields["generation"]
            assert isinstance(generation, int), "the kernel counts generations"
            last[name, generation] = evidence
        elif line == "campaign: healthy":
            self.healthy_after = int(evidence["after"])
            self.recoveries["healthy after the faults"] += 1
        elif name == INIT_NAME and line.startswith("init: back "):
            self.recoveries["service restarted"] += 1
        elif name == INIT_NAME and line.startswith("init: no start of "):
            self.recoveries["spawn refused, tried again"] += 1

    def _read_outcomes(self, who: str, told: Mapping[str, Any]) -> None:
        self.calls.update(told["outcomes"])
        self.recoveries["new instance found"] += told["rebinds"]
        self.recoveries["call answered after one that failed"] += told["recovered"]
        self.recoveries["allowed after a denial for want of policyd"] += told["available_again"]
        outcomes = told["outcomes"]
        unavailable = outcomes.get(f"Unavailable {Status.TIMED_OUT.name}", 0)
        self.recoveries["denied while policyd did not answer"] += unavailable
        self.recoveries["deadline met an unanswered call"] += outcomes.get("TimedOut", 0)
        self.recoveries["call cut off by a death told as Unknown"] += outcomes.get("Unknown", 0)
        self.problems += [f"{who}: outcome {late} ns after its deadline" for late in told["late"]]
        self.problems += [f"{who}: {wrong}" for wrong in told["wrong"]]


# ---------------------------------------------------------------- many runs


def seeds_campaign(campaign: Campaign, first: int, count: int, tell: Callable[[str], None]) -> None:
    """Run `count` seeds with drawn faults, on one and on two CPUs in turn."""
    plan = system_plan(FAULTS_SPAN)
    for seed in range(first, first + count):
        smp = 1 + seed % 2
        report = run(f"seed {seed} smp {smp}", plan, drawn_faults(seed), seed, smp)
        campaign.add(report)
        campaign.seeds += 1
        for problem in report.problems:
            tell(f"{report.name}: {problem}")


class Made(NamedTuple):
    """One trap that a task made: which of its kind (from 1), when, and whether it may wait."""

    nth: int
    after: int  # ns from the start of the run
    waits: bool  # it has a deadline to miss


class Witness:
    """Every trap of a run without faults, by task: what the sweep can fail.

    A failure changes nothing before it, so the Nth trap is the Nth in a run that fails it.
    """

    def __init__(self) -> None:
        self.made: dict[tuple[str, type[Trap[Any]]], list[Made]] = defaultdict(list)

    def watch(self, kernel: SimKernel) -> None:
        """Look at every trap before its handler."""
        start = kernel.now
        for kind, (handler, code) in list(kernel.handlers.items()):
            kernel.handlers[kind] = (self._watched(kernel, start, kind, handler), code)

    def _watched(
        self, kernel: SimKernel, start: Nanos, kind: type[Trap[Any]], handler: Callable[..., Any]
    ) -> Callable[..., Any]:
        def handle(task: Any, trap: Any) -> Any:
            if kind is not abi_traps.ReplyRecv or trap.slot is not None:
                made = self.made[task.name, kind]
                waits = getattr(trap, "deadline", NO_WAIT) not in (NO_WAIT, NEVER)
                made.append(Made(len(made) + 1, kernel.now - start, waits))
            return handler(task, trap)

        return handle

    def makers(self) -> dict[str, list[str]]:
        """By trap the tasks that made it."""
        return {
            trap.__name__: sorted(name for name, kind in self.made if kind is trap)
            for trap in TRAPS
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepRow:
    """One trap of one task with one status, and which occurrences of the trap may have it."""

    task: str
    trap: type[Trap[Any]]
    status: Status
    nths: tuple[int, ...]
    span: Nanos  # ns; how long after the start they are made

    @property
    def name(self) -> str:
        """The row in words."""
        return f"{self.task} {self.trap.__name__} {self.status.name}"


SWEPT: Final[Mapping[type[Trap[Any]], tuple[Status, ...]]] = {
    **FAILURES,
    abi_traps.SetTaskQos: (Status.QUEUE_FULL,),  # planned only: those above are drawn too
}
"""What the sweep makes the traps answer."""

_RIGHTS: Final = "refuses only for a slot, a right or a value, which are the caller's own"
_ROOT: Final = "made by init alone, whose kernel refuses it to others only"
_SURE: Final = "refuses nothing"
_DEVICE: Final = "no service of the campaign has a device"
_KEPT: Final = "no service of the campaign has a secret"
_PORT: Final = "refuses only for a slot or a connection; no service of the campaign has a port"
NOT_SWEPT: Final[Mapping[type[Trap[Any]], str]] = {
    abi_traps.SleepUntil: _SURE,
    abi_traps.Now: _SURE,
    abi_traps.TaskQos: _SURE,
    abi_traps.TaskStats: _SURE,
    abi_traps.Exit: _SURE,
    abi_traps.SpawnLastError: _SURE,
    abi_traps.EndpointClose: _RIGHTS,
    abi_traps.CapClose: _RIGHTS,
    abi_traps.CapQuery: _RIGHTS,
    abi_traps.VmoWrite: _RIGHTS,
    abi_traps.VmoSeal: _RIGHTS,
    abi_traps.VmoMap: _RIGHTS,
    abi_traps.VmoShare: _RIGHTS,
    abi_traps.VmoWatch: _RIGHTS,
    abi_traps.Fence: _SURE,
    abi_traps.ClockMap: _SURE,
    abi_traps.Kill: _ROOT,
    abi_traps.TaskTable: _ROOT,
    abi_traps.Entropy: _ROOT,
    abi_traps.AuditLog: _ROOT,
    abi_traps.PolicyRead: _SURE,
    abi_traps.PolicyRaise: _ROOT,
    abi_traps.BootMemoryRead: _ROOT,
    abi_traps.Notify: _ROOT,
    abi_traps.PortClose: _PORT,
    abi_traps.PortPeer: _PORT,
    abi_traps.PortDial: _PORT,
    abi_traps.BusScan: _ROOT,
    abi_traps.DeviceQuery: _RIGHTS,
    abi_traps.DeviceMap: _RIGHTS,
    abi_traps.DeviceDma: _RIGHTS,
    abi_traps.SecretQuery: _SURE,
}
"""Traps without a failure that could be injected, and why."""

TRAPS: Final = (*SWEPT, *NOT_SWEPT)
assert len(TRAPS) == len(set(TRAPS)), "a trap is swept, or there is a why"
assert set(TRAPS) == {
    trap for trap in Trap.__subclasses__() if trap.__module__ == abi_traps.__name__
}, "every trap is in one of the two"

SELDOM: Final[Mapping[type[Trap[Any]], str]] = {
    abi_traps.Exit: "every task returns instead",
    abi_traps.SpawnLastError: "made after a refused Spawn",
    abi_traps.Kill: "made when a service does not answer",
    abi_traps.PortSend: "no service of the campaign has a port",
    abi_traps.PortClose: "no service of the campaign has a port",
    abi_traps.PortPeer: "no service of the campaign has a port",
    abi_traps.PortDial: "no service of the campaign has a port",
    abi_traps.BusScan: _DEVICE,
    abi_traps.DeviceQuery: _DEVICE,
    abi_traps.DeviceMap: _DEVICE,
    abi_traps.DeviceDma: _DEVICE,
    abi_traps.BlockRead: _DEVICE,
    abi_traps.BlockWrite: _DEVICE,
    abi_traps.BlockFlush: _DEVICE,
    abi_traps.EntropyDraw: _DEVICE,
    abi_traps.SecretQuery: _KEPT,
    abi_traps.SecretRead: _KEPT,
    abi_traps.SecretReplace: _KEPT,
}
"""Traps that a run without faults need not make."""

UNMADE: Final[Mapping[tuple[type[Trap[Any]], Status], str]] = {
    (abi_traps.Wait, Status.TIMED_OUT): "init looks with NO_WAIT, which is refused as QueueEmpty",
    (abi_traps.PortSend, Status.QUEUE_FULL): "no service of the campaign has a port",
    (abi_traps.BlockRead, Status.DEVICE_FAILED): _DEVICE,
    (abi_traps.BlockRead, Status.TIMED_OUT): _DEVICE,
    (abi_traps.BlockWrite, Status.DEVICE_FAILED): _DEVICE,
    (abi_traps.BlockWrite, Status.TIMED_OUT): _DEVICE,
    (abi_traps.BlockWrite, Status.NO_SPACE): _DEVICE,
    (abi_traps.BlockFlush, Status.DEVICE_FAILED): _DEVICE,
    (abi_traps.BlockFlush, Status.TIMED_OUT): _DEVICE,
    (abi_traps.EntropyDraw, Status.DEVICE_FAILED): _DEVICE,
    (abi_traps.SecretRead, Status.DEVICE_FAILED): _KEPT,
    (abi_traps.SecretReplace, Status.DEVICE_FAILED): _KEPT,
    (abi_traps.SecretReplace, Status.NO_SPACE): _KEPT,
}
"""Failures of SWEPT that no task of the system can meet, and why."""

INIT_TRAPS: Final = (
    abi_traps.Spawn,
    abi_traps.Wait,
    abi_traps.ConsoleWrite,
    abi_traps.Send,
    abi_traps.BootMemoryReplace,
)
"""What init must survive. Its other traps fail only by a bug of its own or of its kernel."""


def sweep_rows(witness: Witness) -> list[SweepRow]:
    """Every failure that a task of the system, but for the judge, can meet; UNMADE left out.

    A failure that no task can meet is a row that cannot fire.
    """
    rows = []
    for trap, statuses in SWEPT.items():
        for status in statuses:
            found = [
                row
                for task in (*SERVICES, CLIENTS[0], INIT_NAME)
                if task != INIT_NAME or trap in INIT_TRAPS
                for row in _row(task, trap, status, witness.made.get((task, trap), ()))
            ]
            if not found and (trap, status) not in UNMADE:
                nobody = SweepRow(task="nobody", trap=trap, status=status, nths=(), span=SWEEP_SPAN)
                found.append(nobody)
            rows += found
    return rows


def _row(
    task: str, trap: type[Trap[Any]], status: Status, made: Sequence[Made]
) -> Iterator[SweepRow]:
    """The row of what a task made: the early ones, or the late ones if there is no other.

    Only a trap with a deadline times out, and only one without finds a queue empty.
    """
    if status in (Status.TIMED_OUT, Status.QUEUE_EMPTY):
        made = [each for each in made if each.waits == (status is Status.TIMED_OUT)]
    early = tuple(each.nth for each in made if each.after < SWEEP_SPAN)
    late = tuple(each.nth for each in made)
    if late:
        span = SWEEP_SPAN if early else RUN_LIMIT
        yield SweepRow(task=task, trap=trap, status=status, nths=early or late, span=span)


def sweep_campaign(campaign: Campaign, nth_max: int, tell: Callable[[str], None]) -> None:
    """Fail the 1st, 2nd, 3rd... occurrence of each trap, until there is none or `nth_max`."""
    plan = system_plan(SWEEP_SPAN)
    witness = Witness()
    clean = run("sweep without a failure", plan, Plan(span=SWEEP_SPAN), 1, 1, witness=witness)
    campaign.add(clean)
    campaign.makers = witness.makers()
    for row in sweep_rows(witness):
        campaign.sweep_rows += 1
        campaign.sweep_fired[row.name] = 0
        campaign.sweep_ends += 0 < len(row.nths) <= nth_max
        for nth in row.nths[:nth_max]:
            failure = NthFailure(trap=row.trap, nth=nth, status=row.status, task=row.task)
            faults = Plan(nth=(failure,), span=row.span)
            report = run(f"sweep {row.name} #{nth}", plan, faults, 1, 1)
            campaign.sweep_runs += 1
            fired = report.fired[FaultPoint.NTH.value]
            campaign.sweep_fired[row.name] += fired
            campaign.add(report)
            problems = report.problems if fired else (*report.problems, "it never happened")
            campaign.problems += [] if fired else [f"{report.name}: it never happened"]
            for problem in problems:
                tell(f"{report.name}: {problem}")


# ---------------------------------------------------------------- report


def as_json(campaign: Campaign) -> str:
    """The whole campaign as one JSON object."""
    report = {
        "exit_code": campaign.exit_code,
        "seeds": campaign.seeds,
        "sweep_rows": campaign.sweep_rows,
        "sweep_runs": campaign.sweep_runs,
        "sweep_ends": campaign.sweep_ends,
        "sweep_fired": dict(campaign.sweep_fired),
        "problems": campaign.problems,
        "never": campaign.never,
        "faults": {
            point.value: {
                "reached": campaign.reached[point.value],
                "fired": campaign.fired[point.value],
            }
            for point in FaultPoint
            if point not in DEVICE_POINTS
        },
        "recoveries": {name: campaign.recoveries[name] for name in RECOVERIES},
        "calls": dict(sorted(campaign.calls.items())),
        "healthy_after_max_ns": campaign.healthy_after_max,
        "healthy_within_ns": HEALTHY_WITHIN,
        "seconds": round(campaign.seconds, 1),
    }
    return json.dumps(report, indent=2) + "\n"


def as_markdown(campaign: Campaign) -> str:
    """The report that is committed."""
    return "\n".join(_markdown(campaign)) + "\n"


def _markdown(campaign: Campaign) -> Iterator[str]:
    verdict = "green" if campaign.exit_code == GREEN else "RED"
    yield "# The last campaign"
    yield ""
    yield "Made by `make campaign`; do not edit. What is checked stands in `nexus.proof.campaign`."
    yield "The same command writes [fuzz.txt](fuzz.txt): mutated frames against every decoder, and"
    yield "[saboteurs-sim.txt](saboteurs-sim.txt), [saboteurs-linux.txt](saboteurs-linux.txt): a"
    yield "planted fault for each rung of the ladder, and that it turns red; of a machine's ladder"
    yield "[saboteurs-vm.txt](saboteurs-vm.txt) has a sample of each phase."
    yield "[worlds-ladder.txt](worlds-ladder.txt): the ladder of three grounds compared."
    yield "[longrun.txt](longrun.txt): a million puts into the store."
    yield "[aarch64.txt](aarch64.txt): a smoke test of rings and pages on an emulated aarch64."
    yield ""
    yield f"**{verdict}**: {campaign.seeds} seeds with faults, then a sweep of "
    yield f"{campaign.sweep_rows} failures of a task's trap in {campaign.sweep_runs} runs "
    yield f"({campaign.sweep_ends} of them to the last occurrence in {SWEEP_SPAN // 1_000_000} ms)."
    within, after = HEALTHY_WITHIN / 1e9, campaign.healthy_after_max / 1e9
    yield f"Healthy again at most {after:.3f} s of virtual time after the faults; "
    yield f"{within} s are stated."
    yield ""
    yield from _table(
        "fault",
        ("reached", "fired"),
        [
            (point.value, campaign.reached[point.value], campaign.fired[point.value])
            for point in FaultPoint
            if point not in DEVICE_POINTS
        ],
    )
    yield from _table(
        "recovery", ("times",), [(name, campaign.recoveries[name]) for name in RECOVERIES]
    )
    yield from _table("outcome of a call", ("times",), sorted(campaign.calls.items()))
    yield from _table("failure of the sweep", ("times",), list(campaign.sweep_fired.items()))
    yield from _table(
        "not injected",
        ("made without faults by", "why"),
        [
            (
                trap.__name__,
                SELDOM.get(trap, ", ".join(campaign.makers.get(trap.__name__, ()))),
                why,
            )
            for trap, why in NOT_SWEPT.items()
        ]
        + [(f"{trap.__name__} {status.name}", "", why) for (trap, status), why in UNMADE.items()],
    )
    for problem in campaign.problems[:PROBLEMS_SHOWN_MAX]:
        yield f"- broken: {problem}"
    for name in campaign.never:
        yield f"- never seen, so not tested: {name}"


def _table(head: str, columns: Sequence[str], rows: Sequence[tuple[object, ...]]) -> Iterator[str]:
    yield f"| {' | '.join((head, *columns))} |"
    right = bool(rows) and isinstance(rows[0][-1], int)
    yield f"|---|{('---:|' if right else '---|') * len(columns)}"
    for row in rows:
        yield f"| {' | '.join(map(str, row))} |"
    yield ""


# ---------------------------------------------------------------- command


def main(argv: Sequence[str]) -> int:
    """Run a campaign and print its report."""
    parser = argparse.ArgumentParser(prog="nexus campaign", description=__doc__.split("\n")[0])
    _ = parser.add_argument("--seeds", type=int, default=50, help="how many seeds")
    _ = parser.add_argument("--first", type=int, default=1, help="the first seed")
    _ = parser.add_argument("--nth", type=int, default=SWEEP_NTH_MAX, help="bound of the sweep")
    _ = parser.add_argument("--json", action="store_true", help="print JSON")
    _ = parser.add_argument("--report", type=Path, help="write the report as Markdown here")
    options = parser.parse_args(list(argv))
    campaign = Campaign()
    start = time.monotonic_ns()
    seeds_campaign(campaign, options.first, options.seeds, _complain)
    sweep_campaign(campaign, options.nth, _complain)
    campaign.seconds = (time.monotonic_ns() - start) / 1e9
    text = as_markdown(campaign)
    if options.report is not None:
        _ = options.report.write_text(text, encoding="utf-8")
    _ = sys.stdout.write(as_json(campaign) if options.json else text)
    return campaign.exit_code


def _complain(text: str) -> None:
    _ = sys.stderr.write(f"{text}\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
