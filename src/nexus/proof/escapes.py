"""The attempts of `nexus.kernel.linux.escapes` as an attack of demo.testsvc, for a proof run."""

from nexus.abi import Pid
from nexus.kernel.linux.escapes import ATTEMPTS, DONE, Target, environment, outcomes
from nexus.protocols.testsvc import AttackResult


async def escape(target: Pid) -> AttackResult:
    """Try every way out: a line each with the errno that refused it; an open door is one that
    nothing refused, or that another wall refused than the one meant to. A word of the environment
    that init was started with is one as well."""
    found = outcomes(Target(target))
    meant = {attempt.name: attempt.refusal for attempt in ATTEMPTS}
    lines = [f"{name}: {outcome}" for name, outcome in found.items()]
    open_doors = sum(found[name] != meant[name] for name in meant)
    left = environment()
    lines.append(f"environment: {len(left)} strings")
    open_doors += len(left)
    assert DONE not in meant.values(), "every attempt is meant to be refused"
    return AttackResult(lines, open_doors)
