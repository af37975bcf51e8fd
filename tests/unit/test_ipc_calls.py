from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from nexus.abi import (
    INIT_NAME,
    AbiError,
    EndpointCreate,
    LinkCreate,
    LinkTerms,
    Message,
    Nanos,
    Now,
    Recv,
    Send,
    SleepUntil,
    Slot,
    Status,
    VmoCreate,
)
from nexus.ipc import (
    Bulk,
    BulkFault,
    Client,
    Closed,
    Context,
    Denied,
    Exchange,
    Malformed,
    MismatchBudgetExceeded,
    NonceMismatchBudget,
    NotFound,
    Peers,
    Refused,
    RetryBudget,
    RetryTokens,
    Routed,
    Stale,
    TimedOut,
    Unknown,
    accept_bulk,
    call_until,
    offer_bulk,
    retry_until,
    route_with_nonce_budgeted,
)
from nexus.ipc.correlate import BUFFER_COUNT_MAX, PENDING_COUNT_MAX
from nexus.ipc.peers import LATE_MAX
from nexus.protocols.init import PROTOCOL as INIT
from nexus.protocols.init import Routed as RoutedReply
from nexus.protocols.meta import Bound
from nexus.wire import ReplyStatus, answer, encode
from tests.fakes.adder import ADDER, Add, Later, Sum
from tests.fakes.pair import FAR, Pair
from tests.fakes.route import System

BUDGET = RetryBudget(attempts_max=5, backoff=Nanos(1_000_000), deadline=FAR)
SUM = encode(Sum(3))


class Puppet:
    """A server played by the test: bound to its client, then the test's script."""

    def __init__(self, script: Callable[["Puppet"], Awaitable[None]]) -> None:
        self.pair = Pair()
        self.task = self.pair.kernel.task("adder")
        self.boot = self.pair.kernel.boot(self.task)
        self.reply = Slot(-1)
        self._script = script
        self.pair.kernel.start(self.task, self._main())

    async def _main(self) -> None:
        message = await self.take()
        assert message.cap is not None
        self.reply = message.cap
        await self.give(message, encode(Bound(1)))
        await self._script(self)

    async def take(self) -> Message:
        return await Recv((self.boot.endpoint,), FAR)

    async def give(
        self, request: Message, body: bytes = SUM, *, status: int = 0, nonce: int | None = None
    ) -> None:
        frame = answer(request.data, status, body)
        if nonce is not None:
            frame[8:16] = nonce.to_bytes(8, "little")
        await Send(self.reply, frame, deadline=FAR)

    def client(self, body: Callable[[Exchange], Awaitable[Any]], **options: Any) -> Any:
        return self.pair.client(body, server=self.task, name="client", **options)

    @property
    def correlator(self) -> Any:
        return self.pair.peers["client"].caller.correlator


def call(exchange: Exchange) -> Awaitable[Any]:
    return exchange.call(Add(1, 2), FAR)


def test_calls_in_flight_are_answered_in_any_order_over_one_inbox() -> None:
    async def script(puppet: Puppet) -> None:
        requests = [await puppet.take() for _ in range(3)]
        for number, request in reversed(list(enumerate(requests))):
            await puppet.give(request, encode(Sum(number)))

    async def body(exchange: Exchange) -> Any:
        started = [await exchange.start(Add(1, 2), FAR) for _ in range(3)]
        return [await exchange.finish(each) for each in started]

    assert Puppet(script).client(body) == [Sum(0), Sum(1), Sum(2)]


def test_stale_and_duplicate_replies_are_counted_and_never_taken() -> None:
    async def script(puppet: Puppet) -> None:
        first = await puppet.take()
        await puppet.give(first)
        second = await puppet.take()
        await puppet.give(second, encode(Sum(-1)), nonce=999)
        await puppet.give(first, encode(Sum(-2)))
        await puppet.give(second)

    async def body(exchange: Exchange) -> Any:
        return [await call(exchange), await call(exchange)]

    puppet = Puppet(script)

    assert puppet.client(body) == [Sum(3), Sum(3)]
    assert (puppet.correlator.stale, puppet.correlator.duplicate) == (1, 1)


