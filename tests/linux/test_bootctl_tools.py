"""U-Boot's own tools on our environment: fw_printenv reads what we wrote, and we what fw_setenv
wrote. The oracle is Debian's libubootenv-tool; nothing of it is ours."""

import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from nexus.bootctl import (
    BOOT_BLOCKS_MIN,
    BootRecord,
    Cause,
    EnvironmentBoot,
    NoBootRecord,
    SlotName,
    SlotState,
    attempt,
    commit,
    failed,
    open_boot,
    staged,
    staging,
    switch,
)
from nexus.bootctl.environment import variables_of
from nexus.drivers import finished
from nexus.loader.devices import opened
from tests.fakes.bootrecords import a_reason, a_set, new

pytestmark = [
    pytest.mark.linux,
    pytest.mark.skipif(
        shutil.which("fw_printenv") is None or shutil.which("fw_setenv") is None,
        reason="the Debian package libubootenv-tool is not installed: apt-get install it",
    ),
]

A, B = SlotName.A, SlotName.B
SIZE = BOOT_BLOCKS_MIN * 512
WAIT = 20.0  # s for one call of a tool; it takes milliseconds


class Board:
    """A boot device as a file, and the tools' configuration for it."""

    def __init__(self, folder: Path) -> None:
        self.image = folder / "boot.img"
        self.image.write_bytes(bytes(SIZE))
        self._config = folder / "fw_env.config"
        self._config.write_text(f"{self.image} 0x0 0x4000\n{self.image} 0x4000 0x4000\n")

    def _run(self, tool: str, *words: str) -> str:
        command = [tool, "-c", str(self._config), *words]
        done = subprocess.run(command, capture_output=True, timeout=WAIT, check=True)
        return done.stdout.decode("latin-1")

    def printed(self) -> dict[str, str]:
        """All variables, as fw_printenv has them."""
        return dict(line.split("=", 1) for line in self._run("fw_printenv").splitlines())

    def set(self, name: str, *value: str) -> None:
        _ = self._run("fw_setenv", name, *value)

    def create(self) -> BootRecord:
        with opened(self.image, writable=True) as device:
            return finished(EnvironmentBoot(device).create(new()))

    def load(self) -> BootRecord:
        with opened(self.image) as device:
            boot, record = finished(open_boot(device))
            assert isinstance(boot, EnvironmentBoot)
            return record

    def change(self, step: Callable[[BootRecord], BootRecord]) -> BootRecord:
        with opened(self.image, writable=True) as device:
            boot, record = finished(open_boot(device))
            return finished(boot.store(step(record)))


@pytest.fixture
def board(tmp_path: Path) -> Board:
    return Board(tmp_path)


def switched(record: BootRecord) -> BootRecord:
    return switch(record, 2, a_reason(Cause.SWITCHED, B, record, tail="one\ntwo \\ ü\x1b"))


STEPS: tuple[Callable[[BootRecord], BootRecord], ...] = (
    staging,
    lambda record: staged(record, replace(a_set(2), name="2.0.0 ü")),
    switched,
    lambda record: attempt(record, wall=5)[0],
    lambda record: failed(record, a_reason(Cause.CRASHED, B, record, detail="it ended")),
    lambda record: attempt(record)[0],
    lambda record: commit(record, B, a_reason(Cause.COMMITTED, B, record)),
)


def test_fw_printenv_reads_the_state_of_every_step_of_an_update(board: Board) -> None:
    record = board.create()
    assert board.printed() == variables_of(record)

    for step in STEPS:
        record = board.change(step)
        assert board.printed() == variables_of(record)

    assert board.printed()["nexus_active"] == "b"


def test_what_fw_setenv_writes_is_the_state_we_go_on_with(board: Board) -> None:
    _ = board.create()
    for step in STEPS[:3]:
        _ = board.change(step)

    board.set("nexus_b_tries", "1")

    record = board.load()
    assert record.slot(B).tries_left == 1
    record, slot = attempt(record)
    assert (slot, record.slot(B).tries_left) == (B, 0)


def test_fw_setenv_can_take_a_switch_back_as_an_operator_does(board: Board) -> None:
    _ = board.create()
    for step in STEPS[:3]:
        _ = board.change(step)

    board.set("nexus_b_tries", "0")
    board.set("nexus_trying")

    record = board.load()
    assert (record.trying, record.slot(B).state) == (None, SlotState.STAGED)
    assert attempt(record)[1] is A


def test_both_write_by_turns_and_each_reads_the_other_for_three_hundred_changes(
    board: Board,
) -> None:
    _ = board.create()

    for turn in range(100):  # 300 changes: the flags byte comes round
        board.set("bootcount", str(turn))
        board.set("upgrade_available", str(turn % 2))
        record = board.change(lambda record: attempt(record)[0])
        assert record.boots == turn + 1
        if turn % 20 == 0:
            printed = board.printed()
            assert (printed["nexus_boots"], printed["bootcount"]) == (str(turn + 1), str(turn))
    assert board.load().boots == 100


def test_a_variable_of_another_stays_through_our_changes(board: Board) -> None:
    board_command = "if test ${nexus_trying} = b; then run boot_b; else run boot_a; fi"
    _ = board.create()
    board.set("bootcmd", board_command)

    _ = board.change(staging)

    assert board.printed()["bootcmd"] == board_command


def test_a_record_that_fw_setenv_made_impossible_is_refused_and_named(board: Board) -> None:
    _ = board.create()

    board.set("nexus_active", "c")

    with pytest.raises(NoBootRecord, match="nexus_active is 'c', not one of a, b"):
        _ = board.load()
    board.set("nexus_active", "a")
    assert board.load().active is A


def test_a_tool_reads_the_good_copy_when_the_other_one_is_torn(board: Board) -> None:
    record = board.create()
    data = bytearray(board.image.read_bytes())
    before = bytes(data)
    _ = board.change(staging)
    after = board.image.read_bytes()
    changed = 0 if after[:0x4000] != before[:0x4000] else 0x4000
    torn = bytearray(after)
    torn[changed + 512 : changed + 0x4000] = before[changed + 512 : changed + 0x4000]

    board.image.write_bytes(torn)

    assert board.printed() == variables_of(record)
    assert board.load() == record
