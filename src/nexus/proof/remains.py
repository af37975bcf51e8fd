"""What a boot left on the disk of statefsd, as the runner itself reads it while the system is down.

It is read with the engine's own reader over a device that cannot be written, in the runner's
process: whatever is planted in a booted system is not in here.
"""

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from io import FileIO
from pathlib import Path
from typing import Final, NamedTuple

from nexus.abi import BLOCK_SIZE, SECRET_SIZE_MAX, HardwareKind, SecretBackend
from nexus.drivers import DeviceFault, finished
from nexus.drivers.image import Image
from nexus.init.plan import Plan
from nexus.kernel.core import Hardware
from nexus.kernel.linux.secrets import DIRECTORY, NAME
from nexus.protocols.statefsd import ROOT
from nexus.services.statefsd.config import Settings
from nexus.services.statefsd.engine import Damaged, Store, Unopenable

IMAGE_SUFFIX: Final = ".img"
RUNTIME: Final = "run"  # the folder of the sockets, in the state directory of a run on linux
SECRET_SUFFIX: Final = ".secret"  # noqa: S105 (of a file's name)
PAGE: Final = 256  # keys of one look
PIECE_SIZE: Final = 4096  # bytes of an image that are looked at together
TRACK_SIZE: Final = 16  # bytes of a value by which its record is found; it may span two frames
COPIES_MAX: Final = 8  # records of one value: in the journal, and in checkpoints that are no more


class Kept(NamedTuple):
    """A value in a store, and the number of the change that set it."""

    value: bytes
    sequence: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Remains:
    """The store on the disk. `problem` says why there is none to be read, or is empty.

    `size` is that of the device, `first_block` its first bytes. `damaged` is the offset of the byte
    that the runner has changed since, -1 if it has not; `lost` counts the damaged records.
    `written` is all of the disk that is not zero, and `secrets` what the kernel keeps for a
    service, as far as it is in a file: neither gets into a record.
    """

    problem: str = ""
    written: bytes = field(default=b"", repr=False)
    secrets: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    size: int = 0
    first_block: bytes = b""
    epoch: int = 0
    sequence: int = 0
    records: Mapping[bytes, Kept] = field(default_factory=dict)
    damaged: int = -1
    lost: int = 0


NOTHING_LEFT: Final = Remains(problem="the system has no disk")


def image_of(state: Path, device: Hardware) -> Path:
    """Where the content of a block device is while the system is down."""
    return Path(device.path) if device.path else state / f"{device.name}{IMAGE_SUFFIX}"


def remains_of(plan: Plan, state: Path) -> Remains:
    """What lies on the disk of statefsd, and of secrets, in the state directory of a run."""
    device = disk_of(plan)
    if device is None:
        return NOTHING_LEFT
    try:
        data = image_of(state, device).read_bytes()
    except OSError as error:
        return Remains(problem=f"{device.name} cannot be read: {error.strerror}")
    return replace(read_image(data), secrets=_secrets(plan, state))


def kept_secret(state: Path, service: str, backend: SecretBackend) -> Path:
    """Where a simulated machine's secret is while it is off."""
    return state / f"{service}-{backend.name}{SECRET_SUFFIX}"


def _secrets(plan: Plan, state: Path) -> dict[str, bytes]:
    """The secrets of the services that can be read: where linux keeps them and where sim does."""
    found = {}
    for service in plan.services:
        places = (
            kept_secret(state, service.name, service.grants.secret),
            state / DIRECTORY / service.name / NAME,
        )
        for place in places:
            data = _small_file(place)
            if data:
                found[service.name] = data
    return found


def _small_file(path: Path) -> bytes:
    """The content of a file that a service may have made; empty if it is no such file."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return b""
    with FileIO(descriptor) as file:
        regular = stat.S_ISREG(os.fstat(descriptor).st_mode)
        return file.read(SECRET_SIZE_MAX) if regular else b""


def read_image(data: bytes) -> Remains:
    """The store in an image. A record that is damaged is not among `records`."""
    bare = Remains(size=len(data), first_block=data[:BLOCK_SIZE], written=_not_zero(data))
    if not any(data):
        return replace(bare, problem="nothing was ever written to the disk")

    def read_at(offset: int, size: int) -> bytes:
        return data[offset : offset + size]

    try:
        store = finished(Store.open(Image(read_at, len(data)), Settings().limits))
    except (Unopenable, DeviceFault) as error:
        return replace(bare, problem=f"the disk holds no store: {error}")
    return replace(
        bare,
        epoch=store.epoch,
        sequence=store.sequence,
        records=dict(_records(store)),
        lost=store.lost_count,
    )


def damage(plan: Plan, state: Path, left: Remains, key: bytes) -> Remains:
    """Flip a bit of one byte in the record of `key`, in the image in the state directory."""
    device, kept = disk_of(plan), left.records.get(key)
    if device is None or kept is None:
        return left
    image = image_of(state, device)
    data = bytearray(image.read_bytes())
    at = -1
    for _ in range(COPIES_MAX):
        at = data.find(kept.value[:TRACK_SIZE], at + 1)
        if at < 0:
            return left
        data[at] ^= 1
        after = read_image(bytes(data))
        if key not in after.records:
            _write(image, at, bytes(data[at : at + 1]))
            return replace(left, damaged=at, lost=after.lost)
        data[at] ^= 1  # an older copy, which nobody reads any more
    return left


def _not_zero(data: bytes) -> bytes:
    """An image without the pieces that were never written."""
    zero = bytes(PIECE_SIZE)
    pieces = (data[at : at + PIECE_SIZE] for at in range(0, len(data), PIECE_SIZE))
    return b"".join(piece for piece in pieces if piece != zero)


def disk_of(plan: Plan) -> Hardware | None:
    """The disk of statefsd."""
    service = plan.by_name.get("statefsd")
    if service is None:
        return None
    names = {grant.name for grant in service.grants.hardware if grant.kind is HardwareKind.BLOCK}
    return next((each for each in plan.hardware if each.name in names), None)


def _write(image: Path, offset: int, data: bytes) -> None:
    """Change some bytes of an image and leave all others."""
    descriptor = os.open(image, os.O_WRONLY | os.O_CLOEXEC)
    try:
        _ = os.pwrite(descriptor, data, offset)
    finally:
        os.close(descriptor)


def _records(store: Store) -> list[tuple[bytes, Kept]]:
    found: list[tuple[bytes, Kept]] = []
    after, more = b"", True
    while more:
        keys, more = store.keys(ROOT.encode(), after, PAGE, lambda _area: True)
        for key in keys:
            try:
                entry = finished(store.get(key))
            except Damaged:
                continue
            if entry is not None:
                found.append((key, Kept(entry.value, entry.sequence)))
        after = keys[-1] if keys else after
    return found
