"""May the caller do that? Asked of policyd, kept as long as the policy page does not change.

    unknown --page says not available----------------> denied, unavailable; nothing is sent
    unknown --asked, answered in time----------------> known, for the generation read before asking
    unknown --asked; late, malformed, refused, gone--> denied, unavailable; nothing is kept
    known --the page's generation is another---------> unknown

A known decision costs one read of the page and no message. Silence is dear: after one, policyd is
not asked again until the page changes or SILENCE_MAX has passed, so that a frozen policyd costs a
service one wait and not one for each request. Whatever is not an answer is a denial.
"""

from collections.abc import Awaitable, Callable
from enum import IntEnum
from typing import Final, NamedTuple

from nexus.abi import Nanos, Now, PolicyRead, PolicyWord, ServiceId
from nexus.ipc import (
    CallFailure,
    Client,
    Context,
    Refused,
    RetryBudget,
    RouteFailure,
    TimedOut,
    deadline_after,
    may_repeat,
    nested_deadline,
    retry_until,
)
from nexus.log import Logger
from nexus.protocols.logd import Level
from nexus.protocols.policy import RIGHT_SIZE_MAX
from nexus.protocols.policyd import TARGET_SIZE_MAX, CheckFor, Decision, Reason, Verdict
from nexus.runtime.call import Call
from nexus.wire import ReplyStatus

DECISIONS_MAX: Final = 256  # kept; the least recently used one gives way
ASK_MAX: Final = Nanos(500_000_000)  # ns for one question (services.md 4: rngd's and keystored's)
ASK_ATTEMPTS_MAX: Final = 3  # of a question cut off by a restart of policyd, inside ASK_MAX
ASK_BACKOFF: Final = Nanos(5_000_000)  # ns before the second attempt
RENEW_MAX: Final = Nanos(40_000_000)  # ns to find a new instance; a restart takes longer
SILENCE_MAX: Final = Nanos(250_000_000)  # ns without questions after one that was not answered
SILENCE_LEAST: Final = Nanos(50_000_000)
"""ns that a question must have waited to tell of silence: shorter deadlines are the caller's, who
must not be able to stop the questions of others."""

AUDIT_SCOPE: Final = "audit"  # of the records that a service writes in policyd's place

assert SILENCE_LEAST <= ASK_MAX

Connect = Callable[[Nanos], Awaitable[Client | RouteFailure]]
"""Finds policyd, at most until the given time."""

BeforeAsking = Callable[[], Awaitable[object]]

Key = tuple[ServiceId, str, str]
"""Subject, right and target."""


class Outcome(NamedTuple):
    """Whether it is allowed, and why it was decided so."""

    allowed: bool
    reason: Reason


UNAVAILABLE: Final = Outcome(allowed=False, reason=Reason.UNAVAILABLE)
MALFORMED: Final = Outcome(allowed=False, reason=Reason.MALFORMED)


