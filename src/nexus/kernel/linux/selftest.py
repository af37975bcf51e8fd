"""The kernel's self tests on Linux: rungs 1-3 of the ladder, before the root task starts, and on a
machine of our own with several CPUs 39, 40 and 42.

They run real root tasks with real forks in init's process, through the kernel's own traps, and
leave it as they found it. A line is recorded only after the evidence was compared; a test that
fails records `KSELFTEST: <name> FAIL <why>` instead.
"""

import os
from collections.abc import Callable, Coroutine
from typing import Any, Final, TypeAlias

from nexus.abi import (
    BUDGET_SIZE_DEFAULT,
    CONTROL_LINK_SIZE,
    ENDPOINTS_PER_OWNER_MAX,
    NEVER,
    NO_WAIT,
    PAGE_SIZE,
    SLOTS_MAX,
    VMO_SIZE_MAX,
    AbiError,
    BootImage,
    CapClone,
    CapClose,
    EndpointClose,
    EndpointCreate,
    EventKind,
    Kill,
    LinkCreate,
    LinkTerms,
    Nanos,
    Now,
    PeerGone,
    Program,
    Recv,
    Slot,
    Spawn,
    Spawned,
    SpawnLastError,
    SpawnReason,
    SpawnSpec,
    Status,
    TaskStats,
    Trap,
    VmoCreate,
    Wait,
)
from nexus.kernel.core import SPAWN_STATUS
from nexus.kernel.linux.kernel import LinuxKernel

PROCESS_1: Final = 1
CYCLES: Final = 64  # spawn and exit, rung 2
REAP_TIME: Final = 10_000_000_000  # nanoseconds a child may take to end, on a loaded machine
VMO_COUNT_MAX: Final = 64  # tries to exhaust the budget; it holds one or two of the largest
ENDING: Final = "kselftest.exit"
STAYING: Final = "kselftest.stay"
UNMAPPABLE: Final = "kselftest.unmappable"

Evidence: TypeAlias = dict[str, object]
Main: TypeAlias = Callable[[BootImage], Coroutine[Trap[Any], Any, int | None]]
Failing: TypeAlias = Callable[[SpawnSpec, SpawnReason], Coroutine[Trap[Any], Any, None]]


class Failed(Exception):
    """A comparison of a self test came out wrong."""


def run_selftest(kernel: LinuxKernel) -> None:
    """Run the self tests and record a line for each."""
    programs, generations = kernel.programs, dict(kernel.generations)
    kernel.testing = True
    kernel.programs = {
        ENDING: Program(name=ENDING, main=_end, digest=""),
        STAYING: Program(name=STAYING, main=_stay, digest=""),
        UNMAPPABLE: Program(name=UNMAPPABLE, main=_unmappable, digest=""),
    }
    tests: tuple[tuple[str, Callable[[LinuxKernel], Evidence]], ...] = (
        ("spawn reasons", _spawn_reasons),
        ("resource sentinel", _resource_sentinel),
        ("heap budget report", _heap_report),
    )
    try:
        for name, test in tests:
            _one(kernel, name, test)
        if os.getpid() == PROCESS_1 and len(kernel.cpus) > 1:
            _several_cpus(kernel)
    finally:
        kernel.testing = False
        kernel.tested.clear()
        kernel.programs, kernel.generations = programs, generations


def _several_cpus(kernel: LinuxKernel) -> None:
    from nexus.kernel.linux import selftest_cpus

    kernel.programs = {**kernel.programs, **selftest_cpus.PROGRAMS}
    try:
        for evidence in selftest_cpus.cpus_online(kernel):
            kernel.kernel_line(f"KINIT: cpu{evidence['cpu']} online", evidence)
    except Failed as failure:
        kernel.kernel_line(f"KINIT: cpu1 online FAIL {failure}", {})
        return
    _one(kernel, "smp online", selftest_cpus.tasks_placed)
    _one(kernel, "ipi resched", selftest_cpus.calls_interrupt)


def _one(kernel: LinuxKernel, name: str, test: Callable[[LinuxKernel], Evidence]) -> None:
    try:
        evidence = test(kernel)
    except (Failed, AbiError) as failure:
        kernel.kernel_line(f"KSELFTEST: {name} FAIL {failure}", {})
    else:
        kernel.kernel_line(f"KSELFTEST: {name} ok", evidence)


