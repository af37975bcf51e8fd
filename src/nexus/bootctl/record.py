"""What is known of the two slots, and how it may change. Pure: a transition returns a new record.

    slot    EMPTY --staged--> STAGED --attempt--> TRYING --commit--> GOOD
                                                     --no tries left, rollback--> BAD
            GOOD, STAGED, BAD --staging--> EMPTY        any --damaged--> BAD

    record  `active` is the slot that was proven good; it is booted when nothing is tried
            switch: `trying` is the standby slot, so many times
            attempt: a try less, BEFORE the boot; none left: BAD, and `active` is booted
             (a boot loader that counts by itself has taken that try; `attempt` takes the count up)
            commit: the slot in trial is `active` from now on

The standby slot is always the other one than `active`, so nothing is ever staged over the last
good set. Whoever changes a record stores it first and acts afterwards (BootControl.store). What may
not be done raises BootRefused and changes nothing. Decision: docs/adr/0023.
"""

from dataclasses import dataclass, replace
from enum import Enum, IntEnum, StrEnum
from typing import Annotated, Final

import msgspec

from nexus.abi import Nanos
from nexus.bootctl.handover import SlotBoot

COUNT_MAX: Final = (1 << 63) - 1  # of versions, sequences, sizes, times; nobody counts further
COUNTER_LAST: Final = COUNT_MAX - (1 << 48)  # of what is counted up: nobody gets there by counting
DIGEST_SIZE: Final = 32  # bytes of a SHA-256
NAME_SIZE_MAX: Final = 48  # bytes of UTF-8 of a set's or a service's name
DETAIL_SIZE_MAX: Final = 200  # bytes of UTF-8: one sentence
TAIL_SIZE_MAX: Final = 1024  # bytes of UTF-8: the last dozen lines of the console of a failed boot
TRACE_SIZE: Final = 16  # bytes of a W3C trace id
REASONS_MAX: Final = 4  # kept: a switch, two tries that failed, and the rollback
TRIES_MAX: Final = 8  # of a trial: each keeps a device with a bad set down for longer
TRIES_DEFAULT: Final = 2  # one power cut at a bad moment does not condemn a good set

NO_TRACE: Final = bytes(TRACE_SIZE)
NO_DIGEST: Final = bytes(DIGEST_SIZE)

_Count = Annotated[int, msgspec.Meta(ge=0, le=COUNT_MAX)]


class SlotName(StrEnum):
    """Which of the two slots."""

    A = "a"
    B = "b"

    @property
    def other(self) -> "SlotName":
        """The other one of the two."""
        return SlotName.B if self is SlotName.A else SlotName.A

    @property
    def place(self) -> int:
        """Its index in BootRecord.slots."""
        return 0 if self is SlotName.A else 1


class SlotState(IntEnum):
    """How far a slot's content can be relied on. The numbers are stored and never reused."""

    EMPTY = 0  # not bootable, or being written
    STAGED = 1  # verified as a whole, and never booted
    TRYING = 2  # booted at least once, and not yet proven
    GOOD = 3  # committed
    BAD = 4  # used up its tries, was given up, or is damaged


class Cause(IntEnum):
    """What a reason tells. The numbers are stored and never reused."""

    SWITCHED = 1  # a trial was asked for; written before the first risky step
    NOT_READY = 2  # a service was not ready by its deadline
    CRASHED = 3  # a service ended more often than it may
    UNHEALTHY = 4  # a service said that it is not well
    HUNG = 5  # a service answered no health probe any more
    DEADLINE = 6  # the trial's deadline passed before every service was healthy
    INIT_ENDED = 7  # init ended without a verdict
    INIT_HUNG = 8  # init gave no verdict by the trial's deadline and was killed
    LOST = 9  # the boot ended and nobody saw how: the power went, or the machine was reset
    STOPPED = 10  # the system was shut down or restarted in order before the trial was judged
    DAMAGED = 11  # the slot does not hold the bytes that were staged, or cannot be read
    ROLLED_BACK = 12  # no tries were left
    GIVEN_UP = 13  # an operator's rollback
    COMMITTED = 14  # every service was healthy
    PROVISIONED = 15  # the first set of a new device


EVIDENCE: Final = frozenset(
    {
        Cause.NOT_READY,
        Cause.CRASHED,
        Cause.UNHEALTHY,
        Cause.HUNG,
        Cause.DEADLINE,
        Cause.INIT_ENDED,
        Cause.INIT_HUNG,
        Cause.LOST,
        Cause.STOPPED,
        Cause.DAMAGED,
    }
)
"""Causes that say how a boot of a trial ended."""


