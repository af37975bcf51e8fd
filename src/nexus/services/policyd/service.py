"""policyd: may this subject do that? Deny by default, by the policy that init keeps.

Owns the numbers of its decisions and the audit of them, and nothing else: the policy is init's.
Who asks is what the kernel stamped on the request. Nobody is believed who speaks for another but
init, and a holder of `policy.delegate` in a delegated check. It waits for init alone, under a
deadline, and for nobody when it decides; the audit goes to logd in idle moments.
"""

from collections import Counter
from typing import Final, assert_never

from nexus.abi import Message, Nanos, ServiceId
from nexus.ipc import Bulk, accept_bulk, deadline_after, nested_deadline
from nexus.protocols.policy import POLICY_SIZE_MAX
from nexus.protocols.policyd import (
    PROTOCOL,
    Check,
    CheckFor,
    Counts,
    Decision,
    Exec,
    GetCounts,
    PolicydRequest,
    PolicydStatus,
    Reason,
    Reload,
    ReloadBulk,
    Reloaded,
    Route,
    Verdict,
)
from nexus.runtime import Call
from nexus.services.policyd.audit import (
    ACTION_SIZE_MAX,
    NAME_SIZE_MAX,
    TARGET_SIZE_MAX,
    Audit,
    cut,
)
from nexus.services.policyd.judge import Judge, Ruling
from nexus.services.policyd.keeper import ASK_MAX, Keeper
from nexus.services.policyd.shares import Kind
from nexus.wire import PREFIX_SIZE, ReplyStatus

RELOAD_MAX: Final = Nanos(2_000_000_000)  # ns for init to take a policy
DIGEST_DIGITS: Final = 15  # of a digest, as a number: 60 bits, and a fact has 63


