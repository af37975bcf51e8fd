"""The evidence behind the rungs about keystored, the keys it seals, and the decisions that others
enforce.

The runner opens what is sealed itself, with the wrapping key that the kernel keeps, and looks for
what was sealed in everything that the run has written.
"""

import hashlib
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, Final

from nexus.abi import EventKind, SecretBackend, service_id
from nexus.init.grants import SECRET_RIGHTS
from nexus.proof.checks import KILLED, NOTICE_MARGIN, healthy, measured, of_init
from nexus.proof.checks_devices import delivered
from nexus.proof.checks_state import kept_of, left_of, said_in
from nexus.proof.leaks import Leaks
from nexus.proof.remains import Remains
from nexus.proof.trace import FAIL_WORD, Line, Trace
from nexus.proof.verdict import Case, Check, Mismatch, demand, demand_equal
from nexus.protocols.keystored import KeystoredStatus
from nexus.protocols.ladder import SELFTEST, Ground
from nexus.protocols.policy import DELEGATE
from nexus.protocols.statefsd import KEYSTORE_RIGHT, READ_RIGHT, WRITE_RIGHT, ListKeys
from nexus.runtime.authority import ASK_MAX
from nexus.services.keystored.ed25519 import SEED_SIZE, public_of
from nexus.services.keystored.sealing import Unsealable, Wrapping, unpack, unseal
from nexus.services.keystored.secret import Secret
from nexus.services.keystored.vault import DEVICE_PATH
from nexus.services.keystored.vault import ROOT as KEYSTORE
from nexus.services.selftest.decision_rungs import (
    BUSY_MAX,
    DENIED_KEY,
    KEYSTORE_AREA,
    NOBODY,
    TESTSVC,
    TESTSVC_AREA,
    TESTSVC_KEY,
    UNASKED_AREAS,
)
from nexus.services.selftest.key_rungs import (
    CANARY,
    EXPORT_ACTION,
    JOURNAL_LINE,
    KEY_HANDLERS,
    NAME,
    OTHER_NAME,
    SPANS_BETWEEN_MAX,
)
from nexus.services.selftest.state_rungs import HIDDEN_VALUE
from nexus.wire import HEADER, ReplyStatus

KEYSTORED: Final = "keystored"
POLICYD: Final = "policyd"
STATEFSD: Final = "statefsd"
MAKER_SIZE: Final = 4  # bytes of a span id: the low half of its maker's service id
SPANS: Final = 1 << 32  # span ids of a task, which counts them
KEYSTORED_MAKER: Final = (service_id("keystored") & (SPANS - 1)).to_bytes(MAKER_SIZE, "little")
LATE_MARGIN: Final = 100_000_000  # ns behind a deadline; a busy host, not another attempt
ENDS_OF_SHORT: Final = ("timed out", "unavailable", "expired")

Evidence = Mapping[str, Any]


def _id(name: str) -> str:
    """A service's id as evidence shows it."""
    return f"{service_id(name):016x}"


def _instance(trace: Trace, line: Line, name: str) -> int:
    """The generation of the instance that ran where a line was printed, by the kernel's starts."""
    before = [event for at, event in trace.spawns(name) if at < line.place]
    demand(before, f"the kernel recorded no start of {name} before the line")
    generation = before[-1].fields["generation"]
    assert isinstance(generation, int), "the kernel counts generations"
    return generation


def _was_killed(trace: Trace, line: Line, name: str, generation: int) -> None:
    """The kernel ended this instance by a kill before the line was printed."""
    starts = [at for at, event in trace.spawns(name) if event.fields["generation"] == generation]
    demand_equal(len(starts), 1, f"starts of {name} generation {generation}")
    ends = [
        event.fields["signal"]
        for at, event in trace.of_kind(EventKind.EXIT)
        if starts[0] < at < line.place
        and (event.fields.get("name"), event.fields.get("generation")) == (name, generation)
    ]
    demand_equal(ends, [KILLED], f"how {name} generation {generation} ended")


