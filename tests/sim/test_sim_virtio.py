"""The simulated bus, register by register, with drivers that mean harm."""

import struct
from collections.abc import Callable

import pytest

from nexus.abi import (
    BLOCK_SIZE,
    DMA_PAGES,
    PAGE_SIZE,
    BootImage,
    BusEntry,
    BusScan,
    CapDerive,
    CapKind,
    CapQuery,
    DeviceDma,
    DeviceMap,
    DeviceQuery,
    HardwareKind,
    Nanos,
    Now,
    Rights,
    Status,
    Wait,
)
from nexus.kernel.core import Hardware
from nexus.kernel.sim.disk import Disk, DiskFaults
from nexus.kernel.sim.machines import RequestStatus, RequestType
from nexus.kernel.sim.virtio import (
    DESCRIPTOR_INDIRECT,
    DESCRIPTOR_NEXT,
    DESCRIPTOR_WRITE,
    VENDOR_ID,
    DeviceStatus,
    Register,
)
from nexus.testing.conformance.steps import refused
from tests.fakes.registers import (
    AGREED,
    AVAIL,
    BLOCKS,
    BUS,
    DATA,
    DESC,
    DISK,
    EMPTY,
    FLUSH,
    LIVE,
    MS,
    NUM,
    OLD,
    RNG,
    USED,
    VERSION_1,
    Bench,
    Driver,
    pause,
)

BLOCK_FEATURES = VERSION_1 | FLUSH
IN, OUT = RequestType.IN, RequestType.OUT
SECTOR = bytes(range(256)) * 2
assert len(SECTOR) == BLOCK_SIZE


# ---------------------------------------------------------------------- what is there


def test_the_root_task_finds_the_registers_of_every_transport() -> None:
    async def root(boot: BootImage) -> None:
        entries = await BusScan()
        assert [each.name for each in entries] == ["disk", "empty", "old", "rng"]
        for each in entries:
            assert (each.backing, each.length, each.magic) == ("virtio-mmio", 4096, 0x74726976)
        assert [(each.version, each.device_id) for each in entries] == [
            (2, 2),
            (2, 0),
            (1, 4),
            (2, 4),
        ]
        bases = {each.base for each in entries}
        assert len(bases) == 4
        assert all(base % PAGE_SIZE == 0 for base in bases)

    bench = Bench()
    bench.run_root(root)
    assert bench.told() == []


def test_a_device_that_the_kernel_drives_has_no_registers() -> None:
    async def root(boot: BootImage) -> None:
        assert (await BusScan())[0] == BusEntry("disk", HardwareKind.BLOCK, "file", 0, 0, 0, 0, 0)

    Bench(DISK, kernel_driven={"disk"}).run_root(root)


def test_a_window_is_a_page_of_registers_and_its_capability_says_no_more() -> None:
    async def holder(boot: BootImage) -> None:
        (slot,) = boot.hardware
        assert await CapQuery(slot) == (CapKind.DEVICE, Rights.MAP, PAGE_SIZE)
        assert await DeviceQuery(slot) == ("rng", "virtio-mmio", 0, True)
        window = await DeviceMap(slot)
        assert window.length == PAGE_SIZE
        assert [window.read(offset) for offset in (0, 4, 8, 12)] == [
            0x74726976,
            2,
            4,
            VENDOR_ID,
        ]
        area = await DeviceDma(slot)
        assert area.view is not (again := await DeviceDma(slot)).view
        area.view[5] = 7
        assert again.view[5] == 7
        assert again.addresses == area.addresses
        assert len(area.view) == DMA_PAGES * PAGE_SIZE
        assert len(set(area.addresses)) == DMA_PAGES
        assert all(address % PAGE_SIZE == 0 for address in area.addresses)
        steps = {b - a for a, b in zip(area.addresses, area.addresses[1:], strict=False)}
        assert steps != {PAGE_SIZE}, "they do not follow one another"
        dull = await CapDerive(slot, Rights(0))
        await refused(DeviceMap(dull), Status.PERMISSION_DENIED)
        await refused(DeviceDma(dull), Status.PERMISSION_DENIED)
        await refused(DeviceMap(slot, execute=True), Status.PERMISSION_DENIED)
        for offset in (PAGE_SIZE, 2 * PAGE_SIZE, -PAGE_SIZE, 1 << 40):
            await refused(DeviceMap(slot, offset), Status.PERMISSION_DENIED)
        for offset in (1, 4, PAGE_SIZE - 1):
            await refused(DeviceMap(slot, offset), Status.INVALID_ARGUMENT)

    Bench().run(holder, on="rng")


