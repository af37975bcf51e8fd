"""The process that boots: `python -m nexus.proof.child DESCRIPTOR JOB`, started by the runner."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from nexus.proof.faultpoints import plant_fault_points
from nexus.proof.grounds import boot_scenario, boot_system
from nexus.proof.loading import become_slot, loaded
from nexus.proof.runner import Job, die_with_parent
from nexus.proof.saboteurs import find
from nexus.proof.sink import EventSink
from nexus.protocols.ladder import Ground


def main(argv: Sequence[str]) -> int:
    """Plant the saboteur if there is one, boot, and hand every event to the runner."""
    sink = EventSink(int(argv[0]))
    job = Job(**json.loads(argv[1]))
    die_with_parent(job.runner)
    try:
        plant_fault_points(Ground(job.ground), job.boot)
        if job.saboteur is not None:
            find(job.saboteur, Ground(job.ground)).plant()
        if job.slots and not job.slot:
            job = loaded(job)
            if Ground(job.ground) is not Ground.SIM:
                become_slot(int(argv[0]), job)
        booted = boot_scenario(job, sink) if job.scenario else boot_system(job, sink)
        if job.log is not None:
            with Path(job.log).open("a" if job.boot else "w", encoding="utf-8") as file:
                _ = file.write(f"boot {job.boot}\n")
                file.writelines(f"{line}\n" for line in booted.log_lines)
        return booted.exit_code
    finally:
        sink.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
