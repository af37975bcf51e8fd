"""A driver and a device that answers anything: a result within its bounds or a DeviceFault, and an
end in bounded time."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from nexus.abi import BLOCK_SIZE, Nanos
from nexus.drivers import REQUEST_MAX, DeviceFault, VirtioBlock, VirtioEntropy
from nexus.drivers import virtio as registers
from tests.fakes.virtio import START, FakeDisk, FakeEntropy, FakeVirtio, drive

REGISTERS = (
    registers.MAGIC_VALUE,
    registers.VERSION_VALUE,
    registers.DEVICE_ID,
    registers.DEVICE_FEATURES,
    registers.QUEUE_COUNT_MAX,
    registers.QUEUE_READY,
    registers.STATUS,
    registers.CONFIG_GENERATION,
    registers.CONFIG,
    registers.CONFIG + 4,
)
USED = registers.USED_AT
WORDS = st.integers(0, 0xFFFF_FFFF)
TRUTH = st.none()
# What a register reads as from the nth read on; None is what a true device says.
ANSWERS = st.dictionaries(
    st.sampled_from(REGISTERS),
    st.tuples(st.integers(0, 8), st.one_of(TRUTH, st.integers(0, 64), WORDS)),
    max_size=3,
)
# What the device scribbles into the queue's page and behind it, once it was notified.
SCRIBBLES = st.lists(
    st.tuples(
        st.one_of(st.integers(USED, USED + 40), st.integers(0, 3 * 4096 - 8)),
        st.binary(min_size=1, max_size=8),
    ),
    max_size=4,
)


def hostile(device: FakeVirtio, answers: Any, scribbles: Any) -> FakeVirtio:
    """`device`, made to answer so."""
    reads: dict[int, int] = {}
    read, notified = device.read, device._on_notify

    def answer(offset: int) -> int:
        reads[offset] = reads.get(offset, -1) + 1
        begin, value = answers.get(offset, (0, None))
        return read(offset) if value is None or reads[offset] < begin else int(value)

    def on_notify() -> None:
        notified()
        for offset, data in scribbles:
            device.memory[offset : offset + len(data)] = data

    device.read = answer  # type: ignore[method-assign]
    device._on_notify = on_notify  # type: ignore[method-assign]
    return device


@given(ANSWERS, SCRIBBLES, st.integers(1, 256))
def test_a_draw_from_any_device_is_within_bounds_or_a_fault(
    answers: Any, scribbles: Any, size: int
) -> None:
    device = hostile(FakeEntropy(entries_max=8), answers, scribbles)

    async def draws() -> list[bytearray]:
        driver = await VirtioEntropy.open(device, device.area)
        until = Nanos(START + REQUEST_MAX)
        return [await driver.draw(size, until) for _ in range(3)]

    try:
        drawn = drive(draws(), device)
    except DeviceFault:
        drawn = []

    assert all(len(each) <= size for each in drawn)
    assert device.now <= START + 4 * REQUEST_MAX


@given(ANSWERS, SCRIBBLES)
def test_blocks_of_any_device_are_whole_or_a_fault(answers: Any, scribbles: Any) -> None:
    device = hostile(FakeDisk(64, entries_max=8), answers, scribbles)

    async def transfers() -> list[bytes]:
        driver = await VirtioBlock.open(device, device.area)
        await driver.write(1, bytes(9 * BLOCK_SIZE), durable=True)
        return [await driver.read(0, 40), await driver.read(3, 1)]

    try:
        read = drive(transfers(), device)
    except DeviceFault:
        return
    finally:
        assert device.now <= START + 6 * REQUEST_MAX

    assert [len(each) for each in read] == [40 * BLOCK_SIZE, BLOCK_SIZE]
