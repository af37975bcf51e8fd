"""`nexus ota`: a signed update comes to the standby slot, is tried, and kept or left.

The bytes go through operator's port a piece at a time, so an update that is cut off goes on where
it was, whoever asks again. What may be done, and why not, updated says.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

from nexus.bootctl.record import Cause
from nexus.cli.ask import Asked
from nexus.cli.client import OperatorClient, ServiceRefused, Unanswered
from nexus.cli.errors import CommandFailed, UsageError
from nexus.cli.files import open_input
from nexus.cli.output import counting, progress, say, say_json, say_table
from nexus.protocols.operator import OperatorStatus
from nexus.protocols.updated import (
    COMMIT_RIGHT,
    DIGEST_SIZE,
    INLINE_PIECE_MAX,
    METADATA_SIZE_MAX,
    PIECE_UNIT,
    PROTOCOL,
    READ_RIGHT,
    ROLLBACK_RIGHT,
    SERVICE_NAME,
    STAGE_RIGHT,
    SWITCH_RIGHT,
    BeginInline,
    Begun,
    ChunkInline,
    Commit,
    Finish,
    GetHistory,
    GetReasons,
    GetUpdate,
    Phase,
    PutMetadata,
    Rollback,
    Slot,
    SlotRow,
    SlotState,
    Staged,
    Switch,
    Transfer,
    Update,
    UpdatedStatus,
)
from nexus.wire import ReplyStatus, Request

ASK_TIME: Final = 5.0  # seconds for each question
PIECE_TIME: Final = 15.0  # seconds for a piece: a slot on a slow card erases as it is written
VERIFY_TIME: Final = 5.0  # seconds of one wait for Finish, which goes on when they are over
VERIFY_WAITS_MAX: Final = 120  # such waits: ten minutes, for what is read back in seconds
SWITCH_TIME: Final = 30.0  # seconds; the data that the set migrates are copied before
KIB: Final = 1024
SHOWN_DIGITS: Final = 12  # of a digest
PIECE_SIZE: Final = INLINE_PIECE_MAX - INLINE_PIECE_MAX % PIECE_UNIT  # bytes of every piece

assert PIECE_SIZE > 0

ReplyT = TypeVar("ReplyT")

RIGHTS: Final[Mapping[type, str]] = {
    GetUpdate: READ_RIGHT,
    GetReasons: READ_RIGHT,
    GetHistory: READ_RIGHT,
    PutMetadata: STAGE_RIGHT,
    BeginInline: STAGE_RIGHT,
    ChunkInline: STAGE_RIGHT,
    Finish: STAGE_RIGHT,
    Switch: SWITCH_RIGHT,
    Commit: COMMIT_RIGHT,
    Rollback: ROLLBACK_RIGHT,
}
WHY: Final[Mapping[IntEnum, str]] = {
    UpdatedStatus.UNPROVEN: "the running set is on trial: wait until it is committed, "
    "or take it back with `nexus ota rollback`",
    UpdatedStatus.PENDING: "a switch waits for its boot: restart the system, "
    "or take it back with `nexus ota rollback`",
    UpdatedStatus.NOT_STAGED: "the standby slot holds no such verified set: "
    "`nexus ota stage` brings one",
    UpdatedStatus.NOT_ON_TRIAL: "that set is not on trial: see `nexus ota status`",
    UpdatedStatus.NO_TARGET: "the other slot holds no set that was ever committed",
    UpdatedStatus.NO_BOOT_RECORD: "its boot device holds no record: "
    "provision the device with `nexus ota provision`",
    UpdatedStatus.NOT_STAGING: "the transfer was forgotten: stage the update again",
    UpdatedStatus.OUT_OF_ORDER: "somebody else stages at the same time: stage the update again",
    UpdatedStatus.INCOMPLETE: "not all of it came: stage the update again",
    UpdatedStatus.TOO_LARGE: "it is larger than the slot, or its metadata than they may be",
    UpdatedStatus.ABANDONED: "another transfer was begun meanwhile: see `nexus ota status`",
    UpdatedStatus.RESTORING: "the data of before the last trial are being put back: try again",
    UpdatedStatus.ALREADY_RUNS: "that very set runs already",
    UpdatedStatus.IO_ERROR: "the slot or the boot device failed: see `nexus logs`; "
    "what was durable is as before",
    UpdatedStatus.UNAVAILABLE: "statefsd cannot be had now: see `nexus status`, and try again",
    UpdatedStatus.NO_SPACE: "the store of statefsd is full: see `nexus state check`",
    UpdatedStatus.MALFORMED_METADATA: "its metadata are not what the format says",
    UpdatedStatus.METADATA_TRUNCATED: "its metadata end too early",
    UpdatedStatus.METADATA_TOO_LARGE: "its metadata are larger than any release's",
    UpdatedStatus.METADATA_TOO_MANY: "its metadata hold more than any release's",
    UpdatedStatus.METADATA_DUPLICATE: "its metadata say something twice",
    UpdatedStatus.WRONG_KEY: "nobody whom this device trusts has signed it",
    UpdatedStatus.BAD_SIGNATURE: "it was changed after those whom this device trusts signed it",
    UpdatedStatus.THRESHOLD: "too few of those whom this device trusts have signed it",
    UpdatedStatus.MIXED: "its metadata were put together from several releases",
    UpdatedStatus.REPLAYED: "it is an older release than one that this device has seen",
    UpdatedStatus.ROLLED_BACK: "its metadata are older inside than those this device has seen",
    UpdatedStatus.EXPIRED_METADATA: "it ended before a moment that has been signed since",
    UpdatedStatus.BELOW_FLOOR: "its version is below the lowest that this device may run",
    UpdatedStatus.DEVELOPMENT_KEY: "it is signed with keys for development, "
    "and this device is none for development",
    UpdatedStatus.NO_SET: "its metadata name no set",
    UpdatedStatus.NO_ANCHOR: "its boot device holds no trust anchor that can be read: "
    "provision the device with `nexus ota provision`",
    UpdatedStatus.WRONG_DIGEST: "what came is not what was signed",
    UpdatedStatus.BAD_SET: "what was signed is no system set in the strict form",
    UpdatedStatus.WRONG_MANIFEST: "the set says another version or name than what was signed",
    UpdatedStatus.WRONG_BASE: "it needs another base system than this device has",
    UpdatedStatus.SCHEMA_OLDER: "it knows an older form of the data than this device has",
    UpdatedStatus.NO_SNAPSHOT: "it changes the form of the data, "
    "and there is no room for a copy to go back to: see `nexus state check`",
}
"""What a refusal means for the one who asked."""

STATES: Final[Mapping[SlotState, str]] = {
    SlotState.EMPTY: "empty",
    SlotState.STAGED: "staged",
    SlotState.TRYING: "on trial",
    SlotState.GOOD: "good",
    SlotState.BAD: "bad",
}
CAUSES: Final[Mapping[int, str]] = {
    Cause.SWITCHED: "a trial of it was asked for",
    Cause.NOT_READY: "a service was not ready in time",
    Cause.CRASHED: "a service crashed more often than it may",
    Cause.UNHEALTHY: "a service said that it is not well",
    Cause.HUNG: "a service hung",
    Cause.DEADLINE: "not every service was healthy by the deadline",
    Cause.INIT_ENDED: "init itself ended",
    Cause.INIT_HUNG: "init itself gave no sign of life by the deadline, and was killed",
    Cause.LOST: "the power went, or the machine was reset, before it was proven",
    Cause.STOPPED: "the system was ended before it was proven",
    Cause.DAMAGED: "the slot no longer held what was staged, or could not be read",
    Cause.ROLLED_BACK: "no tries were left, and the set before was booted again",
    Cause.GIVEN_UP: "it was taken back by a command",
    Cause.COMMITTED: "every service was healthy",
    Cause.PROVISIONED: "it is the first set of the device",
}
"""What the boot device's causes mean to a person."""


