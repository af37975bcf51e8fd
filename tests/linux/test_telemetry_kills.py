"""A writer killed at any instant: what is read of its ring and its page was written so.

The writers are real processes that do nothing else; the reader reads while they run and after
their death. x86 keeps stores in their order, so that no barrier is needed here between processes;
what weaker machines may do is tests/property/test_telemetry_weak_memory.py.
"""

import gc
import mmap
import os
import random  # noqa: TID251 (seeded: when to kill)
import signal
import time
from collections.abc import Callable
from typing import Final

import pytest

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
from nexus.telemetry.ring import COMMIT_WORD, RESERVE_WORD

pytestmark = [pytest.mark.linux, pytest.mark.slow]

KILLS: Final = 300  # of each kind of writer
LIFE_LEAST: Final = 0.0005  # seconds a writer lives with the reader beside it
LIFE_MOST: Final = 0.006
START_MAX: Final = 5.0  # seconds until a writer has written its first word
DRAIN_COUNT: Final = 64
SIZE: Final = 16 * 1024  # bytes
BOUNDS: Final = (10, 100, 1_000)
LAP: Final = 200  # observations, after which the values begin again
FACTOR: Final = 7  # from one value to the next


def payload_of(number: int) -> bytes:
    """Differs from record to record in size and content."""
    return b"%d:" % number + bytes([number & 255]) * (20 + number % 150)


def killed(
    memory: mmap.mmap, write: Callable[[memoryview], None], look: Callable[[], None]
) -> None:
    """Run `write` in a process of its own, `look` beside it, and kill it at some instant."""
    pid = os.fork()
    if pid == 0:
        gc.disable()
        write(memoryview(memory))
        os._exit(1)
    try:
        until = time.perf_counter() + START_MAX
        while memory[8:16] == bytes(8):
            assert time.perf_counter() < until, "the writer does not begin"
        end = time.perf_counter() + random.Random(pid).uniform(LIFE_LEAST, LIFE_MOST)
        while time.perf_counter() < end:
            look()
    finally:
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL


def fresh() -> mmap.mmap:
    return mmap.mmap(-1, SIZE)


def write_ring(view: memoryview) -> None:
    writer = RingWriter(view)
    while True:
        writer.put(payload_of(writer.sequence))


def write_page(view: memoryview) -> None:
    page = PageWriter(view)
    histogram = Histogram(Kind.HISTOGRAM, "h", "", [], BOUNDS)
    histogram.place(page, 0)
    number = 0
    while True:
        histogram.observe(FACTOR * (number % LAP))
        number += 1
        if number % 16 == 0:
            span = page.spans.open(b"t" * 24, number, number, called("work", {"n": str(number)}))
            page.spans.close(span, number, 1)


class RingWatch:
    """What is read of one ring."""

    def __init__(self, memory: mmap.mmap) -> None:
        self._memory = memory
        self.reader: RingReader | None = None
        self.found: list[bytes] = []

    def look(self) -> None:
        """Read what is there; the ring's first word is stored last."""
        if self.reader is None and self._memory[:8] != bytes(8):
            self.reader = RingReader(memoryview(self._memory))
        if self.reader is not None:
            self.found += self.reader.drain(DRAIN_COUNT)

    def finish(self) -> None:
        """The writer is dead: read to the end."""
        while self.reader is not None and self.reader.pending:
            self.look()
        if self.reader is not None:
            self.reader.settle()

    @property
    def numbers(self) -> list[int]:
        """Of the records that were read."""
        return [int(each.partition(b":")[0]) for each in self.found]


def test_a_ring_whose_writer_is_killed_gives_only_what_was_put() -> None:
    accepted = overwritten = inside = 0

    for _ in range(KILLS):
        memory = fresh()
        watch = RingWatch(memory)
        killed(memory, write_ring, watch.look)
        watch.finish()
        reader, numbers = watch.reader, watch.numbers
        if reader is None:
            continue

        assert watch.found == [payload_of(number) for number in numbers]
        assert numbers == sorted(set(numbers))
        assert reader.damaged == 0
        assert reader.accepted == len(numbers)
        assert reader.accepted + reader.overwritten == reader.sequence
        assert reader.sequence - reader.written in (0, 1)  # the count is stored last
        assert not numbers or numbers[-1] == reader.sequence - 1  # the last one is always there
        accepted += reader.accepted
        overwritten += reader.overwritten
        words = memoryview(memory).cast("Q")
        inside += words[RESERVE_WORD] != words[COMMIT_WORD]

    assert accepted > 10 * KILLS
    assert overwritten > 0, "no reader was ever overtaken"
    assert inside > 0, "no writer was killed between its reservation and its commit"


class PageWatch:
    """What is read of one page. `reads` and `spans` are counts, of what was looked at and true."""

    def __init__(self, memory: mmap.mmap) -> None:
        self._memory = memory
        self.reader: PageReader | None = None
        self.reads = 0
        self.spans = 0
        self._last = Group(0, 0, [])

    def look(self) -> None:
        """One round; between processes on x86 the barrier is the order of the stores."""
        if self.reader is None:
            if self._memory[:8] == bytes(8):
                return
            self.reader = PageReader(memoryview(self._memory))
            assert self.reader.allot_group(len(BOUNDS) + 1) == 0
        reader = self.reader
        reader.begin()
        for _ in range(PASSES_MAX):
            reader.mark()
            reader.copy()
            if not reader.settle():
                break
        reader.give_up()
        self._check(reader)

    def _check(self, reader: PageReader) -> None:
        group = reader.group(0)
        laps, rest = divmod(group.count, LAP)
        total = FACTOR * (laps * LAP * (LAP - 1) // 2 + rest * (rest - 1) // 2)
        assert (sum(group.buckets), group.sum) == (group.count, total)
        assert group.count >= self._last.count
        self._last = group
        self.reads += 1
        for payload in [*reader.spans.drain(DRAIN_COUNT), *reader.open_spans()]:
            span = decode_span(payload)
            assert span is not None
            assert (span.name, span.attributes) == ("work", [("n", str(span.start))])
            self.spans += 1


def test_a_page_whose_writer_is_killed_has_only_true_histograms_and_spans() -> None:
    reads = torn = inside = spans = 0

    for _ in range(KILLS):
        memory = fresh()
        watch = PageWatch(memory)
        killed(memory, write_page, watch.look)
        watch.look()
        reader = watch.reader
        if reader is None:
            continue

        assert reader.spans.damaged == 0
        reads, spans, torn = reads + watch.reads, spans + watch.spans, torn + reader.torn
        words = memoryview(memory)[HEADER_SIZE:].cast("Q")
        if words[COUNT] != sum(words[BUCKETS : BUCKETS + len(BOUNDS) + 1]):
            inside += 1
            given_up = reader.given_up
            watch.look()
            assert reader.given_up == given_up + 1  # the former value stands, counted each time

    assert reads > 10 * KILLS
    assert spans > KILLS
    assert torn > 0, "no group was ever seen torn"
    assert inside > 0, "no writer was killed inside a group"
