"""The runner's own fault points: what no task of the system can bring about by itself.

Planted in every run of the proof, unlike saboteurs: rung 63 sends two messages that are to arrive
with a sender no kernel may accept, and the receiver's kernel has to refuse and count them; rung 81
asks policyd for a right from which it does not come back; rung 84 has execd start a program whose
file has one byte changed; rung 129 has the copies of demo.testsvc killed that have written their
last words, as the kernel of a machine without memory kills; and demo.testsvc gets its attacks by
raw system calls on grounds that have them.
"""

# ruff: noqa: SLF001 (a fault point is inside)

import importlib.util
import signal
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from nexus.abi import ConsoleWrite, Nanos, Pid, Sender, SleepUntil
from nexus.init import launches, programs
from nexus.init.programs import ProgramSource
from nexus.proof.escapes import escape
from nexus.proof.hostile import foreign_credentials
from nexus.proof.sabotage import replace
from nexus.protocols.ladder import Ground
from nexus.protocols.policyd import Check, Decision
from nexus.protocols.testsvc import LAST_LINE
from nexus.runtime import Call
from nexus.services.demo import testsvc
from nexus.services.policyd.service import Policyd
from nexus.services.selftest.decision_rungs import HOLD_RIGHT
from nexus.services.selftest.exec_rungs import COPY
from nexus.services.selftest.identity_rungs import FOREIGN_CREDENTIALS, FORGED_SENDERS
from nexus.services.selftest.watch_rungs import ESCAPE

CREDENTIALS: Final = struct.Struct("3i")  # struct ucred: pid, uid, gid
PID_NOBODY_HAS: Final = (1 << 22) + 1  # above the largest pid_max of Linux
FORGED_PIDS: Final = {FORGED_SENDERS[0]: Pid(0), FORGED_SENDERS[1]: Pid(PID_NOBODY_HAS)}


def plant_fault_points(ground: Ground, boot: int = 0) -> None:
    """Give the messages of FORGED_SENDERS their forged pid, policyd a question that holds it, execd
    a changed program in the first boot, and demo.testsvc its attacks."""
    _plant_hold()
    if boot == 0:
        _plant_changed()
    if ground is Ground.SIM:
        _plant_sim()
    else:
        _plant_linux()
        attacks = {FOREIGN_CREDENTIALS: foreign_credentials, ESCAPE: escape}
        _ = replace(testsvc, "ATTACKS", attacks)


def _plant_hold() -> None:
    async def check(policyd: Policyd, call: Call, request: Check) -> Decision:
        if request.right == HOLD_RIGHT:
            _ = await SleepUntil(Nanos(call.now + HOLD_SPAN))
        decision: Decision = await original(policyd, call, request)
        return decision

    original = replace(Policyd, "_check", check)


def _plant_changed() -> None:
    """The first time that init looks at the files of this program they are a copy with one byte
    changed."""
    changed: list[ProgramSource] = []

    def measured(source: ProgramSource) -> str:
        if source.name != CHANGED_PROGRAM or changed:
            digest: str = original(source)
            return digest
        changed.append(source)
        return _digest_of_changed(source)

    original = replace(launches, "measured", measured)


def _digest_of_changed(source: ProgramSource) -> str:
    spec = importlib.util.find_spec(source.module)
    assert spec is not None, "the program is one of ours"
    assert spec.origin is not None, "it is a file"
    file = Path(spec.origin)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    with TemporaryDirectory() as folder:
        copy = Path(folder) / file.name
        _ = copy.write_bytes(content)
        found = importlib.util.spec_from_file_location(spec.name, copy)
        assert found is not None, "a Python file has a spec"
        return programs._digest([found])


CHANGED_PROGRAM: Final = "demo.testsvc"  # of the service that rung 84 asks for
HOLD_SPAN: Final = 60_000_000_000  # ns; init ends a task that hangs long before


def _plant_sim() -> None:
    from nexus.kernel.sim.ipc import Ipc
    from nexus.kernel.sim.kernel import SimKernel
    from nexus.kernel.sim.objects import BLOCKED, Link, Task

    def console_write(kernel: SimKernel, task: Task, trap: ConsoleWrite) -> Any:
        told = original_write(kernel, task, trap)
        if (task.name, trap.line) != (COPY, LAST_LINE):
            return told
        kernel.end(task, 0, signal.SIGKILL)
        return BLOCKED

    original_write = replace(SimKernel, "_console_write", console_write)

    def deliver(ipc: Ipc, link: Link) -> None:
        data, pid, cap = link.queue[-1]
        link.queue[-1] = (data, FORGED_PIDS.get(data, pid), cap)
        original(ipc, link)

    original = replace(Ipc, "deliver", deliver)


def _plant_linux() -> None:
    from nexus.kernel.linux.driver import Driver
    from nexus.kernel.linux.kernel import LinuxKernel
    from nexus.kernel.linux.objects import OwnerLink

    def console(kernel: LinuxKernel, sender: Sender, line: str, evidence: bytes) -> None:
        original_console(kernel, sender, line, evidence)
        if (kernel.names[sender.service], line) == (COPY, LAST_LINE):
            signal.pidfd_send_signal(kernel.children[sender.pid].pidfd, signal.SIGKILL)

    original_console = replace(LinuxKernel, "console", console)

    def own(driver: Driver, *arguments: Any) -> OwnerLink:
        link: OwnerLink = original(driver, *arguments)
        link.recvmsg = _forging(link.recvmsg)
        return link

    original = replace(Driver, "own", own)


def _forging(recvmsg: Callable[..., Any]) -> Callable[..., Any]:
    """recvmsg, with the credentials of the marked messages exchanged."""

    def forged(*arguments: int) -> Any:
        data, ancillary, flags, address = recvmsg(*arguments)
        pid = FORGED_PIDS.get(data)
        if pid is not None:
            ancillary = [
                (level, kind, CREDENTIALS.pack(pid, 0, 0))
                if kind == socket.SCM_CREDENTIALS
                else (level, kind, content)
                for level, kind, content in ancillary
            ]
        return data, ancillary, flags, address

    return forged