# ---------------------------------------------------------------- keystored and its way


def keystored_ready(case: Case, trace: Trace, line: Line) -> None:
    """#35: it names what it stands on, and statefsd has heard it look there before all others.

    What init granted, and what statefsd has heard, is told once the whole system is up: where it
    does not get there another rung is red.
    """
    facts = healthy(case, trace, line)
    evidence = line.evidence
    backend = case.plan.by_name[KEYSTORED].grants.secret
    demand(backend is not SecretBackend.NONE, "the plan gives keystored no secret")
    demand_equal(evidence["backend"], backend.name.lower(), "wrapping back end")
    demand_equal(evidence["store"], STATEFSD, "store")
    generation = _instance(trace, line, STATEFSD)
    demand_equal(evidence["statefsd_generation"], generation, "generation of the store")
    demand_equal(facts["statefsd_generation"], generation, "generation of the store, on two ways")
    demand_equal(facts["wrapping"], evidence["wrapping"], "number of the wrapping key")
    wanted = [KEYSTORED, SECRET_RIGHTS[backend], f"secret of {KEYSTORED}", "allow"]
    ready = of_init(trace, "init: ready")
    grants = [wanted] if ready is None else ready.evidence["grants"]
    demand(wanted in grants, f"init's table has no {wanted}")
    if any(each.printer == SELFTEST and not FAIL_WORD.search(each.text) for each in trace.lines):
        _opening_read(measured(trace, 35))  # the client climbs; nobody else may ask statefsd


def _opening_read(heard: Evidence) -> None:
    demand(heard["total"] >= 1, "statefsd has heard nothing of keystored")
    demand_equal(heard["senders"], [_id(KEYSTORED)], "senders of what statefsd heard")
    demand(ListKeys.INFO.op in heard["ops"], f"keystored has not looked: {heard['ops']}")


def routing_keystored(_case: Case, trace: Trace, line: Line) -> None:
    """#52: init counted one route, and made a link into keystored for it and into nobody else."""
    evidence = line.evidence
    demand_equal(evidence["counters"], {"ok": 1}, "growth of init's route counters")
    generation = _instance(trace, line, KEYSTORED)
    demand_equal(evidence["generation"], generation, "generation of keystored")
    since = max((each.place for each in trace.lines if _earlier_of_client(each, line)), default=0)
    owners = [
        str(event.fields["owner"])
        for at, event in trace.of_kind(EventKind.LINK)
        if since < at < line.place
    ]
    demand(KEYSTORED in owners, f"the kernel made links into {owners} since the client's last line")
    demand(set(owners) <= {KEYSTORED, SELFTEST}, f"the kernel made links into {owners}")


def _earlier_of_client(each: Line, line: Line) -> bool:
    return each.printer == SELFTEST and each.place < line.place


def nested_deadline(_case: Case, trace: Trace, line: Line) -> None:
    """#74: by statefsd's record every inner call has our trace and no later deadline, and its
    parent is a span of the task whose opening read statefsd heard before any client's."""
    evidence = line.evidence
    heard = measured(trace, 35)["spans"]
    opening = _span(heard[-1]) if heard else _span(evidence["spans"][0][1]) - 1
    for own, *inner in evidence["deadlines"]:
        demand(inner, "statefsd saw no inner call")
        demand(max(inner) <= own, f"a deadline {max(inner) - own} ns after the outer one")
    traces = evidence["traces"]
    demand_equal(len({own for own, _ in traces}), len(traces), "different traces of the client")
    for own, inner in traces:
        demand_equal(inner, own, "trace of the inner call")
    for own, parent in evidence["spans"]:
        demand(parent != own, "the parent is the client's span")
        apart = (_span(parent) - opening) % SPANS
        demand(0 < apart < SPANS_BETWEEN_MAX, f"the parent {parent} is no span of keystored's")
        demand_equal(bytes.fromhex(parent)[:MAKER_SIZE], KEYSTORED_MAKER, "the parent's maker")
    demand(evidence["outcome"] in ENDS_OF_SHORT, f"a short call was {evidence['outcome']}")
    demand(evidence["late_ns"] <= LATE_MARGIN, f"it ended {evidence['late_ns']} ns late")


