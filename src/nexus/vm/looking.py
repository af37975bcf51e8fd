"""What holds in a guest: a machine is booted that starts no system, tries each guarantee, and goes
off."""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from nexus.proof.job import Job
from nexus.proof.notes import NOTE
from nexus.vm import qemu
from nexus.vm.contract import DOCTOR, JOB, NOTE_CRASH, NOTE_DOCTOR, NOTE_OFF
from nexus.vm.image import Image
from nexus.vm.initramfs import Tree

LOOK_MAX: Final = 180.0  # seconds of ours, on a busy machine


class NothingTold(Exception):
    """The machine went off, or did not, and its report is not whole; the text says what came."""


def report(image: Image) -> Mapping[str, Any]:
    """What `nexus doctor` says there, as JSON has it. Raises NotHad and NothingTold."""
    notes: dict[str, Mapping[str, Any]] = {}

    def evidence(_seconds: float, line: bytes) -> bool:
        note = json.loads(line)
        if NOTE in note:
            notes[note[NOTE]] = note
        return False

    job = Job(ground="vm", system="", smp=1, seed=0, limit=0)
    tree = Tree()
    tree.file(JOB[1:], json.dumps({**asdict(job), DOCTOR: True}).encode())
    last = ""

    def told(_seconds: float, text: str) -> None:
        nonlocal last
        last = text or last

    with tempfile.TemporaryDirectory(prefix="nexus-vm-") as name:
        initrd = Path(name, "initrd")
        image.write_initrd(initrd, tree)
        setup = qemu.Setup(machine=image.machine, kernel=image.kernel, initrd=initrd)
        ended = qemu.run(setup, deadline=LOOK_MAX, told=told, evidence=evidence)
    found = notes.get(NOTE_DOCTOR)
    if found is None or notes.get(NOTE_OFF, {}).get("code") != 0 or ended.alarm:
        crash = notes.get(NOTE_CRASH, {}).get("text", "")
        raise NothingTold(ended.alarm or crash or last or "it said nothing")
    return {key: found[key] for key in ("guarantees", "kernel")}
