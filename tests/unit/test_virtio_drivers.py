"""The virtio drivers, against devices that do what the specification says, and that lie."""

from collections.abc import Callable
from typing import Any

import pytest

from nexus.abi import BLOCK_SIZE, PAGE_SIZE, Nanos
from nexus.drivers import (
    REQUEST_MAX,
    BlockDevice,
    DeviceFault,
    EntropyDevice,
    Fault,
    VirtioBlock,
    VirtioEntropy,
    open_block,
    open_entropy,
)
from nexus.drivers.entropy import DRAW_MAX
from nexus.drivers.virtio import (
    ACKNOWLEDGE,
    DRIVER,
    FAILED,
    FEATURES_OK,
    INDEX_COUNT,
    MAGIC,
    NEEDS_RESET,
    PAUSE_MAX,
    QUEUE_READY,
    RUNNING,
    STATUS,
    VERSION_1,
    Identity,
)
from nexus.drivers.virtio_block import DATA_PAGES_MAX, FLUSH_FEATURE, READ_ONLY_FEATURE
from tests.fakes.virtio import SLOT, START, FakeDisk, FakeEntropy, FakeVirtio, Lies, Request, drive

UP = [0, ACKNOWLEDGE, ACKNOWLEDGE | DRIVER, ACKNOWLEDGE | DRIVER | FEATURES_OK]
LATER = Nanos(START + REQUEST_MAX)


def entropy(device: FakeEntropy) -> VirtioEntropy:
    opened = drive(open_entropy(SLOT), device)
    assert isinstance(opened, VirtioEntropy)
    return opened


def block(device: FakeDisk) -> VirtioBlock:
    opened = drive(open_block(SLOT), device)
    assert isinstance(opened, VirtioBlock)
    return opened


def fault_of(run: Callable[[], Any]) -> Fault:
    with pytest.raises(DeviceFault) as caught:
        run()
    return caught.value.fault


def pattern(block_number: int) -> bytes:
    return bytes((block_number + place) % 256 for place in range(BLOCK_SIZE))


# ---------------------------------------------------------------- bring-up


def test_a_device_is_brought_up_in_the_order_of_the_specification() -> None:
    device = FakeEntropy()

    driver = entropy(device)

    assert device.statuses == [*UP, RUNNING]
    order = [offset for offset, _ in device.written]
    last_status = len(order) - 1 - order[::-1].index(STATUS)
    assert order.index(QUEUE_READY) < last_status, "the queue stands before DRIVER_OK"
    assert driver.identity == Identity(MAGIC, 2, 4, VERSION_1)


@pytest.mark.parametrize(
    "lies", [Lies(magic=0x74726977), Lies(version=1), Lies(version=3), Lies(device_id=2)]
)
def test_what_is_no_modern_device_of_our_kind_is_refused_without_a_write(lies: Lies) -> None:
    device = FakeEntropy(lies=lies)

    assert fault_of(lambda: entropy(device)) is Fault.REFUSED
    assert device.written == []


@pytest.mark.parametrize(
    "options",
    [
        {"features": 0},
        {"lies": Lies(drops_features_ok=True)},
        {"lies": Lies(queue_in_use=True)},
        {"lies": Lies(does_not_start=True)},
        {"entries_max": 0},
    ],
    ids=["no VERSION_1", "drops FEATURES_OK", "queue in use", "does not start", "no queue"],
)
def test_a_device_that_does_not_negotiate_is_marked_failed(options: dict[str, Any]) -> None:
    device = FakeEntropy(**options)

    assert fault_of(lambda: entropy(device)) is Fault.REFUSED
    assert device.statuses[-1] & FAILED
    assert device.requests == []


def test_a_device_that_does_not_agree_is_given_up_before_it_could_be_started() -> None:
    device = FakeEntropy(lies=Lies(drops_features_ok=True))

    assert fault_of(lambda: entropy(device)) is Fault.REFUSED

    assert device.statuses == [*UP, ACKNOWLEDGE | DRIVER | FAILED]
    assert QUEUE_READY not in {offset for offset, _ in device.written}, "it has no queue"


def test_a_reset_that_takes_its_time_is_waited_for() -> None:
    device = FakeEntropy(reset_delay=10_000_000)

    _ = entropy(device)

    assert device.now >= START + 10_000_000
    assert device.statuses[-1] == RUNNING


def test_a_device_that_never_resets_is_not_used() -> None:
    device = FakeEntropy(lies=Lies(never_resets=True))

    assert fault_of(lambda: entropy(device)) is Fault.TIMED_OUT
    assert device.statuses == [0]


