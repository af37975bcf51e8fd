import contextlib
import json
from typing import Any

import pytest

from nexus.abi import EndpointCreate, LinkCreate, LinkTerms, Nanos, PeerGone, Recv, Send
from nexus.ipc import Answer, Exchange, Peers, Refused, TimedOut, Unknown, offer_bulk
from nexus.protocols.meta import PROTOCOL as META
from nexus.protocols.meta import Bound, GetStatus, Health, Healthy, MetaStatus, Stop, Stopping
from nexus.runtime import BINDS_MAX, ONE_SHOTS_MAX, Server, serve
from nexus.wire import (
    FLAGS_INDEX,
    HEADER_SIZE,
    OP_INDEX,
    REPLY_BIT,
    Codec,
    ReplyStatus,
    encode,
    nonce_of,
    status_of,
)
from tests.fakes.adder import ADDER, Add, Adder, AdderStatus, Bytes, Give, Keep, Large, Later, Sum
from tests.fakes.pair import FAR, SEED, TERMS, Pair

ADD = ADDER.codecs[Add]


def add_frame(codec: Codec = ADD, *, nonce: int = 77, deadline: int = FAR) -> bytearray:
    frame = bytearray(codec.prefix)
    frame += nonce.to_bytes(8, "little") + deadline.to_bytes(8, "little") + bytes(range(24))
    return frame + encode(Add(1, 2))


def raw(exchange: Exchange, frame: bytes | bytearray) -> Any:
    """Send bytes as they are and receive what comes back."""

    async def swap() -> bytes:
        await Send(exchange.peer.slot, bytes(frame))
        deadline = Nanos(5_000_000_000)
        return (await Recv((exchange.peer.inbox,), deadline, link=exchange.peer.link)).data

    return swap()


def test_a_request_is_answered_with_its_nonce_deadline_trace_and_span() -> None:
    pair = Pair()
    frame = add_frame()

    reply = pair.client(lambda x: raw(x, frame))

    assert reply[OP_INDEX] == ADD.op | REPLY_BIT
    assert reply[8:HEADER_SIZE] == frame[8:HEADER_SIZE]
    assert reply[HEADER_SIZE:] == encode(Sum(3))


@pytest.mark.parametrize(
    ("change", "status"),
    [
        (lambda f: f[:20], ReplyStatus.MALFORMED),
        (lambda f: f[:HEADER_SIZE], ReplyStatus.MALFORMED),
        (lambda f: f + b"\0", ReplyStatus.MALFORMED),
        (lambda f: f[:HEADER_SIZE] + b"\x93\x01\x02\x03", ReplyStatus.MALFORMED),
        (lambda f: f[:HEADER_SIZE] + b"\x91\x01", ReplyStatus.MALFORMED),
        (lambda f: f[:HEADER_SIZE] + b"\x92\xcc\x01\x02", ReplyStatus.MALFORMED),
        (lambda f: f[:HEADER_SIZE] + b"\x92\xcf" + b"\xff" * 8 + b"\2", ReplyStatus.MALFORMED),
        (lambda f: f[:1] + b"\2" + f[2:], ReplyStatus.UNSUPPORTED),
        (lambda f: f[:2] + b"\x66" + f[3:], ReplyStatus.UNSUPPORTED),
        (lambda f: f[:3] + b"\x80" + f[4:], ReplyStatus.UNSUPPORTED),
        (lambda f: f[:4] + b"\xee\xee" + f[6:], ReplyStatus.UNSUPPORTED),
        (lambda f: f[:6] + b"\1\0" + f[8:], ReplyStatus.MALFORMED),
        (lambda f: b"\x11" + f[1:], ReplyStatus.MALFORMED),
    ],
    ids=[
        "short header",
        "no body",
        "trailing byte",
        "extra element",
        "missing element",
        "non-minimal integer",
        "oversize field",
        "unknown version",
        "unknown op",
        "unknown flag",
        "unknown protocol",
        "a status in a request",
        "unknown kind",
    ],
)
def test_a_broken_frame_is_refused_with_its_nonce_and_counted(
    change: Any, status: ReplyStatus
) -> None:
    pair = Pair()

    reply = pair.client(lambda x: raw(x, change(add_frame())))

    assert status_of(reply) == status
    assert nonce_of(reply) == 77
    assert len(reply) == HEADER_SIZE
    assert pair.server.account.malformed == 1
    assert pair.service.deadlines == [], "the handler was not asked"


