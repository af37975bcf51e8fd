"""statefsd as its clients see it, on the tiny kernel and a disk that can fail."""

import subprocess
import sys
from collections.abc import Coroutine, Mapping
from typing import Any

import pytest

from nexus.abi import (
    BLOCK_SIZE,
    INIT_NAME,
    LinkTerms,
    Message,
    Nanos,
    Recv,
    Send,
    VmoCreate,
    VmoMap,
    VmoSeal,
    VmoShare,
    VmoWrite,
    service_id,
)
from nexus.drivers.crc import SLOW, crc32c
from nexus.ipc import Answer, Exchange, Refused
from nexus.kernel.sim.disk import NOTHING, Disk, DiskFaults, Failure, Operation
from nexus.protocols.init import PROOF_CONTROL
from nexus.protocols.meta import GetStatus, Health, Healthy, MetaStatus, ServiceStatus, Stop
from nexus.protocols.statefsd import (
    BATCH_MAX,
    BOOT_RIGHT,
    BULK_VALUE_MAX,
    INLINE_VALUE_MAX,
    KEYSTORE_RIGHT,
    PROTOCOL,
    READ_RIGHT,
    WRITE_RIGHT,
    AreaUse,
    Batch,
    BulkValue,
    Calls,
    Change,
    Changes,
    Delete,
    Durability,
    Get,
    GetArea,
    GetBulk,
    GetCalls,
    GetStore,
    Keys,
    ListKeys,
    Put,
    PutBulk,
    StatefsdStatus,
    Store,
    Stored,
    Sync,
    Synced,
    Value,
)
from nexus.runtime.program import Unusable
from nexus.services.statefsd.config import Settings, disk_fault
from nexus.services.statefsd.engine import layout
from nexus.services.statefsd.engine.errors import Lost as LostRecord
from nexus.services.statefsd.engine.journal import NO_BLOCK, Place, encode_commit, encode_entry
from nexus.services.statefsd.engine.record import Kind, encode_record
from nexus.services.statefsd.group import GROUP_MAX, GROUP_SIZE_MAX, Group
from nexus.services.statefsd.service import Disk as OpenDisk
from nexus.services.statefsd.service import Statefsd
from nexus.wire import Codec, ReplyStatus, Request, encode, status_of
from tests.fakes.diskdevice import DiskDevice
from tests.fakes.gate import RightsGate
from tests.fakes.pair import FAR, Pair

BLOCKS = 8192  # 4 MiB
D, A = Durability.DURABLE, Durability.ACCEPTED
ME = INIT_NAME
RIGHTS = {ME: [READ_RIGHT, WRITE_RIGHT]}


