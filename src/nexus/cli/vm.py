"""`nexus vm`: a machine of our own, built, booted and looked into.

What cannot be had here is "not run", with the command that would help, and an exit code of its own:
never green.
"""

import json
import os
import signal
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Final

from nexus.abi import NEVER, EventKind
from nexus.cli.doctor import show as show_report
from nexus.cli.errors import EXIT_FAILED, EXIT_OK, UsageError
from nexus.cli.output import say, say_json, say_table, tell
from nexus.cli.places import base_dirs
from nexus.cli.sink import told_of
from nexus.init.plan import load_plan
from nexus.proof.record import MalformedEvent, decode_event
from nexus.proof.runner import EXIT_NOT_RUN, Job
from nexus.vm import qemu
from nexus.vm.contract import STOP_WORD
from nexus.vm.host import boot
from nexus.vm.image import Image
from nexus.vm.image import build as build_image
from nexus.vm.looking import NothingTold, report
from nexus.vm.machines import NoSuchMachine, machine_named
from nexus.vm.packages import NotHad, cache_folder
from nexus.vm.shell import shell as show

MIB: Final = 1024 * 1024
TIMEOUT_MAX: Final = 30 * 86_400.0  # seconds; a machine that nobody stops


def build(machine: str | None, *, refresh: bool, contents: bool, as_json: bool) -> int:
    """Build an image, or say what is in the one that is there."""
    return _or_not_run(machine, refresh, lambda image: _built(image, contents, as_json))


def run(
    file: Path, state: Path | None, machine: str | None, *, memory: int, cpus: int, timeout: float
) -> int:
    """Boot a system and show what it prints, until it ends or Ctrl-C."""
    plan = load_plan(file)
    place = state or base_dirs(os.environ, os.geteuid())[0] / "vm" / plan.name
    place.mkdir(mode=0o700, parents=True, exist_ok=True)
    job = Job(
        ground="vm",
        system=str(file),
        smp=cpus,
        seed=0,
        limit=NEVER,
        boot=_boots_of(place),
        state=str(place),
    )

    def started(say_to: qemu.Say) -> None:
        """A signal is a wish to the guest, a second one the end of its machine."""

        def wish(*_signal: object) -> None:
            for number in (signal.SIGINT, signal.SIGTERM):
                _ = signal.signal(number, signal.default_int_handler)
            say_to(STOP_WORD)

        for number in (signal.SIGINT, signal.SIGTERM):
            _ = signal.signal(number, wish)

    def booted(image: Image) -> int:
        return boot(
            image,
            job,
            place,
            event=_show,
            told=lambda _, text: tell(text),
            plain=True,
            deadline=timeout or TIMEOUT_MAX,
            memory=memory,
            started=started,
        )

    return _or_not_run(machine, False, booted)


def shell(machine: str | None, *, memory: int, cpus: int) -> int:
    """A prompt in a guest."""
    return _or_not_run(machine, False, lambda image: show(image, memory, cpus))


def doctor(machine: str | None, *, as_json: bool) -> int:
    """What `nexus doctor` says in a guest; red if it says nothing."""

    def looked(image: Image) -> int:
        try:
            found = report(image)
        except NothingTold as nothing:
            tell(f"the machine told nothing: {nothing}")
            return EXIT_FAILED
        show_report(found, as_json=as_json)
        return EXIT_OK

    return _or_not_run(machine, False, looked)


def _or_not_run(name: str | None, refresh: bool, act: Callable[[Image], int]) -> int:
    try:
        machine = machine_named(name)
        return act(build_image(machine, cache_folder(), refresh=refresh))
    except NoSuchMachine as error:
        raise UsageError(str(error)) from error
    except NotHad as missing:
        tell(f"not run: {missing}")
        return EXIT_NOT_RUN


def _built(image: Image, contents: bool, as_json: bool) -> int:
    if as_json:
        document = {**asdict(image), "machine": image.machine.name, "size": image.size}
        if contents:
            document["contents"] = [each._asdict() for each in image.contents()]
        say_json(json.loads(json.dumps(document, default=str)))
        return EXIT_OK
    if contents:
        rows = [(str(each.size), f"/{each.path}") for each in image.contents()]
        say_table(("SIZE", "PATH"), rows)
    say(image.told)
    return EXIT_OK


def _boots_of(place: Path) -> int:
    """How often it was booted here."""
    return len(list(place.glob("guest-*.jsonl")))


def _show(line: bytes) -> bool:
    if line.startswith(b'{"dropped":'):
        return False
    try:
        told = told_of(decode_event(line))
    except MalformedEvent as error:
        tell(f"not understood: {error}")
        return False
    if told is None:
        return False
    is_said = told.kind == EventKind.CONSOLE
    head = "" if is_said and told.text.startswith(f"{told.name}: ") else f"{told.name}: "
    say(f"{head}{told.text}" if is_said else f"[{told.name} {told.text}]")
    return False
