"""bench/boot: how long `nexus up` takes to be all ready, what the system holds in memory, and what
its sandbox and its policy cost.

Runs the installed command as a person does, in directories of its own, and ends the system with
`nexus down`. When everything was ready is read from the console file, which has the kernel's
clock; it is the clock this process measures the command with.
"""

import json
import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NamedTuple

from bench import guard, sandbox
from bench.measure import UnavailableError, cpu_time_ns
from bench.memory import NEEDS_ROOT, Memory, descendants, may_read, memory_of
from bench.pairing import Spread, WorkerError
from bench.report import BootResult, ServiceMemory, Target
from nexus.abi import INIT_NAME
from nexus.init.plan import load_plan

SYSTEM: Final = Path(__file__).parent.parent / "systems" / "minimal.toml"
COMMAND: Final = Path(sys.executable).with_name("nexus")
READY_SECONDS_MAX: Final = 0.7  # from exec of the command to everything ready
MEMORY_MAX: Final = 45.0  # MB of PSS, init included
UP_SECONDS_MAX: Final = 30.0  # a loaded machine still boots in it
DOWN_SECONDS_MAX: Final = 20.0
READ_SIZE: Final = 65_536  # bytes
MEGABYTE: Final = 1_000_000
INIT_READY: Final = "init: ready"
CONSOLE: Final = "[console]"
PLACES: Final = ("NEXUS_STATE_DIR", "NEXUS_RUNTIME_DIR", "NEXUS_LOG_DIR")


class Detached(NamedTuple):
    """One `nexus up -d`. Times are ms from its exec: init's first line, the last service ready,
    the end of the command; `cpu` is what the command and the system's processes have used, which
    others on the machine change little. `memory` is by process, empty where it is hidden."""

    first: float
    ready: float
    returned: float
    cpu: float
    memory: dict[str, Memory]


@contextmanager
def _home() -> Iterator[dict[str, str]]:
    """An environment whose systems keep everything in a directory that goes away."""
    with tempfile.TemporaryDirectory(prefix="nexus-bench-") as name:
        places = {variable: str(Path(name, variable[6:9].lower())) for variable in PLACES}
        yield {**os.environ, **places}


