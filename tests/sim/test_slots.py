"""A whole device in the simulator is updated: real services, the real loader, its disks between."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from nexus.abi import INIT_NAME, BootImage, EndpointCreate, Status
from nexus.bootctl import Cause, SlotName, SlotState
from nexus.bootctl.handover import EXIT_REBOOT, EXIT_SLOT_FAILED, EXIT_STOPPED, TrialReason
from nexus.ipc import Refused
from nexus.kernel.core.ending import EXIT_CRASH
from nexus.kernel.sim.faults import Faults, NthFailure, Plan
from nexus.kernel.sim.power import Cut, Moment
from nexus.protocols.statefsd import (
    Durability,
    Get,
    GetSnapshot,
    GetStore,
    Put,
    SnapshotKept,
    SnapshotState,
)
from nexus.protocols.updated import GetUpdate, UpdatedStatus
from nexus.protocols.updated import Slot as UpdatedSlot
from nexus.services.demo.faulty import main as faulty
from nexus.testing.device import CallFailed, Device
from nexus.testing.slots import (
    Boot,
    Published,
    Slots,
    judging,
    reboot,
    stage,
    stamped,
    switch,
    updating,
)

pytestmark = pytest.mark.sim

A, B = SlotName.A, SlotName.B
DATA = "/state/faulty/"
HISTORY_SIZE = 12_000  # bytes; updated keeps its latest events, a few more for each update
STATE_RIGHTS = ("statefs.read", "statefs.write", "statefs.snapshot")
SYSTEM = """
[system]
name = "slots"
total_size = "16MiB"
trial_settle = "1s"

[device.boot]
kind = "block"
size = "64KiB"
[device.slot-a]
kind = "block"
size = "256KiB"
[device.slot-b]
kind = "block"
size = "256KiB"
[device.disk]
kind = "block"
size = "4MiB"

[service.policyd]
program = "policyd"
capabilities = ["policy.authority"]

[service.statefsd]
program = "statefsd"
stage = "core"
hardware = ["disk"]
capabilities = ["policy.delegate", "device.mmio.blk"]
uses = { policyd = {} }

[service.updated]
program = "updated"
isolation = "exec"
hardware = ["boot", "slot-a", "slot-b"]
capabilities = [
    "policy.delegate", "device.mmio.blk", "statefs.boot", "statefs.snapshot", "system.reboot",
]
uses = { policyd = {}, statefsd = {} }
health = { deadline = "6s" }

