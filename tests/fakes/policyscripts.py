"""What a driver does to a system with policyd, and what it saw: the same on both kernels."""

from typing import Any, Final

from nexus.abi import Nanos, Now, service_id
from nexus.ipc import Answer, CallFailure, Refused
from nexus.protocols.policyd import (
    Check,
    CheckFor,
    Counts,
    Decision,
    Exec,
    Reload,
    Reloaded,
    Route,
)
from tests.fakes.guard import Require, Use, Used, UseFor
from tests.fakes.initrig import MS, SECOND
from tests.fakes.policyrig import Hands, told, without

KEPT: Final = "store.read"
ASKED: Final = "store.write"
FORBIDDEN: Final = "store.format"
FLOOD: Final = 300  # questions
STALE_MAX: Final = 1 * SECOND  # policy_stale_max of the system: its default


async def frozen(hands: Hands) -> dict[str, Any]:
    """policyd stops for ever; then init notices, kills it and starts another."""
    first = told(await hands.use(KEPT))
    before = await hands.system()
    await hands.outside("freeze policyd")
    begun = await Now()
    await hands.pause(2 * MS)
    kept = told(await hands.use(KEPT))
    asked = await hands.use(ASKED)
    again = await hands.use(ASKED)
    stale: int | None = None
    allowed = []
    while await Now() < begun + STALE_MAX + SECOND:
        used = await hands.use(KEPT)
        if not used.allowed and stale is None:
            stale = await Now() - begun
        if used.allowed and stale is not None:
            allowed.append(await Now() - begun)
            break
        await hands.pause(5 * MS)
    took = await hands.until_allowed(ASKED, 10 * SECOND)
    after = await hands.system()
    await hands.pause(SECOND)  # the guard's log finds a quiet moment
    own = [each for each in await hands.audits() if each["scope"] == "audit"]
    return {
        "first": first,
        "kept": kept,
        "own": sorted({(each["reason"], each["decision"], each["action"]) for each in own}),
        "asked": [*told(asked), asked.took],
        "again": [*told(again), again.took],
        "stale": stale,
        "back": took,
        "generations": [before.policy_generation, after.policy_generation],
        "available": after.policy_available,
        "forbidden": told(await hands.use(FORBIDDEN)),
    }


async def is_back(hands: Hands, begun: dict[str, int]) -> bool:
    """Whether policyd went and came since."""
    system = await hands.system()
    return system.policy_available and system.policy_generation > begun["generation"]


async def killed(hands: Hands) -> dict[str, Any]:
    """policyd is killed: everything is denied until the next instance is healthy."""
    first = told(await hands.use(KEPT))
    before = await hands.counts()
    begun = {"generation": (await hands.system()).policy_generation}
    await hands.outside("kill policyd")
    seen: list[tuple[bool, str]] = []
    slowest = 0

    async def good() -> bool:
        used = await hands.use(KEPT)
        nonlocal slowest
        slowest = max(slowest, used.took)
        seen.append(told(used))
        if used.allowed and (False, "UNAVAILABLE") not in seen and await is_back(hands, begun):
            begun["generation"] = (await hands.system()).policy_generation
            await hands.outside("kill policyd")  # it was back before anybody looked
        return len(seen) > 1 and used.allowed and (False, "UNAVAILABLE") in seen

    back = await hands.until(good)
    after = await hands.counts()
    return {
        "first": first,
        "seen": sorted(set(seen)),
        "back": back,
        "slowest": slowest,
        "same": after.digest == before.digest,
        "generation": [before.generation, after.generation],
        "forbidden": told(await hands.use(FORBIDDEN)),
    }


