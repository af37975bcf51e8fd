"""The evidence behind the rungs about updates: what the runner reads on boot device and slots
between the boots, the sets that it has made itself, and what the earlier boots said."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from types import MappingProxyType
from typing import Any, Final

from nexus.abi import INIT_NAME, EventKind, service_id
from nexus.bootctl import EVIDENCE, BootRecord, Cause, Reason, SlotName, SlotState
from nexus.proof.boot_remains import BootRemains
from nexus.proof.checks import healthy, measured
from nexus.proof.checks_state import STATEFSD, kept_of, left_of, opened_what_was_left
from nexus.proof.slots import FIRST, FLOOR, ISSUED, STUCK, STUCK_SAYS
from nexus.proof.trace import FAIL_WORD, Line, Trace
from nexus.proof.verdict import Case, Check, Mismatch, demand, demand_equal
from nexus.protocols.ladder import SELFTEST, Ground, rung
from nexus.protocols.statefsd import Get, GetSnapshot
from nexus.protocols.updated import UpdatedStatus
from nexus.services.selftest.exec_rungs import ON_DEMAND
from nexus.services.selftest.ota_rungs import BAD_TRIES, TRIES
from nexus.services.selftest.stick import BAD, GOOD
from nexus.services.updated.kept import HISTORY, TRUST, KeptHistory
from nexus.trust import Untrusted, decode_state
from nexus.wire import RemoteProtocolError, strict_decoder

UPDATED: Final = "updated"
HEALTH_OK: Final = "init: health ok (slot b)"
SLOT_FAILED: Final = "init: slot failed (slot a)"
read_history: Final = strict_decoder(KeptHistory)
READS_AT_START: Final = 2  # of updated in statefs: the history, and a transfer that is not over
Evidence = Mapping[str, Any]


def _boot_left(trace: Trace) -> BootRemains:
    """What the runner found on boot device and slots after a boot."""
    left = trace.boot_left
    if left is None or left.record is None:
        raise Mismatch("there is no boot device" if left is None else left.problem)
    return left


def _record(trace: Trace) -> BootRecord:
    record = _boot_left(trace).record
    assert record is not None, "it was looked at"
    return record


def _copies(trace: Trace) -> tuple[BootRecord, BootRecord]:
    """Both copies of the record, each whole."""
    first, second = _boot_left(trace).copies
    if first is None or second is None:
        which = 1 if first is None else 2
        raise Mismatch(f"copy {which} of the record is none, after boot {trace.number}")
    return first, second


def _slots(record: BootRecord) -> list[list[object]]:
    """Both slots, as the client tells of them."""
    return [
        [
            record.slot(name).state.name.lower(),
            record.slot(name).version,
            record.slot(name).digest.hex(),
            record.slot(name).tries_left,
        ]
        for name in SlotName
    ]


def _holds(trace: Trace, name: SlotName, made: str, state: SlotState) -> None:
    """A slot is in this state, and its bytes are this set's."""
    left, record, wanted = _boot_left(trace), _record(trace), trace.made[made]
    info = record.slot(name)
    where = f"slot {name} after boot {trace.number}"
    demand_equal(info.state, state, f"state of {where}")
    found = (info.version, info.digest.hex(), info.size)
    demand_equal(found, (wanted.version, wanted.digest, wanted.size), f"set of {where}")
    demand_equal(left.digests[name], wanted.digest, f"digest of the bytes of {where}")


def _boot(case: Case, number: int) -> Trace:
    """Another boot of the run."""
    found = next((trace for trace in case.boots if trace.number == number), None)
    if found is None:
        raise Mismatch(f"boot {number} was not made")
    return found


def _of(trace: Trace, printer: str, text: str) -> Line:
    """The one line with this text in a boot."""
    lines = [line for line in trace.lines if (line.printer, line.text) == (printer, text)]
    demand_equal(len(lines), 1, f"lines {text!r} of {printer} in boot {trace.number}")
    return lines[0]


# ---------------------------------------------------------------- before the first update


