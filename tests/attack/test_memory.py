"""Memory and descriptors: a sibling's, the identity table's, and those init had before the fork."""

import ctypes
import errno
import fcntl
import mmap
import os
import signal
import socket
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest

from nexus.abi import (
    HEAP_SIZE,
    MEMORY_SIZE_DEFAULT,
    BootImage,
    Grants,
    Send,
    VmoCreate,
    VmoMap,
    VmoSeal,
    VmoWrite,
)
from nexus.kernel.linux import harden
from nexus.kernel.linux.native import F_SEAL_FUTURE_WRITE
from nexus.testing.conformance.steps import ended, ended_well, start, take, tell
from nexus.testing.rig import Rig, linux_rig
from tests.attack.grounds import EVERYWHERE, FORK, with_programs
from tests.attack.hostile import (
    MIB,
    MMAP,
    call,
    driver,
    errno_of,
    open_descriptors,
    report,
    reporting_back,
    result,
    socket_of,
)

pytestmark = pytest.mark.linux

SECRET: Final = b"the prey's secret 0123456789abcdef"
PROCESS_VM_READV: Final = 310
PROCESS_VM_WRITEV: Final = 311
PTRACE: Final = 101
PTRACE_SEIZE: Final = 0x4206
PIDFD_OPEN: Final = 434
PIDFD_GETFD: Final = 438
MPROTECT: Final = 10
MREMAP: Final = 25
F_GET_SEALS: Final = 1034
PYBUF_FULL_RO: Final = 0x11C  # CPython's pybuffer.h


class _Iovec(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("size", ctypes.c_size_t)]  # type: ignore[mutable-override]


def _open(path: str) -> None:
    os.close(os.open(path, os.O_RDONLY))


def _raid(_boot: BootImage, told: Mapping[str, Any]) -> dict[str, Any]:
    """Try to read and write the prey's secret by every way there is."""
    pid, address = told["pid"], told["address"]
    size = len(SECRET)
    buffer = ctypes.create_string_buffer(size)
    local = _Iovec(ctypes.addressof(buffer), size)
    remote = _Iovec(address, size)
    outcome: dict[str, Any] = {}

    def vm(number: int) -> int:
        return call(number, pid, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0)

    outcome["process_vm_readv"] = vm(PROCESS_VM_READV)
    outcome["read"] = buffer.raw == SECRET
    outcome["process_vm_writev"] = vm(PROCESS_VM_WRITEV)
    for name in ("mem", "maps", "environ", "fd/0", "ns/pid", "root"):
        path = f"/proc/{pid}/{name}"
        outcome[f"open {name}"] = errno_of(partial(_open, path))
    outcome["ptrace"] = call(PTRACE, PTRACE_SEIZE, pid, 0, 0)
    pidfd, outcome["pidfd_open"] = result(PIDFD_OPEN, pid, 0)
    outcome["pidfd_getfd"] = call(PIDFD_GETFD, pidfd, 0, 0)
    outcome["kill"] = call(62, pid, 0)
    return outcome


def _raided(rig: Rig) -> dict[str, Any]:
    async def prey(boot: BootImage) -> None:
        secret = ctypes.create_string_buffer(SECRET, len(SECRET))
        await tell(boot, b"%d" % ctypes.addressof(secret))
        await take(boot.endpoint)
        assert secret.raw == SECRET, "the secret is as it was"

    async def root(boot: BootImage) -> Any:
        victim = await start(boot, "prey")
        address = int((await take(boot.endpoint)).data)
        spawned = await start(boot, "hostile")
        await Send(spawned.slot, b'{"pid": %d, "address": %d}' % (victim.pid, address))
        outcome = await report(boot, spawned.link)
        await ended_well(spawned)
        await Send(victim.slot, b"end")
        await ended_well(victim)
        return outcome

    outcome: dict[str, Any] = rig.run(
        root, programs={"hostile": reporting_back(_raid), "prey": prey}
    )
    return outcome


def test_a_siblings_memory_is_out_of_reach(linux: Rig) -> None:
    outcome = _raided(linux)

    assert outcome.pop("read") is False
    assert {name: error for name, error in outcome.items() if error != errno.EPERM} == {}


def test_a_siblings_memory_is_in_reach_without_hardening() -> None:
    if os.getuid():
        pytest.skip("how much an ordinary user may trace is a setting of the machine")
    outcome = _raided(linux_rig(harden=False))

    assert outcome.pop("read") is True
    assert outcome.pop("open fd/0") in {0, errno.ENXIO, errno.ENOENT}
    outcome.pop("pidfd_getfd")
    assert {name: error for name, error in outcome.items() if error} == {}