def require(holds: object, why: str) -> None:
    """Raise Failed unless it holds."""
    if not holds:
        raise Failed(why)


def run(kernel: LinuxKernel, main: Main) -> None:
    """Run a root task; what it raises is raised here."""
    kernel.tested.clear()
    half = kernel.limits.total_size // 2  # the rest is for the control links of children
    root_size = min(kernel.limits.root_size, half)
    program = Program(name="kselftest", main=main, digest="")
    end = kernel.run_root(program, b"", root_size=root_size, budget=BUDGET_SIZE_DEFAULT)
    require(end.code == 0, f"the root of the test ended with {end.code}")


def spec_of(boot: BootImage, name: str, program: str) -> SpawnSpec:
    """How a child of a test is started."""
    return SpawnSpec(name, program, boot.endpoint, owner_size=CONTROL_LINK_SIZE, endpoints=1)


# ---- rung 1


def _spawn_reasons(kernel: LinuxKernel) -> Evidence:
    evidence: Evidence = {}

    async def failing(spec: SpawnSpec, reason: SpawnReason) -> None:
        before = kernel.resources()
        label = reason.name.lower()
        refusal = await _refused(Spawn(spec))
        require(refusal is SPAWN_STATUS[reason], f"{label} came with {refusal!r}")
        first, second = await SpawnLastError(), await SpawnLastError()
        require(first is reason, f"{label} was kept as {first.name.lower()}")
        require(second is SpawnReason.NONE, f"{label} was told twice")
        after = kernel.resources()
        require(after == before, f"{label} left {_difference(before, after)}")
        evidence[label] = {
            "code": int(first),
            "again": int(second),
            "tasks": before["tasks"],
            "tasks_after": after["tasks"],
        }

    async def main(boot: BootImage) -> int:
        spec = spec_of(boot, "kselftest.child", ENDING)
        await failing(spec._replace(program="kselftest.none"), SpawnReason.INVALID_PAYLOAD)
        await failing(spec._replace(program=UNMAPPABLE), SpawnReason.MAP_FAILED)
        await failing(spec._replace(owner_size=kernel.limits.total_size), SpawnReason.OOM)
        await _beyond_the_endpoints(kernel, boot, failing)
        link = await LinkCreate(boot.endpoint, LinkTerms(1, 1, 0))
        clones = await _until_full(lambda: CapClone(link.slot))
        await failing(spec, SpawnReason.CAP_TABLE_FULL)
        for slot in clones:
            await CapClose(slot)
        return await _spawn_and_reap(spec)

    run(kernel, main)
    return evidence


async def _beyond_the_endpoints(kernel: LinuxKernel, boot: BootImage, failing: Failing) -> None:
    """Reserve nearly all endpoints of the system for living children, then ask for more."""
    started: list[Spawned] = []
    spec = spec_of(boot, "kselftest.greedy", STAYING)
    while kernel.shares.endpoints.free >= ENDPOINTS_PER_OWNER_MAX:
        greedy = spec._replace(
            name=f"kselftest.greedy{len(started)}", endpoints=ENDPOINTS_PER_OWNER_MAX
        )
        started.append(await Spawn(greedy))
    over = spec._replace(endpoints=kernel.shares.endpoints.free + 1)
    await failing(over, SpawnReason.ENDPOINT_QUOTA)
    for child in started:
        await Kill(child.pid)
        _ = await reap(child)


# ---- rung 2


def _resource_sentinel(kernel: LinuxKernel) -> Evidence:
    evidence: Evidence = {}

    async def main(boot: BootImage) -> int:
        spec = spec_of(boot, "kselftest.cycle", ENDING)
        before = await _in_use(kernel)
        link = await LinkCreate(boot.endpoint, LinkTerms(1, 1, 0))
        clones = await _until_full(lambda: CapClone(link.slot))
        full = await TaskStats()
        require(full.slots == SLOTS_MAX, f"the table was full at {full.slots} slots")
        for slot in (*clones, link.slot):
            await CapClose(slot)
        await _hear_of_the_gone(boot.endpoint)
        made = await _until_full(EndpointCreate)
        most = await TaskStats()
        quota = kernel.limits.root_endpoints
        require(most.endpoints == quota, f"{most.endpoints} endpoints of {quota}")
        for slot in made:
            await EndpointClose(slot)
        for _ in range(CYCLES):
            require(await _spawn_and_reap(spec) == 0, "a child ended with a code")
            await _hear_of_the_gone(boot.endpoint)
        after = await _in_use(kernel)
        require(after == before, f"{_difference(before, after)} did not come back")
        evidence.update(
            slots=full.slots, endpoints=most.endpoints, cycles=CYCLES, before=before, after=after
        )
        return 0

    run(kernel, main)
    return evidence


