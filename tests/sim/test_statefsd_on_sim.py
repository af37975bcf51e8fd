"""statefsd in a system of its own on the simulated kernel: every status, restarts, a bad disk."""

from collections.abc import Callable
from functools import partial
from typing import Any, Final

import pytest

from nexus.abi import BLOCK_SIZE, Nanos, Send, VmoCreate, VmoMap, VmoSeal, VmoWrite
from nexus.ipc import Answer, Refused
from nexus.kernel.sim.disk import Disk, DiskErrorKind, DiskFaults, Failure, Operation
from nexus.protocols.init import GetService, ServiceRecord
from nexus.protocols.meta import GetStatus
from nexus.protocols.statefsd import (
    INLINE_VALUE_MAX,
    PROTOCOL,
    Batch,
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
    Store,
    Stored,
    Sync,
    Value,
)
from nexus.wire import HEADER_SIZE, PREFIX_SIZE, ReplyStatus, encode
from tests.fakes.initrig import MS, SECOND
from tests.fakes.staterig import DISK_SIZE, SYSTEM, Outcome, StateHands, boot_sim, client_text

pytestmark = pytest.mark.sim

Boot = Callable[..., Outcome]
D: Final = Durability.DURABLE
A: Final = Durability.ACCEPTED
K: Final = b"/state/t/key"
BLOCKS: Final = DISK_SIZE // BLOCK_SIZE


@pytest.fixture
def boot(monkeypatch: pytest.MonkeyPatch) -> Boot:
    """Boots the system with a script."""
    return partial(boot_sim, monkeypatch)


def put(key: bytes, value: bytes = b"v", durability: Durability = D, request_id: int = 0) -> Put:
    return Put(key, value, durability, request_id)


def batch(*changes: tuple[bytes, bytes | None]) -> Batch:
    return Batch(bytes(encode(Changes([Change(*each) for each in changes]))), D, 0)


def word(outcome: Any) -> str:
    """An outcome as a script returns it."""
    if isinstance(outcome, Refused):
        return outcome.status.name
    return type(outcome).__name__


async def is_well(hands: StateHands) -> bool:
    """Whether the same instance is healthy and keeps values."""
    record = await hands.reply(GetService("statefsd"), ServiceRecord)
    stored = await hands.state(put(b"/state/t/well", b"well"))
    value = await hands.state(Get(b"/state/t/well"))
    return (
        record.generation == 1
        and isinstance(stored, Stored)
        and isinstance(value, Value)
        and value.value == b"well"
    )


# ------------------------------------------------------------------ statuses


@pytest.mark.parametrize("kernel_driven", [False, True], ids=["window", "kernel"])
def test_every_status_is_stable_and_the_service_is_healthy_after_it(
    boot: Boot, *, kernel_driven: bool
) -> None:
    long = b"/state/t/" + b"k" * 247
    big = bytes(INLINE_VALUE_MAX + 1)
    asked: dict[str, list[Any]] = {
        "KEY_TOO_LONG": [put(long), Get(long), Delete(long, D, 0), ListKeys(long + b"/", b"", 1)],
        "INVALID_KEY": [
            put(key)
            for key in (
                b"", b"/state/", b"/etc/passwd", b"/state/../x", b"/state/t/./x", b"/state//x",
                b"/state/t/x/", b"/state/t/\x00", b"/state/t/\xff", b"/state/" + b"a" * 49,
            )
        ] + [batch((K, b"1"), (K, b"2")), Sync(K), GetArea(K), ListKeys(K, b"", 1)],
        "VALUE_TOO_LARGE": [put(K, big), PutBulk(K, 0, 64 * 1024 + 1, D, 0)],
        "BAD_BULK": [PutBulk(K, 0, 1, D, 0)],
        "DENIED": [
            put(b"/state/keystore/x"), Get(b"/state/boot/x"), ListKeys(b"/state/boot/", b"", 1),
            batch((K, b"1"), (b"/state/boot/x", b"1")), Sync(b"/state/keystore/"),
        ],
        "NOT_FOUND": [Get(b"/state/t/no"), GetBulk(b"/state/t/no"), Delete(b"/state/t/no", D, 0)],
        "MALFORMED": [Batch(b"\xc1", D, 0)],
        "OVER_QUOTA": [put(b"/state/small/x", bytes(3000))],
        "Stored": [put(K), batch((K, b"2"), (b"/state/t/no", None)), Delete(K, A, 0)],
    }  # fmt: skip
    text = SYSTEM.replace(
        "[service.driver]",
        '[service.statefsd.settings]\nquotas = "small 2KiB 10"\n\n[service.driver]',
    )

    async def script(hands: StateHands) -> Any:
        found = {
            status: [word(await hands.state(request)) for request in requests]
            for status, requests in asked.items()
        }
        return found, await is_well(hands), await hands.facts()

    found, well, facts = boot(script, text=text, kernel_driven=kernel_driven).result()

    assert found == {status: [status] * len(requests) for status, requests in asked.items()}
    assert well
    assert facts["denied_total"] == 5


