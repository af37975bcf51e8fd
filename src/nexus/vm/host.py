"""The host's side of one boot: `python -m nexus.vm.host DESCRIPTOR JOB`, started by the runner.

With no arguments it builds the image and looks for the programs, so that no boot waits for them.

To the runner this is the process that boots, as nexus.proof.child is: events go to the descriptor
as they come, the console to the standard output, and the exit code is that of the boot. Beside the
disks it leaves in the state directory what it saw: console-N.log with the time of each line, and
guest-N.jsonl with what the guest said of itself and when.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final, TextIO

from nexus.bundle.gather import SYSTEM, system_files
from nexus.init.plan import load_plan
from nexus.init.system import load as load_system
from nexus.proof.lock import AlreadyHeld, take_directory
from nexus.proof.notes import NOTE, NOTE_PAGES, NOTE_STAGE, NOTE_UP, NOTE_WINDOWS
from nexus.proof.runner import EXIT_NOT_RUN, EXIT_POWER_CUT, GO, Job, die_with_parent
from nexus.proof.scrape import port_of
from nexus.proof.timeline import NOTES_SIZE_MAX
from nexus.services.selftest.export_rungs import SCRAPE_LINE
from nexus.vm import qemu
from nexus.vm.contract import (
    EXIT_GUEST,
    GO_WORD,
    JOB,
    NOTE_CRASH,
    NOTE_OFF,
    PLAIN,
    SCRAPE_WORD,
    STOP_WORD,
)
from nexus.vm.cut import Cut
from nexus.vm.disks import bring_home, check_tools, disks_later, disks_of
from nexus.vm.image import Image, build, pinned
from nexus.vm.initramfs import Tree
from nexus.vm.machines import NoSuchMachine, machine_named
from nexus.vm.packages import NotHad, cache_folder
from nexus.vm.qmp import Qmp, QmpFailed, awaited, cpu_count, devices

NANOSECONDS: Final = 1_000_000_000
START_MAX: Final = 60.0  # seconds from QEMU's start to the system's, on a busy machine
LISTEN_MAX: Final = 10_000_000_000  # ns from the word to a QEMU that listens; it was started before
EXIT_NO_MACHINE: Final = 107  # of a boot; 3 is what a guest says that starts again
PIN: Final = ".image"  # in the state directory, not to be carried into the guest
ALL_TOLD: Final = b'{"dropped":0}'  # of a guest that was cut off: what came of its events, came
NOTE_START: Final = b'{"%s":' % NOTE.encode()
QUESTIONS: Final[Mapping[str, tuple[str, Callable[[Qmp], object]]]] = {
    NOTE_WINDOWS: ("devices", devices),
    NOTE_UP: ("cpus", cpu_count),
}
"""What QEMU is asked when the guest says this."""
QUESTIONS_MAX: Final = 16  # of one boot, which has five: a guest could ask for ever
HOST_SIZE: Final = 256 * 1024  # bytes that are kept for what we say: so many answers, and the end

Event = Callable[[bytes], bool]
"""Is given each event of the booted system as it comes; True ends the boot there."""


SHAPES: Final[Mapping[str, Mapping[str, type]]] = {
    NOTE_UP: {"t": int},
    NOTE_STAGE: {"t": int, "name": str},
    NOTE_PAGES: {"t": int, "pages": list},
    NOTE_WINDOWS: {"t": int, "line": str, "pid": int, "holders": list},
    NOTE_CRASH: {"text": str},
    NOTE_OFF: {"code": int},
}
"""What a note of each kind has at least."""
OURS: Final = frozenset({"at", "host"})  # keys of what the host says beside the guest's notes
CODE_MAX: Final = 255  # of a process; a larger one would be another, and may be 0


def note_of(line: bytes) -> Mapping[str, Any] | None:
    """What the guest says, without what is ours to say; None if it is no note."""
    try:
        note = json.loads(line)
    except (ValueError, RecursionError):
        return None
    shape = SHAPES.get(str(note.get(NOTE))) if type(note) is dict else None
    if shape is None or any(type(note.get(key)) is not kind for key, kind in shape.items()):
        return None
    if note[NOTE] == NOTE_OFF and not 0 <= note["code"] <= CODE_MAX:
        return None
    if note[NOTE] == NOTE_OFF and note["code"] in {EXIT_POWER_CUT, EXIT_NO_MACHINE}:
        return None
    return {key: value for key, value in note.items() if key not in OURS}


class Notes:
    """What the guest says of itself: kept with the second at which it came."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._room = NOTES_SIZE_MAX - HOST_SIZE
        self.lost = 0
        self.off: int | None = None
        self.crash = ""

    def take(self, seconds: float, line: bytes) -> str:
        """One note; its kind. What is none is kept as it is, and means nothing."""
        note = note_of(line)
        if note is None:
            malformed = line[:200].decode("utf-8", "replace")
            self._keep_if_room({"at": round(seconds, 3), "malformed": malformed})
            return ""
        if note[NOTE] == NOTE_OFF:
            self.off = note["code"]
        elif note[NOTE] == NOTE_CRASH:
            self.crash = note["text"] or "it says no more"
        self._keep_if_room({"at": round(seconds, 3), **note})
        return str(note[NOTE])

    def _keep_if_room(self, entry: Mapping[str, Any]) -> None:
        size = len(json.dumps(entry)) + 1
        if size > self._room:
            self.lost += 1
            return
        self._room -= size
        self.keep(entry)

    def keep(self, entry: Mapping[str, Any]) -> None:
        """Write one line, of ours."""
        _ = self._file.write(f"{json.dumps(entry)}\n")
        self._file.flush()


