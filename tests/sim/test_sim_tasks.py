"""Tasks, memory, classes, console and accounts on the simulated kernel."""

from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import pytest

from nexus.abi import (
    NEVER,
    NO_WAIT,
    PAGE_SIZE,
    VMO_SIZE_MAX,
    AbiError,
    BootImage,
    CapClone,
    CapClose,
    CapKind,
    CapQuery,
    ConsoleWrite,
    Entropy,
    Event,
    EventKind,
    Kill,
    LinkCreate,
    LinkId,
    LinkTerms,
    Nanos,
    Now,
    PeerGone,
    Pid,
    Program,
    QosClass,
    Recv,
    Rights,
    Send,
    SetTaskQos,
    SleepUntil,
    Slot,
    Spawn,
    SpawnLastError,
    SpawnReason,
    SpawnSpec,
    Status,
    TaskQos,
    TaskStats,
    TaskTable,
    Trap,
    VmoCreate,
    VmoMap,
    VmoSeal,
    VmoWrite,
    Wait,
    service_id,
)
from nexus.kernel.core import EXIT_CRASH, RunOver, SystemLimits
from nexus.kernel.sim import SimKernel

Main = Callable[[BootImage], Coroutine[Trap[Any], Any, int | None]]
MS = 1_000_000


def make(
    main: Main,
    *,
    limits: SystemLimits | None = None,
    heap_size: int = 1792 * 1024,
    **programs: Main,
) -> tuple[SimKernel, Program, list[Event]]:
    events: list[Event] = []
    table = {name: Program(name=name, main=task, digest=name) for name, task in programs.items()}
    kernel = SimKernel(table, seed=1, recorder=events.append, limits=limits, heap_size=heap_size)
    return kernel, Program(name="root", main=main, digest="root"), events


def run(main: Main, **options: Any) -> list[Event]:
    """Run a root task to its end; a failed assertion in any task fails the test."""
    kernel, root, events = make(main, **options)
    kernel.run(root, b"", until=Nanos(kernel.now + 60_000 * MS))
    assert kernel.crashes == []
    assert set(kernel.resources().values()) == {0}
    return events


async def refused(trap: Awaitable[Any]) -> Status:
    try:
        answer = await trap
    except AbiError as refusal:
        return refusal.status
    raise AssertionError(f"not refused, but answered {answer!r}")


async def drained(endpoint: Slot) -> LinkId:
    """Take what is queued until a link has ended; its id."""
    while True:
        try:
            await Recv((endpoint,), NO_WAIT)
        except PeerGone as gone:
            return gone.link


async def idle(boot: BootImage) -> None:
    await SleepUntil(NEVER)


async def leave(boot: BootImage) -> int:
    return 3


def of(kind: EventKind, events: list[Event]) -> list[dict[str, object]]:
    return [dict(event.fields) for event in events if event.kind is kind]


# ---- spawn, wait, kill


def test_a_child_knows_who_it_is_and_has_its_two_slots() -> None:
    boots: list[BootImage] = []

    async def main(boot: BootImage) -> None:
        assert (boot.name, boot.control, boot.endpoint) == ("init-lite", None, 1)
        spec = SpawnSpec("worker", "child", boot.endpoint, b"settings", QosClass.INTERACTIVE)
        spawned = await Spawn(spec)
        table = await TaskTable()

        assert [row.name for row in table] == ["init-lite", "worker"]
        assert table[1].pid == spawned.pid
        assert (table[1].service, table[1].qos) == (service_id("worker"), QosClass.INTERACTIVE)
        assert (await Wait(spawned.pid, NEVER)).code == 0
        assert len(await TaskTable()) == 1

    async def child(boot: BootImage) -> None:
        boots.append(boot)
        assert boot.control == 0
        assert boot.endpoint == 1
        counters = await TaskStats()
        assert (counters.slots, counters.endpoints, counters.links) == (2, 1, 1)
        assert await TaskQos() is QosClass.INTERACTIVE

    events = run(main, child=child)

    assert boots[0].argument == b"settings"
    assert boots[0].service == service_id("worker")
    spawn = of(EventKind.SPAWN, events)[1]
    assert spawn["name"] == "worker"
    assert (spawn["program"], spawn["digest"], spawn["generation"]) == ("child", "child", 1)
    assert of(EventKind.EXIT, events)[0] == {
        "name": "worker",
        "generation": 1,
        "code": 0,
        "signal": 0,
    }


