"""What the runtime counts, bounded by construction."""

from typing import Final

from nexus.abi import ServiceId
from nexus.protocols.meta import SENDERS_MAX, SenderCount, StatusCount

OTHERS: Final = ServiceId(0)  # the row of all senders beyond SENDERS_MAX


class Account:
    """The counters of one instance of a service.

    `senders` holds, per service the kernel named, a one-element list with its requests: the hot
    path adds to it in place.
    """

    __slots__ = (
        "expired",
        "lost",
        "malformed",
        "refusals",
        "refused_binds",
        "replies",
        "senders",
        "unanswerable",
    )

    def __init__(self) -> None:
        self.senders: dict[ServiceId, list[int]] = {}
        self.refusals: dict[int, int] = {}
        self.replies = 0
        self.lost = 0
        self.malformed = 0
        self.expired = 0
        self.unanswerable = 0
        self.refused_binds = 0

    def row(self, service: ServiceId) -> list[int]:
        """The row of a sender not seen before, or the shared one when the table is full."""
        if service not in self.senders and len(self.senders) >= SENDERS_MAX:
            service = OTHERS
        return self.senders.setdefault(service, [0])

    def on_refused(self, status: int) -> None:
        """A reply carries `status` instead of an answer."""
        self.refusals[status] = self.refusals.get(status, 0) + 1

    @property
    def requests(self) -> int:
        """All messages taken from the queue."""
        return sum(row[0] for row in self.senders.values())

    def sender_rows(self) -> list[SenderCount]:
        """Requests per sender, by service id."""
        return [SenderCount(service, row[0]) for service, row in sorted(self.senders.items())]

    def refusal_rows(self) -> list[StatusCount]:
        """Refusals per status, by number."""
        return [StatusCount(status, count) for status, count in sorted(self.refusals.items())]
