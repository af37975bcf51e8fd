"""Landlock: every file and network right handled, none granted that is not named here, signals
and sockets scoped."""

import ctypes
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Final

from nexus.kernel.linux.native import (
    NR_LANDLOCK_ADD_RULE,
    NR_LANDLOCK_CREATE_RULESET,
    NR_LANDLOCK_RESTRICT_SELF,
    PR_SET_NO_NEW_PRIVS,
    prctl,
    syscall,
)

# include/uapi/linux/landlock.h: bits of LANDLOCK_ACCESS_FS_* known to each ABI version
FS_BITS: Final = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
NET_SINCE: Final = 4  # ABI version with TCP bind and connect
SCOPE_SINCE: Final = 6  # ABI version with abstract sockets and signals
NET_RIGHTS: Final = 0b11
SCOPES: Final = 0b11
FS_EXECUTE: Final = 1 << 0
FS_WRITE_FILE: Final = 1 << 1
FS_READ_FILE: Final = 1 << 2
FS_READ_DIR: Final = 1 << 3
FS_REMOVE_FILE: Final = 1 << 5
FS_MAKE_REG: Final = 1 << 8
# What it takes to read a file of a directory, and to replace it by another one of it.
FS_REPLACE: Final = FS_READ_FILE | FS_WRITE_FILE | FS_MAKE_REG | FS_REMOVE_FILE
NET_CONNECT_TCP: Final = 1 << 1
_CREATE_RULESET_VERSION: Final = 1
_RULE_PATH_BENEATH: Final = 1
_RULE_NET_PORT: Final = 2


class _Ruleset(ctypes.Structure):
    _fields_ = [  # type: ignore[mutable-override]
        ("handled_access_fs", ctypes.c_uint64),
        ("handled_access_net", ctypes.c_uint64),
        ("scoped", ctypes.c_uint64),
    ]


class _Beneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = [("allowed", ctypes.c_uint64), ("parent", ctypes.c_int32)]  # type: ignore[mutable-override]


class _Port(ctypes.Structure):
    _fields_ = [("allowed", ctypes.c_uint64), ("port", ctypes.c_uint64)]  # type: ignore[mutable-override]


def version() -> int:
    """The ABI version of the running kernel; 0 if it has no Landlock."""
    try:
        return syscall(NR_LANDLOCK_CREATE_RULESET, None, 0, _CREATE_RULESET_VERSION)
    except OSError:
        return 0


def restrict(
    abi: int,
    *,
    connect: Iterable[int] = (),
    readable: Iterable[str] = (),
    replaceable: Iterable[int] = (),
) -> int:
    """Confine the calling process for ever; returns a descriptor for the caller to close.

    `connect` are the TCP ports it may still connect to (NET_SINCE), `readable` the files and
    directories it may still read and execute; those that are not there are left out.
    `replaceable` are descriptors of directories whose files it may read, make and remove.
    Raises OSError.
    """
    assert abi >= 1, "the caller has looked at version()"
    fields = 3 if abi >= SCOPE_SINCE else 2 if abi >= NET_SINCE else 1
    ruleset = _Ruleset(
        (1 << FS_BITS[min(abi, max(FS_BITS))]) - 1,
        NET_RIGHTS if abi >= NET_SINCE else 0,
        SCOPES if abi >= SCOPE_SINCE else 0,
    )
    size = fields * ctypes.sizeof(ctypes.c_uint64)
    descriptor = syscall(NR_LANDLOCK_CREATE_RULESET, ctypes.byref(ruleset), size, 0)
    for path in readable:
        with suppress(FileNotFoundError, NotADirectoryError, PermissionError):
            _allow_reading(descriptor, path)
    for directory in replaceable:
        _allow(descriptor, directory, FS_REPLACE)
    for port in connect:
        rule = _Port(NET_CONNECT_TCP, port)
        _ = syscall(NR_LANDLOCK_ADD_RULE, descriptor, _RULE_NET_PORT, ctypes.byref(rule), 0)
    _ = prctl(PR_SET_NO_NEW_PRIVS, 1)
    _ = syscall(NR_LANDLOCK_RESTRICT_SELF, descriptor, 0)
    return descriptor


def _allow_reading(ruleset: int, path: str) -> None:
    parent = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        rights = FS_READ_FILE | FS_EXECUTE
        if Path(path).is_dir():
            rights |= FS_READ_DIR
        _allow(ruleset, parent, rights)
    finally:
        os.close(parent)


def _allow(ruleset: int, parent: int, rights: int) -> None:
    rule = _Beneath(rights, parent)
    _ = syscall(NR_LANDLOCK_ADD_RULE, ruleset, _RULE_PATH_BENEATH, ctypes.byref(rule), 0)