def test_a_sibling_is_out_of_reach_for_any_process_of_its_user(linux: Rig) -> None:
    """Not only the filter: the prey is not dumpable, so even its user's own shell is refused."""

    async def prey(boot: BootImage) -> None:
        await take(boot.endpoint)

    async def root(boot: BootImage) -> Any:
        victim = await start(boot, "prey")
        status = Path(f"/proc/{victim.pid}/status").stat()
        owner = status.st_uid
        user = _uid_of(victim.pid)
        pid = os.fork()
        if pid == 0:
            code = 0
            try:
                if os.getuid() == 0:
                    os.setgroups([])
                    os.setresgid(user, user, user)
                    os.setresuid(user, user, user)
                if errno_of(partial(_open, f"/proc/{victim.pid}/mem")):
                    code |= 1
                pidfd = os.pidfd_open(victim.pid)
                if call(PIDFD_GETFD, pidfd, 0, 0) == errno.EPERM:
                    code |= 2
            finally:
                os._exit(code)
        _, raised = os.waitpid(pid, 0)
        await Send(victim.slot, b"end")
        await ended_well(victim)
        return owner, os.waitstatus_to_exitcode(raised)

    owner, code = linux.run(root, programs={"prey": prey})

    # Linux gives the /proc entries of an undumpable process to root.
    assert owner == 0
    assert code == 3


def _uid_of(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("Uid:"):
            return int(line.split()[1])
    raise AssertionError("no Uid line")


def test_a_service_has_no_capabilities_and_no_way_to_new_ones(linux: Rig) -> None:
    async def prey(boot: BootImage) -> None:
        await take(boot.endpoint)

    async def root(boot: BootImage) -> Any:
        victims = [await start(boot, name, program="prey") for name in ("one", "two")]
        status = [
            dict(
                line.split(":\t", 1)
                for line in Path(f"/proc/{victim.pid}/status").read_text().splitlines()
                if ":\t" in line
            )
            for victim in victims
        ]
        for victim in victims:
            await Send(victim.slot, b"end")
            await ended_well(victim)
        return status

    for status in linux.run(root, programs={"prey": prey}):
        for field in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
            assert int(status[field], 16) == 0, field
        assert status["NoNewPrivs"] == "1"
        assert status["Seccomp"] == "2"
        assert status["Threads"] == "1"
        assert "0" not in status["Uid"].split()


def _table_mapping() -> tuple[int, int]:
    view = driver()._view.cells
    return _address_of(view), view.nbytes


class _PyBuffer(ctypes.Structure):
    _fields_ = [  # type: ignore[mutable-override]
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.c_void_p),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    ]


def _address_of(view: memoryview) -> int:
    buffer = _PyBuffer()
    ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(view), ctypes.byref(buffer), PYBUF_FULL_RO)
    address = int(buffer.buf or 0)
    ctypes.pythonapi.PyBuffer_Release(ctypes.byref(buffer))
    return address


def _sealed_files() -> list[int]:
    found = []
    for descriptor in open_descriptors():
        try:
            fcntl.fcntl(descriptor, F_GET_SEALS)
        except OSError:
            continue
        found.append(descriptor)
    return found


def _tamper(_boot: BootImage, _told: Mapping[str, Any]) -> dict[str, Any]:
    """Try to make the identity table writable, and a table of one's own for comparison."""
    address, size = _table_mapping()
    outcome: dict[str, Any] = {
        "mprotect": call(MPROTECT, address, size, mmap.PROT_READ | mmap.PROT_WRITE),
        "held": len(_sealed_files()),
        "mremap": call(MREMAP, address, size, size * 2, 0),
    }
    for descriptor in _sealed_files():
        outcome[f"write {descriptor}"] = errno_of(partial(os.write, descriptor, b"x"))
        outcome[f"map {descriptor}"] = _map(descriptor, mmap.PROT_READ | mmap.PROT_WRITE)[1]
        outcome[f"cut {descriptor}"] = errno_of(partial(os.ftruncate, descriptor, 0))
    mine = os.memfd_create("mine", os.MFD_ALLOW_SEALING)
    os.ftruncate(mine, 4096)
    own, outcome["control: read"] = _map(mine, mmap.PROT_READ)
    outcome["control: write"] = _map(mine, mmap.PROT_READ | mmap.PROT_WRITE)[1]
    outcome["control: mprotect"] = call(MPROTECT, own, 4096, mmap.PROT_READ | mmap.PROT_WRITE)
    theirs = os.memfd_create("theirs", os.MFD_ALLOW_SEALING)
    os.ftruncate(theirs, 4096)
    fcntl.fcntl(theirs, fcntl.F_ADD_SEALS, F_SEAL_FUTURE_WRITE)
    sealed, outcome["control: sealed read"] = _map(theirs, mmap.PROT_READ)
    outcome["control: sealed write"] = _map(theirs, mmap.PROT_READ | mmap.PROT_WRITE)[1]
    outcome["control: sealed mprotect"] = call(MPROTECT, sealed, 4096, mmap.PROT_WRITE)
    return outcome


