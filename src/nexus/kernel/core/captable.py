"""One task's capability table: a fixed number of slots, the lowest free one first."""

from collections.abc import Iterator
from typing import Generic, TypeVar

from nexus.abi import SLOTS_MAX, AbiError, Rights, Slot, Status

T = TypeVar("T")


class Held(Generic[T]):
    """What one slot holds: an object, and what this slot allows on it.

    `bits` is `rights` as a plain integer: operators on an IntFlag take 20 times as long.
    """

    __slots__ = ("bits", "object", "rights")

    def __init__(self, object_: T, rights: Rights) -> None:
        self.object = object_
        self.rights = rights
        self.bits = int(rights)


class CapTable(Generic[T]):
    """Slots of one task. Several slots may alias one object; objects are told apart by identity.

    `entries` is keyed by slot, so that a slot outside the table is simply not there. Read only
    for others: hot paths look slots up in it without a call.
    """

    __slots__ = ("_aliases", "_free", "entries", "slot_count")

    def __init__(self, slot_count: int = SLOTS_MAX) -> None:
        assert 1 <= slot_count <= SLOTS_MAX, "a table is at most as large as the ABI says"
        self.slot_count = slot_count
        self.entries: dict[int, Held[T]] = {}
        self._free = (1 << slot_count) - 1  # bit n is set while slot n is empty
        self._aliases: dict[int, int] = {}  # id of an object -> slots that hold it

    @property
    def used(self) -> int:
        """How many slots hold something."""
        return len(self.entries)

    @property
    def full(self) -> bool:
        """Whether no slot is free."""
        return not self._free

    def set(self, object_: T, rights: Rights) -> Slot:
        """Put an object into the lowest free slot. Refuses: NoSpace."""
        if not self._free:
            raise AbiError(Status.NO_SPACE, f"all {self.slot_count} slots are used")
        slot = Slot((self._free & -self._free).bit_length() - 1)
        self.restore(slot, Held(object_, rights))
        return slot

    def get(self, slot: Slot) -> Held[T]:
        """What a slot holds. Refuses: InvalidArgument (outside the table, empty)."""
        held = self.entries.get(slot)
        if held is None:
            raise AbiError(Status.INVALID_ARGUMENT, f"slot {slot} holds nothing")
        return held

    def require(self, slot: Slot, right: Rights) -> Held[T]:
        """What a slot holds, if it has this right. Refuses: InvalidArgument, PermissionDenied."""
        held = self.get(slot)
        if not held.bits & int(right):
            raise AbiError(Status.PERMISSION_DENIED, f"slot {slot} lacks {right!r}")
        return held

    def take(self, slot: Slot) -> Held[T]:
        """Empty a slot and return what it held. Refuses: InvalidArgument."""
        held = self.get(slot)
        del self.entries[slot]
        self._free |= 1 << slot
        key = id(held.object)
        count = self._aliases[key] - 1
        if count:
            self._aliases[key] = count
        else:
            del self._aliases[key]
        return held

    def restore(self, slot: Slot, held: Held[T]) -> None:
        """Put something into one particular empty slot, such as what was taken from it."""
        assert self._free >> slot & 1, "only an empty slot is filled"
        self._free &= ~(1 << slot)
        self.entries[slot] = held
        key = id(held.object)
        self._aliases[key] = self._aliases.get(key, 0) + 1

    def aliases(self, object_: T) -> int:
        """How many slots hold this very object."""
        return self._aliases.get(id(object_), 0)

    def slots(self) -> Iterator[Slot]:
        """The used slots, lowest first."""
        for slot in sorted(self.entries):
            yield Slot(slot)
