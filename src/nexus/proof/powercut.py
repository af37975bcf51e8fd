"""`nexus sim powercut state`: the power is cut everywhere, and nothing acknowledged is lost.

A workload runs on the store over a simulated disk. Before each write and each flush the disk's
cache is looked at, and for every way in which a power cut could leave the disk there (`choices`)
a store is opened on what would be left. It has to hold exactly what some prefix of the workload
had made, no shorter than what was acknowledged as durable: so nothing is lost, no half batch is
seen, nothing deleted returns, and request ids are remembered. A snapshot that is kept leads back to
exactly what was copied, also where the power goes while it does. Then it is written to and opened
again, so that nothing dropped comes back either; and in a part of the cases the power is cut once
more, at every operation of that recovery.

Every problem comes with the command that repeats it alone.
"""

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from random import Random  # noqa: TID251 (workloads and samples are drawn from the run's seed)
from typing import Final, NamedTuple, TypeAlias

from nexus.abi import BLOCK_SIZE
from nexus.drivers import DeviceFault, Fault, finished
from nexus.kernel.sim.disk import (
    NOTHING,
    Choice,
    Disk,
    DiskError,
    DiskErrorKind,
    Pending,
    Piece,
    choice_text,
    parse_choice,
)
from nexus.services.statefsd.engine import (
    Applied,
    Change,
    Damaged,
    Quota,
    Store,
    StoreFull,
    StoreLimits,
    Unopenable,
)
from nexus.services.statefsd.engine.limits import area_of
from nexus.services.statefsd.engine.snapshot import AREA as COPY_AREA
from nexus.services.statefsd.engine.snapshot import (
    HEAD,
    SnapshotDamaged,
    drop,
    head_of,
    restore,
    resume,
    take,
    take_again,
)
from nexus.services.statefsd.engine.snapshot import (
    State as CopyState,
)

AREAS: Final = (b"/state/a0/", b"/state/a1/")  # what workloads write into, and copy
KEYS_MAX: Final = 1000  # of a workload's store
COPIES_EVERY: Final = 7  # of so many cases with a snapshot one is cut again on the way back
DISK_BLOCKS: Final = 128  # 64 KiB, the smallest store: its ring is full after 32 small commits
SUBSETS_MAX: Final = 6  # pending writes of which every subset is tried
SUBSETS_SAMPLE: Final = 3  # the same, in a sample
DRAWN: Final = 16  # seeded choices where there are more pending writes, torn and reordered
SECOND_EVERY: Final = 41  # of so many cases one is cut again during its recovery
STEPS: Final = 60  # of a generated workload
SEEDS_DEFAULT: Final = 8
PROBLEMS_MAX: Final = 20  # a workload with more of them is left
GREEN, RED, USAGE = 0, 1, 2
PAGE: Final = "# Power cuts\n"

LIMITS: Final = StoreLimits(
    quota=Quota(size=1 << 30, keys=1 << 20),
    quotas={},
    reserves={},
    areas_max=4,
    clients_kept=2,
    requests_kept=4,
    lost_kept=4,
)

Content: TypeAlias = dict[bytes, bytes]


_FAULTS: Final[Mapping[DiskErrorKind, Fault]] = {
    DiskErrorKind.IO: Fault.IO,
    DiskErrorKind.NO_SPACE: Fault.NO_SPACE,
    DiskErrorKind.READ_ONLY: Fault.READ_ONLY,
    DiskErrorKind.OUT_OF_RANGE: Fault.OUT_OF_RANGE,
}


class DiskDevice:
    """A simulated disk as a drivers.BlockDevice, without kernel and driver between."""

    def __init__(self, disk: Disk) -> None:
        self.disk = disk

    @property
    def block_count(self) -> int:
        """How many blocks it has."""
        return self.disk.block_count

    @property
    def writable(self) -> bool:
        """Whether it can be written at all."""
        return not self.disk.faults.read_only

    async def read(self, block: int, count: int) -> bytes:
        """`count` blocks from `block` on."""
        try:
            return self.disk.read(block, count)
        except DiskError as error:
            raise DeviceFault(_FAULTS[error.kind]) from error

    async def write(
        self, block: int, data: bytes | bytearray | memoryview, *, durable: bool = False
    ) -> None:
        """Write whole blocks."""
        try:
            self.disk.write(block, data, durable=durable)
        except DiskError as error:
            raise DeviceFault(_FAULTS[error.kind]) from error

    async def flush(self) -> None:
        """Make everything durable."""
        try:
            self.disk.flush()
        except DiskError as error:
            raise DeviceFault(_FAULTS[error.kind]) from error


