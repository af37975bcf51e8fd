"""Deadlines: absolute, saturating, and only ever shrinking."""

from nexus.abi import NEVER, Nanos


def deadline_after(now: Nanos, budget: Nanos) -> Nanos:
    """The time `budget` ns after `now`, never beyond NEVER."""
    return Nanos(min(now + budget, NEVER))


def nested_deadline(parent: Nanos, own: Nanos) -> Nanos:
    """The deadline of a call made on behalf of another: the earlier of the two."""
    return min(parent, own)
