"""The decisions of policyd as a service sees them: what is kept, for how long, and every denial."""

from collections.abc import Awaitable, Callable
from typing import Any, Final

import pytest

from nexus.abi import Nanos, Now, PolicyRead, SleepUntil, service_id
from nexus.ipc import Client, Context, Peers, Refused, RetryBudget, RouteFailure
from nexus.protocols.policyd import PROTOCOL, CheckFor, Decision, Reason, Verdict
from nexus.runtime import Authority, Call, Deferred, Outcome, Server
from nexus.runtime.authority import ASK_MAX, DECISIONS_MAX, RENEW_MAX, SILENCE_LEAST, SILENCE_MAX
from nexus.wire import HEADER_SIZE, ReplyStatus, answer, encode
from tests.fakes.adder import ADDER, Add, Sum
from tests.fakes.pair import FAR, SEED
from tests.fakes.policy import PolicySystem, policy_of

SECOND: Final = 1_000_000_000
SUBJECT: Final = service_id("other")
ALLOW: Final = Outcome(allowed=True, reason=Reason.POLICY)
DENY: Final = Outcome(allowed=False, reason=Reason.POLICY)
UNAVAILABLE: Final = Outcome(allowed=False, reason=Reason.UNAVAILABLE)
MESSAGES: Final = ("Call", "Send", "Recv", "ReplyRecv")


class FakePolicyd:
    """Answers CheckFor as it is told to; None leaves the question open."""

    def __init__(self) -> None:
        self.asked: list[CheckFor] = []
        self.contexts: list[Context] = []
        self.deadlines: list[Nanos] = []
        self.verdict = Verdict.ALLOW
        self.reason = Reason.POLICY
        self.generation: int | None = None
        self.silent = False
        self.refuses: ReplyStatus | None = None
        self.delay = 0
        self.open: list[Deferred] = []
        self.meanwhile: Callable[[], None] | None = None

    async def handle(self, call: Call, request: CheckFor) -> Decision | Deferred:
        self.asked.append(request)
        self.contexts.append(call.parent)
        self.deadlines.append(call.deadline)
        if self.silent:
            self.open.append(call.defer())
            return self.open[-1]
        if self.refuses is not None:
            raise call.refuse(self.refuses)
        if self.delay:
            _ = await SleepUntil(Nanos(call.now + self.delay))
        word = await PolicyRead()
        if self.meanwhile is not None:
            self.meanwhile()
        generation = word.generation if self.generation is None else self.generation
        return Decision(self.verdict, self.reason, generation, len(self.asked))


class Asking:
    """A task `app` with an Authority, and a policyd that does as it is told."""

    def __init__(self, *, policyd: bool = True) -> None:
        self.system = PolicySystem(policy_of({}), policyd=False)
        self.kernel = self.system.kernel
        self.policyd = FakePolicyd()
        self.lines: list[tuple[str, dict[str, Any]]] = []
        self.authority: Authority
        self.peers: Peers
        self._uses = policyd
        if policyd:
            self.start()

    def start(self) -> None:
        policyd = self.policyd
        self.system.start("policyd", lambda boot: Server(policyd, PROTOCOL, boot).run())

    def run(self, body: Callable[[Authority], Awaitable[Any]]) -> Any:
        async def main(peers: Peers) -> Any:
            async def connect(until: Nanos) -> Client | RouteFailure:
                budget = RetryBudget(attempts_max=9, backoff=Nanos(1_000_000), deadline=until)
                return await peers.connect("policyd", PROTOCOL, budget)

            self.peers = peers
            self.authority = Authority(connect if self._uses else None, self)  # type: ignore[arg-type]
            return await body(self.authority)

        return self.system.client(main)

    def write(
        self, _level: Any, text: str, fields: Any = None, *, scope: str | None = None
    ) -> bool:
        """As Logger.write."""
        self.lines.append((f"{scope}:{text}", dict(fields)))
        return True

    def messages(self) -> int:
        return sum(self.kernel.traps[name] for name in MESSAGES)


async def check(authority: Authority, right: str = "a", target: str = "t") -> Outcome:
    return await authority.check(SUBJECT, right, target, Nanos(await Now() + 10 * SECOND))


