"""Reservations: a part is taken from a total when something is made, and given back after.

Exact: a total is never exceeded, and what is given back was taken.
"""

from nexus.abi import AbiError, Status
from nexus.kernel.core.limits import SystemLimits


class Pool:
    """A total and what is taken from it."""

    __slots__ = ("name", "total", "used")

    def __init__(self, name: str, total: int) -> None:
        assert total >= 0, "a total is a count or a size"
        self.name = name
        self.total = total
        self.used = 0

    @property
    def free(self) -> int:
        """What can still be taken."""
        return self.total - self.used

    def take(self, amount: int) -> None:
        """Take a part. Refuses: NoSpace; nothing is taken then."""
        assert amount >= 0, "a part is a count or a size"
        if amount > self.total - self.used:
            raise AbiError(Status.NO_SPACE, f"{amount} of {self.name}, {self.free} are free")
        self.used += amount

    def give(self, amount: int) -> None:
        """Give a part back."""
        assert 0 <= amount <= self.used, "only what was taken is given back"
        self.used -= amount


class OwnerShare:
    """What one task has reserved from the system, and what it has used of that."""

    __slots__ = ("endpoints", "size")

    def __init__(self, size: int, endpoints: int) -> None:
        self.size = Pool("link bytes of the owner", size)
        self.endpoints = Pool("endpoints of the owner", endpoints)


class SystemShares:
    """The totals of a system and the shares its tasks have reserved from them."""

    __slots__ = ("endpoints", "size", "tasks")

    def __init__(self, limits: SystemLimits) -> None:
        self.size = Pool("link bytes of the system", limits.total_size)
        self.endpoints = Pool("endpoints of the system", limits.endpoints)
        self.tasks = Pool("tasks of the system", limits.tasks)

    def reserve(self, size: int, endpoints: int) -> OwnerShare:
        """Reserve an owner's share. Refuses: NoSpace; nothing is reserved then."""
        self.size.take(size)
        try:
            self.endpoints.take(endpoints)
        except AbiError:
            self.size.give(size)
            raise
        return OwnerShare(size, endpoints)

    def release(self, share: OwnerShare) -> None:
        """Give an owner's whole share back, used or not: its task is gone."""
        self.size.give(share.size.total)
        self.endpoints.give(share.endpoints.total)
