"""One run of QEMU: its command line, and what comes out of it.

Two streams are read while it runs: the console, whose lines are for people and are stamped when
they come, and the evidence port, whose lines are what the guest says of itself. Both are bounded.
QEMU is killed when the run is over, however it ends. Its own exit code says little: a kernel that
panics ends it with 0 as well.
"""

import json
import os
import select
import selectors
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from nexus.kernel.linux.native import PR_SET_PDEATHSIG, prctl
from nexus.proof.trace import ALARMS
from nexus.vm.contract import EVIDENCE_PORT, SERIAL_SIZE_MAX
from nexus.vm.machines import Machine
from nexus.vm.packages import NotHad
from nexus.vm.qmp import Qmp

MEMORY_DEFAULT: Final = 512  # MiB
LINE_SIZE_MAX: Final = 64 * 1024 + 1024  # bytes; the longest event is 64 KiB
LOG_SIZE_MAX: Final = 4 * 1024 * 1024  # bytes of the console that are told, the first ones
READ_SIZE: Final = 256 * 1024
SOCKET_SIZE: Final = 1024 * 1024  # bytes of evidence between QEMU and us
EXIT_GRACE: Final = 5.0  # seconds QEMU has to exit once its console is closed

COUNTED: Final = ("-accel", "tcg,thread=single", "-icount", "shift=0,sleep=on")
"""The guest's clock counts its instructions, a nanosecond each, and goes like ours while it idles:
what is emulated thirty times as slow takes as long, by its own clock, as on a small real machine,
however busy ours is. So the times of a system file and of the ladder hold as they are. Its CPUs
take turns."""
COUNTED_KHZ: Final = 1_000_000  # of its CPU: an instruction a nanosecond

UNUSED: Final = (  # initcalls: a third of the kernel's start, and nothing here uses them
    "bpf_dummy_struct_ops_init",
    "bpf_tcp_ca_kfunc_init",
    "crypto_kdf108_init",
    "init_kprobe_trace",
    "jent_mod_init",
    "load_system_certificate_list",
)
WORDS: Final = ("panic=-1", "quiet", "audit=0", f"initcall_blacklist={','.join(UNUSED)}")
"""What every kernel is told."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Disk:
    """A disk by its name, which the guest reads as its serial. With `log` every write and flush is
    written to that file too (dm-log-writes). One with a `size` is put in later: it is empty until
    then, and its file is another machine's."""

    name: str
    file: Path
    read_only: bool = False
    log: Path | None = None
    is_alone: bool = False  # in its page of registers, so that who has it can drive it itself
    size: int = 0  # bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Setup:
    """What is started. `memory` is in MiB; `qmp` is the path of the socket for control, and `bios`
    of a boot loader, which then finds the kernel by itself; `flash` is what it reads its own
    settings from. A machine `apart` is in a process group of its own: what a terminal's keys mean
    is for us to say."""

    machine: Machine
    kernel: Path | None = None
    initrd: Path | None = None
    bios: Path | None = None
    flash: Path | None = None
    memory: int = MEMORY_DEFAULT
    cpus: int = 1
    disks: tuple[Disk, ...] = ()
    append: tuple[str, ...] = ()
    qmp: Path | None = None
    apart: bool = False


class Ended(NamedTuple):
    """How a run ended. `code` is QEMU's own, None if it had to be killed; `alarm` is the first line
    of the console that tells of a panic or an oops."""

    code: int | None
    timed_out: bool
    stopped: bool
    alarm: str
    lost: int  # bytes of the console that were not told


def check(machine: Machine) -> str:
    """The program. Raises NotHad."""
    found = shutil.which(machine.qemu)
    if found is None:
        raise NotHad(f"there is no {machine.qemu}; try `apt-get install {machine.qemu_package}`")
    return found


