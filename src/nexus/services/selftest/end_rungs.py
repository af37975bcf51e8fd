"""The last rungs: nothing is left behind, and the ladder's end."""

from typing import Final

from nexus.abi import INIT_NAME, TaskCounters, TaskStats
from nexus.protocols.init import Account, GetResources, Resources
from nexus.services.selftest.climb import Climb
from nexus.services.selftest.rung import Evidence, expect, require

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


def _held_by(account: Account) -> dict[str, int]:
    facts = {f"fact {fact.name}": fact.value for fact in account.facts}
    return held(TaskCounters._make(account.counters)) | facts


async def no_resource_left_behind(climb: Climb) -> Evidence:
    """#143: every task holds what it held when the system became ready."""
    tasks = 0
    compared: dict[str, object] = {}
    for name in (INIT_NAME, *climb.clients):
        resources = await climb.call(climb.control, GetResources(name))
        now, ready = _held_by(resources.now), _held_by(resources.ready)
        expect(now, ready, f"what {name} holds")
        compared[name] = {"ready": ready, "now": now}
        tasks = _same_tasks(resources)
    mine = held(await TaskStats())
    expect(mine, climb.held_at_ready, f"what {climb.boot.name} holds")
    compared[climb.boot.name] = {"ready": climb.held_at_ready, "now": mine}
    return {"accounts": compared, "tasks": tasks}


def _same_tasks(resources: Resources) -> int:
    expect(resources.tasks_now, resources.tasks_ready, "live tasks")
    return resources.tasks_now


async def end(climb: Climb) -> Evidence:
    """#144: every rung before this one that could be climbed was."""
    require(not climb.failed, f"rungs failed: {climb.failed}")
    expect(climb.passed, climb.planned, "rungs passed")
    return {"passed": list(climb.passed)}
