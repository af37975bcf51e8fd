"""A disk of a machine that grows slow, fails, and is well again: QEMU makes it so, through QMP."""

from collections.abc import Callable
from pathlib import Path

import pytest

from nexus.abi import EventKind
from nexus.init.plan import load_plan
from nexus.proof.record import decode_event
from nexus.proof.remains import read_image
from nexus.proof.runner import Job
from nexus.vm import qemu
from nexus.vm.disks import disks_of
from nexus.vm.host import overlay_of
from nexus.vm.image import Image
from nexus.vm.qmp import Qmp
from tests.vm.powercut import BOOT_MAX, KEPT, SYSTEM

pytestmark = [pytest.mark.vm, pytest.mark.slow]

SLOW: int = 4  # requests a second; a value takes two
FREE: int = 0
VALUES: int = 10  # under each condition
LIMITS = ("bps", "bps_rd", "bps_wr", "iops_rd", "iops_wr")


def booted(
    image: Image, folder: Path, on_line: Callable[[float, str, str], bool]
) -> tuple[list[str], qemu.Ended]:
    """Boot the system that keeps numbered values; every console line of a service, and how it
    ended. `on_line` sees when each came, who printed it, and what; True ends the boot."""
    job = Job(
        ground="vm", system=str(SYSTEM), smp=1, seed=0, limit=int(BOOT_MAX * 1e9), state=str(folder)
    )
    initrd = folder / ".initrd"
    image.write_initrd(initrd, overlay_of(job, plain=True))
    setup = qemu.Setup(
        machine=image.machine,
        kernel=image.kernel,
        initrd=initrd,
        disks=disks_of(load_plan(SYSTEM), folder),
        qmp=folder / "q",
    )
    lines: list[str] = []

    def on_evidence(seconds: float, line: bytes) -> bool:
        if b'"k":"console"' not in line:
            return False
        event = decode_event(line)
        assert event.kind is EventKind.CONSOLE
        lines.append(str(event.fields["line"]))
        return on_line(seconds, str(event.fields["name"]), lines[-1])

    ended = qemu.run(setup, deadline=BOOT_MAX, told=lambda _s, _t: None, evidence=on_evidence)
    return lines, ended


def throttle(folder: Path, requests: int) -> None:
    """So many requests a second to the disk; FREE for as many as there are."""
    with Qmp(folder / "q") as control:
        limits = dict.fromkeys(LIMITS, 0)
        _ = control.ask("block_set_io_throttle", id="disk-disk", iops=requests, **limits)


def fail_writes(folder: Path) -> None:
    """From now on each write to the disk ends with EIO."""
    error = {"event": "pwritev", "iotype": "write", "errno": 5, "once": False}
    node = {"driver": "blkdebug", "node-name": "bad", "image": "file-disk", "inject-error": [error]}
    disk = {"driver": "raw", "node-name": "raw-disk", "file": "bad"}
    with Qmp(folder / "q") as control:
        _ = control.ask("blockdev-add", **node)
        _ = control.ask("blockdev-reopen", options=[disk])


def last_of(folder: Path) -> int:
    """The highest number in the store on the disk."""
    left = read_image((folder / "disk.img").read_bytes())
    assert not left.problem
    assert not left.lost
    return max(int(each.value.split()[0]) for each in left.records.values())


def test_a_slow_disk_slows_who_waits_for_it_and_breaks_nothing(
    image: Image, tmp_path: Path
) -> None:
    times: dict[int, float] = {}

    def on_line(seconds: float, _name: str, line: str) -> bool:
        if not line.startswith(KEPT):
            return False
        number = int(line.removeprefix(KEPT))
        times[number] = seconds
        if number == VALUES:
            throttle(tmp_path, SLOW)
        if number == 2 * VALUES:
            throttle(tmp_path, FREE)
        return number == 3 * VALUES

    lines, ended = booted(image, tmp_path, on_line)

    assert ended.stopped, lines[-20:]
    slow = times[2 * VALUES] - times[VALUES + 1]
    assert slow > 1.0
    assert slow > 2 * (times[3 * VALUES] - times[2 * VALUES + 1])
    assert list(times) == list(range(1, 3 * VALUES + 1))
    assert not any("end of" in line for line in lines)


def test_a_disk_that_fails_is_not_written_any_more_and_serves_again_after_a_boot(
    image: Image, tmp_path: Path
) -> None:
    refused: list[str] = []

    def until_read_only(_seconds: float, _name: str, line: str) -> bool:
        if line == f"{KEPT}{VALUES}":
            fail_writes(tmp_path)
        if "is not kept" in line:
            refused.append(line)
        return "READ_ONLY" in line

    lines, ended = booted(image, tmp_path, until_read_only)

    assert ended.stopped, lines[-20:]
    assert f"value {VALUES + 1} is not kept" in refused[0]
    assert "IO_ERROR" in refused[0]
    assert not any("end of statefsd" in line for line in lines)
    assert last_of(tmp_path) == VALUES

    def until_kept(_seconds: float, _name: str, line: str) -> bool:
        return line == f"{KEPT}{2 * VALUES}"

    lines, ended = booted(image, tmp_path, until_kept)

    assert ended.stopped, lines[-20:]
    assert last_of(tmp_path) == 2 * VALUES