def test_what_is_no_register_is_a_value_error() -> None:
    async def holder(boot: BootImage) -> None:
        window = await DeviceMap(boot.hardware[0])
        for offset in (-4, 1, 2, 3, PAGE_SIZE, PAGE_SIZE + 4, 1 << 40):
            with pytest.raises(ValueError, match="no register"):
                window.read(offset)
            with pytest.raises(ValueError, match="no register"):
                window.write(offset, 0)
        for value in (-1, 1 << 32):
            with pytest.raises(ValueError, match="no 32-bit word"):
                window.write(Register.STATUS, value)

    bench = Bench()
    bench.run(holder, on="disk")
    assert [each for each in bench.told() if each["what"] == "status"] == []


def test_read_only_registers_stay_and_others_read_as_nothing() -> None:
    async def holder(boot: BootImage) -> None:
        driver = await Driver.of(boot.hardware[0])
        driver.begin(BLOCK_FEATURES)
        before = {offset: driver.window.read(offset) for offset in range(0, PAGE_SIZE, 4)}
        for register in (
            Register.MAGIC,
            Register.VERSION,
            Register.DEVICE_ID,
            Register.VENDOR_ID,
            Register.DEVICE_FEATURES,
            Register.QUEUE_NUM_MAX,
            Register.INTERRUPT_STATUS,
            Register.CONFIG_GENERATION,
        ):
            driver.write(register, 0xFFFF_FFFF)
        for offset in (0x100, 0x104, 0xFFC, 0x0B0, 0x018):
            driver.window.write(offset, 0xFFFF_FFFF)
        assert {offset: driver.window.read(offset) for offset in range(0, PAGE_SIZE, 4)} == before
        for register in (
            Register.DRIVER_FEATURES,
            Register.QUEUE_SELECT,
            Register.QUEUE_NUM,
            Register.QUEUE_NOTIFY,
            Register.INTERRUPT_ACK,
            Register.QUEUE_DESC_LOW,
        ):
            assert driver.read(register) == 0
        assert before[0x100] | before[0x104] << 32 == BLOCKS

    Bench().run(holder, on="disk")


def test_the_empty_transport_answers_who_it_is_and_nothing_else() -> None:
    async def holder(boot: BootImage) -> None:
        driver = await Driver.of(boot.hardware[0])
        assert driver.read(Register.MAGIC) == 0x74726976
        assert driver.read(Register.VERSION) == 2
        assert driver.read(Register.DEVICE_ID) == 0
        for offset in range(0x10, PAGE_SIZE, 4):
            driver.window.write(offset, 0xFFFF_FFFF)
        assert all(driver.window.read(offset) == 0 for offset in range(0x10, PAGE_SIZE, 4))

    bench = Bench()
    bench.run(holder, on="empty")
    assert bench.told() == [
        {"name": "empty", "what": "status", "value": 0xFFFF_FFFF},
        {"name": "empty", "what": "released"},
    ]


# ---------------------------------------------------------------------- negotiation


@pytest.mark.parametrize("features", [0, FLUSH, 1 << 33 | VERSION_1, VERSION_1 | 1 << 63, 1])
def test_features_without_version_1_or_not_offered_are_not_agreed_on(features: int) -> None:
    async def holder(boot: BootImage) -> None:
        driver = await Driver.of(boot.hardware[0])
        assert driver.accept(features) == AGREED & ~DeviceStatus.FEATURES_OK
        driver.queue()
        assert driver.read(Register.QUEUE_READY) == 0
        driver.write(Register.STATUS, LIVE)
        assert not driver.status & (DeviceStatus.DRIVER_OK | DeviceStatus.FEATURES_OK)
        driver.request(OUT, 0, SECTOR)
        await pause()
        assert driver.used == []
        driver.begin(BLOCK_FEATURES)  # it can still be driven as it should be

    bench = Bench()
    bench.run(holder, on="disk")
    assert bench.kernel.bus.disks["disk"].image() == bytes(BLOCKS * BLOCK_SIZE)