def _map(descriptor: int, protection: int) -> tuple[int, int]:
    """mmap(2) itself: Python's mmap duplicates the descriptor first, which is refused."""
    return result(MMAP, None, 4096, protection, mmap.MAP_SHARED, descriptor, 0)


def test_the_identity_table_cannot_be_made_writable(linux: Rig) -> None:
    async def root(boot: BootImage) -> Any:
        spawned = await start(boot, "hostile")
        await Send(spawned.slot, b"{}")
        outcome = await report(boot, spawned.link)
        await ended_well(spawned)
        return outcome

    outcome = linux.run(root, programs={"hostile": reporting_back(_tamper)})

    assert outcome.pop("mprotect") == errno.EACCES
    assert outcome.pop("held") == 0, "no descriptor of the table is left to try"
    assert outcome.pop("mremap") in {errno.EFAULT, errno.EINVAL, errno.EPERM, errno.ENOMEM}
    for name in ("read", "write", "mprotect", "sealed read"):
        assert outcome.pop(f"control: {name}") == 0, name
    assert outcome.pop("control: sealed write") == errno.EPERM
    assert outcome.pop("control: sealed mprotect") == errno.EACCES
    assert outcome == {}


def test_a_write_to_the_identity_table_kills_the_writer_and_changes_nothing(linux: Rig) -> None:
    async def hostile(boot: BootImage) -> None:
        await tell(boot, b"before")
        address, size = _table_mapping()
        ctypes.memset(address, 0xFF, size)
        await tell(boot, b"I wrote it")

    async def root(boot: BootImage) -> None:
        spawned = await start(boot, "hostile")
        info = await ended(spawned)
        assert info.signal == signal.SIGSEGV
        message = await take(boot.endpoint)
        assert message.data == b"before"
        assert message.sender.service == spawned.service

    linux.run(root, programs={"hostile": hostile})


def test_a_sealed_vmo_cannot_be_changed_by_its_maker_or_its_taker(linux: Rig) -> None:
    def change(descriptor: int, address: int) -> dict[str, int]:
        return {
            "write": errno_of(lambda: os.pwrite(descriptor, b"x", 0)),
            "map": _map(descriptor, mmap.PROT_READ | mmap.PROT_WRITE)[1],
            "map to read": _map(descriptor, mmap.PROT_READ)[1],
            "cut": errno_of(lambda: os.ftruncate(descriptor, 0)),
            "grow": errno_of(lambda: os.ftruncate(descriptor, 8192)),
            "mprotect": call(MPROTECT, address, 4096, mmap.PROT_READ | mmap.PROT_WRITE),
        }

    async def hostile(boot: BootImage) -> None:
        given = await take(boot.endpoint)
        assert given.cap is not None
        theirs: Any = driver().table.entries[given.cap].object
        view = await VmoMap(given.cap)
        outcome = change(theirs.descriptor, _address_of(view))
        own = await VmoCreate(4096)
        mine: Any = driver().table.entries[own].object
        await VmoWrite(own, 0, b"mine")
        await VmoSeal(own)
        mapped = await VmoMap(own)
        outcome_own = change(mine.descriptor, _address_of(mapped))
        assert bytes(mapped[:4]) == b"mine"
        assert outcome == outcome_own == {
            "write": errno.EPERM, "map": errno.EPERM, "cut": errno.EPERM, "grow": errno.EPERM,
            "map to read": 0, "mprotect": errno.EACCES,
        }, (outcome, outcome_own)  # fmt: skip

    async def root(boot: BootImage) -> None:
        spawned = await start(boot, "hostile")
        vmo = await VmoCreate(4096)
        await VmoSeal(vmo)
        await Send(spawned.slot, b"look", move=vmo)
        await ended_well(spawned)

    linux.run(root, programs={"hostile": hostile})


def _list_descriptors(_boot: BootImage, _told: Mapping[str, Any]) -> dict[str, Any]:
    found = open_descriptors()
    return {
        "kinds": {str(number): kind for number, kind in found.items()},
        "high": [n for n in found if n >= 512],
    }


