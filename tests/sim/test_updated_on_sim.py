"""updated with the real statefsd, policyd and logd on the simulated kernel, on its own disks.

The loader's own `choose` picks the slot before each boot, and init judges each trial.
"""

import json
from functools import partial
from typing import Any, Final

import pytest

from nexus.abi import BootImage
from nexus.bootctl import Cause, SlotName, SlotState
from nexus.bootctl.handover import EXIT_REBOOT, EXIT_SLOT_FAILED
from nexus.ipc import Refused
from nexus.kernel.sim.disk import Disk, DiskFaults
from nexus.kernel.sim.kernel import SimKernel
from nexus.kernel.sim.power import Cut, Moment
from nexus.protocols.statefsd import Durability, Get, Put, StatefsdStatus, Value
from nexus.protocols.updated import (
    INLINE_PIECE_MAX,
    METADATA_SIZE_MAX,
    Begin,
    BeginInline,
    Begun,
    Chunk,
    ChunkInline,
    Commit,
    Events,
    Finish,
    GetHistory,
    GetReasons,
    GetUpdate,
    Phase,
    PutMetadata,
    Reasons,
    ReportHealth,
    Rollback,
    Slot,
    Staged,
    Switch,
    Switched,
    Update,
    UpdatedRequest,
)
from nexus.protocols.updated import (
    Event as Entry,
)
from nexus.protocols.updated import (
    EventKind as Happened,
)
from tests.fakes.initrig import MS, SECOND
from tests.fakes.policyrig import Hands, Outcome
from tests.fakes.updaterig import (
    DEVELOPMENT,
    SYSTEM,
    UpdateMachine,
    ask,
    ask_with,
    begin,
    begin_inline,
    stage,
)
from tests.fakes.updates import AREA, Made, Maker

pytestmark = pytest.mark.sim

A, B = SlotName.A, SlotName.B
KEY: Final = AREA.encode() + b"value"
DENIED: Final = "DENIED"


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> UpdateMachine:
    return UpdateMachine(monkeypatch)


async def status(hands: Hands) -> Update:
    found = await ask(hands, GetUpdate())
    assert isinstance(found, Update), found
    return found


async def told(hands: Hands) -> list[Any]:
    """The slots as updated has them: what is active, tried, running."""
    update = await status(hands)
    return [int(update.active), int(update.trying), int(update.running)]


async def history(hands: Hands) -> list[Entry]:
    """Every event, oldest first."""
    found: list[Entry] = []
    before = 0
    while True:
        page = await ask(hands, GetHistory(before))
        assert isinstance(page, Events), page
        found += page.events
        if not page.more:
            return found[::-1]
        before = found[-1].number


async def happened(hands: Hands) -> list[str]:
    return [event.kind.name for event in await history(hands)]


async def audits(hands: Hands) -> list[dict[str, Any]]:
    """updated's own audit, in order."""
    return [each for each in await hands.audits() if "op" in each and "status" in each]


async def nothing(_hands: Hands) -> list[Any]:
    return []


async def judged(hands: Hands) -> list[Any]:
    """How it stands once init has judged the boot."""
    await hands.pause(SECOND)
    return await told(hands)


def evidence(outcome: Outcome, line: str) -> dict[str, Any]:
    (found,) = [
        event.fields["evidence"] for event in outcome.events if event.fields.get("line") == line
    ]
    said: Any = json.loads(found) if isinstance(found, str | bytes) else found
    assert isinstance(said, dict)
    return said


async def stage_and_switch(hands: Hands, made: Made, tries: int = 2) -> list[str]:
    """The types of the two answers, or the names of refusals."""
    staged = await stage(hands, made)
    switched = await ask(hands, Switch(made.digest, tries, False))
    return [each if isinstance(each, str) else type(each).__name__ for each in (staged, switched)]


GOOD: Final = ["Staged", "Switched"]


# ------------------------------------------------------------------ from the update to the commit