def test_a_foreign_reply_with_the_right_nonce_is_counted_and_never_taken() -> None:
    pair = Pair()
    mallory = pair.kernel.task("mallory")

    async def body(exchange: Exchange) -> Any:
        inbox = client.table[exchange.peer.inbox].target
        started = await exchange.start(Later(3, 1_000_000), FAR)
        header = ADDER.codecs[Later].prefix + started.pending.echo
        forged = answer(header, 0, encode(Sum(-1)))
        pair.kernel.inject(mallory, inbox, forged)
        return await exchange.finish(started)

    client = pair.add_client(body, name="client")

    assert pair.kernel.run(client) == Sum(3)
    correlator = pair.peers["client"].caller.correlator
    assert (correlator.foreign, correlator.stale, correlator.duplicate) == (1, 0, 0)


@pytest.mark.parametrize(("strays", "expected"), [(64, Sum(3)), (65, MismatchBudgetExceeded())])
def test_a_wait_meets_64_mismatches_and_ends_with_the_65th(strays: int, expected: Any) -> None:
    async def script(puppet: Puppet) -> None:
        request = await puppet.take()
        for number in range(strays):
            await puppet.give(request, nonce=5_000 + number)
        await puppet.give(request)
        _ = await puppet.take()

    assert Puppet(script).client(call) == expected


def test_replies_to_others_beyond_the_buffer_are_dropped_and_counted() -> None:
    async def script(puppet: Puppet) -> None:
        requests = [await puppet.take() for _ in range(BUFFER_COUNT_MAX + 2)]
        for request in requests[1:]:
            await puppet.give(request)
        await puppet.give(requests[0])
        _ = await puppet.take()

    async def body(exchange: Exchange) -> Any:
        started = [
            await exchange.start(Add(1, 2), Nanos(9_000_000)) for _ in range(BUFFER_COUNT_MAX + 2)
        ]
        return [await exchange.finish(each) for each in started]

    puppet = Puppet(script)

    outcomes = puppet.client(body)

    assert outcomes == [Sum(3), TimedOut()] + [Sum(3)] * BUFFER_COUNT_MAX
    assert puppet.correlator.buffer.drops == 1
    assert puppet.correlator.in_flight == {}


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 0),
        (b"\x90", 0),
        (SUM + b"\0", 0),
        (b"\x92\x03\x03", 0),
        (b"\x91\xcc\x03", 0),
        (SUM, 16),
        (b"", 999),
        (b"", ReplyStatus.REFUSED_ITEM),
    ],
    ids=[
        "no body",
        "missing element",
        "trailing byte",
        "extra element",
        "non-minimal integer",
        "refusal with a body",
        "undeclared status",
        "item status outside a batch",
    ],
)
def test_a_malformed_reply_fails_closed(body: bytes, status: int) -> None:
    async def script(puppet: Puppet) -> None:
        await puppet.give(await puppet.take(), body, status=status)
        _ = await puppet.take()

    puppet = Puppet(script)

    assert puppet.client(call) == Malformed()
    assert puppet.correlator.malformed == 1


@pytest.mark.parametrize("index", [1, 4, 16, 24, 40])
def test_a_reply_must_return_the_header_of_its_request(index: int) -> None:
    async def script(puppet: Puppet) -> None:
        request = await puppet.take()
        frame = answer(request.data, 0, SUM)
        frame[index] ^= 1
        await Send(puppet.reply, frame)
        _ = await puppet.take()

    assert Puppet(script).client(call) == Malformed()


def test_a_late_reply_is_stale_for_the_next_call() -> None:
    async def script(puppet: Puppet) -> None:
        late = await puppet.take()
        request = await puppet.take()
        await puppet.give(late, encode(Sum(-1)))
        await puppet.give(request)

    async def body(exchange: Exchange) -> Any:
        return await exchange.call(Add(1, 2), Nanos(5_000_000)), await call(exchange)

    puppet = Puppet(script)

    assert puppet.client(body) == (TimedOut(), Sum(3))
    assert puppet.correlator.stale == 1


