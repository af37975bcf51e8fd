"""A page of living memory: words that are series, and spans.

    header    8 words: magic | size | overflow | lost spans | began (ns) | 3 free
    words     a quarter of the page: u64 cells, handed out by the reader's owner
    spans     the rest (nexus.telemetry.span): states, then units

A counter or gauge is one word, which is stored and read whole. A histogram is a group: count, sum,
and a word per bucket. The writer stores the count, one more than before, then the sum, and the
bucket last. So the group is being written as long as its buckets do not add up to its count.

A group is read in two steps with a barrier before each (mark, Fence, copy, Fence, settle). What the
copy has is accepted if the marked buckets added up to the marked count and the count is the same
after the second barrier: the first barrier shows the sum, which was stored before the last of the
marked buckets was, the second one shows the next count of whoever stored into the copy. Otherwise
the former value stands. The barriers are the reader's alone (abi.Fence): they hold on the writer's
CPU too.
"""

from dataclasses import dataclass
from typing import Final, NamedTuple

from nexus.telemetry.span import UNIT_SIZE, UNITS_OF_SPAN_MAX, SpanReader, SpanWriter

PAGE_VERSION: Final = 1
PAGE_MAGIC: Final = int.from_bytes(b"NXPAGE\0" + bytes([PAGE_VERSION]), "little")
WORD_SIZE: Final = 8  # bytes
HEADER_WORDS: Final = 8
HEADER_SIZE: Final = HEADER_WORDS * WORD_SIZE  # bytes
PAGE_SIZE_MIN: Final = 4096  # bytes
WORD_MAX: Final = (1 << 63) - 1  # a counter stays there; a gauge's largest value
PASSES_MAX: Final = 4  # over a page, until a group that was never still is given up for now

MAGIC_WORD: Final = 0
SIZE_WORD: Final = 1
OVERFLOW_WORD: Final = 2
BEGAN_WORD: Final = 4

COUNT: Final = 0  # words of a group, in their order
SUM: Final = 1
BUCKETS: Final = 2
GROUP_WORDS_MIN: Final = BUCKETS + 1
GROUP_WORDS_MAX: Final = BUCKETS + 17


class NoPage(Exception):
    """The memory holds no page of this version; the text says why."""


class Shape(NamedTuple):
    """Where the parts of a page of one size lie (bytes)."""

    states_at: int
    units_at: int
    units: int  # how many
    end: int


def page_shape(size: int) -> Shape:
    """The parts of a page of `size` bytes; the same for writer and reader, and not negotiable."""
    assert size >= PAGE_SIZE_MIN
    states_at = size // 4 // WORD_SIZE * WORD_SIZE
    units = (size - states_at) // (WORD_SIZE + UNIT_SIZE)
    units_at = states_at + units * WORD_SIZE
    return Shape(states_at, units_at, units, units_at + units * UNIT_SIZE)


assert page_shape(PAGE_SIZE_MIN).units >= 2 * UNITS_OF_SPAN_MAX


class PageWriter:
    """Makes a page in `view`. `words` are its cells, `signed` the same cells for gauges."""

    __slots__ = ("_header", "signed", "spans", "words")

    def __init__(self, view: memoryview) -> None:
        shape = page_shape(len(view))
        self._header = view[:HEADER_SIZE].cast("Q")
        self.words = view[HEADER_SIZE : shape.states_at].cast("Q")
        self.signed = view[HEADER_SIZE : shape.states_at].cast("q")
        view[HEADER_SIZE:] = bytes(len(view) - HEADER_SIZE)
        for index in range(HEADER_WORDS):
            self._header[index] = 0
        self.spans = SpanWriter(
            self._header,
            view[shape.states_at : shape.units_at],
            view[shape.units_at : shape.end],
        )
        self._header[SIZE_WORD] = len(view)
        self._header[MAGIC_WORD] = PAGE_MAGIC

    def begin(self, at: int) -> None:
        """Say when its task began to count (kernel clock, ns)."""
        self._header[BEGAN_WORD] = at

    def clear(self) -> None:
        """Make all words zero: they are handed out anew."""
        for index in range(len(self.words)):
            self.words[index] = 0

    @property
    def overflow(self) -> int:
        """Updates of series that were refused."""
        return self._header[OVERFLOW_WORD]

    def count_overflow(self, count: int) -> None:
        """`count` updates belong to no series, as their series was refused."""
        self._header[OVERFLOW_WORD] += count


@dataclass(frozen=True, slots=True)
class Group:
    """A histogram as it was last read whole."""

    count: int
    sum: int
    buckets: list[int]


