"""The machines behind the transports, and behind the devices that the kernel drives itself.

A request takes virtual time and is done by an event of the clock, one after another. What a
planned fault does to it is decided when it is taken up.
"""

import struct
from collections.abc import Callable
from enum import IntEnum
from random import Random  # noqa: TID251 (handed in: a stream of the run's choices)
from typing import Final

from nexus.abi import BLOCK_SIZE, HardwareKind, Nanos, Status
from nexus.kernel.sim.clock import Clock
from nexus.kernel.sim.disk import Disk, DiskError, DiskErrorKind, Operation
from nexus.kernel.sim.faults import FaultPoint, Faults
from nexus.kernel.sim.power import Power
from nexus.kernel.sim.virtio import Broken, Chain, Finish, Memory

DRAW_TIME: Final = Nanos(20_000)  # ns; 256 bytes of QEMU's virtio-rng take a few times that
ENTROPY_QUEUE_COUNT_MAX: Final = 8  # as QEMU's
BLOCK_QUEUE_COUNT_MAX: Final = 128  # a transfer of the whole DMA area in pages, and its queue
REFUSAL_TIME: Final = Nanos(1_000)  # ns; a request that the disk never hears of
CONSTANT: Final = b"\xa5"  # what a stuck source delivers

FEATURE_READ_ONLY: Final = 1 << 5  # VIRTIO_BLK_F_RO
FEATURE_FLUSH: Final = 1 << 9  # VIRTIO_BLK_F_FLUSH

REQUEST: Final = struct.Struct("<IIQ")  # type, reserved, sector
STATUS_SIZE: Final = 1  # the last byte that the device writes

_ENTROPY_POINTS: Final = (
    FaultPoint.ENTROPY_SHORT,
    FaultPoint.ENTROPY_NONE,
    FaultPoint.ENTROPY_CONSTANT,
    FaultPoint.ENTROPY_REPEAT,
)
_BLOCK_POINTS: Final = (FaultPoint.BLOCK_ERROR, FaultPoint.SLOW_DISK, FaultPoint.LOST_COMPLETION)

Tell = Callable[[str, dict[str, object]], None]
"""What a machine reports as an event of kind DEVICE: what, and what goes with it."""

OnFault = Callable[[FaultPoint], None]


class RequestType(IntEnum):
    """Types of a virtio-blk request that the device knows."""

    IN = 0
    OUT = 1
    FLUSH = 4


class RequestStatus(IntEnum):
    """How a virtio-blk request ended."""

    OK = 0
    IO_ERROR = 1
    UNSUPPORTED = 2


