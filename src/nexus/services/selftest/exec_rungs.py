"""Rungs about execd: programs that are started, waited for and ended; what is told of a crash."""

from typing import Final

import msgspec

from nexus.abi import CapClone, Nanos, Recv, Send, SpawnReason, service_id
from nexus.ipc import CallFailure, Client, Refused, RetryBudget, RetryTokens, retry_until
from nexus.protocols.execd import PROTOCOL as EXECD
from nexus.protocols.execd import (
    Ended,
    Exec,
    ExecdStatus,
    GetCrashes,
    GetPrograms,
    GetReport,
    Kill,
    Report,
    ReportExit,
    Restart,
    Variable,
    Wait,
)
from nexus.protocols.execd import Started as Child
from nexus.protocols.hello import PROTOCOL as HELLO_PROTOCOL
from nexus.protocols.hello import Greet
from nexus.protocols.init import Health
from nexus.protocols.logd import EVERY_RECORD, Filter, Query, Record
from nexus.protocols.testsvc import PROTOCOL as TESTSVC
from nexus.protocols.testsvc import AskExecd, LastWords
from nexus.services.selftest.climb import CALL_WAIT, Climb
from nexus.services.selftest.policy_rungs import SPOOFED, fields_of, records_about
from nexus.services.selftest.routing_rungs import grown, use_once
from nexus.services.selftest.rung import Evidence, expect, expect_type, require
from nexus.wire import HEADER, ReplyStatus, encode, nonce_of, status_of

EXECD_NAME: Final = "execd"
HELLO: Final = "demo.hello"
EXIT0: Final = "demo.exit0"
EXIT42: Final = "demo.exit42"
COPY: Final = "demo.copy"  # of demo.testsvc
ON_DEMAND: Final = (HELLO, EXIT0, EXIT42, COPY)  # nobody finds them before execd has started them
ALTERED: Final = COPY  # the runner's fault point: its first start meets a changed file
CODE: Final = 42
ARGUMENT: Final = "one argument"
VARIABLE: Final = Variable("GREETING", "hello")
NOBODY: Final = 0xFFFF_FFF0  # a pid that no task has
GREET_NONCE: Final = (1 << 61) + 86  # no call of this run reaches it
BAD_NONCE: Final = (1 << 61) + 94
END_WAIT: Final = Nanos(5_000_000_000)  # ns; a child ends in milliseconds
LOOKS_MAX: Final = 10  # with doubling pauses: 2 ms to 1 s
LOOK_PAUSE: Final = Nanos(2_000_000)  # ns
COPIES: Final = 3  # of demo.testsvc that are killed for their last words
SPAWN_RIGHT: Final = "proc.spawn"
CRASH_EVENT: Final = "crash.v1"


def _exec(program: str, requester: str, *arguments: str) -> Exec:
    return Exec(program, requester, list(arguments), [VARIABLE], Restart.NEVER)


async def _start(climb: Climb, program: str, *arguments: str) -> Child:
    """Have execd start a program; any refusal fails the rung."""
    return await climb.call(
        climb.client(EXECD_NAME), _exec(program, climb.boot.name, *arguments), END_WAIT
    )


async def _end(climb: Climb, child: Child) -> Ended:
    """Have execd end a child, and wait until it is reaped."""
    execd = climb.client(EXECD_NAME)
    waiting = await execd.start(Wait(child.pid), await climb.ahead(END_WAIT))
    _ = await climb.call(execd, Kill(child.pid))
    return await climb.finish(execd, waiting)


# ------------------------------------------------------------------ what can be started


async def program_table(climb: Climb) -> Evidence:
    """#37, stated: what execd says that it can start, and with which digests."""
    page = await climb.call(climb.client(EXECD_NAME), GetPrograms(0))
    return {"programs": [[row.name, row.digest] for row in page.rows], "total": page.total}


async def routing_execd(climb: Climb) -> Evidence:
    """#55: execd found by name, one round trip on that very link, init's counter and entry."""
    before = await climb.route_counts()

    generation = await use_once(climb, EXECD_NAME, EXECD, GetPrograms(0))
    counted = grown(before, await climb.route_counts())

    expect(counted, {"ok": 1}, "growth of init's route counters")
    expect(generation, (await climb.task(EXECD_NAME)).generation, "execd's generation")
    return {"counters": counted, "generation": generation}


async def load(climb: Climb) -> Evidence:
    """#84, stated: a program is refused whose file has one byte changed, and demo.hello started."""
    execd = climb.client(EXECD_NAME)
    changed = await execd.call(_exec(ALTERED, climb.boot.name), await climb.ahead(END_WAIT))
    if isinstance(changed, Child):
        _ = await _end(climb, changed)
    child = await _start(climb, HELLO, ARGUMENT)
    climb.children[HELLO] = child
    return {
        "altered": ALTERED,
        "refused": changed.status.name if isinstance(changed, Refused) else type(changed).__name__,
        "pid": child.pid,
        "generation": child.generation,
    }


