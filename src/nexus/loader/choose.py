"""Which slot is booted next. Pure: reads and writes block devices, and knows no files.

    load record -> add how the last boot ended -> count down the try -> look at every byte of the
    slot -> store -> Chosen

The record is stored before anything is started from the slot, so whatever happens from then on has
been paid for: a boot that never says a word again leads back, one try at a time. A slot that does
not hold what the record says is never started; then the other one is looked at.

A slot that cannot be read now may be readable at the next boot. It is passed over, and what is
stored is that the other one is booted: a set that was proven good stays so, and nothing at all is
stored if there is nothing else to boot.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Final

from nexus.abi import BLOCK_SIZE, Nanos
from nexus.bootctl import (
    NO_TRACE,
    TRACE_SIZE,
    BootRecord,
    BootRefused,
    Cause,
    Reason,
    SlotInfo,
    SlotName,
    SlotState,
    attempt,
    damaged,
    failed,
    rollback,
    slot_boot,
)
from nexus.bootctl.contract import BootControl
from nexus.bootctl.handover import EXIT_ENDED, EXIT_STOPPED, SlotBoot, TrialFailure, TrialReason
from nexus.drivers import BlockDevice, DeviceFault
from nexus.sets import Manifest, SetRefused, read_manifest

READ_BLOCKS: Final = 2048  # blocks of one read: 1 MiB, of which one at a time is in memory
LOOKS_MAX: Final = 4  # slots looked at for one boot: each may be found damaged, in trial and after

ORDERLY: Final = (EXIT_STOPPED, EXIT_ENDED)  # exit codes of an init that was told to end


class NothingBootable(Exception):
    """There is no slot to boot, and why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ended:
    """What is known of the boot before this one.

    `code` and `signal` are how init ended, None if nobody saw it; `is_hung` says that the loader
    killed it because it gave no verdict in time; `problem` is why it could not even be started.
    `failure` is init's own last word, `tail` the last lines of that boot's console.
    """

    code: int | None = None
    signal: int = 0
    is_hung: bool = False
    problem: str = ""
    failure: TrialFailure | None = None
    tail: str = ""


UNSEEN: Final = Ended()


@dataclass(frozen=True, kw_only=True, slots=True)
class Chosen:
    """The slot to boot, the manifest of its set, and the record as it is stored."""

    boot: SlotBoot
    manifest: Manifest
    record: BootRecord


