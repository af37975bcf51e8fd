"""policyd between a fake init and a fake logd: what it decides, counts, audits and survives."""

from collections import Counter
from collections.abc import Callable
from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nexus.abi import INIT_NAME, Nanos, Now, Recv, Send, SleepUntil, service_id
from nexus.ipc import Client, Peers, Refused, RetryBudget, TimedOut, offer_bulk
from nexus.protocols.init import InitStatus
from nexus.protocols.logd import Level, LogdStatus
from nexus.protocols.meta import GetStatus, Health, ServiceStatus
from nexus.protocols.policy import DELEGATE, EXEC_RIGHT, RELOAD, ROUTE_RIGHT, Policy
from nexus.protocols.policyd import (
    PROTOCOL,
    Check,
    CheckFor,
    Counts,
    Decision,
    Exec,
    GetCounts,
    PolicydStatus,
    Reason,
    Reload,
    ReloadBulk,
    Reloaded,
    Route,
    Verdict,
)
from nexus.services.policyd.audit import POSTS_MAX, cut
from nexus.services.policyd.judge import Judge
from nexus.services.policyd.shares import (
    MALFORMED,
    PLACES_DEFAULT,
    RATE_DEFAULT,
    RELOADS,
)
from nexus.wire import HEADER_SIZE, ReplyStatus, status_of
from tests.fakes.policy import SERVICES, PolicySystem, policy_of

FAR: Final = Nanos(30_000_000_000)
SECOND: Final = 1_000_000_000
LONG_TARGET: Final = 64 * "\u00fc"
BASE: Final = {
    "app": ["proof.probe", ROUTE_RIGHT, EXEC_RIGHT],
    "other": [],
    "keystored": [DELEGATE, "crypto.sign"],
    "policyd": ["policy.authority"],
    "statefsd": [RELOAD, DELEGATE],
}


def system_of(rights: dict[str, list[str]] = BASE, **options: Any) -> PolicySystem:
    routes = options.pop("routes", None)
    return PolicySystem(policy_of(rights, routes=routes), **options)


async def bound(peers: Peers) -> Client:
    budget = RetryBudget(attempts_max=3, backoff=Nanos(1_000_000), deadline=FAR)
    found = await peers.connect("policyd", PROTOCOL, budget)
    assert isinstance(found, Client), found
    return found


def ask(system: PolicySystem, *requests: Any, name: str = "app") -> list[Any]:
    """The outcomes of requests made by the service `name`, one after the other."""

    async def body(peers: Peers) -> list[Any]:
        policyd = await bound(peers)
        return [await policyd.call(request, FAR) for request in requests]

    return list(system.client(body, name))


def counts(system: PolicySystem) -> Counts:
    (found,) = ask(system, GetCounts(), name="other")
    assert isinstance(found, Counts)
    assert (
        found.allowed + found.denied_policy + found.denied_identity
        == found.audited + found.audit_dropped + found.audit_waiting
    )
    return found


def wait(system: PolicySystem, span: int) -> None:
    """Let everybody work for a while."""

    async def body(_peers: Peers) -> None:
        _ = await SleepUntil(Nanos(await Now() + span))

    system.client(body, "other")


def numbers(first: int, last: int) -> list[str]:
    return [str(number) for number in range(first, last + 1)]


def verdict_of(outcome: object) -> tuple[Verdict, Reason]:
    assert isinstance(outcome, Decision), outcome
    return outcome.verdict, outcome.reason


ALLOWED: Final = (Verdict.ALLOW, Reason.POLICY)
DENIED: Final = (Verdict.DENY, Reason.POLICY)
FOREIGN: Final = (Verdict.DENY, Reason.IDENTITY)


# ------------------------------------------------------------------ decisions


def test_what_the_policy_lists_is_allowed_and_nothing_else_is() -> None:
    system = system_of()

    outcomes = ask(system, Check("proof.probe", "x"), Check("crypto.sign", "x"))

    assert [verdict_of(each) for each in outcomes] == [ALLOWED, DENIED]


def test_a_service_without_an_entry_has_no_right() -> None:
    system = system_of()

    assert verdict_of(*ask(system, Check("proof.probe", ""), name="logd")) == DENIED


def test_a_right_that_is_bound_allows_its_target_alone() -> None:
    rights = {"app": ["ipc.core", "statefs.write:/state/app/", "port.open:door", "port.open:gate"]}
    targets = ("/state/app/", "/state/app/key", "/state/app", "/state/apple/", "/state/", "")
    system = PolicySystem(policy_of(rights))

    writes = ask(system, *(Check("statefs.write", target) for target in targets))
    opens = ask(system, *(Check("port.open", name) for name in ("door", "gate", "doors", "")))

    assert [verdict_of(each) for each in writes] == [ALLOWED] * 2 + [DENIED] * 4
    assert [verdict_of(each) for each in opens] == [ALLOWED] * 2 + [DENIED] * 2


