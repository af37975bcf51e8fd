"""Tasks: starting, ending, waiting, killing, and what only the root task may do."""

import sys
from typing import Any

from nexus.abi import (
    CONTROL_LINK_SIZE,
    ENDPOINTS_PER_OWNER_MAX,
    ENTROPY_SIZE_MAX,
    INIT_NAME,
    NO_WAIT,
    SERVICE_NAME_SIZE_MAX,
    SLOTS_MAX,
    AbiError,
    AuditLog,
    BootImage,
    CapClone,
    CapClose,
    EndpointCreate,
    Entropy,
    EventKind,
    Exit,
    Kill,
    LinkCreate,
    LinkTerms,
    Now,
    Pid,
    QosClass,
    Recv,
    Send,
    Slot,
    Spawn,
    SpawnLastError,
    SpawnReason,
    SpawnSpec,
    Status,
    TaskInfo,
    TaskStats,
    TaskTable,
    Trap,
    Wait,
    service_id,
)
from nexus.kernel.core import EXIT_CRASH
from nexus.kernel.core.limits import SystemLimits
from nexus.testing.conformance.steps import (
    PAST,
    control,
    ended,
    ended_well,
    gone,
    refused,
    soon,
    start,
    take,
    tell,
)
from nexus.testing.rig import EXIT_FAILED, Main, Rig, TaskFailed


async def _waits(boot: BootImage) -> None:
    """A program that ends on its first message."""
    await take(boot.endpoint)


def test_traps_of_the_root_task_are_refused_to_others(rig: Rig) -> None:
    async def child(boot: BootImage) -> None:
        spec = SpawnSpec(name="bastard", program="child", control=boot.endpoint)
        traps: tuple[Trap[Any], ...] = (
            Spawn(spec),
            Wait(boot.pid, NO_WAIT),
            Wait(boot.pid, PAST),
            Kill(boot.pid),
            Kill(Pid(1)),
            TaskTable(),
            Entropy(16),
            AuditLog(),
        )
        before = await TaskStats()
        for trap in traps:
            await refused(trap, Status.PERMISSION_DENIED)
        assert await TaskStats() == before

    async def root(boot: BootImage) -> None:
        spawned = await start(boot, "child")
        await ended_well(spawned)
        assert len(await TaskTable()) == 1

    rig.run(root, programs={"child": child})


def test_an_exit_code_reaches_the_root_task(rig: Rig) -> None:
    async def returns(boot: BootImage) -> int:
        return int(boot.argument)

    async def exits(boot: BootImage) -> None:
        await Exit(int(boot.argument))
        raise AssertionError("a task lives on after Exit")

    async def nothing(boot: BootImage) -> None:
        assert boot.argument == b"0"

    async def root(boot: BootImage) -> None:
        for name, code in (
            ("returns", 0), ("returns", 42), ("returns", 255),
            ("exits", 0), ("exits", 7), ("exits", 255), ("nothing", 0),
        ):  # fmt: skip
            spawned = await start(boot, name, argument=b"%d" % code)
            info = await ended(spawned)
            assert (info.pid, info.code, info.signal) == (spawned.pid, code, 0), name

    rig.run(root, programs={"returns": returns, "exits": exits, "nothing": nothing})


def test_exit_codes_outside_a_byte_are_refused(rig: Rig) -> None:
    async def child(boot: BootImage) -> int:
        for code in (-1, 256):
            await refused(Exit(code), Status.INVALID_ARGUMENT)
        return 3

    async def root(boot: BootImage) -> None:
        assert (await ended(await start(boot, "child"))).code == 3

    rig.run(root, programs={"child": child})


def test_an_exit_is_final_whatever_the_task_does_about_it(rig: Rig) -> None:
    async def clings(boot: BootImage) -> int:
        try:
            await Exit(5)
        except GeneratorExit:
            await Now()
        return 7

    async def protests(boot: BootImage) -> None:
        try:
            await Exit(5)
        finally:
            raise ValueError("too late")

    async def root(boot: BootImage) -> None:
        for name in ("clings", "protests"):
            info = await ended(await start(boot, name))
            assert (info.code, info.signal) == (5, 0), name

    rig.run(root, programs={"clings": clings, "protests": protests})


