"""Rungs about a task that goes wrong without ending, and about what holds it in."""

from typing import Final

from nexus.abi import Nanos, PolicyRead, PolicyWord
from nexus.ipc import CallFailure, Refused, RetryBudget, RetryTokens, retry_until
from nexus.protocols.logd import EVERY_RECORD, Query
from nexus.protocols.policyd import Check, GetCounts, Verdict
from nexus.protocols.testsvc import Attack, AttackResult, Echo, Hang, TestsvcStatus
from nexus.services.selftest.climb import (
    CALL_WAIT,
    RESTART_PAUSE,
    RESTART_POLLS_MAX,
    RESTART_WAIT,
    Climb,
)
from nexus.services.selftest.rung import Evidence, RungAbsent, expect, expect_type, require
from nexus.wire import ReplyStatus

HANG_MS: Final = 9_000  # longer than the watchdog needs, by the system file of the proof
HANG_SEEN_MAX: Final = Nanos(7_000_000_000)  # ns; init must have ended the instance by then
MILLISECOND: Final = 1_000_000  # ns
REASON_HANG: Final = "hang"
ESCAPE: Final = "escape"
CORE_RIGHT: Final = "ipc.core"  # the policy gives it to this client


async def watchdog_restart(climb: Climb) -> Evidence:
    """#96: demo.testsvc stops answering and does not end: init ends it, and nobody else. Where
    there is a policyd it is ended too: nobody is allowed anything until the next one answers."""
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
    evidence: Evidence = {"generation": record.generation, "noticed_ns": record.died - begun}
    if {"policyd", "logd"} <= climb.clients.keys():
        return {**evidence, "policyd": await _without_policyd(climb)}
    return evidence


async def _without_policyd(climb: Climb) -> Evidence:
    """The policy page when policyd has been killed, and what logd lets us read meanwhile.

    A loaded machine may bring policyd back before we look: the page's generation tells all the
    same, and what logd answered counts only if the page shows one absence before and after.
    """
    policyd = climb.client("policyd")
    read = Query(climb.config.boot, 1, 1, EVERY_RECORD)
    before = await PolicyRead()

    killed = await climb.restart("policyd")
    down = await PolicyRead()
    answer = await climb.client("logd").call(read, await climb.ahead(CALL_WAIT))
    still = await PolicyRead()
    meanwhile = answer if down == still and not down.available else None
    record = await climb.up_again("policyd", killed.generation + 1)
    up = await _available_again(climb)
    _ = await policyd.call(GetCounts(), await climb.ahead(CALL_WAIT))  # ends with the old link
    decision = await climb.call(policyd, Check(CORE_RIGHT, "after a restart"))

    require(before.available, "the page says that policyd answers, before")
    require(down.generation > before.generation, f"policyd is killed and the page says {down}")
    require(
        not down.available or down.generation > before.generation + 1,
        f"the page says {down} with no policyd since {before}",
    )
    if meanwhile is not None:
        expect(meanwhile, Refused(ReplyStatus.DENIED), "a read of the journal without policyd")
    require(up.available, f"policyd is back and the page says {up}")
    require(up.generation > before.generation + 1, f"raised once only: {before}, {up}")
    expect(decision.verdict, Verdict.ALLOW, "decision of the next instance")
    require(decision.generation >= up.generation, "it decides under the page's generation")
    return {
        "generation": record.generation,
        "pages": [list(before), list(down), list(up)],
        "denied": meanwhile is not None,
    }


async def _available_again(climb: Climb) -> PolicyWord:
    budget = RetryBudget(
        attempts_max=RESTART_POLLS_MAX,
        backoff=RESTART_PAUSE,
        deadline=await climb.ahead(RESTART_WAIT),
    )

    async def read() -> PolicyWord:
        return await PolicyRead()

    return await retry_until(read, lambda word: not word.available, budget, RetryTokens())


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