async def child_hello(climb: Climb) -> Evidence:
    """#85, stated: who demo.hello is by execd's answer and by init's task list."""
    child = climb.children[HELLO]
    row = await climb.task(HELLO)
    await _well(climb, HELLO)
    hello = await _connected(climb, HELLO)
    _ = await climb.call(hello, Greet())  # which it tells on the console
    await climb.peers.discard(hello.peer)
    _ = await _end(climb, child)
    return {"pid": child.pid, "generation": child.generation, "row": [row.pid, row.generation]}


async def _well(climb: Climb, name: str) -> None:
    """The child has begun its work: it has said what it says then."""
    budget = RetryBudget(
        attempts_max=LOOKS_MAX, backoff=LOOK_PAUSE, deadline=await climb.ahead(END_WAIT)
    )
    record = await retry_until(
        lambda: climb.record(name),
        lambda seen: seen.health is not Health.OK,
        budget,
        RetryTokens(),
    )
    expect(record.health, Health.OK, f"health of {name}")


async def exec_elf(climb: Climb) -> Evidence:
    """#86: a call to the child comes back with the pid that execd answered, by the kernel."""
    child = await _start(climb, HELLO, ARGUMENT)
    hello = await _connected(climb, HELLO)
    codec = HELLO_PROTOCOL.codecs[Greet]
    deadline = await climb.ahead(CALL_WAIT)
    echo = GREET_NONCE.to_bytes(8, "little") + deadline.to_bytes(8, "little")
    trail = climb.peers.caller.spans.root.trail

    await Send(hello.peer.slot, codec.prefix + echo + trail + encode(Greet()), deadline=deadline)
    reply = await Recv((hello.peer.inbox,), deadline, link=hello.peer.link)
    greeting = codec.decode_reply(reply.data[HEADER.size :])
    await climb.peers.discard(hello.peer)
    _ = await _end(climb, child)

    expect(nonce_of(reply.data), GREET_NONCE, "nonce of the answer")
    expect(status_of(reply.data), ReplyStatus.OK, "status of the answer")
    expect(reply.sender.pid, child.pid, "pid of the child, stamped by its kernel")
    expect(reply.sender.service, service_id(HELLO), "service id of the child")
    expect((greeting.pid, greeting.generation), (child.pid, child.generation), "who it says it is")
    expect(greeting.arguments, [ARGUMENT], "its arguments")
    expect(greeting.environment, [VARIABLE], "its environment")
    return {"pid": child.pid, "stamped": reply.sender.pid, "generation": child.generation}


async def _connected(climb: Climb, name: str) -> Client:
    """A client of a child that execd has started."""
    budget = RetryBudget(
        attempts_max=LOOKS_MAX, backoff=LOOK_PAUSE, deadline=await climb.ahead(END_WAIT)
    )
    protocol = HELLO_PROTOCOL if name == HELLO else TESTSVC
    client = await climb.peers.connect(name, protocol, budget)
    return expect_type(client, Client, f"connection to {name}")


# ------------------------------------------------------------------ waiting


async def child_exit0(climb: Climb) -> Evidence:
    """#87, stated: who demo.exit0 was by execd's answer. Another child lives meanwhile: a kernel
    may give the number of one that has ended to the next."""
    climb.children[HELLO] = await _start(climb, HELLO)
    child = climb.children[EXIT0] = await _start(climb, EXIT0)
    return {"pid": child.pid, "generation": child.generation}


async def child_exited(climb: Climb) -> Evidence:
    """#88, stated: while execd waits for one child another client is served, and then it says how
    demo.exit0 ended."""
    execd = climb.client(EXECD_NAME)
    exit0, hello = climb.children[EXIT0], climb.children[HELLO]
    waiting = await execd.start(Wait(hello.pid), await climb.ahead(END_WAIT))
    served = await climb.moved(climb.testsvc, AskExecd(), await CapClone(execd.peer.slot))
    row = await climb.task(HELLO)
    ended = climb.ends[EXIT0] = await climb.call(execd, Wait(exit0.pid), END_WAIT)
    _ = await climb.call(execd, Kill(hello.pid))
    killed = await climb.finish(execd, waiting)
    return {
        "served": served.status,
        "waited_for": [row.pid, killed.pid, killed.signal, killed.generation],
        "pid": ended.pid,
        "generation": ended.generation,
        "code": ended.code,
    }


