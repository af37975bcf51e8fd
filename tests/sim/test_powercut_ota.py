"""Power cuts during updates: a sample of them, and that the explorer finds what it is there for.

All of it is part of `make campaign`; its last report is docs/reference/powercut-ota.md.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from random import Random  # noqa: TID251 (seeded)

import pytest

from nexus.bootctl import (
    BootRecord,
    Reason,
    SlotInfo,
    SlotName,
    SlotState,
    attempt,
    block,
    damaged,
    environment,
    staged,
)
from nexus.cli.command import main as nexus
from nexus.drivers import BlockDevice
from nexus.kernel.sim.disk import Disk, Piece
from nexus.loader import choose as loader
from nexus.proof.ota_device import AREA, BACKENDS, BLOCKS, FIRST, MIGRATING, SCENES, Paper, vendor
from nexus.proof.powercut_ota import (
    CutTarget,
    Explorer,
    explore,
    left_of,
    main,
    parse_split,
    split_text,
    splits,
)
from nexus.services.statefsd.engine import Store, snapshot
from nexus.services.updated import engine
from nexus.services.updated.engine import Engine
from nexus.services.updated.kept import Asker

SAMPLE = 31  # of so many cases one is booted in `make test`
Patch = Callable[[pytest.MonkeyPatch], None]


def test_a_power_cut_anywhere_in_an_update_leaves_a_device_that_boots_the_right_set() -> None:
    report = explore(list(SCENES), backends=list(BACKENDS), every=SAMPLE)

    assert report.problems == []
    assert [report.count(kind) for kind in ("brick", "wrong", "loss")] == [0, 0, 0]
    assert report.exit_code == 0
    assert report.cut_points > 450
    assert report.cases > 200
    assert all(each.cases for each in report.explored)


def test_the_scenes_are_those_of_a_device_that_is_updated() -> None:
    asked = {step.name.split(" ")[0] for scene in SCENES.values() for step in scene.cut}

    assert asked == {"begin", "stage", "switch", "boot", "migrate", "commit", "fail", "go", "edit"}
    assert any(step.name == "rot" for scene in SCENES.values() for step in scene.before)


def test_both_sets_come_up_where_both_may() -> None:
    (explored,) = explore(["second-try"], every=7).explored

    assert set(explored.seen) == {FIRST, MIGRATING}


def test_opening_nothing_proves_nothing() -> None:
    assert explore(["commit"], every=1_000_000).exit_code == 1


# ---------------------------------------------------------------- paper and splits


def test_on_paper_a_trial_without_a_try_left_is_over_and_the_data_go_back() -> None:
    paper = Paper(trying=12, tries=1, data=2, copy=1)

    first = paper.boots()
    second = first.boots()

    assert (first.runs, second.runs) == (12, 10)
    assert (second.data, second.copy) == (1, 0)


def test_every_disk_loses_its_cache_by_itself_and_with_the_others() -> None:
    disks = {name: Disk(blocks) for name, blocks in BLOCKS.items()}
    for name in ("boot", "state"):
        disks[name].write(0, bytes([1]) * 512)

    tried = list(splits(disks, "boot", 0, 4, Random(1)))

    whole = (Piece(0, 0, 512),)
    assert {"boot": whole, "state": whole} in tried
    assert {"boot": whole} in tried
    assert {"state": whole} in tried
    assert {"boot": ()} in tried
    assert any(piece.stop == 40 for split in tried for piece in split.get("boot", ()))
    assert any(piece.stop == 40 for split in tried for piece in split.get("state", ()))


def test_a_split_on_a_command_line_comes_back() -> None:
    split = {"boot": (Piece(0, 0, 512), Piece(2, 4, 9)), "state": ()}

    assert split_text(split) == "boot=0:0-512,2:4-9"
    assert parse_split(split_text(split)) == {"boot": split["boot"]}
    assert parse_split("none") == {}
    with pytest.raises(ValueError, match="no disk"):
        _ = parse_split("floppy=0:0-1")


def test_what_is_not_named_is_lost() -> None:
    disks = {"boot": Disk(8), "state": Disk(8)}
    for disk in disks.values():
        disk.write(1, b"x" * 512)

    left = left_of(disks, {"boot": (Piece(0, 0, 3),)})

    assert left["boot"].read(1, 1) == b"xxx" + bytes(509)
    assert left["state"].read(1, 1) == bytes(512)


# ---------------------------------------------------------------- mutations


def not_durable(patch: pytest.MonkeyPatch) -> None:
    """The boot record is written into the disk's cache, and answered."""

    async def write_back(device: BlockDevice, at: int, data: bytes) -> None:
        await device.write(at, data)

    patch.setattr(block, "write_back", write_back)


