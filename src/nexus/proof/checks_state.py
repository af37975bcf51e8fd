"""The evidence behind the rungs about state: what the runner itself reads on the disk between the
boots, and what the earlier boots said."""

import hashlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

from nexus.abi import HardwareKind, service_id
from nexus.init.grants import MMIO_RIGHTS
from nexus.proof.checks import healthy
from nexus.proof.checks_devices import granted
from nexus.proof.remains import Kept, Remains
from nexus.proof.trace import Line, Trace
from nexus.proof.verdict import Case, Check, Mismatch, demand, demand_equal
from nexus.protocols.ladder import SELFTEST, Ground, rung
from nexus.services.selftest.state_rungs import (
    BULK_KEY,
    CUT_LINE,
    FIRST_KEYS,
    FOREIGN_KEY,
    KEPT_KEY,
    KEYSTORE_AREA,
    PUT_KEY,
    SECOND_KEYS,
    VICTIM_KEY,
)

RECORD_MAX: Final = 2048  # bytes; a record of the rungs, its frames included
LIVE_COST_MAX: Final = 128  # bytes that a live record counts for besides its key and value
STATEFSD: Final = "statefsd"


def left_of(trace: Trace) -> Remains:
    """What the runner found on the disk after a boot."""
    demand(not trace.left.problem, trace.left.problem)
    return trace.left


def kept_of(left: Remains, key: bytes) -> Kept:
    """The value of a key, which must be there."""
    kept = left.records.get(key)
    if kept is None:
        raise Mismatch(f"{key!r} is not on the disk")
    return kept


def said_in(trace: Trace, number: int) -> Mapping[str, Any]:
    """The evidence of a rung that was met in this boot."""
    lines = [each for each in trace.lines if each.text == rung(number).marker]
    demand_equal(len(lines), 1, f"lines about #{number} in boot {trace.number}")
    return lines[0].evidence


def _openings(trace: Trace, since: int) -> int:
    """How often statefsd opened its store in a boot behind this place."""
    return sum(
        each.place > since
        for each in trace.lines
        if each.printer == STATEFSD and each.text.startswith(f"{STATEFSD}: ready")
    )


def statefsd_ready(case: Case, trace: Trace, line: Line) -> None:
    """#34: open on the granted device: what it says of its store is what is on the disk."""
    facts = healthy(case, trace, line)
    demand_equal(facts["store_open"], 1, "store_open")
    demand_equal([facts["epoch"]], [line.evidence["epoch"]], "epoch, on two ways")
    names = [
        grant.name
        for grant in case.plan.by_name[STATEFSD].grants.hardware
        if grant.kind is HardwareKind.BLOCK
    ]
    demand_equal([line.evidence["device"]], names, "device")
    granted(trace, names[0], MMIO_RIGHTS[HardwareKind.BLOCK], [STATEFSD])
    left = left_of(trace)
    openings = line.evidence["epoch"] + _openings(trace, line.place)
    if trace.ending.stopped:  # and went on for a moment
        demand(left.epoch >= openings, f"epoch on disk: {left.epoch}, {openings} were said")
    else:
        demand_equal(left.epoch, openings, "epoch on disk")
    demand(left.sequence >= line.evidence["sequence"], "the disk is behind what was there")


def _first_opening(boot: Trace) -> Mapping[str, Any]:
    """What statefsd said when it first opened its store in a boot."""
    text = rung(34).marker
    lines = [each for each in boot.lines if (each.printer, each.text) == (STATEFSD, text)]
    demand(lines, f"no {text!r} in boot {boot.number}")
    return lines[0].evidence


def opened_what_was_left(boot: Trace) -> bool:
    """Whether statefsd has opened what the boot before left: #104 demands it."""
    return bool(_first_opening(boot)["sequence"] == left_of(boot.earlier[-1]).sequence)


def _goes_on(boot: Trace) -> None:
    """statefsd has opened what the boot before left."""
    opening, left = _first_opening(boot), left_of(boot.earlier[-1])
    demand_equal(opening["epoch"], left.epoch + 1, f"epoch, boot {boot.number}")
    demand_equal(opening["sequence"], left.sequence, f"sequence, boot {boot.number}")


def statefs_put(_case: Case, trace: Trace, line: Line) -> None:
    """#100: the value stands on the disk with that number, and is accounted for."""
    evidence = line.evidence
    kept = kept_of(left_of(trace), PUT_KEY)
    demand_equal(kept.value.hex(), evidence["value"], "value on the disk")
    demand_equal(kept.sequence, evidence["sequence"], "sequence number on the disk")
    least = len(PUT_KEY) + len(kept.value)
    growth = evidence["area_growth"]
    demand(least <= growth <= least + LIVE_COST_MAX, f"account grew by {growth}, record {least}")


def unauthorized(case: Case, trace: Trace, line: Line) -> None:
    """#101: statefsd's record names path and client, and there is something that was not listed."""
    client = f"0x{service_id(SELFTEST):016x}"
    demand_equal(line.evidence["denial"], [FOREIGN_KEY.decode(), client], "path and client denied")
    hidden = [key for key in left_of(trace).records if key.startswith(KEYSTORE_AREA.encode())]
    if "keystored" in case.plan.by_name:
        demand(hidden, "the key store's area is empty: nothing could be listed")
    demand(line.evidence["listed"] < line.evidence["keys"] or not hidden, "every key was listed")