def test_a_set_is_staged_switched_to_and_committed_on_inits_word(machine: UpdateMachine) -> None:
    made = machine.maker.update(11)
    running = machine.slot_bytes(A)

    one = machine.boot(partial(stage_and_switch, made=made))

    assert one.result == GOOD
    assert machine.slot_bytes(B)[: len(made.data)] == made.data
    assert machine.slot_bytes(A) == running
    pending = machine.record()
    assert (pending.trying, pending.active, pending.slot(B).tries_left) == (B, A, 2)

    two = machine.boot(judged)

    assert two.result == [Slot.B, Slot.NONE, Slot.B]
    assert "init: health ok (slot b)" in two.lines()
    committed = machine.record()
    assert (committed.active, committed.trying) == (B, None)
    assert committed.slot(B).state is SlotState.GOOD
    assert committed.sequence > pending.sequence


def test_the_line_that_it_is_ready_says_what_the_disk_holds(machine: UpdateMachine) -> None:
    outcome = machine.boot(nothing)

    said = evidence(outcome, "updated: ready (statefs)")
    record = machine.record()
    assert (said["slot"], said["sequence"], said["store"]) == ("a", record.sequence, "statefsd")
    assert said["statefsd_generation"] == 1


def test_its_answers_are_what_the_disk_holds(machine: UpdateMachine) -> None:
    made = machine.maker.update(11)

    async def script(hands: Hands) -> Any:
        _ = await stage(hands, made)
        update = await status(hands)
        rows = [
            [row.slot, row.state, row.version, row.name, row.digest.hex(), row.size, row.capacity]
            for row in update.slots
        ]
        return [update.sequence, update.boots, rows, update.transfer.phase]

    sequence, boots, rows, phase = machine.boot(script).result

    record = machine.record()
    assert (sequence, boots, phase) == (record.sequence, record.boots, Phase.STAGED)
    assert rows == [
        [slot, info.state, info.version, info.name, info.digest.hex(), info.size, 1024 * 1024]
        for slot, info in zip((Slot.A, Slot.B), record.slots, strict=True)
    ]


def test_it_takes_an_update_in_pieces_of_frames_too(machine: UpdateMachine) -> None:
    made = machine.maker.update(11)

    async def script(hands: Hands) -> Any:
        staged = await stage(hands, made, piece=7168, inline=True)
        return isinstance(staged, Staged)

    assert machine.boot(script).result is True
    assert machine.slot_bytes(B)[: len(made.data)] == made.data


def test_a_switch_with_a_reboot_ends_the_run_for_the_loader(machine: UpdateMachine) -> None:
    made = machine.maker.update(11)

    async def script(hands: Hands) -> Any:
        _ = await stage(hands, made)
        switched = await ask(hands, Switch(made.digest, 1, True))
        assert isinstance(switched, Switched), switched
        await hands.pause(20 * SECOND)
        return "still up"

    outcome = machine.boot(script)

    assert outcome.ended is not None
    assert outcome.ended.code == EXIT_REBOOT
    assert machine.boot(judged).result == [Slot.B, Slot.NONE, Slot.B]


def test_without_being_asked_to_it_reboots_nobody(machine: UpdateMachine) -> None:
    made = machine.maker.update(11)

    async def script(hands: Hands) -> Any:
        _ = await stage_and_switch(hands, made)
        await hands.pause(5 * SECOND)
        back = await ask(hands, Rollback(Slot.A, True))  # which runs already
        await hands.pause(5 * SECOND)
        return [int(back.slot), await told(hands)]

    outcome = machine.boot(script)

    assert outcome.result == [Slot.A, [Slot.A, Slot.NONE, Slot.A]]


