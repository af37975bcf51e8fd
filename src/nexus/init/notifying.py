"""What the service manager outside is told, in the words of sd_notify(3); without one, nobody."""

from typing import TYPE_CHECKING, Final

from nexus.abi import NOTIFY_SIZE_MAX, Nanos, Notify
from nexus.protocols.init import Health, SystemState, TaskState

if TYPE_CHECKING:
    from nexus.init.supervisor import Supervisor

PINGS_PER_WATCHDOG: Final = 2  # sd_watchdog_enabled(3): notify at half of the interval


class Notifier:
    """READY=1 once, STATUS= when it changes, WATCHDOG=1 in time, STOPPING=1 at the end."""

    def __init__(self, init: "Supervisor", watchdog: Nanos | None) -> None:
        self._init = init
        self._ping_every = None if watchdog is None else Nanos(watchdog // PINGS_PER_WATCHDOG)
        self._ping_due = init.now
        self._is_ready = False
        self._is_stopping = False
        self._status = ""

    def next_time(self) -> Nanos | None:
        """When the next sign of life is due."""
        return None if self._ping_every is None else self._ping_due

    async def on_time(self) -> None:
        """Tell what has changed since the last time."""
        init = self._init
        if self._ping_every is not None and init.now >= self._ping_due:
            self._ping_due = Nanos(init.now + self._ping_every)
            await Notify("WATCHDOG=1")
        if init.is_going_down and not self._is_stopping:
            self._is_stopping = True
            await Notify("STOPPING=1")
        if not self._is_ready and not init.is_going_down and self._all_well():
            self._is_ready = True
            await Notify("READY=1")
        status = self._status_text()
        if status != self._status:
            self._status = status
            await Notify(f"STATUS={status}".encode()[:NOTIFY_SIZE_MAX].decode(errors="ignore"))

    def _all_well(self) -> bool:
        """Whether everybody that is to run does its work; who waits for the others does too."""
        waiting = self._init.desk.waiting_for_ready
        return all(
            record.is_out or record.health is Health.OK or record.name in waiting
            for record in self._init.records.values()
        )

    def _status_text(self) -> str:
        init = self._init
        records = init.records.values()
        up = sum(record.state is TaskState.UP for record in records)
        text = f"{init.state.name.lower()}, {up} of {len(records)} services up"
        failed = [record.name for record in records if record.state is TaskState.FAILED]
        if init.state is SystemState.SAFE:
            text += f", {init.safe_why}"
        return text + (f", failed: {' '.join(failed)}" if failed else "")
