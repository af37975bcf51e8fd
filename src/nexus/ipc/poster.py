"""Requests sent without waiting for their answers, which are taken later, as they come.

    posted --answer-----------------------> acknowledged, or refused by its status
    posted --the peer is gone, its deadline passed--> lost

The answers come into the task's one inbox by the one correlator: whoever receives one, a call
waiting for another answer or `take`, gives it to the post it belongs to.
"""

from collections import Counter
from collections.abc import Callable
from enum import Enum, IntEnum
from typing import Any, Final, Generic, TypeVar

from nexus.abi import Nanos, Slot
from nexus.ipc.correlate import Pending
from nexus.ipc.deadline import deadline_after
from nexus.ipc.exchange import Exchange
from nexus.ipc.outcome import CallFailure, Refused, TimedOut, Unknown
from nexus.wire import Request

OUTSTANDING_MAX: Final = 8  # posts without an answer; the depth of a reply link, so none is lost
TAKEN_MAX: Final = 4  # answers taken with one post, so that a post has a bound of its own


class Posted(Enum):
    """What became of one post."""

    SENT = "it is in the peer's queue"
    FULL = "the peer's queue is full, or as many answers are open as may be"
    GONE = "there is no peer"


TagT = TypeVar("TagT")


class Poster(Generic[TagT]):
    """Posts over one exchange, and the account of them.

    sent = acknowledged + all of `refused` + lost + outstanding, always. `on_ended` is told of each
    sent request once: the tag it was posted with, and its reply, Refused, or a CallFailure. `wait`
    is how long, in ns, an answer may take to count.
    """

    __slots__ = (
        "_on_ended",
        "_open",
        "acknowledged",
        "exchange",
        "lost",
        "refused",
        "sent",
        "wait",
    )

    def __init__(
        self, exchange: Exchange, on_ended: Callable[[TagT, object], None], *, wait: Nanos
    ) -> None:
        self.exchange = exchange
        self.wait = wait
        self.sent = 0
        self.acknowledged = 0
        self.refused: Counter[IntEnum] = Counter()
        self.lost = 0
        self._on_ended = on_ended
        self._open: dict[int, Pending] = {}  # by nonce, in the order of their deadlines

    @property
    def outstanding(self) -> int:
        """Posts that have no answer so far."""
        return len(self._open)

    async def post(
        self, request: Request[Any], now: Nanos, tag: TagT, *, move: Slot | None = None
    ) -> Posted:
        """Take the answers that are there, TAKEN_MAX at most, and send `request`; never waits.

        Unless it was SENT, `move` stays.
        """
        await self.take(now)
        peer = self.exchange.peer
        if peer.alive and len(self._open) >= min(OUTSTANDING_MAX, peer.reply_terms.depth):
            return Posted.FULL

        def taker(pending: Pending, outcome: object) -> None:
            self._end(pending, tag, outcome)

        until = deadline_after(now, self.wait)
        posted = await self.exchange.post(request, until, taker, move=move)
        if isinstance(posted, Pending):
            self.sent += 1
            if self.exchange.is_in_flight(posted):  # else somebody has met its answer meanwhile
                self._open[posted.nonce] = posted
            return Posted.SENT
        return Posted.FULL if isinstance(posted, Refused) else Posted.GONE

    async def take(self, now: Nanos) -> None:
        """Take the answers that are there, TAKEN_MAX at most, and give up those that are late."""
        if self._open:
            await self.exchange.take(TAKEN_MAX)
        for pending in [each for each in self._open.values() if each.deadline <= now]:
            self.exchange.give_up(pending, TimedOut())

    def abandon(self) -> None:
        """Wait for no answer any more; whether these posts were acted on is not known."""
        for pending in list(self._open.values()):
            self.exchange.give_up(pending, Unknown())

    def _end(self, pending: Pending, tag: TagT, outcome: object) -> None:
        """One post has its outcome."""
        _ = self._open.pop(pending.nonce, None)
        match outcome:
            case Refused(status):
                self.refused[status] += 1
            case CallFailure():
                self.lost += 1
            case _:
                self.acknowledged += 1
        self._on_ended(tag, outcome)
