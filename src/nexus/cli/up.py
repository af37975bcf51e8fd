"""`nexus up`: start a system in the foreground, in the background, or as this very process."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import msgspec

import nexus
from nexus.abi import INIT_NAME, EventKind
from nexus.cli.boot import AWAITED, REFUSED, RUNS_ALREADY, Job, stop_max
from nexus.cli.client import NANOS
from nexus.cli.errors import EXIT_FAILED, EXIT_OK, CommandFailed, UsageError
from nexus.cli.output import progress, say, say_json, tell
from nexus.cli.places import (
    Places,
    Running,
    base_dirs,
    make_dirs,
    places_of,
    read_running,
    title_of,
)
from nexus.cli.readiness import Readiness
from nexus.cli.sink import TOLD_SIZE_MAX, Told
from nexus.cli.trial import tried_plan
from nexus.init.plan import Plan
from nexus.loader.devices import boot_path
from nexus.loader.main import BOOTING, END_MAX, MARGIN
from nexus.proof.lock import holder_of
from nexus.services.logd.escape import escaped

KILLED_WAIT: Final = 2.0  # seconds for a killed init to be gone
ENDED_WAIT: Final = 2.0  # seconds for an init that tells no more to be gone too
SLOTS_STOP: Final = int((END_MAX + MARGIN) * NANOS)  # ns for a loader and its init to end
SHOWN: Final = (BOOTING, EventKind.SPAWN_FAILED, EventKind.HANG, EventKind.DEVICE)
ERRORS_NAME: Final = "init.err"  # what init's interpreter itself had to say
INIT_LABEL: Final = "init"  # what init calls itself in its lines
ERRORS_SIZE_MAX: Final = 2000  # bytes of it that are shown


def up(
    file: Path,
    *,
    instance: str | None,
    detach: bool,
    exec_: bool,
    wait: float,
    as_json: bool,
) -> int:
    """Start the system of `file`; the exit code. Raises CommandFailed and SystemFileError."""
    plan = tried_plan(file)
    declared = (plan.state_dir, plan.runtime_dir, plan.log_dir)
    places = places_of(plan.name, instance, file, declared, os.environ, os.getuid())
    ports = [port for service in plan.services for port in service.grants.ports]
    make_dirs(places, os.getuid(), ports)
    running = read_running(places.home)
    holder = holder_of(places.lock) if running is None else running.pid
    if holder is not None:
        raise CommandFailed(RUNS_ALREADY.format(title=places.title, pid=holder or "unknown"))
    job = _job(plan, places, file)
    if exec_:
        return _become(job)
    watch, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with watch:
        job = msgspec.structs.replace(job, watcher=theirs.fileno(), leashed=not detach)
        child = _start(_command(job), theirs.fileno(), places)
        theirs.close()
        readiness = Readiness(s.name for s in plan.services if not s.by)
        watching = _Watching(child, watch, readiness, places)
        if detach:
            return watching.until_ready(wait, job.running.stop_ns, as_json=as_json)
        return watching.until_the_end(as_json=as_json)


def up_slots(
    name: str | None,
    *,
    instance: str | None,
    detach: bool,
    exec_: bool,
    wait: float,
    as_json: bool,
) -> int:
    """Have the loader boot the system `name` out of its slots, without one the only one that was
    provisioned; the exit code. Raises CommandFailed and UsageError."""
    name = _provisioned(instance) if name is None else name
    places = places_of(name, instance, Path(), (None, None, None), os.environ, os.getuid())
    if not boot_path(places.state).exists():
        raise CommandFailed(
            f"{boot_path(places.state)} is not there: provision the device with "
            "`nexus ota provision`"
        )
    make_dirs(places, os.getuid(), ())
    running = read_running(places.home)
    holder = holder_of(places.lock) if running is None else running.pid
    if holder is not None:
        raise CommandFailed(RUNS_ALREADY.format(title=places.title, pid=holder or "unknown"))
    job = _bare_job(places)
    if exec_:
        job = msgspec.structs.replace(job, streams=True, parent=0)
        words = _loader_command(job, becomes=True)
        os.execve(sys.executable, words, _environment())  # noqa: S606 (our own interpreter)
    watch, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with watch:
        job = msgspec.structs.replace(job, watcher=theirs.fileno(), leashed=not detach)
        child = _start(_loader_command(job, becomes=False), theirs.fileno(), places)
        theirs.close()
        watching = _Watching(child, watch, Readiness(()), places, reboots=True)
        if detach:
            return watching.until_ready(wait, SLOTS_STOP, as_json=as_json)
        return watching.until_the_end(as_json=as_json)


def _provisioned(instance: str | None) -> str:
    """The only system here that has a boot device. Raises UsageError."""
    state, _, _ = base_dirs(os.environ, os.getuid())
    found = sorted(path.parent.name for path in state.glob(f"*/{boot_path(Path()).name}"))
    names = sorted({title.partition("@")[0] for title in found if title_of("", instance) in title})
    if len(names) != 1:
        which = f"one of {', '.join(names)}" if names else f"one: none is provisioned in {state}"
        raise UsageError(f"name the system to boot out of its slots, {which}")
    return names[0]


def _bare_job(places: Places) -> Job:
    """The job of a system of which nothing is known but its place; the loader fills in the rest."""
    running = Running(
        title=places.title,
        file="",
        digest="",
        pid=0,
        state=str(places.state),
        runtime=str(places.runtime),
        log=str(places.log),
    )
    return Job(
        running=running,
        home=str(places.home),
        smp=len(os.sched_getaffinity(0)),
        watcher=-1,
        leashed=False,
        streams=False,
        parent=os.getpid(),
    )


def _loader_command(job: Job, *, becomes: bool) -> list[str]:
    """nexus.loader.main with what it has to do: stay beside init, or become it."""
    settings = {"becomes": becomes, "margin": MARGIN}
    text = json.dumps({**msgspec.to_builtins(job), "loader": settings})
    return [sys.executable, "-P", "-m", "nexus.loader.main", text]


def _job(plan: Plan, places: Places, file: Path) -> Job:
    bare = _bare_job(places)
    running = msgspec.structs.replace(
        bare.running,
        file=str(file.absolute()),
        digest=plan.digest,
        stop_ns=stop_max(plan),
    )
    return msgspec.structs.replace(bare, running=running)


def _command(job: Job) -> list[str]:
    return [sys.executable, "-P", "-m", "nexus.cli.boot", msgspec.json.encode(job).decode()]


def _environment() -> dict[str, str]:
    """This one, with this package found first: the child runs the same code."""
    source = str(Path(nexus.__file__).parents[1])
    paths = [source, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def _become(job: Job) -> int:
    """Be the system's init from here on, under the pid that a service manager knows."""
    job = msgspec.structs.replace(job, streams=True)
    os.execve(sys.executable, _command(job), _environment())  # noqa: S606 (our own interpreter)


