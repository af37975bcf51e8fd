"""What only processes can get wrong: what is left behind, crashes, numbers, time, floods."""

import ctypes
import os
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nexus.abi import (
    NEVER,
    NO_WAIT,
    AbiError,
    BootImage,
    ConsoleWrite,
    EndpointCreate,
    Event,
    EventKind,
    Kill,
    LinkCreate,
    LinkTerms,
    Nanos,
    Now,
    PeerGone,
    Pid,
    QosClass,
    Recv,
    ReplyRecv,
    Send,
    SetTaskQos,
    SleepUntil,
    SpawnLastError,
    SpawnReason,
    Status,
    TaskQos,
    TaskStats,
    Wait,
)
from nexus.kernel.core import EXIT_CRASH, RunOver
from nexus.kernel.linux import LinuxKernel, State, hardening_report
from nexus.kernel.linux import channel as channel_module
from nexus.kernel.linux import driver as driver_module
from nexus.kernel.linux import kernel as kernel_module
from nexus.kernel.linux.channel import CONSOLE, CONSOLE_HEAD
from nexus.kernel.linux.driver import Driver
from nexus.kernel.linux.kernel import FORKS_MAX, NICE
from nexus.kernel.linux.report import STEPS
from tests.linux.linux_run import RUN_TIME, SECOND, holdings, make, program, run, start

pytestmark = pytest.mark.linux

IS_ROOT = os.geteuid() == 0
MILLISECOND = SECOND // 1000
TIMES = struct.Struct("<qq")  # ns; of the two words of a sender
PATIENCE = 20 * SECOND  # for what takes a moment on a free machine
ROUNDS_MAX = 20  # of waits, one of which must end in time on a busy machine


async def waits(boot: BootImage) -> int:
    try:
        await Recv((boot.endpoint,), NEVER)
    except PeerGone:
        return 1
    return 0


async def soon() -> Nanos:
    return Nanos(await Now() + PATIENCE)


async def until(holds: Callable[[], bool], what: str) -> None:
    """Let the tasks go on until it holds."""
    give_up = await soon()
    while not holds():
        assert await SleepUntil(Nanos(await Now() + MILLISECOND)) < give_up, what


# ---- what a run leaves behind


async def _leaves_children(boot: BootImage) -> int:
    for name in ("one", "two"):
        await start(boot, name, program="waits")
    return 7


async def _raises(boot: BootImage) -> int:
    await start(boot, "one", program="waits")
    raise LookupError("a fault of the root task")


async def _sleeps(boot: BootImage) -> int:
    await start(boot, "one", program="waits")
    await SleepUntil(NEVER)
    return 0


def test_a_run_ends_with_every_child_reaped_and_every_descriptor_closed() -> None:
    before = holdings()

    ended = run(_leaves_children, {"waits": waits})

    assert ended.exit.code == 7
    assert holdings() == before
    signals = [fields["signal"] for fields in ended.of(EventKind.EXIT)]
    assert sorted(map(str, signals)) == ["0", "9", "9"]


def test_a_fault_of_the_root_task_comes_out_and_leaves_nothing_behind() -> None:
    before = holdings()

    with pytest.raises(LookupError, match="a fault of the root task"):
        run(_raises, {"waits": waits})

    assert holdings() == before