[service.app]
program = "demo.faulty"
capabilities = ["statefs.read", "statefs.write"]
health = { deadline = "2s", every = "100ms", answer = "200ms", misses = 2 }
restart = { backoff = "100ms", backoff_max = "100ms" }
[service.app.settings]
"""


def system(folder: Path, failure: str = "none", **more: str) -> Path:
    """A system whose app fails so."""
    folder.mkdir(exist_ok=True)
    file = folder / "system.toml"
    rows = {"failure": failure, **more}
    text = "\n".join(f'{name} = "{value}"' for name, value in rows.items())
    if failure in ("migration", "disk"):
        text += "\n[service.app.uses]\nstatefsd = {}"
    _ = file.write_text(SYSTEM + text + "\n")
    return file


def made(
    device: Slots, folder: Path, version: int, failure: str = "none", schema: int = 1, **more: Any
) -> Published:
    """A later set of the device, whose app fails so, and knows its data in this schema."""
    services = more.pop("services", {})
    file = system(folder / f"of-{version}", failure, **more)
    return device.publish(file, version, schemas={DATA: schema}, services=services)


@pytest.fixture
def device(tmp_path: Path) -> Slots:
    return Slots(tmp_path / "trees", system(tmp_path / "first"), seed=1, schemas={DATA: 1})


def stamps(boot: Boot) -> set[str]:
    """Of which set every service of a boot is; none of two."""
    found = set()
    for each in boot.plan.services:
        if each.name in ("app", "updated", "statefsd", "policyd"):
            right = boot.spawned[each.name] == stamped(each.program_digest, boot.slot.digest)
            found.add(boot.slot.digest if right else f"{each.name} of another set")
    return found


def test_a_good_set_is_staged_tried_committed_and_stays(device: Slots, tmp_path: Path) -> None:
    better = made(device, tmp_path, 2)
    running: list[UpdatedSlot] = []

    async def after(found: Device) -> None:
        await judging(found)
        update = await found.call("updated", GetUpdate())
        running.extend((update.running, update.active, update.trying))

    first = device.boot(updating(better))
    trial = device.boot(after)
    third = device.boot(after)

    assert (first.slot.slot, first.exit_code) == ("a", EXIT_REBOOT)
    assert (trial.slot.slot, trial.slot.trial, trial.exit_code) == ("b", True, EXIT_STOPPED)
    assert (third.slot.slot, third.slot.trial) == ("b", False)
    assert "init: health ok (slot b)" in trial.console
    assert running == [UpdatedSlot.B, UpdatedSlot.B, UpdatedSlot.NONE] * 2
    assert [stamps(each) for each in (first, trial, third)] == [
        {device.first.digest.hex()},
        {better.digest.hex()},
        {better.digest.hex()},
    ]
    assert device.content(B) == better.content
    assert device.content(A) == device.first.content


@pytest.mark.parametrize(
    ("failure", "reason", "cause"),
    [
        ("never ready", TrialReason.NOT_READY, Cause.NOT_READY),
        ("crashes", TrialReason.CRASHED, Cause.CRASHED),
        ("hangs", TrialReason.HUNG, Cause.HUNG),
        ("unhealthy", TrialReason.UNHEALTHY, Cause.UNHEALTHY),
        ("memory", TrialReason.CRASHED, Cause.CRASHED),
    ],
)
def test_a_bad_set_fails_its_trial_and_the_device_goes_back_by_itself(
    device: Slots, tmp_path: Path, failure: str, reason: TrialReason, cause: Cause
) -> None:
    bad = made(device, tmp_path, 2, failure)

    _ = device.boot(updating(bad))
    trial = device.boot(judging)
    back = device.boot(judging)

    assert trial.exit_code == EXIT_SLOT_FAILED
    assert not trial.finished
    assert trial.failure is not None
    assert (trial.failure.service, trial.failure.reason) == ("app", reason)
    assert (back.slot.slot, back.exit_code) == ("a", EXIT_STOPPED)
    assert stamps(back) == {device.first.digest.hex()}
    record = device.record
    assert (record.active, record.trying) == (A, None)
    assert record.slot(B).state is SlotState.BAD
    why = next(each for each in record.reasons if each.cause is cause)
    assert (why.service, why.version, why.detail) == ("app", 2, trial.failure.detail)
    assert why.trace.hex() == trial.failure.trace
    assert "app: " in why.tail


def test_a_set_whose_init_crashes_is_left_too(device: Slots, tmp_path: Path) -> None:
    """Its kernel gives it no endpoint, and it has no answer to that."""
    failing = NthFailure(trap=EndpointCreate, nth=1, status=Status.NO_SPACE, task=INIT_NAME)
    bad = made(device, tmp_path, 2)
    _ = device.boot(updating(bad))

    trial = device.boot(judging, faults=Faults(Plan(nth=(failing,))))
    back = device.boot(judging)

    assert (trial.exit_code, trial.failure) == (EXIT_CRASH, None)
    assert (back.slot.slot, back.exit_code) == ("a", EXIT_STOPPED)
    why = next(each for each in device.record.reasons if each.cause is Cause.INIT_ENDED)
    assert why.detail == f"init ended with exit code {EXIT_CRASH}"


def test_a_second_try_may_go_well(device: Slots, tmp_path: Path) -> None:
    async def shaky(image: BootImage) -> int:
        if len(device.boots) == 1:  # in the first boot of the trial
            return 7
        return int(await faulty(image) or 0)

    better = made(device, tmp_path, 2, services={"demo.faulty": shaky})
    _ = device.boot(updating(better, tries=2))

    first, second = device.boot(judging), device.boot(judging)

    assert first.exit_code == EXIT_SLOT_FAILED
    assert (second.slot.slot, second.slot.attempt, second.exit_code) == ("b", 2, EXIT_STOPPED)
    assert device.record.active is B


def test_nothing_is_staged_while_the_running_set_is_on_trial(device: Slots, tmp_path: Path) -> None:
    better = made(device, tmp_path, 2)
    third = made(device, tmp_path, 3)
    refused: list[object] = []

    async def early(found: Device) -> None:
        try:
            _ = await stage(found, third)
        except CallFailed as failed:
            refused.append(failed.outcome)
        await judging(found)
        _ = await stage(found, third)

    _ = device.boot(updating(better))
    trial = device.boot(early)

    assert refused == [Refused(UpdatedStatus.UNPROVEN)]
    assert trial.exit_code == EXIT_STOPPED
    assert device.record.slot(A).state is SlotState.STAGED


async def kept(found: Device) -> SnapshotKept:
    return await found.call("statefsd", GetSnapshot())


async def write(found: Device, values: Mapping[str, bytes]) -> None:
    for key, value in values.items():
        _ = await found.call("statefsd", Put(key.encode(), value, Durability.DURABLE, 0))


async def read(found: Device, keys: Mapping[str, bytes]) -> dict[str, bytes]:
    return {key: (await found.call("statefsd", Get(key.encode()))).value for key in keys}


BEFORE = {f"{DATA}a": b"1", f"{DATA}b": b"x" * 3000, "/state/log/k": b"other"}


@pytest.mark.parametrize(
    ("failure", "cut"), [("migration", False), ("migration", True), ("disk", False)]
)
def test_data_that_a_bad_set_has_changed_are_as_before_once_it_is_left(
    device: Slots, tmp_path: Path, failure: str, cut: bool
) -> None:
    """It migrates them, or fills the whole disk with more of them."""
    more = {"keys": f"{DATA}a {DATA}b {DATA}0"} if failure == "migration" else {}
    bad = made(device, tmp_path, 2, failure, schema=2, **more)
    seen: list[dict[str, bytes]] = []
    left: list[SnapshotKept] = []

    async def fill(found: Device) -> None:
        await write(found, dict.fromkeys(BEFORE, b"earlier"))
        _ = await stage(found, bad)
        _ = await switch(found, bad)
        await write(found, BEFORE)  # promised to last, and in no copy yet
        await reboot(found)

    async def look(found: Device) -> None:
        await judging(found)
        seen.append(await read(found, BEFORE))
        left.append(await kept(found))
        with pytest.raises(CallFailed, match="NOT_FOUND"):
            _ = await read(found, {f"{DATA}0": b""})

    _ = device.boot(fill, rights=STATE_RIGHTS)
    trial = device.boot(judging, rights=STATE_RIGHTS)
    if cut:  # in the midst of the way back
        half = device.boot(
            look,
            rights=STATE_RIGHTS,
            cut=Cut(disk="disk", write=4, moment=Moment.INSIDE, size=100),
        )
        assert half.run.cut
        assert not seen
    back = device.boot(look, rights=STATE_RIGHTS)

    assert trial.failure is not None
    assert trial.failure.reason == TrialReason.CRASHED
    assert "app: " in "".join(trial.console)
    assert back.slot.slot == "a"
    assert back.slot.restore
    assert seen == [BEFORE]
    assert left[0].state is SnapshotState.NONE
    assert (device.record.restore, device.record.snapshot) == (False, 0)


def test_an_update_that_migrates_and_commits_keeps_what_it_made_and_no_copy(
    device: Slots, tmp_path: Path
) -> None:
    better = made(device, tmp_path, 2, schema=2)
    seen: list[dict[str, bytes]] = []
    states: list[SnapshotState] = []

    async def fill(found: Device) -> None:
        await write(found, BEFORE)
        _ = await stage(found, better)
        _ = await switch(found, better)
        states.append((await kept(found)).state)

    async def migrate(found: Device) -> None:
        await write(found, {f"{DATA}a": b"2"})
        await judging(found)
        states.append((await kept(found)).state)

    async def look(found: Device) -> None:
        seen.append(await read(found, BEFORE))

    for scenario in (fill, migrate, look):
        _ = device.boot(scenario, rights=STATE_RIGHTS)

    assert states == [SnapshotState.KEPT, SnapshotState.NONE]
    assert seen == [{**BEFORE, f"{DATA}a": b"2"}]


def test_ten_updates_in_a_row_leave_nothing_behind(device: Slots, tmp_path: Path) -> None:
    """Each migrates the data. What is left is two sets, two trees, the data, and no copy."""
    sizes: list[int] = []

    async def look(found: Device) -> None:
        await judging(found)
        assert (await kept(found)).state is SnapshotState.NONE
        sizes.append((await found.call("statefsd", GetStore())).used)
        assert await read(found, BEFORE) == BEFORE

    async def fill(found: Device) -> None:
        await write(found, BEFORE)

    _ = device.boot(fill, rights=STATE_RIGHTS)
    for version in range(2, 12):
        update = made(device, tmp_path, version, schema=version)
        assert device.boot(updating(update)).exit_code == EXIT_REBOOT
        assert device.boot(look, rights=STATE_RIGHTS).exit_code == EXIT_STOPPED

    assert device.record.slot(device.record.active).version == 11
    assert len(list((tmp_path / "trees" / "slots").iterdir())) == 2
    assert max(sizes) - sizes[-1] < HISTORY_SIZE
    assert sizes[-1] - sizes[0] < HISTORY_SIZE


@pytest.mark.parametrize(
    ("cut", "is_committed"),
    [
        (Cut(disk="disk", write=1), False),
        (Cut(disk="disk", write=2, moment=Moment.INSIDE, size=40), False),
        (Cut(disk="boot", write=1, moment=Moment.BEFORE), False),
        (Cut(disk="boot", write=1, moment=Moment.INSIDE, size=300), False),
        (Cut(disk="boot", flush=1), True),
        (Cut(disk="disk", write=3), True),  # the history, when the commit is durable
    ],
)
def test_a_power_cut_in_a_trial_costs_a_try_unless_the_commit_was_durable(
    device: Slots, tmp_path: Path, cut: Cut, is_committed: bool
) -> None:
    better = made(device, tmp_path, 2)
    _ = device.boot(updating(better, tries=2))

    dark = device.boot(judging, cut=cut)
    then = device.boot(judging)

    assert dark.run.cut
    assert (dark.slot.slot, then.slot.slot) == ("b", "b")
    assert then.slot.trial is not is_committed
    assert then.exit_code == EXIT_STOPPED
    assert device.record.active is B
    lost = [each for each in device.record.reasons if each.cause is Cause.LOST]
    assert len(lost) == (not is_committed)


def test_a_program_of_a_sets_own_table_runs_in_that_set_alone(
    device: Slots, tmp_path: Path
) -> None:
    ran: list[int] = []

    async def other(image: BootImage) -> int:
        ran.append(len(device.boots))
        return int(await faulty(image) or 0)

    better = made(device, tmp_path, 2, services={"demo.faulty": other})

    for scenario in (updating(better), judging, judging):
        _ = device.boot(scenario)

    assert ran == [1, 2]


def test_one_seed_is_one_device(tmp_path: Path) -> None:
    logs = []
    for turn in range(2):
        folder = tmp_path / str(turn)
        folder.mkdir()
        device = Slots(folder / "trees", system(folder / "first"), seed=7, schemas={DATA: 1})
        bad = made(device, folder, 2, "crashes")
        boots = [device.boot(updating(bad)), device.boot(judging), device.boot(judging)]
        logs.append([each.run.log for each in boots])

    assert logs[0] == logs[1]
