"""Accounts of bytes: the kernel heap, and each task's budget of kernel objects.

Every charge has a kind, and an account can be audited: the sum of what its live objects cost
must be what it says is used.
"""

from typing import Final, NoReturn

from nexus.abi import PAGE_SIZE, AbiError, Status

# What the objects cost, in bytes. The reference system's structures, rounded up to powers of two.
TASK_SIZE: Final = 1024  # control block and capability table
WAITER_SIZE: Final = 64  # one per task, charged with it: a task waits in one trap at a time
TIMER_SIZE: Final = 32  # one per task, charged with it, so a wait is never refused
ENDPOINT_SIZE: Final = 256
LINK_END_SIZE: Final = 128  # each end of a link: the owner's and the holder's
SLOT_SIZE: Final = 32
MESSAGE_SIZE: Final = 64  # in front of a queued message's bytes

OBJECT_ALIGN: Final = 16  # bytes; what malloc gives for these structures on 64-bit machines

BOOT_BUDGET_SIZE: Final = ENDPOINT_SIZE + LINK_END_SIZE + 2 * SLOT_SIZE
"""What a task's budget holds when it starts: its endpoint, its control link, two slots.

A task's budget is charged for what its table holds: each slot, and once for each object its end
of a link, an endpoint, the pages of a VMO. Links into own endpoints are bounded by shares."""

assert PAGE_SIZE % OBJECT_ALIGN == 0


def page_round(size: int) -> int:
    """A length rounded up to whole pages."""
    return -(-size // PAGE_SIZE) * PAGE_SIZE


class Account:
    """A budget of bytes, what is charged to it, and the last request it refused."""

    __slots__ = ("name", "refused_align", "refused_count", "refused_size", "total", "used")

    def __init__(self, name: str, total: int) -> None:
        self.name = name
        self.total = total
        self.used = 0
        self.refused_size = 0  # bytes of the last refused request, 0 if there was none
        self.refused_align = 0
        self.refused_count = 0

    @property
    def free(self) -> int:
        """Bytes that can still be charged."""
        return self.total - self.used

    def charge(self, size: int, align: int = OBJECT_ALIGN, *, asked: int | None = None) -> None:
        """Charge an object; `asked` is the size in the request where that was rounded up.

        Refuses: NoSpace; the request is kept, nothing is charged.
        """
        if size > self.total - self.used:
            self.refuse(size if asked is None else asked, align)
        self.add(size)

    def refuse(self, size: int, align: int) -> NoReturn:
        """Keep a request and refuse it with NoSpace."""
        self.refused_size = size
        self.refused_align = align
        self.refused_count += 1
        raise AbiError(Status.NO_SPACE, self.report())

    def add(self, size: int) -> None:
        """Count bytes that are known to fit."""
        self.used += size

    def refund(self, size: int) -> None:
        """Give the bytes of an object back."""
        assert 0 <= size <= self.used, "only what was charged is given back"
        self.used -= size

    def reported_used(self) -> int:
        """The bytes in use, as a report tells them."""
        return self.used

    def report(self) -> str:
        """The diagnostic line of an exhausted budget."""
        used = self.reported_used()
        return (
            f"{self.name}: req_size=0x{self.refused_size:x} req_align=0x{self.refused_align:x} "
            f"heap_budget_used=0x{used:x} heap_budget_free=0x{self.total - used:x} "
            f"heap_budget_total=0x{self.total:x}"
        )

    def fields(self) -> dict[str, object]:
        """The same as fields of an event of kind HEAP."""
        used = self.reported_used()
        return {
            "account": self.name,
            "heap_budget_used": used,
            "heap_budget_free": self.total - used,
            "heap_budget_total": self.total,
            "size": self.refused_size,
            "align": self.refused_align,
        }