def _span(text: str) -> int:
    """The number of a span among those of its task."""
    return int.from_bytes(bytes.fromhex(text)[MAKER_SIZE:], "little")


# ---------------------------------------------------------------- decisions


def _audited(told: Evidence, sender: str, what: str, **wanted: str) -> Mapping[str, str]:
    """The fields of an audit record that this service has written; each in `wanted` is so."""
    demand_equal(told["service"], _id(sender), f"sender of the record of {what}")
    fields: Mapping[str, str] = told["fields"]
    found = {name: fields.get(name) for name in wanted}
    demand_equal(found, wanted, f"the audit record of {what}")
    return fields


def deny_reasons(case: Case, trace: Trace, line: Line) -> None:
    """#81: each reason stands in the journal, from who denied; policyd hung and was killed; the
    waits are those that the system declares; and no decision is missing in the journal."""
    evidence = line.evidence
    by_us = {"decision": "deny", "subject": SELFTEST, "asked_by": SELFTEST}
    of_area = {**by_us, "asked_by": STATEFSD, "action": KEYSTORE_RIGHT, "target": KEYSTORE_AREA}
    _ = _audited(evidence["policy"], POLICYD, "policy", **of_area, reason="policy")
    fields = _audited(evidence["identity"], POLICYD, "identity", **by_us, reason="identity")
    demand(fields["action"] and fields["target"], "the record of identity says not what")
    _ = _audited(evidence["malformed"], POLICYD, "malformed", **by_us, reason="malformed")
    demand_equal(evidence["malformed"]["status"], int(ReplyStatus.MALFORMED), "status of that")
    area = evidence["unavailable"]["fields"]["target"]
    demand(area.encode() in UNASKED_AREAS, f"{area} may have been asked about before")
    _ = _audited(
        evidence["unavailable"],
        STATEFSD,
        "unavailable",
        decision="deny",
        reason="unavailable",
        subject=f"0x{_id(SELFTEST)}",
        action=READ_RIGHT,
        target=area,
    )
    _held(case, trace, line)
    before, after = evidence["audits"]
    for told in (before, after):
        _balanced(told)
    demand_equal(
        [before["generation"], after["generation"]],
        evidence["unavailable"]["generations"],
        "instances that decided",
    )
    numbers = {int(evidence[each]["fields"]["number"]) for each in ("policy", "identity")}
    demand(numbers <= set(before["numbers"]), "a denial is not among the audited decisions")


def _balanced(told: Evidence) -> None:
    """Every decision of an instance has a record of its own in the journal, or was counted as
    dropped; the records are those of different decisions."""
    decided, (audited, dropped) = sum(told["decided"]), told["told"]
    demand_equal(audited + dropped, decided, "audit records and counted drops, against decisions")
    numbers = told["numbers"]
    demand_equal(len(set(numbers)), audited, "decisions that the journal has records of")
    demand(all(1 <= number <= decided for number in numbers), f"decisions {numbers} of {decided}")


def _held(case: Case, trace: Trace, line: Line) -> None:
    """policyd hung, was killed for it and started anew; how long the others waited for it."""
    told = line.evidence["unavailable"]
    old, new = told["generations"]
    demand_equal(new, old + 1, "policyd's generation")
    demand_equal(_instance(trace, line, POLICYD), new, "policyd's generation, by the kernel")
    _was_killed(trace, line, POLICYD, old)
    ends = [
        each.evidence["reason"]
        for each in trace.lines
        if each.text == f"init: end of {POLICYD}" and each.evidence["generation"] == old
    ]
    demand_equal(ends, ["hang"], "why init ended policyd")
    took, late = told["took_ns"], told["late_ns"]
    demand(took <= ASK_MAX + BUSY_MAX, f"denied after {took} ns, declared are {ASK_MAX}")
    planned = case.plan.by_name[POLICYD]
    stale = planned.probe_every + planned.probe_answer * planned.probe_misses + NOTICE_MARGIN
    demand(late <= stale, f"a known allow was good for {late} ns, declared are {stale}")


