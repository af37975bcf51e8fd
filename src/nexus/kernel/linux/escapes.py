"""What a hostile service tries, and which wall refuses it: the table that `nexus doctor`, the
attack suite and a proof run share.

Each attempt is a plain function on the process it runs in. It harms nobody where it succeeds:
paths do not exist or are read only by everybody, signals have number 0, a forked child ends.
Behind the first wall stands a second for most: `beyond` is what meets a process whose system call
filter is missing.
"""

import ctypes
import errno
import gc
import json
import mmap
import os
import resource
import socket
import struct
from collections.abc import Callable, Coroutine
from enum import StrEnum
from typing import Any, Final, NamedTuple

from nexus.abi import (
    VMO_SIZE_MAX,
    BootImage,
    LinkId,
    Nanos,
    Now,
    Recv,
    Send,
    ServiceId,
    Slot,
    Trap,
)
from nexus.kernel.linux.identity import POLICY, IdentityView
from nexus.kernel.linux.native import LIBC, MACHINE, environment_strings, syscall

DONE: Final = "done"  # outcome of an attempt that nothing refused
PATIENCE: Final = Nanos(5_000_000_000)  # nanoseconds for the driver's side of an attempt
PART_SIZE: Final = 3000  # bytes of a report per message of the control link
READABLE: Final = "/etc/passwd"  # by everybody, so that only a wall refuses it
ABSTRACT: Final = b"\0nexus-escape"
MEMORY_MANY: Final = 8 << 30  # bytes; far above any budget with its margin, and an import's limit
MAP_NORESERVE: Final = 0x4000  # or Linux itself refuses so much on a small machine
OBJECT_LARGE: Final = 1 << 26  # bytes; above every memory object
OBJECTS_MANY: Final = 256  # of the largest size: four times what a service may map
DESCRIPTORS_MANY: Final = 4096  # above every limit of a service
PROC_MEMORY: Final = "mem"
PTRACE_SEIZE: Final = 0x4206
PTRACE_DETACH: Final = 17
IPC_PRIVATE: Final = 0
KEYCTL_GET_KEYRING_ID: Final = 0
KEY_SPEC_PROCESS_KEYRING: Final = -2
# Numbers on x86_64 and in the generic table, for what the C library has no function for.
KEYCTL: Final = {"x86_64": 250}
KEYCTL_GENERIC: Final = 219
IO_URING_SETUP: Final = 425
PIDFD_OPEN: Final = 434
_IOVEC: Final = struct.Struct("@PN")
_CREDENTIALS: Final = struct.Struct("=iII")


class Wall(StrEnum):
    """What refuses."""

    FILTER = "seccomp"
    LANDLOCK = "landlock"
    LIMITS = "limits"
    IDS = "ids"
    SEALS = "seals"
    NONE = "none"


class Target(NamedTuple):
    """What there is to attack."""

    sibling: int  # pid of another service


class Attempt(NamedTuple):
    """One way out: who is meant to refuse it and how, and who stands behind that."""

    name: str
    run: Callable[[Target], None]  # raises OSError where it is refused
    wall: Wall
    refusal: str  # name of the errno
    behind: Wall  # without the filter
    beyond: str


def _open_path(_target: Target) -> None:
    os.close(os.open(READABLE, os.O_RDONLY))


def _list_directory(_target: Target) -> None:
    _ = os.listdir("/")  # noqa: PTH208 (the plainest way to the call)


def _datagram_to_path(_target: Target) -> None:
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with left, right:
        _reached(lambda: left.sendto(b"x", "/run/nexus-escape"))


def _datagram_to_name(_target: Target) -> None:
    """An abstract one. Where somebody outside listens at it, Landlock is a second wall."""
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with left, right:
        _reached(lambda: left.sendto(b"x", ABSTRACT))


def _pair_to_path(_target: Target) -> None:
    """Through the only kind of pair that is allowed: it is connected for ever."""
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with left, right:
        _ = _checked(LIBC.connect(left.fileno(), b"\1\0/run/nexus-escape\0", 20))


def _stream_pair(_target: Target) -> None:
    for end in socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM):
        end.close()