class PageReader:
    """Reads the page in `view`. Its owner hands out the words with `allot`; a group is a histogram.

    One pass over the page: mark(), a barrier, copy(), a barrier, settle(). Again, up to PASSES_MAX
    times, while settle() says that groups were torn; then give_up().
    """

    def __init__(self, view: memoryview) -> None:
        if len(view) < PAGE_SIZE_MIN:
            raise NoPage(f"{len(view)} bytes are too few for a page")
        shape = page_shape(len(view))
        self._header = view[:HEADER_SIZE].cast("Q")
        if self._header[MAGIC_WORD] != PAGE_MAGIC:
            raise NoPage("it does not begin as a page of this version does")
        if self._header[SIZE_WORD] != len(view):
            raise NoPage("its size is not that of its memory")
        self._words = view[HEADER_SIZE : shape.states_at].cast("Q")
        self.spans = SpanReader(
            self._header,
            view[shape.states_at : shape.units_at],
            view[shape.units_at : shape.end],
        )
        self.torn = 0  # groups that had to be read again
        self.given_up = 0  # groups whose former value stands, as no pass saw them still
        self._allotted = 0
        self._values: list[int] = []  # of the words, as copied last
        self._groups: dict[int, int] = {}  # first word of a group: how many it has
        self._kept: dict[int, Group] = {}
        self._torn: list[int] = []  # groups that this round has not accepted yet
        self._marks: dict[int, int] = {}  # the counts of those that were still
        self._is_first = True  # pass of the round: the spans are read in it

    # ------------------------------------------------------------------ words

    @property
    def room(self) -> int:
        """Words that are not handed out."""
        return len(self._words) - self._allotted

    def allot(self) -> int | None:
        """A word for a counter or a gauge, or None if there is none left."""
        return self._take(1)

    def allot_group(self, buckets: int) -> int | None:
        """The first word of a histogram with that many buckets, or None if there is no room."""
        assert 1 <= buckets <= GROUP_WORDS_MAX - BUCKETS
        first = self._take(BUCKETS + buckets)
        if first is not None:
            self._groups[first] = buckets
            self._kept[first] = Group(0, 0, [0] * buckets)
        return first

    def _take(self, count: int) -> int | None:
        if count > self.room:
            return None
        first, self._allotted = self._allotted, self._allotted + count
        self._values.extend([0] * count)
        return first

    def counter(self, word: int) -> int:
        """The value at the last copy; never more than a counter can have."""
        return min(self._values[word], WORD_MAX)

    def gauge(self, word: int) -> int:
        """The signed value at the last copy."""
        value = self._values[word]
        return value if value <= WORD_MAX else value - (1 << 64)

    def group(self, word: int) -> Group:
        """The histogram as it was last read whole."""
        return self._kept[word]

    @property
    def stray(self) -> int:
        """Words that belong to no series and are not zero, now."""
        return sum(1 for each in self._words[self._allotted :].tolist() if each)

    @property
    def overflow(self) -> int:
        """Updates of refused series, as the writer says."""
        return min(self._header[OVERFLOW_WORD], WORD_MAX)

    @property
    def began(self) -> int:
        """When its task began to count, as the writer says; 0 if it says nothing."""
        return self._header[BEGAN_WORD]

    # ------------------------------------------------------------------ a pass

    def begin(self) -> None:
        """A new round: every group is to be read."""
        self._torn = list(self._groups)
        self._is_first = True

    def mark(self) -> None:
        """First step: which of the groups that are to be read are not being written."""
        values = self._words[: self._allotted].tolist()
        self._marks = {
            first: values[first + COUNT] for first in self._torn if self._is_still(first, values)
        }
        if self._is_first:
            self.spans.mark()

    def copy(self) -> None:
        """Second step, after a barrier: all words that were handed out."""
        self._values = self._words[: self._allotted].tolist()
        if self._is_first:
            self.spans.copy()

    def settle(self) -> bool:
        """Third step, after another barrier: accept what stood still; whether groups are torn."""
        if self._is_first:
            self.spans.settle()
            self._is_first = False
        words = self._words
        torn = []
        marks, values = self._marks, self._values
        for first in self._torn:
            is_same = first in marks and words[first + COUNT] == marks[first]
            if is_same and self._is_still(first, values):  # which it is, or its writer is no writer
                self._accept(first)
            else:
                torn.append(first)
        self.torn += len(torn)
        self._torn = torn
        return bool(torn)

    def give_up(self) -> None:
        """What is still torn keeps its former value until the next round."""
        self.given_up += len(self._torn)
        self._torn = []

    def _is_still(self, first: int, values: list[int]) -> bool:
        """Whether no update of the group is on its way."""
        count = values[first + COUNT]
        buckets = values[first + BUCKETS : first + BUCKETS + self._groups[first]]
        return count == sum(buckets) and count <= WORD_MAX

    def _accept(self, first: int) -> None:
        values = self._values
        buckets = values[first + BUCKETS : first + BUCKETS + self._groups[first]]
        self._kept[first] = Group(
            values[first + COUNT], min(values[first + SUM], WORD_MAX), buckets
        )

    def open_spans(self) -> list[bytes]:
        """The spans that were open in the last round, for decode_span."""
        return self.spans.open_spans()