def updated_ready(case: Case, trace: Trace, line: Line) -> None:
    """#36: the slot and the sequence number are those that the runner reads on the boot device, and
    statefsd has heard updated ask for its history."""
    facts = healthy(case, trace, line)
    evidence, record = line.evidence, _record(trace)
    demand_equal(evidence["store"], STATEFSD, "store")
    demand_equal(evidence["slot"], record.active.value, "slot")
    demand_equal(facts["sequence"], evidence["sequence"], "sequence number, on two ways")
    demand_equal(evidence["sequence"], record.sequence, "sequence number on the boot device")
    _holds(trace, SlotName.A, FIRST, SlotState.GOOD)
    if not any(
        each.printer == SELFTEST and not FAIL_WORD.search(each.text) for each in trace.lines
    ):
        return  # nobody else may ask statefsd what it has heard
    heard = measured(trace, 36)
    demand_equal(
        heard["senders"], [f"{service_id(UPDATED):016x}"], "senders of what statefsd heard"
    )
    ops = heard["ops"]
    opening = ops[: ops.index(GetSnapshot.INFO.op)] if GetSnapshot.INFO.op in ops else ops
    reads = opening.count(Get.INFO.op)
    demand(reads >= READS_AT_START, f"{reads} reads of updated: not its history and its transfer")
    for boot in case.boots[1:]:
        _history_read(boot)
    demand_equal(heard["running"], record.active.value, "slot, as it is answered")
    demand_equal(heard["sequence"], record.sequence, "sequence number, as it is answered")


def _history_read(boot: Trace) -> None:
    """What updated says of its history when it comes up again is what was on the disk."""
    kept = left_of(boot.earlier[-1]).records.get(HISTORY)
    ready = [each for each in boot.lines if (each.printer, each.text) == (UPDATED, rung(36).marker)]
    if kept is None or not ready or not opened_what_was_left(boot):  # that is another rung's
        return
    try:
        last = read_history(kept.value).last
    except RemoteProtocolError as error:
        raise Mismatch(f"the history on the disk: {error}") from error
    demand(
        ready[0].evidence["events"] >= last, f"history of boot {boot.number}: {last} on the disk"
    )


def routing_updated(_case: Case, trace: Trace, line: Line) -> None:
    """#54: init counted one route, and the kernel made a link into updated for it."""
    demand_equal(line.evidence["counters"], {"ok": 1}, "growth of init's route counters")
    starts = [event for at, event in trace.spawns(UPDATED) if at < line.place]
    demand(starts, "the kernel recorded no start of updated before the line")
    demand_equal(line.evidence["generation"], starts[-1].fields["generation"], "generation")
    mine = [each.place for each in trace.lines if each.printer == SELFTEST]
    since = max((place for place in mine if place < line.place), default=0)
    owners = {
        str(event.fields["owner"])
        for at, event in trace.of_kind(EventKind.LINK)
        if since < at < line.place
    }
    demand(UPDATED in owners, f"the kernel made links into {sorted(owners)}")
    demand(owners <= {UPDATED, SELFTEST}, f"the kernel made links into {sorted(owners)}")


# ---------------------------------------------------------------- staged, and refused


def ota_stage(_case: Case, trace: Trace, line: Line) -> None:
    """#131: slot b holds the set that the runner has made, to the byte; slot a is untouched."""
    evidence, made = line.evidence, trace.made[GOOD]
    found = [evidence[name] for name in ("digest", "size", "version")]
    demand_equal(found, [made.digest, made.size, made.version], "the set that was staged")
    demand_equal(evidence["slot"], SlotName.B.value, "the standby slot")
    _holds(trace, SlotName.B, GOOD, SlotState.STAGED)
    _holds(trace, SlotName.A, FIRST, SlotState.GOOD)
    before, after = _boot_left(trace.earlier[-1]), _boot_left(trace)
    demand_equal(after.whole[SlotName.A], before.whole[SlotName.A], "every byte of slot a")
    demand(evidence["sequence"] <= _record(trace).sequence, "the record on the device is older")


REFUSED: Final = MappingProxyType(
    {
        "unknown key": UpdatedStatus.WRONG_KEY,
        "flipped byte": UpdatedStatus.BAD_SIGNATURE,
        "mixed": UpdatedStatus.MIXED,
        "expired": UpdatedStatus.EXPIRED_METADATA,
    }
)
SEEN: Final = 2  # the release of the good set; the one before is that below the floor


