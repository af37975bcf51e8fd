"""An interpreter of its own for a service: from the fork over the exec to its program.

    forked child   signals, close_range, limits, namespaces, ids, Landlock (the import path may be
                   read), no-new-privs, first filter, exec
    interpreter    not dumpable, second filter (no exec), imports the program, memory limits,
                   parent-death signal, Landlock (nothing), final filter
    init           enters its ids as Linux stamps them, and only then hands over links, argument
                   and grants

Until then the process has the kernel channel and nothing else of the system but the place of its
own secret, which Landlock and the filters must know from the start; and init believes nothing it
says but the stamp of Linux. Init does not wait for any of it: the spawn has returned,
init holds the service's side of its links, and an import that fails, hangs or dies is the end of
an instance. What the program does while it is imported is bounded by
the first stage, for it could leave out the second.
"""

import importlib
import os
import pickle
import select
import socket
import struct
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, NamedTuple, NoReturn

from nexus.abi import Sender, ServiceId, SpawnSpec
from nexus.kernel.core import EXIT_CRASH, OwnerShare
from nexus.kernel.linux.channel import (
    FRAME_SIZE_MAX,
    GO,
    GO_PATIENCE,
    PREPARED,
    InitIsGone,
    Prepared,
    TaskPort,
    pack_prepared,
)
from nexus.kernel.linux.child import (
    EXIT_ORPHAN,
    EXIT_UNPREPARED,
    Birth,
    adopt_channel,
    furnish,
    run,
)
from nexus.kernel.linux.devices import Granted
from nexus.kernel.linux.harden import Confinement, Hardening, import_paths, preload
from nexus.kernel.linux.truesize import Truesize

BIRTH_SIZE_MAX: Final = 64 * 1024  # bytes; an argument is at most a quarter of it
BIRTH_DESCRIPTORS_MAX: Final = 64  # three, ports, devices of both kinds and sockets
DETAIL_SIZE_MAX: Final = 512  # bytes of the sentence about a failed import
NANOSECONDS: Final = 1_000_000  # per millisecond

# Runs before anything of ours is imported: arguments are the kernel channel, the plan, and init's
# import path. That one is in front, in init's order: where init runs out of a slot, the package of
# the base system lies on Python's own path too. The program's own path comes later: it could stand
# in for a module of ours. Little of what is imported is garbage: the collector runs after that. And
# init has looked for site-packages already.
BOOTSTRAP: Final = f"""
import ctypes, gc, sys
gc.disable()
ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)
import json, os
channel, plan, *path = sys.argv[1:]
try:
    sys.path[:] = path + [entry for entry in sys.path if entry not in path]
    from nexus.kernel.linux.stage2 import main
except BaseException as error:  # whatever stops our own import is told to init, and ends here
    text = "cannot import nexus: %s: %s" % (type(error).__name__, error)
    os.write(int(channel), bytes(({PREPARED},)) + json.dumps((0, 0, (), text[:400])).encode())
    os._exit({EXIT_UNPREPARED})
del sys.argv[1:]
main(plan)
"""


class Plan(NamedTuple):
    """What the interpreter needs before it may be trusted with anything: no secrets."""

    entry: str
    path: tuple[str, ...]  # in front of the import path
    ordinary: bool
    channel: int  # descriptors it was started with
    statm: int
    confinement: Confinement
    why: dict[str, str]  # steps of the first stage that could not be taken


class Handover(NamedTuple):
    """What init hands over when the task's ids are in the table; descriptors travel along:
    control link, own endpoint's link, identity, ports, devices of the bus map, character devices
    and sockets."""

    spec: SpawnSpec
    me: Sender
    spawner: ServiceId
    devices: tuple[Granted, ...]  # of the bus map
    names: tuple[str, ...]  # of character devices and sockets
    trace: bool


def hand_over(channel: socket.socket, handover: Handover, descriptors: tuple[int, ...]) -> None:
    """Init's side of it. Raises OSError."""
    frame = bytes((GO,)) + pickle.dumps(handover)
    packed = struct.pack(f"={len(descriptors)}i", *descriptors)
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, packed)]
    _ = channel.sendmsg([frame], rights, socket.MSG_DONTWAIT)


