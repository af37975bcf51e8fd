"""What a task writes into its ring when an error ends it: the error, where, and the way there.

A record has room for a few frames only, so the traceback comes in parts, the outermost frames
first; the last part names the error. Writing is a store into the task's own memory: whoever reads
the ring after the death finds it. The values of variables are never written.
"""

import traceback
from collections.abc import Iterable, Iterator, Sequence
from pathlib import PurePath
from typing import Final, Protocol

from nexus.log.line import FieldValue
from nexus.protocols.logd import Field, Level

EVENT_KEY: Final = "event"
EVENT: Final = "exception.v1"
TYPE_KEY: Final = "type"
PLACE_KEY: Final = "place"
TRACE_KEY: Final = "traceback"
PART_KEY: Final = "part"
FRAMES_MAX: Final = 24  # the innermost; a recursion that is too deep has a thousand
PART_SIZE_MAX: Final = 300  # characters; with the other fields inside a record's
PARTS_MAX: Final = 5  # records of one error
MESSAGE_SIZE_MAX: Final = 200  # characters
FOLDERS_SHOWN: Final = 3  # of a file's path, the last ones: where it is installed says nothing
FRAME_SIZE_MAX: Final = 120  # characters

assert FRAME_SIZE_MAX < PART_SIZE_MAX


class Writer(Protocol):
    """What last words need of a Logger."""

    def write(self, level: Level, text: str, fields: dict[str, FieldValue]) -> bool:
        """Write one line."""


def write_last_words(log: Writer, error: BaseException) -> None:
    """Write what ended the task. Never raises: it is the last that the task does."""
    frames = _frames(error)
    parts = list(_parts(frames))[-PARTS_MAX:] or [""]
    place = frames[-1] if frames else ""
    for number, part in enumerate(parts, 1):
        fields: dict[str, FieldValue] = {
            EVENT_KEY: EVENT,
            TYPE_KEY: _type(error),
            PLACE_KEY: place,
            TRACE_KEY: part,
            PART_KEY: f"{number}/{len(parts)}",
        }
        _ = log.write(Level.ERROR, _message(error), fields)


def is_last_word(fields: Iterable[Field]) -> bool:
    """Whether a record with these fields is one of those that tell of an error."""
    return any(each.key == EVENT_KEY and each.value == EVENT for each in fields)


def _type(error: BaseException) -> str:
    return type(error).__qualname__[:FRAME_SIZE_MAX]


def _message(error: BaseException) -> str:
    """The error's type and what it says, if it can say it."""
    return traceback.format_exception_only(error)[-1].strip()[:MESSAGE_SIZE_MAX]


def _frames(error: BaseException) -> list[str]:
    """The innermost frames as lines, the outermost first."""
    summary = traceback.StackSummary.extract(
        traceback.walk_tb(error.__traceback__), limit=-FRAMES_MAX, lookup_lines=False
    )
    return [_frame(each.filename, each.lineno or 0, each.name) for each in summary]


def _frame(file: str, line: int, name: str) -> str:
    path = "/".join(PurePath(file).parts[-FOLDERS_SHOWN:])
    return f"{path}:{line} {name}"[-FRAME_SIZE_MAX:]


def _parts(frames: Sequence[str]) -> Iterator[str]:
    """The frames in parts that fit a record each."""
    part = ""
    for frame in frames:
        longer = f"{part} > {frame}" if part else frame
        if len(longer) > PART_SIZE_MAX:
            yield part
            longer = frame
        part = longer
    if part:
        yield part