def untrusted_refused(_case: Case, trace: Trace, line: Line) -> None:
    """#132: each with its own status; on the disks nothing has moved."""
    evidence, earlier = line.evidence, measured(trace, 132)
    wanted = {name: status.name for name, status in REFUSED.items()}
    demand_equal(evidence["statuses"], wanted, "statuses")
    demand_equal(earlier["low"], UpdatedStatus.BELOW_FLOOR.name, "a version below the floor")
    demand_equal(earlier["flipped"], UpdatedStatus.WRONG_DIGEST.name, "a set with a flipped byte")
    demand_equal(earlier["size"], trace.made[GOOD].size, "bytes of that set")
    record, left = _record(trace), _boot_left(trace)
    demand_equal(evidence["floor"], record.floor, "version floor on the boot device")
    demand_equal(record.floor, FLOOR, "version floor that the runner has set")
    rows = [row[:3] for row in evidence["slots"]]
    demand_equal(rows, [row[:3] for row in _slots(record)], "slots on the boot device")
    for name in SlotName:
        info = record.slot(name)
        if info.is_bootable:
            demand_equal(left.digests[name], info.digest.hex(), f"bytes of slot {name}")
    try:
        trust = decode_state(kept_of(left_of(trace), TRUST).value)
    except Untrusted as error:
        raise Mismatch(f"what is kept of trust: {error}") from error
    demand_equal(evidence["time_floor"], trust.time_floor, "time floor in statefs")
    demand_equal(trust.time_floor, ISSUED, "time floor: when the good set was signed")
    demand_equal((trust.timestamp, trust.targets), (SEEN, SEEN), "the latest release seen")


# ---------------------------------------------------------------- the trial of slot b


def ota_switch(_case: Case, trace: Trace, line: Line) -> None:
    """#133: the pending trial stood on the boot device when no system ran; this boot is its first,
    and updated found the try counted when it came up."""
    asked, before = measured(trace.earlier[-1], 133), trace.earlier[-1]
    record = _record(before)
    demand_equal(record.trying, SlotName.B, "slot to be tried, between the boots")
    demand_equal(record.active, SlotName.A, "active slot, between the boots")
    demand_equal(record.slot(SlotName.B).tries_left, TRIES, "tries left, between the boots")
    demand_equal((asked["slot"], asked["tries_left"]), ("b", TRIES), "what was answered")
    demand_equal(asked["sequence"], record.sequence, "sequence number that was answered")
    demand([each for each in record.reasons if _is_switch(each, SlotName.B)], "it has no reason")
    ready = _of(trace, UPDATED, rung(36).marker).evidence
    reported = [ready[name] for name in ("slot", "trying", "tries_left")]
    demand_equal(reported, ["b", "b", TRIES - 1], "the attempt, as updated found it")
    demand(ready["sequence"] > record.sequence, "the attempt was not written down")
    evidence = line.evidence
    demand_equal(evidence["slot"], "b", "slot that init was booted from")
    demand_equal(evidence["set"], _set_of(trace, GOOD), "set that init was booted with")
    demand_equal(evidence["boots"], record.boots + 1, "attempts to boot")


def _set_of(trace: Trace, made: str) -> list[object]:
    return [trace.made[made].version, trace.made[made].digest]


def running_set(case: Case, trace: Trace, line: Line) -> None:
    """#134: every service that runs comes from slot b's set, and none from slot a's."""
    demand_equal(line.evidence["set"], _set_of(trace, GOOD), "set that init was booted with")
    _runs(case, trace, line, GOOD)


