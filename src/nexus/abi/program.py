"""What a kernel can start."""

from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any

from nexus.abi.traps import Trap
from nexus.abi.types import Nanos, Pid, ServiceId, Slot


@dataclass(frozen=True, kw_only=True, slots=True)
class BootImage:
    """What a task finds when it starts: who it is, its two first slots, and its argument.

    `control` is a SEND link to the task that spawned it; `endpoint` is its own endpoint
    (RECV and MANAGE) to which the spawner holds a link. The root task has no `control`.
    `descriptors` are for programs with ordinary libraries; the simulated kernel has none.
    """

    name: str
    service: ServiceId
    pid: Pid
    generation: int
    control: Slot | None
    endpoint: Slot
    now: Nanos
    argument: bytes
    ports: tuple[Slot, ...] = ()  # in the order of Grants.ports
    hardware: tuple[Slot, ...] = ()  # in the order of Grants.hardware
    descriptors: tuple[tuple[str, int], ...] = ()  # granted devices and sockets, by name


@dataclass(frozen=True, kw_only=True, slots=True)
class Program:
    """A program: `main` returns the exit code (None is 0); `digest` is SHA-256, hexadecimal.

    `entry` is where an interpreter of its own finds `main`, as "package.module:name", with
    `path` in front of its import path. `ordinary` programs use libraries that need an event loop
    of their own; on linux they run under the asyncio driver, and `main` is their double.
    `set_digest` is the SHA-256 of the system set that it came with, empty outside of a slot.
    """

    name: str
    main: Callable[[BootImage], Coroutine[Trap[Any], Any, int | None]]
    digest: str
    entry: str = ""
    path: tuple[str, ...] = ()
    ordinary: bool = False
    set_digest: str = ""


Programs = Mapping[str, Program]
"""The program table given to a kernel; Spawn names its entries."""