def one_copy(patch: pytest.MonkeyPatch) -> None:
    """The record is written over the only one there is."""
    patch.setattr(block, "COPIES", (0, 0))


def one_environment(patch: pytest.MonkeyPatch) -> None:
    """U-Boot's environment is written over the only copy there is."""
    patch.setattr(environment, "ENVIRONMENT_COPIES", (0, 0))


def no_try_counted(patch: pytest.MonkeyPatch) -> None:
    """A boot costs nothing."""

    def free(record: BootRecord, *, wall: int = 0) -> tuple[BootRecord, SlotName]:
        tried, name = attempt(record, wall=wall)
        if tried.trying is None:
            return tried, name
        info = replace(tried.slot(name), tries_left=record.slot(name).tries_left)
        return tried.with_slot(name, info), name

    patch.setattr(loader, "attempt", free)


def not_cleared_first(patch: pytest.MonkeyPatch) -> None:
    """The record calls a set staged over which another one is written."""

    def cleared_then(record: BootRecord, info: SlotInfo) -> BootRecord:
        return staged(record.with_slot(record.standby, SlotInfo()), info)

    patch.setattr(engine, "staging", lambda record: record)
    patch.setattr(engine, "staged", cleared_then)


def not_flushed(patch: pytest.MonkeyPatch) -> None:
    """The record calls a set staged that is in the disk's cache."""

    async def sync(self: Engine) -> None:
        del self

    patch.setattr(Engine, "sync", sync)


def no_copy(patch: pytest.MonkeyPatch) -> None:
    """Nothing is kept of the data that the new set migrates."""

    async def copied(self: Engine, areas: Sequence[str]) -> int:
        del self, areas
        return 0

    patch.setattr(Engine, "_copied", copied)


def not_restored(patch: pytest.MonkeyPatch) -> None:
    """The old set finds the data of the new one."""

    async def restore(store: Store, number: int) -> snapshot.Head:
        del number
        return await snapshot.head_of(store)

    patch.setattr(snapshot, "restore", restore)


def not_taken_again(patch: pytest.MonkeyPatch) -> None:
    """What was changed between the switch and the boot is lost with a rollback."""

    async def take_again(store: Store, number: int) -> snapshot.Head:
        del number
        return await snapshot.head_of(store)

    patch.setattr(snapshot, "take_again", take_again)


def copy_dropped_first(patch: pytest.MonkeyPatch) -> None:
    """The copy goes before the commit is durable."""
    genuine = Engine.commit

    async def commit(
        self: Engine, name: SlotName, digest: bytes, nonce: int, asker: Asker
    ) -> object:
        await self._memory.keep_only(0)
        return await genuine(self, name, digest, nonce, asker)

    patch.setattr(Engine, "commit", commit)


def commit_forgotten(patch: pytest.MonkeyPatch) -> None:
    """A commit is answered and not made."""
    patch.setattr(engine, "commit", lambda record, *_: record)


def switched_before_the_copy(patch: pytest.MonkeyPatch) -> None:
    """The record asks for the trial, and only then the data are copied."""
    genuine = Engine.switch

    async def copied(self: Engine, areas: Sequence[str]) -> int:
        del self
        return 1 if areas else 0

    async def switch(self: Engine, digest: bytes, tries: int, asker: Asker) -> object:
        answer = await genuine(self, digest, tries, asker)
        _ = await self._memory.snapshot([AREA])
        return answer

    patch.setattr(Engine, "_copied", copied)
    patch.setattr(Engine, "switch", switch)