def test_the_slot_that_runs_is_the_one_that_was_booted_whatever_the_record_says(
    machine: UpdateMachine,
) -> None:
    made, other = machine.maker.update(11), machine.maker.update(12)
    _ = machine.boot(partial(stage_and_switch, made=made))
    _ = machine.boot(judged)
    running = machine.slot_bytes(B)

    async def script(hands: Hands) -> Any:
        _ = await ask(hands, Rollback(Slot.A, False))
        await hands.kill("updated")
        await hands.pause(300 * MS)
        return [await begin(hands, other), await told(hands)]

    outcome = machine.boot(script)

    assert outcome.result == ["PENDING", [Slot.A, Slot.NONE, Slot.B]]
    assert machine.slot_bytes(B) == running


def test_the_history_lasts_and_says_who_and_when(machine: UpdateMachine) -> None:
    made = machine.maker.update(11)
    _ = machine.boot(partial(stage_and_switch, made=made))

    async def script(hands: Hands) -> Any:
        await hands.pause(SECOND)
        return [
            [each.number, each.kind.name, each.version, each.boot, each.wall > 0]
            for each in await history(hands)
        ]

    found = machine.boot(script).result

    assert [row[:2] for row in found] == [
        [1, "BEGUN"],
        [2, "STAGED"],
        [3, "SWITCHED"],
        [4, "COMMITTED"],
    ]
    assert [row[2] for row in found] == [11] * 4
    assert [row[3] for row in found] == [1, 1, 1, 2]
    assert all(row[4] for row in found)


# ------------------------------------------------------------------ interruptions


def test_a_transfer_goes_on_when_updated_was_killed_in_its_midst(machine: UpdateMachine) -> None:
    made = machine.maker.update(11, size=20_000)

    async def script(hands: Hands) -> Any:
        _ = await begin(hands, made)
        for at in range(0, 8192, 1024):
            piece = made.data[at : at + 1024]
            _ = await ask_with(hands, Chunk(at, 0, 1024), piece)
        await hands.kill("updated")
        await hands.pause(300 * MS)
        again = await begin(hands, made)
        assert isinstance(again, Begun), again
        staged = await stage(hands, made)
        return [again.offset <= 8192, isinstance(staged, Staged)]

    assert machine.boot(script).result == [True, True]
    assert machine.slot_bytes(B)[: len(made.data)] == made.data


def test_a_slow_transfer_is_kept_every_second_and_goes_on_from_there(
    machine: UpdateMachine,
) -> None:
    made = machine.maker.update(11, size=20_000)

    async def script(hands: Hands) -> Any:
        _ = await begin(hands, made)
        _ = await ask_with(hands, Chunk(0, 0, 8192), made.data[:8192])
        await hands.pause(1500 * MS)
        _ = await ask_with(hands, Chunk(8192, 0, 1024), made.data[8192:9216])
        await hands.outside("kill updated")
        await hands.pause(300 * MS)
        begun = await begin(hands, made)
        assert isinstance(begun, Begun), begun
        return begun.offset

    assert machine.boot(script).result == 8192


def test_a_transfer_goes_on_after_a_reboot_where_it_was_kept(machine: UpdateMachine) -> None:
    made = machine.maker.update(11, size=20_000)

    async def first(hands: Hands) -> Any:
        _ = await begin(hands, made)
        return len([await ask_with(hands, Chunk(0, 0, 8192), made.data[:8192])])

    async def second(hands: Hands) -> Any:
        begun = await begin(hands, made)
        assert isinstance(begun, Begun), begun
        staged = await stage(hands, made)
        return [begun.offset, isinstance(staged, Staged)]

    _ = machine.boot(first)  # ends in order: what came is kept
    assert machine.boot(second).result == [8192, True]
    assert machine.slot_bytes(B)[: len(made.data)] == made.data


