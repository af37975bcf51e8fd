"""What a run found, as one value, and its Markdown page (docs/reference/benchmarks.md)."""

import os
import platform
from collections.abc import Iterable
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

import msgspec

from bench.memory import NEEDS_ROOT
from bench.pairing import C_CREDENTIALS, Spread, Variant

NAMES: Final = {
    C_CREDENTIALS: "C SEQPACKET, credentials both ways",
    "python_sockets": "Python send/recv on SEQPACKET",
    "bare": "**ours: bare trap exchange**",
    "typed": "**ours: typed call, everything on**",
    "pipelined": "**ours: 64 calls in one packet** (per call)",
    "connection_bytes": "multiprocessing.Connection, bytes",
    "connection_objects": "multiprocessing.Connection, objects",
    "pyzmq": "pyzmq REQ/REP, ipc://",
    "dbus_fast": "dbus-fast, typed (service interface, proxy)",
    "dbus_fast_messages": "dbus-fast, hand-made messages",
}
QUIET_LOAD_MAX: Final = 0.5  # of the load average per CPU; our own start alone stays below
TITLES: Final = {
    "ipc": "## Calls between two processes",
    "sim": "## Simulated kernel",
    "boot": "## Boot on Linux",
    "state": "## State that lasts",
    "observe": "## Logs, metrics and spans",
    "update": "## Updates",
}
TARGETS_TITLE: Final = "## Targets"
PACKAGES: Final = (
    "msgspec",
    "pyzmq",
    "dbus-fast",
    "lmdb",
    "google-crc32c",
    "prometheus-client",
    "opentelemetry-sdk",
    "structlog",
    "orjson",
)


class Outcome(StrEnum):
    """How a target fared. Not run is never met."""

    MET = "met"
    MISSED = "MISSED"
    NOT_RUN = "not run"


class Target(msgspec.Struct, frozen=True):
    """A number that was promised, and what was measured. Judged by the median."""

    name: str
    bound: float
    at_most: bool
    measured: Spread | None
    why_not: str = ""
    unit: str = ""

    @property
    def outcome(self) -> Outcome:
        """Met, missed or not run."""
        if self.measured is None:
            return Outcome.NOT_RUN
        held = (
            self.measured.median <= self.bound
            if self.at_most
            else self.measured.median >= self.bound
        )
        return Outcome.MET if held else Outcome.MISSED


class Machine(msgspec.Struct, frozen=True):
    """What the numbers depend on."""

    system: str
    cpu_count: int
    python: str  # with its build: how it was compiled is worth a tenth
    packages: dict[str, str]
    load: float  # 1-minute load average when the run started

    @classmethod
    def here(cls) -> "Machine":
        """This machine, now."""
        packages: dict[str, str] = {}
        for name in PACKAGES:
            try:
                packages[name] = version(name)
            except PackageNotFoundError:
                packages[name] = "absent"
        return cls(
            system=f"{platform.system()} {platform.release()} {platform.machine()}",
            cpu_count=len(os.sched_getaffinity(0)),
            python=(
                f"{platform.python_implementation()} {platform.python_version()} "
                f"({', '.join(platform.python_build())}; {platform.python_compiler()})"
            ),
            packages=packages,
            load=os.getloadavg()[0],
        )


class Step(msgspec.Struct, frozen=True):
    """One step of a call: the loop time of doing it once, and how often a call does it."""

    name: str
    ns: float
    times: int = 1

    @property
    def total_ns(self) -> float:
        """Its share of one call."""
        return self.ns * self.times


class IpcResult(msgspec.Struct, frozen=True):
    """bench/ipc: all variants in all placements."""

    rounds: int
    seconds: float
    variants: list[Variant]
    c_p50_us: dict[str, Spread]  # by placement
    layers: list[Step]  # filled when a target is missed, as `steps` is
    steps: list[Step]


class SimResult(msgspec.Struct, frozen=True):
    """bench/sim: typed round trips per second of one core."""

    rounds: int
    rate: Spread
    bare_rate: Spread  # of the bare trap exchange, for the share of the kernel in it
    cpu_us: Spread  # of one round trip; what stays true when others want the core as well
    bare_cpu_us: Spread


