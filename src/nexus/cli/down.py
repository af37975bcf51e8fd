"""`nexus down`: end a running system in order, within a bound."""

import os
import signal
import time
from pathlib import Path
from threading import Event as Pause
from typing import Final

from nexus.abi import INIT_NAME
from nexus.cli.ask import client_of
from nexus.cli.client import NANOS, CutOff
from nexus.cli.errors import CommandFailed
from nexus.cli.output import progress, say, say_json, tell
from nexus.cli.places import Running, base_dirs, is_alive
from nexus.loader.main import LOCK_NAME as LOADER_LOCK
from nexus.proof.lock import holder_of, start_of
from nexus.protocols.init import PROTOCOL as INIT
from nexus.protocols.init import Shutdown

ASK_TIME: Final = 2.0  # seconds for operator to pass the request on
LOOK_PAUSE: Final = 0.02  # seconds between looks at the lock, which has no event
ASKED: Final = "asked"
SIGNALLED: Final = "signalled"


def down(running: Running, timeout: float | None, *, as_json: bool) -> None:
    """End the system. Raises CommandFailed if it lives on."""
    _, base, _ = base_dirs(os.environ, os.getuid())
    home = base / running.title
    bound = running.stop_ns if timeout is None else int(timeout * NANOS)
    start = time.monotonic_ns()
    with progress(f"ending {running.title}"):
        how = (not running.loader and _ask(running)) or _signal(running, home)
        ended = _gone(running, home, start + bound)
        if not ended and how == ASKED:
            how = _signal(running, home)
            ended = _gone(running, home, time.monotonic_ns() + bound)
    if not ended:
        raise CommandFailed(
            f"{running.title} (process {running.pid}) has not ended after {bound / NANOS:g} s: "
            f"see `nexus logs` and {running.log}, or kill it with `kill -9 {running.pid}`"
        )
    seconds = (time.monotonic_ns() - start) / NANOS
    if as_json:
        say_json({"system": running.title, "how": how, "seconds": round(seconds, 3)})
    else:
        say(f"{running.title} has ended after {seconds:.2f} s")


def _ask(running: Running) -> str:
    """Ask init through operator; empty if that way is not open."""
    try:
        with client_of(running) as client:
            _ = client.relay(INIT_NAME, INIT, Shutdown(), ASK_TIME)
    except CutOff:
        return ASKED  # operator is among the first to end; if it was not that, a signal follows
    except CommandFailed as error:
        tell(f"{error}; sending SIGTERM instead")
        return ""
    return ASKED


def _signal(running: Running, home: Path) -> str:
    """SIGTERM to the process that holds the locks, and to no other of the same number; to its
    loader, which passes it on and boots no more, where there is one."""
    try:
        process = os.pidfd_open(running.loader or running.pid)
    except ProcessLookupError:
        return SIGNALLED
    try:
        if _is_there(running, home):  # asked now that the number cannot be given to another
            signal.pidfd_send_signal(process, signal.SIGTERM)
    except ProcessLookupError:
        return SIGNALLED
    except PermissionError as error:
        raise CommandFailed(
            f"process {running.pid} is not yours: run this as its user, or as root"
        ) from error
    finally:
        os.close(process)
    return SIGNALLED


def _gone(running: Running, home: Path, until: int) -> bool:
    """Whether the process ends in time."""
    pause = Pause()
    while _is_there(running, home):
        if time.monotonic_ns() >= until:
            return False
        _ = pause.wait(LOOK_PAUSE)
    return True


def _is_there(running: Running, home: Path) -> bool:
    """Whether the system runs, or its loader does: that boots it again."""
    if running.loader and holder_of(home / LOADER_LOCK) is not None:
        return start_of(running.loader) == running.loader_started
    return is_alive(running, home)