def _unix_socket(_target: Target) -> None:
    """How the operator's socket would be reached."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as end:
        _reached(lambda: end.connect("/run/nexus-escape"))


def _tcp_socket(_target: Target) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as end:
        _reached(lambda: end.connect(("127.0.0.1", 9)))


def _udp_socket(_target: Target) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as end:
        _reached(lambda: end.sendto(b"x", ("127.0.0.1", 9)))


def _netlink_socket(_target: Target) -> None:
    socket.socket(socket.AF_NETLINK, socket.SOCK_RAW).close()


def _sysv_memory(_target: Target) -> None:
    made = _checked(LIBC.shmget(IPC_PRIVATE, mmap.PAGESIZE, 0o600))
    _ = LIBC.shmctl(made, 0, None)  # IPC_RMID


def _sysv_queue(_target: Target) -> None:
    made = _checked(LIBC.msgget(IPC_PRIVATE, 0o600))
    _ = LIBC.msgctl(made, 0, None)


def _io_uring(_target: Target) -> None:
    os.close(syscall(IO_URING_SETUP, 1, ctypes.create_string_buffer(256)))


def _keyring(_target: Target) -> None:
    number = KEYCTL.get(MACHINE, KEYCTL_GENERIC)
    _ = syscall(number, KEYCTL_GET_KEYRING_ID, KEY_SPEC_PROCESS_KEYRING, 1)


def _execute(_target: Target) -> None:
    _reached(lambda: os.execv("/nexus-escape", ["nexus-escape"]))  # noqa: S606 (there is none)


def _fork(_target: Target) -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    _ = os.waitpid(child, 0)


def _thread(_target: Target) -> None:
    """By the C library itself: Python keeps no errno. The thread runs getpid and ends."""
    thread = ctypes.c_void_p()
    refused = LIBC.pthread_create(ctypes.byref(thread), None, LIBC.getpid, None)
    if refused:
        raise OSError(refused, os.strerror(refused))
    _ = LIBC.pthread_join(thread, None)


def _trace_sibling(target: Target) -> None:
    _ = _checked(LIBC.ptrace(PTRACE_SEIZE, target.sibling, None, None))
    _ = LIBC.ptrace(PTRACE_DETACH, target.sibling, None, None)


def _read_sibling(target: Target) -> None:
    """By process_vm_readv; address 8 is nobody's, and EFAULT comes after the permission."""
    here = ctypes.create_string_buffer(8)
    local = _IOVEC.pack(ctypes.addressof(here), 8)
    remote = _IOVEC.pack(8, 8)
    read = LIBC.process_vm_readv
    _reached(lambda: _checked(read(target.sibling, local, 1, remote, 1, 0)))


def _open_sibling_memory(target: Target) -> None:
    os.close(os.open(f"/proc/{target.sibling}/{PROC_MEMORY}", os.O_RDONLY))


def _open_sibling_environment(target: Target) -> None:
    with open(f"/proc/{target.sibling}/environ", "rb") as file:  # noqa: PTH123 (the plain call)
        _ = file.read()


def _signal_sibling(target: Target) -> None:
    os.kill(target.sibling, 0)


def _pidfd_sibling(target: Target) -> None:
    os.close(syscall(PIDFD_OPEN, target.sibling, 0))


def _raise_priority(_target: Target) -> None:
    os.setpriority(os.PRIO_PROCESS, 0, os.getpriority(os.PRIO_PROCESS, 0))


def _become_root(_target: Target) -> None:
    os.setresuid(0, 0, 0)


def _forge_credentials(target: Target) -> None:
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with left, right:
        forged = _CREDENTIALS.pack(target.sibling, os.getuid(), os.getgid())
        ancillary = [(socket.SOL_SOCKET, socket.SCM_CREDENTIALS, forged)]
        _ = left.sendmsg([b"x"], ancillary, socket.MSG_DONTWAIT)


def _take_descriptors(_target: Target) -> None:
    taken: list[int] = []
    try:
        while len(taken) < DESCRIPTORS_MANY:
            taken.append(os.memfd_create("escape"))
    finally:
        for descriptor in taken:
            os.close(descriptor)


def _take_memory(_target: Target) -> None:
    mmap.mmap(-1, MEMORY_MANY, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE).close()


def _take_shared_memory(_target: Target) -> None:
    mmap.mmap(-1, MEMORY_MANY, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | MAP_NORESERVE).close()


def _take_large_object(_target: Target) -> None:
    descriptor = os.memfd_create("escape")
    try:
        os.ftruncate(descriptor, OBJECT_LARGE)
    finally:
        os.close(descriptor)


def _take_many_objects(_target: Target) -> None:
    """Each as large as one may be. Only its last byte is written: Linux would count pages."""
    taken: list[int] = []
    try:
        while len(taken) < OBJECTS_MANY:
            taken.append(os.memfd_create("escape"))
            _ = os.pwrite(taken[-1], b"x", VMO_SIZE_MAX - 1)
    finally:
        for descriptor in taken:
            os.close(descriptor)


