"""W3C trace context as the frame header carries it: a trace id and the caller's span id."""

import hashlib
import struct
from typing import Final, NamedTuple

from nexus.abi import service_id

TRACE_SIZE: Final = 16  # bytes
SPAN_SIZE: Final = 8  # bytes
NO_TRACE: Final = bytes(TRACE_SIZE)  # no trace id (W3C); a caller may send it all the same
MAKER_SIZE: Final = 4  # bytes of a span id: the low half of its maker's service id
COUNT_MASK: Final = (1 << 32) - 1
COUNT_STEP: Final = 1 << 32  # from one span id to the next
SPAN_MASK: Final = (1 << 64) - 1
FIRST_TRAIL: Final = struct.Struct("<8sQQ")
NEXT_TRAIL: Final = struct.Struct("<16sQ")
first_trail: Final = FIRST_TRAIL.pack
"""Half a trace and the number of its first span, twice: the trace ends as that span."""
next_trail: Final = NEXT_TRAIL.pack
"""A trail, of which the trace is taken, and the number of a span."""


class Context(NamedTuple):
    """The trace a call belongs to and the span that makes it. Neither is all zeros (W3C)."""

    trace: bytes
    span: bytes

    @property
    def trail(self) -> bytes:
        """Both, in the order of the header."""
        return self.trace + self.span


class Spans:
    """Makes the trace and span ids of one task, the same ones for the same seed.

    The first bytes of a span id name the service that made it, as its id does, so that nobody can
    end another's span. The others count from a number that no other start of the service has but
    by a chance of 1 to 4 billion.
    """

    __slots__ = ("_maker", "last", "root", "trace")

    def __init__(self, seed: bytes, name: str, generation: int) -> None:
        material = hashlib.sha256(b"%b|%b|%d" % (seed, name.encode(), generation)).digest()
        self._maker = service_id(name) & COUNT_MASK
        count = int.from_bytes(material[TRACE_SIZE : TRACE_SIZE + MAKER_SIZE], "little")
        self.last = self._maker + count * COUNT_STEP
        self.trace = material[: TRACE_SIZE - SPAN_SIZE]  # with the first span of it a trace id
        self.root = Context(material[:TRACE_SIZE], self.next_span())

    def next_number(self) -> int:
        """A span id that this task has not used before, as a number of 8 bytes."""
        self.last = number = self.last + COUNT_STEP
        return number if number <= SPAN_MASK else self.begin_again()

    def begin_again(self) -> int:
        """The number after the last one that 8 bytes can hold."""
        self.last = number = self._maker + COUNT_STEP
        return number

    def next_span(self) -> bytes:
        """The same as bytes."""
        return self.next_number().to_bytes(SPAN_SIZE, "little")

    def next_trail(self) -> bytes:
        """The first span of a trace that is begun here, with the trace before it."""
        number = self.next_number()
        return first_trail(self.trace, number, number)


assert MAKER_SIZE + MAKER_SIZE == SPAN_SIZE
assert FIRST_TRAIL.size == NEXT_TRAIL.size == TRACE_SIZE + SPAN_SIZE
