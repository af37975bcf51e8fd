"""Services in an interpreter of their own: how they start, what they get, how a start fails."""

import dataclasses
import errno
import json
import os
import signal
import socket
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest

from nexus.abi import (
    LINK_DEPTH_DEFAULT,
    NO_WAIT,
    AbiError,
    BootImage,
    CapClose,
    DeviceGrant,
    EventKind,
    ExitInfo,
    Grants,
    Isolation,
    Kill,
    LinkCreate,
    LinkTerms,
    ListenGrant,
    Nanos,
    Now,
    PolicyRaise,
    PolicyRead,
    Program,
    Programs,
    QosClass,
    Recorder,
    Recv,
    Send,
    SetTaskQos,
    SleepUntil,
    SpawnLastError,
    SpawnReason,
    Status,
    TaskTable,
    VmoWatch,
)
from nexus.kernel.core import CannotRun, SystemLimits
from nexus.kernel.linux import LinuxKernel, kernel, landlock
from nexus.kernel.linux.child import EXIT_UNPREPARED
from nexus.kernel.linux.harden import UID_FIRST
from nexus.kernel.linux.identity import ROWS, IdentityTable
from nexus.kernel.linux.stage2 import load_entry
from nexus.testing.conformance.steps import ended, ended_well, gone, refused, start, take
from nexus.testing.outside import free_tcp_port
from nexus.testing.rig import Kernel, Rig, Run, TaskFailed, linux_rig, program
from tests.linux import exec_programs
from tests.linux.ground import Ground, mine

__all__ = ["mine"]

pytestmark = pytest.mark.linux

EXEC: Final = Grants(isolation=Isolation.EXEC)
STREAMS: Final = EXEC._replace(streams=True)
PLACE: Final = "tests.linux.exec_programs"
MS: Final = 1_000_000  # nanoseconds
SECOND: Final = 1_000_000_000
ANSWER_MAX: Final = 1 * SECOND  # of init, while an import takes five


async def double(boot: BootImage) -> None:
    """What the simulated kernel would run; here nothing does."""
    raise AssertionError(f"{boot.name} was forked")


def entry(name: str, words: str = "", *, ordinary: bool = False) -> Program:
    text = f"{PLACE}:{name} {words}".strip()
    return dataclasses.replace(program(name, double), entry=text, ordinary=ordinary)


PROGRAMS: Final = (
    entry("who"),
    entry("made", "one two"),
    entry("raises", "-"),
    entry("hangs", "-"),
    entry("dies", "-"),
    entry("babbles", "-"),
    dataclasses.replace(entry("is_infinite"), entry=f'{PLACE}:breaks [1e999,0,[],""]'),
    dataclasses.replace(entry("is_another_frame"), entry=f"{PLACE}:speaks -"),
    dataclasses.replace(entry("draws"), entry=f'{PLACE}:breaks [0,0,[],"a\\u001b[2J\\nb\\udcff"]'),
    dataclasses.replace(entry("sleeps_1"), entry=f"{PLACE}:sleeps 1"),
    dataclasses.replace(entry("sleeps_5"), entry=f"{PLACE}:sleeps 5"),
    entry("pretends", "-"),
    entry("threads"),
    entry("shares"),
    entry("shares_beside", ordinary=True),
    entry("reads_device"),
    entry("many_at_once", ordinary=True),
    entry("closes_under_a_wait", ordinary=True),
    entry("stops", ordinary=True),
    entry("waits_for_room", ordinary=True),
    entry("serves_tcp", ordinary=True),
    entry("connects_tcp", ordinary=True),
    dataclasses.replace(program("absent", double), entry="tests.linux.no_such_module:main"),
    program("forked", double),
)


def exec_rig(*more: Program) -> Rig:
    """The Linux kernel, with the programs of `exec_programs`, and more."""
    rig = linux_rig()

    def make(programs: Programs, *, recorder: Recorder, limits: SystemLimits) -> Kernel:
        table = {**programs, **{one.name: one for one in (*PROGRAMS, *more)}}
        return rig.make_kernel(table, recorder=recorder, limits=limits)

    return dataclasses.replace(rig, make_kernel=make)


