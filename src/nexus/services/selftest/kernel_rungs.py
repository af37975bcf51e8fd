"""Rungs about the kernel's promises, climbed with traps alone."""

from typing import TYPE_CHECKING, Final

from nexus.abi import (
    MESSAGE_SIZE_MAX,
    NO_WAIT,
    PAGE_SIZE,
    SLOTS_MAX,
    CapClone,
    CapClose,
    CapInfo,
    CapKind,
    CapQuery,
    EndpointClose,
    EndpointCreate,
    LinkCreate,
    LinkTerms,
    Nanos,
    NewLink,
    Now,
    QosClass,
    Recv,
    Rights,
    Send,
    SetTaskQos,
    Slot,
    Status,
    TaskQos,
    TaskStats,
    VmoCreate,
    VmoSeal,
)
from nexus.services.selftest.rung import Evidence, expect, refusal, require, status_of_trap
from nexus.wire import FRAME_KIND, HEADER, HEADER_SIZE

if TYPE_CHECKING:
    from nexus.services.selftest.climb import Climb

PAYLOAD_SIZES: Final = (0, 1, 8192)
PAYLOAD_TYPE: Final = 0x5A  # the op of the frames below; the reference probe sent type 0x5A5A
ROUND_TRIP_WAIT: Final = Nanos(2_000_000_000)  # ns; a local delivery takes microseconds
DEADLINE_AHEAD: Final = Nanos(50_000_000)  # ns; ladder #60
DEADLINE_WAITS: Final = 5  # waits of a group; the median hides one late wake-up of the host
DEADLINE_GROUPS_MAX: Final = 6  # groups; a kernel that is late is late in all of them
DEADLINE_LATE_MAX: Final = Nanos(1_000_000)  # ns; design.md section 3, promise 4
AT_ONCE: Final = 20_000_000  # ns; a trap takes microseconds, a busy host some milliseconds
LONG_PAST: Final = 1_000_000_000  # ns; no delay of a busy host makes a deadline so old
SMALL_BUFFER_SIZE: Final = 16  # bytes; ladder #67
VMO_SIZE: Final = 5000  # bytes; ladder #142, two pages
INVALID_QOS: Final = 255


async def _loopback(terms: LinkTerms) -> tuple[Slot, NewLink]:
    """An endpoint of one's own and a link into it."""
    endpoint = await EndpointCreate()
    return endpoint, await LinkCreate(endpoint, terms)


def _frame(payload: bytes) -> bytes:
    """A frame of type PAYLOAD_TYPE with a raw body, as the kernel carries it: unread."""
    return (
        HEADER.pack(FRAME_KIND, 1, PAYLOAD_TYPE, 0, 0xFFFF, 0, 0, 0, bytes(16), bytes(8)) + payload
    )


async def payload_roundtrip(climb: "Climb") -> Evidence:
    """#57: 0, 1 and 8192 bytes there and back through demo.testsvc, 8193 refused."""
    session = await climb.echo_session(len(PAYLOAD_SIZES))
    before = await TaskStats()

    payloads = [_frame(bytes(index & 0xFF for index in range(size))) for size in PAYLOAD_SIZES]
    back = []
    for sent in payloads:
        await Send(session.slot, sent)
        message = await Recv((session.endpoint,), await climb.ahead(ROUND_TRIP_WAIT))
        back.append(message.data)
    oversize = await refusal(Send(session.slot, _frame(bytes(8193))))
    after = await TaskStats()
    _ = await climb.end_session(session)

    for sent, received in zip(payloads, back, strict=True):
        expect(len(received), len(sent), "length")
        expect(received[2], PAYLOAD_TYPE, "type")
        expect(received, sent, f"bytes of the {len(sent) - HEADER_SIZE}-byte payload")
    expect(oversize, Status.INVALID_ARGUMENT, "8193 bytes")
    total = sum(map(len, payloads))
    expect(after.sent_size - before.sent_size, total, "kernel's count of bytes sent")
    expect(after.received_size - before.received_size, total, "kernel's count of bytes received")
    return {"sizes": list(PAYLOAD_SIZES), "bytes": total, "oversize": oversize.name}


