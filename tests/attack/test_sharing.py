"""Shared memory: who watches it, who makes it, and whom a fork would give it to."""

import ctypes
import errno
import fcntl
import mmap
import os
import socket
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final

import pytest

from nexus.abi import (
    PAGE_SIZE,
    AbiError,
    BootImage,
    CapClone,
    CapKind,
    Fence,
    Send,
    Status,
    TaskStats,
    VmoCreate,
    VmoMap,
    VmoShare,
    VmoWatch,
)
from nexus.kernel.linux import driver as drivers
from nexus.kernel.linux import native
from nexus.kernel.linux.driver import SEALS, SHARED_SEALS
from nexus.kernel.linux.frames import Trailer, pack_trailer
from nexus.kernel.linux.native import F_SEAL_FUTURE_WRITE
from nexus.testing.conformance.steps import ended_well, gone, refused, start, take, tell
from nexus.testing.rig import Rig, linux_rig
from tests.attack.hostile import (
    MMAP,
    call,
    driver,
    errno_of,
    report,
    reporting_back,
    result,
    socket_of,
    with_descriptors,
)

pytestmark = pytest.mark.linux

MPROTECT: Final = 10
FALLOCATE: Final = 285
MADVISE: Final = 28
MEMBARRIER: Final = 324
PUNCH_HOLE: Final = 3  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
READ_WRITE: Final = mmap.PROT_READ | mmap.PROT_WRITE
WRITE_ONLY_MAP: Final = mmap.PROT_WRITE


def _address_of(view: memoryview) -> int:
    """Where a view lies, also one that may only be read."""
    array: Any = view.obj
    return ctypes.addressof(array)


def _map(descriptor: int, protection: int) -> int:
    """mmap(2) itself: Python's mmap duplicates the descriptor first, which is refused."""
    return result(MMAP, None, PAGE_SIZE, protection, mmap.MAP_SHARED, descriptor, 0)[1]


def _reopened(descriptor: int) -> int:
    """Write through another open file of the same memory: the errno of what is refused."""
    try:
        again = os.open(f"/proc/self/fd/{descriptor}", os.O_RDWR)
    except OSError as error:
        return error.errno or 0
    try:
        return errno_of(partial(os.write, again, b"x")) or _map(again, READ_WRITE)
    finally:
        os.close(again)


def _tampered(descriptor: int, address: int) -> dict[str, int]:
    """Everything a holder of the descriptor and of a read-only mapping could try."""
    return {
        "map": _map(descriptor, READ_WRITE),
        "map to write": _map(descriptor, WRITE_ONLY_MAP),
        "map to read": _map(descriptor, mmap.PROT_READ),
        "mprotect": call(MPROTECT, address, PAGE_SIZE, READ_WRITE),
        "write": errno_of(partial(os.write, descriptor, b"x")),
        "pwrite": errno_of(partial(os.pwrite, descriptor, b"x", 0)),
        "cut": errno_of(partial(os.ftruncate, descriptor, 0)),
        "grow": errno_of(partial(os.ftruncate, descriptor, 2 * PAGE_SIZE)),
        "punch a hole": call(FALLOCATE, descriptor, PUNCH_HOLE, 0, PAGE_SIZE),
        "seal": errno_of(partial(fcntl.fcntl, descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)),
        "reopen": _reopened(descriptor),
    }


REFUSED: Final = {
    "map": errno.EPERM,
    "map to write": errno.EPERM,
    "map to read": 0,
    "mprotect": errno.EACCES,
    "write": errno.EPERM,
    "pwrite": errno.EPERM,
    "cut": errno.EPERM,
    "grow": errno.EPERM,
    "punch a hole": errno.EPERM,
    "seal": errno.EPERM,
    "reopen": errno.EPERM,
}


async def _tamper_with_what_is_watched(boot: BootImage, _told: Mapping[str, Any]) -> Any:
    given = await take(boot.endpoint)
    assert given.cap is not None
    held: Any = driver().table.entries[given.cap].object
    seen = await VmoWatch(given.cap)
    return _tampered(held.descriptor, _address_of(seen))