class BootStatus(Enum):
    """Why a transition is refused."""

    TRIAL_PENDING = "a trial is not over: it has to be committed or rolled back first"
    UNPROVEN = "the slot that is booted is not proven good"
    RESTORING = "data of before the rolled back trial are not restored yet"
    NOT_STAGED = "nothing verified stands in the standby slot"
    NOT_TRYING = "there is no trial, or it was not booted yet"
    OTHER_SLOT = "that slot is not the one in trial"
    BELOW_FLOOR = "the version is below the device's floor"
    UNCOUNTABLE = "a number of the set is larger than a record can hold"
    NO_SLOT = "there is no other slot that can be booted"
    TRIES = "so many tries are not given"
    NOTHING_TO_RESTORE = "there is nothing to restore"


class BootRefused(Exception):
    """A transition that may not be made now; the record stays as it was."""

    def __init__(self, status: BootStatus) -> None:
        super().__init__(status.value)
        self.status = status


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotInfo:
    """What is known of one slot."""

    state: SlotState = SlotState.EMPTY
    tries_left: _Count = 0  # of the trial; counted down before each boot of it
    attempts: _Count = 0  # boots of the trial
    version: _Count = 0
    name: str = ""  # what people call the version; at most NAME_SIZE_MAX
    digest: bytes = NO_DIGEST  # SHA-256 of the whole set file
    size: _Count = 0  # bytes of the set file, from the slot's beginning on
    floor: _Count = 0  # the device's version floor once this set is committed

    @property
    def is_bootable(self) -> bool:
        """Whether a whole verified set stands in it, so far as the record knows."""
        return self.state in (SlotState.STAGED, SlotState.TRYING, SlotState.GOOD)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reason:
    """Something that happened to a slot, with its evidence. Texts are clipped when it is made."""

    cause: Cause
    slot: SlotName
    version: _Count  # of the set that stood in the slot then
    boot: _Count  # BootRecord.boots at that time
    wall: _Count = 0  # ns since 1970 by the clock of the machine; 0 if there was none
    trace: bytes = NO_TRACE  # the trace id under which init or the operator acted
    service: str = ""  # the service it was about; at most NAME_SIZE_MAX
    detail: str = ""  # one sentence; at most DETAIL_SIZE_MAX
    tail: str = ""  # the last lines of the boot's console; at most TAIL_SIZE_MAX

    def __post_init__(self) -> None:
        """Clip what is too long: a name and a sentence at the end, a tail at the beginning."""
        for field, clipped in (
            ("service", clip(self.service, NAME_SIZE_MAX)),
            ("detail", clip(self.detail, DETAIL_SIZE_MAX)),
            ("tail", clip_front(self.tail, TAIL_SIZE_MAX)),
        ):
            object.__setattr__(self, field, clipped)


@dataclass(frozen=True, slots=True, kw_only=True)
class Counted:
    """What the board's boot loader has done since the last `attempt`, which takes it up.

    Each of these boots of the trial has taken its try already; all but the last ended before our
    loader ran, and the last too if the boot loader starts the other slot now.
    """

    boots: _Count  # of the trial; at most TRIES_MAX
    slot: SlotName  # whose kernel it started last


@dataclass(frozen=True, slots=True, kw_only=True)
class BootRecord:
    """Everything boot control knows."""

    sequence: _Count = 0  # of the stored record; BootControl.store raises it
    active: SlotName = SlotName.A
    trying: SlotName | None = None  # never `active`
    slots: tuple[SlotInfo, SlotInfo] = (SlotInfo(), SlotInfo())  # a, b
    boots: _Count = 0  # attempts to boot, ever
    floor: _Count = 0  # no set below this version is staged, tried or booted
    snapshot: _Count = 0  # of the data before the trial; 0 for none
    restore: bool = False  # the snapshot has to be restored before anything reads the data
    reasons: tuple[Reason, ...] = ()  # the latest last
    counted: Counted | None = None  # None where no boot loader counts; docs/adr/0029

    @property
    def standby(self) -> SlotName:
        """The slot that may be written."""
        return self.active.other

    def slot(self, name: SlotName) -> SlotInfo:
        """What is known of this slot."""
        return self.slots[name.place]

    def with_slot(self, name: SlotName, info: SlotInfo) -> "BootRecord":
        """The same record with another info for that slot."""
        slots = (info, self.slots[1]) if name is SlotName.A else (self.slots[0], info)
        return replace(self, slots=slots)

    def with_reason(self, reason: Reason) -> "BootRecord":
        """The same record with one more reason; the oldest beyond REASONS_MAX goes."""
        return replace(self, reasons=(*self.reasons, reason)[-REASONS_MAX:])


