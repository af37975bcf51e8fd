"""The evidence stream: what a kernel itself records, the same kinds on every ground."""

from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import NamedTuple

from nexus.abi.types import Nanos, Pid


class EventKind(StrEnum):
    """The closed set of recorded events."""

    # name, generation, program, digest, qos, service (hex id), grants: a task was let go
    SPAWN = "spawn"
    # name, program, reason, detail: a refused spawn, or a spawned task that will never be let go
    SPAWN_FAILED = "spawn_failed"
    EXIT = "exit"  # name, generation, code, signal; crash (text) if there is one
    CONSOLE = "console"  # name, generation, line, evidence (object)
    LINK = "link"  # owner, holder, depth, size: a link was made
    QOS = "qos"  # line: the QOS-AUDIT text (core.md 1.2)
    REFUSED = "refused"  # reason: identity, several_caps, oversize, excess_link; owner
    HEAP = "heap"  # the report of an allocation over the budget
    FAULT = "fault"  # point, count: an injected fault fired
    KERNEL = "kernel"  # line: KSELFTEST and KINIT lines; evidence (object)
    TRAP = "trap"  # name, trap, status, size: only while tracing is on
    HANG = "hang"  # name: a task that never yields
    # name, what, and what goes with it: a status register was written, bytes were delivered
    DEVICE = "device"


class Event(NamedTuple):
    """One recorded event: when (kernel clock), what, about which task, and its fields."""

    time: Nanos
    kind: EventKind
    pid: Pid
    fields: Mapping[str, object]


Recorder = Callable[[Event], None]
"""Where a kernel puts its events. Must not block and must not raise."""