def test_the_subject_of_a_check_is_the_sender_and_not_who_holds_the_right() -> None:
    system = system_of()

    assert verdict_of(*ask(system, Check("proof.probe", ""), name="other")) == DENIED


def test_a_sender_that_init_never_issued_is_denied_for_its_identity() -> None:
    system = system_of({**BASE, "ghost": ["proof.probe"]})

    assert verdict_of(*ask(system, Check("proof.probe", ""), name="ghost")) == FOREIGN


def test_decisions_are_numbered_from_one_and_carry_the_generation_of_the_page() -> None:
    system = system_of()

    first, second = ask(system, Check("proof.probe", ""), Check("no", ""))
    system.raise_page(available=True)
    (third,) = ask(system, Check("proof.probe", ""))

    assert [(d.number, d.generation) for d in (first, second, third)] == [(1, 1), (2, 1), (3, 2)]


@pytest.mark.parametrize(
    ("request_", "sender", "expected"),
    [
        (Route("app", "logd"), "app", ALLOWED),
        (Route("other", "logd"), "other", DENIED),
        (Route("app", "logd"), "other", FOREIGN),
        (Route("keystored", "logd"), "app", FOREIGN),
        (Route("app", "logd"), INIT_NAME, ALLOWED),
        (Route("other", "logd"), INIT_NAME, DENIED),
        (Route("ghost", "logd"), INIT_NAME, FOREIGN),
        (Route("\u00e4pp", "logd"), INIT_NAME, FOREIGN),
        (Route("app", "statefsd"), "app", DENIED),
        (Exec("app", "demo"), "app", ALLOWED),
        (Exec("other", "demo"), "other", DENIED),
        (Exec("app", "demo"), "other", FOREIGN),
        (Exec("app", "demo"), INIT_NAME, ALLOWED),
        (Exec("ghost", "demo"), INIT_NAME, FOREIGN),
    ],
)
def test_a_named_requester_is_the_sender_or_init_speaks_for_it(
    request_: Any, sender: str, expected: tuple[Verdict, Reason]
) -> None:
    judge = Judge(policy_of(BASE, routes={"statefsd": "route.statefsd"}))

    if isinstance(request_, Route):
        ruling = judge.route(service_id(sender), request_.requester, request_.target)
    else:
        ruling = judge.exec(service_id(sender), request_.requester, request_.program)

    assert (ruling.verdict, ruling.reason) == expected


def test_route_and_exec_are_decided_over_the_wire_as_the_judge_says() -> None:
    system = system_of(routes={"statefsd": "route.statefsd"})

    outcomes = ask(
        system,
        Route("app", "logd"),
        Route("app", "statefsd"),
        Route("keystored", "logd"),
        Exec("app", "demo"),
        Exec("keystored", "demo"),
    )

    assert [verdict_of(each) for each in outcomes] == [ALLOWED, DENIED, FOREIGN, ALLOWED, FOREIGN]


def test_a_target_with_a_right_of_its_own_needs_both() -> None:
    rights = {"app": [ROUTE_RIGHT, "route.statefsd"], "other": ["route.statefsd"]}
    judge = Judge(policy_of(rights, routes={"statefsd": "route.statefsd"}))

    allowed = judge.route(service_id("app"), "app", "statefsd")
    denied = judge.route(service_id("other"), "other", "statefsd")

    assert (allowed.verdict, allowed.action) == (Verdict.ALLOW, "route.statefsd")
    assert (denied.verdict, denied.action) == (Verdict.DENY, ROUTE_RIGHT)


def test_only_a_holder_of_policy_delegate_or_init_asks_for_others() -> None:
    system = system_of()
    request = CheckFor(service_id("app"), "proof.probe", "x")

    by_delegate = ask(system, request, name="keystored")
    by_other = ask(system, request, name="other")
    by_itself = ask(system, request, name="app")
    by_init = Judge(policy_of(BASE)).check_for(
        service_id(INIT_NAME), service_id("app"), "proof.probe", ""
    )

    assert verdict_of(*by_delegate) == ALLOWED
    assert verdict_of(*by_other) == FOREIGN
    assert verdict_of(*by_itself) == FOREIGN, "it may ask for itself with Check"
    assert by_init.verdict is Verdict.ALLOW


def test_an_id_that_init_never_issued_stands_for_nobody() -> None:
    system = system_of()
    alias = 0xE34FD9BEF149D9DE  # keystored's alias in the reference system

    outcomes = ask(
        system,
        CheckFor(alias, "crypto.sign", ""),
        CheckFor(service_id("keystored"), "crypto.sign", ""),
        CheckFor(0, "crypto.sign", ""),
        name="keystored",
    )

    assert [verdict_of(each) for each in outcomes] == [FOREIGN, ALLOWED, FOREIGN]


def test_another_instance_of_a_service_is_the_same_subject() -> None:
    system = system_of()

    first = ask(system, Check("proof.probe", ""))
    second = ask(system, Check("proof.probe", ""))

    assert system.kernel.generations["app"] == 2
    assert verdict_of(*first) == verdict_of(*second) == ALLOWED