def exec_rig_here() -> Rig:
    """The same in the calling process."""
    return dataclasses.replace(exec_rig(), forked=False)


async def told(boot: BootImage, name: str, **values: Any) -> Any:
    """Start a program that tells one thing and ends."""
    values.setdefault("grants", EXEC)
    spawned = await start(boot, values.pop("called", name), program=name, **values)
    message = await take(boot.endpoint, link=spawned.link)
    assert message.sender.service == spawned.service
    await ended_well(spawned)
    return json.loads(message.data)


# ---- what it is


def test_two_interpreters_share_neither_layout_nor_hash_seed_nor_anything_of_init() -> None:
    async def root(boot: BootImage) -> Any:
        return [await told(boot, "who", called=name, argument=b"words") for name in ("a", "b")]

    one, other = exec_rig().run(root)

    assert len({one["hash"], other["hash"], hash("nexus")}) == 3
    assert len({one["layout"], other["layout"], id(None)}) == 3
    for found in (one, other):
        assert found["argument"] == "words"
        assert found["environ"] == {}
        assert found["argv"] == ["-c"]
        assert found["init_here"] == []


def test_nothing_of_the_first_stage_is_left() -> None:
    """No capability, though reading may have needed one; three filters; not dumpable."""

    async def root(boot: BootImage) -> Any:
        spawned = await start(boot, "stops", grants=STREAMS)
        _ = await take(boot.endpoint, link=spawned.link)
        lines = Path(f"/proc/{spawned.pid}/status").read_text().splitlines()
        status = {name: value.split() for name, _, value in (line.partition(":") for line in lines)}
        owner = Path(f"/proc/{spawned.pid}/stat").stat().st_uid
        await Send(spawned.slot, b"now")
        await ended(spawned)
        return status, owner

    status, owner = exec_rig().run(root)

    for kind in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
        assert int(status[kind][0], 16) == 0, kind
    assert status["NoNewPrivs"] == ["1"]
    mine = Path("/proc/self/status").read_text()
    before = int(mine.partition("Seccomp_filters:")[2].split()[0])
    assert int(status["Seccomp_filters"][0]) == before + 3
    if os.getuid() == 0:
        assert owner == 0, "Linux gives the files of a process that is not dumpable to root"
        assert status["Uid"][0] != "0"


def test_a_program_cannot_stand_in_for_a_module_of_ours() -> None:
    """Its path is searched first, but not before the second filter stands."""

    async def root(boot: BootImage) -> Any:
        return await told(boot, "mine")

    with tempfile.TemporaryDirectory() as directory:  # not pytest's own: others may not enter it
        place = Path(directory)
        place.chmod(0o755)
        (place / "nexus").mkdir()
        (place / "nexus" / "__init__.py").write_text("raise SystemExit('stood in')")
        (place / "mine.py").write_text(
            "async def main(boot):\n    from nexus.abi import Send\n"
            "    await Send(boot.control, b'\"mine\"')\n"
        )
        mine = dataclasses.replace(program("mine", double), entry="mine:main", path=(directory,))
        assert exec_rig(mine).run(root) == "mine"


def test_a_maker_is_called_with_the_other_words_of_the_entry() -> None:
    async def root(boot: BootImage) -> Any:
        return await told(boot, "made")

    assert exec_rig().run(root) == ["one", "two"]


def test_an_entry_that_is_no_function_is_refused() -> None:
    with pytest.raises(TypeError, match="is no function"):
        load_entry("tests.linux.test_exec:PLACE")


# ---- how it fails


class Failed(NamedTuple):
    """How a start failed twice: the last exit or refusal, what init held before and after."""

    exit: ExitInfo | None
    text: str
    before: list[Any]
    after: list[Any]
    run: Run


def refused_start(name: str, grants: Grants = EXEC) -> Failed:
    """Start what init refuses to start, twice, and then something that can be started."""

    async def root(boot: BootImage) -> Any:
        await told(boot, "who")
        before = _holdings()
        refused_with = ""
        for _ in range(2):
            with pytest.raises(AbiError) as refusal:
                await start(boot, name, grants=grants)
            reason = await SpawnLastError()
            assert reason in (SpawnReason.MAP_FAILED, SpawnReason.INVALID_PAYLOAD)
            refused_with = str(refusal.value)
        after = _holdings()
        assert [row.name for row in await TaskTable()] == ["init-lite"]
        await told(boot, "who")
        return None, refused_with, before, after

    run = exec_rig().observe(root)
    exit_info, text, before, after = run.result
    return Failed(exit_info, text, before, after, run)


