"""Services in an interpreter of their own: how they start, what they get, how a start fails."""

import dataclasses
import errno
import json
import os
import socket
import tempfile
from pathlib import Path
from typing import Any, Final

import pytest

from nexus.abi import (
    LINK_DEPTH_DEFAULT,
    AbiError,
    BootImage,
    DeviceGrant,
    EventKind,
    Grants,
    Isolation,
    Kill,
    ListenGrant,
    Nanos,
    Now,
    Program,
    Programs,
    Recorder,
    Send,
    SleepUntil,
    SpawnLastError,
    SpawnReason,
    Status,
    TaskTable,
)
from nexus.kernel.core.limits import SystemLimits
from nexus.kernel.linux import LinuxKernel, kernel, landlock
from nexus.kernel.linux.stage2 import load_entry
from nexus.testing.conformance.steps import ended, ended_well, start, take
from nexus.testing.rig import Kernel, Rig, Run, linux_rig, program
from tests.linux import exec_programs

pytestmark = pytest.mark.linux

EXEC: Final = Grants(isolation=Isolation.EXEC)
STREAMS: Final = EXEC._replace(streams=True)
TCP_PORTS: Final = (18_421, 18_422, 18_423)
PLACE: Final = "tests.linux.exec_programs"


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
    entry("pretends", "-"),
    entry("threads"),
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


def failing(name: str, grants: Grants = EXEC) -> tuple[str, list[Any], list[Any], Run]:
    """Start what cannot start, twice, and then something that can: the detail, and what init
    holds before and after."""
    held: list[Any] = []
    text = ""

    async def root(boot: BootImage) -> Any:
        nonlocal text
        await told(boot, "who")
        held.append(_holdings())
        for _ in range(2):
            try:
                await start(boot, name, grants=grants)
            except AbiError as error:
                text = str(error)
                reason = await SpawnLastError()
                assert reason in (SpawnReason.MAP_FAILED, SpawnReason.INVALID_PAYLOAD)
            else:
                raise AssertionError(f"{name} started")
        held.append(_holdings())
        assert [row.name for row in await TaskTable()] == ["init-lite"]
        await told(boot, "who")
        return [text, *held]

    run = exec_rig().observe(root)
    text, before, after = run.result
    return text, before, after, run


def _holdings() -> list[Any]:
    """Descriptors and children of the calling process, which is init's."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        children = True
    except ChildProcessError:
        children = False
    return [sorted(os.listdir("/proc/self/fd")), children]  # noqa: PTH208 (names, not paths)


@pytest.mark.parametrize(
    ("name", "detail"),
    [
        ("raises", "cannot import tests.linux.exec_programs:raises -: LookupError: no such pump"),
        ("absent", "ModuleNotFoundError: No module named 'tests.linux.no_such_module'"),
        ("dies", "the child ended before it was confined"),
        ("babbles", "the child spoke before it was confined"),
    ],
)
def test_a_failed_import_fails_the_spawn_and_leaves_nothing(name: str, detail: str) -> None:
    text, before, after, run = failing(name)

    assert detail in text
    assert after == before
    recorded = run.fields(EventKind.SPAWN_FAILED)
    assert [event["reason"] for event in recorded] == ["map_failed"] * 2
    assert all(detail in str(event["detail"]) for event in recorded)


def test_the_detail_names_file_and_line_of_what_raised() -> None:
    text, *_ = failing("raises")

    assert "(exec_programs.py:" in text


def test_an_import_that_hangs_is_ended_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "EXEC_PREPARE_TIME", 1_000_000_000)
    # Two interpreters start within the second as well.
    text, before, after, _ = failing("hangs")

    assert "did not confine itself in time (1 s)" in text
    assert after == before


def test_init_serves_the_others_while_an_import_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "EXEC_PREPARE_TIME", 1_000_000_000)

    async def root(boot: BootImage) -> None:
        victim = await start(boot, "waits", grants=Grants())
        await Kill(victim.pid)
        with pytest.raises(AbiError):
            await start(boot, "hangs", grants=EXEC)

    async def waits(boot: BootImage) -> None:
        await take(boot.endpoint)

    events = exec_rig().observe(root, programs={"waits": waits}).events
    order = [
        event.kind for event in events if event.kind in (EventKind.EXIT, EventKind.SPAWN_FAILED)
    ]
    assert order[:2] == [EventKind.EXIT, EventKind.SPAWN_FAILED], "its end was noted meanwhile"


def test_a_program_without_an_entry_is_refused() -> None:
    text, *_ = failing("forked")

    assert "forked names no entry to execute it by" in text


def test_an_ordinary_program_needs_streams() -> None:
    text, *_ = failing("stops")

    assert "needs isolation = exec and streams" in text


def test_what_a_process_says_of_its_ids_is_not_believed() -> None:
    """It leaves the second stage out and says it is root: init enters Linux's own stamp."""
    seen: list[tuple[int, int]] = []
    former = LinuxKernel._prepared

    def prepared(self: LinuxKernel, *arguments: Any) -> Any:
        answer = former(self, *arguments)
        seen.append((answer.uid, self._uid_of(arguments[2]) or os.getuid()))
        return answer

    async def root(boot: BootImage) -> Any:
        spawned = await start(boot, "pretends", grants=EXEC)
        assert (await ended(spawned)).code == 0
        return seen

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LinuxKernel, "_prepared", prepared)
        ((uid, expected),) = exec_rig().run(root)
    assert uid == expected


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
    text, before, after, _ = failing("reads_device", grants)

    assert f"device pump: {path}" in text
    assert detail in text
    assert after == before