def _nexus(environment: dict[str, str], *words: str, wait: float) -> str:
    """What a command of nexus says. Raises WorkerError if it fails or takes too long."""
    command = (str(COMMAND), *words)
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=wait, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise WorkerError(f"nexus {' '.join(words)}: nothing after {wait:g} s") from error
    if done.returncode != 0:
        raise WorkerError(f"nexus {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


def _awaited(file: Path) -> set[str]:
    """The console lines that say that everything is ready."""
    names = (service.name for service in load_plan(file).services)
    return {f"{name}: ready" for name in names} | {INIT_READY}


def _console_times(log: Path, awaited: set[str]) -> tuple[float, float]:
    """When the first line was said and the last of those awaited, s of CLOCK_MONOTONIC."""
    times: list[float] = []
    lacking = set(awaited)
    for line in log.read_text(encoding="utf-8").splitlines():
        stamp, _, rest = line.partition(" ")
        _, said, text = rest.partition(f" {CONSOLE} ")
        if said and lacking:
            times.append(float(stamp))
            lacking.discard(text)
    if lacking:
        raise WorkerError(f"the console never said {', '.join(sorted(lacking))}")
    return times[0], times[-1]


def _memory(environment: dict[str, str], root: int) -> dict[str, Memory]:
    """The memory of every process of a running system, by the name of its service."""
    status = json.loads(_nexus(environment, "status", "--json", wait=DOWN_SECONDS_MAX))
    names = {entry["pid"]: entry["service"] for entry in status["services"]}
    names[root] = INIT_NAME
    found: dict[str, Memory] = {}
    for pid in descendants(root):
        memory = memory_of(pid)
        assert memory is not None, "only asked of root, who may read it"
        found[names.get(pid, f"process {pid}")] = memory
    return found


def _detached(file: Path, awaited: set[str]) -> Detached:
    """`nexus up -d`, and what it left running."""
    with _home() as environment:
        before = _cpu_of_children()
        start = time.monotonic()
        said = json.loads(_nexus(environment, "up", "-d", "--json", str(file), wait=UP_SECONDS_MAX))
        returned = time.monotonic()
        try:
            cpu = _cpu_of_children() - before + cpu_time_ns(descendants(said["pid"])) / 1e6
            first, ready = _console_times(Path(said["log_dir"], "console.log"), awaited)
            memory = _memory(environment, said["pid"]) if may_read() else {}
        finally:
            _ = _nexus(environment, "down", wait=DOWN_SECONDS_MAX)
    times = [(moment - start) * 1000 for moment in (first, ready, returned)]
    return Detached(times[0], times[1], times[2], cpu, memory)


def _cpu_of_children() -> float:
    """CPU time of the commands that have ended, ms."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (used.ru_utime + used.ru_stime) * 1000


def _foreground(file: Path, awaited: set[str]) -> float:
    """`nexus up`: ms from its exec until it has shown that everything is ready."""
    lacking = set(awaited)
    with _home() as environment:
        start = time.monotonic()
        with subprocess.Popen(
            (str(COMMAND), "up", str(file)),
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        ) as child:
            try:
                ready = _read_until(child, lacking, start + UP_SECONDS_MAX)
            finally:
                child.send_signal(signal.SIGINT)
                try:
                    _ = child.wait(DOWN_SECONDS_MAX)
                except subprocess.TimeoutExpired:
                    child.kill()
    return (ready - start) * 1000


def _read_until(child: "subprocess.Popen[bytes]", lacking: set[str], end: float) -> float:
    """When the last of the awaited lines came. Raises WorkerError."""
    assert child.stdout is not None
    rest = b""
    while lacking:
        readable, _, _ = select.select([child.stdout], [], [], max(0.0, end - time.monotonic()))
        data = os.read(child.stdout.fileno(), READ_SIZE) if readable else b""
        if not data:
            raise WorkerError(f"nexus up never said {', '.join(sorted(lacking))}")
        *lines, rest = (rest + data).split(b"\n")
        lacking.difference_update(line.decode() for line in lines)
    return time.monotonic()


def run(
    *, rounds: int, seconds: float, system: Path | None, progress: Callable[[str], None]
) -> tuple[BootResult, list[Target]]:
    """Start a system `rounds` times each way; then what its sandbox and its policy cost."""
    if not COMMAND.exists():
        raise UnavailableError(f"no {COMMAND}: install nexus next to this Python (make venv)")
    file = (system or SYSTEM).absolute()
    awaited = _awaited(file)
    detached: list[Detached] = []
    shown: list[float] = []
    for index in range(rounds):
        detached.append(_detached(file, awaited))
        shown.append(_foreground(file, awaited))
        last = detached[-1]
        progress(
            f"boot: round {index + 1}: up -d ready after {last.ready:.0f} ms, back after "
            f"{last.returned:.0f} ms; in the foreground ready after {shown[-1]:.0f} ms"
        )
    spawns = sandbox.spawns(rounds=rounds, progress=progress)
    calls = sandbox.calls(rounds=rounds, seconds=seconds, progress=progress)
    guarded = guard.run(progress=progress)
    result = BootResult(
        system=file.name,
        rounds=rounds,
        first_ms=Spread.of([each.first for each in detached]),
        ready_ms=Spread.of([each.ready for each in detached]),
        returned_ms=Spread.of([each.returned for each in detached]),
        cpu_ms=Spread.of([each.cpu for each in detached]),
        foreground_ms=Spread.of(shown),
        services=_by_name([each.memory for each in detached]),
        spawns=spawns,
        calls=calls,
        guarded=guarded,
    )
    return result, _targets(detached, shown)


def _by_name(rounds: list[dict[str, Memory]]) -> list[ServiceMemory]:
    """The spread over the rounds, for each process."""
    return [
        ServiceMemory(
            name,
            Spread.of([each[name].pss for each in rounds]),
            Spread.of([each[name].private_dirty for each in rounds]),
        )
        for name in rounds[0]
    ]


def _targets(detached: list[Detached], shown: list[float]) -> list[Target]:
    """The detached command counts until it has returned: that is when a person may go on."""
    sums = [
        sum(memory.pss for memory in each.memory.values()) / MEGABYTE
        for each in detached
        if each.memory
    ]
    return [
        Target(
            "`nexus up -d`, exec to return with all ready",
            READY_SECONDS_MAX,
            at_most=True,
            measured=Spread.of([each.returned / 1000 for each in detached]),
            unit=" s",
        ),
        Target(
            "`nexus up`, exec to all ready",
            READY_SECONDS_MAX,
            at_most=True,
            measured=Spread.of([each / 1000 for each in shown]),
            unit=" s",
        ),
        Target(
            "PSS of the whole system, init included",
            MEMORY_MAX,
            at_most=True,
            measured=Spread.of(sums) if sums else None,
            why_not=NEEDS_ROOT,
            unit=" MB",
        ),
    ]
