"""Pages are written from the code, and a page that differs is seen."""

from enum import IntEnum
from typing import Annotated, Final

import msgspec
import pytest

from nexus.wire import U16, Blob, List, Message, Protocol, Request, Text
from tools import pages
from tools.statuses import Evidence, Refusal


class ParrotStatus(IntEnum):
    """Why it will not speak."""

    TIRED = 16  # it has spoken enough


class Said(Message):
    """What it said."""

    words: Annotated[list[Annotated[str, Text(size_max=8)]], List(count_max=3)]


class Say(Request[Said], op=1, idempotent=True, refuses=ParrotStatus):
    """Say it."""

    data: Annotated[bytes, Blob(size_max=256, size_min=1)]
    times: Annotated[int, U16(maximum=9)]


PROTOCOL: Final = Protocol("parrot", number=900, version=1, requests=(Say,))
FULL: Final = Refusal("abi", "Status", "QUEUE_FULL", 3, "the link holds depth messages")


@pytest.mark.parametrize(
    ("declared", "words"),
    [
        (Annotated[int, U16(maximum=9)], "integer 0..9"),
        (Annotated[bytes, Blob(size_max=256, size_min=1)], "1..256 bytes"),
        (Annotated[str, Text(size_max=8)], "text, 0..8 characters"),
        (bool, "bool"),
        (Said, "`Said`"),
    ],
)
def test_a_field_is_described_with_its_bounds(declared: object, words: str) -> None:
    assert pages.describe(msgspec.inspect.type_info(declared)) == words


def test_a_reference_page_names_requests_replies_fields_and_repetition() -> None:
    import sys

    page = pages.reference(PROTOCOL, sys.modules[__name__])

    assert "### Say\n\nSay it.\n\nOp 1, may be repeated.\nAnswered with `Said`." in page
    assert "| `data` | 1..256 bytes |" in page
    assert "### Said\n\nWhat it said." in page


def test_the_reject_matrix_has_a_row_for_each_test() -> None:
    tests = ["tests/unit/test_x.py::test_a_ninth_message", "tests/sim/test_y.py::test_a_flood"]
    found = Evidence({FULL.key: tests}, {FULL.key: [66, 62, 66]}, [])

    text = pages.matrix(["abi"], [FULL], found)

    assert text.splitlines()[2:] == [
        (
            "| a ninth message | the link holds depth messages | `abi.QUEUE_FULL` "
            "| `tests/unit/test_x.py::test_a_ninth_message` | #62, #66 |"
        ),
        (
            "| a flood | the link holds depth messages | `abi.QUEUE_FULL` "
            "| `tests/sim/test_y.py::test_a_flood` | #62, #66 |"
        ),
    ]


def test_only_the_marked_part_of_a_page_is_written() -> None:
    page = (
        "before\n\n<!-- limits: written by `make docs` -->\nold\n<!-- end of limits -->\n\nafter\n"
    )

    assert pages.fill(page, {"limits": "new\n"}) == page.replace("old", "new")


def test_filling_a_page_twice_changes_nothing() -> None:
    page = "<!-- limits: written by `make docs` -->\n<!-- end of limits -->\n"

    once = pages.fill(page, {"limits": "| a |\n"})

    assert pages.fill(once, {"limits": "| a |\n"}) == once


def test_a_page_without_its_marks_is_an_error() -> None:
    with pytest.raises(AssertionError, match="is missing"):
        _ = pages.fill("nothing here\n", {"limits": "x\n"})
