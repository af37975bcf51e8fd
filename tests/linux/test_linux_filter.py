"""The system call filter as a program: its answers, on each architecture that has a table."""

import errno
import socket
import struct
from typing import Final

import pytest

from nexus.abi import (
    DeviceGrant,
    Grants,
    HardwareGrant,
    HardwareKind,
    Isolation,
    ListenGrant,
    SecretBackend,
    StreamGrant,
    StreamRole,
)
from nexus.kernel.linux import durable, seccomp
from nexus.kernel.linux.seccomp import Stage
from nexus.kernel.linux.secrets import NO_SECRET, Secret

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
    "fsync": (74, 82),
    "fdatasync": (75, 83),
    "sync": (162, 81),
    "pwritev2": (328, 287),
    "renameat": (264, 38),
    "renameat2": (316, 276),
    "unlinkat": (263, 35),
    "linkat": (265, 37),
    "symlinkat": (266, 36),
    "mkdirat": (258, 34),
    "fchmod": (91, 52),
    "fchown": (93, 55),
    "request_key": (249, 218),
    "x32 open": (0x4000_0002, None),
}


def answer(
    machine: str,
    number: int,
    *arguments: int,
    audit: int | None = None,
    grants: Grants = seccomp.NO_GRANTS,
    stage: Stage = Stage.FINAL,
    secret: Secret = NO_SECRET,
) -> int:
    """Run the filter over one call, as the kernel's interpreter does."""
    padded = (*arguments, 0, 0, 0, 0, 0, 0)[:6]
    arch = seccomp.MACHINES[machine].audit if audit is None else audit
    data = SECCOMP_DATA.pack(number, arch, 0, *padded)
    code, at, accumulator = seccomp.program(machine, grants, stage, secret), 0, 0
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
            seccomp.MEMBARRIER,
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
    barrier = seccomp.MEMBARRIER[column]
    assert [answer(machine, barrier, 1 << bit) == ALLOW for bit in range(10)] == [
        bit in (1, 2) for bit in range(10)
    ], "global expedited, and to ask for it"
    assert answer(machine, barrier, 0) == EPERM


def test_a_call_for_another_architecture_kills(machine: str) -> None:
    for other in seccomp.MACHINES.values():
        if other.audit != seccomp.MACHINES[machine].audit:
            assert answer(machine, 0, audit=other.audit) == seccomp.KILL_PROCESS
    assert answer(machine, 0, audit=0x4000_0003) == seccomp.KILL_PROCESS, "i386"


# ---- what grants add, and what they do not

THREADS: Final = Grants(threads=1)
STREAMS: Final = Grants(streams=True)
PORTS: Final = Grants(ports=("operator",))
CONNECT: Final = Grants(connect=(502,))
LISTEN: Final = Grants(listen=(ListenGrant("web", "127.0.0.1", 80),))
DEVICES: Final = Grants(devices=(DeviceGrant("line", "/dev/ttyS0", writable=True),))
BLOCK: Final = Grants(hardware=(HardwareGrant("disk", HardwareKind.BLOCK),))
ENTROPY: Final = Grants(hardware=(HardwareGrant("rng", HardwareKind.ENTROPY),))
FILE: Final = Grants(isolation=Isolation.EXEC, secret=SecretBackend.FILE)
KEYRING: Final = Grants(isolation=Isolation.EXEC, secret=SecretBackend.KEYRING)
ALL: Final = Grants(
    threads=1, streams=True, ports=("operator",), connect=(502,), listen=LISTEN.listen,
    devices=DEVICES.devices, hardware=(*BLOCK.hardware, *ENTROPY.hardware),
    secret=SecretBackend.FILE,
)  # fmt: skip
FLAGS: Final = socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
MPTCP: Final = 262
FASTOPEN: Final = 0x2000_0000


def number_of(machine: str, pair: tuple[int | None, int | None]) -> int:
    number = pair[seccomp.MACHINES[machine].column]
    assert number is not None
    return number