def subject_normalization(case: Case, trace: Trace, line: Line) -> None:
    """#82: the instance that is asked about is the kernel's present one, the unknown id is
    nobody's, and what the policy files say makes each of the four decisions right."""
    evidence = line.evidence
    demand_equal(evidence["subject"], _id(KEYSTORED), "subject")
    generation = _instance(trace, line, KEYSTORED)
    demand(generation > 1, "keystored was not restarted")
    demand_equal(evidence["generation"], generation, "generation, in init's table")
    pids = [
        event.pid
        for at, event in trace.spawns(KEYSTORED)
        if at < line.place and event.fields["generation"] == generation
    ]
    demand_equal([evidence["pid"]], pids, "pid, in init's table")
    _was_killed(trace, line, KEYSTORED, generation - 1)
    issued = {service.service for service in case.plan.services}
    demand(NOBODY not in issued, "the id that is nobody's is a service's")
    policy = case.plan.policy
    demand(policy.right(SELFTEST, DELEGATE, "") is None, "the client may delegate by the files")
    held = policy.right(KEYSTORED, KEYSTORE_RIGHT, KEYSTORE_AREA)
    demand(held is not None, "keystored has no right to its area by the files")
    wanted = (
        (KEYSTORED, "deny", "identity"),
        (KEYSTORED, "allow", "policy"),
        (f"0x{NOBODY:016x}", "deny", "identity"),
        (KEYSTORED, "deny", "identity"),
    )
    numbers = []
    for told, (subject, decision, reason) in zip(evidence["records"], wanted, strict=True):
        fields = _audited(
            told,
            POLICYD,
            f"{subject}, to be {decision}",
            op="check_for",
            asked_by=SELFTEST,
            subject=subject,
            decision=decision,
            reason=reason,
            action=KEYSTORE_RIGHT,
            target=KEYSTORE_AREA,
        )
        numbers.append(int(fields["number"]))
    demand_equal(sorted(set(numbers)), numbers, "numbers of the decisions, in order")


def policy_generation(case: Case, trace: Trace, line: Line) -> None:
    """#83: init raised the page at the reload, nobody was restarted, and what was denied is not
    on the disk."""
    evidence = line.evidence
    old, *new = evidence["generations"]
    demand_equal(new, [old + 1] * 2, "generations of the page and of policyd's status")
    fields = _audited(
        evidence,
        POLICYD,
        "the denial",
        decision="deny",
        reason="policy",
        subject=TESTSVC,
        action=WRITE_RIGHT,
        target=TESTSVC_AREA,
        asked_by=STATEFSD,
    )
    demand_equal(fields["generation"], str(old + 1), "generation in the audit record")
    sets = [
        each.evidence
        for each in trace.lines
        if each.text == "init: policy set" and each.place < line.place
    ]
    demand_equal(
        [told["generation"] for told in sets[-2:]], [old + 1, old + 2], "the page, by init"
    )
    demand_equal(sets[-1]["digest"], case.plan.policy.digest, "the policy that is given back")
    demand(sets[-2]["digest"] != sets[-1]["digest"], "the policy was not changed")
    allowed = int(ReplyStatus.OK)
    wanted = [allowed, allowed, int(ReplyStatus.DENIED), allowed]
    demand_equal(evidence["statuses"], wanted, "what the four uses met")
    demand(evidence["cached"] >= 1, "the second use was not decided without a question")
    instances = [_instance(trace, line, name) for name in (TESTSVC, STATEFSD, POLICYD)]
    demand_equal(evidence["instances"], instances, "instances, by the kernel")
    left = left_of(trace)
    demand(TESTSVC_KEY in left.records, "what was allowed is not on the disk")
    demand(DENIED_KEY not in left.records, "what was denied is on the disk")