async def child_exit(climb: Climb) -> Evidence:
    """#89: WAIT says which child has ended, and how; of a pid that is nobody's it knows nothing."""
    execd = climb.client(EXECD_NAME)
    child, ended = climb.children[EXIT0], climb.ends[EXIT0]

    again = await climb.call(execd, Wait(child.pid), END_WAIT)
    unknown = await execd.call(Wait(NOBODY), await climb.ahead(CALL_WAIT))

    expect(ended.pid, child.pid, "pid that WAIT gives")
    expect(ended.generation, child.generation, "generation that WAIT gives")
    expect((ended.code, ended.signal, ended.report), (0, 0, 0), "code, signal and report")
    expect(again, ended, "WAIT once more")
    expect(unknown, Refused(ExecdStatus.NOT_FOUND), "WAIT for a pid that is nobody's")
    return {
        "pid": ended.pid,
        "generation": ended.generation,
        "code": ended.code,
        "unknown": ExecdStatus.NOT_FOUND.name,
    }


# ------------------------------------------------------------------ crashes


async def child_exit42(climb: Climb) -> Evidence:
    """#90, stated: who demo.exit42 was by execd's answer."""
    child = climb.children[EXIT42] = await _start(climb, EXIT42)
    return {"pid": child.pid, "generation": child.generation}


async def crash_line(climb: Climb) -> Evidence:
    """#91, stated: how demo.exit42 ended, and what became of the same report from somebody who is
    not the parent."""
    execd = climb.client(EXECD_NAME)
    child = climb.children[EXIT42]
    ended = climb.ends[EXIT42] = await climb.call(execd, Wait(child.pid), END_WAIT)
    before = await _crashes(climb)
    now = await climb.ahead(Nanos(0))
    forged = ReportExit(
        EXIT42,
        child.pid,
        child.generation,
        CODE + 1,
        signal=0,
        started=now,
        ended=now,
        digest="",
        reason="",
        action="",
        asked=False,
        again=False,
        lost=0,
    )
    outcome = await execd.call(forged, await climb.ahead(CALL_WAIT))
    after = await _crashes(climb)
    return {
        "pid": ended.pid,
        "generation": ended.generation,
        "code": ended.code,
        "report": ended.report,
        "forged": outcome.status.name if isinstance(outcome, Refused) else type(outcome).__name__,
        "reports": [before, after],
    }


async def _crashes(climb: Climb) -> list[int]:
    """The numbers of the reports of demo.exit42."""
    page = await climb.call(climb.client(EXECD_NAME), GetCrashes(0, EXIT42))
    return [crash.report for crash in page.rows]


async def crash_report(climb: Climb) -> Evidence:
    """#92: one record of logd's, of execd's id, says how that very child crashed."""
    ended = climb.ends[EXIT42]
    record = await _crash_record(climb, ended)
    report = await _report(climb, ended)
    fields = fields_of(record)

    expect(record.service, service_id(EXECD_NAME), "sender of the record")
    expect(fields["event"], CRASH_EVENT, "event")
    expect((fields["pid"], fields["code"]), (str(ended.pid), str(CODE)), "pid and code")
    expect(fields["name"], EXIT42, "name")
    expect((report.crash.pid, report.crash.code), (ended.pid, CODE), "pid and code of the report")
    return {
        "record": record.record,
        "service": f"{record.service:016x}",
        "fields": fields,
        "digest": report.crash.digest,
        "duration": report.crash.duration,
        "generation": ended.generation,
    }


async def _crash_record(climb: Climb, ended: Ended) -> Record:
    """The one record of a crash, read by its id."""
    found = await records_about(climb, "pid", str(ended.pid), {"event": CRASH_EVENT})
    expect(len(found), 1, f"records of the crash of pid {ended.pid}")
    query = Query(climb.config.boot, found[0].record, 1, EVERY_RECORD)
    by_id = (await climb.call(climb.client("logd"), query)).records
    expect(by_id, found, f"record {found[0].record}, by its id")
    return by_id[0]


async def _report(climb: Climb, ended: Ended) -> Report:
    require(ended.report > 0, "WAIT names no report")
    return await climb.call(climb.client(EXECD_NAME), GetReport(ended.report))


async def exec_denied(climb: Climb) -> Evidence:
    """#93: EXEC in another's name is denied, starts nothing, and is known for what it was."""
    execd = climb.client(EXECD_NAME)
    before = await climb.tasks()
    number = (await climb.record(EXIT0)).spawn_refused

    outcome = await execd.call(_exec(EXIT0, SPOOFED), await climb.ahead(END_WAIT))
    after = await climb.tasks()
    record = await climb.record(EXIT0)
    audits = await records_about(climb, "action", SPAWN_RIGHT, {"reason": "identity"})

    expect(outcome, Refused(ReplyStatus.DENIED), "EXEC in another's name")
    expect(after.live, before.live, "live tasks")
    expect(record.spawn_refused - number, 1, "refused starts that init has counted")
    expect(record.spawn_reason, SpawnReason.DENIED_BY_POLICY, "why the last was refused")
    expect(len(audits), 1, "audit records about it")
    return {
        "live": [before.live, after.live],
        "reason": record.spawn_reason,
        "record": audits[0].record,
        "service": f"{audits[0].service:016x}",
        "fields": fields_of(audits[0]),
    }


