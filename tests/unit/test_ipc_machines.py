from typing import Any

import pytest

from nexus.abi import (
    NEVER,
    LinkId,
    LinkTerms,
    Message,
    Nanos,
    Pid,
    QosClass,
    Sender,
    Slot,
    service_id,
)
from nexus.ipc import (
    Context,
    Correlator,
    NonceGen,
    NonceMismatchBudget,
    Peer,
    Pending,
    ReplyBuffer,
    Retry,
    RetryBudget,
    RetryTokens,
    Spans,
    Stale,
    Unknown,
    Verdict,
    deadline_after,
    nested_deadline,
)
from nexus.ipc.correlate import GENERATION_ANY, RECENT_COUNT
from nexus.ipc.retry import TOKEN, TOKENS_MAX
from nexus.wire import FRAME_KIND, HEADER, REPLY_BIT
from tests.fakes.adder import ADDER, Add

U64_MAX = (1 << 64) - 1


def message(
    nonce: int = 1,
    *,
    link: int = 5,
    service: str = "adder",
    generation: int = 1,
    size: int = 48,
    data: bytes | None = None,
) -> Message:
    op = 1 | REPLY_BIT
    frame = HEADER.pack(FRAME_KIND, 1, op, 0, 900, 0, nonce, 0, bytes(16), bytes(8))
    sender = Sender(service_id(service), Pid(3), generation, QosClass.NORMAL)
    body = frame + bytes(size - 48) if data is None else data
    return Message(body, sender, LinkId(link), None, Nanos(1), Slot(2))


def peer(name: str = "adder", link: int = 5, generation: int = 1) -> Peer:
    terms = LinkTerms()
    return Peer(
        name,
        slot=Slot(3),
        inbox=Slot(2),
        link=LinkId(link),
        service=service_id(name),
        generation=generation,
        terms=terms,
        reply_terms=terms,
    )


def sent(correlator: Correlator, to: Peer) -> Pending:
    nonce = correlator.nonces.take()
    pending = Pending(nonce, to, ADDER.codecs[Add], NEVER, b"", 0)
    correlator.on_sent(pending)
    return pending


def test_nonces_count_up_from_the_given_start_and_wrap_at_64_bits() -> None:
    nonces = NonceGen(U64_MAX - 1, ())

    assert [nonces.take() for _ in range(4)] == [U64_MAX - 1, U64_MAX, 0, 1]


def test_a_nonce_in_flight_is_not_given_again() -> None:
    nonces = NonceGen(7, {7, 8})

    assert nonces.take() == 9


def test_the_65th_mismatch_exceeds_a_budget_of_64() -> None:
    budget = NonceMismatchBudget(64)

    assert not budget.exceeded_by(64)
    assert budget.exceeded_by(65)


def test_a_deadline_saturates_and_a_nested_one_only_shrinks() -> None:
    assert deadline_after(Nanos(5), Nanos(7)) == 12
    assert deadline_after(Nanos(5), NEVER) == NEVER
    assert nested_deadline(Nanos(10), Nanos(20)) == 10
    assert nested_deadline(Nanos(20), Nanos(10)) == 10


def test_kept_replies_are_taken_in_any_order_and_once() -> None:
    buffer = ReplyBuffer(4, 1000)
    for nonce in (1, 2, 3):
        assert buffer.push(nonce, message(nonce)).kept

    assert buffer.take(3) == message(3)
    assert buffer.take(1) == message(1)
    assert buffer.take(1) is None
    assert (len(buffer), buffer.size, buffer.drops) == (1, 48, 0)


def test_a_full_buffer_evicts_the_oldest_reply_and_counts_it() -> None:
    buffer = ReplyBuffer(2, 1000)
    for nonce in (1, 2):
        assert buffer.push(nonce, message(nonce)).kept

    push = buffer.push(3, message(3))

    assert push.evicted == (message(1),)
    assert [buffer.take(nonce) for nonce in (1, 2, 3)] == [None, message(2), message(3)]
    assert buffer.drops == 1


def test_a_buffer_is_bounded_in_bytes_too() -> None:
    buffer = ReplyBuffer(10, 200)
    for nonce in (1, 2, 3):
        assert buffer.push(nonce, message(nonce, size=60)).kept

    push = buffer.push(4, message(4, size=130))

    assert [len(each.data) for each in push.evicted] == [60, 60]
    assert buffer.size == 190
    assert not buffer.push(5, message(5, size=201)).kept
    assert buffer.drops == 3


def test_a_second_reply_for_a_kept_nonce_is_refused() -> None:
    buffer = ReplyBuffer(2, 1000)
    assert buffer.push(1, message(1, size=50)).kept

    assert not buffer.push(1, message(1, size=60)).kept
    assert buffer.take(1) == message(1, size=50)
    assert buffer.drops == 1


def test_a_reply_to_a_call_in_flight_is_its_match() -> None:
    correlator = Correlator()
    pending = sent(correlator, peer())

    assert correlator.judge(message(pending.nonce)) is Verdict.MATCH


@pytest.mark.parametrize("wrong", [{"link": 6}, {"service": "mallory"}])
def test_the_right_nonce_from_somebody_else_is_foreign(wrong: dict[str, Any]) -> None:
    correlator = Correlator()
    pending = sent(correlator, peer())

    assert correlator.judge(message(pending.nonce, **wrong)) is Verdict.FOREIGN
    assert (correlator.foreign, correlator.stale, correlator.duplicate) == (1, 0, 0)
    assert correlator.judge(message(pending.nonce)) is Verdict.MATCH


