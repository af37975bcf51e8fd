"""Rungs about entropy: fresh, counted by its source, and never more than asked for."""

import hashlib
from typing import Final

from nexus.ipc import Refused
from nexus.protocols.rngd import DRAW_RIGHT, DRAW_SIZE_MAX, GetEntropy, GetSource, RngdStatus
from nexus.services.selftest.climb import CALL_WAIT, Climb
from nexus.services.selftest.policy_rungs import audits_of, fields_of
from nexus.services.selftest.rung import Evidence, expect, require

DRAW_SIZE: Final = 32  # bytes; ladder #98
LOOKS: Final = 2  # of init at its sources; what was there at the first is taken at the second
OVERSIZED: Final = (0, DRAW_SIZE_MAX + 1)


async def policy_allow(climb: Climb) -> Evidence:
    """#97: the first draw of this client is decided by policyd; rngd says so itself, and the
    runner compares what it says with this record."""
    rngd = climb.client("rngd")
    _ = await climb.call(rngd, GetEntropy(DRAW_SIZE))

    records = await audits_of(climb, "action", DRAW_RIGHT, subject=climb.boot.name)

    for _ in range(LOOKS):  # init has taken what rngd said to the console before it answered us
        _ = await climb.tasks()

    expect(len(records), 1, f"audit records about {DRAW_RIGHT}")
    fields = fields_of(records[0])
    return {"record": records[0].record, "service": records[0].service, "fields": fields}


async def entropy(climb: Climb) -> Evidence:
    """#98: two draws of 32 bytes, fresh, and delivered by the source. The bytes stay here."""
    rngd = climb.client("rngd")
    before = await climb.call(rngd, GetSource())

    first = (await climb.call(rngd, GetEntropy(DRAW_SIZE))).data
    second = (await climb.call(rngd, GetEntropy(DRAW_SIZE))).data
    after = await climb.call(rngd, GetSource())

    expect((len(first), len(second)), (DRAW_SIZE, DRAW_SIZE), "bytes drawn")
    require(first != second, "two draws are equal")
    require(len(set(first)) > 1 and len(set(second)) > 1, "a draw is constant")
    given = after.given_to_caller - before.given_to_caller
    expect(given, 2 * DRAW_SIZE, "growth of what this client was given")
    delivered = after.delivered - before.delivered
    require(delivered >= 2 * DRAW_SIZE, f"the source delivered {delivered} bytes")
    return {
        "backing": after.backing,
        "given": given,
        "delivered": delivered,
        "delivered_total": after.delivered,
        "digests": [hashlib.sha256(drawn).hexdigest() for drawn in (first, second)],
    }


async def oversized(climb: Climb) -> Evidence:
    """#99: 0 and 257 bytes are refused and cost nothing, 256 are given."""
    rngd = climb.client("rngd")
    before = await climb.call(rngd, GetSource())

    refused = [await _refusal(climb, size) for size in OVERSIZED]
    between = await climb.call(rngd, GetSource())
    largest = await climb.call(rngd, GetEntropy(DRAW_SIZE_MAX))
    after = await climb.call(rngd, GetSource())

    expect(refused, [RngdStatus.OVERSIZED.name] * 2, f"draws of {OVERSIZED} bytes")
    expect(between.delivered, before.delivered, "what the source delivered meanwhile")
    expect(len(largest.data), DRAW_SIZE_MAX, "bytes of the largest draw")
    expect(after.given - between.given, DRAW_SIZE_MAX, "growth of what was given")
    return {
        "refused": refused,
        "delivered": [before.delivered, between.delivered, after.delivered],
    }


async def _refusal(climb: Climb, size: int) -> str:
    """How a draw is refused; bytes that were given all the same are told to nobody."""
    outcome = await climb.client("rngd").call(GetEntropy(size), await climb.ahead(CALL_WAIT))
    if isinstance(outcome, Refused):
        return outcome.status.name
    return type(outcome).__name__
