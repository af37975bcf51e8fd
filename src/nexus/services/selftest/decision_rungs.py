"""Rungs about decisions that others enforce: denied for the right reason, delegated, taken back."""

from typing import Final

from nexus.abi import Nanos, Now, PolicyRead, PolicyWord, Recv, Send, ServiceId, service_id
from nexus.ipc import (
    Answer,
    Bulk,
    CallFailure,
    Refused,
    RetryBudget,
    RetryTokens,
    accept_bulk,
    retry_until,
)
from nexus.protocols.init import GetPolicy
from nexus.protocols.keystored import GetStore as GetKeystore
from nexus.protocols.logd import Record
from nexus.protocols.policy import DELEGATE, Policy, Right, decode_policy
from nexus.protocols.policyd import PROTOCOL as POLICYD
from nexus.protocols.policyd import (
    Check,
    CheckFor,
    Counts,
    Decision,
    GetCounts,
    Reason,
    Reload,
    Route,
    Verdict,
)
from nexus.protocols.statefsd import (
    KEYSTORE_RIGHT,
    READ_RIGHT,
    WRITE_RIGHT,
    Get,
    GetArea,
    StatefsdStatus,
)
from nexus.protocols.testsvc import UseState
from nexus.runtime.authority import ASK_MAX
from nexus.services.selftest.climb import CALL_WAIT, RESTART_WAIT, Climb
from nexus.services.selftest.policy_rungs import (
    FOREIGN_RIGHT,
    MMIO_SUBJECT,
    SPOOFED,
    audits_of,
    fields_of,
    find,
    pages,
    records_about,
)
from nexus.services.selftest.rung import Evidence, RungFailed, expect, expect_type, require
from nexus.wire import HEADER, ReplyStatus, nonce_of, status_of

HOLD_RIGHT: Final = "proof.hold"  # the runner's fault point: policyd does not come back from it
HOLD_MAX: Final = Nanos(20_000_000_000)  # ns; init ends a hung policyd long before
MISSING_KEY: Final = b"/state/selftest/missing"
KEYSTORE_KEY: Final = b"/state/keystore/anything"
UNASKED_AREAS: Final = tuple(
    b"/state/unasked%d/" % number for number in range(20)
)  # by anybody yet
TESTSVC_KEY: Final = b"/state/testsvc/right"
DENIED_KEY: Final = b"/state/testsvc/denied"  # the runner sees that it was never written
TESTSVC_AREA: Final = "/state/testsvc/"
KEYSTORE_AREA: Final = "/state/keystore/"
BAD_NONCE: Final = (1 << 61) + 81  # no call of this run reaches it
NOBODY: Final = ServiceId(0x0123_4567_89AB_CDEF)  # an id that init has issued to nobody
TESTSVC: Final = "demo.testsvc"
BUSY_MAX: Final = Nanos(400_000_000)  # ns over ASK_MAX; a busy host, not another question
TAKE_PAUSE: Final = Nanos(20_000_000)  # ns in which an idle policyd takes a request, usually
PAGE_POLLS_MAX: Final = 4_000
PAGE_PAUSE: Final = Nanos(1_000_000)  # ns; shorter than policyd's back-off and start
SETTLE_POLLS_MAX: Final = 10  # with doubling pauses: 1 ms to half a second
SETTLE_PAUSE: Final = Nanos(1_000_000)  # ns; an acknowledgement takes less


# ------------------------------------------------------------------ why it was denied


async def deny_reasons(climb: Climb) -> Evidence:
    """#81: policy, identity, malformed and unavailable, each to the caller and into the audit."""
    statefsd = climb.client("statefsd")
    found = {
        "policy": await _denied_by_policy(climb),
        "identity": await _denied_by_identity(climb),
        "malformed": await _malformed(climb),
    }
    before = await _settled_audit(climb)
    found["unavailable"] = await _unavailable(climb)
    again = await statefsd.call(Get(MISSING_KEY), await climb.ahead(CALL_WAIT))
    after = await _settled_audit(climb)

    expect(again, Refused(StatefsdStatus.NOT_FOUND), "an allowed read once policyd is back")
    return {**found, "audits": [before, after]}


