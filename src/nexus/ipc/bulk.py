"""Bulk bytes travel as a sealed VMO; the frame carries their offset and length.

The sender moves the VMO with the request (`ask(..., move=slot)`). The receiver checks kind,
right, seal and bounds before it looks at a byte, and closes what it was given.
"""

from dataclasses import dataclass
from enum import Enum
from typing import Final

from nexus.abi import (
    VMO_SIZE_MAX,
    AbiError,
    CapClose,
    CapKind,
    CapQuery,
    Rights,
    Slot,
    Status,
    VmoCreate,
    VmoMap,
    VmoSeal,
    VmoWrite,
)

BULK_SIZE_MAX: Final = VMO_SIZE_MAX  # bytes of one transfer


class BulkFault(Enum):
    """Why offered bulk bytes are not taken."""

    NO_CAPABILITY = "no capability came with the frame"
    NOT_A_VMO = "the capability is no VMO that may be mapped"
    NOT_SEALED = "the sender could still change the bytes"
    OUT_OF_BOUNDS = "offset and length are not inside the VMO"


@dataclass(frozen=True, slots=True)
class Bulk:
    """Mapped bytes of somebody else's VMO; `release` them when they are used."""

    view: memoryview
    slot: Slot
    whole: memoryview

    async def release(self) -> None:
        """End the mapping and close the capability."""
        self.view.release()
        self.whole.release()
        await CapClose(self.slot)


async def offer_bulk(data: bytes) -> Slot | None:
    """A sealed VMO that holds `data` from offset 0 on; None if the task's budget refuses it."""
    assert 1 <= len(data) <= BULK_SIZE_MAX
    try:
        slot = await VmoCreate(len(data))
    except AbiError as error:
        if error.status is Status.NO_SPACE:
            return None
        raise
    await VmoWrite(slot, 0, data)
    await VmoSeal(slot)
    return slot


async def accept_bulk(cap: Slot | None, offset: int, length: int) -> Bulk | BulkFault:
    """The bytes a frame refers to, mapped; on a fault `cap` is closed."""
    if cap is None:
        return BulkFault.NO_CAPABILITY
    fault = await _fault_of(cap, offset, length)
    if fault is None:
        try:
            whole = await VmoMap(cap)
        except AbiError:
            fault = BulkFault.NOT_SEALED
        else:
            return Bulk(whole[offset : offset + length], cap, whole)
    await CapClose(cap)
    return fault


async def _fault_of(cap: Slot, offset: int, length: int) -> BulkFault | None:
    try:
        info = await CapQuery(cap)
    except AbiError:
        return BulkFault.NOT_A_VMO
    if info.kind is not CapKind.VMO or not info.rights & Rights.MAP:
        return BulkFault.NOT_A_VMO
    if offset < 0 or length < 0 or offset + length > info.length:
        return BulkFault.OUT_OF_BOUNDS
    return None