class ServiceMemory(msgspec.Struct, frozen=True):
    """Memory of one process of a running system, bytes. PSS shares pages fairly."""

    name: str
    pss: Spread
    private_dirty: Spread


class SpawnCost(msgspec.Struct, frozen=True):
    """A service started with its sandbox and without, up to its first word; sizes in bytes, None
    where they are hidden. `degraded`: steps of the sandbox this machine could not take."""

    isolation: str
    confined_ms: Spread
    unconfined_ms: Spread
    difference_ms: Spread  # within a round
    confined_pss: Spread | None
    unconfined_pss: Spread | None
    confined_dirty: Spread | None
    unconfined_dirty: Spread | None
    degraded: list[str]


class CallCost(msgspec.Struct, frozen=True):
    """A call with something on, and with it off: `ratio` is taken within a round."""

    name: str
    p50_us: Spread
    base_us: Spread
    ratio: Spread


class BootResult(msgspec.Struct, frozen=True):
    """bench/boot: times in ms from the exec of the command."""

    system: str
    rounds: int
    first_ms: Spread  # init's first line
    ready_ms: Spread  # all ready, by the console's clock
    returned_ms: Spread  # the end of `nexus up -d`
    cpu_ms: Spread  # of `nexus up -d` and every process it left, at its end
    foreground_ms: Spread  # all ready as `nexus up` shows it
    services: list[ServiceMemory]  # empty where it may not be read
    spawns: list[SpawnCost]
    calls: list[CallCost]  # confined, against not
    guarded: list[CallCost]  # guarded, against not


class StateRow(msgspec.Struct, frozen=True):
    """A store of bench/state: us for each put and get, ms to open 1e5 keys, bytes of memory."""

    name: str
    put_us: Spread
    group_us: Spread  # of one put of 64 made durable together
    get_us: Spread | None
    warm_ms: Spread | None
    cold_ms: Spread | None  # its files out of the page cache
    pss: Spread | None  # more than before the opening, every seventh key read


class StateResult(msgspec.Struct, frozen=True):
    """bench/state: the engine and its peers in process; statefsd through IPC, p50 and p99 us."""

    rounds: int
    seconds: float
    rows: list[StateRow]
    ipc: dict[str, list[Spread]]


class ObserveRow(msgspec.Struct, frozen=True):
    """One way of bench/observe to do one thing: ns of CPU, and as a multiple of ours."""

    thing: str
    name: str
    ns: Spread
    ratio: Spread


class ObserveResult(msgspec.Struct, frozen=True):
    """bench/observe: the facades and their peers; a typed call with telemetry and without."""

    rounds: int
    rows: list[ObserveRow]
    call: CallCost


class UpdateRow(msgspec.Struct, frozen=True):
    """Sets of one kind, bench/update: s to have all pieces taken, to have it staged, to copy and
    hash the same file, and for the strict reader alone; ratios are to the copy of the round."""

    kind: str
    size: int  # bytes of the set file
    received_s: Spread
    staged_s: Spread
    copied_s: Spread
    checked_s: Spread
    received_ratio: Spread
    ratio: Spread


class UpdateResult(msgspec.Struct, frozen=True):
    """bench/update: the rows; of a large set updated's memory before and at most, bytes, and s."""

    rounds: int
    rows: list[UpdateRow]
    large_size: int
    memory_before: int
    memory_most: int
    large_staged_s: float
    large_copied_s: float


class Report(msgspec.Struct):
    """Everything one run found."""

    machine: Machine
    ipc: IpcResult | None = None
    sim: SimResult | None = None
    boot: BootResult | None = None
    state: StateResult | None = None
    observe: ObserveResult | None = None
    update: UpdateResult | None = None
    targets: list[Target] = []
    missing: dict[str, str] = {}  # part that could not run -> why


def _spread(spread: Spread, digits: int = 2) -> str:
    return f"{spread.median:.{digits}f} [{spread.least:.{digits}f}-{spread.most:.{digits}f}]"


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|---" + "|--:" * (len(head) - 1) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return lines


def _number(value: float, digits: int) -> str:
    return f"{value:,.{digits}f}".replace(",", " ")