def _runs(case: Case, trace: Trace, line: Line, made: str) -> None:
    """Every service comes from this set: by the kernel's starts where one process holds all the
    code, else by what each process has imported."""
    wanted = trace.made[made]
    planned = {each.name for each in case.plan.services if not each.by}
    started = {name: trace.spawns(name) for name in planned}
    missing = sorted(name for name, spawns in started.items() if not spawns)
    demand(not missing, f"the kernel recorded no start of {missing}")
    if case.scope.ground is Ground.SIM:
        found = {
            name: str(event.fields.get("set", ""))
            for name, spawns in started.items()
            for _, event in spawns
        }
        wrong = sorted(name for name, digest in found.items() if digest != wanted.digest)
        demand(not wrong, f"not started from the set of slot b: {wrong}")
        return
    rows = line.evidence["running"]
    demand_equal([row[:2] for row in rows], [_set_of(trace, made)], "sets that processes run")
    answered = set(rows[0][2])
    silent = sorted(planned - answered - {SELFTEST} - set(ON_DEMAND))
    demand(not silent, f"not asked: {silent}")


def ota_health(case: Case, trace: Trace, line: Line) -> None:
    """#135: init's gate came behind every declared health answer, its nonce came back from updated,
    the commit stands on the boot device, and nothing could be staged before."""
    evidence = line.evidence
    gate = _of(trace, INIT_NAME, HEALTH_OK)
    demand(gate.place < line.place, "the client saw the commit before init told of it")
    wanted = trace.made[GOOD]
    demand_equal(
        [gate.evidence["version"], gate.evidence["digest"]],
        [wanted.version, wanted.digest],
        "set that init reported",
    )
    demand(gate.evidence["nonce"], "init's report has no nonce")
    for service in case.plan.services:
        if service.by:
            continue
        answers = [
            each.place
            for each in trace.lines
            if each.printer == INIT_NAME and each.text == f"init: health {service.name} ok"
        ]
        demand(answers, f"{service.name} has not answered a health probe")
        demand(answers[0] < gate.place, f"committed before {service.name} had answered")
    demand_equal(
        evidence["trace"], gate.evidence["trace"], "trace of the report, by updated's audit"
    )
    demand_equal(evidence["subject"], f"0x{service_id(INIT_NAME):016x}", "who reported")
    demand_equal(evidence["trial"], "committed", "the trial, by init")
    demand_equal(evidence["refused"], UpdatedStatus.UNPROVEN.name, "staging before the commit")
    _holds(trace, SlotName.B, GOOD, SlotState.GOOD)
    record = _record(trace)
    demand_equal(record.active, SlotName.B, "active slot on the boot device")
    commits = [each for each in record.reasons if each.cause is Cause.COMMITTED]
    demand_equal(len(commits), 1, "commits in the record")
    demand_equal(
        commits[0].trace.hex(), gate.evidence["trace"], "trace of the commit on the device"
    )
    demand(evidence["sequence"] >= gate.evidence["sequence"], "the commit is not in the record")


# ---------------------------------------------------------------- the bad set, and back


def ota_rollback(case: Case, trace: Trace, line: Line) -> None:
    """#136: the bad set had its one try and failed; what runs afterwards is slot b again."""
    third, fourth = _boot(case, 3), _boot(case, 4)
    asked, pending = measured(third, 136), _record(third)
    demand_equal((pending.active, pending.trying), (SlotName.B, SlotName.A), "active, to be tried")
    demand_equal(pending.slot(SlotName.A).tries_left, BAD_TRIES, "tries before boot 4")
    demand_equal(asked["digest"], trace.made[BAD].digest, "the set that was staged")
    _holds(third, SlotName.A, BAD, SlotState.STAGED)
    during = _record(fourth)
    demand_equal(during.slot(SlotName.A).tries_left, BAD_TRIES - 1, "tries while boot 4 ran")
    demand_equal(during.boots, pending.boots + 1, "attempts, after boot 4")
    failed = _of(fourth, INIT_NAME, SLOT_FAILED)
    demand_equal(failed.evidence["service"], STUCK, "service at fault, by init")
    demand(
        not [
            each for each in fourth.lines if each.text == HEALTH_OK.replace("(slot b)", "(slot a)")
        ],
        "the bad set was committed",
    )
    _holds(trace, SlotName.A, BAD, SlotState.BAD)
    _holds(trace, SlotName.B, GOOD, SlotState.GOOD)
    record = _record(trace)
    demand_equal((record.active, record.trying), (SlotName.B, None), "active, tried, afterwards")
    demand_equal(record.boots, during.boots + 1, "attempts, after boot 5")
    demand_equal(line.evidence["set"], _set_of(trace, GOOD), "set that init was booted with")
    demand_equal(line.evidence["slots"], _slots(record), "slots, as updated has them")
    _runs(case, trace, line, GOOD)


