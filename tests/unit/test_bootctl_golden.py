"""The stored forms, to the byte: a device of an older release is read by a newer one."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from nexus.bootctl import (
    FORMAT_VERSION,
    BootControl,
    BootRecord,
    Cause,
    Reason,
    SlotName,
    attempt,
    block,
    failed,
    open_boot,
    staged,
    staging,
    switch,
)
from nexus.bootctl.anchor import ANCHOR_COPIES, ANCHOR_SIZE_MAX
from nexus.bootctl.block import COPIES, COPY_SIZE
from nexus.bootctl.environment import ENVIRONMENT_COPIES, ENVIRONMENT_SIZE, variables_of
from nexus.bootctl.record import Cause as Causes
from nexus.bootctl.record import SlotState
from nexus.drivers import finished
from nexus.kernel.sim.disk import Disk
from nexus.proof.powercut import DiskDevice
from tests.fakes.bootrecords import BACKENDS, BOOT_BLOCKS, a_set, new

FOLDER = Path(__file__).parent.parent / "golden"
PAGE = Path(__file__).parents[2] / "docs" / "reference" / "boot-format.md"
ANCHOR = b'{"signed":{"_type":"root"}}'


def made(backend: str) -> tuple[Disk, BootRecord]:
    """A device in the midst of a trial, with evidence of its first boot."""
    disk = Disk(BOOT_BLOCKS)
    boot: BootControl = BACKENDS[backend](DiskDevice(disk))
    record = finished(boot.create(new()))
    finished(boot.write_anchor(ANCHOR))
    record = finished(boot.store(staging(record)))
    info = replace(a_set(2, floor=1), name="2.0.0 é")
    record = finished(boot.store(staged(record, info)))
    reason = Reason(
        cause=Cause.SWITCHED, slot=SlotName.B, version=2, boot=1, wall=5, trace=b"t" * 16
    )
    record = finished(boot.store(switch(record, 2, reason, snapshot=3)))
    record = finished(boot.store(attempt(record)[0]))
    reason = Reason(
        cause=Cause.NOT_READY,
        slot=SlotName.B,
        version=2,
        boot=1,
        trace=b"u" * 16,
        service="app",
        detail="not ready after 5 s",
        tail="init: start app\ninit: \x1b[31mapp\\ is late",
    )
    record = finished(boot.store(attempt(failed(record, reason))[0]))
    return disk, record


def lines(disk: Disk) -> list[str]:
    """Every block that is not all zeros."""
    blocks = [(at, disk.read(at, 1)) for at in range(disk.block_count)]
    return [f"block {at} {data.hex()}" for at, data in blocks if data.strip(b"\0")]


def path_of(backend: str) -> Path:
    return FOLDER / f"boot-{backend}-{FORMAT_VERSION}.hex"


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_golden_device_is_read(backend: str) -> None:
    disk = Disk(BOOT_BLOCKS)
    for line in path_of(backend).read_text("ascii").splitlines():
        _, at, data = line.split(" ")
        disk.write(int(at), bytes.fromhex(data), durable=True)

    boot, record = finished(open_boot(DiskDevice(disk)))

    assert isinstance(boot, BACKENDS[backend])  # type: ignore[arg-type]  # they are classes
    assert record == made(backend)[1]
    assert finished(boot.read_anchor()) == ANCHOR


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_written_now_is_what_this_version_writes(backend: str) -> None:
    assert lines(made(backend)[0]) == path_of(backend).read_text("ascii").splitlines(), (
        "the format has changed: raise FORMAT_VERSION, keep the old device, describe both"
    )


def test_the_page_that_describes_the_format_is_of_this_version() -> None:
    page = PAGE.read_text("utf-8")

    assert f"version {FORMAT_VERSION}" in page
    for name, value in (
        ("COPY_SIZE", COPY_SIZE),
        ("ENVIRONMENT_SIZE", ENVIRONMENT_SIZE),
        ("ANCHOR_SIZE_MAX", ANCHOR_SIZE_MAX),
        ("BODY_SIZE_MAX", block.BODY_SIZE_MAX),
    ):
        [told] = re.findall(rf"`{name}` = ([0-9 ]+)", page)
        assert int(told.replace(" ", "")) == value
    for at in (*COPIES, *ENVIRONMENT_COPIES, *ANCHOR_COPIES):
        assert re.search(rf"^\| {at} to ", page, re.MULTILINE), f"block {at} is not told"


def test_the_page_tells_every_state_cause_and_variable() -> None:
    page = PAGE.read_text("utf-8")

    for kind in (SlotState, Causes):
        for each in kind:
            assert f"| {each.value} | `{each.name.lower()}` |" in page
    names = {re.sub("reason_[1-4]", "reason_N", name) for name in variables_of(made("block")[1])}
    names = {re.sub("^nexus_[ab]_", "nexus_S_", name) for name in names}
    for name in names:
        assert f"| `{name}` |" in page


if __name__ == "__main__":
    for each in BACKENDS:
        _ = path_of(each).write_text("\n".join(lines(made(each)[0])) + "\n", "ascii")
