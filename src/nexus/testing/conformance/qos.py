"""Scheduling classes: who may set whose, in which order it is checked, and the audit lines."""

from nexus.abi import (
    AUDIT_LINES_MAX,
    INIT_NAME,
    AuditLog,
    BootImage,
    EventKind,
    Pid,
    QosClass,
    Send,
    SetTaskQos,
    Spawned,
    Status,
    TaskQos,
    TaskTable,
    service_id,
)
from nexus.testing.conformance.steps import ended_well, refused, start, take, tell
from nexus.testing.rig import Rig, Run

NO_PID = Pid((1 << 22) + 1)  # above Linux's PID_MAX_LIMIT


def _line(decision: str, reason: str, caller: str, pids: tuple[int, int], change: str = "") -> str:
    return (
        f"QOS-AUDIT decision={decision} reason={reason} caller_sid=0x{service_id(caller):016x} "
        f"caller_pid={pids[0]} target_pid={pids[1]}{change}"
    )


def _audit(run: Run) -> list[str]:
    return [str(fields["line"]) for fields in run.fields(EventKind.QOS)]


def test_a_task_has_the_class_of_its_spawn(rig: Rig) -> None:
    async def child(boot: BootImage) -> None:
        assert await TaskQos() is QosClass(int(boot.argument))

    async def root(boot: BootImage) -> None:
        for qos in QosClass:
            spawned = await start(boot, "child", qos=qos, argument=b"%d" % qos)
            await ended_well(spawned)

    rig.run(root, programs={"child": child})


def test_a_task_lowers_itself_and_does_not_come_back_up(rig: Rig) -> None:
    async def child(boot: BootImage) -> None:
        await SetTaskQos(None, QosClass.NORMAL)
        assert await TaskQos() is QosClass.NORMAL
        await SetTaskQos(boot.pid, QosClass.IDLE)
        assert await TaskQos() is QosClass.IDLE
        await SetTaskQos(None, QosClass.IDLE)
        await refused(SetTaskQos(None, QosClass.NORMAL), Status.PERMISSION_DENIED)
        assert await TaskQos() is QosClass.IDLE

    async def root(boot: BootImage) -> int:
        spawned = await start(boot, "modest", qos=QosClass.INTERACTIVE)
        await ended_well(spawned)
        return spawned.pid

    run = rig.observe(root, programs={"modest": child})

    pids = (run.result, run.result)
    assert _audit(run) == [
        _line("allow", "applied", "modest", pids, " from=interactive to=normal"),
        _line("allow", "applied", "modest", pids, " from=normal to=idle"),
        _line("allow", "applied", "modest", pids, " from=idle to=idle"),
        _line("deny", "unauthorized_escalation", "modest", pids, " from=idle to=normal"),
    ]


def test_refusals_of_a_class_come_in_the_order_of_the_contract(rig: Rig) -> None:
    async def child(boot: BootImage) -> None:
        other = Pid(int((await take(boot.endpoint)).data))
        for raw in (4, 255, -1):
            # An invalid number comes first, whatever else is wrong.
            await refused(SetTaskQos(NO_PID, raw), Status.INVALID_ARGUMENT)
        await refused(SetTaskQos(NO_PID, QosClass.IDLE), Status.INVALID_ARGUMENT)
        await refused(SetTaskQos(other, QosClass.PERF_BURST), Status.PERMISSION_DENIED)
        await refused(SetTaskQos(other, QosClass.IDLE), Status.PERMISSION_DENIED)
        await refused(SetTaskQos(None, QosClass.PERF_BURST), Status.PERMISSION_DENIED)
        assert await TaskQos() is QosClass.NORMAL
        await tell(boot, b"done")
        await take(boot.endpoint)

    async def waits(boot: BootImage) -> None:
        await take(boot.endpoint)
        assert await TaskQos() is QosClass.INTERACTIVE

    async def root(boot: BootImage) -> tuple[int, int]:
        other = await start(boot, "other", program="waits", qos=QosClass.INTERACTIVE)
        spawned = await start(boot, "pusher")
        await Send(spawned.slot, b"%d" % other.pid)
        assert (await take(boot.endpoint)).data == b"done"
        classes = {row.name: row.qos for row in await TaskTable()}
        assert classes["other"] is QosClass.INTERACTIVE
        assert classes["pusher"] is QosClass.NORMAL
        for each in (spawned, other):
            await Send(each.slot, b"end")
            await ended_well(each)
        return spawned.pid, other.pid

    run = rig.observe(root, programs={"pusher": child, "waits": waits})

    me, other = run.result
    denied = [
        ("invalid_qos_class", NO_PID, ""),
        ("invalid_qos_class", NO_PID, ""),
        ("invalid_qos_class", NO_PID, ""),
        ("invalid_target_pid", NO_PID, ""),
        ("unauthorized_other_pid", other, " from=interactive to=perfburst"),
        ("unauthorized_other_pid", other, " from=interactive to=idle"),
        ("unauthorized_escalation", me, " from=normal to=perfburst"),
    ]
    assert _audit(run) == [
        _line("deny", reason, "pusher", (me, target), change) for reason, target, change in denied
    ]


