"""Boot control beside a dumb model: whatever is asked of it and wherever the power goes, one slot
boots that was verified, nothing is written over the last good one, and a commit stays."""

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from nexus.bootctl import (
    BootControl,
    BootRecord,
    BootRefused,
    Cause,
    SlotName,
    SlotState,
    attempt,
    commit,
    failed,
    problem_of,
    restored,
    rollback,
    staged,
    staging,
    switch,
)
from nexus.drivers import finished
from nexus.kernel.sim.disk import Disk
from nexus.proof.powercut import DiskDevice
from tests.fakes.bootrecords import BACKENDS, BOOT_BLOCKS, a_reason, a_set, new

A = SlotName.A


@dataclass
class Model:
    """What a person would write on paper."""

    content: dict[SlotName, int] = field(default_factory=lambda: {A: 1})  # whole verified sets
    good: int = 1  # the version that was last proven good and is not given up
    before: int | None = None  # the good one before it
    tried: int | None = None
    tries: int = 0
    was_booted: bool = False
    running: int = 1


class BootMachine(RuleBasedStateMachine):
    """One rule for each transition; each is stored and loaded again by another reader."""

    backend = "block"

    @initialize()
    def provision(self) -> None:
        self.disk = Disk(BOOT_BLOCKS)
        self.boot: BootControl = BACKENDS[self.backend](DiskDevice(self.disk))
        self.record = finished(self.boot.create(new()))
        self.model = Model()
        self.next_version = 2

    def change(self, step: Callable[[BootRecord], BootRecord], *, allowed: bool) -> bool:
        """Make it if the model allows it; that it is refused if not."""
        try:
            changed = step(self.record)
        except BootRefused:
            assert not allowed, "the model allows it"
            return False
        assert allowed, "the model refuses it"
        self.record = finished(self.boot.store(changed))
        return True

    @rule()
    def stage(self) -> None:
        allowed = self.model.tried is None and not self.record.restore
        if self.change(staging, allowed=allowed):
            standby = self.record.standby
            assert self.model.content.get(standby) != self.model.good
            self.model.content.pop(standby, None)
            self.model.before = None

    @rule()
    def call_it_staged(self) -> None:
        standby = self.record.standby
        is_empty = self.record.slot(standby).state is SlotState.EMPTY
        allowed = self.model.tried is None and not self.record.restore and is_empty
        version = self.next_version
        if self.change(lambda it: staged(it, a_set(version)), allowed=allowed):
            self.model.content[standby] = version
            self.next_version += 1

    @rule(tries=st.integers(1, 3), snapshot=st.integers(0, 1))
    def switch(self, tries: int, snapshot: int) -> None:
        standby = self.record.standby
        is_staged = self.record.slot(standby).state is SlotState.STAGED
        allowed = self.model.tried is None and not self.record.restore and is_staged
        reason = a_reason(Cause.SWITCHED, standby, self.record)
        if self.change(lambda it: switch(it, tries, reason, snapshot=snapshot), allowed=allowed):
            self.model.tried = self.model.content[standby]
            self.model.tries, self.model.was_booted = tries, False

    @rule()
    def boot_it(self) -> None:
        record, slot = attempt(self.record)
        self.record = finished(self.boot.store(record))
        model = self.model
        if model.tried is not None and model.tries == 0:
            model.tried, model.was_booted = None, False
        elif model.tried is not None:
            model.tries -= 1
            model.was_booted = True
        expected = model.good if model.tried is None else model.tried
        model.running = model.content[slot]
        assert model.running == expected

    @rule()
    def commit(self) -> None:
        slot = self.record.trying or self.record.active
        reason = a_reason(Cause.COMMITTED, slot, self.record)
        allowed = self.model.tried is not None and self.model.was_booted
        if self.change(lambda it: commit(it, slot, reason), allowed=allowed):
            assert self.model.tried is not None
            self.model.before, self.model.good = self.model.good, self.model.tried
            self.model.tried = None

    @rule()
    def fail(self) -> None:
        slot = self.record.trying or self.record.active
        reason = a_reason(Cause.CRASHED, slot, self.record)
        allowed = self.model.tried is not None and self.model.was_booted
        _ = self.change(lambda it: failed(it, reason), allowed=allowed)

    @rule()
    def go_back(self) -> None:
        model = self.model
        slot = self.record.trying or self.record.active
        reason = a_reason(Cause.GIVEN_UP, slot, self.record)
        goes = model.before is not None and not self.record.restore
        if self.change(lambda it: rollback(it, reason), allowed=model.tried is not None or goes):
            if model.tried is None:
                assert model.before is not None
                model.good, model.before = model.before, model.good
            model.tried = None

    @rule()
    def restore(self) -> None:
        _ = self.change(restored, allowed=self.record.restore)

    @rule()
    def cut_the_power(self) -> None:
        self.disk = Disk(BOOT_BLOCKS, self.disk.durable_image())
        self.boot = BACKENDS[self.backend](DiskDevice(self.disk))
        assert finished(self.boot.load()) == self.record

    @invariant()
    def another_reader_finds_the_same(self) -> None:
        found = finished(BACKENDS[self.backend](DiskDevice(self.disk)).load())
        assert found == self.record
        assert problem_of(found) is None

    @invariant()
    def the_last_good_set_stands_where_it_is_booted_from(self) -> None:
        assert self.model.content[self.record.active] == self.model.good
        assert self.record.slot(self.record.active).version == self.model.good
        assert self.record.slot(self.record.active).state is SlotState.GOOD


class EnvironmentMachine(BootMachine):
    """The same in a U-Boot environment."""

    backend = "environment"


@pytest.mark.parametrize("machine", [BootMachine, EnvironmentMachine])
def test_boot_control_agrees_with_its_model(machine: type[BootMachine]) -> None:
    run_state_machine_as_test(machine, settings=settings(max_examples=40, stateful_step_count=40))
