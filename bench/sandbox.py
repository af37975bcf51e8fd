"""What the sandbox costs: starting a service, its memory, and one call, confined and not.

Confined is as in production: ids, limits, namespaces, Landlock and the system call filter. The
other run is the same kernel without them (LinuxKernel's `harden`). The two stand side by side in
each round, in alternating order, and a ratio is taken within a round.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Final

import msgspec

from bench.measure import Placement, Sample
from bench.pairing import Spread, WorkerError, run_worker
from bench.report import CallCost, SpawnCost
from bench.spawns import ISOLATIONS, SpawnSample

SPAWNS: Final = {"fork": 20, "exec": 3}  # of one run; an interpreter takes thirty times a fork
SPAWN_SECONDS_MAX: Final = 60.0  # for one run; then it hangs
CALLS: Final = {
    "typed call": ("typed", "typed_unconfined"),
    "bare exchange": ("bare", "bare_unconfined"),
}
ON: Final = "on"
OFF: Final = "off"


def _spawn_sample(isolation: str, hardened: str) -> SpawnSample:
    count = str(SPAWNS[isolation])
    command = (sys.executable, "-m", "bench.spawns", isolation, hardened, count)
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=SPAWN_SECONDS_MAX
        )
    except subprocess.TimeoutExpired as error:
        raise WorkerError(f"spawns {isolation}: nothing after {error.timeout:.0f} s") from error
    if done.returncode != 0:
        raise WorkerError(f"spawns {isolation}: exit {done.returncode}\n{done.stderr.strip()}")
    return msgspec.json.decode(done.stdout.splitlines()[-1], type=SpawnSample)


def _order(number: int) -> tuple[str, str]:
    return (ON, OFF) if number % 2 == 0 else (OFF, ON)


def _spread(values: Sequence[float | None]) -> Spread | None:
    """None if one of the values could not be read."""
    known = [value for value in values if value is not None]
    return Spread.of(known) if len(known) == len(values) else None


def spawns(*, rounds: int, progress: Callable[[str], None]) -> list[SpawnCost]:
    """Start a service with and without its sandbox, for each kind of isolation."""
    costs: list[SpawnCost] = []
    for isolation in ISOLATIONS:
        found: dict[str, list[SpawnSample]] = {ON: [], OFF: []}
        for number in range(rounds):
            for hardened in _order(number):
                found[hardened].append(_spawn_sample(isolation, hardened))
            on, off = (found[each][-1].up_ns / 1e6 for each in (ON, OFF))
            progress(f"sandbox: round {number + 1}: {isolation}: {on:.1f} ms, off {off:.1f} ms")
        pairs = list(zip(found[ON], found[OFF], strict=True))
        costs.append(
            SpawnCost(
                isolation=isolation,
                confined_ms=Spread.of([on.up_ns / 1e6 for on, _ in pairs]),
                unconfined_ms=Spread.of([off.up_ns / 1e6 for _, off in pairs]),
                difference_ms=Spread.of([(on.up_ns - off.up_ns) / 1e6 for on, off in pairs]),
                confined_pss=_spread([on.pss for on, _ in pairs]),
                unconfined_pss=_spread([off.pss for _, off in pairs]),
                confined_dirty=_spread([on.private_dirty for on, _ in pairs]),
                unconfined_dirty=_spread([off.private_dirty for _, off in pairs]),
                degraded=sorted({step for on, _ in pairs for step in on.degraded}),
            )
        )
    return costs


def _call_sample(variant: str, place: Placement, seconds: float) -> Sample:
    result = run_worker(variant, place, seconds)
    assert isinstance(result, Sample), "ours need nothing foreign"
    return result


def calls(*, rounds: int, seconds: float, progress: Callable[[str], None]) -> list[CallCost]:
    """Calls between two services with and without their sandbox, on one CPU."""
    cpu = min(os.sched_getaffinity(0))
    place = Placement(client=cpu, server=cpu)
    costs: list[CallCost] = []
    for name, (confined, unconfined) in CALLS.items():
        variants = {ON: confined, OFF: unconfined}
        found: dict[str, list[Sample]] = {ON: [], OFF: []}
        for number in range(rounds):
            for hardened in _order(number):
                found[hardened].append(_call_sample(variants[hardened], place, seconds))
            on, off = (found[each][-1].p50_ns / 1000 for each in (ON, OFF))
            progress(f"sandbox: round {number + 1}: {name}: {on:.2f} us, off {off:.2f} us")
        pairs = list(zip(found[ON], found[OFF], strict=True))
        costs.append(
            CallCost(
                name=name,
                p50_us=Spread.of([on.p50_ns / 1000 for on, _ in pairs]),
                base_us=Spread.of([off.p50_ns / 1000 for _, off in pairs]),
                ratio=Spread.of([on.p50_ns / off.p50_ns for on, off in pairs]),
            )
        )
    return costs