async def deadline_timeout(_climb: "Climb") -> Evidence:
    """#59: a past deadline is TimedOut at once on an empty queue, and a message wins over it."""
    endpoint, link = await _loopback(LinkTerms())
    before = await TaskStats()
    start = await Now()
    past = Nanos(start - LONG_PAST)

    empty = await refusal(Recv((endpoint,), past))
    waited = await Now() - start
    unwaited = await refusal(Recv((endpoint,), NO_WAIT))
    await Send(link.slot, b"\x01queued")
    message = await Recv((endpoint,), past)
    after = await TaskStats()
    await EndpointClose(endpoint)
    await CapClose(link.slot)

    expect(empty, Status.TIMED_OUT, "past deadline, empty queue")
    require(waited <= AT_ONCE, f"the refusal of a past deadline took {waited} ns")
    expect(unwaited, Status.QUEUE_EMPTY, "no wait, empty queue")
    expect(message.data, b"\x01queued", "past deadline, queued message")
    expect(after.timeouts - before.timeouts, 1, "kernel's count of time-outs")
    return {"status": empty.name, "waited_ns": waited, "timeouts": 1}


async def deadline_fires(climb: "Climb") -> Evidence:
    """#60: a receive 50 ms ahead ends by itself: never early, and on an idle CPU at most a
    millisecond late. Whether the CPU was idle cannot be seen from here, so the quietest of a few
    groups of waits counts; each wait of every group counts for being early."""
    endpoint, link = await _loopback(LinkTerms())

    groups: list[list[int]] = []
    for _ in range(DEADLINE_GROUPS_MAX):
        groups.append([await _lateness(climb, endpoint) for _ in range(DEADLINE_WAITS)])
        if _median(groups[-1]) <= DEADLINE_LATE_MAX:
            break
    await EndpointClose(endpoint)
    await CapClose(link.slot)

    earliest = min(map(min, groups))
    require(earliest >= 0, f"a wait ended {-earliest} ns early")
    quietest = min(map(_median, groups))
    require(quietest <= DEADLINE_LATE_MAX, f"median lateness {quietest} ns in {len(groups)} groups")
    return {"ahead_ns": DEADLINE_AHEAD, "late_ns": groups}