# ---- rung 3


def _heap_report(kernel: LinuxKernel) -> Evidence:
    evidence: Evidence = {}

    async def main(boot: BootImage) -> int:
        _ = await LinkCreate(boot.endpoint)
        size = VMO_SIZE_MAX - PAGE_SIZE - 1  # not a multiple of anything
        refusal: Status | None = None
        for _ in range(VMO_COUNT_MAX):
            refusal = await _refused(VmoCreate(size))
            if refusal is not None:
                break
        require(refusal is Status.NO_SPACE, f"refused with {refusal!r}")
        reports = [event for event in kernel.tested if event.kind is EventKind.HEAP]
        require(len(reports) == 1, f"{len(reports)} reports")
        fields = dict(reports[0].fields)
        used, audited = fields["heap_budget_used"], kernel.driver.audit()
        rest = (fields["heap_budget_free"], fields["heap_budget_total"])
        require(used == audited, f"{used} bytes are told, the objects cost {audited}")
        require(rest == (BUDGET_SIZE_DEFAULT - audited, BUDGET_SIZE_DEFAULT), f"rest {rest}")
        require(fields["size"] == size, f"a request of {size} is told as {fields['size']}")
        require(fields["align"] == PAGE_SIZE, f"alignment {fields['align']}")
        counters = await TaskStats()
        require(counters.refused_size == size, "the task's counters tell another size")
        require(counters.budget_used == audited, "the task's counters tell another use")
        slot = await VmoCreate(PAGE_SIZE)
        smaller = kernel.driver.audit()
        require(smaller > audited, "a smaller request cost nothing")
        require((await TaskStats()).budget_used == smaller, "its cost is not in the account")
        await CapClose(slot)
        evidence.update(fields, audited=audited, request=size, granted=PAGE_SIZE)
        return 0

    run(kernel, main)
    return evidence


# ---- steps


async def _in_use(kernel: LinuxKernel) -> dict[str, int]:
    """What init's process holds and, in the kernel's own account, its root task."""
    counters = await TaskStats()
    fields = ("slots", "endpoints", "links", "queued", "queued_size", "budget_used")
    return kernel.resources() | {field: int(getattr(counters, field)) for field in fields}


def _difference(before: dict[str, int], after: dict[str, int]) -> str:
    changed = (key for key, value in before.items() if after[key] != value)
    return ", ".join(f"{key} {before[key]} -> {after[key]}" for key in changed)


async def _refused(trap: Trap[Any]) -> Status | None:
    try:
        _ = await trap
    except AbiError as refusal:
        return refusal.status
    return None


async def _until_full(make: Callable[[], Trap[Slot]]) -> list[Slot]:
    """Make slots until the first refusal, which has to be NoSpace."""
    made: list[Slot] = []
    while True:
        try:
            made.append(await make())
        except AbiError as refusal:
            require(refusal.status is Status.NO_SPACE, f"full is answered with {refusal}")
            return made


async def _hear_of_the_gone(endpoint: Slot) -> None:
    while True:
        try:
            _ = await Recv((endpoint,), NO_WAIT)
        except PeerGone:
            continue
        except AbiError:
            return


async def reap(child: Spawned) -> int:
    """Wait for the end of a child; its exit code."""
    end = await Wait(child.pid, Nanos(await Now() + REAP_TIME))
    await CapClose(child.slot)
    return end.code


async def _spawn_and_reap(spec: SpawnSpec) -> int:
    return await reap(await Spawn(spec))


async def _end(_boot: BootImage) -> int:
    return 0


async def _stay(boot: BootImage) -> int:
    _ = await Recv((boot.endpoint,), NEVER)
    return 0


def _unmappable(_boot: BootImage) -> Coroutine[Trap[Any], Any, int | None]:
    raise MemoryError("this program's image does not map")
