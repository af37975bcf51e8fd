"""The watchdog: is each service ready in time, and does it still do its work?

    UP --Health until OK, GetStatus--> well --every probe_every: Health--> well
       \\--readiness deadline--> late         \\--not OK within probe_answer, or too many
           \\--a second one--> killed              requests expired: a miss
                                                     \\--probe_misses in a row--> killed

With `probe_every` 0 a service is asked until its first OK and never again, and not killed for
being late. Who waits in AwaitReady listens to nothing else and is not asked.
"""

from typing import TYPE_CHECKING, Any, Final

from nexus.abi import Nanos
from nexus.init.asking import Done
from nexus.init.reasons import Reason
from nexus.init.record import Record
from nexus.protocols.init import Health
from nexus.protocols.meta import GetStatus, Healthy, ServiceStatus
from nexus.protocols.meta import Health as Probe

if TYPE_CHECKING:
    from nexus.init.supervisor import Supervisor

PROBE_PAUSE: Final = Nanos(20_000_000)  # ns; between probes of a service that is not ready yet,
# and between tries to send a probe to one whose queue is full


class Watch:
    """Asks every service for its health, and judges the answers."""

    def __init__(self, init: "Supervisor") -> None:
        self._init = init

    # ------------------------------------------------------------------ times

    def late_time(self, record: Record, since: Nanos) -> Nanos:
        """When a service that was not ready at `since` is late."""
        return Nanos(since + record.planned.health_deadline)

    def _since(self, record: Record) -> Nanos:
        """The readiness deadline counts from the start, or from a later `init: ready`; and anew
        from its first OK, since only then it is asked for what is missing still."""
        times = (record.started, self._init.ready_at, record.answered)
        return max(time for time in times if time is not None)

    def _unready_time(self, record: Record) -> Nanos:
        """When a late service is killed: the second deadline, counted once all it uses is well."""
        used = (self._init.records[link.server] for link in record.planned.uses if link.sync)
        since = max((each.well_since or 0 for each in used), default=0)
        late = self.late_time(record, Nanos(max(since, self._since(record))))
        return Nanos(late + record.planned.health_deadline)

    def _may_be_killed(self, record: Record) -> bool:
        """Whether it is watched, and all that it waits for is well: else it is not to blame."""
        return record.planned.probe_every > 0 and all(
            self._init.records[link.server].well_since is not None
            for link in record.planned.uses
            if link.sync
        )

    def times(self, record: Record) -> list[Nanos]:
        """When this service needs to be looked at next."""
        times = [] if record.probe_again is None else [record.probe_again]
        if not record.is_settled and record.first_started is not None and not record.is_out:
            times.append(self.late_time(record, record.first_started))
        if self._is_awaited(record):
            if record.health is Health.UNKNOWN:
                times.append(self.late_time(record, self._since(record)))
            elif self._may_be_killed(record):
                times.append(self._unready_time(record))
        return times

    def _is_awaited(self, record: Record) -> bool:
        """Whether the first OK of this instance is still to come."""
        unready = record.is_up and record.well_since is None and not record.kill_reason
        return unready and not self._waits_for_ready(record)

    def _waits_for_ready(self, record: Record) -> bool:
        return record.name in self._init.desk.waiting_for_ready

    async def on_time(self, record: Record) -> None:
        """Do what is due for this service."""
        now, heard = self._init.now, self._init.hearing.until
        if not record.is_settled and record.first_started is not None:
            record.is_settled = heard >= self.late_time(record, record.first_started)
        if record.probe_again is not None and now >= record.probe_again:
            await self.probe(record)
        if not self._is_awaited(record):
            return
        if record.health is Health.UNKNOWN:
            if heard >= self.late_time(record, self._since(record)):
                record.health = Health.LATE
                await self._init.say(
                    f"init: health {record.name} late", generation=record.generation
                )
        elif self._may_be_killed(record) and heard >= self._unready_time(record):
            await self._init.kill(record, Reason.NOT_READY)

    # ------------------------------------------------------------------ the first probe

    async def probe(self, record: Record) -> None:
        """Ask the service whether it does its work. One question at a time."""
        record.probe_again = None
        if record.probing or not record.is_up or record.kill_reason:
            return
        if record.well_since is not None:
            await self._probe_later(record)
            return

        async def on_health(reply: Any, nonce: int) -> None:
            await self._on_first_health(record, reply, nonce)

        await self._question(record, Probe(), on_health)

    async def _question(self, record: Record, request: Any, done: Done) -> None:
        """Ask, and if there is no room for the question ask again a little later."""
        deadline = Nanos(self._init.now + record.planned.health_deadline)
        record.probing = await self._init.ask(record, request, deadline, done)
        if not record.probing:
            record.probe_again = Nanos(self._init.now + PROBE_PAUSE)

    async def _on_first_health(self, record: Record, reply: Any, nonce: int) -> None:
        record.probing = False
        if not record.lives:
            return
        if not self._is_healthy(record, reply):
            record.probe_again = Nanos(self._init.now + PROBE_PAUSE)
            return
        record.probe_nonce = nonce
        record.expired = reply.expired
        record.answered = self._init.now if record.answered is None else record.answered
        await self._init.authority.on_health(record)
        if self._waits_for_ready(record):
            await self._on_well(record, {})  # it listens to nothing but that answer now
            return

        async def on_status(status: Any, _nonce: int) -> None:
            await self._on_first_status(record, status)

        await self._question(record, GetStatus(), on_status)

    def _is_healthy(self, record: Record, reply: Any) -> bool:
        """Whether the answer is of this instance, started as it was."""
        return (
            isinstance(reply, Healthy)
            and reply.generation == record.generation
            and reply.digest == record.argument_digest
        )

    async def _on_first_status(self, record: Record, status: Any) -> None:
        """The service answered its probe and says how it is."""
        record.probing = False
        if not record.lives:
            return
        if not isinstance(status, ServiceStatus):
            record.probe_again = Nanos(self._init.now + PROBE_PAUSE)
            return
        await self._on_well(record, {fact.name: fact.value for fact in status.facts})

    async def _on_well(self, record: Record, facts: dict[str, int]) -> None:
        """The probe is answered, by this instance, with its nonce."""
        record.health = Health.OK
        record.well_since = self._init.now
        record.is_settled = True
        self._plan_next(record)
        await self._init.say(
            f"init: health {record.name} ok",
            nonce=record.probe_nonce,
            generation=record.generation,
            facts=facts,
        )

    # ------------------------------------------------------------------ later probes

    def _plan_next(self, record: Record) -> None:
        record.probe_begun = None
        every = record.planned.probe_every
        is_asked = every > 0 and not self._init.stops.is_stopping(record)
        record.probe_again = Nanos(self._init.now + every) if is_asked else None

    async def _probe_later(self, record: Record) -> None:
        """Probe a service that was well; a probe that finds no room in time is a miss too."""
        if self._waits_for_ready(record):
            self._plan_next(record)
            return
        now = self._init.now
        if record.probe_begun is None:
            record.probe_begun = now
        room_until = Nanos(record.probe_begun + record.planned.probe_answer)
        # Init itself may have been held up since the last try: what fits now has its whole time.
        until = room_until if now < room_until else Nanos(now + record.planned.probe_answer)

        async def on_health(reply: Any, _nonce: int) -> None:
            await self._on_later_health(record, reply, until)

        record.probing = await self._init.ask(record, Probe(), until, on_health)
        if record.probing:
            return
        if now >= room_until:
            await self._on_miss(record, Reason.HANG)
            return
        record.probe_again = Nanos(min(now + PROBE_PAUSE, room_until))

    async def _on_later_health(self, record: Record, reply: Any, deadline: Nanos) -> None:
        record.probing = False
        if not record.is_up or record.kill_reason:
            return
        if self._is_healthy(record, reply):
            expired = reply.expired - record.expired
            record.expired = reply.expired
            if record.planned.late_max and expired > record.planned.late_max:
                await self._on_miss(record, Reason.LATE)
                return
            record.misses = 0
            record.health = Health.OK
            self._plan_next(record)
            await self._init.authority.on_health(record)
        elif self._waits_for_ready(record):
            self._plan_next(record)
        else:
            silent = self._init.hearing.until >= deadline
            await self._on_miss(record, Reason.HANG if silent else Reason.NOT_READY)

    async def _on_miss(self, record: Record, reason: Reason) -> None:
        """A probe was not answered as it should; the last one that may be is the end."""
        record.misses += 1
        record.health = Health.LATE
        self._plan_next(record)
        await self._init.authority.on_doubt(record)
        # Going down, a service has the deadline of its Stop, and no other.
        if record.misses >= record.planned.probe_misses and not self._init.is_going_down:
            await self._init.kill(record, reason)
