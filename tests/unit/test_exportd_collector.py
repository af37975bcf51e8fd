"""The queue for a collector: bounded, tried again with pauses, every drop counted."""

from typing import Final

import h11
import pytest

from nexus.abi import LinkId, Nanos
from nexus.protocols.exportd import CollectorState
from nexus.services.exportd.collector import (
    ANSWER_TIME_MAX,
    ATTEMPTS_MAX,
    BODY_LIFE,
    DIAL_TIME_MAX,
    RETRY_AFTER_MAX,
    RETRY_FIRST,
    Collector,
    Dial,
    HangUp,
    Transmit,
)
from nexus.services.exportd.otlp import Body

NOW: Final = Nanos(1_000_000_000)
LINK: Final = LinkId(4)
PAUSE_MAX: Final = Nanos(6_000_000_000)


def body(number: int = 0, size: int = 10) -> Body:
    return Body("/v1/traces", str(number % 10).encode() * size, 1)


def collector(count_max: int = 4, size_max: int = 1000) -> Collector:
    return Collector("collector", count_max=count_max, size_max=size_max, pause_max=PAUSE_MAX)


def stands(machine: Collector, now: Nanos = NOW) -> bytes:
    """Let the dialled connection stand; what is sent over it."""
    machine.on_dialled(LINK)
    assert machine.on_room(now) == [Transmit()]
    return drained(machine)


def drained(machine: Collector) -> bytes:
    said = b""
    while part := machine.part():
        said += part
        machine.on_part_sent(len(part))
    return said


def answer(status: int, *fields: tuple[str, str], content: bytes = b"{}") -> bytes:
    lines = [f"HTTP/1.1 {status} word", f"Content-Length: {len(content)}"]
    lines += [f"{name}: {value}" for name, value in fields]
    return "\r\n".join([*lines, "", ""]).encode() + content


def requests(said: bytes) -> list[tuple[bytes, bytes]]:
    """Target and content of each request, as an HTTP server reads them."""
    found = []
    server = h11.Connection(h11.SERVER)
    server.receive_data(said)
    while isinstance(event := server.next_event(), h11.Request):
        content = b""
        while isinstance(data := server.next_event(), h11.Data):
            content += data.data
        assert isinstance(data, h11.EndOfMessage)
        found.append((event.target, content))
        _ = server.send(h11.Response(status_code=200, headers=[("Content-Length", "0")]))
        _ = server.send(h11.EndOfMessage())
        server.start_next_cycle()
    return found


def test_a_body_is_posted_over_a_new_connection_and_the_next_over_the_same() -> None:
    machine = collector()
    assert machine.on_body(body(1), NOW) == [Dial()]
    assert machine.on_body(body(2), NOW) == []

    said = stands(machine)
    assert machine.on_data(answer(200), NOW) == [Transmit()]
    said += drained(machine)
    assert machine.on_data(answer(200), NOW) == []

    assert requests(said) == [(b"/v1/traces", b"1" * 10), (b"/v1/traces", b"2" * 10)]
    assert (machine.sent, machine.count, machine.size, machine.dropped) == (2, 0, 0, 0)
    assert machine.there is CollectorState.THERE
    assert machine.next_time() is None


def test_while_it_is_away_the_pauses_double_and_the_body_is_kept() -> None:
    machine = collector()
    effects = machine.on_body(body(), NOW)
    now, pauses = NOW, []

    for _ in range(4):
        assert effects == [Dial()]
        machine.on_dialled(LINK)
        assert machine.on_gone(now) == []
        due = machine.next_time()
        assert due is not None
        assert machine.on_time(Nanos(due - 1)) == []
        pauses.append(due - now)
        now = due
        effects = machine.on_time(now)

    assert pauses == [RETRY_FIRST << doublings for doublings in range(4)]
    assert (machine.failed, machine.count, machine.dropped) == (4, 1, 0)
    assert machine.there is CollectorState.AWAY
    assert requests(stands(machine, now)) == [(b"/v1/traces", b"0" * 10)]


def test_the_pauses_are_bounded_and_an_outage_alone_costs_no_body() -> None:
    machine = collector()
    _ = machine.on_body(body(1), NOW)
    now, pauses = NOW, []
    for _ in range(2 * ATTEMPTS_MAX):
        machine.on_dialled(LINK)
        assert machine.on_gone(now) == []
        due = machine.next_time()
        assert due is not None
        pauses.append(due - now)
        now = due
        assert machine.on_time(now) == [Dial()]

    assert max(pauses) == PAUSE_MAX
    assert (machine.count, machine.dropped) == (1, 0)
    assert requests(stands(machine, now)) == [(b"/v1/traces", b"1" * 10)]


def test_old_news_is_dropped_at_its_next_failure() -> None:
    machine = collector()
    _ = machine.on_body(body(), NOW)

    machine.on_dialled(LINK)
    _ = machine.on_gone(Nanos(NOW + BODY_LIFE))

    assert (machine.count, machine.dropped) == (0, 1)


