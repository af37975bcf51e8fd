"""Which of the promises about a service's confinement this machine and user can keep, tried.

`nexus doctor` shows it. A child goes through the very steps every service goes through and
tells which it could take; the rest is looked up.
"""

import json
import os
import signal
from enum import StrEnum
from pathlib import Path
from typing import Final, NamedTuple, NoReturn

from nexus.abi import HEAP_SIZE
from nexus.kernel.linux import landlock, seccomp
from nexus.kernel.linux.harden import (
    UID_FIRST,
    Confinement,
    Hardening,
    Namespaces,
    preload,
    readable,
)
from nexus.kernel.linux.kernel import enough_descriptors, may_renice
from nexus.kernel.linux.native import MACHINE

PID_MAX_LARGE: Final = 1 << 22  # the largest Linux has: a number comes again late
ANSWER_TIME: Final = 5_000  # milliseconds the child may take
ANSWER_SIZE_MAX: Final = 4096  # bytes


class State(StrEnum):
    """How far a guarantee holds."""

    HELD = "held"
    DEGRADED = "degraded"
    ABSENT = "absent"


class Guarantee(NamedTuple):
    """One guarantee: what it gives, and why it does not hold fully where it does not."""

    name: str
    state: State
    gives: str
    why: str = ""


# Name of a step, what it gives, and what is left where it cannot be taken.
STEPS: Final = (
    ("limits", "descriptors, core dumps, processes and locked memory are bounded", State.ABSENT),
    ("memory", "memory, mappings and memory objects are bounded by the budget", State.ABSENT),
    ("namespaces", "no network, no host name, no System V objects in sight", State.ABSENT),
    ("ids", "a user id of its own: no signal to, no trace of another service", State.DEGRADED),
    ("capabilities", "no capability: a sender's pid cannot be forged", State.ABSENT),
    ("not_dumpable", "memory and descriptors are closed to processes of the same id", State.ABSENT),
    ("landlock", "no file can be opened by path", State.ABSENT),
    ("landlock_scope", "no abstract socket and no signal outside", State.DEGRADED),
    ("seccomp", "only the listed system calls", State.ABSENT),
)


def hardening_report() -> tuple[Guarantee, ...]:
    """The state of each guarantee on this machine, for this user."""
    preload()
    refused = _try_in_a_child()
    root = os.geteuid() == 0
    rows = [
        Guarantee(name, left if name in refused else State.HELD, gives, refused.get(name, ""))
        for name, gives, left in STEPS
    ]
    if "landlock" in refused:
        index = [row.name for row in rows].index("landlock_scope")
        rows[index] = rows[index]._replace(state=State.ABSENT, why=refused["landlock"])
    renice = may_renice()
    rows.append(
        Guarantee(
            "qos",
            State.HELD if renice else State.ABSENT,
            "Linux schedules a service by its class",
            "" if renice else "a priority once lowered could not be raised again",
        )
    )
    enough = enough_descriptors()
    rows.append(
        Guarantee(
            "descriptors",
            State.HELD if enough else State.DEGRADED,
            "init has a descriptor for everything that may be live at once",
            "" if enough else "the hard limit of open files is lower: spawns fail earlier",
        )
    )
    pid_max = int(Path("/proc/sys/kernel/pid_max").read_text())
    rows.append(
        Guarantee(
            "pid_reuse",
            State.HELD if root and pid_max >= PID_MAX_LARGE else State.DEGRADED,
            "a pid never means two services; two colluding ones cannot wait for it to come again",
            "" if pid_max >= PID_MAX_LARGE else f"pid_max is {pid_max}: it comes again soon",
        )
    )
    return tuple(rows)


def _try_in_a_child() -> dict[str, str]:
    """Confine a child and learn which steps it could not take."""
    namespaces = Namespaces() if os.geteuid() == 0 else None
    reader, writer = os.pipe()
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        _confined(
            Confinement(
                parent=parent,
                uid=UID_FIRST if os.geteuid() == 0 else None,
                keep=(writer,),
                null=null,
                namespaces=() if namespaces is None else namespaces.descriptors,
                enabled=True,
                name="doctor",
                budget=HEAP_SIZE,
            )
        )
    os.close(writer)
    os.close(null)
    answer = b""
    # A part at a time, each bounded: the child writes once.
    while readable(reader, ANSWER_TIME) and (part := os.read(reader, ANSWER_SIZE_MAX)):
        answer += part
    os.close(reader)
    os.kill(child, signal.SIGKILL)
    _ = os.waitpid(child, 0)
    if namespaces is not None:
        namespaces.close()
    if not answer:
        return {name: "the confined child ended" for name, _, _ in STEPS}
    refused: dict[str, str] = dict(json.loads(answer))
    return refused


def _confined(confinement: Confinement) -> NoReturn:
    try:
        hardening = Hardening(confinement)
        (writer,) = hardening.before_identity()
        hardening.finish()
        _ = os.write(writer, json.dumps(hardening.why).encode())
    finally:
        os._exit(0)


def kernel_facts() -> dict[str, int | str]:
    """What the report rests on, for the record."""
    return {
        "landlock_abi": landlock.version(),
        "seccomp_calls": len(seccomp.allowed_calls(MACHINE)) if MACHINE in seccomp.MACHINES else 0,
        "machine": MACHINE,
        "release": os.uname().release,
    }
