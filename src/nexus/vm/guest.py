"""Process 1 of a guest: from Linux's hand to nexus.init, and to the end of the machine.

    file systems -> modules -> devices -> evidence port -> job -> disk for what lasts
        -> (slots) the loader chooses, this process becomes the slot's
        -> the system runs -> its end -> evidence handed over -> power off

It is what an image starts as /init, and it is small: what it needs of our own is imported when the
evidence port is open, so that a failing import is told too. From then on everything is as on any
Linux: nexus.init.ground boots the plan, and nothing below it knows that this is process 1.

An error in here is the end of the machine, never of its evidence: the traceback goes to the console
and to the port, and the power goes off.
"""

import fcntl
import gc
import json
import os
import select
import signal
import struct
import sys
import time
import traceback
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Event as Pause
from typing import TYPE_CHECKING, Any, Final, NamedTuple, NoReturn

from nexus.proof.notes import GOES_ON, NOTE, NOTE_STAGE, NOTE_UP, WAITS
from nexus.vm import devices
from nexus.vm.calls import Mounted, Power, load_module, mount, power, raise_interface, unmount
from nexus.vm.contract import (
    AHEAD,
    DISK_SUFFIX,
    DOCTOR,
    EVIDENCE_PORT,
    EXIT_GUEST,
    GO_WORD,
    INTERRUPT_WORD,
    JOB,
    MODULES,
    MODULES_ORDER,
    NOTE_CRASH,
    NOTE_DOCTOR,
    NOTE_OFF,
    PERSIST,
    PERSIST_STATE,
    PLAIN,
    RELOAD_WORD,
    SCRAPE_WORD,
    SLOT_AT,
    STOP_WORD,
    WATCHDOG,
    WATCHDOG_DEFAULT,
)

if TYPE_CHECKING:
    from nexus.kernel.linux.mmio import MmioPage
    from nexus.proof.sink import EventSink

QUIET: Final = Mounted.NO_SUID | Mounted.NO_DEVICES | Mounted.NO_EXEC

FILE_SYSTEMS: Final = (
    ("proc", "/proc", QUIET, ""),
    ("sysfs", "/sys", QUIET, ""),
    ("devtmpfs", "/dev", Mounted.NO_SUID, "mode=0755"),
    ("tmpfs", "/run", Mounted.NO_SUID | Mounted.NO_DEVICES, "mode=0755"),
    ("tmpfs", "/tmp", Mounted.NO_SUID | Mounted.NO_DEVICES, "mode=1777"),  # noqa: S108
    # CONTROL_GROUPS; each start of a service enters one, which costs it ten milliseconds otherwise.
    ("cgroup2", "/sys/fs/cgroup", QUIET, "favordynmods"),
)
CONTROL_GROUPS: Final = Path("/sys/fs/cgroup")
SETTINGS: Final = (
    ("kernel/panic_on_oops", "1"),  # a kernel that went wrong proves nothing any more
    ("kernel/pid_max", "4194304"),  # a number comes again late
    ("vm/compact_unevictable_allowed", "0"),  # nexus.kernel.linux.mmio
)

WATCHDOG_NODE: Final = Path("/dev/watchdog")
WATCHDOG_SET: Final = 0xC0045706  # WDIOC_SETTIMEOUT of linux/watchdog.h, an int of seconds
WATCHDOG_INTERVALS: Final = 3  # in its margin, each with two signs of life
WATCHDOG_OFF: Final = b"V"  # Documentation/watchdog/watchdog-api.rst: the last byte before a close
PERSIST_AT: Final = Path("/persist")
STATE_ELSE: Final = Path("/run/state")  # of a machine without a disk for what lasts
RUNTIME: Final = Path("/run/nexus")
DEVICE_WAIT: Final = 10_000_000_000  # ns; a port comes some milliseconds after its device
DEVICE_POLL: Final = 0.01  # seconds
DISK_MODULES: Final = frozenset({"virtio_blk"})
GO_WAIT: Final = 3_600_000  # ms for the boot before; the host kills who waits for nothing
LEAVE_WAIT: Final = 0.05  # seconds for QEMU's own loop to hand on what it has taken
TEXT_SIZE_MAX: Final = 16 * 1024  # bytes of a traceback
REBOOTS: Final = frozenset({3, 4})
"""EXIT_REBOOT and EXIT_SLOT_FAILED of nexus.bootctl.handover, which a test compares: what fails
before anything of ours is imported ends here too."""
WORD_SIZE_MAX: Final = 256  # bytes of what the host says
SIGNALS: Final = {
    STOP_WORD: signal.SIGTERM,
    INTERRUPT_WORD: signal.SIGINT,
    RELOAD_WORD: signal.SIGHUP,
}

