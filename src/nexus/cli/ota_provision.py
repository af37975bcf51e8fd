"""`nexus ota provision`: a new device, or its images, with a first set and a trust anchor.

Who provisions a device says whom it trusts: the root is named on its own, and the update has to
be signed under it. From then on the device decides by itself.
"""

import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Final

from nexus.abi import BLOCK_SIZE, HardwareKind
from nexus.bootctl import BootControl, BootRecord, NoBootRecord, SlotInfo, new_boot
from nexus.bootctl.provision import provision as make_record
from nexus.cli.errors import CommandFailed, UsageError
from nexus.cli.files import open_input, read_input
from nexus.cli.keyring import telling
from nexus.cli.output import say, say_json
from nexus.cli.places import make_dirs, places_of
from nexus.drivers import DeviceFault, finished
from nexus.init.system import FILE_SIZE_MAX, System, parse
from nexus.kernel.core.hardware import Hardware
from nexus.kernel.linux.hardware import IMAGE_SIZE_MAX, IMAGE_SUFFIX, Bus
from nexus.loader.devices import FileBlock, opened
from nexus.sets import CallSource, File, Manifest, SetRefused, Verified, read_manifest, unpack
from nexus.trust import Anchor, Target, TrustState, Untrusted, Update, read_update
from nexus.trust.limits import ROOT_SIZE_MAX
from nexus.trust.verify import resume, verify_metadata

BOOT: Final = "boot"
SLOT_A: Final = "slot-a"
SLOT_B: Final = "slot-b"
UPDATED: Final = "updated"
DEVELOPMENT_SETTING: Final = "development_keys"  # of updated; a test compares it
DEVICES: Final = (BOOT, SLOT_A, SLOT_B)


@dataclass(frozen=True, slots=True)
class First:
    """An update that was found good: what a device begins with."""

    state: TrustState
    target: Target
    manifest: Manifest
    system: System
    source: CallSource


def provision(
    update: Path,
    root: Path,
    *,
    instance: str | None,
    state: Path | None,
    again: bool,
    as_json: bool,
) -> None:
    """Verify an update and write a device's first slot, its anchor and its boot record.

    Raises UsageError, CommandFailed and SystemFileError; the device is as before, or has no record.
    """
    anchor = Anchor(_bounded(root, ROOT_SIZE_MAX))
    descriptor = open_input(update)
    try:
        first = _verified(update, descriptor, anchor)
        folder = _folder(first.system, instance, state)
        record = write_device(folder, first, again=again)
    finally:
        os.close(descriptor)
    if as_json:
        say_json(
            {
                "state": str(folder),
                "system": first.system.name,
                "slot": record.active.value,
                "name": first.target.name,
                "version": first.target.version,
                "floor": record.floor,
                "sha256": first.target.sha256.hex(),
                "sequence": record.sequence,
            }
        )
        return
    say(f"{folder}: {first.system.name} boots set {first.target.name} from slot a")
    trusted = Anchor(first.state.root).digest.hex()[:12]
    say(f"it trusts the root {trusted}, and what that root's keys will sign")


def write_device(folder: Path, first: First, *, again: bool) -> BootRecord:
    """Write slot a, anchor and record of the device whose state is in `folder`."""
    info = SlotInfo(
        version=first.target.version,
        name=first.target.name,
        digest=first.target.sha256,
        size=first.target.length,
        floor=first.target.floor,
    )
    hardware = _hardware(first.system)
    _check_declared(hardware, info)
    with telling(f"cannot make the images in {folder}"):
        _ = Bus(tuple(hardware.values()), folder).make_images()
    wall = int(datetime.now(tz=UTC).timestamp()) * 1_000_000_000
    try:
        with ExitStack() as stack:
            devices = {
                name: stack.enter_context(opened(_path(folder, each), writable=True))
                for name, each in hardware.items()
            }
            _check_sizes(devices, hardware)
            control = finished(new_boot(devices[BOOT]))
            if not again:
                _check_new(control)
            return finished(
                make_record(
                    control, devices[SLOT_A], first.source, info, first.state.root, wall=wall
                )
            )
    except DeviceFault as fault:
        raise CommandFailed(f"the device was not provisioned: {fault}") from fault


def _check_new(control: BootControl) -> None:
    try:
        record = finished(control.load())
    except NoBootRecord:
        return
    slot = record.slot(record.active)
    raise CommandFailed(
        f"this device is provisioned, and boots set {slot.name} from slot {record.active.value}: "
        "`nexus ota stage` updates it, --again makes it a new one"
    )


