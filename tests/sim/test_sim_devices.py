"""Devices that the simulated kernel drives, their faults, secrets, and power that is cut."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from nexus.abi import (
    BLOCK_SIZE,
    NEVER,
    AbiError,
    BlockFlush,
    BlockRead,
    BlockWrite,
    BootImage,
    BootMemoryReplace,
    ConsoleWrite,
    EntropyDraw,
    EventKind,
    Grants,
    HardwareGrant,
    HardwareKind,
    Isolation,
    Nanos,
    Now,
    Program,
    SecretBackend,
    SecretRead,
    SecretReplace,
    Spawn,
    SpawnSpec,
    Status,
    Trap,
    Wait,
)
from nexus.kernel.core import Hardware, PowerCut
from nexus.kernel.sim import FAILURES, Cut, FaultPoint, Faults, Moment, NthFailure, NthRequest, Plan
from nexus.kernel.sim.disk import (
    Disk,
    DiskErrorKind,
    DiskFaults,
    Failure,
    Operation,
)
from nexus.kernel.sim.machines import RequestStatus, RequestType
from nexus.kernel.sim.virtio import DESCRIPTOR_WRITE, Register
from nexus.testing.conformance.steps import refused, soon
from tests.fakes.registers import (
    BLOCKS,
    BUS,
    DATA,
    DISK,
    FLUSH,
    MS,
    RNG,
    VERSION_1,
    Bench,
    Driver,
    Main,
    pause,
)

ONES, TWOS, THREES = (bytes([n]) * BLOCK_SIZE for n in (0x11, 0x22, 0x33))
SECOND = 1_000 * MS


def driven(*hardware: Hardware, **options: Any) -> Bench:
    """A kernel that drives all its devices itself."""
    hardware = hardware or (DISK, RNG)
    return Bench(*hardware, kernel_driven={each.name for each in hardware}, **options)


def with_requests(*requests: NthRequest) -> dict[str, Any]:
    return {"faults": Faults(Plan(requests=requests))}


# ---------------------------------------------------------------------- time


def test_a_disk_takes_virtual_time_and_one_operation_after_another() -> None:
    latency = {Operation.WRITE: Nanos(7 * MS), Operation.READ: Nanos(3 * MS)}

    async def holder(boot: BootImage) -> None:
        (disk,) = boot.hardware
        start = await Now()
        await BlockWrite(disk, 0, ONES, await soon())
        assert 7 * MS <= await Now() - start < 8 * MS
        start = await Now()
        await refused(BlockWrite(disk, 0, TWOS, Nanos(start + MS)), Status.TIMED_OUT)
        assert MS <= await Now() - start < 2 * MS
        # It stays at it, and the read comes behind.
        assert await BlockRead(disk, 0, 1, await soon()) == TWOS
        assert 10 * MS <= await Now() - start < 11 * MS

    disk = Disk(BLOCKS, faults=DiskFaults(latency=latency))
    driven(DISK, disks={"disk": disk}).run(holder, on="disk")


def test_a_holder_that_is_killed_leaves_no_operation_behind() -> None:
    async def writes(boot: BootImage) -> None:
        await BlockWrite(boot.hardware[0], 0, ONES, NEVER)

    async def reads(boot: BootImage) -> None:
        await pause(SECOND)
        assert await BlockRead(boot.hardware[0], 0, 1, await soon()) == bytes(BLOCK_SIZE)

    slow = DiskFaults(latency={Operation.WRITE: Nanos(5 * MS)})
    bench = driven(DISK, disks={"disk": Disk(BLOCKS, faults=slow)})
    bench.add("writes", writes)
    bench.add("reads", reads)

    async def root(boot: BootImage) -> None:
        spawned = await bench.start(boot, "writes", bench.grants("disk"))
        await pause(MS)
        await bench.kill(spawned)
        spawned = await bench.start(boot, "reads", bench.grants("disk"))
        assert (await Wait(spawned.pid, Nanos(await Now() + 2 * SECOND))).code == 0

    bench.run_root(root)


def test_a_frozen_holder_finds_its_answer_when_it_thaws() -> None:
    async def holder(boot: BootImage) -> None:
        assert await BlockRead(boot.hardware[0], 0, 1, await soon()) == bytes(BLOCK_SIZE)
        assert await Now() - boot.now >= SECOND

    latency = DiskFaults(latency={Operation.READ: Nanos(5 * MS)})
    bench = driven(DISK, disks={"disk": Disk(BLOCKS, faults=latency)})
    kernel = bench.kernel

    def freeze() -> None:
        assert kernel.freeze("holder0", Nanos(kernel.now + SECOND))

    kernel.at(Nanos(kernel.now + MS), freeze)
    bench.run(holder, on="disk")


# ---------------------------------------------------------------------- faults of disks


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        (DiskErrorKind.IO, Status.DEVICE_FAILED),
        (DiskErrorKind.NO_SPACE, Status.NO_SPACE),
    ],
)
@pytest.mark.parametrize("operation", list(Operation))
def test_what_a_disk_reports_is_a_status(
    operation: Operation, kind: DiskErrorKind, status: Status
) -> None:
    async def holder(boot: BootImage) -> None:
        (disk,) = boot.hardware
        later = await soon()
        traps: dict[Operation, Trap[Any]] = {
            Operation.READ: BlockRead(disk, 0, 1, later),
            Operation.WRITE: BlockWrite(disk, 0, ONES, later),
            Operation.FLUSH: BlockFlush(disk, later),
        }
        await refused(traps.pop(operation), status)
        for trap in traps.values():
            await trap

    failing = DiskFaults(failures=(Failure(operation=operation, nth=1, kind=kind),))
    driven(DISK, disks={"disk": Disk(BLOCKS, faults=failing)}).run(holder, on="disk")


def test_a_thin_disk_without_room_says_so() -> None:
    async def holder(boot: BootImage) -> None:
        (disk,) = boot.hardware
        await BlockWrite(disk, 0, ONES, await soon())
        await refused(BlockWrite(disk, 1, ONES, await soon()), Status.NO_SPACE)
        await BlockWrite(disk, 0, TWOS, await soon())

    disk = Disk(BLOCKS, faults=DiskFaults(room=1))
    driven(DISK, disks={"disk": disk}).run(holder, on="disk")


def test_planned_faults_meet_the_nth_request_of_a_disk() -> None:
    requests = (
        NthRequest(device="disk", point=FaultPoint.BLOCK_ERROR, nth=2),
        NthRequest(device="disk", point=FaultPoint.SLOW_DISK, nth=3, span=Nanos(SECOND)),
        NthRequest(device="disk", point=FaultPoint.LOST_COMPLETION, nth=4, persistent=True),
        NthRequest(device="other", point=FaultPoint.BLOCK_ERROR, nth=1),
    )

    async def holder(boot: BootImage) -> None:
        (disk,) = boot.hardware
        await BlockWrite(disk, 0, ONES, await soon())
        await refused(BlockWrite(disk, 0, TWOS, await soon()), Status.DEVICE_FAILED)
        start = await Now()
        assert await BlockRead(disk, 0, 1, await soon()) == ONES
        assert await Now() - start >= SECOND
        for data in (TWOS, THREES):
            await refused(BlockWrite(disk, 1, data, await soon()), Status.TIMED_OUT)

    bench = driven(DISK, **with_requests(*requests))
    bench.run(holder, on="disk")
    assert bench.kernel.bus.disks["disk"].image()[: 2 * BLOCK_SIZE] == ONES + THREES
    told = [(each["device"], each["point"]) for each in bench.told(EventKind.FAULT)]
    assert told == [
        ("disk", "block_error"),
        ("disk", "slow_disk"),
        ("disk", "lost_completion"),
        ("disk", "lost_completion"),
    ]


def test_the_same_faults_meet_requests_through_the_registers() -> None:
    requests = (
        NthRequest(device="disk", point=FaultPoint.BLOCK_ERROR, nth=1),
        NthRequest(device="disk", point=FaultPoint.SLOW_DISK, nth=2, span=Nanos(SECOND)),
        NthRequest(device="disk", point=FaultPoint.LOST_COMPLETION, nth=3),
    )

    async def holder(boot: BootImage) -> None:
        driver = await Driver.of(boot.hardware[0])
        driver.begin(VERSION_1 | FLUSH)
        out = RequestType.OUT
        assert await driver.done(out, 0, ONES) == RequestStatus.IO_ERROR
        assert await driver.done(out, 0, TWOS) == 0xEE, "it has not answered"
        await pause(SECOND)
        assert driver.area.view[2 * DATA] == RequestStatus.OK
        assert len(driver.used) == 2
        await driver.done(out, 1, THREES)
        await pause(SECOND)
        assert len(driver.used) == 2

    bench = Bench(**with_requests(*requests))
    bench.run(holder, on="disk")
    assert bench.kernel.bus.disks["disk"].image()[: 2 * BLOCK_SIZE] == TWOS + THREES


def test_chances_of_device_faults_are_drawn_and_fire() -> None:
    points = {
        FaultPoint.BLOCK_ERROR: 300_000,
        FaultPoint.SLOW_DISK: 300_000,
        FaultPoint.LOST_COMPLETION: 100_000,
        FaultPoint.ENTROPY_SHORT: 300_000,
        FaultPoint.ENTROPY_NONE: 300_000,
        FaultPoint.ENTROPY_CONSTANT: 300_000,
        FaultPoint.ENTROPY_REPEAT: 300_000,
    }
    faults = Faults(Plan(chances=points))

    async def holder(boot: BootImage) -> None:
        disk, rng = boot.hardware
        for _ in range(60):
            assert len(await EntropyDraw(rng, 8)) <= 8
            try:
                await BlockWrite(disk, 0, ONES, Nanos(await Now() + SECOND))
            except AbiError as error:
                assert error.status in (Status.DEVICE_FAILED, Status.TIMED_OUT)

    bench = driven(faults=faults)
    bench.run(holder, grants=bench.grants("disk", "rng"))
    assert all(faults.fired[point] for point in points)
    assert all(faults.reached[point] >= 60 for point in points)


@pytest.mark.parametrize(
    ("trap", "status"),
    [
        (trap, status)
        for trap, statuses in FAILURES.items()
        for status in statuses
        if trap in (BlockRead, BlockWrite, BlockFlush, EntropyDraw, SecretRead, SecretReplace)
    ],
    ids=lambda value: value.name if isinstance(value, Status) else value.__name__,
)
def test_the_nth_device_trap_of_a_task_can_be_made_to_fail(
    trap: type[Trap[Any]], status: Status
) -> None:
    faults = Faults(Plan(nth=(NthFailure(trap=trap, nth=2, status=status),)))

    async def holder(boot: BootImage) -> None:
        disk, rng = boot.hardware

        async def made() -> Trap[Any]:
            later = await soon()
            traps: tuple[Trap[Any], ...] = (
                BlockRead(disk, 0, 1, later),
                BlockWrite(disk, 0, ONES, later),
                BlockFlush(disk, later),
                EntropyDraw(rng, 8),
                SecretRead(),
                SecretReplace(b"kept"),
            )
            return next(each for each in traps if type(each) is trap)

        await (await made())
        await refused(await made(), status)
        await (await made())

    bench = driven(faults=faults)
    grants = bench.grants("disk", "rng")._replace(
        isolation=Isolation.EXEC, secret=SecretBackend.FILE
    )
    bench.run(holder, grants=grants)
    assert faults.fired[FaultPoint.NTH] == 1


# ---------------------------------------------------------------------- faults of entropy


async def _draws(boot: BootImage, count: int) -> list[bytes]:
    return [await EntropyDraw(boot.hardware[0], 16) for _ in range(count)]


@pytest.mark.parametrize(
    ("point", "good"),
    [
        (FaultPoint.ENTROPY_SHORT, lambda first, data: len(data) == 8),
        (FaultPoint.ENTROPY_NONE, lambda first, data: data == b""),
        (FaultPoint.ENTROPY_CONSTANT, lambda first, data: len(data) == 16 and len(set(data)) == 1),
        (FaultPoint.ENTROPY_REPEAT, lambda first, data: data == first),
    ],
)
def test_an_entropy_source_fails_in_the_way_that_was_planned(
    point: FaultPoint, good: Callable[[bytes, bytes], bool]
) -> None:
    async def holder(boot: BootImage) -> None:
        first, second, third = await _draws(boot, 3)
        assert good(first, second)
        assert len(third) == 16
        assert third not in (first, second)

    bench = driven(**with_requests(NthRequest(device="rng", point=point, nth=2)))
    bench.run(holder, on="rng")
    sizes = [each["size"] for each in bench.told() if each["what"] == "draw"]
    assert len(sizes) == 3


def test_a_short_delivery_is_told_in_the_ring_and_fills_no_more() -> None:
    async def holder(boot: BootImage) -> None:
        driver = await Driver.of(boot.hardware[0])
        driver.begin()
        driver.chain([(DATA, 64, DESCRIPTOR_WRITE)])
        sizes = []
        for _ in range(3):
            driver.area.view[DATA : DATA + 64] = bytes(64)
            driver.offer(0)
            await pause()
            sizes.append(driver.used[-1][1])
            assert driver.bytes_at(DATA + sizes[-1], 64 - sizes[-1]) == bytes(64 - sizes[-1])
        assert sizes == [32, 0, 64]
        driver.offer(0)
        await pause(SECOND)
        assert len(driver.used) == 3, "the fourth was lost"

    requests = (
        NthRequest(device="rng", point=FaultPoint.ENTROPY_SHORT, nth=1),
        NthRequest(device="rng", point=FaultPoint.ENTROPY_NONE, nth=2),
        NthRequest(device="rng", point=FaultPoint.LOST_COMPLETION, nth=4),
    )
    Bench(**with_requests(*requests)).run(holder, on="rng")


def test_entropy_and_secrets_are_in_no_log() -> None:
    seen: list[bytes] = []

    async def holder(boot: BootImage) -> None:
        assert (await SecretRead()) == b"the old secret"
        await SecretReplace(b"the new secret")
        seen.extend([await SecretRead(), *await _draws(boot, 4)])
        driver = await Driver.of(boot.hardware[1])
        driver.begin()
        driver.chain([(DATA, 32, DESCRIPTOR_WRITE)])
        driver.offer(0)
        await pause()
        seen.append(driver.bytes_at(DATA, 32))

    other = RNG._replace(name="other")
    bench = Bench(
        RNG,
        other,
        kernel_driven={"rng"},
        trace=True,
        secrets={("holder0", SecretBackend.FILE): b"the old secret"},
    )
    grants = bench.grants("rng", "other")._replace(
        isolation=Isolation.EXEC, secret=SecretBackend.FILE
    )
    bench.run(holder, grants=grants)

    text = "\n".join([*bench.kernel.log_lines(), *map(repr, bench.events)])
    assert "EntropyDraw" in text
    for data in (*seen, b"the old secret"):
        assert data.hex() not in text
        assert repr(data)[2:-1] not in text


# ---------------------------------------------------------------------- wrong arguments

# Their constructors, as somebody uses them who runs no type checker.
any_read: Any = BlockRead
any_write: Any = BlockWrite
any_flush: Any = BlockFlush
any_draw: Any = EntropyDraw
any_replace: Any = SecretReplace


@pytest.mark.parametrize(
    "trap",
    [
        lambda disk, rng, later: any_read(disk, "0", 1, later),
        lambda disk, rng, later: any_read(disk, 0.0, 1, later),
        lambda disk, rng, later: any_read(disk, 0, None, later),
        lambda disk, rng, later: any_read(disk, 0, 1, "soon"),
        lambda disk, rng, later: any_read(disk, 0, 1, 1e30),
        lambda disk, rng, later: any_write(disk, 0, 512, later),
        lambda disk, rng, later: any_write(disk, 0, "x" * 512, later),
        lambda disk, rng, later: any_write(disk, 0, [0] * 512, later),
        lambda disk, rng, later: any_flush(disk, None),
        lambda disk, rng, later: any_draw(rng, "8"),
        lambda disk, rng, later: any_draw(rng, None),
        lambda disk, rng, later: any_replace(7),
    ],
)
def test_values_of_the_wrong_type_are_the_tasks_crash_and_not_the_kernels(
    trap: Callable[[Any, Any, Any], Trap[Any]],
) -> None:
    bench = driven()

    async def clumsy(boot: BootImage) -> None:
        disk, rng = boot.hardware
        await trap(disk, rng, await soon())

    async def root(boot: BootImage) -> None:
        grants = bench.grants("disk", "rng")._replace(
            isolation=Isolation.EXEC, secret=SecretBackend.FILE
        )
        spawned = await bench.start(boot, "clumsy", grants)
        assert (await Wait(spawned.pid, Nanos(await Now() + SECOND))).code == 70
        bench.kernel.crashes.clear()

    bench.add("clumsy", clumsy)
    bench.run_root(root)


@pytest.mark.parametrize(
    ("hardware", "secret", "crashes"),
    [
        (5, 0, True),
        ((5,), 0, True),
        ((("disk", HardwareKind.BLOCK),), 0, True),
        ((HardwareGrant(7, HardwareKind.BLOCK),), 0, True),  # type: ignore[arg-type]
        ((HardwareGrant("disk", "block"),), 0, False),  # type: ignore[arg-type]
        ((), "file", False),
        ((), None, False),
    ],
)
def test_grants_of_the_wrong_type_are_refused_or_the_spawners_crash(
    hardware: Any, secret: Any, crashes: bool
) -> None:
    bench = driven()

    async def root(boot: BootImage) -> None:
        grants = Grants(isolation=Isolation.EXEC, hardware=hardware, secret=secret)
        spec = SpawnSpec("child", "child", boot.endpoint, grants=grants)
        await refused(Spawn(spec), Status.INVALID_ARGUMENT)

    bench.add("child", root)
    program = Program(name="root", main=root, digest="r")
    until = Nanos(bench.kernel.now + SECOND)
    end = bench.kernel.run(program, b"", until=until)

    assert (end.code, end.signal) == (70 if crashes else 0, 0)
    assert len(bench.kernel.crashes) == crashes
    assert set(bench.kernel.resources().values()) == {0}


# ---------------------------------------------------------------------- secrets


def _with_secret(bench: Bench, backend: SecretBackend, holder: Main) -> None:
    bench.run(holder, grants=Grants(isolation=Isolation.EXEC, secret=backend))


@pytest.mark.parametrize("backend", [SecretBackend.FILE, SecretBackend.KEYRING])
def test_a_full_or_failing_backend_keeps_the_old_secret(backend: SecretBackend) -> None:
    bench = driven()
    kernel = bench.kernel

    async def holder(boot: BootImage) -> None:
        await SecretReplace(b"old")
        kernel.disk_full = True
        await refused(SecretReplace(b"new"), Status.NO_SPACE)
        assert await SecretRead() == b"old"
        kernel.secrets.failing.add("holder0")
        await refused(SecretReplace(b"new"), Status.DEVICE_FAILED)
        await refused(SecretRead(), Status.DEVICE_FAILED)
        await refused(SecretReplace(b""), Status.INVALID_ARGUMENT)
        kernel.secrets.failing.clear()
        assert await SecretRead() == b"old"
        kernel.disk_full = False
        await SecretReplace(b"new")

    _with_secret(bench, backend, holder)
    assert kernel.secrets.kept == {("holder0", backend): b"new"}


# ---------------------------------------------------------------------- power

WORKLOAD = ((0, ONES), (5, TWOS * 2), None, (0, THREES), None, (7, ONES * 3))
WRITES = sum(step is not None for step in WORKLOAD)
FLUSHES = len(WORKLOAD) - WRITES


async def _by_the_kernel(boot: BootImage) -> None:
    (disk,) = boot.hardware
    for step in WORKLOAD:
        if step is None:
            await BlockFlush(disk, await soon())
        else:
            await BlockWrite(disk, *step, await soon())


async def _by_registers(boot: BootImage) -> None:
    driver = await Driver.of(boot.hardware[0])
    driver.begin(VERSION_1 | FLUSH)
    for step in WORKLOAD:
        if step is None:
            assert await driver.done(RequestType.FLUSH, 0) == RequestStatus.OK
        else:
            assert await driver.done(RequestType.OUT, *step) == RequestStatus.OK


def _model(writes: int, flushes: int, last: bytes | None = None) -> tuple[bytes, bytes]:
    """Image and durable image after so many operations; of the next write `last` came through."""
    image, durable = bytearray(BLOCKS * BLOCK_SIZE), bytes(BLOCKS * BLOCK_SIZE)
    for step in WORKLOAD:
        if step is None:
            if not flushes:
                break
            flushes -= 1
            durable = bytes(image)
            continue
        block, data = step
        if not writes:
            image[block * BLOCK_SIZE :][: len(last or b"")] = last or b""
            if last:
                image[block * BLOCK_SIZE : block * BLOCK_SIZE + len(last)] = last
            break
        writes -= 1
        image[block * BLOCK_SIZE : block * BLOCK_SIZE + len(data)] = data
    return bytes(image), durable


def _cut(bench: Bench, cut: Cut, holder: Main) -> Disk:
    bench.kernel.cut_power(cut)
    with pytest.raises(PowerCut) as told:
        bench.run(holder, on="disk")
    assert told.value.at == bench.kernel.now
    last = bench.events[-1]
    assert (last.kind, last.fields["what"]) == (EventKind.DEVICE, "cut")
    assert last.fields["why"] == told.value.why
    return bench.kernel.bus.disks["disk"]


@pytest.mark.parametrize("registers", [True, False], ids=["registers", "kernel-driven"])
@pytest.mark.parametrize("nth", range(1, WRITES + 1))
@pytest.mark.parametrize("size", [None, 0, 1, 511, 512, 700, 1024, 1 << 20])
def test_the_power_can_be_cut_at_every_write_and_inside_it(
    nth: int, size: int | None, registers: bool
) -> None:
    data = [step[1] for step in WORKLOAD if step is not None][nth - 1]
    flushes = [step for step in WORKLOAD[: _index_of(nth)] if step is None]
    moment = Moment.BEFORE if size is None else Moment.INSIDE
    cut = Cut(disk="disk", write=nth, moment=moment, size=size or 0)

    disk = _cut(
        Bench() if registers else driven(),
        cut,
        _by_registers if registers else _by_the_kernel,
    )

    image, durable = _model(nth - 1, len(flushes), data[: size or 0])
    assert disk.image() == image
    assert disk.durable_image() == durable
    assert disk.survivors(()).image() == durable


def _index_of(nth: int) -> int:
    """Where the nth write stands in the workload."""
    return [index for index, step in enumerate(WORKLOAD) if step is not None][nth - 1]


@pytest.mark.parametrize("registers", [True, False], ids=["registers", "kernel-driven"])
@pytest.mark.parametrize("nth", range(1, WRITES + 1))
def test_the_power_can_be_cut_behind_every_write(nth: int, registers: bool) -> None:
    flushes = [step for step in WORKLOAD[: _index_of(nth)] if step is None]

    disk = _cut(
        Bench() if registers else driven(),
        Cut(disk="disk", write=nth),
        _by_registers if registers else _by_the_kernel,
    )

    assert (disk.image(), disk.durable_image()) == _model(nth, len(flushes))


@pytest.mark.parametrize("registers", [True, False], ids=["registers", "kernel-driven"])
@pytest.mark.parametrize("moment", [Moment.BEFORE, Moment.AFTER])
@pytest.mark.parametrize("nth", range(1, FLUSHES + 1))
def test_the_power_can_be_cut_at_every_flush(nth: int, moment: Moment, registers: bool) -> None:
    disk = _cut(
        Bench() if registers else driven(),
        Cut(flush=nth, moment=moment),
        _by_registers if registers else _by_the_kernel,
    )

    done = nth if moment is Moment.AFTER else nth - 1
    index = [index for index, step in enumerate(WORKLOAD) if step is None][nth - 1]
    writes = [step for step in WORKLOAD[:index] if step is not None]
    image, durable = _model(len(writes), done)
    assert disk.durable_image() == durable
    assert disk.image() == image


def test_a_cut_that_never_comes_changes_nothing() -> None:
    def lines(cut: bool) -> list[str]:
        bench = driven()
        if cut:
            bench.kernel.cut_power(Cut(disk="disk", write=WRITES + 1))
            bench.kernel.cut_power(Cut(task="holder0", line="never"))
        bench.run(_by_the_kernel, on="disk")
        return list(bench.kernel.log_lines())

    assert lines(cut=True) == lines(cut=False)


@pytest.mark.parametrize("writes", [0, 1, 2])
def test_writes_are_counted_from_the_line_of_a_task_on(writes: int) -> None:
    async def holder(boot: BootImage) -> None:
        (disk,) = boot.hardware
        await ConsoleWrite("not yet")
        for block in range(4):
            await BlockWrite(disk, block, ONES, await soon())
        await ConsoleWrite("now")
        for block in range(4, 8):
            await BlockWrite(disk, block, ONES, await soon())

    async def other(boot: BootImage) -> None:
        await ConsoleWrite("now")

    bench = driven()
    bench.add("other", other)
    bench.add("holder0", holder)

    async def root(boot: BootImage) -> None:
        for name, grants in (("other", Grants()), ("holder0", bench.grants("disk"))):
            spawned = await bench.start(boot, name, grants)
            await Wait(spawned.pid, Nanos(await Now() + SECOND))

    bench.kernel.cut_power(Cut(task="holder0", line="now", write=writes, moment=Moment.AFTER))
    with pytest.raises(PowerCut):
        bench.run_root(root)

    written = bench.kernel.bus.disks["disk"].image().count(ONES)
    assert written == 4 + writes
    lines = [each["line"] for each in bench.told(EventKind.CONSOLE)]
    assert lines == ["now", "not yet", "now"]


def test_a_cut_from_outside_stops_everything_at_that_instant() -> None:
    after: list[str] = []

    async def holder(boot: BootImage) -> None:
        await SecretReplace(b"kept" if boot.name == "file" else b"lost")
        (slot,) = boot.hardware
        driver = await Driver.of(slot)
        driver.begin(VERSION_1 | FLUSH)
        driver.request(RequestType.OUT, 0, ONES)
        try:
            while True:
                await pause()
        finally:
            try:
                driver.write(Register.STATUS, 0)
            except ValueError:
                after.append(boot.name)
            await ConsoleWrite("last words")

    bench = Bench(DISK, DISK._replace(name="more"))
    kernel = bench.kernel
    bench.add("file", holder)
    bench.add("keyring", holder)

    async def root(boot: BootImage) -> None:
        await BootMemoryReplace(b"first")
        for name, backend, disk in (
            ("file", SecretBackend.FILE, "disk"),
            ("keyring", SecretBackend.KEYRING, "more"),
        ):
            grants = bench.grants(disk)._replace(isolation=Isolation.EXEC, secret=backend)
            await Spawn(SpawnSpec(name, name, boot.endpoint, grants=grants))
        await pause(SECOND)
        await BootMemoryReplace(b"second")

    at = Nanos(kernel.now + 20 * MS)
    kernel.at(at, kernel.cut_power)
    with pytest.raises(PowerCut, match="from outside") as told:
        bench.run_root(root)

    assert told.value.at == at
    assert sorted(after) == ["file", "keyring"]
    assert max(event.time for event in bench.events) == at
    assert bench.told(EventKind.CONSOLE) == []
    assert {each["name"] for each in bench.told(EventKind.EXIT)} == set()
    assert kernel.boot_memory == b"first"
    assert kernel.secrets.kept == {("file", SecretBackend.FILE): b"kept"}
    disk = kernel.bus.disks["disk"]
    assert disk.image()[:BLOCK_SIZE] == ONES
    assert disk.durable_image()[:BLOCK_SIZE] == bytes(BLOCK_SIZE)
    assert set(kernel.resources().values()) == {0}


def test_a_cut_that_is_asked_for_inside_a_task_comes_before_its_next_trap() -> None:
    bench = driven()

    async def holder(boot: BootImage) -> None:
        await BlockWrite(boot.hardware[0], 0, ONES, await soon())
        bench.kernel.cut_power()
        await ConsoleWrite("never")

    with pytest.raises(PowerCut):
        bench.run(holder, on="disk")
    assert bench.told(EventKind.CONSOLE) == []
    assert bench.kernel.crashes == []


def test_the_next_boot_finds_what_was_durable() -> None:
    bench = driven(DISK, secrets={("one", SecretBackend.FILE): b"kept"})
    disk = _cut(bench, Cut(flush=2, moment=Moment.BEFORE), _by_the_kernel)
    choice = disk.drawn_choice(bench.kernel.chance.of_device("survivors"))
    left = disk.survivors(choice)

    async def holder(boot: BootImage) -> None:
        (slot,) = boot.hardware
        assert await BlockRead(slot, 5, 2, await soon()) == TWOS * 2
        assert (await BlockRead(slot, 0, 1, await soon()))[:1] in (ONES[:1], THREES[:1])

    again = driven(
        DISK,
        seed=2,
        disks={"disk": left},
        secrets=bench.kernel.secrets.kept,
        boot_memory=bench.kernel.boot_memory,
    )
    again.run(holder, on="disk")


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"write": 1, "flush": 1},
        {"write": -1},
        {"flush": 1, "moment": Moment.INSIDE},
        {"line": "nobody's"},
        {"write": 1, "task": "silent"},
    ],
)
def test_what_is_no_moment_is_no_cut(wrong: dict[str, Any]) -> None:
    with pytest.raises(AssertionError):
        Cut(**wrong)


# ---------------------------------------------------------------------- determinism

SCRIPT = """
from nexus.kernel.sim import FaultPoint, Faults, Plan
from tests.sim.test_sim_devices import mixed
print("\\n".join(mixed(int(__import__("sys").argv[1]))))
"""


def mixed(seed: int) -> list[str]:
    """The log of a run in which a bit of everything happens."""
    points = (FaultPoint.SLOW_DISK, FaultPoint.ENTROPY_SHORT, FaultPoint.LOST_COMPLETION)
    bench = Bench(
        *BUS,
        Hardware("image", HardwareKind.BLOCK, size=BLOCKS * BLOCK_SIZE),
        seed=seed,
        kernel_driven={"image"},
        faults=Faults(Plan(chances=dict.fromkeys(points, 200_000))),
        trace=True,
    )

    async def holder(boot: BootImage) -> None:
        disk, rng, image = boot.hardware
        blocks, entropy = await Driver.of(disk), await Driver.of(rng)
        blocks.begin(VERSION_1 | FLUSH)
        entropy.begin()
        entropy.chain([(DATA, 64, DESCRIPTOR_WRITE)])
        for number in range(12):
            entropy.offer(0)
            await blocks.done(RequestType.OUT, number, entropy.bytes_at(DATA, 64) * 8)
            try:
                await BlockWrite(image, number, ONES, Nanos(await Now() + 50 * MS))
            except AbiError as error:
                assert error.status is Status.TIMED_OUT
        await ConsoleWrite(f"{sum(blocks.area.addresses)} {len(entropy.used)}")

    bench.run(holder, grants=bench.grants("disk", "rng", "image"))
    digest = bench.kernel.bus.disks["disk"].image()
    return [*bench.kernel.log_lines(), str(sum(digest))]


def test_one_seed_gives_one_log_whatever_the_hash_seed() -> None:
    def run(seed: int, hash_seed: str) -> str:
        return subprocess.run(
            [sys.executable, "-c", SCRIPT, str(seed)],
            env={"PYTHONHASHSEED": hash_seed, "PYTHONPATH": "src:."},
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()

    first = run(5, "0")
    assert first == run(5, "4711") == "\n".join(mixed(5))
    assert first != "\n".join(mixed(6))
