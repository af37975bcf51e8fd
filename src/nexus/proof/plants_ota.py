"""Saboteurs of the rungs about updates: 21, 22, 36, 54 and 131-138."""

# ruff: noqa: SLF001 (saboteurs break what is private)

import dataclasses
import sys
from functools import partial
from pathlib import Path
from typing import Any, Final, NoReturn

from nexus.abi import Nanos, Programs
from nexus.bootctl import BootRecord, SlotName, SlotState
from nexus.bootctl.handover import SlotBoot
from nexus.init import ground
from nexus.init.programs import PROGRAMS
from nexus.init.trial import Trial
from nexus.kernel.linux import kernel as linux_kernel
from nexus.loader import choose as loader
from nexus.proof import loading
from nexus.proof.planted_boot import one_copy
from nexus.proof.plants_init import missing, withheld
from nexus.proof.plants_keys import execute_instead
from nexus.proof.plants_policy import route_to_logd
from nexus.proof.sabotage import Saboteur, replace
from nexus.protocols.ladder import SELFTEST, Ground

BOTH: Final = frozenset(Ground)
SIM: Final = frozenset({Ground.SIM})
LINUX: Final = frozenset({Ground.LINUX, Ground.VM})
UPDATED: Final = "updated"
ENTRY: Final = "nexus.proof.planted_updated:sabotaged"
INSIDE: Final = (36, 131, 132, 133, 137)  # broken in updated itself: planted_updated
TIMED: Final = "timed"
EXPORTD: Final = "exportd"


def _inside_sim(number: int) -> None:
    """The simulator runs updated in this process."""
    from nexus.proof.planted_updated import plant  # which imports what init must not

    plant(number)


def _inside_linux(number: int) -> None:
    execute_instead(UPDATED, f"{ENTRY} {number}")


def _one_from_slot_a_sim() -> None:
    """#134: timed's program is that of slot a."""
    others: list[str] = []

    async def choose(*rest: Any, **options: Any) -> Any:
        chosen = await original_choose(*rest, **options)
        others.append(chosen.record.slot(SlotName.A).digest.hex())
        return chosen

    def stamped(programs: Programs, slot_boot: SlotBoot) -> Programs:
        found: Programs = original(programs, slot_boot)
        if slot_boot.slot != SlotName.B:
            return found
        return {**found, TIMED: dataclasses.replace(found[TIMED], set_digest=others[-1])}

    original_choose = replace(loading, "choose", choose)
    original = replace(ground, "stamped", stamped)


def _one_from_slot_a_linux() -> None:
    """#134: the interpreter of exportd finds the package of slot a first."""
    entry = f"{PROGRAMS[EXPORTD].module}:main"

    def execute(wanted: str, *rest: Any, **options: Any) -> NoReturn:
        if wanted == entry:
            sys.path[:] = map(_as_in_slot_a, sys.path)
        original(wanted, *rest, **options)
        raise AssertionError("execute does not return")

    original = replace(linux_kernel, "execute", execute)


def _as_in_slot_a(path: str) -> str:
    """A folder of slot b's tree as slot a's has it; any other as it is."""
    tree = Path(path).parent
    if not tree.name.startswith(f"{SlotName.B.value}-"):
        return path
    (other,) = tree.parent.glob(f"{SlotName.A.value}-*")
    return str(other / Path(path).name)


def _commit_before_the_last() -> None:
    """#135: the client is not waited for, and nobody has to stay healthy."""

    def settled(trial: Trial) -> Nanos | None:
        others = (each for each in trial._awaited() if each.name != SELFTEST)
        return trial._init.hearing.until if all(map(trial._is_well, others)) else None

    _ = replace(Trial, "_settled_time", settled)


def _counted_afterwards() -> None:
    """#136: the try of slot a is counted when its boot is over."""

    def attempt(record: BootRecord, **options: Any) -> tuple[BootRecord, SlotName]:
        info = record.slot(SlotName.A)
        if record.trying is SlotName.A and info.state is SlotState.TRYING:
            counted = dataclasses.replace(info, tries_left=info.tries_left - 1)
            record = record.with_slot(SlotName.A, counted)
        tried, name = original(record, **options)
        if tried.trying is SlotName.A:
            info = tried.slot(SlotName.A)
            uncounted = dataclasses.replace(info, tries_left=info.tries_left + 1)
            tried = tried.with_slot(SlotName.A, uncounted)
        return tried, name

    original = replace(loader, "attempt", attempt)


def _one_copy_linux() -> None:
    """#138: the loader and updated write the first copy of the record alone."""
    one_copy()
    _inside_linux(138)


SABOTEURS: Final = (
    Saboteur(rung=21, grounds=BOTH, plant=partial(missing, UPDATED)),
    Saboteur(rung=22, grounds=BOTH, plant=partial(withheld, UPDATED)),
    Saboteur(rung=54, grounds=BOTH, plant=partial(route_to_logd, UPDATED)),
    *(Saboteur(rung=each, grounds=SIM, plant=partial(_inside_sim, each)) for each in INSIDE),
    *(Saboteur(rung=each, grounds=LINUX, plant=partial(_inside_linux, each)) for each in INSIDE),
    Saboteur(rung=134, grounds=SIM, plant=_one_from_slot_a_sim),
    Saboteur(rung=134, grounds=LINUX, plant=_one_from_slot_a_linux),
    Saboteur(rung=135, grounds=BOTH, plant=_commit_before_the_last),
    Saboteur(rung=136, grounds=BOTH, plant=_counted_afterwards),
    Saboteur(rung=138, grounds=SIM, plant=one_copy),
    Saboteur(rung=138, grounds=LINUX, plant=_one_copy_linux),
)
