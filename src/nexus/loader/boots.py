"""One boot on Linux, in a process that the loader forked for it: decide, unpack, become init.

    read the last boot's evidence -> choose -> the slot's tree -> tell the loader -> exec of init

What it does before it becomes init is the loader's only use of our libraries; its memory goes with
the exec.
"""

import json
import os
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Final, NoReturn

import msgspec

from nexus.abi import AbiError
from nexus.bootctl import (
    TRIES_MAX,
    BootRecord,
    NoBootRecord,
    SlotName,
    TrialFailure,
    open_boot,
    read_failure,
)
from nexus.drivers.block import BlockDevice, DeviceFault
from nexus.drivers.finished import finished
from nexus.kernel.linux.bootmemory import BootMemory
from nexus.loader.choose import Chosen, Ended, NothingBootable, SlotSource, choose, note_end
from nexus.loader.devices import boot_path, opened, opened_slot, slot_path
from nexus.loader.main import BOOTING, FAILING, JUDGED, OPEN
from nexus.loader.tail import ConsoleLine, last_words
from nexus.loader.tree import PYTHON, NoTree, tree_of

CONSOLE: Final = "console.log"  # of the log directory; init writes it too
TAIL_READ: Final = 64 * 1024  # bytes at the end of it that are looked through
ERRORS_READ: Final = 16 * 1024  # bytes at the end of standard error that are looked through
TELLER: Final = "loader"
INTERPRETER: Final = "init"  # in front of what init's Python says; init's own lines are init-lite's
INIT_MODULE: Final = "nexus.cli.boot"
NOT_INHERITED: Final = ("PYTHONPYCACHEPREFIX", "PYTHONHOME", "PYTHONOPTIMIZE")

CANNOT: Final = (NothingBootable, NoBootRecord, DeviceFault)
"""Why there is no boot at all; the text is a sentence."""


def become(job: Any, seen: dict[str, Any] | None, told: int) -> NoReturn:
    """Choose and become init. `seen` is what the loader saw of the last boot's end, None if it saw
    none; what it has to know of this one is written to the descriptor `told`, -1 for nobody.

    Raises what is in CANNOT.
    """
    running = job["running"]
    state, console = Path(running["state"]), Path(running["log"]) / CONSOLE
    with ExitStack() as stack:
        device = stack.enter_context(opened(boot_path(state), writable=True))
        chosen, tree = _prepared(state, device, console, seen)
    _announce(job, chosen, console)
    start = {
        "trial": chosen.boot.trial,
        "deadline": chosen.boot.deadline,
        "slot": chosen.boot.slot,
    }
    if told >= 0:
        _ = os.write(told, json.dumps(start).encode())
    words = [sys.executable, "-P", "-m", INIT_MODULE, _job(job, chosen, tree)]
    os.execve(sys.executable, words, _environment(tree))  # noqa: S606 (our own interpreter)


def verdict(job: Any) -> int:
    """How it stands with the trial that was booted last, by the boot device and init's memory."""
    state = Path(job["running"]["state"])
    with opened(boot_path(state)) as device:
        _, record = finished(open_boot(device))
    if record.trying is None:
        return JUDGED
    return OPEN if _failure_of(state, record) is None else FAILING


def note(job: Any, seen: dict[str, Any]) -> None:
    """Keep how the last boot ended; there is no other one now. Raises what is in CANNOT."""
    state, console = Path(job["running"]["state"]), Path(job["running"]["log"]) / CONSOLE
    with opened(boot_path(state), writable=True) as device:
        control, record = finished(open_boot(device))
        ended = _ended(state, record, console, seen)
        _ = finished(note_end(control, ended, wall=time.time_ns()))


def _prepared(
    state: Path, device: BlockDevice, console: Path, seen: dict[str, Any] | None
) -> tuple[Chosen, Path]:
    """The slot to boot, and its files. A set in trial that cannot be unpacked has had its try."""
    control, record = finished(open_boot(device))
    ended = _ended(state, record, console, seen or {})
    for _ in range(TRIES_MAX + 2):
        with ExitStack() as stack:
            slots = {
                name: stack.enter_context(opened_slot(slot_path(state, name))) for name in SlotName
            }
            chosen = finished(choose(control, slots, ended, wall=time.time_ns()))
            name = SlotName(chosen.boot.slot)
            source = SlotSource(slots[name], chosen.record.slot(name).size)
            try:
                return chosen, tree_of(state, chosen.record, name, chosen.manifest, source)
            except NoTree as error:
                if not chosen.boot.trial:
                    raise NothingBootable(f"slot {name}: {error}") from error
                ended = Ended(problem=str(error))
    raise NothingBootable("no try of the trial could be unpacked, and it does not end")