# ---------------------------------------------------------------- entropy


@pytest.mark.parametrize("entries", [1, 2, 3, 8, 1024])
def test_draws_of_every_queue_size_deliver_what_the_device_wrote(entries: int) -> None:
    device = FakeEntropy(entries_max=entries)
    driver: EntropyDevice = entropy(device)

    first = drive(driver.draw(256, LATER), device)
    second = drive(driver.draw(3, LATER), device)

    assert first == bytes(place % 251 for place in range(256))
    assert second == bytes((256 + place) % 251 for place in range(3))


def test_no_drawn_byte_stays_in_the_memory_of_the_device() -> None:
    device = FakeEntropy()
    driver = entropy(device)

    drawn = drive(driver.draw(64, LATER), device)

    assert drawn == bytes(range(64))
    assert device.memory[PAGE_SIZE:] == bytes(len(device.memory) - PAGE_SIZE)


def test_what_a_device_left_behind_its_reset_is_no_part_of_a_delivery() -> None:
    class Untidy(FakeEntropy):
        """Writes once more when it was reset, and says it wrote more than it does."""

        def _on_status(self, value: int) -> None:
            super()._on_status(value)
            if value == RUNNING:
                self.memory[PAGE_SIZE : 2 * PAGE_SIZE] = PAGE_SIZE * b"\xa5"

        def act(self, request: Request) -> int:
            self.scatter(request, bytes(range(1, 5)))
            return request.room

    device = Untidy()
    driver = entropy(device)
    first = drive(driver.draw(32, LATER), device)
    device.lies = Lies(never_completes=True)
    assert fault_of(lambda: drive(driver.draw(32, LATER), device)) is Fault.TIMED_OUT
    device.lies = Lies()
    second = drive(driver.draw(32, Nanos(device.now + DRAW_MAX)), device)

    assert driver.resets == 1
    assert first == second == bytes(range(1, 5)) + bytes(28)


@pytest.mark.parametrize("lies", [Lies(length=lambda size: size + 1), Lies(id_offset=1)])
def test_a_delivery_that_is_not_believed_is_wiped_as_well(lies: Lies) -> None:
    device = FakeEntropy()
    driver = entropy(device)
    device.lies = lies

    assert fault_of(lambda: drive(driver.draw(64, LATER), device)) is Fault.IO
    assert device.drawn == 64
    assert device.memory[PAGE_SIZE:] == bytes(len(device.memory) - PAGE_SIZE)


@pytest.mark.parametrize("delivered", [0, 1, 31])
def test_a_short_delivery_is_told_as_short(delivered: int) -> None:
    device = FakeEntropy(lies=Lies(length=lambda _: delivered))
    driver = entropy(device)

    assert drive(driver.draw(32, LATER), device) == bytes(range(delivered))


def test_the_indexes_wrap_at_sixteen_bits() -> None:
    device = FakeEntropy(entries_max=8)
    driver = entropy(device)
    device.seen = device.used = INDEX_COUNT - 2
    driver._virtio._index = INDEX_COUNT - 2
    driver._virtio._available_index[0] = driver._virtio._used_index[0] = INDEX_COUNT - 2

    draws = [drive(driver.draw(4, LATER), device) for _ in range(4)]

    assert [draw[0] for draw in draws] == [0, 4, 8, 12]
    assert device.used == 2


# ---------------------------------------------------------------- hostile devices


@pytest.mark.parametrize(
    "lies",
    [
        Lies(length=lambda size: size + 1),
        Lies(length=lambda _: 0xFFFF_FFFF),
        Lies(extra_completions=1),
        Lies(extra_completions=300),
        Lies(id_offset=1),
        Lies(id_offset=0x1000_0000),
    ],
    ids=["longer", "huge", "twice", "far index", "next id", "no id"],
)
def test_what_cannot_be_is_a_fault_and_resets_the_device(lies: Lies) -> None:
    device = FakeEntropy()
    driver = entropy(device)
    device.lies = lies

    assert fault_of(lambda: drive(driver.draw(32, LATER), device)) is Fault.IO
    assert device.statuses[-1] == 0

    device.lies = Lies()
    assert len(drive(driver.draw(32, LATER), device)) == 32
    assert driver.resets == 1