def test_a_forgotten_call_leaves_nothing_behind() -> None:
    async def script(puppet: Puppet) -> None:
        request = await puppet.take()
        await puppet.give(request, encode(Sum(-1)))
        await puppet.give(await puppet.take())

    async def body(exchange: Exchange) -> Any:
        exchange.forget(await exchange.start(Add(1, 2), FAR))
        return await call(exchange)

    puppet = Puppet(script)

    assert puppet.client(body) == Sum(3)
    assert puppet.correlator.in_flight == {}
    assert puppet.correlator.stale == 1


def test_calls_in_flight_are_bounded() -> None:
    async def script(puppet: Puppet) -> None:
        while True:
            _ = await puppet.take()

    async def body(exchange: Exchange) -> Any:
        for _ in range(PENDING_COUNT_MAX):
            _ = await exchange.start(Add(1, 2), FAR)
        return await exchange.finish(await exchange.start(Add(1, 2), FAR))

    assert Puppet(script).client(body) == Refused(ReplyStatus.BUSY)


def test_a_full_link_is_waited_for_until_the_deadline() -> None:
    async def script(puppet: Puppet) -> None:
        _ = await Recv((await EndpointCreate(),), FAR)

    async def body(exchange: Exchange) -> Any:
        for _ in range(2):
            _ = await exchange.start(Add(1, 2), FAR)
        return await exchange.call(Add(1, 2), Nanos(7_000_000))

    puppet = Puppet(script)

    assert puppet.client(body, terms=LinkTerms(2, 4096, 0)) == TimedOut()
    assert puppet.pair.kernel.now == 7_000_000


def test_a_full_link_that_empties_in_time_is_used() -> None:
    async def script(puppet: Puppet) -> None:
        _ = await SleepUntil(Nanos(3_000_000))
        for _ in range(3):
            await puppet.give(await puppet.take())

    async def body(exchange: Exchange) -> Any:
        started = [await exchange.start(Add(1, 2), FAR) for _ in range(2)]
        last = await call(exchange)
        return last, [await exchange.finish(each) for each in started]

    puppet = Puppet(script)

    assert puppet.client(body, terms=LinkTerms(2, 4096, 0)) == (Sum(3), [Sum(3), Sum(3)])


def test_a_peer_cut_off_after_the_send_leaves_the_effect_unknown() -> None:
    async def script(puppet: Puppet) -> None:
        _ = await puppet.take()

    assert Puppet(script).client(call) == Unknown()


def test_what_a_dead_peer_had_answered_is_received() -> None:
    async def script(puppet: Puppet) -> None:
        await puppet.give(await puppet.take())

    async def body(exchange: Exchange) -> Any:
        return await call(exchange), await call(exchange), await call(exchange)

    assert Puppet(script).client(body) == (Sum(3), Stale(), Closed())


def test_a_moved_capability_stays_when_the_request_cannot_be_sent() -> None:
    async def script(puppet: Puppet) -> None:
        await puppet.give(await puppet.take())

    async def body(exchange: Exchange) -> Any:
        _ = await call(exchange)
        link = await LinkCreate(await EndpointCreate())
        outcome = await exchange.ask(Add(1, 2), FAR, move=link.slot)
        await Send(link.slot, b"still mine")
        return outcome

    assert Puppet(script).client(body) == Stale()


def test_two_services_share_one_inbox() -> None:
    system = System("left", "right")

    async def body(peers: Peers) -> Any:
        left = await peers.connect("left", ADDER, BUDGET)
        right = await peers.connect("right", ADDER, BUDGET)
        assert isinstance(left, Client)
        assert isinstance(right, Client)
        slow = await left.start(Later(1, 5_000_000), FAR)
        fast = await right.start(Later(2, 1_000_000), FAR)
        assert left.peer.inbox == right.peer.inbox
        return await left.finish(slow), await right.finish(fast)

    assert system.client(body) == (Sum(1), Sum(2))


def test_a_restarted_service_is_stale_once_and_then_found_again() -> None:
    system = System("adder")

    async def body(peers: Peers) -> Any:
        client = await peers.connect("adder", ADDER, BUDGET)
        assert isinstance(client, Client)
        before = await client.call(Add(1, 2), FAR), client.generation
        table = next(task.table for task in system.kernel.tasks if task.name == "client")
        slots = len(table)
        system.kill("adder")
        system.start("adder")
        stale = await client.call(Add(1, 2), FAR)
        after = await client.call(Add(1, 2), FAR), client.generation
        return before, stale, after, client.rebinds, len(table) - slots

    before, stale, after, rebinds, slots = system.client(body)

    assert (before, stale, after) == ((Sum(3), 1), Stale(), (Sum(3), 2))
    assert (rebinds, slots) == (1, 0)
    assert system.router.asked["adder"] == 2


