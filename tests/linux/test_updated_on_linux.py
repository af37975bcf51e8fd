"""updated in an interpreter of its own, on images: killed in the midst of a transfer, and how much
memory a large one takes."""

import os
import signal
from pathlib import Path
from typing import Any, Final

import pytest

from nexus.abi import BLOCK_SIZE, EventKind
from nexus.bootctl import SlotName, SlotState
from nexus.protocols.updated import Begun, Chunk, Finish, Staged, Switch, Switched, Taken
from tests.fakes.initrig import MS, SECOND
from tests.fakes.policyrig import Hands
from tests.fakes.updaterig import SYSTEM, LinuxUpdateMachine, ask, ask_with, begin, stage

pytestmark = pytest.mark.linux

A, B = SlotName.A, SlotName.B
PIECE: Final = 1024 * 1024
LARGE: Final = 32 * 1024 * 1024  # bytes of a set; a gigabyte is bench/update's
GROWTH_MAX: Final = 12 * 1024  # KiB that a stage of any size may add to the peak: it is 5 at rest
KILLS: Final = 4


def peak(pid: int) -> int:
    """KiB that the process had resident at most."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1])
    raise AssertionError("no peak")


def test_a_set_is_staged_and_switched_to(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    machine = LinuxUpdateMachine(monkeypatch, tmp_path)
    made = machine.maker.update(11)
    running = machine.slot_bytes(A)

    async def script(hands: Hands) -> Any:
        staged = await stage(hands, made)
        switched = await ask(hands, Switch(made.digest, 2, False))
        return [isinstance(staged, Staged), isinstance(switched, Switched)]

    outcome = machine.boot(script)

    assert outcome.result == [True, True]
    assert "updated: ready (statefs)" in outcome.lines()
    assert machine.slot_bytes(B)[: len(made.data)] == made.data
    assert machine.slot_bytes(A) == running
    record = machine.record()
    assert (record.trying, record.slot(B).state) == (B, SlotState.STAGED)


def test_a_large_transfer_survives_kills_and_takes_no_more_memory_than_a_piece(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    text = SYSTEM.replace('kind = "block"\nsize = "1MiB"', 'kind = "block"\nsize = "64MiB"')
    machine = LinuxUpdateMachine(
        monkeypatch, tmp_path, text=text, slot_blocks=64 * 1024 * 1024 // BLOCK_SIZE
    )
    made = machine.maker.update(11, size=LARGE)
    peaks: list[int] = []

    def obey(what: str, name: str) -> None:
        if what == "kill":
            os.kill(machine.pids[name], signal.SIGKILL)
        else:
            peaks.append(peak(machine.pids[name]))

    async def until_begun(hands: Hands) -> int:
        """From where the new instance goes on."""
        found: list[int] = []

        async def good() -> bool:
            begun = await begin(hands, made)
            if isinstance(begun, Begun):
                found.append(begun.offset)
            return bool(found)

        _ = await hands.until(good, 20 * SECOND)
        return found[-1]

    async def script(hands: Hands) -> Any:
        resumed: list[int] = []
        offset = await until_begun(hands)
        await hands.outside("peak updated")
        kills = [len(made.data) * number // (KILLS + 1) for number in range(1, KILLS + 1)]
        while offset < len(made.data):
            data = made.data[offset : offset + PIECE]
            taken = await ask_with(hands, Chunk(offset, 0, len(data)), data)
            if not isinstance(taken, Taken):  # this instance is gone
                offset = await until_begun(hands)
                resumed.append(offset)
                continue
            offset = taken.offset
            if kills and offset >= kills[0]:
                del kills[0]
                if len(kills) % 2:  # what came is kept meanwhile
                    await hands.pause(1200 * MS)
                await hands.outside("kill updated")
                await hands.pause(20 * MS)
        await hands.outside("peak updated")
        staged = await ask(hands, Finish(), 60 * SECOND)
        await hands.outside("peak updated")
        return [isinstance(staged, Staged), resumed]

    outcome = machine.boot(script, obey=obey)
    staged, resumed = outcome.result

    assert staged is True
    started = [
        event
        for event in outcome.events
        if event.kind is EventKind.SPAWN and event.fields["name"] == "updated"
    ]
    assert len(started) == KILLS + 1
    assert max(resumed) > 0, "it went on, and did not begin anew"
    assert machine.slot_bytes(B)[: len(made.data)] == made.data
    at_rest, sent, verified = peaks
    assert verified - at_rest < GROWTH_MAX, peaks
    assert sent <= verified
