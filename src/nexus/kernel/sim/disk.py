"""A disk as it really is: a cache that forgets, writes that tear, and worse. Pure and sparse.

What was written is readable at once and stands in a volatile cache; it is on the medium after a
flush, or at once with `durable` (FUA: these bytes alone). When the power goes, any of the cached
writes may have reached the medium, in any order, each of them in part: a `Choice` says which, so
that an explorer can try them all and a run can be repeated. Nothing is drawn here: what a seed
decides is handed in.

The other faults are planned in a `DiskFaults`: operations that fail, writes the disk says it made
and did not (lost) or made elsewhere (misdirected), blocks that cannot be read, a thin disk without
room, latency. Bits rot when somebody calls `rot`.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from random import Random  # noqa: TID251 (handed in: the run's seeded stream of faults)
from typing import Final, NamedTuple, TypeAlias

from nexus.abi import BLOCK_SIZE, Nanos

CACHE_BLOCKS_MAX: Final = 16 * 1024  # 8 MiB; a disk's cache is small, and it writes the oldest out
DISK_BLOCKS_MAX: Final = 1 << 32  # 2 TiB; block numbers of the oldest tables end there
TORN_CHANCE: Final = 4  # one of so many surviving writes is torn, in a drawn choice
ZEROS: Final = bytes(BLOCK_SIZE)


class Operation(StrEnum):
    """What a disk is asked to do."""

    READ = "read"
    WRITE = "write"
    FLUSH = "flush"


class DiskErrorKind(StrEnum):
    """Why a disk refuses an operation."""

    IO = "io"
    NO_SPACE = "no space"  # a thin disk: there is no room under it
    READ_ONLY = "read only"
    OUT_OF_RANGE = "out of range"


class DiskError(Exception):
    """An operation failed. A write that failed may be done in part, as `Failure.done` says."""

    def __init__(self, kind: DiskErrorKind) -> None:
        super().__init__(kind.value)
        self.kind = kind


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """The `nth` operation of a kind (from 1) fails; with `persistent` all later ones too.

    Of a write that fails its first `done` bytes are in the cache all the same. A flush that fails
    has written nothing out, and the disk forgets what it had cached, as Linux forgets dirty pages.
    """

    operation: Operation
    nth: int
    kind: DiskErrorKind = DiskErrorKind.IO
    persistent: bool = False
    done: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class DiskFaults:
    """What is wrong with a disk. Writes are counted from 1."""

    failures: tuple[Failure, ...] = ()
    lost: frozenset[int] = frozenset()  # writes that are answered well and never made
    misdirected: Mapping[int, int] = field(default_factory=dict)  # write -> block it lands on
    unreadable: frozenset[int] = frozenset()  # blocks; until they are written again
    room: int | None = None  # blocks there is room for under a thin disk
    read_only: bool = False
    latency: Mapping[Operation, Nanos] = field(default_factory=dict)


class Pending(NamedTuple):
    """A cached write that a power cut may lose."""

    number: int  # of the write, from 1
    block: int
    data: bytes


class Piece(NamedTuple):
    """Bytes `start` to `stop` of the pending write `which` reached the medium."""

    which: int  # index in Disk.pending
    start: int
    stop: int


Choice: TypeAlias = tuple[Piece, ...]
"""What of the cache reached the medium, in the order in which it did."""

NOTHING: Final[Choice] = ()


def choice_text(choice: Choice) -> str:
    """A choice on a command line: `0:0-512,2:0-100`, or `none`."""
    return ",".join(f"{index}:{start}-{stop}" for index, start, stop in choice) or "none"


def parse_choice(text: str) -> Choice:
    """The choice that `choice_text` wrote. ValueError for anything else."""
    if text == "none":
        return NOTHING
    pieces = []
    for word in text.split(","):
        index, _, span = word.partition(":")
        start, _, stop = span.partition("-")
        pieces.append(Piece(int(index), int(start), int(stop)))
    return tuple(pieces)


class Disk:
    """Blocks of abi.BLOCK_SIZE bytes, from 0; those never written are zeros and take no memory."""

    def __init__(
        self, block_count: int, content: bytes = b"", faults: DiskFaults | None = None
    ) -> None:
        assert 0 < block_count <= DISK_BLOCKS_MAX, block_count
        assert len(content) <= block_count * BLOCK_SIZE, "the content fits"
        self.block_count = block_count
        self.faults = faults or DiskFaults()
        self.done: dict[Operation, int] = dict.fromkeys(Operation, 0)  # also those that failed
        self._medium: dict[int, bytes] = {}
        self._pending: list[Pending] = []  # in the order of writing
        self._cached: dict[int, bytes] = {}  # what the pending writes come to, by block
        self._mended: set[int] = set()  # unreadable blocks that were written since
        for block, data in _blocks(0, content):
            if data != ZEROS:
                self._medium[block] = data

    # ------------------------------------------------------------ operations

    def read(self, block: int, count: int) -> bytes:
        """`count` blocks from `block` on, as they were last written. Raises DiskError."""
        self._begin(Operation.READ, block, count)
        for bad in self.faults.unreadable - self._mended:
            if block <= bad < block + count:
                raise DiskError(DiskErrorKind.IO)
        return self._join(range(block, block + count))

    def write(
        self, block: int, data: bytes | bytearray | memoryview, *, durable: bool = False
    ) -> None:
        """Write whole blocks, into the cache or with `durable` to the medium. Raises DiskError."""
        content = bytes(data)
        assert len(content) % BLOCK_SIZE == 0, "whole blocks"
        count = len(content) // BLOCK_SIZE
        if self.faults.read_only:
            self.done[Operation.WRITE] += 1
            raise DiskError(DiskErrorKind.READ_ONLY)
        try:
            self._begin(Operation.WRITE, block, count)
        except DiskError as error:
            failed = self._failure(Operation.WRITE)
            if error.kind is not DiskErrorKind.OUT_OF_RANGE and failed is not None and failed.done:
                self._store_part(block, content[: failed.done])
            raise
        number = self.done[Operation.WRITE]
        if number in self.faults.lost:
            return
        block = self.faults.misdirected.get(number, block)
        if block + count > self.block_count:
            return  # it landed outside, where nobody reads
        self._take_room(block, count)
        if durable:
            self._apply_durable(block, content)
        else:
            self._cache(block, content)

    def flush(self) -> None:
        """Everything written before is on the medium afterwards. Raises DiskError."""
        try:
            self._begin(Operation.FLUSH, 0, 0)
        except DiskError:
            self._forget()
            raise
        self._medium.update(self._cached)
        self._forget()

    def latency(self, operation: Operation) -> Nanos:
        """How long such an operation takes on this disk beyond what a disk takes."""
        return self.faults.latency.get(operation, Nanos(0))

    # ------------------------------------------------------------ what an explorer sees

    @property
    def pending(self) -> tuple[Pending, ...]:
        """The cached writes of this flush epoch, in the order of writing."""
        return tuple(self._pending)

    def image(self) -> bytes:
        """Everything, as it would be read now."""
        return self._join(range(self.block_count))

    def durable_image(self) -> bytes:
        """What is on the medium: what a power cut leaves for certain."""
        return b"".join(self._medium.get(block, ZEROS) for block in range(self.block_count))

    def copy(self) -> "Disk":
        """The same disk with the same cache, to try something on. Without its faults."""
        other = Disk(self.block_count)
        other.done = dict(self.done)
        other._medium = dict(self._medium)
        other._pending = list(self._pending)
        other._cached = dict(self._cached)
        return other

    def begin_write(self, block: int, data: bytes) -> int:
        """A write (durable or not) in whose midst the power is cut: its index for a Choice."""
        assert len(data) % BLOCK_SIZE == 0, "whole blocks"
        assert 0 <= block <= self.block_count - len(data) // BLOCK_SIZE
        self.done[Operation.WRITE] += 1
        self._pending.append(Pending(self.done[Operation.WRITE], block, data))
        self._cached.update(_blocks(block, data))
        return len(self._pending) - 1

    def survivors(self, choice: Choice, faults: DiskFaults | None = None) -> "Disk":
        """The disk after a power cut: the medium, and of the cache what the choice names.

        This disk stays as it is, so that other choices can be tried.
        """
        left = Disk(self.block_count, faults=faults)
        left._medium = dict(self._medium)
        for index, start, stop in choice:
            pending = self._pending[index]
            assert 0 <= start <= stop <= len(pending.data), "a part of the write"
            _overlay(left._medium, pending.block * BLOCK_SIZE + start, pending.data[start:stop])
        return left

    def drawn_choice(self, source: Random) -> Choice:
        """What a seed makes survive: each write or not, in any order, some of them torn."""
        kept = [index for index in range(len(self._pending)) if source.randrange(2)]
        source.shuffle(kept)
        pieces = []
        for index in kept:
            size = len(self._pending[index].data)
            start, stop = 0, size
            if size and not source.randrange(TORN_CHANCE):
                start, stop = sorted((source.randrange(size + 1), source.randrange(size + 1)))
            pieces.append(Piece(index, start, stop))
        return tuple(pieces)

    def rot(self, offset: int, mask: int = 1) -> None:
        """Flip the bits `mask` of the byte at `offset` of the disk, cached or not."""
        assert 0 < mask < 256
        block, at = divmod(offset, BLOCK_SIZE)
        assert 0 <= block < self.block_count
        for blocks in (self._medium, self._cached):
            if block in blocks or blocks is self._medium:
                data = bytearray(blocks.get(block, ZEROS))
                data[at] ^= mask
                blocks[block] = bytes(data)

    # ------------------------------------------------------------ inside

    def _begin(self, operation: Operation, block: int, count: int) -> None:
        self.done[operation] += 1
        if block < 0 or count < 0 or block + count > self.block_count:
            raise DiskError(DiskErrorKind.OUT_OF_RANGE)
        failure = self._failure(operation)
        if failure is not None:
            raise DiskError(failure.kind)

    def _failure(self, operation: Operation) -> Failure | None:
        number = self.done[operation]
        for failure in self.faults.failures:
            if failure.operation is operation and (
                number == failure.nth or (failure.persistent and number > failure.nth)
            ):
                return failure
        return None

    def _join(self, blocks: range) -> bytes:
        cached, medium = self._cached, self._medium
        return b"".join(
            cached[block] if block in cached else medium.get(block, ZEROS) for block in blocks
        )

    def _take_room(self, block: int, count: int) -> None:
        if self.faults.room is None:
            return
        new = sum(
            each not in self._medium and each not in self._cached
            for each in range(block, block + count)
        )
        held = len(self._medium) + sum(each not in self._medium for each in self._cached)
        if held + new > self.faults.room:
            raise DiskError(DiskErrorKind.NO_SPACE)

    def _cache(self, block: int, content: bytes) -> None:
        self._pending.append(Pending(self.done[Operation.WRITE], block, content))
        for each, data in _blocks(block, content):
            self._cached[each] = data
            self._mended.add(each)
        if len(self._cached) > CACHE_BLOCKS_MAX:
            oldest = self._pending.pop(0)
            self._medium.update(_blocks(oldest.block, oldest.data))
            self._settle()

    def _store_part(self, block: int, content: bytes) -> None:
        whole = -(-len(content) // BLOCK_SIZE)
        if block + whole <= self.block_count:
            old = self._join(range(block, block + whole))
            self._cache(block, content + old[len(content) :])

    def _apply_durable(self, block: int, content: bytes) -> None:
        """To the medium. An older cached write may not cover it later."""
        written = dict(_blocks(block, content))
        self._medium.update(written)
        self._mended.update(written)
        if not self._cached.keys().isdisjoint(written):
            self._pending = [
                part for pending in self._pending for part in _without(pending, written.keys())
            ]
            self._settle()

    def _settle(self) -> None:
        self._cached = {}
        for pending in self._pending:
            self._cached.update(_blocks(pending.block, pending.data))

    def _forget(self) -> None:
        self._pending.clear()
        self._cached.clear()


def _blocks(block: int, data: bytes) -> Iterator[tuple[int, bytes]]:
    """The blocks of a write, the last filled up with zeros."""
    for at in range(0, len(data), BLOCK_SIZE):
        piece = data[at : at + BLOCK_SIZE]
        yield block + at // BLOCK_SIZE, piece.ljust(BLOCK_SIZE, b"\0")


def _overlay(medium: dict[int, bytes], offset: int, data: bytes) -> None:
    """Put bytes on the medium at an offset that need not be a block's."""
    while data:
        block, at = divmod(offset, BLOCK_SIZE)
        piece = data[: BLOCK_SIZE - at]
        old = medium.get(block, ZEROS)
        medium[block] = old[:at] + piece + old[at + len(piece) :]
        offset += len(piece)
        data = data[len(piece) :]


def _without(pending: Pending, taken: Collection[int]) -> Iterator[Pending]:
    """The parts of a pending write outside the blocks that are taken."""
    start: int | None = None
    count = len(pending.data) // BLOCK_SIZE
    for index in range(count + 1):
        outside = index < count and pending.block + index not in taken
        if outside and start is None:
            start = index
        elif not outside and start is not None:
            data = pending.data[start * BLOCK_SIZE : index * BLOCK_SIZE]
            yield Pending(pending.number, pending.block + start, data)
            start = None