@pytest.mark.parametrize(("count_max", "size_max"), [(3, 1000), (100, 30)])
def test_a_full_queue_drops_the_oldest(count_max: int, size_max: int) -> None:
    machine = collector(count_max, size_max)

    for number in range(7):
        _ = machine.on_body(body(number), NOW)

    assert (machine.count, machine.size, machine.dropped) == (3, 30, 4)
    assert requests(stands(machine)) == [(b"/v1/traces", b"4" * 10)]


def test_the_body_that_is_on_its_way_is_not_the_one_that_is_dropped() -> None:
    machine = collector(count_max=2)
    _ = machine.on_body(body(0), NOW)
    _ = stands(machine)
    for number in range(1, 4):
        _ = machine.on_body(body(number), NOW)
    assert (machine.count, machine.dropped) == (2, 2)

    assert machine.on_data(answer(200), NOW) == [Transmit()]

    assert b"3" * 10 in drained(machine)
    assert (machine.sent, machine.dropped) == (1, 2)


def test_a_body_larger_than_the_queue_is_dropped_alone() -> None:
    machine = collector(size_max=50)
    _ = machine.on_body(body(1), NOW)

    assert machine.on_body(body(2, size=51), NOW) == []

    assert (machine.count, machine.dropped) == (1, 1)


@pytest.mark.parametrize("status", [400, 401, 404, 413, 500])
def test_what_is_refused_for_good_is_dropped_and_the_next_one_goes(status: int) -> None:
    machine = collector()
    _ = machine.on_body(body(1), NOW)
    _ = machine.on_body(body(2), NOW)
    _ = stands(machine)

    assert machine.on_data(answer(status), NOW) == [Transmit()]

    assert (machine.count, machine.dropped, machine.sent) == (1, 1, 0)
    assert machine.last_failure == f"status {status}, for good"


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_a_busy_collector_gets_the_body_again_when_it_says(status: int) -> None:
    machine = collector()
    _ = machine.on_body(body(), NOW)
    _ = stands(machine)

    assert machine.on_data(answer(status, ("Retry-After", "7")), NOW) == [HangUp(LINK)]

    assert machine.next_time() == NOW + 7_000_000_000
    assert (machine.count, machine.dropped) == (1, 0)


@pytest.mark.parametrize(
    ("after", "pause"),
    [
        ("999999", RETRY_AFTER_MAX * 1_000_000_000),
        ("Wed, 21 Oct 2026 07:28:00 GMT", RETRY_FIRST),
        ("-5", RETRY_FIRST),
        ("9" * 40, RETRY_FIRST),
    ],
)
def test_what_a_collector_asks_for_is_bounded(after: str, pause: int) -> None:
    machine = collector()
    _ = machine.on_body(body(), NOW)
    _ = stands(machine)

    _ = machine.on_data(answer(503, ("Retry-After", after)), NOW)

    assert machine.next_time() == NOW + pause


def test_a_connection_that_does_not_stand_and_an_answer_that_does_not_come_are_late() -> None:
    machine = collector()
    _ = machine.on_body(body(), NOW)
    machine.on_dialled(LINK)
    late = Nanos(NOW + DIAL_TIME_MAX)
    assert machine.on_time(Nanos(late - 1)) == []
    assert machine.on_time(late) == [HangUp(LINK)]
    due = machine.next_time()
    assert due is not None
    assert machine.on_time(due) == [Dial()]
    _ = stands(machine, due)

    assert machine.on_time(Nanos(due + ANSWER_TIME_MAX)) == [HangUp(LINK)]

    assert (machine.failed, machine.last_failure) == (2, "no answer in time")


@pytest.mark.parametrize(
    "said",
    [b"no HTTP at all\r\n\r\n", answer(200) + answer(200), b"HTTP/1.1 200 x\r\n" + bytes(40_000)],
)
def test_an_answer_that_is_none_ends_the_connection_and_no_more(said: bytes) -> None:
    machine = collector()
    _ = machine.on_body(body(1), NOW)
    _ = machine.on_body(body(2), NOW)
    _ = stands(machine)

    effects = machine.on_data(said, NOW)
    if HangUp(LINK) not in effects:  # the second of two answers to one body
        effects = machine.on_data(b"x", NOW)

    assert HangUp(LINK) in effects
    assert machine.count >= 1


def test_a_connection_closed_between_two_bodies_is_nobodys_failure() -> None:
    machine = collector()
    _ = machine.on_body(body(1), NOW)
    _ = stands(machine)
    _ = machine.on_data(answer(200), NOW)

    assert machine.on_gone(NOW) == []

    assert machine.failed == 0
    assert machine.on_body(body(2), NOW) == [Dial()]


def test_an_answer_with_close_takes_the_next_body_over_another_connection() -> None:
    machine = collector()
    _ = machine.on_body(body(1), NOW)
    _ = machine.on_body(body(2), NOW)
    _ = stands(machine)

    effects = machine.on_data(answer(200, ("Connection", "close")), NOW)

    assert effects == [HangUp(LINK), Dial()]
    assert machine.sent == 1
