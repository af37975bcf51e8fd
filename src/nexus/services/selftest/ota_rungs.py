"""Rungs about updates: staged, refused, tried, committed, left; and what is told of it afterwards.

The sets and who signed them are the runner's, on a stick. What is done in one boot is looked at in
the next one, and between the two the runner reads boot device and slots itself.
"""

from typing import Final

from nexus.abi import INIT_NAME, Nanos, Slot, service_id
from nexus.ipc import Refused, RetryBudget, RetryTokens, offer_bulk, retry_until
from nexus.protocols.init import GetSystem
from nexus.protocols.meta import Health
from nexus.protocols.statefsd import GetCalls
from nexus.protocols.updated import (
    PIECE_UNIT,
    REASONS_PAGE,
    Begin,
    Begun,
    Chunk,
    Finish,
    GetReasons,
    GetUpdate,
    ReasonRow,
    SlotRow,
    SlotState,
    Staged,
    Switch,
    Switched,
    Update,
    UpdatedStatus,
)
from nexus.protocols.updated import PROTOCOL as UPDATED
from nexus.protocols.updated import Slot as SlotNumber
from nexus.services.selftest.climb import CALL_WAIT, Climb
from nexus.services.selftest.exec_rungs import ON_DEMAND
from nexus.services.selftest.policy_rungs import fields_of, records_about
from nexus.services.selftest.routing_rungs import grown, use_once
from nexus.services.selftest.rung import Evidence, RungFailed, expect, expect_type, require
from nexus.services.selftest.stick import BAD, GOOD, LOW, Stick, open_stick

UPDATED_NAME: Final = "updated"
UPDATED_ID: Final = service_id(UPDATED_NAME)
PIECE: Final = 256 * 1024  # bytes of a piece in a VMO
STAGE_WAIT: Final = Nanos(10_000_000_000)  # ns; a megabyte is written and read back
COMMIT_WAIT: Final = Nanos(15_000_000_000)  # ns; everybody healthy, and two seconds of that
COMMIT_LOOKS_MAX: Final = 12  # with doubling pauses: 5 ms to 10 s
COMMIT_PAUSE: Final = Nanos(5_000_000)  # ns
SEEN_MAX: Final = 16
ATTACKS_MIN: Final = 4  # unknown key, flipped byte, mixed, expired
TRIES: Final = 2  # of the good set
BAD_TRIES: Final = 1

assert PIECE % PIECE_UNIT == 0


async def _look(climb: Climb) -> Update:
    return await climb.call(climb.client(UPDATED_NAME), GetUpdate())


def _row(update: Update, slot: int) -> SlotRow:
    return next(row for row in update.slots if row.slot == slot)


def _shown(row: SlotRow) -> list[object]:
    """A slot for the runner."""
    return [row.state.name.lower(), row.version, row.digest.hex(), row.tries_left]


# ------------------------------------------------------------------ before anything is updated


async def history_read(climb: Climb) -> Evidence:
    """#36, stated: what statefsd has heard of updated, and what updated says of its record."""
    page = await climb.call(climb.client("statefsd"), GetCalls(UPDATED_ID, SEEN_MAX))
    update = await _look(climb)
    return {
        "total": page.total,
        "ops": [seen.op for seen in page.seen],
        "senders": sorted({f"{seen.sender:016x}" for seen in page.seen}),
        "sequence": update.sequence,
        "running": update.running.name.lower(),
    }


async def routing_updated(climb: Climb) -> Evidence:
    """#54: updated found by name, one round trip on that very link, init's counter and entry."""
    before = await climb.route_counts()

    generation = await use_once(climb, UPDATED_NAME, UPDATED, GetUpdate())
    counted = grown(before, await climb.route_counts())

    expect(counted, {"ok": 1}, "growth of init's route counters")
    expect(generation, (await climb.task(UPDATED_NAME)).generation, "updated's generation")
    return {"counters": counted, "generation": generation}


# ------------------------------------------------------------------ a transfer


async def _moved(data: bytes) -> Slot:
    slot = await offer_bulk(data)
    if slot is None:
        raise RungFailed("no room for a VMO")
    return slot


