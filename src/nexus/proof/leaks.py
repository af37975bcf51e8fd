"""Looks for secrets where none may be: raw, as hexadecimal digits, in base64, as Python prints.

A piece of a secret is a leak too, so pieces are looked for. Who uses this shows, next to it, that
a leak that was planted is found.
"""

import base64
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Final

PIECE: Final = 12  # bytes of a secret in a row: 96 bits are nowhere by chance
STEP: Final = 4  # bytes between the beginnings of two pieces


def forms(piece: bytes) -> Iterator[bytes]:
    """How these bytes can stand in something that is written."""
    yield piece
    yield piece.hex().encode()
    yield piece.hex().upper().encode()
    yield piece.hex(" ").encode()
    printed = repr(piece)[2:-1].encode()
    yield printed
    yield printed.replace(b"\\", b"\\\\")  # a string that is printed as a part of another
    text = piece.decode("latin-1")
    yield text.encode()
    yield json.dumps(text)[1:-1].encode()
    yield ", ".join(str(byte) for byte in piece).encode()
    for shift in range(3):
        # In front of it may be 0, 1 or 2 bytes of the same group of four characters.
        encoded = base64.b64encode(bytes(shift) + piece + bytes(3))
        inner = encoded[4 * bool(shift) : (shift + len(piece)) // 3 * 4]
        yield inner
        yield inner.replace(b"+", b"-").replace(b"/", b"_")


class Leaks:
    """The secrets of a run, by name."""

    def __init__(self, secrets: Mapping[str, bytes]) -> None:
        self._needles = {
            form: name
            for name, secret in secrets.items()
            for start in range(0, max(1, len(secret) - PIECE + 1), STEP)
            for form in forms(secret[start : start + PIECE])
        }

    def within(self, data: bytes) -> set[str]:
        """The names of the secrets of which something stands in `data`."""
        return {name for needle, name in self._needles.items() if needle in data}

    def among(self, places: Iterable[tuple[str, bytes]]) -> dict[str, set[str]]:
        """Which place has something of which secrets."""
        found = {place: self.within(data) for place, data in places}
        return {place: names for place, names in found.items() if names}
