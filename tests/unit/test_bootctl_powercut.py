"""The power is cut at every write of every transition: the record before it, or the one after."""

from collections.abc import Callable
from dataclasses import replace
from random import Random  # noqa: TID251 (seeded)
from typing import TypeAlias

import pytest

from nexus.bootctl import (
    BootControl,
    BootRecord,
    Cause,
    NoBootRecord,
    SlotName,
    attempt,
    block,
    commit,
    damaged,
    environment,
    failed,
    problem_of,
    restored,
    rollback,
    staged,
    staging,
    switch,
)
from nexus.drivers import BlockDevice, finished
from nexus.kernel.sim.disk import NOTHING, Disk, choice_text
from nexus.proof.powercut import DiskDevice, Watched, choices
from tests.fakes.bootrecords import BACKENDS, BOOT_BLOCKS, a_reason, a_set, new

B = SlotName.B
Step: TypeAlias = Callable[[BootRecord], BootRecord]


def tried(record: BootRecord) -> BootRecord:
    return attempt(record, wall=7)[0]


def switched(record: BootRecord, snapshot: int = 0) -> BootRecord:
    reason = a_reason(Cause.SWITCHED, record.standby, record, tail="t" * 900)
    return switch(record, 1, reason, snapshot=snapshot)


def proven(record: BootRecord) -> BootRecord:
    assert record.trying is not None
    return commit(record, record.trying, a_reason(Cause.COMMITTED, record.trying, record))


def given_up(record: BootRecord) -> BootRecord:
    return rollback(record, a_reason(Cause.GIVEN_UP, record.trying or record.active, record))


def crashed(record: BootRecord) -> BootRecord:
    assert record.trying is not None
    return failed(record, a_reason(Cause.CRASHED, record.trying, record, detail="it ended"))


TRANSITIONS: dict[str, tuple[Step, ...]] = {
    "boot": (tried,),
    "stage": (staging, lambda it: staged(it, a_set(2))),
    "switch": (staging, lambda it: staged(it, a_set(2)), switched),
    "commit": (staging, lambda it: staged(it, a_set(2)), switched, tried, proven, tried),
    "roll back by itself": (
        staging,
        lambda it: staged(it, a_set(2)),
        lambda it: switched(it, 3),
        tried,
        crashed,
        tried,
        restored,
    ),
    "take a switch back": (staging, lambda it: staged(it, a_set(2)), switched, given_up),
    "give a trial up": (staging, lambda it: staged(it, a_set(2)), switched, tried, given_up),
    "go back": (staging, lambda it: staged(it, a_set(2)), switched, tried, proven, given_up),
    "damage": (
        staging,
        lambda it: staged(it, a_set(2)),
        switched,
        lambda it: damaged(it, B, a_reason(Cause.DAMAGED, B, it)),
    ),
}


class Cuts:
    """Cuts the power before, in and after each write, and looks at what boot control says then."""

    def __init__(self, backend: Callable[[BlockDevice], BootControl]) -> None:
        self._backend = backend
        self._source = Random(1)
        self.acknowledged: BootRecord | None = None
        self.next: Step | None = None
        self.cases = 0
        self.problems: list[str] = []

    def on_write(self, _: int, disk: Disk, current: int | None) -> None:
        """Every way to lose what is written at this moment."""
        for choice in choices(disk.pending, current, 6, self._source):
            self.cases += 1
            problem = self._problem(disk.survivors(choice))
            if problem is not None:
                self.problems.append(f"{choice_text(choice)}: {problem}")

    def _problem(self, disk: Disk) -> str | None:
        assert self.acknowledged is not None
        assert self.next is not None
        device = DiskDevice(disk)
        try:
            found = finished(self._backend(device).load())
        except NoBootRecord as error:
            return str(error)
        after = self.next(self.acknowledged)
        if found.sequence == self.acknowledged.sequence:
            expected = self.acknowledged
        else:
            expected = self._stored(after)
        if found != expected or problem_of(found) is not None:
            return f"{found}, neither {self.acknowledged} nor its successor"
        boot = self._backend(device)
        again, _ = attempt(finished(boot.load()))
        stored = finished(boot.store(again))
        left = DiskDevice(device.disk.survivors(NOTHING))
        if finished(self._backend(left).load()) != stored:
            return "what is stored after the cut is not found after the next one"
        return None

    def _stored(self, record: BootRecord) -> BootRecord:
        other = self._backend(DiskDevice(Disk(BOOT_BLOCKS)))
        kept = finished(other.create(record))
        return replace(kept, sequence=record.sequence + 1)


def walk(backend: str, steps: tuple[Step, ...]) -> Cuts:
    disk = Disk(BOOT_BLOCKS)
    cuts = Cuts(BACKENDS[backend])
    _ = finished(BACKENDS[backend](DiskDevice(disk)).create(new()))
    boot = BACKENDS[backend](Watched(disk, cuts.on_write))
    record = finished(boot.load())
    for step in steps:
        cuts.acknowledged, cuts.next = record, step
        record = finished(boot.store(step(record)))
    return cuts


@pytest.mark.parametrize("name", TRANSITIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_power_cut_leaves_the_record_before_or_the_one_after(backend: str, name: str) -> None:
    cuts = walk(backend, TRANSITIONS[name])

    assert cuts.problems == []
    assert cuts.cases >= 20 * len(TRANSITIONS[name])


@pytest.mark.parametrize(
    ("backend", "target", "name", "change"),
    [
        ("block", block, "COPIES", (0, 0)),
        ("block", block, "crc32c", lambda _: 0),
        ("environment", environment, "ENVIRONMENT_COPIES", (0, 0)),
        ("environment", environment, "_is_newer", lambda second, first: second.flags > 0),
    ],
    ids=["one copy", "no checksum", "one environment", "always the second"],
)
def test_a_store_without_one_of_its_guards_is_found_out(
    monkeypatch: pytest.MonkeyPatch, backend: str, target: object, name: str, change: object
) -> None:
    monkeypatch.setattr(target, name, change)

    assert walk(backend, (*TRANSITIONS["stage"], tried, tried)).problems
