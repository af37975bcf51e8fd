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
    """

    name: str
    service: ServiceId
    pid: Pid
    generation: int
    control: Slot | None
    endpoint: Slot
    now: Nanos
    argument: bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Program:
    """A program: `main` returns the exit code (None is 0); `digest` is SHA-256, hexadecimal."""

    name: str
    main: Callable[[BootImage], Coroutine[Trap[Any], Any, int | None]]
    digest: str


Programs = Mapping[str, Program]
"""The program table given to a kernel; Spawn names its entries."""
