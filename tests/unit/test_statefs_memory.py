"""What a full store takes in memory: no more than memory_needed says, whatever is done with it."""

import gc
import tracemalloc
from collections.abc import Callable
from typing import TypeVar

import pytest

from nexus.abi import BLOCK_SIZE
from nexus.drivers import finished
from nexus.services.statefsd.engine import (
    Change,
    Quota,
    Store,
    StoreFull,
    StoreLimits,
    layout,
    memory_needed,
)

BLOCKS = 4 * 1024 * 1024 // BLOCK_SIZE
WIDE = Quota(size=1 << 30, keys=1 << 24)
LIMITS = StoreLimits(
    quota=WIDE,
    quotas={},
    reserves={},
    areas_max=32,
    clients_kept=64,
    requests_kept=64,
    lost_kept=64,
)
CLEAN_MAX = memory_needed(BLOCKS) - layout.MEMORY_FIXED  # what is fixed is for damage
T = TypeVar("T")


class Image:
    """A device whose bytes are there before anything is measured."""

    def __init__(self, data: bytes) -> None:
        self.data = bytearray(data)
        self.block_count = len(data) // BLOCK_SIZE
        self.writable = True

    async def read(self, block: int, count: int) -> bytes:
        return bytes(self.data[block * BLOCK_SIZE : (block + count) * BLOCK_SIZE])

    async def write(
        self, block: int, data: bytes | bytearray | memoryview, *, durable: bool = False
    ) -> None:
        del durable
        self.data[block * BLOCK_SIZE : block * BLOCK_SIZE + len(data)] = data

    async def flush(self) -> None:
        """Everything is there."""


def measured(work: Callable[[], T]) -> tuple[T, int]:
    """What came of it, and the most memory it took."""
    _ = gc.collect()
    tracemalloc.start()
    try:
        made = work()
        return made, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def opened(device: Image) -> Store:
    return finished(Store.open(device, LIMITS))


def put(store: Store, first: int, value_size: int) -> None:
    """64 keys in one commit; no two values are one object."""
    for number in range(first, first + 64):
        _ = store.stage([Change(b"/state/a/%d" % number, b"%d" % number * (value_size // 4))])
    finished(store.commit(False))


def full(value_size: int) -> tuple[Image, int]:
    """A store that is full, and how many keys it has."""
    device = Image(bytes(BLOCKS * BLOCK_SIZE))
    store = opened(device)
    count = 0
    try:
        while True:
            put(store, count, value_size)
            count += 64
            _ = finished(store.maintain())
    except StoreFull:
        finished(store.commit(True))
    while finished(store.maintain()):
        pass
    finished(store.close())
    return device, count


def compacted_under_load(device: Image, count: int, value_size: int) -> Store:
    """Changes until most of the ring is used, and more while the checkpoint is built."""
    store = opened(device)
    first = 0
    while store._builder is None and store._ring_used * 10 < store._ring_blocks * 7:
        put(store, first % (count - 64), value_size)
        first += 64
    if store._builder is None:
        store._begin_build()
    while finished(store.maintain()):
        if store._ring_used * 10 < store._ring_blocks * 9:
            put(store, first % (count - 64), value_size)
            first += 64
    return store


@pytest.mark.parametrize("value_size", [0, 8, 400])
def test_a_full_store_is_opened_and_compacted_within_what_is_said(value_size: int) -> None:
    device, count = full(value_size)
    store, opening = measured(lambda: opened(device))
    assert store.used > store.capacity * 9 // 10
    del store
    store, compacting = measured(lambda: compacted_under_load(device, count, value_size))

    assert store.compactions >= 2
    assert opening < CLEAN_MAX
    assert opening < compacting < CLEAN_MAX
    assert compacting > CLEAN_MAX // 4, "it says something"


def test_one_flipped_bit_takes_no_more_than_what_it_is_in() -> None:
    device, _ = full(8)
    store, clean = measured(lambda: opened(device))
    found = store._found
    del store
    device.data[found.area_first(found.active) * BLOCK_SIZE + 10] ^= 1

    store, flipped = measured(lambda: opened(device))

    assert store.lost_count == 1
    assert flipped < clean + layout.SEGMENT_SIZE


def test_a_segment_of_garbage_is_told_within_what_is_said() -> None:
    device, _ = full(0)
    store = opened(device)
    found = store._found
    start = found.area_first(found.active) * BLOCK_SIZE
    device.data[start : start + layout.SEGMENT_SIZE] = bytes(layout.SEGMENT_SIZE)

    store, peak = measured(lambda: opened(device))

    assert store.lost_count > 10_000
    assert peak < memory_needed(BLOCKS)


def test_memory_grows_with_the_store_up_to_the_largest() -> None:
    sizes = [memory_needed(count) for count in (128, 4096, 65536, layout.STORE_BLOCKS_MAX)]

    assert sizes == sorted(sizes)
    assert memory_needed(2 * layout.STORE_BLOCKS_MAX) == sizes[-1] < 400 * 1024 * 1024
    assert memory_needed(layout.STORE_BLOCKS_MIN - 1) == 0