def test_features_are_offered_by_halves_and_fixed_once_agreed_on() -> None:
    async def holder(boot: BootImage) -> None:
        driver = await Driver.of(boot.hardware[0])
        halves = []
        for half in (0, 1, 2, 0xFFFF_FFFF):
            driver.write(Register.DEVICE_FEATURES_SELECT, half)
            halves.append(driver.read(Register.DEVICE_FEATURES))
        assert halves == [FLUSH, 1, 0, 0]
        assert driver.accept(VERSION_1) == AGREED
        driver.write(Register.DRIVER_FEATURES_SELECT, 0)
        driver.write(Register.DRIVER_FEATURES, 0xFFFF_FFFF)
        driver.write(Register.STATUS, LIVE)
        assert driver.status == LIVE

    bench = Bench()
    bench.run(holder, on="disk")
    (live,) = [each for each in bench.told() if each["what"] == "live"]
    assert (live["version"], live["device"], live["features"]) == (2, 2, VERSION_1)


def test_a_legacy_transport_agrees_on_nothing_and_has_no_queue() -> None:
    async def holder(boot: BootImage) -> None:
        driver = await Driver.of(boot.hardware[0])
        assert driver.read(Register.VERSION) == 1
        assert driver.read(Register.DEVICE_ID) == 4
        driver.write(Register.DEVICE_FEATURES_SELECT, 1)
        assert driver.read(Register.DEVICE_FEATURES) == 0
        for features in (0, VERSION_1):
            assert not driver.accept(features) & DeviceStatus.FEATURES_OK
        assert driver.read(Register.QUEUE_NUM_MAX) == 0
        driver.queue()
        driver.write(Register.STATUS, DeviceStatus.FAILED)
        assert driver.status & DeviceStatus.FAILED
        driver.chain([(DATA, 16, DESCRIPTOR_WRITE)])
        driver.offer(0)
        await pause()
        assert driver.bytes_at(DATA, 16) == bytes(16)

    bench = Bench()
    bench.run(holder, on="old")
    assert {each["what"] for each in bench.told()} == {"status", "released"}


def test_a_driver_adds_bits_to_the_status_and_only_a_reset_takes_them_away() -> None:
    async def holder(boot: BootImage) -> None:
        driver = await Driver.of(boot.hardware[0])
        driver.begin()
        driver.write(Register.STATUS, DeviceStatus.ACKNOWLEDGE)
        assert driver.status == LIVE
        driver.write(Register.STATUS, LIVE | DeviceStatus.NEEDS_RESET)
        assert driver.status == LIVE
        driver.write(Register.STATUS, 0)
        assert driver.status == 0
        assert driver.read(Register.QUEUE_READY) == 0

    Bench().run(holder, on="rng")


def test_a_driver_that_has_failed_is_served_no_more() -> None:
    async def holder(boot: BootImage) -> None:
        driver = await Driver.of(boot.hardware[0])
        driver.begin()
        driver.write(Register.STATUS, LIVE | DeviceStatus.FAILED)
        driver.chain([(DATA, 16, DESCRIPTOR_WRITE)])
        driver.offer(0)
        await pause()
        assert driver.used == []

    bench = Bench()
    bench.run(holder, on="rng")
    assert "draw" not in {each["what"] for each in bench.told()}


# ---------------------------------------------------------------------- requests


def test_entropy_lands_in_scattered_pages_some_time_after_the_notification() -> None:
    async def holder(boot: BootImage) -> None:
        driver = await Driver.of(boot.hardware[0])
        driver.begin()
        driver.chain([(DATA + 4090, 6, DESCRIPTOR_WRITE), (5 * DATA, 94, DESCRIPTOR_WRITE)])
        driver.offer(0)
        assert driver.used == [], "nothing happens inside a register write"
        assert driver.read(Register.INTERRUPT_STATUS) == 0
        await pause()
        assert driver.used == [(0, 100)]
        assert driver.bytes_at(DATA + 4090, 6) != bytes(6)
        assert driver.bytes_at(5 * DATA, 94) != bytes(94)
        assert driver.bytes_at(5 * DATA + 94, 100) == bytes(100)
        assert driver.read(Register.INTERRUPT_STATUS) == 1
        driver.write(Register.INTERRUPT_ACK, 1)
        assert driver.read(Register.INTERRUPT_STATUS) == 0
        first = driver.bytes_at(5 * DATA, 94)
        for _ in range(3 * NUM):  # round the rings
            driver.offer(0)
            await pause()
        assert driver.available == 3 * NUM + 1
        assert len(driver.used) == NUM
        assert driver.bytes_at(5 * DATA, 94) != first

    bench = Bench()
    bench.run(holder, on="rng")
    draws = [each for each in bench.told() if each["what"] == "draw"]
    assert draws == [{"name": "rng", "what": "draw", "size": 100}] * (3 * NUM + 1)


