"""Runs of the Linux kernel in the test's own process, with what it recorded and left behind."""

import os
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from nexus.abi import (
    BootImage,
    Event,
    EventKind,
    ExitInfo,
    Nanos,
    Program,
    Spawn,
    Spawned,
    SpawnSpec,
    Trap,
)
from nexus.kernel.linux import LinuxKernel

Main = Callable[[BootImage], Coroutine[Trap[Any], Any, int | None]]

RUN_TIME: Final = 60_000_000_000  # nanoseconds
SECOND: Final = 1_000_000_000


class Run(NamedTuple):
    """One finished run."""

    exit: ExitInfo
    events: list[Event]
    kernel: LinuxKernel

    def of(self, kind: EventKind, name: str | None = None) -> list[Mapping[str, object]]:
        """The fields of the events of one kind, of one task if named."""
        return [
            event.fields
            for event in self.events
            if event.kind is kind and name in (None, event.fields.get("name"))
        ]

    def lines(self) -> list[str]:
        """The console lines."""
        return [str(fields["line"]) for fields in self.of(EventKind.CONSOLE)]


def program(name: str, main: Main) -> Program:
    """A program without an image."""
    return Program(name=name, main=main, digest="0" * 64)


def make(events: list[Event], programs: Mapping[str, Main], **options: Any) -> LinuxKernel:
    """A kernel that records into `events`."""
    table = {name: program(name, main) for name, main in programs.items()}
    return LinuxKernel(table, recorder=events.append, **options)


def run(root: Main, programs: Mapping[str, Main] | None = None, **options: Any) -> Run:
    """Run a root task to its end."""
    events: list[Event] = []
    kernel = make(events, programs or {}, **options)
    ended = kernel.run(program("root", root), b"", until=Nanos(kernel.now + RUN_TIME))
    return Run(ended, events, kernel)


async def start(boot: BootImage, name: str, **values: Any) -> Spawned:
    """Spawn the program of the same name."""
    return await Spawn(SpawnSpec(name, values.pop("program", name), boot.endpoint, **values))


def holdings() -> tuple[int, int]:
    """Open descriptors and children of this process."""
    descriptors = sum(1 for _ in Path("/proc/self/fd").iterdir())
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return descriptors, len(children)
