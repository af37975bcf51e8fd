"""The trial of a slot: is the system that was booted out of it well, and does it stay so?

    judging --everybody well for trial_settle--> reporting --updated committed it--> over
       |                                             |
       |--a service late, crashed, unhealthy, hung---|
       \\--the trial's deadline----------------------/--> failed: remembered, said, shut down

Nobody's word counts but what the services answer to init's own probes. The cause of a failed trial
is in the boot memory before anything is stopped for it, so that the loader finds it whatever comes.
A boot that is no trial is judged by nobody here.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

import msgspec

from nexus.abi import Entropy, ExitInfo, Nanos
from nexus.bootctl.handover import (
    FAILED_DETAIL_SIZE_MAX,
    SlotBoot,
    TrialFailure,
    TrialReason,
)
from nexus.init.reasons import UNCOUNTED, Reason
from nexus.init.record import Record
from nexus.protocols.init import Health, TaskState, TrialState
from nexus.protocols.updated import SERVICE_NAME as UPDATED_PROGRAM
from nexus.protocols.updated import Committed, ReportHealth, Slot

if TYPE_CHECKING:
    from nexus.init.supervisor import Supervisor

ENDS_MAX: Final = 2  # ends of one service that a trial forgives, those by a busy machine's watchdog
# among them: a third is no accident
REPORT_MAX: Final = Nanos(5_000_000_000)  # ns for updated's answer: two durable writes, and time
AGAIN: Final = Nanos(250_000_000)  # ns until updated is told again; it may have restarted
NONCE_SIZE: Final = 8  # bytes
MILLISECOND: Final = 1_000_000  # ns
SLOTS: Final = {"a": Slot.A, "b": Slot.B}

_KINDS: Final = {
    Reason.HANG: TrialReason.HUNG,
    Reason.LATE: TrialReason.HUNG,
    Reason.NO_ECHO: TrialReason.NOT_READY,
    Reason.NOT_READY: TrialReason.NOT_READY,
}
"""What an end says about a service, by init's word for it; any other is a crash."""


