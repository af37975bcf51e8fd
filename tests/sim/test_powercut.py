"""The power-cut explorer: a sample of it, and that it finds what it is there to find.

All of it is part of `make campaign`; its last report is docs/reference/powercut.md.
"""

from collections.abc import Callable
from random import Random  # noqa: TID251 (seeded)
from typing import Any

import msgspec
import pytest

from nexus.kernel.sim.disk import Disk, Pending, Piece, parse_choice
from nexus.proof import powercut
from nexus.proof.powercut import (
    DISK_BLOCKS,
    SCRIPTED,
    WORKLOADS,
    Explorer,
    Target,
    choices,
    explore,
    main,
)
from nexus.services.statefsd.engine import (
    checkpoint,
    journal,
    layout,
    requests,
    snapshot,
    store,
)
from nexus.services.statefsd.engine.journal import Header, Read, Reader
from nexus.services.statefsd.engine.record import has_whole_value, parse_head
from nexus.services.statefsd.engine.store import Store

SAMPLE = 41  # of so many cases one is opened in `make test`
Patch = Callable[[pytest.MonkeyPatch], None]


@pytest.mark.parametrize("workload", WORKLOADS)
def test_a_power_cut_anywhere_loses_nothing_acknowledged(workload: str) -> None:
    report = explore([workload], [1], subsets_max=powercut.SUBSETS_SAMPLE, every=SAMPLE)

    assert report.problems == []
    assert (report.losses, report.bricks, report.exit_code) == (0, 0, 0)
    assert report.cut_points > 20
    assert report.cases > 10


def test_the_workloads_reach_what_they_are_there_for() -> None:
    report = explore(SCRIPTED, [1], every=1_000_000)

    assert sum(each.compactions for each in report.explored) >= 4
    assert max(each.pending_max for each in report.explored) > powercut.SUBSETS_MAX
    assert report.exit_code == 1, "opening nothing proves nothing"


def test_no_reordering_within_the_bound_is_left_out() -> None:
    pending = [Pending(number, number, bytes(1024)) for number in range(3)]

    tried = list(choices(pending, None, 6, Random(1)))

    whole = {index: Piece(index, 0, 1024) for index in range(3)}
    assert {(), (whole[0],), (whole[1], whole[2]), tuple(whole.values())} <= set(tried)
    assert sum(set(choice) <= set(whole.values()) for choice in set(tried)) >= 8
    assert (whole[2], whole[1], whole[0]) in tried
    assert any(piece.stop % 512 for choice in tried for piece in choice), "torn in a sector"


def test_beyond_the_bound_each_write_is_once_alone_and_once_missing() -> None:
    pending = [Pending(number, number, bytes(512)) for number in range(10)]

    tried = set(choices(pending, None, 3, Random(1)))

    everything = [Piece(index, 0, 512) for index in range(10)]
    for index in range(10):
        assert (everything[index],) in tried
        assert tuple(everything[:index] + everything[index + 1 :]) in tried
        assert tuple(everything[:index]) in tried
        assert tuple(everything[index:]) in tried


# ---------------------------------------------------------------- the explorer can fail


def _forget_the_flush(patch: pytest.MonkeyPatch) -> None:
    """A new checkpoint is put in force before it is durable."""

    genuine = Store._flush

    async def flush(self: Store) -> None:
        if self._builder is None:
            await genuine(self)
        self.durable = self._committed

    patch.setattr(Store, "_flush", flush)


def _forget_the_checksums(patch: pytest.MonkeyPatch) -> None:
    """A value is taken for whole without looking."""
    patch.setattr(journal, "has_whole_value", lambda *_: True)


def _forget_the_epochs(patch: pytest.MonkeyPatch) -> None:
    """A commit follows if its number does, whatever was dropped there."""

    def follows(self: Reader, header: Header) -> bool:
        return header.first == self._expected

    patch.setattr(Reader, "_follows", follows)
    patch.setattr(journal, "without_stale", lambda headers, *_: headers)


def _forget_that_a_commit_is_one(patch: pytest.MonkeyPatch) -> None:
    """Of a commit that is not whole, what is whole is applied."""

    def some(payload: bytes, header: Header) -> list[Read]:
        records: list[Read] = []
        at = journal.HEADER_SIZE
        for index in range(header.record_count):
            head = parse_head(payload, at, len(payload))
            if head is None or head.sequence != header.first + index:
                break
            if not has_whole_value(payload, head):
                break
            value = payload[head.value_at : head.end]
            records.append(Read(head.sequence, head.kind, head.key, value, 0, lost=None))
            rider = journal.rider_of(payload, head)
            at = head.end if rider is None else rider.end
        return records

    patch.setattr(journal, "whole_records", some)


def _forget_to_make_it_durable(patch: pytest.MonkeyPatch) -> None:
    """The disk is not told that a commit is to be durable."""
    genuine = powercut.Watched.write

    async def write(self: Any, block: int, data: bytes, *, durable: bool = False) -> None:
        await genuine(self, block, data, durable=durable and block < 16)

    patch.setattr(powercut.Watched, "write", write)


