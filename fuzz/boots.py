"""Mutated boot devices against both readers of boot control, and the reader of the anchor.

Bytes anywhere, blocks moved about, and, since checksums would stop almost all of that at the door,
bodies and variables whose checksums are made right again. Whatever stands there, `open_boot` ends
in NoBootRecord with one printable line, or with a record that is possible, from which a boot can be
attempted, stored and found again.

    python -m fuzz.boots --devices 5000 --seed 1
"""

import argparse
import random  # noqa: TID251 (a fuzzer has a seeded generator of its own)
import sys
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from fuzz.decoders import mutate as mutate_bytes
from nexus.abi import BLOCK_SIZE
from nexus.bootctl import (
    BOOT_BLOCKS_MIN,
    BlockBoot,
    BootRefused,
    Cause,
    EnvironmentBoot,
    NoAnchor,
    NoBootRecord,
    Reason,
    SlotInfo,
    SlotName,
    attempt,
    open_boot,
    problem_of,
    provisioned,
    staged,
    staging,
    switch,
)
from nexus.bootctl.anchor import ANCHOR_BLOCKS, ANCHOR_COPIES
from nexus.bootctl.block import COPIES, COPY_SIZE
from nexus.bootctl.environment import (
    ENVIRONMENT_COPIES,
    ENVIRONMENT_SIZE,
    Copy,
    decode_environment,
    encode_environment,
)
from nexus.drivers import finished
from nexus.drivers.crc import crc32c
from nexus.kernel.sim.disk import Disk
from nexus.proof.powercut import DiskDevice

DEVICES_DEFAULT: Final = 5_000
SPAN_MAX: Final = 1.0  # s of CPU for one device
HEAD_SIZE: Final = 24  # of a copy of the record, and 16 of one of the anchor
SUMMED_FROM: Final = 8  # magic and checksum stand before
VALUES: Final = ("", "0", "00", "-1", "9" * 30, "a", "b", "c", "good", "trying", "bad", "\xff", "x")


@dataclass(slots=True)
class Counts:
    """What became of the devices; `slowest` is s of CPU."""

    accepted: int = 0
    refused: int = 0
    slowest: float = 0.0


def seeds() -> list[bytes]:
    """Boot devices of both backends at every step of an update, and an empty one."""
    images = [bytes(BOOT_BLOCKS_MIN * BLOCK_SIZE)]
    for backend in (BlockBoot, EnvironmentBoot):
        disk = Disk(BOOT_BLOCKS_MIN)
        boot = backend(DiskDevice(disk))
        first = SlotInfo(version=1, name="1.0.0", digest=bytes(range(32)), size=1 << 20)
        record = finished(boot.create(provisioned(first)))
        finished(boot.write_anchor(b'{"signed":{}}' * 40))
        images.append(disk.image())
        second = SlotInfo(version=2, name="2.0.0 \u00e9", digest=bytes(32), size=5, floor=1)
        reason = Reason(
            cause=Cause.SWITCHED, slot=SlotName.B, version=2, boot=1, detail="d", tail="a\nb\\"
        )
        record = finished(boot.store(staged(staging(record), second)))
        record = finished(boot.store(switch(record, 2, reason, snapshot=3)))
        for _ in range(3):
            images.append(disk.image())
            record = finished(boot.store(attempt(record)[0]))
        images.append(disk.image())
    return images


def mutate(rng: random.Random, images: Sequence[bytes]) -> bytes:
    """One of the devices, changed somewhere."""
    image = bytearray(rng.choice(images))
    for _ in range(rng.choice((1, 1, 2, 4))):
        match rng.randrange(6):
            case 0:
                for _ in range(rng.choice((1, 3, 50))):
                    image[rng.randrange(len(image))] ^= 1 << rng.randrange(8)
            case 1:
                count = rng.randrange(1, 40)
                start, to = (rng.randrange(BOOT_BLOCKS_MIN - count) * BLOCK_SIZE for _ in range(2))
                size = count * BLOCK_SIZE
                image[to : to + size] = image[start : start + size]
            case 2 | 3:
                _craft(rng, image, rng.choice(COPIES), COPY_SIZE, HEAD_SIZE)
            case 4:
                _craft_environment(rng, image)
            case _:
                at = rng.choice(ANCHOR_COPIES)
                _craft(rng, image, at, ANCHOR_BLOCKS * BLOCK_SIZE, 16)
    return bytes(image)