class File(NamedTuple):
    """An update file: its metadata as they are, and where in it the set is."""

    metadata: bytes
    offset: int
    size: int


# ---------------------------------------------------------------- the commands


def stage(asked: Asked, file: Path, *, as_json: bool) -> None:
    """Bring an update to the standby slot, or go on where it was cut off; verified there.

    Raises CommandFailed and UsageError.
    """
    with open_update(file) as (descriptor, update), asked.client() as client:
        begun = _begin(client, update.metadata)
        if begun.size != update.size:
            raise CommandFailed(
                f"{file} holds {update.size} bytes of a set, and {begun.size} were signed: "
                "it was cut off, or something was put behind it"
            )
        if not begun.staged:
            _send(client, descriptor, update, begun)
        staged = _finish(client, begun)
    if as_json:
        say_json({**_set_of(staged), "slot": letter(staged.slot), "resumed": begun.offset})
        return
    title = titled(staged.name, staged.version)
    say(f"{title} is staged in slot {letter(staged.slot)}: {staged.size} bytes, verified there")
    say("`nexus ota switch` has it tried at the next start, `nexus ota switch --reboot` at once")


def switch(asked: Asked, digest: str | None, tries: int, *, reboot: bool, as_json: bool) -> None:
    """Have the staged set tried, by default the one that is there. Raises CommandFailed."""
    with asked.client() as client:
        row = _row(ask(client, GetUpdate()), digest)
        with progress(f"switching to {titled(row.name, row.version)}"):
            request = Switch(row.digest, tries, reboot)
            switched = ask(client, request, SWITCH_TIME)
    if as_json:
        shown = {"slot": letter(switched.slot), "tries_left": switched.tries_left}
        say_json({**_set_of(row), **shown, "repeated": switched.repeated, "reboot": reboot})
        return
    when = "the system restarts now" if reboot else "restart the system when it may be down"
    tried = "once" if switched.tries_left == 1 else f"up to {switched.tries_left} times"
    again = " still" if switched.repeated else ""
    title = titled(row.name, row.version)
    say(f"{title} in slot {letter(switched.slot)} is{again} to be tried {tried}: {when}")
    if switched.snapshot:
        say("it changes the form of the data: a copy was made, to go back to")


