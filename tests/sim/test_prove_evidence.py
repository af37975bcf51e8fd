"""The checks of devices, entropy and state on what a real run of three boots left behind: true
evidence passes, and each way to lie in one place is found."""

import dataclasses
import hashlib
from base64 import b64encode
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nexus.abi import Event, EventKind
from nexus.proof.checks_devices import delivered
from nexus.proof.prove import Outcome
from nexus.proof.remains import Remains
from nexus.proof.verdict import Mismatch
from nexus.services.selftest.random_rungs import DRAW_SIZE
from nexus.services.selftest.state_rungs import BULK_KEY, FIRST_KEYS, KEPT_KEY, PUT_KEY, VICTIM_KEY
from tests.fakes.told import Change, ChangeLeft, Told

SYSTEM = Path(__file__).parents[2] / "systems" / "selftest.toml"
DEVICES = (33, 49, 50, 51, 97, 98, 99, 139, 140, 141)
STATE = (34, 100, 101, 102, 103, 104, 105, 106)

pytestmark = [pytest.mark.sim, pytest.mark.slow]


def _draws(event: Event) -> bool:
    return event.kind is EventKind.DEVICE and event.fields.get("what") == "draw"


def _lives(event: Event) -> bool:
    return event.kind is EventKind.DEVICE and event.fields.get("what") == "live"


@pytest.mark.parametrize("number", [*DEVICES, *STATE])
def test_true_evidence_passes(outcome: Outcome, number: int) -> None:
    Told(outcome, number).check()


LIES: tuple[tuple[int, Change], ...] = (
    (33, lambda e: e.update(source="getrandom")),
    (34, lambda e: e.update(epoch=e["epoch"] + 1)),
    (34, lambda e: e.update(device="noise")),
    (34, lambda e: e.update(sequence=1 << 40)),
    (49, lambda e: e.update(transports=[["old", 2]])),
    (49, lambda e: e.update(granted=[["old", "statefsd"]])),
    (50, lambda e: e.update(version=1)),
    (50, lambda e: e.update(features=e["features"] & 0xFFFF_FFFF)),
    (50, lambda e: e.update(block_count=1)),
    (50, lambda e: e.update(first_block="00" * 32)),
    (51, lambda e: e.update(device_id=2)),
    (51, lambda e: e.update(full_draws=1_000)),
    (97, lambda e: e.update(subject="0x0000000000000001")),
    (97, lambda e: e.update(trace="00" * 16)),
    (98, lambda e: e.update(given=63)),
    (98, lambda e: e.update(delivered_total=1 << 40)),
    (98, lambda e: e.update(digests=e["digests"][:1] * 2)),
    (99, lambda e: e.update(delivered=[0, 257, 513])),
    (100, lambda e: e.update(sequence=e["sequence"] + 1)),
    (100, lambda e: e.update(value="00")),
    (100, lambda e: e.update(area_growth=1)),
    (101, lambda e: e.update(listed=e["keys"])),
    (102, lambda e: e.update(digest="00" * 32)),
    (102, lambda e: e.update(mappings=[1, 2])),
    (103, lambda e: e.update(generations=[1, 1])),
    (103, lambda e: e.update(value="00")),
    (103, lambda e: e.update(pids=[1, 1])),
    (104, lambda e: e.update(sequence=e["sequence"] + 1)),
    (104, lambda e: e.update(value="00")),
    (104, lambda e: e.update(boot_id="00" * 16)),
    (104, lambda e: e["pids"].update(timed=1)),
    (105, lambda e: e["first"].update(dict.fromkeys(list(e["first"])[:1], ""))),
    (105, lambda e: e["second"].update(dict.fromkeys(list(e["second"])[:1], "x"))),
    (106, lambda e: e.update(offset=e["offset"] + (1 << 20))),
    (106, lambda e: e.update(quarantined=2)),
    (106, lambda e: e["others"].update({PUT_KEY.decode(): ""})),
    (106, lambda e: e.update(bulk="")),
    (139, lambda e: e["fields"].update(subject="rngd")),
    (140, lambda e: e.update(registers=[*e["registers"][:2], 2])),
    (140, lambda e: e.update(device="disk")),
    (141, lambda e: e["device"].__setitem__(2, 0x0A00_2000)),
    (141, lambda e: e["answer"].__setitem__(0, 1)),
)


@pytest.mark.parametrize(("number", "lie"), LIES)
def test_each_lie_in_the_evidence_is_found(outcome: Outcome, number: int, lie: Change) -> None:
    told = Told(outcome, number)

    told.say(lie)

    with pytest.raises(Mismatch):
        told.check()


def _without(key: bytes) -> ChangeLeft:
    def change(left: Remains) -> Remains:
        records = {name: kept for name, kept in left.records.items() if name != key}
        return dataclasses.replace(left, records=records)

    return change


