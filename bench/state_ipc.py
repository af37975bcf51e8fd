"""What a put and a get cost a client of statefsd, apart from the engine in process.

Boots bench/stated.toml on a state directory of its own, whose timer measures in rounds inside one
boot, and reads what it says on the console.
"""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

from bench.boot_child import CHILD
from bench.pairing import Spread, WorkerError
from bench.stated import DONE_LINE, SAMPLE_LINE, WAYS
from nexus.abi import Event, EventKind
from nexus.proof.runner import Job, run_boot

SYSTEM: Final = Path(__file__).with_name("stated.toml")
RUN_NS_MAX: Final = 60_000_000_000  # ns; the rounds of the file take a sixth of it
SEED: Final = 1


class Watcher:
    """Sees a boot's events; `p50` and `p99` are us of each way, in the order of the rounds."""

    def __init__(self) -> None:
        self.p50: dict[str, list[float]] = {way: [] for way in WAYS}
        self.p99: dict[str, list[float]] = {way: [] for way in WAYS}
        self.done = False

    def __call__(self, event: Event) -> bool:
        """Take in one event; True when the timer is done."""
        if event.kind is not EventKind.CONSOLE:
            return False
        if event.fields["line"] == SAMPLE_LINE:
            evidence = event.fields["evidence"]
            assert isinstance(evidence, dict), "the timer's own evidence"
            self.p50[evidence["way"]].append(evidence["p50"] / 1000)
            self.p99[evidence["way"]].append(evidence["p99"] / 1000)
        self.done = self.done or event.fields["line"] == DONE_LINE
        return self.done


def run(
    *, directory: Path | None = None, progress: Callable[[str], None]
) -> dict[str, tuple[Spread, Spread]]:
    """One boot; p50 and p99 of each way, us. The image is in `directory`, the disk's if given."""
    watcher = Watcher()
    with tempfile.TemporaryDirectory(prefix="nxbench", dir=directory) as state:
        job = Job(
            ground="linux",
            system=str(SYSTEM),
            smp=len(os.sched_getaffinity(0)),
            seed=SEED,
            limit=RUN_NS_MAX,
            state=state,
        )
        trace = run_boot(job, timeout=RUN_NS_MAX, watch=watcher, command=CHILD)
    if not watcher.done:
        raise WorkerError(f"{SYSTEM.name}: the timer was never done\n{trace.output}")
    found = {}
    for way in WAYS:
        found[way] = Spread.of(watcher.p50[way]), Spread.of(watcher.p99[way])
        progress(f"state through IPC: {way}: {found[way][0].median:.1f} us")
    return found


if __name__ == "__main__":
    _ = run(progress=print)
