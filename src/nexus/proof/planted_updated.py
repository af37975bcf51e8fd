"""What saboteurs break inside updated, by rung: in the simulator in the process that simulates, on
linux in the interpreter of its own, whose entry is then `sabotaged`."""

# ruff: noqa: SLF001 (saboteurs break what is private)

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final

from nexus.bootctl import BootRecord, Cause, Reason, SlotName, SlotState
from nexus.drivers import BlockDevice
from nexus.proof.planted_boot import one_copy
from nexus.proof.sabotage import replace
from nexus.runtime.program import Main, program_of
from nexus.services.updated import engine
from nexus.services.updated.engine import Engine
from nexus.services.updated.kept import History
from nexus.services.updated.places import GrantedBoot
from nexus.services.updated.service import Updated


def sabotaged(number: str) -> Main:
    """updated with the fault of a rung."""
    plant(int(number))
    return program_of(Updated)


def plant(number: int) -> None:
    """Break what turns this rung red."""
    _PLANTS[number]()


def _history_not_read() -> None:
    """#36."""

    async def opened(_history: History) -> None:
        """What is kept is not looked at."""

    _ = replace(History, "open", opened)


def _at_a_wrong_offset() -> None:
    """#131: the first piece, one block further on."""

    async def write(device: BlockDevice, block: int, data: Any) -> None:
        await original(device, block + (block == 0), data)

    original = replace(engine, "_write", write)


def _floor_not_compared() -> None:
    """#132."""

    def verify(state: Any, metadata: Any, **options: Any) -> Any:
        moved, target = original(dataclasses.replace(state, version_floor=0), metadata, **options)
        return dataclasses.replace(moved, version_floor=state.version_floor), target

    original = replace(engine, "verify_metadata", verify)


def _pending_in_memory() -> None:
    """#133: the record of a trial that is to come is not stored."""

    async def store(boot: GrantedBoot, record: BootRecord) -> BootRecord:
        trying = record.trying
        if trying is SlotName.B and record.slot(trying).state is SlotState.STAGED:
            return dataclasses.replace(record, sequence=record.sequence + 1)
        stored: BootRecord = await original(boot, record)
        return stored

    original = replace(GrantedBoot, "store", store)


def _reason_afterwards() -> None:
    """#137: why slot a was tried is written once the trial is over."""

    def switched(record: BootRecord, tries: int, reason: Reason, **options: Any) -> BootRecord:
        found: BootRecord = original(record, tries, reason, **options)
        late = found.trying is SlotName.A
        return dataclasses.replace(found, reasons=record.reasons) if late else found

    async def opened(updates: Engine, asker: Any) -> None:
        await original_open(updates, asker)
        record = updates.record
        if record.trying is None and record.slot(SlotName.A).state is SlotState.BAD:
            version = record.slot(SlotName.A).version
            late = Reason(cause=Cause.SWITCHED, slot=SlotName.A, version=version, boot=record.boots)
            await updates._change(lambda found: found.with_reason(late))

    original = replace(engine, "switch", switched)
    original_open = replace(Engine, "open", opened)


_PLANTS: Final[Mapping[int, Callable[[], None]]] = MappingProxyType(
    {
        36: _history_not_read,
        131: _at_a_wrong_offset,
        132: _floor_not_compared,
        133: _pending_in_memory,
        137: _reason_afterwards,
        138: one_copy,
    }
)
