"""Rungs about decisions: allowed, denied, denied for the right reason, and each one audited."""

from collections.abc import Mapping
from typing import Final

import msgspec

from nexus.abi import INIT_NAME, Nanos, Recv, Send, service_id
from nexus.ipc import RetryBudget, RetryTokens, retry_until
from nexus.protocols.logd import EVERY_RECORD, PAGE_MAX, Query, Record
from nexus.protocols.policyd import PROTOCOL as POLICYD
from nexus.protocols.policyd import (
    Check,
    CheckFor,
    Counts,
    Decision,
    GetCounts,
    Reason,
    Route,
    Verdict,
)
from nexus.protocols.testsvc import AskInit
from nexus.services.selftest.climb import CALL_WAIT, Climb
from nexus.services.selftest.routing_rungs import grown, use_once
from nexus.services.selftest.rung import Evidence, RungFailed, expect, require
from nexus.wire import HEADER, ReplyStatus, nonce_of, status_of

PROBE_RIGHT: Final = "proof.probe"  # the policy gives it to this client alone
FOREIGN_RIGHT: Final = "crypto.sign"  # keystored's
SPOOFED: Final = "demo.testsvc"
HELD_BY_SPOOFED: Final = "ipc.core"  # a right it has: only who asks is wrong
NOBODY: Final = "nobody"  # whom init would restart, were it asked by somebody with the right
ASKED_OF_INIT: Final = 5  # requests of AskInit
MMIO_RIGHT: Final = "device.mmio.blk"
MMIO_SUBJECT: Final = "timed"
MMIO_TARGET: Final = "window blk"
BAD_NONCE: Final = (1 << 61) + 80  # no call of this run reaches it
AUDIT_POLLS_MAX: Final = 10  # with doubling pauses: 2 ms to 1 s
PAGES_MAX: Final = 1_024  # of one search; more than the journal of the proof has records
AUDIT_PAUSE: Final = Nanos(2_000_000)  # ns


async def routing_policyd(climb: Climb) -> Evidence:
    """#53: policyd found by name, one round trip on that very link, init's counter and entry."""
    before = await climb.route_counts()

    generation = await use_once(climb, "policyd", POLICYD, GetCounts())
    counted = grown(before, await climb.route_counts())

    expect(counted, {"ok": 1}, "growth of init's route counters")
    expect(generation, (await climb.task("policyd")).generation, "policyd's generation")
    return {"counters": counted, "generation": generation}


async def policy_allow(climb: Climb) -> Evidence:
    """#77: what the policy gives this client is allowed, and the audit says so."""
    target = f"probe {climb.boot.pid}"

    decision = await climb.call(climb.client("policyd"), Check(PROBE_RIGHT, target))
    record = await _audit_of(climb, target)

    _expect_decision(decision, Verdict.ALLOW, Reason.POLICY)
    _expect_audit(climb, record, PROBE_RIGHT, decision, subject=climb.boot.name)
    return {"decision": decision.number, "record": record.record}


async def policy_deny(climb: Climb) -> Evidence:
    """#78: what it does not give is an answer, DENY, reason policy; not an error."""
    target = f"key {climb.boot.pid}"

    decision = await climb.call(climb.client("policyd"), Check(FOREIGN_RIGHT, target))
    record = await _audit_of(climb, target)

    _expect_decision(decision, Verdict.DENY, Reason.POLICY)
    _expect_audit(climb, record, FOREIGN_RIGHT, decision, subject=climb.boot.name)
    return {"decision": decision.number, "record": record.record}


async def requester_spoof_denied(climb: Climb) -> Evidence:
    """#79: naming somebody else, or asking in another's place, is DENY, reason identity, and the
    audit names us; and init lets a service do for itself only what its rights say."""
    policyd = climb.client("policyd")
    spoof = Route(SPOOFED, MMIO_SUBJECT)
    delegated = CheckFor(service_id(SPOOFED), HELD_BY_SPOOFED, f"delegated {climb.boot.pid}")

    found = {}
    for name, request in (("named", spoof), ("delegated", delegated)):
        decision = await climb.call(policyd, request)
        record = await _audit_by_number(climb, decision)
        _expect_decision(decision, Verdict.DENY, Reason.IDENTITY)
        fields = fields_of(record)
        expect(record.service, service_id("policyd"), "sender of the audit record")
        expect(fields["asked_by"], climb.boot.name, "who asked, by the audit")
        expect(fields["reason"], "identity", "reason in the audit")
        expect(fields["decision"], "deny", "decision in the audit")
        found[name] = {"decision": decision.number, "record": record.record}
    asked = await climb.call(climb.testsvc, AskInit(NOBODY))

    expect(asked.statuses, [int(ReplyStatus.DENIED)] * ASKED_OF_INIT, "what init answered another")
    return {**found, "init": asked.statuses}


