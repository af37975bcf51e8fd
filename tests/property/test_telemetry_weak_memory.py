"""Every order in which a weakly ordered machine may show the writer's stores to the reader.

The model. The writer issues its stores in program order, which is taken from the real writer. A
store that was issued becomes visible at any later moment; stores into one word become visible in
their order (coherence), stores into different words in any order. Loads of the reader between two
barriers happen in any order. At a barrier (abi.Fence) every store that was issued is visible, and
none that is issued afterwards is visible before it. A word is stored and loaded whole.

So an observation of the group protocol is given by how far the writer was at each barrier, and by
which of the allowed versions each load had; `by_machine` finds the same observations with a store
buffer for each word and every interleaving, and both are compared.

The ring needs no barrier: its reader's loads are given every version that coherence allows, one
choice after the other, until all choices are used up.

Not in the model: loads that are invented out of thin air, words that tear, a compiler between
Python and the machine (CPython's memoryview stores a word with one memcpy of 8 bytes), and a
checksum that fits by chance (1 to 4 billion for each damaged record).
"""

import struct
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from operator import le
from typing import Any, Final, cast

import pytest

from nexus.metrics.series import Histogram
from nexus.protocols.metricsd import Kind
from nexus.telemetry import Group, PageReader, PageWriter, RingReader, RingWriter
from nexus.telemetry import ring as ring_module
from nexus.telemetry.page import BUCKETS, COUNT, SUM
from nexus.telemetry.ring import COMMIT_WORD, COUNT_WORD, RESERVE_WORD, RING_SIZE_MIN

Store = tuple[int, int]  # word, value
Words = tuple[int, ...]
Observation = tuple[Words, Words, int]  # the words as marked, as copied, the count again

BOUNDS: Final = (10, 20)
GROUP_WORDS: Final = BUCKETS + len(BOUNDS) + 1
VALUES: Final = (5, 15, 5)  # three updates, into different buckets and again into the first
PAGE_SIZE: Final = 4096


class Recording(dict[int, int]):
    """Cells that keep each store in its order."""

    def __init__(self) -> None:
        super().__init__(dict.fromkeys(range(GROUP_WORDS), 0))
        self.stores: list[Store] = []

    def __setitem__(self, word: int, value: int) -> None:
        self.stores.append((word, value))
        super().__setitem__(word, value)


class Unordered:
    """A writer that stores the count when the others are there."""

    def __init__(self) -> None:
        self._true = Histogram(Kind.HISTOGRAM, "h", "", [], BOUNDS)
        self._cells = Recording()
        self._true._move(self._cells, 0)

    def stores_of(self, value: int) -> list[Store]:
        self._cells.stores = []
        self._true.observe(value)
        count, *others = self._cells.stores
        return [*others, count]


def group_stores(values: Sequence[int]) -> list[list[Store]]:
    """The stores of Histogram.observe, one list for each update."""
    histogram = Histogram(Kind.HISTOGRAM, "h", "", [], BOUNDS)
    cells = Recording()
    histogram._move(cells, 0)
    updates = []
    for value in values:
        cells.stores = []
        histogram.observe(value)
        updates.append(cells.stores)
    return updates


def truths(updates: Sequence[Sequence[Store]]) -> list[Group]:
    """The group before any update, and after each."""
    words = [0] * GROUP_WORDS
    found = [Group(0, 0, [0] * (GROUP_WORDS - BUCKETS))]
    for update in updates:
        for word, value in update:
            words[word] = value
        found.append(Group(words[COUNT], words[SUM], words[BUCKETS:]))
    return found


def versions_of(stores: Sequence[Store]) -> list[list[int]]:
    """The values of each word, in the order of its stores."""
    versions = [[0] for _ in range(GROUP_WORDS)]
    for word, value in stores:
        versions[word].append(value)
    return versions


def issued_of(stores: Sequence[Store], count: int) -> list[int]:
    """The version of each word when the first `count` stores are all visible."""
    issued = [0] * GROUP_WORDS
    for word, _ in stores[:count]:
        issued[word] += 1
    return issued


