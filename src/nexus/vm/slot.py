"""How process 1 of the base system becomes that of the slot which the loader chooses. It imports
what the loader needs and no more: all of it is thrown away with this interpreter.
"""

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Final, NoReturn

from nexus.loader.tree import PYTHON
from nexus.proof.job import Job
from nexus.proof.loading import loaded
from nexus.vm.calls import Mounted, mount
from nexus.vm.contract import PLAIN, SLOT_AT

GUEST_MODULE: Final = "nexus.vm.guest"


def plant(saboteur: int) -> None:
    """Plant the saboteur of a rung, in the base system and again in the slot's: it may be one of
    the loader's."""
    from nexus.proof.saboteurs import find
    from nexus.protocols.ladder import Ground

    find(saboteur, Ground.VM).plant()


def show(tree: Path) -> Path:
    """Where the tree is to be read, and by nobody to be written."""
    mount(str(tree), Path(SLOT_AT), "", Mounted.BIND)
    at = Mounted.BIND | Mounted.REMOUNT | Mounted.READ_ONLY
    mount("", Path(SLOT_AT), "", at | Mounted.NO_SUID | Mounted.NO_DEVICES | Mounted.NO_EXEC)
    return Path(SLOT_AT)


def become_slot(descriptor: int, job: Job, beside: Mapping[str, object]) -> NoReturn:
    """Let the loader choose, and start over out of that slot's tree. It stays process 1. `beside`
    is what else it is told."""
    if job.saboteur is not None and not beside[PLAIN]:
        plant(job.saboteur)
    chosen = loaded(job)
    system = Path(chosen.system)
    unpacked = next(each for each in system.parents if (each / PYTHON).is_dir())
    tree = show(unpacked)
    chosen = replace(chosen, system=str(tree / system.relative_to(unpacked)))
    paths = [str(tree / PYTHON), *(path for path in sys.path if path)]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    told = json.dumps({**asdict(chosen), **beside})
    words = [sys.executable, "-S", "-P", "-B", "-m", GUEST_MODULE, str(descriptor), told]
    os.set_inheritable(descriptor, True)
    os.execve(sys.executable, words, environ)  # noqa: S606 (our own interpreter)
