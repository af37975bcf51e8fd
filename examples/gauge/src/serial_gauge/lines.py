"""What the gauge prints: lines such as "P 1.013", in bar."""

import re
from typing import Final

LINE: Final = re.compile(rb"P ([0-9]{1,4})\.([0-9]{3})")
LINE_SIZE_MAX: Final = 64  # bytes; a longer one is noise on the wire
PASCAL_PER_MILLIBAR: Final = 100


def pascal_of(line: bytes) -> int | None:
    """The pressure in a line, or None if it is none."""
    found = LINE.fullmatch(line.strip())
    if found is None:
        return None
    return (int(found[1]) * 1000 + int(found[2])) * PASCAL_PER_MILLIBAR
