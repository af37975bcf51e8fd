"""The kernel's self tests, and for each rung the saboteur that must turn it red, alone."""

from collections import deque
from typing import Any

import pytest

from nexus.abi import BootImage, Event, EventKind, Nanos, Program, SpawnReason
from nexus.kernel.core import LINK_END_SIZE, Account, SpawnRefused
from nexus.kernel.sim import FaultPoint, Faults, Plan, SimKernel, sched
from nexus.kernel.sim.objects import Task
from nexus.kernel.sim.sched import Cpu, Scheduler

ALWAYS = ("spawn reasons", "resource sentinel", "heap budget report", "set_task_qos rollback")
SMP = (
    "smp online",
    "ipi counterfactual",
    "ipi resched",
    "test_reject_invalid_ipi_target_cpu",
    "test_reject_offline_cpu_resched",
    "work stealing",
    "test_reject_steal_above_bound",
    "test_reject_steal_higher_qos",
)


async def nothing(boot: BootImage) -> int:
    return 0


def lines(cpu_count: int, faults: Faults | None = None) -> list[str]:
    events: list[Event] = []
    kernel = SimKernel(
        {}, seed=3, recorder=events.append, cpu_count=cpu_count, selftest=True, faults=faults
    )
    before = kernel.resources()
    root = Program(name="root", main=nothing, digest="")
    kernel.run(root, b"", until=Nanos(kernel.now + 10**12))
    assert kernel.resources() == before
    assert kernel.generations == {"init-lite": 1}, "the tests have left no trace of a start"
    told = [event for event in events if event.kind is EventKind.KERNEL]
    for event in told:
        assert "FAIL" in str(event.fields["line"]) or event.fields["evidence"]
    return [str(event.fields["line"]) for event in told]


def expected(cpu_count: int) -> list[str]:
    online = [f"KINIT: cpu{index} online" for index in range(cpu_count)] if cpu_count > 1 else []
    names = ALWAYS + (SMP if cpu_count > 1 else ())
    return online + [f"KSELFTEST: {name} ok" for name in names]


@pytest.mark.parametrize("cpu_count", [1, 2, 3, 4])
def test_every_self_test_passes_and_prints_its_line_once(cpu_count: int) -> None:
    assert lines(cpu_count) == expected(cpu_count)


def test_a_fault_plan_does_not_reach_the_self_tests() -> None:
    faults = Faults(Plan(chances=dict.fromkeys(FaultPoint, 1_000_000)))

    assert lines(2, faults) == expected(2)


def recorded_wrongly(self: SimKernel, refusal: SpawnRefused) -> SpawnReason:
    if refusal.reason is SpawnReason.CAP_TABLE_FULL:
        return SpawnReason.INVALID_PAYLOAD
    return refusal.reason


def forgets_last_endpoint(self: SimKernel, task: Task) -> list[Task]:
    woken: list[Task] = []
    for endpoint in list(task.endpoints.values())[:-1]:
        self.heap.unhold(task, endpoint.slot)
        woken += self.ipc.shut(endpoint)
    return woken


def misses_an_object(self: Account) -> int:
    return self.used - LINK_END_SIZE


def at_the_tail(self: Scheduler, queue: deque[Task], index: int, task: Task) -> None:
    queue.append(task)


def never_runs(self: Scheduler) -> None:
    for cpu in self.smp:
        cpu.online = True
    self.smp[0].at = self.clock.now


def counted_anyway(self: Scheduler, cpu: Cpu) -> bool:
    cpu.sent += 1
    if not cpu.force_send_fail:
        cpu.signal = True
        cpu.at = min(cpu.at, Nanos(self.clock.now + 1000))
    return not cpu.force_send_fail


def sender_acknowledges(self: Scheduler, cpu: Cpu) -> bool:
    if cpu.force_send_fail:
        return False
    cpu.sent += 1
    cpu.taken += 1
    cpu.acknowledged += 1
    cpu.pending = False
    cpu.at = min(cpu.at, Nanos(self.clock.now + 1000))
    return True


def counts_without_stealing(self: Scheduler, thief: Cpu) -> Task | None:
    if any(victim.mask for victim in self.smp if victim is not thief):
        thief.steals += 1
    return None


def bound_with_greater(self: Scheduler, index: int) -> bool:
    return not index > sched.CPUS_MAX


# What each must turn red, and what the ladder puts behind that (`after`) and may be blocked.
SABOTEURS: list[tuple[str, Any, str, Any, tuple[str, ...]]] = [
    ("spawn reasons", SimKernel, "spawn_reason", recorded_wrongly, ()),
    ("resource sentinel", SimKernel, "release_endpoints", forgets_last_endpoint, ()),
    ("heap budget report", Account, "reported_used", misses_an_object, ()),
    ("set_task_qos rollback", Scheduler, "put_back", at_the_tail, ()),
    ("cpu1 online", Scheduler, "start", never_runs, SMP),
    ("smp online", Scheduler, "online_mask", lambda self: 3, SMP),
    ("ipi counterfactual", Scheduler, "send_signal", counted_anyway, ()),
    ("ipi resched", Scheduler, "send_signal", sender_acknowledges, ()),
    (SMP[3], Scheduler, "in_range", bound_with_greater, ()),
    (SMP[4], Scheduler, "is_online", lambda self, cpu: True, ()),
    ("work stealing", Scheduler, "steal", counts_without_stealing, SMP[6:]),
    (SMP[6], sched, "STEAL_COUNT_MAX", 2, ()),
    (SMP[7], Scheduler, "may_steal", lambda self, thief, qos: True, ()),
]


@pytest.mark.parametrize(
    ("name", "owner", "attribute", "faulty", "behind"),
    SABOTEURS,
    ids=[saboteur[0] for saboteur in SABOTEURS],
)
def test_a_saboteur_turns_its_self_test_red_and_no_other(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    owner: Any,
    attribute: str,
    faulty: Any,
    behind: tuple[str, ...],
) -> None:
    monkeypatch.setattr(owner, attribute, faulty)
    events: list[Event] = []
    kernel = SimKernel({}, seed=3, recorder=events.append, cpu_count=2, selftest=True)

    kernel.run(Program(name="root", main=nothing, digest=""), b"", until=Nanos(kernel.now + 10**12))

    told = [str(event.fields["line"]) for event in events if event.kind is EventKind.KERNEL]
    red = {line.removeprefix("KSELFTEST: ").split(" FAIL ")[0] for line in told if "FAIL" in line}
    assert name in red
    assert red - {name} <= set(behind), told
