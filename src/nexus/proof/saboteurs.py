"""Saboteurs: faults planted before a system starts, each of which must turn one rung red.

A plant replaces one attribute of production code by a faulty version, in the process that is
going to run the system; on linux the services are forked from it. So production code has no
branch for it, and what a saboteur breaks is looked up when it is called.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nexus.protocols.ladder import RUNGS, Ground, rung


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


def find(number: int, ground: Ground) -> Saboteur:
    """The saboteur of a rung on a ground. Raises NoSuchSaboteur."""
    for saboteur in SABOTEURS:
        if saboteur.rung == number and ground in saboteur.grounds:
            return saboteur
    known = 1 <= number <= len(RUNGS)
    why = f"none can be planted on {ground.value}" if known else "there is no such rung"
    raise NoSuchSaboteur(f"No saboteur for rung {number}: {why}.")


SABOTEURS: tuple[Saboteur, ...] = ()
