"""How the store refuses, and what it says of damage."""

from typing import NamedTuple


class Unopenable(Exception):
    """The device holds no store of ours, or one of a newer format. Nothing was written to it."""


class OverQuota(Exception):
    """The area would take more bytes or keys than it may."""


class StoreFull(Exception):
    """The store would take more than it can hold, or than what is reserved for others leaves."""


class ReadOnly(Exception):
    """The device cannot be written, or an operation of it failed since the store was opened."""


class Lost(NamedTuple):
    """A damaged record that was set aside."""

    key: bytes  # b"" if it cannot be told
    offset: int  # bytes from the device's beginning
    sequence: int  # 0 if it cannot be told


class Damaged(Exception):
    """The record of this key was damaged and is quarantined. A change of the key replaces it."""

    def __init__(self, lost: Lost) -> None:
        super().__init__(f"the record at {lost.offset} is damaged")
        self.lost = lost
