"""The process that boots for bench/guard: `python -m bench.boot_child DESCRIPTOR JOB`.

As nexus.proof.child, without the kernel's self-test, which is no part of a boot.
"""

import json
import sys
from pathlib import Path
from typing import Final

from nexus.abi import Nanos
from nexus.init.ground import Places, boot
from nexus.init.plan import load_plan
from nexus.proof.runner import Job
from nexus.proof.sink import EventSink
from nexus.protocols.ladder import Ground

CHILD: Final = (sys.executable, "-m", "bench.boot_child")


def main(arguments: list[str]) -> int:
    """Boot, and hand every event to bench.guard, which ends the run."""
    sink = EventSink(int(arguments[0]))
    job = Job(**json.loads(arguments[1]))
    try:
        booted = boot(
            load_plan(Path(job.system)),
            Ground(job.ground),
            seed=job.seed,
            smp=job.smp,
            recorder=sink.record,
            limit=Nanos(job.limit),
            places=Places(state=None if job.state is None else Path(job.state)),
        )
        return booted.exit.code
    finally:
        sink.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