def test_threads_are_threads_of_this_process_only(machine: str) -> None:
    clone = number_of(machine, seccomp.CLONE)
    new_user, vfork, fork = 0x1000_0000, 0x4111, 17

    for flags in seccomp.THREAD_FLAGS:
        assert answer(machine, clone, flags, grants=THREADS) == ALLOW
        assert answer(machine, clone, flags) == EPERM
        assert answer(machine, clone, flags | new_user, grants=THREADS) == EPERM
        assert answer(machine, clone, flags & ~0x1_0000, grants=THREADS) == EPERM, "CLONE_THREAD"
    for flags in (0, fork, vfork):
        assert answer(machine, clone, flags, grants=ALL) == EPERM


def test_streams_are_pairs_and_never_datagrams(machine: str) -> None:
    pair = number_of(machine, seccomp.SOCKETPAIR)
    ioctl = number_of(machine, seccomp.IOCTL)
    unix = socket.AF_UNIX

    assert answer(machine, pair, unix, socket.SOCK_STREAM | FLAGS, grants=STREAMS) == ALLOW
    assert answer(machine, pair, unix, socket.SOCK_SEQPACKET, grants=STREAMS) == ALLOW
    assert answer(machine, pair, unix, socket.SOCK_DGRAM, grants=ALL) == EPERM
    assert answer(machine, pair, unix, socket.SOCK_DGRAM | FLAGS, grants=ALL) == EPERM
    assert answer(machine, pair, unix, socket.SOCK_RAW, grants=ALL) == EPERM, "a DGRAM in disguise"
    assert answer(machine, pair, socket.AF_INET, socket.SOCK_STREAM, grants=ALL) == EPERM
    assert answer(machine, ioctl, 5, seccomp.FIONBIO, grants=STREAMS) == ALLOW
    assert answer(machine, ioctl, 5, seccomp.FIONBIO) == EPERM


def test_a_tcp_socket_is_of_the_kind_landlock_knows(machine: str) -> None:
    new = number_of(machine, seccomp.SOCKET)
    stream = socket.SOCK_STREAM | FLAGS

    for family in (int(socket.AF_INET), int(socket.AF_INET6)):
        assert answer(machine, new, family, stream, grants=CONNECT) == ALLOW
        assert answer(machine, new, family, stream, 6, grants=CONNECT) == ALLOW
        assert answer(machine, new, family, stream, MPTCP, grants=ALL) == EPERM
        assert answer(machine, new, family, socket.SOCK_DGRAM, grants=ALL) == EPERM
        assert answer(machine, new, family, stream, grants=LISTEN) == EPERM, "it has its sockets"
    for family in (socket.AF_UNIX, socket.AF_NETLINK, socket.AF_VSOCK, 43):
        assert answer(machine, new, family, stream, grants=ALL) == EPERM, "AF_SMC is 43"


def test_a_connection_is_not_made_by_sending(machine: str) -> None:
    """TCP Fast Open connects in sendto and sendmsg, where Landlock does not look."""
    sendto, sendmsg = (number_of(machine, one) for one in (seccomp.SENDTO, seccomp.SENDMSG))

    for grants in (CONNECT, LISTEN):
        assert answer(machine, sendto, 5, 0, 1, 0x4000, grants=grants) == ALLOW
        assert answer(machine, sendto, 5, 0, 1, FASTOPEN | 0x4000, grants=grants) == EPERM
        assert answer(machine, sendmsg, 5, 0, 0, grants=grants) == ALLOW
        assert answer(machine, sendmsg, 5, 0, FASTOPEN, grants=grants) == EPERM


def test_the_options_of_tcp_are_few(machine: str) -> None:
    option = number_of(machine, seccomp.SETSOCKOPT)
    tcp = socket.IPPROTO_TCP

    assert answer(machine, option, 5, tcp, socket.TCP_NODELAY, grants=CONNECT) == ALLOW
    assert answer(machine, option, 5, tcp, 30, grants=CONNECT) == EPERM, "TCP_FASTOPEN_CONNECT"
    level = socket.SOL_SOCKET
    assert answer(machine, option, 5, level, socket.SO_KEEPALIVE, grants=LISTEN) == ALLOW
    assert answer(machine, option, 5, level, socket.SO_PASSCRED, grants=LISTEN) == ALLOW
    assert answer(machine, option, 5, level, socket.SO_SNDBUF, grants=ALL) == EPERM
    assert answer(machine, option, 5, socket.IPPROTO_IP, socket.SO_PASSCRED, grants=ALL) == EPERM