async def _begin(climb: Climb, metadata: bytes) -> Begun | Refused:
    outcome = await climb.client(UPDATED_NAME).ask(
        Begin(0, len(metadata)), await climb.ahead(CALL_WAIT), move=await _moved(metadata)
    )
    if isinstance(outcome, Refused):
        return outcome
    begun: object = getattr(outcome, "reply", outcome)
    return expect_type(begun, Begun, "Begin")


async def _transfer(climb: Climb, stick: Stick, name: str, *, flip: bool = False) -> Begun:
    """Begin, and send the whole set in pieces; with `flip` its last byte is another one."""
    begun = expect_type(await _begin(climb, await stick.metadata(name)), Begun, "Begin")
    expect(begun.digest.hex(), stick.index[name].digest, "digest of what was begun")
    for offset in range(begun.offset, begun.size, PIECE):
        piece = bytearray(await stick.content(name, offset, PIECE))
        if flip and offset + len(piece) == begun.size:
            piece[-1] ^= 1
        request = Chunk(offset, 0, len(piece))
        taken = await climb.moved(climb.client(UPDATED_NAME), request, await _moved(bytes(piece)))
        expect(taken.offset, offset + len(piece), "where the file ends")
    return begun


async def _finish(climb: Climb) -> Staged | Refused:
    """The outcome of the check, which may outlive one deadline."""
    outcome = await climb.client(UPDATED_NAME).call(Finish(), await climb.ahead(STAGE_WAIT))
    return outcome if isinstance(outcome, Refused) else expect_type(outcome, Staged, "Finish")


async def _stage(climb: Climb, name: str) -> Staged:
    _ = await _transfer(climb, await open_stick(climb), name)
    return expect_type(await _finish(climb), Staged, "Finish")


# ------------------------------------------------------------------ the boot before


async def before_staging(climb: Climb) -> Evidence:
    """#132, stated: a set below the floor is not begun, and one whose last byte was flipped on its
    way is not staged; the slot that it was written to is empty. Done before there is anything to
    lose in that slot."""
    stick = await open_stick(climb)
    before = await _look(climb)

    low = await _begin(climb, await stick.metadata(LOW))
    begun = await _transfer(climb, stick, GOOD, flip=True)
    outcome = await _finish(climb)
    after = await _look(climb)

    refused = expect_type(outcome, Refused, "a set with a flipped byte")
    expect(refused.status, UpdatedStatus.WRONG_DIGEST, "status of a set with a flipped byte")
    expect(_row(after, begun.slot).state, SlotState.EMPTY, "the slot afterwards")
    expect(_row(after, before.active), _row(before, before.active), "the active slot")
    expect((after.active, after.floor), (before.active, before.floor), "what is active, the floor")
    return {
        "low": low.status.name if isinstance(low, Refused) else "taken",
        "flipped": refused.status.name,
        "slot": begun.slot.name.lower(),
        "size": begun.size,
    }


async def ota_stage(climb: Climb) -> Evidence:
    """#131: a signed set goes to the standby slot in VMOs, is read back, and counts as staged."""
    before = await _look(climb)

    staged = await _stage(climb, GOOD)
    after = await _look(climb)

    expect(after.active, before.active, "the active slot")
    require(staged.slot is not after.active, "the set went over the active slot")
    row = _row(after, staged.slot)
    expect((row.state, row.digest), (SlotState.STAGED, staged.digest), "the standby slot")
    expect(_row(after, after.active), _row(before, before.active), "row of the active slot")
    require(after.sequence > before.sequence, "the record has not changed")
    return {
        "slot": staged.slot.name.lower(),
        "digest": staged.digest.hex(),
        "size": staged.size,
        "version": staged.version,
        "active": _shown(_row(after, after.active)),
        "sequence": after.sequence,
    }


