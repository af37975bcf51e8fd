"""updated's engine beside a model that knows one thing: which set was proven good, and its data.

Whatever is asked for, in whatever order, with restarts and power cuts between: the device boots the
set that was last committed, or one on trial; its slot is whole; and outside of a trial the data are
what the last committed set made of them.
"""

from hashlib import sha256
from random import Random  # noqa: TID251 (what a power cut leaves is drawn from the rule's seed)

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from nexus.bootctl import BlockBoot, SlotName, SlotState
from nexus.drivers import finished
from nexus.protocols.updated import Phase, Slot, UpdatedStatus
from nexus.services.updated.engine import NAMES
from nexus.services.updated.faults import Declined
from nexus.services.updated.kept import HISTORY, TRANSFER, TRUST
from tests.fakes.diskdevice import DiskDevice
from tests.fakes.updates import AREA, ASKER, Device, Made

MIGRATED = b"migrated by "


class Engine(RuleBasedStateMachine):
    """One device, and who stages, switches, commits and goes back as it likes."""

    def __init__(self) -> None:
        super().__init__()
        self.device = Device()
        self.version = 10
        self.schema = 1
        self.made: dict[bytes, Made] = {self.device.first.digest: self.device.first}
        self.schemas = {self.device.first.digest: 1}
        self.current: Made | None = None
        self.good = self.device.first.digest
        self.data = self.device.memory.data
        _ = self.device.boot()

    # ------------------------------------------------------------------ what it is asked for

    @rule(raises=st.booleans(), size=st.sampled_from([600, 3000]), whole=st.booleans())
    def begin(self, raises: bool, size: int, whole: bool) -> None:
        """The next update, or all of it at once; its data may be of the next schema."""
        self.version += 1
        schema = self.schemas[self.good] + raises
        made = self.device.maker.update(self.version, size=size, schemas={AREA: schema})
        self.made[made.digest] = made
        self.schemas[made.digest] = schema
        try:
            begun = self.device.begin(made)
        except Declined as declined:
            assert self.unsettled, declined
            return
        assert not self.unsettled
        assert (begun.digest, begun.offset, begun.staged) == (made.digest, 0, False)
        assert NAMES[begun.slot] is not self.device.engine.running
        self.current = made
        if whole:
            self.device.send(made.data)
            self.finish()

    @precondition(lambda self: self.current is not None)
    @rule()
    def begin_again(self) -> None:
        """The same update: it goes on, or is staged already, or is what runs."""
        assert self.current is not None
        try:
            begun = self.device.begin(self.current)
        except Declined as declined:
            assert self.unsettled or declined.status is UpdatedStatus.ALREADY_RUNS, declined
            return
        assert begun.offset <= len(self.current.data)

    @precondition(lambda self: self.current is not None)
    @rule(pieces=st.integers(1, 8), flips=st.integers(0, 4))
    def send(self, pieces: int, flips: int) -> None:
        """Some more of the file, now and then with a flipped bit."""
        assert self.current is not None
        data = bytearray(self.current.data)
        if flips == 4:
            data[len(data) // 2] ^= 4
        offset = self.device.engine.transfer().offset
        for at in range(offset, min(len(data), offset + 512 * pieces), 512):
            try:
                _ = self.device.take(at, bytes(data[at : at + 512]))
            except Declined as declined:
                assert declined.status is UpdatedStatus.NOT_STAGING
                return

    @rule()
    def sync(self) -> None:
        """Keep how far it is."""
        finished(self.device.engine.sync())

    @rule()
    def finish(self) -> None:
        """What is staged is whole in its slot, to the byte."""
        try:
            staged = self.device.finish()
        except Declined:
            return
        made = self.made[staged.digest]
        assert self.device.slot_bytes(NAMES[staged.slot])[: len(made.data)] == made.data

    @precondition(lambda self: self.standby is SlotState.STAGED)
    @rule(tries=st.integers(1, 2))
    def switch(self, tries: int) -> None:
        """Only what is staged, and with a copy of what it migrates."""
        record = self.device.engine.record
        info = record.slot(record.standby)
        try:
            switched = finished(self.device.engine.switch(info.digest, tries, ASKER))
        except Declined as declined:
            assert declined.status is not UpdatedStatus.IO_ERROR
            return
        migrates = self.schemas[info.digest] > self.schemas[self.good]
        assert bool(switched.snapshot) == migrates

    @precondition(lambda self: self.on_trial)
    @rule()
    def commit(self) -> None:
        """What is on trial, and nothing else."""
        engine = self.device.engine
        name = engine.running
        digest = engine.record.slot(name).digest
        committed = finished(engine.commit(name, digest, 5, ASKER))
        assert committed.nonce == 5
        assert NAMES[committed.slot] is name
        self.good, self.data = digest, self.device.memory.data

    @precondition(lambda self: self.unsettled or self.standby is SlotState.GOOD)
    @rule(slot=st.sampled_from([Slot.A, Slot.B]))
    def rollback(self, slot: Slot) -> None:
        """Leave a trial or a switch, or go back to what was good before."""
        try:
            back = finished(self.device.engine.rollback(NAMES[slot], ASKER))
        except Declined as declined:
            assert declined.status in (
                UpdatedStatus.NO_TARGET,
                UpdatedStatus.SCHEMA_OLDER,
                UpdatedStatus.RESTORING,
            )
            return
        record = self.device.engine.record
        assert NAMES[back.slot] is record.active
        self.good = record.slot(record.active).digest

    # ------------------------------------------------------------------ what happens to it

    @rule()
    def reboot(self) -> None:
        """In order; a set on trial migrates the data it knows a newer schema of."""
        slot = self.device.boot()
        self._run(slot)

    @rule()
    def restart(self) -> None:
        """updated alone begins anew."""
        _ = self.device.start()

    @rule(seed=st.integers(0, 1 << 16))
    def power_cut(self, seed: int) -> None:
        """Of what was not flushed any part may be lost."""
        source = Random(seed)
        device = self.device
        device.boot_disk = device.boot_disk.survivors(device.boot_disk.drawn_choice(source))
        device.slot_disks = {
            name: disk.survivors(disk.drawn_choice(source))
            for name, disk in device.slot_disks.items()
        }
        self._run(device.boot())

    def _run(self, slot: SlotName) -> None:
        digest = self.device.engine.record.slot(slot).digest
        if self.schemas[digest] > self.schemas[self.good]:
            self.device.memory.data = MIGRATED + str(self.schemas[digest]).encode()

    # ------------------------------------------------------------------ what is always so

    @property
    def standby(self) -> SlotState:
        record = self.device.engine.record
        return record.slot(record.standby).state

    @property
    def on_trial(self) -> bool:
        record = self.device.engine.record
        return record.trying is not None and record.slot(record.trying).state is SlotState.TRYING

    @property
    def unsettled(self) -> bool:
        record = self.device.engine.record
        is_other = self.device.engine.running is not record.active
        return record.trying is not None or record.restore or is_other

    @invariant()
    def the_good_set_stands_whole_in_its_slot(self) -> None:
        """It is what is booted when nothing is tried."""
        record = finished(BlockBoot(DiskDevice(self.device.boot_disk)).load())
        info = record.slot(record.active)
        assert record == self.device.engine.record
        assert (info.digest, info.state) == (self.good, SlotState.GOOD)
        content = self.device.slot_bytes(record.active)[: info.size]
        assert sha256(content).digest() == info.digest

    @invariant()
    def what_can_be_booted_was_verified(self) -> None:
        """Also in the other slot."""
        record = self.device.engine.record
        info = record.slot(record.standby)
        if info.is_bootable:
            content = self.device.slot_bytes(record.standby)[: info.size]
            assert sha256(content).digest() == info.digest

    @invariant()
    def outside_of_a_trial_the_data_are_those_of_the_good_set(self) -> None:
        """A copy is there exactly as long as there may be a way back."""
        record = self.device.engine.record
        if self.device.engine.running is record.active and not record.restore:
            assert self.device.memory.data == self.data
        assert set(self.device.memory.copies) == ({record.snapshot} - {0})

    @invariant()
    def nothing_else_is_kept(self) -> None:
        """Neither of transfers that ended, nor of sets that are gone."""
        kept = {TRUST, HISTORY}
        if self.device.engine.transfer().phase in (Phase.RECEIVING, Phase.VERIFYING):
            kept |= {TRANSFER}
        assert set(self.device.memory.values) <= kept


Engine.TestCase.settings = settings(max_examples=60, stateful_step_count=40)
TestEngine = Engine.TestCase
