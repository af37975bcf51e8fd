"""Landlock: every file and network right handled, none granted, signals and sockets scoped."""

import ctypes
from typing import Final

from nexus.kernel.linux.native import (
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
_CREATE_RULESET_VERSION: Final = 1


class _Ruleset(ctypes.Structure):
    _fields_ = [  # type: ignore[mutable-override]
        ("handled_access_fs", ctypes.c_uint64),
        ("handled_access_net", ctypes.c_uint64),
        ("scoped", ctypes.c_uint64),
    ]


def version() -> int:
    """The ABI version of the running kernel; 0 if it has no Landlock."""
    try:
        return syscall(NR_LANDLOCK_CREATE_RULESET, None, 0, _CREATE_RULESET_VERSION)
    except OSError:
        return 0


def restrict(abi: int) -> int:
    """Confine the calling process for ever; returns a descriptor for the caller to close.

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
    _ = prctl(PR_SET_NO_NEW_PRIVS, 1)
    _ = syscall(NR_LANDLOCK_RESTRICT_SELF, descriptor, 0)
    return descriptor