async def untrusted_refused(climb: Climb) -> Evidence:
    """#132: each update that is not to be trusted is refused with a status of its own, and the
    staged set, its slot and the floors are what they were."""
    stick = await open_stick(climb)
    before = await _look(climb)
    statuses = {}
    for name, update in stick.index.items():
        if not update.refused or name == LOW:  # which is older than what was staged by now
            continue
        outcome = await _begin(climb, await stick.metadata(name))
        statuses[name] = outcome.status.name if isinstance(outcome, Refused) else "taken"
        expect(statuses[name], update.refused, f"an update with {name}")
    after = await _look(climb)

    require(len(statuses) >= ATTACKS_MIN, f"only {len(statuses)} attacks")
    expect(after.slots, before.slots, "the slots")
    floors = [(each.floor, each.time_floor) for each in (before, after)]
    expect(floors[1], floors[0], "the floors")
    expect(after.sequence, before.sequence, "sequence of the record")
    return {
        "statuses": statuses,
        "floor": after.floor,
        "time_floor": after.time_floor,
        "sequence": after.sequence,
        "slots": [_shown(row) for row in after.slots],
    }


async def switch_to_good(climb: Climb) -> Evidence:
    """#133, stated: the staged set is to be tried at the next boot."""
    return _switched(await _switch(climb, GOOD, TRIES))


async def _switch(climb: Climb, name: str, tries: int) -> Switched:
    digest = bytes.fromhex((await open_stick(climb)).index[name].digest)
    request = Switch(digest, tries, False)
    return await climb.call(climb.client(UPDATED_NAME), request, STAGE_WAIT)


def _switched(switched: Switched) -> Evidence:
    return {
        "slot": switched.slot.name.lower(),
        "tries_left": switched.tries_left,
        "sequence": switched.sequence,
        "repeated": switched.repeated,
    }


# ------------------------------------------------------------------ the first boot of a new set


async def ota_switch(climb: Climb) -> Evidence:
    """#133: this boot came out of the slot that was switched to. Whether its try was counted the
    runner reads on the device; whether anything can be staged now is asked for #135."""
    refused = await _begin(climb, await (await open_stick(climb)).metadata(BAD))
    climb.refused_unproven = refused.status.name if isinstance(refused, Refused) else "taken"
    update = await _look(climb)
    system = await climb.call(climb.control, GetSystem())

    expect(update.running, SlotNumber.B, "the slot that runs")
    row = _row(update, SlotNumber.B)
    require(row.state in (SlotState.TRYING, SlotState.GOOD), f"slot b is {row.state.name}")
    expect((system.slot, system.set_digest), ("b", row.digest.hex()), "what init was booted with")
    return {
        "running": update.running.name.lower(),
        "boots": update.boots,
        "sequence": update.sequence,
        "slot": system.slot,
        "set": [system.set_version, system.set_digest],
    }


async def _running_sets(climb: Climb) -> dict[str, list[object]]:
    """Which set each service imported its code from, by its own process: version and digest."""
    found: dict[str, list[object]] = {}
    for name, client in climb.clients.items():
        if name in ON_DEMAND:
            continue
        healthy = await climb.call(client, Health())
        found[name] = [healthy.set_version, healthy.set_digest]
    return found


def _by_set(running: dict[str, list[object]]) -> list[list[object]]:
    """The same, short: each set once, and the services that come from it."""
    sets = sorted({(str(digest), version) for version, digest in running.values()}, key=str)
    return [
        [version, digest, [name for name in running if running[name] == [version, digest]]]
        for digest, version in sets
    ]


async def running_set(climb: Climb) -> Evidence:
    """#134: what every service answers with is the new set, and none is left of the old one."""
    running = await _running_sets(climb)
    system = await climb.call(climb.control, GetSystem())

    expect(len({str(each) for each in running.values()}), 1, f"sets that run: {running}")
    return {"running": _by_set(running), "set": [system.set_version, system.set_digest]}