def _start(words: list[str], watcher: int, places: Places) -> "subprocess.Popen[bytes]":
    """init's process, or the loader's, in a session of its own: what is typed here reaches only the
    command."""
    errors = places.log / ERRORS_NAME
    with errors.open("wb") as stderr:
        return subprocess.Popen(  # noqa: S603 (our own module, arguments made here)
            words,
            stdin=subprocess.DEVNULL,
            stdout=stderr,
            stderr=stderr,
            pass_fds=(watcher,),
            env=_environment(),
            cwd="/",
            start_new_session=True,
        )


def _since(start: int) -> float:
    """Seconds since `start`, which is time.monotonic_ns()."""
    return (time.monotonic_ns() - start) / NANOS


def labelled(told: Told) -> str:
    """A console line that says whose it is: what does not begin with the name gets it."""
    name = INIT_LABEL if told.name == INIT_NAME else told.name
    return told.text if told.text.startswith(f"{name}: ") else f"{name}: {told.text}"


def _size_of(file: Path) -> int:
    """Bytes of a file, 0 if there is none."""
    try:
        return file.stat().st_size
    except OSError:
        return 0


def _last_line(file: Path, start: int) -> str:
    """The last line of what a file has from `start` on, safe to show; empty if there is none."""
    try:
        with file.open("rb") as opened:
            size = opened.seek(0, os.SEEK_END)
            _ = opened.seek(max(start if start <= size else 0, size - ERRORS_SIZE_MAX))
            text = opened.read(ERRORS_SIZE_MAX)
    except OSError:
        return ""
    lines = text.decode("utf-8", "replace").strip().split("\n")
    return escaped(lines[-1].strip())


