"""Rungs about what survives: the death of statefsd, a restart of the system, a power cut, a bit
that flipped."""

import hashlib
from typing import TYPE_CHECKING, Any, Final

import msgspec

from nexus.abi import (
    AbiError,
    CapClose,
    CapDerive,
    ConsoleWrite,
    EndpointClose,
    EndpointCreate,
    LinkCreate,
    LinkTerms,
    Rights,
    Slot,
    Status,
    VmoCreate,
    service_id,
)
from nexus.ipc import Answer, Bulk, Refused, accept_bulk, offer_bulk
from nexus.protocols.keystored import Put as PutKey
from nexus.protocols.ladder import SELFTEST
from nexus.protocols.statefsd import (
    BULK_VALUE_MAX,
    LIST_MAX,
    ROOT,
    Batch,
    Change,
    Changes,
    Durability,
    Get,
    GetArea,
    GetBulk,
    GetStore,
    ListKeys,
    Put,
    PutBulk,
    StatefsdStatus,
)
from nexus.protocols.testsvc import UseState
from nexus.services.selftest.climb import CALL_WAIT, Climb
from nexus.services.selftest.policy_rungs import audits_of, fields_of, find, records_about
from nexus.services.selftest.rung import (
    Evidence,
    RungAbsent,
    RungFailed,
    expect,
    expect_type,
    require,
    status_of_trap,
)
from nexus.wire import ReplyStatus, encode

if TYPE_CHECKING:
    from nexus.ipc import Client

AREA: Final = b"/state/selftest/"
TESTSVC_KEY: Final = b"/state/testsvc/right"
PUT_KEY: Final = AREA + b"put"
BULK_KEY: Final = AREA + b"bulk"
BAD_KEY: Final = AREA + b"bad-bulk"  # is never there
KEPT_KEY: Final = AREA + b"kept"
VICTIM_KEY: Final = AREA + b"victim"  # whose record the runner damages between two boots
FIRST_KEYS: Final = tuple(AREA + b"first/%d" % number for number in range(4))
SECOND_KEYS: Final = tuple(AREA + b"second/%d" % number for number in range(6))
NOT_CUT_KEY: Final = AREA + b"not-cut"
SECOND_SIZE: Final = 1000  # bytes of a value: the batch is many sectors long
PUT_ID: Final = 100  # request ids of this client
KEYSTORE_AREA: Final = "/state/keystore/"
FOREIGN_KEY: Final = b"/state/keystore/anything"
HIDDEN_NAME: Final = b"hidden"  # an entry of keystored, so that there is something not to list
HIDDEN_VALUE: Final = b"canary: \x5a\xc3\x1e nobody finds this in the clear \x99\x07\xf0"
LIST_PAGES_MAX: Final = 1_000
BEYOND: Final = 0xFFFF_F000  # an offset that wraps with 32 bits
QUARANTINE_TEXT: Final = "record quarantined"
BULK_REFUSALS: Final = {
    "unsealed": f"kernel: {Status.PERMISSION_DENIED.name}",
    "not a VMO": StatefsdStatus.BAD_BULK.name,
    "no right to map": f"kernel: {Status.PERMISSION_DENIED.name}",
    "behind the end": StatefsdStatus.BAD_BULK.name,
    "wraps": StatefsdStatus.BAD_BULK.name,
}
CUT_LINE: Final = "the power may be cut"  # said before the batch that a power cut ends


def _token(climb: Climb, name: bytes) -> bytes:
    """A value that only this boot can have written."""
    return name + b" in boot " + climb.config.boot_id.hex().encode()


async def _put(climb: Climb, key: bytes, value: bytes) -> int:
    """Store a value durably; its sequence number."""
    request = Put(key, value, Durability.DURABLE, 0)
    stored = await climb.call(climb.client("statefsd"), request)
    require(stored.durable, f"{key!r} is not durable")
    return stored.sequence


