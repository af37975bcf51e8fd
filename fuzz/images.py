"""Fuzz the storage engine with whole disk images: each one opens or is refused with a reason.

Images are mutated from stores that were made by a workload: bytes, blocks, truncations, and, since
checksums would stop almost all of that at the door, fields of superblocks, commits, records and
checkpoints with every checksum made right again. Whatever stands on the disk, an opening ends in
Unopenable or DeviceFault or with a store that answers, lists, takes a change and tidies up, within
a bound of time and of memory.

    python -m fuzz.images --images 2000 --seed 1
"""

import argparse
import random  # noqa: TID251 (a fuzzer has a seeded generator of its own)
import sys
import time
import tracemalloc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from nexus.abi import BLOCK_SIZE
from nexus.drivers import DeviceFault, finished
from nexus.drivers.crc import crc32c
from nexus.kernel.sim.disk import Disk
from nexus.proof.powercut import LIMITS, DiskDevice
from nexus.services.statefsd.engine import Change, Damaged, Store, StoreFull, Unopenable
from nexus.services.statefsd.engine.journal import (
    HEADER_SIZE,
    TAG_FIRST,
    TAG_SIZE,
)
from nexus.services.statefsd.engine.layout import COPIES, HEAD_BLOCKS, decode_superblock
from nexus.services.statefsd.engine.record import KEY_AT, KEY_SIZE_AT, parse_head

IMAGES_DEFAULT: Final = 2_000
BLOCKS: Final = 160
SPAN_MAX: Final = 2.0  # s of CPU for one image
MEMORY_MAX: Final = 16 * 1024 * 1024  # bytes an opening may take for an image of 80 KiB
KEYS_MAX: Final = 64  # keys looked at in an opened store
NUMBERS: Final = (0, 1, 2, 7, 31, 32, 255, 508, 512, 0xFFFF, 1 << 20, 1 << 31, 0xFFFF_FFFF)


@dataclass(slots=True)
class Counts:
    """What became of the images; `slowest` is s of CPU, `largest` bytes of memory."""

    accepted: int = 0
    refused: int = 0
    slowest: float = 0.0
    largest: int = 0


def seeds() -> list[bytes]:
    """Stores in every state: blank, just formatted, with a journal, a checkpoint, both, a tail."""
    images = [bytes(BLOCKS * BLOCK_SIZE)]
    disk = Disk(BLOCKS)
    store = finished(Store.open(DiskDevice(disk), LIMITS))
    images.append(disk.image())
    source = random.Random(1)
    for number in range(90):
        key = b"/state/a%d/k%d" % (number % 3, source.randrange(20))
        value = None if number % 7 == 6 else source.randbytes(source.randrange(300))
        _ = store.stage([Change(key, value)], client=number % 2, request_id=number % 5)
        if number % 4 == 3:
            finished(store.commit(number % 8 == 7))
            _ = finished(store.maintain())
        if number % 15 == 14:
            images.append(disk.image())
    finished(store.close())
    images.append(disk.image())
    return images


def mutate(rng: random.Random, images: Sequence[bytes]) -> bytes:
    """One of the images, changed somewhere."""
    image = bytearray(rng.choice(images))
    for _ in range(rng.choice((1, 1, 2, 5))):
        match rng.randrange(8):
            case 0:
                _flip(rng, image)
            case 1:
                _copy_blocks(rng, image)
            case 2:
                at = rng.randrange(BLOCKS) * BLOCK_SIZE
                image[at : at + BLOCK_SIZE] = rng.randbytes(BLOCK_SIZE)
            case 3 | 4:
                _craft_superblock(rng, image)
            case 5 | 6:
                _craft_commit(rng, image)
            case _:
                _craft_record(rng, image)
    if rng.randrange(40) == 0:
        return rng.randbytes(len(image))
    return bytes(image)


def _flip(rng: random.Random, image: bytearray) -> None:
    for _ in range(rng.choice((1, 3, 50))):
        image[rng.randrange(len(image))] ^= 1 << rng.randrange(8)


def _copy_blocks(rng: random.Random, image: bytearray) -> None:
    count = rng.randrange(1, 20)
    start, to = rng.randrange(BLOCKS - count), rng.randrange(BLOCKS - count)
    image[to * BLOCK_SIZE : (to + count) * BLOCK_SIZE] = image[
        start * BLOCK_SIZE : (start + count) * BLOCK_SIZE
    ]


def _change_field(rng: random.Random, image: bytearray, start: int, end: int) -> None:
    width = rng.choice((1, 2, 4, 8))
    at = rng.randrange(start, max(start + 1, end - width + 1))
    old = int.from_bytes(image[at : at + width], "little")
    number = rng.choice((rng.choice(NUMBERS), old + 1, old - 1, rng.getrandbits(8 * width)))
    image[at : at + width] = (number % (1 << 8 * width)).to_bytes(width, "little")


def _craft_superblock(rng: random.Random, image: bytearray) -> None:
    """Fields of both copies, or one, with the checksum made right."""
    for block in rng.choice((COPIES, COPIES[:1], COPIES[1:])):
        start = block * BLOCK_SIZE
        _change_field(rng, image, start + 12, start + 128)
        crc = crc32c(bytes(image[start + 12 : start + BLOCK_SIZE]))
        image[start + 8 : start + 12] = crc.to_bytes(4, "little")


