"""The kernel's self tests: rungs 1-4 and, with two CPUs or more, 39-47 of the ladder.

They run real tasks on this very kernel before its root task starts, through its own traps and
its own run queues, and leave it as they found it. A line is recorded only after the evidence
was compared; a test that fails records `KSELFTEST: <name> FAIL <why>` instead.
"""

from collections.abc import Callable, Coroutine, Mapping
from typing import Any, Final, TypeAlias

from nexus.abi import (
    CONTROL_LINK_SIZE,
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
    ExitInfo,
    LinkCreate,
    LinkTerms,
    Nanos,
    Now,
    PeerGone,
    Pid,
    Program,
    QosClass,
    Recv,
    Send,
    SetTaskQos,
    SleepUntil,
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
from nexus.kernel.core.spawn import BUDGET_SIZE_MAX
from nexus.kernel.sim.kernel import KERNEL_PID, RootTerms, SimKernel
from nexus.kernel.sim.objects import Task
from nexus.kernel.sim.sched import CPUS_MAX, QUEUE_COUNT_MAX, Cpu

TEST_SPAN: Final = Nanos(60_000_000_000)  # 60 s of virtual time for one test; they take < 0.1 s
CYCLES: Final = 64  # spawn and exit, rung 2
COUNTERFACTUAL_TICKS: Final = 200_000  # rung 41
SMP_MIN: Final = 2  # CPUs; below it the smp rungs are not run
VMO_COUNT_MAX: Final = 64  # tries to exhaust the heap; it holds one or two of the largest
LEAVING: Final = "kselftest.exit"
NOTING: Final = "kselftest.note"
HOGGING: Final = "kselftest.hog"
UNMAPPABLE: Final = "kselftest.unmappable"

Evidence: TypeAlias = dict[str, object]
Main: TypeAlias = Callable[[BootImage], Coroutine[Trap[Any], Any, int | None]]


class Failed(Exception):
    """A comparison of a self test came out wrong."""


def run_selftest(kernel: SimKernel) -> None:
    """Run every self test this machine allows and record a line for each."""
    Selftest(kernel).run()


def require(holds: object, why: str) -> None:
    """Fail the test unless the comparison holds."""
    if not holds:
        raise Failed(why)


class Selftest:
    """The tests of one kernel."""

    def __init__(self, kernel: SimKernel) -> None:
        self._kernel = kernel
        self._noted: list[tuple[str, int]] = []  # (task, CPU) in the order they ran
        self._hogging = False

    def run(self) -> None:
        """All tests, in the order of the ladder's rungs."""
        kernel = self._kernel
        programs, generations = kernel.programs, dict(kernel.generations)
        audit, dropped = list(kernel.audit), kernel.audit_dropped
        kernel.testing = True
        if kernel.faults is not None:
            kernel.faults.paused = True  # a plan is about the system, not about these tests
        tests: list[tuple[str, Callable[[], Evidence]]] = []
        if len(kernel.scheduler.smp) >= SMP_MIN:
            self._bring_up()
            tests = [
                ("smp online", self._smp_online),
                ("ipi counterfactual", self._ipi_counterfactual),
                ("ipi resched", self._ipi_resched),
                ("test_reject_invalid_ipi_target_cpu", self._invalid_target),
                ("test_reject_offline_cpu_resched", self._offline_target),
                ("work stealing", self._work_stealing),
                ("test_reject_steal_above_bound", self._steal_bound),
                ("test_reject_steal_higher_qos", self._steal_class),
            ]
        first: list[tuple[str, Callable[[], Evidence]]] = [
            ("spawn reasons", self._spawn_reasons),
            ("resource sentinel", self._resource_sentinel),
            ("heap budget report", self._heap_report),
            ("set_task_qos rollback", self._qos_rollback),
        ]
        for name, test in [*first, *tests]:
            self._one(name, test)
        kernel.testing = False
        if kernel.faults is not None:
            kernel.faults.paused = False
        kernel.programs, kernel.generations = programs, generations
        kernel.audit.clear()
        kernel.audit.extend(audit)
        kernel.audit_dropped = dropped

    def _one(self, name: str, test: Callable[[], Evidence]) -> None:
        kernel = self._kernel
        crashes = len(kernel.crashes)
        try:
            evidence = test()
            require(len(kernel.crashes) == crashes, "a task of the test crashed")
        except Failed as failure:
            self._line(f"KSELFTEST: {name} FAIL {failure}", {})
        except AbiError as refusal:
            self._line(f"KSELFTEST: {name} FAIL unexpected {refusal}", {})
        else:
            self._line(f"KSELFTEST: {name} ok", evidence)

    def _line(self, line: str, evidence: Mapping[str, object]) -> None:
        self._kernel.record(
            EventKind.KERNEL, KERNEL_PID, {"line": line, "evidence": dict(evidence)}
        )

    # ---- driving tasks

    def _run(self, main: Main, *, budget: int = BUDGET_SIZE_MAX) -> ExitInfo:
        """Run a root task on CPU 0, above every class of the tasks it starts."""
        kernel = self._kernel
        kernel.programs = {
            LEAVING: Program(name=LEAVING, main=_leave, digest=""),
            NOTING: Program(name=NOTING, main=self._note, digest=""),
            HOGGING: Program(name=HOGGING, main=self._hog, digest=""),
            UNMAPPABLE: Program(name=UNMAPPABLE, main=_unmappable, digest=""),
        }
        self._noted.clear()
        failure: list[Failed] = []

        async def guarded(boot: BootImage) -> int | None:
            try:
                return await main(boot)
            except Failed as failed:
                failure.append(failed)
                return 1

        until = Nanos(kernel.now + TEST_SPAN)
        half = kernel.limits.total_size // 2  # for the control links of many children
        terms = RootTerms(QosClass.PERF_BURST, 0, half, budget)
        program = Program(name="kselftest", main=guarded, digest="")
        end = kernel.run_root(program, b"", until=until, terms=terms)
        if failure:
            raise failure[0]
        return end

    async def _note(self, boot: BootImage) -> int:
        current = self._kernel.scheduler.current
        self._noted.append((boot.name, 0 if current is None else current.index))
        return 0

    async def _hog(self, _boot: BootImage) -> int:
        # Keeps its CPU: it has the highest class and never waits.
        while self._hogging:
            _ = await Now()
        return 0

    def _spec(
        self,
        boot: BootImage,
        name: str,
        program: str = NOTING,
        *,
        qos: QosClass = QosClass.NORMAL,
        cpu: int = 0,
    ) -> SpawnSpec:
        return SpawnSpec(
            name,
            program,
            boot.endpoint,
            qos=qos,
            cpu=cpu,
            owner_size=CONTROL_LINK_SIZE,
            endpoints=1,
        )

    # ---- rung 1

    def _spawn_reasons(self) -> Evidence:
        kernel = self._kernel
        evidence: Evidence = {}

        async def failing(spec: SpawnSpec, reason: SpawnReason) -> None:
            tasks = len(kernel.tasks)
            refusal: Status | None = None
            try:
                spawned = await Spawn(spec)
            except AbiError as refused:
                refusal = refused.status
            else:
                raise Failed(f"{spec.name} was started as {spawned.pid}")
            label = reason.name.lower()
            require(refusal is SPAWN_STATUS[reason], f"{label} came with {refusal!r}")
            first, second = await SpawnLastError(), await SpawnLastError()
            require(first is reason, f"{label} was kept as {first.name.lower()}")
            require(second is SpawnReason.NONE, f"{label} was told twice")
            left = len(kernel.tasks)
            require(left == tasks, f"{label} left a task")
            told = {"code": int(first), "again": int(second), "tasks": tasks, "tasks_after": left}
            evidence[label] = told

        async def main(boot: BootImage) -> int:
            spec = self._spec(boot, "kselftest.child", LEAVING)
            await failing(spec._replace(program="kselftest.none"), SpawnReason.INVALID_PAYLOAD)
            absent = len(kernel.scheduler.smp)
            await failing(spec._replace(cpu=absent), SpawnReason.MAP_FAILED)
            await failing(spec._replace(program=UNMAPPABLE), SpawnReason.MAP_FAILED)
            await failing(spec._replace(owner_size=kernel.limits.total_size), SpawnReason.OOM)
            await self._quota(boot, failing)
            link = await LinkCreate(boot.endpoint, LinkTerms(1, 1, 0))
            clones = await _fill_slots(link.slot)
            await failing(spec, SpawnReason.CAP_TABLE_FULL)
            for slot in clones:
                await CapClose(slot)
            return await _spawn_and_reap(spec)

        end = self._run(main)
        require(end.code == 0, "the spawn after the failed ones did not work")
        return evidence

    async def _quota(
        self,
        boot: BootImage,
        failing: Callable[[SpawnSpec, SpawnReason], Coroutine[Trap[Any], Any, None]],
    ) -> None:
        kernel = self._kernel
        spec = self._spec(boot, "kselftest.greedy", HOGGING)
        started: list[Spawned] = []
        self._hogging = False
        while kernel.shares.endpoints.free >= kernel.limits.root_endpoints:
            name = f"kselftest.greedy{len(started)}"
            greedy = spec._replace(name=name, endpoints=kernel.limits.root_endpoints)
            started.append(await Spawn(greedy))
        over = spec._replace(endpoints=kernel.shares.endpoints.free + 1)
        await failing(over, SpawnReason.ENDPOINT_QUOTA)
        for child in started:
            _ = await _reap(child)

    # ---- rung 2

    def _resource_sentinel(self) -> Evidence:
        kernel = self._kernel
        evidence: Evidence = {}

        async def main(boot: BootImage) -> int:
            spec = self._spec(boot, "kselftest.cycle", LEAVING)
            before, counters = kernel.resources(), await TaskStats()
            link = await LinkCreate(boot.endpoint, LinkTerms(1, 1, 0))
            clones = await _fill_slots(link.slot)
            full = await TaskStats()
            require(full.slots == SLOTS_MAX, f"the table was full at {full.slots} slots")
            for slot in clones:
                await CapClose(slot)
            await CapClose(link.slot)
            _ = await _drained(boot.endpoint)
            made = await _fill_endpoints()
            most = await TaskStats()
            quota = kernel.limits.root_endpoints
            require(most.endpoints == quota, f"{most.endpoints} endpoints of {quota}")
            for slot in made:
                await EndpointClose(slot)
            for _ in range(CYCLES):
                require(await _spawn_and_reap(spec) == 0, "a child ended with a code")
                _ = await _drained(boot.endpoint)
            after, counters_after = kernel.resources(), await TaskStats()
            require(after == before, f"{_difference(before, after)} did not come back")
            same = ("slots", "endpoints", "links", "queued", "queued_size", "budget_used")
            for field in same:
                was, has = getattr(counters, field), getattr(counters_after, field)
                require(was == has, f"{field} was {was} and is {has}")
            evidence.update(
                slots=full.slots,
                endpoints=most.endpoints,
                cycles=CYCLES,
                before=before,
                after=after,
            )
            return 0

        _ = self._run(main)
        return evidence

    # ---- rung 3

    def _heap_report(self) -> Evidence:
        kernel = self._kernel
        account = kernel.heap.account
        evidence: Evidence = {}

        async def main(boot: BootImage) -> int:
            # What exits had not given back before is rung 2's business, not this one's.
            used_first, objects_first = kernel.heap_audit()
            drift = used_first - objects_first
            link = await LinkCreate(boot.endpoint)
            await Send(link.slot, b"queued")
            size = VMO_SIZE_MAX - PAGE_SIZE - 1  # not a multiple of anything
            for _ in range(VMO_COUNT_MAX):
                try:
                    _ = await VmoCreate(size)
                except AbiError as refused:
                    require(refused.status is Status.NO_SPACE, f"refused with {refused}")
                    break
            else:
                raise Failed("the heap never ran out")
            report = kernel.tested
            require(report is not None and report.kind is EventKind.HEAP, "no report")
            fields = {} if report is None else dict(report.fields)
            used, objects = kernel.heap_audit()
            audited = objects + drift
            free = fields["heap_budget_free"]
            require(fields["account"] == account.name, f"{fields['account']} reported")
            require(fields["heap_budget_used"] == used, "the report tells another use")
            require(used + int(str(free)) == fields["heap_budget_total"], "used + free != total")
            require(used == audited, f"{used} bytes used, the objects cost {audited}")
            require(fields["size"] == size, f"a request of {size} told as {fields['size']}")
            require(fields["align"] == PAGE_SIZE, f"alignment {fields['align']}")
            counters = await TaskStats()
            require(counters.refused_size == size, "the task's counters tell another size")
            slot = await VmoCreate(PAGE_SIZE)
            smaller, objects = kernel.heap_audit()
            require(smaller == objects + drift, "the objects cost something else after it")
            require(smaller > used, "a smaller request cost nothing")
            await CapClose(slot)
            evidence.update(fields, audited=audited, request=size, granted=PAGE_SIZE)
            return 0

        _ = self._run(main)
        return evidence

    # ---- rung 4

    def _qos_rollback(self) -> Evidence:
        kernel = self._kernel
        cpu = kernel.scheduler.cpus[0]
        normal, interactive = cpu.queues[QosClass.NORMAL], cpu.queues[QosClass.INTERACTIVE]
        evidence: Evidence = {}
        waiting = [f"kselftest.n{index}" for index in range(3)]
        filling = [f"kselftest.i{index}" for index in range(QUEUE_COUNT_MAX)]

        async def main(boot: BootImage) -> int:
            children = [await Spawn(self._spec(boot, name)) for name in waiting]
            qos = QosClass.INTERACTIVE
            children += [await Spawn(self._spec(boot, name, qos=qos)) for name in filling]
            middle = kernel.tasks[children[1].pid]
            before = [task.pid for task in normal]
            index, class_before = before.index(middle.pid), middle.qos
            require(0 < index < len(before) - 1, "the task is not in the middle")
            require(len(interactive) == QUEUE_COUNT_MAX, f"{len(interactive)} in Interactive")
            refusal = await _refused(SetTaskQos(middle.pid, int(qos)))
            after, still = [task.pid for task in normal], len(interactive)
            require(refusal is Status.QUEUE_FULL, f"answered {refusal!r}")
            require(still == QUEUE_COUNT_MAX, "Interactive has changed")
            require(after == before, "Normal has another order")
            require(middle.qos is class_before, f"the class is {middle.qos.name}")
            evidence.update(
                status=Status.QUEUE_FULL.name,
                pid=middle.pid,
                index=index,
                index_after=after.index(middle.pid),
                order_before=before,
                order_after=after,
                class_before=int(class_before),
                class_after=int(middle.qos),
                interactive=still,
            )
            for child in children:
                require((await Wait(child.pid, _later(kernel))).code == 0, "a child failed")
            return 0

        _ = self._run(main)
        ran = [name for name, _ in self._noted]
        require(ran == [*filling, *waiting], "the tasks were not picked in the old order")
        return {**evidence, "picked": len(ran)}

    # ---- rungs 39 to 47

    def _bring_up(self) -> None:
        smp = self._kernel.scheduler.smp
        before = [cpu.ticks for cpu in smp]
        _ = self._run(_doze)
        for cpu, ticks in zip(smp, before, strict=True):
            evidence: Evidence = {"cpu": cpu.index, "ticks_before": ticks, "ticks": cpu.ticks}
            if cpu.online and cpu.ticks > ticks:
                self._line(f"KINIT: cpu{cpu.index} online", evidence)
            else:
                why = "its bit is not set" if cpu.ticks > ticks else "it has not run"
                self._line(f"KSELFTEST: cpu{cpu.index} online FAIL {why}", evidence)

    def _smp_online(self) -> Evidence:
        scheduler = self._kernel.scheduler
        count = len(scheduler.smp)
        masks: list[tuple[int, int]] = []

        async def reader(_boot: BootImage) -> int:
            current = scheduler.current
            masks.append((0 if current is None else current.index, scheduler.online_mask()))
            return 0

        async def main(boot: BootImage) -> int:
            program = Program(name=NOTING, main=reader, digest="")
            self._kernel.programs = {NOTING: program}
            return await _spawn_and_reap(self._spec(boot, "kselftest.reader", cpu=1))

        _ = self._run(main)
        expected = (1 << count) - 1
        require(masks == [(1, expected)], f"(CPU, mask) read as {masks}")
        last = scheduler.smp[-1]
        last.online = False
        without = scheduler.online_mask()
        last.online = True
        require(without == expected >> 1, f"mask {without} with the last CPU off line")
        return {"mask": expected, "read_on_cpu": 1, "without_last": without}

    def _ipi_counterfactual(self) -> Evidence:
        scheduler = self._kernel.scheduler
        target = scheduler.cpus[1]
        before = _counters(target)
        target.force_send_fail = True
        scheduler.current = scheduler.cpus[0]
        scheduler.request_resched(target.index)
        for _ in range(COUNTERFACTUAL_TICKS):
            _ = scheduler.tick(target)
        after = _counters(target)
        target.force_send_fail = False
        _settle(target)
        grown = [now - then for then, now in zip(before, after, strict=True)]
        require(grown == [1, 0, 0, 0], f"request, sent, taken, acknowledged grew by {grown}")
        return {"before": before, "after": after, "ticks": COUNTERFACTUAL_TICKS}

    def _ipi_resched(self) -> Evidence:
        scheduler = self._kernel.scheduler
        target = scheduler.cpus[1]
        before = _counters(target)
        scheduler.current = scheduler.cpus[0]
        scheduler.request_resched(target.index)
        asked = _counters(target)
        _ = self._run(_doze)
        after = _counters(target)
        steps = [now - then for then, now in zip(before, asked, strict=True)]
        require(steps == [1, 1, 0, 0], f"at the sender the counters grew by {steps}")
        rest = [now - then for then, now in zip(asked, after, strict=True)]
        require(rest == [0, 0, 1, 1], f"at the target the counters grew by {rest}")
        return {"before": before, "asked": asked, "after": after, "target": target.index}

    def _invalid_target(self) -> Evidence:
        before = self._all_counters()
        refusal = self._refused_request(CPUS_MAX)
        after = self._all_counters()
        require(refusal is Status.INVALID_ARGUMENT, f"answered {refusal!r}")
        require(after == before, "a counter has changed")
        status = refusal.name if refusal is not None else ""
        return {"cpu": CPUS_MAX, "status": status, "before": before, "after": after}

    def _offline_target(self) -> Evidence:
        target = self._kernel.scheduler.cpus[-1]
        before, online = self._all_counters(), target.online
        target.online = False  # on a machine with all CPUs the last one is taken off line
        mask = sum(1 << cpu.index for cpu in self._kernel.scheduler.cpus if cpu.online)
        refusal = self._refused_request(target.index)
        after = self._all_counters()
        target.online = online
        _settle(target)
        require(refusal is Status.UNSUPPORTED, f"answered {refusal!r}")
        require(after == before, "a counter has changed")
        status = refusal.name if refusal is not None else ""
        return {
            "cpu": target.index,
            "online": mask,
            "status": status,
            "before": before,
            "after": after,
        }

    def _work_stealing(self) -> Evidence:
        steals = self._steals()
        queued: list[Pid] = []

        async def scene(_boot: BootImage, victims: list[Task]) -> None:
            queued.extend(task.pid for task in victims)
            # Waiting leaves CPU 0 without work, so its pick path goes stealing.
            _ = await Wait(victims[0].pid, _later(self._kernel))

        self._with_victims(1, QosClass.NORMAL, scene)
        require(self._noted == [("kselftest.v0", 0)], f"(task, CPU) ran as {self._noted}")
        stolen = self._steals() - steals
        require(stolen == 1, f"the steal counter grew by {stolen}")
        wanted = f"cpu0 pid{queued[0]} picked Start"
        logged = sum(wanted in line for line in self._kernel.log_lines())
        require(logged >= 1, "the event log does not show the task on CPU 0")
        return {"steals": stolen, "ran_on": 0, "queued_on": 1}

    def _steal_bound(self) -> Evidence:
        left: list[int] = []

        async def scene(_boot: BootImage, victims: list[Task]) -> None:
            scheduler = self._kernel.scheduler
            stolen = scheduler.tick(scheduler.cpus[0])
            left.append(len(scheduler.cpus[1].queues[QosClass.NORMAL]))
            require(stolen in victims, "the tick stole nothing")
            if stolen is not None:
                scheduler.ready(stolen)

        self._with_victims(2, QosClass.NORMAL, scene)
        require(left == [1], f"{left} tasks were left on CPU 1")
        return {"queued": 2, "left": left[0]}

    def _steal_class(self) -> Evidence:
        steals = self._steals()
        left: list[int] = []

        async def scene(_boot: BootImage, _victims: list[Task]) -> None:
            scheduler = self._kernel.scheduler
            thief, victim = scheduler.cpus[0], scheduler.cpus[1]
            thief.steal_limit = QosClass.NORMAL
            stolen = scheduler.tick(thief)
            thief.steal_limit = QosClass.PERF_BURST
            left.append(len(victim.queues[QosClass.INTERACTIVE]))
            left.append(self._steals() - steals)
            if stolen is not None:
                scheduler.ready(stolen)

        self._with_victims(2, QosClass.INTERACTIVE, scene)
        require(left == [2, 0], f"left on CPU 1 and stolen: {left}")
        return {
            "queued": 2,
            "left": left[0],
            "stolen": left[1],
            "qos": int(QosClass.INTERACTIVE),
            "limit": int(QosClass.NORMAL),
        }

    def _with_victims(
        self,
        count: int,
        qos: QosClass,
        scene: Callable[[BootImage, list[Task]], Coroutine[Trap[Any], Any, None]],
    ) -> None:
        """Queue tasks on CPU 1, kept busy by a task of the highest class, and play a scene."""
        kernel = self._kernel

        async def main(boot: BootImage) -> int:
            self._hogging = True
            burst = QosClass.PERF_BURST
            hog = await Spawn(self._spec(boot, "kselftest.hog", HOGGING, qos=burst, cpu=1))
            now = await Now()
            _ = await SleepUntil(Nanos(now + 50_000))  # CPU 1 has taken the hog by then
            names = [f"kselftest.v{index}" for index in range(count)]
            children = [await Spawn(self._spec(boot, name, qos=qos, cpu=1)) for name in names]
            victims = [kernel.tasks[child.pid] for child in children]
            for victim in victims:
                victim.pinned = False  # placed on CPU 1, free to be stolen from here on
            try:
                await scene(boot, victims)
            finally:
                self._hogging = False
            for child in [hog, *children]:
                if child.pid in kernel.tasks:
                    _ = await Wait(child.pid, _later(kernel))
            return 0

        _ = self._run(main)

    def _refused_request(self, index: int) -> Status | None:
        scheduler = self._kernel.scheduler
        scheduler.current = scheduler.cpus[0]
        try:
            scheduler.request_resched(index)
        except AbiError as refusal:
            return refusal.status
        except IndexError:
            return None  # past the last CPU: nothing had refused it
        return None

    def _all_counters(self) -> list[list[int]]:
        return [_counters(cpu) for cpu in self._kernel.scheduler.cpus]

    def _steals(self) -> int:
        return sum(cpu.steals for cpu in self._kernel.scheduler.cpus)


def _counters(cpu: Cpu) -> list[int]:
    return [cpu.requests, cpu.sent, cpu.taken, cpu.acknowledged]


def _settle(cpu: Cpu) -> None:
    # Whatever a request may have left in the mailbox.
    cpu.pending = cpu.signal = False


def _later(kernel: SimKernel) -> Nanos:
    return Nanos(kernel.now + TEST_SPAN)


def _difference(before: dict[str, int], after: dict[str, int]) -> str:
    return ", ".join(key for key, value in before.items() if after[key] != value)


async def _refused(trap: Trap[Any]) -> Status | None:
    try:
        _ = await trap
    except AbiError as refusal:
        return refusal.status
    return None


async def _leave(_boot: BootImage) -> int:
    return 0


async def _doze(_boot: BootImage) -> int:
    now = await Now()
    _ = await SleepUntil(Nanos(now + 100_000))
    return 0


def _unmappable(_boot: BootImage) -> Coroutine[Trap[Any], Any, int | None]:
    raise MemoryError("this program's image does not map")


async def _fill_slots(slot: Slot) -> list[Slot]:
    clones: list[Slot] = []
    while True:
        try:
            clones.append(await CapClone(slot))
        except AbiError as refusal:
            require(refusal.status is Status.NO_SPACE, f"a full table answers {refusal}")
            return clones


async def _fill_endpoints() -> list[Slot]:
    made: list[Slot] = []
    while True:
        try:
            made.append(await EndpointCreate())
        except AbiError as refusal:
            require(refusal.status is Status.NO_SPACE, f"a full quota answers {refusal}")
            return made


async def _drained(endpoint: Slot) -> int:
    """Hear of every link that has closed; the number of them."""
    gone = 0
    while True:
        try:
            _ = await Recv((endpoint,), NO_WAIT)
        except PeerGone:
            gone += 1
        except AbiError:
            return gone


async def _reap(child: Spawned) -> int:
    now = await Now()
    end = await Wait(child.pid, Nanos(now + TEST_SPAN))
    await CapClose(child.slot)
    return end.code


async def _spawn_and_reap(spec: SpawnSpec) -> int:
    return await _reap(await Spawn(spec))