def test_a_bug_of_a_task_is_its_own_crash_and_the_system_goes_on(rig: Rig) -> None:
    async def returns_too_much(boot: BootImage) -> int:
        return 256

    async def returns_too_little(boot: BootImage) -> int:
        return -1

    async def leaves(boot: BootImage) -> None:
        sys.exit(0)

    async def interrupts(boot: BootImage) -> None:
        raise KeyboardInterrupt

    async def exits_oddly(boot: BootImage) -> None:
        await Exit(1.5)  # type: ignore[arg-type]

    bugs: dict[str, Main] = {
        "much": returns_too_much,
        "little": returns_too_little,
        "leaves": leaves,
        "interrupts": interrupts,
        "oddly": exits_oddly,
    }

    async def root(boot: BootImage) -> None:
        for name in bugs:
            info = await ended(await start(boot, name))
            assert (info.code, info.signal) == (EXIT_CRASH, 0), name

    # To the rig such a code is a failure: there must be these and no other.
    told: list[str] = []
    try:
        rig.run(root, programs=bugs)
    except TaskFailed as failure:
        told = str(failure).split("\n\n")[1:]
    assert told == [f"{name}: failed and could not print why" for name in bugs]


def test_waiting_tells_running_ended_and_unknown_tasks_apart(rig: Rig) -> None:
    async def root(boot: BootImage) -> None:
        spawned = await start(boot, "child")
        await refused(Wait(spawned.pid, NO_WAIT), Status.QUEUE_EMPTY)
        await refused(Wait(spawned.pid, PAST), Status.TIMED_OUT)
        await Send(spawned.slot, b"end")
        assert (await ended(spawned)).code == 0
        await refused(Wait(spawned.pid, NO_WAIT), Status.INVALID_ARGUMENT)
        for pid in (boot.pid, Pid(0), Pid(-1), Pid(1 << 30)):
            await refused(Wait(pid, NO_WAIT), Status.INVALID_ARGUMENT)
            await refused(Wait(pid, await soon()), Status.INVALID_ARGUMENT)

    rig.run(root, programs={"child": _waits})


def test_the_end_of_a_task_is_kept_until_it_is_waited_for(rig: Rig) -> None:
    async def child(boot: BootImage) -> int:
        return int(boot.argument)

    async def root(boot: BootImage) -> None:
        spawned = [
            await start(boot, f"child{code}", program="child", argument=b"%d" % code)
            for code in (1, 2, 3)
        ]
        for _ in spawned:
            await gone(boot.endpoint, None)

        codes = [(await Wait(each.pid, await soon())).code for each in reversed(spawned)]

        assert codes == [3, 2, 1]

    rig.run(root, programs={"child": child})


def test_a_kill_ends_a_task_at_once(rig: Rig) -> None:
    async def root(boot: BootImage) -> None:
        spawned = await start(boot, "child")

        await Kill(spawned.pid)

        info = await ended(spawned)
        assert (info.pid, info.code, info.signal) == (spawned.pid, 0, 9)
        await gone(boot.endpoint, spawned.link)
        await refused(Send(spawned.slot, b"x"), Status.NO_SUCH_ENDPOINT)

    rig.run(root, programs={"child": _waits})


def test_only_a_living_task_is_killed(rig: Rig) -> None:
    async def root(boot: BootImage) -> None:
        spawned = await start(boot, "child")
        await Send(spawned.slot, b"end")
        await ended_well(spawned)

        for pid in (spawned.pid, Pid(0), Pid(-1), Pid(1 << 30), boot.pid):
            await refused(Kill(pid), Status.INVALID_ARGUMENT)

    rig.run(root, programs={"child": _waits})


def test_the_task_table_lists_the_living_by_pid(rig: Rig) -> None:
    async def root(boot: BootImage) -> None:
        me = TaskInfo(boot.pid, INIT_NAME, service_id(INIT_NAME), 1, QosClass.PERF_BURST)
        alone = await TaskTable()
        assert alone[0]._replace(qos=me.qos) == me
        spawned = [
            await start(boot, "idle", program="child", qos=QosClass.IDLE),
            await start(boot, "quick", program="child", qos=QosClass.INTERACTIVE),
        ]

        table = await TaskTable()

        assert [row.pid for row in table] == sorted(row.pid for row in table)
        rows = {row.name: row for row in table}
        assert set(rows) == {INIT_NAME, "idle", "quick"}
        assert rows["idle"] == TaskInfo(
            spawned[0].pid, "idle", service_id("idle"), 1, QosClass.IDLE
        )
        assert rows["quick"].qos is QosClass.INTERACTIVE
        for each in spawned:
            await Send(each.slot, b"end")
            await ended_well(each)
        assert await TaskTable() == alone

    rig.run(root, programs={"child": _waits})


async def _spawn_fails(spec: SpawnSpec, status: Status, reason: SpawnReason) -> None:
    before = await TaskStats()
    await refused(Spawn(spec), status)
    assert await SpawnLastError() is reason, spec
    assert await SpawnLastError() is SpawnReason.NONE, "reading clears the reason"
    after = await TaskStats()
    assert after._replace(refused_size=0, refused_align=0) == before._replace(
        refused_size=0, refused_align=0
    )


