"""What a service's requests look like to metricsd, and what was counted before it knew."""

from typing import Any

import pytest

from nexus.abi import Nanos, VmoCreate, VmoSeal, service_id
from nexus.ipc import Client, Peers, Refused, RetryBudget
from nexus.ipc import Context as Trace
from nexus.metrics import Metrics
from nexus.protocols.metricsd import SpanStatus
from nexus.runtime import Call, Deferred
from nexus.runtime.program import Context
from tests.fakes.adder import Add, AdderStatus, Keep, Sum
from tests.fakes.own import PROTOCOL, Plain
from tests.fakes.pair import FAR
from tests.unit.test_metrics import MS, Watched

CALLER = Trace(bytes(range(1, 17)), bytes(range(21, 29)))


class Thinking:
    """Answers a little later, and refuses the sum of 13."""

    PROTOCOL = PROTOCOL

    def __init__(self, _context: Context) -> None:
        self._given: list[tuple[Nanos, Deferred, int]] = []

    def handle(self, call: Call, request: Add) -> Deferred:
        deferred = call.defer()
        self._given.append((Nanos(call.now + MS), deferred, request.a + request.b))
        return deferred

    def next_time(self) -> Nanos | None:
        return min((due for due, _, _ in self._given), default=None)

    def on_time(self, now: Nanos) -> None:
        for entry in [each for each in self._given if each[0] <= now]:
            self._given.remove(entry)
            _, deferred, total = entry
            if total == 13:
                deferred.refuse(AdderStatus.TOO_LARGE)
            else:
                deferred.reply(Sum(total))


def test_a_refusal_that_is_given_later_is_an_error_in_its_span_and_a_reply_is_none() -> None:
    watched = Watched()
    watched.serve(Thinking)

    outcomes = watched.ask(Add(1, 2), Add(6, 7), Add(4, 5))
    watched.pause(200 * MS)
    spans = watched.spans()

    assert outcomes == [Sum(3), Refused(AdderStatus.TOO_LARGE), Sum(9)]
    assert [each.name for each in spans] == ["own.Add"] * 3
    assert [each.status for each in spans] == [SpanStatus.OK, SpanStatus.ERROR, SpanStatus.OK]
    assert all(each.end - each.start >= MS for each in spans), "they end with the reply"


@pytest.mark.parametrize("way", ["alone", "with a capability"])
def test_the_parent_of_a_requests_span_is_the_span_of_its_caller(way: str) -> None:
    watched = Watched()
    watched.serve(Plain)

    async def body(peers: Peers) -> Any:
        budget = RetryBudget(attempts_max=3, backoff=Nanos(MS), deadline=FAR)
        found = await peers.connect("own", PROTOCOL, budget)
        assert isinstance(found, Client), found
        if way == "alone":
            return await found.call(Add(1, 2), FAR, CALLER)
        slot = await VmoCreate(4096)
        await VmoSeal(slot)
        started = await found.start(Keep(1), FAR, CALLER, move=slot)
        return await found.finish(started)

    outcome = watched.system.client(body)
    watched.pause(200 * MS)
    (span,) = watched.spans()

    assert isinstance(outcome, Sum)
    assert (span.trace, span.parent) == CALLER
    assert span.span[:4] == (service_id("own") & 0xFFFFFFFF).to_bytes(4, "little")
    assert span.span != span.parent


def test_updates_that_were_refused_before_there_was_a_page_are_in_it() -> None:
    async def body(peers: Peers) -> Any:
        metrics = Metrics(peers, ("metricsd",))
        crowded = metrics.counter("files_total", file="x" * 200)
        for _ in range(3):
            crowded.inc(5)
        before = metrics.counts().overflow_updates
        await metrics.begin()
        crowded.inc()
        return before, metrics.page.overflow, metrics.counts().overflow_updates

    assert Watched().system.client(body) == (3, 4, 4)
