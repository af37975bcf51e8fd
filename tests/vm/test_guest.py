"""Process 1 in a machine: what holds there, what becomes of a service that takes too much, and of
process 1 itself when it fails, hangs or reboots; and which machine it refuses."""

import json
import re
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import pytest

from nexus.abi import BUDGET_SIZE_DEFAULT, Event, EventKind, HardwareKind
from nexus.bootctl.handover import EXIT_REBOOT
from nexus.bundle.gather import SYSTEM, system_files
from nexus.cli.command import main
from nexus.init.system import load as load_system
from nexus.kernel.linux.groups import COMMON_SPARE
from nexus.proof.job import Job
from nexus.proof.notes import NOTE, NOTE_UP
from nexus.proof.record import decode_event
from nexus.proof.walls import GUEST_NOT_HELD, HELD, rows_of
from nexus.protocols.ladder import Ground
from nexus.vm import qemu
from nexus.vm.contract import (
    EXIT_GUEST,
    INTERRUPT_WORD,
    JOB,
    NOTE_CRASH,
    NOTE_OFF,
    PLAIN,
    RELOAD_WORD,
    WATCHDOG,
    WATCHDOG_DEFAULT,
)
from nexus.vm.image import INIT, Image
from nexus.vm.initramfs import Tree
from nexus.vm.qmp import Qmp

pytestmark = [pytest.mark.vm, pytest.mark.slow]

GREED: Final = Path(__file__).parent / "greed" / "system.toml"
QUIET: Final = GREED.with_name("quiet.toml")
MEMORY_SIZE: Final = 64 << 20  # bytes that `hoards` may take, in that file
SHARE: Final = 20  # percent of a CPU that `spins` may take
THREADS: Final = 4  # that `multiplies` may start
SERVICES: Final = ("answers", "calls", "hoards", "spins", "multiplies", "crashes")
BAD_ENDS: Final = ("hoards", "crashes")
TIME_MAX: Final = 240.0  # seconds of ours for one machine, on a busy host
LIMIT: Final = 60_000_000_000  # ns of its clock
SLOW: Final = 150_000_000  # ns of its clock for a call, beside services that want all there is
MARGIN: Final = 3  # seconds of its clock that a hanging init has
BITE_MAX: Final = 5 * MARGIN  # seconds of ours until its watchdog has bitten, on a busy host
RESET_WORD: Final = "Initiating system reboot"  # softdog.c
RESET: Final = "guest-reset"  # qapi/run-state.json, ShutdownCause
OFF: Final = "guest-shutdown"

ORPHANS: Final = """\
import os, signal, time
if os.fork() == 0:
    told, tell = os.pipe()
    if os.fork() == 0:
        if os.fork() == 0:
            if os.fork() == 0:
                os.write(tell, b"%d " % os.getpid())
                signal.pause()
            os.write(tell, b"%d " % os.getpid())
            signal.pause()
        os._exit(0)
    orphans = []
    while len(orphans) < 2:
        orphans += map(int, os.read(told, 100).split())
    orphans.sort()
    while not os.path.exists("/sys/fs/cgroup/nexus/calls.1"):
        time.sleep(0.05)
    for orphan in orphans:
        os.kill(orphan, signal.SIGKILL)
        for _ in range(100):
            if not os.path.exists(f"/proc/{orphan}"):
                os.write(2, b"orphan: gone\\n")
                break
            time.sleep(0.02)
    os._exit(0)
"""
"""An orphan and its child, which is one when it has ended: each is ended when init runs, and has to
be reaped by it. A zombie keeps its folder in /proc. Runs in a process of its own."""

DELEGATED: Final = """\
import sys
sys.path.append("/usr/lib/python3/dist-packages")
from nexus.vm import guest
look = guest.look
def tried():
    import os
    from nexus.kernel.linux import groups_tried
    os.mkdir("/sys/fs/cgroup/given")
    for file, word in ("cgroup.subtree_control", "+memory +pids +cpu"), ("given/cgroup.procs", "0"):
        with open(f"/sys/fs/cgroup/{file}", "w") as control:
            control.write(word)
    os.environ["NEXUS_CGROUP"] = "own"
    found = tuple(groups_tried.tried())
    left = os.listdir("/sys/fs/cgroup/given")
    os.write(2, f"delegated: {found} {left}\\n".encode())
    return look()
guest.look = tried
"""
"""What the doctor finds in a group that it was put into, as systemd does with Delegate=yes."""