class SlotSource:
    """sets.Source: the set that stands at the beginning of a slot."""

    def __init__(self, device: BlockDevice, size: int) -> None:
        self._device = device
        self.size = size

    async def read_at(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset` on; fewer only at the end of the set. Raises DeviceFault."""
        size = min(size, self.size - offset)
        if size <= 0:
            return b""
        first = offset // BLOCK_SIZE
        last = -(-(offset + size) // BLOCK_SIZE)
        data = await self._device.read(first, last - first)
        start = offset - first * BLOCK_SIZE
        return data[start : start + size]


async def choose(
    control: BootControl,
    slots: Mapping[SlotName, BlockDevice],
    ended: Ended | None,
    *,
    wall: int = 0,
) -> Chosen:
    """Decide what is booted, and have that on the boot device before this returns.

    `ended` is how the last boot ended, None for a first look; `wall` the time for the record, ns
    since 1970 or 0. A boot device that cannot be written any more boots what was proven good, and
    tries nothing. Raises NothingBootable, bootctl's NoBootRecord, DeviceFault (boot device).
    """
    try:
        return await _choose(control, slots, ended, wall)
    except DeviceFault as fault:
        return await _proven(control, slots, fault)


async def _proven(
    control: BootControl, slots: Mapping[SlotName, BlockDevice], fault: DeviceFault
) -> Chosen:
    """What can be booted without storing anything: a good slot, and never one in trial."""
    record = settled = await control.load()
    if record.trying is not None:
        # In memory alone: the data are those of before the trial in any case.
        name = record.trying
        settled = rollback(
            record,
            Reason(cause=Cause.GIVEN_UP, slot=name, version=0, boot=record.boots),
        )
    for name in (record.active, record.standby):
        if record.slot(name).state is not SlotState.GOOD:
            continue
        found = await _look(slots[name], record.slot(name))
        if isinstance(found, Manifest):
            boot = slot_boot(settled, name, Nanos(found.health))
            return Chosen(boot=boot, manifest=found, record=record)
    raise fault


async def _choose(
    control: BootControl,
    slots: Mapping[SlotName, BlockDevice],
    ended: Ended | None,
    wall: int,
) -> Chosen:
    record = await control.load()
    if ended is not None:
        record = await _noted(control, record, ended, wall)
    unread: dict[SlotName, Reason] = {}
    for _ in range(LOOKS_MAX):
        try:
            tried, name = attempt(_without(record, unread), wall=wall)
        except BootRefused as refused:
            why = [str(refused), *(reason.detail for reason in unread.values())]
            raise NothingBootable("; ".join(why)) from refused
        found = await _look(slots[name], tried.slot(name))
        if isinstance(found, Unread):  # once more: to leave a slot for a moment's fault is dear
            found = await _look(slots[name], tried.slot(name))
        if isinstance(found, Manifest):
            stored = await control.store(_spared(tried, record, unread))
            deadline = Nanos(found.health)
            boot = slot_boot(stored, name, deadline)
            return Chosen(boot=boot, manifest=found, record=stored)
        if isinstance(found, Unread):
            unread[name] = _flaw(record, name, found, wall)
            continue
        # The boot that did not happen is not counted, nor that a trial was over: with its way back
        # it has lost its end.
        record = await control.store(damaged(record, name, _flaw(record, name, found, wall)))
    raise NothingBootable("every slot that was looked at is damaged")


def _without(record: BootRecord, unread: Mapping[SlotName, Reason]) -> BootRecord:
    """The record as if these slots were damaged: what else there is to boot."""
    for name, reason in unread.items():
        record = damaged(record, name, reason)
    return record


def _spared(tried: BootRecord, record: BootRecord, unread: Mapping[SlotName, Reason]) -> BootRecord:
    """What is stored of a choice without these slots: those that were proven good still are, and a
    trial that could not be read is over."""
    for name in unread:
        if record.slot(name).state is SlotState.GOOD:
            tried = tried.with_slot(name, record.slot(name))
    return tried


async def note_end(control: BootControl, ended: Ended, *, wall: int = 0) -> BootRecord:
    """Keep how a boot ended that is not followed by another one now; the record.

    Raises bootctl's NoBootRecord, DeviceFault.
    """
    return await _noted(control, await control.load(), ended, wall)


async def _noted(control: BootControl, record: BootRecord, ended: Ended, wall: int) -> BootRecord:
    name = record.trying
    if name is None or record.slot(name).state is not SlotState.TRYING:
        return record  # what ended was no trial, or one that has been judged
    if ended == UNSEEN or (reason := _end_of(record, name, ended, wall)) is None:
        return record  # attempt says that nobody saw it
    if any(each.boot == record.boots and each.cause is reason.cause for each in record.reasons):
        return record  # kept by the loader that saw it, which then ended itself
    return await control.store(failed(record, reason))


def _end_of(record: BootRecord, name: SlotName, ended: Ended, wall: int) -> Reason | None:
    """The evidence of a trial's end; None if nothing is known but that it ended."""
    info = record.slot(name)
    failure = ended.failure
    if failure is not None and not _is_of(failure, record, name):
        failure = None
    service, trace = "", NO_TRACE
    if failure is not None:
        cause = CAUSES.get(failure.reason, Cause.INIT_ENDED)
        service, detail = failure.service, failure.detail
        trace = _trace(failure.trace)
    elif ended.problem:
        cause, detail = Cause.INIT_ENDED, ended.problem
    elif ended.is_hung:
        cause, detail = Cause.INIT_HUNG, "no verdict by the deadline of the trial: init was killed"
    elif ended.signal:
        cause, detail = Cause.INIT_ENDED, f"init was killed by signal {ended.signal}"
    elif ended.code in ORDERLY:
        cause, detail = Cause.STOPPED, "the system was ended in order before it was judged"
    elif ended.code is not None:
        cause, detail = Cause.INIT_ENDED, f"init ended with exit code {ended.code}"
    elif ended.tail:
        cause, detail = Cause.LOST, "nobody saw how it ended: the power went, or all was killed"
    else:
        return None
    return Reason(
        cause=cause,
        slot=name,
        version=info.version,
        boot=record.boots,
        wall=wall,
        trace=trace,
        service=service,
        detail=detail,
        tail=ended.tail,
    )


def _is_of(failure: TrialFailure, record: BootRecord, name: SlotName) -> bool:
    """Whether init's word is about the last boot, and not one of before that was left lying."""
    return (
        failure.slot == name
        and failure.version == record.slot(name).version
        and failure.attempt == record.slot(name).attempts
    )


def _trace(text: str) -> bytes:
    """A trace id as stored; zeros for what is none."""
    try:
        trace = bytes.fromhex(text)
    except ValueError:
        trace = b""
    return trace if len(trace) == TRACE_SIZE else NO_TRACE


class Unread(str):
    """Why a slot could not be read: nothing is known of what it holds."""

    __slots__ = ()


async def _look(device: BlockDevice, info: SlotInfo) -> Manifest | Unread | str:
    """Every byte of a slot against the record: its manifest, or what is wrong with it."""
    try:
        if await _digest(device, info.size) != info.digest:
            return "its bytes are not those that were staged"
        manifest = await read_manifest(SlotSource(device, info.size))
    except DeviceFault as fault:
        return Unread(f"it cannot be read: {fault}")
    except SetRefused as refused:
        return str(refused)
    if manifest.version != info.version:
        return f"it says version {manifest.version}"
    return manifest


async def _digest(device: BlockDevice, size: int) -> bytes:
    """SHA-256 of the first `size` bytes. Raises DeviceFault."""
    digest = sha256()
    source = SlotSource(device, size)
    for offset in range(0, size, READ_BLOCKS * BLOCK_SIZE):
        digest.update(await source.read_at(offset, READ_BLOCKS * BLOCK_SIZE))
    return digest.digest()


def _flaw(record: BootRecord, name: SlotName, found: str, wall: int) -> Reason:
    return Reason(
        cause=Cause.DAMAGED,
        slot=name,
        version=record.slot(name).version,
        boot=record.boots,
        wall=wall,
        detail=f"slot {name}: {found}",
    )


CAUSES: Final[Mapping[str, Cause]] = {
    TrialReason.NOT_READY: Cause.NOT_READY,
    TrialReason.CRASHED: Cause.CRASHED,
    TrialReason.UNHEALTHY: Cause.UNHEALTHY,
    TrialReason.HUNG: Cause.HUNG,
    TrialReason.DEADLINE: Cause.DEADLINE,
}
"""A later init may have more words: of those it is kept that init ended, and its sentence."""