# ---------------------------------------------------------------- the transitions


def provisioned(info: SlotInfo, *, wall: int = 0) -> BootRecord:
    """The record of a new device, whose slot a holds this set: trusted without a trial."""
    first = replace(info, state=SlotState.GOOD, tries_left=0)
    reason = Reason(
        cause=Cause.PROVISIONED, slot=SlotName.A, version=info.version, boot=0, wall=wall
    )
    record = BootRecord(active=SlotName.A, slots=(first, SlotInfo()), floor=info.floor)
    return record.with_reason(reason)


def check_settled(record: BootRecord) -> None:
    """Raises BootRefused unless the running set is proven good and nothing is unfinished."""
    if record.trying is not None:
        raise BootRefused(BootStatus.TRIAL_PENDING)
    if record.slot(record.active).state is not SlotState.GOOD:
        raise BootRefused(BootStatus.UNPROVEN)
    if record.restore:
        raise BootRefused(BootStatus.RESTORING)


def staging(record: BootRecord) -> BootRecord:
    """The standby slot is about to be written: from now on it is not bootable."""
    check_settled(record)
    return record.with_slot(record.standby, SlotInfo())


def staged(record: BootRecord, info: SlotInfo) -> BootRecord:
    """The standby slot holds this set, read back from it and verified as a whole."""
    check_settled(record)
    if record.slot(record.standby).state is not SlotState.EMPTY:
        raise BootRefused(BootStatus.NOT_STAGED)  # it was not cleared first: whose bytes are these
    if max(info.version, info.floor, info.size) > COUNT_MAX:
        raise BootRefused(BootStatus.UNCOUNTABLE)
    if info.version < max(record.floor, info.floor):
        raise BootRefused(BootStatus.BELOW_FLOOR)
    return record.with_slot(
        record.standby, replace(info, state=SlotState.STAGED, tries_left=0, attempts=0)
    )


def switch(record: BootRecord, tries: int, reason: Reason, *, snapshot: int = 0) -> BootRecord:
    """Try the staged set from the next boot on, so many times.

    `reason` says who asked, and is what is known if the device is never seen again in that slot.
    `snapshot` names the data to go back to; 0 if the set migrates nothing.
    """
    check_settled(record)
    info = record.slot(record.standby)
    if info.state is not SlotState.STAGED:
        raise BootRefused(BootStatus.NOT_STAGED)
    if not 1 <= tries <= TRIES_MAX:
        raise BootRefused(BootStatus.TRIES)
    if info.version < record.floor:
        raise BootRefused(BootStatus.BELOW_FLOOR)
    tried = record.with_slot(record.standby, replace(info, tries_left=tries, attempts=0))
    return replace(tried, trying=record.standby, snapshot=snapshot).with_reason(reason)


def attempt(record: BootRecord, *, wall: int = 0) -> tuple[BootRecord, SlotName]:
    """A boot is about to begin: the record to store before it, and the slot to boot.

    A trial's tries are counted down here. One that has none left is over: its slot is BAD, the data
    go back to the snapshot if there is one, and the active slot is booted. If the active slot is
    not bootable any more, a slot in trial is tried without an end: it is the last one.

    A boot of a trial whose end nobody reported (`failed`) is remembered as LOST. A boot that the
    board's boot loader has counted is not counted again.

    Raises BootRefused(NO_SLOT) if there is no slot to boot.
    """
    record = _unseen_end(_taken_up(record, wall), wall)
    record = replace(record, boots=record.boots + 1)
    name = record.trying
    if name is None:
        if not record.slot(record.active).is_bootable:
            raise BootRefused(BootStatus.NO_SLOT)
        return record, record.active
    info = record.slot(name)
    is_last = not record.slot(record.active).is_bootable
    if info.tries_left == 0 and not is_last:
        return _rolled_back(record, name, wall), record.active
    left = max(0, info.tries_left - 1)
    tried = replace(info, state=SlotState.TRYING, tries_left=left, attempts=info.attempts + 1)
    return record.with_slot(name, tried), name


