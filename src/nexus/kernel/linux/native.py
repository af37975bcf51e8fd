"""The Linux calls CPython has no function for, with their numbers and structures.

Every wrapper raises OSError on failure. The library handle is opened at import, so that a
confined child, which can open nothing any more, still has it.
"""

import ctypes
import mmap
import os
import platform
import struct
from collections.abc import Callable, Iterable
from typing import Final

LIBC: Final = ctypes.CDLL(None, use_errno=True)

# include/uapi/linux/prctl.h
PR_SET_PDEATHSIG: Final = 1
PR_GET_DUMPABLE: Final = 3
PR_SET_DUMPABLE: Final = 4
PR_SET_KEEPCAPS: Final = 8
PR_SET_NAME: Final = 15
PR_SET_NO_NEW_PRIVS: Final = 38
PR_CAP_AMBIENT: Final = 47
PR_CAP_AMBIENT_RAISE: Final = 2
PR_CAP_AMBIENT_CLEAR_ALL: Final = 4

# include/uapi/linux/sched.h
CLONE_NEWUTS: Final = 0x0400_0000
CLONE_NEWIPC: Final = 0x0800_0000
CLONE_NEWNET: Final = 0x4000_0000

# include/uapi/linux/membarrier.h
MEMBARRIER_QUERY: Final = 0
MEMBARRIER_GLOBAL_EXPEDITED: Final = 1 << 1
MEMBARRIER_REGISTER_GLOBAL_EXPEDITED: Final = 1 << 2

# include/uapi/linux/fcntl.h: not named in fcntl before 3.14
F_SEAL_FUTURE_WRITE: Final = 0x10

# include/uapi/asm-generic/ioctls.h and sockios.h, the same on x86_64, aarch64 and riscv64
SIOCOUTQ: Final = 0x5411
SIOCINQ: Final = 0x541B

# include/uapi/asm-generic/socket.h
SO_PEEK_OFF: Final = 42
SO_COOKIE: Final = 57

MSG_CMSG_CLOEXEC: Final = 0x4000_0000
TFD_CLOEXEC: Final = 0x8_0000
TFD_NONBLOCK: Final = 0x800
TFD_TIMER_ABSTIME: Final = 1
CLOCK_MONOTONIC: Final = 1

# System call numbers that are the same on every 64-bit architecture (unified since 5.1)
NR_CLOSE_RANGE: Final = 436
NR_LANDLOCK_CREATE_RULESET: Final = 444
NR_LANDLOCK_ADD_RULE: Final = 445
NR_LANDLOCK_RESTRICT_SELF: Final = 446

MACHINE: Final = platform.machine()
NR_MEMBARRIER: Final = 324 if MACHINE == "x86_64" else 283  # else the generic table's

CAP_DAC_READ_SEARCH: Final = 2  # include/uapi/linux/capability.h
_CAPABILITY_VERSION_3: Final = 0x2008_0522
_UINT_MAX: Final = 0xFFFF_FFFF
_ITIMERSPEC: Final = struct.Struct("@qqqq")
_SIGSET_SIZE: Final = 128  # bytes of sigset_t in glibc and musl, on every architecture
_MAP_FAILED: Final = ctypes.c_void_p(-1).value

_mmap: Final = LIBC.mmap
_mmap.restype = ctypes.c_void_p
_mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int64,
)
_munmap: Final = LIBC.munmap
_munmap.restype = ctypes.c_int
_munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_madvise: Final = LIBC.madvise
_madvise.restype = ctypes.c_int
_madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_mlock: Final = LIBC.mlock
_mlock.restype = ctypes.c_int
_mlock.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_timerfd_settime: Final = LIBC.timerfd_settime
_timerfd_settime.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)


def _checked(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def prctl(option: int, value: int, third: int = 0) -> int:
    """prctl(2) with one argument, or two."""
    words = (ctypes.c_ulong(value), ctypes.c_ulong(third), 0, 0)
    return _checked(LIBC.prctl(option, *words), f"prctl({option})")


def syscall(number: int, *arguments: object) -> int:
    """A system call by number."""
    return _checked(LIBC.syscall(number, *arguments), f"syscall {number}")


def membarrier(command: int) -> int:
    """membarrier(2)."""
    return syscall(NR_MEMBARRIER, ctypes.c_int(command), ctypes.c_uint(0), ctypes.c_int(0))


def close_descriptors_except(keep: tuple[int, ...]) -> None:
    """Close every descriptor above 2 that is not in `keep`."""
    low = 3
    for descriptor in sorted(number for number in keep if number > 2):
        if descriptor > low:
            _close_range(low, descriptor - 1)
        low = descriptor + 1
    _close_range(low, _UINT_MAX)


def _close_range(low: int, high: int) -> None:
    _ = syscall(NR_CLOSE_RANGE, ctypes.c_uint(low), ctypes.c_uint(high), 0)


def drop_capabilities() -> None:
    """Give up every capability of the calling process, and the way to any."""
    _ = prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL)
    _set_capabilities(0)


def keep_read_capability() -> None:
    """Give up every capability but CAP_DAC_READ_SEARCH, and keep that one through an exec: for
    an interpreter whose files only root may read. For a process that set PR_SET_KEEPCAPS
    before it changed its ids."""
    _set_capabilities(1 << CAP_DAC_READ_SEARCH)
    _ = prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, CAP_DAC_READ_SEARCH)


def _set_capabilities(low: int) -> None:
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    # effective, permitted, inheritable; low words, high words
    words = (ctypes.c_uint32 * 6)(low, low, low, 0, 0, 0)
    _ = _checked(LIBC.capset(header, words), "capset")


