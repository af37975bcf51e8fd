"""The checks of updates on what a real run of six boots left behind: true evidence passes, and each
way to lie in one place is found."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from nexus.abi import Event, EventKind
from nexus.bootctl import BootRecord, Cause, SlotName, SlotState
from nexus.bootctl.handover import EXIT_SLOT_FAILED, EXIT_STOPPED
from nexus.proof.boot_remains import BootRemains
from nexus.proof.checks_ota import HEALTH_OK, SLOT_FAILED
from nexus.proof.prove import Outcome
from nexus.proof.remains import Kept
from nexus.proof.slots import STUCK, STUCK_SAYS
from nexus.proof.verdict import Mismatch, State, judge
from nexus.protocols.ladder import SELFTEST, rung
from nexus.services.updated.kept import HISTORY, TRUST
from tests.fakes.told import Change, Told

OTA = (36, 54, 131, 132, 133, 134, 135, 136, 137, 138)

pytestmark = [pytest.mark.sim, pytest.mark.slow]

ChangeBoot = Callable[[BootRemains], BootRemains]


@pytest.mark.parametrize("number", OTA)
def test_true_evidence_passes(outcome: Outcome, number: int) -> None:
    Told(outcome, number).check()


LIES: tuple[tuple[int, Change], ...] = (
    (36, lambda e: e.update(store="memory")),
    (36, lambda e: e.update(slot="b")),
    (36, lambda e: e.update(sequence=e["sequence"] + 1)),
    (54, lambda e: e.update(counters={"ok": 2})),
    (54, lambda e: e.update(generation=7)),
    (131, lambda e: e.update(digest="00" * 32)),
    (131, lambda e: e.update(size=1)),
    (131, lambda e: e.update(slot="a")),
    (131, lambda e: e.update(sequence=1 << 40)),
    (132, lambda e: e["statuses"].update({"unknown key": "MIXED"})),
    (132, lambda e: e["statuses"].pop("expired")),
    (132, lambda e: e.update(floor=e["floor"] + 1)),
    (132, lambda e: e.update(time_floor=e["time_floor"] + 1)),
    (132, lambda e: e["slots"][1].__setitem__(2, "00" * 32)),
    (133, lambda e: e.update(slot="a")),
    (133, lambda e: e["set"].__setitem__(1, "00" * 32)),
    (133, lambda e: e.update(boots=e["boots"] + 1)),
    (134, lambda e: e["set"].__setitem__(0, 10)),
    (135, lambda e: e.update(trace="00" * 16)),
    (135, lambda e: e.update(subject="0x0000000000000001")),
    (135, lambda e: e.update(trial="judging")),
    (135, lambda e: e.update(refused="taken")),
    (135, lambda e: e.update(sequence=0)),
    (136, lambda e: e["set"].__setitem__(1, "00" * 32)),
    (136, lambda e: e["slots"][0].__setitem__(0, "good")),
    (137, lambda e: e["reasons"][0].update(service="timed")),
    (137, lambda e: e["reasons"][1].update(tail="")),
    (137, lambda e: e["reasons"][1].update(trace="00" * 16)),
    (137, lambda e: e["reasons"].pop()),
    (138, lambda e: e.update(sequence=e["sequence"] + 1)),
    (138, lambda e: e.update(active="a")),
    (138, lambda e: e["slots"][0].__setitem__(0, "empty")),
)


@pytest.mark.parametrize(("number", "lie"), LIES)
def test_each_lie_in_the_evidence_is_found(outcome: Outcome, number: int, lie: Change) -> None:
    told = Told(outcome, number)

    told.say(lie)

    with pytest.raises(Mismatch):
        told.check()


def _measured(number: int) -> str:
    return f"{SELFTEST}: measured #{number}"


ELSEWHERE: tuple[tuple[int, str, int, Change], ...] = (
    (36, _measured(36), 0, lambda e: e.update(ops=e["ops"][1:])),
    (36, _measured(36), 0, lambda e: e.update(senders=["0000000000000001"])),
    (36, _measured(36), 0, lambda e: e.update(running="b")),
    (36, rung(36).marker, 3, lambda e: e.update(events=0)),
    (132, _measured(132), 2, lambda e: e.update(low="taken")),
    (132, _measured(132), 2, lambda e: e.update(flipped="BAD_SET")),
    (133, _measured(133), 2, lambda e: e.update(tries_left=1)),
    (133, _measured(133), 2, lambda e: e.update(sequence=e["sequence"] + 1)),
    (133, rung(36).marker, 3, lambda e: e.update(tries_left=2)),
    (133, rung(36).marker, 3, lambda e: e.update(slot="a")),
    (135, HEALTH_OK, 3, lambda e: e.update(nonce=0)),
    (135, HEALTH_OK, 3, lambda e: e.update(digest="00" * 32)),
    (136, _measured(136), 3, lambda e: e.update(digest="00" * 32)),
    (136, SLOT_FAILED, 4, lambda e: e.update(service="timed")),
    (137, SLOT_FAILED, 4, lambda e: e.update(trace="00" * 16)),
    (137, SLOT_FAILED, 4, lambda e: e.update(detail="something else")),
)


@pytest.mark.parametrize(("number", "text", "boot", "lie"), ELSEWHERE)
def test_each_lie_in_another_line_is_found(
    outcome: Outcome, number: int, text: str, boot: int, lie: Change
) -> None:
    told = Told(outcome, number)

    told.say(lie, text, boot)

    with pytest.raises(Mismatch):
        told.check()


# ---------------------------------------------------------------- what lies on the devices


def _record(change: Callable[[BootRecord], BootRecord]) -> ChangeBoot:
    """The record in force, and both of its copies, are otherwise."""

    def changed(left: BootRemains) -> BootRemains:
        assert left.record is not None
        record = change(left.record)
        return dataclasses.replace(left, record=record, copies=(record, record))

    return changed


def _slot(name: SlotName, **values: Any) -> ChangeBoot:
    return _record(
        lambda record: record.with_slot(name, dataclasses.replace(record.slot(name), **values))
    )


def _without(cause: Cause) -> ChangeBoot:
    def change(record: BootRecord) -> BootRecord:
        kept = tuple(each for each in record.reasons if each.cause is not cause)
        assert kept != record.reasons, "there is one to be taken away"
        return dataclasses.replace(record, reasons=kept)

    return _record(change)


def _bytes_of(name: SlotName) -> ChangeBoot:
    """A slot holds other bytes than the record says."""

    def change(left: BootRemains) -> BootRemains:
        other = {name: "00" * 32}
        return dataclasses.replace(
            left, digests={**left.digests, **other}, whole={**left.whole, **other}
        )

    return change


def _copy(index: int) -> ChangeBoot:
    """One of the copies is none."""

    def change(left: BootRemains) -> BootRemains:
        first, second = left.copies
        copies = (None, second) if index == 0 else (first, None)
        return dataclasses.replace(left, copies=copies)

    return change


def _old_copy(left: BootRemains) -> BootRemains:
    first, second = left.copies
    assert second is not None
    return dataclasses.replace(
        left, copies=(first, dataclasses.replace(second, sequence=second.sequence - 1))
    )


DEVICES: tuple[tuple[int, int, ChangeBoot], ...] = (
    (36, 0, lambda left: dataclasses.replace(left, record=None, problem="there is none")),
    (36, 0, _record(lambda record: dataclasses.replace(record, sequence=1))),
    (36, 0, _bytes_of(SlotName.A)),
    (131, 2, _bytes_of(SlotName.B)),
    (131, 2, _bytes_of(SlotName.A)),
    (131, 2, _slot(SlotName.B, state=SlotState.EMPTY)),
    (132, 2, _record(lambda record: dataclasses.replace(record, floor=0))),
    (132, 2, _slot(SlotName.B, digest=bytes(32))),
    (132, 2, _bytes_of(SlotName.B)),
    (133, 2, _record(lambda record: dataclasses.replace(record, trying=None))),
    (133, 2, _slot(SlotName.B, tries_left=1)),
    (133, 2, _without(Cause.SWITCHED)),
    (135, 3, _slot(SlotName.B, state=SlotState.TRYING)),
    (135, 3, _record(lambda record: dataclasses.replace(record, active=SlotName.A))),
    (135, 3, _without(Cause.COMMITTED)),
    (136, 3, _slot(SlotName.A, tries_left=2)),
    (136, 4, _slot(SlotName.A, tries_left=1)),
    (136, 5, _slot(SlotName.A, state=SlotState.STAGED)),
    (136, 5, _bytes_of(SlotName.B)),
    (137, 3, _without(Cause.SWITCHED)),
    (137, 5, _without(Cause.ROLLED_BACK)),
    (138, 5, _copy(0)),
    (138, 5, _copy(1)),
    (138, 4, _old_copy),
    (138, 3, _record(lambda record: dataclasses.replace(record, sequence=1))),
)


@pytest.mark.parametrize(("number", "boot", "change"), DEVICES)
def test_a_boot_device_or_a_slot_that_says_otherwise_is_found(
    outcome: Outcome, number: int, boot: int, change: ChangeBoot
) -> None:
    told = Told(outcome, number)
    left = told.traces[boot].boot_left
    assert left is not None

    told.put(boot, dataclasses.replace(told.traces[boot], boot_left=change(left)))

    with pytest.raises(Mismatch):
        told.check()


@pytest.mark.parametrize("key", [TRUST])
def test_trust_that_is_not_kept_is_found(outcome: Outcome, key: bytes) -> None:
    told = Told(outcome, 132)

    told.leave(
        lambda left: dataclasses.replace(
            left, records={**left.records, key: Kept(b"something else", 1)}
        ),
        2,
    )

    with pytest.raises(Mismatch, match="trust"):
        told.check()


def test_a_history_that_cannot_be_read_is_found(outcome: Outcome) -> None:
    told = Told(outcome, 36)

    told.leave(
        lambda left: dataclasses.replace(left, records={**left.records, HISTORY: Kept(b"\xc1", 1)}),
        2,
    )

    with pytest.raises(Mismatch, match="history"):
        told.check()


# ---------------------------------------------------------------- what happened, and when


def _spawns_timed(event: Event) -> bool:
    return event.kind is EventKind.SPAWN and event.fields.get("name") == "timed"


@pytest.mark.parametrize("number", [134, 136])
def test_a_service_that_comes_from_the_other_slot_is_found(outcome: Outcome, number: int) -> None:
    told = Told(outcome, number)
    trace, other = told.traces[told.boot], outcome.traces[0].made["first"].digest
    events = tuple(
        event._replace(fields={**event.fields, "set": other}) if _spawns_timed(event) else event
        for event in trace.events
    )

    told.put(told.boot, dataclasses.replace(trace, events=events))

    with pytest.raises(Mismatch, match=r"not started from the set of slot b: \['timed'\]"):
        told.check()


def test_a_commit_before_the_last_answer_is_found(outcome: Outcome) -> None:
    told = Told(outcome, 135)
    trace = told.traces[told.boot]
    gate = next(line.place for line in trace.lines if line.text == HEALTH_OK)
    events = list(trace.events)
    last = next(line.place for line in trace.lines if line.text == f"init: health {SELFTEST} ok")
    events[gate], events[last] = events[last], events[gate]

    told.put(told.boot, dataclasses.replace(trace, events=tuple(events)))

    with pytest.raises(Mismatch, match=f"committed before {SELFTEST} had answered"):
        told.check()


def test_a_bad_set_that_failed_without_its_last_words_is_found(outcome: Outcome) -> None:
    told = Told(outcome, 137)
    trace = told.traces[4]
    said = f"{STUCK}: {STUCK_SAYS}"
    events = tuple(each for each in trace.events if each.fields.get("line") != said)
    assert len(events) < len(trace.events)

    told.put(4, dataclasses.replace(trace, events=events))

    with pytest.raises(Mismatch, match="has not said"):
        told.check()


def test_only_the_boot_of_the_bad_set_ends_by_init_s_verdict(outcome: Outcome) -> None:
    codes = [trace.ending.code for trace in outcome.traces if not trace.ending.cut]

    assert codes == [*[EXIT_STOPPED] * 3, EXIT_SLOT_FAILED, EXIT_STOPPED]
    assert len(outcome.traces) == len(codes) + 1


@pytest.mark.parametrize(("boot", "code"), [(4, 0), (4, 1), (5, EXIT_SLOT_FAILED)])
def test_another_end_of_a_boot_turns_the_run_red(outcome: Outcome, boot: int, code: int) -> None:
    told = Told(outcome, 144)
    ending = dataclasses.replace(told.traces[boot].ending, code=code)
    told.put(boot, dataclasses.replace(told.traces[boot], ending=ending))

    verdict = judge(told.case, *told.traces)

    assert verdict.exit_code == 1
    assert [result.number for result in verdict.of(State.RED)] == [144]
    assert f"boot {boot}" in verdict.findings[0]