# ---------------------------------------------------------------- what is sealed


def _wrapping(left: Remains) -> Wrapping:
    """The wrapping keys that the kernel keeps for keystored."""
    blob = left.secrets.get(KEYSTORED)
    if blob is None:
        raise Mismatch("the runner cannot read what the kernel keeps for keystored")
    try:
        return unpack(blob)
    except Unsealable:
        raise Mismatch("what the kernel keeps for keystored is damaged") from None


def _opened(left: Remains, path: bytes) -> bytes:
    """The value that is sealed on the disk at this place."""
    record = kept_of(left, path).value
    try:
        with unseal(_wrapping(left), path, record) as value:
            return bytes(value.data)
    except Unsealable:
        raise Mismatch(f"the record {path!r} does not open") from None


def _seed(left: Remains) -> bytes:
    """The device key's seed, in clear."""
    seed = _opened(left, DEVICE_PATH)
    demand_equal(len(seed), SEED_SIZE, "bytes of the seed")
    return seed


def _public_key(seed: bytes) -> bytes:
    with Secret(seed) as secret:
        return public_of(secret)


def _is_key_of(seed: bytes, evidence: Evidence, what: str) -> None:
    """What was told of the device key is the public half of this seed, and its digest."""
    public = _public_key(seed)
    demand_equal(evidence["public_key"], public.hex(), f"public key, {what}")
    demand_equal(evidence["device_id"], hashlib.sha256(public).hexdigest(), f"device id, {what}")


def _entry(client: str, name: bytes) -> bytes:
    """Where an entry of a client stands."""
    return b"%s%016x/%s" % (KEYSTORE, service_id(client), name.hex().encode())


def keystored_entries(_case: Case, trace: Trace, line: Line) -> None:
    """#107: the entry is sealed on the disk, where its owner's are, and opens to the value."""
    evidence = line.evidence
    missing = int(KeystoredStatus.NOT_FOUND)
    wanted = [missing] * 4 + [int(ReplyStatus.MALFORMED)]
    demand_equal(evidence["statuses"], wanted, "statuses")
    before, after = evidence["calls"]
    demand(after > before, "statefsd has heard no call of keystored's")
    left = left_of(trace)
    own = _entry(SELFTEST, NAME)
    demand(kept_of(left, own).value != CANARY, "the entry is stored in clear")
    demand(_opened(left, own) == CANARY, "another value is sealed in the entry")
    for path in (_entry(SELFTEST, OTHER_NAME), _entry(TESTSVC, NAME)):
        demand(path not in left.records, f"{path!r} is on the disk")
    names = [path for path in left.records if path.endswith(b"/" + NAME.hex().encode())]
    demand_equal(names, [own], "entries of that name")


def device_key(case: Case, trace: Trace, line: Line) -> None:
    """#108: the sealed seed makes this public key; in the simulator it is what the entropy device
    delivered, by the run's seed."""
    evidence = line.evidence
    before, after = evidence["given"]
    demand_equal(after - before, SEED_SIZE, "bytes that rngd gave keystored")
    seed = _seed(left_of(trace))
    _is_key_of(seed, evidence, "against the sealed seed")
    told = [
        each.evidence for each in trace.lines if each.text == f"{KEYSTORED}: device key generated"
    ]
    demand_equal(len(told), 1, "times that keystored said it made a key")
    _is_key_of(seed, told[0], "by keystored")
    wrapped = _wrapping(left_of(trace))
    demand_equal(wrapped.device, _public_key(seed), "public key beside the wrapping key")
    if case.scope.ground is Ground.SIM:
        drawn = list(delivered(case, trace, line))
        demand(any(seed in each for each in drawn), "the entropy device never delivered this seed")


