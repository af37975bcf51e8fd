"""The system call filter of a service: an allow list, as data, and the program made from it.

Anything not listed fails with EPERM; clone3 with ENOSYS, so that a C library falls back to
clone, which only a grant of threads lists; a call made for another architecture kills the
process. Extended only by grants, and for an interpreter of its own by what starting and importing
take, until the program is imported. A call's address arguments cannot be read by a filter: what
would need that (open, connect, sendto on anything but a pair) is impossible because its first
step is not here, or Landlock decides it.
"""

import ctypes
import errno
import struct
from enum import IntEnum
from functools import cache
from typing import Final, NamedTuple

from nexus.abi import Grants, HardwareKind, SecretBackend, StreamRole
from nexus.kernel.linux.native import (
    LIBC,
    MACHINE,
    MEMBARRIER_GLOBAL_EXPEDITED,
    MEMBARRIER_REGISTER_GLOBAL_EXPEDITED,
    PR_SET_NO_NEW_PRIVS,
    SIOCINQ,
    SIOCOUTQ,
    prctl,
)
from nexus.kernel.linux.secrets import KEYCTL_READ, KEYCTL_UPDATE, NO_SECRET, Secret


class Machine(NamedTuple):
    """What a filter must know of an architecture."""

    audit: int  # AUDIT_ARCH of include/uapi/linux/audit.h
    column: int  # of CALLS


MACHINES: Final = {
    "x86_64": Machine(0xC000_003E, 0),
    "aarch64": Machine(0xC000_00B7, 1),
    "riscv64": Machine(0xC000_00F3, 1),
}

# Number on x86_64, number in the generic table (aarch64, riscv64); None: no such call there.
# The frequent ones first: the filter is a list that is walked.
CALLS: Final[dict[str, tuple[int | None, int | None]]] = {
    "recvmsg": (47, 212),
    "sendto": (44, 206),
    "epoll_wait": (232, None),
    "epoll_pwait": (281, 22),
    "sendmsg": (46, 211),
    "recvfrom": (45, 207),
    "select": (23, None),
    "pselect6": (270, 72),
    "futex": (202, 98),
    "clock_gettime": (228, 113),
    "timerfd_settime": (286, 86),
    "read": (0, 63),
    "write": (1, 64),
    "close": (3, 57),
    "poll": (7, None),
    "ppoll": (271, 73),
    "munmap": (11, 215),
    "mremap": (25, 216),
    "madvise": (28, 233),
    "brk": (12, 214),
    "rt_sigprocmask": (14, 135),
    "rt_sigaction": (13, 134),
    "rt_sigreturn": (15, 139),
    "sigaltstack": (131, 132),
    "sched_yield": (24, 124),
    "getpid": (39, 172),
    "gettid": (186, 178),
    "getppid": (110, 173),
    "getuid": (102, 174),
    "geteuid": (107, 175),
    "getgid": (104, 176),
    "getegid": (108, 177),
    "clock_getres": (229, 114),
    "clock_nanosleep": (230, 115),
    "nanosleep": (35, 101),
    "restart_syscall": (219, 128),
    "epoll_create1": (291, 20),
    "epoll_ctl": (233, 21),
    "timerfd_create": (283, 85),
    "timerfd_gettime": (287, 87),
    "getsockopt": (55, 209),
    "getsockname": (51, 204),
    "memfd_create": (319, 279),
    "ftruncate": (77, 46),
    "lseek": (8, 62),
    "pread64": (17, 67),
    "pwrite64": (18, 68),
    "readv": (19, 65),
    "writev": (20, 66),
    "fstat": (5, 80),
    "getrandom": (318, 278),
    "getrusage": (98, 165),
    "times": (100, 153),
    "exit": (60, 93),
    "exit_group": (231, 94),
}