def test_a_device_may_be_asked_anything_but_to_act_on_others(machine: str) -> None:
    ioctl = number_of(machine, seccomp.IOCTL)

    assert answer(machine, ioctl, 5, 0x5402, grants=DEVICES) == ALLOW, "TCSETS"
    for request in seccomp.DEVICE_IOCTLS_REFUSED:
        assert answer(machine, ioctl, 5, request, grants=ALL) == EPERM


@pytest.mark.parametrize("name", sorted(FORBIDDEN))
def test_no_grant_opens_what_is_not_its_own(machine: str, name: str) -> None:
    number = FORBIDDEN[name][seccomp.MACHINES[machine].column]
    granted = ("socket", "clone", "connect", "fsync", "fdatasync", "pwritev2")
    if number is None or name in granted:
        pytest.skip("no such call here, or one of a grant, above")

    assert answer(machine, number, grants=ALL) == EPERM


def test_each_grant_adds_its_own_calls(machine: str) -> None:
    base = set(seccomp.allowed_calls(machine))
    added = {
        name: set(seccomp.allowed_calls(machine, grants)) - base
        for name, grants in {
            "threads": THREADS, "streams": STREAMS, "ports": PORTS, "connect": CONNECT,
            "listen": LISTEN, "devices": DEVICES, "block": BLOCK, "entropy": ENTROPY,
            "file": FILE, "keyring": KEYRING,
        }.items()
    }  # fmt: skip

    assert added == {
        "threads": {"set_robust_list", "rseq"},
        "streams": set(),
        "ports": {"accept4"},
        "connect": {"connect", "getpeername", "shutdown"},
        "listen": {"accept4", "listen", "getpeername", "shutdown"},
        "devices": set(),
        "block": {"pwritev2", "fdatasync"},
        "entropy": set(),
        "file": {"fsync"},
        "keyring": set(),
    }


OWN: Final = 7  # descriptor of a secret's directory
SECRET: Final = Secret(OWN)
AT_FDCWD: Final = 0xFFFF_FF9C
DIRECTORY_FLAG: Final = {"x86_64": 0o200_000, "riscv64": 0o200_000, "aarch64": 0o40_000}
PATH_FLAG: Final = 0o10_000_000
TRUNCATE_FLAG: Final = 0o1_000
READ_WRITE: Final = 2


def test_files_are_opened_in_the_directory_of_the_secret_only(machine: str) -> None:
    number = number_of(machine, seccomp.OPENAT)
    flags = 0o2_504_000  # what an open for reading takes, on any of them

    def opened(directory: int, flags: int, secret: Secret = SECRET) -> int:
        return answer(machine, number, directory, 0, flags, grants=FILE, secret=secret)

    assert opened(OWN, flags) == ALLOW
    assert opened(OWN, flags | 0o301) == ALLOW, "O_WRONLY, O_CREAT and O_EXCL"
    for other in (AT_FDCWD, 0, OWN - 1, OWN + 1):
        assert opened(other, flags) == EPERM
    for flag in (DIRECTORY_FLAG[machine], PATH_FLAG, TRUNCATE_FLAG, READ_WRITE):
        assert opened(OWN, flags | flag) == EPERM, oct(flag)
    assert opened(OWN, flags, NO_SECRET) == EPERM, "a filter that knows no directory"


def test_the_flags_of_the_filter_are_those_that_the_kernel_uses_here() -> None:
    for flags in (durable.READ_FLAGS, durable.WRITE_FLAGS):
        assert flags & ~seccomp.SECRET_OPEN_FLAGS == 0


def test_files_are_renamed_and_removed_within_that_directory_only(machine: str) -> None:
    secret = Secret(OWN)
    rename, rename2, unlink = (
        number_of(machine, one) for one in (seccomp.RENAMEAT, seccomp.RENAMEAT2, seccomp.UNLINKAT)
    )

    def done(number: int, *words: int) -> int:
        return answer(machine, number, *words, grants=FILE, secret=secret)

    for number in (rename, rename2):
        assert done(number, OWN, 0, OWN, 0) == ALLOW
        for one, other in ((OWN, AT_FDCWD), (AT_FDCWD, OWN), (OWN, OWN + 1), (0, 0)):
            assert done(number, one, 0, other, 0) == EPERM
    assert done(rename2, OWN, 0, OWN, 0, 2) == EPERM, "RENAME_EXCHANGE"
    assert done(unlink, OWN, 0, 0) == ALLOW
    assert done(unlink, OWN, 0, 0x200) == EPERM, "AT_REMOVEDIR"
    assert done(unlink, AT_FDCWD, 0, 0) == EPERM


