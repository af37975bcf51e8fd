"""Rungs about keystored: entries of one's own, the device key that never leaves, and the calls that
keystored makes in its client's place."""

import hashlib
from typing import Final

import msgspec

from nexus.abi import ConsoleWrite, Nanos, Recv, Send, service_id
from nexus.ipc import Context, Refused, TimedOut
from nexus.ipc.context import MAKER_SIZE
from nexus.protocols.keystored import PROTOCOL as KEYSTORED
from nexus.protocols.keystored import (
    PUBLIC_KEY_SIZE,
    Delete,
    DeviceKey,
    ExportPrivateKey,
    GenerateKey,
    Get,
    GetPublicKey,
    GetStore,
    KeyState,
    KeystoredStatus,
    Put,
)
from nexus.protocols.ladder import SELFTEST
from nexus.protocols.rngd import GetSource
from nexus.protocols.statefsd import Delete as StateDelete
from nexus.protocols.statefsd import Durability, GetCalls, Seen
from nexus.protocols.statefsd import Get as StateGet
from nexus.protocols.statefsd import Put as StatePut
from nexus.protocols.testsvc import UseKeys
from nexus.services.selftest.climb import CALL_WAIT, Climb
from nexus.services.selftest.policy_rungs import audits_of, fields_of, pages
from nexus.services.selftest.routing_rungs import LATE_MAX, grown, use_once
from nexus.services.selftest.rung import Evidence, RungFailed, expect, expect_type, require
from nexus.wire import HEADER, ReplyStatus, encode, nonce_of, status_of

NAME: Final = b"entry"
OTHER_NAME: Final = b"never put"
CANARY: Final = b"canary: \x8e\x11 a value that is nowhere in the clear \xd4\x02\xa9\x7b"
KEY_NOTE: Final = b"/state/selftest/device-key"  # what the next boot compares
RAW_NONCE: Final = (1 << 61) + 107  # no call of this run reaches it
EXPORT_NONCE: Final = (1 << 61) + 109
SHORT: Final = Nanos(50_000)  # ns; a put of keystored's takes longer: three calls and a disk
NESTED: Final = Nanos(1_500_000_000)  # ns; shorter than any default of keystored's own
SEEN_MAX: Final = 16
KEYSTORED_ID: Final = service_id("keystored")
EXPORT_ACTION: Final = "device.key.export"
SPANS_BETWEEN_MAX: Final = 10_000  # spans that keystored makes between two calls of ours
SEED_SIZE: Final = 32  # bytes of an Ed25519 seed: RFC 8032
KEY_HANDLERS: Final = ("keystored", "rngd", "statefsd")  # whose hands the seed went through
JOURNAL_LINE: Final = f"{SELFTEST}: journal of"


async def opening_read(climb: Climb) -> Evidence:
    """#35: what statefsd has heard of keystored, before anybody asked keystored for anything."""
    page = await climb.call(climb.client("statefsd"), GetCalls(KEYSTORED_ID, SEEN_MAX))
    return {
        "total": page.total,
        "ops": [seen.op for seen in page.seen],
        "senders": sorted({f"{seen.sender:016x}" for seen in page.seen}),
        "spans": [seen.parent.hex() for seen in page.seen],
    }


async def routing_keystored(climb: Climb) -> Evidence:
    """#52: keystored found by name, one round trip on that very link, init's counter and entry."""
    before = await climb.route_counts()

    generation = await use_once(climb, "keystored", KEYSTORED, GetStore())
    counted = grown(before, await climb.route_counts())

    expect(counted, {"ok": 1}, "growth of init's route counters")
    expect(generation, (await climb.task("keystored")).generation, "keystored's generation")
    return {"counters": counted, "generation": generation}