def _craft_commit(rng: random.Random, image: bytearray) -> None:
    """A field of a commit's header, with the checksum made right."""
    blocks = [
        at
        for at in range(HEAD_BLOCKS * BLOCK_SIZE, len(image), BLOCK_SIZE)
        if image[at : at + TAG_SIZE] == TAG_FIRST
    ]
    if not blocks:
        return
    start = rng.choice(blocks) + TAG_SIZE
    _change_field(rng, image, start + 4, start + HEADER_SIZE)
    crc = crc32c(bytes(image[start + 4 : start + HEADER_SIZE]))
    image[start : start + 4] = crc.to_bytes(4, "little")


def _craft_record(rng: random.Random, image: bytearray) -> None:
    """A field of a record of the checkpoint, or of its order or table, with checksums made right.

    The segment's checksum stands in the meta, which stays as it is: its records are then looked at
    one by one, as after damage.
    """
    found = decode_superblock(bytes(image[:BLOCK_SIZE]))
    if found is None or not found.records_size:
        return
    start = found.area_first(found.active) * BLOCK_SIZE
    end = min(len(image), start + found.records_size)
    data = bytes(image)
    heads = []
    at = start
    while (head := parse_head(data, at, end)) is not None:
        heads.append(at)
        at = head.end
    if heads and rng.randrange(2):
        at = rng.choice(heads)
        _change_field(rng, image, at + 4, at + KEY_AT + 8)
        stop = at + KEY_AT + image[at + KEY_SIZE_AT]
        image[at : at + 4] = crc32c(bytes(image[at + 4 : stop])).to_bytes(4, "little")
        return
    order = start + -(-found.records_size // BLOCK_SIZE) * BLOCK_SIZE
    _change_field(rng, image, order, min(len(image), order + 4 * found.count + 8))
    crc = crc32c(bytes(image[order : order + 4 * found.count])).to_bytes(4, "little")
    old = found.order_crc.to_bytes(4, "little")
    for block in COPIES:
        first = block * BLOCK_SIZE
        piece = bytes(image[first : first + BLOCK_SIZE]).replace(old, crc)
        whole = piece[:8] + crc32c(piece[12:]).to_bytes(4, "little") + piece[12:]
        image[first : first + BLOCK_SIZE] = whole


def try_image(image: bytes) -> bool:
    """Open an image and use it; whether it opened."""
    device = DiskDevice(Disk(len(image) // BLOCK_SIZE, content=image))
    try:
        store = finished(Store.open(device, LIMITS))
    except (Unopenable, DeviceFault) as error:
        assert str(error).isprintable(), str(error)
        return False
    keys, _ = store.keys(b"", b"", KEYS_MAX, lambda _: True)
    for key in keys:
        try:
            _ = finished(store.get(key))
        except Damaged:
            continue
    if store.writable:
        try:
            _ = store.stage([Change(b"/state/fuzz/x", b"x"), Change(b"/state/fuzz/y", None)])
            finished(store.commit(True))
            for _ in range(8):
                _ = finished(store.maintain())
        except (StoreFull, DeviceFault):
            return True
    return True


def campaign(count: int, seed: int) -> Counts:
    """Open `count` mutated images; what became of them."""
    rng = random.Random(f"{seed} images")
    images = seeds()
    counts = Counts()
    tracemalloc.start()
    try:
        for _ in range(count):
            image = mutate(rng, images)
            before = time.process_time()
            tracemalloc.reset_peak()
            held = tracemalloc.get_traced_memory()[0]
            try:
                accepted = try_image(image)
            except BaseException:
                print(f"fuzz: the image was {image.hex()}", file=sys.stderr)
                raise
            counts.accepted += accepted
            counts.refused += not accepted
            counts.slowest = max(counts.slowest, time.process_time() - before)
            counts.largest = max(counts.largest, tracemalloc.get_traced_memory()[1] - held)
            assert counts.slowest < SPAN_MAX, f"{counts.slowest:.1f} s for one image"
            assert counts.largest < MEMORY_MAX, f"{counts.largest} bytes for one image"
    finally:
        tracemalloc.stop()
    return counts


def main(arguments: Sequence[str] | None = None) -> int:
    """Run and report; 1 if nothing was opened or nothing refused."""
    parser = argparse.ArgumentParser(prog="fuzz.images", description=__doc__)
    parser.add_argument("--images", type=int, default=IMAGES_DEFAULT, help="inputs")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    counts = campaign(options.images, options.seed)
    fault = "" if counts.accepted and counts.refused else "  NOT TESTED"
    tally = f"accepted {counts.accepted:7d}  refused {counts.refused:7d}"
    size = f"largest {counts.largest >> 10} KiB"
    print(f"{'images':44s} {tally}  slowest {counts.slowest * 1000:.0f} ms  {size}{fault}")
    return 1 if fault else 0


if __name__ == "__main__":
    sys.exit(main())
