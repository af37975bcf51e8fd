"""What init alone may ask of Linux: the policy page, boot memory, sd_notify, its signals."""

import ctypes
import errno
import gc
import mmap
import os
import resource
import select
import signal
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nexus.abi import (
    BOOT_MEMORY_SIZE_MAX,
    KERNEL,
    NO_WAIT,
    NOTIFY_SIZE_MAX,
    AbiError,
    BootImage,
    BootMemoryRead,
    BootMemoryReplace,
    EventKind,
    LinkCreate,
    LinkId,
    Message,
    Nanos,
    Notify,
    Now,
    Pid,
    PolicyRaise,
    PolicyRead,
    PolicyWord,
    QosClass,
    Recv,
    Send,
    Sender,
    Signal,
    SleepUntil,
    Status,
    TaskStats,
    Trap,
    Wait,
)
from nexus.kernel.core import RunOver
from nexus.kernel.linux.bootmemory import FILE_NAME, NEW_NAME, BootMemory
from nexus.kernel.linux.identity import IdentityView
from nexus.kernel.linux.outside import SIGNALS
from tests.linux.ground import Ground, ground
from tests.linux.linux_run import SECOND, make, program, run, start

__all__ = ["ground"]

pytestmark = pytest.mark.linux

MILLISECOND = 1_000_000
PATIENCE = 20 * SECOND  # for what takes a moment on a free machine
ROUNDS_MAX = 10  # of a measurement, one of which must be in time on a busy machine
GENERATIONS_SEEN = 300


async def soon() -> Nanos:
    return Nanos(await Now() + PATIENCE)


async def status_of(trap: Trap[Any]) -> Status | None:
    try:
        await trap
    except AbiError as refusal:
        return refusal.status
    return None


# ---- root only


def test_a_service_is_refused_the_traps_of_the_root_task_and_changes_nothing(
    ground: Ground,
) -> None:
    async def service(_boot: BootImage) -> int:
        for trap in (PolicyRaise(True), BootMemoryRead(), BootMemoryReplace(b"x"), Notify("x")):
            assert await status_of(trap) is Status.PERMISSION_DENIED, type(trap).__name__
        assert await PolicyRead() == PolicyWord(0, False)
        return 0

    async def root(boot: BootImage) -> object:
        await BootMemoryReplace(b"kept")
        child = await start(boot, "service")
        return (
            (await Wait(child.pid, await soon())).code,
            await PolicyRead(),
            await BootMemoryRead(),
        )

    name = f"nexus-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind("\0" + name)
        left = ground.run(
            root,
            {"service": service},
            state_dir=ground.directory,
            notify_socket="@" + name,
        )
        with pytest.raises(BlockingIOError):
            manager.recv(100, socket.MSG_DONTWAIT)

    assert left == (0, PolicyWord(0, False), b"kept")


# ---- the policy page


