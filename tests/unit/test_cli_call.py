"""From the words of `nexus call` to a request, and from a reply to words."""

import json
import socket as socketlib
import time
from contextlib import closing
from enum import IntEnum
from pathlib import Path
from typing import Annotated, Any, Self

import pytest

from nexus.cli.call import call, find_request, make_request, shown, value_of
from nexus.cli.client import OperatorClient, ServiceRefused, Unanswered
from nexus.cli.errors import UsageError
from nexus.protocols.logd import PROTOCOL as LOGD
from nexus.protocols.logd import Append, Field, Level
from nexus.protocols.meta import GetStatus, Health
from nexus.protocols.operator import PORT, OperatorStatus
from nexus.protocols.timed import PROTOCOL as TIMED
from nexus.protocols.timed import Cancel, Register, TimedStatus, Timer
from nexus.wire import U16, U64, Blob, Bool, List, Message, Protocol, Request, Text


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


@pytest.mark.parametrize(
    "text",
    [
        *("18446744073709551616", "9" * 21, "9" * 5_000, "-9223372036854775809", "0x" + "f" * 17),
        *("9" * 20 + "s", "9" * 400 + "ms", "+" + "9" * 20 + "m", "1." + "9" * 400 + "s"),
    ],
)
def test_a_number_that_does_not_fit_the_wire_is_wrong_usage(text: str) -> None:
    with pytest.raises(UsageError) as error:
        _ = make_request(Register, [f"deadline={text}"])
    assert len(str(error.value)) < 400


def test_the_largest_number_of_the_wire_is_taken() -> None:
    assert make_request(Register, [f"deadline={(1 << 64) - 1}"]) == Register((1 << 64) - 1)
    assert make_request(Register, ["deadline=1.000000001s"]) == Register(1_000_000_001)


class Numbers(Request[Nothing], op=2, idempotent=True):
    """A list, which is written as JSON."""

    all: Annotated[list[Annotated[int, U64()]], List(count_max=4)]
    text: Annotated[str, Text(size_max=8)]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["all=[99999999999999999999]", "text="], "Numbers: a value cannot be sent: "),
        (["all=[1]", "text=a\udcff"], "Numbers: a value cannot be sent: "),
        (["all=" + "[" * 100_000, "text="], "is no JSON"),
    ],
)
def test_what_cannot_be_encoded_is_wrong_usage(words: list[str], sentence: str) -> None:
    with pytest.raises(UsageError) as error:
        _ = make_request(Numbers, words)
    assert sentence in str(error.value)
    assert len(str(error.value)) < 400


class Answering:
    """A running system whose operator gives one answer."""

    running = None

    def __init__(self, answer: Any) -> None:
        self._answer = answer

    def protocols(self, service: str) -> tuple[Protocol, ...]:
        assert service == "timed"
        return (TIMED,)

    def client(self) -> "Answering":
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        pass

    def relay(self, service: str, protocol: Protocol, request: Any, seconds: float) -> Any:
        assert (service, protocol, seconds) == ("timed", TIMED, 1.0)
        if isinstance(self._answer, Exception):
            raise self._answer
        return self._answer


def asked(answer: Any, *, as_json: bool) -> int:
    system: Any = Answering(answer)
    return call(system, "timed", "register", ["deadline=1s"], 1.0, as_json=as_json)


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (ServiceRefused("timed", "Register", TimedStatus.OVER_LIMIT), "refused"),
        (Unanswered("timed", "Register", OperatorStatus.TIMED_OUT), "unanswered"),
    ],
)
def test_a_call_without_its_answer_ends_with_1_and_says_the_status(
    error: Any, outcome: str, as_json: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    assert asked(error, as_json=as_json) == 1
    said = capsys.readouterr()
    if as_json:
        assert json.loads(said.out) == {outcome: error.status.name, "status": int(error.status)}
        assert said.err == ""
    else:
        assert (said.out, said.err) == ("", f"nexus: {error}\n")


def test_a_call_with_its_answer_ends_with_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert asked(Timer(7, 8), as_json=True) == 0
    assert json.loads(capsys.readouterr().out)["timer_id"] == 7


class Unused(OperatorClient):
    """An operator that uses no service at all; the system has metricsd."""

    def __init__(self, socket: Path) -> None:
        with closing(socketlib.socket(socketlib.AF_UNIX, socketlib.SOCK_SEQPACKET)) as door:
            door.bind(str(socket / f"{PORT}.sock"))
            door.listen()
            super().__init__(socket, "plant", lambda: True, lambda service: service == "metricsd")

    def _ask_once(self, request: Any, _until: int) -> Any:
        raise Unanswered("operator", type(request).__name__, OperatorStatus.NO_SERVICE)


def test_a_service_that_the_system_does_not_have_is_told_in_a_plain_sentence(
    tmp_path: Path,
) -> None:
    with Unused(tmp_path) as client:
        with pytest.raises(Unanswered) as absent:
            _ = client.relay("execd", TIMED, Cancel(1), 1.0)
        with pytest.raises(Unanswered) as unused:
            _ = client.relay("metricsd", TIMED, Cancel(1), 1.0)

    assert str(absent.value) == (
        "this system has no execd: add it to the system file, and to operator's uses"
    )
    assert absent.value.status is OperatorStatus.NO_SERVICE
    assert str(unused.value) == (
        "metricsd did not answer Cancel: NO_SERVICE, "
        "operator's entry in the system file does not use it"
    )