async def nested_deadline(climb: Climb) -> Evidence:
    """#74: what keystored asks of statefsd in our place is no later than our deadline, in our
    trace and under keystored's span; and a deadline too short ends our call."""
    keystored = climb.client("keystored")
    contexts = [climb.new_context() for _ in range(2)]
    nested = [await _nested(climb, context) for context in contexts]

    short = await climb.ahead(SHORT)
    outcome = await keystored.call(Put(NAME, b"too short"), short)
    late = await climb.ahead(Nanos(0)) - short
    _ = await climb.call(keystored, Get(NAME))  # and whatever came of it is over

    for deadline, context, seen in nested:
        require(bool(seen), "statefsd saw no call of keystored's in our trace")
        for each in seen:
            require(each.deadline <= deadline, f"{each.deadline - deadline} ns after our deadline")
            require(each.parent != context.span, "the parent is our own span, not keystored's")
            require(any(each.parent), "there is no parent")
    spans = [int.from_bytes(seen[0].parent[MAKER_SIZE:], "little") for _, _, seen in nested]
    apart = (spans[1] - spans[0]) % (1 << 32)
    require(0 < apart < SPANS_BETWEEN_MAX, "the parents are not spans of one task")
    makers = {int.from_bytes(seen[0].parent[:MAKER_SIZE], "little") for _, _, seen in nested}
    expect(makers, {KEYSTORED_ID & 0xFFFF_FFFF}, "who made the parents, by their ids")
    # Whose wait ends first says so: keystored, that statefsd had no time left or that it had none
    # itself, or our own.
    ends: dict[Refused | TimedOut, str] = {
        TimedOut(): "timed out",
        Refused(KeystoredStatus.UNAVAILABLE): "unavailable",
        Refused(ReplyStatus.EXPIRED): "expired",
    }
    ended = ends.get(outcome, "") if isinstance(outcome, Refused | TimedOut) else ""
    require(bool(ended), f"a call with too short a deadline ended with {outcome!r}")
    require(late <= LATE_MAX, f"it ended {late} ns after its deadline")
    return {
        "deadlines": [
            [deadline, *(each.deadline for each in seen)] for deadline, _, seen in nested
        ],
        "traces": [[context.trace.hex(), seen[0].trace.hex()] for _, context, seen in nested],
        "spans": [[context.span.hex(), seen[0].parent.hex()] for _, context, seen in nested],
        "outcome": ended,
        "late_ns": late,
    }


async def _nested(climb: Climb, context: Context) -> tuple[Nanos, Context, list[Seen]]:
    """A put at keystored, and what statefsd saw of it."""
    deadline = await climb.ahead(NESTED)
    outcome = await climb.client("keystored").call(Put(NAME, b"nested"), deadline, context)
    if isinstance(outcome, Refused) or not hasattr(outcome, "__struct_fields__"):
        raise RungFailed(f"Put ended with {outcome!r}")
    calls = await _calls_of_keystored(climb)
    return deadline, context, [seen for seen in calls if seen.trace == context.trace]


async def _calls_of_keystored(climb: Climb) -> list[Seen]:
    page = await climb.call(climb.client("statefsd"), GetCalls(KEYSTORED_ID, SEEN_MAX))
    return page.seen


async def entries(climb: Climb) -> Evidence:
    """#107: an entry of one's own: kept, read, dropped, missed; and nobody else's to read."""
    keystored = climb.client("keystored")
    before = (await climb.call(climb.client("statefsd"), GetCalls(KEYSTORED_ID, 1))).total

    _ = await climb.call(keystored, Put(NAME, CANARY))
    got = await climb.call(keystored, Get(NAME))
    foreign = await climb.call(climb.testsvc, UseKeys(NAME))
    missed = await keystored.call(Get(OTHER_NAME), await climb.ahead(CALL_WAIT))
    malformed = await _raw(climb, KEYSTORED.codecs[Get].prefix, RAW_NONCE, b"\xc1")
    _ = await climb.call(keystored, Delete(NAME))
    gone = await keystored.call(Get(NAME), await climb.ahead(CALL_WAIT))
    again = await keystored.call(Delete(NAME), await climb.ahead(CALL_WAIT))
    _ = await climb.call(keystored, Put(NAME, CANARY))
    calls = await climb.call(climb.client("statefsd"), GetCalls(KEYSTORED_ID, SEEN_MAX))

    expect(got.value, CANARY, "the value")
    expect(foreign.status, int(KeystoredStatus.NOT_FOUND), "another service's read of that name")
    missing = (missed, gone, again)
    refused = [expect_type(each, Refused, "what is not there").status for each in missing]
    expect(refused, [KeystoredStatus.NOT_FOUND] * 3, "a miss, a read and a drop of what is gone")
    expect(status_of(malformed), ReplyStatus.MALFORMED, "status of a bad body")
    ops = {seen.op for seen in calls.seen}
    wanted = {StatePut.INFO.op, StateGet.INFO.op, StateDelete.INFO.op}
    require(calls.total > before, "statefsd counted no call of keystored's")
    require(wanted <= ops, f"statefsd heard of keystored only {sorted(ops)}")
    return {
        "statuses": [foreign.status, *map(int, refused), status_of(malformed)],
        "calls": [before, calls.total],
        "ops": sorted(ops),
    }


async def _raw(climb: Climb, prefix: bytes, nonce: int, body: bytes) -> bytes:
    """The whole answer of keystored to a frame with this nonce."""
    peer = climb.client("keystored").peer
    deadline = await climb.ahead(CALL_WAIT)
    echo = nonce.to_bytes(8, "little") + deadline.to_bytes(8, "little")
    await Send(peer.slot, prefix + echo + climb.peers.caller.spans.root.trail + body)
    reply = await Recv((peer.inbox,), deadline, link=peer.link)
    expect(nonce_of(reply.data), nonce, "nonce of the answer")
    return bytes(reply.data)