def asked(path: Path, question: Callable[[Qmp], object]) -> Mapping[str, object]:
    """What QEMU answers, or why it does not."""
    try:
        with Qmp(path) as qmp:
            return {"answer": question(qmp)}
    except QmpFailed as failed:
        return {"failed": str(failed)}


def _to_nobody(_word: str) -> None:
    """There is no machine yet."""


def _unheard(_say: qemu.Say) -> None:
    """Nothing is to be said."""


class Dropped(Exception):
    """The boot before was the last one."""


def await_go() -> None:
    """Wait until the runner says that the disks are free. It kills us when it ends. Raises
    Dropped."""
    if sys.stdin.buffer.read(len(GO)) != GO:
        raise Dropped


def overlay_of(job: Job, *, plain: bool) -> Tree:
    """The archive of one boot: the job, the system file and what it names."""
    tree = Tree()
    if job.scenario:
        tree.file(JOB[1:], json.dumps({**asdict(job), "state": None}).encode())
        return tree
    file = Path(job.system)
    for path, content in system_files(load_system(file)).items():
        tree.file(path, content.data)
    told = {**asdict(job), "system": f"/{SYSTEM}/{file.name}", "state": None, "log": None}
    tree.file(JOB[1:], json.dumps({**told, PLAIN: plain}).encode())
    return tree


def boot(
    image: Image,
    job: Job,
    state: Path,
    *,
    event: Event,
    told: qemu.Told,
    plain: bool = False,
    deadline: float | None = None,
    memory: int = qemu.MEMORY_DEFAULT,
    started: Callable[[qemu.Say], None] = _unheard,
) -> int:
    """Boot a system in a guest, its disks in `state`; the exit code of the boot. A `plain` one is
    of no proof. Raises NotHad."""
    _ = qemu.check(image.machine)
    with ExitStack() as taken:
        if not job.ahead:
            _take(state, taken)
        return _boot(image, job, state, event, told, deadline, memory, started, taken, plain=plain)


def _take(state: Path, taken: ExitStack) -> None:
    """Have the disks in `state`, and no other machine. Raises NotHad."""
    try:
        _ = taken.callback(os.close, take_directory(state))
    except AlreadyHeld as held:
        raise NotHad(
            f"another machine has the disks in {state}; try again when it is off"
        ) from held


