"""What exportd does with a metricsd that answers some of its questions and not the others."""

from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any

import pytest

from nexus.abi import Nanos, Now, Trap
from nexus.ipc import TimedOut
from nexus.protocols.metricsd import Span, SpanPage, SpanStatus
from nexus.services.exportd.readings import NoReading, Readings

UNTIL = Nanos(1_000_000_000)


def span(number: int) -> Span:
    return Span(number, b"t" * 16, b"s" * 8, bytes(8), 7, 7, 1, "work", 1, 2, 1, SpanStatus.OK, [])


@dataclass
class Metricsd:
    """It gives the answers it has, in turn, and is silent afterwards."""

    answers: list[SpanPage]
    asked: list[int] = field(default_factory=list)  # from which number on
    generation: int = 1

    @property
    def peer(self) -> "Metricsd":
        return self

    async def client(self, *_: object) -> "Metricsd":
        return self

    async def call(self, request: Any, _until: Nanos) -> Any:
        self.asked.append(request.since)
        return self.answers.pop(0) if self.answers else TimedOut()


def at_once(body: Coroutine[Trap[Any], Any, Any]) -> Any:
    """The result of a body that asks the kernel for nothing but the time, which is 0."""
    given: Nanos | None = None
    while True:
        try:
            trap = body.send(given)
        except StopIteration as end:
            return end.value
        assert isinstance(trap, Now)
        given = Nanos(0)


def readings(metricsd: Metricsd) -> Readings:
    context: Any = metricsd
    return Readings(context, 64)


def test_spans_that_were_told_before_metricsd_fell_silent_are_not_lost() -> None:
    metricsd = Metricsd([SpanPage(3, [span(1), span(2)])])

    found = at_once(readings(metricsd).spans(UNTIL))

    assert [each.number for each in found] == [1, 2]
    assert metricsd.asked == [0, 3]


def test_the_next_reading_goes_on_behind_what_was_told() -> None:
    metricsd = Metricsd([SpanPage(3, [span(1), span(2)])])
    told = readings(metricsd)
    _ = at_once(told.spans(UNTIL))
    metricsd.answers = [SpanPage(0, [span(3)])]
    told._silent_until = Nanos(0)

    found = at_once(told.spans(UNTIL))

    assert [each.number for each in found] == [3]
    assert metricsd.asked[-1] == 3


def test_a_metricsd_that_tells_nothing_gives_no_reading() -> None:
    with pytest.raises(NoReading, match="TimedOut"):
        at_once(readings(Metricsd([])).spans(UNTIL))