def _descriptors(rig: Rig) -> tuple[dict[str, Any], list[int]]:
    """What a service has open when init had files, pipes, sockets and directories open."""

    async def root(boot: BootImage) -> Any:
        planted = [os.open("/etc/passwd", os.O_RDONLY), os.open("/", os.O_RDONLY)]
        planted += os.pipe()
        left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        planted += [left.fileno(), right.fileno()]
        for descriptor in planted:
            os.set_inheritable(descriptor, True)
        high = fcntl.fcntl(planted[0], fcntl.F_DUPFD, 700)
        planted.append(high)
        other = await start(boot, "other")
        spawned = await start(boot, "hostile")
        await Send(spawned.slot, b"{}")
        outcome = await report(boot, spawned.link)
        await ended_well(spawned)
        await Send(other.slot, b"end")
        await ended_well(other)
        return outcome, planted

    async def other(boot: BootImage) -> None:
        await take(boot.endpoint)

    outcome: tuple[dict[str, Any], list[int]] = rig.run(
        root, programs={"hostile": reporting_back(_list_descriptors), "other": other}
    )
    return outcome


def test_only_granted_descriptors_are_open(linux: Rig) -> None:
    outcome, _ = _descriptors(linux)

    kinds = {int(number): kind for number, kind in outcome["kinds"].items()}
    assert outcome["high"] == []
    assert not {"directory", "disk", "file"} & set(kinds.values()), kinds
    beyond = {number: kind for number, kind in kinds.items() if number > 2}
    # Control link, own endpoint's link, kernel channel; timer, idle set, endpoint's set.
    assert sum(kind == "socket" for kind in beyond.values()) == 3, kinds
    assert set(beyond.values()) <= {"socket", "anonymous"}
    assert len(beyond) <= 8


def test_a_planted_descriptor_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harden, "close_descriptors_except", lambda _kept: None)

    outcome, planted = _descriptors(linux_rig())

    kinds = {int(number): kind for number, kind in outcome["kinds"].items()}
    assert {"directory", "file", "pipe"} <= set(kinds.values())
    assert planted[-1] in outcome["high"]


def test_a_socket_of_a_service_reaches_no_other_socket(linux: Rig) -> None:
    def reach(boot: BootImage, _told: Mapping[str, Any]) -> dict[str, int]:
        assert boot.control is not None
        link = socket_of(boot.control)
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        assert near.send(b"control: one's own pair works") > 0
        assert far.recv(100).startswith(b"control")
        return {
            "sendto a path": errno_of(lambda: near.sendto(b"x", "/run/systemd/notify")),
            "sendto an abstract name": errno_of(lambda: near.sendto(b"x", b"\0name")),
            "connect": errno_of(lambda: link.connect("/run/systemd/notify")),
            "bind": errno_of(lambda: near.bind(b"\0name")),
            "shutdown": errno_of(lambda: near.shutdown(2)),
        }

    async def root(boot: BootImage) -> Any:
        spawned = await start(boot, "hostile")
        await Send(spawned.slot, b"{}")
        outcome = await report(boot, spawned.link)
        await ended_well(spawned)
        return outcome

    outcome = linux.run(root, programs={"hostile": reporting_back(reach)})

    assert outcome["connect"] == outcome["bind"] == outcome["shutdown"] == errno.EPERM
    # A connected SEQPACKET end has one peer; Linux ignores or refuses another address.
    assert outcome["sendto a path"] in {0, errno.EISCONN, errno.EPERM}


def _hoarded(rig: Rig, grants: Grants = FORK) -> dict[str, Any]:
    async def root(boot: BootImage) -> Any:
        spawned = await start(boot, "hoards", grants=grants)
        await Send(spawned.slot, b"{}")
        outcome = await report(boot, spawned.link)
        await ended_well(spawned)
        return outcome

    outcome: dict[str, Any] = with_programs(rig).run(root)
    return outcome


@EVERYWHERE
def test_a_service_cannot_take_memory_beyond_its_budget_and_margin(
    linux: Rig, grants: Grants
) -> None:
    taken = _hoarded(linux, grants)

    most = (MEMORY_SIZE_DEFAULT + 2 * HEAP_SIZE) // MIB + 1
    assert 8 < taken["private"] <= most
    assert 8 < taken["shared"] <= most
    assert taken["object"] == errno.EFBIG


def test_without_the_limits_the_memory_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harden.Hardening, "_memory", lambda _self: None)

    assert _hoarded(linux_rig()) == {"private": 300, "shared": 300, "object": 0}