def rollback_reason(case: Case, trace: Trace, line: Line) -> None:
    """#137: the reason names what the runner has planted, and it was on the disk in time."""
    told, record = line.evidence["reasons"], _record(trace)
    demand_equal(told, [_shown(each) for each in reversed(record.reasons)], "reasons on the device")
    failed = _of(_boot(case, 4), INIT_NAME, SLOT_FAILED)
    back = [each for each in told if each["cause"] == Cause.ROLLED_BACK]
    ends = [each for each in told if each["cause"] in EVIDENCE]
    demand_equal((len(back), len(ends)), (1, 1), "rollbacks, and ends of the trial")
    for each in (back[0], ends[0]):
        demand_equal(each["service"], STUCK, "service")
        demand_equal(each["trace"], failed.evidence["trace"], "trace of boot 4")
        demand_equal(each["version"], trace.made[BAD].version, "version")
        demand_equal(each["slot"], SlotName.A.value, "slot")
    demand_equal(ends[0]["cause"], int(Cause.NOT_READY), "cause: the missed readiness deadline")
    demand_equal(ends[0]["detail"], failed.evidence["detail"], "detail")
    demand("not ready within its deadline" in ends[0]["detail"], "no deadline is named")
    said = f"{STUCK}: {STUCK_SAYS}"
    console = [each.text for each in _boot(case, 4).lines if each.printer == STUCK]
    demand(said in console, f"{STUCK} has not said what it waits for")
    demand(said in ends[0]["tail"], "the tail of the log is not that of boot 4")
    _written_before(case, told)


def _written_before(case: Case, told: Sequence[Evidence]) -> None:
    """Why slot a was to be tried stood on the boot device before it was booted."""
    earlier = _record(_boot(case, 3)).reasons
    asked = [each for each in earlier if _is_switch(each, SlotName.A)]
    demand_equal(len(asked), 1, "reasons for the trial of slot a, before boot 4")
    demand(_shown(asked[0]) in told, "that reason is not told")
    demand(any(asked[0].trace), "it has no trace")


def _is_switch(reason: Reason, slot: SlotName) -> bool:
    return reason.cause is Cause.SWITCHED and reason.slot is slot


def _shown(reason: Reason) -> dict[str, object]:
    """A reason on the boot device, as the client tells of it."""
    return {
        "cause": int(reason.cause),
        "slot": reason.slot.value,
        "version": reason.version,
        "boot": reason.boot,
        "trace": reason.trace.hex(),
        "service": reason.service,
        "detail": reason.detail,
        "tail": reason.tail,
    }


def bootctl_persist(case: Case, trace: Trace, line: Line) -> None:
    """#138: both copies are whole and equal after each boot, and newer after each of the last."""
    boots = [_boot(case, number) for number in (2, 3, 4, 5)]
    sequences = []
    for boot in boots:
        first, second = _copies(boot)
        demand_equal(first, second, f"the two copies after boot {boot.number}")
        sequences.append(first.sequence)
    rising = all(later > before for before, later in pairwise(sequences))
    demand(rising, f"sequence numbers after boots 2 to 5: {sequences}")
    record, evidence = _record(trace), line.evidence
    found = [evidence[name] for name in ("sequence", "boots", "active", "trying", "floor")]
    trying = "none" if record.trying is None else record.trying.value
    wanted = [record.sequence, record.boots, record.active.value, trying, record.floor]
    demand_equal(found, wanted, "what updated says, against the boot device")
    demand_equal(evidence["slots"], _slots(record), "slots, as updated has them")


CHECKS: Final[Mapping[int, Check]] = MappingProxyType(
    {
        36: updated_ready,
        54: routing_updated,
        131: ota_stage,
        132: untrusted_refused,
        133: ota_switch,
        134: running_set,
        135: ota_health,
        136: ota_rollback,
        137: rollback_reason,
        138: bootctl_persist,
    }
)
