"""timed: timers that fire, coalesced by the window of the caller's scheduling class.

Owns the table of live timers, which is lost with it: a client that meets a new instance registers
again. Class and identity of a caller are what the kernel says of its message; what a payload
claims is never looked at. It trusts nobody, and no client can make it wait for another.
"""

from typing import Final, assert_never

from nexus.abi import LinkId, Nanos, QosClass
from nexus.protocols.timed import (
    PROTOCOL,
    WINDOWS,
    Cancel,
    Cancelled,
    Fired,
    Register,
    Seen,
    Sleep,
    TimedRequest,
    TimedStatus,
    Timer,
    Wait,
    Whoami,
    Woken,
)
from nexus.runtime import Call, Deferred
from nexus.runtime.program import Context, program_of
from nexus.services.timed.table import Entry, Owner, TimerTable, coalesce


class Timed:
    """Serves nexus.protocols.timed."""

    def __init__(self) -> None:
        self._table: TimerTable[Deferred] = TimerTable()

    def handle(
        self, call: Call, request: TimedRequest
    ) -> Timer | Cancelled | Fired | Seen | Deferred:
        """The reply, now or later."""
        self._table.meet(self._owner_of(call))
        match request:
            case Register():
                return self._register(call, request)
            case Cancel():
                return self._cancel(call, request)
            case Sleep():
                return self._sleep(call, request)
            case Wait():
                return self._wait(call, request)
            case Whoami():
                return self._whoami(call, request)
            case _:
                assert_never(request)

    def next_time(self) -> Nanos | None:
        """When the next timer is due."""
        return self._table.next_time()

    def on_time(self, now: Nanos) -> None:
        """Fire what is due."""
        for entry in self._table.due(now):
            self._fire(entry, now)

    def on_gone(self, link: LinkId) -> None:
        """The holder of a link is gone: what it asked for over that link is freed."""
        self._table.forget_link(link)

    def facts(self) -> dict[str, int]:
        """What the table holds, and what it had to drop."""
        return {
            "timers": len(self._table),
            "sleepers": self._table.sleepers,
            "owners": self._table.owners,
            "kept": self._table.kept,
            "pushed_out": self._table.pushed_out,
        }

    def ready(self) -> bool:
        """timed needs nothing but its endpoint."""
        return True

    def _register(self, call: Call, request: Register) -> Timer:
        entry = self._set(call, Nanos(request.deadline), sleeper=None)
        return Timer(timer_id=entry.timer_id, deadline=entry.deadline)

    def _sleep(self, call: Call, request: Sleep) -> Deferred:
        deadline = Nanos(request.deadline)
        if self._coalesced(call, deadline) > call.deadline:
            raise call.refuse(TimedStatus.INVALID_ARGS)  # its answer would come too late to count
        deferred = call.defer()
        _ = self._set(call, deadline, sleeper=deferred)
        return deferred

    def _cancel(self, call: Call, request: Cancel) -> Cancelled:
        entry = self._table.cancel(self._owner_of(call), request.timer_id)
        if entry is None:
            raise call.refuse(TimedStatus.NOT_FOUND)
        self._turn_away(entry.waiter)
        return Cancelled(timer_id=entry.timer_id)

    def _wait(self, call: Call, request: Wait) -> Fired | Deferred:
        owner = self._owner_of(call)
        firing = self._table.take_kept(owner, request.timer_id)
        if firing is not None:
            return Fired(timer_id=request.timer_id, deadline=firing.deadline, now=firing.now)
        entry = self._table.find(owner, request.timer_id)
        if entry is None:
            raise call.refuse(TimedStatus.NOT_FOUND)
        deferred = call.defer()
        self._turn_away(entry.waiter)
        entry.waiter = deferred
        return deferred

    def _whoami(self, call: Call, request: Whoami) -> Seen:
        return Seen(
            pid=self._pid_of(call, request),
            service=self._service_of(call, request),
            generation=call.sender.generation,
            qos=self._class_of(call),
        )

    def _set(self, call: Call, deadline: Nanos, *, sleeper: Deferred | None) -> Entry[Deferred]:
        """Put a timer or a sleep into the table, or refuse."""
        result = self._table.add(
            self._owner_of(call),
            call.link,
            deadline,
            self._coalesced(call, deadline),
            call.now,
            sleeper=sleeper,
        )
        if isinstance(result, TimedStatus):
            raise call.refuse(result)
        return result

    def _fire(self, entry: Entry[Deferred], now: Nanos) -> None:
        """Answer who waits; keep the firing for a later Wait if nobody does any more."""
        waiter = entry.waiter
        if waiter is None or waiter.deadline <= now:
            if not entry.sleeps:
                self._table.keep(entry, now)
        elif entry.sleeps:
            waiter.reply(Woken(deadline=entry.deadline, now=now))
        else:
            waiter.reply(Fired(timer_id=entry.timer_id, deadline=entry.deadline, now=now))

    def _turn_away(self, waiter: Deferred | None) -> None:
        if waiter is not None:
            waiter.refuse(TimedStatus.CANCELLED)

    # What follows decides by the kernel's word; each is small because a ladder row breaks it.

    def _owner_of(self, call: Call) -> Owner:
        """Whose timers these are."""
        return Owner(call.sender.service, call.sender.generation)

    def _class_of(self, call: Call) -> QosClass:
        """The class whose window counts."""
        return call.sender.qos

    def _coalesced(self, call: Call, deadline: Nanos) -> Nanos:
        """The deadline, rounded up to the window of the caller's class."""
        return coalesce(deadline, WINDOWS[self._class_of(call)])

    def _pid_of(self, call: Call, request: Whoami) -> int:
        """The pid to echo; `request` claims one and is not asked."""
        del request
        return call.sender.pid

    def _service_of(self, call: Call, request: Whoami) -> int:
        """The service id to echo; `request` claims a name and is not asked."""
        del request
        return call.sender.service


def made(_context: Context) -> Timed:
    """timed, which has no settings; its log and its metrics are the runtime's to drive."""
    return Timed()


main: Final = program_of(made, PROTOCOL)