def test_unknown_operations_and_wrong_frames_have_their_status(boot: Boot) -> None:
    async def script(hands: StateHands) -> Any:
        exchange = hands.client("statefsd")
        codec = PROTOCOL.codecs[Get]
        until = await hands.ahead(SECOND)
        for op, body in ((0x7E, encode(Get(K))), (codec.op, b"\xc1"), (codec.op, b"")):
            prefix = bytearray(codec.prefix)
            prefix[2] = op
            head = prefix.ljust(PREFIX_SIZE, b"\0") + bytes(8) + until.to_bytes(8, "little")
            frame = bytes(head.ljust(HEADER_SIZE, b"\0")) + body
            await Send(exchange.peer.slot, frame)
            await hands.pause(MS)
        account = await hands.call("statefsd", GetStatus())
        statuses = {row.status: row.count for row in account.refusals}
        return statuses, await is_well(hands)

    statuses, well = boot(script).result()

    assert statuses[str(int(ReplyStatus.UNSUPPORTED))] == 1
    assert statuses[str(int(ReplyStatus.MALFORMED))] == 2
    assert well


def test_10000_lists_leave_a_healthy_service(boot: Boot) -> None:
    async def script(hands: StateHands) -> Any:
        _ = await hands.state(put(K))
        outcome: Any = None
        for _ in range(10_000):
            outcome = await hands.state(ListKeys(b"/state/", b"", 24))
        facts = await hands.facts()
        return [key.decode() for key in outcome.keys], facts["reads_total"], await is_well(hands)

    keys, reads, well = boot(script, seconds=120).result()

    assert keys == [K.decode()]
    assert reads == 10_000
    assert well


def test_a_denied_first_write_pins_nothing_and_is_told_by_logd_with_path_and_sender(
    boot: Boot,
) -> None:
    """A store on memory that a first write pins is what the reference system did."""
    text = SYSTEM + client_text("stranger")

    async def stranger(hands: StateHands) -> Any:
        return word(await hands.state(put(b"/state/x/1")))

    async def script(hands: StateHands) -> Any:
        await hands.pause(200 * MS)
        stored = await hands.state(put(K, b"1"))
        store = await hands.state(GetStore())
        assert isinstance(store, Store)
        await hands.pause(300 * MS)
        records = await hands.records("statefsd")
        denied = [
            {field.key: field.value for field in each.fields}
            for each in records
            if each.text == "access denied"
        ]
        return stored.sequence, store.device, store.backing, denied

    run = boot(script, text=text, clients={"stranger": stranger})

    sequence, device, backing, denied = run.result()
    assert run.result("stranger") == "DENIED"
    assert (sequence, device, backing) == (1, "disk", "virtio-mmio")
    (line,) = denied
    assert (line["path"], line["right"]) == ("/state/x/1", "statefs.write")
    assert line["client"].startswith("0x")


def test_a_narrow_right_is_for_its_area_and_a_list_shows_no_other(boot: Boot) -> None:
    text = SYSTEM + client_text("narrow", "statefs.write:/state/mine/", "statefs.read:/state/mine/")

    async def narrow(hands: StateHands) -> Any:
        outcomes = [
            await hands.state(request)
            for request in (
                put(b"/state/mine/1"), put(b"/state/other/1"), Get(b"/state/mine/1"),
                Get(b"/state/other/1"), put(b"/state/minesweeper/1"),
            )
        ]  # fmt: skip
        await hands.pause(100 * MS)
        listed = await hands.state(ListKeys(b"/state/", b"", 24))
        assert isinstance(listed, Keys)
        return [word(each) for each in outcomes], [key.decode() for key in listed.keys]

    async def script(hands: StateHands) -> Any:
        _ = await hands.state(put(b"/state/other/9"))
        await hands.pause(300 * MS)
        listed = await hands.state(ListKeys(b"/state/", b"", 24))
        return [key.decode() for key in listed.keys]

    run = boot(script, text=text, clients={"narrow": narrow})

    outcomes, listed = run.result("narrow")
    assert outcomes == ["Stored", "DENIED", "Value", "DENIED", "DENIED"]
    assert listed == ["/state/mine/1"]
    assert run.result() == ["/state/mine/1", "/state/other/9"]