def execute(
    entry: str, path: tuple[str, ...], confinement: Confinement, *, ordinary: bool
) -> NoReturn:
    """The forked child's life: the first stage, and then another program."""
    hardening = Hardening(confinement)
    channel = confinement.keep[0]
    try:
        inherited = import_paths()
        channel, statm = hardening.before_exec((*path, *inherited))
        confinement = hardening.confinement  # it knows the secret by now
        plan = Plan(entry, path, ordinary, channel, statm, confinement, hardening.why)
        words = (str(channel), pickle.dumps(plan).hex(), *inherited)
        os.execve(  # noqa: S606 (there is no shell in it)
            sys.executable, [sys.executable, "-I", "-S", "-B", "-c", BOOTSTRAP, *words], {}
        )
    except OSError as error:
        sentence = f"cannot start {sys.executable} as uid {os.getuid()}: {error}"
        _ = os.write(channel, pack_prepared(Prepared(0, 0, (), sentence)))
    finally:
        os._exit(EXIT_UNPREPARED)


def main(text: str) -> NoReturn:
    """The interpreter's life, from the point where it can import this module."""
    plan: Plan = pickle.loads(bytes.fromhex(text))  # noqa: S301 (from init's own child)
    code = EXIT_CRASH
    try:
        code = _live(plan)
    except InitIsGone:
        code = EXIT_ORPHAN
    finally:
        os._exit(code)


def _live(plan: Plan) -> int:
    hardening = Hardening(plan.confinement, plan.why)
    channel = adopt_channel(plan.channel)
    try:
        hardening.before_import()
        preload()
        if plan.ordinary:
            from nexus.kernel.linux import aio  # and asyncio, which other services do without
        sys.path[:0] = plan.path
        program = load_entry(plan.entry)
        truesize = Truesize()
        hardening.after_import(plan.statm)
    except BaseException as error:  # noqa: BLE001 (a program that cannot be started is told as such)
        _ = channel.send(pack_prepared(Prepared(0, 0, (), _sentence(plan.entry, error))))
        return EXIT_UNPREPARED
    prepared = Prepared(os.getuid(), os.getgid(), tuple(hardening.why), "")
    handover, descriptors = _receive(channel, prepared)
    port = TaskPort(channel)
    spec = handover.spec
    birth = Birth(
        spec=spec,
        program=None,
        me=handover.me,
        spawner=handover.spawner,
        devices=handover.devices,
        names=handover.names,
        confinement=plan.confinement,
        share=OwnerShare(spec.owner_size, spec.endpoints),
        truesize=truesize,
        trace=handover.trace,
    )
    driver, boot = furnish(birth, port, descriptors)
    if plan.ordinary:
        trace = port.trace if handover.trace else None
        return run(port, lambda: aio.run(driver, port, lambda task: program(boot, task), trace))
    return run(port, lambda: driver.run(program(boot))[0])


def load_entry(entry: str) -> Callable[..., Any]:
    """The `main` that an entry names: "package.module:name", or with further words the result
    of calling what the first one names with them."""
    first, *words = entry.split()
    module, _, name = first.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    if words:
        found = found(*words)
    if not callable(found):
        raise TypeError(f"{entry} is no function")
    return found


def _sentence(entry: str, error: BaseException) -> str:
    """What went wrong with an import, and the innermost line of it that is a file's."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.name != _live.__name__]
    own = [frame for frame in own if frame.name != load_entry.__name__]
    own = [frame for frame in own if "importlib" not in frame.filename and frame.lineno]
    where = f" ({Path(own[-1].filename).name}:{own[-1].lineno})" if own else ""
    text = f"{type(error).__name__}: {error}"[:DETAIL_SIZE_MAX]
    return f"cannot import {entry}: {text}{where}"


def _receive(channel: socket.socket, prepared: Prepared) -> tuple[Handover, list[int]]:
    """Tell init that the second stage is done, and take what it hands over; the process ends
    here if init does not let it go."""
    with suppress(OSError):  # init is gone: the look below says so
        _ = channel.send(pack_prepared(prepared))
    look = select.poll()
    look.register(channel, select.POLLIN)
    if not look.poll(GO_PATIENCE / NANOSECONDS):
        os._exit(0)
    room = socket.CMSG_SPACE(4 * BIRTH_DESCRIPTORS_MAX) + socket.CMSG_SPACE(12)
    data, ancillary, _, _ = channel.recvmsg(
        BIRTH_SIZE_MAX, room, socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
    )
    if data[:1] != bytes((GO,)):
        os._exit(0)  # this number is burned, or the spawn was given up
    descriptors: list[int] = []
    for _, kind, content in ancillary:
        if kind == socket.SCM_RIGHTS:
            descriptors += struct.unpack(f"={len(content) // 4}i", content)
    handover: Handover = pickle.loads(data[1:])  # noqa: S301 (over the channel that is init's)
    return handover, descriptors


assert FRAME_SIZE_MAX > 8 * DETAIL_SIZE_MAX, "a sentence fits a frame, escaped as JSON"
