"""What a backend of boot control does for the loader and for updated, wherever the record is.

There is one writer at a time: the loader while no system runs, updated while one does.
"""

from typing import Final, Protocol

from nexus.bootctl.record import BootRecord

BOOT_BLOCKS_MIN: Final = 128  # 64 KiB: the record or environment in two copies, and the anchor


class NoBootRecord(Exception):
    """The device holds no record that can be relied on. Nothing was written to it."""


class BootControl(Protocol):
    """The stored record, and the trust anchor beside it. Every method raises DeviceFault."""

    async def load(self) -> BootRecord:
        """The record in force. Raises NoBootRecord."""
        ...

    async def store(self, record: BootRecord) -> BootRecord:
        """Make the loaded record's successor the one in force: it survives a power cut on return,
        was read back, and is answered with its new sequence.

        After a DeviceFault nobody knows which of the two is in force: `load` first.
        """
        ...

    async def create(self, record: BootRecord) -> BootRecord:
        """Make a record the one in force whatever was there: only who provisions a device does."""
        ...

    async def read_anchor(self) -> bytes:
        """The trust anchor. Raises NoAnchor."""
        ...

    async def write_anchor(self, data: bytes) -> None:
        """Make this the trust anchor: only who provisions a device does."""
        ...