async def _settled_audit(climb: Climb) -> Evidence:
    """What policyd's present instance has decided, once every record of it is acknowledged, and
    the numbers of the decisions that its records in the journal are about: none is missing."""
    policyd = climb.client("policyd")
    _ = await pages(climb)  # what logd asks about us is decided before anything is counted
    budget = RetryBudget(
        attempts_max=SETTLE_POLLS_MAX, backoff=SETTLE_PAUSE, deadline=await climb.ahead(CALL_WAIT)
    )
    counts = await retry_until(
        lambda: climb.call(policyd, GetCounts()),
        lambda seen: seen.audit_waiting > 0,
        budget,
        RetryTokens(),
    )
    expect(counts.audit_waiting, 0, "audit records not acknowledged yet")

    async def look() -> tuple[Counts, list[Record], Counts]:
        first = await climb.call(policyd, GetCounts())
        records, _ = await pages(climb, service=service_id("policyd"))
        return first, records, await climb.call(policyd, GetCounts())

    budget = RetryBudget(
        attempts_max=SETTLE_POLLS_MAX, backoff=SETTLE_PAUSE, deadline=await climb.ahead(CALL_WAIT)
    )
    counts, records, after = await retry_until(  # others go on asking policyd meanwhile
        look, lambda seen: seen[0] != seen[2] or seen[2].audit_waiting > 0, budget, RetryTokens()
    )
    expect(counts, after, "policyd's counts around the reading of the journal")
    generation = (await climb.task("policyd")).generation
    own = [fields_of(each) for each in records if each.generation == generation]
    numbers = sorted(int(fields["number"]) for fields in own if fields.get("number", "0") != "0")
    decided = [counts.allowed, counts.denied_policy, counts.denied_identity]
    told = [counts.audited, counts.audit_dropped]

    expect(sum(told), sum(decided), "audit records and counted drops, against the decisions")
    expect(len(numbers), counts.audited, "audit records in the journal, against policyd's count")
    return {"generation": generation, "decided": decided, "told": told, "numbers": numbers}


async def _denied_by_policy(climb: Climb) -> Evidence:
    """By statefsd, which asked policyd about this client."""
    outcome = await climb.client("statefsd").call(Get(KEYSTORE_KEY), await climb.ahead(CALL_WAIT))
    records = await audits_of(climb, "target", KEYSTORE_AREA, subject=climb.boot.name)
    own = await climb.call(climb.client("policyd"), Check(FOREIGN_RIGHT, "reasons"))

    expect(outcome, Refused(ReplyStatus.DENIED), "a read of the key store's area")
    expect((own.verdict, own.reason), (Verdict.DENY, Reason.POLICY), "a right that we lack")
    return _expect(records[0], "policy", climb.boot.name, KEYSTORE_RIGHT, "statefsd")


async def _denied_by_identity(climb: Climb) -> Evidence:
    decision = await climb.call(climb.client("policyd"), Route(SPOOFED, MMIO_SUBJECT))
    mine = await audits_of(climb, "number", str(decision.number), subject=climb.boot.name)

    expect((decision.verdict, decision.reason), (Verdict.DENY, Reason.IDENTITY), "a false name")
    expect(len(mine), 1, "audit records of that decision")
    action = fields_of(mine[0])["action"]
    return _expect(mine[0], "identity", climb.boot.name, action, climb.boot.name)