# What a C library does in a thread it starts, beside the clone itself.
THREAD_CALLS: Final[dict[str, tuple[int | None, int | None]]] = {
    "set_robust_list": (273, 99),
    "rseq": (334, 293),
}
ACCEPT_CALLS: Final[dict[str, tuple[int | None, int | None]]] = {"accept4": (288, 242)}
TCP_CALLS: Final[dict[str, tuple[int | None, int | None]]] = {
    "getpeername": (52, 205),
    "shutdown": (48, 210),
}
# asyncio calls it again on a socket that listens. With `connect` as well it gives a service a
# port that Linux chooses.
LISTEN_CALLS: Final[dict[str, tuple[int | None, int | None]]] = {"listen": (50, 201)}
CONNECT_CALLS: Final[dict[str, tuple[int | None, int | None]]] = {"connect": (42, 203)}
# A block device is read and written by what every service has for its memory objects.
BLOCK_CALLS: Final[dict[str, tuple[int | None, int | None]]] = {
    "pwritev2": (328, 287),
    "fdatasync": (75, 83),
}
SECRET_FILE_CALLS: Final[dict[str, tuple[int | None, int | None]]] = {"fsync": (74, 82)}
# What an interpreter needs to import, and to confine itself afterwards. Landlock bounds the paths.
IMPORT_CALLS: Final[dict[str, tuple[int | None, int | None]]] = {
    **THREAD_CALLS,
    "open": (2, None),
    "openat": (257, 56),
    "stat": (4, None),
    "lstat": (6, None),
    "newfstatat": (262, 79),
    "statx": (332, 291),
    "access": (21, None),
    "faccessat": (269, 48),
    "faccessat2": (439, 439),
    "readlink": (89, None),
    "readlinkat": (267, 78),
    "getcwd": (79, 17),
    "getdents64": (217, 61),
    "uname": (63, 160),
    "sysinfo": (99, 179),
    "sched_getaffinity": (204, 123),
    "prctl": (157, 167),
    "capset": (126, 91),
    "landlock_create_ruleset": (444, 444),
    "landlock_add_rule": (445, 445),
    "landlock_restrict_self": (446, 446),
}
EXEC_CALLS: Final[dict[str, tuple[int | None, int | None]]] = {
    "execve": (59, 221),
    "arch_prctl": (158, None),
    "set_tid_address": (218, 96),
}

# Calls allowed with some arguments only.
SOCKETPAIR: Final = (53, 199)
SOCKET: Final = (41, 198)
CLONE: Final = (56, 220)
PRLIMIT: Final = (302, 261)
SENDTO: Final = (44, 206)
SENDMSG: Final = (46, 211)
SETSOCKOPT: Final = (54, 208)
IOCTL: Final = (16, 29)
FCNTL: Final = (72, 25)
MMAP: Final = (9, 222)
MPROTECT: Final = (10, 226)
CLONE3: Final = (435, 435)
OPENAT: Final = (257, 56)
UNLINKAT: Final = (263, 35)
RENAMEAT: Final = (264, 38)
RENAMEAT2: Final = (316, 276)  # what a C library takes where there is no renameat
KEYCTL: Final = (250, 219)
MEMBARRIER: Final = (324, 283)

AF_UNIX: Final = 1
AF_INET: Final = 2
AF_INET6: Final = 10
SOCK_STREAM: Final = 1
SOCK_SEQPACKET: Final = 5
IPPROTO_TCP: Final = 6
TCP_NODELAY: Final = 1
MSG_FASTOPEN: Final = 0x2000_0000  # a connect that Landlock does not see
SOCK_FLAGS: Final = 0o2004000  # SOCK_CLOEXEC | SOCK_NONBLOCK
SOL_SOCKET: Final = 1
# SO_PASSCRED, SO_RCVTIMEO and SO_PEEK_OFF (to count what is queued without taking it). Never
# SO_SNDBUF: with it a client would lift the wall of its own link.
SOCKET_OPTIONS: Final = (16, 20, 42)
TCP_SOCKET_OPTIONS: Final = (*SOCKET_OPTIONS, 9)  # SO_KEEPALIVE
IOCTLS: Final = (SIOCOUTQ, SIOCINQ)
FIONBIO: Final = 0x5421  # how Python makes a socket non-blocking
# With a device any request but these, for a filter does not see which descriptor it is about:
# FIOSETOWN, SIOCSPGRP, FIOASYNC have Linux signal others, TIOCSTI types for them, TIOCSCTTY.
DEVICE_IOCTLS_REFUSED: Final = (0x8901, 0x8902, 0x5452, 0x5412, 0x540E)
# CLONE_VM, FS, FILES, SIGHAND, THREAD, SYSVSEM, SETTLS, PARENT_SETTID, CHILD_CLEARTID: what
# pthread_create asks for, with CLONE_DETACHED in musl. Nothing less is a thread of this process.
THREAD_FLAGS: Final = (0x3D_0F00, 0x7D_0F00)
# A barrier among those who asked for it, and to ask for it. Not the others: they stop every CPU.
MEMBARRIERS: Final = (MEMBARRIER_GLOBAL_EXPEDITED, MEMBARRIER_REGISTER_GLOBAL_EXPEDITED)
# F_GETFD, F_SETFD, F_GETFL, F_ADD_SEALS, F_GET_SEALS: none makes a descriptor.
FCNTLS: Final = (1, 2, 3, 1033, 1034)
PROT_EXEC: Final = 4
# Flags to read or to make a file of the secret's directory: O_WRONLY, CREAT, EXCL, NONBLOCK and
# CLOEXEC, and NOFOLLOW and LARGEFILE, which have each other's number on aarch64. Neither
# O_DIRECTORY nor O_PATH nor O_TMPFILE: no other directory to start from.
SECRET_OPEN_FLAGS: Final = 0o2504301
UINT_MAX: Final = 0xFFFF_FFFF

