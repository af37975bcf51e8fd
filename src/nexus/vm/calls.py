"""What process 1 of a guest asks of Linux and CPython has no function for. All of it raises OSError
and needs root.
"""

import ctypes
import fcntl
import os
import socket
import struct
from enum import IntEnum, IntFlag
from pathlib import Path
from typing import Final

from nexus.kernel.linux.native import LIBC, MACHINE, syscall

NR_INIT_MODULE: Final = 175 if MACHINE == "x86_64" else 105  # else the generic table's

# include/uapi/linux/sockios.h and if.h
SIOCGIFFLAGS: Final = 0x8913
SIOCSIFFLAGS: Final = 0x8914
IFF_UP: Final = 1
_IFREQ: Final = struct.Struct("=16sh14x")


class Mounted(IntFlag):
    """How a file system is mounted: include/uapi/linux/mount.h."""

    READ_ONLY = 1
    NO_SUID = 2
    NO_DEVICES = 4
    NO_EXEC = 8
    REMOUNT = 32
    BIND = 4096


class Power(IntEnum):
    """What becomes of the machine: include/uapi/linux/reboot.h."""

    OFF = 0x4321_FEDC
    REBOOT = 0x0123_4567
    IGNORE_KEYS = 0  # Ctrl-Alt-Del is a signal to process 1


def mount(source: str, target: Path, kind: str, flags: Mounted, data: str = "") -> None:
    """mount(2); the target is made if it is not there."""
    target.mkdir(parents=True, exist_ok=True)
    words = (source.encode(), os.fsencode(target), kind.encode())
    _check(LIBC.mount(*words, ctypes.c_ulong(flags), data.encode() or None), f"mount {target}")


def unmount(target: Path) -> None:
    """umount(2)."""
    _check(LIBC.umount2(os.fsencode(target), 0), f"umount {target}")


def load_module(image: bytes) -> None:
    """Load a module of Linux's; one that is loaded already is no error."""
    try:
        _ = syscall(NR_INIT_MODULE, image, ctypes.c_ulong(len(image)), b"")
    except FileExistsError:
        return


def power(what: Power) -> None:
    """reboot(2); returns only for what does not end the machine."""
    _check(LIBC.reboot(ctypes.c_int(what)), f"reboot {what.name}")


def raise_interface(name: str) -> None:
    """Have a network interface up."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        asked = fcntl.ioctl(any_socket, SIOCGIFFLAGS, _IFREQ.pack(name.encode(), 0))
        _, flags = _IFREQ.unpack(asked)
        _ = fcntl.ioctl(any_socket, SIOCSIFFLAGS, _IFREQ.pack(name.encode(), flags | IFF_UP))


def _check(result: int, what: str) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
