"""Every saboteur, by the rung it turns red."""

from typing import Final

from nexus.proof.plants_devices import SABOTEURS as DEVICES
from nexus.proof.plants_exec import SABOTEURS as EXEC
from nexus.proof.plants_init import SABOTEURS as INIT
from nexus.proof.plants_kernel import SABOTEURS as KERNEL
from nexus.proof.plants_keys import SABOTEURS as KEYS
from nexus.proof.plants_observe import SABOTEURS as OBSERVE
from nexus.proof.plants_ota import SABOTEURS as OTA
from nexus.proof.plants_policy import SABOTEURS as POLICY
from nexus.proof.plants_selftest import SABOTEURS as SELFTEST
from nexus.proof.plants_state import SABOTEURS as STATE
from nexus.proof.sabotage import NoSuchSaboteur, Saboteur, replace
from nexus.protocols.ladder import RUNGS, Ground

__all__ = ["SABOTEURS", "SAMPLE", "NoSuchSaboteur", "Saboteur", "find", "replace", "sample"]

SABOTEURS: Final[tuple[Saboteur, ...]] = (
    *KERNEL,
    *INIT,
    *POLICY,
    *DEVICES,
    *SELFTEST,
    *STATE,
    *KEYS,
    *OBSERVE,
    *EXEC,
    *OTA,
)


SAMPLE: Final = (2, 39, 40, 42, 50, 51, 59, 81, 95, 105, 127, 136, 140, 143)
"""Rungs of every phase, for a ground where a sweep of all takes hours."""


def sample(ground: Ground) -> tuple[int, ...]:
    """The rungs of SAMPLE for which there is a saboteur on a ground."""
    planted = {saboteur.rung for saboteur in SABOTEURS if ground in saboteur.grounds}
    return tuple(number for number in SAMPLE if number in planted)


def find(number: int, ground: Ground) -> Saboteur:
    """The saboteur of a rung on a ground. Raises NoSuchSaboteur."""
    for saboteur in SABOTEURS:
        if saboteur.rung == number and ground in saboteur.grounds:
            return saboteur
    known = 1 <= number <= len(RUNGS)
    why = f"none can be planted on {ground.value}" if known else "there is no such rung"
    raise NoSuchSaboteur(f"No saboteur for rung {number}: {why}.")