async def policy_malformed(climb: Climb) -> Evidence:
    """#80: a bad body is MALFORMED, counted as such, and decides nothing."""
    policyd = climb.client("policyd")
    codec = POLICYD.codecs[Check]
    deadline = await climb.ahead(CALL_WAIT)
    spans = climb.peers.caller.spans.root
    echo = BAD_NONCE.to_bytes(8, "little") + deadline.to_bytes(8, "little") + spans.trail
    before = await climb.call(policyd, GetCounts())

    await Send(policyd.peer.slot, codec.prefix + echo + b"\xc1", deadline=deadline)
    reply = await Recv((policyd.peer.inbox,), deadline, link=policyd.peer.link)
    after = await climb.call(policyd, GetCounts())

    expect(len(reply.data), HEADER.size, "bytes of the answer")
    expect(nonce_of(reply.data), BAD_NONCE, "nonce of the answer")
    expect(status_of(reply.data), ReplyStatus.MALFORMED, "status of the answer")
    expect(after.malformed - before.malformed, 1, "growth of policyd's malformed counter")
    expect(_decided(after), _decided(before), "policyd's allow and deny counters")
    return {"malformed": after.malformed, "decided": sum(_decided(after))}


async def mmio_policy_deny(climb: Climb) -> Evidence:
    """#139: init's own question before the first grant stands in the journal, as it was asked."""
    records = await audits_of(climb, "action", MMIO_RIGHT, subject=MMIO_SUBJECT)

    expect(len(records), 1, f"audit records about {MMIO_RIGHT} and {MMIO_SUBJECT}")
    (record,) = records
    fields = fields_of(record)
    wanted = {
        "decision": "deny",
        "reason": "policy",
        "subject": MMIO_SUBJECT,
        "action": MMIO_RIGHT,
        "target": MMIO_TARGET,
        "asked_by": INIT_NAME,
    }
    expect(record.service, service_id("policyd"), "sender of the audit record")
    expect({name: fields[name] for name in wanted}, wanted, "the audit record")
    return {"record": record.record, "fields": fields}


# ------------------------------------------------------------------ the audit


def fields_of(record: Record) -> dict[str, str]:
    """The fields of a record by key."""
    return {field.key: field.value for field in record.fields}


async def find(climb: Climb, key: str, value: str) -> list[Record]:
    """Every record with that field."""
    records, _ = await pages(climb, key=key, value=value)
    return records


async def pages(
    climb: Climb, since: int = 1, *, key: str = "", value: str = "", service: int = 0
) -> tuple[list[Record], int]:
    """Every record from id `since` on, or what of them has that field, or is of that service; and
    the number of pages, of which one may lead on and hold none."""
    found: list[Record] = []
    for count in range(1, PAGES_MAX + 1):
        wanted = msgspec.structs.replace(EVERY_RECORD, service=service, key=key, value=value)
        query = Query(climb.config.boot, since, PAGE_MAX, wanted)
        page = await climb.call(climb.client("logd"), query)
        found += page.records
        if page.next > page.total:
            return found, count
        require(page.next > since, "a page leads on")
        since = page.next
    raise RungFailed(f"the journal did not end within {PAGES_MAX} pages")


async def _audit_of(climb: Climb, target: str) -> Record:
    """The one audit record about `target`; policyd writes it after it has answered."""
    return await _only_record(climb, "target", target)


async def _audit_by_number(climb: Climb, decision: Decision) -> Record:
    return await _only_record(climb, "number", str(decision.number))


async def audits_of(climb: Climb, key: str, value: str, *, subject: str) -> list[Record]:
    """The audit records with that field about `subject`, at least one."""
    return await records_about(climb, key, value, {"subject": subject})


async def records_about(
    climb: Climb, key: str, value: str, about: Mapping[str, str]
) -> list[Record]:
    """The records with all of these fields, at least one; they may come after the answer."""
    budget = RetryBudget(
        attempts_max=AUDIT_POLLS_MAX, backoff=AUDIT_PAUSE, deadline=await climb.ahead(CALL_WAIT)
    )

    async def look() -> list[Record]:
        found = await find(climb, key, value)
        return [record for record in found if about.items() <= fields_of(record).items()]

    found = await retry_until(look, lambda seen: not seen, budget, RetryTokens())
    words = " ".join(f"{name}={text}" for name, text in about.items())
    require(bool(found), f"no record with {key}={value} {words}")
    return found


async def _only_record(climb: Climb, key: str, value: str) -> Record:
    budget = RetryBudget(
        attempts_max=AUDIT_POLLS_MAX, backoff=AUDIT_PAUSE, deadline=await climb.ahead(CALL_WAIT)
    )
    records = await retry_until(
        lambda: find(climb, key, value), lambda seen: not seen, budget, RetryTokens()
    )
    expect(len(records), 1, f"audit records with {key}={value}")
    return records[0]


def _expect_decision(decision: Decision, verdict: Verdict, reason: Reason) -> None:
    expect((decision.verdict, decision.reason), (verdict, reason), "the decision")
    require(decision.generation > 0, "a decision has a generation")


def _expect_audit(
    climb: Climb, record: Record, action: str, decision: Decision, *, subject: str
) -> None:
    """The record says what was decided, about whom, and that this client asked."""
    fields = fields_of(record)
    wanted = {
        "decision": decision.verdict.name.lower(),
        "reason": decision.reason.name.lower(),
        "subject": subject,
        "action": action,
        "asked_by": climb.boot.name,
        "generation": str(decision.generation),
        "number": str(decision.number),
    }
    expect(record.service, service_id("policyd"), "sender of the audit record")
    expect({name: fields.get(name) for name in wanted}, wanted, "the audit record")


def _decided(counts: Counts) -> tuple[int, int, int]:
    return counts.allowed, counts.denied_policy, counts.denied_identity