@pytest.mark.parametrize("moment", [Moment.BEFORE, Moment.AFTER])
def test_after_a_power_cut_at_any_write_the_device_boots_and_the_update_goes_on(
    monkeypatch: pytest.MonkeyPatch, moment: Moment
) -> None:
    """Of all disks together, in the whole system; every write of every disk alone, and torn ones,
    are `nexus sim powercut ota`'s."""

    async def script(hands: Hands, made: Made) -> Any:
        await hands.outside("mark begin")
        return await stage_and_switch(hands, made)

    cuts = 0
    for write in range(1, 200, 3):
        machine = UpdateMachine(monkeypatch)
        made = machine.maker.update(11)
        cut = Cut(write=write, moment=moment, task="driver", line="driver: outside mark begin")
        _ = machine.boot(partial(script, made=made), on_machine=partial(plan_cut, cut=cut))
        if not machine.was_cut:
            break
        cuts += 1
        assert machine.record().active is A
        if machine.record().trying is None:
            assert machine.boot(partial(stage_and_switch, made=made)).result == GOOD
        assert machine.boot(judged).result == [Slot.B, Slot.NONE, Slot.B]
        assert machine.slot_bytes(B)[: len(made.data)] == made.data

    assert cuts >= 5


def plan_cut(kernel: SimKernel, cut: Cut) -> None:
    kernel.power.plan(cut)


def test_a_transfer_bears_a_restart_of_statefsd(machine: UpdateMachine) -> None:
    made = machine.maker.update(11)

    async def script(hands: Hands) -> Any:
        _ = await begin(hands, made)
        await hands.kill("statefsd")
        staged = await stage(hands, made)
        return isinstance(staged, Staged)

    assert machine.boot(script).result is True


def test_who_asks_for_the_end_of_a_verification_gets_it_and_others_are_served_meanwhile(
    machine: UpdateMachine,
) -> None:
    made = machine.maker.update(11, size=900_000)

    async def script(hands: Hands) -> Any:
        _ = await begin(hands, made)
        for at in range(0, len(made.data), 100_352):
            piece = made.data[at : at + 100_352]
            _ = await ask_with(hands, Chunk(at, 0, len(piece)), piece)
        updated = hands.client("updated")
        one = await updated.start(Finish(), await hands.ahead(5 * SECOND))
        update = await status(hands)
        other = await ask(hands, Finish())
        return [
            await updated.finish(one) == other,
            update.transfer.phase.name,
            update.transfer.offset == len(made.data),
            type(other).__name__,
        ]

    assert machine.boot(script).result == [True, "VERIFYING", True, "Staged"]


def test_only_so_many_wait_for_the_end_of_a_verification(machine: UpdateMachine) -> None:
    made = machine.maker.update(11, size=900_000)

    async def script(hands: Hands) -> Any:
        _ = await begin(hands, made)
        for at in range(0, len(made.data), 100_352):
            piece = made.data[at : at + 100_352]
            _ = await ask_with(hands, Chunk(at, 0, len(piece)), piece)
        updated = hands.client("updated")
        until = await hands.ahead(5 * SECOND)
        started = [await updated.start(Finish(), until) for _ in range(6)]
        found = [await updated.finish(each) for each in started]
        return [
            each.status.name if isinstance(each, Refused) else type(each).__name__ for each in found
        ]

    assert machine.boot(script).result == ["Staged"] * 4 + ["BUSY"] * 2


@pytest.mark.covers("updated.ABANDONED")
def test_another_transfer_ends_the_verification_of_one(machine: UpdateMachine) -> None:
    made = machine.maker.update(11, size=900_000)
    other = machine.maker.update(12)

    async def script(hands: Hands) -> Any:
        _ = await begin(hands, made)
        for at in range(0, len(made.data), 100_352):
            piece = made.data[at : at + 100_352]
            _ = await ask_with(hands, Chunk(at, 0, len(piece)), piece)
        updated = hands.client("updated")
        waiting = await updated.start(Finish(), await hands.ahead(5 * SECOND))
        begun = await begin(hands, other)
        outcome = await updated.finish(waiting)
        assert isinstance(outcome, Refused), outcome
        return [begun.version, outcome.status.name]

    assert machine.boot(script).result == [12, "ABANDONED"]


# ------------------------------------------------------------------ who may


EVERY: Final[tuple[UpdatedRequest, ...]] = (
    GetUpdate(),
    PutMetadata(0, b"x"),
    BeginInline(1),
    ChunkInline(0, b"x"),
    Finish(),
    Switch(bytes(32), 1, False),
    Commit(bytes(32)),
    Rollback(Slot.B, False),
    GetReasons(0),
    GetHistory(0),
)