def test_a_reply_sent_to_a_service_is_never_answered() -> None:
    pair = Pair()
    frame = add_frame()
    frame[OP_INDEX] |= REPLY_BIT

    async def body(exchange: Exchange) -> Any:
        await Send(exchange.peer.slot, frame)
        return await exchange.call(Add(1, 1), FAR)

    assert pair.client(body) == Sum(2)
    assert pair.server.account.unanswerable == 1


def test_a_request_past_its_deadline_is_expired_and_not_handled() -> None:
    pair = Pair()

    reply = pair.client(lambda x: raw(x, add_frame(deadline=1)))

    assert status_of(reply) == ReplyStatus.EXPIRED
    assert pair.server.account.expired == 1
    assert pair.service.deadlines == []


def test_a_refusal_is_a_status_and_leaves_a_remark_with_its_notes() -> None:
    pair = Pair()

    outcome = pair.client(lambda x: x.call(Add(999, 2), FAR), name="greedy")

    assert outcome == Refused(AdderStatus.TOO_LARGE)
    assert pair.server.remarks[-1].notes == (("value", 1001),)
    assert pair.server.remarks[-1].request == "Add"


def test_a_deferred_reply_comes_when_its_time_has_come() -> None:
    pair = Pair()

    async def body(exchange: Exchange) -> Any:
        late = await exchange.start(Later(7, 5_000_000), FAR)
        soon = await exchange.start(Later(8, 1_000), FAR)
        direct = await exchange.call(Add(1, 1), FAR)
        return direct, await exchange.finish(soon), await exchange.finish(late)

    assert pair.client(body) == (Sum(2), Sum(8), Sum(7))
    assert 5_000_000 <= pair.kernel.now < 5_100_000


def test_the_death_of_a_client_frees_its_reply_link_and_tells_the_service() -> None:
    pair = Pair()
    client = pair.add_client(lambda x: x.call(Later(1, 4_000_000_000), FAR))
    pair.kernel.settle()
    slots = len(pair.serving.table)

    pair.kernel.end(client)
    pair.kernel.settle()

    assert len(pair.serving.table) == slots - 1
    assert len(pair.service.gone) == 1
    assert pair.service.later == []


def test_a_client_that_reads_no_replies_loses_them_and_blocks_nobody() -> None:
    pair = Pair()

    async def deaf(exchange: Exchange) -> None:
        for _ in range(20):
            await Send(exchange.peer.slot, add_frame(), deadline=FAR)
        _ = await Recv((pair.boot.endpoint,), FAR)

    pair.add_client(deaf, name="deaf")
    pair.kernel.settle()

    assert pair.client(lambda x: x.call(Add(1, 1), FAR), name="other") == Sum(2)
    assert pair.server.account.lost == 12
    assert pair.server.account.replies == 8 + 1 + 2


def test_a_request_on_a_link_that_was_never_bound_is_counted_and_not_handled() -> None:
    pair = Pair()
    stranger = pair.kernel.task("stranger")
    slot = pair.kernel.link(pair.kernel.endpoint_of(pair.serving), stranger)

    async def main() -> None:
        await Send(slot, add_frame())

    pair.kernel.run(pair.kernel.start(stranger, main()))
    pair.kernel.settle()

    assert pair.server.account.unanswerable == 1
    assert pair.service.deadlines == []