class Watched(DiskDevice):
    """Tells before each write and flush: its number from 1, and the disk in its midst."""

    def __init__(self, disk: Disk, watch: "Callable[[int, Disk, int | None], None]") -> None:
        super().__init__(disk)
        self.count = 0
        self._watch = watch

    async def write(
        self, block: int, data: bytes | bytearray | memoryview, *, durable: bool = False
    ) -> None:
        """Tell, then write."""
        self.count += 1
        trial = self.disk.copy()
        self._watch(self.count, trial, trial.begin_write(block, bytes(data)))
        await super().write(block, data, durable=durable)

    async def flush(self) -> None:
        """Tell, then flush."""
        self.count += 1
        self._watch(self.count, self.disk, None)
        await super().flush()


# ---------------------------------------------------------------- ways to lose a cache


def choices(
    pending: Sequence[Pending], current: int | None, subsets_max: int, source: Random
) -> Iterator[Choice]:
    """Ways in which a power cut leaves pending writes, the `current` one in its midst.

    Up to `subsets_max` others: every subset of them; above that none, all, each one missing, each
    one alone, every prefix and suffix. With each of these nothing or all of the current write;
    with none and with all of them also parts of it, and parts of each other. On top, DRAWN choices
    with any order and any tear.
    """
    others = [index for index in range(len(pending)) if index != current]
    whole = {index: Piece(index, 0, len(pending[index].data)) for index in range(len(pending))}
    now = [()] if current is None else [(), (whole[current],)]
    seen = set()
    for subset in _subsets(others, subsets_max):
        for tail in now:
            choice = (*(whole[index] for index in subset), *tail)
            seen.add(choice)
            yield choice
    everything = tuple(whole[index] for index in others)
    if len(everything) > 1:
        yield everything[::-1]
    if current is not None:
        for part in _parts(current, len(pending[current].data)):
            yield part
            if everything:
                yield (*everything, *part)
                yield (*part, *everything)
    for index in others[-subsets_max:]:
        rest = tuple(whole[other] for other in others if other != index)
        for part in _parts(index, len(pending[index].data)):
            yield (*rest, *part)
    if len(pending) > 2:
        for _ in range(DRAWN):
            yield _drawn(pending, source)


def _subsets(indexes: Sequence[int], subsets_max: int) -> Iterator[tuple[int, ...]]:
    count = len(indexes)
    if count <= subsets_max:
        for size in range(count + 1):
            yield from combinations(indexes, size)
        return
    seen: set[tuple[int, ...]] = set()
    for at in range(count + 1):
        for subset in (
            tuple(indexes[:at]),
            tuple(indexes[at:]),
            tuple(index for place, index in enumerate(indexes) if place != at),
            tuple(indexes[at : at + 1]),
        ):
            if subset not in seen:
                seen.add(subset)
                yield subset