def test_a_second_completion_of_an_old_request_is_found_before_the_next() -> None:
    device = FakeEntropy()
    driver = entropy(device)
    _ = drive(driver.draw(32, LATER), device)
    device.complete(device.requests[-1].head, 32)

    assert fault_of(lambda: drive(driver.draw(32, LATER), device)) is Fault.IO
    assert len(device.requests) == 1


def test_a_request_without_an_answer_times_out_and_resets_the_device() -> None:
    device = FakeEntropy()
    driver = entropy(device)
    device.lies = Lies(never_completes=True)
    before = device.now

    assert fault_of(lambda: drive(driver.draw(32, LATER), device)) is Fault.TIMED_OUT
    assert before + DRAW_MAX <= device.now <= before + DRAW_MAX + PAUSE_MAX
    assert device.statuses[-1] == 0


def test_the_caller_s_deadline_ends_a_wait_before_the_device_s_own() -> None:
    device = FakeEntropy()
    driver = entropy(device)
    device.lies = Lies(never_completes=True)
    soon = Nanos(device.now + 1_000_000)

    assert fault_of(lambda: drive(driver.draw(32, soon), device)) is Fault.TIMED_OUT
    assert device.now == soon


def test_an_answer_at_the_last_moment_counts() -> None:
    device = FakeEntropy()
    driver = entropy(device)
    device.delay = DRAW_MAX

    assert len(drive(driver.draw(32, LATER), device)) == 32


def test_a_slow_device_is_looked_at_with_growing_pauses() -> None:
    device = FakeEntropy(delay=50_000_000)
    driver = entropy(device)
    looks = []
    read = device.read

    def noted(offset: int) -> int:
        looks.append(device.now)
        return read(offset)

    device.read = noted  # type: ignore[method-assign]
    _ = drive(driver.draw(32, LATER), device)

    assert len(set(looks)) < 60, "about one look for each millisecond"


def test_a_late_completion_is_never_taken_for_the_next_draw() -> None:
    device = FakeEntropy()
    driver = entropy(device)
    device.lies = Lies(never_completes=True)
    assert fault_of(lambda: drive(driver.draw(32, LATER), device)) is Fault.TIMED_OUT
    device.lies = Lies(stale_completion=True)

    assert fault_of(lambda: drive(driver.draw(32, LATER), device)) is Fault.IO

    device.lies = Lies()
    assert len(drive(driver.draw(32, LATER), device)) == 32


def test_the_memory_is_not_used_before_a_failed_device_has_reset() -> None:
    device = FakeDisk()
    driver = block(device)
    device.lies = Lies(never_completes=True)
    assert fault_of(lambda: drive(driver.read(0, 1), device)) is Fault.TIMED_OUT
    device.lies = Lies(never_resets=True)
    memory = bytes(device.memory)

    assert fault_of(lambda: drive(driver.write(0, pattern(1)), device)) is Fault.TIMED_OUT
    assert bytes(device.memory) == memory


def test_a_device_that_asks_for_a_reset_is_reset_and_its_request_lost() -> None:
    device = FakeEntropy()
    driver = entropy(device)
    device.lies = Lies(needs_reset=True)

    assert fault_of(lambda: drive(driver.draw(32, LATER), device)) is Fault.GONE
    assert device.statuses[-1] == 0

    device.lies = Lies()
    assert len(drive(driver.draw(32, LATER), device)) == 32


@pytest.mark.parametrize("status", [RUNNING | NEEDS_RESET, 0, RUNNING | FAILED, 0xFFFF_FFFF])
def test_a_device_that_ceased_to_run_between_requests_is_reset(status: int) -> None:
    device = FakeEntropy()
    driver = entropy(device)
    device.registers[STATUS] = status

    assert fault_of(lambda: drive(driver.draw(32, LATER), device)) is Fault.GONE
    assert device.requests == []
    assert len(drive(driver.draw(32, LATER), device)) == 32


# ---------------------------------------------------------------- blocks


@pytest.mark.parametrize("entries", [4, 8, 32, 1024])
def test_what_is_written_is_read_again_over_any_number_of_requests(entries: int) -> None:
    device = FakeDisk(entries_max=entries)
    driver: BlockDevice = block(device)
    count = DATA_PAGES_MAX * PAGE_SIZE // BLOCK_SIZE + 3
    data = b"".join(pattern(number) for number in range(count))

    drive(driver.write(5, data), device)

    assert device.content[5 * BLOCK_SIZE : (5 + count) * BLOCK_SIZE] == data
    assert drive(driver.read(5, count), device) == data
    assert drive(driver.read(4, 1), device) == bytes(BLOCK_SIZE)


