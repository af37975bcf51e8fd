"""A pid number never means two services while a message of its former holder can be queued.

As pid 1 of a pid namespace of its own, whose pid_max is Linux's least: after the first 300
numbers every process gets the number 300, so each spawn meets the burned number of the last.
"""

import ctypes
import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import pytest

from nexus.abi import (
    NO_WAIT,
    AbiError,
    BootImage,
    CapClose,
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
from nexus.testing.rig import Main, Rig, linux_rig

pytestmark = [
    pytest.mark.linux,
    pytest.mark.skipif(os.getuid() != 0, reason="a pid namespace is made by root"),
]

PID_MAX_MINIMUM: Final = 301  # Linux refuses less: RESERVED_PIDS + 1
SPAWNS: Final = 10 * PID_MAX_MINIMUM
DEAF_TURNS: Final = 30  # spawns after which root does not listen: the next meets a burned number
QUEUED_MAX: Final = 6  # dead tasks whose words wait, before root listens anyway
RUN_TIME: Final = Nanos(150_000_000_000)

CLONE_NEWPID: Final = 0x2000_0000
CLONE_NEWNS: Final = 0x0002_0000
MS_PRIVATE_REC: Final = 0x4_4000
LIBC: Final = ctypes.CDLL(None, use_errno=True)


def in_a_pid_namespace(rig: Rig, pid_max: int, root: Main, programs: Mapping[str, Main]) -> Any:
    """Run as pid 1 of a pid namespace whose numbers end below `pid_max`; the result as JSON."""
    reader, writer = os.pipe()
    middle = os.fork()
    if middle == 0:
        try:
            if LIBC.unshare(CLONE_NEWPID | CLONE_NEWNS):
                raise OSError(ctypes.get_errno(), "unshare")
            first = os.fork()
            if first == 0:
                _live_as_first(rig, pid_max, root, programs, writer)
            os.waitpid(first, 0)
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        data = file.read()
    os.waitpid(middle, 0)
    outcome = json.loads(data or b'{"failure": "no outcome"}')
    assert not outcome["failure"], outcome["failure"]
    return outcome["result"]


def _live_as_first(
    rig: Rig, pid_max: int, root: Main, programs: Mapping[str, Main], writer: int
) -> None:
    outcome: dict[str, Any] = {"failure": "the namespace was not made"}
    try:
        LIBC.mount(None, b"/", None, MS_PRIVATE_REC, None)
        LIBC.mount(b"proc", b"/proc", b"proc", 0, None)
        Path("/proc/sys/kernel/pid_max").write_text(str(pid_max))
        here = dataclasses.replace(rig, forked=False, time_max=RUN_TIME)
        run = here.run_here(root, programs, SystemLimits(), b"")
        outcome = {"failure": "\n".join(run.failures), "result": run.result}
    except BaseException as error:
        outcome["failure"] = repr(error)
    finally:
        os.write(writer, json.dumps(outcome).encode())
        os._exit(0)


async def _says_its_name(boot: BootImage) -> None:
    await tell(boot, f"{boot.name} {boot.generation}".encode())


class _Listener:
    """Root's side: starts services and listens late, so that numbers come back early."""

    def __init__(self, boot: BootImage) -> None:
        self.boot = boot
        self.queued = 0
        self.heard = 0
        self.refusals = 0
        self.pids: set[int] = set()
        self.wrong: list[str] = []

    async def listen(self) -> None:
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


def _walk(rig: Rig, pid_max: int, spawns: int, *, deaf_turns: int) -> Mapping[str, Any]:
    """Spawn again and again; every `deaf_turns`th time leave the words of the dead queued."""

    async def root(boot: BootImage) -> Mapping[str, Any]:
        listener = _Listener(boot)
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

    outcome: Mapping[str, Any] = in_a_pid_namespace(rig, pid_max, root, {"child": _says_its_name})
    return outcome


@pytest.mark.slow
def test_a_reused_pid_at_the_least_pid_max_never_changes_who_spoke() -> None:
    outcome = _walk(linux_rig(), PID_MAX_MINIMUM, SPAWNS, deaf_turns=DEAF_TURNS)

    assert outcome["wrong"] == []
    assert outcome["heard"] == SPAWNS
    assert outcome["refusals"] >= (SPAWNS - PID_MAX_MINIMUM) // DEAF_TURNS - 1, "burned numbers"
    assert outcome["pids"] < PID_MAX_MINIMUM


def test_a_few_numbers_more_are_enough_to_go_on_without_a_refusal() -> None:
    outcome = _walk(linux_rig(), PID_MAX_MINIMUM + 20, 360, deaf_turns=1)

    assert outcome["wrong"] == []
    assert outcome["heard"] == 360
    assert outcome["refusals"] == 0


def test_without_burned_numbers_the_test_hears_the_wrong_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The control experiment: a table whose rows follow the number at once misattributes."""

    def publish_over(table: IdentityTable, sender: Sender, uid: int, gid: int) -> None:
        if burned(table, sender.pid):
            table.clear(sender.pid)
        publish(table, sender, uid, gid)

    burned, publish = IdentityTable.burned, IdentityTable.publish
    monkeypatch.setattr(IdentityTable, "burned", lambda _table, _pid: False)
    monkeypatch.setattr(IdentityTable, "publish", publish_over)

    outcome = _walk(linux_rig(), PID_MAX_MINIMUM, 330, deaf_turns=2)

    assert outcome["refusals"] == 0
    assert len(outcome["wrong"]) >= 5
