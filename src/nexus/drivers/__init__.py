"""User-space drivers: what a service does with a device it was granted.

A driver finds out from its capability what it holds (a register window, or a device the kernel
drives) and looks the same to the service either way. It waits by the ABI, with a deadline. What it
raises is a DeviceFault; it repeats nothing by itself.
"""

from nexus.drivers.block import REQUEST_MAX, BlockDevice, DeviceFault, Fault
from nexus.drivers.choose import open_block, open_entropy
from nexus.drivers.entropy import DRAW_MAX, DRAW_SIZE_MAX, EntropyDevice, fill
from nexus.drivers.finished import finished
from nexus.drivers.kernel_block import KernelBlock
from nexus.drivers.kernel_entropy import KernelEntropy
from nexus.drivers.virtio import Identity
from nexus.drivers.virtio_block import VirtioBlock
from nexus.drivers.virtio_entropy import VirtioEntropy

__all__ = [
    "DRAW_MAX",
    "DRAW_SIZE_MAX",
    "REQUEST_MAX",
    "BlockDevice",
    "DeviceFault",
    "EntropyDevice",
    "Fault",
    "Identity",
    "KernelBlock",
    "KernelEntropy",
    "VirtioBlock",
    "VirtioEntropy",
    "fill",
    "finished",
    "open_block",
    "open_entropy",
]
