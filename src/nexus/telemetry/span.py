"""Spans in a page: an array of states, and an array of units that hold what the spans are.

    states    a u64 for each unit: number of the span times 8, and what it is: 0 nothing (or being
              written), 1 open, 2 + status ended
    units     128 bytes each; a span takes as many in a row as it needs, its state is the first's
              trace 16 | parent 8 | span 8 | start u64 | end u64 | size u16 | name size u8 |
              attributes u8 | more u8 | 3 free, then the name, the attributes, and more attributes
              that came at the end: each key size u8, key, value size u8, value; all UTF-8.
              trace and parent are next to each other as in the header of a frame, and as what is
              known of the span around; the first span of a trace is its own parent

Numbers count from 1 and are never used again. To begin a span the writer makes the state nothing,
stores the unit and then the state; to end it, the end and then the state. So the state is to a unit
what the count is to a group of words (nexus.telemetry.page): a copy is good if the state is the
same before the first barrier and after the second. Units are used in turn, over what has ended;
what is open stays where it is.
"""

import struct
from collections import deque
from collections.abc import Callable, Mapping
from typing import Final, NamedTuple

WORD_SIZE: Final = 8  # bytes
UNIT_SIZE: Final = 128  # bytes; a name of 30 characters and two short attributes fit
HEAD: Final = struct.Struct("<16s8s8sQQHBBB3x")
TAIL: Final = struct.Struct("<HBBB3x")  # of the head: what is the same for all spans of a name
HEAD_SIZE: Final = HEAD.size
UNIT_WORDS: Final = UNIT_SIZE // WORD_SIZE
END_WORD: Final = 5  # of a unit: when the span has ended
MORE_AT: Final = 52
SIZE_AT: Final = 48
SIZE: Final = struct.Struct("<H")
NO_PARENT: Final = bytes(8)
ATTRIBUTES_MAX: Final = 8  # at the beginning, and as many more at the end
NO_ATTRIBUTES: Final[dict[str, str]] = {}
TEXT_SIZE_MAX: Final = 255  # bytes that a size of one byte can say
SPAN_SIZE_MAX: Final = 768  # bytes; name, and attributes of metricsd's limits twice, fit
ROOM_FOR_MORE: Final = 32  # bytes kept free for an attribute that comes at the end
UNITS_OF_SPAN_MAX: Final = SPAN_SIZE_MAX // UNIT_SIZE
CLAIMS_MAX: Final = 16  # spans that are open and in the way, until one has no place
KIND_BITS: Final = 3
KIND_MASK: Final = 7
NUMBER_STEP: Final = 1 << KIND_BITS
OPEN: Final = 1
ENDED: Final = 2  # and the status on top
LOST_WORD: Final = 3  # of the page's header
NUMBER_MAX: Final = 1 << 56  # a larger one is no span's

SINGLE: Final = 0  # what a unit holds: on its own, ended or never used; or else:
REST: Final = 1  # not the first one of its span
LARGE: Final = 2  # of an ended span with further units
# of an open span: its state, and that below 0 if it has further units

assert END_WORD * WORD_SIZE == 24 + 8 + 8
assert HEAD_SIZE % WORD_SIZE == 0
assert HEAD_SIZE + TEXT_SIZE_MAX < SPAN_SIZE_MAX
assert HEAD_SIZE - TAIL.size == SIZE_AT
assert NUMBER_STEP + OPEN > LARGE
assert ENDED == OPEN + 1, "SpanWriter.close adds it to the state"


class SpanRecord(NamedTuple):
    """A span as its writer tells it; `end` is 0 and `status` 0 while it is open.

    Whether it may say so is not checked: neither names nor sizes nor who made the ids.
    """

    trace: bytes
    span: bytes
    parent: bytes
    start: int
    end: int
    status: int
    name: str
    attributes: list[tuple[str, str]]


