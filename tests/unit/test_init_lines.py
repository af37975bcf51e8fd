"""The line of every key of a TOML text."""

import tomllib

import hypothesis.strategies as st
import pytest
from hypothesis import given

from nexus.init.lines import KeyLines, KeyPath

TEXT = '''# a comment with [brackets] and = signs
[system]
name = "x" # trailing
text = """
[not.a.table]
a = 1
"""

[service."demo.testsvc"]
uses = [
    { name = "timed", depth = 8 },
    # between
    { name = "a", size = "]" },
]
restart = { backoff = "50ms", other = [1,
  2] }
settings.one = 1
[[list]]
a = 1
[[list]]
a = 2
[list.sub]
b = 3
'''


@pytest.mark.parametrize(
    ("path", "line"),
    [
        (("system",), 2),
        (("system", "name"), 3),
        (("system", "text"), 4),
        (("service",), 9),
        (("service", "demo.testsvc"), 9),
        (("service", "demo.testsvc", "uses"), 10),
        (("service", "demo.testsvc", "uses", 0, "depth"), 11),
        (("service", "demo.testsvc", "uses", 1), 13),
        (("service", "demo.testsvc", "uses", 1, "size"), 13),
        (("service", "demo.testsvc", "restart", "backoff"), 15),
        (("service", "demo.testsvc", "restart", "other", 1), 16),
        (("service", "demo.testsvc", "settings", "one"), 17),
        (("list", 0, "a"), 19),
        (("list", 1), 20),
        (("list", 1, "sub", "b"), 23),
    ],
)
def test_a_key_has_the_line_it_stands_on(path: KeyPath, line: int) -> None:
    tomllib.loads(TEXT)

    assert KeyLines(TEXT).line(path) == line


def test_a_key_that_is_not_written_has_the_line_of_its_table() -> None:
    lines = KeyLines(TEXT)

    assert lines.line(("service", "demo.testsvc", "health", "deadline")) == 9
    assert lines.line(("nothing",)) == 1
    assert not lines.has(("service", "demo.testsvc", "health"))


def test_windows_line_ends_count_once() -> None:
    assert KeyLines("a = 1\r\n\r\nb = [\r\n1]\r\n").line(("b", 0)) == 4


def paths(value: object, path: KeyPath = ()) -> list[KeyPath]:
    """Every key path of a document."""
    items: list[tuple[str | int, object]] = []
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    return [found for key, each in items for found in [(*path, key), *paths(each, (*path, key))]]


def test_every_key_of_a_document_is_found() -> None:
    lines = KeyLines(TEXT)

    missing = [path for path in paths(tomllib.loads(TEXT)) if not lines.has(path)]

    assert missing == []


@given(st.text(alphabet="[]{}\"'.,=#\n ab1\\", max_size=60))
def test_any_text_is_scanned_to_its_end(text: str) -> None:
    lines = KeyLines(text)

    assert lines.line(("a", "b")) >= 1


@given(st.text(alphabet="[]{}\"'.,=#\n ab1", max_size=40))
def test_what_tomllib_accepts_the_scanner_finds(text: str) -> None:
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return
    lines = KeyLines(text)

    assert [path for path in paths(document) if not lines.has(path)] == []
