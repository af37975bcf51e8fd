"""Fuzz the readers of living memory: a ring, a page, written by whoever wants to hurt them.

Memory is what an honest writer made of it, changed between the steps of the reader: bytes, words
of the headers and states, whole ranges, while the writer goes on. Whatever is there, a reader ends
each turn, raises nothing, and every number has one account.

    python -m fuzz.memory --turns 20000 --seed 1
"""

import argparse
import random  # noqa: TID251 (a fuzzer has a seeded generator of its own)
import sys
from collections.abc import Callable, Sequence
from typing import Final

from nexus.telemetry import (
    PAGE_SIZE_MIN,
    RING_SIZE_MIN,
    PageReader,
    PageWriter,
    RingReader,
    RingWriter,
    called,
    decode_span,
    page_shape,
    payload_size_max,
)

TURNS_DEFAULT: Final = 20_000
CHANGES_MAX: Final = 12  # of one turn
TURNS_OF_MEMORY: Final = 50  # until it is made anew
DRAIN_COUNT: Final = 16
NUMBERS: Final = (
    0,
    1,
    7,
    8,
    9,
    64,
    1024,
    1 << 31,
    1 << 32,
    1 << 56,
    1 << 62,
    (1 << 63) - 8,
    (1 << 64) - 1,
)
FIXED: Final = 16  # bytes at the start that say what the memory is: others are refused


class Counts:
    """What came out: what honest writers had put, and what did not count."""

    def __init__(self) -> None:
        self.accepted = 0
        self.refused = 0


def hurt(rng: random.Random, memory: bytearray, header: int) -> None:
    """Change the memory somewhere, its first `header` bytes as often as all the rest."""
    for _ in range(rng.randrange(CHANGES_MAX)):
        match rng.randrange(4):
            case 0:
                memory[rng.randrange(FIXED, len(memory))] = rng.randrange(256)
            case 1 | 2:
                end = header if rng.random() < 0.5 else len(memory)
                at = rng.randrange(FIXED, end - 7) & ~7
                memory[at : at + 8] = rng.choice(NUMBERS).to_bytes(8, "little")
            case _:
                size = rng.randrange(1, 200)
                here, there = (rng.randrange(FIXED, len(memory) - size) for _ in range(2))
                memory[here : here + size] = memory[there : there + size]


def fuzz_ring(rng: random.Random, turns: int, counts: Counts) -> None:
    """Turns over one ring after the other."""
    memory, writer, reader = bytearray(), None, None
    for turn in range(turns):
        if writer is None or reader is None or turn % TURNS_OF_MEMORY == 0:
            memory = bytearray(RING_SIZE_MIN + 64 * rng.randrange(40))
            writer = RingWriter(memoryview(memory))
            reader = RingReader(memoryview(memory).toreadonly())
        for _ in range(rng.randrange(6)):
            writer.put(rng.randbytes(rng.randrange(payload_size_max(len(memory)) + 2)))
        if rng.random() < 0.5:
            hurt(rng, memory, 128)
        before = (reader.accepted, reader.overwritten, reader.damaged, reader.sequence)
        payloads = reader.drain(DRAIN_COUNT)
        after = (reader.accepted, reader.overwritten, reader.damaged, reader.sequence)
        assert len(payloads) <= DRAIN_COUNT
        assert all(a <= b for a, b in zip(before, after, strict=True))
        assert sum(after[:3]) == after[3] < 1 << 63
        assert 0 <= reader.pending <= len(memory)
        assert max(reader.lost, reader.written) < 1 << 63
        counts.accepted += len(payloads)
        counts.refused += after[1] + after[2] - before[1] - before[2]


def fuzz_page(rng: random.Random, turns: int, counts: Counts) -> None:
    """Turns over one page after the other."""
    memory, writer, reader = bytearray(), None, None
    for turn in range(turns):
        if writer is None or reader is None or turn % TURNS_OF_MEMORY == 0:
            memory = bytearray(PAGE_SIZE_MIN + 8 * rng.randrange(200))
            writer = PageWriter(memoryview(memory))
            reader = PageReader(memoryview(memory).toreadonly())
            assert (reader.allot(), reader.allot_group(3)) == (0, 1)
        spans = [
            writer.spans.open(rng.randbytes(24), turn, turn, called("x" * rng.randrange(120)))
            for _ in range(rng.randrange(4))
        ]
        for span in spans:
            if rng.random() < 0.9:
                writer.spans.close(span, turn + 1, rng.randrange(3))
        if rng.random() < 0.5:
            hurt(rng, memory, page_shape(len(memory)).units_at)
        before = reader.spans.accepted + reader.spans.overwritten + reader.spans.damaged
        reader.begin()
        reader.mark()
        if rng.random() < 0.2:
            hurt(rng, memory, page_shape(len(memory)).units_at)
        reader.copy()
        _ = reader.settle()
        reader.give_up()
        found = [decode_span(each) for each in (*reader.spans.drain(1000), *reader.open_spans())]
        kept = reader.group(1)
        assert len(found) <= page_shape(len(memory)).units
        assert kept.count == sum(kept.buckets) < 1 << 63
        assert reader.stray <= reader.room
        assert reader.spans.accepted + reader.spans.overwritten + reader.spans.damaged >= before
        assert max(reader.overflow, reader.spans.lost, reader.counter(0)) < 1 << 63
        counts.accepted += sum(each is not None for each in found)
        counts.refused += sum(each is None for each in found)


READERS: Final[dict[str, Callable[[random.Random, int, Counts], None]]] = {
    "ring": fuzz_ring,
    "page": fuzz_page,
}


def campaign(turns: int, seed: int) -> dict[str, Counts]:
    """Both readers; what was accepted and refused, by name."""
    found: dict[str, Counts] = {}
    for name, fuzz in READERS.items():
        found[name] = Counts()
        fuzz(random.Random(f"{seed} {name}"), turns, found[name])
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run and report; 1 if a reader accepted or refused nothing."""
    parser = argparse.ArgumentParser(prog="fuzz.memory", description=__doc__)
    parser.add_argument("--turns", type=int, default=TURNS_DEFAULT, help="turns per reader")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    dull = 0
    for name, counts in campaign(options.turns, options.seed).items():
        verdict = "ok" if counts.accepted and counts.refused else "NOT TESTED"
        dull += verdict != "ok"
        print(f"{name}: {counts.accepted} accepted, {counts.refused} refused: {verdict}")
    return 1 if dull else 0


if __name__ == "__main__":
    sys.exit(main())
