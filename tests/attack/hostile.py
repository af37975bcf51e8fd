"""What a hostile service has: raw system calls, and its own process's memory.

Everything here runs inside a service of the Linux kernel backend. The driver is a library in the
hostile process, so its objects are the attacker's to use: `driver()` finds it, `socket_of` takes
the descriptor behind a slot, `call` makes a system call that no library allows or refuses.
"""

import ctypes
import errno
import json
import os
import socket
import stat
import struct
import sys
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any, Final

from nexus.abi import BootImage, Slot
from nexus.testing.conformance.steps import take, tell
from nexus.testing.rig import Main

LIBC: Final = ctypes.CDLL(None, use_errno=True)
DESCRIPTORS_LOOKED_AT: Final = 2048
REPORT_SIZE: Final = 3000  # bytes of a report per message of the control link

FSTAT: Final = 5  # x86_64
FTRUNCATE: Final = 77
MMAP: Final = 9
MUNMAP: Final = 11
MIB: Final = 1 << 20
MAP_SHARED_ANONYMOUS: Final = 0x21
MAP_PRIVATE_ANONYMOUS: Final = 0x22
READ_WRITE: Final = 3
MODE_AT: Final = 24  # offset of st_mode in struct stat of x86_64
KINDS: Final = {
    stat.S_IFSOCK: "socket",
    stat.S_IFIFO: "pipe",
    stat.S_IFREG: "file",
    stat.S_IFCHR: "device",
    stat.S_IFDIR: "directory",
    stat.S_IFBLK: "disk",
}

UCRED: Final = struct.Struct("=iII")
INTS: Final = struct.Struct("=ii")


def driver() -> Any:
    """The driver that runs the calling coroutine, found by walking up the stack."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        candidate = frame.f_locals.get("self")
        if candidate is not None and hasattr(candidate, "table"):
            return candidate
        frame = frame.f_back
    raise AssertionError("no driver above")


def socket_of(slot: Slot) -> socket.socket:
    """The socket of the link in a slot, behind the driver's back."""
    held: Any = driver().table.entries[slot].object
    found: socket.socket = held.sock
    return found


def errno_of(attempt: Callable[[], Any]) -> int:
    """The errno of an attempt, 0 if it succeeded."""
    try:
        attempt()
    except OSError as error:
        assert error.errno is not None
        return error.errno
    return 0


def call(number: int, *arguments: Any) -> int:
    """A raw system call: its errno, 0 if it succeeded."""
    return result(number, *arguments)[1]


def result(number: int, *arguments: Any) -> tuple[int, int]:
    """A raw system call: what it returned, and its errno."""
    ctypes.set_errno(0)
    wide = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    LIBC.syscall.restype = ctypes.c_long
    returned = LIBC.syscall(ctypes.c_long(number), *wide)
    return returned, ctypes.get_errno() if returned == -1 else 0


def open_descriptors() -> dict[int, str]:
    """Every open descriptor and what it is, without /proc and without libc's fstat, which asks
    by path: that call is refused, and a refusal is not "closed"."""
    found = {}
    for descriptor in range(DESCRIPTORS_LOOKED_AT):
        status = ctypes.create_string_buffer(256)
        error = call(FSTAT, descriptor, status)
        if error == errno.EBADF:
            continue
        assert error == 0, f"fstat of {descriptor}: {errno.errorcode[error]}"
        mode = int.from_bytes(status.raw[MODE_AT : MODE_AT + 4], "little")
        found[descriptor] = KINDS.get(stat.S_IFMT(mode), "anonymous")
    return found


def forged(sock: socket.socket, data: bytes, *, pid: int, uid: int, gid: int) -> int:
    """Send with chosen credentials: the errno."""
    credentials = UCRED.pack(pid, uid, gid)
    ancillary = [(socket.SOL_SOCKET, socket.SCM_CREDENTIALS, credentials)]
    return errno_of(lambda: sock.sendmsg([data], ancillary, socket.MSG_DONTWAIT))


def with_descriptors(sock: socket.socket, data: bytes, descriptors: list[int]) -> int:
    """Send with descriptors attached: the errno."""
    packed = struct.pack(f"={len(descriptors)}i", *descriptors)
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, packed)]
    return errno_of(lambda: sock.sendmsg([data], ancillary, socket.MSG_DONTWAIT))


def hoard(_boot: BootImage, _told: Mapping[str, Any]) -> dict[str, Any]:
    """Map 300 MiB in both ways, a MiB at a time, and make a memory object of 1 TiB."""
    taken = {}
    for name, flags in (("private", MAP_PRIVATE_ANONYMOUS), ("shared", MAP_SHARED_ANONYMOUS)):
        maps: list[int] = []
        while len(maps) < 300:
            address, error = result(MMAP, 0, MIB, READ_WRITE, flags, -1, 0)
            if error:
                break
            maps.append(address)
        for address in maps:
            assert call(MUNMAP, address, MIB) == 0
        taken[name] = len(maps)
    memory = os.memfd_create("huge_memory")
    taken["object"] = call(FTRUNCATE, memory, 1 << 40)
    os.close(memory)
    return taken


def reporting_back(attack: Callable[[BootImage, Mapping[str, Any]], Any]) -> Main:
    """A hostile program: told what to attack by its first message, it sends back what it got."""

    async def main(boot: BootImage) -> None:
        told = json.loads((await take(boot.endpoint)).data)
        outcome = attack(boot, told)
        if hasattr(outcome, "__await__"):
            outcome = await outcome
        text = json.dumps(outcome).encode()
        for start in range(0, len(text), REPORT_SIZE):
            await tell(boot, b"+" + text[start : start + REPORT_SIZE])
        await tell(boot, b".")

    return main


async def report(boot: BootImage, link: Any) -> Any:
    """The outcome of a hostile program, in root."""
    text = b""
    while True:
        message = await take(boot.endpoint, link=link)
        if message.data == b".":
            return json.loads(text)
        assert message.data[:1] == b"+"
        text += message.data[1:]


EPERM: Final = errno.EPERM
