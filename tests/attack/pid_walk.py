"""Spawns without end as pid 1 of a small pid namespace; run as a program of its own.

    python -m tests.attack.pid_walk PID_MAX SPAWNS DEAF_TURNS [reckless]

A fresh interpreter, because a fork copies the page tables of its parent and a test runner is
large. Prints what was heard as JSON. `reckless` gives numbers again at once: the fault that the
burning of numbers is there against.
"""

import ctypes
import dataclasses
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from nexus.abi import (
    NO_WAIT,
    AbiError,
    BootImage,
    CapClose,
    EventKind,
    Nanos,
    PeerGone,
    Recv,
    Sender,
    SpawnLastError,
    SpawnReason,
    Status,
    service_id,
)
from nexus.kernel.core.limits import SystemLimits
from nexus.kernel.linux.identity import IdentityTable
from nexus.testing.conformance.steps import ended_well, start, tell
from nexus.testing.rig import Main, linux_rig

QUEUED_MAX: Final = 6  # dead tasks whose words wait, before root listens anyway
RUN_TIME: Final = Nanos(270_000_000_000)

CLONE_NEWPID: Final = 0x2000_0000
CLONE_NEWNS: Final = 0x0002_0000
MS_PRIVATE_REC: Final = 0x4_4000
LIBC: Final = ctypes.CDLL(None, use_errno=True)


async def says_its_name(boot: BootImage) -> None:
    """The program of every service here."""
    await tell(boot, f"{boot.name} {boot.generation}".encode())


class Listener:
    """Root's side: starts services and listens late, so that numbers come back early."""

    def __init__(self, boot: BootImage) -> None:
        self.boot = boot
        self.queued = 0
        self.heard = 0
        self.refusals = 0
        self.pids: set[int] = set()
        self.wrong: list[str] = []

    async def listen(self) -> None:
        """Hear everybody who has spoken, and compare what they say with what the kernel says."""
        while self.queued:
            try:
                message = await Recv((self.boot.endpoint,), NO_WAIT)
            except PeerGone:
                self.queued -= 1
                continue
            name, generation = message.data.decode().split()
            claimed = (service_id(name), int(generation))
            if claimed != (message.sender.service, message.sender.generation):
                self.wrong.append(f"{message.data!r} as {message.sender}")
            self.heard += 1

    async def spawn(self, name: str) -> None:
        """Start a service to its end; where every number is burned, listen and try again."""
        try:
            spawned = await start(self.boot, name, program="child")
        except AbiError as error:
            assert error.status is Status.NO_SPACE
            assert await SpawnLastError() is SpawnReason.OOM
            assert self.queued, "a number stays burned though nothing of its holder is queued"
            self.refusals += 1
            await self.listen()
            spawned = await start(self.boot, name, program="child")
        self.pids.add(spawned.pid)
        self.queued += 1
        await ended_well(spawned)
        await CapClose(spawned.slot)


def walk(spawns: int, deaf_turns: int) -> Main:
    """A root that spawns again and again; every `deaf_turns`th time it leaves words queued."""

    async def root(boot: BootImage) -> Mapping[str, Any]:
        listener = Listener(boot)
        for index in range(spawns):
            await listener.spawn(f"service{index % 7}")
            if index % deaf_turns or listener.queued > QUEUED_MAX:
                await listener.listen()
        await listener.listen()
        return {
            "heard": listener.heard,
            "wrong": listener.wrong,
            "refusals": listener.refusals,
            "pids": len(listener.pids),
        }

    return root


def be_reckless() -> None:
    """Let the table follow a number at once, whoever's words are still queued."""

    def publish_over(table: IdentityTable, sender: Sender, uid: int, gid: int) -> None:
        if burned(table, sender.pid):
            table.clear(sender.pid)
        publish(table, sender, uid, gid)

    burned, publish = IdentityTable.burned, IdentityTable.publish
    for name, replacement in {
        "burned": lambda _table, _pid: False,
        "publish": publish_over,
    }.items():
        setattr(IdentityTable, name, replacement)


def main(pid_max: str, spawns: str, deaf_turns: str, *options: str) -> int:
    """Make the namespace, become its pid 1, run, print."""
    if options == ("reckless",):
        be_reckless()
    if LIBC.unshare(CLONE_NEWPID | CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), "unshare")
    first = os.fork()
    if first:
        _, status = os.waitpid(first, 0)
        return os.waitstatus_to_exitcode(status)
    LIBC.mount(None, b"/", None, MS_PRIVATE_REC, None)
    LIBC.mount(b"proc", b"/proc", b"proc", 0, None)
    Path("/proc/sys/kernel/pid_max").write_text(pid_max)
    rig = dataclasses.replace(
        linux_rig(), forked=False, time_max=RUN_TIME, kinds=frozenset((EventKind.CONSOLE,))
    )
    outcome = rig.run_here(
        walk(int(spawns), int(deaf_turns)), {"child": says_its_name}, SystemLimits(), b""
    )
    sys.stdout.write(json.dumps({"failures": outcome.failures, "result": outcome.result}))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