def test_without_the_right_every_request_is_denied_and_changes_nothing(
    machine: UpdateMachine,
) -> None:
    made = machine.maker.update(11)

    async def other(boot: BootImage) -> int:
        hands = Hands(boot)
        await hands.begin(ready=False)
        found = [await ask(hands, request) for request in EVERY]
        found.append(await begin(hands, made))
        found.append(await ask_with(hands, Chunk(0, 0, 512), bytes(512)))
        await hands.outside("mark " + "-".join(map(str, found)))
        return await hands.server.run()

    async def script(hands: Hands) -> Any:
        await hands.pause(500 * MS)
        denied = [each for each in await audits(hands) if each["status"] == "denied"]
        return [[each["op"] for each in denied], await happened(hands)]

    outcome = machine.boot(script, mains={"guard": other})

    (said,) = [line for line in outcome.lines() if line.startswith("driver: outside mark")] or [""]
    assert said.removeprefix("driver: outside mark ").split("-") == [DENIED] * (len(EVERY) + 2)
    ops, events = outcome.result
    assert ops == [*(type(each).__name__ for each in EVERY), "Begin", "Chunk"]
    assert events == []
    assert machine.record().slot(B).state is SlotState.EMPTY


def test_nobody_but_init_reports_health(machine: UpdateMachine) -> None:
    made = machine.maker.update(11)
    text = SYSTEM.replace('trial_settle = "100ms"', 'trial_settle = "30s"')
    machine.text = text
    _ = machine.boot(partial(stage_and_switch, made=made))

    async def script(hands: Hands) -> Any:
        return [await ask(hands, ReportHealth(1, Slot.B, made.digest)), await told(hands)]

    found = machine.boot(script).result

    assert found == [DENIED, [Slot.A, Slot.B, Slot.B]]


def test_a_person_may_commit_with_the_right(machine: UpdateMachine) -> None:
    made = machine.maker.update(11)
    machine.text = SYSTEM.replace('trial_settle = "100ms"', 'trial_settle = "30s"')
    _ = machine.boot(partial(stage_and_switch, made=made))

    async def script(hands: Hands) -> Any:
        wrong = await ask(hands, Commit(bytes(32)))
        committed = await ask(hands, Commit(made.digest))
        return [wrong, int(committed.slot), await told(hands)]

    found = machine.boot(script).result

    assert found == ["NOT_ON_TRIAL", Slot.B, [Slot.B, Slot.NONE, Slot.B]]


def test_with_policyd_silent_everything_is_denied(machine: UpdateMachine) -> None:
    made = machine.maker.update(11)

    async def script(hands: Hands) -> Any:
        await hands.outside("freeze policyd")
        await hands.pause(100 * MS)
        return [await begin(hands, made), await ask(hands, Switch(made.digest, 1, False))]

    assert machine.boot(script).result == [DENIED, DENIED]
    assert machine.record().slot(B).state is SlotState.EMPTY


def test_every_change_is_audited_with_who_asked_and_how_it_ended(machine: UpdateMachine) -> None:
    made = machine.maker.update(11)
    bad = Maker(seed=9).update(12)

    async def script(hands: Hands) -> Any:
        _ = await begin(hands, bad)
        _ = await stage_and_switch(hands, made)
        _ = await ask(hands, Switch(bad.digest, 1, False))
        _ = await ask(hands, Rollback(Slot.A, False))
        await hands.pause(200 * MS)
        return await audits(hands)

    found = machine.boot(script).result

    assert [(each["op"], each["status"]) for each in found] == [
        ("Begin", "wrong_key"),
        ("Begin", "ok"),
        ("Finish", "ok"),
        ("Switch", "ok"),
        ("Switch", "pending"),
        ("Rollback", "ok"),
    ]
    assert {each["asked_by"] for each in found} == {"driver"}
    assert {each["trace"] for each in found} != {"0" * 32}
    assert [each["number"] for each in found] == [str(number) for number in range(1, 7)]
    assert str(len(made.data)) == found[2]["bytes"]