def test_init_execd_and_policyd_set_the_class_of_others(rig: Rig) -> None:
    async def child(boot: BootImage) -> None:
        other = Pid(int((await take(boot.endpoint)).data))
        await SetTaskQos(other, QosClass.PERF_BURST)
        await SetTaskQos(None, QosClass.INTERACTIVE)
        assert await TaskQos() is QosClass.INTERACTIVE

    async def waits(boot: BootImage) -> None:
        await take(boot.endpoint)

    async def root(boot: BootImage) -> list[tuple[str, Pid, Pid]]:
        other = await start(boot, "other", program="waits")
        asked = []
        for name in ("execd", "policyd"):
            spawned = await start(boot, name, program="child")
            await Send(spawned.slot, b"%d" % other.pid)
            await ended_well(spawned)
            asked.append((name, spawned.pid, other.pid))
            assert await _class_of(other) is QosClass.PERF_BURST
            await SetTaskQos(other.pid, QosClass.NORMAL)
            assert await _class_of(other) is QosClass.NORMAL
            asked.append((INIT_NAME, boot.pid, other.pid))
        await Send(other.slot, b"end")
        await ended_well(other)
        return asked

    run = rig.observe(root, programs={"child": child, "waits": waits})

    lines = []
    for name, caller, target in run.result:
        if name == INIT_NAME:
            change = " from=perfburst to=normal"
            lines.append(_line("allow", "applied", name, (caller, target), change))
        else:
            change = " from=normal to=perfburst"
            lines.append(_line("allow", "applied", name, (caller, target), change))
            change = " from=normal to=interactive"
            lines.append(_line("allow", "applied", name, (caller, caller), change))
    assert _audit(run) == lines


async def _class_of(task: Spawned) -> QosClass:
    rows = {row.pid: row for row in await TaskTable()}
    return rows[task.pid].qos


def test_a_dead_task_is_no_target(rig: Rig) -> None:
    async def child(boot: BootImage) -> None:
        pass

    async def root(boot: BootImage) -> None:
        spawned = await start(boot, "brief")
        await ended_well(spawned)
        await refused(SetTaskQos(spawned.pid, QosClass.IDLE), Status.INVALID_ARGUMENT)

    rig.run(root, programs={"brief": child})


def test_the_audit_log_is_taken_once_in_order_and_counts_what_it_dropped(rig: Rig) -> None:
    async def root(boot: BootImage) -> None:
        assert await AuditLog() == ((), 0)
        await refused(SetTaskQos(NO_PID, 200), Status.INVALID_ARGUMENT)
        await SetTaskQos(None, await TaskQos())
        lines, dropped = await AuditLog()
        assert dropped == 0
        pids = (boot.pid, NO_PID)
        assert lines[0] == _line("deny", "invalid_qos_class", INIT_NAME, pids)
        assert "reason=applied" in lines[1]
        assert len(lines) == 2
        assert await AuditLog() == ((), 0)
        for number in range(AUDIT_LINES_MAX + 5):
            await refused(SetTaskQos(Pid(NO_PID + number), 200), Status.INVALID_ARGUMENT)
        lines, dropped = await AuditLog()
        assert (len(lines), dropped) == (AUDIT_LINES_MAX, 5)
        assert f"target_pid={NO_PID + AUDIT_LINES_MAX + 4}" in lines[-1]
        assert f"target_pid={NO_PID + 5}" in lines[0]

    rig.run(root)