def failed(record: BootRecord, reason: Reason) -> BootRecord:
    """How the latest boot of the trial ended. Whether there is another one, `attempt` decides."""
    _check_trial(record, reason.slot)
    return record.with_reason(reason)


def commit(record: BootRecord, running: SlotName, reason: Reason) -> BootRecord:
    """The trial that runs in `running` is healthy: it is what is booted from now on.

    The device's floor rises to what the set declares. A set in the other slot that is below it is
    not bootable any more, so that no way back leads under the floor.
    """
    _check_trial(record, running)
    info = replace(record.slot(running), state=SlotState.GOOD, tries_left=0)
    floor = max(record.floor, info.floor)
    record = record.with_slot(running, info)
    if record.slot(running.other).version < floor:
        record = record.with_slot(running.other, SlotInfo())
    record = replace(record, active=running, trying=None, floor=floor, snapshot=0, restore=False)
    return record.with_reason(reason)


def rollback(record: BootRecord, reason: Reason) -> BootRecord:
    """The operator gives up the trial, or without one goes back to the other slot's good set.

    A trial that was never booted is merely taken back: its set stays staged.
    """
    if record.trying is not None:
        name = record.trying
        if not record.slot(record.active).is_bootable:
            raise BootRefused(BootStatus.NO_SLOT)
        info = record.slot(name)
        was_booted = info.state is SlotState.TRYING
        left = replace(info, state=SlotState.BAD if was_booted else SlotState.STAGED, tries_left=0)
        record = _without_trial(record.with_slot(name, left), was_booted=was_booted)
        return record.with_reason(reason)
    if record.restore:
        raise BootRefused(BootStatus.RESTORING)
    other = record.slot(record.standby)
    if other.state is not SlotState.GOOD:
        raise BootRefused(BootStatus.NO_SLOT)
    if other.version < record.floor:
        raise BootRefused(BootStatus.BELOW_FLOOR)
    return replace(record, active=record.standby).with_reason(reason)


def damaged(record: BootRecord, name: SlotName, reason: Reason) -> BootRecord:
    """A slot does not hold what the record says: it is BAD, and what else there is counts.

    Of a trial that is the end, as if its tries were used up. In place of a damaged active slot the
    other one is booted: a good one as it is, a staged one as a trial without an end (`attempt`).
    """
    info = replace(record.slot(name), state=SlotState.BAD, tries_left=0)
    was_booted = record.slot(name).state is SlotState.TRYING
    record = record.with_slot(name, info).with_reason(reason)
    if name is record.trying:
        return _without_trial(record, was_booted=was_booted)
    if name is record.active and record.trying is None:
        other = record.slot(name.other)
        if other.state is SlotState.GOOD:
            return replace(record, active=name.other)
        if other.is_bootable:
            record = record.with_slot(name.other, replace(other, tries_left=1))
            return replace(record, trying=name.other)
    return record


def restored(record: BootRecord) -> BootRecord:
    """The data are those of before the trial again, durably."""
    if not record.restore:
        raise BootRefused(BootStatus.NOTHING_TO_RESTORE)
    return replace(record, restore=False, snapshot=0)


# ---------------------------------------------------------------- what they share


def _check_trial(record: BootRecord, name: SlotName) -> None:
    if record.trying is None or record.slot(record.trying).state is not SlotState.TRYING:
        raise BootRefused(BootStatus.NOT_TRYING)
    if name is not record.trying:
        raise BootRefused(BootStatus.OTHER_SLOT)


def _without_trial(record: BootRecord, *, was_booted: bool) -> BootRecord:
    """The trial is over, without success. Only one that was booted can have changed data."""
    restore = record.restore or (was_booted and record.snapshot != 0)
    snapshot = record.snapshot if restore else 0
    return replace(record, trying=None, restore=restore, snapshot=snapshot, counted=None)


def _rolled_back(record: BootRecord, name: SlotName, wall: int) -> BootRecord:
    """No try is left. The reason repeats who was at fault, for older ones may be gone."""
    info = record.slot(name)
    last = next((each for each in reversed(record.reasons) if _tells_end(each, name)), None)
    reason = Reason(
        cause=Cause.ROLLED_BACK,
        slot=name,
        version=info.version,
        boot=record.boots,
        wall=wall,
        trace=NO_TRACE if last is None else last.trace,
        service="" if last is None else last.service,
        detail="" if last is None else f"{last.cause.name.lower()}: {last.detail}",
    )
    record = record.with_slot(name, replace(info, state=SlotState.BAD))
    return _without_trial(record, was_booted=True).with_reason(reason)


