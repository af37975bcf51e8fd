"""Rungs about who a message is from, and about capabilities that move."""

from typing import Final

from nexus.abi import (
    CapClone,
    CapQuery,
    LinkCreate,
    LinkTerms,
    Nanos,
    Recv,
    Send,
    Status,
    TaskCounters,
    service_id,
)
from nexus.ipc import Refused
from nexus.protocols.meta import ServiceStatus
from nexus.protocols.testsvc import Attack, AttackResult, Forge, TestsvcStatus, UseLink
from nexus.protocols.timed import PROTOCOL as TIMED
from nexus.protocols.timed import Seen, Whoami
from nexus.services.selftest.climb import CALL_WAIT, Climb
from nexus.services.selftest.rung import Evidence, RungFailed, expect, expect_type, refusal
from nexus.wire import HEADER, ReplyStatus, encode, nonce_of, status_of

SELFTEST_ID: Final = 0x52C6C4A34FFB3F69  # FNV-1a 64 of "selftest-client" (core.md 2.6)
FNV64_OFFSET: Final = 0xCBF29CE484222325  # recomputed here: the rung trusts no shared helper
FNV64_PRIME: Final = 0x100000001B3
CLAIMED_NAME: Final = "init-lite"
CLAIMED_PID: Final = 1
ONE_SHOT_NONCE: Final = (1 << 61) + 1  # no call of this run reaches it
SEND_WAIT: Final = Nanos(1_000_000_000)  # ns
FORGED_SENDERS: Final = (b"\x02sender: pid 0", b"\x02sender: unknown pid")
"""Messages to which the proof run's fault point gives a sender that the kernel must refuse."""

FOREIGN_CREDENTIALS: Final = "credentials"


def _fnv64(name: str) -> int:
    digest = FNV64_OFFSET
    for byte in name.encode():
        digest = (digest ^ byte) * FNV64_PRIME % (1 << 64)
    return digest


def _requests_of(status: ServiceStatus, name: str) -> int:
    wanted = service_id(name)
    return sum(row.requests for row in status.senders if row.service == wanted)


def _counters(status: ServiceStatus) -> TaskCounters:
    return TaskCounters._make(status.counters)


async def sender_pid(climb: Climb) -> Evidence:
    """#61: timed echoes the pid its kernel gave, which is ours, not the one claimed."""
    row = await climb.task(climb.boot.name)

    seen = await climb.call(climb.timed, Whoami(row.pid + 1, climb.boot.name))

    expect(seen.pid, row.pid, "pid in timed's echo against init's task list")
    expect(seen.pid, climb.boot.pid, "pid in timed's echo against our own boot image")
    return {"pid": seen.pid, "claimed": row.pid + 1}


async def sender_service_id(climb: Climb) -> Evidence:
    """#62: timed echoes the service id its kernel gave: FNV-1a 64 of our name, no other."""
    seen = await climb.call(climb.timed, Whoami(climb.boot.pid, CLAIMED_NAME))

    expect(seen.service, SELFTEST_ID, "service id in timed's echo")
    expect(seen.service, _fnv64(climb.boot.name), "the id recomputed")
    return {"service": f"0x{seen.service:016x}", "claimed": CLAIMED_NAME}


async def forged_identity(climb: Climb) -> Evidence:
    """#63: a claimed name, another's header and foreign credentials change nothing; pid 0 and a
    pid outside the table are refused and counted."""
    correlator = climb.peers.caller.correlator
    testsvc = await climb.task("demo.testsvc")
    codec = TIMED.codecs[Whoami]
    own = await climb.timed.start(Whoami(0, ""), await climb.ahead(SEND_WAIT))
    _ = await climb.finish(climb.timed, own)
    mine = HEADER.pack(
        *HEADER.unpack(codec.prefix + bytes(HEADER.size - len(codec.prefix)))[:6],
        own.pending.nonce,
        await climb.ahead(SEND_WAIT),
        climb.peers.caller.spans.root.trace,
        climb.peers.caller.spans.root.span,
    )
    before = await climb.status(climb.timed)
    strays = (correlator.stale, correlator.duplicate, correlator.foreign)

    report = await climb.call(climb.testsvc, Forge(climb.boot.pid, climb.boot.name, mine))
    for message in FORGED_SENDERS:
        await Send(climb.timed.peer.slot, message, deadline=await climb.ahead(SEND_WAIT))
    raw = await climb.testsvc.call(
        Attack(FOREIGN_CREDENTIALS, climb.boot.pid), await climb.ahead(CALL_WAIT)
    )
    after = await climb.status(climb.timed)

    expect((report.pid, report.service), (testsvc.pid, testsvc.service), "who timed saw")
    expect(report.statuses, [int(ReplyStatus.OK)], "answer to another's header")
    expect(
        (correlator.stale, correlator.duplicate, correlator.foreign),
        strays,
        "stray replies at the one whose header was used",
    )
    refused = _counters(after).refused_identity - _counters(before).refused_identity
    expect(refused, len(FORGED_SENDERS), "timed's kernel's count of refused senders")
    expect(after.malformed, before.malformed, "timed's malformed counter")
    expect(after.facts, before.facts, "timed's state")
    grown = _requests_of(after, climb.boot.name) - _requests_of(before, climb.boot.name)
    expect(grown, 1, "requests counted for us, of which only one is ours")
    return {"seen": report.pid, "refused": refused, "raw": _raw_lines(raw)}