async def execd_malformed(climb: Climb) -> Evidence:
    """#94: a bad body is MALFORMED, counted as such, starts nothing; and the next EXEC works."""
    execd = climb.client(EXECD_NAME)
    codec = EXECD.codecs[Exec]
    deadline = await climb.ahead(CALL_WAIT)
    echo = BAD_NONCE.to_bytes(8, "little") + deadline.to_bytes(8, "little")
    before, tasks = (await climb.status(execd)).malformed, (await climb.tasks()).live

    await Send(
        execd.peer.slot,
        codec.prefix + echo + climb.peers.caller.spans.root.trail + b"\xc1",
        deadline=deadline,
    )
    reply = await Recv((execd.peer.inbox,), deadline, link=execd.peer.link)
    after, still = (await climb.status(execd)).malformed, (await climb.tasks()).live
    child = await _start(climb, HELLO)
    ended = await _end(climb, child)

    expect(nonce_of(reply.data), BAD_NONCE, "nonce of the answer")
    expect(status_of(reply.data), ReplyStatus.MALFORMED, "status of the answer")
    expect(after - before, 1, "growth of execd's malformed counter")
    expect(still, tasks, "live tasks")
    expect(ended.pid, child.pid, "the child of the next EXEC")
    return {"malformed": after, "next": [child.pid, child.generation]}


async def use_execd(climb: Climb) -> None:
    """Have execd use all that it uses: a start in another's name, and a crash that it is done with;
    whatever it answers."""
    execd = climb.client(EXECD_NAME)
    _ = await execd.call(_exec(EXIT42, SPOOFED), await climb.ahead(END_WAIT))
    child = await execd.call(_exec(EXIT42, climb.boot.name), await climb.ahead(END_WAIT))
    if isinstance(child, Child):
        _ = await execd.call(Wait(child.pid), await climb.ahead(END_WAIT))


# ------------------------------------------------------------------ last words


async def last_words(climb: Climb) -> Evidence:
    """#129: what a child wrote into its log just before it was killed stands in its report. logd
    looks at a ring now and then, whoever rings: so there are several, killed one after another."""
    return {"copies": [await _last_words(climb) for _ in range(COPIES)]}


async def _last_words(climb: Climb) -> Evidence:
    execd = climb.client(EXECD_NAME)
    token = f"{climb.boot.pid}.{await climb.ahead(Nanos(0))}"
    child = await _start(climb, COPY)
    copy = await _connected(climb, COPY)
    await _known_to_logd(climb, child)

    waiting = await execd.start(Wait(child.pid), await climb.ahead(END_WAIT))
    outcome = await copy.call(LastWords(token), await climb.ahead(END_WAIT))
    ended = await climb.finish(execd, waiting)
    await climb.peers.discard(copy.peer)
    report = await _report(climb, ended)
    found = await records_about(climb, "token", token, {"token": token})

    require(isinstance(outcome, CallFailure), f"the call was answered: {outcome!r}")
    expect((ended.pid, ended.signal), (child.pid, 9), "who was killed, and how")
    require(bool(report.records), "the report has no last record")
    expect(len(found), 1, "records with the token")
    (record,) = found
    expect((record.pid, record.generation), (child.pid, child.generation), "whose the record is")
    require(token in report.records[-1].text, f"the last record is {report.records[-1].text!r}")
    return {
        "token": token,
        "pid": child.pid,
        "generation": child.generation,
        "report": {
            "pid": report.crash.pid,
            "signal": report.crash.signal,
            "name": report.crash.name,
            "last": report.records[-1].text,
        },
        "service": f"{record.service:016x}",
        "written": record.written,
        "taken": record.at,
    }


def _of(child: Child) -> Filter:
    return msgspec.structs.replace(
        EVERY_RECORD, service=service_id(COPY), pid=child.pid, generation=child.generation
    )


async def _known_to_logd(climb: Climb, child: Child) -> None:
    """logd drains the ring of this child: its first line has come."""
    budget = RetryBudget(
        attempts_max=LOOKS_MAX, backoff=LOOK_PAUSE, deadline=await climb.ahead(END_WAIT)
    )

    async def look() -> list[Record]:
        wanted = Query(climb.config.boot, 1, 1, _of(child))
        return (await climb.call(climb.client("logd"), wanted)).records

    found = await retry_until(look, lambda seen: not seen, budget, RetryTokens())
    require(bool(found), f"logd has no line of pid {child.pid}")