NAMES: Final = ("app", "other", "keystored", "ghost", INIT_NAME)
NAMED: Final = (DELEGATE, ROUTE_RIGHT, EXEC_RIGHT, RELOAD, "a", "b")
TARGETS: Final = ("", "app", "/x/", "/x/y", "/x/y/z", "/xy/", "/")
RIGHTS: Final = (
    *NAMED,
    *(
        f"{name}:{target}"
        for name in ("a", DELEGATE, ROUTE_RIGHT, RELOAD)
        for target in TARGETS[1:]
    ),
)
POLICIES: Final = st.builds(
    policy_of,
    st.dictionaries(
        st.sampled_from(NAMES), st.lists(st.sampled_from(RIGHTS), unique=True, max_size=6)
    ),
    services=st.lists(st.sampled_from(NAMES[:3]), unique=True),
    routes=st.dictionaries(st.sampled_from(NAMES), st.sampled_from(NAMED), max_size=3),
)


def held_by(policy: Policy, subject: str, target: str) -> set[str]:
    """The reference: the names of the rights that somebody holds to do something to `target`."""
    above = {"", target, *(target[: at + 1] for at, each in enumerate(target) if each == "/")}
    return {right.name for right in policy.allow.get(subject, ()) if right.target in above}


def modelled(
    policy: Policy, subject: str, rights: list[str], target: str, *, bound_to: bool
) -> object:
    """The reference: who is not issued or not bound is foreign; else it needs every right."""
    if not bound_to or subject not in (*policy.services, INIT_NAME):
        return FOREIGN
    return ALLOWED if held_by(policy, subject, target).issuperset(rights) else DENIED


@given(
    policy=POLICIES,
    sender=st.sampled_from(NAMES),
    named=st.sampled_from(NAMES),
    right=st.sampled_from(NAMED),
    target=st.sampled_from(TARGETS),
)
def test_decisions_equal_the_reference_model(
    policy: Policy, sender: str, named: str, right: str, target: str
) -> None:
    judge = Judge(policy)
    who, whom = service_id(sender), service_id(named)
    issued = (*policy.services, INIT_NAME)
    delegates = sender == INIT_NAME or (
        sender in issued and DELEGATE in held_by(policy, sender, "")
    )
    speaks = sender in (named, INIT_NAME)
    needed = [ROUTE_RIGHT, *([policy.routes["app"]] if "app" in policy.routes else [])]

    found = {
        "check": judge.check(who, right, target),
        "check_for": judge.check_for(who, whom, right, target),
        "route": judge.route(who, named, "app"),
        "exec": judge.exec(who, named, target),
        "reload": judge.reload(who),
    }

    assert {op: (each.verdict, each.reason) for op, each in found.items()} == {
        "check": modelled(policy, sender, [right], target, bound_to=True),
        "check_for": modelled(policy, named, [right], target, bound_to=delegates),
        "route": modelled(policy, named, needed, "app", bound_to=speaks),
        "exec": modelled(policy, named, [EXEC_RIGHT], target, bound_to=speaks),
        "reload": ALLOWED
        if sender == INIT_NAME
        else modelled(policy, sender, [RELOAD], "", bound_to=True),
    }


# ------------------------------------------------------------------ malformed requests


def raw(system: PolicySystem, change: Callable[[bytes], bytes]) -> bytes:
    """The answer to a Check whose frame was changed on its way."""

    async def body(peers: Peers) -> bytes:
        policyd = await bound(peers)
        codec = PROTOCOL.codecs[Check]
        header = codec.prefix + (7).to_bytes(8, "little") + int(FAR).to_bytes(8, "little")
        frame = header + bytes(range(24)) + b"\x92\xa1a\xa1b"
        await Send(policyd.peer.slot, change(frame))
        message = await Recv((policyd.peer.inbox,), FAR, link=policyd.peer.link)
        return message.data

    data: bytes = system.client(body)
    return data


def test_a_malformed_request_is_refused_as_such_counted_and_audited_and_is_no_decision() -> None:
    system = system_of()
    before = counts(system)

    reply = raw(system, lambda frame: frame + b"\0")
    wait(system, SECOND)
    after = counts(system)

    assert status_of(reply) == ReplyStatus.MALFORMED
    assert len(reply) == HEADER_SIZE
    assert after.malformed == before.malformed + 1
    assert (after.allowed, after.denied_policy, after.denied_identity) == (0, 0, 0)
    assert after.audited == 0, "malformed is counted in none of the four"
    (audit,) = system.logd.audits()
    assert (audit["reason"], audit["decision"], audit["op"]) == ("malformed", "deny", "check")
    assert (audit["subject"], audit["asked_by"]) == ("app", "app")


def test_the_untouched_frame_of_that_test_is_answered() -> None:
    reply = raw(system_of(), lambda frame: frame)

    assert status_of(reply) == ReplyStatus.OK


def test_a_frame_of_another_version_is_unsupported_and_not_malformed() -> None:
    system = system_of()

    reply = raw(system, lambda frame: frame[:1] + b"\x09" + frame[2:])

    assert status_of(reply) == ReplyStatus.UNSUPPORTED
    assert counts(system).malformed == 0