def _watcher_tampers(rig: Rig) -> dict[str, int]:
    """What a hostile watcher can do to what root shares with it, and goes on to write."""

    async def root(boot: BootImage) -> Any:
        spawned = await start(boot, "hostile")
        vmo = await VmoCreate(PAGE_SIZE)
        written = await VmoShare(vmo)
        written[:4] = b"mine"
        await Send(spawned.slot, b"{}")
        await Send(spawned.slot, b"look", move=await CapClone(vmo))
        outcome = await report(boot, spawned.link)
        await ended_well(spawned)
        assert bytes(written) == b"mine".ljust(PAGE_SIZE, b"\0"), "nothing was changed"
        written[:4] = b"more"
        seen = await VmoWatch(vmo)
        assert bytes(seen[:4]) == b"more"
        seen.release()
        written.release()
        return outcome

    outcome: dict[str, int] = rig.run(
        root, programs={"hostile": reporting_back(_tamper_with_what_is_watched)}
    )
    return outcome


def test_who_watches_shared_memory_cannot_change_it(linux: Rig) -> None:
    assert _watcher_tampers(linux) == REFUSED


def test_the_seals_alone_keep_who_watches_from_changing_it() -> None:
    """Without the filter, as root: not the descriptor but the object refuses."""
    assert _watcher_tampers(linux_rig(harden=False)) == REFUSED


def test_without_the_seals_who_watches_changes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drivers, "SHARED_SEALS", fcntl.F_SEAL_GROW)

    async def hostile(boot: BootImage) -> None:
        given = await take(boot.endpoint)
        assert given.cap is not None
        held: Any = driver().table.entries[given.cap].object
        os.pwrite(held.descriptor, b"not mine", 0)

    async def root(boot: BootImage) -> None:
        spawned = await start(boot, "hostile")
        vmo = await VmoCreate(PAGE_SIZE)
        written = await VmoShare(vmo)
        await Send(spawned.slot, b"look", move=await CapClone(vmo))
        await ended_well(spawned)
        assert bytes(written[:8]) == b"not mine"
        written.release()

    linux_rig().run(root, programs={"hostile": hostile})


def test_its_own_writer_cannot_change_its_length_or_map_it_again(linux: Rig) -> None:
    """A reader maps what a hostile task has shared: a shorter object would kill the reader."""

    async def hostile(boot: BootImage) -> None:
        vmo = await VmoCreate(PAGE_SIZE)
        written = await VmoShare(vmo)
        held: Any = driver().table.entries[vmo].object
        seen = await VmoWatch(vmo)
        outcome = _tampered(held.descriptor, _address_of(seen))
        assert outcome == REFUSED, outcome
        written[:4] = b"open"
        assert bytes(seen[:4]) == b"open"

    async def root(boot: BootImage) -> None:
        await ended_well(await start(boot, "hostile"))

    linux.run(root, programs={"hostile": hostile})


# ---- who makes it is hostile


def _memory(seals: int, length: int = PAGE_SIZE) -> int:
    descriptor = os.memfd_create("theirs", os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, length)
    if seals:
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    return descriptor


def _write_only() -> int:
    """Only an unconfined task can open such a descriptor."""
    descriptor = _memory(SHARED_SEALS)
    again = os.open(f"/proc/self/fd/{descriptor}", os.O_WRONLY)
    os.close(descriptor)
    return again


SHRINK, GROW, SEAL = fcntl.F_SEAL_SHRINK, fcntl.F_SEAL_GROW, fcntl.F_SEAL_SEAL
FUTURE: Final = F_SEAL_FUTURE_WRITE
GIFTS: Final[dict[str, Callable[[], int]]] = {
    "no seal": lambda: _memory(0),
    "it may shrink": lambda: _memory(FUTURE | GROW | SEAL),
    "it may grow": lambda: _memory(FUTURE | SHRINK | SEAL),
    "it may be mapped to write": lambda: _memory(SHRINK | GROW | SEAL),
    "it may be sealed on": lambda: _memory(FUTURE | SHRINK | GROW),
    "part of a page": lambda: _memory(SHARED_SEALS, PAGE_SIZE + 1),
    "nothing": lambda: _memory(SHARED_SEALS, 0),
}