class Trial:
    """Judges a boot on trial; does nothing in any other."""

    def __init__(self, init: "Supervisor", slot_boot: SlotBoot | None) -> None:
        self._init = init
        self._boot = slot_boot
        on_trial = slot_boot is not None and slot_boot.trial
        self.state = TrialState.JUDGING if on_trial else TrialState.NONE
        self.failure: TrialFailure | None = None
        self._was_well: set[str] = set()
        self._unwell_since: dict[str, Nanos] = {}  # who was well in this boot, and ended then
        self._ends: dict[str, int] = {}
        self._last: dict[str, tuple[TrialReason, str]] = {}  # how the latest of these ends was
        self._nonce = 0
        self._report_at: Nanos | None = None  # when updated is to be told, or told again
        self._is_told = False  # its answer is awaited
        self._refusals: set[str] = set()  # those that were said

    @property
    def is_open(self) -> bool:
        """Whether this boot is on trial and not judged yet."""
        return self.state is TrialState.JUDGING and not self._init.is_going_down

    @property
    def is_counted(self) -> bool:
        """Whether the slot's tries count this boot, and not init's memory of unstable ones."""
        return self._boot is not None and self._boot.trial

    @property
    def slot_boot(self) -> SlotBoot | None:
        """What a service that starts now is told: with its commit a trial is over, and the copy of
        the data given up."""
        if self._boot is None or self.state is not TrialState.COMMITTED:
            return self._boot
        return msgspec.structs.replace(self._boot, trial=False, snapshot=0)

    # ------------------------------------------------------------------ times

    @property
    def _deadline(self) -> Nanos:
        assert self._boot is not None, "only a trial has one"
        return Nanos(self._init.boot.now + self._boot.deadline)

    def _awaited(self) -> Iterator[Record]:
        """Who has to be well: what starts with the system and is to run."""
        waiting = self._init.desk.waiting_for_ready
        for record in self._init.records.values():
            out = record.is_demanded or record.state in (TaskState.LEFT_OUT, TaskState.STOPPED)
            if not out and record.name not in waiting:  # who waits for the others is well
                yield record

    def _is_well(self, record: Record) -> bool:
        return record.well_since is not None and record.health is Health.OK

    def _blame_time(self, record: Record) -> Nanos | None:
        """When a service that is not well has missed its readiness deadline; None if it waits.

        Counted from its first start, or its end after it had been well; anew from its first OK, as
        the watchdog does; and not before all that it waits for is well, for until then it is not to
        blame.
        """
        since = self._unwell_since.get(record.name, record.first_started)
        if since is None:  # never started: its turn has not come, or a grant is not decided
            return None
        since = max(since, record.answered or since)
        if record.name in self._was_well:  # it misses a probe: that is for the watchdog to judge
            return None
        for link in record.planned.uses:
            used = self._init.records[link.server]
            if link.sync and not self._is_well(used):
                return None
            if link.sync:
                since = max(since, used.well_since or since)
        return Nanos(since + record.planned.health_deadline)

    def _settled_time(self) -> Nanos | None:
        """When everybody has been well for long enough; None while somebody is not."""
        latest = self._init.boot.now
        for record in self._awaited():
            if not self._is_well(record):
                return None
            latest = max(latest, record.well_since or latest)
        return Nanos(latest + self._init.plan.trial_settle)

    def next_time(self) -> Nanos | None:
        """When there is something to judge or to report."""
        if not self.is_open:
            return None
        times = [self._deadline]
        blames = [self._blame_time(each) for each in self._awaited() if not self._is_well(each)]
        times += [time for time in blames if time is not None]
        settled = self._settled_time()
        if settled is not None and not self._is_told and self._init.now < self._deadline:
            times.append(settled if self._report_at is None else max(settled, self._report_at))
        return min(times)

    async def on_time(self) -> None:
        """Judge who is late, and the whole; report when everybody is well."""
        if not self.is_open:
            return
        now, heard = self._init.now, self._init.hearing.until
        for record in self._awaited():
            if self._is_well(record):
                self._was_well.add(record.name)
                _ = self._unwell_since.pop(record.name, None)
                continue
            blame = self._blame_time(record)
            if blame is not None and heard >= blame:
                await self._fail_late(record)
                return
        if heard >= self._deadline:
            await self._fail_deadline()
            return
        settled = self._settled_time()
        if settled is None or heard < settled or self._is_told or now >= self._deadline:
            return
        if self._report_at is None or now >= self._report_at:
            await self._report()

    # ------------------------------------------------------------------ what happens

    async def on_end(self, record: Record, info: ExitInfo) -> None:
        """An instance ended and nobody wanted that."""
        if not self.is_open or record.is_demanded or record.reason in UNCOUNTED:
            return
        name = record.name
        how = f"signal {info.signal}" if info.signal else f"code {info.code}"
        kind = next((kind for word, kind in _KINDS.items() if record.reason == word), None)
        kind = kind or TrialReason.CRASHED
        if name in self._was_well:
            self._was_well.remove(name)
            self._unwell_since[name] = self._init.now
            kind = TrialReason.UNHEALTHY if kind is TrialReason.NOT_READY else kind
        self._ends[name] = self._ends.get(name, 0) + 1
        self._last[name] = kind, f"{record.reason}, {how}"
        if self._ends[name] > ENDS_MAX:
            await self._fail(name, kind, self._ends_text(name))

    async def on_exceeded(self, record: Record, why: str) -> bool:
        """A group ended more often than it may; whether that, or what was before, ends a trial."""
        if self.is_open:
            await self._fail(record.name, TrialReason.CRASHED, why)
        return self.state is TrialState.FAILED

    # ------------------------------------------------------------------ the verdict

    def _ends_text(self, name: str) -> str:
        return f"{name} ended {self._ends[name]} times, the last by {self._last[name][1]}"

    async def _fail_late(self, record: Record) -> None:
        """A readiness deadline passed; a service that keeps ending is told by how it ends."""
        limit = record.planned.health_deadline // MILLISECOND
        if record.name in self._ends:
            detail = f"{self._ends_text(record.name)}; it was not ready within {limit} ms"
            await self._fail(record.name, self._last[record.name][0], detail)
            return
        detail = f"{record.name} was not ready within its deadline of {limit} ms"
        if record.reason:
            detail += f": {record.reason}"
        await self._fail(record.name, TrialReason.NOT_READY, detail)

    async def _fail_deadline(self) -> None:
        """The whole took too long: the first that is not well is named, with what is known."""
        assert self._boot is not None, "only a trial has a deadline"
        limit = self._boot.deadline // MILLISECOND
        unwell = next((each for each in self._awaited() if not self._is_well(each)), None)
        if unwell is None:
            who, what = "", "everybody was well, and the commit was not durable"
            if self._refusals:
                what += f": {', '.join(sorted(self._refusals))}"
        else:
            who, what = unwell.name, f"{unwell.name} was not well"
            if who in self._ends:
                what = self._ends_text(who)
            elif unwell.reason:
                what += f": {unwell.reason}"
        await self._fail(who, TrialReason.DEADLINE, f"{what} {limit} ms after the start")

    async def _fail(self, service: str, reason: TrialReason, detail: str) -> None:
        """Remember why, say it, and end the boot in order."""
        init, boot = self._init, self._boot
        assert boot is not None, "only a trial fails"
        self.state = TrialState.FAILED
        self.failure = TrialFailure(
            slot=boot.slot,
            version=boot.version,
            attempt=boot.attempt,
            boot=init.memory.boot,
            at=init.now - init.boot.now,
            trace=init.asking.trace.hex(),
            service=service,
            reason=reason,
            detail=detail[:FAILED_DETAIL_SIZE_MAX],
        )
        await init.memory.on_trial_failed(self.failure)
        await init.say(
            f"init: slot failed (slot {boot.slot})",
            service=service,
            reason=reason,
            detail=self.failure.detail,
            version=boot.version,
            attempt=boot.attempt,
            trace=self.failure.trace,
        )
        init.shut_down(orderly=True)

    # ------------------------------------------------------------------ the report

    async def _report(self) -> None:
        """Tell updated, which commits; its word counts when it says that this is durable."""
        init, boot = self._init, self._boot
        assert boot is not None, "only a trial is reported"
        self._report_at = Nanos(init.now + AGAIN)
        record = next(
            (each for each in init.records.values() if each.planned.program == UPDATED_PROGRAM),
            None,
        )
        if record is None or not record.is_up:
            self._refusals.add("there is no updated")
            return
        if not self._nonce:
            self._nonce = int.from_bytes(await Entropy(NONCE_SIZE), "little") or 1
        request = ReportHealth(self._nonce, SLOTS[boot.slot], bytes.fromhex(boot.digest))

        async def on_answer(reply: Any, _nonce: int) -> None:
            await self._on_answer(reply)

        deadline = Nanos(min(init.now + REPORT_MAX, self._deadline))
        self._is_told = await init.ask(record, request, deadline, on_answer, refusals=True)

    async def _on_answer(self, reply: Any) -> None:
        self._is_told = False
        init, boot = self._init, self._boot
        assert boot is not None, "only a trial was reported"
        self._report_at = Nanos(init.now + AGAIN)
        if not self.is_open:
            return
        if (
            not isinstance(reply, Committed)
            or reply.nonce != self._nonce
            or reply.slot is not SLOTS[boot.slot]
            or reply.version != boot.version
        ):
            why = "another commit" if isinstance(reply, Committed) else _refusal_text(reply)
            if why not in self._refusals:
                self._refusals.add(why)
                await init.say("init: health not taken", why=why)
            return
        self.state = TrialState.COMMITTED
        await init.memory.on_committed()
        await init.say(
            f"init: health ok (slot {boot.slot})",
            nonce=self._nonce,
            version=boot.version,
            digest=boot.digest,
            attempt=boot.attempt,
            sequence=reply.sequence,
            services=[record.name for record in self._awaited()],
            trace=init.asking.trace.hex(),
        )


def _refusal_text(reply: Any) -> str:
    """Why there is no commit: the status of the refusal, or that nothing came in time."""
    return "no answer" if reply is None else f"updated refused it: {reply.name.lower()}"
