"""What init tells execd of ends: once, in order, bounded while execd is away, never waiting."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from nexus.abi import ExitInfo, Nanos, Pid
from nexus.init.reasons import Reason
from nexus.init.record import Record
from nexus.init.reports import AGAIN, REPORTS_MAX, Reports, action_of
from nexus.protocols.execd import Reported, ReportExit
from nexus.protocols.init import TaskState
from tests.unit.test_execd_keeping import run

NOW = Nanos(100)
Done = Callable[[Any, int], Awaitable[None]]


def record_of(name: str, program: str = "timed", by: str = "") -> Record:
    planned: Any = SimpleNamespace(name=name, program=program, by=by, program_digest="d" * 64)
    return Record(planned=planned, pid=Pid(7), generation=1, reason=Reason.EXIT)


@dataclass
class Init:
    """As much of init as the reports need."""

    records: dict[str, Record]
    now: Nanos = NOW
    asked: list[tuple[ReportExit, Done]] = field(default_factory=list)
    has_room: bool = True

    async def ask(self, record: Record, request: Any, _deadline: Nanos, done: Done) -> bool:
        assert record.planned.program == "execd"
        if self.has_room:
            self.asked.append((request, done))
        return self.has_room


def system() -> tuple[Init, Reports]:
    records = {
        "execd": record_of("execd", "execd"),
        "pump": record_of("pump"),
        "valve": record_of("valve"),
        "child": record_of("child", by="execd"),
    }
    records["execd"].state = TaskState.UP
    init = Init(records)
    return init, Reports(init)  # type: ignore[arg-type]


def end(
    reports: Reports, record: Record, code: int = 1, *, signal: int = 0, wanted: bool = False
) -> None:
    reports.on_end(record, ExitInfo(Pid(7), code, signal), wanted=wanted, action="what was done")


def test_a_crash_is_told_and_forgotten_with_its_answer() -> None:
    init, reports = system()
    end(reports, init.records["pump"])

    assert reports.next_time() == init.now
    run(reports.on_time())
    ((report, done),) = init.asked
    run(done(Reported(1), 1))

    assert (report.name, report.code, report.asked, report.action) == (
        "pump",
        1,
        False,
        "what was done",
    )
    assert reports.next_time() is None


@pytest.mark.parametrize("reason", [Reason.ASKED, Reason.GROUP, Reason.SAFE, Reason.REVOKED])
def test_an_end_that_was_wanted_is_nobodys_crash(reason: Reason) -> None:
    init, reports = system()
    pump = init.records["pump"]
    pump.reason = reason
    end(reports, pump, 0, signal=9)
    pump.reason = Reason.EXIT
    end(reports, pump, 0, signal=9, wanted=True)
    end(reports, pump, 0)

    assert reports.next_time() is None


def test_every_end_of_what_execd_started_is_told_and_whether_it_was_asked_for() -> None:
    init, reports = system()
    child = init.records["child"]
    end(reports, child, 0)
    run(reports.on_time())
    run(init.asked[0][1](Reported(0), 1))
    child.reason = Reason.ENDED
    end(reports, child, 0, signal=9)
    run(reports.on_time())

    assert [report.asked for report, _ in init.asked] == [False, True]


def test_ends_of_one_service_are_told_one_after_the_other_and_of_two_at_the_same_time() -> None:
    init, reports = system()
    for name in ("pump", "pump", "valve"):
        init.records[name].generation += 1
        end(reports, init.records[name])

    run(reports.on_time())
    run(reports.on_time())
    first = [(report.name, report.generation) for report, _ in init.asked]
    run(init.asked[0][1](Reported(1), 1))
    run(reports.on_time())

    assert first == [("pump", 2), ("valve", 2)]
    assert [(report.name, report.generation) for report, _ in init.asked[2:]] == [("pump", 3)]


def test_while_execd_is_away_a_bounded_number_waits_for_each_service_and_the_rest_is_counted() -> (
    None
):
    init, reports = system()
    init.records["execd"].state = TaskState.BACKING_OFF
    end(reports, init.records["valve"])
    for generation in range(1, REPORTS_MAX + 4):
        init.records["pump"].generation = generation
        end(reports, init.records["pump"])

    assert reports.next_time() is None, "nobody is there to be told"
    assert reports.lost == 3
    init.records["execd"].state = TaskState.UP
    told = []
    for _ in range(REPORTS_MAX + 1):
        run(reports.on_time())
        for report, done in init.asked:
            told.append((report.name, report.generation, report.lost))
            run(done(Reported(1), 1))
        init.asked.clear()

    assert told == [("valve", 1, 3), *(("pump", generation, 3) for generation in range(4, 8))]


def test_what_is_not_answered_is_told_again_after_a_pause() -> None:
    init, reports = system()
    end(reports, init.records["pump"])
    run(reports.on_time())
    run(init.asked[0][1](None, 1))

    run(reports.on_time())
    assert len(init.asked) == 1, "not at once"
    assert reports.next_time() == init.now + AGAIN
    init.now = Nanos(init.now + AGAIN)
    init.has_room = False
    run(reports.on_time())
    init.has_room = True
    init.now = Nanos(init.now + AGAIN)
    run(reports.on_time())

    assert len(init.asked) == 2
    assert init.asked[0][0] == init.asked[1][0]


@pytest.mark.parametrize(
    ("state", "due", "going_down", "safe", "told"),
    [
        (TaskState.BACKING_OFF, 51_000_000, False, False, "started again after 51 ms, restart 3"),
        (TaskState.BACKING_OFF, None, False, False, "started again together with its group"),
        (TaskState.FAILED, None, False, False, "given up after 3 restarts"),
        (TaskState.LEFT_OUT, None, False, True, "left out: the system went into safe mode"),
        (TaskState.STOPPED, None, True, False, "the system goes down"),
        (TaskState.ON_DEMAND, None, False, False, "not started again"),
    ],
)
def test_what_was_done_about_an_end_in_words(
    state: TaskState, due: int | None, going_down: bool, safe: bool, told: str
) -> None:
    record = record_of("pump")
    record.state = state
    record.restarts = 3
    record.due = None if due is None else Nanos(due)

    said = action_of(record, is_going_down=going_down, is_safe=safe, now=Nanos(0))

    assert said.startswith(told)