def export_rejected(case: Case, trace: Trace, line: Line) -> None:
    """#109: refused and audited; and no secret stands in clear on a disk, in the output, in the
    event log or in the record, where the journal of all who handled the key is printed."""
    evidence = line.evidence
    demand_equal(evidence["status"], int(KeystoredStatus.EXPORT_DENIED), "status of the export")
    demand_equal(evidence["size"], HEADER.size, "bytes of the answer, a header alone")
    _ = _audited(
        evidence,
        KEYSTORED,
        "the export",
        decision="deny",
        subject=f"0x{_id(SELFTEST)}",
        action=EXPORT_ACTION,
    )
    shown = {
        name: [
            each.evidence["record"] for each in trace.lines if each.text == f"{JOURNAL_LINE} {name}"
        ]
        for name in KEY_HANDLERS
    }
    counts = {name: len(records) for name, records in shown.items()}
    demand_equal(counts, evidence["journal"], "records of the journal that were printed")
    demand(evidence["record"] in shown[KEYSTORED], "the audit record is not among them")
    found = _secrets(case).among(_places(case))
    demand(not found, "secrets in clear: " + ", ".join(_found(found)))


def _found(found: Mapping[str, set[str]]) -> list[str]:
    return [f"{', '.join(sorted(names))} in {place}" for place, names in sorted(found.items())]


def _secrets(case: Case) -> Leaks:
    """Every secret of the run that the runner can know, in any of its boots. The first one has
    made the device key; that a later one still has it is rung 110's to say."""
    secrets = {"the entry": CANARY, "the hidden entry": HIDDEN_VALUE}
    for boot in case.boots:
        left = left_of(boot)
        if boot is case.boots[0] or DEVICE_PATH in left.records:
            secrets[f"the seed, boot {boot.number}"] = _seed(left)
        for key in _wrapping(left).keys:
            secrets[f"wrapping key {key.number}, boot {boot.number}"] = bytes(key.secret.data)
    names = {secret: name for name, secret in secrets.items()}  # most are those of the boot before
    return Leaks({name: secret for secret, name in names.items()})


def _places(case: Case) -> Iterator[tuple[str, bytes]]:
    """Everything that the run has written and the runner can read."""
    for boot in case.boots:
        demand(boot.left.written, f"nothing was written to the disk in boot {boot.number}")
        yield f"the disk after boot {boot.number}", boot.left.written
        yield f"the output of boot {boot.number}", boot.output.encode()
    demand(case.written, "the run has no record")
    for path in case.written:
        yield path.name, path.read_bytes()


def device_key_persists(_case: Case, trace: Trace, line: Line) -> None:
    """#110: one seed on the disk after both boots, and its public half before the kill, after it
    and in the next boot."""
    before = trace.earlier[-1]
    made, killed = said_in(before, 108), measured(before, 110)
    seed = _seed(left_of(before))
    demand(_seed(left_of(trace)) == seed, "another seed is on the disk after the next boot")
    for evidence, what in ((made, "when made"), (killed, "after the kill"), (line.evidence, "now")):
        _is_key_of(seed, evidence, what)
    for evidence in (killed, line.evidence):
        demand_equal(evidence["keygens"], 0, "keys made by an instance that found one")
    demand(line.evidence["boot_id"] != killed["boot_id"], "it is the same boot")
    old, new = killed["generations"]
    demand_equal(new, old + 1, "keystored's generation")
    told = next(each for each in before.lines if each.evidence is killed)
    demand_equal(_instance(before, told, KEYSTORED), new, "keystored's generation, by the kernel")
    _was_killed(before, told, KEYSTORED, old)


CHECKS: Final[Mapping[int, Check]] = MappingProxyType(
    {
        35: keystored_ready,
        52: routing_keystored,
        74: nested_deadline,
        81: deny_reasons,
        82: subject_normalization,
        83: policy_generation,
        107: keystored_entries,
        108: device_key,
        109: export_rejected,
        110: device_key_persists,
    }
)