# ------------------------------------------------------------------ the audit


def test_each_decision_is_audited_with_all_its_words() -> None:
    system = system_of()

    ask(system, Check("proof.probe", "valve"))
    ask(system, CheckFor(0x1234, "crypto.sign", "key"), name="keystored")
    wait(system, SECOND)

    audits = system.logd.audits()
    traces = [bytes.fromhex(audit.pop("trace")) for audit in audits]
    assert len(set(traces)) == 2, "each question has its own"
    assert {len(trace) for trace in traces} == {16}
    assert audits == [
        {
            "op": "check",
            "decision": "allow",
            "reason": "policy",
            "subject": "app",
            "action": "proof.probe",
            "target": "valve",
            "asked_by": "app",
            "generation": "1",
            "number": "1",
        },
        {
            "op": "check_for",
            "decision": "deny",
            "reason": "identity",
            "subject": "0x0000000000001234",
            "action": "crypto.sign",
            "target": "key",
            "asked_by": "keystored",
            "generation": "1",
            "number": "2",
        },
    ]
    assert {(each.scope, each.text) for each in system.logd.records} == {("policyd.audit", "audit")}
    assert counts(system).audited == 2


def test_the_answer_does_not_wait_for_the_audit() -> None:
    system = system_of()
    system.logd.silent = True

    async def body(peers: Peers) -> tuple[Any, int]:
        policyd = await bound(peers)
        begun = await Now()
        outcomes = [await policyd.call(Check("proof.probe", ""), FAR) for _ in range(40)]
        return outcomes[-1], await Now() - begun

    outcome, took = system.client(body)

    assert verdict_of(outcome) == ALLOWED
    assert took == 0, "the clock moves only when everybody waits"


def test_an_audit_is_in_logds_queue_before_the_answer_is_read() -> None:
    system = system_of()
    ask(system, Check("proof.probe", "first"))
    wait(system, SECOND)

    async def body(peers: Peers) -> None:
        policyd = await bound(peers)
        _ = await policyd.call(Check("proof.probe", "last"), FAR)
        system.kill("policyd")

    system.client(body)
    system.kernel.settle()

    assert [each["target"] for each in system.logd.audits()] == ["first", "last"]


def test_audits_wait_for_logd_and_none_is_lost_when_it_comes() -> None:
    system = system_of()
    system.keeper.down.add("logd")

    ask(system, *(Check("proof.probe", str(number)) for number in range(20)))
    wait(system, SECOND)
    waiting = counts(system)
    system.keeper.down.clear()
    wait(system, 5 * SECOND)

    assert (waiting.audited, waiting.audit_waiting, waiting.audit_dropped) == (0, 20, 0)
    assert [each["number"] for each in system.logd.audits()] == [str(n) for n in range(1, 21)]
    assert (counts(system).audited, counts(system).audit_waiting) == (20, 0)


def test_what_does_not_fit_is_counted_and_told_by_a_sum() -> None:
    system = system_of(settings={"audit_rate": 1000})
    system.keeper.down.add("logd")

    ask(system, *(Check("proof.probe", "") for _ in range(PLACES_DEFAULT + 4)), Check("no", ""))
    full = counts(system)
    system.keeper.down.clear()
    wait(system, 5 * SECOND)
    ask(system, Check("proof.probe", "last"))
    wait(system, SECOND)

    assert (full.audit_waiting, full.audit_dropped) == (PLACES_DEFAULT, 5)
    assert counts(system).audited == PLACES_DEFAULT + 1
    audits = system.logd.audits()
    assert [each["number"] for each in audits[:-2]] == numbers(1, PLACES_DEFAULT)
    assert audits[-2] == {
        "op": "suppressed",
        "asked_by": "app",
        "count": "5",
        "first": str(PLACES_DEFAULT + 1),
        "last": str(PLACES_DEFAULT + 5),
        "allowed": "4",
        "denied": "1",
    }
    assert system.logd.records[-2].level is Level.WARN
    assert audits[-1]["target"] == "last"


