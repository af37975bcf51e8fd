"""Somebody at a device: runs in the guest, beside the system and outside of it.

    nothing staged   -> nexus ota stage, nexus ota switch --reboot
    a trial is over  -> nexus why, fw_printenv

It is what these commands do, asked through operator's socket as anybody on a device asks; there is
no other command in an image. board.py puts it there, and starts it as a child of process 1.
"""

import os
import sys
import time
from pathlib import Path
from threading import Event as Pause
from typing import Final

HOME: Final = Path("/run/nexus")  # nexus.vm.guest.RUNTIME
SOCKET: Final = HOME / "operator.sock"
STATE: Final = "/persist/state"
UPDATE: Final = Path("/update.nxu")
TITLE: Final = "slotted"
TRIES: Final = 2
UP_MAX: Final = 120.0  # seconds of the guest's clock until operator listens
ASK_MAX: Final = 60.0  # seconds until updated answers: it starts meanwhile
LOOK: Final = 0.2  # seconds between two looks: each takes time from what starts
WHO: Final = "person: "
DONE: Final = f"{WHO}done"


def main() -> int:
    """Look how it stands, and do what is to be done; an exit code."""
    until, pause = time.monotonic_ns() + int(UP_MAX * 1e9), Pause()
    while not SOCKET.exists():
        if time.monotonic_ns() > until:
            return say(f"there is no {SOCKET}", 1)
        _ = pause.wait(LOOK)
    os.environ["NO_COLOR"] = "1"

    from nexus.cli.ask import Asked
    from nexus.cli.ota import ask, stage, switch
    from nexus.cli.places import Running
    from nexus.protocols.updated import GetUpdate, SlotState

    running = Running(
        title=TITLE, file="", digest="", pid=1, state=STATE, runtime=str(HOME), log=""
    )
    asked = Asked(running)
    with asked.client() as client:
        update = ask(client, GetUpdate(), ASK_MAX)
    standby = next(row for row in update.slots if row.slot != update.active)
    if standby.state is SlotState.EMPTY:
        stage(asked, UPDATE, as_json=False)
        switch(asked, None, TRIES, reboot=True, as_json=False)
    else:
        from nexus.cli.why_update import why

        why(asked, as_json=False)
        child = os.posix_spawn("/usr/bin/fw_printenv", ["fw_printenv"], {})
        _, status = os.waitpid(child, 0)
        if status:
            return say(f"fw_printenv ended with {os.waitstatus_to_exitcode(status)}", 1)
    return say(DONE.removeprefix(WHO), 0)


def say(text: str, code: int) -> int:
    """A line of the console; the code."""
    _ = sys.stdout.write(f"{WHO}{text}\n")
    _ = sys.stdout.flush()
    return code