def _boot(
    image: Image,
    job: Job,
    state: Path,
    event: Event,
    told: qemu.Told,
    deadline: float | None,
    memory: int,
    started: Callable[[qemu.Say], None],
    taken: ExitStack,
    *,
    plain: bool,
) -> int:
    initrd = state / f".initrd-{job.boot}"
    control = state / f"qmp-{job.boot}.sock"
    image.write_initrd(initrd, overlay_of(job, plain=plain))
    plan = None if job.scenario else load_plan(Path(job.system))
    look = disks_later if job.ahead else disks_of
    disks = () if plan is None else look(plan, state)
    cut = None if plan is None or not job.cut_at else Cut(job, plan, disks, state)
    setup = qemu.Setup(
        machine=image.machine,
        kernel=image.kernel,
        initrd=initrd,
        memory=memory,
        cpus=job.smp,
        disks=disks if cut is None else cut.disks,
        qmp=control,
        apart=plain,
    )
    if deadline is None:
        deadline = START_MAX + job.limit / NANOSECONDS
    try:
        with (
            (state / f"console-{job.boot}.log").open("w", encoding="utf-8") as console,
            (state / f"guest-{job.boot}.jsonl").open("w", encoding="utf-8") as file,
        ):
            notes = Notes(file)
            latest, questions = 0.0, 0
            port = None if plain or plan is None else port_of(plan)
            say: qemu.Say = _to_nobody
            is_scraped = is_left = False

            def leave(*_signal: object) -> None:
                """The runner has seen enough of a boot whose page it wants: it is brought home once
                the guest is off."""
                nonlocal is_left
                if not is_left:
                    is_left = True
                    say(STOP_WORD)

            def on_line(seconds: float, text: str) -> None:
                _ = console.write(f"{seconds:9.3f} {text}\n")
                told(seconds, text)

            def on_evidence(seconds: float, line: bytes) -> bool:
                nonlocal latest, is_scraped, questions
                latest = seconds
                if not line.startswith(NOTE_START):
                    if cut is not None and cut.is_word(line):
                        _ = event(line)
                        cut.wait()
                        return True
                    if port is not None and SCRAPE_LINE.encode() in line:
                        is_scraped = True
                        _ = signal.signal(signal.SIGTERM, leave)
                        say(f"{SCRAPE_WORD} {port} {job.boot}")
                    is_over = event(line)
                    if is_over and is_scraped:
                        leave()
                        return False
                    return is_over
                kind = notes.take(seconds, line)
                if kind in QUESTIONS and questions < QUESTIONS_MAX:
                    questions += 1
                    about, question = QUESTIONS[kind]
                    notes.keep({"host": about, **asked(control, question)})
                return False

            def on_start(speak: qemu.Say) -> None:
                nonlocal say
                say = speak
                if job.ahead:
                    await_go()
                    _take(state, taken)
                    if plan is not None:
                        _ = disks_of(plan, state)
                if cut is not None:
                    cut.begin()
                if job.ahead:
                    until = time.monotonic_ns() + LISTEN_MAX
                    with awaited(control, until) as qmp:
                        qemu.put_in(qmp, setup.disks)
                    say(GO_WORD)
                started(speak)

            ended = qemu.run(
                setup, deadline=deadline, told=on_line, evidence=on_evidence, started=on_start
            )
            told_last = {"after": round(latest, 3), "lost_notes": notes.lost, **ended._asdict()}
            notes.keep({"host": "ended", **told_last})
    finally:
        initrd.unlink(missing_ok=True)
    if cut is not None and cut.is_made:
        cut.leave()
        _ = event(ALL_TOLD)
    bring_home(state)
    if cut is not None and cut.is_made:
        return EXIT_POWER_CUT
    return _code(ended, notes, told)


def _code(ended: qemu.Ended, notes: Notes, told: qemu.Told) -> int:
    """The boot's exit code: the guest's word, if nothing speaks against it."""
    problem = ""
    if ended.alarm:
        problem = f"the console tells of {ended.alarm!r}"
    elif ended.timed_out:
        problem = "it was not over in time"
    elif notes.crash:
        problem = "process 1 failed"
    elif notes.off is None and not ended.stopped:
        problem = f"it went off without a word, QEMU's exit code is {ended.code}"
    elif ended.code and not ended.stopped:
        problem = f"QEMU's exit code is {ended.code}"
    if problem:
        told(0.0, f"nexus.vm.host: {problem}")
        return EXIT_GUEST
    return notes.off or 0


def ready() -> int:
    """Have everything there that a boot needs; 0, or EXIT_NOT_RUN and one sentence."""
    try:
        machine = machine_named()
        _ = qemu.check(machine)
        check_tools()
        _ = build(machine, cache_folder())
    except (NotHad, NoSuchMachine) as missing:
        _ = sys.stderr.write(f"{missing}\n")
        return EXIT_NOT_RUN
    return 0


def main(argv: Sequence[str]) -> int:
    """Boot what the job says, and hand every event to the runner."""
    if not argv:
        return ready()
    descriptor, job = int(argv[0]), Job(**json.loads(argv[1]))
    die_with_parent(job.runner)
    assert job.state is not None, "a system is booted with a state directory"

    def event(line: bytes) -> bool:
        rest = memoryview(line + b"\n")
        try:
            while rest:
                rest = rest[os.write(descriptor, rest) :]
        except BrokenPipeError:  # the runner has seen enough
            return True
        return False

    def told(_seconds: float, text: str) -> None:
        _ = sys.stdout.write(f"{text}\n")
        _ = sys.stdout.flush()

    try:
        state = Path(job.state)
        image = pinned(machine_named(), cache_folder(), state / PIN)
        return boot(image, replace(job, runner=0), state, event=event, told=told)
    except (NotHad, NoSuchMachine) as missing:
        _ = sys.stderr.write(f"not run: {missing}\n")
        return EXIT_NO_MACHINE
    except QmpFailed as failed:
        _ = sys.stderr.write(f"nexus.vm.host: no disks could be put in: {failed}\n")
        return EXIT_GUEST
    except Dropped:
        return 0
    finally:
        os.close(descriptor)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