CONSOLE: Final = 2
SECOND: Final = 1_000_000_000  # ns


class Machine(NamedTuple):
    """What was found of it."""

    disks: dict[str, Path]  # nodes by serial
    pages: "tuple[tuple[MmioPage, str], ...]"


class Evidence:
    """The port to the host: what is said before there is a sink for events is said here."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.sink: EventSink | None = None

    def note(self, kind: str, **fields: object) -> None:
        """Tell the host something of the guest's own."""
        note = {NOTE: kind, "t": time.monotonic_ns(), **fields}
        line = json.dumps(note, separators=(",", ":")).encode() + b"\n"
        if self.sink is not None:
            self.sink.send(line)
        else:
            _write_all(self.descriptor, line)

    def off(self, code: int) -> None:
        """The last word; returns when the host's side has it."""
        if self.sink is not None:
            self.sink.end()
            self.sink = None
        # A blocking write returns when QEMU has taken a buffer, which is an earlier one if there
        # is one left; one moment later it has taken this one too.
        os.set_blocking(self.descriptor, True)
        self.note(NOTE_OFF, code=code)
        _ = Pause().wait(LEAVE_WAIT)


def main(argv: Sequence[str] = ()) -> NoReturn:
    """The life of process 1. With arguments it comes out of a slot: the descriptor of the evidence
    port, and the job."""
    evidence: Evidence | None = None
    code = EXIT_GUEST
    gc.disable()  # what is imported stays; the kernel backend does without from then on
    try:
        if argv:
            evidence = Evidence(int(argv[0]))
            told = json.loads(argv[1])
        else:
            set_up()
            evidence = open_evidence()
            evidence.note(
                NOTE_UP,
                python=sys.version.split()[0],
                kernel=os.uname().release,
                machine=os.uname().machine,
                cpus=os.cpu_count(),
                page_size=os.sysconf("SC_PAGE_SIZE"),
            )
            told = json.loads(Path(JOB).read_text("utf-8"))
            if told.get(AHEAD):
                await_go(told, evidence)
            load_modules(DISK_MODULES)
        code = run(told, evidence, is_slot=bool(argv))
    except BaseException:  # noqa: BLE001 (whatever it was: process 1 must tell it, and not end)
        crashed(traceback.format_exc(), evidence)
    finally:
        end(code, evidence)


def crashed(text: str, evidence: Evidence | None) -> None:
    """Tell of a failure in process 1, wherever there is somebody to be told."""
    with suppress(OSError):
        _write_all(CONSOLE, f"\n{text}".encode())
    if evidence is not None:
        with suppress(OSError):
            evidence.note(NOTE_CRASH, text=text[-TEXT_SIZE_MAX:])


def service_crashed(name: str, text: str) -> None:
    """Leave the last words of a service on the console, whoever is still there to read the evidence
    of it. Each line is marked as the service's: an unmarked traceback is one of process 1."""
    lines = text[-TEXT_SIZE_MAX:].splitlines()
    with suppress(OSError):
        _write_all(CONSOLE, "".join(f"{name}: | {line}\n" for line in lines).encode())