def test_one_key_is_read_and_updated_and_nothing_else_is_asked_of_keyrings(machine: str) -> None:
    keyctl, key = number_of(machine, seccomp.KEYCTL), 123_456_789
    read, update = 11, 2

    def asked(*words: int) -> int:
        return answer(machine, keyctl, *words, grants=KEYRING, secret=Secret(key=key))

    assert asked(read, key) == asked(update, key) == ALLOW
    for operation in range(40):
        if operation not in (read, update):
            assert asked(operation, key) == EPERM, operation
    for other in (key + 1, 0, 0xFFFF_FFFD, 0xFFFF_FFFC):  # the session's and the user's keyring
        assert asked(read, other) == EPERM
    assert answer(machine, keyctl, read, 0, grants=KEYRING) == EPERM, "there is no key"
    assert answer(machine, keyctl, read, key, grants=FILE, secret=Secret(OWN)) == EPERM


def test_the_stages_before_open_the_same_directory_for_a_secret(machine: str) -> None:
    """Filters are stacked: what the last one allows the first one must have allowed."""
    for grants, secret in ((FILE, Secret(OWN)), (KEYRING, Secret(key=5))):
        for stage in Stage:
            allowed = set(seccomp.allowed_calls(machine, grants, stage))
            assert set(seccomp.allowed_calls(machine, grants)) <= allowed
            calls = [(seccomp.RENAMEAT, OWN, 0, OWN), (seccomp.UNLINKAT, OWN, 0, 0)]
            if secret.key:
                calls = [(seccomp.KEYCTL, 11, 5, 0)]
            for pair, *words in calls:
                number = number_of(machine, pair)
                assert answer(
                    machine, number, *words, grants=grants, stage=stage, secret=secret
                ) == ALLOW  # fmt: skip


def test_each_stage_of_an_interpreter_is_stricter_than_the_one_before(machine: str) -> None:
    calls = {stage: set(seccomp.allowed_calls(machine, ALL, stage)) for stage in Stage}

    assert calls[Stage.FINAL] < calls[Stage.IMPORT] < calls[Stage.START]
    assert "execve" in calls[Stage.START] - calls[Stage.IMPORT]
    for name in ("execve", "clone", "socket", "kill", "ptrace", "bind", "openat2", "dup"):
        assert name not in calls[Stage.IMPORT]
    limits = number_of(machine, seccomp.PRLIMIT)
    assert answer(machine, limits, 0, 7, stage=Stage.START) == ALLOW
    assert answer(machine, limits, 1234, 7, stage=Stage.START) == EPERM
    assert answer(machine, limits, 0, 7) == EPERM
    executable = number_of(machine, seccomp.MMAP)
    assert answer(machine, executable, 0, 4096, 5, stage=Stage.IMPORT) == ALLOW
    assert answer(machine, executable, 0, 4096, 5) == EPERM


@pytest.mark.parametrize("role", list(StreamRole))
def test_a_stream_port_adds_accept_alone_and_no_way_to_connect(
    machine: str, role: StreamRole
) -> None:
    column = seccomp.MACHINES[machine].column
    address = "" if role is StreamRole.UNIX else "127.0.0.1"
    grants = Grants(stream_ports=(StreamGrant("far", role, address, 4318 if address else 0),))
    added = set(seccomp.allowed_calls(machine, grants)) - set(seccomp.allowed_calls(machine))

    assert added == set(seccomp.ACCEPT_CALLS)
    for number, flags in ((seccomp.SENDTO[column], 3), (seccomp.SENDMSG[column], 2)):
        plain = [0] * 6
        fast = [0] * 6
        fast[flags] = seccomp.MSG_FASTOPEN
        assert answer(machine, number, *plain, grants=grants) == ALLOW
        expected = ALLOW if role is StreamRole.UNIX else EPERM
        assert answer(machine, number, *fast, grants=grants) == expected
    for name in ("socket", "connect", "bind"):
        forbidden = FORBIDDEN[name][column]
        assert forbidden is not None
        assert answer(machine, forbidden, grants=grants) == EPERM