def test_a_spawn_of_a_bad_request_is_refused_as_invalid_payload(rig: Rig) -> None:
    async def root(boot: BootImage) -> None:
        assert await SpawnLastError() is SpawnReason.NONE
        living = await start(boot, "living", program="child")
        good = SpawnSpec(name="fresh", program="child", control=boot.endpoint)
        table = await TaskTable()
        for spec in (
            good._replace(program="no such program"),
            good._replace(name=""),
            good._replace(name="x" * (SERVICE_NAME_SIZE_MAX + 1)),
            good._replace(name="naïve"),
            good._replace(name="a\nb"),
            good._replace(name="living"),
            good._replace(owner_size=0),
            good._replace(owner_size=-1),
            good._replace(owner_size=CONTROL_LINK_SIZE - 1),
            good._replace(endpoints=0),
            good._replace(endpoints=ENDPOINTS_PER_OWNER_MAX + 1),
            good._replace(budget=0),
            good._replace(budget=-1),
            good._replace(delegations=-1),
        ):
            await _spawn_fails(spec, Status.INVALID_ARGUMENT, SpawnReason.INVALID_PAYLOAD)
        assert await TaskTable() == table
        await Send(living.slot, b"end")
        await ended_well(living)
        again = await start(boot, "living", program="child")
        assert again.generation == 2, "a refused spawn is no start"
        await Kill(again.pid)
        await ended(again)

    rig.run(root, programs={"child": _waits})


def test_a_failed_spawn_is_recorded_with_its_reason(rig: Rig) -> None:
    async def root(boot: BootImage) -> None:
        spec = SpawnSpec(name="fresh", program="none", control=boot.endpoint)
        await refused(Spawn(spec), Status.INVALID_ARGUMENT)

    run = rig.observe(root)

    (failed,) = run.fields(EventKind.SPAWN_FAILED)
    assert failed["name"] == "fresh"
    assert failed["program"] == "none"
    assert str(failed["reason"]).lower().replace("_", "-") in {"invalid-payload", "5"}


def test_a_spawn_with_a_full_table_is_refused_as_cap_table_full(rig: Rig) -> None:
    async def root(boot: BootImage) -> None:
        link = await LinkCreate(boot.endpoint)
        clones = [await CapClone(link.slot) for _ in range(SLOTS_MAX - (await TaskStats()).slots)]
        spec = SpawnSpec(name="child", program="child", control=boot.endpoint)

        await _spawn_fails(spec, Status.NO_SPACE, SpawnReason.CAP_TABLE_FULL)

        await CapClose(clones[3])
        spawned = await Spawn(spec)
        assert spawned.slot == clones[3]
        assert spawned.generation == 1
        await Send(spawned.slot, b"end")
        await ended_well(spawned)

    rig.run(root, programs={"child": _waits})


def test_a_spawn_beyond_the_tasks_of_the_system_is_refused_as_oom(rig: Rig) -> None:
    async def root(boot: BootImage) -> None:
        children = [await start(boot, name, program="child") for name in ("one", "two")]
        spec = SpawnSpec(name="three", program="child", control=boot.endpoint)

        await _spawn_fails(spec, Status.NO_SPACE, SpawnReason.OOM)

        await Send(children[0].slot, b"end")
        await ended_well(children[0])
        third = await Spawn(spec)
        for each in (third, children[1]):
            await Send(each.slot, b"end")
            await ended_well(each)

    rig.run(root, programs={"child": _waits}, limits=SystemLimits(tasks=3))


def test_a_spawn_onto_a_cpu_that_is_not_there_is_refused_as_map_failed(rig: Rig) -> None:
    async def root(boot: BootImage) -> None:
        spec = SpawnSpec(name="lost", program="child", control=boot.endpoint, cpu=1000)

        await _spawn_fails(spec, Status.UNSUPPORTED, SpawnReason.MAP_FAILED)

        assert len(await TaskTable()) == 1
        placed = await Spawn(spec._replace(cpu=0))
        assert placed.generation == 1
        await Send(placed.slot, b"end")
        await ended_well(placed)

    rig.run(root, programs={"child": _waits})


def test_a_spawn_needs_an_endpoint_of_ones_own_for_control(rig: Rig) -> None:
    async def root(boot: BootImage) -> None:
        link = await LinkCreate(boot.endpoint)
        for slot in (Slot(60), Slot(-1), link.slot):
            spec = SpawnSpec(name="child", program="child", control=slot)
            try:
                await Spawn(spec)
            except AbiError as error:
                assert error.status in {Status.INVALID_ARGUMENT, Status.PERMISSION_DENIED}
            else:
                raise AssertionError("a spawn without a control endpoint was not refused")
        assert len(await TaskTable()) == 1

    rig.run(root, programs={"child": _waits})