def test_a_reply_link_that_ended_while_another_was_waited_for_is_not_waited_on() -> None:
    system = System("left", "right")

    async def body(peers: Peers) -> Any:
        left = await peers.connect("left", ADDER, BUDGET)
        right = await peers.connect("right", ADDER, BUDGET)
        assert isinstance(left, Client)
        assert isinstance(right, Client)
        slow = await right.start(Later(1, 5_000_000), FAR)
        system.close_reply_links("left")
        waited = await right.finish(slow)
        return waited, left.peer.alive, await left.call(Add(1, 2), FAR), left.rebinds

    assert system.client(body) == (Sum(1), False, Sum(3), 1)


def test_a_route_that_dies_before_the_bind_is_asked_for_again() -> None:
    system = System("adder")
    system.router.dying["adder"] = 1

    async def body(peers: Peers) -> Any:
        client = await peers.connect("adder", ADDER, BUDGET)
        assert isinstance(client, Client)
        return await client.call(Add(1, 2), FAR), client.generation

    assert system.client(body) == (Sum(3), 2)


class Served:
    """A request that is served, as far as a call made for it looks at it."""

    def __init__(self, deadline: Nanos) -> None:
        self.deadline = deadline
        self.trail = bytes(24)
        self.context = Context(bytes(16), bytes(8))


async def found_late(peers: Peers, tries: int) -> Any:
    """What each search of 10 ms ended with, and the client of one that found it."""
    ended: list[object] = []
    for _ in range(tries):
        budget = RetryBudget(
            attempts_max=1, backoff=Nanos(1_000_000), deadline=Nanos(await Now() + 10_000_000)
        )
        client = await peers.connect("adder", ADDER, budget)
        if isinstance(client, Client):
            return ended, await client.call(Add(1, 2), FAR), client.generation
        ended.append(client)
    return ended, None, 0


def test_a_server_that_is_late_to_bind_is_found_by_the_route_taken_first() -> None:
    system = System()
    system.late["adder"] = Nanos(95_000_000)
    _ = system.start("adder")

    ended, answered, generation = system.client(lambda peers: found_late(peers, 20))

    assert ended == [TimedOut()] * 9
    assert (answered, generation) == (Sum(3), 1)
    assert system.router.asked["adder"] == 1, "init counts each route as taken"
    assert system.servers["adder"].account.expired == 0


def test_a_server_that_ends_before_it_has_bound_is_asked_for_anew() -> None:
    system = System()
    system.late["adder"] = FAR
    _ = system.start("adder")

    async def body(peers: Peers) -> Any:
        before = await found_late(peers, 3)
        table = next(task.table for task in system.kernel.tasks if task.name == "client")
        slots = len(table)
        system.kill("adder")
        system.late.clear()
        _ = system.start("adder")
        after = await found_late(peers, 1)
        return before, after, len(table) - slots

    before, after, slots = system.client(body)

    assert before == ([TimedOut()] * 3, None, 0)
    assert after == ([], Sum(3), 2)
    assert (system.router.asked["adder"], slots) == (2, 0)


def test_a_late_binding_that_is_forgotten_leaves_nothing_and_is_asked_for_anew() -> None:
    system = System()
    system.late["adder"] = FAR
    _ = system.start("adder")

    async def body(peers: Peers) -> Any:
        _ = await peers.control(FAR)
        table = next(task.table for task in system.kernel.tasks if task.name == "client")
        slots = len(table)
        ended, _, _ = await found_late(peers, 1)
        await peers.forget("adder")
        await peers.forget("adder")  # there is none any more
        left = len(table) - slots, len(peers.caller.correlator.in_flight)
        again, _, _ = await found_late(peers, 1)
        return ended, left, again

    assert system.client(body) == ([TimedOut()], (0, 0), [TimedOut()])
    assert system.router.asked["adder"] == 2