def targets_table(targets: Iterable[Target]) -> list[str]:
    """The verdicts, as a Markdown table."""
    rows: list[tuple[str, ...]] = []
    for target in targets:
        digits = 0 if target.bound >= 1000 else 2
        sign = "at most" if target.at_most else "at least"
        if target.measured is None:
            measured = target.why_not
        else:
            spread = target.measured
            measured = (
                f"{_number(spread.median, digits)} "
                f"[{_number(spread.least, digits)} to {_number(spread.most, digits)}]"
            )
        needed = 1 if round(target.bound, 1) == target.bound else 2  # 1.15 is not 1.1
        bound = _number(target.bound, min(digits, needed))
        rows.append((target.name, f"{sign} {bound}{target.unit}", measured, target.outcome.value))
    return _table(("target", "bound", "measured: median [range]", "verdict"), rows)


def _ipc(result: IpcResult) -> list[str]:
    lines = [
        TITLES["ipc"],
        "",
        (
            f"{result.rounds} rounds of {result.seconds:g} s per run. "
            "Every run stands between two runs of the C ping-pong; the ratio is its p50 to "
            "the mean "
            "of theirs, and the table gives the median over rounds [smallest-largest]."
        ),
        (
            "C and the peers carry 64 bytes each way and check nothing. "
            "Our bare exchange carries 64 bytes, with the sender's identity checked both ways. "
            "Our typed call carries a 68-byte request and a 76-byte reply, with identity "
            "both ways, "
            "deadline, trace context, bounded queue accounting, counters and strict decoding."
        ),
        "",
    ]
    labels: dict[str, list[Variant]] = {}
    for variant in result.variants:
        labels.setdefault(variant.placement.label, []).append(variant)
    for label, variants in labels.items():
        place = variants[0].placement
        lines += [
            f"### {label[0].upper()}{label[1:]}",
            "",
            (
                f"Client on CPU {place.client}, server on CPU {place.server}. "
                f"C SEQPACKET ping-pong: p50 {_spread(result.c_p50_us[label])} us."
            ),
            "",
        ]
        rows: list[tuple[str, ...]] = []
        for variant in variants:
            name = NAMES[variant.name]
            if not variant.pairs:
                rows.append((name, f"skipped: {variant.skipped}", "", "", "", ""))
                continue
            rows.append(
                (
                    name,
                    _spread(variant.spread(lambda p: p.ratio)),
                    _number(
                        variant.spread(lambda p: p.sample.p50_ns / p.sample.messages).median / 1000,
                        2,
                    ),
                    _number(
                        variant.spread(lambda p: p.sample.p99_ns / p.sample.messages).median / 1000,
                        1,
                    ),
                    _number(variant.spread(lambda p: p.sample.cpu_ns).median / 1000, 2),
                    _number(variant.spread(lambda p: p.sample.rate).median, 0),
                )
            )
        lines += _table(
            ("variant", "ratio to C", "p50 us", "p99 us", "CPU us per message", "messages/s"), rows
        )
        lines.append("")
    if result.layers:
        lines += [
            "### Where a typed call spends its time",
            "",
            "Medians on one CPU; the layers above the kernel are driven by hand, without one.",
            "",
        ]
        lines += _profile(result.layers)
        lines += [
            "Single steps, each timed in a loop with warm caches; the layers hold them.",
            "",
        ]
        lines += _profile(result.steps)
    return lines


def _profile(steps: list[Step]) -> list[str]:
    rows = [
        (step.name, _number(step.ns, 0), str(step.times), _number(step.total_ns, 0))
        for step in steps
    ]
    rows.append(("sum", "", "", _number(sum(step.total_ns for step in steps), 0)))
    return [*_table(("step", "ns", "times per call", "ns per call"), rows), ""]


def _sim(result: SimResult) -> list[str]:
    rows = [
        (
            name,
            _number(rate.median, 0),
            f"{_number(rate.least, 0)} to {_number(rate.most, 0)}",
            _number(cpu.median, 2),
            _number(1e6 / cpu.median, 0),
        )
        for name, rate, cpu in (
            ("typed call, everything on", result.rate, result.cpu_us),
            ("bare trap exchange", result.bare_rate, result.bare_cpu_us),
        )
    ]
    return [
        TITLES["sim"],
        "",
        (
            f"Round trips per second of wall-clock time on one core, {result.rounds} rounds; "
            "the same programs as above, client and server in one process."
        ),
        "",
        *_table(("variant", "per second", "range", "CPU us each", "per CPU second"), rows),
        "",
    ]


