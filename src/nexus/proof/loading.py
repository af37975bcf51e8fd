"""What stands before init in a boot of a device with slots: the loader, in the runner's child.

It is nexus.loader's own `choose` and its own tree, over the images in the state directory, on both
grounds: a simulated machine's disks are made of the same images afterwards. On linux the child then
starts an interpreter anew, which finds the set's package first, so what runs is the slot's.
"""

import json
import os
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

import msgspec

from nexus.bootctl import SlotName, open_boot, read_failure
from nexus.bootctl.handover import SlotBoot
from nexus.drivers import finished
from nexus.kernel.linux.bootmemory import FILE_NAME
from nexus.loader.choose import Chosen, Ended, SlotSource, choose
from nexus.loader.devices import boot_path, opened, slot_path
from nexus.loader.tail import ConsoleLine, last_words
from nexus.loader.tree import PYTHON, tree_of
from nexus.proof.job import Job

if TYPE_CHECKING:
    from nexus.proof.trace import Trace

ENDED: Final = "ended.json"  # in the state directory: what the runner saw of the boot before
BOOT_MEMORY_NAME: Final = FILE_NAME  # on both grounds
WALL: Final = "wall"  # in the state directory: what a simulated machine's clock says next
LINES_MAX: Final = 4096  # of the console of a boot, the last
SIM: Final = "sim"  # protocols.ladder.Ground; a guest has not read the ladder yet
CHILD_MODULE: Final = "nexus.proof.child"


def keep_end(state: Path, trace: "Trace") -> None:
    """Leave to the next boot's loader what it would have seen of this one."""
    ending = trace.ending
    lines = [[line.printer, f"{line.printer}: {line.text}"] for line in trace.lines]
    seen = {
        "code": None if ending.cut or ending.stopped else ending.code,
        "signal": ending.signal,
        "is_hung": ending.code is None,
        "lines": lines[-LINES_MAX:],
    }
    _ = (state / ENDED).write_text(json.dumps(seen), "utf-8")


def loaded(job: Job) -> Job:
    """The job as the loader hands it to init: which slot, and the system file of its set."""
    assert job.state is not None, "a system is booted with a state directory"
    state = Path(job.state)
    with ExitStack() as stack:
        boot = stack.enter_context(opened(boot_path(state), writable=True))
        slots = {name: stack.enter_context(opened(slot_path(state, name))) for name in SlotName}
        control, _ = finished(open_boot(boot))
        chosen = finished(choose(control, slots, end_before(state), wall=_wall(job, state)))
        tree = _tree(state, chosen, slots)
    slot = msgspec.json.encode(chosen.boot).decode()
    return replace(job, slot=slot, system=str(tree / chosen.manifest.system))


def _tree(state: Path, chosen: Chosen, slots: Any) -> Path:
    name = SlotName(chosen.boot.slot)
    source = SlotSource(slots[name], chosen.record.slot(name).size)
    return tree_of(state, chosen.record, name, chosen.manifest, source)


def end_before(state: Path) -> Ended | None:
    """What is known of the boot before; without a runner that saw it, it is what init left."""
    memory = state / BOOT_MEMORY_NAME
    failure = read_failure(memory.read_bytes()) if memory.exists() else None
    try:
        seen = json.loads((state / ENDED).read_text("utf-8"))
    except FileNotFoundError:
        return None if failure is None else Ended(failure=failure)
    lines = [ConsoleLine(*line) for line in seen.pop("lines")]
    tail = last_words(lines, "" if failure is None else failure.service)
    return Ended(**seen, failure=failure, tail=tail)


def _wall(job: Job, state: Path) -> int:
    """ns since 1970, by the clock of the machine that boots; 0 where it never ran."""
    if job.ground != SIM:
        return time.time_ns()
    wall = state / WALL
    return int(wall.read_text()) if wall.exists() else 0


def slot_boot_of(job: Job) -> SlotBoot | None:
    """What the loader said of the slot; None in a boot without slots."""
    return msgspec.json.decode(job.slot, type=SlotBoot) if job.slot else None


def become_slot(descriptor: int, job: Job) -> NoReturn:
    """Start over in an interpreter that finds the package of the slot's set first."""
    system = Path(job.system)
    tree = next(each for each in system.parents if (each / PYTHON).is_dir())
    paths = [str(tree / PYTHON), *filter(None, [os.environ.get("PYTHONPATH")])]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    words = [sys.executable, "-P", "-m", CHILD_MODULE, str(descriptor), json.dumps(asdict(job))]
    os.set_inheritable(descriptor, True)
    os.execve(sys.executable, words, environ)  # noqa: S606 (our own interpreter)
