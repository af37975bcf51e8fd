"""The drivers on the simulated bus: over a device's registers, and over the kernel's traps."""

from collections.abc import Callable
from typing import Any

import pytest

from nexus.abi import BLOCK_SIZE, BootImage, Nanos, Now
from nexus.drivers import (
    DeviceFault,
    Fault,
    KernelBlock,
    KernelEntropy,
    VirtioBlock,
    VirtioEntropy,
    open_block,
    open_entropy,
)
from nexus.kernel.sim import FaultPoint, Faults, NthRequest, Plan
from nexus.kernel.sim.disk import Disk
from tests.fakes.registers import BLOCKS, DISK, RNG, Bench

pytestmark = pytest.mark.sim

SECOND = 1_000_000_000
COUNT = min(BLOCKS - 1, 255)  # more than one request of a driver takes
DATA = b"".join(bytes([number % 251]) * BLOCK_SIZE for number in range(COUNT))
MakeBench = Callable[..., Bench]


@pytest.fixture(params=["window", "driven"])
def bench(request: Any) -> MakeBench:
    """Makes a kernel, one for either way to reach a device."""

    def make(*faults: NthRequest, **options: Any) -> Bench:
        driven = {"disk", "rng"} if request.param == "driven" else set()
        plan = Faults(Plan(requests=faults)) if faults else None
        return Bench(DISK, RNG, kernel_driven=driven, faults=plan, **options)

    return make


async def fault_in(operation: Any) -> Fault:
    """How an operation fails."""
    try:
        _ = await operation
    except DeviceFault as error:
        return error.fault
    raise AssertionError("it does not fail")


def test_what_is_written_is_read_again_and_stands_on_the_disk(bench: MakeBench) -> None:
    async def holder(boot: BootImage) -> None:
        disk = await open_block(boot.hardware[0])
        assert isinstance(disk, VirtioBlock | KernelBlock)
        assert disk.writable
        assert disk.block_count == BLOCKS
        await disk.write(1, DATA)
        assert await disk.read(1, COUNT) == DATA
        assert await disk.read(0, 1) == bytes(BLOCK_SIZE)
        await disk.flush()

    disk = Disk(BLOCKS)
    bench(disks={"disk": disk}).run(holder, on="disk")

    assert disk.durable_image()[BLOCK_SIZE : (1 + COUNT) * BLOCK_SIZE] == DATA


def test_a_durable_write_stands_on_the_medium_and_a_plain_one_need_not(bench: MakeBench) -> None:
    async def holder(boot: BootImage) -> None:
        disk = await open_block(boot.hardware[0])
        await disk.write(1, b"\x01" * BLOCK_SIZE, durable=True)
        await disk.write(2, b"\x02" * BLOCK_SIZE)

    disk = Disk(BLOCKS)
    bench(disks={"disk": disk}).run(holder, on="disk")

    image = disk.durable_image()
    assert image[BLOCK_SIZE : 2 * BLOCK_SIZE] == b"\x01" * BLOCK_SIZE
    assert image[2 * BLOCK_SIZE : 3 * BLOCK_SIZE] == bytes(BLOCK_SIZE)


def test_a_failing_request_is_a_fault_and_the_next_one_works(bench: MakeBench) -> None:
    async def holder(boot: BootImage) -> None:
        disk = await open_block(boot.hardware[0])
        await disk.write(0, b"\x01" * BLOCK_SIZE)
        assert await fault_in(disk.write(0, b"\x02" * BLOCK_SIZE)) is Fault.IO
        assert await disk.read(0, 1) == b"\x01" * BLOCK_SIZE

    bench(NthRequest(device="disk", point=FaultPoint.BLOCK_ERROR, nth=2)).run(holder, on="disk")


@pytest.mark.parametrize("point", [FaultPoint.LOST_COMPLETION, FaultPoint.SLOW_DISK])
def test_a_request_without_an_answer_is_a_time_out_and_never_data(
    bench: MakeBench, point: FaultPoint
) -> None:
    async def holder(boot: BootImage) -> None:
        disk = await open_block(boot.hardware[0])
        await disk.write(0, b"\x01" * BLOCK_SIZE)
        begun = await Now()
        assert await fault_in(disk.read(0, 1)) is Fault.TIMED_OUT
        assert await Now() - begun < 3 * SECOND
        if point is FaultPoint.LOST_COMPLETION:
            assert await disk.read(0, 1) == b"\x01" * BLOCK_SIZE

    fault = NthRequest(device="disk", point=point, nth=2)
    bench(fault).run(holder, on="disk")


def test_draws_differ_and_come_as_long_as_asked(bench: MakeBench) -> None:
    async def holder(boot: BootImage) -> None:
        rng = await open_entropy(boot.hardware[0])
        assert isinstance(rng, VirtioEntropy | KernelEntropy)
        until = Nanos(await Now() + SECOND)
        drawn = [bytes(await rng.draw(size, until)) for size in (1, 32, 32, 256)]
        assert [len(each) for each in drawn] == [1, 32, 32, 256]
        assert drawn[1] != drawn[2]

    bench().run(holder, on="rng")


def test_a_source_without_entropy_gives_no_byte(bench: MakeBench) -> None:
    async def holder(boot: BootImage) -> None:
        rng = await open_entropy(boot.hardware[0])
        until = Nanos(await Now() + SECOND)
        if isinstance(rng, VirtioEntropy):
            assert await rng.draw(32, until) == b""
        else:
            assert await fault_in(rng.draw(32, until)) is Fault.TIMED_OUT

    fault = NthRequest(device="rng", point=FaultPoint.ENTROPY_NONE, nth=1, persistent=True)
    bench(fault).run(holder, on="rng")