def test_a_one_shot_reply_link_takes_the_reply_and_is_closed() -> None:
    pair = Pair()

    async def body(exchange: Exchange) -> Any:
        inbox = await EndpointCreate()
        link = await LinkCreate(inbox, LinkTerms())
        await Send(exchange.peer.slot, add_frame(), move=link.slot)
        answer = await Recv((inbox,), FAR)
        with pytest.raises(PeerGone):
            await Recv((inbox,), FAR)
        return answer.data[HEADER_SIZE:]

    assert pair.client(body) == encode(Sum(3))
    assert pair.server.account.replies == 2


def test_one_shot_replies_can_be_deferred_up_to_a_bound() -> None:
    pair = Pair()
    later = ADDER.codecs[Later]
    frame = add_frame()
    frame[: len(later.prefix)] = later.prefix
    frame[HEADER_SIZE:] = encode(Later(5, 1_000_000))

    async def body(exchange: Exchange) -> Any:
        inbox = await EndpointCreate()
        for _ in range(ONE_SHOTS_MAX + 1):
            link = await LinkCreate(inbox, LinkTerms())
            await Send(exchange.peer.slot, frame, move=link.slot, deadline=FAR)
        statuses: list[int] = []
        while len(statuses) < ONE_SHOTS_MAX + 1:
            with contextlib.suppress(PeerGone):
                statuses.append(status_of((await Recv((inbox,), FAR)).data))
        return statuses

    statuses = pair.client(body)
    pair.kernel.settle()

    assert statuses == [ReplyStatus.BUSY] + [ReplyStatus.OK] * ONE_SHOTS_MAX
    assert len(pair.serving.table) == 1


def test_binds_beyond_the_bound_are_refused_and_the_table_never_fills() -> None:
    pair = Pair()

    async def wait(exchange: Exchange) -> None:
        _ = await exchange.call(Later(1, 0xFFFF_FFFF), FAR)

    for number in range(BINDS_MAX):
        pair.add_client(wait, name=f"client{number}")
    pair.kernel.settle()
    with pytest.raises(AssertionError, match="Closed"):
        pair.client(lambda x: x.call(Add(1, 1), FAR), name="one too many")

    assert pair.server.account.refused_binds == 1
    assert len(pair.serving.table) == BINDS_MAX + 1


def test_a_capability_of_a_request_is_kept_if_taken_and_closed_if_not() -> None:
    pair = Pair()

    async def body(exchange: Exchange) -> Any:
        inbox = await EndpointCreate()
        refused = await exchange.ask(Keep(0), FAR, move=(await LinkCreate(inbox)).slot)
        after_refusal = len(pair.serving.table)
        kept = await exchange.ask(Keep(1), FAR, move=(await LinkCreate(inbox)).slot)
        after_keep = len(pair.serving.table)
        given = await exchange.ask(Give(), FAR)
        return refused, after_refusal, kept, after_keep, given, len(pair.serving.table)

    refused, after_refusal, kept, after_keep, given, after_give = pair.client(body)

    assert refused == Refused(AdderStatus.NO_CAPABILITY)
    assert isinstance(kept, Answer)
    assert isinstance(given, Answer)
    assert given.cap is not None
    assert (after_refusal, after_keep, after_give) == (2, 3, 2)


def test_an_unwanted_capability_in_a_reply_is_closed() -> None:
    pair = Pair()

    async def body(exchange: Exchange) -> Any:
        inbox = await EndpointCreate()
        _ = await exchange.ask(Keep(1), FAR, move=(await LinkCreate(inbox)).slot)
        slots = len(client.table)
        reply = await exchange.call(Give(), FAR)
        return reply, len(client.table) - slots

    client = pair.add_client(body)

    assert pair.kernel.run(client) == (Sum(2), 0)


