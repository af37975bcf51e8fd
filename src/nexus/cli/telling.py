"""How a story is told to people: a time of day, and lines that say what they are."""

from datetime import datetime
from typing import Final

NANOS: Final = 1_000_000_000
INDENT: Final = "    "
LABEL_WIDTH: Final = 11  # characters; the longest label and a space


def labelled(label: str, text: str) -> str:
    """A line of evidence, and what it is."""
    return f"{INDENT}{label.ljust(LABEL_WIDTH)}{text}"


def clock(wall: int) -> str:
    """A time of day as people here read it, from ns since 1970."""
    at = datetime.fromtimestamp(wall / NANOS).astimezone()
    return f"{at:%Y-%m-%d %H:%M:%S}.{at.microsecond // 1000:03}"
