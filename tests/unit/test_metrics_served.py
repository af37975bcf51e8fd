"""What a service's requests look like to metricsd, and what was counted before it knew."""

from typing import Any

import pytest

from nexus.abi import Nanos, VmoCreate, VmoSeal, service_id
from nexus.ipc import Client, Peers, Refused, RetryBudget
from nexus.ipc import Context as Trace
from nexus.metrics import Metrics
from nexus.protocols.metricsd import SpanStatus
from nexus.runtime import Call, Deferred, Server
from nexus.runtime.program import Context, program_of
from tests.fakes.adder import Add, Adder, AdderStatus, Keep, Sum
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


class Hearing(Adder):
    """Adds, and keeps what its callers say they are part of."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[Trace] = []

    def handle(self, call: Call, request: Any) -> Any:
        self.heard.append(call.parent)
        return super().handle(call, request)


class Periodic:
    """Asks twice every millisecond, and once more inside of a span."""

    PROTOCOL = PROTOCOL

    def __init__(self, context: Context) -> None:
        self._context = context
        self._due = Nanos(0)

    def handle(self, call: Call, request: Add) -> Sum:
        del call
        return Sum(request.a + request.b)

    def next_time(self) -> Nanos:
        return self._due

    async def on_time(self, now: Nanos) -> None:
        self._due = Nanos(now + MS)
        hearing = await self._context.client("hearing", PROTOCOL)
        for _ in range(2):
            _ = await hearing.call(Add(1, 2), FAR)
        with self._context.metrics.span("work"):
            _ = await hearing.call(Add(1, 2), FAR)


def heard_of_turns() -> tuple[list[Trace], list[Any]]:
    """What is heard of a service's own turns, three times in each, and the spans."""
    watched = Watched()
    hearing = Hearing()
    watched.system.start("hearing", lambda boot: Server(hearing, PROTOCOL, boot).run())
    _ = watched.start(program_of(Periodic), uses=("hearing", "metricsd"), posts=("metricsd",))
    _ = watched.ask(Add(3, 4))  # it begins with its first link
    watched.pause(20 * MS)
    heard = hearing.heard[: len(hearing.heard) // 3 * 3]
    return heard, watched.spans()


def test_each_turn_of_a_services_own_is_a_trace_the_same_one_for_a_seed() -> None:
    turns, spans = heard_of_turns()

    grouped = [turns[index : index + 3] for index in range(0, len(turns), 3)]
    assert len(grouped) > 3
    assert all(first.trace == second.trace for first, second, _ in grouped)
    assert len({first.trace for first, _, _ in grouped}) == len(grouped)
    assert len({each.trace for each in turns}) == 2 * len(grouped)  # a span begins its own
    works = [each for each in spans if each.name == "work"]
    assert all(each.parent == bytes(8) for each in works)
    assert heard_of_turns()[0] == turns


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