async def _malformed(climb: Climb) -> Evidence:
    """A frame that is no request is refused as such, and audited; it decides nothing."""
    peer = climb.client("policyd").peer
    codec = POLICYD.codecs[Check]
    deadline = await climb.ahead(CALL_WAIT)
    echo = BAD_NONCE.to_bytes(8, "little") + deadline.to_bytes(8, "little")
    before = len(await find(climb, "reason", "malformed"))
    await Send(peer.slot, codec.prefix + echo + climb.peers.caller.spans.root.trail + b"\xc1")
    reply = await Recv((peer.inbox,), deadline, link=peer.link)
    budget = RetryBudget(attempts_max=10, backoff=Nanos(2_000_000), deadline=deadline)
    records = await retry_until(
        lambda: find(climb, "reason", "malformed"),
        lambda seen: len(seen) == before,
        budget,
        RetryTokens(),
    )

    expect(nonce_of(reply.data), BAD_NONCE, "nonce of the answer")
    expect((status_of(reply.data), len(reply.data)), (ReplyStatus.MALFORMED, HEADER.size), "answer")
    expect(len(records), before + 1, "audit records with the reason malformed")
    fields = fields_of(records[-1])
    expect(fields.get("asked_by"), climb.boot.name, "who asked, by the audit")
    return {**_shown(records[-1]), "status": status_of(reply.data)}


async def _unavailable(climb: Climb) -> Evidence:
    """policyd is held, so that it answers nobody; init ends it and starts another one.

    What was not asked for before is denied inside the budget of a question; what was is allowed
    until the policy page says that nobody answers, and denied from then on.
    """
    policyd, statefsd = climb.client("policyd"), climb.client("statefsd")
    read = Get(MISSING_KEY)
    generation = (await climb.task("policyd")).generation
    known = await statefsd.call(read, await climb.ahead(CALL_WAIT))

    begun = await Now()
    held = await policyd.start(Check(HOLD_RIGHT, ""), await climb.ahead(HOLD_MAX))
    for area in UNASKED_AREAS:  # one that is decided was asked about before the request was taken
        _ = await climb.pause(TAKE_PAUSE)
        asked = await Now()
        uncached = await statefsd.call(GetArea(area), await climb.ahead(CALL_WAIT))
        took = await Now() - asked
        if uncached == Refused(ReplyStatus.DENIED):
            break
    else:
        raise RungFailed("policyd answers others while it is held")
    page = await PolicyRead()
    kept = await statefsd.call(read, await climb.ahead(CALL_WAIT))
    still = await PolicyRead()
    gone, late = await _denied_when_stale(climb, begun)
    ended = await policyd.finish(held)
    record = await climb.up_again("policyd", generation + 1)
    back = await _page_once(climb, available=True)
    _ = await policyd.call(GetCounts(), await climb.ahead(CALL_WAIT))  # ends with the old link
    _ = await climb.call(policyd, GetCounts())
    subject = f"0x{climb.boot.service:016x}"
    records = await audits_of(climb, "target", area.decode(), subject=subject)

    expect(known, Refused(StatefsdStatus.NOT_FOUND), "an allowed read, before")
    require(took <= ASK_MAX + BUSY_MAX, f"denied after {took} ns, a question may take {ASK_MAX}")
    if page == still and page.available:
        expect(kept, Refused(StatefsdStatus.NOT_FOUND), "what was decided before")
    expect(gone, Refused(ReplyStatus.DENIED), "what was decided before, once nobody answers")
    _ = expect_type(ended, CallFailure, "the question that held policyd")
    require(back.generation > page.generation, f"the page said {page} and says {back}")
    own = records[0]
    expect(own.service, service_id("statefsd"), "sender of the audit record")
    fields = fields_of(own)
    wanted = {"decision": "deny", "reason": "unavailable", "action": READ_RIGHT}
    expect({name: fields.get(name) for name in wanted}, wanted, "the audit record")
    return {
        **_shown(own),
        "took_ns": took,
        "kept": page == still and page.available,
        "late_ns": late,
        "generations": [generation, record.generation],
    }


async def _denied_when_stale(climb: Climb, begun: Nanos) -> tuple[object, Nanos]:
    """What a known read meets once the page says that nobody answers, and when that was. A loaded
    machine may bring policyd back before statefsd looks: if the read was allowed then, there was
    nothing to see, which is told."""
    word = await _page_once(climb, available=False)
    seen = Nanos(await Now() - begun)
    outcome = await climb.client("statefsd").call(Get(MISSING_KEY), await climb.ahead(CALL_WAIT))
    after = await PolicyRead()
    denied = outcome == Refused(ReplyStatus.DENIED)
    require(denied or after == word, f"the page said {word} and then {after}: too slow to look")
    return outcome, seen