def _tells_end(reason: Reason, name: SlotName) -> bool:
    return reason.slot is name and reason.cause in EVIDENCE


def _taken_up(record: BootRecord, wall: int) -> BootRecord:
    """The record without a boot loader's count: boots that never came to our loader are LOST, and
    the try of the boot that goes on is given back, for `attempt` takes it."""
    name, counted = record.trying, record.counted
    record = replace(record, counted=None)
    if counted is None or name is None:
        return record
    goes_on = counted.slot is name and counted.boots > 0
    for _ in range(counted.boots - goes_on):
        record = _unseen_end(record, wall)
        info = record.slot(name)
        lost = replace(info, state=SlotState.TRYING, attempts=info.attempts + 1)
        record = replace(record, boots=record.boots + 1).with_slot(name, lost)
    info = record.slot(name)
    return record.with_slot(name, replace(info, tries_left=info.tries_left + goes_on))


def _unseen_end(record: BootRecord, wall: int) -> BootRecord:
    name = record.trying
    if name is None or record.slot(name).state is not SlotState.TRYING:
        return record
    if any(_tells_end(each, name) and each.boot == record.boots for each in record.reasons):
        return record
    return record.with_reason(
        Reason(
            cause=Cause.LOST,
            slot=name,
            version=record.slot(name).version,
            boot=record.boots,
            wall=wall,
            detail="the boot ended and nobody saw how: the power went, or the machine was reset",
        )
    )


def clip(text: str, size_max: int) -> str:
    """The beginning of a text, at most so many bytes of UTF-8."""
    data = text.encode("utf-8", "replace")
    return data[:size_max].decode("utf-8", "ignore") if len(data) > size_max else data.decode()


def clip_front(text: str, size_max: int) -> str:
    """The end of a text, at most so many bytes of UTF-8."""
    data = text.encode("utf-8", "replace")
    return data[-size_max:].decode("utf-8", "ignore") if len(data) > size_max else data.decode()


def problem_of(record: BootRecord) -> str | None:
    """What no record can be, however it came about; None for a possible one."""
    numbers = [record.sequence, record.boots, record.floor, record.snapshot]
    numbers += [it for each in record.slots for it in _numbers_of_slot(each)]
    numbers += [it for each in record.reasons for it in (each.version, each.boot, each.wall)]
    if not all(0 <= number <= COUNT_MAX for number in numbers):
        return "a number is out of bounds"
    if max(record.sequence, record.boots, *(it.attempts for it in record.slots)) > COUNTER_LAST:
        return "a counter has come too far"
    if record.trying is record.active:
        return "the active slot is in trial"
    if record.restore and not record.snapshot:
        return "there is nothing to restore from"
    if record.counted is not None and record.counted.boots > TRIES_MAX:
        return f"{record.counted.boots} boots are counted, more than a trial has"
    if len(record.reasons) > REASONS_MAX:
        return "there are too many reasons"
    for name in SlotName:
        info = record.slot(name)
        if len(info.digest) != DIGEST_SIZE:
            return f"the digest of slot {name} has {len(info.digest)} bytes"
        if clip(info.name, NAME_SIZE_MAX) != info.name:
            return f"the name of slot {name} is too long, or no text"
        if info.tries_left > TRIES_MAX or (info.tries_left and name is not record.trying):
            return f"slot {name} has {info.tries_left} tries left"
        if info.state is SlotState.TRYING and name is not record.trying:
            return f"slot {name} is tried without a trial"
    if record.trying is not None and not record.slot(record.trying).is_bootable:
        return f"slot {record.trying} is in trial and not bootable"
    for reason in record.reasons:
        if len(reason.trace) != TRACE_SIZE:
            return f"a trace id has {len(reason.trace)} bytes"
    return None


def _numbers_of_slot(info: SlotInfo) -> tuple[int, ...]:
    return info.tries_left, info.attempts, info.version, info.size, info.floor


def slot_boot(record: BootRecord, name: SlotName, deadline: Nanos) -> SlotBoot:
    """What init is told of the boot that `attempt` chose."""
    info = record.slot(name)
    return SlotBoot(
        slot=name.value,
        version=info.version,
        name=info.name,
        digest=info.digest.hex(),
        trial=name is record.trying,
        attempt=info.attempts if name is record.trying else 0,
        deadline=deadline if name is record.trying else 0,
        snapshot=record.snapshot,
        restore=record.restore,
    )
