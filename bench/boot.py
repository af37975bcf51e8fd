"""bench/boot: how long a system takes to be all ready on Linux, and the memory of each process.

Boots as the proof does, in a process group of its own, and ends it once everything is ready.
The times are those of the kernel's own events. Memory is read from /proc/PID/smaps_rollup, which
for a confined service takes root.
"""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from bench.measure import UnavailableError
from bench.pairing import Spread, WorkerError
from bench.report import BootResult, ServiceMemory
from nexus.abi import INIT_NAME, Event, EventKind
from nexus.init.plan import Plan, load_plan
from nexus.proof.runner import Job, run_boot

SYSTEM: Final = Path(__file__).parent.parent / "systems" / "minimal.toml"
BOOT_NS_MAX: Final = 30_000_000_000  # ns; a loaded machine still boots in it
SEED: Final = 1
CHILD: Final = (sys.executable, "-m", "bench.boot_child")
KIB: Final = 1024
INIT_READY: Final = "init: ready"


class Watcher:
    """Sees a boot's events; `ready_ns` is set when init and every service have said so."""

    def __init__(self, services: tuple[str, ...]) -> None:
        self._awaited = {f"{name}: ready" for name in services} | {INIT_READY}
        self.pids: dict[str, int] = {}
        self.first_ns: int | None = None
        self.ready_ns: int | None = None
        self.memory: dict[str, tuple[int, int]] = {}

    def __call__(self, event: Event) -> bool:
        """Take in one event; True when everything is ready."""
        if event.kind is EventKind.SPAWN:
            self.pids[str(event.fields["name"])] = int(event.pid)
        if event.kind is not EventKind.CONSOLE:
            return False
        if self.first_ns is None:
            self.first_ns = event.time
            self.pids.setdefault(INIT_NAME, int(event.pid))
        self._awaited.discard(str(event.fields["line"]))
        if self._awaited:
            return False
        self.ready_ns = event.time
        self.memory = {name: memory_of(pid) for name, pid in self.pids.items()}
        return True


def memory_of(pid: int) -> tuple[int, int]:
    """PSS and private dirty memory of a process, bytes; zeros if it may not be read."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
    except (PermissionError, FileNotFoundError):
        return 0, 0
    sizes = {
        line.split(":")[0]: int(line.split()[1]) * KIB
        for line in text.splitlines()
        if line.endswith(" kB")
    }
    return sizes["Pss"], sizes["Private_Dirty"]


def _boot_once(file: Path, plan: Plan) -> tuple[float, float, dict[str, tuple[int, int]]]:
    watcher = Watcher(tuple(service.name for service in plan.services))
    job = Job(
        ground="linux",
        system=str(file),
        smp=len(os.sched_getaffinity(0)),
        seed=SEED,
        limit=BOOT_NS_MAX,
    )
    start = time.monotonic_ns()
    trace = run_boot(job, timeout=BOOT_NS_MAX, watch=watcher, command=CHILD)
    if watcher.ready_ns is None or watcher.first_ns is None:
        raise WorkerError(f"{file.name} never became ready\n{trace.output}")
    return (
        (watcher.ready_ns - start) / 1e6,
        (watcher.ready_ns - watcher.first_ns) / 1e6,
        watcher.memory,
    )


def run(*, rounds: int, system: Path | None, progress: Callable[[str], None]) -> BootResult:
    """Boot a system `rounds` times and end it each time when it is ready."""
    if not Path("/proc/self/smaps_rollup").exists():
        raise UnavailableError("no /proc/PID/smaps_rollup: Linux 4.14 or newer is needed")
    file = system or SYSTEM
    plan = load_plan(file)
    whole: list[float] = []
    inner: list[float] = []
    memory: dict[str, list[tuple[int, int]]] = {}
    for index in range(rounds):
        since_exec, since_init, sizes = _boot_once(file, plan)
        whole.append(since_exec)
        inner.append(since_init)
        for name, size in sizes.items():
            memory.setdefault(name, []).append(size)
        progress(
            f"boot: round {index + 1}: ready {since_exec:.0f} ms after exec, "
            f"{since_init:.0f} ms after init's first line"
        )
    services = [
        ServiceMemory(
            name, Spread.of([pss for pss, _ in sizes]), Spread.of([dirty for _, dirty in sizes])
        )
        for name, sizes in memory.items()
    ]
    return BootResult(file.name, rounds, Spread.of(whole), Spread.of(inner), services)
