"""Golden images of the ring and the page: what is written now is what version 1 is, and it is read.

To write them for a new version: `python -m tests.unit.test_telemetry_golden`.
"""

from pathlib import Path

from nexus.metrics import Counter, Gauge, Histogram
from nexus.protocols.metricsd import Kind
from nexus.telemetry import PageReader, PageWriter, RingReader, RingWriter, called, decode_span
from nexus.telemetry.page import PAGE_VERSION
from nexus.telemetry.ring import RING_VERSION

FILE = Path(__file__).parent.parent / "golden" / f"telemetry-{PAGE_VERSION}.hex"
RING_SIZE = 1152
PAGE_SIZE = 4096
LINE = 32  # bytes
SPAN = int.from_bytes(b"s" * 8, "little")


def ring() -> bytes:
    """A ring that has gone round once."""
    memory = bytearray(RING_SIZE)
    writer = RingWriter(memoryview(memory))
    for number in range(50):
        writer.put(b"record %d" % number)
    writer.lost(2)
    return bytes(memory)


def page() -> bytes:
    """A series of each kind, a span that is open and one that has ended."""
    memory = bytearray(PAGE_SIZE)
    writer = PageWriter(memoryview(memory))
    counter = Counter(Kind.COUNTER, "c", "", [])
    gauge = Gauge(Kind.GAUGE, "g", "", [])
    histogram = Histogram(Kind.HISTOGRAM, "h", "", [], (10, 20))
    for word, series in enumerate((counter, gauge, histogram)):
        series.place(writer, word)
    counter.inc(41)
    gauge.set(-3)
    histogram.observe(15)
    ended = writer.spans.open(b"t" * 16 + b"s" * 8, SPAN, 1, called("ended", {"a": "b"}))
    writer.spans.close(ended, 5, 1, {"c": "d"})
    _ = writer.spans.open(b"t" * 16 + b"s" * 8, SPAN + 1, 2, called("open"))
    writer.count_overflow(7)
    return bytes(memory)


def shown(memory: bytes) -> list[str]:
    """Its lines that are not all zeros, with where they begin."""
    return [
        f"{at:05x} {memory[at : at + LINE].hex()}"
        for at in range(0, len(memory), LINE)
        if any(memory[at : at + LINE])
    ]


def golden() -> str:
    return "\n".join(["ring", *shown(ring()), "page", *shown(page()), ""])


def loaded(part: str, size: int) -> bytes:
    """The memory of one part of the file."""
    memory = bytearray(size)
    reading = False
    for line in FILE.read_text().splitlines():
        if line in ("ring", "page"):
            reading = line == part
        elif reading:
            at, _, text = line.partition(" ")
            data = bytes.fromhex(text)
            memory[int(at, 16) : int(at, 16) + len(data)] = data
    return bytes(memory)


def test_what_is_written_is_what_this_version_is() -> None:
    assert RING_VERSION == PAGE_VERSION
    assert FILE.read_text() == golden(), "a change of the format needs a new version"


def test_the_golden_ring_is_read() -> None:
    reader = RingReader(memoryview(loaded("ring", RING_SIZE)))

    read = [each for _ in range(50) for each in reader.drain(4)]

    assert read == [b"record %d" % number for number in range(50 - len(read), 50)]
    assert (reader.sequence, reader.written, reader.lost, reader.damaged) == (50, 50, 2, 0)


def test_the_golden_page_is_read() -> None:
    reader = PageReader(memoryview(loaded("page", PAGE_SIZE)))
    words = (reader.allot(), reader.allot(), reader.allot_group(3))
    reader.begin()
    reader.mark()
    reader.copy()

    assert not reader.settle()
    assert words == (0, 1, 2)
    assert (reader.counter(0), reader.gauge(1), reader.overflow) == (41, -3, 7)
    assert (reader.group(2).sum, reader.group(2).buckets) == (15, [0, 1, 0])
    (ended,) = map(decode_span, reader.spans.drain(9))
    (still,) = map(decode_span, reader.open_spans())
    assert ended is not None
    assert still is not None
    assert (ended.name, ended.end, ended.attributes) == ("ended", 5, [("a", "b"), ("c", "d")])
    assert (ended.trace, ended.span, ended.parent) == (b"t" * 16, b"s" * 8, bytes(8))
    assert (still.name, still.trace, still.end) == ("open", b"t" * 16, 0)
    assert (still.span, still.parent) == (b"t" + b"s" * 7, b"s" * 8)


if __name__ == "__main__":
    _ = FILE.write_text(golden())