class Authority:
    """The decisions of policyd, as one service needs them.

    With `connect` None the service uses no policyd: everything is denied.
    """

    def __init__(self, connect: Connect | None, log: Logger | None) -> None:
        self._connect = connect
        self._log = log
        self._client: Client | None = None
        self._known: dict[Key, Outcome] = {}  # of generation _generation, the latest used last
        self._generation = 0
        self._silent: tuple[PolicyWord, Nanos] | None = None
        self._page = PolicyRead()
        self.before_asking: BeforeAsking | None = None
        """Done before policyd is asked: what must not wait for its answer."""
        self.allowed = 0
        self.denied = 0
        self.unavailable = 0  # of the denied ones
        self.hits = 0  # decided without a message

    def facts(self) -> dict[str, int]:
        """The counters, for the service's status."""
        return {
            "authority_allowed_total": self.allowed,
            "authority_denied_total": self.denied,
            "authority_hits_total": self.hits,
            "authority_unavailable_total": self.unavailable,
        }

    async def prepare(self, until: Nanos) -> bool:
        """Find policyd before somebody asks, so that the planned link exists; whether there is no
        more to do. A failure costs nothing: the first question looks again."""
        if self._connect is None:
            return True
        return isinstance(await self._found(self._connect, until), Client)

    async def require(
        self,
        call: Call,
        right: str,
        target: str = "",
        *,
        otherwise: IntEnum = ReplyStatus.DENIED,
    ) -> None:
        """Go on only if the caller of `call` may do `right` to `target`.

        Who that is, is the kernel's word. Raises the refusal with `otherwise` for every denial;
        the reason is noted with the call.
        """
        outcome = await self.check(call.sender.service, right, target, call.deadline, call.context)
        if not outcome.allowed:
            call.note("right", right)
            call.note("reason", outcome.reason.name.lower())
            raise call.refuse(otherwise)

    async def check(
        self,
        subject: ServiceId,
        right: str,
        target: str,
        deadline: Nanos,
        context: Context | None = None,
    ) -> Outcome:
        """The decision about a service. Never later than `deadline`, never than ASK_MAX from now.

        `subject` is an id the kernel stamped, and not one from a payload.
        """
        assert 1 <= len(right) <= RIGHT_SIZE_MAX, "the name of a right is a constant of ours"
        if len(target) > TARGET_SIZE_MAX:
            return self._counted(MALFORMED)  # the caller's word for it; there is no such thing
        word = await self._page
        key = (subject, right, target)
        outcome = self._recall(key, word)
        if outcome is None:
            if self.before_asking is not None:
                _ = await self.before_asking()
            outcome = await self._ask(key, word, deadline, context)
            if outcome is UNAVAILABLE:
                self._audit(key, word)
        return self._counted(outcome)

    def _recall(self, key: Key, word: PolicyWord) -> Outcome | None:
        """What is known under this word; None if policyd has to be asked."""
        if word.generation != self._generation or not word.available:
            self._known.clear()
            self._generation = word.generation
        outcome = self._known.pop(key, None)
        if outcome is not None:
            self._known[key] = outcome  # the latest used
            self.hits += 1
        return outcome

    def _keep(self, key: Key, word: PolicyWord, outcome: Outcome) -> None:
        """Keep a decision for the generation that was read before it was asked for."""
        assert word.generation == self._generation, "a task asks one question at a time"
        if len(self._known) >= DECISIONS_MAX:
            del self._known[next(iter(self._known))]
        self._known[key] = outcome

    async def _ask(
        self, key: Key, word: PolicyWord, deadline: Nanos, context: Context | None
    ) -> Outcome:
        if self._connect is None or not word.available:
            return UNAVAILABLE
        now = await Now()
        if self._is_silent(word, now):
            return UNAVAILABLE
        until = nested_deadline(deadline, deadline_after(now, ASK_MAX))
        answer = await self._decision(self._connect, CheckFor(*key), until, context)
        if isinstance(answer, Decision) and _makes_sense(answer, word):
            self._silent = None
            outcome = Outcome(answer.verdict is Verdict.ALLOW, answer.reason)
            self._keep(key, word, outcome)
            return outcome
        ends = await Now()
        if not _is_late(answer) or ends - now >= SILENCE_LEAST:
            self._silent = (word, deadline_after(ends, SILENCE_MAX))
        return UNAVAILABLE

    async def _decision(
        self, connect: Connect, request: CheckFor, until: Nanos, context: Context | None
    ) -> Decision | Refused | CallFailure | RouteFailure:
        client = await self._found(connect, until)
        if not isinstance(client, Client):
            return client
        budget = RetryBudget(attempts_max=ASK_ATTEMPTS_MAX, backoff=ASK_BACKOFF, deadline=until)

        async def attempt() -> Decision | Refused | CallFailure:
            if not client.peer.alive and not await self._renewed(client, until):
                return TimedOut()
            return await client.call(request, until, context)

        return await retry_until(attempt, may_repeat, budget, client.tokens)

    async def _found(self, connect: Connect, until: Nanos) -> Client | RouteFailure:
        """policyd's client, made once."""
        if self._client is None:
            found = await connect(until)
            if not isinstance(found, Client):
                return found
            self._client = found
        return self._client

    async def _renewed(self, client: Client, until: Nanos) -> bool:
        """Whether there is a way to policyd's new instance already; it is not waited for.

        It may be that init has not noticed the death, and the page still says available.
        """
        if not (await self._page).available:
            return False
        soon = deadline_after(await Now(), RENEW_MAX)
        return await client.renew(nested_deadline(until, soon)) is None

    def _is_silent(self, word: PolicyWord, now: Nanos) -> bool:
        """Whether policyd left a question open a moment ago, and nothing has changed since."""
        return self._silent is not None and self._silent[0] == word and now < self._silent[1]

    def _counted(self, outcome: Outcome) -> Outcome:
        if outcome.allowed:
            self.allowed += 1
        else:
            self.denied += 1
            self.unavailable += outcome.reason is Reason.UNAVAILABLE
        return outcome

    def _audit(self, key: Key, word: PolicyWord) -> None:
        """policyd knows nothing of this denial: the record is ours to write."""
        if self._log is None:
            return
        subject, right, target = key
        fields: dict[str, str | int] = {
            "op": "check",
            "decision": "deny",
            "reason": Reason.UNAVAILABLE.name.lower(),
            "subject": f"0x{subject:016x}",
            "action": right,
            "target": target,
            "generation": word.generation,
            "number": self.unavailable + 1,
        }
        _ = self._log.write(Level.WARN, "audit", fields, scope=AUDIT_SCOPE)


def _makes_sense(decision: Decision, word: PolicyWord) -> bool:
    """Whether policyd can have decided so: under no older policy, and an ALLOW by policy only."""
    if decision.generation < word.generation:
        return False
    if decision.verdict is Verdict.ALLOW:
        return decision.reason is Reason.POLICY
    return decision.reason in (Reason.POLICY, Reason.IDENTITY)


def _is_late(answer: object) -> bool:
    """Whether the time was over, rather than the answer no answer."""
    return isinstance(answer, TimedOut | Refused)