async def ota_health(climb: Climb) -> Evidence:
    """#135: the set was committed because init reported it healthy, and by nobody else's word."""
    budget = RetryBudget(
        attempts_max=COMMIT_LOOKS_MAX,
        backoff=COMMIT_PAUSE,
        deadline=await climb.ahead(COMMIT_WAIT),
    )
    update = await retry_until(
        lambda: _look(climb),
        lambda seen: seen.trying is not SlotNumber.NONE,
        budget,
        RetryTokens(),
    )
    system = await climb.call(climb.control, GetSystem())
    audits = await records_about(climb, "op", "ReportHealth", {"status": "ok"})
    fields = fields_of(audits[0])

    expect((update.trying, update.active), (SlotNumber.NONE, SlotNumber.B), "what is tried, active")
    expect(_row(update, SlotNumber.B).state, SlotState.GOOD, "state of the new set")
    expect(len(audits), 1, "reports of health that were taken")
    expect(audits[0].service, UPDATED_ID, "sender of the audit record")
    expect(fields["subject"], f"0x{service_id(INIT_NAME):016x}", "who reported the health")
    expect(climb.refused_unproven, UpdatedStatus.UNPROVEN.name, "staging while it was unproven")
    return {
        "slots": [_shown(row) for row in update.slots],
        "sequence": update.sequence,
        "trial": system.trial.name.lower(),
        "subject": fields["subject"],
        "trace": fields["trace"],
        "refused": climb.refused_unproven,
    }


async def switch_to_bad(climb: Climb) -> Evidence:
    """#136, stated: a set with a service that never becomes ready is staged in the other slot, and
    to be tried once."""
    staged = await _stage(climb, BAD)
    switched = await _switch(climb, BAD, BAD_TRIES)
    expect(switched.slot, staged.slot, "slot that is switched to")
    return {**_switched(switched), "digest": staged.digest.hex(), "version": staged.version}


# ------------------------------------------------------------------ back in the good set


async def ota_rollback(climb: Climb) -> Evidence:
    """#136: the boot of the bad set failed; what runs is the good one again, all of it."""
    update = await _look(climb)
    system = await climb.call(climb.control, GetSystem())
    running = await _running_sets(climb)

    expect((update.trying, update.active), (SlotNumber.NONE, SlotNumber.B), "what is tried, active")
    expect(update.running, SlotNumber.B, "the slot that runs")
    expect(_row(update, SlotNumber.A).state, SlotState.BAD, "state of the bad set")
    expect(_row(update, SlotNumber.B).state, SlotState.GOOD, "state of the good set")
    expect(update.restoring, False, "data are being put back")
    expect(len({str(each) for each in running.values()}), 1, f"sets that run: {running}")
    return {
        "slots": [_shown(row) for row in update.slots],
        "running": _by_set(running),
        "set": [system.set_version, system.set_digest],
        "boots": update.boots,
        "sequence": update.sequence,
    }


async def rollback_reason(climb: Climb) -> Evidence:
    """#137: what `nexus why` is told by updated: who was at fault, how, and what was seen."""
    reasons = await _reasons(climb)
    return {"reasons": [_told(each) for each in reasons]}


async def _reasons(climb: Climb) -> list[ReasonRow]:
    """All that the boot device keeps, latest first."""
    updated = climb.client(UPDATED_NAME)
    first = await climb.call(updated, GetReasons(0))
    reasons = list(first.reasons)
    for index in range(len(reasons), first.total, REASONS_PAGE):
        reasons += (await climb.call(updated, GetReasons(index))).reasons
    expect(len(reasons), first.total, "reasons")
    return reasons


def _told(reason: ReasonRow) -> dict[str, object]:
    return {
        "cause": reason.cause,
        "slot": reason.slot.name.lower(),
        "version": reason.version,
        "boot": reason.boot,
        "trace": reason.trace.hex(),
        "service": reason.service,
        "detail": reason.detail,
        "tail": reason.tail.decode("utf-8", "replace"),
    }


async def bootctl_persist(climb: Climb) -> Evidence:
    """#138: what updated says of the record. The runner reads both copies after each boot."""
    update = await _look(climb)
    return {
        "sequence": update.sequence,
        "boots": update.boots,
        "active": update.active.name.lower(),
        "trying": update.trying.name.lower(),
        "floor": update.floor,
        "slots": [_shown(row) for row in update.slots],
    }
