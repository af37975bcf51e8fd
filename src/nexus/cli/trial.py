"""A plan made in a process apart, so that importing a system's own modules harms no command.

A module may end the interpreter when it is imported, never return, print, or leave a thread or a
timer behind. The command that was asked about it forks a child that imports and plans, and takes
from it nothing but data: a plan, or what is wrong with the file. What is believed is that the
child's code, which is the user's own, sends no plan on purpose that is not one; it could do all
this command can do anyway. Init then imports the same modules again, in its own process.
"""

import os
import select
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final, NoReturn

import msgspec

from nexus.init.declare import cut
from nexus.init.errors import SystemFileError
from nexus.init.plan import Plan, import_path, make_plan
from nexus.init.programs import WrongProgram, check_own, own_source
from nexus.init.system import Service, System, load

IMPORT_TIME: Final = 20_000_000_000  # ns for all imports; the slowest libraries take a few seconds
END_TIME: Final = 1.0  # seconds for a child that says nothing any more to be gone
READ_SIZE: Final = 65_536  # bytes
ANSWER_SIZE_MAX: Final = 16 * 1024 * 1024  # bytes; a plan of a whole device has some thousand


class Importing(msgspec.Struct, frozen=True, tag=True):
    """The child is about to import what a service is made of."""

    index: int


class Wrong(msgspec.Struct, frozen=True, tag=True):
    """A SystemFileError, as the child has it."""

    path: str
    line: int
    expected: str
    found: str


class Made(msgspec.Struct, frozen=True, tag=True):
    """The plan."""

    plan: Plan


Answer = Importing | Wrong | Made


def tried_plan(file: Path) -> Plan:
    """Read and check a system file as load_plan does; this process imports no module that the
    file names. Raises SystemFileError."""
    return tried(load(file))


def tried(system: System, limit: int = IMPORT_TIME) -> Plan:
    """The plan of a system. Raises SystemFileError; after `limit` ns the import counts as hung."""
    if not any(service.entry for service in system.services):
        return make_plan(system)
    _ = sys.stdout.flush()  # or the child might print it once more
    reader, writer = os.pipe()
    deadline = time.monotonic_ns() + limit
    child = os.fork()
    if child == 0:
        os.close(reader)
        _try_and_end(system, writer)
    os.close(writer)
    try:
        answers = _answers(reader, deadline)
    finally:
        os.close(reader)
        status = _end(child, late=time.monotonic_ns() >= deadline)
    match answers[-1] if answers else None:
        case Made(plan=plan):
            return plan
        case Wrong(path=path, line=line, expected=expected, found=found):
            raise SystemFileError(Path(path), line, expected, found)
        case Importing(index=index):
            raise _not_imported(system, system.services[index], status, limit)
        case None:
            first = next(service for service in system.services if service.entry)
            raise _not_imported(system, first, status, limit)


def _not_imported(
    system: System, service: Service, status: int | None, limit: int
) -> SystemFileError:
    """What is wrong with a service whose import never came to an end of its own."""
    name = f'"{cut(service.entry)}"'
    if status is None:
        expected = f"a module that is imported within {limit / 1e9:g} s"
        return system.wrong((*service.path, "module"), expected, f"{name}, still being imported")
    how = f"signal {-status}" if status < 0 else f"exit code {status}"
    expected = "a module that can be imported"
    found = f"{name}, which ends the interpreter ({how})"
    return system.wrong((*service.path, "module"), expected, found)


def _answers(reader: int, deadline: int) -> list[Answer]:
    """What the child says until it says how it went, says nothing any more, or is late."""
    answers: list[Answer] = []
    waiting = bytearray()
    while len(waiting) <= ANSWER_SIZE_MAX:
        left = (deadline - time.monotonic_ns()) / 1e9
        if left <= 0 or not select.select([reader], [], [], left)[0]:
            break
        part = os.read(reader, READ_SIZE)
        if not part:
            break
        *lines, rest = (waiting + part).split(b"\n")
        waiting = bytearray(rest)
        for line in lines:
            try:
                answers.append(msgspec.json.decode(line, type=Answer))
            except (msgspec.DecodeError, UnicodeDecodeError):
                return answers  # something else wrote into the pipe: no answer can be had
        if answers and not isinstance(answers[-1], Importing):
            break
    return answers


def _end(child: int, *, late: bool) -> int | None:
    """End the child and all it started; its exit code, negative for a signal, None if it lived."""
    process = os.pidfd_open(child)
    try:
        ended = bool(select.select([process], [], [], 0 if late else END_TIME)[0])
    finally:
        os.close(process)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)
    if not ended:
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    return os.waitstatus_to_exitcode(status) if ended else None


# ---------------------------------------------------------------- in the child


def _try_and_end(system: System, writer: int) -> NoReturn:
    """The child: no output, no terminal, no way back into the command."""
    me = os.getpid()

    def tell(answer: Answer) -> None:
        if os.getpid() == me:  # a module may fork, and its child comes by here too
            data = memoryview(msgspec.json.encode(answer) + b"\n")
            while data:
                data = data[os.write(writer, data) :]

    try:
        os.setsid()
        nothing = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            _ = os.dup2(nothing, descriptor)
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115, PTH123 (for its whole life)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            _ = signal.signal(number, signal.SIG_DFL)
        _plan(system, tell)
        os._exit(0)
    finally:
        os._exit(1)  # a module may raise anything, and there is nobody to raise it to


def _plan(system: System, tell: Callable[[Answer], None]) -> None:
    path = import_path(system)
    wrong = None
    for index, service in enumerate(system.services):
        if not service.entry:
            continue
        tell(Importing(index))
        source = own_source(
            service.entry,
            service.protocol,
            double=service.double,
            ordinary=service.ordinary,
            path=path,
        )
        try:
            check_own(source)
        except WrongProgram as error:  # what else is wrong with the file comes first
            wrong = wrong or system.wrong((*service.path, error.key), error.expected, error.found)
    try:
        plan = make_plan(system)
    except SystemFileError as error:
        wrong = error
    else:
        if wrong is None:
            tell(Made(plan))
            return
    tell(Wrong(str(wrong.path), wrong.line, wrong.expected, wrong.found))
