from hypothesis import given
from hypothesis import strategies as st

from nexus.abi import LinkId, LinkTerms, Message, Nanos, Pid, QosClass, Sender, Slot, service_id
from nexus.ipc import (
    Correlator,
    Peer,
    Pending,
    ReplyBuffer,
    Retry,
    RetryBudget,
    RetryTokens,
    Verdict,
)
from nexus.wire import FRAME_KIND, HEADER, REPLY_BIT
from tests.fakes.adder import ADDER, Add

NAMES = ("left", "right")
CODEC = ADDER.codecs[Add]


def reply(nonce: int, name: str, link: int, size: int = 48) -> Message:
    header = HEADER.pack(FRAME_KIND, 1, 1 | REPLY_BIT, 0, 900, 0, nonce, 0, bytes(16), bytes(8))
    sender = Sender(service_id(name), Pid(3), 1, QosClass.NORMAL)
    return Message(header.ljust(size, b"\0"), sender, LinkId(link), None, Nanos(1), Slot(2))


def peer(index: int) -> Peer:
    return Peer(
        NAMES[index],
        slot=Slot(3 + index),
        inbox=Slot(2),
        link=LinkId(index),
        service=service_id(NAMES[index]),
        generation=1,
        terms=LinkTerms(),
        reply_terms=LinkTerms(),
    )


@given(
    st.integers(1, 4),
    st.integers(48, 600),  # so that either bound is the first to be met
    st.lists(st.tuples(st.booleans(), st.integers(0, 6), st.integers(48, 120)), max_size=40),
)
def test_a_reply_buffer_never_exceeds_its_bounds_and_loses_nothing_uncounted(
    count_max: int, size_max: int, steps: list[tuple[bool, int, int]]
) -> None:
    buffer = ReplyBuffer(count_max, size_max)
    pushed = taken = 0

    for is_push, nonce, size in steps:
        if is_push:
            pushed += 1
            _ = buffer.push(nonce, reply(nonce, "left", 0, size))
        else:
            taken += buffer.take(nonce) is not None
        assert len(buffer) <= count_max
        assert buffer.size <= size_max
        assert pushed == taken + len(buffer) + buffer.drops


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("send"), st.integers(0, 1), st.just(0)),
            st.tuples(st.just("abandon"), st.integers(0, 12), st.just(0)),
            st.tuples(st.sampled_from(NAMES), st.integers(0, 12), st.integers(0, 1)),
        ),
        max_size=60,
    )
)
def test_only_the_one_asked_is_ever_believed_and_every_stray_is_counted_once(
    steps: list[tuple[str, int, int]],
) -> None:
    correlator = Correlator(start=0)
    peers = [peer(0), peer(1)]
    asked: dict[int, Pending] = {}
    received = matched = 0

    for what, number, link in steps:
        if what == "send":
            nonce = correlator.nonces.take()
            asked[nonce] = Pending(nonce, peers[number], CODEC, Nanos(9), b"", 0)
            correlator.on_sent(asked[nonce])
        elif what == "abandon":
            if number in asked:
                correlator.on_abandoned(number)
                correlator.on_ended(asked.pop(number))
        else:
            received += 1
            if correlator.judge(reply(number, what, link)) is Verdict.MATCH:
                matched += 1
                target = asked.pop(number)
                assert (target.peer.name, target.peer.link) == (what, link)
                correlator.on_ended(target)

    strays = correlator.stale + correlator.duplicate + correlator.foreign + correlator.malformed
    assert received == matched + strays


@given(
    st.integers(1, 12),
    st.integers(1, 1_000),
    st.integers(1, 100_000),
    st.lists(st.integers(0, 5_000), max_size=30),
)
def test_a_retry_stays_inside_its_budget(
    attempts_max: int, backoff: int, deadline: int, delays: list[int]
) -> None:
    budget = RetryBudget(
        attempts_max=attempts_max, backoff=Nanos(backoff), deadline=Nanos(deadline)
    )
    retry = Retry(budget, RetryTokens())
    now = Nanos(0)

    for delay in delays:
        now = Nanos(now + delay)
        again = retry.on_failed(now)
        if again is None:
            break
        assert now < again < deadline
        assert retry.attempts <= attempts_max
        now = again