def _ended(state: Path, record: BootRecord, console: Path, seen: dict[str, Any]) -> Ended:
    """What is known of the last boot: what the loader saw, init's last word, the console."""
    failure = _failure_of(state, record)
    told = dict(seen)
    since = told.pop("errors", -1)
    errors = errors_of(sys.stderr.fileno(), since) if failure is None else []
    service = INTERPRETER if failure is None else failure.service
    tail = tail_of(console, record.boots, service, errors)
    return Ended(**told, failure=failure, tail=tail)


def _failure_of(state: Path, record: BootRecord) -> TrialFailure | None:
    """init's word about the trial that was booted last, unless it left none."""
    failure = read_failure(_memory(state))
    if record.trying is None or failure is None:
        return None
    info = record.slot(record.trying)
    about = failure.slot, failure.version, failure.attempt
    return failure if about == (record.trying.value, info.version, info.attempts) else None


def _memory(state: Path) -> bytes:
    """init's boot memory; nothing if it cannot be read."""
    try:
        return BootMemory(state).read()
    except (AbiError, OSError):
        return b""


def errors_of(descriptor: int, since: int) -> list[str]:
    """What the interpreter of the last boot's init said on standard error, the loader's file here;
    nothing with `since` of -1, where it is none. How init crashed is said nowhere else."""
    if since < 0:
        return []
    try:
        with Path(f"/proc/self/fd/{descriptor}").open("rb") as file:
            _ = file.seek(max(since, file.seek(0, os.SEEK_END) - ERRORS_READ))
            lines = file.read(ERRORS_READ).decode("utf-8", "replace").splitlines()
    except OSError:
        return []
    return [f"{INTERPRETER} [stderr] {line}" for line in lines]


def tail_of(console: Path, boots: int, service: str = "", errors: Sequence[str] = ()) -> str:
    """The last words of that boot, and of a service in it, on the console, with those of its
    interpreter; empty if it never came to say anything."""
    own = [_console_line(line) for line in _console_of(console, boots)]
    own += [ConsoleLine(INTERPRETER, line) for line in errors]
    return last_words(own, service)


def _console_of(console: Path, boots: int) -> list[str]:
    """The lines of that boot, as far as they are among the last ones."""
    try:
        with console.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            _ = file.seek(max(0, size - TAIL_READ))
            lines = file.read(TAIL_READ).decode("utf-8", "replace").splitlines()
    except OSError:
        return []
    head = f"{TELLER} [{BOOTING}] "
    heads = [at for at, line in enumerate(lines) if head in line]
    own: list[str] = [] if heads else lines[1:]  # a boot that wrote more than is looked through
    for at, end in zip(heads, [*heads[1:], len(lines)], strict=False):
        if f"{head}boot {boots}:" in lines[at]:
            own = lines[at + 1 : end]
    return own


def _console_line(line: str) -> ConsoleLine:
    """TIME NAME [KIND] TEXT, as nexus.cli.sink writes it; what is none has no name."""
    words = line.split(" ", 2)
    return ConsoleLine(words[1] if len(words) > 1 else "", line)


def _announce(job: Any, chosen: Chosen, console: Path) -> None:
    """Say which boot this is, on the console of the system and to whoever watches."""
    boot, info = chosen.boot, chosen.record.slot(SlotName(chosen.boot.slot))
    trial = f", trial {boot.attempt}, {info.tries_left} tries left" if boot.trial else ""
    text = (
        f"boot {chosen.record.boots}: slot {boot.slot}, version {boot.version} ({boot.name}), "
        f"{boot.digest[:12]}{trial}"
    )
    now = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
    with suppress(OSError):
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(console, flags, 0o600)
        try:
            _ = os.write(descriptor, f"{now / 1e9:.6f} {TELLER} [{BOOTING}] {text}\n".encode())
        finally:
            os.close(descriptor)
    tell(job, BOOTING, text)


def tell(job: Any, kind: str, text: str) -> None:
    """A nexus.cli.sink.Told for the watching command, if there is one that has room."""
    if job["watcher"] < 0:
        return
    from socket import MSG_DONTWAIT, socket

    line = json.dumps([kind, TELLER, text, ""]).encode()
    watcher = socket(fileno=os.dup(job["watcher"]))
    with watcher, suppress(OSError):
        _ = watcher.send(line, MSG_DONTWAIT)


def _job(job: Any, chosen: Chosen, tree: Path) -> str:
    """The job for the init of this slot; what it does not know of, an older one ignores."""
    file = str(tree / chosen.manifest.system)
    boot = msgspec.to_builtins(chosen.boot)
    return json.dumps({**job, "running": {**job["running"], "file": file}, "slot_boot": boot})


def _environment(tree: Path) -> dict[str, str]:
    """This one, with the set's package found first; nobody writes compiled files in a tree."""
    kept = {name: text for name, text in os.environ.items() if name not in NOT_INHERITED}
    paths = [str(tree / PYTHON), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**kept, "PYTHONPATH": os.pathsep.join(paths), "PYTHONDONTWRITEBYTECODE": "1"}
