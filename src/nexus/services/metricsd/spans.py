"""Spans: those that are open by message, and those that have ended, bounded and shared fairly.

    open --ended, by message or in a page--> kept
    open --longer than may be--------------> kept as TIMED_OUT
    open --its task has ended--------------> kept as LOST

Of those that are kept, a new one pushes out the oldest: first of a service that holds more than
SHARE_MAX of the store. So a service that makes a flood of spans loses its own.
"""

from bisect import bisect_left
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Final

from nexus.abi import Nanos, ServiceId
from nexus.protocols.metricsd import Label, Span, SpanStatus
from nexus.services.metricsd.series import Instance

SHARE_MAX: Final = Fraction(1, 2)  # of the kept spans; beyond it a service's own go first


@dataclass(frozen=True, slots=True)
class Begun:
    """A span that is open. Times are the kernel's clock."""

    instance: Instance
    span: bytes
    trace: bytes
    parent: bytes
    name: str
    start: Nanos
    attributes: tuple[tuple[str, str], ...]

    def ended(
        self,
        number: int,
        end: Nanos,
        status: SpanStatus,
        more: Sequence[tuple[str, str]],
        offset: int,
    ) -> Span:
        """The span as it travels; with end 0 it is still open. `offset` is from the kernel's clock
        to ns since 1970."""
        return Span(
            number=number,
            trace=self.trace,
            span=self.span,
            parent=self.parent,
            service=self.instance.service,
            pid=self.instance.pid,
            generation=self.instance.generation,
            name=self.name,
            start=self.start,
            end=end and max(end, self.start),
            wall=max(0, self.start + offset),
            status=status,
            attributes=[Label(key, value) for key, value in (*self.attributes, *more)],
        )


class OpenSpans:
    """Spans begun by message."""

    def __init__(self, total: int, each: int) -> None:
        self.total_max = total
        self.each_max = each
        self._open: dict[tuple[Instance, bytes], Begun] = {}  # the first to begin first
        self._counts: dict[ServiceId, int] = {}

    def __len__(self) -> int:
        return len(self._open)

    def __iter__(self) -> Iterator[Begun]:
        return iter(list(self._open.values()))

    def is_open(self, instance: Instance, span: bytes) -> bool:
        """Whether this instance has begun this span and not ended it."""
        return (instance, span) in self._open

    def is_full_for(self, service: ServiceId) -> bool:
        """Whether one more is more than may be open."""
        return self._counts.get(service, 0) >= self.each_max or len(self._open) >= self.total_max

    def add(self, begun: Begun) -> None:
        """A span is open."""
        self._open[begun.instance, begun.span] = begun
        service = begun.instance.service
        self._counts[service] = self._counts.get(service, 0) + 1

    def take(self, instance: Instance, span: bytes) -> Begun | None:
        """The span, which is open no more."""
        begun = self._open.pop((instance, span), None)
        if begun is not None:
            service = instance.service
            self._counts[service] -= 1
            if not self._counts[service]:
                del self._counts[service]
        return begun

    def of(self, instance: Instance) -> list[Begun]:
        """What this instance has open."""
        return [each for each in self._open.values() if each.instance == instance]

    def older_than(self, start: Nanos) -> list[Begun]:
        """Those that began before."""
        return [each for each in self._open.values() if each.start < start]


class Kept:
    """The spans that have ended, at most `count_max`, by number."""

    def __init__(self, count_max: int) -> None:
        self.count_max = count_max
        self.total = 0  # ever kept, and the number of the latest
        self._spans: dict[int, Span] = {}
        self._numbers: list[int] = []  # in order
        self._of: dict[int, deque[int]] = {}  # by service

    def __len__(self) -> int:
        return len(self._spans)

    def resize(self, count_max: int) -> None:
        """Keep at most so many from now on; the oldest go."""
        self.count_max = count_max
        while len(self._spans) > count_max:
            self._push_out()

    def add(
        self,
        begun: Begun,
        end: Nanos,
        status: SpanStatus,
        more: Sequence[tuple[str, str]],
        offset: int,
    ) -> Span:
        """A span has ended."""
        while len(self._spans) >= self.count_max:
            self._push_out()
        self.total += 1
        span = begun.ended(self.total, end, status, more, offset)
        self._spans[self.total] = span
        self._numbers.append(self.total)
        self._of.setdefault(span.service, deque()).append(self.total)
        return span

    def since(self, number: int) -> Iterator[Span]:
        """Spans with this number or a later one, in order."""
        for index in range(bisect_left(self._numbers, number), len(self._numbers)):
            yield self._spans[self._numbers[index]]

    def _push_out(self) -> None:
        number = self._next_out()
        span = self._spans.pop(number)
        _ = self._numbers.pop(bisect_left(self._numbers, number))
        own = self._of[span.service]
        _ = own.popleft()
        if not own:
            del self._of[span.service]

    def _next_out(self) -> int:
        """The number that goes first: the oldest, or that of who holds too much."""
        most = self.count_max * SHARE_MAX
        for own in self._of.values():
            if len(own) > most:
                return own[0]
        return self._numbers[0]
