"""The devices of a guest, found in a copy of what Linux shows of them."""

from pathlib import Path

import pytest

from nexus.abi import HardwareKind
from nexus.kernel.linux.mmio import MmioPage
from nexus.vm.devices import (
    NotModern,
    blocks,
    check_modern,
    found,
    pages,
    port,
    serials_of,
    transports,
)

MODERN = "0" * 32 + "1" + "0" * 31
LEGACY = "0" * 64


class Machine:
    """A sysfs of transports 0x200 apart, as QEMU's virt has them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for folder in ("bus/virtio/devices", "bus/platform/devices", "block", "class/virtio-ports"):
            (root / folder).mkdir(parents=True)

    def transport(self, address: int) -> Path:
        path = self.root / "devices" / f"{address:x}.virtio_mmio"
        (path / "of_node").mkdir(parents=True)
        _ = (path / "of_node/compatible").write_bytes(b"virtio,mmio\0")
        register = address.to_bytes(8, "big") + (0x200).to_bytes(8, "big")
        _ = (path / "of_node/reg").write_bytes(register)
        (self.root / "bus/platform/devices" / path.name).symlink_to(path)
        return path

    def device(
        self, address: int, number: int, kind: int, *, features: str = MODERN, driver: str = "any"
    ) -> Path:
        path = self.transport(address) / f"virtio{number}"
        path.mkdir()
        _ = (path / "device").write_text(f"0x{kind:04x}\n")
        _ = (path / "features").write_text(f"{features}\n")
        if driver:
            (self.root / "drivers" / driver).mkdir(parents=True, exist_ok=True)
            (path / "driver").symlink_to(self.root / "drivers" / driver)
        (self.root / "bus/virtio/devices" / path.name).symlink_to(path)
        return path

    def disk(self, address: int, number: int, name: str, serial: str) -> None:
        device = self.device(address, number, 2)
        folder = self.root / "block" / name
        folder.mkdir()
        _ = (folder / "serial").write_text(serial)
        (folder / "device").symlink_to(device)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path / "sys")


def pages_of(machine: Machine) -> list[tuple[MmioPage, str]]:
    serials = serials_of(blocks(machine.root), machine.root)
    return list(pages(found(machine.root), serials, machine.root))


def test_a_disk_is_found_by_its_serial_whatever_its_number(machine: Machine) -> None:
    machine.disk(0xA001000, 5, "vda", "slot-b")
    machine.disk(0xA001200, 2, "vdb", "boot")

    assert blocks(machine.root) == {"slot-b": Path("/dev/vda"), "boot": Path("/dev/vdb")}


def test_a_port_is_found_by_its_name(machine: Machine) -> None:
    folder = machine.root / "class/virtio-ports/vport3p1"
    folder.mkdir()
    _ = (folder / "name").write_text("nexus.evidence\n")

    assert port("nexus.evidence", machine.root) == Path("/dev/vport3p1")
    assert port("nexus.other", machine.root) is None


def test_a_device_of_the_legacy_transport_is_refused_by_its_name(machine: Machine) -> None:
    _ = machine.device(0xA001000, 0, 2)
    _ = machine.device(0xA001200, 1, 3, features=LEGACY)

    with pytest.raises(NotModern, match=r"VERSION_1: virtio1 \(device id 3\)"):
        check_modern(found(machine.root))


def test_a_device_without_a_driver_has_agreed_to_nothing_and_is_no_legacy_one(
    machine: Machine,
) -> None:
    _ = machine.device(0xA000000, 0, 4, features=LEGACY, driver="")

    check_modern(found(machine.root))


def test_a_transport_is_where_the_device_tree_says(machine: Machine) -> None:
    _ = machine.transport(0xA003E00)

    assert transports(machine.root) == {"a003e00.virtio_mmio": 0xA003E00}


def test_an_entropy_device_alone_in_its_page_may_be_handed_over(machine: Machine) -> None:
    _ = machine.device(0xA000000, 0, 4, driver="")
    _ = machine.transport(0xA000200)

    page = MmioPage(HardwareKind.ENTROPY, 0xA000000)
    assert pages_of(machine) == [(page, "a000000.virtio_mmio")]


def test_a_page_with_another_device_in_it_is_nobodys(machine: Machine) -> None:
    _ = machine.device(0xA000000, 0, 4, driver="")
    machine.disk(0xA000200, 1, "vda", "boot")

    assert pages_of(machine) == []


def test_a_device_behind_the_beginning_of_its_page_is_not_handed_over(machine: Machine) -> None:
    _ = machine.transport(0xA000000)
    _ = machine.device(0xA000200, 0, 4, driver="")

    assert pages_of(machine) == []


def test_a_disk_alone_in_its_page_is_handed_over_by_its_name(machine: Machine) -> None:
    machine.disk(0xA001000, 3, "vda", "disk")

    page = MmioPage(HardwareKind.BLOCK, 0xA001000, "disk")
    assert pages_of(machine) == [(page, "a001000.virtio_mmio")]


def test_a_page_of_empty_transports_is_an_empty_one(machine: Machine) -> None:
    _ = machine.transport(0xA003000)
    _ = machine.transport(0xA003200)

    assert pages_of(machine) == [(MmioPage(HardwareKind.EMPTY, 0xA003000), "")]