def test_a_generation_counts_the_starts_and_a_failed_start_does_not_count() -> None:
    async def main(boot: BootImage) -> None:
        spec = SpawnSpec("worker", "leave", boot.endpoint)
        for generation in (1, 2, 3):
            spawned = await Spawn(spec)
            assert spawned.generation == generation
            assert await refused(Spawn(spec)) is Status.INVALID_ARGUMENT  # alive
            await Wait(spawned.pid, NEVER)

    run(main, leave=leave)


def test_wait_tells_a_child_once_and_never_early() -> None:
    async def main(boot: BootImage) -> None:
        spawned = await Spawn(SpawnSpec("idle", "idle", boot.endpoint))
        deadline = Nanos(await Now() + MS)

        assert await refused(Wait(spawned.pid, NO_WAIT)) is Status.QUEUE_EMPTY
        assert await refused(Wait(spawned.pid, deadline)) is Status.TIMED_OUT
        assert await Now() >= deadline
        await Kill(spawned.pid)
        await Kill(spawned.pid)  # it is dead and not yet waited for: nothing happens
        end = await Wait(spawned.pid, NO_WAIT)

        assert (end.code, end.signal) == (0, 9)
        assert await refused(Wait(spawned.pid, NO_WAIT)) is Status.INVALID_ARGUMENT
        assert await refused(Wait(boot.pid, NO_WAIT)) is Status.INVALID_ARGUMENT
        assert await refused(Kill(spawned.pid)) is Status.INVALID_ARGUMENT

    run(main, idle=idle)


def test_only_the_root_task_may() -> None:
    async def main(boot: BootImage) -> None:
        spawned = await Spawn(SpawnSpec("child", "child", boot.endpoint))
        assert (await Wait(spawned.pid, NEVER)).code == 0

    async def child(boot: BootImage) -> None:
        spec = SpawnSpec("other", "child", boot.endpoint)
        traps: list[Trap[Any]] = [
            Spawn(spec),
            Wait(Pid(1), NO_WAIT),
            Kill(Pid(1)),
            TaskTable(),
            Entropy(8),
        ]
        for trap in traps:
            assert await refused(trap) is Status.PERMISSION_DENIED
        assert await SpawnLastError() is SpawnReason.NONE

    run(main, child=child)


@pytest.mark.parametrize(
    "change",
    [
        {"program": "none"},
        {"name": ""},
        {"name": "n" * 49},
        {"name": "Upper"},
        {"name": "s p"},
        {"name": "naïve"},
        {"qos": 4},
        {"cpu": -1},
        {"owner_size": 4095},
        {"endpoints": 0},
        {"endpoints": 97},
        {"budget": 1},
        {"delegations": -1},
        {"argument": b"x" * (16 * 1024 + 1)},
        {"control": Slot(0)},
        {"control": Slot(-1)},
        {"name": "init-lite"},
    ],
)
def test_a_misshapen_spawn_is_invalid_payload_and_leaves_nothing(change: dict[str, Any]) -> None:
    async def main(boot: BootImage) -> None:
        before = await TaskStats()
        spec = SpawnSpec("leave", "leave", boot.endpoint)

        assert await refused(Spawn(spec._replace(**change))) is Status.INVALID_ARGUMENT

        assert await SpawnLastError() is SpawnReason.INVALID_PAYLOAD
        assert await SpawnLastError() is SpawnReason.NONE
        assert await TaskStats() == before

    events = run(main, leave=leave)

    assert of(EventKind.SPAWN_FAILED, events)[0]["reason"] == "invalid_payload"


