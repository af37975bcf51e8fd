"""What devices a guest has, found by what they are: numbers and order differ from machine to
machine.

Only the modern transport is driven. A device that did not agree to VERSION_1 is of the legacy one,
and a machine with such a device is refused as a whole: nothing in it was asked for.
"""

import os
import struct
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from nexus.abi import PAGE_SIZE, HardwareKind
from nexus.kernel.linux.mmio import MmioPage

SYSFS: Final = Path("/sys")
IOMEM: Final = Path("/proc/iomem")
VIRTIO: Final = "bus/virtio/devices"
PLATFORM: Final = "bus/platform/devices"
UNBIND: Final = "bus/platform/drivers/virtio-mmio/unbind"
PORTS: Final = "class/virtio-ports"
BLOCKS: Final = "block"
VERSION_1_AT: Final = 32  # bit of the features
TRANSPORT: Final = "virtio,mmio"  # in the device tree
TRANSPORT_ACPI: Final = "LNRO0005"
_REG: Final = struct.Struct(">QQ")  # address and length, in the device tree


class NotModern(Exception):
    """A device does not use the modern transport."""


class Virtio(NamedTuple):
    """A virtio device that Linux found."""

    name: str  # virtio0
    device_id: int
    transport: str  # the platform device it sits on
    driver: str  # "" for none
    is_modern: bool


def found(sysfs: Path = SYSFS) -> tuple[Virtio, ...]:
    """Every virtio device of the machine."""
    folder = sysfs / VIRTIO
    return tuple(_virtio(path) for path in sorted(folder.iterdir()))


def _virtio(path: Path) -> Virtio:
    features = (path / "features").read_text().strip()
    driver = path / "driver"
    return Virtio(
        path.name,
        int((path / "device").read_text(), 16),
        path.resolve().parent.name,
        driver.resolve().name if driver.exists() else "",
        features[VERSION_1_AT : VERSION_1_AT + 1] == "1",
    )


def check_modern(devices: Sequence[Virtio]) -> None:
    """Raises NotModern. What has no driver has agreed to nothing yet: its driver will look."""
    old = [each for each in devices if each.driver and not each.is_modern]
    if old:
        named = ", ".join(f"{each.name} (device id {each.device_id})" for each in old)
        raise NotModern(f"without VERSION_1: {named}; start QEMU with modern virtio-mmio devices")


def blocks(sysfs: Path = SYSFS) -> dict[str, Path]:
    """Disks by their serial; what has none is nobody's."""
    serials = {}
    for path in sorted((sysfs / BLOCKS).iterdir()):
        file = path / "serial"
        serial = file.read_text().strip() if file.exists() else ""
        if serial:
            assert serial not in serials, f"two disks with the serial {serial}"
            serials[serial] = Path("/dev") / path.name
    return serials


def port(name: str, sysfs: Path = SYSFS) -> Path | None:
    """The virtio-serial port of that name; it comes a moment after its device."""
    folder = sysfs / PORTS
    if not folder.exists():
        return None
    for path in sorted(folder.iterdir()):
        if (path / "name").read_text().strip() == name:
            return Path("/dev") / path.name
    return None


# ---------------------------------------------------------------------- pages of registers


def pages(
    devices: Sequence[Virtio],
    serials: Mapping[str, str],
    sysfs: Path = SYSFS,
    iomem: Path = IOMEM,
) -> tuple[tuple[MmioPage, str], ...]:
    """The pages of registers that one service may be given, each with the platform device that
    Linux's driver has to let go of, "" for none.

    A page is handed over whole, so there is one device in it and no other, at its beginning:
    an entropy device, or a disk (`serials` are the disks' by their virtio name). A page of nothing
    but empty transports is one too.
    """
    by_transport = {each.transport: each for each in devices}
    by_page: dict[int, list[tuple[int, str]]] = defaultdict(list)
    for name, address in transports(sysfs, iomem).items():
        by_page[address - address % PAGE_SIZE].append((address, name))
    given = []
    for page, there in sorted(by_page.items()):
        used = [(address, by_transport[name]) for address, name in there if name in by_transport]
        if not used:
            if page in dict(there):
                given.append((MmioPage(HardwareKind.EMPTY, page), ""))
            continue
        (address, device), *others = used
        if others or address != page:
            continue
        if device.device_id == HardwareKind.ENTROPY:
            given.append((MmioPage(HardwareKind.ENTROPY, page), device.transport))
        elif device.device_id == HardwareKind.BLOCK and device.name in serials:
            serial = serials[device.name]
            given.append((MmioPage(HardwareKind.BLOCK, page, serial), device.transport))
    return tuple(given)


def transports(sysfs: Path = SYSFS, iomem: Path = IOMEM) -> dict[str, int]:
    """The virtio-mmio transports of the machine by their name, and their physical addresses."""
    found_there = {}
    for path in sorted((sysfs / PLATFORM).iterdir()):
        register = path / "of_node" / "reg"
        if register.exists():
            compatible = (path / "of_node" / "compatible").read_bytes()
            if compatible.rstrip(b"\0").decode() == TRANSPORT:
                found_there[path.name] = _REG.unpack(register.read_bytes())[0]
        elif path.name.startswith(TRANSPORT_ACPI):
            address = _in_iomem(path.name, iomem)
            if address is not None:
                found_there[path.name] = address
    return found_there


def _in_iomem(name: str, iomem: Path) -> int | None:
    for line in iomem.read_text().splitlines():
        span, _, holder = line.strip().partition(" : ")
        if holder.split(" ")[0] == name:
            return int(span.partition("-")[0], 16)
    return None


def serials_of(disks: Mapping[str, Path], sysfs: Path = SYSFS) -> dict[str, str]:
    """Serials by the virtio device that the disk is."""
    return {
        (sysfs / BLOCKS / node.name / "device").resolve().name: serial
        for serial, node in disks.items()
    }


def let_go(transport: str, sysfs: Path = SYSFS) -> None:
    """Have Linux's driver leave a transport: its registers are nobody's then. Raises OSError."""
    descriptor = os.open(sysfs / UNBIND, os.O_WRONLY | os.O_CLOEXEC)
    try:
        _ = os.write(descriptor, transport.encode())
    finally:
        os.close(descriptor)