def failed_start(name: str, times: int = 2, prepare_time: int = kernel.EXEC_PREPARE_TIME) -> Failed:
    """Start what does not get to run, and then something that does: init hears of it as of any
    task's end, and the record says why. It alone is given so many nanoseconds to be prepared in."""

    async def root(boot: BootImage) -> Any:
        await told(boot, "who")
        before = _holdings()
        exit_info = None
        for _ in range(times):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(kernel, "EXEC_PREPARE_TIME", prepare_time)
                spawned = await start(boot, name, grants=EXEC)
                await gone(boot.endpoint, spawned.link, only=True)
            exit_info = await ended(spawned)
            _ = await refused(Send(spawned.slot, b"?"), Status.NO_SUCH_ENDPOINT)
            await CapClose(spawned.slot)
        assert await SpawnLastError() is SpawnReason.NONE, "the spawns were not refused"
        after = _holdings()
        assert [row.name for row in await TaskTable()] == ["init-lite"]
        await told(boot, "who")
        return exit_info, before, after

    run = exec_rig().observe(root)
    exit_info, before, after = run.result
    events = [each for each in run.events if each.fields.get("name") == name]
    assert [each.kind for each in events] == [EventKind.SPAWN_FAILED, EventKind.EXIT] * times
    assert len({each.pid for each in events}) <= times, "a number may come again"
    (text,) = {str(each.fields["detail"]) for each in events[::2]}
    assert {each.fields["reason"] for each in events[::2]} == {"map_failed"}
    assert {each.fields["crash"] for each in events[1::2]} == {text}
    return Failed(exit_info, text, before, after, run)


def _holdings() -> list[Any]:
    """Descriptors and children of the calling process, which is init's."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        children = True
    except ChildProcessError:
        children = False
    return [sorted(os.listdir("/proc/self/fd")), children]  # noqa: PTH208 (names, not paths)


@pytest.mark.parametrize(
    ("name", "detail", "code", "number"),
    [
        (
            "raises",
            "cannot import tests.linux.exec_programs:raises -: LookupError: no such pump",
            EXIT_UNPREPARED,
            0,
        ),
        (
            "absent",
            "ModuleNotFoundError: No module named 'tests.linux.no_such_module'",
            EXIT_UNPREPARED,
            0,
        ),
        ("dies", "the child ended before it was confined", 3, 0),
        ("babbles", "the child spoke before it was confined", 0, signal.SIGKILL),
        ("is_infinite", "the child spoke before it was confined", 0, signal.SIGKILL),
        ("is_another_frame", "the child spoke before it was confined", 0, signal.SIGKILL),
        (
            "draws",
            "a\N{REPLACEMENT CHARACTER}[2J\N{REPLACEMENT CHARACTER}b\N{REPLACEMENT CHARACTER}",
            0,
            signal.SIGKILL,
        ),
    ],
)
def test_a_failed_import_ends_the_instance_and_leaves_nothing(
    name: str, detail: str, code: int, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if number:  # it lives on until it is killed
        monkeypatch.setattr(kernel, "LEAVE_TIME", 100_000_000)
    failed = failed_start(name)

    assert detail in failed.text
    assert failed.exit is not None
    assert (failed.exit.code, failed.exit.signal) == (code, number)
    assert failed.after == failed.before


def test_the_detail_names_file_and_line_of_what_raised() -> None:
    assert "(exec_programs.py:" in failed_start("raises").text


def test_thirty_failed_imports_leave_nothing() -> None:
    failed = failed_start("raises", times=30)

    assert failed.after == failed.before


def test_what_a_failed_import_had_reserved_is_free_again(mine: Ground) -> None:
    async def root(boot: BootImage) -> Any:
        kernel = mine.kernel
        kernel.programs = {**kernel.programs, **{one.name: one for one in PROGRAMS}}
        before = kernel.resources()
        for name in ("raises", "dies", "hangs"):
            spawned = await start(boot, name, grants=EXEC, owner_size=65536, endpoints=3)
            assert kernel.resources()["reserved_tasks"] == before["reserved_tasks"] + 1
            if name == "hangs":
                await Kill(spawned.pid)
            await ended(spawned)
            await gone(boot.endpoint, spawned.link, only=True)
            await CapClose(spawned.slot)
        after = kernel.resources()
        return before, after, kernel._deadlines

    before, after, deadlines = mine.run(root)

    assert after == before
    assert deadlines == {}


def test_an_import_that_hangs_is_ended_in_time() -> None:
    failed = failed_start("hangs", prepare_time=1_000_000_000)

    assert failed.text == "the child did not confine itself in time (1 s)"
    assert failed.exit is not None
    assert failed.exit.signal == signal.SIGKILL
    assert failed.after == failed.before


def test_a_program_without_an_entry_is_refused() -> None:
    assert "forked names no entry to execute it by" in refused_start("forked").text


def test_an_ordinary_program_needs_streams() -> None:
    assert "needs isolation = exec and streams" in refused_start("stops").text


def test_what_a_process_says_of_its_ids_is_not_believed() -> None:
    """It leaves the second stage out and says it is root: init enters Linux's own stamp."""
    entered: list[tuple[int, int]] = []
    former = IdentityTable.set_ids

    def set_ids(self: IdentityTable, pid: int, uid: int, gid: int) -> None:
        entered.append((uid, UID_FIRST + pid % ROWS if os.getuid() == 0 else os.getuid()))
        former(self, pid, uid, gid)

    async def root(boot: BootImage) -> Any:
        spawned = await start(boot, "pretends", grants=EXEC)
        assert (await ended(spawned)).code == 0
        return entered

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(IdentityTable, "set_ids", set_ids)
        ((uid, expected),) = exec_rig().run(root)
    assert uid == expected


