"""The last rungs: nothing is left behind, and the ladder's end."""

from typing import Any, Final

from nexus.abi import INIT_NAME, Nanos, TaskCounters, TaskStats
from nexus.ipc import RetryBudget, RetryTokens, retry_until
from nexus.protocols.execd import GetReport
from nexus.protocols.init import Account, GetResources, Resources
from nexus.protocols.keystored import Get as GetKey
from nexus.protocols.keystored import GetPublicKey
from nexus.protocols.logd import EVERY_RECORD, Query
from nexus.protocols.meta import Fact, GetStatus
from nexus.protocols.metricsd import GetSeries
from nexus.protocols.rngd import GetEntropy
from nexus.protocols.statefsd import Get
from nexus.protocols.testsvc import UseKeys, UseState
from nexus.protocols.updated import BeginInline, GetUpdate, PutMetadata
from nexus.services.selftest.climb import CALL_WAIT, Climb
from nexus.services.selftest.exec_rungs import EXECD_NAME, EXIT42, use_execd
from nexus.services.selftest.rung import Evidence, expect, require
from nexus.wire import Request

UNUSED_KEY: Final = b"/state/testsvc/unused"
NO_REPORT: Final = 1 << 40  # the number of a report that nobody has made
UNUSED_NAME: Final = b"unused"
LOOKS_MAX: Final = 9  # at a task's account; logd writes its tail every second
LOOK_WAIT: Final = Nanos(5_000_000_000)  # ns for all of them
LOOK_PAUSE: Final = Nanos(7_000_000)  # ns, doubling; no whole part of a probe's interval
COUNTER_SUFFIX: Final = "_total"
KEPT_FACTS: Final = frozenset(
    {
        *("clients", "statefsd_generation", "wrapping"),  # who asks, and whom it asks
        *("reports", "reports_unsaved"),  # of crashes
        *("epoch", "sequence", "durable", "keys", "used"),  # what is on the disk
        *("trial", "provisioned"),  # what is on the boot device
    }
)
HELD: Final = (  # counters that say what a task holds now; the others only grow
    "slots",
    "endpoints",
    "links",
    "reserved_size",
    "queued",
    "queued_size",
    "budget_used",
    "vmo_size",
)


def held(counters: TaskCounters) -> dict[str, int]:
    """What a task holds by its kernel's account."""
    return {name: getattr(counters, name) for name in HELD}


def _numbers(held_by: dict[str, int]) -> list[int]:
    """What is held, in the order of its names: a line of evidence has no room for all of these."""
    return [held_by[name] for name in sorted(held_by)]


def _held_by(account: Account) -> dict[str, int]:
    facts = {f"fact {fact.name}": fact.value for fact in state_of(account.facts)}
    return held(TaskCounters._make(account.counters)) | facts


def state_of(facts: list[Fact]) -> list[Fact]:
    """The facts that say what a service holds. Those named `_total` only ever grow, and what is
    kept is kept."""
    return [
        fact
        for fact in facts
        if not fact.name.endswith(COUNTER_SUFFIX) and fact.name not in KEPT_FACTS
    ]


async def _use_all(climb: Climb) -> None:
    """Have every service use those that it needs: one that was started anew meanwhile is found
    when it is next asked, and until then its old link is open. What they answer is not looked at.
    """
    uses: dict[str, tuple[Request[Any], ...]] = {
        "logd": (Query(climb.config.boot, 1, 1, EVERY_RECORD),),
        "metricsd": (GetSeries(1, 1, 0, ""),),
        "execd": (GetReport(NO_REPORT), GetReport(NO_REPORT)),
        "rngd": (GetEntropy(1),),
        "statefsd": (Get(UNUSED_KEY),),
        "keystored": (GetPublicKey(), GetKey(UNUSED_NAME)),
        "updated": (GetUpdate(), PutMetadata(0, b"x"), BeginInline(1)),  # refused, and written down
        "demo.testsvc": (UseState(UNUSED_KEY, b""), UseKeys(UNUSED_NAME)),
    }
    for name, requests in uses.items():
        for request in requests if name in climb.clients else ():
            _ = await climb.client(name).call(request, await climb.ahead(CALL_WAIT))
    if climb.services >= {EXECD_NAME, EXIT42}:
        await use_execd(climb)


async def no_resource_left_behind(climb: Climb) -> Evidence:
    """#143: every task holds what it held when the system became ready."""
    await _use_all(climb)
    tasks = 0
    compared: dict[str, object] = {}
    for name in (INIT_NAME, *climb.clients):
        resources = await _resources(climb, name)
        now, ready = _held_by(resources.now), _held_by(resources.ready)
        _expect_same(now, ready, name, climb.lacking)
        compared[name] = {"ready": _numbers(ready), "now": _numbers(now)}
        tasks = _same_tasks(resources)
    mine = held(await TaskStats())
    _expect_same(mine, climb.held_at_ready, climb.boot.name, climb.lacking)
    compared[climb.boot.name] = {"ready": _numbers(climb.held_at_ready), "now": _numbers(mine)}
    return {"accounts": compared, "tasks": tasks}


def _expect_same(now: dict[str, int], ready: dict[str, int], name: str, lacking: list[str]) -> None:
    """Fail the rung unless the two are equal; what is not is told, and which links came too late
    to be held at ready."""
    names = {each for each in now.keys() | ready.keys() if now.get(each) != ready.get(each)}
    more = {each: [ready.get(each), now.get(each)] for each in sorted(names)}
    late = f" (late: {', '.join(lacking)})" if lacking else ""
    expect(more, {}, f"what {name} holds, at ready and now{late}")


async def _resources(climb: Climb, name: str) -> Resources:
    """The accounts of a task. A message that was just passing is gone at a second look, and who
    posts has found again by then whom it posts to; what is left behind is still there."""
    budget = RetryBudget(
        attempts_max=LOOKS_MAX, backoff=LOOK_PAUSE, deadline=await climb.ahead(LOOK_WAIT)
    )

    async def look() -> Resources:
        resources = await climb.call(climb.control, GetResources(name))
        if _held_by(resources.now) != _held_by(resources.ready):
            await _wake_all(climb)
        return resources

    return await retry_until(
        look, lambda seen: _held_by(seen.now) != _held_by(seen.ready), budget, RetryTokens()
    )


async def _wake_all(climb: Climb) -> None:
    """Wake every service: a library looks now and then, when its task is awake, whether those that
    it writes for have been started anew."""
    for client in climb.clients.values():
        _ = await client.call(GetStatus(), await climb.ahead(CALL_WAIT))


def _same_tasks(resources: Resources) -> int:
    expect(resources.tasks_now, resources.tasks_ready, "live tasks")
    return resources.tasks_now


async def end(climb: Climb) -> Evidence:
    """#144: every rung before this one that could be climbed was."""
    require(not climb.failed, f"rungs failed: {climb.failed}")
    expect(climb.passed, climb.planned, "rungs passed")
    return {"passed": list(climb.passed)}