def _median(values: list[int]) -> int:
    return sorted(values)[len(values) // 2]


async def _lateness(climb: "Climb", endpoint: Slot) -> int:
    deadline = await climb.ahead(DEADLINE_AHEAD)
    expect(await refusal(Recv((endpoint,), deadline)), Status.TIMED_OUT, "the wait")
    return await Now() - deadline


async def cap_move_rollback(_climb: "Climb") -> Evidence:
    """#66: a moving send that fails leaves the capability where it was, with its rights."""
    endpoint, full = await _loopback(LinkTerms(depth=1))
    other_endpoint, other = await _loopback(LinkTerms())
    moved_endpoint, moved = await _loopback(LinkTerms())
    await Send(full.slot, b"\x01fills the queue")
    before = await TaskStats()

    queue_full = await refusal(Send(full.slot, b"\x01a", move=moved.slot))
    past = Nanos(await Now() - 1)
    timed_out = await refusal(Send(full.slot, b"\x01b", move=moved.slot, deadline=past))
    await EndpointClose(other_endpoint)
    closed = await refusal(Send(other.slot, b"\x01c", move=moved.slot))
    after = await TaskStats()
    await Send(moved.slot, b"\x01still works")
    works = await Recv((moved_endpoint,), NO_WAIT)

    expect(queue_full, Status.QUEUE_FULL, "full queue")
    expect(timed_out, Status.TIMED_OUT, "past deadline")
    expect(closed, Status.NO_SUCH_ENDPOINT, "closed endpoint")
    expect(works.data, b"\x01still works", "message over the capability that stayed")
    expect(works.link, moved.link, "its link")
    expect(after.slots, before.slots - 1, "slots after one close and no move")
    waiting = await Recv((endpoint,), NO_WAIT)
    expect(waiting.cap, None, "capability of the one queued message")
    expect(await refusal(Recv((endpoint,), NO_WAIT)), Status.QUEUE_EMPTY, "nothing else came")
    for slot in (full.slot, other.slot, moved.slot):
        await CapClose(slot)
    for slot in (endpoint, moved_endpoint):
        await EndpointClose(slot)
    return {"refusals": [queue_full.name, timed_out.name, closed.name], "slots": after.slots}


async def full_table_keeps_message(_climb: "Climb") -> Evidence:
    """#67: at 96 slots a message with a capability stays first; small buffers lose nothing."""
    endpoint, link = await _loopback(LinkTerms())
    moved_endpoint, moved = await _loopback(LinkTerms())
    await Send(link.slot, b"\x01carries a capability", move=moved.slot)
    free = SLOTS_MAX - (await TaskStats()).slots
    filler = [await CapClone(link.slot) for _ in range(free)]

    queued = (await TaskStats()).queued
    no_space = await refusal(Recv((endpoint,), NO_WAIT))
    kept = (await TaskStats()).queued
    beyond = await refusal(CapClone(link.slot))
    await CapClose(filler.pop())
    too_small = await refusal(Recv((endpoint,), NO_WAIT, size_max=SMALL_BUFFER_SIZE))
    kept_again = (await TaskStats()).queued
    message = await Recv((endpoint,), NO_WAIT)
    after = (await TaskStats()).queued

    expect(no_space, Status.NO_SPACE, "receive at 96 slots")
    expect(beyond, Status.NO_SPACE, "a 97th slot")
    expect(too_small, Status.INVALID_ARGUMENT, "receive into 16 bytes")
    expect((kept, kept_again, after), (queued, queued, queued - 1), "queued messages")
    expect(message.data, b"\x01carries a capability", "the message that stayed")
    require(message.cap is not None, "its capability")
    assert message.cap is not None
    await Send(message.cap, b"\x01arrives")
    arrived = await Recv((moved_endpoint,), NO_WAIT)
    expect(arrived.data, b"\x01arrives", "message over the capability that arrived")
    for slot in (*filler, message.cap, link.slot):
        await CapClose(slot)
    for slot in (endpoint, moved_endpoint):
        await EndpointClose(slot)
    return {"slots": SLOTS_MAX, "refusals": [no_space.name, too_small.name]}


async def qos(climb: "Climb") -> Evidence:
    """#75: a task may lower or keep its class, never raise it, and an unknown class is refused."""
    own = await TaskQos()
    audits = await climb.qos_audit()

    await SetTaskQos(None, own)
    escalation = await status_of_trap(SetTaskQos(None, QosClass.INTERACTIVE))
    invalid = await status_of_trap(SetTaskQos(None, INVALID_QOS))
    held = await climb.qos_held_by_kernel()
    kept = await TaskQos()
    fresh = (await climb.qos_audit())[len(audits) :]
    await SetTaskQos(None, own)  # whatever came of it, the other rungs need the class

    expect(own, QosClass.NORMAL, "own class")
    expect(escalation, Status.PERMISSION_DENIED, "raising the own class")
    expect(invalid, Status.INVALID_ARGUMENT, "class 255")
    expect(held, QosClass.NORMAL, "class the kernel holds")
    expect(kept, QosClass.NORMAL, "own class afterwards")
    reasons = [line.split("reason=")[1].split()[0] for line in fresh]
    expect(
        reasons, ["applied", "unauthorized_escalation", "invalid_qos_class"], "the audit's reasons"
    )
    return {"held": int(held), "audit": reasons}


async def cap_query_vmo(climb: "Climb") -> Evidence:
    """#142: a 5000-byte VMO is two pages long, in the answer and in the kernel's account."""
    before = await TaskStats()

    vmo = await VmoCreate(VMO_SIZE)
    await VmoSeal(vmo)
    info = await CapQuery(vmo)
    after = await TaskStats()
    endpoint = await refusal(CapQuery(climb.boot.endpoint))
    await CapClose(vmo)

    length = -(-VMO_SIZE // PAGE_SIZE) * PAGE_SIZE
    expect(info, CapInfo(CapKind.VMO, Rights.MAP | Rights.MANAGE, length), "answer")
    expect(endpoint, Status.PERMISSION_DENIED, "query of an endpoint")
    expect(after.vmo_size - before.vmo_size, length, "kernel's count of VMO bytes")
    return {"kind": int(info.kind), "length": info.length}


assert HEADER_SIZE + PAYLOAD_SIZES[-1] == MESSAGE_SIZE_MAX, "the largest payload fills a message"