async def reloaded(hands: Hands, policy: Any) -> dict[str, Any]:
    """A right is taken away by a reload; then policyd is killed: it stays away."""
    used = [told(await hands.use(KEPT)), told(await hands.use(KEPT))]
    before = await hands.system()
    changed = without(policy, "driver", KEPT)
    answer = await hands.call("policyd", Reload(changed.encoded()))
    after_reload = told(await hands.use(KEPT))
    still = told(await hands.use(ASKED))
    system = await hands.system()
    counts = await hands.counts()
    assert isinstance(answer, Reloaded), answer
    await settled(hands)
    audits = [each for each in await hands.audits() if each.get("action") == KEPT]
    await hands.kill("policyd")
    await hands.until_allowed(ASKED)
    after_restart = told(await hands.use(KEPT))
    restarted = await hands.counts()
    return {
        "used": used,
        "after_reload": after_reload,
        "still": still,
        "raised": [
            answer.generation - before.policy_generation,
            system.policy_generation - before.policy_generation,
            counts.generation - before.policy_generation,
            int(audits[-1]["generation"]) - before.policy_generation,
        ],
        "audit": [audits[-1]["decision"], audits[-1]["subject"], audits[-1]["target"]],
        "digests": [
            each == changed.digest
            for each in (answer.digest, system.policy_digest, counts.digest, restarted.digest)
        ],
        "after_restart": after_restart,
    }


async def identities(hands: Hands) -> dict[str, Any]:
    """Who speaks for whom, with the kernel's stamps."""

    async def decided(request: Any) -> Any:
        found = await hands.call("policyd", request)
        if isinstance(found, Decision):
            return [found.verdict.name, found.reason.name]
        return repr(found)

    async def guarded(request: Any) -> Any:
        found = await hands.call("guard", request)
        return told(found) if isinstance(found, Used) else repr(found)

    driver = service_id("driver")
    return {
        "own": await decided(Check(KEPT, "")),
        "other requester": await decided(Route("guard", "logd")),
        "own requester": await decided(Route("driver", "logd")),
        "other starter": await decided(Exec("guard", "demo")),
        "no delegate": await decided(CheckFor(driver, KEPT, "")),
        "delegated": await guarded(UseFor(driver, KEPT)),
        "unknown id": await guarded(UseFor(0xE34FD9BEF149D9DE, KEPT)),
        "id of the kernel": await guarded(UseFor(service_id("kernel"), KEPT)),
        "required": await guarded(Require(KEPT)),
        "required and denied": await guarded(Require(FORBIDDEN)),
    }


async def audited(hands: Hands) -> dict[str, Any]:
    """Many decisions, then what the journal has of them."""
    for number in range(40):
        _ = await hands.use((KEPT, ASKED, FORBIDDEN)[number % 3], str(number))

    await settled(hands)
    counts = await hands.counts()
    # Reading the journal is a decision itself: what came after the counting is left out.
    audits = [each for each in await hands.audits() if each["scope"] == "policyd.audit"]
    audits = audits[: counts.audited]
    numbers = [int(each["number"]) for each in audits]
    return {
        "balanced": is_balanced(counts),
        "audited": counts.audited,
        "dropped": counts.audit_dropped,
        "records": len(audits),
        "gapless": numbers == list(range(1, len(numbers) + 1)),
        "targets": sum(each["target"].isdigit() for each in audits),
        "verdicts": sorted({(each["action"], each["decision"]) for each in audits}),
    }


async def settled(hands: Hands) -> None:
    """Every decision of policyd is in the journal."""

    async def good() -> bool:
        return (await hands.counts()).audit_waiting == 0

    _ = await hands.until(good)