def bulk_vmo(_case: Case, trace: Trace, line: Line) -> None:
    """#102: the whole value stands on the disk."""
    kept = kept_of(left_of(trace), BULK_KEY)
    demand_equal(hashlib.sha256(kept.value).hexdigest(), line.evidence["digest"], "bulk value")
    demand_equal(kept.sequence, line.evidence["sequence"], "sequence number on the disk")
    before, after = line.evidence["mappings"]
    demand_equal(after, before, "mappings of refused offers")


def persist(case: Case, trace: Trace, line: Line) -> None:
    """#103: the record on the disk is the one that was answered, and statefsd was killed.

    A simulated kernel gives a new task the lowest pid that is free, which may be the old one's.
    """
    evidence = line.evidence
    kept = kept_of(left_of(trace), KEPT_KEY)
    demand_equal(kept.value.hex(), evidence["value"], "value on the disk")
    demand_equal(kept.sequence, evidence["sequence"], "sequence number on the disk")
    old, new = evidence["generations"]
    demand_equal(new, old + 1, "generations")
    starts = {event.fields["generation"]: event.pid for _, event in trace.spawns(STATEFSD)}
    demand_equal([starts[old], starts[new]], evidence["pids"], "pids, by the kernel")
    if case.scope.ground is not Ground.SIM:
        demand(starts[old] != starts[new], "the new instance has the old pid")


def persist_reboot(case: Case, trace: Trace, line: Line) -> None:
    """#104: what the runner read between the boots is what the second one says; all is new."""
    evidence, before = line.evidence, said_in(trace.earlier[-1], 103)
    kept = kept_of(left_of(trace.earlier[-1]), KEPT_KEY)
    for what, found in (("value", kept.value.hex()), ("sequence", kept.sequence)):
        demand_equal(before[what], found, f"{what} between the boots, against boot 0")
        demand_equal(evidence[what], found, f"{what} between the boots, against boot 1")
    demand(evidence["boot_id"] != before["boot_id"], "the boot has the id of the one before")
    demand(any(bytes.fromhex(evidence["boot_id"])), "the boot has no id")
    _goes_on(trace)
    _all_new(case, trace, evidence["pids"])


def _all_new(case: Case, trace: Trace, pids: Mapping[str, int]) -> None:
    """Every task of this boot was started in it; what starts on demand may have ended since. A
    machine that was off counts pids anew; the host of a linux run goes on counting."""
    started = {
        str(event.fields["name"]): event.pid
        for service in case.plan.services
        if not service.by
        for _, event in trace.spawns(service.name)
    }
    demand_equal({name: pids[name] for name in started}, started, "pids, by the kernel's starts")
    if case.scope.ground is Ground.LINUX:
        old = {
            event.pid
            for service in case.plan.services
            for _, event in trace.earlier[-1].spawns(service.name)
        }
        again = old & set(pids.values())
        demand(not again, f"pids of both boots: {sorted(again)}")


def power_cut(_case: Case, trace: Trace, line: Line) -> None:
    """#105: the batch that was answered before the cut is complete, the later one whole or not."""
    before = trace.earlier[-1]
    demand(before.ending.cut, "the power was not cut")
    told = [each for each in before.lines if each.text == f"{SELFTEST}: {CUT_LINE}"]
    demand_equal(len(told), 1, "lines before the cut")
    first, second = told[0].evidence["first"], told[0].evidence["second"]
    demand_equal(set(first), {key.decode() for key in FIRST_KEYS}, "keys of the first batch")
    demand_equal(line.evidence["first"], first, "the answered batch after the cut")
    found = line.evidence["second"]
    demand(
        found in (second, dict.fromkeys(second, "")), "the later batch is neither whole nor absent"
    )
    left = left_of(before)
    for keys, seen in ((FIRST_KEYS, line.evidence["first"]), (SECOND_KEYS, found)):
        on_disk = {key.decode(): _digest(left.records.get(key)) for key in keys}
        demand_equal(seen, on_disk, "what the runner read on the disk after the cut")


def _digest(kept: Kept | None) -> str:
    return "" if kept is None else hashlib.sha256(kept.value).hexdigest()


def quarantined(_case: Case, trace: Trace, line: Line) -> None:
    """#106: it is the record that the runner damaged, and all others are as they were."""
    evidence, left = line.evidence, left_of(trace.earlier[-1])
    demand(left.damaged >= 0, "the runner found no record to damage")
    within = left.damaged - evidence["offset"]
    demand(0 <= within < RECORD_MAX, f"damaged at {left.damaged}, named {evidence['offset']}")
    demand_equal(evidence["sequence"], kept_of(left, VICTIM_KEY).sequence, "number of the record")
    demand_equal(evidence["quarantined"], left.lost, "quarantined records, by either reader")
    others = {key: _digest(left.records.get(key.encode())) for key in evidence["others"]}
    demand_equal(evidence["others"], others, "the other keys")
    demand_equal(evidence["bulk"], _digest(left.records.get(BULK_KEY)), "the bulk value")
    after = left_of(trace)
    demand(VICTIM_KEY not in after.records, "the damaged record is back on the disk")
    kept = {key: kept for key, kept in left.records.items() if key != VICTIM_KEY}
    lost = [key for key, each in kept.items() if key not in after.records and each]
    demand(not lost, f"lost besides: {lost}")


CHECKS: Final[Mapping[int, Check]] = MappingProxyType(
    {
        34: statefsd_ready,
        100: statefs_put,
        101: unauthorized,
        102: bulk_vmo,
        103: persist,
        104: persist_reboot,
        105: power_cut,
        106: quarantined,
    }
)