# ---- while it imports


def test_init_and_the_others_go_on_during_a_long_import() -> None:
    """Spawn returns at once; init answers, and its policy page reaches another service."""

    async def root(boot: BootImage) -> Any:
        asked = await start(boot, "asked")
        begun = await Now()
        slow = await start(boot, "sleeps_5", grants=EXEC)
        took = [await Now() - begun]
        generation = 0
        while await Now() < begun + 4 * SECOND:
            sent = await Now()
            word = await PolicyRaise(available=generation % 2 == 0)
            await Send(asked.slot, b"policy")
            seen = json.loads((await take(boot.endpoint, link=asked.link)).data)
            took.append(await Now() - sent)
            assert seen == list(word)
            generation = word.generation
            await SleepUntil(Nanos(await Now() + 20 * MS))
        await refused(Recv((boot.endpoint,), NO_WAIT, link=slow.link), Status.QUEUE_EMPTY)
        await Kill(asked.pid)
        await ended(asked)  # its number is told to the slow one, and confirmed when that runs
        await Send(slow.slot, b"after")
        message = await take(boot.endpoint, link=slow.link)
        assert message.data == b"after"
        assert message.sender.service == slow.service
        await Send(slow.slot, b"end")
        await ended_well(slow)
        return max(took), generation, await Now() - begun

    async def asked(boot: BootImage) -> None:
        while True:
            _ = await take(boot.endpoint)
            await exec_programs.tell(boot, list(await PolicyRead()))

    run = exec_rig().observe(root, programs={"asked": asked})
    took, generation, whole = run.result
    assert took < ANSWER_MAX
    assert generation > 10
    assert whole > 5 * SECOND, "or nothing was slow"
    kinds = [event.kind for event in run.events if event.fields.get("name") == "sleeps_5"]
    assert kinds == [EventKind.SPAWN, EventKind.EXIT]


def test_what_is_sent_before_it_runs_is_received_when_it_does() -> None:
    """With a link that moves along, as init's Bind; and one that init is answered on."""

    async def root(boot: BootImage) -> Any:
        spawned = await start(boot, "sleeps_1", grants=EXEC)
        inbox = await LinkCreate(boot.endpoint, LinkTerms())
        await Send(spawned.slot, b"first")
        await Send(spawned.slot, b"second", move=inbox.slot)
        await SetTaskQos(spawned.pid, QosClass.IDLE)
        first = await take(boot.endpoint, link=spawned.link)
        second = await take(boot.endpoint, link=inbox.link)
        assert first.sender.qos is QosClass.IDLE
        await Send(spawned.slot, b"end")
        await ended_well(spawned)
        return first.data, second.data

    assert exec_rig().run(root) == (b"first", b"second")