# include/uapi/linux/bpf_common.h and seccomp.h
LOAD: Final = 0x20
AND: Final = 0x54
JUMP_EQUAL: Final = 0x15
RETURN: Final = 0x06
ALLOW: Final = 0x7FFF_0000
KILL_PROCESS: Final = 0x8000_0000
REFUSE: Final = 0x0005_0000 | errno.EPERM
NO_SUCH_CALL: Final = 0x0005_0000 | errno.ENOSYS

NUMBER_AT: Final = 0  # offsets in struct seccomp_data
ARCH_AT: Final = 4
ARGUMENT_AT: Final = tuple(16 + 8 * index for index in range(6))  # low half, little endian

PR_SET_SECCOMP: Final = 22
SECCOMP_MODE_FILTER: Final = 2

_INSTRUCTION: Final = struct.Struct("=HBBI")

Instruction = tuple[int, int, int, int]
Numbers = tuple[int | None, int | None]


class Stage(IntEnum):
    """How far a process is: the filters are stacked, so each is as strict as those before."""

    FINAL = 0  # the only one of a forked service
    IMPORT = 1  # an interpreter of its own, before it imports the program
    START = 2  # before it is executed


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]  # type: ignore[mutable-override]


def _one_of(index: int, values: tuple[int, ...]) -> list[Instruction]:
    """Allow if argument `index` is one of the values, refuse otherwise."""
    code: list[Instruction] = [(LOAD, 0, 0, ARGUMENT_AT[index])]
    for position, value in enumerate(values):
        code.append((JUMP_EQUAL, len(values) - position, 0, value))
    return [*code, (RETURN, 0, 0, REFUSE), (RETURN, 0, 0, ALLOW)]


def _none_of(index: int, values: tuple[int, ...]) -> list[Instruction]:
    """Refuse if argument `index` is one of the values, allow otherwise."""
    code: list[Instruction] = [(LOAD, 0, 0, ARGUMENT_AT[index])]
    for position, value in enumerate(values):
        code.append((JUMP_EQUAL, len(values) - position, 0, value))
    return [*code, (RETURN, 0, 0, ALLOW), (RETURN, 0, 0, REFUSE)]


def _without(index: int, bits: int) -> list[Instruction]:
    """Allow if argument `index` has none of the bits, refuse otherwise."""
    return [
        (LOAD, 0, 0, ARGUMENT_AT[index]),
        (AND, 0, 0, bits),
        (JUMP_EQUAL, 1, 0, 0),
        (RETURN, 0, 0, REFUSE),
        (RETURN, 0, 0, ALLOW),
    ]


def _pair(kinds: tuple[int, ...]) -> list[Instruction]:
    """Allow a UNIX pair of these kinds; never DGRAM: from such a socket any other could be
    reached."""
    masked = _one_of(1, kinds)
    masked.insert(1, (AND, 0, 0, 0xFFFF_FFFF & ~SOCK_FLAGS))
    return [
        (LOAD, 0, 0, ARGUMENT_AT[0]),
        (JUMP_EQUAL, 1, 0, AF_UNIX),
        (RETURN, 0, 0, REFUSE),
        *masked,
    ]


def _tcp_socket() -> list[Instruction]:
    """Allow a TCP socket, the only kind whose connect Landlock knows: not MPTCP, not SMC."""
    return [
        (LOAD, 0, 0, ARGUMENT_AT[0]),
        (JUMP_EQUAL, 2, 0, AF_INET),
        (JUMP_EQUAL, 1, 0, AF_INET6),
        (RETURN, 0, 0, REFUSE),
        (LOAD, 0, 0, ARGUMENT_AT[1]),
        (AND, 0, 0, 0xFFFF_FFFF & ~SOCK_FLAGS),
        (JUMP_EQUAL, 1, 0, SOCK_STREAM),
        (RETURN, 0, 0, REFUSE),
        *_one_of(2, (0, IPPROTO_TCP)),
    ]