def end(code: int, evidence: Evidence | None) -> NoReturn:
    """Hand the evidence over, leave the disks in order, and have the power go off, or the machine
    start again where init said so."""
    os.sync()
    for place in (Path(SLOT_AT), PERSIST_AT):  # the one is a part of the other
        with suppress(OSError):
            if os.path.ismount(place):
                unmount(place)
    if evidence is not None:
        with suppress(OSError):
            evidence.off(code)
    power(Power.REBOOT if code in REBOOTS else Power.OFF)
    while True:  # a process 1 that ends is a panic of the kernel's
        signal.pause()


# ---------------------------------------------------------------------- the machine


def set_up() -> None:
    """File systems, settings of Linux's, modules."""
    for kind, target, flags, data in FILE_SYSTEMS:
        mount(kind, Path(target), kind, flags, data)
    for name, value in SETTINGS:
        _ = Path("/proc/sys", name).write_text(value, "ascii")
    _ = os.umask(0o022)
    load_modules(set(Path(MODULES_ORDER).read_text("ascii").split()) - DISK_MODULES)
    with suppress(OSError):  # a kernel without keys to press
        power(Power.IGNORE_KEYS)
    raise_interface("lo")


def load_modules(names: Collection[str]) -> None:
    """Load those of the image's modules, each behind what it needs."""
    for name in Path(MODULES_ORDER).read_text("ascii").split():
        if name in names:
            load_module(Path(MODULES, f"{name}.ko").read_bytes())


def await_go(told: Mapping[str, Any], evidence: Evidence) -> None:
    """The disks are another machine's still: have ready what needs none of them, and wait for the
    host's word. Linux must not see a disk before: it would remember what it has read."""
    if told.get("slots"):
        import nexus.vm.slot
    else:
        import nexus.vm.system  # noqa: F401 (both for their time)
    evidence.note(NOTE_STAGE, name=WAITS)
    port = select.poll()
    port.register(evidence.descriptor, select.POLLIN)
    if not port.poll(GO_WAIT):
        raise TimeoutError("the host has said nothing")
    word = os.read(evidence.descriptor, WORD_SIZE_MAX)
    if word != f"{GO_WORD}\n".encode():
        raise ValueError(f"the host says {word!r} before there is a system")
    evidence.note(NOTE_STAGE, name=GOES_ON)


def open_evidence() -> Evidence:
    """The port to the host, which is there a moment after its module is loaded."""
    path = _awaited(lambda: devices.port(EVIDENCE_PORT))
    if path is None:
        raise RuntimeError(f"no virtio-serial port {EVIDENCE_PORT}")
    return Evidence(os.open(path, os.O_RDWR | os.O_CLOEXEC))


def look() -> Machine:
    """Find the devices, none of them legacy. Raises devices.NotModern."""
    found = devices.found()
    devices.check_modern(found)
    disks = devices.blocks()
    return Machine(disks, devices.pages(found, devices.serials_of(disks)))


def mount_state(disks: dict[str, Path]) -> Path:
    """The directory for what lasts, with a node in it for each other disk under the name that an
    image would have there: where a system looks for its devices on any Linux."""
    state = STATE_ELSE
    node = disks.get(PERSIST)
    if node is not None:
        mount(str(node), PERSIST_AT, "ext4", Mounted.NO_SUID | Mounted.NO_EXEC)
        state = PERSIST_AT / PERSIST_STATE
    state.mkdir(mode=0o700, parents=True, exist_ok=True)
    for path in state.glob(f"*{DISK_SUFFIX}"):
        if path.is_block_device():
            path.unlink()  # of an earlier boot: numbers are given anew
    for serial, disk in disks.items():
        if serial != PERSIST:
            os.mknod(state / f"{serial}{DISK_SUFFIX}", 0o600 | 0o060000, disk.stat().st_rdev)
    return state


def _awaited(look_up: Any) -> Any:
    deadline = time.monotonic_ns() + DEVICE_WAIT
    pause = Pause()
    while (found := look_up()) is None and time.monotonic_ns() < deadline:
        _ = pause.wait(DEVICE_POLL)
    return found


# ---------------------------------------------------------------------- the system