async def flooded(hands: Hands, policy: Any) -> dict[str, Any]:
    """The driver asks as fast as it can; then the guard asks once, and the policy is replaced."""
    for number in range(FLOOD):
        decision = await hands.call("policyd", Check(FORBIDDEN, str(number)))
        assert isinstance(decision, Decision), decision
    _ = await hands.use(ASKED, "in the flood")
    answer = await hands.call("policyd", Reload(without(policy, "driver", KEPT).encoded()))
    assert isinstance(answer, Reloaded), answer
    own: list[dict[str, Any]] = []
    sums: list[dict[str, Any]] = []

    async def summed_up() -> bool:
        audits = [each for each in await hands.audits() if each["scope"] == "policyd.audit"]
        own[:] = [each for each in audits if "number" in each]
        sums[:] = [each for each in audits if each["op"] == "suppressed"]
        counted: list[int] = [
            sum(each["op"] == "check" for each in own),
            *(int(each["count"]) for each in sums),
        ]
        return sum(counted) >= FLOOD

    await hands.pause(2 * SECOND)  # the window of the flood is over: what it hid is summed up
    _ = await hands.until(summed_up)
    await settled(hands)
    counts = await hands.counts()
    told = {int(each["number"]) for each in own}
    for each in sums:
        told.update(range(int(each["first"]), int(each["last"]) + 1))
    return {
        "balanced": is_balanced(counts),
        "flooder": sum(each["op"] == "check" for each in own),
        "askers": sorted({each["asked_by"] for each in sums}),
        "summed": sum(int(each["count"]) for each in sums),
        "denied": sum(int(each["denied"]) for each in sums),
        "dropped": counts.audit_dropped,
        "gapless": told == set(range(1, max(told) + 1)),
        "guard": [each["asked_by"] for each in own if each["target"] == "in the flood"],
        "reloads": [each["asked_by"] for each in own if each["op"] == "reload"],
    }


def is_balanced(counts: Counts) -> bool:
    """The law of the audit."""
    decided = counts.allowed + counts.denied_policy + counts.denied_identity
    return decided == counts.audited + counts.audit_dropped + counts.audit_waiting


async def denied_by_nonsense(hands: Hands) -> dict[str, Any]:
    """The guard's policyd answers, but never with a decision: nothing is allowed, nothing hangs."""
    seen = []
    slowest = 0
    for number in range(6):
        used = await hands.use(KEPT, str(number))
        seen.append(told(used))
        slowest = max(slowest, used.took)
        await hands.pause(100 * MS)
    return {"seen": sorted(set(seen)), "slowest": slowest}


async def short_deadlines(hands: Hands) -> dict[str, Any]:
    """The caller's deadline holds, and what it costs others is nothing."""
    outcomes = []
    late = 0
    for number in range(5):
        begun = await Now()
        deadline = Nanos(begun + 20 * MS)
        found = await hands.client("guard").call(Use(KEPT, str(number)), deadline)
        late = max(late, await Now() - deadline)
        allowed = isinstance(found, Used) and found.allowed
        assert isinstance(found, Used | Refused | CallFailure | Answer)
        outcomes.append(allowed)
        await hands.pause(60 * MS)
    return {"allowed": sorted(set(outcomes)), "late": late}


async def storm(hands: Hands, kills: int, order: str) -> dict[str, Any]:
    """policyd dies or stops again and again under load: no wrong answer, and none that is late."""
    seen: dict[str, int] = {}
    slowest = 0
    for number in range(kills):
        begun = {"generation": (await hands.system()).policy_generation}
        await hands.outside(f"{order} policyd")
        until = await Now() + 30 * SECOND
        denied = allowed = False
        while not (denied and allowed):
            assert await Now() < until, (number, seen)
            for right in (KEPT, FORBIDDEN, ASKED):
                used = await hands.use(right, str(number % 3))
                slowest = max(slowest, used.took)
                key = f"{right} {used.allowed} {told(used)[1]}"
                seen[key] = seen.get(key, 0) + 1
                denied = denied or told(used)[1] == "UNAVAILABLE"
                allowed = used.allowed and denied
            if not denied and await is_back(hands, begun):
                begun["generation"] = (await hands.system()).policy_generation
                await hands.outside(f"{order} policyd")  # it was back before anybody looked
            await hands.pause(1 * MS)
    system = await hands.system()
    counts = await hands.counts()
    return {
        "seen": seen,
        "slowest": slowest,
        "generation": system.policy_generation,
        "available": system.policy_available,
        "balanced": is_balanced(counts),
    }
