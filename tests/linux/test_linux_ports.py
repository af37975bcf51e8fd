"""Ports: sockets of a service that people's own programs connect to."""

import os
import select
import socket
import stat
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nexus.abi import (
    LINK_DEPTH_DEFAULT,
    MESSAGE_SIZE_MAX,
    NO_WAIT,
    OUTSIDE,
    PORT_PEERS_MAX,
    AbiError,
    BootImage,
    Call,
    CapClone,
    CapClose,
    ConsoleWrite,
    EndpointClose,
    EventKind,
    Grants,
    Kill,
    LinkCreate,
    LinkId,
    Message,
    Nanos,
    Now,
    PeerGone,
    Pid,
    PortClose,
    PortPeer,
    PortSend,
    Recv,
    ReplyRecv,
    Send,
    Sender,
    Slot,
    Spawn,
    Spawned,
    SpawnLastError,
    SpawnReason,
    SpawnSpec,
    Status,
    TaskStats,
    Trap,
    Wait,
)
from nexus.kernel.linux import LinuxKernel
from nexus.kernel.linux.driver import Driver
from tests.linux.ground import Ground, ground, mine
from tests.linux.linux_run import SECOND, holdings, run, start

__all__ = ["ground", "mine"]

pytestmark = pytest.mark.linux

MILLISECOND = 1_000_000
PATIENCE = 20 * SECOND  # for what takes a moment on a free machine
DOOR = Grants(ports=("door",))
STRANGER = 12_345  # a uid that is neither root nor runs init
ENDPOINT, PORT = Slot(1), Slot(2)
ACCEPTS = "00010000"  # flags of a listening socket in /proc/net/unix: __SO_ACCEPTCON


async def soon() -> Nanos:
    return Nanos(await Now() + PATIENCE)


async def status_of(trap: Trap[Any]) -> Status | None:
    try:
        await trap
    except AbiError as refusal:
        return refusal.status
    return None