def test_the_policy_word_is_raised_one_by_one_and_read_by_everybody_at_once(
    ground: Ground,
) -> None:
    seen = mmap.mmap(-1, mmap.PAGESIZE)  # shared with the fork that the service is

    async def service(boot: BootImage) -> int:
        assert boot.control is not None
        first = await PolicyRead()
        await Send(boot.control, b"ready")
        give_up = await soon()
        while (word := await PolicyRead()).generation == 1:
            assert await Now() < give_up
        seen[0] = 1
        await Send(boot.control, repr((tuple(first), tuple(word))).encode())
        return 0

    async def root(boot: BootImage) -> object:
        assert await PolicyRead() == PolicyWord(0, False)
        assert await PolicyRaise(True) == await PolicyRead() == PolicyWord(1, True)
        await start(boot, "service")
        _ = await Recv((boot.endpoint,), await soon())
        assert await PolicyRaise(False) == PolicyWord(2, False)
        for _ in range(PATIENCE // MILLISECOND):
            if seen[0]:
                break
            select.poll().poll(1)  # init serves nobody meanwhile
        assert seen[0], "without a message, and without init"
        return (await Recv((boot.endpoint,), await soon())).data.decode()

    first, word = eval(ground.run(root, {"service": service}))

    assert (first, word) == ((1, True), (2, False))


def test_a_reader_sees_generation_and_availability_as_one_word() -> None:
    async def service(boot: BootImage) -> int:
        assert boot.control is not None
        await Send(boot.control, b"ready")
        give_up = await soon()
        seen: set[int] = set()
        while len(seen) < GENERATIONS_SEEN and await Now() < give_up:
            for _ in range(100):
                word = await PolicyRead()
                assert word.available == bool(word.generation & 1), word
                seen.add(word.generation)
        return 0 if len(seen) >= GENERATIONS_SEEN else 1

    async def root(boot: BootImage) -> int:
        child = await start(boot, "service")
        _ = await Recv((boot.endpoint,), await soon())
        generation = 0
        while await status_of(Wait(child.pid, NO_WAIT)) is not None:
            for _ in range(100):
                generation += 1
                await PolicyRaise(bool(generation & 1))
        return 0

    ended = run(root, {"service": service})

    assert [row["code"] for row in ended.of(EventKind.EXIT, "service")] == [0]


def test_a_service_cannot_write_the_policy_page() -> None:
    async def writes(boot: BootImage) -> int:
        assert boot.control is not None
        views = [found for found in gc.get_objects() if isinstance(found, IdentityView)]
        arrays: list[Any] = [view.cells.obj for view in views]
        (own,) = (array for array in arrays if array.mapping.pid == os.getpid())
        page = ctypes.addressof(own)
        assert ctypes.c_uint64.from_address(page + 8).value == 3, "the word is there"
        await Send(boot.control, b"found")
        ctypes.c_uint64.from_address(page + 8).value = 99
        return 0

    async def root(boot: BootImage) -> int:
        await PolicyRaise(True)
        child = await start(boot, "writes")
        message = await Recv((boot.endpoint,), await soon())
        assert message.data == b"found"
        ended = await Wait(child.pid, await soon())
        assert await PolicyRead() == PolicyWord(1, True)
        return ended.signal

    assert run(root, {"writes": writes}).exit.code == signal.SIGSEGV


# ---- boot memory


async def _nothing_kept(_boot: BootImage) -> None:
    assert await BootMemoryRead() == b""


def test_boot_memory_outlives_a_boot_and_is_replaced_whole(ground: Ground) -> None:
    largest = bytes(range(256)) * (BOOT_MEMORY_SIZE_MAX // 256)

    async def first(_boot: BootImage) -> None:
        assert await BootMemoryRead() == b""
        await BootMemoryReplace(largest)
        assert await status_of(BootMemoryReplace(largest + b"x")) is Status.INVALID_ARGUMENT
        assert await BootMemoryRead() == largest

    async def second(_boot: BootImage) -> None:
        assert await BootMemoryRead() == largest
        await BootMemoryReplace(b"short")
        assert await BootMemoryRead() == b"short"

    async def third(_boot: BootImage) -> None:
        assert await BootMemoryRead() == b"short"
        await BootMemoryReplace(b"")

    state = ground.directory / "state"  # made by the first that stores something
    for boot in (first, second, third, _nothing_kept):
        ground.run(boot, state_dir=state)

    assert [entry.name for entry in state.iterdir()] == [FILE_NAME]
    assert state.stat().st_mode & 0o777 == 0o700
    assert (state / FILE_NAME).stat().st_mode & 0o777 == 0o600


def test_without_a_state_directory_there_is_no_boot_memory(ground: Ground) -> None:
    async def root(_boot: BootImage) -> object:
        return await status_of(BootMemoryRead()), await status_of(BootMemoryReplace(b"x"))

    assert ground.run(root) == (Status.UNSUPPORTED, Status.UNSUPPORTED)


def test_a_file_somebody_else_wrote_is_given_up_to_the_limit(ground: Ground) -> None:
    (ground.directory / FILE_NAME).write_bytes(b"\xff\x00" * BOOT_MEMORY_SIZE_MAX)
    (ground.directory / FILE_NAME).chmod(0o644)

    async def root(_boot: BootImage) -> bytes:
        return await BootMemoryRead()

    expected = b"\xff\x00" * (BOOT_MEMORY_SIZE_MAX // 2)
    assert ground.run(root, state_dir=ground.directory) == expected


@pytest.mark.parametrize("thing", ["directory", "link", "fifo"])
def test_what_is_no_file_is_not_read_and_not_waited_for(thing: str, tmp_path: Path) -> None:
    path = tmp_path / FILE_NAME
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret")
    if thing == "directory":
        path.mkdir()
    elif thing == "link":
        path.symlink_to(secret)
    else:
        os.mkfifo(path)

    async def root(_boot: BootImage) -> int:
        try:
            return len(await BootMemoryRead())
        except AbiError as refusal:
            return 100 + refusal.status

    expected = 0 if thing == "fifo" else 100 + Status.UNSUPPORTED
    assert run(root, state_dir=tmp_path).exit.code == expected


def test_a_full_disk_is_no_space_and_the_former_content_stays(ground: Ground) -> None:
    async def root(_boot: BootImage) -> object:
        await BootMemoryReplace(b"former")
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
        refused = await status_of(BootMemoryReplace(b"x" * 200))
        return refused, await BootMemoryRead()

    left = ground.run(root, state_dir=ground.directory)

    assert left == (Status.NO_SPACE, b"former")
    assert [entry.name for entry in ground.directory.iterdir()] == [FILE_NAME]


def test_whatever_call_fails_the_content_is_the_former_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    fail_at = 0

    def watched(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **options: Any) -> Any:
            calls.append(name)
            if len(calls) == fail_at:
                raise OSError(errno.ENOSPC, "No space left on device")
            return call(*arguments, **options)

        return wrapper

    memory = BootMemory(tmp_path)
    memory.replace(b"former")
    with monkeypatch.context() as patched:
        for name in ("open", "write", "fsync", "rename"):
            patched.setattr(os, name, watched(name, getattr(os, name)))
        memory.replace(b"latter")
    assert calls == ["open", "open", "write", "fsync", "rename", "fsync"]
    memory.replace(b"former")
    (tmp_path / NEW_NAME).write_bytes(b"of a boot that ended half way")

    for number in range(1, len(calls) + 1):
        fail_at = number
        with monkeypatch.context() as patched:
            for name in ("open", "write", "fsync", "rename"):
                patched.setattr(os, name, watched(name, getattr(os, name)))
            calls.clear()
            with pytest.raises(OSError, match="No space"):
                memory.replace(b"latter")
        last = number == 6
        assert memory.read() == (b"latter" if last else b"former"), calls
        if number > 1:
            assert [entry.name for entry in tmp_path.iterdir()] == [FILE_NAME]


def test_a_state_directory_that_is_made_is_made_durably(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def watched(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    BootMemory(tmp_path / "a" / "b").replace(b"x")

    assert synced == [tmp_path.name, "a", NEW_NAME, "b"]


# ---- sd_notify


@pytest.mark.parametrize("abstract", [False, True])
def test_a_notice_reaches_the_service_manager(ground: Ground, abstract: bool) -> None:
    path = ground.directory / "notify"

    async def root(_boot: BootImage) -> object:
        await Notify("")
        await Notify("READY=1\nSTATUS=söme")
        await Notify("x" * NOTIFY_SIZE_MAX)
        return await status_of(Notify("ö" * (NOTIFY_SIZE_MAX // 2) + "x"))

    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.settimeout(5)
        manager.bind(f"\0{path}" if abstract else str(path))
        if not abstract:
            path.chmod(0o666)
        refused = ground.run(root, notify_socket=f"@{path}" if abstract else str(path))
        assert refused is Status.INVALID_ARGUMENT
        assert manager.recv(1000) == "READY=1\nSTATUS=söme".encode()
        assert manager.recv(1000) == b"x" * NOTIFY_SIZE_MAX
        manager.setblocking(False)
        with pytest.raises(BlockingIOError):
            manager.recv(1000)


def test_a_manager_that_is_gone_or_deaf_is_counted_and_not_waited_for(ground: Ground) -> None:
    name = f"\0nexus-deaf-{os.getpid()}"

    async def gone(_boot: BootImage) -> object:
        await Notify("READY=1")
        return ground.kernel.manager.told, ground.kernel.manager.missed

    async def deaf(_boot: BootImage) -> object:
        started = await Now()
        for _ in range(1000):
            await Notify("WATCHDOG=1")
        manager = ground.kernel.manager
        return await Now() - started, manager.told, manager.missed

    assert ground.run(gone, notify_socket=f"{ground.directory}/none") == (0, 1)
    assert ground.run(gone, notify_socket="no/such" + "x" * 200) == (0, 1)
    assert ground.run(gone, notify_socket=None) == (0, 0)
    assert ground.run(gone, notify_socket="") == (0, 0)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(name)
        took, told, missed = ground.run(deaf, notify_socket="@" + name[1:])
    assert told > 0
    assert missed > 0
    assert told + missed == 1000
    assert took < PATIENCE // 2


# ---- signals


def kill_me(number: int) -> None:
    os.kill(os.getpid(), number)


def test_a_signal_is_a_message_of_the_kernel_to_the_roots_own_endpoint(ground: Ground) -> None:
    async def root(boot: BootImage) -> Message:
        kill_me(signal.SIGTERM)
        return await Recv((boot.endpoint,), NO_WAIT)

    message = ground.run(root)

    assert message.data == b"SIGTERM"
    assert message.data.decode() in list(Signal)
    assert message.sender == Sender(KERNEL, Pid(0), 0, QosClass.NORMAL)
    assert (message.link, message.cap, message.source) == (LinkId(0), None, 1)
    assert message.now > 0


@pytest.mark.parametrize("trace", [False, True])
def test_a_signal_wakes_a_root_that_waits(ground: Ground, trace: bool) -> None:
    async def root(boot: BootImage) -> tuple[bytes, int]:
        started = await Now()
        with subprocess.Popen(["/bin/sh", "-c", "sleep 0.1; kill -INT $PPID"]):
            message = await Recv((boot.endpoint,), await soon())
        return message.data, message.now - started

    data, took = ground.run(root, trace=trace)

    assert data == b"SIGINT"
    assert 90 * MILLISECOND < took < PATIENCE // 2


def test_no_signal_is_lost_between_two_receives_and_a_repeated_one_waits_as_one(
    ground: Ground,
) -> None:
    async def root(boot: BootImage) -> object:
        heard: list[object] = []
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGTERM, signal.SIGTERM):
            kill_me(number)
        await SleepUntil(Nanos(await Now() + MILLISECOND))
        heard += [(await Recv((boot.endpoint,), NO_WAIT)).data for _ in range(2)]
        heard.append(await status_of(Recv((boot.endpoint,), NO_WAIT)))
        kill_me(signal.SIGHUP)
        heard.append((await Recv((boot.endpoint,), NO_WAIT)).data)
        return heard

    assert ground.run(root) == [b"SIGHUP", b"SIGTERM", Status.QUEUE_EMPTY, b"SIGHUP"]


def test_signals_neither_shorten_nor_lengthen_a_wait_for_something_else(ground: Ground) -> None:
    async def root(boot: BootImage) -> object:
        own = await LinkCreate(boot.endpoint)
        script = "for i in 1 2 3 4 5 6 7 8 9; do sleep 0.02; kill -HUP $PPID; done"
        best = []
        for what in ("sleep", "link"):
            late = [late_max]
            while late[-1] >= late_max and len(late) <= ROUNDS_MAX:
                with subprocess.Popen(["/bin/sh", "-c", script]):
                    deadline = Nanos(await Now() + 300 * MILLISECOND)
                    if what == "sleep":
                        await SleepUntil(deadline)
                    else:
                        waits = Recv((boot.endpoint,), deadline, link=own.link)
                        assert await status_of(waits) is Status.TIMED_OUT
                    late.append(await Now() - deadline)
                assert late[-1] >= 0
                assert (await Recv((boot.endpoint,), NO_WAIT)).data == b"SIGHUP"
            best.append(late[-1])
        return best

    late_max = 100 * MILLISECOND  # as late as a signal comes would a wait begun anew be, at least
    assert max(ground.run(root)) < late_max


def test_a_signal_takes_its_turn_among_the_links() -> None:
    async def root(boot: BootImage) -> int:
        own = await LinkCreate(boot.endpoint)
        for _ in range(6):
            await Send(own.slot, b"m")
        kill_me(signal.SIGTERM)
        taken = [(await Recv((boot.endpoint,), NO_WAIT)).data for _ in range(7)]
        return taken.index(b"SIGTERM")

    assert run(root).exit.code <= 1


def test_a_signal_too_long_for_the_receiver_is_not_lost() -> None:
    async def root(boot: BootImage) -> int:
        kill_me(signal.SIGTERM)
        short = Recv((boot.endpoint,), NO_WAIT, size_max=6)
        assert await status_of(short) is Status.INVALID_ARGUMENT
        fits = await Recv((boot.endpoint,), NO_WAIT, size_max=7)
        assert fits.data == b"SIGTERM"
        assert await status_of(Recv((boot.endpoint,), NO_WAIT)) is Status.QUEUE_EMPTY
        return 0

    assert run(root).exit.code == 0


def test_the_signals_are_in_no_account_and_touch_no_service(ground: Ground) -> None:
    async def service(boot: BootImage) -> int:
        assert boot.control is not None
        message = await Recv((boot.endpoint,), await soon())
        await Send(boot.control, message.data)
        return 0

    async def root(boot: BootImage) -> object:
        stats = await TaskStats()
        child = await start(boot, "service")
        kill_me(signal.SIGTERM)
        if os.geteuid() == 0 or ground.user is not None:
            for number in SIGNALS:
                os.kill(child.pid, number)
        await Send(child.slot, b"alive?")
        heard = {(await Recv((boot.endpoint,), await soon())).data for _ in range(2)}
        ended = await Wait(child.pid, await soon())
        return stats.links, stats.queued, heard, ended.code, ended.signal

    assert ground.run(root, {"service": service}) == (0, 0, {b"SIGTERM", b"alive?"}, 0, 0)


@pytest.fixture
def handled() -> Any:
    """What the process's own handlers were called with."""
    calls: list[int] = []
    former = {number: signal.signal(number, lambda got, _: calls.append(got)) for number in SIGNALS}
    yield calls
    for number, handler in former.items():
        signal.signal(number, handler)


def test_a_run_gives_the_mask_and_what_it_was_not_told_back(handled: list[int]) -> None:
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())

    async def deaf(_boot: BootImage) -> int:
        for number in SIGNALS:
            kill_me(number)
        await SleepUntil(Nanos(await Now() + MILLISECOND))
        return len(handled)

    assert run(deaf).exit.code == 0, "no handler runs while the kernel does"

    assert sorted(handled) == [signal.SIGINT, signal.SIGTERM], "too late to tell the root"
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == mask
    kill_me(signal.SIGHUP)
    assert handled[-1] == signal.SIGHUP


def test_an_impatient_second_wish_to_end_does_not_outlive_the_run(handled: list[int]) -> None:
    async def root(boot: BootImage) -> int:
        kill_me(signal.SIGTERM)
        assert (await Recv((boot.endpoint,), NO_WAIT)).data == b"SIGTERM"
        kill_me(signal.SIGTERM)
        kill_me(signal.SIGINT)
        return 0

    assert run(root).exit.code == 0
    assert handled == []


def test_the_mask_is_given_back_when_a_run_is_over_its_time() -> None:
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())

    async def root(_boot: BootImage) -> int:
        await SleepUntil(Nanos(await Now() + 60 * SECOND))
        return 0

    kernel = make([], {})
    with pytest.raises(RunOver):
        kernel.run(program("root", root), b"", until=Nanos(kernel.now + SECOND // 10))

    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == mask


def test_the_roots_of_the_self_tests_leave_the_signals_to_the_system(
    handled: list[int],
) -> None:
    events: list[Any] = []

    def record(event: Any) -> None:
        if event.kind is EventKind.KERNEL and not events:
            kill_me(signal.SIGTERM)
        events.append(event)

    async def root(boot: BootImage) -> int:
        message = await Recv((boot.endpoint,), NO_WAIT)
        return 0 if message.data == b"SIGTERM" else 1

    kernel = make([], {}, selftest=True)
    kernel._record = record
    assert kernel.run(program("root", root), b"", until=Nanos(kernel.now + 10 * SECOND)).code == 0
    assert events
    assert handled == []