def _craft(rng: random.Random, image: bytearray, block: int, size: int, head: int) -> None:
    """A mutated body or header of a copy, with size and checksum made right, mostly."""
    start = block * BLOCK_SIZE
    body = bytes(image[start + head : start + size]).rstrip(b"\0")
    if rng.randrange(2):
        body = mutate_bytes(rng, [body])[: size - head]
        image[start + 12 : start + 16] = len(body).to_bytes(4, "little")
        image[start + head : start + size] = body.ljust(size - head, b"\0")
    else:
        at = start + rng.randrange(SUMMED_FROM, head)
        image[at] = rng.choice((0, 1, 2, 255, image[at] ^ 1))
    checksum = crc32c(bytes(image[start + SUMMED_FROM : start + size]))
    image[start + 4 : start + SUMMED_FROM] = checksum.to_bytes(4, "little")


def _craft_environment(rng: random.Random, image: bytearray) -> None:
    """Variables changed, exchanged and lost, or bytes of them, with the checksum made right."""
    start = rng.choice(ENVIRONMENT_COPIES) * BLOCK_SIZE
    found = decode_environment(bytes(image[start : start + ENVIRONMENT_SIZE]))
    if not isinstance(found, Copy) or not found.variables or not rng.randrange(3):
        data = mutate_bytes(rng, [bytes(image[start + 5 : start + ENVIRONMENT_SIZE]).rstrip(b"\0")])
        data = data[: ENVIRONMENT_SIZE - 5].ljust(ENVIRONMENT_SIZE - 5, b"\0")
        copy = zlib.crc32(data).to_bytes(4, "little") + bytes([rng.randrange(256)]) + data
    else:
        variables = dict(found.variables)
        for _ in range(rng.choice((1, 2))):
            name = rng.choice(sorted(variables))
            if rng.randrange(4):
                others = [*VALUES, *variables.values()]
                variables[name] = rng.choice(others)
            elif len(variables) > 1:
                del variables[name]
        copy = encode_environment(rng.choice((found.flags, rng.randrange(256))), variables)
    image[start : start + ENVIRONMENT_SIZE] = copy


def try_device(image: bytes) -> bool:
    """Read a device and boot from it as the loader does; whether there was a record."""
    device = DiskDevice(Disk(len(image) // BLOCK_SIZE, content=image))
    boot: BlockBoot | EnvironmentBoot = BlockBoot(device)
    try:
        _ = finished(boot.read_anchor())
    except NoAnchor as error:
        assert str(error).isprintable(), str(error)
    try:
        control, record = finished(open_boot(device))
    except NoBootRecord as error:
        assert str(error).isprintable(), str(error)
        return False
    assert problem_of(record) is None
    try:
        tried, _ = attempt(record)
    except BootRefused:
        return True
    assert finished(control.store(tried)).boots == record.boots + 1
    assert finished(open_boot(device))[1].slots == tried.slots
    return True


def campaign(count: int, seed: int) -> Counts:
    """Read `count` mutated devices; what became of them."""
    rng = random.Random(f"{seed} boots")
    images = seeds()
    counts = Counts()
    for _ in range(count):
        image = mutate(rng, images)
        before = time.process_time()
        try:
            accepted = try_device(image)
        except BaseException:
            print(f"fuzz: the device was {image.hex()}", file=sys.stderr)
            raise
        counts.accepted += accepted
        counts.refused += not accepted
        counts.slowest = max(counts.slowest, time.process_time() - before)
        assert counts.slowest < SPAN_MAX, f"{counts.slowest:.1f} s for one device"
    return counts


def main(arguments: Sequence[str] | None = None) -> int:
    """Run and report; 1 if nothing was accepted or nothing refused."""
    parser = argparse.ArgumentParser(prog="fuzz.boots", description=__doc__)
    parser.add_argument("--devices", type=int, default=DEVICES_DEFAULT, help="inputs")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    counts = campaign(options.devices, options.seed)
    fault = "" if counts.accepted and counts.refused else "  NOT TESTED"
    tally = f"accepted {counts.accepted:7d}  refused {counts.refused:7d}"
    print(f"{'boot devices':44s} {tally}  slowest {counts.slowest * 1000:.0f} ms{fault}")
    return 1 if fault else 0


if __name__ == "__main__":
    sys.exit(main())