WHEN_READY: Final = """\
import sys
sys.path.append("/usr/lib/python3/dist-packages")
import threading
from nexus.init.supervisor import Supervisor
check = Supervisor._check_ready
async def checked(self):
    await check(self)
    if self.ready_at is not None:
        {}
Supervisor._check_ready = checked
"""
HANG: Final = WHEN_READY.format("threading.Event().wait()")
"""A lost wake-up in process 1."""
REBOOT: Final = WHEN_READY.format("self.reboot()")
"""What init does when somebody asks it for a reboot."""

MODERN: Final = "virtio-mmio.force-legacy=false"
LEGACY: Final = "virtio-mmio.force-legacy=true"
PORTS_ID: Final = 3  # virtio's device id of the evidence port
SPARE_SIZE: Final = 1 << 20  # bytes of a disk that nobody uses


@dataclass
class Seen:
    """What came out of a machine."""

    ended: qemu.Ended | None = None
    events: list[Event] = field(default_factory=list)
    notes: list[dict[str, Any]] = field(default_factory=list)
    console: list[str] = field(default_factory=list)
    told: list[object] = field(default_factory=list)  # by QEMU: reasons of its end
    times: dict[str, float] = field(default_factory=dict)  # of lines, in seconds since the start

    def note(self, kind: str) -> dict[str, Any]:
        (found,) = (each for each in self.notes if each[NOTE] == kind)
        return found

    def of_kind(self, kind: EventKind, name: str = "") -> list[Event]:
        events = [event for event in self.events if event.kind is kind]
        return [event for event in events if not name or event.fields.get("name") == name]

    def lines(self, start: str) -> list[Event]:
        said = self.of_kind(EventKind.CONSOLE)
        return [event for event in said if str(event.fields["line"]).startswith(start)]

    def line(self, start: str) -> Event:
        (found,) = self.lines(start)
        return found


def booted(
    image: Image,
    folder: Path,
    *,
    system: Path = GREED,
    planted: str = "",
    watchdog: int = WATCHDOG_DEFAULT,
    disks: tuple[qemu.Disk, ...] = (),
    on_line: Callable[[str, qemu.Say], None] = lambda _line, _say: None,
) -> Seen:
    """Boot a machine until it goes off or is reset. `planted` runs before anything of ours;
    `on_line` is handed each line of the system, and the way to speak to it."""
    job = Job(ground="vm", system=f"/{SYSTEM}/{system.name}", smp=1, seed=1, limit=LIMIT)
    overlay = Tree()
    if system.exists():
        for path, content in system_files(load_system(system)).items():
            overlay.file(path, content.data)
    told = {**asdict(job), PLAIN: True, WATCHDOG: watchdog}
    overlay.file(JOB[1:], json.dumps(told).encode())
    first, _, rest = INIT.partition("\n")
    overlay.file("init", f"{first}\n{planted}{rest}".encode(), 0o755)
    initrd, control = folder / "initrd", folder / "q"
    image.write_initrd(initrd, overlay)
    setup = qemu.Setup(
        machine=image.machine, kernel=image.kernel, initrd=initrd, disks=disks, qmp=control
    )
    seen, say = Seen(), list[qemu.Say]()

    with ExitStack() as stack:
        controls = list[Qmp]()

        def evidence(seconds: float, line: bytes) -> bool:
            if line.startswith(b'{"dropped"'):
                assert json.loads(line) == {"dropped": 0}
                return False
            if NOTE in (entry := json.loads(line)):
                seen.notes.append(entry)
                if entry[NOTE] == NOTE_UP:
                    controls.append(stack.enter_context(Qmp(control)))
                return False
            event = decode_event(line)
            seen.events.append(event)
            text = str(event.fields.get("line", ""))
            seen.times[text] = seconds
            on_line(text, say[0])
            return False

        def told_by(seconds: float, text: str) -> None:
            seen.console.append(text)
            seen.times[text] = seconds

        seen.ended = qemu.run(
            setup, deadline=TIME_MAX, told=told_by, evidence=evidence, started=say.append
        )
        for each in controls:
            seen.told += [event.get("data", {}).get("reason") for event in each.told()]
    return seen


