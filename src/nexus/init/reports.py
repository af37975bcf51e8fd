"""What init tells execd of ends: each end that nobody asked for, and each of what execd started.

    an end --> waiting --execd is up--> told --answered--> done
                 ^  \\--more than REPORTS_MAX of one service: its oldest gives way, counted
                 \\--not answered: told again after a pause; execd drops what it has already--/

init waits for no answer, and keeps a bounded number while execd is away. What gave way is told
with the next report.
"""

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import msgspec

from nexus.abi import ExitInfo, Nanos
from nexus.init.crosschecks import EXECD_PROGRAM
from nexus.init.reasons import UNCOUNTED, Reason
from nexus.init.record import Record
from nexus.protocols.execd import WHY_SIZE_MAX, Reported, ReportExit
from nexus.protocols.init import TaskState

if TYPE_CHECKING:
    from nexus.init.supervisor import Supervisor

REPORTS_MAX: Final = 4  # of one service that wait; nobody's crash loop costs others theirs
ANSWER_MAX: Final = Nanos(5_000_000_000)  # ns; execd asks two services and writes to a third
AGAIN: Final = Nanos(500_000_000)  # ns until what was not taken is told again
MILLISECOND: Final = 1_000_000  # ns
ASKED: Final = frozenset({*UNCOUNTED, Reason.ENDED, Reason.GROUP, Reason.SAFE})
"""Ends that init itself or somebody with the right wanted: they are no crashes."""


@dataclass(slots=True, eq=False)
class Waiting:
    """An end that execd does not know of yet."""

    report: ReportExit
    execd: Record
    due: Nanos  # when it is told, or told again
    told: bool = False  # and its answer is awaited


class Reports:
    """The ends that execd is told of."""

    def __init__(self, init: "Supervisor") -> None:
        self._init = init
        self._waiting: dict[str, deque[Waiting]] = {}
        self._execd = next(
            (name for name, each in init.records.items() if each.planned.program == EXECD_PROGRAM),
            None,
        )
        self.lost = 0

    def on_end(self, record: Record, info: ExitInfo, *, wanted: bool, action: str) -> None:
        """An instance has ended and been reaped; `wanted` is that it was being stopped."""
        execd = self._init.records.get(record.planned.by or self._execd or "")
        asked = wanted or record.reason in ASKED
        if execd is None or ((asked or not _is_bad(info)) and not record.is_demanded):
            return
        report = ReportExit(
            name=record.name,
            pid=info.pid,
            generation=record.generation,
            code=info.code,
            signal=info.signal,
            started=record.started,
            ended=record.died,
            digest=record.planned.program_digest,
            reason=record.reason,
            action=action[:WHY_SIZE_MAX],
            asked=asked,
            again=record.state is TaskState.BACKING_OFF,
            lost=0,
        )
        waiting = self._waiting.setdefault(record.name, deque())
        if len(waiting) >= REPORTS_MAX:
            _ = waiting.popleft()
            self.lost += 1
        waiting.append(Waiting(report, execd, self._init.now))

    def next_time(self) -> Nanos | None:
        """When the first of them is to be told; those of an execd that is away wait for it."""
        times = [each.due for each in self._first() if not each.told and each.execd.is_up]
        return min(times, default=None)

    async def on_time(self) -> None:
        """Tell what is due: of each service one at a time, in the order of the ends."""
        for each in self._first():
            if not each.told and each.execd.is_up and self._init.now >= each.due:
                await self._tell(each)

    def _first(self) -> list[Waiting]:
        return [waiting[0] for waiting in self._waiting.values() if waiting]

    async def _tell(self, each: Waiting) -> None:
        async def on_reported(reply: Any, _nonce: int) -> None:
            each.told = False
            each.due = Nanos(self._init.now + AGAIN)
            if isinstance(reply, Reported):
                self._done(each)

        deadline = Nanos(self._init.now + ANSWER_MAX)
        report = msgspec.structs.replace(each.report, lost=self.lost)
        each.told = await self._init.ask(each.execd, report, deadline, on_reported)
        if not each.told:
            each.due = Nanos(self._init.now + AGAIN)

    def _done(self, each: Waiting) -> None:
        """execd knows of it, unless it has given way meanwhile."""
        name = each.report.name
        waiting = self._waiting.get(name, deque())
        if each in waiting:
            waiting.remove(each)
        if not waiting:
            _ = self._waiting.pop(name, None)


def _is_bad(info: ExitInfo) -> bool:
    """Whether a task that ended so crashed."""
    return bool(info.code or info.signal)


def action_of(record: Record, *, is_going_down: bool, is_safe: bool, now: Nanos) -> str:
    """What is done about an end, once that is decided; a sentence for people."""
    match record.state:
        case TaskState.BACKING_OFF if record.due is not None:
            pause = max(0, record.due - now) // MILLISECOND
            return f"started again after {pause} ms, restart {record.restarts}"
        case TaskState.BACKING_OFF:
            return f"started again together with its group, restart {record.restarts}"
        case TaskState.FAILED:
            return f"given up after {record.restarts} restarts"
        case TaskState.LEFT_OUT:
            return "left out: the system went into safe mode"
        case _ if is_going_down:
            return "the system goes down"
        case _ if is_safe:
            return "not started again; the system is in safe mode"
        case _:
            return "not started again"