def test_a_foreign_reply_is_still_foreign_after_the_true_one() -> None:
    correlator = Correlator()
    pending = sent(correlator, peer())
    correlator.on_ended(pending)

    assert correlator.judge(message(pending.nonce, link=6)) is Verdict.FOREIGN


def test_a_second_reply_to_an_answered_call_is_a_duplicate() -> None:
    correlator = Correlator()
    pending = sent(correlator, peer())
    correlator.on_ended(pending)

    assert correlator.judge(message(pending.nonce)) is Verdict.DUPLICATE
    assert correlator.duplicate == 1


def test_a_second_reply_is_a_duplicate_while_the_first_waits_in_the_buffer() -> None:
    correlator = Correlator()
    pending = sent(correlator, peer())
    assert correlator.buffer.push(pending.nonce, message(pending.nonce)).kept

    assert correlator.judge(message(pending.nonce)) is Verdict.DUPLICATE


def test_a_reply_to_an_abandoned_call_is_stale_once() -> None:
    correlator = Correlator()
    pending = sent(correlator, peer())
    correlator.on_abandoned(pending.nonce)
    correlator.on_ended(pending)

    assert correlator.judge(message(pending.nonce)) is Verdict.STALE
    assert correlator.judge(message(pending.nonce)) is Verdict.DUPLICATE


def test_nonces_never_issued_or_long_ago_are_stale() -> None:
    correlator = Correlator()
    first = sent(correlator, peer())
    correlator.on_ended(first)
    for _ in range(RECENT_COUNT):
        correlator.on_ended(sent(correlator, peer()))

    assert correlator.judge(message(first.nonce)) is Verdict.STALE
    assert correlator.judge(message(10_000)) is Verdict.STALE
    assert correlator.judge(message(0)) is Verdict.STALE


@pytest.mark.parametrize("data", [b"", b"N", bytes(48), bytes([FRAME_KIND]) + bytes(60)])
def test_what_is_no_reply_frame_matches_nothing(data: bytes) -> None:
    correlator = Correlator()
    _ = sent(correlator, peer())

    assert correlator.judge(message(data=data)) is Verdict.UNREADABLE
    assert correlator.malformed == 1


def test_a_reply_of_another_generation_ends_the_call_as_stale() -> None:
    correlator = Correlator()
    pending = sent(correlator, peer())

    assert correlator.judge(message(pending.nonce, generation=2)) is Verdict.STALE_PEER
    assert pending.early == Stale()
    assert not pending.peer.alive


def test_a_peer_of_unknown_generation_learns_it_from_the_first_reply() -> None:
    correlator = Correlator()
    target = peer(generation=GENERATION_ANY)
    pending = sent(correlator, target)

    assert correlator.judge(message(pending.nonce, generation=4)) is Verdict.MATCH
    assert target.generation == 4


def test_a_gone_peer_ends_its_calls_as_unknown_and_leaves_the_others() -> None:
    correlator = Correlator()
    lost, other = sent(correlator, peer()), sent(correlator, peer(link=6))
    answered = sent(correlator, peer())
    assert correlator.buffer.push(answered.nonce, message(answered.nonce)).kept

    correlator.on_gone(LinkId(5))

    assert (lost.early, other.early, answered.early) == (Unknown(), None, None)


def test_retries_end_with_the_attempts() -> None:
    budget = RetryBudget(attempts_max=3, backoff=Nanos(10), deadline=Nanos(1000))
    retry = Retry(budget, RetryTokens())

    assert [retry.on_failed(Nanos(0)) for _ in range(3)] == [10, 20, None]


def test_retries_end_before_the_deadline() -> None:
    budget = RetryBudget(attempts_max=9, backoff=Nanos(10), deadline=Nanos(100))
    retry = Retry(budget, RetryTokens())

    assert retry.on_failed(Nanos(89)) == 99
    assert retry.on_failed(Nanos(99)) is None


def test_retries_of_a_route_stop_when_its_tokens_are_spent_and_return_with_success() -> None:
    budget = RetryBudget(attempts_max=100, backoff=Nanos(1), deadline=NEVER)
    tokens = RetryTokens()

    allowed = 0
    while Retry(budget, tokens).on_failed(Nanos(0)) is not None:
        allowed += 1
    for _ in range(TOKEN):
        tokens.on_success()

    assert allowed == TOKENS_MAX // TOKEN
    assert Retry(budget, tokens).on_failed(Nanos(0)) is not None
    assert Retry(budget, tokens).on_failed(Nanos(0)) is None


def test_spans_are_the_same_for_the_same_seed_and_never_repeat() -> None:
    first, again, other = Spans(b"s", "a", 1), Spans(b"s", "a", 1), Spans(b"s", "a", 2)

    spans = [first.next_span() for _ in range(100)]

    assert first.root == again.root != other.root
    assert len({first.root.span, *spans}) == 101
    assert spans == [again.next_span() for _ in range(100)]
    assert Context(bytes(range(16)), bytes(range(8))).trail == bytes(range(16)) + bytes(range(8))
