"""The system call filter as a program: its answers, on each architecture that has a table."""

import errno
import socket
import struct
from typing import Final

import pytest

from nexus.kernel.linux import seccomp

pytestmark = pytest.mark.linux

ALLOW: Final = seccomp.ALLOW
EPERM: Final = 0x5_0000 | errno.EPERM
ENOSYS: Final = 0x5_0000 | errno.ENOSYS
SECCOMP_DATA: Final = struct.Struct("<iIQ6Q")

# Numbers of what must not work: x86_64, generic table.
FORBIDDEN: Final = {
    "open": (2, None),
    "openat": (257, 56),
    "openat2": (437, 437),
    "socket": (41, 198),
    "connect": (42, 203),
    "bind": (49, 200),
    "clone": (56, 220),
    "fork": (57, None),
    "execve": (59, 221),
    "execveat": (322, 281),
    "kill": (62, 129),
    "tgkill": (234, 131),
    "ptrace": (101, 117),
    "process_vm_writev": (311, 271),
    "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438),
    "pidfd_send_signal": (424, 424),
    "io_uring_setup": (425, 425),
    "keyctl": (250, 219),
    "add_key": (248, 217),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "msgget": (68, 186),
    "shmget": (29, 194),
    "mq_open": (240, 180),
    "prctl": (157, 167),
    "setpriority": (141, 140),
    "sched_setaffinity": (203, 122),
    "dup": (32, 23),
    "x32 open": (0x4000_0002, None),
}


def answer(machine: str, number: int, *arguments: int, audit: int | None = None) -> int:
    """Run the filter over one call, as the kernel's interpreter does."""
    padded = (*arguments, 0, 0, 0, 0, 0, 0)[:6]
    arch = seccomp.MACHINES[machine].audit if audit is None else audit
    data = SECCOMP_DATA.pack(number, arch, 0, *padded)
    code, at, accumulator = seccomp.program(machine), 0, 0
    while True:
        operation, true, false, value = code[at]
        at += 1
        if operation == seccomp.LOAD:
            accumulator = struct.unpack_from("<I", data, value)[0]
        elif operation == seccomp.AND:
            accumulator &= value
        elif operation == seccomp.JUMP_EQUAL:
            at += true if accumulator == value else false
        elif operation == seccomp.RETURN:
            return value
        else:
            raise AssertionError(f"operation {operation:#x}")


@pytest.fixture(params=sorted(seccomp.MACHINES))
def machine(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def test_every_listed_call_is_allowed_and_no_other_number(machine: str) -> None:
    allowed = set(seccomp.allowed_calls(machine).values())
    column = seccomp.MACHINES[machine].column
    limited = {
        pair[column]
        for pair in (
            seccomp.SOCKETPAIR,
            seccomp.SETSOCKOPT,
            seccomp.IOCTL,
            seccomp.FCNTL,
            seccomp.MMAP,
            seccomp.MPROTECT,
            seccomp.CLONE3,
        )
    }

    for number in range(600):
        if number in limited:
            continue
        expected = ALLOW if number in allowed else EPERM
        assert answer(machine, number) == expected, number


@pytest.mark.parametrize("name", sorted(FORBIDDEN))
def test_a_dangerous_call_is_refused(machine: str, name: str) -> None:
    number = FORBIDDEN[name][seccomp.MACHINES[machine].column]
    if number is None:
        pytest.skip("no such call on this architecture")

    assert answer(machine, number) == EPERM


def test_calls_with_limits_are_allowed_within_them_only(machine: str) -> None:
    column = seccomp.MACHINES[machine].column
    pair = seccomp.SOCKETPAIR[column]
    unix, seqpacket = socket.AF_UNIX, socket.SOCK_SEQPACKET
    flags = socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
    option, ioctl = seccomp.SETSOCKOPT[column], seccomp.IOCTL[column]
    fcntl_, mmap_ = seccomp.FCNTL[column], seccomp.MMAP[column]

    assert answer(machine, pair, unix, seqpacket) == ALLOW
    assert answer(machine, pair, unix, seqpacket | flags) == ALLOW
    assert answer(machine, pair, unix, socket.SOCK_DGRAM) == EPERM
    assert answer(machine, pair, unix, socket.SOCK_STREAM | flags) == EPERM
    assert answer(machine, pair, socket.AF_INET, seqpacket) == EPERM
    assert answer(machine, option, 5, socket.SOL_SOCKET, socket.SO_PASSCRED) == ALLOW
    assert answer(machine, option, 5, socket.SOL_SOCKET, socket.SO_SNDBUF) == EPERM
    assert answer(machine, option, 5, socket.IPPROTO_TCP, socket.SO_PASSCRED) == EPERM
    assert answer(machine, ioctl, 5, 0x5411) == ALLOW
    assert answer(machine, ioctl, 5, 0x5412) == EPERM, "TIOCSTI"
    assert answer(machine, fcntl_, 5, 1) == ALLOW
    assert answer(machine, fcntl_, 5, 0) == EPERM, "F_DUPFD"
    assert answer(machine, mmap_, 0, 4096, 1) == ALLOW
    assert answer(machine, mmap_, 0, 4096, 5) == EPERM
    assert answer(machine, seccomp.MPROTECT[column], 0, 4096, 4) == EPERM
    assert answer(machine, seccomp.CLONE3[column]) == ENOSYS


def test_a_call_for_another_architecture_kills(machine: str) -> None:
    for other in seccomp.MACHINES.values():
        if other.audit != seccomp.MACHINES[machine].audit:
            assert answer(machine, 0, audit=other.audit) == seccomp.KILL_PROCESS
    assert answer(machine, 0, audit=0x4000_0003) == seccomp.KILL_PROCESS, "i386"