def test_a_server_that_lives_and_never_binds_is_asked_anew_after_a_time() -> None:
    system = System()
    system.late["adder"] = Nanos(3 * LATE_MAX)
    _ = system.start("adder")

    async def body(peers: Peers) -> Any:
        _ = await found_late(peers, 1)
        asked = []
        for span in (LATE_MAX // 2, LATE_MAX):
            _ = await SleepUntil(Nanos(await Now() + span))
            _ = await found_late(peers, 2)
            asked.append(system.router.asked["adder"])
        return asked, len(peers.caller.correlator.in_flight)

    assert system.client(body) == ([1, 2], 1)


@pytest.mark.parametrize("use", ["call", "renew", "take"])
def test_a_late_binding_whose_end_somebody_else_has_seen_is_no_binding(use: str) -> None:
    system = System("other")
    system.late["adder"] = Nanos(30_000_000)
    _ = system.start("adder")

    async def body(peers: Peers) -> Any:
        other = await peers.connect("other", ADDER, BUDGET)
        assert isinstance(other, Client)

        async def elsewhere() -> None:
            """Whatever arrives in the next 60 ms is met by another call's wait."""
            assert await other.finish(await other.start(Later(1, 60_000_000), FAR)) == Sum(1)

        ended, _, _ = await found_late(peers, 1)
        await elsewhere()
        system.kill("adder")
        system.late.clear()
        _ = system.start("adder")
        await elsewhere()
        client = await peers.connect("adder", ADDER, BUDGET)
        assert isinstance(client, Client)
        if use == "renew":
            assert await client.renew(FAR) is None
        elif use == "take":
            await client.take(4)
        peers_known = len(peers.caller.correlator.peers)
        return ended, client.generation, await client.call(Add(1, 2), FAR), peers_known

    assert system.client(body) == ([TimedOut()], 2, Sum(3), 3)


def test_a_late_bind_whose_answer_cannot_be_taken_now_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    system = System()
    system.late["adder"] = Nanos(30_000_000)
    _ = system.start("adder")
    receive = system.kernel._recv
    full: list[bool] = []

    def received(task: Any, *arguments: Any) -> Message:
        if full and task.name == "client":
            full.clear()
            raise AbiError(Status.NO_SPACE, "the table of slots is full")
        return receive(task, *arguments)

    monkeypatch.setattr(system.kernel, "_recv", received)

    async def body(peers: Peers) -> Any:
        _ = await found_late(peers, 1)
        table = next(task.table for task in system.kernel.tasks if task.name == "client")
        slots = len(table)
        full.append(True)
        with pytest.raises(AbiError) as error:
            _ = await peers.connect("adder", ADDER, BUDGET)
        assert error.value.status is Status.NO_SPACE
        client = await peers.connect("adder", ADDER, BUDGET)
        assert isinstance(client, Client)
        left = len(table) - slots, len(peers.caller.correlator.in_flight)
        return await client.call(Add(1, 2), FAR), left

    assert system.client(body) == (Sum(3), (0, 0))
    assert system.router.asked["adder"] == 1


def test_a_search_for_a_request_ends_with_the_request() -> None:
    system = System()
    system.late["adder"] = Nanos(500_000_000)
    _ = system.start("adder")

    async def body(peers: Peers) -> Any:
        _ = await peers.control(FAR)
        begun = await Now()
        peers.caller.parent = Served(Nanos(begun + 5_000_000))
        ended, _, _ = await found_late(peers, 1)
        return ended, await Now() - begun

    assert system.client(body) == ([TimedOut()], 5_000_000)


def test_the_search_for_a_restarted_service_is_bounded() -> None:
    system = System("adder")

    async def body(peers: Peers) -> Any:
        client = await peers.connect("adder", ADDER, BUDGET)
        assert isinstance(client, Client)
        system.kill("adder")
        system.router.down["adder"] = 1_000
        stale = await client.call(Add(1, 2), Nanos(20_000_000_000))
        return stale, await client.call(Add(1, 2), Nanos(20_000_000_000))

    assert system.client(body) == (Stale(), Closed())
    assert system.router.asked["adder"] <= 1 + 8


def test_call_until_repeats_an_idempotent_request_over_a_restart() -> None:
    system = System("adder")

    async def body(peers: Peers) -> Any:
        client = await peers.connect("adder", ADDER, BUDGET)
        assert isinstance(client, Client)
        system.kill("adder")
        system.start("adder")
        again = await call_until(client, Add(1, 2), BUDGET)
        system.kill("adder")
        system.start("adder")
        once = await call_until(client, Later(1, 1), BUDGET)
        return again, once

    assert system.client(body) == (Sum(3), Stale())


def test_retry_until_gives_the_last_result_when_the_budget_is_spent() -> None:
    tries: list[int] = []

    async def attempt() -> int:
        tries.append(1)
        return len(tries)

    async def body(_: Peers) -> Any:
        short = await retry_until(attempt, lambda n: n < 3, BUDGET, RetryTokens())
        long = await retry_until(attempt, lambda n: n < 99, BUDGET, RetryTokens())
        return short, long

    assert System().client(body) == (3, 3 + BUDGET.attempts_max)


def test_a_route_is_denied_not_found_or_comes_up_later() -> None:
    system = System("adder", "secret", "slow")
    system.router.denied.add("secret")
    system.router.down["slow"] = 3

    async def body(peers: Peers) -> Any:
        control = await peers.control(FAR)
        assert isinstance(control, Exchange)
        names = ["adder", "secret", "nobody", "slow", "", "x" * 49, "\u00e4"]
        return [
            await route_with_nonce_budgeted(
                control, name, BUDGET, NonceMismatchBudget(64), RetryTokens()
            )
            for name in names
        ]

    routed, denied, missing, slow, *invalid = system.client(body)

    assert isinstance(routed, Routed)
    assert (denied, missing) == (Denied(), NotFound())
    assert isinstance(slow, Routed)
    assert system.router.asked["slow"] == 4
    assert invalid == [NotFound()] * 3
    assert "" not in system.router.asked


def test_a_route_that_stays_down_is_closed_within_the_attempts() -> None:
    system = System("adder")
    system.router.down["adder"] = 100

    outcome = system.client(lambda peers: peers.connect("adder", ADDER, BUDGET))

    assert outcome == Closed()
    assert system.router.asked["adder"] == BUDGET.attempts_max


ROUTED = encode(RoutedReply(1, 1, 8, 4096, 0, 8, 4096))


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        (lambda p, m: p.give(m, ROUTED), Malformed()),
        (lambda p, m: p.give(m, b"\x91"), Malformed()),
        (lambda p, m: p.give(m, b"", status=ReplyStatus.UNSUPPORTED), Malformed()),
        (lambda p, m: p.give(m, b"", status=ReplyStatus.DENIED), Denied()),
        (lambda p, m: p.give(m, b"", status=ReplyStatus.EXPIRED), TimedOut()),
        (lambda p, _: p.take(), TimedOut()),
        (lambda p, m: strays(p, m, 3), MismatchBudgetExceeded()),
        (None, Closed()),
    ],
    ids=[
        "a route without its capability",
        "a broken body",
        "unsupported",
        "denied",
        "expired",
        "silence",
        "strays",
        "death",
    ],
)
def test_each_answer_of_a_route_server_has_its_outcome(answers: Any, expected: Any) -> None:
    async def script(puppet: Puppet) -> None:
        request = await puppet.take()
        if answers is not None:
            await answers(puppet, request)
            _ = await Recv((await EndpointCreate(),), FAR)

    async def body(exchange: Exchange) -> Any:
        control = Exchange(puppet.pair.peers["client"].caller, INIT, exchange.peer)
        deadline = Nanos(4_000_000)
        budget = RetryBudget(attempts_max=2, backoff=Nanos(1_000_000), deadline=deadline)
        return await route_with_nonce_budgeted(
            control, "adder", budget, NonceMismatchBudget(2), RetryTokens()
        )

    puppet = Puppet(script)

    assert puppet.client(body) == expected