async def _page_once(climb: Climb, *, available: bool) -> PolicyWord:
    """The policy page as soon as it says so."""
    deadline = await climb.ahead(RESTART_WAIT)
    for _ in range(PAGE_POLLS_MAX):
        word = await PolicyRead()
        if word.available is available:
            return word
        now = await Now()
        if now >= deadline:
            break
        _ = await climb.pause(PAGE_PAUSE)
    raise RungFailed(f"the policy page never said {available}")


def _expect(record: Record, reason: str, subject: str, action: str, asked_by: str) -> Evidence:
    """The record says that it was denied, why, to whom and what."""
    fields = fields_of(record)
    wanted = {
        "decision": "deny",
        "reason": reason,
        "subject": subject,
        "action": action,
        "asked_by": asked_by,
    }
    expect({name: fields.get(name) for name in wanted}, wanted, "the audit record")
    expect(record.service, service_id("policyd"), "sender of the audit record")
    require(bool(fields.get("target")), "the audit record has no target")
    return _shown(record)


def _shown(record: Record) -> Evidence:
    """An audit record as evidence: the sender is the kernel's word, the fields are the sender's."""
    return {
        "record": record.record,
        "service": f"{record.service:016x}",
        "fields": {name: value for name, value in fields_of(record).items() if name != "trace"},
    }


# ------------------------------------------------------------------ in another's place


async def subject_normalization(climb: Climb) -> Evidence:
    """#82: who is asked about is who init issued the id to, whatever its generation; and only who
    holds policy.delegate asks about others at all: this client, for the time of the rung."""
    policyd, keystored = climb.client("policyd"), climb.client("keystored")
    subject = service_id("keystored")
    about = CheckFor(subject, KEYSTORE_RIGHT, KEYSTORE_AREA)
    policy = await _policy(climb)
    old = await climb.task("keystored")

    _ = await climb.restart("keystored")
    record = await climb.up_again("keystored", old.generation + 1)
    _ = await keystored.call(GetKeystore(), await climb.ahead(CALL_WAIT))  # ends the old link
    _ = await climb.call(keystored, GetKeystore())
    without = await climb.call(policyd, about)
    await _reload(climb, _with(policy, climb.boot.name, DELEGATE))
    try:
        restarted = await climb.call(policyd, about)
        nobody = await climb.call(policyd, CheckFor(NOBODY, KEYSTORE_RIGHT, KEYSTORE_AREA))
    finally:
        await _reload(climb, policy)
    again = await climb.call(policyd, about)
    issued = {row.name: row for row in (await climb.tasks()).rows}
    records = [await _record_of(climb, each) for each in (without, restarted, nobody, again)]

    expect(_what(restarted), (Verdict.ALLOW, Reason.POLICY), "the restarted keystored")
    expect(_what(nobody), (Verdict.DENY, Reason.IDENTITY), "an id that init never issued")
    expect(_what(without), (Verdict.DENY, Reason.IDENTITY), "without policy.delegate")
    expect(_what(again), (Verdict.DENY, Reason.IDENTITY), "once it is taken back")
    expect(issued["keystored"].generation, record.generation, "generation in init's table")
    require(NOBODY not in map(service_id, issued), "init has issued that id")
    return {
        "subject": f"{subject:016x}",
        "generation": record.generation,
        "pid": issued["keystored"].pid,
        "records": [_shown(each) for each in records],
    }


async def _record_of(climb: Climb, decision: Decision) -> Record:
    """The audit record of a decision of policyd's present instance."""
    generation = (await climb.task("policyd")).generation
    budget = RetryBudget(
        attempts_max=SETTLE_POLLS_MAX, backoff=SETTLE_PAUSE, deadline=await climb.ahead(CALL_WAIT)
    )

    async def look() -> list[Record]:
        found = await find(climb, "number", str(decision.number))
        policyd = service_id("policyd")
        return [each for each in found if (each.service, each.generation) == (policyd, generation)]

    found = await retry_until(look, lambda seen: not seen, budget, RetryTokens())
    expect(len(found), 1, f"audit records of decision {decision.number}")
    return found[0]