def test_spawns_reserve_from_the_totals_and_exits_give_back() -> None:
    limits = SystemLimits(total_size=100_000, root_size=20_000, endpoints=30, root_endpoints=10)

    async def main(boot: BootImage) -> None:
        spec = SpawnSpec("a", "idle", boot.endpoint, owner_size=50_000, endpoints=10)
        first = await Spawn(spec)

        assert await refused(Spawn(spec._replace(name="b"))) is Status.NO_SPACE
        assert await SpawnLastError() is SpawnReason.OOM
        wide = spec._replace(name="b", owner_size=5_000, endpoints=11)
        assert await refused(Spawn(wide)) is Status.NO_SPACE
        assert await SpawnLastError() is SpawnReason.ENDPOINT_QUOTA
        await Kill(first.pid)
        second = await Spawn(spec._replace(name="b"))  # not reaped, and yet given back
        await Kill(second.pid)

    run(main, limits=limits, idle=idle)


def test_the_number_of_tasks_is_bounded_and_the_unreaped_count() -> None:
    async def main(boot: BootImage) -> None:
        spec = SpawnSpec("a", "leave", boot.endpoint, owner_size=5_000, endpoints=1)
        first = await Spawn(spec)
        await SleepUntil(Nanos(await Now() + MS))
        await Spawn(spec._replace(name="b"))

        assert await refused(Spawn(spec._replace(name="c"))) is Status.NO_SPACE
        assert await SpawnLastError() is SpawnReason.OOM
        assert (await Wait(first.pid, NO_WAIT)).code == 3
        await Spawn(spec._replace(name="c"))

    run(main, limits=SystemLimits(tasks=3), leave=leave)


def test_control_links_take_their_share_from_the_spawner() -> None:
    async def main(boot: BootImage) -> None:
        spec = SpawnSpec("a", "leave", boot.endpoint, owner_size=5_000, endpoints=1)
        first = await Spawn(spec)
        await Wait(first.pid, NEVER)

        assert await refused(Spawn(spec)) is Status.NO_SPACE, (
            "the first control link is not heard of"
        )
        with pytest.raises(PeerGone):
            await Recv((boot.endpoint,), NO_WAIT)
        await Spawn(spec)

    run(main, limits=SystemLimits(root_size=4_096), leave=leave)


def test_a_pid_is_given_again_but_not_while_its_messages_are_queued() -> None:
    async def main(boot: BootImage) -> None:
        spec = SpawnSpec("a", "speaker", boot.endpoint)
        first = await Spawn(spec)
        await Wait(first.pid, NEVER)
        second = await Spawn(spec._replace(name="b", program="leave"))
        assert second.pid != first.pid, "a message of the first is still queued"

        message = await Recv((boot.endpoint,), NO_WAIT)
        assert message.sender == (service_id("a"), first.pid, 1, QosClass.NORMAL)
        third = await Spawn(spec._replace(name="c", program="leave"))
        assert third.pid == first.pid
        for child in (second, third):
            await Wait(child.pid, NEVER)

    async def speaker(boot: BootImage) -> None:
        assert boot.control is not None
        await Send(boot.control, b"last words")

    run(main, speaker=speaker, leave=leave)


def test_a_crash_is_an_exit_with_a_code_of_its_own_and_its_traceback_is_kept() -> None:
    async def main(boot: BootImage) -> None:
        spawned = await Spawn(SpawnSpec("a", "crash", boot.endpoint))
        end = await Wait(spawned.pid, NEVER)
        assert (end.code, end.signal) == (EXIT_CRASH, 0)

    async def crash(boot: BootImage) -> None:
        raise ValueError("on purpose")

    kernel, root, events = make(main, crash=crash)
    kernel.run(root, b"", until=Nanos(kernel.now + MS))

    assert len(kernel.crashes) == 1
    assert "on purpose" in str(of(EventKind.EXIT, events)[0]["crash"])
    assert not any("on purpose" in line for line in kernel.log_lines())


def test_awaiting_something_that_is_no_trap_is_a_crash() -> None:
    class Odd:
        def __await__(self) -> Any:
            yield "not a trap"

    async def main(boot: BootImage) -> None:
        await Odd()

    kernel, root, _ = make(main)

    assert kernel.run(root, b"", until=Nanos(kernel.now + MS)).code == EXIT_CRASH
    assert "no trap" in kernel.crashes[0]


