"""Writers of living memory that are killed at any instant, and watches that check what is read.

The writers are real processes that do nothing else; the reader reads while they run and after
their death. Beside the honest writers stand broken ones, which their watches must find: they show
that a watch can fail. Needs no pytest: tests/linux/telemetry_smoke.py runs it on other machines.
"""

import gc
import mmap
import os
import random  # noqa: TID251 (seeded: when to kill)
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol, TypeAlias, cast

from nexus.metrics.series import Histogram
from nexus.protocols.metricsd import Kind
from nexus.telemetry import (
    PASSES_MAX,
    Group,
    PageReader,
    PageWriter,
    RingReader,
    RingWriter,
    called,
    decode_span,
)
from nexus.telemetry.page import BUCKETS, COUNT, HEADER_SIZE
from nexus.telemetry.ring import CAPACITY_WORD, COMMIT_WORD, RING_HEADER_SIZE
from nexus.telemetry.span import KIND_BITS, NUMBER_STEP, OPEN

START_MAX: Final = 30.0  # seconds until a writer has written its first word
ALARM: Final = 60  # seconds after which a writer ends whose reader is gone
DRAIN_COUNT: Final = 64
SIZE: Final = 16 * 1024  # bytes
BOUNDS: Final = (10, 100, 1_000)
LAP: Final = 200  # observations, after which the values begin again
FACTOR: Final = 7  # from one value to the next
SPAN_EVERY: Final = 16  # observations, from one span to the next

RECORDS: Final = "records read"
OVERTAKEN: Final = "overwritten unread"
HISTOGRAMS: Final = "histograms read"
SPANS: Final = "spans read"
TORN: Final = "groups seen torn"
INSIDE: Final = "killed inside an update"


class Wrong(Exception):
    """What was read was never written, or is missing."""


def must(truth: object, text: str) -> None:
    """Raise Wrong with `text` unless it is true."""
    if not truth:
        raise Wrong(text)