def test_what_was_sent_to_one_that_never_runs_is_let_go() -> None:
    """The link that moved along closes with it."""

    async def root(boot: BootImage) -> None:
        before = _holdings()
        spawned = await start(boot, "raises", grants=EXEC)
        inbox = await LinkCreate(boot.endpoint, LinkTerms())
        await Send(spawned.slot, b"bind", move=inbox.slot)
        assert {await gone(boot.endpoint, None) for _ in range(2)} == {spawned.link, inbox.link}
        await ended(spawned)
        await CapClose(spawned.slot)
        assert _holdings() == before

    exec_rig().run(root)


def test_one_that_is_killed_while_it_imports_leaves_nothing() -> None:
    async def root(boot: BootImage) -> None:
        before = _holdings()
        for pause in (0, 30, 300):
            spawned = await start(boot, "hangs", grants=EXEC)
            await SleepUntil(Nanos(await Now() + pause * MS))
            await Kill(spawned.pid)
            assert (await ended(spawned)).signal == signal.SIGKILL
            await gone(boot.endpoint, spawned.link, only=True)
            await CapClose(spawned.slot)
            assert _holdings() == before

    run = exec_rig().observe(root)

    assert run.fields(EventKind.SPAWN_FAILED) == [], "it was killed on purpose"
    exits = [fields for fields in run.fields(EventKind.EXIT) if fields["name"] == "hangs"]
    assert [fields["crash"] for fields in exits] == ["it had not imported hangs yet"] * 3


def test_an_end_of_the_run_ends_what_still_imports(mine: Ground) -> None:
    async def root(boot: BootImage) -> Any:
        kernel = mine.kernel
        kernel.programs = {**kernel.programs, **{one.name: one for one in PROGRAMS}}
        for number in range(3):
            _ = await start(boot, f"hangs{number}", program="hangs", grants=EXEC)
        return 0

    run = mine.observe(root)

    ends = {f["name"]: f["signal"] for f in run.fields(EventKind.EXIT)}
    assert [ends[f"hangs{number}"] for number in range(3)] == [signal.SIGKILL] * 3
    assert run.fields(EventKind.SPAWN_FAILED) == []


def test_it_ends_with_init_while_it_imports() -> None:
    """Init is killed, which nothing can prepare for: Linux ends its children."""
    reader, writer = os.pipe()

    async def root(boot: BootImage) -> None:
        spawned = await start(boot, "hangs", grants=EXEC)
        await SleepUntil(Nanos(await Now() + 200 * MS))
        _ = os.write(writer, str(spawned.pid).encode())
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(TaskFailed, match="wait status 0x9"):
        exec_rig().run(root)
    pid = int(os.read(reader, 20))
    os.close(reader)
    os.close(writer)
    until = time.monotonic() + 20  # noqa: TID251 (another process is waited for)
    while _runs(pid):
        assert time.monotonic() < until, "it outlives init"  # noqa: TID251 (the same)
        time.sleep(0.01)  # noqa: TID251 (the same)