def test_a_control_link_may_lead_to_any_endpoint_of_the_spawner(rig: Rig) -> None:
    async def child(boot: BootImage) -> None:
        await tell(boot, b"hello")

    async def root(boot: BootImage) -> None:
        other = await EndpointCreate()
        spawned = await Spawn(SpawnSpec(name="child", program="child", control=other))
        message = await take(other)
        assert (message.source, message.link) == (other, spawned.link)
        await gone(other, spawned.link)
        await ended_well(spawned)

    rig.run(root, programs={"child": child})


def test_a_control_link_holds_eight_messages_and_its_size(rig: Rig) -> None:
    async def child(boot: BootImage) -> None:
        aside = (await take(boot.endpoint)).cap
        assert aside is not None
        up = control(boot)
        for _ in range(8):
            await Send(up, b"x")
        await refused(Send(up, b"x"), Status.QUEUE_FULL)
        await Send(aside, b"filled")
        assert (await take(boot.endpoint)).data == b"emptied"
        await Send(up, bytes(CONTROL_LINK_SIZE))
        await refused(Send(up, b"x"), Status.NO_SPACE)
        await refused(LinkCreate(up, LinkTerms(9, 1, 0)), Status.PERMISSION_DENIED)
        await refused(LinkCreate(up, LinkTerms(1, 1, 0)), Status.NO_SPACE)
        await Send(aside, b"done")

    async def root(boot: BootImage) -> None:
        spawned = await start(boot, "child")
        other = await EndpointCreate()
        aside = await LinkCreate(other)
        await Send(spawned.slot, b"tell me here", move=aside.slot)
        assert (await take(other)).data == b"filled"
        for _ in range(8):
            await take(boot.endpoint)
        await Send(spawned.slot, b"emptied")
        assert (await take(other)).data == b"done"
        assert len((await take(boot.endpoint)).data) == CONTROL_LINK_SIZE
        await ended_well(spawned)
        for _ in range(8):
            await refused(Send(spawned.slot, b"x"), Status.NO_SUCH_ENDPOINT)

    rig.run(root, programs={"child": child})


def test_a_task_that_raises_ends_with_a_code_of_its_own(rig: Rig) -> None:
    async def child(boot: BootImage) -> None:
        await take(boot.endpoint)
        # The rig's frame turns an exception into this code; the kernel must carry it.
        await Exit(EXIT_FAILED - 1)

    async def root(boot: BootImage) -> None:
        spawned = await start(boot, "child")
        await Send(spawned.slot, b"go")
        assert (await ended(spawned)).code == EXIT_FAILED - 1

    rig.run(root, programs={"child": child})


def test_spawns_and_exits_are_recorded(rig: Rig) -> None:
    async def child(boot: BootImage) -> int:
        return 9

    async def root(boot: BootImage) -> None:
        for _ in range(2):
            await ended(await start(boot, "recorded", qos=QosClass.IDLE))

    run = rig.observe(root, programs={"recorded": child})

    spawns = [f for f in run.fields(EventKind.SPAWN) if f["name"] == "recorded"]
    exits = [f for f in run.fields(EventKind.EXIT) if f["name"] == "recorded"]
    assert [(f["generation"], f["program"]) for f in spawns] == [(1, "recorded"), (2, "recorded")]
    assert [(f["generation"], f["code"], f["signal"]) for f in exits] == [(1, 9, 0), (2, 9, 0)]
    assert len(str(spawns[0]["digest"])) == 64
    assert int(str(spawns[0]["service"]), 16) == service_id("recorded")


def test_entropy_is_fresh_and_bounded(rig: Rig) -> None:
    async def root(boot: BootImage) -> None:
        for size in (0, -1, ENTROPY_SIZE_MAX + 1):
            await refused(Entropy(size), Status.INVALID_ARGUMENT)
        assert len(await Entropy(1)) == 1
        draws = [await Entropy(ENTROPY_SIZE_MAX) for _ in range(4)]
        assert {len(draw) for draw in draws} == {ENTROPY_SIZE_MAX}
        assert len(set(draws)) == 4

    rig.run(root)


def test_many_tasks_live_at_once(rig: Rig) -> None:
    async def root(boot: BootImage) -> None:
        spawned = [
            await start(boot, f"task{n}", program="child", owner_size=8192, endpoints=2)
            for n in range(20)
        ]
        assert len({each.pid for each in spawned}) == 20
        assert len(await TaskTable()) == 21
        for each in spawned:
            await Send(each.slot, b"end")
        for each in spawned:
            await ended_well(each)
            try:
                await Recv((boot.endpoint,), await soon())
            except AbiError as error:
                assert error.status is Status.NO_SUCH_ENDPOINT

    rig.run(root, programs={"child": _waits})