def runs_of(
    stores: Sequence[Store], *, first: bool = True, second: bool = True
) -> Iterator[tuple[int, Observation]]:
    """Every observation a reader can make, which has the first and the second barrier, or not.

    With it goes how many stores had been issued at the first barrier.
    """
    versions = versions_of(stores)
    last = issued_of(stores, len(stores))
    every = range(GROUP_WORDS)
    for here in range(len(stores) + 1 if first else 1):
        at_first = issued_of(stores, here) if first else last
        low = at_first if first else [0] * GROUP_WORDS
        for there in range(here, len(stores) + 1) if second else (len(stores),):
            at_second = issued_of(stores, there)
            marks = product(*(versions[each][: at_first[each] + 1] for each in every))
            copies = list(
                product(*(versions[each][low[each] : at_second[each] + 1] for each in every))
            )
            ends = versions[0][at_second[0] if second else low[0] :]
            for mark, copy, end in product(marks, copies, ends):
                # Coherence: a later load of a word is not older. What a word has only grows.
                if end >= copy[0] and all(map(le, mark, copy)):
                    yield here, (mark, copy, end)


def by_machine(stores: Sequence[Store]) -> set[Observation]:
    """The same for a reader with both barriers, by a machine that runs every interleaving."""
    versions = versions_of(stores)
    found: set[Observation] = set()
    none = (-1,) * GROUP_WORDS
    start = (0, (0,) * GROUP_WORDS, 0, none, none)
    seen = {start}
    todo = [start]

    def go(state: Any) -> None:
        if state not in seen:
            seen.add(state)
            todo.append(state)

    while todo:
        issued, visible, step, mark, copy = todo.pop()
        if issued < len(stores):
            go((issued + 1, visible, step, mark, copy))
        for word, reached in enumerate(issued_of(stores, issued)):
            if visible[word] < reached:
                shown = (*visible[:word], visible[word] + 1, *visible[word + 1 :])
                go((issued, shown, step, mark, copy))
        taken = (mark, copy)[step] if step < 2 else ()
        if step == 2:
            found.add((mark, copy, versions[0][visible[0]]))
        elif min(taken) >= 0:  # a barrier: what was issued is visible
            go((issued, tuple(issued_of(stores, issued)), step + 1, mark, copy))
        for word, value in enumerate(taken):  # the mark or the copy, word by word, in any order
            if value < 0:
                more = (*taken[:word], versions[word][visible[word]], *taken[word + 1 :])
                go((issued, visible, step, *((more, copy) if step == 0 else (mark, more))))
    return found


class Bench:
    """A page with one histogram, whose words are set to what a load is to see."""

    def __init__(self, kind: type[PageReader] = PageReader) -> None:
        memory = memoryview(bytearray(PAGE_SIZE))
        self.words = PageWriter(memory).words
        self.reader = kind(memory)
        word = self.reader.allot_group(len(BOUNDS) + 1)
        assert word == 0

    def read(self, observation: Observation) -> Group | None:
        """What the reader accepts of it, or None."""
        mark, copy, end = observation
        reader = self.reader
        reader._kept[0] = Group(-1, -1, [])
        reader.begin()
        self._show(mark)
        reader.mark()
        self._show(copy)
        reader.copy()
        self.words[0] = end
        _ = reader.settle()
        group = reader.group(0)
        return None if group.count < 0 else group

    def _show(self, words: Words) -> None:
        for word, value in enumerate(words):
            self.words[word] = value


def wrong(
    updates: Sequence[Sequence[Store]],
    kind: type[PageReader] = PageReader,
    *,
    first: bool = True,
    second: bool = True,
) -> tuple[int, int]:
    """How many observations there are, and how many are accepted and were never true."""
    bench = Bench(kind)
    allowed = truths(updates)
    stores = [store for update in updates for store in update]
    seen = {each for _, each in runs_of(stores, first=first, second=second)}
    accepted = [bench.read(each) for each in seen]
    return len(seen), sum(each is not None and each not in allowed for each in accepted)


class NoMark(PageReader):
    """A reader that looks at the count only, as if it were a sequence that is never odd."""

    def mark(self) -> None:
        super().mark()
        self._marks = {first: self._words[first + COUNT] for first in self._torn}


class NoCount(PageReader):
    """A reader that takes what it has copied."""

    def settle(self) -> bool:
        for first in self._torn:
            self._accept(first)
        return False


def test_the_writer_under_test_stores_the_count_first_and_the_bucket_last() -> None:
    updates = group_stores(VALUES)

    assert [[word for word, _ in update] for update in updates] == [
        [COUNT, SUM, BUCKETS],
        [COUNT, SUM, BUCKETS + 1],
        [COUNT, SUM, BUCKETS],
    ]
    assert truths(updates)[-1] == Group(3, sum(VALUES), [2, 1, 0])


