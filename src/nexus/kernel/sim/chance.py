"""The one seeded source of a run: every choice the simulated kernel makes is drawn here.

Each purpose has a stream of its own, derived from the seed, so that switching one thing on
(faults, say) does not shift the choices of another.
"""

from array import array
from collections.abc import Iterator
from itertools import chain
from random import Random  # noqa: TID251 (the seeded generator all simulated choices come from)
from typing import Final

RESUME_COST_MIN: Final = 2_000  # ns; a service that only looks at its state
RESUME_COST_MAX: Final = RESUME_COST_MIN + 0x3FFF  # ns, 18.4 us; a typed request in Python
COST_BLOCK: Final = 4_096  # costs drawn at a time
CLOCK_START_MIN: Final = 10**14  # ns, over a day: code that takes 0 for "now" shows at once
CLOCK_START_MAX: Final = 10**16  # ns, under a year; far below NEVER

assert 0 < RESUME_COST_MIN <= RESUME_COST_MAX


class Chance:
    """Streams of choices, a function of the seed alone."""

    __slots__ = ("_cost", "_entropy", "costs", "faults", "seed", "start")

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._cost = Random(f"nexus.cost.{seed}")  # noqa: S311 (simulation, not keys)
        self.costs = chain.from_iterable(self._cost_blocks())  # ns, one for each resume
        self.faults = Random(f"nexus.faults.{seed}")  # noqa: S311 (simulation, not keys)
        self._entropy = Random(f"nexus.entropy.{seed}")  # noqa: S311 (simulated device)
        clock = Random(f"nexus.clock.{seed}")  # noqa: S311 (simulation, not keys)
        self.start = clock.randrange(CLOCK_START_MIN, CLOCK_START_MAX)

    def _cost_blocks(self) -> Iterator[list[int]]:
        while True:
            drawn = array("H", self._cost.randbytes(2 * COST_BLOCK))
            yield [RESUME_COST_MIN + (number & 0x3FFF) for number in drawn]

    def of_device(self, name: str) -> Random:
        """The stream of a device of the bus, from its beginning."""
        return Random(f"nexus.device.{name}.{self.seed}")  # noqa: S311 (simulated device)

    def entropy(self, size: int) -> bytes:
        """Bytes of the simulated entropy device."""
        return self._entropy.randbytes(size)