def test_the_size_comes_from_the_configuration() -> None:
    assert block(FakeDisk(77)).block_count == 77


def test_a_durable_write_is_flushed_and_a_plain_one_is_not() -> None:
    device = FakeDisk()
    driver = block(device)

    drive(driver.write(0, pattern(0)), device)
    assert device.flushes == 0
    drive(driver.write(1, pattern(1), durable=True), device)
    assert device.flushes == 1
    drive(driver.flush(), device)
    assert device.flushes == 2


@pytest.mark.parametrize("features", [VERSION_1, VERSION_1 | FLUSH_FEATURE | READ_ONLY_FEATURE])
def test_a_device_without_flush_or_for_reading_only_is_not_written(features: int) -> None:
    device = FakeDisk(features=features)
    driver = block(device)

    assert not driver.writable
    assert fault_of(lambda: drive(driver.write(0, pattern(0)), device)) is Fault.READ_ONLY
    assert fault_of(lambda: drive(driver.flush(), device)) is Fault.READ_ONLY
    assert drive(driver.read(0, 1), device) == bytes(BLOCK_SIZE)
    assert len(device.requests) == 1


@pytest.mark.parametrize(
    ("lies", "fault"),
    [
        (Lies(status=1), Fault.IO),
        (Lies(status=2), Fault.REFUSED),
        (Lies(status=7), Fault.IO),
        (Lies(status_untouched=True), Fault.IO),
        (Lies(length=lambda size: size - 1), Fault.IO),
        (Lies(length=lambda _: 0), Fault.IO),
        (Lies(length=lambda size: size + 1), Fault.IO),
        (Lies(never_completes=True), Fault.TIMED_OUT),
        (Lies(needs_reset=True), Fault.GONE),
    ],
    ids=[
        "io error",
        "unsupported",
        "unknown status",
        "no status",
        "short",
        "nothing",
        "longer",
        "never",
        "needs reset",
    ],
)
@pytest.mark.parametrize("operation", ["read", "write", "durable", "flush"])
def test_a_request_that_is_not_wholly_done_is_a_fault(
    operation: str, lies: Lies, fault: Fault
) -> None:
    device = FakeDisk()
    driver = block(device)
    runs = {
        "read": lambda: driver.read(0, 9),
        "write": lambda: driver.write(0, pattern(0)),
        "durable": lambda: driver.write(0, pattern(0), durable=True),
        "flush": driver.flush,
    }
    device.lies = lies

    assert fault_of(lambda: drive(runs[operation](), device)) is fault
    assert len(device.requests) == 1, "nothing is repeated, nothing follows a failure"


@pytest.mark.parametrize(("at", "count"), [(-1, 1), (0, 0), (1024, 1), (1023, 2), (1 << 63, 1)])
def test_blocks_outside_the_device_are_not_asked_for(at: int, count: int) -> None:
    device = FakeDisk(1024)
    driver = block(device)

    assert fault_of(lambda: drive(driver.read(at, count), device)) is Fault.OUT_OF_RANGE
    if count:
        data = bytes(count * BLOCK_SIZE)
        assert fault_of(lambda: drive(driver.write(at, data), device)) is Fault.OUT_OF_RANGE
    assert device.requests == []


def test_a_queue_too_short_for_a_block_request_is_refused() -> None:
    device = FakeDisk(entries_max=2)

    assert fault_of(lambda: block(device)) is Fault.REFUSED
    assert device.statuses[-1] & FAILED


def test_a_configuration_that_never_stands_still_is_refused() -> None:
    assert fault_of(lambda: block(FakeDisk(lies=Lies(restless=True)))) is Fault.REFUSED


@pytest.mark.parametrize("change", ["size", "features"])
def test_a_disk_that_comes_back_from_a_reset_as_another_is_refused(change: str) -> None:
    device = FakeDisk()
    driver = block(device)
    device.lies = Lies(never_completes=True)
    assert fault_of(lambda: drive(driver.read(0, 1), device)) is Fault.TIMED_OUT
    device.lies = Lies()
    if change == "size":
        device.block_count -= 1
    else:
        device.features = VERSION_1

    assert fault_of(lambda: drive(driver.read(0, 1), device)) is Fault.REFUSED


def test_a_driver_is_a_driver_of_any_device_window() -> None:
    device: FakeVirtio = FakeDisk()

    assert fault_of(lambda: drive(open_entropy(SLOT), device)) is Fault.REFUSED
    assert device.written == []