class Policyd:
    """Serves nexus.protocols.policyd."""

    def __init__(self, keeper: Keeper, audit: Audit) -> None:
        self._keeper = keeper
        self._audit = audit
        self._decisions: Counter[tuple[Verdict, Reason]] = Counter()
        self._numbers = 0
        self._malformed = 0

    async def handle(self, call: Call, request: PolicydRequest) -> Decision | Reloaded | Counts:
        """The reply."""
        match request:
            case Check():
                return await self._check(call, request)
            case Route():
                return await self._route(call, request)
            case Exec():
                return await self._exec(call, request)
            case CheckFor():
                return await self._check_for(call, request)
            case Reload():
                return await self._reload(call, request)
            case ReloadBulk():
                return await self._reload_bulk(call, request)
            case GetCounts():
                return self._counts()
            case _:
                assert_never(request)

    def next_time(self) -> Nanos | None:
        """When the audit has something to do."""
        return self._audit.next_time()

    async def on_time(self, now: Nanos) -> None:
        """Let the audit go on."""
        await self._audit.on_time(now)

    def on_malformed(self, message: Message) -> None:
        """Somebody asked what makes no sense: counted, and audited as no decision."""
        self._malformed += 1
        sender = message.sender.service
        codec = PROTOCOL.dispatch.get(message.data[:PREFIX_SIZE])
        fields = {
            "op": "unknown" if codec is None else OPS[codec.request_type],
            "decision": Verdict.DENY.name.lower(),
            "reason": Reason.MALFORMED.name.lower(),
            "subject": self._name_of(sender),
            "action": "",
            "target": "",
            "asked_by": self._name_of(sender),
            "generation": str(max(0, self._keeper.generation)),
            "number": "0",
        }
        self._audit.put(
            fields, message.now, asker=sender, kind=Kind.MALFORMED, number=0, denied=True
        )

    def ready(self) -> bool:
        """Whether a policy is loaded."""
        return self._keeper.judge is not None

    def facts(self) -> dict[str, int]:
        """The policy in short, and the counters."""
        digest = self._keeper.digest
        return {
            "policy_digest": int(digest[:DIGEST_DIGITS], 16) if digest else 0,
            "subjects": self._subjects(),
            "generation_total": max(0, self._keeper.generation),
            "allowed_total": self._decisions[Verdict.ALLOW, Reason.POLICY],
            "denied_total": self._denied(Reason.POLICY) + self._denied(Reason.IDENTITY),
            "malformed_total": self._malformed,
            "audited_total": self._audit.audited,
            "audit_dropped_total": self._audit.dropped,
        }

    async def _check(self, call: Call, request: Check) -> Decision:
        judge = await self._judge(call)
        ruling = judge.check(call.sender.service, request.right, request.target)
        return await self._decide(call, OPS[Check], ruling, request.target)

    async def _route(self, call: Call, request: Route) -> Decision:
        judge = await self._judge(call)
        ruling = judge.route(call.sender.service, request.requester, request.target)
        return await self._decide(call, OPS[Route], ruling, request.target)

    async def _exec(self, call: Call, request: Exec) -> Decision:
        judge = await self._judge(call)
        ruling = judge.exec(call.sender.service, request.requester, request.program)
        return await self._decide(call, OPS[Exec], ruling, request.program)

    async def _check_for(self, call: Call, request: CheckFor) -> Decision:
        judge = await self._judge(call)
        subject = ServiceId(request.subject)
        ruling = judge.check_for(call.sender.service, subject, request.right, request.target)
        return await self._decide(call, OPS[CheckFor], ruling, request.target)

    async def _reload(self, call: Call, request: Reload) -> Reloaded:
        await self._require_reload(call, OPS[Reload])
        return await self._replaced(call, request.policy)

    async def _reload_bulk(self, call: Call, request: ReloadBulk) -> Reloaded:
        await self._require_reload(call, OPS[ReloadBulk])
        if not 1 <= request.size <= POLICY_SIZE_MAX:
            raise call.refuse(PolicydStatus.BAD_POLICY)
        bulk = await accept_bulk(call.take_cap(), 0, request.size)
        if not isinstance(bulk, Bulk):
            call.note("bulk", bulk.value)
            raise call.refuse(PolicydStatus.BAD_POLICY)
        data = bytes(bulk.view)
        await bulk.release()
        return await self._replaced(call, data)

    async def _require_reload(self, call: Call, op: str) -> None:
        judge = await self._judge(call)
        decision = await self._decide(call, op, judge.reload(call.sender.service), "policy")
        if decision.verdict is not Verdict.ALLOW:
            raise call.refuse(ReplyStatus.DENIED)

    async def _replaced(self, call: Call, data: bytes) -> Reloaded:
        until = nested_deadline(call.deadline, deadline_after(call.now, RELOAD_MAX))
        status = await self._keeper.replace(data, until)
        if status is not None:
            raise call.refuse(status)
        return Reloaded(self._keeper.generation, self._keeper.digest)

    def _counts(self) -> Counts:
        return Counts(
            generation=max(0, self._keeper.generation),
            digest=self._keeper.digest,
            allowed=self._decisions[Verdict.ALLOW, Reason.POLICY],
            denied_policy=self._denied(Reason.POLICY),
            denied_identity=self._denied(Reason.IDENTITY),
            malformed=self._malformed,
            audited=self._audit.audited,
            audit_dropped=self._audit.dropped,
            audit_waiting=self._audit.waiting,
            subjects=self._subjects(),
        )

    async def _judge(self, call: Call) -> Judge:
        """The judge of the policy that is in force now; without one nothing is decided."""
        until = nested_deadline(call.deadline, deadline_after(call.now, ASK_MAX))
        judge = await self._keeper.current(until)
        if judge is None:
            call.note("init", "no policy")
            raise call.refuse(ReplyStatus.BUSY)
        return judge

    async def _decide(self, call: Call, op: str, ruling: Ruling, target: str) -> Decision:
        """Number, count and audit a decision."""
        self._numbers += 1
        self._decisions[ruling.verdict, ruling.reason] += 1
        generation = self._keeper.generation
        fields = {
            "op": op,
            "decision": ruling.verdict.name.lower(),
            "reason": ruling.reason.name.lower(),
            "subject": self._name_of(ruling.subject),
            "action": cut(ruling.action, ACTION_SIZE_MAX),
            "target": cut(target, TARGET_SIZE_MAX),
            "asked_by": self._name_of(call.sender.service),
            "generation": str(generation),
            "number": str(self._numbers),
            "trace": call.parent.trace.hex(),
        }
        denied = ruling.verdict is Verdict.DENY
        self._audit.put(
            fields,
            call.now,
            asker=call.sender.service,
            kind=Kind.RELOAD if op == OPS[Reload] and not denied else Kind.DECISION,
            number=self._numbers,
            denied=denied,
        )
        await self._audit.hurry(call.now)
        return Decision(ruling.verdict, ruling.reason, generation, self._numbers)

    def _name_of(self, service: ServiceId) -> str:
        judge = self._keeper.judge
        name = f"0x{service:016x}" if judge is None else judge.name_of(service)
        return cut(name, NAME_SIZE_MAX)

    def _denied(self, reason: Reason) -> int:
        return self._decisions[Verdict.DENY, reason]

    def _subjects(self) -> int:
        judge = self._keeper.judge
        return 0 if judge is None else len(judge.policy.allow)


OPS: Final[dict[type, str]] = {
    Check: "check",
    Route: "route",
    Exec: "exec",
    CheckFor: "check_for",
    Reload: "reload",
    ReloadBulk: "reload",
    GetCounts: "get_counts",
}
"""What the audit calls the requests."""
