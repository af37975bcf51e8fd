"""Posts: sent without waiting, answered into the one inbox that calls use, too."""

from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from nexus.abi import LinkTerms, Message, Nanos, Now, SleepUntil
from nexus.ipc import (
    OUTSTANDING_MAX,
    TAKEN_MAX,
    Client,
    Exchange,
    Malformed,
    Peers,
    Posted,
    Poster,
    Refused,
    RetryBudget,
    Stale,
    TimedOut,
    Unknown,
)
from nexus.ipc.correlate import BUFFER_COUNT_MAX
from nexus.wire import answer, encode
from tests.fakes.adder import ADDER, Add, AdderStatus, Later, Sum
from tests.fakes.pair import FAR, Pair
from tests.fakes.route import System
from tests.unit.test_ipc_calls import Puppet

MS = 1_000_000
WAIT = Nanos(100 * MS)


class Log:
    """A poster over an exchange, and what it was told."""

    def __init__(self, exchange: Exchange) -> None:
        self.ended: list[tuple[Any, Any]] = []
        self.poster: Poster[Any] = Poster(
            exchange, lambda tag, outcome: self.ended.append((tag, outcome)), wait=WAIT
        )

    async def post(self, *numbers: int) -> list[Posted]:
        return [await self.poster.post(Add(number, 0), await Now(), number) for number in numbers]

    async def settled(self) -> list[tuple[Any, Any]]:
        """What ended, after every answer that can come has come."""
        _ = await SleepUntil(Nanos(await Now() + MS))
        for _ in range(OUTSTANDING_MAX // TAKEN_MAX + 1):
            await self.poster.take(await Now())
        return self.ended

    def adds_up(self) -> bool:
        poster = self.poster
        known = poster.acknowledged + poster.refused.total() + poster.lost + poster.outstanding
        return poster.sent == known


def test_posts_are_answered_later_and_counted() -> None:
    async def body(exchange: Exchange) -> Any:
        log = Log(exchange)
        posted = await log.post(1, 2, 2000)
        return posted, await log.settled(), log.poster, log.adds_up()

    posted, ended, poster, adds_up = Pair().client(body)

    assert posted == [Posted.SENT] * 3
    assert ended == [(1, Sum(1)), (2, Sum(2)), (2000, Refused(AdderStatus.TOO_LARGE))]
    assert (poster.acknowledged, dict(poster.refused)) == (2, {AdderStatus.TOO_LARGE: 1})
    assert adds_up


def test_a_post_never_waits_for_a_full_peer() -> None:
    async def script(puppet: Puppet) -> None:
        _ = await SleepUntil(Nanos(MS))

    async def body(exchange: Exchange) -> Any:
        log = Log(exchange)
        return await log.post(*range(20)), log.poster.outstanding, await Now()

    puppet = Puppet(script)

    posted, outstanding, now = puppet.client(body)

    assert posted == [Posted.SENT] * OUTSTANDING_MAX + [Posted.FULL] * 12
    assert outstanding == OUTSTANDING_MAX
    assert now < MS, "nobody waited for room or for an answer"


@pytest.mark.parametrize(
    ("terms", "reply_terms", "room"),
    [
        (LinkTerms(3, 4096, 0), LinkTerms(8, 4096, 0), 3),
        (LinkTerms(8, 4096, 0), LinkTerms(2, 4096, 0), 2),
    ],
    ids=["queue of the peer", "queue of its answers"],
)
def test_no_more_is_sent_than_queue_and_answers_have_room_for(
    terms: LinkTerms, reply_terms: LinkTerms, room: int
) -> None:
    async def script(puppet: Puppet) -> None:
        _ = await SleepUntil(FAR)

    async def body(exchange: Exchange) -> Any:
        return await Log(exchange).post(*range(5))

    posted = Puppet(script).client(body, terms=terms, reply_terms=reply_terms)

    assert posted == [Posted.SENT] * room + [Posted.FULL] * (5 - room)


def test_one_post_takes_a_bounded_number_of_answers() -> None:
    async def script(puppet: Puppet) -> None:
        for request in [await puppet.take() for _ in range(OUTSTANDING_MAX)]:
            await puppet.give(request)
        _ = await puppet.take()

    async def body(exchange: Exchange) -> Any:
        log = Log(exchange)
        _ = await log.post(*range(OUTSTANDING_MAX))
        _ = await SleepUntil(Nanos(await Now() + MS))
        _ = await log.post(99)
        return len(log.ended), log.poster.outstanding

    assert Puppet(script).client(body) == (TAKEN_MAX, OUTSTANDING_MAX - TAKEN_MAX + 1)


def test_calls_and_posts_share_an_inbox_and_lose_none_of_their_answers() -> None:
    """Answers come in the reverse order, so that every call meets those to posts and to others."""

    async def script(puppet: Puppet) -> None:
        requests = [await puppet.take() for _ in range(6)]
        for request in reversed(requests):
            await puppet.give(request, encode(Sum(request.data[-2])))
        last = await puppet.take()
        await puppet.give(last, encode(Sum(77)))
        _ = await puppet.take()

    async def body(exchange: Exchange) -> Any:
        log = Log(exchange)
        _ = await log.post(10, 11)
        first = await exchange.start(Add(20, 0), FAR)
        _ = await log.post(12)
        second = await exchange.start(Add(21, 0), FAR)
        _ = await log.post(13)
        _ = await SleepUntil(Nanos(await Now() + MS))
        await log.poster.take(await Now())
        called = await exchange.call(Add(1, 0), FAR)
        finished = [await exchange.finish(first), await exchange.finish(second)]
        return called, finished, sorted(tag for tag, _ in await log.settled()), log.poster

    puppet = Puppet(script)

    called, finished, tags, poster = puppet.client(body)

    assert called == Sum(77)
    assert all(isinstance(each, Sum) for each in finished)
    assert (tags, poster.acknowledged, poster.lost) == ([10, 11, 12, 13], 4, 0)
    correlator = puppet.correlator
    assert (correlator.stale, correlator.duplicate, correlator.foreign) == (0, 0, 0)
    assert correlator.in_flight == {}
    assert len(correlator.buffer) == 0


def test_answers_to_posts_take_no_room_from_answers_to_calls() -> None:
    async def script(puppet: Puppet) -> None:
        held = [await puppet.take() for _ in range(BUFFER_COUNT_MAX + 1)]
        posts = [await puppet.take() for _ in range(OUTSTANDING_MAX)]
        for request in [*held[:-1], *posts, held[-1]]:
            await puppet.give(request)
        _ = await puppet.take()

    async def body(exchange: Exchange) -> Any:
        started = [await exchange.start(Later(1, 0), FAR) for _ in range(BUFFER_COUNT_MAX + 1)]
        log = Log(exchange)
        _ = await log.post(*range(OUTSTANDING_MAX))
        last = await exchange.finish(started.pop())
        return [last, *[await exchange.finish(each) for each in started]], len(log.ended)

    puppet = Puppet(script)

    outcomes, ended = puppet.client(body)

    assert outcomes == [Sum(3)] * (BUFFER_COUNT_MAX + 1)
    assert ended == OUTSTANDING_MAX
    assert puppet.correlator.buffer.drops == 0


def test_a_late_answer_is_stale_and_the_post_is_lost_once() -> None:
    async def script(puppet: Puppet) -> None:
        request = await puppet.take()
        _ = await SleepUntil(Nanos(2 * WAIT))
        await puppet.give(request)
        _ = await puppet.take()

    async def body(exchange: Exchange) -> Any:
        log = Log(exchange)
        _ = await log.post(1)
        _ = await SleepUntil(Nanos(WAIT + MS))
        await log.poster.take(await Now())
        _ = await SleepUntil(Nanos(3 * WAIT))
        await exchange.take(TAKEN_MAX)
        return log.ended, log.adds_up(), log.poster.lost

    puppet = Puppet(script)

    assert puppet.client(body) == ([(1, TimedOut())], True, 1)
    assert puppet.correlator.stale == 1


@pytest.mark.parametrize("kind", ["dead peer", "malformed", "another instance"])
def test_every_way_to_lose_an_answer_is_told(kind: str) -> None:
    expected = {
        "dead peer": Unknown(),
        "malformed": Malformed(),
        "another instance": Stale(),
    }[kind]

    async def script(puppet: Puppet) -> None:
        request: Message = await puppet.take()
        if kind == "malformed":
            await puppet.give(request, b"\x90")
            _ = await puppet.take()
        elif kind == "another instance":
            puppet.task.sender = puppet.task.sender._replace(generation=9)
            await puppet.give(request)
            _ = await puppet.take()

    async def body(exchange: Exchange) -> Any:
        log = Log(exchange)
        _ = await log.post(1)
        return await log.settled(), log.poster.lost, log.adds_up()

    assert Puppet(script).client(body) == ([(1, expected)], 1, True)


def test_an_answer_met_by_another_coroutine_before_the_post_returns_counts() -> None:
    """In an ordinary program others receive while a post is being sent."""

    class Meanwhile(Exchange):
        async def post(self, *arguments: Any, **options: Any) -> Any:
            posted = await super().post(*arguments, **options)
            _ = await SleepUntil(Nanos(await Now() + MS))
            await self.take(TAKEN_MAX)
            return posted

    async def body(exchange: Exchange) -> Any:
        log = Log(Meanwhile(exchange._caller, exchange.protocol, exchange.peer))
        posted = await log.post(1)
        return posted, log.ended, log.poster.outstanding, log.adds_up()

    assert Pair().client(body) == ([Posted.SENT], [(1, Sum(1))], 0, True)


def test_a_call_that_meets_the_peers_end_tells_the_posts() -> None:
    async def script(puppet: Puppet) -> None:
        for _ in range(2):
            _ = await puppet.take()

    async def body(exchange: Exchange) -> Any:
        log = Log(exchange)
        _ = await log.post(1)
        called = await exchange.call(Add(1, 2), FAR)
        return called, log.ended, await log.post(2)

    assert Puppet(script).client(body) == (Unknown(), [(1, Unknown())], [Posted.GONE])


def test_abandoned_posts_are_lost_and_their_answers_stale() -> None:
    async def script(puppet: Puppet) -> None:
        for request in [await puppet.take() for _ in range(2)]:
            await puppet.give(request)
        _ = await puppet.take()

    async def body(exchange: Exchange) -> Any:
        log = Log(exchange)
        _ = await log.post(1, 2)
        log.poster.abandon()
        _ = await SleepUntil(Nanos(await Now() + MS))
        await exchange.take(TAKEN_MAX)
        return log.ended, log.poster.outstanding

    puppet = Puppet(script)

    assert puppet.client(body) == ([(1, Unknown()), (2, Unknown())], 0)
    assert puppet.correlator.stale == 2


def in_system(body: Callable[[System, Client, Log], Awaitable[Any]]) -> Any:
    system = System("adder")

    async def main(peers: Peers) -> Any:
        budget = RetryBudget(attempts_max=3, backoff=Nanos(MS), deadline=FAR)
        client = await peers.connect("adder", ADDER, budget)
        assert isinstance(client, Client), client
        return await body(system, client, Log(client))

    return system.client(main)


def test_a_restarted_peer_is_found_again_and_no_capability_is_left_behind() -> None:
    async def body(system: System, client: Client, log: Log) -> Any:
        task = system.kernel.tasks[-1]
        slots = len(task.table)
        _ = await log.post(1)
        _ = await log.settled()
        counts = []
        for number in range(5):
            _ = await log.post(100 + number)
            system.kill("adder")
            _ = system.start("adder")
            gone = await log.post(2)
            renewed = await client.renew(FAR)
            again = await log.post(3)
            _ = await log.settled()
            counts.append((gone, renewed, again, len(task.table)))
        return slots, counts, log.poster.lost, log.poster.acknowledged, log.adds_up()

    slots, counts, lost, acknowledged, adds_up = in_system(body)

    assert counts == [([Posted.GONE], None, [Posted.SENT], slots)] * 5
    assert (lost, acknowledged, adds_up) == (5, 6, True)


def test_what_a_dead_peer_had_answered_counts_when_a_new_one_is_looked_for() -> None:
    async def body(system: System, client: Client, log: Log) -> Any:
        _ = await log.post(1, 2)
        _ = await SleepUntil(Nanos(await Now() + MS))
        system.kill("adder")
        _ = system.start("adder")
        client.peer.alive = False
        renewed = await client.renew(FAR)
        return renewed, log.ended

    assert in_system(body) == (None, [(1, Sum(1)), (2, Sum(2))])


def test_an_answer_taken_by_a_forged_sender_is_not_an_answer() -> None:
    pair = Pair()
    mallory = pair.kernel.task("mallory")

    async def body(exchange: Exchange) -> Any:
        log = Log(exchange)
        inbox = client.table[exchange.peer.inbox].target
        pending = await exchange.post(Later(3, MS), FAR, lambda _, out: log.ended.append((0, out)))
        header = exchange.protocol.codecs[Later].prefix + pending.echo  # type: ignore[union-attr]
        _ = pair.kernel.inject(mallory, inbox, answer(header, 0, encode(Sum(-1))))
        before = await exchange.call(Add(1, 1), FAR)
        _ = await SleepUntil(Nanos(10 * MS))
        await exchange.take(TAKEN_MAX)
        return before, log.ended

    client = pair.add_client(body, name="client")

    assert pair.kernel.run(client) == (Sum(2), [(0, Sum(3))])
