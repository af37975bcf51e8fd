"""The plain types of the ABI."""

from enum import IntEnum, IntFlag
from typing import Final, NewType

Nanos = NewType("Nanos", int)
"""A point on, or a span of, the kernel's monotonic clock, in nanoseconds."""

ServiceId = NewType("ServiceId", int)
"""64-bit identity the kernel stamps on every message: FNV-1a 64 of the service name."""

Pid = NewType("Pid", int)
"""Number of a task. Given again only when no message of its former holder can still be queued."""

Slot = NewType("Slot", int)
"""Index into the task's own capability table, 0 <= slot < SLOTS_MAX."""

LinkId = NewType("LinkId", int)
"""A link as its receiver knows it; never used twice in the life of the receiving task."""

NO_WAIT: Final = Nanos(0)
"""As a deadline: do not wait. Refusals are then QueueFull, NoSpace or QueueEmpty."""

NEVER: Final = Nanos((1 << 63) - 1)
"""Largest deadline. Only a service's idle wait for requests may use it."""


class Rights(IntFlag):
    """What a capability allows. Derived only downwards."""

    SEND = 1
    RECV = 2
    MAP = 4
    MANAGE = 8


class CapKind(IntEnum):
    """What a capability names. Numbers 1 and 2 are the reference system's."""

    VMO = 1
    DEVICE = 2
    ENDPOINT = 3
    LINK = 4
    BLOCK = 5  # a block device that the kernel drives
    ENTROPY = 6  # an entropy source that the kernel drives


class QosClass(IntEnum):
    """Scheduling class of a task. Never renumbered; unknown numbers are refused, not clamped."""

    IDLE = 0
    NORMAL = 1
    INTERACTIVE = 2
    PERF_BURST = 3


class HardwareKind(IntEnum):
    """What a device of the bus map is for. Numbers are virtio's device ids."""

    EMPTY = 0  # a transport with no device behind it
    BLOCK = 2
    ENTROPY = 4


class SecretBackend(IntEnum):
    """Where the kernel keeps the secret of a service that was granted one."""

    NONE = 0
    FILE = 1  # a directory of the state directory that only this service can look into
    KEYRING = 2  # Linux's key retention service; lost with the machine's power