def test_what_exceeds_the_rate_is_told_within_a_second_though_nothing_else_happens() -> None:
    system = system_of()

    ask(system, *(Check("proof.probe", "") for _ in range(RATE_DEFAULT + 3)))
    wait(system, SECOND // 2)
    early = len(system.logd.records)
    wait(system, SECOND // 2 + SECOND // 100)

    assert early == RATE_DEFAULT
    (last,) = system.logd.audits()[RATE_DEFAULT:]
    assert (last["op"], last["first"], last["last"]) == (
        "suppressed",
        str(RATE_DEFAULT + 1),
        str(RATE_DEFAULT + 3),
    )
    found = counts(system)
    assert (found.audited, found.audit_dropped, found.audit_waiting) == (RATE_DEFAULT, 3, 0)


def test_an_asker_that_never_stops_writes_its_rate_and_one_sum_a_second() -> None:
    system = system_of()
    seconds = 3

    async def body(peers: Peers) -> int:
        policyd = await bound(peers)
        asked = 0
        until = await Now() + seconds * SECOND
        while await Now() < until:
            _ = await policyd.call(Check("proof.probe", ""), FAR)
            asked += 1
            _ = await SleepUntil(Nanos(await Now() + 1_000_000))
        return asked

    asked = system.client(body)
    wait(system, 2 * SECOND)

    audits = system.logd.audits()
    sums = [each for each in audits if each["op"] == "suppressed"]
    assert asked > 10 * RATE_DEFAULT * seconds
    assert len(sums) in (seconds, seconds + 1)
    assert len(audits) <= (seconds + 1) * (RATE_DEFAULT + 1)
    assert told_once(audits, dict.fromkeys(range(1, asked + 1), "app"))


def test_a_flood_takes_no_place_of_anybody_else() -> None:
    system = system_of()
    system.keeper.down.add("logd")

    ask(system, *(Check("proof.probe", "") for _ in range(1000)))
    ask(system, *(Check("no", "") for _ in range(10)), name="keystored")
    system.keeper.down.clear()
    wait(system, 5 * SECOND)

    kept = [each for each in system.logd.audits() if each["asked_by"] == "keystored"]
    assert [each["number"] for each in kept] == numbers(1001, 1010)


@pytest.mark.parametrize("flooding", ["app", "statefsd"])
def test_the_record_of_a_reload_has_a_place_though_all_others_are_taken(flooding: str) -> None:
    system = system_of()
    system.keeper.down.add("logd")

    ask(system, *(Check("proof.probe", "") for _ in range(1000)), name=flooding)
    ask(system, Reload(policy_of({**BASE, "app": []}).encoded()), name="statefsd")
    system.keeper.down.clear()
    wait(system, 5 * SECOND)

    (found,) = [each for each in system.logd.audits() if each["op"] == "reload"]
    assert (found["decision"], found["asked_by"], found["number"]) == ("allow", "statefsd", "1001")


def test_who_may_not_reload_has_no_place_of_a_reload() -> None:
    system = system_of(settings={"audit_rate": 2})

    ask(system, *(Reload(b"\x80") for _ in range(5)))
    wait(system, 2 * SECOND)

    *own, last = system.logd.audits()
    assert [each["op"] for each in own] == ["reload", "reload"]
    assert (last["op"], last["denied"], last["count"]) == ("suppressed", "3", "3")
    assert "reloads" not in last


def test_reloads_beyond_their_own_rate_are_decisions_like_others_and_told_as_reloads() -> None:
    system = system_of(settings={"audit_rate": 2})

    ask(system, *(Reload(b"\x80") for _ in range(RELOADS.rate + 2 + 3)), name="statefsd")
    wait(system, 2 * SECOND)

    *own, last = system.logd.audits()
    assert [each["op"] for each in own] == ["reload"] * (RELOADS.rate + 2)
    assert (last["allowed"], last["reloads"], last["count"]) == ("3", "3", "3")


def told_once(audits: list[dict[str, str]], asked: dict[int, str]) -> bool:
    """Whether every decision, by number and who asked, is told by one record or by one sum.

    A record that is there twice is the same record.
    """
    own = {(int(each["number"]), each["asked_by"]) for each in audits if "number" in each}
    sums = {tuple(each.items()) for each in audits if each["op"] == "suppressed"}
    tellers = Counter(own)
    for each in map(dict, sums):
        first, last = int(each["first"]), int(each["last"])
        inside = [n for n in range(first, last + 1) if asked[n] == each["asked_by"]]
        assert len(inside) == int(each["count"]), each
        assert len(inside) == int(each.get("allowed", 0)) + int(each.get("denied", 0))
        tellers.update((n, each["asked_by"]) for n in inside)
    assert tellers == dict.fromkeys(asked.items(), 1)
    return True


@pytest.mark.parametrize("places", [8, 64])
def test_every_decision_is_told_once_also_in_a_flood_of_three_and_a_restart_of_logd(
    places: int,
) -> None:
    system = system_of(settings={"audit_rate": 100, "audit_places": places})
    first = system.logd
    asked: dict[int, str] = {}
    rounds = 900

    def flood(name: str) -> Callable[[Peers], Any]:
        async def body(peers: Peers) -> None:
            policyd = await bound(peers)
            for number in range(rounds):
                decision = await policyd.call(Check("proof.probe", ""), FAR)
                assert isinstance(decision, Decision)
                asked[decision.number] = name
                if number % 3 == 0:
                    _ = await SleepUntil(Nanos(await Now() + 7_000_000))
                if name == "app" and number == rounds // 3:
                    system.kill("logd")
                if name == "app" and number == 2 * rounds // 3:
                    _ = system.start_logd()

        return body

    floods = [system.add_client(flood(name), name) for name in ("app", "other", "keystored")]
    for each in floods:
        system.kernel.run(each)
    wait(system, 8 * SECOND)

    audits = first.audits() + system.logd.audits()
    found = counts(system)
    assert sorted(asked) == list(range(1, 3 * rounds + 1))
    assert told_once(audits, asked)
    assert (found.audited + found.audit_dropped, found.audit_waiting) == (3 * rounds, 0)
    assert {each["asked_by"] for each in audits if each["op"] == "suppressed"} == {
        "app",
        "other",
        "keystored",
    }


def test_malformed_requests_do_not_crowd_out_decisions() -> None:
    system = system_of()
    system.keeper.down.add("logd")

    for _ in range(MALFORMED.places + 4):
        _ = raw(system, lambda frame: frame[:-1])
    ask(system, *(Check("proof.probe", "") for _ in range(PLACES_DEFAULT)))

    found = counts(system)
    assert (found.malformed, found.audit_dropped) == (MALFORMED.places + 4, 0)
    system.keeper.down.clear()
    wait(system, 10 * SECOND)
    audits = system.logd.audits()
    reasons = [each.get("reason") for each in audits]
    assert reasons.count("malformed") == MALFORMED.places
    assert reasons.count("policy") == PLACES_DEFAULT
    (told,) = [each for each in audits if each["op"] == "suppressed"]
    assert told == {"op": "suppressed", "asked_by": "app", "count": "0", "malformed": "4"}


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"audit_rate": 0}, "audit_rate is 0: from 1 to 65536 is possible"),
        ({"audit_places": 1025}, "audit_places is 1025: from 1 to 1024 is possible"),
        ({"audit_rates": 5}, "audit_rates"),
    ],
)
def test_wrong_settings_end_it_with_a_sentence(settings: dict[str, Any], word: str) -> None:
    system = PolicySystem(policy_of(BASE), policyd=False, settings=settings)

    code = system.kernel.run(system.start_policyd())

    assert code == 2
    ((_, line, _),) = system.kernel.console
    assert line.startswith("policyd: settings: ")
    assert word in line
    assert line.endswith("correct [service.policyd.settings] in the system file")


