"""What a service costs to start, confined and not: `python -m bench.spawns fork|exec on|off COUNT`.

Starts the same waiting service COUNT times, one after the other, and prints one JSON line, a
SpawnSample. Time runs from the Spawn trap to the service's first word; memory is read then.
"""

import statistics
import sys
import time
from typing import Final

import msgspec

from bench.memory import memory_of
from bench.ours import RUN_NS
from bench.programs import DIGEST, SETUP_NS, program
from nexus.abi import (
    INIT_NAME,
    BootImage,
    Event,
    EventKind,
    Grants,
    Isolation,
    Kill,
    Nanos,
    Now,
    Program,
    Recv,
    Send,
    Spawn,
    SpawnSpec,
    Wait,
)
from nexus.kernel.linux import LinuxKernel

WAITING: Final = "bench.waiting"
ISOLATIONS: Final = {"fork": Isolation.FORK, "exec": Isolation.EXEC}


class SpawnSample(msgspec.Struct, frozen=True):
    """Medians over the spawns of one run; bytes of one service, None where they are hidden.

    `degraded` names the steps of the confinement that this machine could not take.
    """

    up_ns: float
    pss: float | None
    private_dirty: float | None
    degraded: list[str]


async def waiting(boot: BootImage) -> int:
    """Say a word and wait: the least a service does, in an interpreter with its whole runtime."""
    assert boot.control is not None
    deadline = Nanos(await Now() + SETUP_NS)
    await Send(boot.control, b"up", deadline=deadline)
    _ = await Recv((boot.endpoint,), deadline)
    return 0


class SpawnRoot:
    """The root task: starts and ends one service at a time."""

    def __init__(self, isolation: Isolation, count: int) -> None:
        self._grants = Grants(isolation=isolation)
        self._count = count
        self.times: list[int] = []
        self.pss: list[int] = []
        self.private_dirty: list[int] = []

    async def main(self, boot: BootImage) -> int:
        """Start, read, end, so many times."""
        deadline = Nanos(await Now() + RUN_NS)
        for number in range(self._count + 1):
            spec = SpawnSpec(WAITING, WAITING, boot.endpoint, grants=self._grants)
            start = time.perf_counter_ns()
            spawned = await Spawn(spec)
            _ = await Recv((boot.endpoint,), deadline, link=spawned.link)
            if number:  # the first one warms up
                self.times.append(time.perf_counter_ns() - start)
                memory = memory_of(spawned.pid)
                if memory is not None:
                    self.pss.append(memory.pss)
                    self.private_dirty.append(memory.private_dirty)
            await Kill(spawned.pid)
            _ = await Wait(spawned.pid, deadline)
        return 0


def sample(isolation: Isolation, count: int, *, harden: bool) -> SpawnSample:
    """Run it."""
    degraded: set[str] = set()

    def record(event: Event) -> None:
        if event.kind is EventKind.SPAWN and event.fields["name"] == WAITING:
            steps = event.fields["degraded"]
            assert isinstance(steps, list), "the kernel's own list of names"
            degraded.update(steps)

    table = {
        WAITING: Program(name=WAITING, main=waiting, digest=DIGEST, entry="bench.spawns:waiting")
    }
    kernel = LinuxKernel(table, recorder=record, harden=harden)
    root = SpawnRoot(isolation, count)
    until = Nanos(time.monotonic_ns() + 2 * RUN_NS)
    ended = kernel.run(program(INIT_NAME, root.main), b"", until=until)
    assert ended.code == 0, f"root ended with {ended}"
    return SpawnSample(
        up_ns=statistics.median(root.times),
        pss=statistics.median(root.pss) if root.pss else None,
        private_dirty=statistics.median(root.private_dirty) if root.private_dirty else None,
        degraded=sorted(degraded),
    )


def main(arguments: list[str]) -> int:
    """Take one sample and print it."""
    isolation, hardened, count = arguments
    found = sample(ISOLATIONS[isolation], int(count), harden=hardened == "on")
    print(msgspec.json.encode(found).decode())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
