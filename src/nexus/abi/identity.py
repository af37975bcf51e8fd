"""Identity as the kernel stamps it."""

from enum import StrEnum, unique
from typing import Final, NamedTuple

from nexus.abi.types import Pid, QosClass, ServiceId

FNV64_OFFSET: Final = 0xCBF29CE484222325  # FNV-1a 64 parameters, draft-eastlake-fnv
FNV64_PRIME: Final = 0x100000001B3
INIT_NAME: Final = "init-lite"
KERNEL_NAME: Final = "kernel"


def service_id(name: str) -> ServiceId:
    """The 64-bit id of a service: FNV-1a 64 of the bytes of its name."""
    digest = FNV64_OFFSET
    for byte in name.encode("ascii"):
        digest = ((digest ^ byte) * FNV64_PRIME) & 0xFFFF_FFFF_FFFF_FFFF
    return ServiceId(digest)


class Sender(NamedTuple):
    """Who sent a message, as the kernel knows it; never taken from a payload.

    `generation` counts the starts of the service, from 1. `qos` is the class the kernel holds.
    """

    service: ServiceId
    pid: Pid
    generation: int
    qos: QosClass


KERNEL: Final = service_id(KERNEL_NAME)
"""Sender of what the kernel itself tells the root task: a message to its own endpoint, pid 0,
link 0, whose bytes are the name of a signal (abi.Signal) that was sent to it from outside."""

OUTSIDE: Final = ServiceId(0)
"""Sender's service of a message from a port: no service of this system."""


@unique
class Signal(StrEnum):
    """What the kernel passes on to the root task, as b"SIGTERM"."""

    TERM = "SIGTERM"  # end the run in order
    INT = "SIGINT"  # the same
    HUP = "SIGHUP"  # read the policy files again


assert service_id("selftest-client") == 0x52C6C4A34FFB3F69  # core.md 2.6