def test_blocks_are_written_flushed_and_read_through_the_queue() -> None:
    async def holder(boot: BootImage) -> None:
        driver = await Driver.of(boot.hardware[0])
        driver.begin(BLOCK_FEATURES)
        assert await driver.done(OUT, 3, SECTOR * 2) == RequestStatus.OK
        assert driver.used[-1] == (0, 1)
        assert await driver.done(RequestType.FLUSH, 0) == RequestStatus.OK
        assert await driver.done(OUT, BLOCKS - 1, SECTOR) == RequestStatus.OK
        assert await driver.done(IN, 2, wanted=3 * BLOCK_SIZE) == RequestStatus.OK
        assert driver.used[-1] == (0, 3 * BLOCK_SIZE + 1)
        assert driver.bytes_at(2 * DATA, 3 * BLOCK_SIZE) == bytes(BLOCK_SIZE) + SECTOR * 2

    bench = Bench()
    bench.run(holder, on="disk")
    disk = bench.kernel.bus.disks["disk"]
    assert disk.durable_image()[3 * BLOCK_SIZE : 5 * BLOCK_SIZE] == SECTOR * 2
    assert disk.durable_image()[-BLOCK_SIZE:] == bytes(BLOCK_SIZE)
    assert disk.image()[-BLOCK_SIZE:] == SECTOR
    assert [each["what"] for each in bench.told() if each["what"] not in ("status", "live")] == [
        "flush",
        "released",
    ]


def test_a_request_may_be_in_any_pieces() -> None:
    async def holder(boot: BootImage) -> None:
        driver = await Driver.of(boot.hardware[0])
        driver.begin(BLOCK_FEATURES)
        header = struct.pack("<IIQ", OUT, 0, 1) + SECTOR
        driver.area.view[DATA : DATA + len(header)] = header
        driver.chain(
            [
                (DATA, 3, 0),
                (DATA + 3, 20, 0),
                (DATA + 23, 0, 0),
                (DATA + 23, len(header) - 23, 0),
                (3 * DATA, 0, DESCRIPTOR_WRITE),
                (3 * DATA, 1, DESCRIPTOR_WRITE),
            ],
            first=2,
        )
        driver.offer(2)
        await pause()
        assert driver.used == [(2, 1)]
        assert await driver.done(IN, 1, wanted=BLOCK_SIZE) == RequestStatus.OK
        assert driver.bytes_at(2 * DATA, BLOCK_SIZE) == SECTOR

    Bench().run(holder, on="disk")


@pytest.mark.parametrize(
    ("kind", "sector", "data", "wanted", "status"),
    [
        (IN, BLOCKS, b"", BLOCK_SIZE, RequestStatus.IO_ERROR),
        (IN, BLOCKS - 1, b"", 2 * BLOCK_SIZE, RequestStatus.IO_ERROR),
        (IN, (1 << 64) - 1, b"", BLOCK_SIZE, RequestStatus.IO_ERROR),
        (IN, 0, b"", 0, RequestStatus.IO_ERROR),
        (IN, 0, b"", 100, RequestStatus.IO_ERROR),
        (IN, 0, SECTOR, BLOCK_SIZE, RequestStatus.IO_ERROR),
        (OUT, BLOCKS, SECTOR, 0, RequestStatus.IO_ERROR),
        (OUT, 0, SECTOR[:-1], 0, RequestStatus.IO_ERROR),
        (OUT, 0, b"", 0, RequestStatus.IO_ERROR),
        (OUT, 0, SECTOR, 5, RequestStatus.IO_ERROR),
        (RequestType.FLUSH, 0, SECTOR, 0, RequestStatus.UNSUPPORTED),
        (8, 0, b"", 20, RequestStatus.UNSUPPORTED),
        (0xFFFF_FFFF, 0, b"", 0, RequestStatus.UNSUPPORTED),
    ],
)
def test_a_request_that_cannot_be_gets_a_status_and_changes_nothing(
    kind: int, sector: int, data: bytes, wanted: int, status: RequestStatus
) -> None:
    async def holder(boot: BootImage) -> None:
        driver = await Driver.of(boot.hardware[0])
        driver.begin(BLOCK_FEATURES)
        assert await driver.done(kind, sector, data, wanted) == status
        assert driver.used == [(0, 1)]
        assert driver.status == LIVE
        assert driver.bytes_at(2 * DATA, wanted) == bytes(wanted)

    bench = Bench()
    bench.run(holder, on="disk")
    disk = bench.kernel.bus.disks["disk"]
    assert disk.image() == bytes(BLOCKS * BLOCK_SIZE)
    assert set(disk.done.values()) == {0}, "the disk never heard of it"