# ------------------------------------------------------------------ what is not taken


def test_on_trial_nothing_is_staged_and_nothing_switched_to(machine: UpdateMachine) -> None:
    made, other = machine.maker.update(11), machine.maker.update(12)
    machine.text = SYSTEM.replace('trial_settle = "100ms"', 'trial_settle = "30s"')
    _ = machine.boot(partial(stage_and_switch, made=made))
    slots = machine.slot_bytes(A), machine.slot_bytes(B)

    async def script(hands: Hands) -> Any:
        return [await begin(hands, other), await ask(hands, Switch(made.digest, 1, False))]

    assert machine.boot(script).result == ["UNPROVEN", "UNPROVEN"]
    assert (machine.slot_bytes(A), machine.slot_bytes(B)) == slots


def test_keys_for_development_are_taken_only_where_the_system_file_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine = UpdateMachine(monkeypatch, maker=Maker(development=True))
    made = machine.maker.update(11)

    async def script(hands: Hands) -> Any:
        staged = await stage(hands, made)
        return staged if isinstance(staged, str) else type(staged).__name__

    assert machine.boot(script).result == "DEVELOPMENT_KEY"
    machine.text = SYSTEM + DEVELOPMENT
    assert machine.boot(script).result == "Staged"


@pytest.mark.covers("updated.BAD_BULK")
def test_a_vmo_that_is_no_such_piece_is_refused(machine: UpdateMachine) -> None:
    made = machine.maker.update(11)

    async def script(hands: Hands) -> Any:
        _ = await begin(hands, made)
        beyond = await ask_with(hands, Chunk(0, 4096, 512), bytes(512))
        without = await ask(hands, Chunk(0, 0, 512))
        metadata = await ask(hands, Begin(0, 512))
        update = await status(hands)
        return [beyond, without, metadata, update.transfer.offset]

    assert machine.boot(script).result == ["BAD_BULK"] * 3 + [0]


def test_metadata_in_pieces_are_put_together_for_one_caller_and_in_order(
    machine: UpdateMachine,
) -> None:
    made = machine.maker.update(11)

    async def script(hands: Hands) -> Any:
        gap = await ask(hands, PutMetadata(100, b"x"))
        first = await ask(hands, PutMetadata(0, made.metadata[:64]))
        again = await ask(hands, PutMetadata(0, made.metadata[:64]))
        beyond = await ask(hands, PutMetadata(65, b"x"))
        early = await ask(hands, BeginInline(len(made.metadata)))
        begun = await begin_inline(hands, made)
        return [gap, first.size, again.size, beyond, early, type(begun).__name__]

    found = machine.boot(script).result

    assert found == ["OUT_OF_ORDER", 64, 64, "OUT_OF_ORDER", "INCOMPLETE", "Begun"]


def test_metadata_beyond_their_limit_are_refused_before_they_are_looked_at(
    machine: UpdateMachine,
) -> None:
    piece = bytes(INLINE_PIECE_MAX)

    async def script(hands: Hands) -> Any:
        moved = await ask_with(hands, Begin(0, METADATA_SIZE_MAX + 1), bytes(METADATA_SIZE_MAX + 1))
        at = 0
        while not isinstance(taken := await ask(hands, PutMetadata(at, piece)), str):
            at = taken.size
        return [moved, taken, at <= METADATA_SIZE_MAX < at + len(piece)]

    assert machine.boot(script).result == ["TOO_LARGE", "TOO_LARGE", True]