def _otherwise(key: bytes) -> ChangeLeft:
    def change(left: Remains) -> Remains:
        other = left.records[key]._replace(value=b"another value")
        return dataclasses.replace(left, records={**left.records, key: other})

    return change


DISKS: tuple[tuple[int, int, ChangeLeft], ...] = (
    (34, 0, lambda left: dataclasses.replace(left, problem="there is none")),
    (34, 0, lambda left: dataclasses.replace(left, epoch=left.epoch + 1)),
    (34, 0, lambda left: dataclasses.replace(left, sequence=-1)),
    (50, 0, lambda left: dataclasses.replace(left, size=512)),
    (50, 0, lambda left: dataclasses.replace(left, first_block=bytes(512))),
    (100, 0, _without(PUT_KEY)),
    (102, 0, _otherwise(BULK_KEY)),
    (103, 0, _without(KEPT_KEY)),
    (104, 0, _otherwise(KEPT_KEY)),
    (105, 1, _without(FIRST_KEYS[0])),
    (106, 1, lambda left: dataclasses.replace(left, damaged=-1)),
    (106, 1, _otherwise(FIRST_KEYS[0])),
    (106, 2, _without(KEPT_KEY)),
)


@pytest.mark.parametrize(("number", "boot", "change"), DISKS)
def test_a_disk_that_says_otherwise_is_found(
    outcome: Outcome, number: int, boot: int, change: ChangeLeft
) -> None:
    told = Told(outcome, number)

    told.leave(change, boot)

    with pytest.raises(Mismatch):
        told.check()


@pytest.mark.parametrize(
    ("number", "wanted"), [(50, _lives), (51, _lives), (51, _draws), (98, _draws)]
)
def test_a_device_that_saw_nothing_of_it_is_found(
    outcome: Outcome, number: int, wanted: Callable[[Event], bool]
) -> None:
    told = Told(outcome, number)

    told.without(wanted)

    with pytest.raises(Mismatch):
        told.check()


def test_a_first_sector_that_was_not_left_there_is_found(outcome: Outcome) -> None:
    told = Told(outcome, 50)

    told.say(lambda e: e.update(first_block="00" * 32), boot=1)

    with pytest.raises(Mismatch, match="boot 1"):
        told.check()


def test_a_boot_without_its_power_cut_is_found(outcome: Outcome) -> None:
    told = Told(outcome, 105)
    ending = dataclasses.replace(told.traces[1].ending, cut=False)

    told.put(1, dataclasses.replace(told.traces[1], ending=ending))

    with pytest.raises(Mismatch, match="not cut"):
        told.check()


def _draw(outcome: Outcome) -> bytes:
    """32 bytes that selftest was given in the first boot."""
    told = Told(outcome, 98)
    trace, line = told.traces[0], told.line()
    digests = set(line.evidence["digests"])
    for chunk in delivered(told.case, trace, line):
        for start in range(len(chunk) - DRAW_SIZE + 1):
            draw = chunk[start : start + DRAW_SIZE]
            if hashlib.sha256(draw).hexdigest() in digests:
                return draw
    raise AssertionError("the device delivered nothing of it")


@pytest.mark.parametrize(
    "form",
    [bytes.hex, lambda draw: draw[4:20].hex().upper(), lambda draw: b64encode(draw).decode()],
)
def test_a_drawn_byte_string_in_the_output_is_found(
    outcome: Outcome, form: Callable[[bytes], str]
) -> None:
    told = Told(outcome, 98)

    leak = f"oops: f{form(_draw(outcome))}"
    told.put(0, dataclasses.replace(told.traces[0], output=leak))

    with pytest.raises(Mismatch, match="in the clear in the output"):
        told.check()


def test_a_draw_that_the_device_never_delivered_is_found(outcome: Outcome) -> None:
    told = Told(outcome, 98)

    digest = hashlib.sha256(bytes(range(32))).hexdigest()
    told.say(lambda e: e.update(digests=[e["digests"][0], digest]))

    with pytest.raises(Mismatch, match="the entropy device delivered: 1, expected 2"):
        told.check()


def test_the_runner_damaged_a_record_that_it_found_by_itself(outcome: Outcome) -> None:
    _first, second, third, *_ota = outcome.traces

    assert VICTIM_KEY in second.left.records
    assert second.left.damaged > 0
    assert VICTIM_KEY not in third.left.records


def _kinds(outcome: Outcome) -> Iterator[tuple[int, bool]]:
    for trace in outcome.traces:
        yield trace.number, trace.ending.cut


def test_the_power_of_the_second_boot_was_cut_and_no_other(outcome: Outcome) -> None:
    assert list(_kinds(outcome)) == [(number, number == 1) for number in range(6)]