def test_no_reordering_makes_the_reader_accept_what_never_was() -> None:
    count, mistakes = wrong(group_stores(VALUES))

    assert count > 500
    assert mistakes == 0


def test_what_is_accepted_is_not_older_than_the_first_barrier() -> None:
    updates = group_stores(VALUES)
    stores = [store for update in updates for store in update]
    done = truths(updates)
    bench = Bench()

    accepted = [(here, bench.read(each)) for here, each in runs_of(stores)]

    ages = [(here // len(updates[0]), done.index(group)) for here, group in accepted if group]
    assert {finished for finished, _ in ages} == {0, 1, 2, 3}
    assert all(seen >= finished for finished, seen in ages)


def test_a_store_buffer_for_each_word_gives_the_same_observations() -> None:
    (stores,) = group_stores(VALUES[:1])

    assert by_machine(stores) == {each for _, each in runs_of(stores)}


@pytest.mark.parametrize(
    ("first", "second"), [(False, False), (True, False), (False, True)], ids=str
)
def test_a_reader_that_leaves_out_a_barrier_is_found(first: bool, second: bool) -> None:
    _, mistakes = wrong(group_stores(VALUES), first=first, second=second)

    assert mistakes > 0


@pytest.mark.parametrize("kind", [NoMark, NoCount])
def test_a_reader_that_does_not_look_whether_the_group_is_still_is_found(
    kind: type[PageReader],
) -> None:
    _, mistakes = wrong(group_stores(VALUES), kind)

    assert mistakes > 0


def test_a_writer_that_stores_before_the_count_is_found() -> None:
    writer = Unordered()

    _, mistakes = wrong([writer.stores_of(value) for value in VALUES])

    assert mistakes > 0


# ------------------------------------------------------------------ the ring

PIECE: Final = 32  # bytes that are copied at once: one record, or there were too many choices
LAP: Final = (RING_SIZE_MIN - 128) // 32
AHEAD: Final = LAP - 1  # records of the first lap that are all visible
LATE: Final = (
    2  # records whose stores are in any order: the last of this lap, the first of the next
)


def payload_of(number: int) -> bytes:
    return struct.pack("<QQ", number, ~number & (1 << 64) - 1)


class Memory:
    """The memory of a ring whose last stores are in any order.

    `choices` says for each load of a word that has several versions which one it sees; a load
    beyond them sees the oldest one allowed, and `widths` keeps how many there were.
    """

    def __init__(self, base: bytes, stores: Sequence[Store], choices: Sequence[int]) -> None:
        words: tuple[int, ...] = struct.unpack(f"<{len(base) // 8}Q", base)
        self._versions = [[each] for each in words]
        for word, value in stores:
            self._versions[word].append(value)
        self._seen = [0] * len(self._versions)
        self._choices = choices
        self.widths: list[int] = []

    def load(self, word: int) -> int:
        versions, seen = self._versions[word], self._seen[word]
        width = len(versions) - seen
        if width > 1:
            at = len(self.widths)
            self.widths.append(width)
            seen += self._choices[at] if at < len(self._choices) else 0
            self._seen[word] = seen
        return versions[seen]

    def settle(self) -> None:
        """All that was stored is visible."""
        self._seen = [len(each) - 1 for each in self._versions]


class Loads:
    """Loads of single words, as of a memoryview cast to "Q"."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, int):
            return self._memory.load(index)
        found = [self._memory.load(each) for each in range(*index.indices(16))]
        return memoryview(struct.pack(f"<{len(found)}Q", *found)).cast("Q")


class Bytes:
    """Copies of whole words, as slices of a memoryview of bytes."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory

    def __getitem__(self, piece: slice) -> bytes:
        assert piece.start % 8 == 0
        words = range(piece.start // 8, (piece.stop + 7) // 8)
        data = b"".join(self._memory.load(word).to_bytes(8, "little") for word in words)
        return data[: piece.stop - piece.start]


def ring_stores() -> tuple[bytes, list[Store]]:
    """The memory before, and the stores of LATE puts in the order of the program."""
    memory = bytearray(RING_SIZE_MIN)
    writer = RingWriter(memoryview(memory))
    for number in range(AHEAD):
        writer.put(payload_of(number))
    before = bytes(memory)
    stores: list[Store] = []
    for number in range(AHEAD, AHEAD + LATE):
        former = bytes(memory)
        writer.put(payload_of(number))
        changed = [
            at // 8 for at in range(0, len(memory), 8) if memory[at : at + 8] != former[at : at + 8]
        ]
        order = sorted(
            changed,
            key=lambda word: (word != RESERVE_WORD, word in (COUNT_WORD, COMMIT_WORD), word),
        )
        stores += [
            (word, int.from_bytes(memory[8 * word : 8 * word + 8], "little")) for word in order
        ]
    return before, stores


def every_run(run: Callable[[Memory], None], base: bytes, stores: Sequence[Store]) -> int:
    """Call `run` with every choice of versions; how many runs that were."""
    choices: list[int] = []
    runs = 0
    while True:
        memory = Memory(base, stores, choices)
        run(memory)
        runs += 1
        taken = [*choices, *([0] * len(memory.widths))][: len(memory.widths)]
        while taken and taken[-1] + 1 >= memory.widths[len(taken) - 1]:
            del taken[-1]
        if not taken:
            return runs
        taken[-1] += 1
        choices = taken


def reader_at(kind: type[RingReader], base: bytes, number: int) -> RingReader:
    """A reader that has taken all records before `number`."""
    reader = kind(memoryview(bytearray(base)), taken=32 * number, sequence=number)
    reader._piece_size = PIECE
    return reader


def read_all(
    kind: type[RingReader], base: bytes, memory: Memory, number: int, early: int
) -> list[bytes]:
    """`early` drains while the stores come in, then as many as it takes once all are visible."""
    reader = reader_at(kind, base, number)
    reader._words = cast("memoryview", Loads(memory))
    reader._view = cast("memoryview", Bytes(memory))
    payloads = [each for _ in range(early) for each in reader.drain(2)]
    memory.settle()
    for _ in range(LAP):
        payloads += reader.drain(4)
    assert not reader.pending
    if kind is RingReader:
        reader.settle()
        assert reader.sequence == AHEAD + LATE
        assert reader.accepted == len(payloads)
        assert number + reader.accepted + reader.overwritten + reader.damaged == reader.sequence
    return payloads


def ring_mistakes(kind: type[RingReader], number: int, early: int = 2) -> tuple[int, int]:
    """Runs of a reader that begins at record `number`, and those that gave what was never put."""
    good = {payload_of(each): each for each in range(AHEAD + LATE)}
    base, stores = ring_stores()
    mistakes = 0

    def run(memory: Memory) -> None:
        nonlocal mistakes
        payloads = read_all(kind, base, memory, number, early)
        numbers = [good.get(each, -1) for each in payloads]
        mistakes += numbers != sorted({each for each in numbers if each >= number})

    return every_run(run, base, stores), mistakes


class OneByOne(RingReader):
    """Takes each record by itself, as a reader does after a jump: here mistakes are planted."""

    def _take_some(self, commit: int, steps: int, payloads: list[bytes]) -> int:
        payload = self._take(commit)
        if payload is not None:
            payloads.append(payload)
        return steps - 1


class NoChecksum(OneByOne):
    """A reader that believes what fits by its number."""

    def _fits(self, number: int, payload: bytes, check: int) -> bool:
        return self._is_due(number)


class NoNumber(OneByOne):
    """A reader that believes a checksum, whatever record it belongs to."""

    def _is_due(self, number: int) -> bool:
        self.sequence = min(self.sequence, number)
        return True


@pytest.mark.parametrize(("number", "early"), [(0, 1), (AHEAD - 1, 1), (AHEAD, 2)])
def test_no_reordering_makes_the_ring_give_what_was_never_put(number: int, early: int) -> None:
    runs, mistakes = ring_mistakes(RingReader, number, early)

    assert runs > 100
    assert mistakes == 0


@pytest.mark.parametrize("number", [0, AHEAD])
def test_no_reordering_does_so_when_the_writer_reserves_for_several_records(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ring_module, "RESERVE_PART", 8)
    reserved = [value for word, value in ring_stores()[1] if word == RESERVE_WORD]

    runs, mistakes = ring_mistakes(RingReader, number, 1)

    assert reserved == [32 * LAP + (RING_SIZE_MIN - 128) // 8]
    assert runs > 100
    assert mistakes == 0


def test_taking_records_one_by_one_is_as_right() -> None:
    _, mistakes = ring_mistakes(OneByOne, AHEAD, 1)

    assert mistakes == 0


def test_a_ring_reader_without_the_checksum_is_found() -> None:
    _, mistakes = ring_mistakes(NoChecksum, AHEAD)

    assert mistakes > 0


def test_a_ring_reader_without_the_number_is_found() -> None:
    _, mistakes = ring_mistakes(NoNumber, AHEAD)

    assert mistakes > 0