async def device_key(climb: Climb) -> Evidence:
    """#108: one device key in a device's life, of 32 bytes that rngd gave keystored for it."""
    keystored = climb.client("keystored")
    none = await keystored.call(GetPublicKey(), await climb.ahead(CALL_WAIT))
    before = await _given_to_keystored(climb)

    key = await climb.call(keystored, GenerateKey())
    given = await _given_to_keystored(climb)
    second = await keystored.call(GenerateKey(), await climb.ahead(CALL_WAIT))
    public = await climb.call(keystored, GetPublicKey())
    store = await climb.call(keystored, GetStore())

    expect(none, Refused(KeystoredStatus.KEY_NOT_FOUND), "the public key before there is one")
    expect(given - before, SEED_SIZE, "bytes that rngd gave keystored meanwhile")
    expect(len(key.public_key), PUBLIC_KEY_SIZE, "bytes of the public key")
    expect(key.device_id, hashlib.sha256(key.public_key).hexdigest(), "the device id")
    expect(second, Refused(KeystoredStatus.KEY_EXISTS), "a second device key")
    expect(public, key, "the public key that is kept")
    expect((store.keygens, store.device_key), (1, KeyState.PRESENT), "keystored's own account")
    return {
        "public_key": key.public_key.hex(),
        "device_id": key.device_id,
        "given": [before, given],
    }


async def _given_to_keystored(climb: Climb) -> int:
    source = await climb.call(climb.client("rngd"), GetSource())
    return sum(row.given for row in source.clients if row.service == KEYSTORED_ID)


async def export_rejected(climb: Climb) -> Evidence:
    """#109: the private key is given to nobody, and whoever asks is in the journal."""
    codec = KEYSTORED.codecs[ExportPrivateKey]
    answer = await _raw(climb, codec.prefix, EXPORT_NONCE, encode(ExportPrivateKey()))
    subject = f"0x{climb.boot.service:016x}"
    records = await audits_of(climb, "action", EXPORT_ACTION, subject=subject)
    journal = {name: await _show_journal(climb, name) for name in KEY_HANDLERS}

    expect(status_of(answer), KeystoredStatus.EXPORT_DENIED, "status of the answer")
    expect(len(answer), HEADER.size, "bytes of the answer, a header alone")
    expect(records[0].service, KEYSTORED_ID, "sender of the audit record")
    expect(fields_of(records[0]).get("decision"), "deny", "decision in the audit")
    return {
        "status": status_of(answer),
        "size": len(answer),
        "record": records[0].record,
        "service": f"{records[0].service:016x}",
        "fields": fields_of(records[0]),
        "journal": journal,
    }


async def _show_journal(climb: Climb, name: str) -> int:
    """Print what the journal has of a service, for the runner to look through; the records.

    This task does not know the seed, and the runner cannot read the journal.
    """
    records, _ = await pages(climb, service=service_id(name))
    for each in records:
        shown = {"record": each.record, "text": each.text, "fields": fields_of(each)}
        await ConsoleWrite(f"{JOURNAL_LINE} {name}", msgspec.json.encode(shown))
    return len(records)


async def device_key_restarted(climb: Climb) -> Evidence:
    """#110, the first half: keystored is killed, and the next one has the same key."""
    keystored = climb.client("keystored")
    before = await climb.call(keystored, GetPublicKey())
    old = await climb.task("keystored")

    _ = await climb.restart("keystored")
    _ = await climb.up_again("keystored", old.generation + 1)
    _ = await keystored.call(GetStore(), await climb.ahead(CALL_WAIT))  # ends with the old link
    after = await climb.call(keystored, GetPublicKey())
    store = await climb.call(keystored, GetStore())
    note = StatePut(KEY_NOTE, after.public_key, Durability.DURABLE, 0)
    _ = await climb.call(climb.client("statefsd"), note)
    _ = await climb.call(climb.testsvc, UseKeys(NAME))  # it too finds the new instance

    expect(after, before, "the device key after keystored's restart")
    expect(store.keygens, 0, "keys made by the new instance")
    return {
        **_key_evidence(climb, after, store.keygens),
        "generations": [old.generation, (await climb.task("keystored")).generation],
    }


async def device_key_persists(climb: Climb) -> Evidence:
    """#110: the device key of the boot before."""
    keystored = climb.client("keystored")

    key = await climb.call(keystored, GetPublicKey())
    store = await climb.call(keystored, GetStore())
    noted = await climb.call(climb.client("statefsd"), StateGet(KEY_NOTE))

    expect(key.public_key, noted.value, "the public key, against the note of the boot before")
    expect(store.keygens, 0, "keys made in this boot")
    return _key_evidence(climb, key, store.keygens)


def _key_evidence(climb: Climb, key: DeviceKey, keygens: int) -> Evidence:
    return {
        "public_key": key.public_key.hex(),
        "device_id": key.device_id,
        "keygens": keygens,
        "boot_id": climb.config.boot_id.hex(),
    }