def _raw_lines(outcome: object) -> list[str]:
    """What raw system calls met; empty where the ground has none."""
    if outcome == Refused(TestsvcStatus.NO_SUCH_ATTACK):
        return []
    result = expect_type(outcome, AttackResult, "the attack by raw system calls")
    expect(result.open_doors, 0, f"attempts that were not refused: {result.lines}")
    return result.lines


async def moved_link_sender(climb: Climb) -> Evidence:
    """#64: over a link we give away, requests arrive under the new holder's identity."""
    testsvc = await climb.task("demo.testsvc")
    before = await climb.status(climb.timed)

    given = await CapClone(climb.timed.peer.slot)
    seen = await climb.moved(climb.testsvc, UseLink(climb.boot.pid, climb.boot.name), given)
    empty = await refusal(CapQuery(given))
    after = await climb.status(climb.timed)

    expect((seen.pid, seen.service), (testsvc.pid, testsvc.service), "sender over the given link")
    expect(seen.generation, testsvc.generation, "its generation")
    expect(empty, Status.INVALID_ARGUMENT, "our slot after the move")
    ours = _requests_of(after, climb.boot.name) - _requests_of(before, climb.boot.name)
    theirs = _requests_of(after, "demo.testsvc") - _requests_of(before, "demo.testsvc")
    expect(ours, 1, "requests counted for us: the status request before")
    expect(theirs, 2, "requests counted for demo.testsvc: bind and whoami")
    return {"seen": seen.pid, "counters": {"ours": ours, "theirs": theirs}}


async def cap_move_reply(climb: Climb) -> Evidence:
    """#65: a reply comes over a SEND link that moved with its request, into the shared inbox."""
    before = _counters(await climb.status(climb.timed)).slots
    inbox = await climb.peers.inbox()
    way = await LinkCreate(inbox, LinkTerms(depth=1))
    assert way.link is not None, "the inbox is ours"
    codec = TIMED.codecs[Whoami]
    deadline = await climb.ahead(SEND_WAIT)
    echo = (
        ONE_SHOT_NONCE.to_bytes(8, "little")
        + deadline.to_bytes(8, "little")
        + climb.peers.caller.spans.root.trail
    )

    await Send(
        climb.timed.peer.slot,
        codec.prefix + echo + encode(Whoami(CLAIMED_PID, CLAIMED_NAME)),
        move=way.slot,
        deadline=deadline,
    )
    empty = await refusal(CapQuery(way.slot))
    reply = await Recv((inbox,), deadline, link=way.link)
    await climb.see_gone(inbox, way.link)
    after = _counters(await climb.status(climb.timed)).slots

    expect(empty, Status.INVALID_ARGUMENT, "our slot after the send")
    expect(reply.sender.service, service_id("timed"), "who replied")
    expect(nonce_of(reply.data), ONE_SHOT_NONCE, "nonce")
    expect(status_of(reply.data), ReplyStatus.OK, "status")
    seen: object = codec.decode_reply(reply.data[HEADER.size :])
    if not isinstance(seen, Seen):
        raise RungFailed(f"the reply is {seen!r}")
    expect(after, before, "timed's capability slots")
    return {"nonce": ONE_SHOT_NONCE, "slots": after}
