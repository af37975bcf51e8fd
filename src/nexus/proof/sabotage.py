"""What a saboteur is: a fault planted before a system starts, which must turn one rung red.

A plant replaces one attribute of production code by a faulty version, in the process that is
going to run the system; on linux the services are forked from it. So production code has no
branch for it, and what a saboteur breaks is looked up when it is called.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nexus.protocols.ladder import Ground, rung


@dataclass(frozen=True, kw_only=True, slots=True)
class Saboteur:
    """The fault of a rung, on the grounds where `plant` puts it in place."""

    rung: int
    grounds: frozenset[Ground]
    plant: Callable[[], None]

    @property
    def name(self) -> str:
        """What is broken, in the words of the ladder."""
        return rung(self.rung).fault


class NoSuchSaboteur(Exception):
    """No saboteur of this rung can be planted on this ground."""


def replace(owner: Any, name: str, faulty: Any) -> Any:
    """Put `faulty` in the place of `owner.name` and return what was there.

    The attribute must exist: a saboteur of something that was renamed would break nothing.
    """
    assert hasattr(owner, name), f"{owner!r} has no {name}: the saboteur aims at nothing"
    original = getattr(owner, name)
    setattr(owner, name, faulty)
    return original