def test_a_large_value_travels_as_a_sealed_vmo_both_ways(boot: Boot) -> None:
    async def script(hands: StateHands) -> Any:
        client = hands.client("statefsd")
        data = bytes(range(256)) * 256
        slot = await VmoCreate(len(data))
        await VmoWrite(slot, 0, data)
        await VmoSeal(slot)
        until = await hands.ahead(3 * SECOND)
        stored = await client.ask(PutBulk(K, 0, len(data), D, 0), until, move=slot)
        fetched = await client.ask(GetBulk(K), until)
        assert isinstance(stored, Answer)
        assert isinstance(fetched, Answer)
        assert fetched.cap is not None
        view = await VmoMap(fetched.cap)
        return bytes(view[: fetched.reply.length]) == data, word(await hands.state(Get(K)))

    assert boot(script).result() == [True, "LARGE"]


def test_64_durable_puts_in_flight_are_all_answered_and_written_in_few_groups(boot: Boot) -> None:
    async def script(hands: StateHands) -> Any:
        _ = await hands.state(put(K))
        client = hands.client("statefsd")
        before = await hands.facts()
        until = await hands.ahead(3 * SECOND)
        started = [await client.start(put(b"/state/t/%d" % n), until) for n in range(64)]
        outcomes = [await client.finish(each) for each in started]
        after = await hands.facts()
        durable = [isinstance(each, Stored) and each.durable for each in outcomes]
        return durable, after["groups_total"] - before["groups_total"]

    durable, groups = boot(script).result()

    assert durable == [True] * 64
    assert groups <= 16


# ------------------------------------------------------------------ restarts


def test_a_killed_statefsd_keeps_what_it_acknowledged_and_request_ids(boot: Boot) -> None:
    async def script(hands: StateHands) -> Any:
        first = await hands.state(put(K, b"durable", D, 7))
        _ = await hands.state(put(b"/state/t/a", b"accepted", A))
        before = await hands.facts()
        await hands.kill("statefsd")
        value = await hands.call("statefsd", Get(K))
        accepted = await hands.call("statefsd", Get(b"/state/t/a"))
        again = await hands.state(put(K, b"other", D, 7))
        after = await hands.facts()
        return (
            value.value.decode(), accepted.value.decode(), again.repeated,
            again.sequence == first.sequence, after["epoch"] - before["epoch"],
        )  # fmt: skip

    assert boot(script).result() == ["durable", "accepted", True, True, 1]


def test_the_next_boot_finds_everything_on_the_same_disk(boot: Boot) -> None:
    async def first(hands: StateHands) -> Any:
        stored = await hands.state(put(K, b"1"))
        _ = await hands.state(put(b"/state/t/accepted", b"2", A))
        return stored.sequence

    async def second(hands: StateHands) -> Any:
        value, accepted = await hands.state(Get(K)), await hands.state(Get(b"/state/t/accepted"))
        return value.value.decode(), value.sequence, accepted.value.decode()

    run = boot(first)
    assert run.disk is not None
    again = boot(second, disk=Disk(BLOCKS, run.disk.durable_image()))

    assert again.result() == ["1", run.result(), "2"], "an orderly end makes everything durable"


def test_a_foreign_disk_is_left_alone_and_the_system_says_why(boot: Boot) -> None:
    foreign = Disk(BLOCKS, b"\xeb\x3c\x90MSDOS5.0" + bytes(range(256)) * 64)
    before = foreign.image()
    text = SYSTEM.replace("restarts = 1000", "restarts = 2")

    async def script(hands: StateHands) -> Any:
        return "never ready"

    with pytest.raises(AssertionError, match="not opened and not written to") as failure:
        _ = boot(script, text=text, disk=foreign, seconds=5)

    assert "statefsd: ready" not in str(failure.value)
    assert foreign.image() == before


# ------------------------------------------------------------------ a disk in trouble


