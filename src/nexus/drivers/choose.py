"""Which driver a granted device needs: asked of its capability, never of the ground."""

from nexus.abi import CapKind, CapQuery, DeviceDma, DeviceMap, DeviceQuery, Slot
from nexus.drivers.block import DeviceFault, Fault
from nexus.drivers.kernel_block import KernelBlock
from nexus.drivers.kernel_entropy import KernelEntropy
from nexus.drivers.virtio_block import VirtioBlock
from nexus.drivers.virtio_entropy import VirtioEntropy


async def open_block(slot: Slot) -> VirtioBlock | KernelBlock:
    """The block device in `slot`, ready to use. Raises DeviceFault."""
    kind = (await CapQuery(slot)).kind
    if kind is CapKind.DEVICE:
        return await VirtioBlock.open(await DeviceMap(slot), await DeviceDma(slot))
    if kind is CapKind.BLOCK:
        return KernelBlock(slot, await DeviceQuery(slot))
    raise DeviceFault(Fault.REFUSED, f"slot {slot} is no block device but {kind.name}")


async def open_entropy(slot: Slot) -> VirtioEntropy | KernelEntropy:
    """The entropy device in `slot`, ready to use. Raises DeviceFault."""
    kind = (await CapQuery(slot)).kind
    if kind is CapKind.DEVICE:
        return await VirtioEntropy.open(await DeviceMap(slot), await DeviceDma(slot))
    if kind is CapKind.ENTROPY:
        return KernelEntropy(slot, await DeviceQuery(slot))
    raise DeviceFault(Fault.REFUSED, f"slot {slot} is no entropy device but {kind.name}")