def _what(decision: Decision) -> tuple[Verdict, Reason]:
    return decision.verdict, decision.reason


# ------------------------------------------------------------------ taken back


async def generation(climb: Climb) -> Evidence:
    """#83: a right that is used, decided and kept is gone with the next request after a reload."""
    policyd, statefsd = climb.client("policyd"), climb.client("statefsd")
    use, use_denied = (UseState(key, b"kept") for key in (TESTSVC_KEY, DENIED_KEY))
    policy = await _policy(climb)

    first = await climb.call(climb.testsvc, use)
    hits = await _hits(climb)
    second = await climb.call(climb.testsvc, use)
    cached = await _hits(climb) - hits
    tasks = [(await climb.task(name)).generation for name in (TESTSVC, "statefsd", "policyd")]
    before = await PolicyRead()
    await _reload(climb, _without(policy, TESTSVC, WRITE_RIGHT))
    try:
        denied = await climb.call(climb.testsvc, use_denied)
        after = await PolicyRead()
        counts = await climb.call(policyd, GetCounts())
        refused = await records_about(
            climb, "target", TESTSVC_AREA, {"subject": TESTSVC, "decision": "deny"}
        )
    finally:
        await _reload(climb, policy)
    restored = await climb.call(climb.testsvc, use)
    later = [(await climb.task(name)).generation for name in (TESTSVC, "statefsd", "policyd")]
    _ = await climb.status(statefsd)

    expect([first.status, second.status], [int(ReplyStatus.OK)] * 2, "uses of the right")
    require(cached >= 1, "the second use was not decided without a question")
    expect(denied.status, int(ReplyStatus.DENIED), "the very next use")
    expect(restored.status, int(ReplyStatus.OK), "a use once the right is given back")
    expect(after.generation, before.generation + 1, "generation in the sealed page")
    expect(counts.generation, after.generation, "generation in policyd's status")
    expect(len(refused), 1, "audit records of the denial")
    fields = fields_of(refused[0])
    expect(fields["generation"], str(after.generation), "generation in the audit record")
    expect(fields["asked_by"], "statefsd", "who asked, by the audit")
    expect(later, tasks, "generations of the instances: nobody was restarted")
    return {
        **_shown(refused[0]),
        "generations": [before.generation, after.generation, counts.generation],
        "cached": cached,
        "statuses": [first.status, second.status, denied.status, restored.status],
        "instances": tasks,
    }


async def _hits(climb: Climb) -> int:
    """Decisions that statefsd made without a question."""
    status = await climb.status(climb.client("statefsd"))
    return next(fact.value for fact in status.facts if fact.name == "authority_hits_total")


async def _policy(climb: Climb) -> Policy:
    """The policy in force, from init."""
    outcome = await climb.control.ask(GetPolicy(), await climb.ahead(CALL_WAIT))
    if not isinstance(outcome, Answer):
        raise RungFailed(f"GetPolicy ended with {outcome!r}")
    bulk = expect_type(await accept_bulk(outcome.cap, 0, outcome.reply.size), Bulk, "the policy")
    policy = decode_policy(bytes(bulk.view))
    await bulk.release()
    return policy


async def _reload(climb: Climb, policy: Policy) -> None:
    reloaded = await climb.call(climb.client("policyd"), Reload(policy.encoded()))
    expect(reloaded.digest, policy.digest, "digest of the policy in force")


def _with(policy: Policy, subject: str, right: str) -> Policy:
    allow = {**policy.allow, subject: [*policy.allow[subject], Right(right, "rung 82", 0)]}
    return Policy(services=policy.services, allow=allow, routes=policy.routes)


def _without(policy: Policy, subject: str, right: str) -> Policy:
    kept = [each for each in policy.allow[subject] if each.name != right]
    assert len(kept) < len(policy.allow[subject]), f"{subject} does not hold {right}"
    allow = {**policy.allow, subject: kept}
    return Policy(services=policy.services, allow=allow, routes=policy.routes)
