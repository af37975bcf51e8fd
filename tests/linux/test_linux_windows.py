"""Register windows that init hands over, with a file in the place of the machine's memory.

Real here are the mappings, the fork, the page map and the walls of a service; what is no device's
are the registers, which keep what is written.
"""

import ctypes
import os
import struct
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import pytest

from nexus.abi import (
    DMA_PAGES,
    PAGE_SIZE,
    AbiError,
    BootImage,
    BusScan,
    CapKind,
    CapQuery,
    DeviceDma,
    DeviceMap,
    DeviceQuery,
    Grants,
    HardwareGrant,
    HardwareKind,
    Isolation,
    SpawnReason,
    Status,
)
from nexus.kernel.core import Hardware, SpawnRefused
from nexus.kernel.linux import mmio
from nexus.kernel.linux.hardware import Bus
from nexus.kernel.linux.mmio import Identity, Mmio, MmioPage
from nexus.testing.conformance.steps import ended_well, start
from nexus.testing.rig import program
from tests.linux.ground import Ground

pytestmark = [
    pytest.mark.linux,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root reads the page map"),
]

MAGIC, VERSION, DEVICE_ID = 0x74726976, 2, 4
ADDRESS: Final = 2 * PAGE_SIZE
PAGE: Final = MmioPage(HardwareKind.ENTROPY, ADDRESS)
EMPTY_PAGE: Final = MmioPage(HardwareKind.EMPTY, 3 * PAGE_SIZE)
NOISE: Final = Hardware("noise", HardwareKind.ENTROPY)
SPARE: Final = Hardware("spare", HardwareKind.EMPTY)
DISK: Final = Hardware("disk", HardwareKind.BLOCK, size=PAGE_SIZE)
HOLDS_NOISE: Final = Grants(hardware=(HardwareGrant("noise", HardwareKind.ENTROPY),))
WRITTEN: Final = 0x70  # a register, and what a holder writes into it
WORD: Final = 0xDEAD_0001


@pytest.fixture(autouse=True)
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Physical memory, as long as the machine's registers reach."""
    file = tmp_path / "memory"
    content = bytearray(4 * PAGE_SIZE)
    struct.pack_into("<III", content, ADDRESS, MAGIC, VERSION, DEVICE_ID)
    struct.pack_into("<III", content, EMPTY_PAGE.address, MAGIC, VERSION, 0)
    _ = file.write_bytes(content)
    monkeypatch.setattr(mmio, "MEMORY", str(file))
    return file