def test_a_larger_share_is_a_matter_of_the_settings() -> None:
    system = system_of(settings={"audit_rate": 1000, "audit_places": 256})

    ask(system, *(Check("proof.probe", "") for _ in range(250)))
    wait(system, 2 * SECOND)

    assert [each["number"] for each in system.logd.audits()] == numbers(1, 250)


def test_a_rate_limited_audit_is_sent_again_in_its_order() -> None:
    system = system_of()
    system.logd.accepts = 3

    ask(system, *(Check("proof.probe", "") for _ in range(10)))
    wait(system, SECOND)
    limited = counts(system)
    assert system.logd.limited <= 5 * POSTS_MAX, "four times a second, and not without end"
    system.logd.accepts = None
    wait(system, SECOND)

    assert (limited.audited, limited.audit_waiting, limited.audit_dropped) == (3, 7, 0)
    assert [each["number"] for each in system.logd.audits()] == [str(n) for n in range(1, 11)]
    assert counts(system).audited == 10


def test_an_audit_that_is_refused_again_and_again_waits_until_it_is_taken() -> None:
    system = system_of()
    system.logd.accepts = 0

    ask(system, Check("proof.probe", ""))
    wait(system, 25 * SECOND)
    refused = counts(system)
    system.logd.accepts = None
    wait(system, SECOND)

    assert 70 <= system.logd.limited <= 100, "at most four times a second, and without end"
    assert (refused.audit_dropped, refused.audit_waiting) == (0, 1)
    assert (counts(system).audited, counts(system).audit_waiting) == (1, 0)


@pytest.mark.parametrize("status", [LogdStatus.INVALID_ARGS, LogdStatus.OVER_LIMIT])
def test_an_audit_refused_for_good_is_dropped_at_once(status: LogdStatus) -> None:
    system = system_of()
    system.logd.refuses = status

    ask(system, Check("proof.probe", ""))
    wait(system, SECOND)

    found = counts(system)
    assert (found.audit_dropped, found.audited, found.audit_waiting) == (1, 0, 0)


def test_a_decision_whose_record_is_refused_for_good_is_told_by_a_sum_of_one() -> None:
    system = system_of()
    system.logd.refuses = LogdStatus.INVALID_ARGS
    system.logd.refuses_op = "check"

    ask(system, Check("no", ""), Exec("app", "demo"))
    wait(system, SECOND)

    alone, _ = sorted(system.logd.audits(), key=lambda each: each["op"] != "suppressed")
    assert (alone["first"], alone["last"], alone["denied"]) == ("1", "1", "1")
    assert told_once(system.logd.audits(), {1: "app", 2: "app"})
    assert (counts(system).audit_dropped, counts(system).audited) == (1, 1)


