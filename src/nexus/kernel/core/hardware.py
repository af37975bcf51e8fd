"""The bus map: which devices a system has, and what both kernels check before one is granted."""

from collections.abc import Collection, Sequence
from typing import Final, NamedTuple

from nexus.abi import BLOCK_SIZE, PAGE_SIZE, Grants, HardwareKind, SpawnReason
from nexus.kernel.core.spawn import SpawnRefused

WINDOW_SIZE: Final = PAGE_SIZE  # bytes of a device's registers; one page of its own
VIRTIO_MAGIC: Final = 0x74726976  # "virt"
VIRTIO_VERSION: Final = 2  # the modern register layout; 1 is the legacy one


class Hardware(NamedTuple):
    """One device of the bus map.

    `size` is bytes of a block device, a multiple of BLOCK_SIZE. `path` is a device node or a file
    on linux; empty for NAME.img in the state directory (BLOCK), or for whatever source Linux has
    (ENTROPY). `legacy` puts a transport of the old register layout on the simulated bus. A
    `read_only` block device is opened for reading alone.
    """

    name: str
    kind: HardwareKind
    size: int = 0
    path: str = ""
    legacy: bool = False
    read_only: bool = False


def find_hardware(
    grants: Grants, bus: Sequence[Hardware], live: Collection[str]
) -> tuple[Hardware, ...]:
    """The devices to grant, in the order of the grants; `live` are those that have a holder.

    Refuses: SpawnRefused with invalid-payload (no such device, another kind, held already).
    """
    by_name = {each.name: each for each in bus}
    found = []
    for grant in grants.hardware:
        device = by_name.get(grant.name)
        if device is None:
            raise SpawnRefused(SpawnReason.INVALID_PAYLOAD, f"no device {grant.name!r}")
        if device.kind is not grant.kind:
            kinds = f"{device.kind.name.lower()}, not {HardwareKind(grant.kind).name.lower()}"
            raise SpawnRefused(SpawnReason.INVALID_PAYLOAD, f"device {grant.name} is {kinds}")
        if grant.name in live:
            raise SpawnRefused(
                SpawnReason.INVALID_PAYLOAD, f"device {grant.name} belongs to a live task"
            )
        found.append(device)
    return tuple(found)


def check_bus(bus: Sequence[Hardware]) -> None:
    """A bus map is made by init's plan; what is wrong with one is a bug."""
    assert len({each.name for each in bus}) == len(bus), "two devices have one name"
    for each in bus:
        assert each.size % BLOCK_SIZE == 0, f"{each.name}: {each.size} bytes are no whole blocks"
        assert (each.size > 0) is (each.kind is HardwareKind.BLOCK), f"{each.name}: size"