def _lift_limit(_target: Target) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, hard))


def _limits_of_sibling(target: Target) -> None:
    """Who may read them may set them. Without the filter, only another id refuses it."""
    _ = resource.prlimit(target.sibling, resource.RLIMIT_CORE)


def _executable_memory(_target: Target) -> None:
    protection = mmap.PROT_READ | mmap.PROT_EXEC
    mmap.mmap(-1, mmap.PAGESIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, protection).close()


def _write_identity_table(_target: Target) -> None:
    _make_writable(mmap.PAGESIZE)  # its second page: rows


def _write_policy_page(_target: Target) -> None:
    _make_writable(POLICY * 8)


def _make_writable(offset: int) -> None:
    """Of any mapping of the table there is. (A fork has init's view, but not what that is of.)"""
    views = [found for found in gc.get_objects() if isinstance(found, IdentityView)]
    arrays: list[Any] = [view.cells.obj for view in views]
    mappings = [array.mapping for array in arrays if array.mapping.pid == os.getpid()]
    assert mappings, "every task maps the table"
    refused = 0
    for mapping in mappings:
        page = ctypes.c_void_p(mapping.address + offset - offset % mmap.PAGESIZE)
        size = ctypes.c_size_t(mmap.PAGESIZE)
        if LIBC.mprotect(page, size, mmap.PROT_READ | mmap.PROT_WRITE) < 0:
            refused = ctypes.get_errno()
    if refused:
        raise OSError(refused, os.strerror(refused))


def _checked(returned: int) -> int:
    if returned < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return returned


def _reached(act: Callable[[], object]) -> None:
    """An act on something that is not there: it is refused only if permission is what fails."""
    try:
        _ = act()
    except OSError as error:
        if error.errno in (errno.EPERM, errno.EACCES):
            raise


EPERM, EACCES = "EPERM", "EACCES"
FILTER, LANDLOCK, LIMITS, IDS = Wall.FILTER, Wall.LANDLOCK, Wall.LIMITS, Wall.IDS

ATTEMPTS: Final = (
    Attempt("open a path", _open_path, FILTER, EPERM, LANDLOCK, EACCES),
    Attempt("list a directory", _list_directory, FILTER, EPERM, LANDLOCK, EACCES),
    Attempt("datagram to a path", _datagram_to_path, FILTER, EPERM, Wall.NONE, DONE),
    Attempt("datagram to a name", _datagram_to_name, FILTER, EPERM, Wall.NONE, DONE),
    Attempt("reconnect a pair", _pair_to_path, FILTER, EPERM, Wall.NONE, "ENOENT"),
    Attempt("stream pair", _stream_pair, FILTER, EPERM, Wall.NONE, DONE),
    Attempt("operator's socket", _unix_socket, FILTER, EPERM, Wall.NONE, DONE),
    Attempt("TCP connection", _tcp_socket, FILTER, EPERM, LANDLOCK, EACCES),
    Attempt("UDP socket", _udp_socket, FILTER, EPERM, Wall.NONE, DONE),
    Attempt("netlink socket", _netlink_socket, FILTER, EPERM, Wall.NONE, DONE),
    Attempt("System V memory", _sysv_memory, FILTER, EPERM, Wall.NONE, DONE),
    Attempt("System V queue", _sysv_queue, FILTER, EPERM, Wall.NONE, DONE),
    Attempt("io_uring", _io_uring, FILTER, EPERM, LIMITS, "ENOMEM"),
    Attempt("keyring", _keyring, FILTER, EPERM, Wall.NONE, DONE),
    Attempt("execute", _execute, FILTER, EPERM, Wall.NONE, DONE),
    Attempt("fork", _fork, FILTER, EPERM, LIMITS, "EAGAIN"),
    Attempt("thread", _thread, FILTER, EPERM, LIMITS, "EAGAIN"),
    Attempt("trace a sibling", _trace_sibling, FILTER, EPERM, IDS, EPERM),
    Attempt("read a sibling", _read_sibling, FILTER, EPERM, IDS, EPERM),
    Attempt("open a sibling's memory", _open_sibling_memory, FILTER, EPERM, LANDLOCK, EACCES),
    Attempt("a sibling's environment", _open_sibling_environment, FILTER, EPERM, LANDLOCK, EACCES),
    Attempt("signal a sibling", _signal_sibling, FILTER, EPERM, LANDLOCK, EPERM),
    Attempt("descriptor of a sibling", _pidfd_sibling, FILTER, EPERM, Wall.NONE, DONE),
    Attempt("a priority", _raise_priority, FILTER, EPERM, Wall.NONE, DONE),
    Attempt("become root", _become_root, FILTER, EPERM, IDS, EPERM),
    Attempt("forge credentials", _forge_credentials, IDS, EPERM, IDS, EPERM),
    Attempt("descriptors without end", _take_descriptors, LIMITS, "EMFILE", LIMITS, "EMFILE"),
    Attempt("memory without end", _take_memory, LIMITS, "ENOMEM", LIMITS, "ENOMEM"),
    Attempt("shared memory without end", _take_shared_memory, LIMITS, "ENOMEM", LIMITS, "ENOMEM"),
    Attempt("an object too large", _take_large_object, LIMITS, "EFBIG", LIMITS, "EFBIG"),
    Attempt("lift a limit", _lift_limit, FILTER, EPERM, Wall.NONE, DONE),
    Attempt("a sibling's limits", _limits_of_sibling, FILTER, EPERM, IDS, EPERM),
    Attempt("executable memory", _executable_memory, FILTER, EPERM, Wall.NONE, DONE),
    Attempt(
        "write the identity table", _write_identity_table, Wall.SEALS, EACCES, Wall.SEALS, EACCES
    ),
    Attempt("write the policy page", _write_policy_page, Wall.SEALS, EACCES, Wall.SEALS, EACCES),
)