def test_a_write_error_is_told_and_reads_go_on_until_a_restart_mends_it(boot: Boot) -> None:
    disk = Disk(BLOCKS)

    async def script(hands: StateHands) -> Any:
        _ = await hands.state(put(b"/state/t/before", b"kept"))
        await hands.pause(500 * MS)  # the fault comes meanwhile
        outcomes = [
            word(await hands.state(request))
            for request in (
                put(K), put(K), Delete(b"/state/t/before", D, 0), Sync(b"/state/t/"),
                Get(b"/state/t/before"), ListKeys(b"/state/t/", b"", 9),
            )
        ]  # fmt: skip
        facts = await hands.facts()
        store = await hands.state(GetStore())
        await hands.kill("statefsd")
        kept = await hands.call("statefsd", Get(b"/state/t/before"))
        again = await hands.state(put(K, b"again"))
        return outcomes, facts["store_writable"], store.writable, kept.value.decode(), word(again)

    def break_it(_: Any) -> None:
        nth = disk.done[Operation.WRITE] + 1
        disk.faults = DiskFaults(failures=(Failure(operation=Operation.WRITE, nth=nth),))

    run = boot(script, disk=disk, at=[(450 * MS, break_it)])

    outcomes, facts, writable, kept, again = run.result()
    assert outcomes == ["IO_ERROR", "READ_ONLY", "READ_ONLY", "READ_ONLY", "Value", "Keys"]
    assert (facts, writable) == (0, False)
    assert (kept, again) == ("kept", "Stored")


def test_a_full_device_refuses_writes_and_keeps_what_is_there(boot: Boot) -> None:
    disk = Disk(BLOCKS)

    async def script(hands: StateHands) -> Any:
        _ = await hands.state(put(b"/state/t/before", b"kept"))
        await hands.pause(500 * MS)
        refused = word(await hands.state(put(K, bytes(6000))))
        value = await hands.state(Get(b"/state/t/before"))
        return refused, value.value.decode(), word(await hands.state(put(K)))

    def fill(_: Any) -> None:
        disk.faults = DiskFaults(
            failures=(
                Failure(
                    operation=Operation.WRITE,
                    nth=disk.done[Operation.WRITE] + 1,
                    kind=DiskErrorKind.NO_SPACE,
                    persistent=True,
                ),
            )
        )

    run = boot(script, disk=disk, at=[(450 * MS, fill)], kernel_driven=True)

    assert run.result() == ["IO_ERROR", "kept", "READ_ONLY"]


def test_a_slow_disk_delays_answers_and_changes_nothing(boot: Boot) -> None:
    slow = DiskFaults(latency={Operation.WRITE: Nanos(20 * MS), Operation.FLUSH: Nanos(30 * MS)})

    async def script(hands: StateHands) -> Any:
        outcomes = [word(await hands.state(put(b"/state/t/%d" % n))) for n in range(5)]
        return outcomes, await is_well(hands)

    assert boot(script, disk=Disk(BLOCKS, faults=slow)).result() == [["Stored"] * 5, True]


def test_a_rotten_bit_is_quarantined_told_once_and_everything_else_is_there(boot: Boot) -> None:
    async def first(hands: StateHands) -> Any:
        for number in range(8):
            _ = await hands.state(put(b"/state/t/%d" % number, b"needle-%d" % number))
        return None

    async def second(hands: StateHands) -> Any:
        outcomes = [await hands.state(Get(b"/state/t/%d" % number)) for number in range(8)]
        store = await hands.state(GetStore())
        await hands.pause(100 * MS)
        told = [
            {field.key: field.value for field in each.fields}
            for each in await hands.records("statefsd")
            if each.text == "record quarantined"
        ]
        replaced = word(await hands.state(put(b"/state/t/3", b"new")))
        return (
            [word(each) for each in outcomes],
            [(each.key.decode(), each.offset) for each in store.lost],
            told,
            replaced,
        )

    run = boot(first)
    assert run.disk is not None
    image = bytearray(run.disk.durable_image())
    at = image.index(b"needle-3")
    image[at] ^= 0x10
    outcomes, lost, told, replaced = boot(second, disk=Disk(BLOCKS, bytes(image))).result()

    assert outcomes == ["Value"] * 3 + ["CORRUPTED"] + ["Value"] * 4
    ((key, offset),) = lost
    assert key == "/state/t/3"
    assert abs(offset - at) < BLOCK_SIZE
    assert told == [{"key": "/state/t/3", "offset": str(offset), "sequence": "4"}]
    assert replaced == "Stored"


def test_calls_show_deadline_trace_and_sender_to_the_proof(boot: Boot) -> None:
    async def script(hands: StateHands) -> Any:
        _ = await hands.state(put(K))
        seen = await hands.state(GetCalls(hands.boot.service, 8))
        return [each.op for each in seen.seen], seen.total

    assert boot(script).result() == [[1, 11], 2]