def status(asked: Asked, *, as_json: bool) -> None:
    """Print what the slots hold, what runs, and how a transfer goes. Raises CommandFailed."""
    with asked.client() as client:
        update = ask(client, GetUpdate())
    if as_json:
        say_json(document(update))
        return
    say_table(
        ("SLOT", "SET", "VERSION", "STATE", "SIZE", "DIGEST", ""),
        [_cells(update, row) for row in update.slots],
    )
    for line in _status_lines(update):
        say(line)


def commit(asked: Asked, *, as_json: bool) -> None:
    """Keep the set on trial, by a person's word. Raises CommandFailed."""
    with asked.client() as client:
        update = ask(client, GetUpdate())
        row = next((row for row in update.slots if row.slot == update.running), None)
        if row is None or update.trying is not update.running:
            raise CommandFailed("nothing is on trial: see `nexus ota status`")
        committed = ask(client, Commit(row.digest))
    if as_json:
        say_json({**_set_of(row), "slot": letter(row.slot), "repeated": committed.repeated})
        return
    say(f"{titled(row.name, row.version)} in slot {letter(row.slot)} is committed")


def rollback(asked: Asked, *, reboot: bool, as_json: bool) -> None:
    """End a trial, take a switch back, or go back to the set before. Raises CommandFailed."""
    with asked.client() as client:
        update = ask(client, GetUpdate())
        back = _way_back(update)
        row = next(row for row in update.slots if row.slot == back)
        done = ask(client, Rollback(back, reboot), SWITCH_TIME)
    if as_json:
        shown = {"slot": letter(done.slot), "restoring": done.restoring}
        say_json({**_set_of(row), **shown, "repeated": done.repeated, "reboot": reboot})
        return
    now = "the system restarts now" if reboot else "from the next start on"
    runs = update.running is back
    when = "goes on as before" if runs else f"is booted {now}"
    say(f"{titled(row.name, row.version)} in slot {letter(done.slot)} {when}")
    if done.restoring:
        say("the data go back to what they were before the switch")


def _way_back(update: Update) -> Slot:
    """Which slot a rollback leads to: away from what is tried, else away from what is active."""
    if update.trying is not Slot.NONE:
        return update.active
    return Slot.A if update.active is Slot.B else Slot.B


# ---------------------------------------------------------------- a transfer