def test_a_decision_is_policyds_and_asked_for_the_subject() -> None:
    asking = Asking()

    outcome = asking.run(check)

    assert outcome == ALLOW
    assert asking.policyd.asked == [CheckFor(SUBJECT, "a", "t")]


def test_a_denial_is_kept_like_an_allow() -> None:
    asking = Asking()
    asking.policyd.verdict = Verdict.DENY

    outcomes = asking.run(lambda authority: _times(authority, 3))

    assert outcomes == [DENY] * 3
    assert len(asking.policyd.asked) == 1


def test_what_must_not_wait_for_policyd_is_done_before_it_is_asked_and_only_then() -> None:
    asking = Asking()
    asked_before: list[int] = []

    async def body(authority: Authority) -> None:
        async def before() -> None:
            asked_before.append(len(asking.policyd.asked))

        authority.before_asking = before
        for right in ("a", "a", "b", "a"):
            assert (await check(authority, right)).allowed

    asking.run(body)

    assert asked_before == [0, 1]


async def _times(authority: Authority, count: int) -> list[Outcome]:
    return [await check(authority) for _ in range(count)]


def test_a_kept_decision_costs_one_look_at_the_page_and_no_message() -> None:
    asking = Asking()

    async def body(authority: Authority) -> tuple[int, int, int]:
        _ = await check(authority)
        deadline = Nanos(await Now() + SECOND)
        messages = asking.messages()
        reads = asking.kernel.traps["PolicyRead"]
        traps = asking.kernel.traps.total()
        for _ in range(100):
            assert (await authority.check(SUBJECT, "a", "t", deadline)).allowed
        kernel = asking.kernel
        return (
            asking.messages() - messages,
            kernel.traps["PolicyRead"] - reads,
            kernel.traps.total() - traps,
        )

    messages, reads, traps = asking.run(body)

    assert messages == 0
    assert reads == traps == 100
    assert asking.authority.hits == 100


@pytest.mark.parametrize(
    ("subject", "right", "target"),
    [(service_id("app"), "a", "t"), (SUBJECT, "b", "t"), (SUBJECT, "a", "u")],
)
def test_what_is_kept_is_for_this_subject_right_and_target_only(
    subject: Any, right: str, target: str
) -> None:
    asking = Asking()

    async def body(authority: Authority) -> Outcome:
        assert (await check(authority)).allowed
        asking.policyd.verdict = Verdict.DENY
        return await authority.check(subject, right, target, FAR)

    assert asking.run(body) == DENY


def test_nothing_kept_survives_another_generation() -> None:
    asking = Asking()

    async def body(authority: Authority) -> Outcome:
        assert (await check(authority)).allowed
        asking.policyd.verdict = Verdict.DENY
        assert (await check(authority)).allowed, "kept"
        asking.system.raise_page(available=True)
        return await check(authority)

    assert asking.run(body) == DENY
    assert len(asking.policyd.asked) == 2


def test_a_decision_is_kept_for_the_generation_read_before_it_was_asked_for() -> None:
    asking = Asking()

    async def body(authority: Authority) -> Outcome:
        asking.policyd.meanwhile = lambda: asking.system.raise_page(available=True)
        assert (await check(authority)).allowed, "decided before the page was raised"
        asking.policyd.meanwhile = None
        asking.policyd.verdict = Verdict.DENY
        return await check(authority)

    assert asking.run(body) == DENY


def test_without_policyd_available_all_is_denied_at_once_and_nothing_is_sent() -> None:
    asking = Asking()

    async def body(authority: Authority) -> tuple[Outcome, Outcome, int, int]:
        assert (await check(authority)).allowed
        asking.system.raise_page(available=False)
        messages, begun = asking.messages(), await Now()
        kept = await check(authority)
        other = await check(authority, "b")
        return kept, other, asking.messages() - messages, await Now() - begun

    assert asking.run(body) == (UNAVAILABLE, UNAVAILABLE, 0, 0)