def command(setup: Setup, evidence: int | None) -> list[str]:
    """The command line; `evidence` is a connected socket that QEMU inherits. Without one nobody
    reads what the guest says of itself, and its console is the terminal of whoever starts it."""
    machine = setup.machine
    words = [check(machine), *machine.arguments]
    words += COUNTED
    words += ["-smp", str(setup.cpus), "-m", f"{setup.memory}M"]
    words += ["-nodefaults", "-no-user-config", "-display", "none"]
    words += ["-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console"]
    words += ["-no-reboot"]
    words += ["-global", "virtio-mmio.force-legacy=false"]
    words += ["-object", "rng-random,id=entropy,filename=/dev/urandom"]
    words += ["-device", "virtio-rng-device,rng=entropy,bus=virtio-mmio-bus.0"]
    port = "null,id=evidence" if evidence is None else f"socket,id=evidence,fd={evidence}"
    words += ["-chardev", port]
    bus = machine.own_page
    words += ["-device", f"virtio-serial-device,id=ports,bus=virtio-mmio-bus.{bus}"]
    words += ["-device", f"virtserialport,bus=ports.0,chardev=evidence,name={EVIDENCE_PORT}"]
    free = machine.transports  # from here on pages are taken for one disk each
    for disk in setup.disks:
        if disk.is_alone:
            free -= machine.own_page
        else:
            bus += 1
        if bus >= free:
            raise ValueError(f"there is no place for a disk {disk.name!r}")
        words += _disk(disk, free if disk.is_alone else bus)
    if setup.qmp is not None:
        words += ["-qmp", f"unix:{_escaped(setup.qmp)},server=on,wait=off"]
    if setup.bios is not None:
        words += ["-bios", str(setup.bios)]
    if setup.flash is not None:
        flash = _escaped(setup.flash)
        words += ["-drive", f"if=pflash,unit=1,format=raw,readonly=on,file={flash}"]
    if setup.kernel is not None:
        append = [f"console={machine.console}", *WORDS, *machine.append, *setup.append]
        if machine.has_tsc:
            append += [f"tsc_early_khz={COUNTED_KHZ}", "tsc=reliable", "no_timer_check"]
        words += ["-kernel", str(setup.kernel), "-append", " ".join(append)]
    if setup.initrd is not None:
        words += ["-initrd", str(setup.initrd)]
    return words


def _disk(disk: Disk, bus: int) -> list[str]:
    """A disk that announces a cache of its own, so that the guest has to flush."""
    if len(disk.name.encode()) > SERIAL_SIZE_MAX:
        raise ValueError(f"{disk.name!r} is longer than a serial, {SERIAL_SIZE_MAX} bytes")
    file, raw = _file(disk), _raw(disk)
    top = f"raw-{disk.name}"
    if disk.size:
        file = {"driver": "null-co", "node-name": f"none-{disk.name}", "size": disk.size}
        raw["file"] = file["node-name"]
    nodes: list[dict[str, object]] = [file, raw]
    if disk.log is not None:
        log: dict[str, object] = {
            "driver": "file",
            "node-name": f"log-{disk.name}",
            "filename": str(disk.log),
        }
        top = f"writes-{disk.name}"
        nodes += [
            log,
            {
                "driver": "blklogwrites",
                "node-name": top,
                "file": f"raw-{disk.name}",
                "log": log["node-name"],
                "log-super-update-interval": 1,
            },
        ]
    words = [word for node in nodes for word in ("-blockdev", json.dumps(node))]
    device = {
        "driver": "virtio-blk-device",
        "id": f"disk-{disk.name}",
        "drive": top,
        "serial": disk.name,
        "bus": f"virtio-mmio-bus.{bus}",
        "write-cache": "on",
        "werror": "report",
        "rerror": "report",
    }
    return [*words, "-device", json.dumps(device)]


def _file(disk: Disk) -> dict[str, object]:
    return {
        "driver": "file",
        "node-name": f"file-{disk.name}",
        "filename": str(disk.file),
        "read-only": disk.read_only,
    }


def _raw(disk: Disk) -> dict[str, object]:
    return {
        "driver": "raw",
        "node-name": f"raw-{disk.name}",
        "file": f"file-{disk.name}",
        "read-only": disk.read_only,
    }


def put_in(qmp: Qmp, disks: Iterable[Disk]) -> None:
    """Put the disks into a machine that was started without them. Raises QmpFailed."""
    for disk in disks:
        _ = qmp.ask("blockdev-add", **_file(disk))
        _ = qmp.ask("blockdev-reopen", options=[_raw(disk)])


def _escaped(path: Path) -> str:
    """A path in QEMU's list of options, where a comma is written twice."""
    return str(path).replace(",", ",,")


# ---------------------------------------------------------------- a run

Told = Callable[[float, str], None]
"""Is given each line of the console, and the seconds since the start at which it came."""

Evidence = Callable[[float, bytes], bool]
"""Is given each line of the evidence port as it comes, and when; True ends the run there."""

Say = Callable[[str], None]
"""Gives the guest a line over the evidence port; what does not fit there at once is lost."""


def _unheard(_say: Say) -> None:
    """Nothing is to be said."""