class _Watching:
    """A system that was just started, seen from the command that started it."""

    def __init__(
        self,
        child: "subprocess.Popen[bytes]",
        watch: socket.socket,
        readiness: Readiness,
        places: Places,
        *,
        reboots: bool = False,
    ) -> None:
        self._child = child
        self._reboots = reboots  # what cannot get ready may be rolled back
        self._watch = watch
        self._readiness = readiness
        self._places = places
        self._refusal = ""
        self._stops = 0
        self._is_silent = False
        self._is_said_up = False
        self._console_size = _size_of(places.console)

    # ------------------------------------------------------------------ in the background

    def until_ready(self, wait: float, stop_ns: int, *, as_json: bool) -> int:
        """Return when every service is ready; end the system if that takes too long."""
        start = time.monotonic_ns()
        with self._ending_on_signals(), progress(f"starting {self._places.title}"):
            while not (self._readiness.done or self._is_hopeless or self._stops):
                left = wait - _since(start)
                if left <= 0 or not self._see(left):
                    break
        if self._is_silent:
            self._await_end()
        if self._readiness.done and not self._readiness.safe_mode:
            self._say_up(_since(start), as_json=as_json)
            return EXIT_OK
        if self._readiness.safe_mode:
            raise CommandFailed(
                f"{self._places.title} runs in safe mode ({self._readiness.safe_mode}): see `nexus "
                "status`, and go back to normal with `nexus safe leave`"
            )
        why = self._why(wait)
        self._end(stop_ns)
        raise CommandFailed(why)

    @property
    def _is_hopeless(self) -> bool:
        return bool(self._readiness.hopeless) and not self._reboots

    def _say_up(self, seconds: float, *, as_json: bool) -> None:
        if as_json:
            say_json(
                {
                    "system": self._places.title,
                    "pid": self._child.pid,
                    "ready_seconds": round(seconds, 3),
                    "runtime_dir": str(self._places.runtime),
                    "state_dir": str(self._places.state),
                    "log_dir": str(self._places.log),
                }
            )
        else:
            say(f"{self._places.title} is up, process {self._child.pid}: every service is ready")

    def _why(self, wait: float) -> str:
        """Why it is not up, in one sentence."""
        title = self._places.title
        if self._refusal:
            return self._refusal
        if self._stops:
            return f"{title} was not started: interrupted"
        lacking = "; ".join(self._readiness.lacking())
        code = self._child.poll()
        if code is not None:
            how = f"exit code {code}" if code >= 0 else f"killed by signal {-code}"
            return (
                f"{title} ended while it started, {how} ({lacking}){self._said()}: "
                f"see {self._places.console}"
            )
        if self._is_hopeless:
            return f"{title} cannot get ready and was ended ({lacking}): see {self._places.console}"
        return (
            f"{title} was not ready after {wait:g} s and was ended ({lacking}): "
            f"see {self._places.console}, or give it longer with --wait"
        )

    def _said(self) -> str:
        """The last line that init's interpreter wrote, or else of the console of this start."""
        line = _last_line(self._places.log / ERRORS_NAME, 0) or _last_line(
            self._places.console, self._console_size
        )
        return f", its last words: {line}" if line else ""

    def _await_end(self) -> None:
        """Init has closed the socket: it is about to end, or has ended."""
        with suppress(subprocess.TimeoutExpired):
            _ = self._child.wait(ENDED_WAIT)

    def _end(self, stop_ns: int) -> None:
        """End what was started, in order if it can, at once if it cannot."""
        if self._child.poll() is None:
            self._child.terminate()
        try:
            _ = self._child.wait(stop_ns / NANOS)
        except subprocess.TimeoutExpired:
            self._child.kill()
            _ = self._child.wait(KILLED_WAIT)

    # ------------------------------------------------------------------ in the foreground

    def until_the_end(self, *, as_json: bool) -> int:
        """Show the console lines until the system has ended; its exit code, 0 or 1."""
        start = time.monotonic_ns()
        with self._ending_on_signals():
            while self._see(None, show=True):
                if self._readiness.done and not self._is_said_up:
                    self._is_said_up = True
                    self._tell_up(_since(start), as_json=as_json)
            code = self._child.wait()
        if self._refusal:
            raise CommandFailed(self._refusal)
        if code != EXIT_OK and not self._is_said_up and not self._stops:
            raise CommandFailed(self._why(0))
        tell(f"{self._places.title} has ended" + ("" if code == 0 else f", exit code {code}"))
        return EXIT_OK if code == EXIT_OK else EXIT_FAILED

    def _tell_up(self, seconds: float, *, as_json: bool) -> None:
        if as_json:
            self._say_up(seconds, as_json=True)
        elif self._readiness.safe_mode:
            tell(f"{self._places.title} is in safe mode: leave it with `nexus safe leave`")
        else:
            tell(f"{self._places.title} is up after {seconds:.2f} s; Ctrl-C ends it")

    # ------------------------------------------------------------------ both

    def _see(self, seconds: float | None, *, show: bool = False) -> bool:
        """Take what the system tells next; False when it tells no more, or not in time."""
        self._watch.settimeout(seconds)
        try:
            data = self._watch.recv(TOLD_SIZE_MAX)
        except TimeoutError:
            return False
        except OSError:
            data = b""
        if not data:
            self._is_silent = True
            return False
        told = msgspec.json.decode(data, type=Told)
        if told.kind == REFUSED:
            self._refusal = told.text
        if told.kind == BOOTING:
            self._readiness = Readiness(())
            self._is_said_up = False
        elif told.kind == AWAITED:
            self._readiness = Readiness(told.text.split())
        self._readiness.on_told(told)
        if show and told.kind == EventKind.CONSOLE:
            say(labelled(told))
            _ = sys.stdout.flush()
        elif show and told.kind in SHOWN:
            tell(f"{told.name}: {told.text}")
        return True

    @contextmanager
    def _ending_on_signals(self) -> Iterator[None]:
        """Ctrl-C and its like end the system: first in order, the second time at once."""
        former = {
            number: signal.signal(number, self._on_signal)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        }
        try:
            yield
        finally:
            for number, handler in former.items():
                _ = signal.signal(number, handler)

    def _on_signal(self, number: int, _frame: object) -> None:
        del number
        self._stops += 1
        if self._stops == 1:
            tell(f"ending {self._places.title}; once more kills it")
            self._child.terminate()
        else:
            self._child.kill()