def call(path: Path) -> socket.socket:
    """A connection to a port, with a time limit on everything."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.settimeout(PATIENCE / SECOND)
    sock.connect(str(path))
    return sock


async def door(boot: BootImage, program: str = "echo", name: str = "svc") -> Spawned:
    """Start a service with the port `door`."""
    return await start(boot, name, program=program, grants=DOOR)


async def echo(boot: BootImage) -> int:
    """Answers each message of its port until one says end; prints its account then."""
    assert boot.ports == (PORT,)
    while True:
        try:
            message = await Recv((boot.endpoint, PORT), await soon())
        except PeerGone:
            continue
        if message.data == b"end":
            stats = await TaskStats()
            await ConsoleWrite(
                f"{stats.refused_identity} {stats.refused_links} {stats.refused_oversize} "
                f"{stats.refused_caps} {stats.endpoints} {stats.links}"
            )
            return 0
        _ = await status_of(PortSend(PORT, message.link, b"echo " + message.data[:100]))


async def ended(child: Spawned) -> int:
    return (await Wait(child.pid, await soon())).code


# ---- messages


@pytest.mark.parametrize("trace", [False, True])
@pytest.mark.parametrize("alone", [False, True])
def test_a_caller_and_a_service_exchange_whole_packets(
    ground: Ground, trace: bool, alone: bool
) -> None:
    async def service(boot: BootImage) -> int:
        sources = (PORT,) if alone else (boot.endpoint, PORT)
        seen: list[Message] = []
        waits = ReplyRecv(sources, await soon())
        while len(seen) < 3:
            message = await waits
            seen.append(message)
            await PortSend(PORT, message.link, message.data[::-1])
        first = seen[0]
        assert {message.link for message in seen} == {first.link}
        assert {message.source for message in seen} == {PORT}
        assert {message.cap for message in seen} == {None}
        peer = await PortPeer(PORT, first.link)
        assert first.sender == Sender(OUTSIDE, Pid(peer.pid), 0, first.sender.qos)
        await PortSend(PORT, first.link, f"{peer.pid} {peer.uid} {first.sender.qos}".encode())
        stats = await TaskStats()
        assert (stats.received, stats.sent, stats.endpoints) == (3, 4, 1)
        with pytest.raises(PeerGone) as gone:
            await Recv(sources, await soon())
        assert gone.value.link == first.link
        return 0

    async def root(boot: BootImage) -> object:
        child = await door(boot, "service")
        with call(ground.directory / "door.sock") as sock:
            for data in (b"\xff first", b"x" * MESSAGE_SIZE_MAX, b"y"):
                sock.send(data)
                assert sock.recv(10_000) == data[::-1]
            told = sock.recv(1000).decode()
        return told, await ended(child), os.getpid()

    told, code, pid = ground.run(
        root, {"service": service}, runtime_dir=ground.directory, trace=trace
    )

    assert code == 0
    assert told == f"{pid} {ground.uid} 1"


def test_a_filtered_or_small_receive_leaves_the_others_queued(mine: Ground) -> None:
    async def service(boot: BootImage) -> int:
        links = {}
        for _ in range(2):
            message = await Recv((PORT,), await soon())
            links[message.data] = message.link
        await PortSend(PORT, links[b"a"], b"go")
        second = await Recv((boot.endpoint, PORT), await soon(), link=links[b"b"])
        assert second.data == b"b2"
        again = Recv((PORT,), Nanos(await Now() + 50 * MILLISECOND), link=links[b"b"])
        assert await status_of(again) is Status.TIMED_OUT
        assert await status_of(Recv((PORT,), NO_WAIT, size_max=1)) is Status.INVALID_ARGUMENT
        assert (await Recv((PORT,), NO_WAIT, size_max=2)).data == b"a2"
        return 0

    async def root(boot: BootImage) -> int:
        child = await door(boot, "service")
        with call(mine.directory / "door.sock") as a:
            a.send(b"a")
            with call(mine.directory / "door.sock") as b:
                b.send(b"b")
                assert a.recv(10) == b"go"
                a.send(b"a2")
                b.send(b"b2")
                return await ended(child)

    assert mine.run(root, {"service": service}, runtime_dir=mine.directory) == 0


@pytest.mark.parametrize("alone", [False, True])
def test_what_a_new_caller_has_sent_is_there_without_waiting(mine: Ground, alone: bool) -> None:
    async def service(boot: BootImage) -> int:
        assert boot.control is not None
        _ = await Recv((boot.endpoint,), await soon())
        sources = (PORT,) if alone else (boot.endpoint, PORT)
        assert (await Recv(sources, NO_WAIT)).data == b"first words"
        assert await status_of(Recv(sources, NO_WAIT)) is Status.QUEUE_EMPTY
        return 0

    async def root(boot: BootImage) -> int:
        child = await door(boot, "service")
        with call(mine.directory / "door.sock") as sock:
            sock.send(b"first words")
            await Send(child.slot, b"now")
            return await ended(child)

    assert mine.run(root, {"service": service}, runtime_dir=mine.directory) == 0


def test_a_slow_caller_is_queue_full_and_nobody_waits(ground: Ground) -> None:
    async def service(boot: BootImage) -> int:
        assert boot.control is not None
        message = await Recv((PORT,), await soon())
        started = await Now()
        sent = 0
        while (status := await status_of(PortSend(PORT, message.link, b"%08d" % sent))) is None:
            sent += 1
            assert sent < 10_000
        assert status is Status.QUEUE_FULL
        assert await Now() - started < PATIENCE // 2
        await Send(boot.control, b"%d" % sent)
        _ = await Recv((PORT,), await soon())
        await PortSend(PORT, message.link, b"again")
        return 0

    async def root(boot: BootImage) -> object:
        child = await door(boot, "service")
        with call(ground.directory / "door.sock") as sock:
            sock.send(b"hello")
            sent = int((await Recv((boot.endpoint,), await soon())).data)
            got = [int(sock.recv(100)) for _ in range(sent)]
            sock.send(b"read all")
            assert sock.recv(100) == b"again"
        return sent, got == list(range(sent)), await ended(child)

    sent, whole, code = ground.run(root, {"service": service}, runtime_dir=ground.directory)

    assert sent > 8
    assert (whole, code) == (True, 0)


def test_the_port_and_the_endpoint_are_served_in_turn(ground: Ground) -> None:
    async def service(boot: BootImage) -> int:
        assert boot.control is not None
        while (await TaskStats()).queued < LINK_DEPTH_DEFAULT:
            pass  # until both queues are full
        taken = [
            (await Recv((boot.endpoint, PORT), await soon())).source
            for _ in range(2 * LINK_DEPTH_DEFAULT)
        ]
        await Send(boot.control, b"%d" % taken.count(PORT))
        return 0

    async def root(boot: BootImage) -> int:
        child = await door(boot, "service")
        with call(ground.directory / "door.sock") as sock:
            for _ in range(5 * LINK_DEPTH_DEFAULT):
                sock.send(b"from outside")
            for _ in range(LINK_DEPTH_DEFAULT):
                await Send(child.slot, b"from root")
            return int((await Recv((boot.endpoint,), await soon())).data)

    of_port = ground.run(root, {"service": service}, runtime_dir=ground.directory)
    assert abs(of_port - LINK_DEPTH_DEFAULT) <= 1


def test_two_callers_of_one_port_are_served_in_turn(mine: Ground) -> None:
    async def service(boot: BootImage) -> int:
        assert boot.control is not None
        await Send(boot.control, b"up")
        _ = await Recv((boot.endpoint,), await soon())
        taken = [(await Recv((PORT,), await soon())).link for _ in range(10)]
        await Send(boot.control, b"%d" % taken.count(taken[0]))
        return 0

    async def root(boot: BootImage) -> int:
        child = await door(boot, "service")
        _ = await Recv((boot.endpoint,), await soon())
        with call(path) as greedy, call(path) as modest:
            for _ in range(50):
                greedy.send(b"more")
            for _ in range(5):
                modest.send(b"please")
            await Send(child.slot, b"go")
            return int((await Recv((boot.endpoint,), await soon())).data)

    path = mine.directory / "door.sock"
    assert 4 <= mine.run(root, {"service": service}, runtime_dir=mine.directory) <= 6


# ---- the end of a connection


def test_a_caller_that_leaves_is_heard_to_the_end_and_then_gone(ground: Ground) -> None:
    async def service(boot: BootImage) -> int:
        assert boot.control is not None
        first = await Recv((PORT,), await soon())
        await Send(boot.control, b"first")
        _ = await Recv((boot.endpoint,), await soon())
        assert await status_of(PortSend(PORT, first.link, b"x")) is Status.NO_SUCH_ENDPOINT
        assert (await Recv((PORT,), await soon())).data == b"two"
        assert (await PortPeer(PORT, first.link)).pid == first.sender.pid
        with pytest.raises(PeerGone) as gone:
            await Recv((PORT,), await soon())
        assert gone.value.link == first.link
        for trap in (
            PortPeer(PORT, first.link),
            PortClose(PORT, first.link),
            PortSend(PORT, first.link, b"x"),
        ):
            assert await status_of(trap) is Status.NO_SUCH_ENDPOINT
        assert await status_of(Recv((PORT,), NO_WAIT)) is Status.QUEUE_EMPTY, "told once"
        return 0

    async def root(boot: BootImage) -> int:
        child = await door(boot, "service")
        with call(ground.directory / "door.sock") as sock:
            sock.send(b"one")
            _ = await Recv((boot.endpoint,), await soon())
            sock.send(b"two")
        await Send(child.slot, b"left")
        return await ended(child)

    assert ground.run(root, {"service": service}, runtime_dir=ground.directory) == 0


def test_a_connection_the_service_ends_is_over_at_once(ground: Ground) -> None:
    async def service(boot: BootImage) -> int:
        message = await Recv((PORT,), await soon())
        _ = await Recv((boot.endpoint,), await soon())
        await PortSend(PORT, message.link, b"bye")
        await PortClose(PORT, message.link)
        assert await status_of(PortClose(PORT, message.link)) is Status.NO_SUCH_ENDPOINT
        later = await Recv((boot.endpoint, PORT), await soon())
        assert later.data == b"another", "neither the unread message nor a PeerGone comes"
        assert later.link > message.link
        return 0

    async def root(boot: BootImage) -> int:
        child = await door(boot, "service")
        with call(ground.directory / "door.sock") as sock:
            sock.send(b"hello")
            sock.send(b"unread")
            await Send(child.slot, b"both are sent")
            until_closed = select.poll()
            until_closed.register(sock, 0)  # a hang-up is told unasked
            assert until_closed.poll(5000)
            with pytest.raises(ConnectionResetError):
                sock.recv(100)  # Linux tells of the unread message first
            assert sock.recv(100) == b"bye"
            assert sock.recv(100) == b""
        with call(ground.directory / "door.sock") as sock:
            sock.send(b"another")
            return await ended(child)

    assert ground.run(root, {"service": service}, runtime_dir=ground.directory) == 0


@pytest.mark.parametrize("what", ["oversize", "empty", "descriptors"])
def test_what_is_no_message_ends_that_connection_alone(ground: Ground, what: str) -> None:
    async def root(boot: BootImage) -> object:
        path = ground.directory / "door.sock"
        child = await door(boot)
        with call(path) as good, call(path) as bad:
            for sock in (good, bad):
                sock.send(b"hello")
                assert sock.recv(100) == b"echo hello"
            if what == "oversize":
                bad.send(b"x" * (MESSAGE_SIZE_MAX + 1))
            elif what == "empty":
                bad.send(b"")
            else:
                socket.send_fds(bad, [b"take these"], [0] * 3)
            assert bad.recv(100) == b""
            good.send(b"still here")
            assert good.recv(100) == b"echo still here"
            good.send(b"end")
            assert await ended(child) == 0
            assert good.recv(100) == b""
        return None

    ended_run = ground.observe(root, {"echo": echo}, runtime_dir=ground.directory)

    (line,) = [str(row["line"]) for row in ended_run.fields(EventKind.CONSOLE)]
    refused = {"oversize": "0 0 1 0", "empty": "0 0 0 0", "descriptors": "0 0 0 1"}
    assert line == refused[what] + " 1 1"


def test_descriptors_a_caller_sends_do_not_stay_in_the_service(mine: Ground) -> None:
    def open_in(pid: int) -> int:
        return sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())

    async def root(boot: BootImage) -> int:
        child = await door(boot)
        path = mine.directory / "door.sock"
        with call(path) as sock:
            sock.send(b"x")
            sock.recv(100)
            before = open_in(child.pid)
            for _ in range(20):
                with call(path) as other:
                    socket.send_fds(other, [b"x"], [0] * 10)
                    assert other.recv(100) == b""
            sock.send(b"y")
            sock.recv(100)
            return open_in(child.pid) - before

    if os.geteuid():
        pytest.skip("only root may look into a service")
    assert mine.run(root, {"echo": echo}, runtime_dir=mine.directory) == 0


def test_a_port_has_so_many_callers_and_no_more(ground: Ground) -> None:
    async def root(boot: BootImage) -> int:
        path = ground.directory / "door.sock"
        child = await door(boot)
        callers = [call(path) for _ in range(PORT_PEERS_MAX)]
        for number, sock in enumerate(callers):
            sock.send(b"%d" % number)
            assert sock.recv(100) == b"echo %d" % number
        with call(path) as further:
            assert further.recv(100) == b"", "turned away at once"
        callers.pop().close()
        give_up = await soon()
        while True:  # as soon as the service has heard of it
            with call(path) as sock:
                try:
                    sock.send(b"in")
                    if sock.recv(100) == b"echo in":
                        break
                except ConnectionError:
                    pass
            assert await Now() < give_up
        callers[0].send(b"end")
        code = await ended(child)
        for sock in callers:
            sock.close()
        return code

    ended_run = ground.observe(root, {"echo": echo}, runtime_dir=ground.directory)

    assert ended_run.result == 0
    reasons = [row["reason"] for row in ended_run.fields(EventKind.REFUSED)]
    assert set(reasons) == {"excess_link"}
    assert {row["port"] for row in ended_run.fields(EventKind.REFUSED)} == {"door"}


# ---- who may call


def test_only_root_and_the_user_who_runs_the_system_may_connect(ground: Ground) -> None:
    path = ground.directory / "door.sock"

    async def root(boot: BootImage) -> object:
        child = await door(boot)
        mode = stat.S_IMODE(path.stat().st_mode)
        return mode, path.stat().st_uid, await ended(child)

    def client() -> None:
        """Root's, against a system of another user; another user's, against root's."""
        if ground.user is None:
            os.setegid(STRANGER)
            os.seteuid(STRANGER)
            with pytest.raises(PermissionError):
                call(path)
            os.seteuid(0)
        with call(path) as sock:
            sock.send(b"mine")
            assert sock.recv(100) == b"echo mine"
            sock.send(b"end")
            assert sock.recv(100) == b""

    if os.geteuid():
        pytest.skip("only root can be two users")
    assert beside(
        path, client, lambda: ground.run(root, {"echo": echo}, runtime_dir=ground.directory)
    ) == (0o600, ground.uid, 0)