def _given(rig: Rig, make: Callable[[], int]) -> tuple[int, list[str]]:
    """Let a service hand root a descriptor as a memory object, raw: how many capabilities root
    refused, and what it could do with one that it took."""

    async def hostile(boot: BootImage) -> None:
        assert boot.control is not None
        descriptor = make()
        claim = pack_trailer(Trailer(CapKind.VMO, length=PAGE_SIZE))
        assert with_descriptors(socket_of(boot.control), b"gift" + claim, [descriptor]) == 0
        os.close(descriptor)
        socket_of(boot.control).send(b"honest")

    async def root(boot: BootImage) -> tuple[int, list[str]]:
        before = await TaskStats()
        spawned = await start(boot, "hostile")
        message = await take(boot.endpoint, link=spawned.link)
        taken = []
        if message.cap is not None:
            for name, trap in (("watch", VmoWatch(message.cap)), ("map", VmoMap(message.cap))):
                try:
                    view = await trap
                except AbiError as refusal:
                    assert refusal.status is Status.PERMISSION_DENIED, (name, refusal)
                else:
                    taken.append(name)
                    view.release()
            message = await take(boot.endpoint, link=spawned.link)
        assert message.data == b"honest"
        await ended_well(spawned)
        return (await TaskStats()).refused_caps - before.refused_caps, taken

    refusals, taken = rig.run(root, programs={"hostile": hostile})
    return refusals, taken


@pytest.mark.parametrize("gift", GIFTS)
def test_memory_that_is_not_what_a_capability_promises_is_dropped(linux: Rig, gift: str) -> None:
    assert _given(linux, GIFTS[gift]) == (1, [])


def test_memory_that_nothing_could_map_is_dropped() -> None:
    assert _given(linux_rig(harden=False), _write_only) == (1, [])


def test_memory_that_is_sealed_and_memory_that_is_shared_are_told_apart(linux: Rig) -> None:
    """The seals say which it is, whatever the sender says."""
    assert _given(linux, lambda: _memory(SHARED_SEALS)) == (0, ["watch"])
    assert _given(linux, lambda: _memory(SEALS)) == (0, ["map"])
    assert _given(linux, lambda: _memory(SEALS | FUTURE)) == (0, ["map"])


@pytest.mark.parametrize("word", ["sealed", "shared"])
def test_a_task_that_calls_its_memory_shared_is_not_believed(linux: Rig, word: str) -> None:
    async def hostile(boot: BootImage) -> None:
        vmo = await VmoCreate(PAGE_SIZE)
        held: Any = driver().table.entries[vmo].object
        setattr(held, word, True)
        await tell(boot, b"gift", move=vmo)

    async def root(boot: BootImage) -> int:
        before = await TaskStats()
        spawned = await start(boot, "hostile")
        await ended_well(spawned)
        await gone(boot.endpoint, spawned.link)
        return (await TaskStats()).refused_caps - before.refused_caps

    assert linux.run(root, programs={"hostile": hostile}) == 1


# ---- a fork


async def _look_at_inits(boot: BootImage, told: Mapping[str, Any]) -> Any:
    """Which mappings of init's stand here too, by what is in them: something else may have their
    address by now. One of its own does."""
    own = await VmoShare(await VmoCreate(PAGE_SIZE))
    own[: len(OWN_MARK)] = OWN_MARK
    found = {"own": _begins(_address_of(own), OWN_MARK)}
    found |= {name: _begins(address, MARK) for name, address in told.items()}
    if found["written"]:
        ctypes.memset(told["written"], ord("x"), 1)
    return found


