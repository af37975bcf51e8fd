"""The client's own living memory: a ring that logd drains, and what it offers for a proof.

The ring, and the page of its metrics, are made before the system is ready and held to the end.
Rungs that offer other memory, or have a library offer its own, give these back to their readers
afterwards: what is held is then what was held (#143).
"""

from dataclasses import dataclass
from typing import Final, TypeVar

from nexus.abi import CapClose, CapDerive, Nanos, Rights, Slot, VmoCreate, VmoShare
from nexus.ipc import (
    Answer,
    CallFailure,
    Exchange,
    Refused,
    RetryBudget,
    RetryTokens,
    retry_until,
)
from nexus.log.payload import packed
from nexus.metrics import Metrics
from nexus.protocols.logd import Append, Field, Level, OpenStream, StreamOpened
from nexus.protocols.metricsd import OpenPage, PageOpened
from nexus.telemetry import RingWriter
from nexus.wire import Request

SCOPE: Final = "selftest"  # of what is written here
RING_SIZE: Final = 16 * 1024  # bytes; rung 115 writes much more than that before anybody looks
SETTLE_TRIES_MAX: Final = 7  # of as many looks each
SETTLE_LOOKS: Final = 8  # with doubling pauses: 2 ms to 0.3 s
SETTLE_PAUSE: Final = Nanos(2_000_000)  # ns

ReplyT = TypeVar("ReplyT")


@dataclass(frozen=True, slots=True)
class Shared:
    """A shared VMO of this task: the one view that writes into it, and its slot."""

    slot: Slot
    view: memoryview

    async def offered(self) -> Slot:
        """A capability of it that may move: to look, and nothing else."""
        return await CapDerive(self.slot, Rights.MAP)

    async def close(self) -> None:
        """Let go of it; whoever watches it sees it still."""
        self.view.release()
        await CapClose(self.slot)


async def shared(size: int) -> Shared:
    """Living memory of `size` bytes, all zeros."""
    slot = await VmoCreate(size)
    return Shared(slot, await VmoShare(slot))


class OwnRing:
    """The client's ring, written without a library's help but for the form of a line."""

    def __init__(self, memory: Shared) -> None:
        self.memory = memory
        self.writer = RingWriter(memory.view)
        self.drained = (0, 0)  # how far logd is: position and sequence number

    def put(self, text: str, *pairs: str, at: Nanos = Nanos(0)) -> None:  # noqa: B008 (an int)
        """One record; `pairs` are keys and values of fields, one after the other."""
        fields = [Field(key, value) for key, value in zip(pairs[::2], pairs[1::2], strict=True)]
        self.writer.put(packed(Append(Level.INFO, SCOPE, text, fields), at))


async def open_stream(
    logd: Exchange, memory: Shared, deadline: Nanos, taken: int = 0, sequence: int = 0
) -> StreamOpened | Refused | CallFailure:
    """Offer a ring to logd."""
    return await _offer(logd, OpenStream(taken, sequence), memory, deadline)


async def open_page(
    metricsd: Exchange, memory: Shared, deadline: Nanos
) -> PageOpened | Refused | CallFailure:
    """Offer a page to metricsd."""
    return await _offer(metricsd, OpenPage(), memory, deadline)


async def _offer(
    exchange: Exchange, request: Request[ReplyT], memory: Shared, deadline: Nanos
) -> ReplyT | Refused | CallFailure:
    slot = await memory.offered()
    outcome = await exchange.ask(request, deadline, move=slot)
    if isinstance(outcome, Answer):
        return outcome.reply
    return outcome


async def is_settled(metrics: Metrics, until: Nanos) -> bool:
    """Whether metricsd reads the page and every series has its place, at the latest at `until`."""

    async def flushed() -> bool:
        await metrics.flush()
        return not metrics.due

    async def looked() -> bool:
        budget = RetryBudget(attempts_max=SETTLE_LOOKS, backoff=SETTLE_PAUSE, deadline=until)
        return await retry_until(flushed, lambda done: not done, budget, RetryTokens())

    budget = RetryBudget(attempts_max=SETTLE_TRIES_MAX, backoff=SETTLE_PAUSE, deadline=until)
    return await retry_until(looked, lambda done: not done, budget, RetryTokens())
