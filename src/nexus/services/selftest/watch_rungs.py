"""Rungs about a task that goes wrong without ending, and about what holds it in."""

from typing import Final

from nexus.abi import Nanos
from nexus.ipc import CallFailure, Refused
from nexus.protocols.testsvc import Attack, AttackResult, Echo, Hang, TestsvcStatus
from nexus.services.selftest.climb import CALL_WAIT, Climb
from nexus.services.selftest.rung import Evidence, RungAbsent, expect, expect_type, require

HANG_MS: Final = 9_000  # longer than the watchdog needs, by the system file of the proof
HANG_SEEN_MAX: Final = Nanos(7_000_000_000)  # ns; init must have ended the instance by then
MILLISECOND: Final = 1_000_000  # ns
REASON_HANG: Final = "hang"
ESCAPE: Final = "escape"


async def watchdog_restart(climb: Climb) -> Evidence:
    """#96: demo.testsvc stops answering and does not end: init ends it, and nobody else."""
    before = {row.name: (row.pid, row.generation) for row in (await climb.tasks()).rows}
    _, old = before["demo.testsvc"]
    begun = await climb.ahead(Nanos(0))
    over = Nanos(begun + HANG_MS * MILLISECOND)
    hung = await climb.testsvc.start(Hang(HANG_MS), over)

    outcome = await climb.testsvc.finish(hung)  # ends with the instance, or with the hang
    noticed = await climb.ahead(Nanos(0)) - begun
    require(isinstance(outcome, CallFailure), f"the hang was answered: {outcome!r}")
    require(noticed <= HANG_SEEN_MAX, f"the hanging instance was still there after {noticed} ns")
    record = await climb.up_again("demo.testsvc", old + 1)
    after = {row.name: (row.pid, row.generation) for row in (await climb.tasks()).rows}
    _ = await climb.testsvc.call(Echo(b"stale"), await climb.ahead(CALL_WAIT))
    _ = await climb.call(climb.testsvc, Echo(b"again"))

    expect(record.reason, REASON_HANG, "reason in init's record")
    expect(after.pop("demo.testsvc")[1], old + 1, "generation of demo.testsvc")
    del before["demo.testsvc"]
    expect(after, before, "pids and generations of every other service")
    return {"generation": record.generation, "noticed_ns": record.died - begun}


async def sandbox_escape(climb: Climb) -> Evidence:
    """#95: whatever demo.testsvc tries by raw system calls is refused; the rest of the claim is
    the runner's, which compares what init read from outside with `nexus doctor`."""
    target = await climb.task("timed")

    outcome = await climb.testsvc.call(Attack(ESCAPE, target.pid), await climb.ahead(CALL_WAIT))
    if outcome == Refused(TestsvcStatus.NO_SUCH_ATTACK):
        raise RungAbsent
    report = expect_type(outcome, AttackResult, "the report of the attack")
    again = await climb.task("timed")

    expect(report.open_doors, 0, f"attempts that were not refused: {report.lines}")
    require(len(report.lines) > 0, "nothing was tried")
    expect((again.pid, again.generation), (target.pid, target.generation), "the attacked service")
    return {"attempts": report.lines, "pid": (await climb.task("demo.testsvc")).pid}