def test_an_audit_counts_only_when_logd_has_said_so() -> None:
    system = system_of()
    system.logd.loses_answers = True

    ask(system, Check("proof.probe", ""))
    wait(system, SECOND // 2)

    assert len(system.logd.records) == 1
    assert (counts(system).audited, counts(system).audit_waiting) == (0, 1)


def test_a_restart_of_logd_loses_no_audit() -> None:
    system = system_of()
    ask(system, Check("proof.probe", "first"))
    wait(system, SECOND)
    system.kill("logd")
    ask(system, Check("proof.probe", "second"), Check("crypto.sign", "third"))
    wait(system, SECOND)

    restarted = system.start_logd()
    wait(system, 5 * SECOND)

    assert [each["target"] for each in restarted.audits()] == ["second", "third"]
    found = counts(system)
    assert (found.audited, found.audit_waiting, found.audit_dropped) == (3, 0, 0)


def test_the_largest_words_fit_a_record() -> None:
    system = system_of()

    ask(system, Check(48 * "\u00fc", LONG_TARGET))
    wait(system, SECOND)

    (audit,) = system.logd.audits()
    assert len(audit["action"].encode()) <= 64
    assert audit["target"] == LONG_TARGET
    size = sum(len(key) + len(value.encode()) + 2 for key, value in audit.items())
    assert size <= 512


def test_cut_keeps_whole_characters() -> None:
    assert cut("abc", 3) == "abc"
    assert cut("\u00fc\u00fc\u00fc", 5) == "\u00fc\u2026"
    assert len(cut("\u00fc" * 40, 64).encode()) <= 64


# ------------------------------------------------------------------ the policy itself


def test_it_is_ready_only_with_a_policy() -> None:
    system = PolicySystem(policy_of(BASE), policyd=False)
    system.keeper.silent = True
    task = system.start_policyd()
    system.kernel.settle()

    with_none = task.over
    code = system.kernel.run(task)

    assert not with_none, "it asks again for a while"
    assert code == 1
    assert [line for _, line, _ in system.kernel.console] == [
        "policyd: init gives no policy: TimedOut"
    ]


@pytest.mark.parametrize(
    ("garbage", "word"),
    [(b"\xc1", "Unreadable"), (b"\x80", "Unreadable"), (b"\x81\xa1\xff\x90", "Unreadable")],
)
def test_what_is_no_policy_is_not_taken_from_init(garbage: bytes, word: str) -> None:
    system = PolicySystem(policy_of(BASE), policyd=False)
    system.keeper.garbage = garbage

    code = system.kernel.run(system.start_policyd())

    assert code == 1
    assert system.kernel.console[-1][1].endswith(word)


def test_a_refusal_of_init_is_told_by_its_name() -> None:
    system = PolicySystem(policy_of(BASE), policyd=False)
    system.keeper.refuses = ReplyStatus.DENIED

    code = system.kernel.run(system.start_policyd())

    assert (code, system.kernel.console[-1][1]) == (1, "policyd: init gives no policy: DENIED")
    assert system.keeper.asked == ["GetPolicy"], "asking again would not help"


def test_its_status_tells_the_policy_it_holds() -> None:
    system = system_of()

    status, health = ask(system, GetStatus(), Health())

    assert isinstance(status, ServiceStatus)
    facts = {fact.name: fact.value for fact in status.facts}
    digest = policy_of(BASE).digest
    assert facts["policy_digest"] == int(digest[:15], 16)
    assert facts["subjects"] == len(BASE)
    assert facts["generation_total"] == counts(system).generation
    assert counts(system).digest == digest
    assert not isinstance(health, Refused)


def test_a_reload_is_in_force_for_the_very_next_request() -> None:
    system = system_of()
    ask(system, Check("proof.probe", ""))
    changed = policy_of({**BASE, "app": []})

    (reloaded,) = ask(system, Reload(changed.encoded()), name="statefsd")
    (after,) = ask(system, Check("proof.probe", ""))
    wait(system, SECOND)

    assert reloaded == Reloaded(2, changed.digest)
    assert system.kernel.page.generation == 2
    assert verdict_of(after) == DENIED
    assert after.generation == 2
    assert (counts(system).generation, counts(system).digest) == (2, changed.digest)
    assert system.keeper.policy == changed
    audits = system.logd.audits()
    assert [(each["op"], each["generation"]) for each in audits] == [
        ("check", "1"),
        ("reload", "1"),
        ("check", "2"),
    ]


def test_a_reload_in_bulk_is_the_same() -> None:
    system = system_of()
    changed = policy_of({**BASE, "app": []})

    async def body(peers: Peers) -> Any:
        policyd = await bound(peers)
        data = changed.encoded()
        slot = await offer_bulk(data)
        return await policyd.ask(ReloadBulk(len(data)), FAR, move=slot)

    answer = system.client(body, "statefsd")

    assert answer.reply == Reloaded(2, changed.digest)
    assert verdict_of(*ask(system, Check("proof.probe", ""))) == DENIED


def test_who_may_not_reload_changes_nothing_and_is_audited() -> None:
    system = system_of()

    (outcome,) = ask(system, Reload(policy_of({"app": [RELOAD]}).encoded()))
    wait(system, SECOND)

    assert outcome == Refused(ReplyStatus.DENIED)
    assert "SetPolicy" not in system.keeper.asked
    assert [(each["op"], each["decision"], each["action"]) for each in system.logd.audits()] == [
        ("reload", "deny", RELOAD)
    ]
    assert verdict_of(*ask(system, Check("proof.probe", ""))) == ALLOWED


@pytest.mark.covers("policyd.BAD_POLICY")
@pytest.mark.parametrize(
    "data",
    [
        b"\xc1",
        b"\x80",
        policy_of(BASE).encoded() + b"\0",
        policy_of(BASE).encoded().replace(b"base.toml", b"bas\xff.toml"),
        policy_of({**BASE, "ghost": ["a"]}).encoded(),
        policy_of(BASE, services=[*SERVICES, "ghost"]).encoded(),
        policy_of(BASE, services=SERVICES[1:]).encoded(),
    ],
    ids=[
        "no MessagePack",
        "no policy",
        "trailing byte",
        "no UTF-8",
        "unknown subject",
        "more",
        "fewer",
    ],
)
def test_a_bad_policy_is_refused_and_the_old_one_stays(data: bytes) -> None:
    system = system_of()

    outcomes = ask(system, Reload(data), name="statefsd")

    assert outcomes == [Refused(PolicydStatus.BAD_POLICY)]
    assert verdict_of(*ask(system, Check("proof.probe", ""))) == ALLOWED
    assert system.kernel.page.generation == 1


def test_a_bulk_reload_without_its_bytes_is_a_bad_policy() -> None:
    system = system_of()

    outcomes = ask(system, ReloadBulk(10), ReloadBulk(0), name="statefsd")

    assert outcomes == [Refused(PolicydStatus.BAD_POLICY)] * 2


@pytest.mark.covers("policyd.INIT_REFUSED")
def test_a_policy_that_init_does_not_take_is_not_in_force() -> None:
    system = system_of()
    ask(system, Check("proof.probe", ""))
    system.keeper.refuses = ReplyStatus.BUSY

    outcomes = ask(system, Reload(policy_of({**BASE, "app": []}).encoded()), name="statefsd")

    assert outcomes == [Refused(PolicydStatus.INIT_REFUSED)]
    assert verdict_of(*ask(system, Check("proof.probe", ""))) == ALLOWED


def test_a_policy_that_init_finds_bad_is_refused_as_bad() -> None:
    system = system_of()
    ask(system, Check("proof.probe", ""))
    system.keeper.refuses = InitStatus.BAD_POLICY

    outcomes = ask(system, Reload(policy_of({**BASE, "app": []}).encoded()), name="statefsd")

    assert outcomes == [Refused(PolicydStatus.BAD_POLICY)]


def test_when_inits_answer_to_a_reload_is_lost_init_is_asked_before_the_next_decision() -> None:
    system = system_of()
    ask(system, Check("proof.probe", ""))
    system.keeper.loses_answers = True

    outcomes = ask(system, Reload(policy_of({**BASE, "app": []}).encoded()), name="statefsd")
    (after,) = ask(system, Check("proof.probe", ""))

    assert outcomes == [Refused(PolicydStatus.INIT_REFUSED)]
    assert verdict_of(after) == DENIED, "init has taken it: the right is gone"


def test_nothing_is_decided_by_a_policy_that_may_be_outdated() -> None:
    system = system_of()
    ask(system, Check("proof.probe", ""))
    system.raise_page(available=True)
    system.keeper.silent = True

    (outcome,) = ask(system, Check("proof.probe", ""))

    assert outcome == Refused(ReplyStatus.BUSY)
    assert counts(system).allowed == 1, "no decision was made"


def test_a_policy_set_behind_its_back_is_met_by_the_next_decision() -> None:
    system = system_of()
    ask(system, Check("proof.probe", ""))
    system.keeper.policy = policy_of({**BASE, "app": []})
    system.raise_page(available=True)

    assert verdict_of(*ask(system, Check("proof.probe", ""))) == DENIED


def test_a_restarted_policyd_has_the_policy_that_was_set() -> None:
    system = system_of()
    changed = policy_of({**BASE, "app": ["crypto.sign"]})
    ask(system, Reload(changed.encoded()), name="statefsd")

    system.kill("policyd")
    system.start_policyd()
    outcomes = ask(system, Check("proof.probe", ""), Check("crypto.sign", ""))

    assert [verdict_of(each) for each in outcomes] == [DENIED, ALLOWED]
    assert counts(system).digest == changed.digest


def test_a_decision_never_outlives_the_callers_deadline() -> None:
    system = system_of()
    ask(system, Check("proof.probe", ""))
    system.raise_page(available=True)
    system.keeper.silent = True

    async def body(peers: Peers) -> tuple[Any, int]:
        policyd = await bound(peers)
        begun = await Now()
        outcome = await policyd.call(Check("proof.probe", ""), Nanos(begun + 50_000_000))
        return outcome, await Now() - begun

    outcome, took = system.client(body)

    assert isinstance(outcome, TimedOut | Refused)
    assert took <= 50_000_000