def _boot(result: BootResult) -> list[str]:
    phases = (
        ("`nexus up -d`: init's first line", result.first_ms),
        ("`nexus up -d`: all ready", result.ready_ms),
        ("`nexus up -d`: the command returns", result.returned_ms),
        ("`nexus up`: all ready, as shown", result.foreground_ms),
    )
    return [
        TITLES["boot"],
        "",
        (
            f"`{result.system}`, started {result.rounds} times each way, ms since the exec of the "
            "installed command."
        ),
        "",
        *_table(
            ("until", "ms: median [range]"),
            ((name, _spread(spread, 0)) for name, spread in phases),
        ),
        "",
        (
            f"CPU time of `nexus up -d` and all processes it started: {_spread(result.cpu_ms, 0)} "
            "ms, which other load changes less."
        ),
        "",
        *_system_memory(result),
        *_sandbox(result),
        *_guarded(result),
    ]


def _kib(spread: Spread | None) -> str:
    return "hidden" if spread is None else _number(spread.median / 1024, 0)


def _system_memory(result: BootResult) -> list[str]:
    lines = ["### Memory", ""]
    if not result.services:
        return [*lines, f"Not measured: {NEEDS_ROOT}.", ""]
    rows = [(entry.name, _kib(entry.pss), _kib(entry.private_dirty)) for entry in result.services]
    rows.append(
        (
            "all",
            _number(sum(entry.pss.median for entry in result.services) / 1024, 0),
            _number(sum(entry.private_dirty.median for entry in result.services) / 1024, 0),
        )
    )
    return [
        *lines,
        (
            "Every process of the system, when all are ready; medians. PSS shares the pages of "
            "libraries with whatever else runs from this Python."
        ),
        "",
        *_table(("process", "PSS KiB", "private dirty KiB"), rows),
        "",
    ]


def _sandbox(result: BootResult) -> list[str]:
    times: list[tuple[str, ...]] = []
    sizes: list[tuple[str, ...]] = []
    for cost in result.spawns:
        label = f"isolation = {cost.isolation}"
        spreads = (cost.confined_ms, cost.unconfined_ms, cost.difference_ms)
        times.append((label, *(_spread(each, 1) for each in spreads)))
        held = (cost.confined_pss, cost.unconfined_pss, cost.confined_dirty, cost.unconfined_dirty)
        sizes.append((label, *(_kib(each) for each in held)))
    lacking = sorted({step for cost in result.spawns for step in cost.degraded})
    missing = f" Steps this machine could not take: {', '.join(lacking)}." if lacking else ""
    return [
        "### What the sandbox costs",
        "",
        (
            "The same with it and without, in paired rounds. A service from the Spawn trap to its "
            f"first word, ms: median [range].{missing}"
        ),
        "",
        *_table(("service", "confined", "not confined", "difference"), times),
        "",
        "Its memory then, KiB.",
        "",
        *_table(
            ("service", "PSS", "not confined", "private dirty", "not confined"),
            sizes,
        ),
        "",
        "One round trip on one CPU, p50: median [range].",
        "",
        *_table(
            ("call", "confined us", "not confined us", "ratio"),
            (_call_row(cost) for cost in result.calls),
        ),
        "",
    ]


def _guarded(result: BootResult) -> list[str]:
    return [
        "### What a guarded call costs",
        "",
        (
            "`authority.require` in the handler against the same call without it, all services on "
            "one CPU, p50: median [range]. policyd writes down each decision it is asked for."
        ),
        "",
        *_table(
            ("call", "guarded us", "unguarded us", "ratio"),
            (_call_row(cost) for cost in result.guarded),
        ),
        "",
    ]


def _call_row(cost: CallCost) -> tuple[str, ...]:
    return (cost.name, *(_spread(each) for each in (cost.p50_us, cost.base_us, cost.ratio)))