def run(told: dict[str, Any], evidence: Evidence, *, is_slot: bool) -> int:
    """Boot what the job says; the exit code of the boot."""
    if told.pop(DOCTOR, False):
        return look_around(evidence)
    is_plain = bool(told.pop(PLAIN, False))
    margin = int(told.pop(WATCHDOG, WATCHDOG_DEFAULT))
    machine = look()
    evidence.note(NOTE_STAGE, name="devices", disks=sorted(machine.disks))
    if is_slot:
        state = Path(told["state"])
    else:
        state = mount_state(machine.disks)
        _forward_words(evidence.descriptor, state)
    evidence.note(NOTE_STAGE, name="state")

    from nexus.proof.job import Job

    job = Job(**{**told, "state": str(state)})
    if job.slots and not job.slot:
        from nexus.vm.slot import become_slot

        become_slot(evidence.descriptor, job, {PLAIN: is_plain, WATCHDOG: margin})

    from nexus.proof.sink import EventSink
    from nexus.vm.system import boot_job

    evidence.note(NOTE_STAGE, name="imported")
    sink = EventSink(evidence.descriptor)
    evidence.sink = sink
    with _watchdog(margin) as watchdog:
        evidence.note(NOTE_STAGE, name="system", watchdog=watchdog >= 0)
        interval = margin * SECOND // WATCHDOG_INTERVALS
        return boot_job(job, sink, machine.pages, (watchdog, interval), is_plain=is_plain)


def look_around(evidence: Evidence) -> int:
    """What `nexus doctor` says here, told to the host."""
    from nexus.kernel.linux.report import hardening_report, kernel_facts

    rows = [row._asdict() for row in hardening_report()]
    evidence.note(NOTE_DOCTOR, guarantees=rows, kernel=kernel_facts())
    return 0


class _watchdog:  # noqa: N801 (used as a function)
    """The machine's watchdog, which bites after so many seconds without a sign of life; -1 without
    one. Only an end in order calls it off."""

    def __init__(self, margin: int) -> None:
        self._margin = margin

    def __enter__(self) -> int:
        self._descriptor = -1
        if WATCHDOG_NODE.exists():
            self._descriptor = os.open(WATCHDOG_NODE, os.O_WRONLY | os.O_CLOEXEC)
            _ = fcntl.ioctl(self._descriptor, WATCHDOG_SET, struct.pack("=i", self._margin))
        return self._descriptor

    def __exit__(self, kind: object, value: object, trace: object) -> None:
        if self._descriptor < 0:
            return
        if kind is None:
            _ = os.write(self._descriptor, WATCHDOG_OFF)
        os.close(self._descriptor)


def _forward_words(descriptor: int, state: Path) -> None:
    """Leave a process that reads the port: a word from the host is a signal to process 1, as a
    machine's buttons are, or has it look from outside at what a service serves."""
    if os.fork():
        return
    try:
        _forward(descriptor, state)
    finally:
        os._exit(1)


def _forward(descriptor: int, state: Path) -> None:
    look = select.poll()
    look.register(descriptor, select.POLLIN)
    rest = b""
    while True:
        _ = look.poll()
        try:
            data = os.read(descriptor, WORD_SIZE_MAX)
        except BlockingIOError:
            continue
        if not data:  # nobody is connected now
            _ = Pause().wait(DEVICE_POLL)
            continue
        *lines, rest = (rest + data)[-WORD_SIZE_MAX:].split(b"\n")
        for line in lines:
            word, *arguments = line.decode("ascii", "replace").split() or [""]
            number = SIGNALS.get(word)
            if number is not None:
                os.kill(1, number)
            elif word == SCRAPE_WORD:
                _scrape(state, *arguments)


def _scrape(state: Path, name: str, boot: str) -> None:
    from nexus.proof.scraper import kept_at, scrape

    _ = kept_at(state, int(boot)).write_bytes(scrape(RUNTIME / f"{name}.sock"))


def _write_all(descriptor: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


if __name__ == "__main__":
    main(sys.argv[1:])