@contextmanager
def open_update(file: Path) -> Iterator[tuple[int, File]]:
    """A descriptor of an update file, and what is where in it. Raises UsageError."""
    from nexus.trust import UPDATE_HEADER_SIZE, Untrusted, metadata_size

    descriptor = open_input(file, node=True)
    try:
        whole = os.lseek(descriptor, 0, os.SEEK_END)
        try:
            size = metadata_size(os.pread(descriptor, UPDATE_HEADER_SIZE, 0))
        except Untrusted as error:
            raise UsageError(f"{file} is no update: {error.detail}") from error
        if size > METADATA_SIZE_MAX:
            raise UsageError(
                f"{file} has {size} bytes of metadata, and up to {METADATA_SIZE_MAX} are taken"
            )
        offset = UPDATE_HEADER_SIZE + size
        if whole <= offset:
            raise UsageError(f"{file} is no update: it ends within its metadata")
        yield (
            descriptor,
            File(os.pread(descriptor, size, UPDATE_HEADER_SIZE), offset, whole - offset),
        )
    finally:
        os.close(descriptor)


def _begin(client: OperatorClient, metadata: bytes) -> Begun:
    for at in range(0, len(metadata), PIECE_SIZE):
        _ = ask(client, PutMetadata(at, metadata[at : at + PIECE_SIZE]))
    return ask(client, BeginInline(len(metadata)), PIECE_TIME)


def _send(client: OperatorClient, descriptor: int, update: File, begun: Begun) -> None:
    with counting(f"staging {titled(begun.name, begun.version)}", begun.size) as count:
        at = begun.offset
        count(at)
        while at < begun.size:
            size = min(PIECE_SIZE, begun.size - at)
            data = os.pread(descriptor, size, update.offset + at)
            if len(data) != size:
                raise CommandFailed("the update file became shorter while it was read")
            taken = ask(client, ChunkInline(at, data), PIECE_TIME)
            if taken.offset <= at:
                raise CommandFailed(f"{SERVICE_NAME} took a piece and is at {taken.offset}")
            at = taken.offset
            count(at)


def _finish(client: OperatorClient, begun: Begun) -> Staged:
    """The outcome of the check; one that takes long is asked for again, and its progress shown."""
    with counting(f"verifying {titled(begun.name, begun.version)}", begun.size) as count:
        for _ in range(VERIFY_WAITS_MAX):
            try:
                return ask(client, Finish(), VERIFY_TIME)
            except _Goes:
                count(ask(client, GetUpdate()).transfer.verified)
    raise CommandFailed(f"{SERVICE_NAME} still verifies it: see `nexus ota status`")


class _Goes(Exception):
    """What was asked for goes on, and is not done yet."""


def ask(client: OperatorClient, request: Request[ReplyT], seconds: float = ASK_TIME) -> ReplyT:
    """updated's answer; what a refusal means is said."""
    try:
        return client.relay(SERVICE_NAME, PROTOCOL, request, seconds)
    except ServiceRefused as error:
        if isinstance(request, Finish) and error.status is ReplyStatus.EXPIRED:
            raise _Goes from error
        why = WHY.get(error.status)
        if error.status is ReplyStatus.DENIED:
            why = f"operator has no right {RIGHTS[type(request)]}: give it in the system file"
        if why is None:
            raise
        raise CommandFailed(
            f"{SERVICE_NAME}: {error.status.name}, {why}{_told(client, error.status)}"
        ) from error
    except Unanswered as error:
        if isinstance(request, Finish) and error.status is OperatorStatus.TIMED_OUT:
            raise _Goes from error
        raise


def _told(client: OperatorClient, status: IntEnum) -> str:
    """updated's own sentence about an update that it has just refused, if it has one."""
    if status not in REFUSALS:
        return ""
    try:
        page = client.relay(SERVICE_NAME, PROTOCOL, GetHistory(0), ASK_TIME)
    except CommandFailed:
        return ""  # the refusal itself is what counts
    last = next(iter(page.events), None)
    return f" ({last.detail})" if last is not None and last.status == status and last.detail else ""


REFUSALS: Final = frozenset(
    each for each in UpdatedStatus if each >= UpdatedStatus.MALFORMED_METADATA
)
"""Those about an update itself, which updated keeps in its history."""


# ---------------------------------------------------------------- what is shown


