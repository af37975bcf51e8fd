"""The system call filter of a service: an allow list, as data, and the program made from it.

Anything not listed fails with EPERM; clone3 with ENOSYS, so that a C library falls back to
clone, which is not listed; a call made for another architecture kills the process. Extended
only by grants. A call's address arguments cannot be read by a filter: what would need that
(open, connect, sendto on anything but a pair) is impossible because its first step is not here.
"""

import ctypes
import errno
import struct
from typing import Final, NamedTuple

from nexus.kernel.linux.native import LIBC, MACHINE, PR_SET_NO_NEW_PRIVS, SIOCINQ, SIOCOUTQ, prctl


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

# Calls allowed with some arguments only.
SOCKETPAIR: Final = (53, 199)
SETSOCKOPT: Final = (54, 208)
IOCTL: Final = (16, 29)
FCNTL: Final = (72, 25)
MMAP: Final = (9, 222)
MPROTECT: Final = (10, 226)
CLONE3: Final = (435, 435)

AF_UNIX: Final = 1
SOCK_SEQPACKET: Final = 5
SOCK_FLAGS: Final = 0o2004000  # SOCK_CLOEXEC | SOCK_NONBLOCK
SOL_SOCKET: Final = 1
# SO_PASSCRED, SO_RCVTIMEO and SO_PEEK_OFF (to count what is queued without taking it). Never
# SO_SNDBUF: with it a client would lift the wall of its own link.
SOCKET_OPTIONS: Final = (16, 20, 42)
IOCTLS: Final = (SIOCOUTQ, SIOCINQ)
# F_GETFD, F_SETFD, F_GETFL, F_ADD_SEALS, F_GET_SEALS: none makes a descriptor.
FCNTLS: Final = (1, 2, 3, 1033, 1034)
PROT_EXEC: Final = 4

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


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]  # type: ignore[mutable-override]


def _one_of(index: int, values: tuple[int, ...]) -> list[Instruction]:
    """Allow if argument `index` is one of the values, refuse otherwise."""
    code: list[Instruction] = [(LOAD, 0, 0, ARGUMENT_AT[index])]
    for position, value in enumerate(values):
        code.append((JUMP_EQUAL, len(values) - position, 0, value))
    return [*code, (RETURN, 0, 0, REFUSE), (RETURN, 0, 0, ALLOW)]


def _without(index: int, bits: int) -> list[Instruction]:
    """Allow if argument `index` has none of the bits, refuse otherwise."""
    return [
        (LOAD, 0, 0, ARGUMENT_AT[index]),
        (AND, 0, 0, bits),
        (JUMP_EQUAL, 1, 0, 0),
        (RETURN, 0, 0, REFUSE),
        (RETURN, 0, 0, ALLOW),
    ]


def _pair() -> list[Instruction]:
    """Allow a SEQPACKET pair only: from a DGRAM socket any other could be reached."""
    return [
        (LOAD, 0, 0, ARGUMENT_AT[0]),
        (JUMP_EQUAL, 0, 3, AF_UNIX),
        (LOAD, 0, 0, ARGUMENT_AT[1]),
        (AND, 0, 0, 0xFFFF_FFFF & ~SOCK_FLAGS),
        (JUMP_EQUAL, 1, 0, SOCK_SEQPACKET),
        (RETURN, 0, 0, REFUSE),
        (RETURN, 0, 0, ALLOW),
    ]


def _option() -> list[Instruction]:
    """Allow the few socket options of SOL_SOCKET."""
    return [
        (LOAD, 0, 0, ARGUMENT_AT[1]),
        (JUMP_EQUAL, 1, 0, SOL_SOCKET),
        (RETURN, 0, 0, REFUSE),
        *_one_of(2, SOCKET_OPTIONS),
    ]


def allowed_calls(machine: str) -> dict[str, int]:
    """The calls allowed with any argument on an architecture, by name."""
    column = MACHINES[machine].column
    numbers = {name: pair[column] for name, pair in CALLS.items()}
    return {name: number for name, number in numbers.items() if number is not None}


def program(machine: str) -> list[Instruction]:
    """The filter of an architecture. Raises KeyError for one without a table."""
    known = MACHINES[machine]
    limited = (
        (SOCKETPAIR, _pair()),
        (SETSOCKOPT, _option()),
        (IOCTL, _one_of(1, IOCTLS)),
        (FCNTL, _one_of(1, FCNTLS)),
        (MMAP, _without(2, PROT_EXEC)),
        (MPROTECT, _without(2, PROT_EXEC)),
        (CLONE3, [(RETURN, 0, 0, NO_SUCH_CALL)]),
    )
    code: list[Instruction] = [
        (LOAD, 0, 0, ARCH_AT),
        (JUMP_EQUAL, 1, 0, known.audit),
        (RETURN, 0, 0, KILL_PROCESS),
        (LOAD, 0, 0, NUMBER_AT),
    ]
    for number in allowed_calls(machine).values():
        code += [(JUMP_EQUAL, 0, 1, number), (RETURN, 0, 0, ALLOW)]
    for numbers, body in limited:
        code += [(JUMP_EQUAL, 0, len(body), numbers[known.column]), *body]
    code.append((RETURN, 0, 0, REFUSE))
    assert all(true <= 255 and false <= 255 for _, true, false, _ in code), "jumps are bytes"
    return code


def install(machine: str = MACHINE) -> None:
    """Confine the calling process for ever. Raises OSError, KeyError without a table."""
    code = b"".join(_INSTRUCTION.pack(*instruction) for instruction in program(machine))
    text = ctypes.create_string_buffer(code, len(code))
    listing = _Program(len(code) // _INSTRUCTION.size, ctypes.addressof(text))
    _ = prctl(PR_SET_NO_NEW_PRIVS, 1)
    if LIBC.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(listing), 0, 0) < 0:
        number = ctypes.get_errno()
        raise OSError(number, "seccomp filter refused")
