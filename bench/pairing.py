"""Paired rounds: every variant runs between two runs of the yardstick.

A shared machine drifts by a factor over minutes and by far less over a second. So what is
kept of a run is its ratio to the mean of the C runs just before and just after it; a round
visits all variants, the next one in the opposite order, and the report gives the median over
rounds with the smallest and largest.
"""

import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Final

import msgspec

from bench.measure import Placement, Sample, Skipped
from bench.yardstick import Yardstick

WORKER_SECONDS_MAX: Final = 60.0  # start-up, warm-up and tear-down of one worker; then it hangs
C_CREDENTIALS: Final = "c_credentials"


class WorkerError(Exception):
    """A worker died or hung: a fault of ours, not a missing peer."""


class Spread(msgspec.Struct, frozen=True):
    """Median, smallest and largest over the rounds."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """The spread of at least one value."""
        return cls(statistics.median(values), min(values), max(values))


class Pair(msgspec.Struct, frozen=True):
    """One run and the yardstick around it."""

    round: int
    sample: Sample
    c_p50_ns: float
    c_rate: float

    @property
    def ratio(self) -> float:
        """Time per message as a multiple of the C round trip, medians of both."""
        return self.sample.p50_ns / self.sample.messages / self.c_p50_ns


class Variant(msgspec.Struct):
    """All runs of one variant in one placement, or why there are none."""

    name: str
    placement: Placement
    pairs: list[Pair] = []
    skipped: str | None = None

    def spread(self, of: Callable[[Pair], float]) -> Spread:
        """Median and range of something over the rounds."""
        return Spread.of([of(pair) for pair in self.pairs])

    def against(self, other: "Variant") -> Spread | None:
        """How many times faster this one is than `other`: ratios to C, paired by round."""
        theirs = {pair.round: pair.ratio for pair in other.pairs}
        ratios = [theirs[pair.round] / pair.ratio for pair in self.pairs if pair.round in theirs]
        return Spread.of(ratios) if ratios else None


def run_worker(name: str, placement: Placement, seconds: float) -> Sample | Skipped:
    """Run one variant in a process of its own."""
    command = (
        sys.executable,
        "-m",
        "bench.worker",
        name,
        str(placement.client),
        str(placement.server),
        str(seconds),
    )
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            timeout=seconds + WORKER_SECONDS_MAX,
        )
    except subprocess.TimeoutExpired as error:
        raise WorkerError(f"{name}: no result after {error.timeout:.0f} s") from error
    if done.returncode != 0:
        raise WorkerError(f"{name}: exit {done.returncode}\n{done.stderr.strip()}")
    result: Sample | Skipped = msgspec.json.decode(
        done.stdout.splitlines()[-1], type=Sample | Skipped
    )
    return result


def run_rounds(
    yardstick: Yardstick,
    names: Sequence[str],
    placement: Placement,
    *,
    rounds: int,
    seconds: float,
    progress: Callable[[str], None],
) -> dict[str, Variant]:
    """Run every variant `rounds` times, each between two C runs, in alternating order."""
    variants = {name: Variant(name, placement) for name in names}
    for index in range(rounds):
        order = list(names) if index % 2 == 0 else list(reversed(names))
        before = yardstick.run(placement, seconds)
        for name in order:
            variant = variants[name]
            if variant.skipped is not None:
                continue
            result: Sample | Skipped
            if name == C_CREDENTIALS:
                result = yardstick.run(placement, seconds, credentials=True)
            else:
                result = run_worker(name, placement, seconds)
            if isinstance(result, Skipped):
                variant.skipped = result.reason
                progress(f"{placement.label}: {name}: skipped: {result.reason}")
                continue
            after = yardstick.run(placement, seconds)
            pair = Pair(
                index,
                result,
                (before.p50_ns + after.p50_ns) / 2,
                (before.rate + after.rate) / 2,
            )
            variant.pairs.append(pair)
            before = after
            progress(
                f"{placement.label}: round {index + 1}: {name}: "
                f"{result.p50_ns / result.messages / 1000:.2f} us, {pair.ratio:.2f} x C"
            )
    return variants