def test_everything_that_doctor_lists_is_held_in_a_machine_of_ours(
    image: Image, capsys: pytest.CaptureFixture[str]
) -> None:
    """And what it says there is what the ladder's rungs are compared with."""
    code = main(["vm", "doctor", "--json", "--machine", image.machine.name])

    assert code == 0
    found = json.loads(capsys.readouterr().out)["guarantees"]
    rows = {row["name"]: row["state"] for row in found}
    others = {row["name"]: (row["state"], row["why"]) for row in found if row["state"] != HELD}
    assert {name: state for name, (state, _) in others.items()} == GUEST_NOT_HELD, others
    assert rows.keys() >= rows_of(Ground.VM).keys()
    assert {"seccomp", "landlock", "pidfd", "cgroup_cpu"} <= rows.keys()


# ---- one boot in which each service that takes too much does


@pytest.fixture(scope="module")
def greed(image: Image, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """SIGHUP when all have done it, and SIGINT when that is answered."""
    awaited = {"init: back hoards", "init: back crashes", "spins: had", "multiplies: has"}
    signals = [INTERRUPT_WORD, RELOAD_WORD]

    def on_line(line: str, say: qemu.Say) -> None:
        awaited.difference_update({each for each in awaited if line.startswith(each)})
        turn = "calls: slowest" if signals[-1:] == [RELOAD_WORD] else "init: policy set"
        if not awaited and signals and line.startswith(turn):
            say(signals.pop())

    folder = tmp_path_factory.mktemp("greed")
    return booted(image, folder, planted=ORPHANS, on_line=on_line)


def test_a_service_over_its_memory_is_killed_alone_reported_and_started_again(greed: Seen) -> None:
    (heap,) = greed.of_kind(EventKind.HEAP)
    assert heap.fields["account"] == "memory of hoards"
    used, free, total = (heap.fields[f"heap_budget_{name}"] for name in ("used", "free", "total"))
    assert isinstance(total, int)
    assert (used, free) == (total, 0)
    assert MEMORY_SIZE + BUDGET_SIZE_DEFAULT + COMMON_SPARE <= total <= 2 * MEMORY_SIZE
    assert heap.fields["size"] == "unknown"
    said = [event.fields["line"] for event in greed.of_kind(EventKind.KERNEL)]
    assert said.count("KHEAP: hoards ended, over its memory") == 1
    killed = greed.of_kind(EventKind.EXIT, "hoards")[0]
    assert [killed.fields[name] for name in ("generation", "code", "signal")] == [1, 0, 9]
    end = greed.line("init: end of hoards").fields["evidence"]
    assert isinstance(end, dict)
    assert (end["generation"], end["reason"]) == (1, "memory limit")


def test_nobody_else_notices_those_who_take_too_much(greed: Seen) -> None:
    for name in SERVICES:
        generations = [1, 2] if name in BAD_ENDS else [1]
        starts = greed.of_kind(EventKind.SPAWN, name)
        assert [event.fields["generation"] for event in starts] == generations
        ends = [
            (event.fields["code"], event.fields["signal"])
            for event in greed.of_kind(EventKind.EXIT, name)
        ]
        assert ends[-1] == (0, 0) or name == "hoards"
        assert len(ends) == len(generations)
    assert greed.lines("calls: failed") == []
    calls = greed.lines("calls: slowest")
    assert max(int(str(event.fields["line"]).split()[2]) for event in calls) < SLOW
    moments = [
        greed.of_kind(EventKind.HEAP)[0],
        greed.line("spins: had"),
        greed.line("multiplies: has"),
    ]
    for moment in moments:  # others were called until then, and afterwards
        assert calls[0].time < moment.time < calls[-1].time


def test_a_service_that_never_rests_has_its_share_of_the_processor(greed: Seen) -> None:
    words = str(greed.line("spins: had").fields["line"]).split()

    assert SHARE // 2 <= int(words[2]) <= SHARE + 2


def test_a_service_that_starts_threads_without_end_has_as_many_as_it_may(greed: Seen) -> None:
    line = str(greed.line("multiplies: has").fields["line"])

    assert line.startswith(f"multiplies: has {THREADS} threads, then can't start new thread")


def test_the_last_words_of_a_service_are_on_the_console_with_its_name(greed: Seen) -> None:
    words = [line for line in greed.console if line.startswith("crashes: | ")]

    assert words[0] == "crashes: | Traceback (most recent call last):"
    assert words[-1] == "crashes: | KeyError: 'calibration'"
    assert not any(line.startswith("Traceback") for line in greed.console)


def test_what_others_leave_is_reaped_by_process_1(greed: Seen) -> None:
    assert greed.console.count("orphan: gone") == 2


def test_process_1_takes_its_signals_and_ends_in_order(greed: Seen) -> None:
    signals = [event.fields["evidence"] for event in greed.lines("init: signal")]

    assert signals == [{"name": "SIGHUP"}, {"name": "SIGINT"}]
    assert greed.lines("init: policy set"), "what SIGHUP is for"
    assert greed.note(NOTE_OFF)["code"] == 0
    assert any(note.get("watchdog") for note in greed.notes)
    assert not any("watchdog" in line for line in greed.console)  # "... did not stop!"
    assert RESET not in greed.told
    assert OFF in greed.told


# ---- process 1 itself


@pytest.fixture(scope="module")
def failed(image: Image, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """A boot in which process 1 fails, for there is no system."""
    folder = tmp_path_factory.mktemp("failed")
    return booted(image, folder, system=folder / "missing.toml", planted=DELEGATED)


def test_in_a_delegated_group_everything_is_held_and_it_is_left_as_it_was(failed: Seen) -> None:
    (found,) = (line for line in failed.console if line.startswith("delegated: "))

    assert found.startswith("delegated: ('', '', '', '') [")
    assert "'nexus'" not in found
    assert "'init'" not in found


def test_a_failure_of_process_1_is_told_and_the_power_goes_off(failed: Seen) -> None:
    seen = failed

    assert "missing.toml" in seen.note(NOTE_CRASH)["text"]
    assert any(line.startswith("Traceback") for line in seen.console)
    assert seen.note(NOTE_OFF)["code"] == EXIT_GUEST
    assert seen.ended is not None
    assert (seen.ended.code, seen.ended.timed_out) == (0, False)


def test_a_machine_whose_init_hangs_is_started_again_by_its_watchdog(
    image: Image, tmp_path: Path
) -> None:
    seen = booted(image, tmp_path, system=QUIET, planted=HANG, watchdog=MARGIN)

    assert seen.ended is not None
    assert (seen.ended.code, seen.ended.timed_out) == (0, False)
    assert RESET in seen.told
    (bite,) = (line for line in seen.console if RESET_WORD in line)
    assert NOTE_OFF not in [note[NOTE] for note in seen.notes]
    assert 0 < seen.times[bite] - seen.times["init: ready"] < BITE_MAX


def test_a_reboot_in_order_starts_the_machine_again(image: Image, tmp_path: Path) -> None:
    seen = booted(image, tmp_path, system=QUIET, planted=REBOOT)

    assert seen.ended is not None
    assert (seen.ended.code, seen.ended.timed_out, seen.ended.alarm) == (0, False, "")
    end = seen.line("init: stopped").fields["evidence"]
    assert isinstance(end, dict)
    assert end["dirty"] == []
    assert seen.note(NOTE_OFF)["code"] == EXIT_REBOOT
    assert RESET in seen.told
    assert OFF not in seen.told
    assert not any(RESET_WORD in line for line in seen.console), "nobody had to bite"


# ---- the machine


def test_a_machine_of_the_legacy_transport_is_refused_before_anything_starts(
    image: Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its driver of the entropy device is rngd, which is never started: it has agreed to nothing,
    and is not named."""
    command = qemu.command

    def legacy(setup: qemu.Setup, evidence: int | None) -> list[str]:
        words = command(setup, evidence)
        words[words.index(MODERN)] = LEGACY
        return words

    monkeypatch.setattr(qemu, "command", legacy)
    spare = qemu.Disk(name="spare", file=tmp_path / "spare.img")
    _ = spare.file.write_bytes(bytes(SPARE_SIZE))

    # A system that was started all the same would end by itself.
    seen = booted(image, tmp_path, system=QUIET, planted=REBOOT, disks=(spare,))

    said = str(seen.note(NOTE_CRASH)["text"]).splitlines()[-1]
    assert said.startswith("nexus.vm.devices.NotModern: without VERSION_1: virtio"), said
    ids = sorted(int(number) for number in re.findall(r"virtio\d+ \(device id (\d+)\)", said))
    assert ids == [HardwareKind.BLOCK, PORTS_ID]
    assert seen.note(NOTE_OFF)["code"] == EXIT_GUEST
    assert [note[NOTE] for note in seen.notes] == [NOTE_UP, NOTE_CRASH, NOTE_OFF]
    assert seen.events == []
    assert seen.ended is not None
    assert (seen.ended.code, seen.ended.timed_out) == (0, False)
    assert OFF in seen.told
