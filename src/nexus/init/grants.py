"""Grants are decided before a service starts: each device, port, socket and secret of its entry.

With a policy service in the system it is asked, by init as proxy, one grant at a time; without
one init decides from the policy itself, and so it does for the policy service. Before the first
of all, init asks for something that must be denied: a policyd that allows it, errs or is silent
is said, not trusted.

    allowed --every device is what the bus map says (`bus`)--> granted
    granted --a new policy without its right--> killed in the same step of init --> decided anew:
                                                 denied, FAILED until a policy allows it again
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from nexus.abi import (
    HardwareKind,
    Nanos,
    SecretBackend,
    StreamGrant,
    StreamRole,
    service_id,
)
from nexus.init.plan import PlannedService
from nexus.init.reasons import Reason
from nexus.init.record import Record
from nexus.protocols.init import Health, TaskState
from nexus.protocols.policyd import (
    TARGET_SIZE_MAX,
    CheckFor,
    Counts,
    Decision,
    GetCounts,
    Verdict,
)
from nexus.protocols.policyd import Reason as Why

if TYPE_CHECKING:
    from nexus.init.supervisor import Supervisor

DECISION_MAX: Final = Nanos(1_000_000_000)  # ns; no answer by then is none (ladder 48)
MMIO_RIGHTS: Final = {
    HardwareKind.BLOCK: "device.mmio.blk",
    HardwareKind.ENTROPY: "device.mmio.rng",
    HardwareKind.EMPTY: "device.mmio.empty",
}
SECRET_RIGHTS: Final = {SecretBackend.FILE: "secret.file", SecretBackend.KEYRING: "secret.keyring"}
DENIED_SUBJECT: Final = "timed"  # has no device, in no system
DENIED_RIGHT: Final = MMIO_RIGHTS[HardwareKind.BLOCK]
DENIED_TARGET: Final = "window blk"


class Wanted(NamedTuple):
    """A right that a grant needs, and what it is granted for."""

    right: str
    target: str


class Decided(NamedTuple):
    """A decision about a grant: None is that there was none."""

    service: str
    right: str
    target: str
    allowed: bool | None

    @property
    def row(self) -> list[str]:
        """For evidence."""
        word = {True: "allow", False: "deny", None: "none"}[self.allowed]
        return [self.service, self.right, self.target, word]


@dataclass(slots=True)
class Deciding:
    """The grants of one service that is to start: those still to be decided, and the others."""

    record: Record
    left: list[Wanted]
    decided: list[Decided] = field(default_factory=list)


def wanted_by(planned: PlannedService) -> list[Wanted]:
    """The rights a service needs for what the plan grants it."""
    grants = planned.grants
    wanted = [Wanted(f"port.{name}", name) for name in grants.ports]
    wanted += [_wanted_by_stream(each) for each in grants.stream_ports]
    wanted += [Wanted(f"device.{each.name}", each.path) for each in grants.devices]
    wanted += [
        Wanted(f"net.listen.{each.name}", f"{each.address} {each.port}") for each in grants.listen
    ]
    wanted += [Wanted("net.connect", f"tcp {port}") for port in grants.connect]
    wanted += [Wanted(MMIO_RIGHTS[each.kind], f"window {each.name}") for each in grants.hardware]
    if grants.secret:
        wanted.append(Wanted(SECRET_RIGHTS[grants.secret], f"secret of {planned.name}"))
    return [Wanted(right, target[:TARGET_SIZE_MAX]) for right, target in wanted]


def _wanted_by_stream(grant: StreamGrant) -> Wanted:
    if grant.role is StreamRole.UNIX:
        return Wanted(f"port.stream.{grant.name}", f"unix {grant.name}")
    where = f"tcp {grant.address} {grant.port}"
    word = "dial" if grant.role is StreamRole.DIAL else "stream"
    return Wanted(f"port.{word}.{grant.name}", where)


class Grants:
    """The decisions about grants."""

    def __init__(self, init: "Supervisor") -> None:
        self._init = init
        self._deciding: dict[str, Deciding] = {}
        self._decided: dict[str, list[Decided]] = {}  # of the latest start of each service
        self._has_asked = False
        plan = init.plan
        self.is_checked = plan.policyd is None or DENIED_SUBJECT not in plan.by_name
        """Whether the question that must be denied is over."""

    @property
    def rows(self) -> list[list[str]]:
        """Every decided grant, as evidence, in the order of the plan."""
        return [each.row for name in self._init.records for each in self._decided.get(name, ())]

    @property
    def count(self) -> int:
        """How many grants are decided."""
        return sum(len(decided) for decided in self._decided.values())

    # ------------------------------------------------------------------ before a start

    async def decide(self, record: Record) -> None:
        """Start the service, once all its grants are decided and none is denied."""
        record.due = None
        if record.name in self._deciding:
            return
        record.first_started = record.first_started or self._init.now
        self._deciding[record.name] = Deciding(record, wanted_by(record.planned))
        await self._go_on(self._deciding[record.name])

    async def _go_on(self, deciding: Deciding) -> None:
        """Decide what can be decided at once; the answer to a question goes on here."""
        record = deciding.record
        if self._deciding.get(record.name) is not deciding:
            return  # it is being stopped meanwhile
        policyd = self._init.authority.policyd
        while deciding.left:
            wanted = deciding.left.pop(0)
            if policyd is None or record is policyd:
                allowed = self._init.authority.may(record, wanted.right, target=wanted.target)
                deciding.decided.append(Decided(record.name, *wanted, allowed))
            elif await self._ask(policyd, deciding, wanted):
                return
            else:
                deciding.decided.append(Decided(record.name, *wanted, None))
        await self._end(deciding)

    async def _ask(self, policyd: Record, deciding: Deciding, wanted: Wanted) -> bool:
        name = deciding.record.name

        async def on_decision(reply: Any, _nonce: int) -> None:
            allowed = reply.verdict is Verdict.ALLOW if isinstance(reply, Decision) else None
            deciding.decided.append(Decided(name, *wanted, allowed))
            await self._go_on(deciding)

        deadline = Nanos(self._init.now + DECISION_MAX)
        question = CheckFor(deciding.record.planned.service, wanted.right, wanted.target)
        return self._init.authority.is_available and await self._init.ask(
            policyd, question, deadline, on_decision
        )

    async def _end(self, deciding: Deciding) -> None:
        """Everything is decided: start, or say why not."""
        record = deciding.record
        del self._deciding[record.name]
        self._decided[record.name] = deciding.decided
        denied = [each.row for each in deciding.decided if each.allowed is False]
        if denied:
            record.state = TaskState.FAILED
            record.reason = Reason.DENIED
            await self._say_not_started(record, denied)
            if await self._init.launches.on_no_start(record):
                self._init.launches.note_denied(record)
        elif any(each.allowed is None for each in deciding.decided):
            open_rows = [each.row for each in deciding.decided if each.allowed is None]
            await self._say_not_started(record, open_rows, reason=Reason.UNDECIDED)
            await self._init.groups.on_no_start(record, Reason.UNDECIDED)
        else:
            await self._start(record)

    async def _start(self, record: Record) -> None:
        """Start the service if its devices are what the plan says, else try again later."""
        found = await self._init.bus.find(record.planned)
        if not found.wrong:
            await self._init.instances.start(record, found)
            return
        await self._init.say(
            f"init: no start of {record.name}",
            reason=Reason.DEVICE,
            why=", ".join(f"device {name}: {problem}" for name, problem in found.wrong),
            devices=found.wrong,
        )
        await self._init.groups.on_no_start(record, Reason.DEVICE)

    def cancel(self, record: Record) -> None:
        """The service is to be stopped: it does not start, whatever is answered."""
        _ = self._deciding.pop(record.name, None)

    async def _say_not_started(
        self, record: Record, rows: list[list[str]], *, reason: Reason = Reason.DENIED
    ) -> None:
        await self._init.say(f"init: no start of {record.name}", reason=reason, grants=rows)

    async def on_policy(self) -> None:
        """There is a new policy: whatever the old one decided about grants is decided again.

        An instance that holds one whose right is gone ends at once, for what it has open cannot be
        taken from it; its next start is decided like any other.
        """
        for record in self._init.records.values():
            if record.state is TaskState.FAILED and record.reason == Reason.DENIED:
                if self._init.is_safe and not record.planned.safe:
                    record.state = TaskState.LEFT_OUT  # like the others, until safe mode is left
                    continue
                record.state = TaskState.BACKING_OFF
                record.due = self._init.now
            elif record.name in self._deciding:
                self.cancel(record)  # an answer that is on its way is one about the old policy
                record.due = self._init.now
            elif record.lives and record.leaving is None and not record.kill_reason:
                await self._revoke(record)

    async def _revoke(self, record: Record) -> None:
        """End the instance if the policy no longer allows all it was granted; and say it."""
        may = self._init.authority.may
        lost = [
            wanted
            for wanted in wanted_by(record.planned)
            if not may(record, wanted.right, target=wanted.target)
        ]
        if lost:
            await self._init.say(f"init: grants of {record.name} revoked", grants=lost)
            await self._init.kill(record, Reason.REVOKED)

    # ------------------------------------------------------------------ what must be denied

    async def on_time(self) -> None:
        """Ask, as soon as policyd can be asked, what it must deny; say it if it cannot be."""
        if self.is_checked or self._has_asked or self._init.is_going_down:
            return
        policyd = self._init.authority.policyd
        assert policyd is not None, "without it there is nothing to check"
        if policyd.health is Health.OK:
            self._has_asked = True
            await _Denial(self._init, policyd, self._on_checked).begin()
        elif policyd.is_settled or policyd.is_out or not self._is_started(policyd):
            self.is_checked = True  # nobody answers, so nothing is allowed either
            await self._init.say("init: mmio policy not asked", error="policyd is not ready")

    def _is_started(self, record: Record) -> bool:
        """Whether its turn comes at all."""
        return any(planned is record.planned for planned in self._init.start_list())

    async def _on_checked(self, evidence: dict[str, Any]) -> None:
        self.is_checked = True
        if self._init.is_going_down:
            return
        fault = evidence.get("error")
        line = "init: mmio policy deny " + ("ok" if fault is None else f"FAIL {fault}")
        await self._init.say(line, grants=self.count, **evidence)


class _Denial:
    """Three questions in a row: the counters, the one that must be denied, the counters."""

    def __init__(
        self,
        init: "Supervisor",
        policyd: Record,
        on_end: Callable[[dict[str, Any]], Awaitable[None]],
    ) -> None:
        self._init = init
        self._policyd = policyd
        self._on_end = on_end
        self._evidence: dict[str, Any] = {
            "subject": DENIED_SUBJECT,
            "right": DENIED_RIGHT,
            "target": DENIED_TARGET,
        }
        self._asked = init.now

    async def begin(self) -> None:
        await self._ask(GetCounts(), self._on_before)

    async def _ask(self, request: Any, done: Callable[[Any, int], Awaitable[None]]) -> None:
        deadline = Nanos(self._init.now + DECISION_MAX)
        if not await self._init.ask(self._policyd, request, deadline, done):
            await self._fail(f"{self._policyd.name} could not be asked")

    async def _fail(self, error: str) -> None:
        await self._on_end({**self._evidence, "error": error})

    async def _on_before(self, counts: Any, _nonce: int) -> None:
        if not isinstance(counts, Counts):
            await self._fail("no counters")
            return
        self._evidence["denied_before"] = counts.denied_policy
        self._asked = self._init.now
        question = CheckFor(service_id(DENIED_SUBJECT), DENIED_RIGHT, DENIED_TARGET)
        await self._ask(question, self._on_decision)

    async def _on_decision(self, decision: Any, nonce: int) -> None:
        if not isinstance(decision, Decision):
            await self._fail("no decision")
            return
        self._evidence |= {
            "nonce": nonce,
            "decision": decision.verdict.name.lower(),
            "reason": decision.reason.name.lower(),
            "took_ns": self._init.now - self._asked,
        }
        if decision.verdict is not Verdict.DENY or decision.reason is not Why.POLICY:
            await self._fail(f"{self._evidence['decision']}, {self._evidence['reason']}")
            return
        await self._ask(GetCounts(), self._on_after)

    async def _on_after(self, counts: Any, _nonce: int) -> None:
        if not isinstance(counts, Counts):
            await self._fail("no counters")
            return
        self._evidence["denied_after"] = counts.denied_policy
        await self._on_end(self._evidence)
