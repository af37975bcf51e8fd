"""Short lines of a ring: what they say, and what a hostile writer makes of them."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nexus.abi import LinkId, Nanos, Pid, QosClass, Sender, service_id
from nexus.log.payload import (
    HEAD_SIZE_MAX,
    NO_PAYLOAD,
    SHORT,
    UNREADABLE,
    Payload,
    head_of,
    pack,
    unpack,
)
from nexus.protocols.logd import (
    EVERY_RECORD,
    FIELDS_SIZE_MAX,
    TEXT_SIZE_MAX,
    Level,
)
from nexus.services.logd.checks import HEADS_KNOWN_MAX, SURE_KEYS, SURE_SIZE, Looker
from nexus.services.logd.journal import Journal, fields_size, text_size
from nexus.services.logd.reading import Wanted
from nexus.services.logd.senders import Row
from nexus.services.logd.streams import Stream, Streams
from nexus.telemetry import RingReader, RingWriter

SENDER = Sender(service_id("pump"), Pid(7), 1, QosClass.NORMAL)
SIZE = 16 * 1024
IDS = bytes(range(24))


def head(*keys: str, level: int = Level.INFO, scope: str = "pump") -> bytes:
    found = head_of(level, scope, keys)
    assert found is not None
    return found


def line(*values: Any, keys: tuple[str, ...] = (), text: Any = "text", ids: Any = b"") -> bytes:
    return head(*keys) + pack([5, text, ids, *values])


class Bench:
    """A ring, the stream that drains it, and the journal behind that."""

    def __init__(self) -> None:
        memory = memoryview(bytearray(SIZE))
        self.ring = RingWriter(memory)
        self.journal = Journal(1000, 256 * 1024)
        self.streams = Streams(self.journal)
        self.row = Row(SENDER.service, 0)
        self.stream: Stream = self.streams.open(
            LinkId(1), SENDER, memory, RingReader(memory), self.row, is_core=False
        )

    def drain(self, *payloads: bytes) -> None:
        for payload in payloads:
            self.ring.put(payload)
        self.streams.drain_to_end(self.stream, Nanos(1), 1)

    def texts(self) -> list[str]:
        page = self.journal.page(0, 16, Wanted(EVERY_RECORD))
        return [each.text for each in page.records]


def test_a_short_line_says_what_was_written_in_the_order_of_keys() -> None:
    data = line("get", 200, keys=("method", "code"), ids=IDS)

    assert unpack(data) == Payload(
        Level.INFO, 5, "pump", "text", "code method", [200, "get"], IDS[:16], IDS[16:]
    )


@pytest.mark.parametrize(
    ("data", "values"),
    [
        (line(1, keys=("a", "b")), [1, UNREADABLE]),
        (line(1, 2, 3, keys=("a", "b")), [1, 2]),
        (line([1], 2, keys=("a", "b")), [UNREADABLE, 2]),
        (head("a", "b"), [UNREADABLE, UNREADABLE]),
        (head("a", "b") + b"\xc1", [UNREADABLE, UNREADABLE]),
        (line(1, 2, keys=("a", "b")) + b"\0", [UNREADABLE, UNREADABLE]),
    ],
    ids=["too few", "too many", "a list", "nothing", "no MessagePack", "more behind it"],
)
def test_what_follows_a_head_and_is_no_value_is_shown_as_such(
    data: bytes, values: list[Any]
) -> None:
    assert unpack(data).values == values


def test_a_text_a_clock_and_a_trace_that_are_none_are_left_out() -> None:
    found = unpack(head() + pack([-1, b"text", b"short"]))

    assert (found.written, found.text, found.trace, found.span) == (0, UNREADABLE, b"", b"")


@pytest.mark.parametrize(
    "data",
    [
        bytes([SHORT]),
        bytes([SHORT, 2]),
        bytes([SHORT, 2, 2]),
        bytes([SHORT, 2, 9]) + b"p\x1f",
        bytes([SHORT, 2, 4]) + b"p",
        bytes([SHORT, 5, 5]) + b"p\x1f",
        bytes([SHORT, 2, 5]) + b"\xff\x1f",
        bytes([SHORT, 2, 6]) + b"p\x1f\xff",
    ],
)
def test_a_short_line_without_a_good_head_is_none(data: bytes) -> None:
    with pytest.raises(NO_PAYLOAD):
        _ = unpack(data)


def test_a_head_has_one_scope_and_its_size_in_a_byte() -> None:
    assert head_of(Level.INFO, "a\x1fb", ()) is None
    assert head_of(Level.INFO, "pump", ["k" * HEAD_SIZE_MAX]) is None


@given(st.binary(max_size=SURE_SIZE))
def test_any_bytes_behind_a_head_are_a_line_within_the_bounds(tail: bytes) -> None:
    keys = tuple("abcdefghij")
    assert len(keys) == SURE_KEYS

    found = unpack((head(*keys) + tail)[:SURE_SIZE])

    assert text_size(found.text) <= TEXT_SIZE_MAX
    assert fields_size(found.fields) <= FIELDS_SIZE_MAX
    assert Looker(is_core=False).refusal_of(found) is None


@given(st.lists(st.floats() | st.integers(-(2**63), 2**64 - 1) | st.booleans(), max_size=10))
def test_values_that_are_shown_longer_than_written_stay_within_the_bounds(
    values: list[Any],
) -> None:
    keys = tuple(f"key{each:017}" for each in range(len(values)))
    scope = head_of(Level.INFO, "pump", keys)
    data = (scope or b"") + pack([0, "", b"", *values])

    if scope is not None and len(data) <= SURE_SIZE:
        assert Looker(is_core=False).refusal_of(unpack(data)) is None


def test_lines_with_a_known_head_are_taken_and_others_between_them_are_looked_at() -> None:
    bench = Bench()
    good = line(1, keys=("a",))

    bench.drain(good, good)
    bench.drain(
        good,
        line(1, keys=("sender.id",)),  # says who it is
        line(1, keys=("no key",), text="two keys and one value"),
        line(1, keys=("A",)),
        b"",
        b"\x01",
        bytes([SHORT, 2]),
        bytes([SHORT, 2, 255]),
        line("x" * FIELDS_SIZE_MAX, keys=("a",)),
        head("a") + b"junk",
        good,
    )

    row = bench.row
    assert (row.invalid_args, row.over_limit, row.damaged) == (2, 1, 4)
    assert row.accepted == bench.stream.accepted == 6
    assert bench.stream.refused == 7
    assert bench.texts() == ["text"] * 3 + ["two keys and one value", UNREADABLE, "text"]


def test_a_claim_is_refused_the_second_time_as_the_first() -> None:
    bench = Bench()

    for _ in range(3):
        bench.drain(line(1, keys=("service_id",)))

    assert (bench.row.accepted, bench.row.invalid_args) == (0, 3)
    assert not bench.stream.looker.heads


def test_a_stream_of_ever_new_heads_makes_logd_remember_a_bounded_number() -> None:
    bench = Bench()

    for number in range(2 * HEADS_KNOWN_MAX):
        bench.drain(line(1, keys=(f"k{number}",)))

    assert len(bench.stream.looker.heads) == HEADS_KNOWN_MAX
    assert bench.row.accepted == 2 * HEADS_KNOWN_MAX


def test_a_looker_knows_a_line_by_its_whole_head_alone() -> None:
    looker = Looker(is_core=False)
    known = [line(keys=("one",)), line(keys=("two", "one"))]
    for data in known:
        looker.learn(data, unpack(data))

    assert looker.knows([*known, known[0], known[0], known[1]])
    for stranger in (b"", b"\0", known[0][:2], head("one")[:-1], line(keys=("on",)), head("ones")):
        assert not looker.knows([stranger])
        assert not looker.knows([known[0], stranger])
        assert not looker.knows([*known, stranger, known[0]])
    assert not Looker(is_core=False).knows(known)