def _option() -> list[Instruction]:
    """Allow the few socket options of SOL_SOCKET."""
    return [
        (LOAD, 0, 0, ARGUMENT_AT[1]),
        (JUMP_EQUAL, 1, 0, SOL_SOCKET),
        (RETURN, 0, 0, REFUSE),
        *_one_of(2, SOCKET_OPTIONS),
    ]


def _tcp_option() -> list[Instruction]:
    """Allow what `_option` does, and what an event loop sets on a TCP socket."""
    return [
        (LOAD, 0, 0, ARGUMENT_AT[1]),
        (JUMP_EQUAL, 0, 4, IPPROTO_TCP),
        (LOAD, 0, 0, ARGUMENT_AT[2]),
        (JUMP_EQUAL, 0, 1, TCP_NODELAY),
        (RETURN, 0, 0, ALLOW),
        (RETURN, 0, 0, REFUSE),
        (JUMP_EQUAL, 1, 0, SOL_SOCKET),
        (RETURN, 0, 0, REFUSE),
        *_one_of(2, TCP_SOCKET_OPTIONS),
    ]


def _both(first: int, values: tuple[int, ...], body: list[Instruction]) -> list[Instruction]:
    """Go on to `body` if argument `first` is one of the values, refuse otherwise."""
    code: list[Instruction] = [(LOAD, 0, 0, ARGUMENT_AT[first])]
    for position, value in enumerate(values):
        code.append((JUMP_EQUAL, len(values) - position, 0, value))
    return [*code, (RETURN, 0, 0, REFUSE), *body]


def _secret_calls(secret: Secret, stage: Stage) -> list[tuple[Numbers, list[Instruction]]]:
    """What a service may do with the place of its secret, and with no other directory or key.

    An absolute path, or one that climbs, is Landlock's to refuse.
    """
    limited: list[tuple[Numbers, list[Instruction]]] = []
    if secret.directory >= 0:
        here = (secret.directory,)
        rename = _both(0, here, _one_of(2, here))
        limited += [
            (UNLINKAT, _both(0, here, _one_of(2, (0,)))),  # no AT_REMOVEDIR
            (RENAMEAT, rename),
            (RENAMEAT2, _both(0, here, _both(2, here, _one_of(4, (0,))))),  # no exchange
        ]
        if stage is Stage.FINAL:  # before, Landlock says what an import opens
            flags = _without(2, UINT_MAX & ~SECRET_OPEN_FLAGS)
            limited.append((OPENAT, _both(0, here, flags)))
    if secret.key:
        operations = (KEYCTL_READ, KEYCTL_UPDATE)
        limited.append((KEYCTL, _both(0, operations, _one_of(1, (secret.key,)))))
    return limited


def _has_tcp(grants: Grants) -> bool:
    """Whether a TCP socket comes into its hands: of those, one that has ended could be sent with
    MSG_FASTOPEN to any address."""
    streams = (StreamRole.TCP, StreamRole.DIAL)
    dials = any(each.role in streams for each in grants.stream_ports)
    return bool(grants.listen or grants.connect or dials)


def _calls(grants: Grants, stage: Stage) -> dict[str, Numbers]:
    """The calls allowed with any argument."""
    calls: dict[str, Numbers] = dict(CALLS)
    if grants.threads:
        calls |= THREAD_CALLS
    if grants.ports or grants.stream_ports or grants.listen:
        calls |= ACCEPT_CALLS
    if grants.listen or grants.connect:
        calls |= TCP_CALLS
    if _has_tcp(grants):
        del calls["sendto"], calls["sendmsg"]  # limited, below
    if grants.listen:
        calls |= LISTEN_CALLS
    if grants.connect:
        calls |= CONNECT_CALLS
    if any(each.kind is HardwareKind.BLOCK for each in grants.hardware):
        calls |= BLOCK_CALLS
    if grants.secret is SecretBackend.FILE:
        calls |= SECRET_FILE_CALLS
    if stage >= Stage.IMPORT:
        calls |= IMPORT_CALLS
    if stage >= Stage.START:
        calls |= EXEC_CALLS
    return calls