def _check_declared(hardware: Mapping[str, Hardware], info: SlotInfo) -> None:
    if info.size > hardware[SLOT_A].size:
        raise CommandFailed(
            f"the set has {info.size} bytes, and a slot has {hardware[SLOT_A].size}"
        )
    if hardware[SLOT_A].size != hardware[SLOT_B].size:
        raise CommandFailed("the two slots are of different size: what fits one has to fit both")


def _check_sizes(devices: Mapping[str, FileBlock], hardware: Mapping[str, Hardware]) -> None:
    for name, each in hardware.items():
        if devices[name].block_count * BLOCK_SIZE < each.size:
            raise CommandFailed(f"the device {name} is smaller than the system file says")


def _hardware(system: System) -> dict[str, Hardware]:
    """The three devices of an updatable system, as its system file has them."""
    found = {}
    for name in DEVICES:
        device = next((each for each in system.hardware if each.name == name), None)
        if device is None or device.kind is not HardwareKind.BLOCK:
            raise CommandFailed(
                f"the system file of the set has no block device {name}: what is updated in two "
                f"slots has {', '.join(DEVICES)}"
            )
        found[name] = device
    return found


def _path(folder: Path, device: Hardware) -> Path:
    given = PurePosixPath(device.path or f"{device.name}{IMAGE_SUFFIX}")
    path = folder / given
    if not path.exists() and device.size > IMAGE_SIZE_MAX:
        raise CommandFailed(f"{path} is not there: `truncate -s {device.size} {path}` makes it")
    return path


def _folder(system: System, instance: str | None, state: Path | None) -> Path:
    """The state directory: the named one, or where `nexus up` of this system would have it."""
    if state is not None:
        with telling(f"cannot make {state}"):
            state.mkdir(mode=0o700, parents=True, exist_ok=True)
        return state
    places = places_of(
        system.name, instance, system.file, (None, None, None), os.environ, os.getuid()
    )
    make_dirs(places, os.getuid(), ())
    return places.state


def _verified(update: Path, descriptor: int, anchor: Anchor) -> First:
    def read_at(offset: int, size: int) -> bytes:
        return os.pread(descriptor, size, offset)

    try:
        whole = CallSource(read_at, os.fstat(descriptor).st_size)
        found: Update = finished(read_update(whole))
        new = resume(anchor, None, version_floor=0)
        state, target = verify_metadata(new, found.metadata, release=False)
        source = CallSource(
            lambda offset, size: read_at(found.set_offset + offset, size), found.set_size
        )
        verified, system = _unpacked(source)
        if _refuses_development_keys(system):
            _ = verify_metadata(new, found.metadata, release=True)
    except Untrusted as error:
        raise CommandFailed(f"{update} is not trusted: {error}") from error
    except SetRefused as refused:
        raise CommandFailed(f"the set in {update} is refused: {refused}") from refused
    except OSError as error:
        raise CommandFailed(f"cannot read {update}: {error.strerror or error}") from error
    signed = (target.length, target.sha256, target.version, target.name)
    manifest = verified.manifest
    if signed != (verified.size, verified.sha256, manifest.version, manifest.name):
        raise CommandFailed(f"the set in {update} is not the one that was signed")
    return First(state, target, manifest, system, source)


def _unpacked(source: CallSource) -> tuple[Verified, System]:
    """Look at every byte of the set, and keep its system file."""
    manifest = finished(read_manifest(source))
    keeper = _Keeper(manifest.system)
    verified = finished(unpack(source, keeper))
    return verified, parse(bytes(keeper.data), Path("/") / manifest.system)


def _refuses_development_keys(system: System) -> bool:
    """What updated of this system will say; a device that takes no further update is not made."""
    return any(
        service.program == UPDATED and (DEVELOPMENT_SETTING, True) not in service.settings
        for service in system.services
    )


class _Keeper:
    """sets.Sink that keeps one file."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._is_it = False
        self.data = bytearray()

    async def begin(self, file: File) -> None:
        """As Sink."""
        self._is_it = file.path == self._path
        if self._is_it and file.size > FILE_SIZE_MAX:
            raise CommandFailed(f"the system file of the set has {file.size} bytes")

    async def write(self, data: bytes) -> None:
        """As Sink."""
        if self._is_it:
            self.data += data

    async def end(self, file: File) -> None:
        """As Sink."""


def _bounded(path: Path, size_max: int) -> bytes:
    data = read_input(path, size_max)
    if len(data) > size_max:
        raise UsageError(f"{path} is no root: it has more than {size_max} bytes")
    return data