@pytest.fixture
def tcp_rules() -> None:
    if landlock.version() < landlock.NET_SINCE:
        pytest.skip("Landlock knows no TCP ports here")


@pytest.mark.usefixtures("tcp_rules")
def test_a_granted_socket_is_served_by_an_ordinary_library() -> None:
    async def root(boot: BootImage) -> Any:
        grants = STREAMS._replace(listen=(ListenGrant("web", "127.0.0.1", TCP_PORTS[0]),))
        spawned = await start(boot, "serves_tcp", grants=grants)
        assert json.loads((await take(boot.endpoint, link=spawned.link)).data) == "ready"
        with socket.create_connection(("127.0.0.1", TCP_PORTS[0]), timeout=3) as client:
            client.sendall(b"hello\n")
            line = client.recv(100)
        await ended_well(spawned)
        return line

    assert exec_rig().run(root) == b"web:hello\n"


@pytest.mark.usefixtures("tcp_rules")
def test_only_the_granted_port_can_be_connected_to() -> None:
    granted, other = TCP_PORTS[1:]

    async def root(boot: BootImage) -> Any:
        with (
            socket.create_server(("127.0.0.1", granted)) as there,
            socket.create_server(("127.0.0.1", other)),
        ):
            if os.fork() == 0:  # a peer that answers once
                there.settimeout(5)
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
    text, *_ = failing("connects_tcp", STREAMS._replace(connect=(1,)))

    assert "Landlock ABI 3 cannot bound TCP connections" in text


# ---- under asyncio


def test_many_waits_at_once_beside_an_event_loops_own_work() -> None:
    async def root(boot: BootImage) -> Any:
        spawned = await start(boot, "many_at_once", grants=STREAMS)
        asked = [await take(boot.endpoint, link=spawned.link) for _ in range(4)]
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
    assert found["ticks"] >= 5, "the loop went on while all of them waited"


def test_a_wait_ends_when_another_coroutine_closes_its_link() -> None:
    async def root(boot: BootImage) -> Any:
        return await told(boot, "closes_under_a_wait", grants=STREAMS)

    outcome, took = exec_rig().run(root)

    assert outcome == "gone"
    assert took < 1, "not by its deadline"


def test_a_full_link_is_waited_for_and_a_wait_can_be_given_up() -> None:
    async def root(boot: BootImage) -> Any:
        spawned = await start(boot, "waits_for_room", grants=STREAMS)
        await SleepUntil(Nanos(await Now() + 100_000_000))  # it has filled its link by then
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
        await Send(spawned.slot, b"now")
        return (await ended(spawned)).code

    assert exec_rig().run(root) == 5