def test_metadata_of_one_caller_are_not_those_of_another(machine: UpdateMachine) -> None:
    made = machine.maker.update(11)
    rights = 'capabilities = ["log.read"]'
    assert rights in SYSTEM
    machine.text = SYSTEM.replace(rights, 'capabilities = ["log.read", "update.stage"]')

    async def other(boot: BootImage) -> int:
        """It is ready, and the driver begins, when it has sent them."""
        hands = Hands(boot)
        await hands.begin(ready=False)
        taken = await ask(hands, PutMetadata(0, made.metadata[:64]))
        await hands.outside(f"mark {taken.size}")
        return await hands.server.run()

    async def script(hands: Hands) -> Any:
        more = await ask(hands, PutMetadata(64, made.metadata[64:128]))
        return [more, await ask(hands, BeginInline(64))]

    outcome = machine.boot(script, mains={"guard": other})

    assert "driver: outside mark 64" in outcome.lines()
    assert outcome.result == ["OUT_OF_ORDER", "INCOMPLETE"]


def test_a_full_disk_under_the_standby_slot_leaves_the_device_as_it_is(
    machine: UpdateMachine,
) -> None:
    made = machine.maker.update(11, size=50_000)
    machine.disks["slot-b"].faults = DiskFaults(room=20)

    async def script(hands: Hands) -> Any:
        staged = await stage(hands, made)
        return [staged, await told(hands)]

    assert machine.boot(script).result == ["IO_ERROR", [Slot.A, Slot.NONE, Slot.A]]
    machine.disks["slot-b"].faults = DiskFaults()
    assert machine.boot(partial(stage_and_switch, made=made)).result == GOOD


def test_a_full_statefs_has_room_for_what_updated_keeps_and_none_for_a_copy(
    machine: UpdateMachine,
) -> None:
    made = machine.maker.update(11)
    migrates = machine.maker.update(12, schemas={AREA: 2})

    async def fill(hands: Hands) -> int:
        """Fill statefs up with values of the app's; how many there are."""
        for number in range(2000):
            put = Put(AREA.encode() + b"%d" % number, bytes(7000), Durability.ACCEPTED, 0)
            outcome = await hands.call("statefsd", put)
            if isinstance(outcome, Refused):
                assert outcome.status in (StatefsdStatus.NO_SPACE, StatefsdStatus.OVER_QUOTA)
                return number
        raise AssertionError("it is never full")

    async def script(hands: Hands) -> Any:
        filled = await fill(hands)
        staged = await stage(hands, made)
        other = await stage(hands, migrates)
        switched = await ask(hands, Switch(migrates.digest, 1, False))
        return [filled > 100, type(staged).__name__, type(other).__name__, switched]

    assert machine.boot(script).result == [True, "Staged", "Staged", "NO_SNAPSHOT"]
    assert machine.record().trying is None


@pytest.mark.covers("updated.NO_SPACE")
def test_without_room_in_statefs_for_what_it_keeps_nothing_is_begun(
    machine: UpdateMachine,
) -> None:
    machine.text = (
        SYSTEM
        + """
[service.statefsd.settings]
quotas = "keystore 1MiB 4096, boot 512 4"
"""
    )
    made = machine.maker.update(11)

    async def script(hands: Hands) -> Any:
        return [await begin(hands, made), await told(hands)]

    assert machine.boot(script).result == ["NO_SPACE", [Slot.A, Slot.NONE, Slot.A]]
    assert machine.record().slot(B).state is SlotState.EMPTY


def test_a_device_that_was_never_provisioned_says_so_and_takes_nothing(
    machine: UpdateMachine,
) -> None:
    made = machine.maker.update(11)
    machine.disks["boot"] = Disk(machine.disks["boot"].block_count)

    async def script(hands: Hands) -> Any:
        return [await ask(hands, GetUpdate()), await begin(hands, made)]

    outcome = machine.boot(script, loads=False)

    assert outcome.result == ["NO_BOOT_RECORD", "NO_BOOT_RECORD"]
    assert "updated: ready (not provisioned)" in outcome.lines()
    assert machine.slot_bytes(B) == bytes(1024 * 1024)


