"""One connection of a scraper, as bytes: right answers, and an end to everything that is none."""

from collections.abc import Iterable
from typing import Final

import h11
import pytest

from nexus.abi import LinkId, Nanos, Slot
from nexus.services.exportd.pages import (
    ASK_TIME_MAX,
    CONTENT_SIZE_MAX,
    IDLE_TIME_MAX,
    READ_TIME_MAX,
    REQUEST_SIZE_MAX,
    Asked,
    Visit,
)

NOW: Final = Nanos(1_000_000_000)
ASK: Final = b"GET /metrics HTTP/1.1\r\nHost: device\r\nAccept: text/plain\r\n\r\n"
PAGE: Final = b"strokes_total 7\n"


def visit() -> Visit:
    return Visit(Slot(2), LinkId(5), NOW)


def sent(each: Visit) -> bytes:
    """Everything it says, taken piece by piece."""
    said = b""
    while part := each.part():
        said += part
        each.on_sent(len(part))
    return said


def responses(
    said: bytes, methods: Iterable[str] = ("GET",)
) -> list[tuple[int, dict[str, str], bytes]]:
    """What an HTTP client makes of it."""
    client = h11.Connection(h11.CLIENT)
    found = []
    client.receive_data(said)
    for method in methods:
        _ = client.send(h11.Request(method=method, target="/", headers=[("Host", "device")]))
        _ = client.send(h11.EndOfMessage())
        response = client.next_event()
        assert isinstance(response, h11.Response)
        content = b""
        while isinstance(event := client.next_event(), h11.Data):
            content += event.data
        assert isinstance(event, h11.EndOfMessage)
        fields = {name.decode(): value.decode() for name, value in response.headers}
        found.append((response.status_code, fields, content))
        if client.our_state is h11.DONE:
            client.start_next_cycle()
    return found


def test_a_request_may_come_byte_by_byte_and_is_answered_once() -> None:
    each = visit()

    asked = [each.take(ASK[index : index + 1], NOW) for index in range(len(ASK))]

    assert [ask is not None for ask in asked] == [False] * (len(ASK) - 1) + [True]
    last = asked[-1]
    assert isinstance(last, Asked)
    assert last.accept == "text/plain"
    each.answer(200, PAGE, NOW, kind="text/x")
    ((status, fields, content),) = responses(sent(each))
    assert (status, content) == (200, PAGE)
    assert (fields["content-type"], fields["content-length"]) == ("text/x", str(len(PAGE)))
    assert not each.over


def test_a_kept_connection_asks_again_and_what_came_meanwhile_waits() -> None:
    each = visit()
    assert each.take(ASK + ASK, NOW) is not None
    each.answer(200, PAGE, NOW)
    assert each.take(ASK, NOW) is None  # one answer at a time

    said = sent(each)
    for _ in range(2):
        assert each.go_on(NOW) is not None
        each.answer(200, PAGE, NOW)
        said += sent(each)

    assert [status for status, _, _ in responses(said, ["GET"] * 3)] == [200] * 3
    assert each.go_on(NOW) is None


def test_a_request_without_its_content_is_not_answered_yet() -> None:
    each = visit()

    assert each.take(b"GET /metrics HTTP/1.1\r\nHost: d\r\nContent-Length: 2\r\n\r\n", NOW) is None

    assert not each.answered
    assert each.take(b"xy", NOW) is not None


def test_the_head_of_the_page_has_no_content() -> None:
    each = visit()
    assert each.take(ASK.replace(b"GET", b"HEAD"), NOW) is not None

    each.answer(200, PAGE, NOW)

    ((status, fields, content),) = responses(sent(each), ["HEAD"])
    assert (status, fields["content-length"], content) == (200, str(len(PAGE)), b"")


@pytest.mark.parametrize(
    ("request_", "status", "ends"),
    [
        (b"GET /other HTTP/1.1\r\nHost: d\r\n\r\n", 404, False),
        (b"GET /metrics/ HTTP/1.1\r\nHost: d\r\n\r\n", 404, False),
        (b"POST /metrics HTTP/1.1\r\nHost: d\r\nContent-Length: 2\r\n\r\nxy", 405, False),
        (b"DELETE /metrics HTTP/1.1\r\nHost: d\r\n\r\n", 405, False),
        (b"GET /metrics HTTP/1.1\r\n\r\n", 400, True),  # no Host
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400, True),  # TLS
        (b"GET /metrics HTTP/1.1\r\nHost: d\r\nX: " + bytes(REQUEST_SIZE_MAX), 431, True),
        (
            b"POST /metrics HTTP/1.1\r\nHost: d\r\nContent-Length: 999999\r\n\r\n"
            + bytes(CONTENT_SIZE_MAX + 1),
            413,
            True,
        ),
        (b"GET /metrics HTTP/1.1\r\nHost: d\r\nTransfer-Encoding: odd\r\n\r\n", 501, True),
    ],
)
def test_what_is_no_request_for_the_page_is_told_so(
    request_: bytes, status: int, ends: bool
) -> None:
    each = visit()

    assert each.take(request_, NOW) is None

    ((found, fields, _),) = responses(sent(each))
    assert (found, each.refused) == (status, 1)
    assert each.over is ends
    if status == 405:
        assert fields["allow"] == "GET, HEAD"
    if not ends:
        assert each.go_on(NOW) is None
        assert each.take(ASK, NOW) is not None


def test_one_that_wants_the_connection_closed_gets_that() -> None:
    each = visit()
    assert each.take(ASK.replace(b"Accept", b"Connection: close\r\nAccept"), NOW) is not None

    each.answer(200, PAGE, NOW)

    assert not each.over
    assert responses(sent(each))[0][0] == 200
    assert each.over


def test_a_request_that_trickles_in_is_late_and_told_so() -> None:
    each = visit()
    late = Nanos(NOW + ASK_TIME_MAX)
    for index in range(20):
        assert each.take(ASK[index : index + 1], Nanos(NOW + index * 100_000_000)) is None

    assert not each.is_late(Nanos(late - 1))
    assert each.is_late(late)

    assert responses(sent(each))[0][0] == 408
    assert each.over


def test_one_that_says_nothing_is_late_without_a_word() -> None:
    each = visit()

    assert each.is_late(Nanos(NOW + ASK_TIME_MAX))

    assert sent(each) == b""


def test_an_answer_has_its_time_to_be_read_and_a_kept_connection_to_ask_again() -> None:
    each = visit()
    assert each.take(ASK, NOW) is not None
    each.answer(200, PAGE, NOW)
    assert each.due == NOW + READ_TIME_MAX

    _ = sent(each)
    assert each.go_on(NOW) is None

    assert each.due == NOW + IDLE_TIME_MAX


def test_what_is_sent_in_front_of_an_answer_is_bounded() -> None:
    each = visit()
    assert each.take(ASK, NOW) is not None

    for _ in range(4):
        assert each.take(bytes(REQUEST_SIZE_MAX), NOW) is None
    each.answer(200, PAGE, NOW)

    assert responses(sent(each))[0][0] == 200
    assert each.over