def _runs(pid: int) -> bool:
    """Whether there is such a process, beside a zombie that nobody waits for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


# ---- what a module that init imported may have left behind


def test_a_process_with_a_second_thread_cannot_be_init() -> None:
    """A fork would take along whatever the other holds locked."""
    end = threading.Event()
    other = threading.Thread(target=end.wait, name="poller")

    async def root(_boot: BootImage) -> int:
        return 0

    def run() -> ExitInfo:
        here = LinuxKernel({}, recorder=lambda _event: None)
        return here.run(program("root", root), b"", until=Nanos(here.now + SECOND))

    other.start()
    with pytest.raises(CannotRun, match=r"its process has 2 threads \('poller'\)"):
        run()
    end.set()
    other.join()
    assert run().code == 0, "once it is alone"


def test_timers_and_handlers_rest_while_init_runs() -> None:
    called: list[int] = []

    async def root(_boot: BootImage) -> Any:
        os.kill(os.getpid(), signal.SIGCHLD)
        before = len(called)  # by the timer, until init had begun to run
        found = [signal.getsignal(number) for number in (signal.SIGALRM, signal.SIGUSR1)]
        await SleepUntil(Nanos(await Now() + 50 * MS))
        return found, signal.getitimer(signal.ITIMER_REAL), called[before:]

    def run() -> Any:
        _ = signal.signal(signal.SIGALRM, lambda *_: called.append(1))
        _ = signal.signal(signal.SIGUSR1, lambda *_: called.append(2))
        _ = signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
        found = exec_rig_here().run(root)
        _ = signal.setitimer(signal.ITIMER_REAL, 0)
        return found

    former = signal.getsignal(signal.SIGALRM), signal.getsignal(signal.SIGUSR1)
    left = signal.getitimer(signal.ITIMER_REAL)
    try:
        assert run() == ([signal.SIG_DFL] * 2, (0.0, 0.0), [])
    finally:
        _ = signal.signal(signal.SIGALRM, former[0])
        _ = signal.signal(signal.SIGUSR1, former[1])
        _ = signal.setitimer(signal.ITIMER_REAL, *left)


# ---- grants


def test_as_many_threads_as_granted_and_no_more() -> None:
    async def root(boot: BootImage) -> Any:
        counts = []
        for isolation in Isolation:
            grants = Grants(isolation=isolation, threads=3)
            name = "threads" if isolation is Isolation.EXEC else "forked_threads"
            counts.append(await told(boot, name, grants=grants, argument=b"8"))
        counts.append(await told(boot, "threads", called="none", argument=b"8"))
        return counts

    counts = exec_rig().run(root, programs={"forked_threads": exec_programs.threads})
    granted = 3 if os.getuid() == 0 else 8  # Linux counts the whole user there
    assert counts == [granted, granted, 0]


@pytest.mark.parametrize("name", ["shares", "shares_beside"])
def test_an_interpreter_of_its_own_shares_memory_and_has_fences_and_clocks(name: str) -> None:
    async def root(boot: BootImage) -> Any:
        spawned = await start(boot, name, grants=STREAMS if name == "shares_beside" else EXEC)
        given = await take(boot.endpoint, link=spawned.link)
        assert given.cap is not None
        seen = await VmoWatch(given.cap)
        await Send(spawned.slot, b"write")
        found = json.loads((await take(boot.endpoint, link=spawned.link)).data)
        await ended_well(spawned)
        assert bytes(seen[:5]) == b"words"
        seen.release()
        return found

    before, mapped, after, wall = exec_rig().run(root)

    assert before <= mapped <= after
    assert abs(wall - time.time_ns()) < 60 * SECOND, "the machine's clock is one for all"


def test_a_device_is_opened_as_granted() -> None:
    devices = (
        DeviceGrant("in", "/dev/zero", writable=False),
        DeviceGrant("out", "/dev/zero", writable=True),
    )

    async def root(boot: BootImage) -> Any:
        return await told(boot, "reads_device", grants=EXEC._replace(devices=devices))

    assert exec_rig().run(root) == {"in": ["00000000", -errno.EBADF], "out": ["00000000", 1]}


@pytest.mark.parametrize(
    ("path", "detail"),
    [("/dev/no-such", "No such file or directory"), ("/etc/passwd", "is no device")],
)
def test_a_device_that_is_none_fails_the_spawn(path: str, detail: str) -> None:
    grants = EXEC._replace(devices=(DeviceGrant("pump", path, writable=False),))
    failed = refused_start("reads_device", grants)

    assert f"device pump: {path}" in failed.text
    assert detail in failed.text
    assert failed.after == failed.before


@pytest.fixture
def tcp_rules() -> None:
    if landlock.version() < landlock.NET_SINCE:
        pytest.skip("Landlock knows no TCP ports here")


@pytest.mark.usefixtures("tcp_rules")
def test_a_granted_socket_is_served_by_an_ordinary_library() -> None:
    async def root(boot: BootImage) -> Any:
        port = free_tcp_port()
        grants = STREAMS._replace(listen=(ListenGrant("web", "127.0.0.1", port),))
        spawned = await start(boot, "serves_tcp", grants=grants)
        assert json.loads((await take(boot.endpoint, link=spawned.link)).data) == "ready"
        with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
            client.sendall(b"hello\n")
            line = client.recv(100)
        await ended_well(spawned)
        return line

    assert exec_rig().run(root) == b"web:hello\n"


@pytest.mark.usefixtures("tcp_rules")
def test_only_the_granted_port_can_be_connected_to() -> None:
    async def root(boot: BootImage) -> Any:
        granted = free_tcp_port()
        with (
            socket.create_server(("127.0.0.1", granted)) as there,
            socket.create_server(("127.0.0.1", free_tcp_port())) as elsewhere,
        ):
            other = elsewhere.getsockname()[1]
            if os.fork() == 0:  # a peer that answers once
                there.settimeout(20)
                peer, _ = there.accept()
                peer.sendall(b"re:" + peer.recv(100))
                os._exit(0)
            grants = STREAMS._replace(connect=(granted,))
            found = await told(
                boot, "connects_tcp", grants=grants, argument=json.dumps([granted, other]).encode()
            )
            os.wait()
            return found

    assert exec_rig().run(root) == ["re:hello\n", errno.EACCES]


def test_without_tcp_rules_a_network_grant_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(landlock, "version", lambda: landlock.NET_SINCE - 1)
    failed = refused_start("connects_tcp", STREAMS._replace(connect=(1,)))

    assert "Landlock ABI 3 cannot bound TCP connections" in failed.text


# ---- under asyncio


def test_many_waits_at_once_beside_an_event_loops_own_work() -> None:
    async def root(boot: BootImage) -> Any:
        spawned = await start(boot, "many_at_once", grants=STREAMS)
        asked = [await take(boot.endpoint, link=spawned.link) for _ in range(4)]
        # All of them wait for an answer, and it is not sent before the loop has gone on.
        assert (await take(boot.endpoint, link=spawned.link)).data == b'"ticked"'
        for message in reversed(asked):
            assert message.cap is not None
            await Send(message.cap, b"a" + message.data)
        found = json.loads((await take(boot.endpoint, link=spawned.link)).data)
        assert (await ended(spawned)).code == 7
        return found

    found = exec_rig().run(root)

    assert found["answers"] == [f"aq{index}" for index in range(4)]
    assert all(late >= 0 for late in found["late"]), "never early"
    status, late = found["nothing"]
    assert status == Status.TIMED_OUT.name
    assert late >= 0


def test_a_wait_ends_when_another_coroutine_closes_its_link() -> None:
    async def root(boot: BootImage) -> Any:
        return await told(boot, "closes_under_a_wait", grants=STREAMS)

    outcome, took = exec_rig().run(root)

    assert outcome == "gone"
    assert took < exec_programs.PATIENCE / SECOND / 2, "not by its deadline"


def test_a_full_link_is_waited_for_and_a_wait_can_be_given_up() -> None:
    async def root(boot: BootImage) -> Any:
        spawned = await start(boot, "waits_for_room", grants=STREAMS)
        aside = await LinkCreate(boot.endpoint, LinkTerms())
        _ = await take(boot.endpoint, link=spawned.link)
        await Send(spawned.slot, b"say when", move=aside.slot)
        assert (await take(boot.endpoint, link=aside.link)).data == b"waiting"
        filled = 0
        while (data := (await take(boot.endpoint, link=spawned.link)).data) == b"fill":
            filled += 1
        await ended_well(spawned)
        return filled, json.loads(data)

    filled, (sent, refusal, late, given_up) = exec_rig().run(root)

    assert filled == sent == LINK_DEPTH_DEFAULT
    assert refusal == Status.TIMED_OUT.name
    assert late >= 0, "never early"
    assert given_up


def test_an_exit_trap_ends_the_whole_program() -> None:
    async def root(boot: BootImage) -> Any:
        spawned = await start(boot, "stops", grants=STREAMS)
        _ = await take(boot.endpoint, link=spawned.link)
        await Send(spawned.slot, b"now")
        return (await ended(spawned)).code

    assert exec_rig().run(root) == 5