def test_an_unavailable_page_of_the_same_generation_keeps_nothing_either() -> None:
    asking = Asking()

    async def body(authority: Authority) -> Outcome:
        assert (await check(authority)).allowed
        asking.kernel.page = asking.kernel.page._replace(available=False)
        return await check(authority)

    assert asking.run(body) == UNAVAILABLE


def test_silence_is_a_denial_after_half_a_second_and_then_at_once_for_a_while() -> None:
    asking = Asking()
    asking.policyd.silent = True

    async def body(authority: Authority) -> list[tuple[Outcome, int]]:
        found = []
        for right in ("a", "a", "b"):
            begun = await Now()
            found.append((await check(authority, right), await Now() - begun))
        _ = await SleepUntil(Nanos(await Now() + SILENCE_MAX))
        begun = await Now()
        asking.policyd.silent = False
        found.append((await check(authority), await Now() - begun))
        return found

    first, second, third, last = asking.run(body)

    assert first == (UNAVAILABLE, ASK_MAX)
    assert second == third == (UNAVAILABLE, 0)
    assert last == (ALLOW, 0), "asked again: the silence is over"
    assert len(asking.policyd.asked) == 2


def test_a_changed_page_ends_the_silence() -> None:
    asking = Asking()
    asking.policyd.silent = True

    async def body(authority: Authority) -> Outcome:
        _ = await check(authority)
        asking.policyd.silent = False
        asking.system.raise_page(available=True)
        return await check(authority)

    assert asking.run(body) == ALLOW