def beside(path: Path, client: Callable[[], None], work: Callable[[], Any]) -> Any:
    """Run a client in a process of its own once somebody listens at a port."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            give_up = time.monotonic_ns() + PATIENCE
            while not listens(path) and time.monotonic_ns() < give_up:
                time.sleep(0.01)  # noqa: TID251 (a process beside the system)
            client()
            code = 0
        except BaseException:
            traceback.print_exc()
            raise
        finally:
            os._exit(code)
    result = work()
    assert os.waitpid(pid, 0)[1] == 0, "the client failed"
    return result


def listens(path: Path) -> bool:
    """Whether a socket listens there: it is at its path a moment earlier, and refuses callers."""
    rows = (line.split() for line in Path("/proc/net/unix").read_text().splitlines())
    return any(row[3] == ACCEPTS and row[-1] == str(path) for row in rows)


def test_the_user_is_asked_of_linux_where_the_file_lets_anybody_in(mine: Ground) -> None:
    async def root(boot: BootImage) -> object:
        child = await door(boot)
        path.parent.chmod(0o777)
        path.chmod(0o777)
        os.seteuid(STRANGER)
        try:
            stranger = call(path)
        finally:
            os.seteuid(0)
        with stranger:
            refused = stranger.recv(100)
        with call(path) as sock:
            sock.send(b"end")
            return refused, await ended(child)

    if os.geteuid():
        pytest.skip("only root can be two users")
    path = mine.directory / "door.sock"
    ended_run = mine.observe(root, {"echo": echo}, runtime_dir=mine.directory)
    assert ended_run.result == (b"", 0)
    (line,) = [str(row["line"]) for row in ended_run.fields(EventKind.CONSOLE)]
    assert line == "1 0 0 0 1 1"
    (row,) = ended_run.fields(EventKind.REFUSED)
    assert (row["reason"], row["uid"], row["port"]) == ("identity", STRANGER, "door")


# ---- what a port's slot is


def test_a_port_is_no_endpoint_and_an_endpoint_no_port(ground: Ground) -> None:
    async def service(boot: BootImage) -> int:
        assert boot.control is not None
        hello = await Recv((PORT,), await soon())
        denied: tuple[Trap[Any], ...] = (
            EndpointClose(PORT),
            LinkCreate(PORT),
            CapClone(PORT),
            Send(PORT, b"x"),
        )
        for trap in denied:
            assert await status_of(trap) is Status.PERMISSION_DENIED, type(trap).__name__
        own = await LinkCreate(boot.endpoint)
        assert own.link is not None
        for slot in (boot.endpoint, boot.control, own.slot, Slot(50), Slot(-1)):
            asked: tuple[Trap[Any], ...] = (
                PortSend(slot, hello.link, b"x"),
                PortClose(slot, hello.link),
                PortPeer(slot, hello.link),
            )
            for trap in asked:
                assert await status_of(trap) is Status.INVALID_ARGUMENT, (slot, trap)
        for link in (own.link, LinkId(999), LinkId(0)):
            assert await status_of(PortPeer(PORT, link)) is Status.NO_SUCH_ENDPOINT
        for size in (0, MESSAGE_SIZE_MAX + 1):
            refused = await status_of(PortSend(PORT, hello.link, b"x" * size))
            assert refused is Status.INVALID_ARGUMENT
        call_ = Call(own.slot, b"x", PORT, hello.link, await soon())
        assert await status_of(call_) is Status.INVALID_ARGUMENT
        assert not call_.sent
        await PortSend(PORT, hello.link, b"still there")
        before = await TaskStats()
        await CapClose(PORT)
        after = await TaskStats()
        assert (before.slots - after.slots, before.endpoints - after.endpoints) == (1, 0)
        assert before.budget_used > after.budget_used
        assert await status_of(Recv((PORT,), NO_WAIT)) is Status.INVALID_ARGUMENT
        await Send(boot.control, b"closed")
        _ = await status_of(Recv((boot.endpoint,), await soon()))
        return 0

    async def root(boot: BootImage) -> int:
        child = await door(boot, "service")
        path = ground.directory / "door.sock"
        with call(path) as sock:
            sock.send(b"hello")
            assert sock.recv(100) == b"still there"
            assert (await Recv((boot.endpoint,), await soon())).data == b"closed"
            assert sock.recv(100) == b""
        with pytest.raises(ConnectionRefusedError):
            call(path)
        await Send(child.slot, b"end")
        return await ended(child)

    assert ground.run(root, {"service": service}, runtime_dir=ground.directory) == 0


# ---- the socket's file


def test_the_socket_goes_with_its_task_and_comes_anew(ground: Ground) -> None:
    path = ground.directory / "run" / "door.sock"

    async def root(boot: BootImage) -> object:
        seen = []
        for _ in range(2):
            child = await door(boot)
            with call(path) as sock:
                sock.send(b"there?")
                assert sock.recv(100) == b"echo there?"
                seen.append(path.stat().st_ino)
                await Kill(child.pid)
                assert (await Wait(child.pid, await soon())).signal == 9
                assert not path.exists()
                assert sock.recv(100) == b""
        await door(boot)
        return len(seen), path.exists()

    left = ground.run(root, {"echo": echo}, runtime_dir=path.parent)

    assert left == (2, True)
    assert not path.exists(), "the end of the run is the end of the task"
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_what_an_earlier_run_left_is_replaced(ground: Ground) -> None:
    path = ground.directory / "door.sock"

    async def root(boot: BootImage) -> int:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stale:
            stale.bind(str(path))
        child = await door(boot)
        with call(path) as sock:
            sock.send(b"end")
            return await ended(child)

    assert ground.run(root, {"echo": echo}, runtime_dir=ground.directory) == 0


@pytest.mark.parametrize("why", ["file", "no directory", "long", "read only"])
def test_a_port_that_cannot_be_made_fails_the_spawn_and_leaves_nothing(
    why: str, tmp_path: Path
) -> None:
    directory: Path | None = tmp_path
    if why == "file":
        (tmp_path / "door.sock").write_text("precious")
    elif why == "no directory":
        directory = None
    elif why == "long":
        directory = tmp_path / ("x" * 100)
    else:
        (tmp_path / "file").write_text("")
        directory = tmp_path / "file" / "below"
    before = holdings()

    async def root(boot: BootImage) -> int:
        inside = holdings()
        both = Grants(ports=("other", "door"))
        refused = await status_of(await_spawn(boot, both))
        assert refused is Status.UNSUPPORTED
        assert await SpawnLastError() is SpawnReason.MAP_FAILED
        assert holdings() == inside
        return 0

    ended_run = run(root, {"echo": echo}, runtime_dir=directory)

    assert ended_run.exit.code == 0
    assert holdings() == before
    (failed,) = ended_run.of(EventKind.SPAWN_FAILED)
    assert len(str(failed["detail"])) > 20, "a sentence for people"
    if why == "file":
        assert [entry.name for entry in tmp_path.iterdir()] == ["door.sock"]
        assert (tmp_path / "door.sock").read_text() == "precious"


def await_spawn(boot: BootImage, grants: Grants, name: str = "svc") -> Trap[Any]:
    return Spawn(SpawnSpec(name, "echo", boot.endpoint, grants=grants))


def test_a_port_of_a_live_task_is_not_given_twice(ground: Ground) -> None:
    async def root(boot: BootImage) -> object:
        child = await door(boot)
        refused = await status_of(await_spawn(boot, DOOR, "second"))
        reason = await SpawnLastError()
        with call(ground.directory / "door.sock") as sock:
            sock.send(b"end")
            assert await ended(child) == 0
        return refused, reason, await status_of(await_spawn(boot, DOOR, "second"))

    left = ground.run(root, {"echo": echo}, runtime_dir=ground.directory)

    assert left == (Status.INVALID_ARGUMENT, SpawnReason.INVALID_PAYLOAD, None)


def test_a_spawn_that_fails_later_takes_its_sockets_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        assert (tmp_path / "door.sock").exists(), "before the fork"
        raise OSError(24, "Too many open files")

    async def root(boot: BootImage) -> int:
        before = holdings()
        with monkeypatch.context() as broken:
            broken.setattr(LinuxKernel, "_fork", refuse)
            assert await status_of(await_spawn(boot, DOOR)) is Status.NO_SPACE
        assert holdings() == before
        assert list(tmp_path.iterdir()) == []
        return 0

    assert run(root, {"echo": echo}, runtime_dir=tmp_path).exit.code == 0


def test_the_listening_socket_is_with_its_service_alone(mine: Ground) -> None:
    def holders(inode: str, pids: list[int]) -> list[bool]:
        return [
            any(
                str(entry.readlink()) == f"socket:[{inode}]"
                for entry in Path(f"/proc/{pid}/fd").iterdir()
                if os.path.lexists(entry)  # not the one that lists
            )
            for pid in pids
        ]

    async def root(boot: BootImage) -> object:
        before = await start(boot, "before", program="waits")
        child = await door(boot)
        after = await start(boot, "after", program="waits")
        listing = Path("/proc/net/unix").read_text().splitlines()
        (inode,) = {line.split()[6] for line in listing if line.endswith(str(path))}
        return holders(inode, [boot.pid, before.pid, child.pid, after.pid])

    async def waits(boot: BootImage) -> int:
        _ = await status_of(Recv((boot.endpoint,), await soon()))
        return 0

    if os.geteuid():
        pytest.skip("only root may look into a service")
    path = mine.directory / "door.sock"
    left = mine.run(root, {"echo": echo, "waits": waits}, runtime_dir=mine.directory)
    assert left == [False, False, True, False]


# ---- the checks can be broken


@pytest.mark.parametrize("check", ["_may_call", "_room_for_caller"])
def test_each_refusal_of_a_caller_is_one_check(
    check: str, mine: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def root(boot: BootImage) -> bytes:
        child = await door(boot)
        with call(mine.directory / "door.sock") as sock:
            closed = sock.recv(100)
        await Send(child.slot, b"end")
        assert await ended(child) == 0
        return closed

    monkeypatch.setattr(Driver, check, lambda *_: False)
    assert mine.run(root, {"echo": echo}, runtime_dir=mine.directory) == b""
