"""The long run of the store: a million puts over ten thousand keys, within its declared budget.

The budget is the device's size: nothing is written outside it by construction, so what is shown is
that the store never comes to a stop in it, that its checkpoint in memory stays within its share of
the disk all the way, that no single step of tidying up writes more than its bound, that an opening
with two checkpoints stays within the declared memory, and that everything is there at the end.
"""

import argparse
import sys
import tracemalloc
from collections.abc import Sequence
from random import Random  # noqa: TID251 (the workload, from the run's seed)
from typing import Final, NamedTuple

from nexus.abi import BLOCK_SIZE
from nexus.drivers import finished
from nexus.kernel.sim.disk import Disk
from nexus.proof.powercut import DiskDevice
from nexus.services.statefsd.engine import Change, Quota, Store, StoreLimits

PUTS: Final = 1_000_000
KEYS: Final = 10_000
VALUE_SIZE: Final = 64  # bytes
DISK_SIZE: Final = 8 * 1024 * 1024  # bytes: the declared budget of the disk
MEMORY_MAX: Final = 32 * 1024 * 1024  # bytes: two checkpoints, a ring of changes, the disk's model
STEP_SIZE_MAX: Final = 65 * 1024  # bytes of one maintain(): 64 KiB, and a last record beyond them
STEP_WRITES_MAX: Final = 4  # of one maintain(): both copies of a checkpoint's meta, two superblocks
CHECKPOINT_SHARE: Final = 2  # the disk has room for two, so one in memory is at most its half
GROUP: Final = 16
SEED: Final = 1
LIMITS: Final = StoreLimits(
    quota=Quota(size=DISK_SIZE, keys=KEYS),
    quotas={},
    reserves={},
    areas_max=8,
    clients_kept=8,
    requests_kept=16,
    lost_kept=16,
)


class LongRun(NamedTuple):
    """What came of it."""

    puts: int
    compactions: int
    blocks_used: int  # of the disk, highest
    blocks: int
    step_size: int  # bytes that one maintain() wrote at most
    step_writes: int  # device writes of one maintain() at most
    checkpoint: int  # bytes of the checkpoint in memory, highest while it ran
    memory: int  # bytes of Python objects of an opening at most, the disk's model not counted
    problem: str | None

    @property
    def text(self) -> str:
        """In one line."""
        return (
            f"{self.puts} puts over {KEYS} keys, {self.compactions} checkpoints: "
            f"{self.blocks_used} of {self.blocks} blocks; a step wrote at most "
            f"{self.step_size} bytes in {self.step_writes} writes; "
            f"{self.checkpoint >> 10} KiB of checkpoint while it ran, "
            f"{self.memory >> 10} KiB of memory to open it again: "
            f"{self.problem or 'everything is there'}"
        )


class Counted(DiskDevice):
    """What was written since `begin`."""

    def __init__(self, disk: Disk) -> None:
        super().__init__(disk)
        self.begin()

    def begin(self) -> None:
        """Count from nothing."""
        self.size = 0
        self.writes = 0

    async def write(
        self, block: int, data: bytes | bytearray | memoryview, *, durable: bool = False
    ) -> None:
        """Count, then write."""
        self.size += len(data)
        self.writes += 1
        await super().write(block, data, durable=durable)


def run(puts: int = PUTS, *, keys: int = KEYS, disk_size: int = DISK_SIZE) -> LongRun:
    """Put, and look at the end."""
    source = Random(SEED)  # noqa: S311 (a workload, no keys)
    disk = Disk(disk_size // BLOCK_SIZE)
    device = Counted(disk)
    store = finished(Store.open(device, LIMITS))
    step_size = step_writes = checkpoint = 0
    latest: dict[int, int] = {}
    for number in range(puts):
        key = source.randrange(keys)
        _ = store.stage([Change(_key(key), _value(number))])
        latest[key] = number
        if number % GROUP == GROUP - 1:
            finished(store.commit(True))
            device.begin()
            _ = finished(store.maintain())
            step_size = max(step_size, device.size)
            step_writes = max(step_writes, device.writes)
            checkpoint = max(checkpoint, store.memory)
    finished(store.close())
    compactions = store.compactions
    del store
    tracemalloc.start()
    try:
        again = finished(Store.open(DiskDevice(disk), LIMITS))
        again._begin_build()  # noqa: SLF001 (two checkpoints at once are the most it holds)
        while finished(again.maintain()):
            pass
        memory = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    problem = None
    if memory > MEMORY_MAX:
        problem = f"{memory} bytes of memory"
    if checkpoint > disk_size // CHECKPOINT_SHARE:
        problem = f"a checkpoint of {checkpoint} bytes in memory"
    if step_size > STEP_SIZE_MAX or step_writes > STEP_WRITES_MAX:
        problem = f"a step of {step_size} bytes, or of {step_writes} writes"
    for key, number in latest.items():
        entry = finished(again.get(_key(key)))
        if entry is None or entry.value != _value(number):
            problem = f"{_key(key)!r} is not what was put last"
    if again.key_count != len(latest) or again.lost_count:
        problem = f"{again.key_count} keys, {again.lost_count} lost"
    used = sum(1 for block in range(disk.block_count) if disk.read(block, 1).strip(b"\0"))
    return LongRun(
        puts=puts,
        compactions=compactions,
        blocks_used=used,
        blocks=disk.block_count,
        step_size=step_size,
        step_writes=step_writes,
        checkpoint=checkpoint,
        memory=memory,
        problem=problem,
    )


def _key(number: int) -> bytes:
    return b"/state/longrun/%05d" % number


def _value(number: int) -> bytes:
    return b"%08d" % number * (VALUE_SIZE // 8)


def main(argv: Sequence[str]) -> int:
    """Run and print; 1 if something was wrong."""
    parser = argparse.ArgumentParser(prog="nexus.proof.longrun", description=__doc__)
    _ = parser.add_argument("--puts", type=int, default=PUTS)
    found = run(parser.parse_args(list(argv)).puts)
    _ = sys.stdout.write(f"{found.text}\n")
    return 1 if found.problem else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