MARK: Final = b"nobody else's memory begins so"
OWN_MARK: Final = b"but this one so"


def _begins(address: int, mark: bytes) -> bool:
    """Whether something is mapped there that begins with these bytes."""
    mapped = not call(MADVISE, address, PAGE_SIZE, mmap.MADV_NORMAL)
    return mapped and ctypes.string_at(address, len(mark)) == mark


def _inherited(rig: Rig) -> tuple[dict[str, bool], bytes]:
    """Which of root's mappings a forked service has, and what root finds in its own then."""

    async def root(boot: BootImage) -> Any:
        vmo = await VmoCreate(PAGE_SIZE)
        written = await VmoShare(vmo)
        written[: len(MARK)] = MARK
        seen = await VmoWatch(vmo)
        spawned = await start(boot, "hostile")
        told = f'{{"written": {_address_of(written)}, "seen": {_address_of(seen)}}}'
        await Send(spawned.slot, told.encode())
        outcome = await report(boot, spawned.link)
        await ended_well(spawned)
        left = bytes(written[: len(MARK)])
        seen.release()
        written.release()
        return outcome, left

    found, left = rig.run(root, programs={"hostile": reporting_back(_look_at_inits)})
    return found, left


def test_a_forked_service_has_no_mapping_of_inits(linux: Rig) -> None:
    found, left = _inherited(linux)

    assert found == {"own": True, "written": False, "seen": False}
    assert left == MARK


def test_without_the_advice_a_fork_would_write_inits_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(native, "_madvise", lambda *_: 0)

    found, left = _inherited(linux_rig())

    assert found == {"own": True, "written": True, "seen": True}
    assert left == b"x" + MARK[1:]


def test_a_child_that_lets_inits_view_go_unmaps_nothing() -> None:
    """The address may be another mapping's by then."""

    async def root(boot: BootImage) -> None:
        written = await VmoShare(await VmoCreate(PAGE_SIZE))
        address = _address_of(written)
        near, far = socket.socketpair()
        pid = os.fork()
        if pid == 0:
            fixed = mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | 0x10  # MAP_FIXED
            _, error = result(MMAP, address, PAGE_SIZE, READ_WRITE, fixed, -1, 0)
            written.release()
            del written
            stands = call(MADVISE, address, PAGE_SIZE, mmap.MADV_NORMAL)
            near.send(b"%d %d" % (error, stands))
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        assert far.recv(100) == b"0 0"
        near.close()
        far.close()
        written[0] = 1
        written.release()

    linux_rig().run(root)


# ---- barriers


async def _barriers(boot: BootImage, _told: Mapping[str, Any]) -> Any:
    await Fence()
    return [call(MEMBARRIER, command, 0, 0) for command in (0, 1, 2, 4, 8, 16, 32, 64, 128, 256)]


def test_a_service_has_its_own_barriers_and_no_others(linux: Rig) -> None:
    async def root(boot: BootImage) -> Any:
        spawned = await start(boot, "hostile")
        await Send(spawned.slot, b"{}")
        outcome = await report(boot, spawned.link)
        await ended_well(spawned)
        return outcome

    outcome = linux.run(root, programs={"hostile": reporting_back(_barriers)})

    # Asking what there is, stopping every CPU, and what only a process's own threads would need.
    assert outcome == [errno.EPERM, errno.EPERM, 0, 0, *[errno.EPERM] * 6]


def test_a_fence_on_a_machine_without_barriers_is_unsupported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing(_command: int) -> int:
        raise OSError(errno.ENOSYS, "membarrier")

    monkeypatch.setattr(drivers, "membarrier", missing)

    async def root(boot: BootImage) -> None:
        await refused(Fence(), Status.UNSUPPORTED)
        spawned = await start(boot, "fences")
        await ended_well(spawned)

    async def fences(boot: BootImage) -> None:
        await refused(Fence(), Status.UNSUPPORTED)

    linux_rig().run(root, programs={"fences": fences})