def test_without_flushes_agreed_on_every_write_is_durable() -> None:
    async def holder(boot: BootImage) -> None:
        driver = await Driver.of(boot.hardware[0])
        driver.begin(VERSION_1)
        assert await driver.done(OUT, 0, SECTOR) == RequestStatus.OK
        assert await driver.done(RequestType.FLUSH, 0) == RequestStatus.UNSUPPORTED

    bench = Bench()
    bench.run(holder, on="disk")
    assert bench.kernel.bus.disks["disk"].durable_image()[:BLOCK_SIZE] == SECTOR


@pytest.mark.parametrize("by_map", [True, False], ids=["by the map", "by the disk"])
def test_a_read_only_disk_says_so_and_is_not_written(by_map: bool) -> None:
    hardware = DISK._replace(read_only=by_map)
    disk = Disk(BLOCKS, SECTOR, DiskFaults(read_only=not by_map))

    async def holder(boot: BootImage) -> None:
        driver = await Driver.of(boot.hardware[0])
        driver.write(Register.DEVICE_FEATURES_SELECT, 0)
        assert driver.read(Register.DEVICE_FEATURES) == FLUSH | 1 << 5
        driver.begin(BLOCK_FEATURES)
        assert await driver.done(OUT, 0, bytes(BLOCK_SIZE)) == RequestStatus.IO_ERROR
        assert await driver.done(IN, 0, wanted=BLOCK_SIZE) == RequestStatus.OK
        assert driver.bytes_at(2 * DATA, BLOCK_SIZE) == SECTOR

    Bench(hardware, disks={"disk": disk}).run(holder, on="disk")


# ---------------------------------------------------------------------- hostile drivers


@pytest.mark.parametrize("num", [0, 3, 7, 256, 0x8000_0000, 0xFFFF_FFFF])
def test_a_queue_of_an_impossible_size_needs_a_reset(num: int) -> None:
    async def holder(boot: BootImage) -> None:
        driver = await Driver.of(boot.hardware[0])
        assert driver.accept(VERSION_1) == AGREED
        driver.queue(num)
        assert driver.status == AGREED | DeviceStatus.NEEDS_RESET
        assert driver.read(Register.QUEUE_READY) == 0
        assert driver.read(Register.INTERRUPT_STATUS) == 2
        driver.begin()

    Bench().run(holder, on="disk")


def test_a_queue_that_is_not_there_is_not_set_up() -> None:
    async def holder(boot: BootImage) -> None:
        driver = await Driver.of(boot.hardware[0])
        assert driver.accept(VERSION_1) == AGREED
        driver.write(Register.QUEUE_SELECT, 1)
        assert driver.read(Register.QUEUE_NUM_MAX) == 0
        driver.write(Register.QUEUE_NUM, 8)
        driver.write(Register.QUEUE_READY, 1)
        assert driver.read(Register.QUEUE_READY) == 0
        driver.write(Register.QUEUE_NOTIFY, 1)
        driver.write(Register.QUEUE_NOTIFY, 0)
        await pause()
        assert driver.status == AGREED

    Bench().run(holder, on="disk")


@pytest.mark.parametrize(
    ("register", "offset"),
    [
        (Register.QUEUE_DESC_LOW, 8),  # not aligned
        (Register.QUEUE_DRIVER_LOW, AVAIL + 1),
        (Register.QUEUE_DEVICE_LOW, USED + 2),
        (Register.QUEUE_DESC_LOW, PAGE_SIZE - 16),  # across a page, and the next is elsewhere
        (Register.QUEUE_DRIVER_LOW, -1),  # 0: no page of its own
        (Register.QUEUE_DEVICE_LOW, -2),  # the largest address there is
    ],
)
def test_a_ring_outside_the_memory_of_the_device_needs_a_reset(
    register: Register, offset: int
) -> None:
    async def holder(boot: BootImage) -> None:
        driver = await Driver.of(boot.hardware[0])
        assert driver.accept(VERSION_1) == AGREED
        driver.queue()
        driver.write(Register.QUEUE_READY, 0)
        places = {-1: 0, -2: (1 << 64) - 4}
        driver.place(register, places.get(offset, driver.address(max(offset, 0))))
        driver.write(Register.QUEUE_READY, 1)
        assert driver.status & DeviceStatus.NEEDS_RESET

    Bench().run(holder, on="disk")


