"""The drivers over the kernel's traps, and how a buffer is filled."""

from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import pytest

from nexus.abi import (
    BLOCK_SIZE,
    BLOCK_TRANSFER_MAX,
    AbiError,
    BlockFlush,
    BlockRead,
    BlockWrite,
    CapInfo,
    CapKind,
    CapQuery,
    DeviceInfo,
    DeviceQuery,
    EntropyDraw,
    Nanos,
    Now,
    Rights,
    SleepUntil,
    Slot,
    Status,
    Trap,
)
from nexus.drivers import (
    DRAW_MAX,
    REQUEST_MAX,
    BlockDevice,
    DeviceFault,
    EntropyDevice,
    Fault,
    KernelBlock,
    KernelEntropy,
    fill,
    open_block,
    open_entropy,
)
from nexus.drivers.entropy import SHORT_MAX
from tests.fakes.source import ScriptedSource

SLOT = Slot(7)
START = Nanos(1_000)
FAR = Nanos(10**12)
DISK = DeviceInfo("disk", "file", 8_192, writable=True)
ROM = DISK._replace(writable=False)
RNG = DeviceInfo("rng", "hwrng", 0, writable=False)
ResultT = TypeVar("ResultT")


class Traps:
    """Answers traps: the clock by itself, the device's by `answer`."""

    def __init__(self, answer: Callable[[Trap[Any]], Any]) -> None:
        self.now = START
        self.seen: list[Trap[Any]] = []  # those of devices
        self._answer = answer

    def run(self, program: Coroutine[Trap[Any], Any, ResultT]) -> ResultT:
        value: Any = None
        error: AbiError | None = None
        while True:
            try:
                trap = program.send(value) if error is None else program.throw(error)
            except StopIteration as stop:
                result: ResultT = stop.value
                return result
            value, error = None, None
            match trap:
                case Now():
                    value = self.now
                case SleepUntil():
                    value = self.now = Nanos(max(self.now, trap.deadline))
                case _:
                    self.seen.append(trap)
                    try:
                        value = self._answer(trap)
                    except AbiError as refusal:
                        error = refusal


def refusing(status: Status) -> Traps:
    def answer(_trap: Trap[Any]) -> Any:
        raise AbiError(status)

    return Traps(answer)


def delivering(*parts: bytes) -> Traps:
    """An entropy source that has these at hand, one after another, and then nothing."""
    left = list(parts)
    return Traps(lambda _: left.pop(0) if left else b"")


def fault_of(run: Callable[[], Any]) -> Fault:
    with pytest.raises(DeviceFault) as caught:
        run()
    return caught.value.fault


# ---------------------------------------------------------------- blocks


def test_a_transfer_is_split_into_traps_of_what_one_may_move() -> None:
    blocks = BLOCK_TRANSFER_MAX // BLOCK_SIZE
    kernel = Traps(
        lambda trap: bytes(trap.count * BLOCK_SIZE) if isinstance(trap, BlockRead) else None
    )
    driver: BlockDevice = KernelBlock(SLOT, DISK)

    assert len(kernel.run(driver.read(3, 2 * blocks + 1))) == 2 * BLOCK_TRANSFER_MAX + BLOCK_SIZE
    kernel.run(driver.write(3, bytes(BLOCK_TRANSFER_MAX + BLOCK_SIZE)))

    reads = [(each.block, each.count) for each in kernel.seen if isinstance(each, BlockRead)]
    writes = [
        (each.block, len(each.data), each.durable)
        for each in kernel.seen
        if isinstance(each, BlockWrite)
    ]
    assert reads == [(3, blocks), (3 + blocks, blocks), (3 + 2 * blocks, 1)]
    assert writes == [(3, BLOCK_TRANSFER_MAX, False), (3 + blocks, BLOCK_SIZE, False)]


def test_a_durable_write_of_one_trap_says_so_and_one_of_several_is_flushed_once() -> None:
    kernel = Traps(lambda _: None)
    driver = KernelBlock(SLOT, DISK)

    kernel.run(driver.write(0, bytes(BLOCK_SIZE), durable=True))
    assert [type(each) for each in kernel.seen] == [BlockWrite]
    assert kernel.seen[0].durable  # type: ignore[attr-defined]

    kernel.seen.clear()
    kernel.run(driver.write(0, bytes(BLOCK_TRANSFER_MAX + BLOCK_SIZE), durable=True))
    assert [type(each) for each in kernel.seen] == [BlockWrite, BlockWrite, BlockFlush]
    assert not any(getattr(each, "durable", False) for each in kernel.seen)


def test_every_request_has_a_deadline() -> None:
    kernel = Traps(lambda trap: bytes(BLOCK_SIZE) if isinstance(trap, BlockRead) else None)
    driver = KernelBlock(SLOT, DISK)

    _ = kernel.run(driver.read(0, 1))
    kernel.run(driver.write(0, bytes(BLOCK_SIZE)))
    kernel.run(driver.flush())

    deadlines = {getattr(each, "deadline", None) for each in kernel.seen}
    assert deadlines == {START + REQUEST_MAX}


@pytest.mark.parametrize(
    ("status", "fault"),
    [
        (Status.DEVICE_FAILED, Fault.IO),
        (Status.TIMED_OUT, Fault.TIMED_OUT),
        (Status.NO_SPACE, Fault.NO_SPACE),
        (Status.INVALID_ARGUMENT, Fault.OUT_OF_RANGE),
    ],
)
def test_a_refusal_becomes_its_fault_and_nothing_is_repeated(status: Status, fault: Fault) -> None:
    kernel = refusing(status)
    driver = KernelBlock(SLOT, DISK)
    runs: list[Callable[[], Coroutine[Any, Any, Any]]] = [
        lambda: driver.read(0, 1),
        lambda: driver.write(0, bytes(BLOCK_TRANSFER_MAX + BLOCK_SIZE), durable=True),
        driver.flush,
    ]

    for run in runs:
        assert fault_of(lambda run=run: kernel.run(run())) is fault  # type: ignore[misc]
    assert len(kernel.seen) == len(runs)