def test_a_run_over_its_time_comes_out_and_leaves_nothing_behind() -> None:
    before = holdings()
    events: list[Event] = []
    kernel = make(events, {"waits": waits})
    started = time.monotonic_ns()

    with pytest.raises(RunOver):
        kernel.run(program("root", _sleeps), b"", until=Nanos(kernel.now + SECOND // 5))

    assert SECOND // 5 <= time.monotonic_ns() - started < PATIENCE
    assert holdings() == before


def test_the_self_tests_pass_and_what_they_cause_is_not_evidence_about_the_system() -> None:
    async def root(boot: BootImage) -> int:
        return boot.generation

    ended = run(root, selftest=True)

    assert [fields["line"] for fields in ended.of(EventKind.KERNEL)] == [
        "KSELFTEST: spawn reasons ok",
        "KSELFTEST: resource sentinel ok",
        "KSELFTEST: heap budget report ok",
    ]
    assert [fields["name"] for fields in ended.of(EventKind.SPAWN)] == ["init-lite"]
    assert ended.exit.code == 1


# ---- a message that came before the deadline


async def _sends_at(boot: BootImage) -> int:
    """Sends a first and a second word, at the two times that it is sent."""
    assert boot.control is not None
    while True:
        try:
            message = await Recv((boot.endpoint,), NEVER)
        except PeerGone:
            return 0
        for time_, word in zip(TIMES.unpack(message.data[1:]), (b"first", b"second"), strict=True):
            _ = await SleepUntil(Nanos(time_))
            await Send(boot.control, word)


@pytest.mark.parametrize("sources", ["two endpoints", "one endpoint", "one link"])
@pytest.mark.parametrize("nth", [1, 2, 3])
def test_a_message_wins_over_its_deadline_wherever_the_look_for_it_is_held_up(
    sources: str, nth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The timer of an earlier receive fires; from one look at the clock to the next the second
    message comes, and the deadline after it passes."""
    window = (0, 0)  # in it the nth look at the clock takes until its end
    looks = 0

    def clock() -> int:
        nonlocal looks
        now = time.monotonic_ns()
        if window[0] <= now < window[1]:
            looks += 1
            while looks == nth and now < window[1]:
                now = time.monotonic_ns()
        return now

    async def root(boot: BootImage) -> int:
        nonlocal window
        inbox = await EndpointCreate()
        spawned = await start(boot, "sender")
        early = await Now() + SECOND // 5
        late = early + SECOND // 2
        await Send(spawned.slot, b"!" + TIMES.pack(early - SECOND // 10, early + SECOND // 10))
        receive = Recv(
            (boot.endpoint, inbox) if sources == "two endpoints" else (boot.endpoint,),
            Nanos(early),
            link=spawned.link if sources == "one link" else None,
        )
        assert (await receive).data == b"first"
        window = (early, late)
        receive.deadline = Nanos(late)
        assert (await receive).data == b"second"
        return 7

    monkeypatch.setattr(driver_module, "monotonic_ns", clock)

    assert run(root, {"sender": _sends_at}).exit.code == 7


# ---- crashes


def test_a_crash_under_the_filter_leaves_its_traceback() -> None:
    async def crashes(boot: BootImage) -> int:
        await ConsoleWrite("about to fail")
        exits: dict[str, int] = {}
        return exits[boot.name]

    async def root(boot: BootImage) -> int:
        child = await start(boot, "crashes")
        return (await Wait(child.pid, await soon())).code

    ended = run(root, {"crashes": crashes})

    assert ended.exit.code == EXIT_CRASH
    text = str(ended.of(EventKind.EXIT, "crashes")[0]["crash"])
    assert text.startswith("Traceback (most recent call last):")
    assert text.endswith("KeyError: 'crashes'\n")
    assert "in crashes" in text


def test_a_task_that_exits_from_below_python_is_told_by_its_signal() -> None:
    async def dies(_boot: BootImage) -> int:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGSEGV})
        ctypes.string_at(0)
        return 0

    async def root(boot: BootImage) -> int:
        child = await start(boot, "dies")
        return (await Wait(child.pid, await soon())).signal

    assert run(root, {"dies": dies}).exit.code == signal.SIGSEGV


# ---- burned numbers


def test_a_burned_number_is_discarded_and_forked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    offered: list[int] = []

    def only_the_fourth(_kernel: LinuxKernel, pid: int) -> bool:
        offered.append(pid)
        return len(offered) == 4

    async def child(_boot: BootImage) -> int:
        await ConsoleWrite("ran")
        return 0

    async def root(boot: BootImage) -> int:
        spawned = await start(boot, "child")
        assert spawned.pid == offered[3]
        return (await Wait(spawned.pid, await soon())).code

    monkeypatch.setattr(LinuxKernel, "_may_reuse", only_the_fourth)
    before = holdings()

    ended = run(root, {"child": child})

    assert ended.exit.code == 0
    assert ended.kernel.forks_discarded == 3
    assert ended.lines() == ["ran"], "a discarded child runs nothing of the program"
    assert holdings() == before


def test_a_spawn_that_is_offered_burned_numbers_only_fails_as_oom(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def root(boot: BootImage) -> int:
        with pytest.raises(AbiError) as refusal:
            await start(boot, "waits")
        assert refusal.value.status is Status.NO_SPACE
        assert await SpawnLastError() is SpawnReason.OOM
        return 0

    monkeypatch.setattr(LinuxKernel, "_may_reuse", lambda _kernel, _pid: False)
    before = holdings()

    ended = run(root, {"waits": waits})

    assert ended.kernel.forks_discarded == FORKS_MAX
    assert ended.kernel.shares.tasks.used == ended.kernel.shares.size.used == 0
    assert holdings() == before


@pytest.mark.parametrize("fault", ["pidfd_open", "prepared", "register"])
def test_a_spawn_that_fails_after_the_fork_leaves_no_child(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(24, "Too many open files")

    left: list[tuple[int, int]] = []

    async def root(boot: BootImage) -> int:
        before = holdings()
        with monkeypatch.context() as broken:
            if fault == "pidfd_open":
                broken.setattr(os, "pidfd_open", refuse)
            elif fault == "prepared":
                broken.setattr(LinuxKernel, "_prepared", refuse)
            else:
                broken.setattr(LinuxKernel, "_may_reuse", refuse)
            with pytest.raises(AbiError):
                await start(boot, "waits")
        left.extend((before, holdings()))
        assert await SpawnLastError() is SpawnReason.OOM
        spawned = await start(boot, "waits")
        await Kill(spawned.pid)
        await Wait(spawned.pid, await soon())
        return 0

    assert run(root, {"waits": waits}).exit.code == 0
    assert left[0] == left[1]


def test_a_task_that_keeps_a_number_is_ended_when_numbers_run_short(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernel_module, "CONFIRM_MAX", SECOND // 10)
    monkeypatch.setattr(kernel_module, "BURNED_MAX", 2)

    async def deaf(_boot: BootImage) -> int:
        while True:
            select.poll().poll()  # it neither receives nor serves its channel

    async def brief(_boot: BootImage) -> int:
        return 0

    async def root(boot: BootImage) -> int:
        keeper = await start(boot, "deaf")
        honest = await start(boot, "waits")
        for index in range(4):
            spawned = await start(boot, f"brief{index}", program="brief")
            await Wait(spawned.pid, await soon())
            await until(lambda: not keeps(honest.pid), "it does not confirm")
            await SleepUntil(Nanos(await Now() + SECOND // 8))
        assert (await Wait(keeper.pid, await soon())).signal == signal.SIGKILL
        with pytest.raises(AbiError) as refusal:
            await Wait(honest.pid, NO_WAIT)
        assert refusal.value.status is Status.QUEUE_EMPTY, "it confirms, so it goes on"
        return 0

    def keeps(pid: int) -> bool:
        return any(pid in waiting for waiting in kernel.burned.values())

    events: list[Event] = []
    kernel = make(events, {"deaf": deaf, "waits": waits, "brief": brief})
    ended = kernel.run(program("root", root), b"", until=Nanos(kernel.now + RUN_TIME))

    assert ended.code == 0
    lines = [str(each.fields["line"]) for each in events if each.kind is EventKind.KERNEL]
    assert any("KCONFIRM: deaf" in line for line in lines)


def test_a_task_kept_waiting_by_init_gives_up_and_an_answer_too_late_is_nobodys(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(channel_module, "QOS_PATIENCE", SECOND // 20)
    mine, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    port = channel_module.TaskPort(mine)

    with pytest.raises(AbiError) as refusal:
        port.set_qos(Pid(1), 1)

    assert refusal.value.status is Status.TIMED_OUT
    its.send(bytes((channel_module.QOS_ANSWER, int(Status.PERMISSION_DENIED))))
    its.send(bytes((channel_module.QOS_ANSWER, 0)))
    port.set_qos(Pid(1), 1)
    its.close()
    with pytest.raises(channel_module.InitIsGone):
        port.set_qos(Pid(1), 1)
    mine.close()


def test_too_few_descriptors_for_init_are_told_as_degraded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernel_module, "DESCRIPTORS_WANTED", 1 << 40)

    async def root(boot: BootImage) -> int:
        await start(boot, "waits")
        return 0

    degraded = run(root, {"waits": waits}).of(EventKind.SPAWN, "waits")[0]["degraded"]

    assert isinstance(degraded, list)
    assert "descriptors" in degraded
    (row,) = (row for row in hardening_report() if row.name == "descriptors")
    assert row.state is State.DEGRADED


def test_a_number_stays_burned_until_what_its_holder_sent_has_been_read() -> None:
    burned: list[list[int]] = []

    async def child(boot: BootImage) -> int:
        assert boot.control is not None
        await Send(boot.control, b"last words")
        return 0

    async def bystander(boot: BootImage) -> int:
        # Holds the number as well: a client that only calls must hear of deaths too.
        return await waits(boot)

    async def root(boot: BootImage) -> int:
        other = await start(boot, "bystander")
        spawned = await start(boot, "child")
        await Wait(spawned.pid, await soon())
        await until(lambda: other.pid not in kernel.burned[spawned.pid], "it does not confirm")
        burned.append(list(kernel.burned))
        message = await Recv((boot.endpoint,), await soon())
        assert (message.data, message.sender.pid) == (b"last words", spawned.pid)
        await Now()
        burned.append(list(kernel.burned))
        await Send(other.slot, b"end")
        assert burned[0] == [spawned.pid]
        return (await Wait(other.pid, await soon())).code

    events: list[Event] = []
    kernel = make(events, {"child": child, "bystander": bystander})
    ended = kernel.run(program("root", root), b"", until=Nanos(kernel.now + RUN_TIME))

    assert ended.code == 0
    assert burned[1] == []


# ---- deadlines


@pytest.mark.parametrize("what", ["endpoint", "link", "sleep", "two endpoints"])
def test_a_wait_ends_by_itself_never_early_and_hardly_late(what: str) -> None:
    spans = (0.3, 1.5, 5.0, 50.0, 250.0)  # milliseconds
    late_max = 1.0  # milliseconds, of the best of several waits: the machine has other work too

    async def child(boot: BootImage) -> int:
        other = await EndpointCreate()
        link = await LinkCreate(boot.endpoint)
        best = dict.fromkeys(spans, 1_000_000.0)
        for span in spans * ROUNDS_MAX:
            if best[span] < late_max:
                continue
            deadline = Nanos(await Now() + int(span * 1_000_000))
            try:
                if what == "sleep":
                    await SleepUntil(deadline)
                elif what == "link":
                    await Recv((boot.endpoint,), deadline, link=link.link)
                elif what == "two endpoints":
                    await Recv((boot.endpoint, other), deadline)
                else:
                    await Recv((boot.endpoint,), deadline)
            except AbiError as refusal:
                assert refusal.status is Status.TIMED_OUT
            late = await Now() - deadline
            assert late >= 0
            best[span] = min(best[span], late / 1_000_000)
        await ConsoleWrite(",".join(f"{best[span]:.3f}" for span in spans))
        return 0

    async def root(boot: BootImage) -> int:
        spawned = await start(boot, "child")
        return (await Wait(spawned.pid, await soon())).code

    ended = run(root, {"child": child})

    late = [float(value) for value in ended.lines()[0].split(",")]
    assert max(late) < late_max, f"late by {late} ms"


# ---- traces


def test_traps_are_recorded_per_task_in_order() -> None:
    async def child(boot: BootImage) -> int:
        assert boot.control is not None
        with pytest.raises(AbiError):
            await Recv((boot.endpoint,), NO_WAIT)
        for index in range(3):
            await Send(boot.control, b"x" * (index + 1))
        await Recv((boot.endpoint,), NEVER)
        return 0

    async def root(boot: BootImage) -> int:
        spawned = await start(boot, "child")
        for _ in range(3):
            await Recv((boot.endpoint,), await soon())
        await Send(spawned.slot, b"end")
        return (await Wait(spawned.pid, NEVER)).code

    ended = run(root, {"child": child}, trace=True)

    records = [
        (fields["trap"], fields["status"], fields["size"])
        for fields in ended.of(EventKind.TRAP, "child")
    ]
    assert records == [
        ("Recv", "QUEUE_EMPTY", 0),
        ("Send", "OK", 1),
        ("Send", "OK", 2),
        ("Send", "OK", 3),
        ("Recv", "OK", 3),
    ]
    assert ended.of(EventKind.TRAP, "init-lite")[0]["trap"] == "Spawn"


# ---- the kernel channel


def _channel() -> int:
    """The descriptor of a task's own kernel channel, as a hostile task finds it."""
    frame = sys._getframe()
    while frame.f_back is not None:
        port = frame.f_locals.get("port")
        if port is not None and hasattr(port, "fileno"):
            return int(port.fileno)
        frame = frame.f_back
    raise AssertionError("no port on the stack")


def test_a_flood_of_the_kernel_channel_does_not_hold_init_up() -> None:
    """A hostile task writes to its channel as fast as it can; init's own waits stay on time."""

    async def flood(_boot: BootImage) -> int:
        channel = socket.socket(fileno=_channel())
        line = CONSOLE_HEAD.pack(CONSOLE, 1) + b"x"
        junk = (b"", b"\xff", b"\x02", b"\x05" + bytes(7), bytes(9000), b"\x07\x00[")
        end = time.monotonic_ns() + SECOND
        index = 0
        while time.monotonic_ns() < end:
            index += 1
            try:
                channel.send(line if index % 2 else junk[index // 2 % len(junk)], 0x40)
            except BlockingIOError:
                continue
        channel.detach()
        return 0

    late: list[int] = []

    async def root(boot: BootImage) -> int:
        spawned = await start(boot, "flood")
        for _ in range(80):
            deadline = Nanos(await Now() + SECOND // 100)
            late.append(await SleepUntil(deadline) - deadline)
        await Kill(spawned.pid)
        await Wait(spawned.pid, await soon())
        return 0

    ended = run(root, {"flood": flood})

    assert ended.kernel.refused_frames > 100
    assert 100 < len(ended.lines()) < 20_000
    assert sorted(late)[len(late) // 2] < SECOND // 100
    assert max(late) < SECOND, "the flood lasts as long"


def test_a_console_line_is_stamped_by_the_channel_it_came_over() -> None:
    async def forges(boot: BootImage) -> int:
        channel = socket.socket(fileno=_channel())
        credentials = struct.pack("3i", os.getppid(), 0, 0)
        frame = CONSOLE_HEAD.pack(CONSOLE, 1) + b"f"
        ancillary = [(socket.SOL_SOCKET, socket.SCM_CREDENTIALS, credentials)]
        with pytest.raises(PermissionError):
            channel.sendmsg([frame], ancillary)
        channel.detach()
        await ConsoleWrite(f"I am {boot.name}")
        return 0

    async def root(boot: BootImage) -> int:
        spawned = await start(boot, "forges")
        return (await Wait(spawned.pid, await soon())).code

    ended = run(root, {"forges": forges})

    (line,) = ended.of(EventKind.CONSOLE)
    assert (line["name"], line["line"]) == ("forges", "I am forges")


# ---- links


def test_a_moved_link_keeps_its_delegations_and_those_in_use() -> None:
    async def holder(boot: BootImage) -> int:
        given = (await Recv((boot.endpoint,), NEVER)).cap
        assert given is not None
        terms = LinkTerms(1, 100, 0)
        await LinkCreate(given, terms)
        with pytest.raises(AbiError) as refusal:
            await LinkCreate(given, terms)
        assert refusal.value.status is Status.NO_SPACE
        return 0

    async def owner(boot: BootImage) -> int:
        return await waits(boot)

    async def root(boot: BootImage) -> int:
        server = await start(boot, "owner", delegations=1)
        link = await LinkCreate(server.slot, LinkTerms(4, 400, 2))
        await LinkCreate(link.slot, LinkTerms(1, 100, 0))
        client = await start(boot, "holder")
        await Send(client.slot, b"yours", move=link.slot)
        return (await Wait(client.pid, await soon())).code

    assert run(root, {"owner": owner, "holder": holder}).exit.code == 0


def test_a_derived_link_whose_move_failed_is_never_heard_of_by_its_owner(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    passed = Driver._pass
    failures = [AbiError(Status.NO_SUCH_ENDPOINT, "the target closed between look and send")]

    def fail_once(driver: Driver, *arguments: object) -> None:
        if failures:
            raise failures.pop()
        passed(driver, *arguments)  # type: ignore[arg-type]

    async def owner(boot: BootImage) -> int:
        for expected in (b"before", b"after", b"last"):
            assert (await Recv((boot.endpoint,), NEVER)).data == expected
        with pytest.raises(AbiError) as refusal:
            await Recv((boot.endpoint,), Nanos(await Now() + SECOND // 10))
        assert refusal.value.status is Status.TIMED_OUT, "no PeerGone of a link nobody had"
        assert (await TaskStats()).links == 2, "the spawner's, and the one that was used"
        return 0

    async def root(boot: BootImage) -> int:
        server = await start(boot, "owner", delegations=1)
        link = await LinkCreate(server.slot, LinkTerms(4, 400, 1))
        await Send(link.slot, b"before")
        into = await LinkCreate(await EndpointCreate())
        for attempt in range(2):
            if attempt:
                failures.append(AbiError(Status.NO_SUCH_ENDPOINT, "once more"))
            status = Status.NO_SPACE
            give_up = await soon()
            while status is Status.NO_SPACE:  # until the owner has given the delegation back
                assert await SleepUntil(Nanos(await Now() + MILLISECOND)) < give_up
                with pytest.raises(AbiError) as refusal:
                    await Send(into.slot, b"take it", move=link.slot)
                status = refusal.value.status
            assert status is Status.NO_SUCH_ENDPOINT
            await Send(link.slot, (b"after", b"last")[attempt])
        return (await Wait(server.pid, await soon())).code

    monkeypatch.setattr(Driver, "_pass", fail_once)

    assert run(root, {"owner": owner}).exit.code == 0


# ---- placement and classes


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one processor only")
def test_placement_picks_within_the_declared_set_and_is_undone_after_the_run() -> None:
    async def child(_boot: BootImage) -> int:
        await Recv((1,), NEVER)  # type: ignore[arg-type]
        return 0

    own = tuple(sorted(os.sched_getaffinity(0)))
    seen: dict[str, set[int]] = {}

    async def root(boot: BootImage) -> int:
        seen["root"] = os.sched_getaffinity(0)
        for name, cpu in (("first", 0), ("second", 1), ("free", None)):
            spawned = await start(
                boot, name, program="child", cpu=cpu, owner_size=4096, endpoints=1
            )
            seen[name] = os.sched_getaffinity(spawned.pid)
        with pytest.raises(AbiError):
            await start(boot, "third", program="child", cpu=2, owner_size=4096, endpoints=1)
        return 0

    run(root, {"child": child}, cpus=own[:2])

    assert seen["root"] == seen["free"] == set(own[:2])
    assert (seen["first"], seen["second"]) == ({own[0]}, {own[1]})
    assert tuple(sorted(os.sched_getaffinity(0))) == own


@pytest.mark.skipif(not IS_ROOT, reason="an ordinary user cannot raise a priority again")
def test_a_class_is_what_linux_schedules_by() -> None:
    nice: list[int] = []

    async def root(boot: BootImage) -> int:
        spawned = await start(boot, "waits")
        for qos in (QosClass.IDLE, QosClass.PERF_BURST, QosClass.INTERACTIVE, QosClass.NORMAL):
            await SetTaskQos(spawned.pid, qos)
            nice.append(os.getpriority(os.PRIO_PROCESS, spawned.pid))
        assert await TaskQos() is QosClass.NORMAL
        return 0

    run(root, {"waits": waits})

    assert nice == [
        NICE[QosClass.IDLE],
        NICE[QosClass.PERF_BURST],
        NICE[QosClass.INTERACTIVE],
        NICE[QosClass.NORMAL],
    ]


# ---- the confinement, as told


def test_what_a_spawn_reports_as_degraded_is_what_the_report_says() -> None:
    async def root(boot: BootImage) -> int:
        await start(boot, "waits")
        return 0

    told = hardening_report()
    ended = run(root, {"waits": waits})

    steps = {name for name, _, _ in STEPS} | {"descriptors"}
    names = {row.name for row in told if row.state is not State.HELD and row.name in steps}
    degraded = ended.of(EventKind.SPAWN, "waits")[0]["degraded"]
    assert isinstance(degraded, list)
    assert set(degraded) == names
    assert all(row.why for row in told if row.state is not State.HELD)
    if IS_ROOT and Path("/proc/sys/kernel/seccomp").exists():
        assert not degraded


def test_a_reply_to_a_task_that_died_in_between_is_refused_and_the_server_goes_on() -> None:
    async def server(boot: BootImage) -> int:
        trap = ReplyRecv((boot.endpoint,), NEVER)
        message = await trap
        assert message.cap is not None
        assert boot.control is not None
        await Send(boot.control, b"called")
        heard = 0
        while heard < 2:  # the death of the client, and root's word about it
            try:
                await Recv((boot.endpoint,), NEVER)
            except PeerGone as gone:
                assert gone.link == message.link
            heard += 1
        trap.slot, trap.data = message.cap, b"too late"
        end = await trap
        assert end.data == b"end"
        return 0 if trap.reply_status == Status.NO_SUCH_ENDPOINT else 3

    async def client(boot: BootImage) -> int:
        given = (await Recv((boot.endpoint,), NEVER)).cap
        assert given is not None
        inbox = await LinkCreate(boot.endpoint)
        await Send(given, b"answer here", move=inbox.slot)
        await SleepUntil(NEVER)
        return 0

    async def root(boot: BootImage) -> int:
        serving = await start(boot, "server", delegations=1)
        calling = await start(boot, "client")
        link = await LinkCreate(serving.slot)
        await Send(calling.slot, b"yours", move=link.slot)
        assert (await Recv((boot.endpoint,), await soon())).data == b"called"
        await Kill(calling.pid)
        await Wait(calling.pid, await soon())
        await Send(serving.slot, b"it is dead")
        await Send(serving.slot, b"end", deadline=await soon())
        return (await Wait(serving.pid, await soon())).code

    assert run(root, {"server": server, "client": client}).exit.code == 0