def _busy(machine: Machine) -> list[str]:
    """A warning when something else was running."""
    if machine.load < machine.cpu_count * QUIET_LOAD_MAX:
        return []
    return [
        (
            "**The machine was busy when the run began.** Other work evicts caches and preempts, "
            "which costs Python more than C: the ratios below are pessimistic. "
            "Run again when quiet."
        ),
        "",
    ]


def _described(machine: Machine) -> str:
    return (
        f"{machine.system}, {machine.cpu_count} CPUs, load {machine.load:.1f} at start; "
        f"{machine.python}"
    )


STATE_NAMES: Final = {
    "flush": "bare flush: one write of as many bytes",
    "ours": "**ours: the engine in process**",
    "sqlite": "SQLite, WAL, FULL",
    "lmdb": "lmdb",
}


def _observe(result: ObserveResult) -> list[str]:
    rows = [(row.thing, row.name, _spread(row.ns, 0), _spread(row.ratio)) for row in result.rows]
    return [
        TITLES["observe"],
        "",
        (
            f"ns of CPU of one operation, in one process on one CPU, {result.rounds} rounds in "
            "turn: median [range]; the ratio is to ours within a round. Of a log record it is the "
            "writer's part and logd's, which takes it into a journal, without the doorbell: at "
            "most 100 calls a second. A scrape is metricsd's reading of 20 pages, the encoding of "
            "its answers and exportd's text, without the calls between the two. structlog is set "
            "up as its page on performance says; opentelemetry-sdk exports nowhere."
        ),
        "",
        *_table(("what", "who", "ns", "times ours"), rows),
        "",
        (
            "A typed call on one CPU, p50, whose server records each as a span, counts it and "
            "observes a value, against the same call without: median [range]."
        ),
        "",
        *_table(("call", "with us", "without us", "ratio"), [_call_row(result.call)]),
        "",
    ]


def _state(result: StateResult) -> list[str]:
    def cell(spread: Spread | None, digits: int, scale: float = 1.0) -> str:
        if spread is None:
            return ""
        scaled = Spread(spread.median / scale, spread.least / scale, spread.most / scale)
        return _spread(scaled, digits)

    rows = [
        (
            STATE_NAMES[row.name],
            cell(row.put_us, 0),
            cell(row.group_us, 2),
            cell(row.get_us, 2),
            cell(row.warm_ms, 1),
            cell(row.cold_ms, 1),
            cell(row.pss, 1, 1024 * 1024),
        )
        for row in result.rows
    ]
    lines = [
        TITLES["state"],
        "",
        (
            f"{result.rounds} rounds of {result.seconds:g} s for each store and kind of put, taken "
            "in turns on one disk: medians over rounds [smallest-largest]. "
            "1e5 keys of 20 bytes with values of 100; every put is durable when it returns. "
            "Memory is what a process has more once the store is open and a seventh of it read."
        ),
        "",
        *_table(
            (
                "store",
                "durable put us",
                "group of 64, us per put",
                "get us",
                "open 1e5 keys warm ms",
                "cold ms",
                "memory MiB",
            ),
            rows,
        ),
        "",
        (
            "Opening reads the whole checkpoint into memory and checks it, once, with one CRC for "
            "each MiB; lmdb maps its file and checks nothing, which is what stands between the two."
        ),
        "",
    ]
    if result.ipc:
        lines += [
            "Through IPC: a client, statefsd, its device by the kernel's traps, everything on.",
            "",
            *_table(
                ("request to statefsd", "p50 us", "p99 us"),
                [
                    (way, *(_spread(each, 0) for each in spreads))
                    for way, spreads in result.ipc.items()
                ],
            ),
            "",
        ]
    return lines


