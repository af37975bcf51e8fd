"""Saboteurs of the rungs about devices and entropy: 15, 16, 33, 49, 51, 97-99, 140 and 141."""

import hashlib
from contextlib import ExitStack
from functools import partial
from typing import Any, Final

from nexus.abi import DeviceInfo, HardwareKind, Nanos
from nexus.drivers import DRAW_SIZE_MAX, VirtioEntropy
from nexus.drivers.virtio import Identity
from nexus.init import bus as init_bus
from nexus.kernel.core import VIRTIO_MAGIC, VIRTIO_VERSION, Hardware
from nexus.kernel.linux import hardware
from nexus.kernel.linux.hardware import Bus as LinuxBus
from nexus.kernel.linux.mmio import Mmio
from nexus.kernel.sim.bus import Bus
from nexus.kernel.sim.virtio import Register, Window
from nexus.proof.plants_init import missing, withheld
from nexus.proof.sabotage import Saboteur, replace
from nexus.protocols.ladder import SELFTEST, Ground
from nexus.protocols.policy import ROUTE_RIGHT
from nexus.protocols.rngd import DRAW_SIZE_MAX as GIVEN_SIZE_MAX
from nexus.services.rngd import service as rngd
from nexus.services.rngd.service import Rngd
from nexus.services.rngd.source import Source

BOTH: Final = frozenset(Ground)
SIM: Final = frozenset({Ground.SIM})
VM: Final = frozenset({Ground.VM})
GETRANDOM: Final = "getrandom"
HWRNG: Final = "hwrng"


def _source_misnamed() -> None:
    """#33: getrandom, or where that is the truth, another source."""

    def evidence(service: Rngd) -> dict[str, str | int]:
        told: dict[str, str | int] = original(service)
        return {**told, "source": HWRNG if told["source"] == GETRANDOM else GETRANDOM}

    original = replace(Rngd, "evidence", evidence)


class _AnyVersion(int):
    """A register version that no device differs from."""

    __hash__ = int.__hash__

    def __eq__(self, _other: object) -> bool:
        return True

    def __ne__(self, _other: object) -> bool:
        return False


def _old_registers_accepted() -> None:
    """#49."""
    _ = replace(init_bus, "VERSION", _AnyVersion(VIRTIO_VERSION))


class _Elsewhere(VirtioEntropy):
    """Says what a device would, and draws from a source of its own."""

    def __init__(self) -> None:
        """No window is mapped."""
        self._count = 0

    @property
    def identity(self) -> Identity:
        return Identity(VIRTIO_MAGIC, VIRTIO_VERSION, int(HardwareKind.ENTROPY), 1 << 32)

    async def draw(self, size: int, deadline: Nanos) -> bytearray:
        del deadline
        self._count += 1
        return bytearray(hashlib.shake_256(b"%d" % self._count).digest(min(size, DRAW_SIZE_MAX)))


def _window_never_touched() -> None:
    """#51."""

    async def opened(_slot: object) -> VirtioEntropy:
        return _Elsewhere()

    _ = replace(rngd, "open_entropy", opened)


def _never_asked() -> None:
    """#97: nobody asks whether a draw is allowed. policyd is asked for something else, so that the
    link to it is as it would be."""

    async def authorise(service: Rngd, call: Any) -> None:
        await service._tell_allow(call)  # noqa: SLF001 (saboteurs break what is private)
        asked = (call.sender.service, ROUTE_RIGHT, "", call.deadline)
        _ = await service._authority.check(*asked)  # type: ignore[attr-defined] # noqa: SLF001

    _ = replace(Rngd, "_authorise", authorise)


def _cleared_buffer() -> None:
    """#98: what the device delivered is not what is given."""

    async def draw(source: Source, size: int) -> bytearray | None:
        drawn: bytearray | None = await original(source, size)
        return None if drawn is None else bytearray(len(drawn))

    original = replace(Source, "draw", draw)


def _one_byte_more() -> None:
    """#99: 257 bytes are in bounds; what is given is what a frame holds."""

    def is_in_bounds(service: Rngd, size: int) -> bool:
        found: bool = original(service, size)
        return found or size == GIVEN_SIZE_MAX + 1

    async def draw(source: Source, size: int) -> bytearray | None:
        drawn: bytearray | None = await original_draw(source, min(size, GIVEN_SIZE_MAX))
        return None if drawn is None else drawn + bytes(size - len(drawn))

    def given(data: bytes) -> Any:
        return original_reply(data[:GIVEN_SIZE_MAX])

    original = replace(Rngd, "_is_in_bounds", is_in_bounds)
    original_draw = replace(Source, "draw", draw)
    original_reply = replace(rngd, "Entropy", given)


def _another_window() -> None:
    """#140: the client's capability leads to a disk's registers."""

    def map_window(bus: Bus, task: Any, slot: Any, offset: int, *, execute: bool) -> Window:
        window: Window = original(bus, task, slot, offset, execute=execute)
        if task.name != SELFTEST or window.read(Register.DEVICE_ID):  # 0 is an empty transport
            return window
        disks = (
            unit.transport
            for unit in bus.units.values()
            if unit.hardware.kind is HardwareKind.BLOCK and unit.transport is not None
        )
        return Window(next(disks), offset)

    original = replace(Bus, "map_window", map_window)


def _another_window_vm() -> None:
    """#140: the same, by init's hand."""

    def opened(bus: LinuxBus, device: Hardware, undo: ExitStack) -> Any:
        if device.kind is not HardwareKind.EMPTY:
            return original(bus, device, undo)
        disks = (each for each in bus.present if each.kind is HardwareKind.BLOCK)
        disk = next(each for each in disks if each.name in bus.windows)
        granted, descriptor = original(bus, disk, undo)
        return granted._replace(name=device.name, kind=device.kind), descriptor

    original = replace(LinuxBus, "open", opened)


def _base_in_the_answer_vm() -> None:
    """#141."""

    def opened(device: Hardware, window: Mmio, undo: ExitStack) -> Any:
        granted, descriptor = original(device, window, undo)
        if device.kind is HardwareKind.EMPTY:
            granted = granted._replace(block_count=window.page.address)
        return granted, descriptor

    original = replace(hardware, "_open_window", opened)


def _base_in_the_answer() -> None:
    """#141."""

    def query(bus: Bus, task: Any, slot: Any) -> DeviceInfo:
        info: DeviceInfo = original(bus, task, slot)
        return info._replace(block_count=bus.units[info.name].base)

    original = replace(Bus, "query", query)


SABOTEURS: Final = (
    Saboteur(rung=15, grounds=BOTH, plant=partial(missing, "rngd")),
    Saboteur(rung=16, grounds=BOTH, plant=partial(withheld, "rngd")),
    Saboteur(rung=33, grounds=BOTH, plant=_source_misnamed),
    Saboteur(rung=49, grounds=SIM, plant=_old_registers_accepted),
    Saboteur(rung=51, grounds=SIM | VM, plant=_window_never_touched),
    Saboteur(rung=97, grounds=BOTH, plant=_never_asked),
    Saboteur(rung=98, grounds=BOTH, plant=_cleared_buffer),
    Saboteur(rung=99, grounds=BOTH, plant=_one_byte_more),
    Saboteur(rung=140, grounds=SIM, plant=_another_window),
    Saboteur(rung=140, grounds=VM, plant=_another_window_vm),
    Saboteur(rung=141, grounds=SIM, plant=_base_in_the_answer),
    Saboteur(rung=141, grounds=VM, plant=_base_in_the_answer_vm),
)