async def strays(puppet: Puppet, request: Message, count: int) -> None:
    for number in range(count):
        await puppet.give(request, nonce=7_000 + number)


def test_an_unexpected_capability_of_a_route_is_closed() -> None:
    async def script(puppet: Puppet) -> None:
        request = await puppet.take()
        link = await LinkCreate(await EndpointCreate())
        await Send(puppet.reply, answer(request.data, 0, ROUTED), move=link.slot)
        _ = await puppet.take()

    async def body(exchange: Exchange) -> Any:
        control = Exchange(puppet.pair.peers["client"].caller, INIT, exchange.peer)
        outcome = await route_with_nonce_budgeted(
            control, "@reply", BUDGET, NonceMismatchBudget(2), RetryTokens()
        )
        return outcome, len(puppet.pair.kernel.tasks[-1].table)

    puppet = Puppet(script)

    assert puppet.client(body) == (Malformed(), 3)


def test_a_batch_answered_with_the_wrong_count_is_malformed() -> None:
    async def script(puppet: Puppet) -> None:
        await puppet.give(await puppet.take(), encode([Sum(1)]))
        _ = await puppet.take()

    outcomes = Puppet(script).client(lambda x: x.call_many([Add(1, 1)] * 3, FAR))

    assert outcomes == [Malformed()] * 3


