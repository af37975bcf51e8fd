"""The command line of QEMU, and a run of a stand-in for it: a shell script that prints."""

import json
import os
import select
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from nexus.vm import qemu
from nexus.vm.machines import AARCH64
from nexus.vm.packages import NotHad
from nexus.vm.qemu import Disk, Ended, Setup, command, run


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is found before every other one."""
    folder = tmp_path / "programs"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return folder


def stand_in(programs: Path, script: str) -> None:
    file = programs / AARCH64.qemu
    _ = file.write_text(f"#!/usr/bin/env python3\nimport os, socket, sys\n{script}\n")
    file.chmod(0o755)


SETUP = Setup(machine=AARCH64, kernel=Path("vmlinuz"), initrd=Path("initrd"))
PORT = """\
fd = next(int(word.split("fd=")[1]) for word in sys.argv if "id=evidence,fd=" in word)
port = socket.socket(fileno=fd)
"""


def devices(words: list[str]) -> list[str]:
    return [after for word, after in pairwise(words) if word == "-device"]


def test_legacy_transports_are_off_and_entropy_has_a_page_of_its_own(programs: Path) -> None:
    stand_in(programs, "")

    words = command(replace(SETUP, disks=(Disk(name="persist", file=Path("p.img")),)), 7)

    assert "virtio-mmio.force-legacy=false" in words
    first, ports, port, disk = devices(words)
    assert first == "virtio-rng-device,rng=entropy,bus=virtio-mmio-bus.0"
    assert ports.endswith("bus=virtio-mmio-bus.8")
    assert port == "virtserialport,bus=ports.0,chardev=evidence,name=nexus.evidence"
    assert json.loads(disk)["bus"] == "virtio-mmio-bus.9"


def test_a_disk_is_known_by_its_serial_and_announces_a_cache(programs: Path) -> None:
    stand_in(programs, "")
    stick = Disk(name="stick", file=Path("a,b.img"), read_only=True)

    words = command(replace(SETUP, disks=(stick,)), 7)

    device = json.loads(devices(words)[-1])
    assert device["serial"] == "stick"
    assert device["write-cache"] == "on"
    nodes = [json.loads(after) for word, after in pairwise(words) if word == "-blockdev"]
    assert nodes[0]["filename"] == "a,b.img"
    assert all(node["read-only"] is True for node in nodes)
    assert device["drive"] == nodes[-1]["node-name"]


def test_a_write_log_stands_between_disk_and_guest(programs: Path) -> None:
    stand_in(programs, "")
    disk = Disk(name="disk", file=Path("d.img"), log=Path("d.log"))

    words = command(replace(SETUP, disks=(disk,)), 7)

    (writes,) = [json.loads(word) for word in words if "blklogwrites" in word]
    assert json.loads(devices(words)[-1])["drive"] == writes["node-name"]
    assert writes["file"] == "raw-disk"


def test_a_boot_loader_cannot_write_the_flash_that_its_settings_are_in(programs: Path) -> None:
    stand_in(programs, "")
    setup = Setup(machine=AARCH64, bios=Path("u-boot.bin"), flash=Path("a,b.flash"))

    words = command(setup, 7)

    assert words[words.index("-bios") + 1] == "u-boot.bin"
    flash = "if=pflash,unit=1,format=raw,readonly=on,file=a,,b.flash"
    assert words[words.index("-drive") + 1] == flash


@pytest.mark.parametrize("name", ["x" * 21, "ü" * 11])
def test_a_name_that_is_no_serial_is_refused(name: str, programs: Path) -> None:
    stand_in(programs, "")

    with pytest.raises(ValueError, match="is longer than a serial, 20 bytes"):
        command(replace(SETUP, disks=(Disk(name=name, file=Path("d.img")),)), 7)


def test_more_disks_than_transports_are_refused(programs: Path) -> None:
    stand_in(programs, "")
    disks = tuple(Disk(name=f"disk{number}", file=Path("d.img")) for number in range(24))

    with pytest.raises(ValueError, match="there is no place for a disk 'disk23'"):
        command(replace(SETUP, disks=disks), 7)


def test_without_qemu_the_package_is_named(programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(programs))

    with pytest.raises(NotHad, match="try `apt-get install qemu-system-arm`"):
        command(SETUP, 7)


def ran(
    setup: Setup = SETUP, *, deadline: float = 20.0, until: bytes = b"?"
) -> tuple[Ended, list[str], list[bytes]]:
    console: list[str] = []
    evidence: list[bytes] = []

    def on_evidence(_seconds: float, line: bytes) -> bool:
        evidence.append(line)
        return line == until

    ended = run(
        setup, deadline=deadline, told=lambda _, text: console.append(text), evidence=on_evidence
    )
    return ended, console, evidence


def test_console_and_evidence_are_told_line_by_line(programs: Path) -> None:
    stand_in(
        programs, PORT + 'port.sendall(b"one\\ntwo\\n"); print("hello\\r"); print("no end", end="")'
    )

    ended, console, evidence = ran()

    assert evidence == [b"one", b"two"]
    assert console == ["hello", "no end"]
    assert ended == Ended(code=0, timed_out=False, stopped=False, alarm="", lost=0)


@pytest.mark.parametrize(
    "line",
    [
        "[    1.2] Kernel panic - not syncing: Attempted to kill init!",
        "Internal error: Oops: 0000000096000005 [#1] SMP",
        "BUG: scheduling while atomic",
        "Out of memory: Killed process 7",
    ],
)
def test_a_kernel_that_went_wrong_is_seen_whatever_the_exit_code_says(
    line: str, programs: Path
) -> None:
    stand_in(programs, f"print({line!r})")

    ended, _console, _evidence = ran()

    assert ended.alarm == line
    assert ended.code == 0


def test_a_service_killed_over_its_own_limit_is_no_alarm(programs: Path) -> None:
    stand_in(programs, 'print("Memory cgroup out of memory: Killed process 7 (python3)")')

    assert ran()[0].alarm == ""


def test_a_machine_that_hangs_is_killed_at_its_deadline(programs: Path) -> None:
    stand_in(programs, 'print("up", flush=True); import time; time.sleep(60)')

    ended, console, _evidence = ran(deadline=1.0)

    assert console == ["up"]
    assert ended.timed_out
    assert ended.code is None


def test_a_run_ends_where_the_evidence_says_so(programs: Path) -> None:
    stand_in(
        programs, PORT + 'port.sendall(b"one\\nenough\\nmore\\n"); import time; time.sleep(60)'
    )

    ended, _console, evidence = ran(until=b"enough")

    assert evidence == [b"one", b"enough"]
    assert ended.stopped


def test_a_flood_on_the_console_is_cut_and_counted(
    programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qemu, "LOG_SIZE_MAX", 1000)
    stand_in(programs, 'for _ in range(50): print("x" * 99)')

    ended, console, _evidence = ran()

    assert len(console) == 10
    assert ended.lost == 40 * 99


def test_a_line_without_an_end_takes_no_more_than_its_share(
    programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qemu, "LINE_SIZE_MAX", 100)
    stand_in(programs, 'sys.stdout.write("x" * 100_000)')

    ended, console, _evidence = ran()

    assert "".join(console) == "x" * 100_000
    assert ended.code == 0


def test_what_is_said_to_the_guest_comes_through_its_port(programs: Path) -> None:
    stand_in(programs, PORT + "port.sendall(b'heard ' + port.recv(100))")
    evidence: list[bytes] = []

    def on_evidence(_seconds: float, line: bytes) -> bool:
        evidence.append(line)
        return False

    _ = run(
        SETUP,
        deadline=20.0,
        told=lambda _seconds, _text: None,
        evidence=on_evidence,
        started=lambda say: say("stop"),
    )

    assert evidence == [b"heard stop"]


def test_the_machine_counts_its_instructions_and_ends_where_a_guest_starts_again(
    programs: Path,
) -> None:
    """Without the one the times of the system do not hold (ADR 27), without the other a boot of
    the runner's would be two."""
    stand_in(programs, "")

    words = command(SETUP, 7)

    assert ("-icount", "shift=0,sleep=on") in pairwise(words)
    assert ("-accel", "tcg,thread=single") in pairwise(words)
    assert "-no-reboot" in words


def test_a_machine_dies_with_whoever_started_it(programs: Path) -> None:
    stand_in(programs, "import time\nprint(os.getpid(), flush=True)\ntime.sleep(60)")
    starter = (
        "from pathlib import Path\n"
        "from nexus.vm.machines import AARCH64\n"
        "from nexus.vm.qemu import Setup, run\n"
        "setup = Setup(machine=AARCH64, kernel=Path('k'), initrd=Path('i'))\n"
        "tell = lambda _at, line: print(line, flush=True)\n"
        "run(setup, deadline=60, told=tell, evidence=lambda *_: False)\n"
    )
    with subprocess.Popen([sys.executable, "-c", starter], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        machine = os.pidfd_open(int(process.stdout.readline()))
        ended = select.poll()
        ended.register(machine, select.POLLIN)
        assert not ended.poll(0)

        process.kill()

        assert ended.poll(20_000)
        os.close(machine)