async def statefs_put(climb: Climb) -> Evidence:
    """#100: a durable value, sent twice with one id, is one change, is read back and listed."""
    statefsd = climb.client("statefsd")
    value = _token(climb, b"put")
    request = Put(PUT_KEY, value, Durability.DURABLE, PUT_ID)
    before = await climb.call(statefsd, GetStore())
    used = await climb.call(statefsd, GetArea(AREA))

    first = await climb.call(statefsd, request)
    second = await climb.call(statefsd, request)
    got = await climb.call(statefsd, Get(PUT_KEY))
    listed = await climb.call(statefsd, ListKeys(AREA, b"", LIST_MAX))
    after = await climb.call(statefsd, GetStore())
    uses = await climb.call(statefsd, GetArea(AREA))

    expect((first.durable, first.repeated), (True, False), "the first answer")
    expect((second.durable, second.repeated), (True, True), "the second answer")
    expect(second.sequence, first.sequence, "sequence number of the repeated request")
    expect((got.value, got.sequence), (value, first.sequence), "the value")
    expect(first.sequence, before.sequence + 1, "sequence number of the change")
    expect(listed.keys.count(PUT_KEY), 1, "times the key is listed")
    expect(after.sequence, first.sequence, "statefsd's sequence number afterwards")
    expect(uses.keys - used.keys, 1, "growth of the area's keys")
    return {
        "sequence": got.sequence,
        "value": value.hex(),
        "area_growth": uses.size - used.size,
        "store": [before.sequence, after.sequence],
    }


async def unauthorized_access(climb: Climb) -> Evidence:
    """#101: the key store's area is denied, with an audit of who and what, and is not listed."""
    statefsd = climb.client("statefsd")
    if "keystored" in climb.clients:
        _ = await climb.call(climb.client("keystored"), PutKey(HIDDEN_NAME, HIDDEN_VALUE))

    denied = await statefsd.call(Get(FOREIGN_KEY), await climb.ahead(CALL_WAIT))
    audit = await audits_of(climb, "target", KEYSTORE_AREA, subject=climb.boot.name)
    client = f"0x{service_id(climb.boot.name):016x}"
    denials = await records_about(climb, "path", FOREIGN_KEY.decode(), {"client": client})
    listed = await _all_keys(climb, statefsd)
    store = await climb.call(statefsd, GetStore())

    expect(denied, Refused(ReplyStatus.DENIED), "a read of the key store's area")
    fields = fields_of(audit[0])
    wanted = {
        "decision": "deny",
        "reason": "policy",
        "subject": climb.boot.name,
        "action": "statefs.keystore",
        "target": KEYSTORE_AREA,
        "asked_by": "statefsd",
    }
    expect({name: fields.get(name) for name in wanted}, wanted, "the audit record")
    expect(audit[0].service, service_id("policyd"), "sender of the audit record")
    told = fields_of(denials[0])
    expect(denials[0].text, "access denied", "statefsd's record")
    expect(denials[0].service, service_id("statefsd"), "sender of statefsd's record")
    expect(told.get("right"), "statefs.keystore", "right in statefsd's record")
    seen = [key for key in listed if key.startswith(KEYSTORE_AREA.encode())]
    expect(seen, [], "key-store paths in a list of /state/")
    return {
        "record": audit[0].record,
        "denial": [told.get("path"), told.get("client")],
        "listed": len(listed),
        "keys": store.keys,
    }


async def _all_keys(climb: Climb, statefsd: "Client") -> list[bytes]:
    """Every key below /state/ that this client is shown."""
    keys: list[bytes] = []
    for _ in range(LIST_PAGES_MAX):
        after = keys[-1] if keys else b""
        page = await climb.call(statefsd, ListKeys(ROOT.encode(), after, LIST_MAX))
        keys += page.keys
        if not page.more:
            return keys
    raise RungFailed(f"the list did not end within {LIST_PAGES_MAX} pages")