def test_a_batch_is_answered_item_by_item() -> None:
    pair = Pair()

    async def body(exchange: Exchange) -> Any:
        return await exchange.call_many([Add(1, 1), Add(999, 9), Add(2, 2)], FAR)

    assert pair.client(body) == [Sum(2), Refused(AdderStatus.TOO_LARGE), Sum(4)]
    assert pair.server.account.refusals == {AdderStatus.TOO_LARGE: 1}


def test_nothing_is_deferred_in_a_batch() -> None:
    pair = Pair()

    outcomes = pair.client(lambda x: x.call_many([Later(1, 1), Later(2, 1)], FAR))

    assert outcomes == [Refused(ReplyStatus.UNSUPPORTED)] * 2
    assert pair.service.later == []


class Together(Adder):
    """Gives what a batch deferred when all of it was handled."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[int] = []

    def on_batch(self) -> None:
        self.batches.append(len(self.later))
        for _, deferred, value in self.later:
            if value:
                deferred.reply(Sum(value))
            else:
                deferred.refuse(ReplyStatus.DENIED)
        self.later.clear()


def test_what_a_batch_deferred_is_given_at_once_at_its_end() -> None:
    service = Together()
    pair = Pair(service)
    requests = [Later(1, 9), Later(0, 9), Later(2, 9)]

    outcomes = pair.client(lambda x: x.call_many(requests, FAR))

    assert outcomes == [Sum(1), Refused(ReplyStatus.DENIED), Sum(2)]
    assert service.batches == [3]
    assert pair.server.account.refusals == {ReplyStatus.DENIED: 1}


@pytest.mark.parametrize("request_", [Keep(1), Give()], ids=["moves", "gives"])
def test_a_batch_of_what_moves_a_capability_is_refused_and_not_handled(request_: Any) -> None:
    pair = Pair()
    codec = ADDER.codecs[type(request_)]
    frame = bytearray(add_frame(codec))
    frame[FLAGS_INDEX] = 1
    frame[HEADER_SIZE:] = encode([request_] * 2)

    async def body(exchange: Exchange) -> Any:
        return await raw(exchange, frame), await exchange.call_many([request_] * 2, FAR)

    reply, not_sent = pair.client(body)

    assert status_of(reply) == ReplyStatus.UNSUPPORTED
    assert not_sent == [Refused(ReplyStatus.UNSUPPORTED)] * 2
    assert pair.service.deadlines == []


def test_large_replies_of_a_batch_are_spread_over_packets() -> None:
    pair = Pair()

    outcomes = pair.client(lambda x: x.call_many([Large(4000)] * 5, FAR))

    assert outcomes == [Bytes(bytes(4000))] * 5


def test_a_batch_too_large_to_answer_is_malformed_before_anything_is_done() -> None:
    pair = Pair()
    large = ADDER.codecs[Large]
    frame = bytearray(add_frame(large))
    frame[FLAGS_INDEX] = 1
    frame[HEADER_SIZE:] = encode([Large(4000)] * 3)

    reply = pair.client(lambda x: raw(x, frame))

    assert status_of(reply) == ReplyStatus.MALFORMED
    assert pair.service.deadlines == []


def test_health_answered_to_init_prints_ready_once() -> None:
    pair = Pair()

    async def probe(exchange: Exchange) -> Any:
        return await exchange.call(Health(), FAR)

    pair.service.is_ready = False
    early = pair.client(probe)
    pair.service.is_ready = True
    pair.client(probe, name="stranger")
    silent = list(pair.kernel.console)
    healthy = pair.client(probe)
    pair.client(probe)
    pair.kernel.settle()

    assert early == Refused(MetaStatus.NOT_READY)
    assert silent == []
    assert isinstance(healthy, Healthy)
    [(name, line, evidence)] = pair.kernel.console
    assert (name, line) == ("adder", "adder: ready")
    told = json.loads(evidence)
    assert told == {"generation": 1, "digest": healthy.digest, "echoed": told["echoed"]}
    assert told["echoed"] > 0


def test_a_later_instance_does_not_repeat_the_marker() -> None:
    pair = Pair()
    pair.kernel.end(pair.serving)
    again, _, _ = pair.add_server("adder")

    pair.client(lambda x: x.call(Health(), FAR), server=again)
    pair.kernel.settle()

    assert [line for _, line, _ in pair.kernel.console] == ["adder: ready again"]


def test_status_reports_the_counters_by_sender_and_by_status() -> None:
    pair = Pair()

    async def busy(exchange: Exchange) -> None:
        _ = await exchange.call(Add(1, 1), FAR)
        _ = await exchange.call(Add(999, 2), FAR)

    pair.client(busy, name="busy")
    status = pair.client(lambda x: x.call(GetStatus(), FAR), name="curious")

    assert status.requests == 3 + 2
    assert [row.requests for row in status.senders if row.requests == 3] == [3]
    assert [(row.status, row.count) for row in status.refusals] == [(AdderStatus.TOO_LARGE, 1)]
    assert ("later", 0) in [(fact.name, fact.value) for fact in status.facts]
    assert status.generation == 1


def test_only_init_stops_a_service() -> None:
    pair = Pair()

    denied = pair.client(lambda x: x.call(Stop(), FAR), name="stranger")
    stopped = pair.client(lambda x: x.call(Stop(), FAR))
    pair.kernel.settle()

    assert denied == Refused(ReplyStatus.DENIED)
    assert stopped == Stopping()
    assert pair.serving.over
    assert pair.serving.result == 0


def test_bind_says_the_generation_and_may_be_repeated() -> None:
    pair = Pair()
    bind = next(codec for codec in META.codecs.values() if codec.op == 1)
    frame = add_frame(bind)
    frame[HEADER_SIZE:] = b"\x90"

    async def body(exchange: Exchange) -> Any:
        link = await LinkCreate(exchange.peer.inbox, LinkTerms())
        await Send(exchange.peer.slot, frame, move=link.slot)
        bound = await Recv((exchange.peer.inbox,), FAR, link=link.link)
        return bound.data[HEADER_SIZE:], await exchange.call(Add(1, 1), Nanos(1_000_000))

    outcome = pair.client(body)

    assert outcome == (encode(Bound(1)), Unknown()), "the former way back is closed"
    assert len(pair.serving.table) == 2


@pytest.mark.parametrize("bring", ["a VMO", "nothing"])
def test_a_bind_without_a_usable_link_costs_nothing(bring: str) -> None:
    pair = Pair()
    bind = next(codec for codec in META.codecs.values() if codec.op == 1)
    frame = add_frame(bind)
    frame[HEADER_SIZE:] = b"\x90"

    async def body(exchange: Exchange) -> Any:
        move = await offer_bulk(b"x") if bring == "a VMO" else None
        await Send(exchange.peer.slot, frame, move=move)
        return await exchange.call(Add(1, 1), Nanos(2_000_000))

    outcome = pair.client(body)

    assert outcome == Sum(2)
    assert len(pair.serving.table) == 2


def test_a_reply_that_never_comes_is_timed_out_at_the_deadline() -> None:
    pair = Pair()

    outcome = pair.client(lambda x: x.call(Later(1, 0xFFFF_FFFF), Nanos(9_000_000)))

    assert outcome == TimedOut()
    assert pair.kernel.now == 9_000_000


def test_a_handler_may_be_a_coroutine_that_asks_others() -> None:
    class Relay:
        """Asks an adder behind it."""

        def __init__(self) -> None:
            self.behind: Exchange | None = None
            self.traces: list[bytes] = []

        async def handle(self, call: Any, request: Add) -> Any:
            assert self.behind is not None
            self.traces.append(call.context.trace)
            return await self.behind.call(request, FAR)

    back = Pair()
    relay = Relay()
    task = back.kernel.task("relay")
    boot = back.kernel.boot(task)

    peers = Peers(boot, SEED)
    slot = back.kernel.link(back.kernel.endpoint_of(back.serving), task, TERMS)

    async def main() -> int:
        relay.behind = await back.bind(peers, slot, back.serving, TERMS, TERMS)
        return await serve(relay, ADDER, boot, peers)

    back.kernel.start(task, main())

    outcome = back.client(lambda x: x.call(Add(1, 2), Nanos(3_000_000)), name="client", server=task)

    assert outcome == Sum(3)
    assert back.service.deadlines == [3_000_000], "the inner call never outlives the outer one"
    assert relay.traces == [back.peers["client"].caller.spans.root.trace]


def test_a_bug_in_a_handler_ends_the_task_with_its_exception() -> None:
    class Broken:
        """Fails."""

        def handle(self, call: Any, request: Any) -> Any:
            raise ZeroDivisionError("a bug")

    pair = Pair(Broken())
    task = pair.kernel.task("broken")
    boot = pair.kernel.boot(task)
    pair.kernel.start(task, serve(Broken(), ADDER, boot))

    outcome = pair.client(lambda x: x.call(Add(1, 1), FAR), server=task)

    assert outcome == Unknown()
    assert isinstance(task.failure, ZeroDivisionError)
    assert pair.kernel.console == [("broken", "broken: crashed, ZeroDivisionError", b"")]


def test_step_serves_one_message_and_returns() -> None:
    pair = Pair()
    task = pair.kernel.task("stepper")
    boot = pair.kernel.boot(task)

    server = Server(Adder(), ADDER, boot)

    async def main() -> list[bool]:
        return [await server.step(Nanos(10_000_000)) for _ in range(3)]

    pair.kernel.start(task, main())

    assert pair.client(lambda x: x.call(Add(1, 1), FAR), server=task) == Sum(2)
    assert pair.kernel.run(task) == [True, True, False]
    assert pair.kernel.now == 10_000_000


class Gatherer:
    """Answers what it was asked when nobody waits any more, and not before."""

    def __init__(self) -> None:
        self.waiting: list[Any] = []
        self.groups: list[int] = []
        self.stops = 0

    def handle(self, call: Any, request: Add) -> Any:
        deferred = call.defer()
        self.waiting.append((deferred, request))
        return deferred

    def busy(self) -> bool:
        return bool(self.waiting)

    async def on_idle(self) -> None:
        self.give()

    def on_stop(self) -> None:
        self.stops += 1
        self.give()

    def give(self) -> None:
        waiting, self.waiting = self.waiting, []
        self.groups.append(len(waiting))
        for deferred, request in waiting:
            deferred.reply(Sum(request.a + request.b))


def test_what_waits_is_worked_on_when_no_message_does_and_a_lone_one_at_once() -> None:
    gatherer = Gatherer()
    pair = Pair(gatherer)

    async def body(exchange: Exchange) -> list[Any]:
        started = [await exchange.start(Add(number, 1), FAR) for number in range(4)]
        together = [await exchange.finish(each) for each in started]
        return [*together, await exchange.call(Add(10, 1), FAR)]

    outcomes = pair.client(body)

    assert outcomes == [Sum(1), Sum(2), Sum(3), Sum(4), Sum(11)]
    assert gatherer.groups == [4, 1]
    assert pair.kernel.now < 2_000, "nobody waited for the clock"


def test_what_still_waits_is_answered_before_the_service_ends() -> None:
    gatherer = Gatherer()
    pair = Pair(gatherer)

    async def body(exchange: Exchange) -> list[Any]:
        started = [await exchange.start(Add(1, 1), FAR), await exchange.start(Stop(), FAR)]
        return [await exchange.finish(each) for each in started]

    outcomes = pair.client(body)

    assert outcomes == [Sum(2), Stopping()]
    assert (gatherer.groups, gatherer.stops) == ([1], 1)