def test_the_callers_deadline_holds_and_a_short_one_silences_nobody_else() -> None:
    asking = Asking()
    asking.policyd.delay = 20_000_000

    async def body(authority: Authority) -> tuple[Outcome, int, Outcome]:
        begun = await Now()
        short = Nanos(begun + SILENCE_LEAST // 10)
        first = await authority.check(SUBJECT, "a", "t", short)
        took = await Now() - begun
        return first, took, await check(authority, "b")

    first, took, second = asking.run(body)

    assert (first, took) == (UNAVAILABLE, SILENCE_LEAST // 10)
    assert second == ALLOW


def test_a_late_answer_is_not_taken_for_a_later_question() -> None:
    asking = Asking()
    asking.policyd.silent = True

    async def body(authority: Authority) -> tuple[Outcome, Outcome]:
        first = await check(authority)
        asking.policyd.open[0].reply(Decision(Verdict.ALLOW, Reason.POLICY, 1, 1))
        asking.policyd.silent = False
        asking.policyd.verdict = Verdict.DENY
        asking.system.raise_page(available=True)
        return first, await check(authority)

    assert asking.run(body) == (UNAVAILABLE, DENY)


@pytest.mark.parametrize("status", [ReplyStatus.BUSY, ReplyStatus.DENIED, ReplyStatus.MALFORMED])
def test_a_refused_question_is_a_denial(status: ReplyStatus) -> None:
    asking = Asking()
    asking.policyd.refuses = status

    assert asking.run(check) == UNAVAILABLE


@pytest.mark.parametrize(
    ("verdict", "reason", "generation"),
    [
        (Verdict.ALLOW, Reason.IDENTITY, None),
        (Verdict.ALLOW, Reason.UNAVAILABLE, None),
        (Verdict.ALLOW, Reason.POLICY, 0),
        (Verdict.DENY, Reason.UNAVAILABLE, None),
        (Verdict.DENY, Reason.MALFORMED, None),
    ],
)
def test_a_decision_that_cannot_be_is_no_decision(
    verdict: Verdict, reason: Reason, generation: int | None
) -> None:
    asking = Asking()
    asking.policyd.verdict, asking.policyd.reason = verdict, reason
    asking.policyd.generation = generation

    async def body(authority: Authority) -> tuple[Outcome, Outcome]:
        first = await check(authority)
        asking.policyd.verdict, asking.policyd.reason = Verdict.ALLOW, Reason.POLICY
        asking.policyd.generation = None
        _ = await SleepUntil(Nanos(await Now() + SILENCE_MAX))
        return first, await check(authority)

    assert asking.run(body) == (UNAVAILABLE, ALLOW)


@pytest.mark.parametrize("garbage", [b"", b"\xc1", encode(Sum(1)), b"\x94\x00\x00\x01\xff"])
def test_garbage_is_a_denial(garbage: bytes) -> None:
    asking = Asking(policyd=False)
    asking._uses = True
    codec = PROTOCOL.codecs[CheckFor]

    class Garbage(Server):
        def _framed(self, reply: Any) -> Any:
            return answer(self._call.message.data, ReplyStatus.OK, garbage)

    class Deferring(FakePolicyd):
        async def handle(self, call: Call, request: CheckFor) -> Any:
            return Sum(1)

    system = asking.system
    system.start("policyd", lambda boot: Garbage(Deferring(), PROTOCOL, boot).run())

    assert codec.reply_type is Decision
    assert asking.run(check) == UNAVAILABLE


def test_a_reply_of_somebody_else_is_not_the_answer() -> None:
    asking = Asking()
    asking.policyd.delay = SECOND // 10

    async def body(authority: Authority) -> Outcome:
        _ = await check(authority, "warm")
        asking.policyd.verdict = Verdict.DENY
        inbox = await asking.peers.inbox()
        app = next(task for task in asking.kernel.tasks if task.name == "app")
        endpoint = app.table[inbox].target
        for nonce in range(1, 60):
            codec = PROTOCOL.codecs[CheckFor]
            header = codec.reply_prefix + nonce.to_bytes(8, "little")
            frame = header + bytes(HEADER_SIZE - len(header))
            body_ = encode(Decision(Verdict.ALLOW, Reason.POLICY, 1, 1))
            forger = asking.kernel.task(f"forger{nonce}")
            forger.table.clear()
            asking.kernel.inject(forger, endpoint, frame + body_)
        return await check(authority)

    assert asking.run(body) == DENY


def test_policyd_that_is_not_there_is_a_denial_in_time() -> None:
    asking = Asking(policyd=False)
    asking._uses = True

    async def body(authority: Authority) -> tuple[Outcome, int]:
        begun = await Now()
        return await check(authority), await Now() - begun

    outcome, took = asking.run(body)

    assert outcome == UNAVAILABLE
    assert took <= ASK_MAX


def test_a_restarted_policyd_is_found_again() -> None:
    asking = Asking()

    async def body(authority: Authority) -> tuple[Outcome, Outcome, Outcome]:
        first = await check(authority)
        asking.system.kill("policyd")
        asking.system.raise_page(available=False)
        second = await check(authority)
        asking.start()
        asking.system.raise_page(available=True)
        return first, second, await check(authority)

    assert asking.run(body) == (ALLOW, UNAVAILABLE, ALLOW)


def test_a_question_cut_off_by_a_death_is_not_asked_again_while_policyd_is_not_available() -> None:
    asking = Asking()
    asking.policyd.silent = True

    async def body(authority: Authority) -> tuple[Outcome, int]:
        async def killer(_peers: Peers) -> None:
            _ = await SleepUntil(Nanos(await Now() + SECOND // 10))
            asking.system.kill("policyd")
            asking.system.raise_page(available=False)

        asking.system.add_client(killer, "killer")
        begun = await Now()
        return await check(authority), await Now() - begun

    outcome, took = asking.run(body)

    assert outcome == UNAVAILABLE
    assert SECOND // 10 <= took < SECOND // 10 + RENEW_MAX // 2, "nobody is waited for"


def test_a_question_cut_off_by_a_restart_is_asked_again() -> None:
    asking = Asking()
    asking.policyd.silent = True

    async def body(authority: Authority) -> Outcome:
        async def restarter(_peers: Peers) -> None:
            _ = await SleepUntil(Nanos(await Now() + SECOND // 10))
            asking.policyd.silent = False
            asking.system.kill("policyd")
            asking.start()

        asking.system.add_client(restarter, "restarter")
        return await check(authority)

    assert asking.run(body) == ALLOW


def test_a_service_that_uses_no_policyd_is_allowed_nothing() -> None:
    assert Asking(policyd=False).run(check) == UNAVAILABLE


def test_a_target_that_cannot_be_is_denied_without_a_question() -> None:
    asking = Asking()

    outcome = asking.run(lambda authority: check(authority, "a", 65 * "x"))

    assert outcome == Outcome(allowed=False, reason=Reason.MALFORMED)
    assert asking.policyd.asked == []


def test_the_cache_is_bounded_and_the_least_recently_used_gives_way() -> None:
    asking = Asking()

    async def body(authority: Authority) -> None:
        for number in range(DECISIONS_MAX):
            _ = await check(authority, "a", str(number))
        _ = await check(authority, "a", "0")
        _ = await check(authority, "a", "new")
        _ = await check(authority, "a", "0")
        assert len(asking.policyd.asked) == DECISIONS_MAX + 1, "0 was used lately and is kept"
        _ = await check(authority, "a", "1")

    asking.run(body)

    assert len(asking.policyd.asked) == DECISIONS_MAX + 2


def test_an_unavailable_decision_is_audited_by_who_denied_it() -> None:
    asking = Asking()
    asking.system.raise_page(available=False)

    asking.run(lambda authority: check(authority, "valve.open", "main"))

    ((where, fields),) = asking.lines
    assert where == "audit:audit"
    assert fields == {
        "op": "check",
        "decision": "deny",
        "reason": "unavailable",
        "subject": f"0x{SUBJECT:016x}",
        "action": "valve.open",
        "target": "main",
        "generation": 2,
        "number": 1,
    }


def test_what_policyd_decided_is_not_audited_twice() -> None:
    asking = Asking()
    asking.policyd.verdict = Verdict.DENY

    asking.run(check)

    assert asking.lines == []


def test_every_decision_is_counted() -> None:
    asking = Asking()

    async def body(authority: Authority) -> None:
        _ = await check(authority)
        _ = await check(authority)
        asking.policyd.verdict = Verdict.DENY
        _ = await check(authority, "b")
        asking.system.raise_page(available=False)
        _ = await check(authority)

    asking.run(body)

    assert asking.authority.facts() == {
        "authority_allowed_total": 2,
        "authority_denied_total": 2,
        "authority_hits_total": 1,
        "authority_unavailable_total": 1,
    }


# ------------------------------------------------------------------ require, in a service


class Guarded:
    """An adder that asks first."""

    def __init__(self, authority: Authority) -> None:
        self.authority = authority

    async def handle(self, call: Call, request: Add) -> Sum:
        await self.authority.require(call, "add.use", "adder")
        return Sum(request.a + request.b)


def guarded(verdict: Verdict) -> tuple[Asking, Any, Server]:
    """The outcome of an Add that `other` asks of the guarded adder."""
    asking = Asking()
    asking.policyd.verdict = verdict
    servers: list[Server] = []

    def run(boot: Any) -> Any:
        peers = Peers(boot, SEED)

        async def connect(until: Nanos) -> Client | RouteFailure:
            budget = RetryBudget(attempts_max=9, backoff=Nanos(1_000_000), deadline=until)
            return await peers.connect("policyd", PROTOCOL, budget)

        servers.append(Server(Guarded(Authority(connect, None)), ADDER, boot, peers.caller))
        return servers[0].run()

    asking.system.start("adder", run)

    async def body(peers: Peers) -> Any:
        budget = RetryBudget(attempts_max=9, backoff=Nanos(1_000_000), deadline=FAR)
        adder = await peers.connect("adder", ADDER, budget)
        assert isinstance(adder, Client)
        return await adder.call(Add(1, 2), Nanos(await Now() + SECOND // 4))

    return asking, asking.system.client(body, "other"), servers[0]


def test_require_lets_the_caller_of_the_request_through_if_it_may() -> None:
    asking, outcome, _ = guarded(Verdict.ALLOW)

    assert outcome == Sum(3)
    assert asking.policyd.asked == [CheckFor(service_id("other"), "add.use", "adder")]
    assert asking.policyd.deadlines[0] <= SECOND, "the deadline of the request being served"


def test_require_refuses_with_denied_and_notes_why() -> None:
    _, outcome, server = guarded(Verdict.DENY)

    assert outcome == Refused(ReplyStatus.DENIED)
    assert server.remarks[-1].notes == (("right", "add.use"), ("reason", "policy"))