class Source:
    """An entropy source, of the run's seeded chance."""

    device_id = int(HardwareKind.ENTROPY)
    features = 0
    queue_count_max = ENTROPY_QUEUE_COUNT_MAX
    config = b""

    def __init__(
        self,
        name: str,
        chance: Random,
        clock: Clock,
        faults: Faults | None,
        *,
        tell: Tell,
        on_fault: OnFault,
    ) -> None:
        self._name = name
        self._chance = chance
        self._clock = clock
        self._faults = faults
        self._tell = tell
        self._on_fault = on_fault
        self._last = b""  # for a source that repeats itself
        self._busy_until = Nanos(0)
        self._epoch = 0  # of resets

    def draw(self, size: int) -> bytes:
        """At most `size` bytes, as the source delivers them now."""
        points = self._points(_ENTROPY_POINTS)
        data = self._chance.randbytes(size)
        if FaultPoint.ENTROPY_REPEAT in points and self._last:
            data = (self._last * -(-size // len(self._last)))[:size]
        if FaultPoint.ENTROPY_CONSTANT in points:
            data = CONSTANT * size
        if FaultPoint.ENTROPY_SHORT in points:
            data = data[: size // 2]
        if FaultPoint.ENTROPY_NONE in points:
            data = b""
        self._last = data or self._last
        self._tell("draw", {"size": len(data)})
        return data

    def begin(self, chain: Chain, memory: Memory, features: int, finish: Finish) -> None:  # noqa: ARG002
        """Take up a request: memory to fill. Raises Broken."""
        if chain.readable or not chain.writable:
            raise Broken("a request for entropy is memory to write, and none to read")
        lost = FaultPoint.LOST_COMPLETION in self._points((FaultPoint.LOST_COMPLETION,))
        epoch = self._epoch

        def done() -> None:
            if epoch != self._epoch:
                return
            data = self.draw(chain.writable_size)
            scatter(memory, chain.writable, data)
            finish(None if lost else len(data))

        self._busy_until = Nanos(max(self._busy_until, self._clock.now) + DRAW_TIME)
        self._clock.call(self._busy_until, done)

    def reset(self) -> None:
        """Forget the requests that are not done."""
        self._epoch += 1

    def _points(self, points: tuple[FaultPoint, ...]) -> dict[FaultPoint, Nanos]:
        return points_of(self._faults, self._name, points, self._clock.now, self._on_fault)


TIMES: Final = {
    Operation.READ: Nanos(80_000),  # ns, of a good flash drive, whatever the size
    Operation.WRITE: Nanos(30_000),  # into its cache
    Operation.FLUSH: Nanos(500_000),
}
STATUS_OF: Final = {
    DiskErrorKind.IO: Status.DEVICE_FAILED,
    DiskErrorKind.NO_SPACE: Status.NO_SPACE,
    DiskErrorKind.READ_ONLY: Status.PERMISSION_DENIED,
    DiskErrorKind.OUT_OF_RANGE: Status.INVALID_ARGUMENT,
}

Answer = Callable[[bytes | Status], None]
"""Told how a disk operation ended: with these bytes, or why it failed."""


class Drive:
    """A block device over a Disk: one operation at a time, in the order they came."""

    device_id = int(HardwareKind.BLOCK)
    queue_count_max = BLOCK_QUEUE_COUNT_MAX

    def __init__(
        self,
        name: str,
        disk: Disk,
        power: Power,
        clock: Clock,
        faults: Faults | None,
        *,
        writable: bool,
        tell: Tell,
        on_fault: OnFault,
    ) -> None:
        self._name = name
        self.writable = writable and not disk.faults.read_only
        self.disk = disk
        self._power = power
        self._clock = clock
        self._faults = faults
        self._tell = tell
        self._on_fault = on_fault
        self._busy_until = Nanos(0)
        self._epoch = 0  # of resets
        self.features = FEATURE_FLUSH | (0 if self.writable else FEATURE_READ_ONLY)

    @property
    def config(self) -> bytes:
        """struct virtio_blk_config, as far as its fields were offered: the capacity."""
        return self.disk.block_count.to_bytes(8, "little")

    def reset(self) -> None:
        """Forget the operations that are not done."""
        self._epoch += 1

    # ---- as the kernel drives it

    def read(self, block: int, count: int, answer: Answer) -> None:
        """Read blocks."""
        self._start(Operation.READ, lambda: self.disk.read(block, count), answer)

    def write(
        self, block: int, data: Callable[[], bytes], answer: Answer, *, durable: bool
    ) -> None:
        """Write blocks; `data` is asked for when the device gets to it."""

        def work() -> bytes:
            self._power.write(self._name, self.disk, block, data(), durable=durable)
            return b""

        self._start(Operation.WRITE, work, answer)

    def flush(self, answer: Answer) -> None:
        """Make durable what was written."""

        def work() -> bytes:
            self._power.flush(self._name, self.disk)
            self._tell("flush", {})
            return b""

        self._start(Operation.FLUSH, work, answer)

    def _start(self, operation: Operation, work: Callable[[], bytes], answer: Answer) -> None:
        now = self._clock.now
        points = points_of(self._faults, self._name, _BLOCK_POINTS, now, self._on_fault)
        taken = (
            TIMES[operation] + self.disk.latency(operation) + points.get(FaultPoint.SLOW_DISK, 0)
        )
        self._busy_until = Nanos(max(self._busy_until, now) + taken)
        epoch = self._epoch

        def done() -> None:
            if epoch != self._epoch:
                return
            if FaultPoint.BLOCK_ERROR in points:
                ended: bytes | Status = Status.DEVICE_FAILED
            else:
                try:
                    ended = work()
                except DiskError as error:
                    ended = STATUS_OF[error.kind]
            if FaultPoint.LOST_COMPLETION not in points:
                answer(ended)

        self._clock.call(self._busy_until, done)

    # ---- behind its transport

    def begin(self, chain: Chain, memory: Memory, features: int, finish: Finish) -> None:
        """Take up a virtio-blk request. Raises Broken."""
        if chain.readable_size < REQUEST.size or chain.writable_size < STATUS_SIZE:
            raise Broken("a request without a header, or without a place for its status")
        header = gather(memory, chain.readable, 0, REQUEST.size)
        kind, _reserved, sector = REQUEST.unpack(header)
        sent, wanted = chain.readable_size - REQUEST.size, chain.writable_size - STATUS_SIZE

        def answer(ended: bytes | Status) -> None:
            if isinstance(ended, Status):
                reply(RequestStatus.IO_ERROR)
            else:
                reply(RequestStatus.OK, ended)

        def reply(status: RequestStatus, data: bytes = b"") -> None:
            if data:
                scatter(memory, chain.writable, data)
            scatter(memory, chain.writable, bytes([status]), chain.writable_size - STATUS_SIZE)
            finish(len(data) + STATUS_SIZE)

        # Until a driver has agreed on flushes, all that it writes is durable (5.2.6.2).
        durable = not features & FEATURE_FLUSH
        if kind == RequestType.IN and self._fits(sector, wanted) and not sent:
            self.read(sector, wanted // BLOCK_SIZE, answer)
        elif kind == RequestType.OUT and self._fits(sector, sent) and not wanted and self.writable:
            self.write(
                sector,
                lambda: gather(memory, chain.readable, REQUEST.size, sent),
                answer,
                durable=durable,
            )
        elif kind == RequestType.FLUSH and not durable and not sent and not wanted:
            self.flush(answer)
        else:
            known = kind in (RequestType.IN, RequestType.OUT)
            status = RequestStatus.IO_ERROR if known else RequestStatus.UNSUPPORTED
            epoch = self._epoch
            soon = Nanos(self._clock.now + REFUSAL_TIME)
            self._clock.call(soon, lambda: reply(status) if epoch == self._epoch else None)

    def _fits(self, sector: int, size: int) -> bool:
        whole = size > 0 and size % BLOCK_SIZE == 0
        return whole and sector + size // BLOCK_SIZE <= self.disk.block_count


def points_of(
    faults: Faults | None,
    name: str,
    points: tuple[FaultPoint, ...],
    now: Nanos,
    on_fault: OnFault,
) -> dict[FaultPoint, Nanos]:
    """What goes wrong with a request that is taken up now, and by how much."""
    if faults is None:
        return {}
    found = faults.of_request(name, points, now)
    for point in found:
        on_fault(point)
    return found


def gather(memory: Memory, pieces: tuple[tuple[int, int], ...], start: int, size: int) -> bytes:
    """`size` bytes of what stands in pieces of memory, from `start` on."""
    read = b"".join(memory.read(address, length) for address, length in pieces)
    return read[start : start + size]


def scatter(
    memory: Memory, pieces: tuple[tuple[int, int], ...], data: bytes, start: int = 0
) -> None:
    """Put bytes into pieces of memory, from `start` on."""
    for address, length in pieces:
        if start < length and data:
            part = data[: length - start]
            memory.write(address + start, part)
            data = data[len(part) :]
            start = 0
        else:
            start = max(start - length, 0)