def _loop(driver: Driver) -> None:
    for index in range(NUM):
        driver.describe(
            index, driver.address(DATA), 1, DESCRIPTOR_WRITE | DESCRIPTOR_NEXT, (index + 1) % NUM
        )
    driver.offer(0)


def _itself(driver: Driver) -> None:
    driver.describe(0, driver.address(DATA), 1, DESCRIPTOR_WRITE | DESCRIPTOR_NEXT, 0)
    driver.offer(0)


def _one(address: int | None, size: int, flags: int) -> Callable[[Driver], None]:
    def offer(driver: Driver) -> None:
        where = driver.address(DATA) if address is None else address
        driver.describe(0, where, size, flags, 0xFFFF)
        driver.offer(0)

    return offer


def _head(driver: Driver) -> None:
    driver.describe(NUM, driver.address(DATA), 16, DESCRIPTOR_WRITE, 0)
    driver.offer(NUM)


def _next(driver: Driver) -> None:
    driver.describe(0, driver.address(DATA), 1, DESCRIPTOR_WRITE | DESCRIPTOR_NEXT, NUM)
    driver.describe(NUM, driver.address(DATA), 16, DESCRIPTOR_WRITE, 0)
    driver.offer(0)


def _too_many(driver: Driver) -> None:
    driver.chain([(DATA, 1, DESCRIPTOR_WRITE)])
    driver.publish(driver.available + NUM + 1)


def _backwards(driver: Driver) -> None:
    driver.chain([(DATA, 1, DESCRIPTOR_WRITE)])
    driver.publish(driver.available - 1)


def _turned(driver: Driver) -> None:
    driver.chain([(DATA, 16, DESCRIPTOR_WRITE), (DATA, 16, 0)])
    driver.offer(0)


BAD_CHAINS = {
    "a loop": _loop,
    "itself": _itself,
    "no such head": _head,
    "no such next": _next,
    "more than the queue holds": _too_many,
    "an index that goes back": _backwards,
    "a piece to read behind one to write": _turned,
    "address 0": _one(0, 16, DESCRIPTOR_WRITE),
    "the end of all addresses": _one((1 << 64) - 8, 16, DESCRIPTOR_WRITE),
    "a page beyond": _one(None, 2 * PAGE_SIZE, DESCRIPTOR_WRITE),
    "4 GiB": _one(None, 0xFFFF_FFFF, DESCRIPTOR_WRITE),
    "indirect": _one(None, 16, DESCRIPTOR_INDIRECT | DESCRIPTOR_WRITE),
    "nothing to write": _one(None, 16, 0),
}


@pytest.mark.parametrize("name", ["rng", "disk"])
@pytest.mark.parametrize("bad", BAD_CHAINS)
def test_a_bad_chain_needs_a_reset_and_nothing_more_is_done(bad: str, name: str) -> None:
    async def holder(boot: BootImage) -> None:
        driver = await Driver.of(boot.hardware[0])
        driver.begin()
        if name == "disk":
            driver.request(OUT, 0, SECTOR)  # one that is good, in front of it
            await pause()
        good = list(driver.used)
        BAD_CHAINS[bad](driver)
        await pause()
        assert driver.status == LIVE | DeviceStatus.NEEDS_RESET
        driver.chain([(DATA, 16, DESCRIPTOR_WRITE)])
        driver.offer(0)
        await pause()
        assert driver.used == good
        driver.begin()
        if name == "disk":
            assert await driver.done(IN, 0, wanted=BLOCK_SIZE) == RequestStatus.OK
        else:
            driver.chain([(DATA, 16, DESCRIPTOR_WRITE)])
            driver.offer(0)
            await pause()
            assert driver.used == [(0, 16)]

    bench = Bench()
    bench.run(holder, on=name)
    assert len([each for each in bench.told() if each["what"] == "needs_reset"]) == 1