def mappings_of(file: Path, pid: int | str = "self") -> int:
    """How many mappings of a file a process has."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return sum(line.endswith(f" {file}") for line in lines)


def test_a_page_is_looked_at_without_being_kept(memory: Path) -> None:
    assert Mmio(PAGE).look() == Identity(MAGIC, VERSION, DEVICE_ID)
    assert mappings_of(memory) == 0


def test_init_has_a_window_mapped_for_the_fork_and_no_longer(memory: Path) -> None:
    window = Mmio(PAGE)
    with ExitStack() as undo:
        mapped = window.open(undo)
        child = os.fork()
        if child == 0:
            word = ctypes.c_uint32.from_address(mapped.registers).value
            os._exit(0 if word == MAGIC and mappings_of(memory) == 1 else 1)
        assert mappings_of(memory) == 1

    assert mappings_of(memory) == 0
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    window.close()


def test_the_memory_of_a_device_is_the_same_for_each_holder_and_where_linux_says() -> None:
    window = Mmio(PAGE)
    with ExitStack() as undo:
        first = window.open(undo)
        assert ctypes.string_at(first.memory, PAGE_SIZE) == bytes(PAGE_SIZE)
        _ = ctypes.memmove(first.memory, b"kept", 4)
    with ExitStack() as undo:
        second = window.open(undo)
        assert ctypes.string_at(second.memory, 4) == b"kept"

    assert len(set(first.addresses)) == DMA_PAGES
    assert first.addresses == second.addresses
    assert all(address % PAGE_SIZE == 0 for address in first.addresses)
    window.close()


def test_a_device_without_a_path_is_a_window_where_a_page_is_for_its_kind() -> None:
    bus = Bus((NOISE, SPARE, DISK), None, (PAGE, EMPTY_PAGE))

    entries = {entry.name: entry for entry in bus.scan()}

    assert entries["noise"][2:] == ("virtio-mmio", ADDRESS, PAGE_SIZE, MAGIC, VERSION, DEVICE_ID)
    assert entries["spare"].backing == "virtio-mmio"
    assert entries["disk"].backing == "file"


def test_without_a_page_there_is_no_empty_transport() -> None:
    bus = Bus((NOISE, SPARE), None, (PAGE,))

    assert [entry.name for entry in bus.scan()] == ["noise"]


def test_a_page_that_is_for_a_device_by_name_goes_to_no_other() -> None:
    page = MmioPage(HardwareKind.BLOCK, ADDRESS, "disk")
    other = DISK._replace(name="another")

    bus = Bus((other, DISK), None, (page,))

    assert list(bus.windows) == ["disk"]


def test_a_device_with_a_path_is_what_the_path_leads_to() -> None:
    bus = Bus((NOISE._replace(path="/dev/urandom"),), None, (PAGE,))

    assert [entry.backing for entry in bus.scan()] == ["node"]


def test_memory_that_cannot_be_opened_is_a_refusal(memory: Path) -> None:
    memory.unlink()
    bus = Bus((NOISE,), None, (PAGE,))

    with ExitStack() as undo, pytest.raises(SpawnRefused, match="the page 0x2000") as refusal:
        _ = bus.open(NOISE, undo)

    assert refusal.value.reason is SpawnReason.MAP_FAILED


async def holder(boot: BootImage) -> None:
    """Use the window as a driver does."""
    (slot,) = boot.hardware
    assert (await CapQuery(slot)).kind is CapKind.DEVICE
    assert (await DeviceQuery(slot)).backing == "virtio-mmio"
    window = await DeviceMap(slot)
    area = await DeviceDma(slot)
    assert [window.read(at) for at in (0, 4, 8)] == [MAGIC, VERSION, DEVICE_ID]
    assert (window.length, len(area.view), len(area.addresses)) == (
        PAGE_SIZE,
        DMA_PAGES * PAGE_SIZE,
        DMA_PAGES,
    )
    area.view[:4] = b"used"
    window.write(WRITTEN, WORD)


async def bystander(boot: BootImage) -> None:
    """Has nothing."""
    assert not boot.hardware


def test_a_service_without_privilege_reads_and_writes_the_registers_it_was_granted(
    memory: Path,
) -> None:
    async def root(boot: BootImage) -> None:
        (entry,) = await BusScan()
        assert entry.device_id == DEVICE_ID
        await ended_well(await start(boot, "holder", grants=HOLDS_NOISE))
        await ended_well(await start(boot, "bystander"))
        await ended_well(await start(boot, "holder", grants=HOLDS_NOISE))

    mains = {"holder": holder, "bystander": bystander}
    Ground(None).observe(root, mains, hardware=(NOISE,), pages=(PAGE,))

    assert struct.unpack_from("<I", memory.read_bytes(), ADDRESS + WRITTEN) == (WORD,)


def test_an_interpreter_of_its_own_is_refused_a_window() -> None:
    grants = HOLDS_NOISE._replace(isolation=Isolation.EXEC)

    async def root(boot: BootImage) -> None:
        with pytest.raises(AbiError, match="isolation = exec") as refusal:
            await start(boot, "apart", grants=grants)
        assert refusal.value.status is Status.INVALID_ARGUMENT

    apart = replace(program("apart", holder), entry=f"{__name__}:holder")
    mains: dict[str, Any] = {"apart": apart}
    Ground(None).observe(root, mains, hardware=(NOISE,), pages=(PAGE,))
