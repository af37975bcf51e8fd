"""From the words of `nexus call` to a request, and from a reply to words."""

import json
import time
from enum import IntEnum
from typing import Annotated

import pytest

from nexus.cli.call import find_request, make_request, shown, value_of
from nexus.cli.errors import UsageError
from nexus.protocols.logd import PROTOCOL as LOGD
from nexus.protocols.logd import Append, Field, Level
from nexus.protocols.meta import GetStatus, Health
from nexus.protocols.timed import PROTOCOL as TIMED
from nexus.protocols.timed import Cancel, Register
from nexus.wire import U16, Blob, Bool, Message, Request


class Colour(IntEnum):
    """Two names, one with a gap."""

    DARK_RED = 4
    BLUE = 7


class Nothing(Message):
    """No fields."""


class Mixed(Request[Nothing], op=1, idempotent=True):
    """A field of each kind."""

    count: Annotated[int, U16(maximum=9)]
    colour: Colour
    data: Annotated[bytes, Blob(size_max=4)]
    on: Annotated[bool, Bool()]


@pytest.mark.parametrize("name", ["Cancel", "cancel", "CANCEL"])
def test_a_request_is_found_however_it_is_written(name: str) -> None:
    assert find_request("timed", name, (TIMED,)) == (TIMED, Cancel)


@pytest.mark.parametrize("name", ["GetStatus", "get-status", "get_status"])
def test_every_service_can_be_asked_for_its_account(name: str) -> None:
    assert find_request("timed", name, (TIMED,))[1] is GetStatus
    assert find_request("timed", "health", (TIMED,))[1] is Health


@pytest.mark.parametrize("name", ["fly", "bind", "stop", ""])
def test_an_unknown_request_is_told_with_those_there_are(name: str) -> None:
    with pytest.raises(UsageError, match=r"^timed has no request .*: it has Register, Cancel, "):
        _ = find_request("timed", name, (TIMED,))


def test_words_become_the_values_of_their_fields() -> None:
    request = make_request(Mixed, ["count=5", "colour=dark-red", "data=hex:00ff", "on=true"])

    assert request == Mixed(5, Colour.DARK_RED, b"\x00\xff", True)
    assert make_request(Mixed, ["on=0", "data=ab", "colour=7", "count=0x9"]) == Mixed(
        9, Colour.BLUE, b"ab", False
    )


def test_a_span_is_nanoseconds_and_one_with_plus_is_from_now_on() -> None:
    assert make_request(Register, ["deadline=1.5ms"]) == Register(1_500_000)
    before = time.monotonic_ns()
    request = make_request(Register, ["deadline=+2s"])
    assert isinstance(request, Register)
    assert before + 2 * 10**9 <= request.deadline <= time.monotonic_ns() + 2 * 10**9


def test_lists_are_json() -> None:
    words = ["level=warn", "scope=x", "text=a b=c", 'fields=[["k","v"]]']

    assert make_request(Append, words) == Append(Level.WARN, "x", "a b=c", [Field("k", "v")])


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["count=10", "colour=blue", "data=", "on=1"], "Mixed: count: Expected `int` <= 9"),
        (["count=x", "colour=blue", "data=", "on=1"], "Mixed: count: Expected `int`, got `str`"),
        (["count=1", "colour=green", "data=", "on=1"], "'green' is none of dark_red, blue"),
        (["count=1", "colour=blue", "data=hex:0", "on=1"], "'hex:0' is not hexadecimal"),
        (["count=1", "colour=blue", "data=abcde", "on=1"], "Mixed: data: Expected `bytes`"),
        (["count=1", "colour=blue", "data=", "on=2"], "Mixed: on: Expected `bool`"),
        (["count=1"], "Mixed: colour, data, on is missing"),
        (["count=1", "count=2"], "Mixed: 'count=2' is given twice"),
        (["speed=1"], "Mixed: 'speed=1' is no key=value of it; it takes count=... colour=..."),
        (["count"], "Mixed: 'count' is no key=value of it"),
    ],
)
def test_wrong_words_are_told_by_the_field(words: list[str], sentence: str) -> None:
    with pytest.raises(UsageError) as error:
        _ = make_request(Mixed, words)

    assert str(error.value).startswith(sentence)
    assert "\n" not in str(error.value)


def test_a_list_that_is_no_json_is_told() -> None:
    with pytest.raises(UsageError, match="is no JSON"):
        _ = value_of(Annotated[list[int], None], "[1,")


def test_an_answer_is_shown_by_names() -> None:
    reply = Append(Level.WARN, "x", "text", [Field("k", "v")])

    document = shown(reply)

    assert document == {
        "level": "WARN",
        "scope": "x",
        "text": "text",
        "fields": [{"key": "k", "value": "v"}],
    }
    assert json.loads(json.dumps(document)) == document
    assert shown([b"\x00\xff"]) == ["00ff"]


def test_the_journal_can_be_asked_like_any_service() -> None:
    assert find_request("logd", "get-stats", (LOGD,))[0] is LOGD