def test_without_one_of_its_devices_it_says_which(machine: UpdateMachine) -> None:
    machine.text = SYSTEM.replace(
        'hardware = ["boot", "slot-a", "slot-b"]', 'hardware = ["boot", "slot-a"]'
    )

    async def script(boot: BootImage) -> int:
        hands = Hands(boot)
        _ = await hands.server.step(await hands.ahead(SECOND))
        await hands.pause(SECOND)
        return 0

    outcome = machine.boot(nothing, mains={"driver": script}, loads=False)

    assert any("has no device slot-b" in line for line in outcome.lines()), outcome.lines()


# ------------------------------------------------------------------ the way back


async def crash(_boot: BootImage) -> int:
    """A service that never becomes ready."""
    return 7


async def write_state(hands: Hands, value: bytes) -> None:
    put = Put(KEY, value, Durability.DURABLE, 0)
    assert not isinstance(await hands.call("statefsd", put), Refused)


async def read_state(hands: Hands) -> str:
    found = await hands.call("statefsd", Get(KEY))
    assert isinstance(found, Value), found
    return found.value.decode()


def test_a_set_that_migrates_data_and_fails_leaves_set_and_data_as_before(
    machine: UpdateMachine,
) -> None:
    made = machine.maker.update(11, schemas={AREA: 2})

    async def first(hands: Hands) -> Any:
        await write_state(hands, b"old")
        return await stage_and_switch(hands, made, tries=1)

    async def migrating(boot: BootImage) -> int:
        hands = Hands(boot)
        await hands.begin(ready=False)
        await write_state(hands, b"migrated")
        await hands.outside("mark migrated")
        return await hands.server.run()

    async def third(hands: Hands) -> Any:
        await hands.pause(100 * MS)
        reasons = await ask(hands, GetReasons(0))
        assert isinstance(reasons, Reasons), reasons
        causes = [Cause(each.cause).name for each in reasons.reasons]
        services = [each.service for each in reasons.reasons]
        return [await told(hands), await read_state(hands), await happened(hands), causes, services]

    assert machine.boot(first).result == GOOD
    assert machine.record().snapshot == 1
    bad = machine.boot(nothing, mains={"driver": migrating, "guard": crash})
    assert bad.ended is not None
    assert bad.ended.code == EXIT_SLOT_FAILED
    slots, value, events, causes, services = machine.boot(third).result

    assert slots == [Slot.A, Slot.NONE, Slot.A]
    assert value == "old"
    assert events[-3:] == [
        Happened.FAILED.name,
        Happened.ROLLED_BACK.name,
        Happened.RESTORED.name,
    ]
    assert causes[0] == "ROLLED_BACK"
    assert services[0] == "other", "the service to blame is named"
    record = machine.record()
    assert (record.restore, record.snapshot) == (False, 0)
    assert record.slot(B).state is SlotState.BAD


def test_an_operator_goes_back_to_the_set_before(machine: UpdateMachine) -> None:
    made = machine.maker.update(11)
    _ = machine.boot(partial(stage_and_switch, made=made))
    _ = machine.boot(judged)

    async def script(hands: Hands) -> Any:
        back = await ask(hands, Rollback(Slot.A, True))
        await hands.pause(20 * SECOND)
        return back

    outcome = machine.boot(script)

    assert outcome.ended is not None
    assert outcome.ended.code == EXIT_REBOOT
    assert machine.boot(told).result == [Slot.A, Slot.NONE, Slot.A]


def test_ten_updates_in_a_row_leave_nothing_behind(machine: UpdateMachine) -> None:
    async def kept(hands: Hands) -> Any:
        await hands.pause(SECOND)
        update = await status(hands)
        return [int(update.active), update.snapshot, update.transfer.phase.name]

    for version in range(11, 21):
        made = machine.maker.update(version, schemas={AREA: version})
        assert machine.boot(partial(stage_and_switch, made=made)).result == GOOD
        active, snapshot, phase = machine.boot(kept).result
        assert (snapshot, phase) == (0, "IDLE")
        assert active == (Slot.B if version % 2 else Slot.A)