def _parts(index: int, size: int) -> Iterator[Choice]:
    """Parts of a write: torn between sectors, inside the first and the last, and in its midst."""
    last = size - BLOCK_SIZE
    stops = {1, 4, 40, 61, 100, 200, BLOCK_SIZE - 1, BLOCK_SIZE, BLOCK_SIZE + 5, size // 2, last}
    stops |= {last + 1, last + 90, size - 1}
    for stop in sorted(stops):
        if 0 < stop < size:
            yield (Piece(index, 0, stop),)
    for start in sorted({4, 80, BLOCK_SIZE, size // 2, last}):
        if 0 < start < size:
            yield (Piece(index, start, size),)
    if size > 2 * BLOCK_SIZE:
        yield (Piece(index, 0, BLOCK_SIZE), Piece(index, last, size))
        yield (Piece(index, BLOCK_SIZE, last),)


def _drawn(pending: Sequence[Pending], source: Random) -> Choice:
    kept = [index for index in range(len(pending)) if source.randrange(3)]
    source.shuffle(kept)
    pieces = []
    for index in kept:
        size = len(pending[index].data)
        start, stop = 0, size
        if not source.randrange(4):
            start, stop = sorted((source.randrange(size + 1), source.randrange(size + 1)))
        pieces.append(Piece(index, start, stop))
    return tuple(pieces)


# ---------------------------------------------------------------- what a workload does


class Make(NamedTuple):
    """Stage changes in one request, and remember what they come to."""

    changes: tuple[Change, ...]
    client: int = 0
    request_id: int = 0


class Commit(NamedTuple):
    """Commit what is staged."""

    durable: bool


class Maintain(NamedTuple):
    """So many steps of tidying up."""

    steps: int


class Close(NamedTuple):
    """End in order, and open again."""


class Take(NamedTuple):
    """Copy what workloads write into."""


class TakeAgain(NamedTuple):
    """Take it again, as the boot does that may change what was copied."""


class GoBack(NamedTuple):
    """Go back to the copy."""


class Drop(NamedTuple):
    """Give the copy up."""


class Cut(NamedTuple):
    """Cut the power for good, with survivors drawn from `seed`, and go on from there."""

    seed: int


Step: TypeAlias = Make | Commit | Maintain | Close | Cut | Take | TakeAgain | GoBack | Drop
Script: TypeAlias = Callable[[Random], Iterator[Step]]

DURABLE: Final = Commit(durable=True)
ACCEPTED: Final = Commit(durable=False)


def _key(number: int) -> bytes:
    return b"/state/a%d/k%d" % (number % 2, number)


def _put(number: int, value: bytes) -> Change:
    return Change(_key(number), value)


def puts(source: Random) -> Iterator[Step]:
    """Durable puts, one commit each; the ring is used up twice over."""
    for _ in range(40):
        yield Make((_put(source.randrange(8), source.randbytes(source.randrange(400))),))
        yield DURABLE


def batches(source: Random) -> Iterator[Step]:
    """Batches of several blocks, accepted and durable."""
    for index in range(16):
        numbers = source.sample(range(8), source.randrange(2, 6))
        yield Make(tuple(_put(number, source.randbytes(260)) for number in numbers))
        yield DURABLE if index % 3 == 2 else ACCEPTED
    yield DURABLE


def deletes(source: Random) -> Iterator[Step]:
    """Everything that is put is deleted again, some of it in one batch."""
    for _ in range(5):
        for number in range(3):
            yield Make((_put(number, source.randbytes(90)),))
            yield DURABLE
        yield Make((Change(_key(0), None), Change(_key(1), None), _put(2, b"new")))
        yield DURABLE
        yield Make((Change(_key(2), None),))
        yield ACCEPTED
        yield DURABLE


def groups(source: Random) -> Iterator[Step]:
    """Several requests in one commit, with request ids."""
    for index in range(12):
        for _ in range(source.randrange(1, 5)):
            number = source.randrange(6)
            yield Make((_put(number, source.randbytes(70)),), client=7, request_id=index * 8 + 1)
        yield DURABLE if index % 2 else ACCEPTED
        if index % 4 == 3:
            yield Maintain(2)
    yield DURABLE


def compactions(source: Random) -> Iterator[Step]:
    """Checkpoints with commits between their steps."""
    for _ in range(3):
        for index in range(17):
            yield Make((_put(source.randrange(10), source.randbytes(200)),), 3, index + 1)
            yield DURABLE if index % 4 == 0 else ACCEPTED
        for _ in range(8):
            yield Maintain(1)
            yield Make((_put(source.randrange(10), source.randbytes(40)),))
            yield ACCEPTED
    yield DURABLE


def restarts(source: Random) -> Iterator[Step]:
    """Power cuts and orderly ends between the writes: what was dropped stands in the ring."""
    for index in range(10):
        for _ in range(source.randrange(1, 6)):
            yield Make((_put(source.randrange(5), source.randbytes(source.randrange(150))),))
            yield DURABLE if source.randrange(3) == 0 else ACCEPTED
        yield Close() if index % 3 == 2 else Cut(source.randrange(1 << 30))


def full(source: Random) -> Iterator[Step]:
    """A store filled to the brim, deletions in it, and filled again."""
    for _ in range(2):
        for number in range(14):
            yield Make((_put(number, source.randbytes(3500)),))
            yield DURABLE
        yield Make(tuple(Change(_key(number), None) for number in range(0, 14, 2)))
        yield DURABLE
        yield Maintain(4)


def snapshots(source: Random) -> Iterator[Step]:
    """Copies that are taken, gone back to and given up, with changes of any kind between."""
    for round_ in range(3):
        for number in range(6):
            yield Make((_put(number, source.randbytes(source.choice((20, 300, 700)))),))
        yield DURABLE
        yield Take()
        if round_:
            yield Make((_put(0, b"late"), _put(7, source.randbytes(200))))
            yield ACCEPTED
            yield TakeAgain()
        yield Make((_put(0, source.randbytes(900)), Change(_key(1), None), _put(9, b"new")))
        yield Make((_put(2, b""), Change(b"/state/b/other", source.randbytes(50))))
        yield DURABLE if round_ % 2 else ACCEPTED
        if round_ < 2:
            yield GoBack()
            yield Make((_put(4, b"after"),))
            yield DURABLE
        yield Drop()


def mixed(source: Random) -> Iterator[Step]:
    """Anything, as the seed has it."""
    request = 0
    for _ in range(STEPS):
        drawn = source.randrange(20)
        if drawn < 12:
            count = source.choice((1, 1, 1, 2, 5))
            numbers = source.sample(range(9), count)
            client, request_id = 0, 0
            if source.randrange(3) == 0:
                request += 1
                client, request_id = source.randrange(1, 3), request
            yield Make(
                tuple(
                    Change(_key(number), None)
                    if source.randrange(4) == 0
                    else _put(number, source.randbytes(source.choice((0, 9, 120, 450, 900))))
                    for number in numbers
                ),
                client,
                request_id,
            )
            if source.randrange(2):
                yield Commit(durable=bool(source.randrange(2)))
        elif drawn < 15:
            yield Commit(durable=bool(source.randrange(2)))
        elif drawn < 18:
            yield Maintain(source.randrange(1, 4))
        elif drawn == 18:
            yield Close()
        else:
            yield Cut(source.randrange(1 << 30))
    yield DURABLE


WORKLOADS: Final[Mapping[str, Script]] = {
    script.__name__: script
    for script in (puts, batches, deletes, groups, compactions, restarts, full, snapshots, mixed)
}
SCRIPTED: Final = tuple(name for name in WORKLOADS if name != "mixed")


# ---------------------------------------------------------------- what has to hold


class State(NamedTuple):
    """What a prefix of the workload comes to."""

    sequence: int
    content: Content
    requests: Mapping[tuple[int, int], int]  # client and request id -> sequence


@dataclass(slots=True)
class Model:
    """What a workload has made: every prefix of it that a power cut may leave."""

    states: list[State] = field(default_factory=lambda: [State(0, {}, {})])
    durable: int = 0  # index of the state that was acknowledged as durable

    def on_staged(self, step: Make, sequence: int) -> None:
        """The store took a request."""
        last = self.states[-1]
        content = dict(last.content)
        for key, value in step.changes:
            if value is None:
                _ = content.pop(key, None)
            else:
                content[key] = value
        requests = last.requests
        if step.request_id:
            name = (step.client, step.request_id)
            requests = {each: at for each, at in requests.items() if each != name}
            requests[name] = sequence
        self.states.append(State(sequence, content, requests))

    def find(self, sequence: int) -> int | None:
        """The latest state with this sequence."""
        for index in range(len(self.states) - 1, -1, -1):
            if self.states[index].sequence == sequence:
                return index
        return None

    def problem(self, store: Store) -> str | None:
        """What is wrong with a store that was opened on what a power cut left."""
        if store.lost_count:
            return f"loss: the store says that it lost {store.lost_count} records: {store.lost}"
        index = self.find(store.sequence)
        if index is None:
            return f"half a commit is seen: no request ended at {store.sequence}"
        state = self.states[index]
        if index < self.durable:
            return (
                f"loss: sequence {self.states[self.durable].sequence} was durable, "
                f"{store.sequence} is left"
            )
        wrong = content_problem(store, state.content)
        return wrong or self._requests_problem(store, index)

    def _requests_problem(self, store: Store, index: int) -> str | None:
        requests = self.states[index].requests
        latest: dict[int, list[tuple[int, int]]] = {}
        for (client, request_id), sequence in requests.items():
            latest.setdefault(client, []).append((request_id, sequence))
        for client, applied in latest.items():
            for request_id, sequence in applied[-LIMITS.requests_kept :]:
                found = store.applied(client, request_id)
                if found is None or found.sequence != sequence:
                    return f"request {request_id} of {client} would be applied twice: {found}"
        for client, request_id in self.states[-1].requests.keys() - requests.keys():
            if store.applied(client, request_id) is not None:
                return f"request {request_id} of {client} is remembered, and was not made"
        return None


def content_problem(store: Store, content: Content) -> str | None:
    """How a store differs from what it should hold."""
    keys, more = store.keys(b"/state/", b"", len(content) + 1, lambda _: True)
    if more or keys != sorted(content):
        missing, extra = sorted(content.keys() - set(keys)), sorted(set(keys) - content.keys())
        return f"keys missing: {missing[:4]}, keys that should not be there: {extra[:4]}"
    for key, value in content.items():
        try:
            entry = finished(store.get(key))
        except Damaged as error:
            return f"loss: {key!r}: {error}"
        if entry is None or entry.value != value:
            return f"loss: another value of {key!r}"
    if store.key_count != len(content):
        return f"{store.key_count} keys are counted, {len(content)} are there"
    return None


class Recorded(Store):
    """A store that tells what is staged and what is durable, whoever asks for it."""

    model: Model | None = None

    def stage(
        self,
        changes: Iterable[Change],
        *,
        client: int = 0,
        request_id: int = 0,
        within_quota: bool = True,
    ) -> Applied:
        """Stage, then tell."""
        made = tuple(changes)
        applied = super().stage(
            made, client=client, request_id=request_id, within_quota=within_quota
        )
        if self.model is not None and not applied.repeated:
            self.model.on_staged(Make(made, client, request_id), applied.sequence)
        return applied

    async def commit(self, durable: bool) -> None:
        """Commit, then tell."""
        await super().commit(durable)
        if self.model is not None and durable:
            self.model.durable = len(self.model.states) - 1


class Way(NamedTuple):
    """What recovery has to make of a state: the snapshot to go back to, and the content then."""

    number: int
    content: Content
    again: bool = False  # the copy was being taken again


# ---------------------------------------------------------------- the explorer


class Problem(NamedTuple):
    """Something that must not be, and how to see it again."""

    kind: str  # "brick" or "loss"
    what: str
    command: str


class Target(NamedTuple):
    """The one case that is to be repeated."""

    cut: int
    choice: Choice
    second: int | None
    second_choice: Choice | None


@dataclass(kw_only=True, slots=True)
class Explored:
    """What came of one workload with one seed."""

    workload: str
    seed: int
    operations: int = 0  # writes and flushes, each a cut point
    cases: int = 0  # ways to leave the disk, each opened
    second_cuts: int = 0  # cut points during recoveries
    pending_max: int = 0
    compactions: int = 0
    problems: list[Problem] = field(default_factory=list)


class Explorer:
    """Runs one workload, and opens what every power cut would leave."""

    def __init__(
        self,
        workload: str,
        seed: int,
        *,
        subsets_max: int = SUBSETS_MAX,
        every: int = 1,
        target: Target | None = None,
    ) -> None:
        self.explored = Explored(workload=workload, seed=seed)
        self._script = WORKLOADS[workload]
        self._source = Random(f"nexus.powercut.{workload}.{seed}")  # noqa: S311 (no keys)
        self._drawn = Random(f"nexus.powercut.choices.{workload}.{seed}")  # noqa: S311
        self._subsets_max = subsets_max
        self._every = every  # of so many cases one is opened: a sample
        self._target = target
        self._model = Model()
        self._copied: Content = {}  # the latest snapshot's, of all areas
        self._going_back = 0  # the snapshot that the workload goes back to just now
        self._count = 0

    def run(self) -> Explored:
        """Everything; the workload ends early only with PROBLEMS_MAX problems."""
        device = Watched(Disk(DISK_BLOCKS), self._at)
        store = self._open_recorded(device)
        for step in self._script(self._source):
            if len(self.explored.problems) >= PROBLEMS_MAX:
                break
            match step:
                case Make():
                    self._make(store, step)
                case Commit(durable):
                    finished(store.commit(durable))
                case Maintain(steps):
                    for _ in range(steps):
                        if not finished(store.maintain()):
                            break
                case Close():
                    finished(store.close())
                    self._model.durable = len(self._model.states) - 1
                    store = self._open_recorded(device)
                case Take():
                    self._copied = _without_copy(self._model.states[-1].content)
                    _ = finished(take(store, AREAS))
                case TakeAgain():
                    self._copied = _without_copy(self._model.states[-1].content)
                    _ = finished(take_again(store, finished(head_of(store)).number))
                case GoBack():
                    head = finished(head_of(store))
                    self._going_back = head.number
                    _ = finished(restore(store, head.number))
                    self._going_back = 0
                case Drop():
                    _ = finished(drop(store, finished(head_of(store)).number))
                case Cut(seed):
                    left = device.disk.survivors(device.disk.drawn_choice(Random(seed)))  # noqa: S311
                    device.disk = left
                    store = self._open_recorded(device)
                    if not self._go_on(store):
                        break
        self.explored.operations = device.count
        self.explored.compactions = store.compactions
        return self.explored

    def _open_recorded(self, device: DiskDevice) -> Recorded:
        store = finished(Recorded.open(device, LIMITS))
        assert isinstance(store, Recorded), "it is opened as what it is"
        store.model = self._model
        return store

    def _make(self, store: Store, step: Make) -> None:
        with suppress(StoreFull):
            _ = store.stage(step.changes, client=step.client, request_id=step.request_id)

    def _go_on(self, store: Store) -> bool:
        """The workload goes on after a cut of its own, from the state that is left."""
        problem = self._model.problem(store)
        if problem is not None:
            self._report("loss", problem, "")
            return False
        index = self._model.find(store.sequence)
        assert index is not None, "no problem was found"
        del self._model.states[index + 1 :]
        self._model.durable = index
        return True

    def _at(self, cut: int, disk: Disk, current: int | None) -> None:
        """Every power cut at an operation of the workload."""
        if self._target is not None:
            if cut == self._target.cut:
                self._open(cut, disk, self._target.choice)
            return
        pending = disk.pending
        self.explored.pending_max = max(self.explored.pending_max, len(pending))
        for choice in choices(pending, current, self._subsets_max, self._drawn):
            self._count += 1
            if self._count % self._every:
                continue
            if len(self.explored.problems) >= PROBLEMS_MAX:
                return
            self._open(cut, disk, choice)

    def _open(self, cut: int, disk: Disk, choice: Choice) -> None:
        """Open what is left, look at it, write to it, and open it again."""
        self.explored.cases += 1
        target = self._target
        case = f"--cut {cut} --choice {choice_text(choice)}"
        if target is None or target.second is None:
            self._judge(disk.survivors(choice), case)
        second = target is None and self.explored.cases % SECOND_EVERY == 0
        if second or (target is not None and target.second is not None):
            self._cut_again(disk.survivors(choice), case)

    def _cut_again(self, disk: Disk, case: str) -> None:
        """The power is cut at every operation of the recovery, and of what tidying up follows."""
        target = self._target

        def at(cut: int, trial: Disk, current: int | None) -> None:
            self.explored.second_cuts += 1
            if target is not None and target.second is not None:
                if cut == target.second and target.second_choice is not None:
                    again = f"{case} --second {cut} --then {choice_text(target.second_choice)}"
                    self._judge(trial.survivors(target.second_choice), again)
                return
            for then in choices(trial.pending, current, 1, self._drawn):
                again = f"{case} --second {cut} --then {choice_text(then)}"
                self._judge(trial.survivors(then), again)

        device = Watched(disk, at)
        try:
            store = finished(Store.open(device, LIMITS))
            for _ in range(4):
                if not finished(store.maintain()):
                    break
        except (Unopenable, DeviceFault) as error:
            self._report("brick", repr(error), case)

    def _judge(self, disk: Disk, case: str) -> None:
        model = self._model
        device = DiskDevice(disk)
        try:
            store = finished(Store.open(device, LIMITS))
        except (Unopenable, DeviceFault) as error:
            self._report("brick", repr(error), case)
            return
        problem = model.problem(store)
        way = None if problem is not None else self._way(store)
        if way is not None:
            problem = _recovered(disk.copy(), way)
            if problem is None and way.again:
                problem = _taken_again(disk.copy(), way)
            if not self._target and self.explored.cases % COPIES_EVERY == 0:
                self._cut_on_the_way(disk.copy(), way, case)
        if problem is None:
            problem = _write_on(device, store, model)
        if problem is not None:
            self._report("loss", problem, case)

    def _way(self, store: Store) -> Way | None:
        """What recovery has to make of a store that is as some prefix of the workload left it."""
        index = self._model.find(store.sequence)
        assert index is not None, "no problem was found"
        head = finished(head_of(store))
        if head.state is CopyState.NONE:
            return None
        content = _without_copy(self._model.states[index].content)
        if head.state is CopyState.TAKING_AGAIN:
            return Way(head.number, content, again=True)
        going_back = self._going_back == head.number or head.state is CopyState.RESTORING
        if not head.is_kept or head.state is CopyState.RESTORED or not going_back:
            return Way(0, content)
        others = {key: value for key, value in content.items() if area_of(key) not in AREAS}
        copied = {key: value for key, value in self._copied.items() if area_of(key) in AREAS}
        return Way(head.number, {**others, **copied})

    def _cut_on_the_way(self, disk: Disk, way: Way, case: str) -> None:
        """The power is cut at every operation of the way back; the next boot goes it again."""

        def at(cut: int, trial: Disk, current: int | None) -> None:
            self.explored.second_cuts += 1
            for then in choices(trial.pending, current, 1, self._drawn):
                problem = _recovered(trial.survivors(then), way)
                if problem is not None:
                    what = f"after a cut at operation {cut} of the way back, {choice_text(then)}"
                    self._report("loss", f"{problem}, {what}", case)

        device = Watched(disk, at)
        _ = finished(resume(finished(Store.open(device, LIMITS)), way.number))

    def _report(self, kind: str, what: str, case: str) -> None:
        explored = self.explored
        command = f"nexus sim powercut state --workload {explored.workload} --seed {explored.seed}"
        if self._subsets_max != SUBSETS_MAX:
            command += f" --subsets {self._subsets_max}"
        explored.problems.append(Problem(kind, what, f"{command} {case}".rstrip()))


def _without_copy(content: Content) -> Content:
    """The content but for the pages of a snapshot."""
    return {key: value for key, value in content.items() if area_of(key) != COPY_AREA}


def _recovered(disk: Disk, way: Way) -> str | None:
    """What is wrong with a store that was opened and brought back, as statefsd begins."""
    try:
        store = finished(Store.open(DiskDevice(disk), LIMITS))
        head = finished(resume(store, way.number))
    except (Unopenable, DeviceFault, SnapshotDamaged, StoreFull) as error:
        return f"loss: the way back is closed: {error!r}"
    keys, more = store.keys(b"/state/", b"", KEYS_MAX, lambda _: True)
    assert not more, "workloads are small"
    found: Content = {}
    pages = 0
    for key in keys:
        if area_of(key) == COPY_AREA:
            pages += key != HEAD
            continue
        entry = finished(store.get(key))
        assert entry is not None, "a key that is listed is there"
        found[key] = entry.value
    if found != way.content:
        keys_known = found.keys() | way.content.keys()
        wrong = {key for key in keys_known if found.get(key) != way.content.get(key)}
        return f"loss: not what was copied: {sorted(wrong)[:4]}"
    if pages != head.pages:
        return f"{pages} pages are left of a snapshot of {head.pages}"
    if way.number and head.state is not CopyState.RESTORED:
        return f"the way back is not gone to its end: {head.state.name}"
    return None


def _taken_again(disk: Disk, way: Way) -> str | None:
    """What is wrong with a trial whose first boot was cut off, once the next one has migrated."""
    store = finished(Store.open(DiskDevice(disk), LIMITS))
    _ = finished(resume(store))
    _ = finished(take_again(store, way.number))
    _ = store.stage([_put(0, b"migrated"), Change(_key(3), None)])
    finished(store.commit(True))
    return _recovered(disk, way)


def _write_on(device: DiskDevice, store: Store, model: Model) -> str | None:
    """A put on a store that came through, and what it holds when it is opened once more."""
    index = model.find(store.sequence)
    assert index is not None, "no problem was found"
    content = dict(model.states[index].content)
    change = Change(b"/state/a0/after", b"the power came back")
    try:
        _ = store.stage([change])
    except StoreFull:
        change = Change(next(iter(content)), None)
        _ = store.stage([change])
    finished(store.commit(True))
    if change.value is None:
        del content[change.key]
    else:
        content[change.key] = change.value
    again = finished(Store.open(DiskDevice(device.disk.survivors(NOTHING)), LIMITS))
    if again.lost_count:
        return f"loss, after the next write: {again.lost}"
    if again.sequence != store.sequence:
        return f"after the next write there are {again.sequence} changes, not {store.sequence}"
    problem = content_problem(again, content)
    return None if problem is None else f"after the next write: {problem}"


# ---------------------------------------------------------------- the report


@dataclass(kw_only=True, slots=True)
class PowercutReport:
    """Everything a run explored."""

    subsets_max: int
    every: int
    explored: list[Explored] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def problems(self) -> list[Problem]:
        """Every problem of every workload."""
        return [problem for each in self.explored for problem in each.problems]

    @property
    def losses(self) -> int:
        """Cases after which something was not as it was acknowledged."""
        return sum(problem.kind == "loss" for problem in self.problems)

    @property
    def bricks(self) -> int:
        """Cases after which the store did not open."""
        return sum(problem.kind == "brick" for problem in self.problems)

    @property
    def cut_points(self) -> int:
        """Writes and flushes at which the power was cut."""
        return sum(each.operations for each in self.explored)

    @property
    def cases(self) -> int:
        """Ways to leave the disk that were opened."""
        return sum(each.cases for each in self.explored)

    @property
    def exit_code(self) -> int:
        """0 without a problem; 1 also if nothing was explored."""
        return GREEN if self.cases and not self.problems else RED

    def document(self) -> str:
        """The report in figures, as JSON, with the command that repeats each problem."""
        figures = {
            "cut_points": self.cut_points,
            "cases": self.cases,
            "second_cuts": sum(each.second_cuts for each in self.explored),
            "losses": self.losses,
            "bricks": self.bricks,
            "seconds": round(self.seconds, 3),
            "problems": [
                {"kind": each.kind, "what": each.what, "command": each.command}
                for each in self.problems[:PROBLEMS_MAX]
            ],
        }
        return json.dumps(figures, indent=2) + "\n"

    def lines(self) -> Iterator[str]:
        """The report, as Markdown."""
        second = sum(each.second_cuts for each in self.explored)
        yield (
            f"{self.cut_points} cut points, {self.cases} cases opened, {second} cuts during a "
            f"recovery: {self.losses} losses, {self.bricks} bricks."
        )
        yield ""
        yield (
            "The power is cut before, inside and after every write and at every flush, on a disk "
            f"of {DISK_BLOCKS} blocks of {BLOCK_SIZE} bytes."
        )
        yield (
            f"Bound: of up to {self.subsets_max} pending writes every subset survives; of more, "
            "none, all, each alone, each missing, every prefix and every suffix; and where there "
            f"are more than two, {DRAWN} seeded ones with any order and any tear."
        )
        yield (
            "The write in progress survives not, wholly, or in up to 20 parts, and so does each of "
            f"the last {self.subsets_max} pending ones."
        )
        if self.every > 1:
            yield f"Of {self.every} cases one is opened: this is a sample."
        yield (
            f"In one of {SECOND_EVERY} cases the power is cut again at every operation of the "
            "recovery and of four steps of tidying up."
        )
        yield ""
        yield "| workload | seeds | cut points | cases | second cuts | pending, most | problems |"
        yield "|---|--:|--:|--:|--:|--:|--:|"
        for name in dict.fromkeys(each.workload for each in self.explored):
            rows = [each for each in self.explored if each.workload == name]
            yield (
                f"| {name} | {len(rows)} | {sum(each.operations for each in rows)} "
                f"| {sum(each.cases for each in rows)} | {sum(each.second_cuts for each in rows)} "
                f"| {max(each.pending_max for each in rows)} "
                f"| {sum(len(each.problems) for each in rows)} |"
            )
        if self.problems:
            yield ""
        for problem in self.problems[:PROBLEMS_MAX]:
            yield f"- {problem.kind}: {problem.what}: `{problem.command}`"


def explore(
    workloads: Sequence[str],
    seeds: Sequence[int],
    *,
    subsets_max: int = SUBSETS_MAX,
    every: int = 1,
    target: Target | None = None,
    progress: Callable[[Explored], None] | None = None,
) -> PowercutReport:
    """Explore these workloads with these seeds, each with each."""
    report = PowercutReport(subsets_max=subsets_max, every=every)
    start = time.monotonic_ns()
    for workload in workloads:
        for seed in seeds:
            explorer = Explorer(workload, seed, subsets_max=subsets_max, every=every, target=target)
            report.explored.append(explorer.run())
            if progress is not None:
                progress(report.explored[-1])
    report.seconds = (time.monotonic_ns() - start) / 1e9
    return report


def _whole(text: str, least: int = 0) -> int:
    """A number of the command line. Raises ArgumentTypeError."""
    if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least {least}")
    return int(text)


def _positive(text: str) -> int:
    return _whole(text, 1)


def main(argv: Sequence[str]) -> int:
    """`nexus sim powercut state` with these arguments: run, print, and the exit code."""
    parser = argparse.ArgumentParser(
        prog="nexus sim powercut state", description=__doc__.split("\n")[0]
    )
    _ = parser.add_argument("--workload", choices=(*WORKLOADS, "all"), default="all")
    _ = parser.add_argument("--seed", type=_whole, help="one seed alone")
    _ = parser.add_argument(
        "--seeds", type=_positive, default=SEEDS_DEFAULT, help="of the mixed one"
    )
    _ = parser.add_argument(
        "--subsets", type=_whole, default=SUBSETS_MAX, help="bound of the subsets"
    )
    _ = parser.add_argument("--every", type=_positive, default=1, help="open one of so many cases")
    _ = parser.add_argument("--cut", type=_whole, help="repeat: the operation")
    _ = parser.add_argument("--choice", type=parse_choice, help="repeat: what survives")
    _ = parser.add_argument("--second", type=_whole, help="repeat: the operation of the recovery")
    _ = parser.add_argument("--then", type=parse_choice, help="repeat: what survives of that")
    _ = parser.add_argument("--report", type=Path, help="write the report as Markdown here")
    _ = parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(list(argv))
    if options.report is not None:
        # Before the exploration, which takes minutes.
        try:
            options.report.open("a").close()
        except OSError as error:
            parser.error(f"cannot write {options.report}: {error.strerror or error}")
    target = None
    if options.cut is not None or options.choice is not None:
        if options.cut is None or options.choice is None or options.workload == "all":
            parser.error("to repeat a case say --workload, --seed, --cut and --choice")
        if (options.second is None) != (options.then is None):
            parser.error("to repeat a second cut say --second and --then")
        target = Target(options.cut, options.choice, options.second, options.then)
    report = explore_all(
        options.workload,
        options.seed,
        seeds=options.seeds,
        subsets_max=options.subsets,
        every=options.every,
        target=target,
    )
    text = PAGE + "\n" + "\n".join(report.lines()) + "\n"
    if options.report is not None:
        _ = options.report.write_text(text, encoding="utf-8")
    _ = sys.stdout.write(report.document() if options.json else text)
    return report.exit_code


def explore_all(
    workload: str = "all",
    seed: int | None = None,
    *,
    seeds: int = SEEDS_DEFAULT,
    subsets_max: int = SUBSETS_MAX,
    every: int = 1,
    target: Target | None = None,
) -> PowercutReport:
    """One workload, or all: the scripted ones with one seed, the generated one with `seeds`."""
    report = PowercutReport(subsets_max=subsets_max, every=every)
    for name in WORKLOADS if workload == "all" else (workload,):
        chosen = [1 if seed is None else seed]
        if name == "mixed" and seed is None:
            chosen = list(range(1, seeds + 1))
        part = explore([name], chosen, subsets_max=subsets_max, every=every, target=target)
        report.explored += part.explored
        report.seconds += part.seconds
    return report


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
