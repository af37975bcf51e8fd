"""Plants saboteurs one after the other, each in a run of its own: `python -m tests.sim.sweeper
DIRECTORY NUMBER...` prints a line for each, its number and what is wrong with its verdict.

It runs when nothing else would, and ends with who started it. A boot is a fork of this process,
which has imported everything by then, and is otherwise what a new interpreter would be. But the
flood of #72, most of the work of a run, lasts FLOOD_MS; `make campaign` plants with all of it.
"""

import os
import select
import signal
import subprocess
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final, Self

from nexus.proof import child, runner
from nexus.proof.prove import prove
from nexus.proof.request import Request
from nexus.proof.sweep import problem_of
from nexus.protocols.ladder import Ground, Phase, rung
from nexus.services.selftest import call_rungs

SYSTEM: Final = Path(__file__).parents[2] / "systems" / "selftest.toml"
PHASES: Final = tuple(Phase)
FLOOD_MS: Final = 50  # virtual; still 20 times what fills the queue
EXIT_CRASH: Final = 1  # of an interpreter that ends by an exception


class Fork:
    """A boot, as `subprocess.Popen` would have it for the runner."""

    def __init__(self, arguments: Sequence[str], *, pass_fds: tuple[int], **_given: Any) -> None:
        self.returncode: int | None = None
        reader, writer = os.pipe()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _boot(list(arguments[len(runner.CHILD) :]), writer, pass_fds)
        os.close(writer)
        self.stdout = os.fdopen(reader, "rb")
        self._pidfd = os.pidfd_open(self.pid)

    def poll(self) -> int | None:
        """Its exit code, None while it runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code, in time."""
        _ = select.select((self._pidfd,), (), (), timeout)
        code = self.poll()
        if code is None:
            raise subprocess.TimeoutExpired("a boot", timeout or 0)
        return code

    def terminate(self) -> None:
        """Send SIGTERM, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGTERM)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.stdout.close()
        _ = self.wait()
        os.close(self._pidfd)


def _boot(argv: list[str], output: int, kept: tuple[int, ...]) -> None:
    """The boot's process, from the fork to its end."""
    code = EXIT_CRASH
    try:
        os.setpgid(0, 0)  # no session of its own: tests/beside.py says why
        nothing = os.open(os.devnull, os.O_RDONLY)
        for descriptor, number in ((nothing, 0), (output, 1), (output, 2)):
            _ = os.dup2(descriptor, number)
        low = 3
        for descriptor in sorted(kept):
            os.closerange(low, descriptor)
            low = descriptor + 1
        os.closerange(low, os.sysconf("SC_OPEN_MAX"))
        code = child.main(argv)
    except BaseException:  # noqa: BLE001 (as an interpreter does)
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def problem(number: int, directory: Path) -> str:
    """Plant a saboteur; what is wrong with the verdict, "" if nothing is."""
    request = Request(
        ground=Ground.SIM,
        system=SYSTEM,
        smp=2,
        seed=3,
        timeout=280 * 10**9,  # it has what is left of two CPUs
        saboteur=number,
        phase=max(rung(number).phase, Phase.IPC, key=PHASES.index),
        record=directory / f"record-{number}.jsonl",
    )
    return problem_of(number, prove(request, directory).verdict)


def main(argv: Sequence[str]) -> int:
    """Plant those of the command line."""
    runner.die_with_parent(os.getppid())
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    forking = {**vars(subprocess), "Popen": Fork}
    vars(call_rungs)["FLOOD_MS"] = FLOOD_MS
    vars(runner)["subprocess"] = SimpleNamespace(**forking)
    directory, *numbers = argv
    for number in numbers:
        found = problem(int(number), Path(directory) / f"of-{numbers[0]}")
        _ = sys.stdout.write(f"{number} {' '.join(found.split())}\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
