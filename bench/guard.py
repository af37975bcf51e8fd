"""What a guarded call costs: with a kept decision, and with policyd asked each time.

Boots bench/guarded.toml, whose timer measures the three ways in rounds inside one boot, and reads
what it says on the console.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

from bench.boot_child import CHILD
from bench.guarded import ASKED, DONE_LINE, KEPT, SAMPLE_LINE, UNGUARDED
from bench.pairing import Spread, WorkerError
from bench.report import CallCost
from nexus.abi import Event, EventKind
from nexus.proof.runner import Job, run_boot

SYSTEM: Final = Path(__file__).with_name("guarded.toml")
RUN_NS_MAX: Final = 60_000_000_000  # ns; the rounds of the file take a tenth of it
SEED: Final = 1


class Watcher:
    """Sees a boot's events; `samples` are the p50 of each way, us, in the order of the rounds."""

    def __init__(self) -> None:
        self.samples: dict[str, list[float]] = {UNGUARDED: [], KEPT: [], ASKED: []}
        self.done = False

    def __call__(self, event: Event) -> bool:
        """Take in one event; True when the timer is done."""
        if event.kind is not EventKind.CONSOLE:
            return False
        if event.fields["line"] == SAMPLE_LINE:
            evidence = event.fields["evidence"]
            assert isinstance(evidence, dict), "the timer's own evidence"
            self.samples[evidence["way"]].append(evidence["p50"] / 1000)
        self.done = self.done or event.fields["line"] == DONE_LINE
        return self.done


def run(*, progress: Callable[[str], None]) -> list[CallCost]:
    """One boot; the cost of both guarded ways against the unguarded one, paired by round."""
    watcher = Watcher()
    job = Job(
        ground="linux",
        system=str(SYSTEM),
        smp=len(os.sched_getaffinity(0)),
        seed=SEED,
        limit=RUN_NS_MAX,
    )
    trace = run_boot(job, timeout=RUN_NS_MAX, watch=watcher, command=CHILD)
    if not watcher.done:
        raise WorkerError(f"{SYSTEM.name}: the timer was never done\n{trace.output}")
    plain = watcher.samples[UNGUARDED]
    costs: list[CallCost] = []
    for way in (KEPT, ASKED):
        took = watcher.samples[way]
        cost = CallCost(
            name=way,
            p50_us=Spread.of(took),
            base_us=Spread.of(plain),
            ratio=Spread.of([one / base for one, base in zip(took, plain, strict=True)]),
        )
        progress(
            f"guarded: {way}: {cost.p50_us.median:.2f} us, {cost.ratio.median:.2f} x unguarded"
        )
        costs.append(cost)
    return costs