def test_a_long_batch_goes_in_packets_that_fit_the_link() -> None:
    pair = Pair()

    async def body(exchange: Exchange) -> Any:
        return await exchange.call_many([Add(n, n) for n in range(300)], FAR)

    outcomes = pair.client(body, terms=LinkTerms(8, 512, 0), reply_terms=LinkTerms(8, 4096, 0))

    assert outcomes == [Sum(2 * n) for n in range(300)]
    assert pair.kernel.traps["Call"] >= 4


def test_bulk_bytes_arrive_as_they_were_sent() -> None:
    async def body(_: Peers) -> Any:
        slot = await offer_bulk(b"x" * 5_000)
        bulk = await accept_bulk(slot, 4_990, 10)
        assert isinstance(bulk, Bulk)
        data = bytes(bulk.view)
        await bulk.release()
        return data

    assert System().client(body) == b"x" * 10


def test_bulk_is_refused_unless_kind_seal_and_bounds_are_right() -> None:
    async def body(_: Peers) -> Any:
        outside = await accept_bulk(await offer_bulk(b"x"), 4_000, 97)
        negative = await accept_bulk(await offer_bulk(b"x"), -1, 1)
        unsealed = await accept_bulk(await VmoCreate(10), 0, 10)
        endpoint = await EndpointCreate()
        link = await accept_bulk((await LinkCreate(endpoint)).slot, 0, 1)
        nothing = await accept_bulk(None, 0, 1)
        return [outside, negative, unsealed, link, nothing]

    system = System()

    assert system.client(body) == [
        BulkFault.OUT_OF_BOUNDS,
        BulkFault.OUT_OF_BOUNDS,
        BulkFault.NOT_SEALED,
        BulkFault.NOT_A_VMO,
        BulkFault.NO_CAPABILITY,
    ]


def test_a_link_that_is_let_go_twice_costs_nobody_the_slot_it_had() -> None:
    pair = Pair()

    async def body(exchange: Exchange) -> bool:
        peers = pair.peers[INIT_NAME]
        await peers.discard(exchange.peer)
        other = await LinkCreate(exchange.peer.inbox, LinkTerms())
        assert other.slot == exchange.peer.slot, "the lowest free slot is given again"
        await peers.discard(exchange.peer)
        await Send(other.slot, b"\x01still there")
        return True

    assert pair.client(body)


async def _started(exchange: Exchange) -> Any:
    return await exchange.finish(await exchange.start(Add(1, 2), FAR))


@pytest.mark.parametrize("ask", [call, _started], ids=["a call", "a started call"])
def test_a_reply_of_another_instance_is_stale_and_never_taken(ask: Any) -> None:
    async def script(puppet: Puppet) -> None:
        first = await puppet.take()
        await puppet.give(first)
        request = await puppet.take()
        sender = puppet.task.sender
        puppet.task.sender = sender._replace(generation=sender.generation + 1)
        await puppet.give(request, encode(Sum(-1)))
        _ = await puppet.take()

    async def body(exchange: Exchange) -> Any:
        return [await ask(exchange), await ask(exchange), exchange.peer.alive]

    puppet = Puppet(script)

    assert puppet.client(body) == [Sum(3), Stale(), False]
    assert puppet.correlator.in_flight == {}