def _forget_the_second_area(patch: pytest.MonkeyPatch) -> None:
    """The checkpoint in force is written over."""
    genuine: Any = checkpoint.Builder

    def builder(*arguments: Any, **named: Any) -> Any:
        first, blocks = named["first"], named["blocks"]
        named["first"] = first if first < 16 + 32 + blocks else first - blocks
        return genuine(*arguments, **named)

    patch.setattr(store, "Builder", builder)
    patch.setattr(layout.Superblock, "area_first", lambda self, area: 16 + self.ring_blocks)


def _forget_request_ids(patch: pytest.MonkeyPatch) -> None:
    """A checkpoint does not take over which requests were applied."""
    patch.setattr(requests.Requests, "packed", lambda self, kept: [])


def _forget_what_came_since(patch: pytest.MonkeyPatch) -> None:
    """Going back to a snapshot leaves the keys that came since."""

    async def nothing(_store: Store, _head: snapshot.Head) -> None:
        return

    patch.setattr(snapshot, "_drop_others", nothing)


def _forget_that_it_goes_back(patch: pytest.MonkeyPatch) -> None:
    """The way back is taken for done before it is gone: a power cut leaves half of it."""
    genuine = snapshot._write_head

    async def write_head(store: Store, head: snapshot.Head, *, durable: bool) -> None:
        done = head.state is snapshot.State.RESTORING
        state = snapshot.State.RESTORED if done else head.state
        await genuine(store, msgspec.structs.replace(head, state=state), durable=durable)

    patch.setattr(snapshot, "_write_head", write_head)


def _forget_what_is_half_taken(patch: pytest.MonkeyPatch) -> None:
    """A snapshot counts as kept from its first page on."""
    genuine = snapshot._write_head

    async def write_head(store: Store, head: snapshot.Head, *, durable: bool) -> None:
        begun = head.state is snapshot.State.TAKING
        state = snapshot.State.KEPT if begun else head.state
        await genuine(store, msgspec.structs.replace(head, state=state), durable=durable)

    patch.setattr(snapshot, "_write_head", write_head)


@pytest.mark.parametrize(
    ("mutation", "workload", "kind"),
    [
        (_forget_the_flush, "compactions", "loss"),
        (_forget_the_checksums, "puts", "loss"),
        (_forget_the_epochs, "restarts", "loss"),
        (_forget_that_a_commit_is_one, "batches", "loss"),
        (_forget_to_make_it_durable, "puts", "loss"),
        (_forget_the_second_area, "full", "loss"),
        (_forget_request_ids, "compactions", "loss"),
        (_forget_what_came_since, "snapshots", "loss"),
        (_forget_that_it_goes_back, "snapshots", "loss"),
        (_forget_what_is_half_taken, "snapshots", "loss"),
    ],
)
def test_the_explorer_reports_a_store_without_one_of_its_guards(
    mutation: Patch, workload: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mutation(monkeypatch)

    report = explore([workload], [1], subsets_max=2, every=3)

    assert kind in {problem.kind for problem in report.problems}
    assert report.exit_code == 1


def test_the_command_of_a_problem_repeats_it_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _forget_that_a_commit_is_one(monkeypatch)
    found = explore(["batches"], [1], subsets_max=2, every=3).problems[0]
    words = found.command.removeprefix("nexus sim powercut state ").split()

    assert main(words) == 1

    shown = capsys.readouterr().out
    assert found.what in shown
    assert found.command in shown
    assert "| batches | 1 |" in shown
    monkeypatch.undo()
    assert main(words) == 0, "and nothing is wrong with that case otherwise"


def test_a_second_cut_is_repeated_too() -> None:
    target = Target(9, parse_choice("none"), 2, parse_choice("none"))

    explored = Explorer("puts", 1, target=target).run()

    assert explored.problems == []
    assert (explored.cases, explored.second_cuts > 2) == (1, True)


def test_a_store_that_does_not_open_is_a_brick(monkeypatch: pytest.MonkeyPatch) -> None:
    genuine = Disk.survivors

    def wiped(self: Disk, choice: Any, faults: Any = None) -> Disk:
        left = genuine(self, choice)
        for block in (0, 8):
            left.write(block, b"\xff" * 512, durable=True)
        return left

    monkeypatch.setattr(Disk, "survivors", wiped)

    report = explore(["puts"], [1], subsets_max=2, every=9)

    assert report.bricks > 0
    assert report.exit_code == 1


@pytest.mark.parametrize(
    "words",
    [
        ["--cut", "3"],
        ["--cut", "3", "--choice", "none"],
        ["--workload", "puts", "--cut", "3", "--choice", "x"],
        ["--workload", "puts", "--cut", "3", "--choice", "none", "--second", "1"],
        ["--workload", "nothing"],
    ],
)
def test_half_a_case_is_a_usage_error(words: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        _ = main(words)

    assert caught.value.code == 2


def test_the_disk_of_the_explorer_is_the_smallest_store() -> None:
    assert layout.initial(DISK_BLOCKS) is not None
    assert layout.initial(DISK_BLOCKS - 1) is None