def environment_strings() -> list[int]:
    """The addresses of the strings of the C library's environment."""
    listed = ctypes.POINTER(ctypes.c_void_p).in_dll(LIBC, "environ")
    found: list[int] = []
    if not ctypes.cast(listed, ctypes.c_void_p).value:
        return found
    while address := listed[len(found)]:
        found.append(address)
    return found


def set_name(name: str) -> None:
    """The name that ps shows; the kernel cuts it to 15 bytes."""
    text = ctypes.create_string_buffer(name.encode())
    _ = _checked(LIBC.prctl(PR_SET_NAME, text, 0, 0, 0), "PR_SET_NAME")


def unshare(flags: int) -> None:
    """Leave the namespaces in `flags` for fresh ones."""
    _ = _checked(LIBC.unshare(flags), "unshare")


def setns(descriptor: int) -> None:
    """Enter the namespace a descriptor names."""
    _ = _checked(LIBC.setns(descriptor, 0), "setns")


def timerfd() -> int:
    """A non-blocking timer on the monotonic clock, not armed."""
    return _checked(LIBC.timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK), "timerfd")


def timerfd_arm(descriptor: int, deadline: int) -> None:
    """Let a timer fire once at an absolute time in nanoseconds; a past time fires at once."""
    # A zero time would disarm it.
    seconds, nanoseconds = divmod(max(deadline, 1), 1_000_000_000)
    setting = _ITIMERSPEC.pack(0, 0, seconds, nanoseconds)
    if _timerfd_settime(descriptor, TFD_TIMER_ABSTIME, setting, None) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def signalfd(numbers: Iterable[int]) -> int:
    """A non-blocking descriptor by which the process takes those of its blocked signals."""
    wanted = ctypes.create_string_buffer(_SIGSET_SIZE)
    _ = _checked(LIBC.sigemptyset(wanted), "sigemptyset")
    for number in numbers:
        _ = _checked(LIBC.sigaddset(wanted, ctypes.c_int(number)), "sigaddset")
    return _checked(LIBC.signalfd(-1, wanted, os.O_CLOEXEC | os.O_NONBLOCK), "signalfd")


class _Mapping:
    """Unmaps when the array that lies over the mapping is no longer referred to.

    A mapping is of the process that made it: a child of a fork has not got it.
    """

    __slots__ = ("address", "ended", "length", "pid")

    def __init__(self, address: int, length: int, ended: Callable[[], None] | None) -> None:
        self.address = address
        self.length = length
        self.ended = ended
        self.pid = os.getpid()

    def __del__(self) -> None:
        if os.getpid() != self.pid:
            return  # something else may stand at this address by now
        _ = _munmap(self.address, self.length)
        if self.ended is not None:
            self.ended()


def map_read_only(
    descriptor: int, length: int, ended: Callable[[], None] | None = None
) -> memoryview:
    """A read-only shared mapping of a descriptor as bytes, unmapped when the view and all that
    were made from it are released; then `ended` is called.

    mmap.mmap would keep a duplicate of the descriptor for as long as the mapping lives.
    """
    array = _map(descriptor, length, 0, mmap.PROT_READ, ended)
    return memoryview(array).toreadonly().cast("B")


def map_writable(descriptor: int, length: int, ended: Callable[[], None]) -> memoryview:
    """A shared mapping of a descriptor that may be written, as bytes; it ends as one that is
    read only does."""
    protection = mmap.PROT_READ | mmap.PROT_WRITE
    return memoryview(_map(descriptor, length, 0, protection, ended)).cast("B")


def map_shared(descriptor: int, length: int, offset: int) -> "ctypes.Array[ctypes.c_ubyte]":
    """A shared mapping of a descriptor that may be written, unmapped when the array and all that
    was made from it are let go."""
    return _map(descriptor, length, offset, mmap.PROT_READ | mmap.PROT_WRITE, None)


def map_for_child(descriptor: int, length: int, offset: int) -> int:
    """The address of a shared mapping that may be written, and that a child of the next fork
    inherits; `unmap` ends it."""
    return _map_at(descriptor, length, offset, mmap.PROT_READ | mmap.PROT_WRITE)


def unmap(address: int, length: int) -> None:
    """End a mapping of `map_for_child`."""
    _ = _checked(_munmap(address, length), "munmap")


def at_address(address: int, length: int) -> "ctypes.Array[ctypes.c_ubyte]":
    """Memory that was mapped before this process was forked, for as long as it lives."""
    return (ctypes.c_ubyte * length).from_address(address)


def lock_memory(array: "ctypes.Array[ctypes.c_ubyte]") -> None:
    """Have every page of a mapping in memory, to stay there."""
    _ = _checked(_mlock(ctypes.addressof(array), len(array)), "mlock")


def _map_at(descriptor: int, length: int, offset: int, protection: int) -> int:
    address: int | None = _mmap(None, length, protection, mmap.MAP_SHARED, descriptor, offset)
    if address is None or address == _MAP_FAILED:
        number = ctypes.get_errno()
        raise OSError(number, f"mmap: {os.strerror(number)}")
    return address


def _map(
    descriptor: int, length: int, offset: int, protection: int, ended: Callable[[], None] | None
) -> "ctypes.Array[ctypes.c_ubyte]":
    address = _map_at(descriptor, length, offset, protection)
    if _madvise(address, length, mmap.MADV_DONTFORK) < 0:
        number = ctypes.get_errno()
        _ = _munmap(address, length)
        raise OSError(number, f"madvise: {os.strerror(number)}")
    array = (ctypes.c_ubyte * length).from_address(address)
    array.mapping = _Mapping(address, length, ended)  # type: ignore[attr-defined]
    return array