def not_looked_at(patch: pytest.MonkeyPatch) -> None:
    """A slot is booted for what the record says of it."""

    async def believed(device: BlockDevice, size: int) -> bytes:
        data = await device.read(0, device.block_count)
        known = vendor().by_digest(sha256(data[:size]).digest())
        whole = (each for each in vendor().releases.values() if len(each.data) == size)
        found = known or next(each for each in whole if each.data[:64] == data[:64])
        return found.digest

    patch.setattr(loader, "_digest", believed)


def given_up_for_nothing(patch: pytest.MonkeyPatch) -> None:
    """A trial is over although what it would go back to is damaged."""

    def and_the_trial(record: BootRecord, name: SlotName, reason: Reason) -> BootRecord:
        record = damaged(record, name, reason)
        if record.trying is None:
            return record
        bad = replace(record.slot(record.trying), state=SlotState.BAD)
        return replace(record.with_slot(record.trying, bad), trying=None)

    patch.setattr(loader, "damaged", and_the_trial)


MUTATIONS: dict[Patch, tuple[str, str]] = {
    not_durable: ("commit", "wrong"),
    one_copy: ("switch", "brick"),
    one_environment: ("switch", "brick"),
    no_try_counted: ("first-boot", "wrong"),
    not_cleared_first: ("stage-anew", "loss"),
    not_flushed: ("stage", "wrong"),
    no_copy: ("first-boot", "loss"),
    not_restored: ("rollback", "loss"),
    not_taken_again: ("edit-and-roll-back", "loss"),
    copy_dropped_first: ("commit", "brick"),
    commit_forgotten: ("commit", "wrong"),
    switched_before_the_copy: ("switch", "brick"),
    not_looked_at: ("rotten", "wrong"),
    given_up_for_nothing: ("rotten-way-back", "brick"),
}


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda each: each.__name__)
def test_a_device_without_one_of_its_guards_is_found_out(
    monkeypatch: pytest.MonkeyPatch, mutation: Patch
) -> None:
    scene, kind = MUTATIONS[mutation]
    mutation(monkeypatch)

    backend = "environment" if mutation is one_environment else "block"

    report = explore([scene], backends=[backend], every=5)

    assert report.exit_code == 1
    assert kind in {problem.kind for problem in report.problems}


# ---------------------------------------------------------------- one case again


def test_the_printed_command_repeats_a_problem_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    not_flushed(monkeypatch)
    found = explore(["stage"], every=3).problems[0]
    words = found.command.removeprefix("nexus ").split()

    assert nexus(words) == 1
    assert found.command in capsys.readouterr().out


def test_a_case_that_does_not_exist_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--scene", "stage", "--cut", "1", "--split", "boot=7:0-512"]

    assert nexus(["sim", "powercut", "ota", *words]) == 2
    assert "at cut 1 boot has no pending write 7" in capsys.readouterr().err


def test_a_second_cut_is_repeated_alone() -> None:
    target = CutTarget(3, {}, 1, {"boot": (Piece(0, 0, 512),)})

    explored = Explorer("rollback", target=target).run()

    assert (explored.cases, explored.second_cuts, explored.problems) == (1, 1, [])


def test_the_report_is_written_and_the_figures_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"

    assert main(["--scene", "commit", "--every", "40", "--report", str(page), "--json"]) == 0

    figures = json.loads(capsys.readouterr().out)
    assert (figures["bricks"], figures["wrong_slots"], figures["losses"]) == (0, 0, 0)
    assert figures["cut_points"] > 10
    assert "0 bricks, 0 wrong slots" in page.read_text()


@pytest.mark.parametrize(
    "words",
    [
        ["--scene", "nowhere"],
        ["--cut", "1"],
        ["--scene", "commit", "--cut", "1"],
        ["--scene", "commit", "--cut", "1", "--split", "floppy=0:0-1"],
        ["--scene", "commit", "--cut", "1", "--split", "none", "--second", "1"],
        ["--every", "0"],
    ],
)
def test_wrong_usage_is_told(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert nexus(["sim", "powercut", "ota", *words]) == 2
    assert "usage: nexus sim powercut ota" in capsys.readouterr().err
