"""What a task that an error ends writes: bounded, with the innermost frames, and never raising."""

from collections.abc import Callable

import pytest

from nexus.log.lastwords import (
    FRAMES_MAX,
    MESSAGE_SIZE_MAX,
    PARTS_MAX,
    is_last_word,
    write_last_words,
)
from nexus.log.line import FieldValue, make_line
from nexus.protocols.logd import FIELDS_SIZE_MAX, TEXT_SIZE_MAX, Field, Level
from nexus.services.logd.checks import claims_identity, is_over_limit


class Lines:
    """Keeps what is written."""

    def __init__(self) -> None:
        self.lines: list[tuple[Level, str, dict[str, FieldValue]]] = []

    def write(self, level: Level, text: str, fields: dict[str, FieldValue]) -> bool:
        self.lines.append((level, text, fields))
        return True


def written_by(fails: Callable[[], object], kind: type[Exception] = ValueError) -> Lines:
    lines = Lines()
    with pytest.raises(kind) as caught:
        _ = fails()
    write_last_words(lines, caught.value)
    return lines


def boom() -> None:
    raise ValueError("the valve\nis stuck")


def deep(depth: int) -> None:
    if depth:
        deep(depth - 1)
    boom()


def test_the_error_its_place_and_the_way_there_are_written() -> None:
    ((level, text, fields),) = written_by(boom).lines

    assert level is Level.ERROR
    assert text.startswith("ValueError: the valve")
    assert fields["event"] == "exception.v1"
    assert fields["type"] == "ValueError"
    assert str(fields["place"]).endswith(" boom")
    assert str(fields["place"]).startswith("tests/unit/test_last_words.py:")
    assert str(fields["traceback"]).split(" > ")[-1] == fields["place"]
    assert fields["part"] == "1/1"


def test_a_deep_recursion_is_cut_to_its_innermost_frames_in_a_few_records() -> None:
    lines = written_by(lambda: deep(500)).lines

    assert 1 < len(lines) <= PARTS_MAX
    frames = [frame for _, _, fields in lines for frame in str(fields["traceback"]).split(" > ")]
    assert len(frames) <= FRAMES_MAX
    assert frames[-1].endswith(" boom")
    assert frames[-2].endswith(" deep")


@pytest.mark.parametrize(
    "error",
    [ValueError("x" * 10_000), ValueError("\N{SNOWMAN}" * 10_000), KeyError(), ValueError()],
)
def test_every_record_is_one_that_logd_takes(error: Exception) -> None:
    def fails() -> None:
        raise error

    for level, text, fields in written_by(fails, type(error)).lines:
        request = make_line(level, "service", text, fields).request
        assert len(request.text.encode()) <= TEXT_SIZE_MAX
        assert not is_over_limit(request)
        assert not claims_identity(request, is_core=False)
        assert len(text) <= MESSAGE_SIZE_MAX
        assert sum(len(each.key) + len(each.value.encode()) for each in request.fields) <= (
            FIELDS_SIZE_MAX
        )
        assert is_last_word(request.fields)


def test_an_error_that_cannot_say_what_it_is_does_not_hide_itself() -> None:
    class Broken(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no text")

    def fails() -> None:
        raise Broken

    ((_, text, fields),) = written_by(fails, Broken).lines

    assert "Broken" in text
    assert "Broken" in str(fields["type"])


def test_an_ordinary_record_is_no_last_word() -> None:
    assert not is_last_word([Field("event", "crash.v1"), Field("traceback", "exception.v1")])