@pytest.mark.parametrize(
    "pieces",
    [
        [(DATA, 15, 0), (2 * DATA, 1, DESCRIPTOR_WRITE)],
        [(DATA, 16, 0)],
        [(DATA, 16, 0), (2 * DATA, 0, DESCRIPTOR_WRITE)],
        [(DATA, 16, DESCRIPTOR_WRITE)],
    ],
    ids=["short header", "no status", "empty status", "no header"],
)
def test_a_block_request_without_header_or_status_needs_a_reset(
    pieces: list[tuple[int, int, int]],
) -> None:
    async def holder(boot: BootImage) -> None:
        driver = await Driver.of(boot.hardware[0])
        driver.begin(BLOCK_FEATURES)
        driver.chain(pieces)
        driver.offer(0)
        await pause()
        assert driver.status & DeviceStatus.NEEDS_RESET

    Bench().run(holder, on="disk")


def test_a_chain_that_describes_more_memory_than_there_is_needs_a_reset() -> None:
    num, avail, used = 64, 0x400, 0x800

    async def holder(boot: BootImage) -> None:
        driver = await Driver.of(boot.hardware[0])
        for pages, needs_reset in ((DMA_PAGES, False), (DMA_PAGES + 2, True)):
            assert driver.accept(VERSION_1) == AGREED
            driver.queue(num)
            driver.write(Register.QUEUE_READY, 0)
            driver.place(Register.QUEUE_DRIVER_LOW, driver.address(avail))
            driver.place(Register.QUEUE_DEVICE_LOW, driver.address(used))
            driver.write(Register.QUEUE_READY, 1)
            driver.write(Register.STATUS, LIVE)
            header = RequestType.IN.to_bytes(16, "little")
            driver.area.view[DATA : DATA + 16] = header
            driver.chain(
                [(DATA, 16, 0), *[(DATA, PAGE_SIZE, DESCRIPTOR_WRITE)] * (pages - 1)],
            )
            driver.area.view[avail + 2] = 1
            driver.write(Register.QUEUE_NOTIFY, 0)
            await pause()
            assert bool(driver.status & DeviceStatus.NEEDS_RESET) is needs_reset, pages
            assert driver.area.view[used + 2] == (not needs_reset)

    Bench().run(holder, on="disk")


class Dice:
    """A seeded generator of a test's own (an LCG of Knuth's)."""

    def __init__(self, seed: int) -> None:
        self._state = seed

    def roll(self, sides: int) -> int:
        self._state = (self._state * 6364136223846793005 + 1442695040888963407) % (1 << 64)
        return (self._state >> 33) % sides


@pytest.mark.parametrize("name", ["disk", "rng", "old", "empty"])
@pytest.mark.parametrize("seed", range(12))
def test_no_driver_whatever_it_writes_harms_the_kernel(seed: int, name: str) -> None:
    dice = Dice(seed)
    registers = [*Register, 0x100, 0x104, 0xFFC]
    values = [0, 1, 2, 3, 4, 8, 11, 15, 64, 128, 255, 0xFFFF_FFFF, 1 << 16]

    async def holder(boot: BootImage) -> None:
        driver = await Driver.of(boot.hardware[0])
        for _ in range(60):
            if name in ("disk", "rng") and dice.roll(2):
                driver.begin()
                driver.area.view[DESC:AVAIL] = bytes(
                    dice.roll(256) if dice.roll(3) else 0 for _ in range(AVAIL)
                )
                for index in range(NUM):
                    if dice.roll(4):
                        flags = dice.roll(8) if dice.roll(4) else DESCRIPTOR_WRITE
                        where = driver.area.addresses[dice.roll(DMA_PAGES)] + dice.roll(PAGE_SIZE)
                        driver.describe(index, where, dice.roll(600), flags, dice.roll(NUM + 1))
                for _ in range(dice.roll(6)):
                    driver.offer(dice.roll(NUM + 1))
            for _ in range(dice.roll(20)):
                driver.window.write(
                    registers[dice.roll(len(registers))], values[dice.roll(len(values))]
                )
                driver.window.read(registers[dice.roll(len(registers))])
            await pause(dice.roll(3 * MS))

    bench = Bench(seed=seed)
    bench.run(holder, on=name)
    assert bench.kernel.bus.disks["disk"].block_count == BLOCKS


# ---------------------------------------------------------------------- resets


