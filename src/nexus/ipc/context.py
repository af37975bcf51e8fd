"""W3C trace context as the frame header carries it: a trace id and the caller's span id."""

import hashlib
from dataclasses import dataclass
from typing import Final

TRACE_SIZE: Final = 16  # bytes
SPAN_SIZE: Final = 8  # bytes
SPAN_MASK: Final = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Context:
    """The trace a call belongs to and the span that makes it. Neither is all zeros (W3C)."""

    trace: bytes
    span: bytes

    @property
    def trail(self) -> bytes:
        """Both, in the order of the header."""
        return self.trace + self.span


class Spans:
    """Makes the trace and span ids of one task, the same ones for the same seed."""

    __slots__ = ("_count", "_first", "root")

    def __init__(self, seed: bytes, name: str, generation: int) -> None:
        material = hashlib.sha256(b"%b|%b|%d" % (seed, name.encode(), generation)).digest()
        self._first = int.from_bytes(material[TRACE_SIZE : TRACE_SIZE + SPAN_SIZE], "little")
        self._count = 0
        self.root = Context(_not_zero(material[:TRACE_SIZE]), self.next_span())

    def next_span(self) -> bytes:
        """A span id that this task has not used before."""
        self._count += 1
        return _not_zero(((self._first + self._count) & SPAN_MASK).to_bytes(SPAN_SIZE, "little"))

    def next_trace(self) -> Context:
        """A new trace, begun here."""
        span = self.next_span()
        return Context(hashlib.sha256(self.root.trace + span).digest()[:TRACE_SIZE], span)


def _not_zero(number: bytes) -> bytes:
    return number if any(number) else b"\1" * len(number)
