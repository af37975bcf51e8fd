"""The kernel's self tests of a machine with several CPUs: rungs 39, 40 and 42 of the ladder.

They say something about a machine of our own alone, where init is process 1: elsewhere `smp` is a
set of the host's CPUs. All is read where Linux itself keeps account: which CPUs are online, on
which one a task ran last, and how often each was interrupted.
"""

import os
import time
from pathlib import Path
from typing import Any, Final

from nexus.abi import (
    NEVER,
    BootImage,
    Call,
    Kill,
    Nanos,
    Now,
    Program,
    ReplyRecv,
    SleepUntil,
    Spawn,
    Spawned,
    SpawnSpec,
)
from nexus.kernel.linux.kernel import LinuxKernel
from nexus.kernel.linux.selftest import Evidence, Failed, reap, require, run, spec_of

ONLINE: Final = Path("/sys/devices/system/cpu/online")
INTERRUPTS: Final = Path("/proc/interrupts")
STAT: Final = Path("/proc/stat")
# What the rows end with. Linux wakes a task on another CPU by the first; where that CPU idles, or
# has a cache of its own, it hands the task over by the second: ttwu_queue_wakelist in kernel/sched.
RESCHEDULING: Final = ("Rescheduling interrupts", "Function call interrupts")
LAST_CPU: Final = 36  # of /proc/PID/stat behind the command's name: processor, proc_pid_stat(5)
TICKS_OF: Final = slice(1, 9)  # of a CPU's line of /proc/stat: the time it has run, and idled
BUSY: Final = 30_000_000  # ns that a CPU is kept busy; several of its ticks
CALLS: Final = 1000
ANSWER_MAX: Final = 1_000_000_000  # ns for one answer
ECHO: Final = "kselftest.echo"


def cpus_online(kernel: LinuxKernel) -> list[Evidence]:
    """#39: every further CPU is in Linux's own list, and its own count of ticks grows."""
    listed = _listed(ONLINE.read_text("ascii"))
    found: list[Evidence] = []
    for cpu in kernel.cpus[1:]:
        require(cpu in listed, f"CPU {cpu} is not online: {sorted(listed)}")
        before = _ticks(cpu)
        _keep_busy(cpu, kernel.cpus)
        found.append({"cpu": cpu, "ticks_before": before, "ticks": _ticks(cpu)})
    return found


def tasks_placed(kernel: LinuxKernel) -> Evidence:
    """#40: a task that is placed on a CPU runs there, on every one of them."""
    evidence: Evidence = {}

    async def main(boot: BootImage) -> int:
        placed = {}
        for index, cpu in enumerate(kernel.cpus):
            child = await _echoing(boot, index)
            await _ask(boot, child, 2)
            placed[str(cpu)] = _last_cpu(child)
            await _end(child)
        evidence["placed"] = placed
        wrong = {cpu: last for cpu, last in placed.items() if int(cpu) != last}
        require(not wrong, f"tasks placed on a CPU, and where they ran: {wrong}")
        return 0

    run(kernel, main)
    online = _listed(ONLINE.read_text("ascii"))
    return {**evidence, "mask": sum(1 << cpu for cpu in online)}


def calls_interrupt(kernel: LinuxKernel) -> Evidence:
    """#42: calls between two CPUs interrupt both, and more often than rest of the same length."""
    evidence: Evidence = {}

    async def main(boot: BootImage) -> int:
        allowed = os.sched_getaffinity(0)
        os.sched_setaffinity(0, (kernel.cpus[0],))
        try:
            child = await _echoing(boot, 1)
            await _ask(boot, child, 2)
            before, begun = rescheduled(), await Now()
            await _ask(boot, child, CALLS)
            after, ended = rescheduled(), await Now()
            _ = await SleepUntil(Nanos(ended + (ended - begun)))
            rested = rescheduled()
            await _end(child)
        finally:
            os.sched_setaffinity(0, allowed)
        evidence.update(
            calls=CALLS,
            took=ended - begun,
            before=before,
            after=after,
            rested=rested,
            cpus=list(kernel.cpus[:2]),
        )
        for cpu in kernel.cpus[:2]:
            grown, idle = after[cpu] - before[cpu], rested[cpu] - after[cpu]
            require(grown > 0, f"CPU {cpu} was never asked to reschedule")
            require(grown > idle, f"CPU {cpu}: {grown} times while it called, {idle} at rest")
        return 0

    run(kernel, main)
    return evidence


def rescheduled() -> list[int]:
    """How often each CPU was asked by another one to run another task."""
    rows = [
        [int(word) for word in line.split()[1:] if word.isdecimal()]
        for line in INTERRUPTS.read_text("ascii").splitlines()
        if line.rstrip().endswith(RESCHEDULING)
    ]
    if len(rows) != len(RESCHEDULING):
        raise Failed(f"Linux counts {len(rows)} of {RESCHEDULING}")
    return [sum(counts) for counts in zip(*rows, strict=True)]


# ---- steps


def _listed(text: str) -> set[int]:
    """The numbers of a list as Linux writes it ("0-1,3")."""
    found: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return found


def _ticks(cpu: int) -> int:
    """Ticks that a CPU has counted, working and idle."""
    for line in STAT.read_text("ascii").splitlines():
        words = line.split()
        if words[0] == f"cpu{cpu}":
            return sum(map(int, words[TICKS_OF]))
    return 0


def _keep_busy(cpu: int, allowed: tuple[int, ...]) -> None:
    os.sched_setaffinity(0, (cpu,))
    until = time.clock_gettime_ns(time.CLOCK_MONOTONIC) + BUSY
    while time.clock_gettime_ns(time.CLOCK_MONOTONIC) < until:
        pass
    os.sched_setaffinity(0, allowed)


async def _echoing(boot: BootImage, cpu: int) -> Spawned:
    spec: SpawnSpec = spec_of(boot, f"{ECHO}{cpu}", ECHO)
    return await Spawn(spec._replace(cpu=cpu))


async def _ask(boot: BootImage, child: Spawned, count: int) -> None:
    for _ in range(count):
        until = Nanos(await Now() + ANSWER_MAX)
        _ = await Call(child.slot, b"?", boot.endpoint, child.link, until)


async def _end(child: Spawned) -> None:
    await Kill(child.pid)
    _ = await reap(child)


def _last_cpu(child: Spawned) -> int:
    """The CPU that the process ran on last."""
    text = Path(f"/proc/{child.pid}/stat").read_text("ascii", "replace")
    return int(text.rpartition(")")[2].split()[LAST_CPU])


async def _echo(boot: BootImage) -> int:
    receive = ReplyRecv((boot.endpoint,), NEVER)
    while True:
        message: Any = await receive
        receive.slot, receive.data = boot.control, message.data


PROGRAMS: Final = {ECHO: Program(name=ECHO, main=_echo, digest="")}