def _limited(
    grants: Grants, stage: Stage, secret: Secret
) -> list[tuple[Numbers, list[Instruction]]]:
    """The calls allowed with some arguments only."""
    stream = (SOCK_STREAM,) if grants.streams else ()
    tcp = bool(grants.listen or grants.connect)
    ioctls = (*IOCTLS, FIONBIO) if grants.streams or tcp else IOCTLS
    limited: list[tuple[Numbers, list[Instruction]]] = [
        (SOCKETPAIR, _pair((SOCK_SEQPACKET, *stream))),
        (SETSOCKOPT, _tcp_option() if tcp else _option()),
        (IOCTL, _none_of(1, DEVICE_IOCTLS_REFUSED) if grants.devices else _one_of(1, ioctls)),
        (FCNTL, _one_of(1, FCNTLS)),
        (MEMBARRIER, _one_of(0, MEMBARRIERS)),
        (CLONE3, [(RETURN, 0, 0, NO_SUCH_CALL)]),
    ]
    executable: list[Instruction] = [(RETURN, 0, 0, ALLOW)]
    memory = _without(2, PROT_EXEC) if stage is Stage.FINAL else executable
    limited += [(MMAP, memory), (MPROTECT, memory)]
    if stage >= Stage.IMPORT:
        limited.append((PRLIMIT, _one_of(0, (0,))))  # its own: Linux lets an id set its others'
    if grants.threads:
        limited.append((CLONE, _one_of(0, THREAD_FLAGS)))
    if _has_tcp(grants):
        limited += [(SENDTO, _without(3, MSG_FASTOPEN)), (SENDMSG, _without(2, MSG_FASTOPEN))]
    if grants.connect:
        limited.append((SOCKET, _tcp_socket()))
    return limited + _secret_calls(secret, stage)


NO_GRANTS: Final = Grants()


def allowed_calls(
    machine: str, grants: Grants = NO_GRANTS, stage: Stage = Stage.FINAL
) -> dict[str, int]:
    """The calls allowed with any argument on an architecture, by name."""
    column = MACHINES[machine].column
    numbers = {name: pair[column] for name, pair in _calls(grants, stage).items()}
    return {name: number for name, number in numbers.items() if number is not None}


def program(
    machine: str,
    grants: Grants = NO_GRANTS,
    stage: Stage = Stage.FINAL,
    secret: Secret = NO_SECRET,
) -> list[Instruction]:
    """The filter of an architecture. Raises KeyError for one without a table."""
    known = MACHINES[machine]
    code: list[Instruction] = [
        (LOAD, 0, 0, ARCH_AT),
        (JUMP_EQUAL, 1, 0, known.audit),
        (RETURN, 0, 0, KILL_PROCESS),
        (LOAD, 0, 0, NUMBER_AT),
    ]
    for number in allowed_calls(machine, grants, stage).values():
        code += [(JUMP_EQUAL, 0, 1, number), (RETURN, 0, 0, ALLOW)]
    for numbers, body in _limited(grants, stage, secret):
        limited = numbers[known.column]
        if limited is not None:
            code += [(JUMP_EQUAL, 0, len(body), limited), *body]
    code.append((RETURN, 0, 0, REFUSE))
    assert all(true <= 255 and false <= 255 for _, true, false, _ in code), "jumps are bytes"
    return code


@cache
def assembled(grants: Grants, stage: Stage, secret: Secret = NO_SECRET) -> bytes:
    """The filter of this machine as Linux reads it. Asked for by init before it forks, so that a
    child finds it made. Raises KeyError for a machine without a table."""
    instructions = program(MACHINE, grants, stage, secret)
    return b"".join(_INSTRUCTION.pack(*instruction) for instruction in instructions)


def install(
    grants: Grants = NO_GRANTS, stage: Stage = Stage.FINAL, secret: Secret = NO_SECRET
) -> None:
    """Confine the calling process for ever. Raises OSError."""
    if MACHINE not in MACHINES:
        raise OSError(f"there is no list of the calls of {MACHINE}")
    code = assembled(grants, stage, secret)
    text = ctypes.create_string_buffer(code, len(code))
    listing = _Program(len(code) // _INSTRUCTION.size, ctypes.addressof(text))
    _ = prctl(PR_SET_NO_NEW_PRIVS, 1)
    if LIBC.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(listing), 0, 0) < 0:
        number = ctypes.get_errno()
        raise OSError(number, "seccomp filter refused")