class Called:
    """What a span is called, ready to be stored: the end of the head, its name, and attributes."""

    __slots__ = ("is_short", "length", "put", "tail")

    put: Callable[[memoryview, int, bytes, int, int, bytes], None]
    """Stores a span that begins: into what, where, trace and parent, its id, when, `tail`."""

    def __init__(self, content: bytes, name_size: int, attributes: int) -> None:
        size = HEAD_SIZE + len(content)
        self.tail = TAIL.pack(size, name_size, attributes, 0) + content
        self.put = struct.Struct(f"<24sQQ8x{len(self.tail)}s").pack_into
        self.length = -(-size // UNIT_SIZE)  # how many units it takes
        self.is_short = size + ROOM_FOR_MORE <= UNIT_SIZE


def called(name: str, attributes: Mapping[str, str] = NO_ATTRIBUTES) -> Called:
    """What is too many or too long is cut."""
    spelled = _cut(name)
    texts = [_packed(*each) for each in list(attributes.items())[:ATTRIBUTES_MAX]]
    while HEAD_SIZE + len(spelled) + sum(map(len, texts)) + ROOM_FOR_MORE > SPAN_SIZE_MAX:
        _ = texts.pop()
    content = spelled + b"".join(texts)
    return Called(content, len(spelled), len(texts))


class SpanWriter:
    """Writes spans into `states` and `units`, which are zero. Of `header` one word is its own."""

    __slots__ = (
        "_count",
        "_cursor",
        "_ends",
        "_header",
        "_held",
        "_last",
        "_lengths",
        "_next",
        "_states",
        "_units",
    )

    def __init__(self, header: memoryview, states: memoryview, units: memoryview) -> None:
        self._header = header
        self._states = states.cast("Q")
        self._units = units
        self._ends = units.cast("Q")[END_WORD::UNIT_WORDS]
        self._count = len(self._states)
        self._cursor = 0
        self._next = [*range(1, self._count), 0]
        self._last = OPEN  # the state of the span that was opened last
        self._held = [SINGLE] * self._count
        self._lengths: dict[int, int] = {}  # of spans of several units

    def open(self, around: bytes, span: int, start: int, called: Called) -> int:
        """Show a span that begins; the unit it is in, or -1 if there is no place for it.

        `around` is its trace and its parent's id, `span` its own id as a number. The first span of
        a trace has its own id in both.
        """
        unit = self._cursor
        held = self._held
        if held[unit] or not called.is_short:
            return self._open_slowly(around, span, start, called)
        states = self._states
        states[unit] = 0
        put = called.put  # and no method call: the interpreter takes a detour for what is none
        put(self._units, unit * UNIT_SIZE, around, span, start, called.tail)
        self._last = state = self._last + NUMBER_STEP
        held[unit] = state
        states[unit] = state
        self._cursor = self._next[unit]
        return unit

    def close(
        self, unit: int, end: int, status: int, attributes: Mapping[str, str] = NO_ATTRIBUTES
    ) -> None:
        """The span that was opened in `unit` has ended."""
        if unit < 0:
            return
        if attributes:
            self._add(unit, attributes)
        held = self._held
        state = held[unit]
        if state < 0:
            state = -state
            held[unit] = LARGE
        else:
            held[unit] = SINGLE
        self._ends[unit] = end
        self._states[unit] = state + 1 + status

    def _open_slowly(self, around: bytes, span: int, start: int, called: Called) -> int:
        """A span of several units, or one that has another in its way."""
        length = called.length
        unit = self._claim(length)
        if unit < 0:
            self._header[LOST_WORD] += 1
            return -1
        called.put(self._units, unit * UNIT_SIZE, around, span, start, called.tail)
        self._last = state = self._last + NUMBER_STEP
        self._held[unit] = state if length == 1 else -state
        self._states[unit] = state
        return unit

    def _claim(self, length: int) -> int:
        """The first of `length` units in a row, which are this span's now; -1 if none are free."""
        first = self._cursor
        held = self._held
        for _ in range(CLAIMS_MAX):
            if first + length > self._count:
                first = 0
            wanted = range(first, min(first + length, self._count))
            busy = next((each for each in wanted if not 0 <= held[each] <= LARGE), None)
            if busy is None:
                break
            first = busy + self._lengths.get(busy, 1)
        else:
            return -1
        if first + length > self._count:
            return -1
        for each in range(first, first + length):
            self._states[each] = 0
            if held[each] == LARGE:
                self._forget(each)
        if length > 1:
            self._lengths[first] = length
        held[first : first + length] = [REST] * length
        self._cursor = (first + length) % self._count
        return first

    def _forget(self, first: int) -> None:
        """The span that was here gives way: what is left of it are units on their own."""
        length = self._lengths.pop(first)
        self._held[first : first + length] = [SINGLE] * length

    def _add(self, unit: int, attributes: Mapping[str, str]) -> None:
        """Write attributes that came at the end, as many as there is room for."""
        at = unit * UNIT_SIZE
        (size,) = SIZE.unpack_from(self._units, at + SIZE_AT)
        limit = self._lengths.get(unit, 1) * UNIT_SIZE
        count = 0
        for each in list(attributes.items())[:ATTRIBUTES_MAX]:
            text = _packed(*each)
            if size + len(text) > limit:
                break
            self._units[at + size : at + size + len(text)] = text
            size += len(text)
            count += 1
        SIZE.pack_into(self._units, at + SIZE_AT, size)
        self._units[at + MORE_AT] = count


class SpanReader:
    """Reads spans in the rounds of a PageReader: mark, copy, settle, with barriers between.

    Each number is accepted once, when it has ended, or is open, or counts as overwritten: it ended
    and its unit was used again before a round saw it.
    """

    def __init__(self, header: memoryview, states: memoryview, units: memoryview) -> None:
        self._header = header
        self._states = states.cast("Q")
        self._units = units
        self._seen = [0] * len(self._states)  # what a unit had when its span was accepted
        self._marks: list[int] = []
        self._copies: dict[int, bytes] = {}
        self._open: list[bytes] = []
        self._queue: deque[bytes] = deque()
        self.accepted = 0
        self.overwritten = 0
        self.damaged = 0  # accepted, and dropped as nobody took them

    @property
    def lost(self) -> int:
        """Spans that had no place among open ones, as the writer says."""
        return min(self._header[LOST_WORD], NUMBER_MAX)

    def mark(self) -> None:
        """First step: what is there."""
        self._marks = self._states.tolist()

    def copy(self) -> None:
        """Second step: what is new, or open."""
        self._copies = {}
        for unit, (state, seen) in enumerate(zip(self._marks, self._seen, strict=True)):
            if state != seen and state & KIND_MASK and state >> KIND_BITS < NUMBER_MAX:
                at = unit * UNIT_SIZE
                head = state.to_bytes(WORD_SIZE, "little")
                self._copies[unit] = head + bytes(self._units[at : at + SPAN_SIZE_MAX])

    def settle(self) -> None:
        """Third step: accept what stood still."""
        states = self._states.tolist()
        self._open = []
        ended: list[tuple[int, bytes]] = []
        unsettled = newest = 0
        for unit, payload in self._copies.items():
            state = self._marks[unit]
            newest = max(newest, state >> KIND_BITS)
            if states[unit] != state:
                unsettled += 1
            elif state & KIND_MASK == OPEN:
                self._open.append(payload)
            else:
                self._seen[unit] = state
                ended.append((state, payload))
        for _, payload in sorted(ended):
            self._queue.append(payload)
        self.accepted += len(ended)
        while len(self._queue) > 2 * len(self._seen):
            _ = self._queue.popleft()
            self.damaged += 1
        missing = newest - self.accepted - len(self._open) - unsettled
        self.overwritten = max(self.overwritten, missing)

    def drain(self, count_max: int) -> list[bytes]:
        """At most `count_max` spans that ended, oldest first, for decode_span."""
        return [self._queue.popleft() for _ in range(min(count_max, len(self._queue)))]

    def open_spans(self) -> list[bytes]:
        """The spans that were open in the last round."""
        return list(self._open)


def decode_span(data: bytes) -> SpanRecord | None:
    """The span in what a SpanReader gave, or None if there is none; any bytes get an answer."""
    if len(data) < WORD_SIZE + HEAD_SIZE:
        return None
    kind = data[0] & KIND_MASK
    content = data[WORD_SIZE:]
    trace, parent, span, start, end, _, name_size, count, more = HEAD.unpack_from(content)
    found: list[tuple[str, str]] = []
    at = HEAD_SIZE + name_size
    if kind == 0 or at > len(content) or max(count, more) > ATTRIBUTES_MAX:
        return None
    is_open = kind == OPEN
    try:
        name = content[HEAD_SIZE:at].decode()
        at = _unpacked(content, at, count, found)
        if not is_open:
            _ = _unpacked(content, at, more, found)
    except (UnicodeDecodeError, IndexError):
        return None
    return SpanRecord(
        trace,
        span,
        NO_PARENT if parent == span else parent,
        start,
        0 if is_open else end,
        0 if is_open else kind - ENDED,
        name,
        found,
    )


def _packed(key: str, value: str) -> bytes:
    name, text = _cut(key), _cut(value)
    return b"%c%b%c%b" % (len(name), name, len(text), text)


def _cut(text: str) -> bytes:
    """At most TEXT_SIZE_MAX bytes of UTF-8, without half a character at the end."""
    data = text.encode(errors="replace")
    if len(data) <= TEXT_SIZE_MAX:
        return data
    return data[:TEXT_SIZE_MAX].decode(errors="ignore").encode()


def _unpacked(data: bytes, at: int, count: int, found: list[tuple[str, str]]) -> int:
    """Read `count` attributes from `at` on; where they end. Raises where the bytes do."""
    for _ in range(count):
        middle = at + 1 + data[at]
        end = middle + 1 + data[middle]
        if end > len(data):
            raise IndexError
        found.append((data[at + 1 : middle].decode(), data[middle + 1 : end].decode()))
        at = end
    return at