def run(
    setup: Setup,
    *,
    deadline: float,
    told: Told,
    evidence: Evidence,
    started: Callable[[Say], None] = _unheard,
) -> Ended:
    """Start QEMU and read until it is over, `evidence` says so, or `deadline` seconds have passed.
    `started` is handed the way to speak to the guest; time counts from its return. Raises
    NotHad."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours:
        with theirs:
            theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_SIZE)
            process = _start(setup, command(setup, theirs.fileno()), (theirs.fileno(),))

        def say(text: str) -> None:
            with suppress(BlockingIOError, BrokenPipeError):
                _ = ours.send(f"{text}\n".encode(), socket.MSG_DONTWAIT)

        try:
            with process:
                reading = _Reading(process, ours, told, evidence)
                try:
                    started(say)
                    return reading.until(deadline)
                finally:
                    process.kill()
                    reading.close()
        finally:
            if setup.qmp is not None:
                setup.qmp.unlink(missing_ok=True)


def show(setup: Setup) -> int:
    """Start QEMU on this terminal and wait for its end, which is the guest's; its exit code. Raises
    NotHad."""
    words = command(setup, None)
    return subprocess.run(words, check=False, preexec_fn=_dying_with(os.getpid())).returncode  # noqa: S603 (made above)


def _start(
    setup: Setup, words: Sequence[str], descriptors: tuple[int, ...]
) -> "subprocess.Popen[bytes]":
    """A child that dies with us."""
    return subprocess.Popen(  # noqa: S603 (words made above)
        words,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        pass_fds=descriptors,
        process_group=0 if setup.apart else None,
        preexec_fn=_dying_with(os.getpid()),
    )


def _dying_with(parent: int) -> Callable[[], None]:
    """What a child does first, so that Linux kills it when its parent is gone."""

    def before() -> None:
        _ = prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)

    return before


class _Reading:
    """The two streams of a running QEMU."""

    def __init__(
        self,
        process: "subprocess.Popen[bytes]",
        port: socket.socket,
        told: Told,
        evidence: Evidence,
    ) -> None:
        assert process.stdout is not None
        self._process = process
        self._console = process.stdout.fileno()
        self._port = port.fileno()
        self._told = told
        self._evidence = evidence
        self._start = 0
        self._rests = {self._console: b"", self._port: b""}
        self._told_size = 0
        self._lost = 0
        self._alarm = ""
        self._stopped = False

    def close(self) -> None:
        """Tell what is left of the console: of a QEMU that ended before anybody listened, why."""
        if select.select([self._console], [], [], 0)[0]:
            _ = self._read(self._console)

    def until(self, deadline: float) -> Ended:
        self._start = time.monotonic_ns()
        timed_out = False
        with selectors.DefaultSelector() as selector:
            for descriptor in self._rests:
                _ = selector.register(descriptor, selectors.EVENT_READ)
            while selector.get_map() and not self._stopped:
                remaining = deadline - self._elapsed
                if remaining <= 0:
                    timed_out = True
                    break
                for key, _mask in selector.select(min(remaining, 1.0)):
                    if not self._read(key.fd):
                        _ = selector.unregister(key.fd)
                if self._process.poll() is not None and not selector.select(0):
                    break
        code = None
        if not timed_out and not self._stopped:
            try:
                code = self._process.wait(EXIT_GRACE)
            except subprocess.TimeoutExpired:
                timed_out = True
        return Ended(code, timed_out, self._stopped, self._alarm, self._lost)

    @property
    def _elapsed(self) -> float:
        return (time.monotonic_ns() - self._start) / 1e9 if self._start else 0.0

    def _read(self, descriptor: int) -> bool:
        """Take what has come. Whether more may come."""
        try:
            data = os.read(descriptor, READ_SIZE)
        except ConnectionResetError:  # QEMU is gone, with something of ours unread
            data = b""
        *lines, rest = (self._rests[descriptor] + data).split(b"\n")
        if len(rest) > LINE_SIZE_MAX or (rest and not data):
            lines, rest = [*lines, rest], b""
        self._rests[descriptor] = rest
        for line in lines:
            if descriptor == self._console:
                self._on_console(line)
            elif self._evidence(self._elapsed, line):
                self._stopped = True
                return False
        return bool(data)

    def _on_console(self, line: bytes) -> None:
        text = line.decode("utf-8", "replace").rstrip("\r")
        if not self._alarm and ALARMS.search(text):
            self._alarm = text
        if self._told_size + len(line) > LOG_SIZE_MAX:
            self._lost += len(line)
            return
        self._told_size += len(line)
        self._told(self._elapsed, text)