async def bulk_vmo(climb: Climb) -> Evidence:
    """#102: 64 KiB by sealed VMO there and back, and four offers that are no such thing."""
    statefsd = climb.client("statefsd")
    seed = _token(climb, b"bulk")
    data = b"".join(
        hashlib.sha256(seed + b"%d" % number).digest() for number in range(BULK_VALUE_MAX // 32)
    )
    whole = PutBulk(BULK_KEY, 0, len(data), Durability.DURABLE, 0)

    stored = await climb.moved(statefsd, whole, await _offered(data))
    length, digest = await _bulk_of(climb, statefsd)
    maps = await _mappings(climb, statefsd)
    bad, behind, wraps = (
        PutBulk(BAD_KEY, offset, length, Durability.DURABLE, 0)
        for offset, length in ((0, len(data)), (4096, len(data)), (BEYOND, 4096))
    )
    refused = {
        "unsealed": await _refused(climb, bad, await VmoCreate(len(data))),
        "not a VMO": await _refused_link(climb, bad),
        "no right to map": await _refused_bare(climb, bad, data),
        "behind the end": await _refused(climb, behind, await _offered(data)),
        "wraps": await _refused(climb, wraps, await _offered(data)),
    }
    again = await _mappings(climb, statefsd)
    kept = await climb.call(statefsd, GetArea(AREA))

    require(stored.durable, "the bulk value is durable")
    expect((length, digest), (len(data), hashlib.sha256(data).hexdigest()), "the bulk value")
    expect(refused, BULK_REFUSALS, "refusals")
    expect(again, maps, "statefsd's count of mappings")
    return {
        "digest": digest,
        "sequence": stored.sequence,
        "refused": refused,
        "mappings": [maps, again],
        "keys": kept.keys,
    }


async def _offered(data: bytes) -> Slot:
    slot = await offer_bulk(data)
    if slot is None:
        raise RungFailed("no room for a VMO")
    return slot


async def _refused(climb: Climb, request: PutBulk, slot: Slot) -> str:
    """The status an offer is refused with: statefsd's, or the kernel's for what does not even
    travel, because it could still change or its receiver could do nothing with it."""
    deadline = await climb.ahead(CALL_WAIT)
    try:
        outcome = await climb.client("statefsd").ask(request, deadline, move=slot)
    except AbiError as error:
        _ = await status_of_trap(CapClose(slot))  # what a refused move leaves is rung 66's
        return f"kernel: {error.status.name}"
    return outcome.status.name if isinstance(outcome, Refused) else repr(outcome)


async def _refused_link(climb: Climb, request: PutBulk) -> str:
    endpoint = await EndpointCreate()
    link = await LinkCreate(endpoint, LinkTerms())
    assert link.link is not None, "the endpoint is ours"
    found = await _refused(climb, request, link.slot)
    await climb.see_gone(endpoint, link.link)
    await EndpointClose(endpoint)
    return found


async def _refused_bare(climb: Climb, request: PutBulk, data: bytes) -> str:
    slot = await _offered(data)
    bare = await CapDerive(slot, Rights.MANAGE)
    found = await _refused(climb, request, bare)
    await CapClose(slot)
    return found


async def _mappings(climb: Climb, statefsd: "Client") -> int:
    facts = {fact.name: fact.value for fact in (await climb.status(statefsd)).facts}
    return facts["mappings_total"]


# ------------------------------------------------------------------ what survives


async def persist(climb: Climb) -> Evidence:
    """#103: a durable value is there after statefsd was killed and another one started."""
    statefsd = climb.client("statefsd")
    value = _token(climb, b"kept")
    sequence = await _put(climb, KEPT_KEY, value)
    victim = await _put(climb, VICTIM_KEY, _token(climb, b"victim"))
    old = await climb.task("statefsd")

    killed = await climb.restart("statefsd")
    record = await climb.up_again("statefsd", old.generation + 1)
    new = await climb.task("statefsd")
    _ = await statefsd.call(Get(KEPT_KEY), await climb.ahead(CALL_WAIT))  # ends with the old link
    if "demo.testsvc" in climb.clients:  # it too finds the new instance
        _ = await climb.call(climb.testsvc, UseState(TESTSVC_KEY, b"again"))
    got = await climb.call(statefsd, Get(KEPT_KEY))
    store = await climb.call(statefsd, GetStore())

    expect(killed.generation, old.generation, "generation of the killed instance")
    expect((got.value, got.sequence), (value, sequence), "the value after the restart")
    expect(statefsd.generation, record.generation, "generation of the route")
    return {
        "value": value.hex(),
        "sequence": sequence,
        "victim": victim,
        "pids": [old.pid, new.pid],
        "generations": [old.generation, new.generation],
        "epoch": store.epoch,
        "boot_id": climb.config.boot_id.hex(),
    }


async def persist_reboot(climb: Climb) -> Evidence:
    """#104: it is there after a restart of the whole system. The runner knows what it was."""
    statefsd = climb.client("statefsd")

    got = await climb.call(statefsd, Get(KEPT_KEY))
    store = await climb.call(statefsd, GetStore())
    tasks = {row.name: row.pid for row in (await climb.tasks()).rows}

    require(_token(climb, b"kept") != got.value, "the value was written in this boot")
    return {
        "value": got.value.hex(),
        "sequence": got.sequence,
        "store": store.sequence,
        "epoch": store.epoch,
        "boot_id": climb.config.boot_id.hex(),
        "pids": tasks,
    }


async def before_the_power_cut(climb: Climb) -> Evidence:
    """What #105 looks for: a batch that was answered, and one that the cut may hit."""
    statefsd = climb.client("statefsd")
    first = [Change(key, _token(climb, key)) for key in FIRST_KEYS]
    second = [
        Change(key, _token(climb, key) * (SECOND_SIZE // len(_token(climb, key))))
        for key in SECOND_KEYS
    ]

    stored = await climb.call(statefsd, _batch(first))
    require(stored.durable, "the first batch is durable")
    evidence: Evidence = {
        "sequence": stored.sequence,
        "first": {
            key.decode(): _digest(change.value)
            for key, change in zip(FIRST_KEYS, first, strict=True)
        },
        "second": {
            key.decode(): _digest(change.value)
            for key, change in zip(SECOND_KEYS, second, strict=True)
        },
    }
    await ConsoleWrite(f"{SELFTEST}: {CUT_LINE}", msgspec.json.encode(evidence))
    later = await climb.call(statefsd, _batch(second))
    _ = await _put(climb, NOT_CUT_KEY, b"the power was not cut")
    return {**evidence, "later": later.sequence}


def _batch(changes: list[Change]) -> Batch:
    return Batch(encode(Changes(changes)), Durability.DURABLE, 0)


def _digest(value: bytes | None) -> str:
    return hashlib.sha256(value or b"").hexdigest()


async def persist_power_cut(climb: Climb) -> Evidence:
    """#105: what the batches are now. What they were the runner heard before the cut; where no
    power is cut there is nothing to see."""
    if await _digest_of(climb, NOT_CUT_KEY):
        raise RungAbsent("the power was not cut")
    first = {key.decode(): await _digest_of(climb, key) for key in FIRST_KEYS}
    second = {key.decode(): await _digest_of(climb, key) for key in SECOND_KEYS}

    require(all(first.values()), f"the answered batch is not complete: {first}")
    there = sum(bool(found) for found in second.values())
    require(there in {0, len(SECOND_KEYS)}, f"{there} of {len(SECOND_KEYS)} changes of one batch")
    return {"first": first, "second": second, "boot_id": climb.config.boot_id.hex()}


async def _digest_of(climb: Climb, key: bytes) -> str:
    """The digest of a value, "" if there is none."""
    outcome = await climb.client("statefsd").call(Get(key), await climb.ahead(CALL_WAIT))
    if isinstance(outcome, Refused) and outcome.status is StatefsdStatus.NOT_FOUND:
        return ""
    value: Any = getattr(outcome, "value", None)
    if not isinstance(value, bytes):
        raise RungFailed(f"{key!r}: {outcome!r}")
    return _digest(value)


async def corruption_quarantined(climb: Climb) -> Evidence:
    """#106: the damaged record is set aside by name, and nothing else is touched."""
    statefsd = climb.client("statefsd")

    damaged = await statefsd.call(Get(VICTIM_KEY), await climb.ahead(CALL_WAIT))
    store = await climb.call(statefsd, GetStore())
    others = {
        key.decode(): await _digest_of(climb, key) for key in (PUT_KEY, KEPT_KEY, *FIRST_KEYS)
    }
    _, bulk = await _bulk_of(climb, statefsd)
    lost = [each for each in store.lost if each.key == VICTIM_KEY]
    expect(damaged, Refused(StatefsdStatus.CORRUPTED), "a read of the damaged record")
    expect(len(lost), 1, f"quarantined records of that key, of {store.lost}")
    records = [
        record
        for record in await find(climb, "key", VICTIM_KEY.decode())
        if record.text == QUARANTINE_TEXT
    ]
    require(bool(records), "the journal has no record of the damage")
    fields = fields_of(records[0])
    expect(records[0].service, service_id("statefsd"), "sender of the record in the journal")
    expect(fields["offset"], str(lost[0].offset), "offset in the journal")
    return {
        "offset": lost[0].offset,
        "sequence": lost[0].sequence,
        "quarantined": store.quarantined,
        "backing": store.backing,
        "device": store.device,
        "others": others,
        "bulk": bulk,
        "record": records[0].record,
    }


async def _bulk_of(climb: Climb, statefsd: "Client") -> tuple[int, str]:
    """Length and digest of the bulk value."""
    outcome = await statefsd.ask(GetBulk(BULK_KEY), await climb.ahead(CALL_WAIT))
    if not isinstance(outcome, Answer):
        raise RungFailed(f"GetBulk ended with {outcome!r}")
    came = await accept_bulk(outcome.cap, 0, outcome.reply.length)
    bulk = expect_type(came, Bulk, "the bytes that came back")
    found = len(bulk.view), hashlib.sha256(bulk.view).hexdigest()
    await bulk.release()
    return found