class Lines:
    """A log that keeps its lines."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, dict[str, Any]]] = []

    def error(self, text: str, /, **fields: Any) -> None:
        self.lines.append((text, fields))

    def warning(self, text: str, /, **fields: Any) -> None:
        self.lines.append((text, fields))


def driven(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """The result of a coroutine that needs no kernel."""
    try:
        trap = coroutine.send(None)
    except StopIteration as stop:
        return stop.value
    raise AssertionError(f"{trap!r} needs a kernel")


class System:
    """statefsd on a disk, and clients of it."""

    def __init__(
        self,
        disk: Disk | None = None,
        *,
        rights: Mapping[str, list[str]] = RIGHTS,
        writable: bool = True,
        **settings: Any,
    ) -> None:
        self.disk = Disk(BLOCKS) if disk is None else disk
        self.device = DiskDevice(self.disk, writable=writable)
        self.gate = RightsGate(rights)
        self.log = Lines()
        self.sent = 0
        self.service = Statefsd(
            Settings(**settings), self.gate, self.log, self._open, self._send_given
        )
        driven(self.service.start())
        self.pair = Pair(self.service, PROTOCOL)

    async def _open(self) -> OpenDisk:
        return OpenDisk("disk", "model", self.device)

    async def _send_given(self) -> None:
        await self.pair.server.send_given()

    def ask(self, *requests: Request[Any], name: str = ME) -> list[Any]:
        """The outcomes of requests in a row, as a client that then ends."""

        async def body(link: Exchange) -> list[Any]:
            return [await link.call(request, FAR) for request in requests]

        outcomes: list[Any] = self.run(body, name)
        return outcomes

    def run(self, body: Any, name: str = ME) -> Any:
        """What a client's body returns; the crash of the service is the test's failure."""
        try:
            return self.pair.client(body, name=name)
        finally:
            if self.pair.serving.failure is not None:
                raise self.pair.serving.failure

    def one(self, request: Request[Any], name: str = ME) -> Any:
        (outcome,) = self.ask(request, name=name)
        return outcome

    def together(self, *requests: Request[Any], name: str = ME) -> list[Any]:
        """The outcomes of requests that are all in the queue before the first is served."""

        async def body(link: Exchange) -> list[Any]:
            started = [await link.start(request, FAR) for request in requests]
            return [await link.finish(each) for each in started]

        outcomes: list[Any] = self.run(body, name)
        return outcomes

    def again(self, disk: Disk | None = None, **options: Any) -> "System":
        """Another instance on the same disk, or on what a power cut left of it."""
        return System(self.disk if disk is None else disk, **options)

    def stop(self) -> "System":
        """End this instance in order."""
        _ = self.one(Stop())
        return self

    @property
    def held(self) -> int:
        return len(self.pair.serving.table)


def put(key: bytes, value: bytes = b"v", durability: Durability = D, request_id: int = 0) -> Put:
    return Put(key, value, durability, request_id)


def batch(*changes: tuple[bytes, bytes | None], request_id: int = 0) -> Batch:
    packed = encode(Changes([Change(key, value) for key, value in changes]))
    return Batch(bytes(packed), D, request_id)


def ls(prefix: bytes = b"/state/", after: bytes = b"", count: int = 24) -> ListKeys:
    return ListKeys(prefix, after, count)


def packet(codec: Codec, requests: list[Any]) -> bytes:
    """Requests in one packet, as no client of ours would send them."""
    numbers = (77).to_bytes(8, "little") + int(FAR).to_bytes(8, "little")
    return codec.batch_prefix + numbers + bytes(range(24)) + bytes(encode(requests))


async def raw(link: Exchange, frame: bytes) -> bytes:
    """Send bytes as they are and receive what comes back."""
    await Send(link.peer.slot, frame, deadline=FAR)
    message: Message = await Recv((link.peer.inbox,), FAR, link=link.peer.link)
    return message.data


K = b"/state/t/key"


# ------------------------------------------------------------------ values


def test_a_value_is_what_was_put_until_it_is_replaced_or_dropped() -> None:
    system = System()

    first, value, second, replaced, gone, missing = system.ask(
        put(K, b"one"), Get(K), put(K, b"two", A), Get(K), Delete(K, D, 0), Get(K)
    )

    assert first == Stored(1, durable=True, repeated=False)
    assert value == Value(b"one", 1)
    assert second == Stored(2, durable=False, repeated=False)
    assert replaced == Value(b"two", 2)
    assert gone == Stored(3, durable=True, repeated=False)
    assert missing == Refused(StatefsdStatus.NOT_FOUND)


def test_keys_are_listed_in_byte_order_a_page_at_a_time() -> None:
    system = System()
    keys = [b"/state/t/%02d" % number for number in range(5)]
    _ = system.ask(*[put(key, b"", A) for key in reversed(keys)])

    first, second, none, deeper = system.ask(
        ls(b"/state/t/", count=3),
        ls(b"/state/t/", keys[2]),
        ls(b"/state/t/", keys[4]),
        ls(b"/state/t/00/"),
    )

    assert first == Keys(keys[:3], more=True)
    assert second == Keys(keys[3:], more=False)
    assert none == deeper == Keys([], more=False)


def test_a_batch_is_done_as_one_and_deleting_what_is_not_there_is_no_error() -> None:
    system = System()

    done, one, two = system.ask(
        batch((K, b"1"), (b"/state/t/b", b"2"), (b"/state/t/c", None)), Get(K), Get(b"/state/t/b")
    )

    assert done.durable
    assert (one.value, two.value) == (b"1", b"2")
    assert one.sequence <= two.sequence <= done.sequence


def test_the_same_request_is_applied_once_also_after_a_restart() -> None:
    system = System()
    first, again = system.ask(put(K, b"1", D, 7), put(K, b"2", D, 7))

    restarted = system.again()
    later, value, other = restarted.ask(put(K, b"3", D, 7), Get(K), put(K, b"4", D, 8))

    assert again == Stored(first.sequence, durable=True, repeated=True)
    assert later == again
    assert value.value == b"1"
    assert (other.repeated, other.sequence > first.sequence) == (False, True)


def test_a_request_id_is_its_clients_own() -> None:
    system = System(rights={ME: [READ_RIGHT, WRITE_RIGHT], "other": [WRITE_RIGHT]})

    mine = system.one(put(K, b"1", D, 7))
    theirs = system.one(put(K, b"2", D, 7), name="other")

    assert not mine.repeated
    assert not theirs.repeated
    assert system.one(Get(K)).value == b"2"


def test_a_delete_that_is_repeated_by_its_id_is_no_missing_key() -> None:
    system = System()

    _, gone, again, missing = system.ask(put(K), Delete(K, D, 5), Delete(K, D, 5), Delete(K, D, 6))

    assert again == Stored(gone.sequence, durable=True, repeated=True)
    assert missing == Refused(StatefsdStatus.NOT_FOUND)


def test_an_accepted_request_repeated_as_durable_is_made_durable() -> None:
    system = System()

    accepted, durable = system.ask(put(K, b"1", A, 9), put(K, b"1", D, 9))

    assert (accepted.durable, accepted.repeated) == (False, False)
    assert (durable.durable, durable.repeated) == (True, True)
    cut = system.again(Disk(BLOCKS, system.disk.durable_image()))
    assert cut.one(Get(K)).value == b"1"


# ------------------------------------------------------------------ refusals


@pytest.mark.covers(
    "statefsd.VALUE_TOO_LARGE",
    "statefsd.KEY_TOO_LONG",
    "statefsd.INVALID_KEY",
    "statefsd.LARGE",
)
def test_every_wrong_shape_has_its_status_and_costs_no_question() -> None:
    system = System(rights={})
    long = b"/state/t/" + b"k" * 255
    big = bytes(INLINE_VALUE_MAX + 1)
    trick = b"/state/t/../keystore/k"
    refusals: dict[StatefsdStatus, list[Request[Any]]] = {
        StatefsdStatus.KEY_TOO_LONG: [
            put(long), Get(long), GetBulk(long), Delete(long, D, 0), PutBulk(long, 0, 1, D, 0),
            batch((long, b"")), ls(long + b"/"), ls(after=long), Sync(long), GetArea(long),
        ],
        StatefsdStatus.INVALID_KEY: [
            put(trick), Get(trick), GetBulk(trick), Delete(trick, D, 0),
            PutBulk(trick, 0, 1, D, 0), batch((K, b"1"), (trick, None)), batch((K, b"1"), (K, b"")),
            ls(trick + b"/"), ls(b"/state/t"), ls(after=trick), Sync(K), GetArea(b"/state/a/b/"),
        ],
        StatefsdStatus.VALUE_TOO_LARGE: [
            put(K, big), PutBulk(K, 0, BULK_VALUE_MAX + 1, D, 0),
        ],
    }  # fmt: skip

    for status, requests in refusals.items():
        assert system.ask(*requests) == [Refused(status)] * len(requests)

    assert system.gate.asked == []
    assert system.device.writes <= 4, "only the opening has written"


def test_a_batch_that_is_none_is_malformed() -> None:
    system = System()
    too_many = encode(Changes([Change(b"/state/%d" % n, None) for n in range(BATCH_MAX)]))

    outcomes = system.ask(
        Batch(b"\xc1", D, 0), Batch(bytes(too_many) + b"\0", D, 0), Batch(b"\x91\x90", D, 0)
    )

    assert outcomes == [Refused(ReplyStatus.MALFORMED)] * 3
    nothing_to_do = system.one(Batch(bytes(too_many), D, 0))
    assert nothing_to_do == Stored(0, durable=True, repeated=False)
    assert isinstance(system.one(GetStatus()), ServiceStatus)


def test_a_denied_first_write_changes_nothing_and_is_told_with_path_and_sender() -> None:
    system = System(rights={"writer": [WRITE_RIGHT, READ_RIGHT]})

    denied = system.one(put(K), name="stranger")
    stored = system.one(put(K, b"1"), name="writer")

    assert denied == Refused(ReplyStatus.DENIED)
    assert stored == Stored(1, durable=True, repeated=False)
    sender = f"0x{service_id('stranger'):016x}"
    assert system.log.lines == [
        ("access denied", {"path": K.decode(), "client": sender, "right": WRITE_RIGHT})
    ]
    assert system.service.facts()["denied_total"] == 1


@pytest.mark.parametrize(
    "asked",
    [
        put(b"/state/keystore/k"),
        Get(b"/state/keystore/k"),
        GetBulk(b"/state/keystore/k"),
        Delete(b"/state/keystore/k", D, 0),
        ls(b"/state/keystore/"),
        ls(b"/state/keystore/deeper/"),
        batch((K, b"1"), (b"/state/keystore/k", None)),
        Sync(b"/state/keystore/"),
        GetArea(b"/state/keystore/"),
        PutBulk(b"/state/keystore/k", 0, 1, D, 0),
    ],
    ids=lambda request: type(request).__name__,
)
def test_a_special_area_is_for_its_own_right_alone(asked: Request[Any]) -> None:
    system = System(
        rights={ME: [READ_RIGHT, WRITE_RIGHT, BOOT_RIGHT], "keystored": [KEYSTORE_RIGHT]}
    )

    denied = system.one(asked)
    allowed = system.one(asked, name="keystored")

    assert denied == Refused(ReplyStatus.DENIED)
    if not isinstance(asked, Batch):  # which also writes elsewhere
        assert allowed != Refused(ReplyStatus.DENIED)


def test_a_list_of_everything_shows_what_the_caller_may_look_into_and_nothing_else() -> None:
    system = System(
        rights={
            ME: [READ_RIGHT, WRITE_RIGHT],
            "keystored": [KEYSTORE_RIGHT],
            "updated": [BOOT_RIGHT, f"{READ_RIGHT}:/state/b/"],
            "narrow": [f"{READ_RIGHT}:/state/a/"],
        }
    )
    _ = system.one(put(b"/state/keystore/secret"), name="keystored")
    _ = system.one(put(b"/state/boot/slot"), name="updated")
    _ = system.ask(put(b"/state/a/1"), put(b"/state/b/1"), put(b"/state/top"))

    shown = {
        name: system.one(ls(), name=name).keys
        for name in (ME, "keystored", "updated", "narrow", "stranger")
    }

    assert shown == {
        ME: [b"/state/a/1", b"/state/b/1", b"/state/top"],
        "keystored": [b"/state/keystore/secret"],
        "updated": [b"/state/b/1", b"/state/boot/slot"],
        "narrow": [b"/state/a/1"],
        "stranger": [],
    }
    assert system.log.lines == [], "to be shown less is no denial"


def test_a_list_asks_once_about_everything_ordinary() -> None:
    system = System()
    _ = system.ask(*[put(b"/state/a%d/k" % number, b"", A) for number in range(9)])
    system.gate.asked.clear()

    _ = system.ask(*[ls()] * 50)

    assert [target for _, _, target in system.gate.asked] == ["/state/"]


def test_a_list_nobody_can_decide_about_is_denied_and_not_empty() -> None:
    system = System()
    _ = system.one(put(K))
    system.gate.unavailable = True

    assert system.one(ls()) == Refused(ReplyStatus.DENIED)


def test_a_used_up_quota_refuses_growth_and_nothing_else() -> None:
    system = System(quota="64KiB 2", quotas="small 1KiB 100")

    outcomes = system.ask(
        put(b"/state/t/1"), put(b"/state/t/2"), put(b"/state/t/3"), put(b"/state/t/2", b"new"),
        put(b"/state/u/1"), Delete(b"/state/t/1", D, 0), put(b"/state/t/3"),
        put(b"/state/small/1", bytes(2048)),
    )  # fmt: skip
    use = system.one(GetArea(b"/state/t/"))

    refused = [index for index, each in enumerate(outcomes) if isinstance(each, Refused)]
    assert refused == [2, 7]
    assert outcomes[2] == outcomes[7] == Refused(StatefsdStatus.OVER_QUOTA)
    assert isinstance(use, AreaUse)
    assert (use.keys, use.keys_max, use.size_max) == (2, 2, 64 << 10)
    assert 2 * 12 < use.size < 1024


def test_a_full_store_keeps_what_is_reserved_and_takes_deletes() -> None:
    system = System(
        Disk(2048), quota="1GiB 100000", quotas="boot 1GiB 100", reserves="boot 16KiB",
        rights={ME: [READ_RIGHT, WRITE_RIGHT, BOOT_RIGHT]},
    )  # fmt: skip
    stored = 0
    while isinstance(outcome := system.one(put(b"/state/t/%d" % stored, bytes(4000), A)), Stored):
        stored += 1

    assert outcome == Refused(StatefsdStatus.NO_SPACE)
    assert stored > 4
    assert isinstance(system.one(put(b"/state/boot/slot", bytes(4000))), Stored)
    assert isinstance(system.one(Delete(b"/state/t/0", D, 0)), Stored)
    assert isinstance(system.one(put(b"/state/t/0", bytes(4000))), Stored)
    assert system.service.facts()["used"] <= system.service.facts()["capacity"]


# ------------------------------------------------------------------ bulk


async def vmo(data: bytes, *, sealed: bool = True) -> Any:
    """A sealed memory object, or a shared one: no other would move."""
    slot = await VmoCreate(len(data))
    await VmoWrite(slot, 0, data)
    await (VmoSeal(slot) if sealed else VmoShare(slot))
    return slot


def test_a_large_value_goes_in_and_out_as_a_sealed_vmo() -> None:
    system = System()
    data = bytes(range(256)) * (BULK_VALUE_MAX // 256)

    async def body(link: Exchange) -> Any:
        stored = await link.ask(PutBulk(K, 0, len(data), D, 0), FAR, move=await vmo(data))
        inline = await link.call(Get(K), FAR)
        fetched = await link.ask(GetBulk(K), FAR)
        assert isinstance(fetched, Answer)
        assert fetched.cap is not None
        view = await VmoMap(fetched.cap)
        return stored, inline, fetched.reply, bytes(view[: fetched.reply.length])

    held = system.held
    stored, inline, reply, found = system.run(body)

    assert isinstance(stored, Answer)
    assert inline == Refused(StatefsdStatus.LARGE)
    assert reply == BulkValue(len(data), 1)
    assert found == data
    assert system.held <= held + 1, "no capability is left behind but the client's reply link"


def test_an_empty_value_needs_no_vmo() -> None:
    system = System()

    async def body(link: Exchange) -> Any:
        _ = await link.call(put(K, b""), FAR)
        return await link.ask(GetBulk(K), FAR)

    fetched = system.run(body)

    assert (fetched.reply, fetched.cap) == (BulkValue(0, 1), None)


@pytest.mark.covers("statefsd.BAD_BULK")
def test_wrong_bulk_is_refused_and_no_capability_is_kept() -> None:
    system = System(rights={ME: [WRITE_RIGHT, f"{READ_RIGHT}:/state/t/"]})

    async def body(link: Exchange) -> list[Any]:
        async def bulk(slot: Any, offset: int, length: int, key: bytes = K) -> Any:
            return await link.ask(PutBulk(key, offset, length, D, 0), FAR, move=slot)

        return [
            await bulk(None, 0, 1),
            await bulk(await vmo(b"x", sealed=False), 0, 1),
            await bulk(await vmo(b"x"), 4096, 1),
            await bulk(await vmo(b"x"), 0xFFFF_FFFF, BULK_VALUE_MAX),
            await bulk(await vmo(b"x"), 0, BULK_VALUE_MAX + 1),
            await bulk(await vmo(b"x"), 0, 1, b"/state/keystore/k"),
            await bulk(await vmo(b"x"), 0, 1, b"/state/../k"),
            await link.call(Get(K), FAR),
        ]

    _ = system.one(Sync(b"/state/t/"))
    held = system.held
    outcomes = system.run(body)

    bad = Refused(StatefsdStatus.BAD_BULK)
    assert outcomes[:4] == [bad] * 4
    assert outcomes[4:] == [
        Refused(StatefsdStatus.VALUE_TOO_LARGE),
        Refused(ReplyStatus.DENIED),
        Refused(StatefsdStatus.INVALID_KEY),
        Refused(StatefsdStatus.NOT_FOUND),
    ]
    assert system.held <= held + 1


# ------------------------------------------------------------------ groups


def test_durable_writes_that_wait_together_are_made_durable_by_one_write() -> None:
    system = System()
    _ = system.one(put(K))
    writes, flushes = system.device.writes, system.device.flushes

    outcomes = system.together(*[put(b"/state/t/%d" % number) for number in range(8)])

    assert [each.sequence for each in outcomes] == list(range(2, 10))
    assert all(each.durable for each in outcomes)
    assert system.device.writes - writes + system.device.flushes - flushes <= 2


def test_an_accepted_write_is_on_the_device_when_it_is_answered_and_waits_for_no_flush() -> None:
    system = System()
    _ = system.one(put(K))
    flushes = system.device.flushes

    outcome = system.one(put(K, b"new", A))

    assert not outcome.durable
    assert system.device.flushes == flushes
    kept = System(Disk(BLOCKS, system.disk.image()))
    lost = System(Disk(BLOCKS, system.disk.durable_image()))
    assert kept.one(Get(K)).value == b"new"
    assert lost.one(Get(K)).value == b"v"


def test_nobody_sees_a_change_before_it_is_written() -> None:
    system = System()

    outcomes = system.together(put(K, b"1"), Get(K), put(b"/state/t/b", b"2"), ls(b"/state/t/"))

    assert outcomes[1] == Value(b"1", 1)
    assert outcomes[3] == Keys([b"/state/t/b", K], more=False)
    assert system.service.facts()["groups_total"] >= 2


@pytest.mark.parametrize(
    ("changed", "question"), [(K, Get(K)), (b"/state/t/b", ls(b"/state/t/"))], ids=["read", "list"]
)
def test_nobody_sees_a_change_that_the_device_refuses(
    changed: bytes, question: Request[Any]
) -> None:
    system = System()
    _, old = system.ask(put(K, b"kept"), question)  # what is decided is not asked again, which
    asked = len(system.gate.asked)  # would write the group before it is looked at
    nth = system.disk.done[Operation.WRITE] + 1
    system.disk.faults = failing(Operation.WRITE, nth)

    outcomes = system.together(put(changed, b"new", A), question)

    assert outcomes == [Refused(StatefsdStatus.IO_ERROR), old]
    assert len(system.gate.asked) == asked


def test_a_change_does_not_wait_for_a_question_about_somebody_else() -> None:
    system = System(rights={ME: [WRITE_RIGHT]})
    groups: list[int] = []
    _ = system.one(put(K))
    before = system.gate.before_asking
    assert before is not None

    async def watched() -> None:
        _ = await before()
        groups.append(len(system.service._group.waiting))

    system.gate.before_asking = watched
    outcomes = system.together(put(K), put(b"/state/new/area"))

    assert all(each.durable for each in outcomes)
    assert groups == [0]


def test_a_group_has_a_bound_in_requests_and_in_bytes() -> None:
    system = System()
    terms = LinkTerms(GROUP_MAX, 16 * 1024, 0)
    before = system.service.facts()["groups_total"]

    async def body(link: Exchange) -> list[Any]:
        started = [await link.start(put(K, b"", A), FAR) for _ in range(GROUP_MAX)]
        return [await link.finish(each) for each in started]

    outcomes = system.pair.client(body, terms=terms, reply_terms=terms)

    assert [each.sequence for each in outcomes] == list(range(1, GROUP_MAX + 1))
    assert system.service.facts()["groups_total"] == before + 1
    group = Group()
    group.on_staged([K], GROUP_SIZE_MAX - 1, durable=False)
    assert not group.is_full
    group.on_staged([K], 1, durable=False)
    assert (group.is_full, group.take(), bool(group)) == (True, [], False)


@pytest.mark.parametrize("durability", [D, A])
def test_the_changes_of_a_packet_are_one_write(durability: Durability) -> None:
    system = System()
    count = 3 * GROUP_MAX
    terms = LinkTerms(8, 16 * 1024, 0)

    async def body(link: Exchange) -> list[Any]:
        requests = [put(b"/state/t/%d" % number, b"", durability) for number in range(count)]
        return await link.call_many(requests, FAR)

    writes, groups = system.device.writes, system.service.facts()["groups_total"]
    outcomes = system.pair.client(body, terms=terms, reply_terms=terms)

    durable = durability is D
    assert outcomes == [Stored(each, durable, False) for each in range(1, count + 1)]
    assert system.service.facts()["groups_total"] == groups + 1
    assert system.device.writes - writes <= 4  # of the journal; a commit has a bound
    assert system.device.flushes <= 2  # of the opening, and of the packet


def test_a_packet_asks_policyd_about_many_areas_and_is_still_one_write() -> None:
    system = System()
    groups = system.service.facts()["groups_total"]

    async def body(link: Exchange) -> list[Any]:
        requests = [put(b"/state/a%d/k" % area) for area in range(8)]
        return await link.call_many(requests, FAR)

    before = len(system.gate.asked)
    outcomes = system.run(body)

    assert [type(each) for each in outcomes] == [Stored] * 8
    assert len(system.gate.asked) - before == 8
    assert system.service.facts()["groups_total"] == groups + 1


def test_a_fault_of_the_device_is_told_to_every_request_of_the_packet_that_staged() -> None:
    system = System()
    system.disk.faults = failing(Operation.WRITE, system.disk.done[Operation.WRITE] + 1)

    async def body(link: Exchange) -> list[Any]:
        return await link.call_many([put(K), put(b"/nowhere"), put(b"/state/t/2")], FAR)

    failed = Refused(StatefsdStatus.IO_ERROR)

    assert system.run(body) == [failed, Refused(StatefsdStatus.INVALID_KEY), failed]


@pytest.mark.parametrize("count", [1, 2])
def test_a_packet_of_requests_that_give_memory_is_refused_and_ends_nobody(count: int) -> None:
    system = System()
    _ = system.one(put(K, b"1"))
    codec = PROTOCOL.codecs[GetBulk]

    async def body(link: Exchange) -> Any:
        frame = packet(codec, [GetBulk(K)] * count)
        return await raw(link, frame), await link.call_many([GetBulk(K)] * count, FAR)

    answered, not_sent = system.run(body)

    assert status_of(answered) == ReplyStatus.UNSUPPORTED
    assert not_sent == [Refused(ReplyStatus.UNSUPPORTED)] * count
    assert isinstance(system.one(GetStatus()), ServiceStatus)


def test_a_packet_that_brings_memory_is_dropped_and_ends_nobody() -> None:
    system = System()
    codec = PROTOCOL.codecs[PutBulk]

    async def body(link: Exchange) -> Any:
        slots = len(system.pair.serving.table)
        slot = await VmoCreate(5)
        await VmoSeal(slot)
        frame = packet(codec, [PutBulk(K, 0, 5, D, 0)])
        await Send(link.peer.slot, frame, move=slot, deadline=FAR)
        without = await link.start(PutBulk(K, 0, 5, D, 0), FAR)  # on the fast path
        outcomes = await link.finish(without), await link.call(Get(K), FAR)
        return *outcomes, len(system.pair.serving.table) - slots

    bad, missing = Refused(StatefsdStatus.BAD_BULK), Refused(StatefsdStatus.NOT_FOUND)

    assert system.run(body) == (bad, missing, 0)


def test_sync_makes_everything_accepted_durable() -> None:
    system = System()

    stored, synced = system.ask(put(K, b"1", A), Sync(b"/state/t/"))

    assert synced == Synced(stored.sequence)
    cut = System(Disk(BLOCKS, system.disk.durable_image()))
    assert cut.one(Get(K)).value == b"1"


def test_an_orderly_end_makes_everything_accepted_durable() -> None:
    system = System()

    _ = system.ask(put(K, b"1", A), Stop())

    cut = System(Disk(BLOCKS, system.disk.durable_image()))
    assert cut.one(Get(K)).value == b"1"


def test_the_end_writes_what_is_staged_and_answers_who_waits() -> None:
    system = System()
    keys = [b"/state/t/%d" % number for number in range(3)]
    _ = system.one(put(K))
    writes = system.device.writes

    *stored, _ = system.together(*[put(key, key, A) for key in keys], Stop())

    assert stored == [Stored(number, durable=True, repeated=False) for number in (2, 3, 4)]
    assert system.device.writes > writes
    cut = System(system.disk.survivors(NOTHING))
    assert [each.value for each in cut.ask(*[Get(key) for key in keys])] == keys


# ------------------------------------------------------------------ a device in trouble


def failing(operation: Operation, nth: int, **options: Any) -> DiskFaults:
    return DiskFaults(failures=(Failure(operation=operation, nth=nth, **options),))


@pytest.mark.covers("statefsd.IO_ERROR", "statefsd.READ_ONLY")
def test_a_failed_write_is_unknown_to_those_who_waited_and_the_store_is_read_only_then() -> None:
    system = System()
    _ = system.one(put(K, b"kept"))
    nth = system.disk.done[Operation.WRITE] + 1
    system.disk.faults = failing(Operation.WRITE, nth)

    failed = system.together(put(K, b"1"), put(b"/state/t/b", b"2", A))
    after = system.ask(put(K, b"3"), Delete(K, D, 0), Sync(b"/state/t/"), Get(K), ls(b"/state/t/"))

    assert failed == [Refused(StatefsdStatus.IO_ERROR)] * 2
    assert after[:3] == [Refused(StatefsdStatus.READ_ONLY)] * 3
    assert after[3].value == b"kept"
    assert after[4] == Keys([K], more=False)
    facts = system.service.facts()
    assert (facts["store_writable"], facts["device_faults_total"]) == (0, 1)
    assert ("device failed", {"device": "disk", "op": "write", "fault": "io"}) in system.log.lines
    assert isinstance(system.one(Health()), Healthy)
    assert system.one(GetStore()).writable is False


def test_a_failed_flush_calls_nothing_durable() -> None:
    system = System()
    _ = system.one(put(K, b"kept"))
    durable = system.one(GetStore()).durable
    system.disk.faults = DiskFaults(
        failures=(
            Failure(operation=Operation.FLUSH, nth=1, persistent=True),
            Failure(operation=Operation.WRITE, nth=1, persistent=True),
        )
    )

    outcome = system.one(put(K, b"1"))

    assert outcome == Refused(StatefsdStatus.IO_ERROR)
    assert system.one(GetStore()).durable == durable


def test_after_a_fault_the_next_instance_writes_again() -> None:
    system = System()
    _ = system.one(put(K, b"kept"))
    system.disk.faults = failing(Operation.WRITE, system.disk.done[Operation.WRITE] + 1)
    _ = system.one(put(K, b"1"))

    again = system.again()

    assert again.one(Get(K)).value in (b"kept", b"1")
    assert isinstance(again.one(put(K, b"2")), Stored)


def test_a_device_without_a_write_serves_what_is_there() -> None:
    system = System()
    _ = system.one(put(K, b"kept"))

    reading = system.again(writable=False)

    value, refused = reading.ask(Get(K), put(K, b"1"))
    assert value.value == b"kept"
    assert refused == Refused(StatefsdStatus.READ_ONLY)


def test_an_unreadable_block_is_an_error_of_the_device_or_damage_and_no_value() -> None:
    system = System()
    _ = system.one(put(K, bytes(5000)))
    system.disk.faults = failing(Operation.READ, 1, persistent=True)

    outcome = system.one(Get(K))

    assert outcome in (Value(bytes(5000), 1), Refused(StatefsdStatus.IO_ERROR))


def rotten(system: System, value: bytes) -> Disk:
    """The disk with one bit of that value flipped."""
    image = bytearray(system.disk.image())
    at = image.index(value)
    image[at] ^= 1
    return Disk(BLOCKS, bytes(image))


@pytest.mark.covers("statefsd.CORRUPTED")
def test_a_damaged_record_is_quarantined_named_and_replaced_by_a_put() -> None:
    system = System()
    _ = system.ask(put(K, b"needle-in-it"), put(b"/state/t/b", b"well"))

    damaged = System(rotten(system, b"needle-in-it"))
    lost, other = damaged.ask(Get(K), Get(b"/state/t/b"))
    report = damaged.one(GetStore())
    replaced, value = damaged.ask(put(K, b"new"), Get(K))

    assert lost == Refused(StatefsdStatus.CORRUPTED)
    assert other.value == b"well"
    assert isinstance(report, Store)
    assert report.quarantined == 1
    assert [(each.key, each.sequence) for each in report.lost] == [(K, 1)]
    (line,) = [fields for text, fields in damaged.log.lines if text == "record quarantined"]
    assert (line["key"], line["sequence"]) == (K.decode(), 1)
    assert line["offset"] == report.lost[0].offset
    assert isinstance(replaced, Stored)
    assert value.value == b"new"


def test_a_lost_key_is_named_to_who_may_look_at_it_alone() -> None:
    rights = {"keystored": [KEYSTORE_RIGHT], ME: [READ_RIGHT]}
    system = System(rights=rights)
    _ = system.one(put(b"/state/keystore/k", b"needle-in-it"), name="keystored")
    damaged = System(rotten(system.stop(), b"needle-in-it"), rights=rights)

    mine, theirs = damaged.one(GetStore()), damaged.one(GetStore(), name="keystored")

    assert [each.key for each in mine.lost] == [b""]
    assert [each.key for each in theirs.lost] == [b"/state/keystore/k"]


def test_what_is_no_store_is_not_opened_and_not_written_to() -> None:
    foreign = Disk(BLOCKS, b"\xeb\x3c\x90MSDOS5.0" + bytes(range(256)) * 64)
    before = foreign.image()

    with pytest.raises(Unusable, match="disk was not opened and not written to"):
        _ = System(foreign)

    assert foreign.image() == before


# ------------------------------------------------------------------ what it says of itself


def test_it_is_ready_with_an_open_store_only_and_its_facts_say_which() -> None:
    system = System()
    _ = system.ask(put(K, b"1"), put(K, b"2", A), Get(K))

    facts = system.service.facts()

    assert system.service.ready()
    assert (facts["store_open"], facts["store_writable"], facts["keys"]) == (1, 1, 1)
    assert (facts["sequence"], facts["durable"]) == (2, 1)
    assert (facts["reads_total"], facts["writes_total"]) == (1, 2)
    again = system.again()
    assert again.ask() == []
    assert again.service.facts()["epoch"] == facts["epoch"] + 1
    unopened = Statefsd(Settings(), RightsGate({}), Lines(), system._open, system._send_given)
    assert not unopened.ready()
    assert unopened.facts() == {"store_open": 0}
    pair = Pair(unopened, PROTOCOL)
    (health,) = pair.client(lambda link: _all(link, Health()))
    assert health == Refused(MetaStatus.NOT_READY)


async def _all(link: Exchange, *requests: Request[Any]) -> list[Any]:
    return [await link.call(request, FAR) for request in requests]


def test_an_account_is_the_callers_own() -> None:
    system = System(rights={ME: [READ_RIGHT, WRITE_RIGHT], "other": [READ_RIGHT]})
    _ = system.ask(put(K), put(K), Get(K))
    _ = system.ask(Get(K), name="other")

    mine = system.one(GetArea(b"/state/t/"))
    theirs = system.one(GetArea(b"/state/t/"), name="other")

    assert (mine.reads, mine.writes) == (1, 2)
    assert (theirs.reads, theirs.writes) == (1, 0)


def test_calls_are_shown_to_the_proof_alone() -> None:
    system = System(rights={ME: [READ_RIGHT, WRITE_RIGHT], "proof": [PROOF_CONTROL]})
    _ = system.ask(put(K), Get(K))

    denied = system.one(GetCalls(service_id(ME), 5))
    calls = system.one(GetCalls(service_id(ME), 2), name="proof")

    assert denied == Refused(ReplyStatus.DENIED)
    assert isinstance(calls, Calls)
    assert calls.total == 3
    assert [each.op for each in calls.seen] == [3, 11]
    assert {each.sender for each in calls.seen} == {service_id(ME)}
    assert {each.deadline for each in calls.seen} == {FAR}


def test_10000_lists_change_nothing() -> None:
    system = System()
    _ = system.one(put(K))
    held = system.held

    async def body(link: Exchange) -> Any:
        outcome: Any = None
        for _ in range(10_000):
            outcome = await link.call(ls(), Nanos(FAR * 1000))
        return outcome

    assert system.run(body) == Keys([K], more=False)
    assert system.held <= held + 1
    assert isinstance(system.one(Health()), Healthy)


# ------------------------------------------------------------------ the disk, before and after


def test_a_disk_has_room_for_the_reserves_and_the_largest_value() -> None:
    least = next(size for size in range(1 << 16, 1 << 23, 1 << 12) if not disk_fault({}, size))
    system = System(Disk(least // BLOCK_SIZE))
    value = bytes(BULK_VALUE_MAX)

    async def body(link: Exchange) -> Any:
        slot = await VmoCreate(BULK_VALUE_MAX)
        await VmoWrite(slot, 0, value)
        await VmoSeal(slot)
        request = PutBulk(b"/state/x/" + 246 * b"k", 0, BULK_VALUE_MAX, D, 0)
        return await link.ask(request, FAR, move=slot)

    assert isinstance(system.run(body), Answer)
    assert f"no value of {BULK_VALUE_MAX}" in (disk_fault({}, least - (1 << 12)) or "")


def test_a_disk_below_the_reserves_is_not_opened_and_not_written_to() -> None:
    disk = Disk((1 << 20) // BLOCK_SIZE)
    before = disk.image()

    with pytest.raises(Unusable, match="not written to: a disk of 1048576 bytes keeps"):
        _ = System(disk)

    assert disk.image() == before


def test_without_the_compiled_checksum_no_store_is_opened() -> None:
    code = """if True:
        import sys, warnings
        warnings.simplefilter("ignore")
        sys.modules["google_crc32c._crc32c"] = sys.modules["google_crc32c.cext"] = None
        from tests.unit.test_statefsd_service import System
        from nexus.runtime.program import Unusable
        try:
            _ = System()
        except Unusable as error:
            print(error)
    """
    told = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    ).stdout

    assert told == f"{SLOW}\n"


def crafted(superblock: layout.Superblock, *parts: tuple[int, bytes]) -> Disk:
    """A disk of our format that statefsd has not written: every checksum is right."""
    image = bytearray(BLOCKS * BLOCK_SIZE)
    for block, data in (*((at, superblock.encoded()) for at in layout.COPIES), *parts):
        image[block * BLOCK_SIZE : block * BLOCK_SIZE + len(data)] = data
    return Disk(BLOCKS, bytes(image))


def blank() -> layout.Superblock:
    found = layout.initial(BLOCKS)
    assert found is not None
    return found


@pytest.mark.parametrize("rights", [[READ_RIGHT], [f"{READ_RIGHT}:/state/t/"], []])
@pytest.mark.parametrize(
    "key",
    [b"/state/\xff\xfe/x", b"nothing", b"/state/a\nb/x", b"/state/" + b"a" * 200 + b"/x"],
    ids=["no-text", "no-path", "control", "long"],
)
def test_a_foreign_key_on_the_disk_is_shown_to_nobody_and_ends_nobody(
    key: bytes, rights: list[str]
) -> None:
    record = encode_record(1, 1, Kind.PUT, key, b"v")
    entry = encode_entry(len(record), crc32c(key))
    journal, _, _ = encode_commit(0, Place(NO_BLOCK, 0, 0), 1, 1, 1, 0, [record], [entry])
    system = System(crafted(blank(), (layout.HEAD_BLOCKS, journal)), rights={ME: rights})

    listed, report = system.ask(ls(), GetStore())

    assert listed == Keys([], more=False)
    assert isinstance(report, Store)
    assert all(each.key == b"" for each in report.lost)


def test_the_disks_word_for_what_was_lost_is_brought_into_the_bounds_of_the_answer() -> None:
    system = System()
    store = system.service._store
    store.lost = (LostRecord(b"/state/\xff/x", -5, -7), LostRecord(300 * b"k", 1 << 64, 9))
    store.lost_count = -3

    report, status = system.ask(GetStore(), GetStatus())

    assert isinstance(report, Store)
    assert [(each.key, each.offset, each.sequence) for each in report.lost] == [
        (b"", 0, 0),
        (b"", (1 << 64) - 1, 9),
    ]
    assert report.quarantined == 0
    assert isinstance(status, ServiceStatus)