def test_a_notification_that_a_reset_or_a_fault_overtakes_is_nothing() -> None:
    async def holder(boot: BootImage) -> None:
        driver = await Driver.of(boot.hardware[0])
        driver.begin()
        driver.offer(0)
        driver.write(Register.STATUS, 0)
        await pause()
        assert driver.status == 0
        driver.begin()
        for _ in range(3):
            driver.offer(NUM)  # each of them needs a reset
        await pause()
        assert driver.status == LIVE | DeviceStatus.NEEDS_RESET

    bench = Bench()
    bench.run(holder, on="rng")
    assert [each["what"] for each in bench.told()].count("needs_reset") == 1


def test_what_is_under_way_at_a_reset_is_not_done() -> None:
    async def holder(boot: BootImage) -> None:
        driver = await Driver.of(boot.hardware[0])
        driver.begin(BLOCK_FEATURES)
        driver.request(OUT, 0, SECTOR)
        await pause(10_000)  # it is taken up
        driver.begin(BLOCK_FEATURES)
        await pause(10 * MS)
        assert driver.used == []
        assert driver.area.view[2 * DATA] == 0xEE, "its status was never written"
        assert await driver.done(IN, 0, wanted=BLOCK_SIZE) == RequestStatus.OK
        assert driver.bytes_at(2 * DATA, BLOCK_SIZE) == bytes(BLOCK_SIZE)

    Bench().run(holder, on="disk")


@pytest.mark.parametrize("name", ["disk", "rng"])
def test_when_the_holder_dies_the_device_is_reset_before_its_memory_is_used_again(
    name: str,
) -> None:
    leaked: list[Driver] = []
    refusals: list[str] = []

    async def first(boot: BootImage) -> None:
        driver = await Driver.of(boot.hardware[0])
        leaked.append(driver)
        driver.begin()
        driver.area.view[:] = b"\x77" * len(driver.area.view)
        driver.begin()
        for index in range(NUM):
            if name == "disk":
                driver.request(IN, 0, wanted=BLOCK_SIZE)
            else:
                driver.chain([(DATA, 512, DESCRIPTOR_WRITE)], first=index)
                driver.offer(index)
        try:
            await pause(1_000 * MS)
        finally:
            try:
                driver.write(Register.STATUS, LIVE)
            except ValueError as error:  # an assertion would be its last words, and dropped
                refusals.append(str(error))

    async def second(boot: BootImage) -> None:
        await pause(10 * MS)
        (old,) = leaked
        driver = await Driver.of(boot.hardware[0])
        assert driver.status == 0
        assert driver.read(Register.QUEUE_READY) == 0
        assert bytes(driver.area.view) == bytes(DMA_PAGES * PAGE_SIZE)
        driver.area.view[:4] = b"mine"
        assert bytes(old.area.view) == bytes(DMA_PAGES * PAGE_SIZE)
        for access in (lambda: old.window.read(0), lambda: old.window.write(0x70, 0)):
            with pytest.raises(ValueError, match="the mapping has ended"):
                access()

    bench = Bench()
    bench.add("first", first)
    bench.add("second", second)

    async def root(boot: BootImage) -> None:
        spawned = await bench.start(boot, "first", bench.grants(name))
        await pause(MS // 20)
        await bench.kill(spawned)
        assert (await ended_code(bench, boot, "second", name)) == 0

    bench.run_root(root)
    assert refusals == ["the mapping has ended"]
    released = [each for each in bench.told() if each["what"] == "released"]
    assert released == [{"name": name, "what": "released"}] * 2
    assert [each["what"] for each in bench.told()].count("draw") < NUM


async def ended_code(bench: Bench, boot: BootImage, name: str, device: str) -> int:
    """Start a holder and see how it ends."""
    spawned = await bench.start(boot, name, bench.grants(device))
    end = await Wait(spawned.pid, Nanos(await Now() + 1_000 * MS))
    return end.code or end.signal


def test_a_bus_is_checked_when_the_kernel_is_made() -> None:
    for hardware, options in (
        ((DISK, DISK), {}),
        ((Hardware("disk", HardwareKind.BLOCK),), {}),
        ((Hardware("disk", HardwareKind.BLOCK, size=100),), {}),
        ((RNG._replace(size=512),), {}),
        ((DISK,), {"disks": {"disk": Disk(BLOCKS + 1)}}),
        ((DISK,), {"disks": {"other": Disk(BLOCKS)}}),
        ((DISK,), {"kernel_driven": {"other"}}),
        ((EMPTY,), {"kernel_driven": {"empty"}}),
    ):
        with pytest.raises(AssertionError):
            Bench(*hardware, **options)
    assert OLD in BUS