def _update(result: UpdateResult) -> list[str]:
    def cell(spread: Spread) -> str:
        scaled = (1000 * each for each in (spread.median, spread.least, spread.most))
        return _spread(Spread(*scaled), 0)

    rows = [
        (
            row.kind,
            _number(row.size / 1e6, 1),
            cell(row.received_s),
            cell(row.staged_s),
            cell(row.copied_s),
            cell(row.checked_s),
            _spread(row.received_ratio),
            _spread(row.ratio),
        )
        for row in result.rows
    ]
    grown = (result.memory_most - result.memory_before) / 2**20
    return [
        TITLES["update"],
        "",
        (
            f"{result.rounds} boots for each kind of set, ms: median [smallest-largest]. A client "
            "reads the set from a block device and moves it to updated in VMOs of 1 MiB. Received: "
            "every piece is hashed and in the slot. Staged: made durable, read back, compared with "
            "what was signed, every chunk unpacked and compared. Beside it, before and after each "
            "stage: the same file copied, made durable, read back and hashed; and the strict "
            "reader alone over that copy, in one process."
        ),
        "",
        *_table(
            (
                "set",
                "MB",
                "received",
                "staged",
                "copied and hashed",
                "strict reader",
                "received to copied",
                "staged to copied",
            ),
            rows,
        ),
        "",
        (
            f"A set of {_number(result.large_size / 2**20, 0)} MiB: staged in "
            f"{result.large_staged_s:.2f} s, copied and hashed in {result.large_copied_s:.2f} s. "
            f"updated had {_number(result.memory_before / 2**20, 1)} MiB resident before and "
            f"{_number(result.memory_most / 2**20, 1)} MiB at most, {_number(grown, 1)} MiB more."
        ),
        "",
        (
            "What a stage does more than the copy: a second SHA-256 over every byte, for the "
            "chunks (the first is over the file, as it comes); unpacking, of what is packed; a VMO "
            "for each MiB, made, mapped and copied. A disk slower than the page cache that these "
            "files are in adds the same time to both."
        ),
        "",
    ]


def render(report: Report) -> str:
    """The whole page."""
    machine = report.machine
    packages = ", ".join(f"{name} {number}" for name, number in machine.packages.items())
    lines = [
        "<!-- Generated by `make bench`; do not edit. -->",
        "# Benchmarks",
        "",
        "The last report. Ratios carry over to other machines, absolute times do not.",
        "",
        f"Machine: {_described(machine)}; {packages}.",
        "",
        *_busy(machine),
        TARGETS_TITLE,
        "",
        "Judged by the median; calls on one CPU. A target that did not run is not met.",
        "",
        *targets_table(report.targets),
        "",
    ]
    if report.ipc is not None:
        lines += _ipc(report.ipc)
    if report.sim is not None:
        lines += _sim(report.sim)
    if report.boot is not None:
        lines += _boot(report.boot)
    if report.state is not None:
        lines += _state(report.state)
    if report.observe is not None:
        lines += _observe(report.observe)
    if report.update is not None:
        lines += _update(report.update)
    for part, reason in report.missing.items():
        lines += [f"## {part}: not run", "", reason, ""]
    return "\n".join(lines).rstrip() + "\n"


def write(report: Report, path: Path) -> None:
    """Write the page."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(report), encoding="utf-8")


def refresh(report: Report, path: Path, part: str) -> None:
    """Put one part's section and targets into a page that is there; the rest stays as it is."""
    path.write_text(refreshed(path.read_text(encoding="utf-8"), report, part), encoding="utf-8")


def refreshed(page: str, report: Report, part: str) -> str:
    """`page` with the section of `part`, and the rows of its targets, as `report` has them."""
    fresh = _sections(render(report))
    sections = _sections(page)
    title = TITLES[part]
    if title in fresh:
        first, *rest = fresh[title].splitlines()[1:]
        apart = f"Measured apart from the rest: {_described(report.machine)}."
        sections[title] = "\n".join([title, first, apart, "", *_busy(report.machine), *rest, ""])
    targets = [line for line in fresh[TARGETS_TITLE].splitlines() if line[:1] != "|"]
    rows = {
        line.split("|")[1]: line
        for text in (sections.get(TARGETS_TITLE, ""), fresh[TARGETS_TITLE])
        for line in text.splitlines()
        if line[:1] == "|"
    }  # one of this name takes the place of the former one
    sections[TARGETS_TITLE] = "\n".join([*targets, *rows.values()])
    return "\n".join(text.rstrip() + "\n" for text in sections.values())


def _sections(page: str) -> dict[str, str]:
    """The page in pieces, each under the line of its title; the first is under the empty one."""
    sections: dict[str, list[str]] = {"": []}
    title = ""
    for line in page.splitlines():
        if line.startswith("## "):
            title = line
            sections[title] = []
        sections[title].append(line)
    return {title: "\n".join(lines) for title, lines in sections.items()}