def _row(update: Update, digest: str | None) -> SlotRow:
    """The staged set, or the one that is named by the beginning of its digest."""
    standby = Slot.A if update.active is Slot.B else Slot.B
    row = next(row for row in update.slots if row.slot == standby)
    if digest is not None and not row.digest.hex().startswith(digest.lower()):
        raise CommandFailed(f"slot {letter(standby)} holds no set {digest}: see `nexus ota status`")
    return row


def letter(slot: int) -> str:
    """A slot as people call it."""
    return Slot(slot).name.lower() if slot in (Slot.A, Slot.B) else "-"


def titled(name: str, version: int) -> str:
    """A set as people call it."""
    return f"{name} (version {version})" if name else f"version {version}"


def _set_of(row: Any) -> dict[str, Any]:
    return {"name": row.name, "version": row.version, "digest": row.digest, "size": row.size}


def _cells(update: Update, row: SlotRow) -> tuple[str, ...]:
    notes = [
        note
        for note, is_so in (
            ("running", row.slot == update.running),
            ("to be tried", row.slot == update.trying != update.running),
            (f"{row.tries_left} tries left", row.slot == update.trying),
        )
        if is_so
    ]
    if not any(row.digest):
        return (letter(row.slot), "-", "-", STATES[row.state], "-", "-", ", ".join(notes))
    return (
        letter(row.slot),
        row.name or "-",
        str(row.version),
        STATES[row.state],
        _size(row.size),
        row.digest.hex()[:SHOWN_DIGITS],
        ", ".join(notes),
    )


def _status_lines(update: Update) -> Iterator[str]:
    yield f"boot record: sequence {update.sequence}, boots {update.boots}, floor {update.floor}"
    if update.restoring:
        yield "the data are being put back to what they were before the switch"
    elif update.snapshot:
        yield "a copy of the data is kept, for the way back"
    transfer = update.transfer
    title = titled(transfer.name, transfer.version)
    match transfer.phase:
        case Phase.IDLE:
            pass
        case Phase.RECEIVING:
            yield f"transfer of {title}: {_part(transfer, transfer.offset)} came"
        case Phase.VERIFYING:
            yield f"transfer of {title}: {_part(transfer, transfer.verified)} verified"
        case Phase.STAGED:
            yield f"transfer of {title}: staged in slot {letter(transfer.slot)}"
        case Phase.REFUSED:
            yield f"transfer of {title}: refused, {refusal(transfer.status, transfer.detail)}"
    if update.reasons:
        yield "`nexus why` tells what the last change was about"


def refusal(status: int, detail: str) -> str:
    """A status of updated's in words, and its own sentence."""
    known = next((each for each in UpdatedStatus if each == status), None)
    words = (
        f"status {status}"
        if known is None
        else f"{known.name}, {WHY.get(known, 'see `nexus logs`')}"
    )
    return f"{words} ({detail})" if detail else words


def _part(transfer: Transfer, done: int) -> str:
    share = 100 * done // max(1, transfer.size)
    return f"{_size(done)} of {_size(transfer.size)} ({share} %)"


def _size(size: int) -> str:
    """Bytes as people read them."""
    return f"{size} B" if size < KIB else f"{size / KIB:.1f} KiB"


def document(update: Update) -> dict[str, Any]:
    """The status as JSON."""
    transfer = update.transfer
    return {
        "active": letter(update.active),
        "trying": letter(update.trying) if update.trying is not Slot.NONE else None,
        "running": letter(update.running) if update.running is not Slot.NONE else None,
        "sequence": update.sequence,
        "boots": update.boots,
        "floor": update.floor,
        "time_floor": update.time_floor,
        "snapshot": update.snapshot or None,
        "restoring": update.restoring,
        "slots": {
            letter(row.slot): {
                **_set_of(row),
                "state": SlotState(row.state).name.lower(),
                "tries_left": row.tries_left,
                "capacity": row.capacity,
            }
            for row in update.slots
        },
        "transfer": {
            **_set_of(transfer),
            "phase": Phase(transfer.phase).name.lower(),
            "offset": transfer.offset,
            "verified": transfer.verified,
            "refused": refusal(transfer.status, transfer.detail) if transfer.status else None,
        },
    }


assert PIECE_SIZE % PIECE_UNIT == 0, "every piece but the last is whole blocks"
assert DIGEST_SIZE * 2 > SHOWN_DIGITS