# Not in the table, for nothing refuses it: `nexus doctor` shows that.
MANY_OBJECTS: Final = Attempt(
    "memory objects without end", _take_many_objects, Wall.NONE, DONE, Wall.NONE, DONE
)


def outcome(attempt: Attempt, target: Target) -> str:
    """DONE, or the name of the errno that refused it."""
    try:
        attempt.run(target)
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error))
    return DONE


def outcomes(target: Target) -> dict[str, str]:
    """Try everything in the calling process."""
    return {attempt.name: outcome(attempt, target) for attempt in ATTEMPTS}


def importing(_word: str = "") -> Callable[[BootImage], Coroutine[Trap[Any], Any, None]]:
    """A maker (Program.entry) that tries it while its program is imported, in the first stage of
    an interpreter of its own; the program tells what came of it."""
    target = Target(os.getppid())
    found = {
        attempt.name: outcome(attempt, target)
        for attempt in ATTEMPTS
        if attempt.wall is not Wall.SEALS  # there is no table yet
    }

    async def told(boot: BootImage) -> None:
        await _report(boot, found)

    return told


def environment() -> list[str]:
    """Every string of the environment that this process was started with."""
    texts = [ctypes.string_at(address) for address in environment_strings()]
    return sorted(os.environ) + [text.decode(errors="replace") for text in texts if text]


async def main(boot: BootImage) -> None:
    """A program that tries it all: its argument is the pid of the sibling. The report goes over
    the control link in parts, the last one empty but for its first byte."""
    assert boot.control is not None, "only the root has no control link"
    if not boot.argument:
        _ = await Recv((boot.endpoint,), Nanos(await Now() + PATIENCE))  # the sibling's part
        return
    await _report(boot, outcomes(Target(int(boot.argument))))


async def _report(boot: BootImage, found: dict[str, str]) -> None:
    report: dict[str, object] = {
        "outcomes": found,
        "environment": environment(),
        "hash": hash("nexus"),
        "layout": ctypes.cast(LIBC.getpid, ctypes.c_void_p).value,
        "ids": [os.getuid(), os.getgid()],
    }
    await tell_report(boot, report)


async def tell_report(boot: BootImage, report: dict[str, object]) -> None:
    """Send a report to the root, which collects it."""
    assert boot.control is not None, "only the root has no control link"
    text = json.dumps(report).encode()
    for start in range(0, len(text), PART_SIZE):
        part = b"+" + text[start : start + PART_SIZE]
        await Send(boot.control, part, deadline=Nanos(await Now() + PATIENCE))
    await Send(boot.control, b".", deadline=Nanos(await Now() + PATIENCE))


async def collect(endpoint: Slot, link: LinkId, service: ServiceId) -> dict[str, Any]:
    """The root's side of it: a whole report; its `sender` says what was wrong with who sent it,
    empty if nothing was."""
    text = b""
    while True:
        until = Nanos(await Now() + PATIENCE)
        message = await Recv((endpoint,), until, link=link)
        if message.data == b".":
            report: dict[str, Any] = json.loads(text)
            right = message.sender.service == service
            return report | {"sender": "" if right else f"sent by {message.sender}"}
        text += message.data[1:]
