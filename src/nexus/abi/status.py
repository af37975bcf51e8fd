"""The closed set of kernel refusals. Nothing else ever reaches a service, no bare OSError."""

from enum import IntEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nexus.abi.types import LinkId


class Status(IntEnum):
    """Why a trap was refused. Closed: the kernels raise no other."""

    PERMISSION_DENIED = 1  # the capability lacks the right, or the task the authority
    NO_SUCH_ENDPOINT = 2  # closed, or its owner is gone
    QUEUE_FULL = 3  # the link holds as many messages as its depth
    QUEUE_EMPTY = 4  # nothing is queued, and the caller does not wait
    NO_SPACE = 5  # bytes, slots, budgets, delegations: a bound is reached
    TIMED_OUT = 6  # the deadline has passed
    INVALID_ARGUMENT = 7  # a size, slot, number or name that cannot be
    UNSUPPORTED = 8  # this kernel cannot do it
    DEVICE_FAILED = 9  # the device reports an error: what it did is not known (ADR 12)


class SpawnReason(IntEnum):
    """Why the last spawn failed. Numbers are the reference system's (core.md 1.4)."""

    NONE = 0
    OOM = 1
    CAP_TABLE_FULL = 2
    ENDPOINT_QUOTA = 3
    MAP_FAILED = 4
    INVALID_PAYLOAD = 5
    DENIED_BY_POLICY = 6


class AbiError(Exception):
    """A trap was refused; `status` says why and the text is for people."""

    def __init__(self, status: Status, detail: str = "") -> None:
        super().__init__(f"{status.name}: {detail}" if detail else status.name)
        self.status = status


class PeerGone(AbiError):
    """The other end of `link` is closed and everything it had sent has been received.

    Raised once per link, with status NO_SUCH_ENDPOINT; the link id is dead afterwards.
    """

    def __init__(self, link: "LinkId") -> None:
        super().__init__(Status.NO_SUCH_ENDPOINT, f"the peer of link {link} is gone")
        self.link = link
