"""The rung about timed: windows, firing, limits, and owners that go away."""

from typing import Final

from nexus.abi import Nanos, QosClass
from nexus.ipc import CallFailure, Refused
from nexus.protocols.interactive import RegisterFor, SleepFor
from nexus.protocols.timed import (
    TIMERS_PER_OWNER_MAX,
    WINDOWS,
    Cancel,
    Register,
    Sleep,
    TimedStatus,
    Wait,
    Whoami,
)
from nexus.services.selftest.climb import CALL_WAIT, Climb
from nexus.services.selftest.rung import Evidence, expect, expect_type, require

AHEAD: Final = Nanos(20_500_000)  # ns; ladder #76
QUICK_AHEAD: Final = Nanos(2_000_500_000)  # ns; it is cancelled before, however slow the host
FAR_AHEAD: Final = Nanos(600_000_000_000)  # ns; never fires in a run
SLEEP: Final = Nanos(200_000_000)  # ns; much longer than a call
FIRED_LATE_MAX: Final = Nanos(400_000_000)  # ns; a busy host (40.2 ms seen), not a forgotten timer
OWNED_SLEEP: Final = Nanos(1_500_000_000)  # ns; its owner dies before


def _rounded_up(deadline: int, window: int) -> int:
    return -(-deadline // window) * window


async def timed_coalesce(climb: Climb) -> Evidence:
    """#76: rounding up by the kernel's class, firing not before, limits, and freed owners."""
    timed, interactive = climb.timed, climb.client("demo.interactive")
    await _expect_live(climb, 0, "before")

    normal = await climb.ahead(AHEAD)
    timer = await climb.call(timed, Register(normal))
    fired = await climb.call(timed, Wait(timer.timer_id))
    quick = await climb.ahead(QUICK_AHEAD)
    granted = await climb.call(interactive, RegisterFor(quick))

    before = await climb.ahead(Nanos(0))
    asleep = await timed.start(Sleep(Nanos(before + SLEEP)), await climb.ahead(CALL_WAIT))
    _ = await climb.call(timed, Whoami(0, ""))
    blocked = await climb.ahead(Nanos(0)) - before
    require(blocked < SLEEP, "a sleeper delayed another call")
    woken = await climb.finish(timed, asleep)
    require(woken.now >= before + SLEEP, "a sleeper woke early")

    far = await climb.ahead(FAR_AHEAD)
    timers = [
        (await climb.call(timed, Register(far))).timer_id for _ in range(TIMERS_PER_OWNER_MAX)
    ]
    over = await timed.call(Register(far), await climb.ahead(CALL_WAIT))
    await _expect_live(climb, TIMERS_PER_OWNER_MAX, "at the limit")
    for timer_id in timers:
        _ = await climb.call(timed, Cancel(timer_id))
    await _expect_live(climb, 0, "after cancelling all")

    await _owner_dies(climb)

    expect(timer.deadline, _rounded_up(normal, WINDOWS[QosClass.NORMAL]), "window of Normal")
    require(fired.now >= timer.deadline, f"fired {timer.deadline - fired.now} ns early")
    late = fired.now - timer.deadline
    require(late <= FIRED_LATE_MAX, f"fired {late} ns late")
    expect(granted.qos, QosClass.INTERACTIVE, "class of the Interactive helper, by the kernel")
    expect(granted.deadline, _rounded_up(quick, WINDOWS[QosClass.INTERACTIVE]), "its window")
    expect(over, Refused(TimedStatus.OVER_LIMIT), "the 65th timer")
    return {
        "normal": [normal, timer.deadline],
        "interactive": [quick, granted.deadline],
        "fired_late_ns": late,
        "timers": len(timers),
    }


async def _owner_dies(climb: Climb) -> None:
    """A sleep of demo.interactive is freed by its death."""
    interactive = climb.client("demo.interactive")
    generation = interactive.generation
    until = await climb.ahead(OWNED_SLEEP)
    asleep = await interactive.start(SleepFor(until), await climb.ahead(CALL_WAIT))
    pause = await climb.call(climb.timed, Sleep(await climb.ahead(AHEAD)))
    require(pause.now < until, "the pause outlasted the sleep it was to observe")
    await _expect_live(climb, 1, "while demo.interactive sleeps")

    _ = await climb.restart("demo.interactive")
    outcome = await interactive.finish(asleep)
    _ = expect_type(outcome, CallFailure, "call of the killed sleeper")
    _ = await climb.up_again("demo.interactive", generation + 1)
    await _expect_live(climb, 0, "after the death of the sleeper")
    _ = await climb.status(interactive)  # finds the new instance


async def _expect_live(climb: Climb, count: int, when: str) -> None:
    facts = {fact.name: fact.value for fact in (await climb.status(climb.timed)).facts}
    expect(facts["timers"], count, f"live timers {when}")
