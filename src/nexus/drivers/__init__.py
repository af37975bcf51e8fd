"""User-space drivers: what a service does with a device it was granted.

A driver finds out from its capability what it holds (a register window, or a device the kernel
drives) and looks the same to the service either way. It waits by the ABI, with a deadline.
"""

from nexus.drivers.block import BlockDevice, DeviceFault, Fault

__all__ = ["BlockDevice", "DeviceFault", "Fault"]