def no_fence() -> None:
    """The barrier between processes on x86, which keeps the order of stores and of loads."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """How many writers are killed, after how long a life beside the reader (seconds)."""

    kills: int
    life_least: float
    life_most: float
    seed: int
    fence: Callable[[], None]  # the reader's barrier


class Watch(Protocol):
    """What is read of one piece of memory."""

    counts: Counter[str]

    def look(self) -> None:
        """Read what is there. Raises Wrong."""

    def finish(self) -> None:
        """The writer is dead: read to the end. Raises Wrong."""


Write: TypeAlias = Callable[[memoryview], None]
WatchOf: TypeAlias = Callable[[mmap.mmap, Callable[[], None]], Watch]


def campaign(write: Write, watch_of: WatchOf, plan: Plan, counts: Counter[str]) -> None:
    """Kill one writer after the other; what their watches counted is added to `counts`."""
    for number in range(plan.kills):
        memory = mmap.mmap(-1, SIZE)
        watch = watch_of(memory, plan.fence)
        rng = random.Random(f"{plan.seed} {number}")
        life = rng.uniform(plan.life_least, plan.life_most)
        counts["writers"] += 1
        _killed(memory, write, watch.look, life)
        watch.finish()
        counts.update(watch.counts)


def _killed(memory: mmap.mmap, write: Write, look: Callable[[], None], life: float) -> None:
    """Run `write` in a process of its own, `look` beside it, and kill it after its life."""
    pid = os.fork()
    if pid == 0:
        gc.disable()
        _ = signal.signal(signal.SIGALRM, signal.SIG_DFL)
        _ = signal.alarm(ALARM)
        write(memoryview(memory))
        os._exit(1)
    try:
        until = time.perf_counter() + START_MAX
        while memory[8:16] == bytes(8):
            assert time.perf_counter() < until, "the writer does not begin"
        end = time.perf_counter() + life
        while time.perf_counter() < end:
            look()
    finally:
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL, "the writer ended by itself"


# ------------------------------------------------------------------ the ring


def payload_of(number: int) -> bytes:
    """Differs from record to record in size and content."""
    return b"%d:" % number + bytes([number & 255]) * (20 + number % 150)


def write_ring(view: memoryview) -> None:
    """Put records for ever."""
    writer = RingWriter(view)
    while True:
        writer.put(payload_of(writer.sequence))


def write_ring_commit_first(view: memoryview) -> None:
    """Broken: the header says that a record is there before it is."""
    own = memoryview(bytearray(len(view)))
    writer = RingWriter(own)
    while True:
        writer.put(payload_of(writer.sequence))
        view[:RING_HEADER_SIZE] = own[:RING_HEADER_SIZE]
        view[RING_HEADER_SIZE:] = own[RING_HEADER_SIZE:]


class RingWatch:
    """What is read of one ring, which needs no barrier."""

    def __init__(self, memory: mmap.mmap, fence: Callable[[], None]) -> None:
        self._memory = memory
        self._reader: RingReader | None = None
        self._last = -1  # the number of the record that was read last
        self.counts: Counter[str] = Counter()

    def look(self) -> None:
        """As Watch; the ring's first word is stored last."""
        if self._reader is None and self._memory[:8] != bytes(8):
            self._reader = RingReader(memoryview(self._memory))
        if self._reader is None:
            return
        for payload in self._reader.drain(DRAIN_COUNT):
            text = payload.partition(b":")[0]
            number = int(text) if text.isdigit() else -1
            must(payload == payload_of(number), f"record {number} was never put")
            must(number > self._last, f"record {number} came after {self._last}")
            self._last = number
            self.counts[RECORDS] += 1

    def finish(self) -> None:
        """As Watch."""
        reader = self._reader
        if reader is None:
            return
        while reader.pending:
            self.look()
        reader.settle()
        must(reader.damaged == 0, f"{reader.damaged} records are damaged")
        must(reader.accepted == self.counts[RECORDS], "what was read is not what was accepted")
        must(reader.accepted + reader.overwritten == reader.sequence, "a record has no account")
        must(reader.sequence - reader.written in {0, 1}, "the count, stored last, is off")
        must(self._last in {-1, reader.sequence - 1}, "the last record is not there")
        self.counts[OVERTAKEN] += reader.overwritten
        self.counts[INSIDE] += reader.sequence != reader.written or self._is_begun(reader.sequence)

    def _is_begun(self, number: int) -> bool:
        """Whether that record, which is not committed, has its number already."""
        words = memoryview(self._memory).cast("Q")
        at = RING_HEADER_SIZE + words[COMMIT_WORD] % words[CAPACITY_WORD]
        return number > 0 and words[at // 8] == number


# ------------------------------------------------------------------ the page


def write_page(view: memoryview) -> None:
    """Observe for ever, and make a span now and then."""
    page = PageWriter(view)
    histogram = Histogram(Kind.HISTOGRAM, "h", "", [], BOUNDS)
    histogram.place(page, 0)
    _observe(page, histogram)


def write_page_count_last(view: memoryview) -> None:
    """Broken: stores the count of a group when the others are there."""
    page = PageWriter(view)
    histogram = Histogram(Kind.HISTOGRAM, "h", "", [], BOUNDS)
    histogram._move(_CountLast(page.words), 0)
    _observe(page, histogram)


def write_page_state_first(view: memoryview) -> None:
    """Broken: the state says that a span is there before it is."""
    page = PageWriter(view)
    page.spans._states = cast("memoryview", _StateFirst(page.spans._states))
    number = 0
    while True:
        number += SPAN_EVERY
        _make_span(page, number)


def _observe(page: PageWriter, histogram: Histogram) -> None:
    number = 0
    while True:
        histogram.observe(FACTOR * (number % LAP))
        number += 1
        if number % SPAN_EVERY == 0:
            _make_span(page, number)


def _make_span(page: PageWriter, number: int) -> None:
    name = called("work", {"n": str(number)})
    span = page.spans.open(b"t" * 24, number, number, name)
    page.spans.close(span, number, 1)


class _CountLast:
    """Cells of a histogram in `words`."""

    def __init__(self, words: memoryview) -> None:
        self._words = words
        self._count = 0

    def __getitem__(self, index: int) -> int:
        return self._words[index]

    def __setitem__(self, index: int, value: int) -> None:
        if index == COUNT:
            self._count = value
            return
        self._words[index] = value
        if index >= BUCKETS:
            self._words[COUNT] = self._count


class _StateFirst:
    """States of spans: where one is to be nothing, it is what it will be."""

    def __init__(self, states: memoryview) -> None:
        self._states = states
        self._next = OPEN

    def __setitem__(self, unit: int, state: int) -> None:
        if state == 0:
            self._next += NUMBER_STEP
        self._states[unit] = state or self._next


class PageWatch:
    """What is read of one page: a histogram and spans."""

    def __init__(self, memory: mmap.mmap, fence: Callable[[], None]) -> None:
        self._memory = memory
        self._fence = fence
        self._reader: PageReader | None = None
        self._last = Group(0, 0, [])
        self.counts: Counter[str] = Counter()

    def look(self) -> None:
        """One round, as Watch; the page's first word is stored last."""
        if self._reader is None:
            if self._memory[:8] == bytes(8):
                return
            self._reader = PageReader(memoryview(self._memory))
            assert self._reader.allot_group(len(BOUNDS) + 1) == 0
        reader = self._reader
        reader.begin()
        for _ in range(PASSES_MAX):
            reader.mark()
            self._fence()
            reader.copy()
            self._fence()
            if not reader.settle():
                break
        reader.give_up()
        self._check_group(reader.group(0))
        for payload in [*reader.spans.drain(DRAIN_COUNT), *reader.open_spans()]:
            self._check_span(payload)

    def finish(self) -> None:
        """As Watch."""
        self.look()
        reader = self._reader
        if reader is None:
            return
        must(reader.spans.damaged == 0, f"{reader.spans.damaged} spans are damaged")
        words = memoryview(self._memory)[HEADER_SIZE:].cast("Q")
        if words[COUNT] != sum(words[BUCKETS : BUCKETS + len(BOUNDS) + 1]):
            self.counts[INSIDE] += 1
            given_up = reader.given_up
            self.look()
            must(reader.given_up == given_up + 1, "a group in the middle of an update was taken")
        self.counts[TORN] += reader.torn

    def _check_group(self, group: Group) -> None:
        laps, rest = divmod(group.count, LAP)
        total = FACTOR * (laps * LAP * (LAP - 1) // 2 + rest * (rest - 1) // 2)
        must(sum(group.buckets) == group.count, f"{group} does not add up")
        must(group.sum == total, f"{group} has a sum that never went with its count")
        must(group.count >= self._last.count, f"{group} came after {self._last}")
        self._last = group
        self.counts[HISTOGRAMS] += 1

    def _check_span(self, payload: bytes) -> None:
        span = decode_span(payload)
        number = SPAN_EVERY * (int.from_bytes(payload[:8], "little") >> KIND_BITS)
        found = span and (span.name, span.start, span.attributes)
        must(found == ("work", number, [("n", str(number))]), f"span {number} was read as {found}")
        self.counts[SPANS] += 1


NEEDED: Final = {
    "ring": (RECORDS, OVERTAKEN, INSIDE),
    "page": (HISTOGRAMS, SPANS, TORN, INSIDE),
}
"""What must have happened in a campaign; without it nothing was tested."""