def test_the_exit_of_the_root_ends_everything_else() -> None:
    async def main(boot: BootImage) -> int:
        await Spawn(SpawnSpec("a", "idle", boot.endpoint))
        return 7

    kernel, root, events = make(main, idle=idle)

    assert kernel.run(root, b"", until=Nanos(kernel.now + MS)).code == 7
    assert [row["signal"] for row in of(EventKind.EXIT, events)] == [0, 9]
    assert set(kernel.resources().values()) == {0}


def test_a_run_that_takes_too_long_is_over_and_everything_is_given_back() -> None:
    kernel, root, _ = make(idle)
    until = Nanos(kernel.now + 5 * MS)

    with pytest.raises(RunOver):
        kernel.run(root, b"", until=until)

    assert kernel.now == until
    assert set(kernel.resources().values()) == {0}


def test_two_hundred_kills_leave_nothing_behind() -> None:
    async def main(boot: BootImage) -> None:
        before = await TaskStats()
        for _ in range(200):
            spawned = await Spawn(SpawnSpec("a", "busy", boot.endpoint, delegations=2))
            link = await LinkCreate(spawned.slot, LinkTerms(8, 1000, 0))
            await Send(link.slot, b"work")
            await SleepUntil(Nanos(await Now() + MS // 10))
            await Kill(spawned.pid)
            await Wait(spawned.pid, NO_WAIT)
            assert await drained(boot.endpoint) == spawned.link
            await CapClose(link.slot)
            await CapClose(spawned.slot)
        after = await TaskStats()
        assert after.budget_used == before.budget_used
        assert (after.slots, after.links, after.queued) == (before.slots, 0, 0)

    async def busy(boot: BootImage) -> None:
        assert boot.control is not None
        memory = await VmoCreate(9000)
        await VmoSeal(memory)
        view = await VmoMap(memory)
        while True:
            await Send(boot.control, bytes(view[:1]) + b"x", deadline=NEVER)

    kernel, root, _ = make(main, busy=busy)
    kernel.run(root, b"", until=Nanos(kernel.now + 10_000 * MS))
    assert kernel.crashes == []
    assert set(kernel.resources().values()) == {0}
    assert kernel.stats()["spawns"] == 201


# ---- memory


def test_a_vmo_is_zeroed_rounded_and_says_so() -> None:
    async def main(boot: BootImage) -> None:
        memory = await VmoCreate(5000)

        assert await CapQuery(memory) == (CapKind.VMO, Rights.MAP | Rights.MANAGE, 8192)
        assert (await TaskStats()).vmo_size == 8192
        await VmoWrite(memory, 8190, b"ab")
        for offset, data in ((8191, b"ab"), (-1, b"a"), (8193, b"")):
            assert await refused(VmoWrite(memory, offset, data)) is Status.INVALID_ARGUMENT
        assert await refused(VmoMap(memory)) is Status.PERMISSION_DENIED
        await VmoSeal(memory)
        await VmoSeal(memory)
        assert await refused(VmoWrite(memory, 0, b"x")) is Status.PERMISSION_DENIED
        view = await VmoMap(memory)
        assert bytes(view) == bytes(8190) + b"ab"
        assert view.readonly
        for size in (0, -1, VMO_SIZE_MAX + 1):
            assert await refused(VmoCreate(size)) is Status.INVALID_ARGUMENT
        assert await refused(VmoMap(boot.endpoint)) is Status.INVALID_ARGUMENT

    run(main)


def test_a_sealed_vmo_moves_with_map_only_and_its_charge_with_it() -> None:
    async def main(boot: BootImage) -> None:
        spawned = await Spawn(SpawnSpec("a", "reader", boot.endpoint))
        memory = await VmoCreate(PAGE_SIZE)
        await VmoWrite(memory, 0, b"bulk")
        await VmoSeal(memory)
        before = await TaskStats()

        await Send(spawned.slot, b"take it", move=memory)

        after = await TaskStats()
        assert after.vmo_size == 0
        assert before.budget_used - after.budget_used == PAGE_SIZE + 32
        assert (await Wait(spawned.pid, NEVER)).code == 0

    async def reader(boot: BootImage) -> None:
        cap = (await Recv((boot.endpoint,), NEVER)).cap
        assert cap is not None
        assert (await CapQuery(cap)).rights == Rights.MAP
        assert await refused(VmoWrite(cap, 0, b"x")) is Status.PERMISSION_DENIED
        view = await VmoMap(cap)
        assert bytes(view[:4]) == b"bulk"
        await CapClose(cap)
        assert (await TaskStats()).vmo_size == PAGE_SIZE, "a view is still out"
        view.release()
        assert (await TaskStats()).vmo_size == 0

    run(main, reader=reader)


def test_views_of_two_tasks_are_told_apart() -> None:
    async def main(boot: BootImage) -> None:
        memory = await VmoCreate(PAGE_SIZE)
        await VmoSeal(memory)
        kept = await VmoMap(memory)
        clone = await CapClone(memory)
        spawned = await Spawn(SpawnSpec("a", "reader", boot.endpoint))
        await Send(spawned.slot, b"take it", move=clone)
        assert (await Wait(spawned.pid, NEVER)).code == 0
        await CapClose(memory)
        assert (await TaskStats()).vmo_size == PAGE_SIZE
        kept.release()
        assert (await TaskStats()).vmo_size == 0

    async def reader(boot: BootImage) -> None:
        cap = (await Recv((boot.endpoint,), NEVER)).cap
        assert cap is not None
        view = await VmoMap(cap)
        view.release()
        await CapClose(cap)
        assert (await TaskStats()).vmo_size == 0

    run(main, reader=reader)


def test_a_vmo_over_the_budget_is_refused_with_the_request_kept() -> None:
    async def main(boot: BootImage) -> None:
        spawned = await Spawn(SpawnSpec("a", "greedy", boot.endpoint, budget=20_000))
        assert (await Wait(spawned.pid, NEVER)).code == 0

    async def greedy(boot: BootImage) -> None:
        assert await refused(VmoCreate(30_001)) is Status.NO_SPACE
        counters = await TaskStats()
        assert (counters.refused_size, counters.refused_align) == (30_001, PAGE_SIZE)
        assert counters.budget_used + counters.budget_free == counters.budget_total == 20_000
        await VmoCreate(16_000)

    events = run(main, greedy=greedy)
    report = of(EventKind.HEAP, events)[0]
    assert (report["account"], report["size"], report["align"]) == ("budget of a", 30_001, 4096)


def test_the_kernel_heap_is_a_budget_of_its_own() -> None:
    async def main(boot: BootImage) -> None:
        assert await refused(VmoCreate(60_000)) is Status.NO_SPACE
        assert (await TaskStats()).refused_size == 60_000
        await VmoCreate(16_000)
        link = await LinkCreate(boot.endpoint)
        sent = 0
        while True:
            try:
                await Send(link.slot, b"x" * 8000)
            except AbiError as refusal:
                assert refusal.status is Status.NO_SPACE
                break
            sent += 1
        assert sent == 1, "16 KiB of link, but not of heap"
        await Recv((boot.endpoint,), NO_WAIT)
        await Send(link.slot, b"x" * 8000)

    events = run(main, heap_size=32 * 1024)
    assert {row["account"] for row in of(EventKind.HEAP, events)} == {"kernel heap"}
    for row in of(EventKind.HEAP, events):
        used, free, total = (row[f"heap_budget_{part}"] for part in ("used", "free", "total"))
        assert isinstance(used, int)
        assert isinstance(free, int)
        assert used + free == total == 32 * 1024


# ---- classes


def test_the_authority_over_classes_and_its_audit() -> None:
    async def main(boot: BootImage) -> None:
        child = await Spawn(SpawnSpec("a", "child", boot.endpoint))
        await Wait(child.pid, NEVER)
        other = await Spawn(SpawnSpec("execd", "execd", boot.endpoint))
        await Wait(other.pid, NEVER)
        assert await refused(SetTaskQos(other.pid, 1)) is Status.INVALID_ARGUMENT  # dead

    async def child(boot: BootImage) -> None:
        assert await refused(SetTaskQos(None, 255)) is Status.INVALID_ARGUMENT
        assert await refused(SetTaskQos(Pid(77), 4)) is Status.INVALID_ARGUMENT
        assert await refused(SetTaskQos(Pid(77), 1)) is Status.INVALID_ARGUMENT
        assert await refused(SetTaskQos(Pid(1), 0)) is Status.PERMISSION_DENIED
        assert await refused(SetTaskQos(None, 2)) is Status.PERMISSION_DENIED
        assert await TaskQos() is QosClass.NORMAL
        await SetTaskQos(None, 1)
        await SetTaskQos(boot.pid, 0)
        assert await TaskQos() is QosClass.IDLE

    async def execd(boot: BootImage) -> None:
        await SetTaskQos(Pid(1), 2)
        await SetTaskQos(None, 3)

    events = run(main, child=child, execd=execd)
    told = [str(row["line"]) for row in of(EventKind.QOS, events)]
    reasons = [line.split()[2].removeprefix("reason=") for line in told]
    assert reasons == [
        "invalid_qos_class",
        "invalid_qos_class",
        "invalid_target_pid",
        "unauthorized_other_pid",
        "unauthorized_escalation",
        "applied",
        "applied",
        "applied",
        "applied",
        "invalid_target_pid",
    ]
    sid = f"0x{service_id('a'):016x}"
    assert told[4] == (
        "QOS-AUDIT decision=deny reason=unauthorized_escalation "
        f"caller_sid={sid} caller_pid=2 target_pid=2 from=normal to=interactive"
    )
    assert told[2].endswith(" target_pid=77")


def test_a_message_tells_the_class_the_kernel_holds() -> None:
    async def main(boot: BootImage) -> None:
        child = await Spawn(SpawnSpec("a", "child", boot.endpoint, qos=QosClass.PERF_BURST))
        await Wait(child.pid, NEVER)
        message = await Recv((boot.endpoint,), NO_WAIT)
        assert message.sender.qos is QosClass.IDLE

    async def child(boot: BootImage) -> None:
        assert boot.control is not None
        await SetTaskQos(None, 0)
        await Send(boot.control, b"x")

    run(main, child=child)


# ---- console, entropy, time


@pytest.mark.parametrize(
    ("line", "evidence"),
    [
        ("x" * 513, b""),
        ("é" * 257, b""),
        ("two\nlines", b""),
        ("bell\x07", b""),
        ("\x7f", b""),
        ("\u2028", b""),
        ("\ud800", b""),
        ("x", b"[]"),
        ("x", b"{"),
        ("x", b'{"a": NaN}'),
        ("x", b'{"a": 1e999}'),
        ("x", b"\xff"),
        ("x", b"{" + b" " * 4096 + b"}"),
        ("x", b'{"a":' + b"[" * 2000 + b"]" * 2000 + b"}"),
    ],
)
def test_a_line_or_evidence_out_of_shape_is_invalid(line: str, evidence: bytes) -> None:
    async def main(boot: BootImage) -> None:
        assert await refused(ConsoleWrite(line, evidence)) is Status.INVALID_ARGUMENT

    assert of(EventKind.CONSOLE, run(main)) == []


def test_a_line_is_stamped_with_its_writer() -> None:
    async def main(boot: BootImage) -> None:
        await ConsoleWrite("init: ready", b'{"services": 2}')

    events = run(main)

    assert of(EventKind.CONSOLE, events) == [
        {"name": "init-lite", "generation": 1, "line": "init: ready", "evidence": {"services": 2}}
    ]


def test_entropy_is_a_function_of_the_seed_and_bounded() -> None:
    drawn: list[bytes] = []

    async def main(boot: BootImage) -> None:
        drawn.append(await Entropy(256))
        drawn.append(await Entropy(256))
        for size in (0, 257):
            assert await refused(Entropy(size)) is Status.INVALID_ARGUMENT

    run(main)
    run(main)

    assert drawn[0] != drawn[1]
    assert drawn[:2] == drawn[2:]


def test_a_sleep_ends_at_its_time_and_a_past_one_at_once() -> None:
    async def main(boot: BootImage) -> None:
        start = await Now()

        assert await SleepUntil(Nanos(start + 7 * MS)) == start + 7 * MS
        woken = await SleepUntil(Nanos(5))

        assert 0 < woken - (start + 7 * MS) < 30_000

    run(main)
