"""Saboteurs of the kernels' own rungs: 1-4, and with several CPUs 39-47."""

import os
from collections import deque
from collections.abc import Collection
from pathlib import Path
from typing import Any, Final

from nexus.abi import SpawnReason
from nexus.kernel.core import SLOT_SIZE, Account, SpawnRefused
from nexus.kernel.linux import LinuxKernel, selftest_cpus
from nexus.kernel.sim import SimKernel, sched
from nexus.kernel.sim.objects import Task
from nexus.kernel.sim.sched import CPUS_MAX, IDLE, Cpu, Scheduler
from nexus.proof.sabotage import Saboteur, replace
from nexus.protocols.ladder import Ground

SIM: Final = frozenset({Ground.SIM})
LINUX: Final = frozenset({Ground.LINUX, Ground.VM})
VM: Final = frozenset({Ground.VM})
BOTH: Final = SIM | LINUX
SECOND_CPU: Final = Path("/sys/devices/system/cpu/cpu1/online")
SENTINEL_CHILD: Final = "kselftest.cycle"  # the task that #2 starts and ends 64 times


def _spawn_reasons() -> None:
    def faulty(_kernel: Any, refusal: SpawnRefused) -> SpawnReason:
        if refusal.reason is SpawnReason.CAP_TABLE_FULL:
            return SpawnReason.INVALID_PAYLOAD
        return refusal.reason

    _ = replace(SimKernel, "spawn_reason", faulty)
    _ = replace(LinuxKernel, "_spawn_reason", faulty)


def _sentinel_sim() -> None:
    def faulty(kernel: SimKernel, task: Task) -> list[Task]:
        woken: list[Task] = original(kernel, task)
        kernel.ipc.endpoints_alive += task.name == SENTINEL_CHILD
        return woken

    original = replace(SimKernel, "release_endpoints", faulty)


def _sentinel_linux() -> None:
    def faulty(kernel: LinuxKernel, child: Any) -> None:
        original(kernel, child)
        if child.name == SENTINEL_CHILD:
            kernel.shares.endpoints.take(1)

    original = replace(LinuxKernel, "_give_back", faulty)


def _heap_report() -> None:
    def faulty(account: Account) -> dict[str, object]:
        fields: dict[str, Any] = original(account)
        fields["heap_budget_used"] -= SLOT_SIZE
        fields["heap_budget_free"] += SLOT_SIZE
        return fields

    original = replace(Account, "fields", faulty)


def _qos_rollback() -> None:
    def faulty(_scheduler: Scheduler, queue: deque[Task], _index: int, task: Task) -> None:
        queue.append(task)

    _ = replace(Scheduler, "put_back", faulty)


def _cpu_online() -> None:
    def faulty(scheduler: Scheduler) -> None:
        original(scheduler)
        for cpu in scheduler.smp[1:]:
            cpu.online = True  # by CPU 0, which waits for nobody
            cpu.at = IDLE

    original = replace(Scheduler, "start", faulty)


def _cpu_online_vm() -> None:
    """A machine of one CPU, before init looks at it."""
    _ = SECOND_CPU.write_text("0", "ascii")


def _smp_online_vm() -> None:
    """Whoever is to be placed on one CPU is placed on CPU 0."""

    def faulty(pid: int, cpus: Collection[int]) -> None:
        original(pid, {0} if len(cpus) == 1 else cpus)

    original = replace(os, "sched_setaffinity", faulty)


def _resched_vm() -> None:
    """The counters are read once."""
    read: list[list[int]] = []

    def faulty() -> list[int]:
        if not read:
            read.append(original())
        return read[0]

    original = replace(selftest_cpus, "rescheduled", faulty)


def _smp_online() -> None:
    _ = replace(Scheduler, "online_mask", lambda scheduler: (1 << len(scheduler.smp)) - 1)


def _counterfactual() -> None:
    def faulty(scheduler: Scheduler, cpu: Cpu) -> bool:
        cpu.sent += cpu.force_send_fail
        sent: bool = original(scheduler, cpu)
        return sent

    original = replace(Scheduler, "send_signal", faulty)


def _resched() -> None:
    def send(scheduler: Scheduler, cpu: Cpu) -> bool:
        sent: bool = original(scheduler, cpu)
        cpu.acknowledged += sent
        return sent

    def take(_scheduler: Scheduler, cpu: Cpu) -> None:
        cpu.signal = cpu.pending = False
        cpu.taken += 1

    original = replace(Scheduler, "send_signal", send)
    _ = replace(Scheduler, "take_signal", take)


def _reject_target() -> None:
    _ = replace(Scheduler, "in_range", lambda _scheduler, index: 0 <= index <= CPUS_MAX)


def _reject_offline() -> None:
    _ = replace(Scheduler, "is_online", lambda _scheduler, _cpu: True)


def _work_stealing() -> None:
    def faulty(scheduler: Scheduler, thief: Cpu) -> Task | None:
        waiting = [
            task
            for cpu in scheduler.smp
            for queue in cpu.queues
            for task in queue
            if cpu is not thief and not task.pinned
        ]
        if len(waiting) == 1:
            thief.steals += 1
            return None
        stolen: Task | None = original(scheduler, thief)
        return stolen

    original = replace(Scheduler, "steal", faulty)


def _steal_bound() -> None:
    _ = replace(sched, "STEAL_COUNT_MAX", 2)


def _steal_class() -> None:
    _ = replace(Scheduler, "may_steal", lambda _scheduler, _thief, _qos: True)


SABOTEURS: Final = (
    Saboteur(rung=1, grounds=BOTH, plant=_spawn_reasons),
    Saboteur(rung=2, grounds=SIM, plant=_sentinel_sim),
    Saboteur(rung=2, grounds=LINUX, plant=_sentinel_linux),
    Saboteur(rung=3, grounds=BOTH, plant=_heap_report),
    Saboteur(rung=4, grounds=SIM, plant=_qos_rollback),
    Saboteur(rung=39, grounds=SIM, plant=_cpu_online),
    Saboteur(rung=39, grounds=VM, plant=_cpu_online_vm),
    Saboteur(rung=40, grounds=SIM, plant=_smp_online),
    Saboteur(rung=40, grounds=VM, plant=_smp_online_vm),
    Saboteur(rung=41, grounds=SIM, plant=_counterfactual),
    Saboteur(rung=42, grounds=SIM, plant=_resched),
    Saboteur(rung=42, grounds=VM, plant=_resched_vm),
    Saboteur(rung=43, grounds=SIM, plant=_reject_target),
    Saboteur(rung=44, grounds=SIM, plant=_reject_offline),
    Saboteur(rung=45, grounds=SIM, plant=_work_stealing),
    Saboteur(rung=46, grounds=SIM, plant=_steal_bound),
    Saboteur(rung=47, grounds=SIM, plant=_steal_class),
)
