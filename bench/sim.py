"""bench/sim: how many typed calls the simulated kernel carries per second of one core."""

import os
from collections.abc import Callable
from typing import Final

from bench.measure import Placement, Skipped
from bench.pairing import Spread, run_worker
from bench.report import SimResult, Target

RATE_MIN: Final = 60_000.0  # typed round trips per second, everything on
VARIANT: Final = "sim_typed"
BARE_VARIANT: Final = "sim_bare"


def run(
    *, rounds: int, seconds: float, progress: Callable[[str], None]
) -> tuple[SimResult, Target]:
    """Run the whole simulated system `rounds` times on one CPU; wall-clock rates."""
    cpu = min(os.sched_getaffinity(0))
    place = Placement(client=cpu, server=cpu)
    rates: dict[str, list[float]] = {VARIANT: [], BARE_VARIANT: []}
    cpu_us: dict[str, list[float]] = {VARIANT: [], BARE_VARIANT: []}
    for index in range(rounds):
        names = tuple(rates) if index % 2 == 0 else tuple(reversed(rates))
        for name in names:
            result = run_worker(name, place, seconds)
            assert not isinstance(result, Skipped), "the simulated kernel needs nothing foreign"
            rates[name].append(result.rate)
            cpu_us[name].append(result.cpu_ns / 1000)
            progress(f"sim: round {index + 1}: {name}: {result.rate:,.0f} round trips/s")
    typed = Spread.of(rates[VARIANT])
    # Of one core: by its CPU time, which is wall-clock time where nobody else wants the core.
    per_core = Spread.of([1e6 / each for each in cpu_us[VARIANT]])
    target = Target(
        "simulated typed round trips per second of one core",
        RATE_MIN,
        at_most=False,
        measured=per_core,
    )
    found = SimResult(
        rounds=rounds,
        rate=typed,
        bare_rate=Spread.of(rates[BARE_VARIANT]),
        cpu_us=Spread.of(cpu_us[VARIANT]),
        bare_cpu_us=Spread.of(cpu_us[BARE_VARIANT]),
    )
    return found, target
