"""Text of others made safe to show: no character of it moves a cursor, ends a line, turns it round.

The form is Python's own for such characters (\\x0a, \\u2028), and a backslash is doubled, so that
two different texts never look the same. One byte becomes ESCAPE_GROWTH_MAX characters at most.
"""

from typing import Final

C0: Final = range(0x20)
DELETE_AND_C1: Final = range(0x7F, 0xA0)
LINE_BREAKS: Final = (0x2028, 0x2029)  # line and paragraph separator
BIDI: Final = (  # Unicode 15, UAX #9: they change the order in which others are shown
    0x061C,
    0x200E,
    0x200F,
    *range(0x202A, 0x202F),
    *range(0x2066, 0x206A),
)
BACKSLASH: Final = "\\"


def _shown(point: int) -> str:
    return f"\\x{point:02x}" if point <= 0xFF else f"\\u{point:04x}"


CONTROLS: Final = {point: _shown(point) for point in (*C0, *DELETE_AND_C1, *LINE_BREAKS, *BIDI)} | {
    ord(BACKSLASH): 2 * BACKSLASH
}


def escaped(text: str) -> str:
    """`text` without a control character; most texts have none and stay as they are."""
    if text.isprintable() and BACKSLASH not in text:
        return text  # nothing in CONTROLS but the backslash is printable
    return text.translate(CONTROLS)