def test_a_device_that_turned_read_only_is_told_apart_from_no_device() -> None:
    kernel = refusing(Status.PERMISSION_DENIED)
    driver = KernelBlock(SLOT, DISK)

    assert fault_of(lambda: kernel.run(driver.write(0, bytes(BLOCK_SIZE)))) is Fault.READ_ONLY
    with pytest.raises(AbiError):
        _ = kernel.run(driver.read(0, 1))


def test_a_read_only_device_is_not_even_asked_to_write() -> None:
    kernel = Traps(lambda _: None)
    driver = KernelBlock(SLOT, ROM)

    assert not driver.writable
    assert fault_of(lambda: kernel.run(driver.write(0, bytes(BLOCK_SIZE)))) is Fault.READ_ONLY
    assert fault_of(lambda: kernel.run(driver.flush())) is Fault.READ_ONLY
    assert kernel.seen == []


@pytest.mark.parametrize(("block", "count"), [(-1, 1), (0, 0), (8_192, 1), (8_191, 2)])
def test_blocks_outside_the_device_are_not_asked_for(block: int, count: int) -> None:
    kernel = Traps(lambda _: None)
    driver = KernelBlock(SLOT, DISK)

    assert fault_of(lambda: kernel.run(driver.read(block, count))) is Fault.OUT_OF_RANGE
    assert kernel.seen == []


# ---------------------------------------------------------------- entropy


def test_what_is_at_hand_is_gathered_until_there_is_enough() -> None:
    kernel = delivering(b"ab", b"", b"", b"c", b"defgh")
    driver: EntropyDevice = KernelEntropy(SLOT, RNG)

    assert kernel.run(driver.draw(8, FAR)) == b"abcdefgh"
    assert [each.size for each in kernel.seen if isinstance(each, EntropyDraw)] == [8, 6, 6, 6, 5]
    assert kernel.now > START, "it slept while there was nothing"


def test_what_came_in_time_is_a_short_delivery() -> None:
    kernel = delivering(b"abc")
    driver = KernelEntropy(SLOT, RNG)

    assert kernel.run(driver.draw(8, FAR)) == b"abc"
    assert kernel.now == START + DRAW_MAX


@pytest.mark.parametrize("deadline", [FAR, Nanos(START + 1_000)])
def test_nothing_in_time_is_a_time_out(deadline: Nanos) -> None:
    kernel = delivering()
    driver = KernelEntropy(SLOT, RNG)

    assert fault_of(lambda: kernel.run(driver.draw(8, deadline))) is Fault.TIMED_OUT
    assert kernel.now == min(deadline, START + DRAW_MAX)
    assert len(kernel.seen) < 200, "the pauses grow"


def test_a_source_that_delivers_more_than_asked_is_not_believed() -> None:
    kernel = delivering(bytes(9))

    assert fault_of(lambda: kernel.run(KernelEntropy(SLOT, RNG).draw(8, FAR))) is Fault.IO


def test_a_failing_source_is_a_fault() -> None:
    kernel = refusing(Status.DEVICE_FAILED)

    assert fault_of(lambda: kernel.run(KernelEntropy(SLOT, RNG).draw(8, FAR))) is Fault.IO


# ---------------------------------------------------------------- a whole buffer


def filled(source: ScriptedSource, size: int) -> tuple[bytearray, int]:
    buffer = bytearray(size)
    deliveries = Traps(lambda _: None).run(fill(source, buffer, FAR))
    return buffer, deliveries


def test_a_buffer_is_filled_by_as_many_draws_as_it_takes() -> None:
    source = ScriptedSource()

    buffer, deliveries = filled(source, 600)

    assert deliveries == 3
    assert buffer == source.stream


def test_short_deliveries_are_made_up_for_and_not_padded() -> None:
    source = ScriptedSource()
    source.lie = lambda data: data[: max(1, len(data) // 2)]

    buffer, deliveries = filled(source, 32)

    assert buffer == source.stream
    assert deliveries == 6


def test_more_short_deliveries_than_the_bound_are_a_fault() -> None:
    source = ScriptedSource()
    source.lie = lambda _: b""

    assert fault_of(lambda: filled(source, 32)) is Fault.IO
    assert source.drawn == SHORT_MAX + 1


# ---------------------------------------------------------------- which driver


@pytest.mark.parametrize(
    ("kind", "info", "driver"),
    [(CapKind.BLOCK, DISK, KernelBlock), (CapKind.ENTROPY, RNG, KernelEntropy)],
)
def test_the_capability_says_which_driver(kind: CapKind, info: DeviceInfo, driver: type) -> None:
    def answer(trap: Trap[Any]) -> Any:
        match trap:
            case CapQuery():
                return CapInfo(kind, Rights.MAP, 0)
            case DeviceQuery():
                return info
            case _:
                raise AssertionError(trap)

    opening = open_block if kind is CapKind.BLOCK else open_entropy
    other = open_entropy if kind is CapKind.BLOCK else open_block

    opened = Traps(answer).run(opening(SLOT))

    assert type(opened) is driver
    assert opened.backing == info.backing
    assert fault_of(lambda: Traps(answer).run(other(SLOT))) is Fault.REFUSED
