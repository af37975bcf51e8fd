"""statefsd between processes of the Linux kernel: killed 200 times under load, and on bad disks.

What is injected is said in each test: SIGKILL through init, a file system without room and a loop
device on it that fails with EIO (when root runs the tests), an image opened for reading alone, and
bytes of the image changed between two boots. A file size limit is the kernel's own to set. EIO at
a chosen operation needs device-mapper or a fault injector, which this kernel may lack; that is
what the simulated disk is for.
"""

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import pytest

from nexus.abi import ConsoleWrite, Now
from nexus.ipc import CallFailure, Refused
from nexus.protocols.init import GetService, ServiceRecord
from nexus.protocols.statefsd import (
    Batch,
    Change,
    Changes,
    Delete,
    Durability,
    Get,
    GetStore,
    ListKeys,
    Put,
    StatefsdStatus,
    Stored,
    Value,
)
from nexus.wire import encode
from tests.fakes.initrig import MS, SECOND
from tests.fakes.staterig import RESULT, SYSTEM, StateHands, boot_linux, client_text

pytestmark = [pytest.mark.linux, pytest.mark.slow]

KILLS: Final = 200
CLIENTS: Final = ("one", "two", "three")
BATCH_KEYS: Final = 5
LIFE_LEAST: Final = 3 * MS  # between the first answer of an instance and its death
LIFE_STEP: Final = 1 * MS
GO: Final = b"/state/driver/go"
STOP: Final = b"/state/driver/stop"
DONE: Final = b"/state/driver/done-"  # and the name of a client
D: Final = Durability.DURABLE
A: Final = Durability.ACCEPTED


@pytest.fixture
def directory() -> Iterator[Path]:
    """A state directory."""
    made = Path(tempfile.mkdtemp(prefix="nx"))
    yield made
    shutil.rmtree(made)


def put(key: bytes, value: bytes = b"v", durability: Durability = D, request_id: int = 0) -> Put:
    return Put(key, value, durability, request_id)


def word(outcome: Any) -> str:
    """An outcome as a script returns it."""
    if isinstance(outcome, Refused):
        return outcome.status.name
    return type(outcome).__name__


# ------------------------------------------------------------------ 200 kills


class Load:
    """A client that writes without a pause and believes nothing but answers.

    Every change has a request id. A change whose answer was cut off is sent again under its id
    until it is answered; then it has been applied exactly once, by this answer or the one before.
    """

    def __init__(self, hands: StateHands) -> None:
        self.hands = hands
        self.root = f"/state/{hands.boot.name}/".encode()
        self.known: dict[bytes, bytes | None] = {}  # what must be there
        self.number = 0
        self.cut_off = 0
        self.repeated = 0
        self.wrong: list[str] = []

    async def run(self) -> Any:
        while word(await self.sure(Get(STOP))) == "NOT_FOUND":
            await self.one_round()
        await self.check_all()
        return {
            "changes": self.number,
            "cut_off": self.cut_off,
            "repeated": self.repeated,
            "wrong": self.wrong[:5],
        }

    async def sure(self, request: Any) -> Any:
        """The answer, asked for until there is one. Each request here may be repeated."""
        begun = await Now()
        while True:
            outcome = await self.hands.state(request, SECOND)
            if not isinstance(outcome, CallFailure):
                return outcome
            self.cut_off += 1
            assert await Now() < begun + 60 * SECOND, outcome
            await self.hands.pause(MS)

    async def change(self, request: Any) -> Stored:
        """Make a change under the id it has."""
        self.number += 1
        cut_off = self.cut_off
        stored = await self.sure(request)
        assert isinstance(stored, Stored), stored
        if stored.repeated:
            self.repeated += 1
            self.expect(self.cut_off > cut_off, f"{self.number} repeated and never cut off")
        return stored

    def expect(self, good: bool, what: str) -> None:
        if not good:
            self.wrong.append(what)

    async def one_round(self) -> None:
        number = self.number
        key = self.root + b"k%d" % (number % 7)
        durability = D if number % 3 else A
        first = await self.change(put(key, b"a%d" % number, durability, 4 * number + 1))
        self.known[key] = b"a%d" % number
        await self.check(key)
        _ = await self.change(put(key, b"b%d" % number, durability, 4 * number + 2))
        self.known[key] = b"b%d" % number
        late = await self.sure(put(key, b"a%d" % number, durability, 4 * number + 1))
        self.expect(
            isinstance(late, Stored) and late.repeated and late.sequence == first.sequence,
            f"{number}: a late duplicate was applied: {late}",
        )
        await self.check(key)
        stamp = b"s%d" % number
        names = [self.root + b"batch%d" % index for index in range(BATCH_KEYS)]
        changes = bytes(encode(Changes([Change(name, stamp) for name in names])))
        batch = Batch(changes, durability, 4 * number + 3)
        outcome = await self.hands.state(batch, SECOND)
        if isinstance(outcome, CallFailure):  # look before it is repeated: all of it or nothing
            self.cut_off += 1
            found = [await self.sure(Get(name)) for name in names]
            values = {each.value if isinstance(each, Value) else None for each in found}
            self.expect(len(values) == 1, f"{number}: half a batch: {values}")
        _ = await self.sure(batch)
        self.known.update(dict.fromkeys(names, stamp))
        await self.check(names[number % BATCH_KEYS])
        if number % 5 == 0:
            gone = Delete(key, durability, 4 * number + 4)
            _ = await self.change(gone)
            self.known[key] = None
            await self.check(key)

    async def check(self, key: bytes) -> None:
        value = await self.sure(Get(key))
        found = value.value if isinstance(value, Value) else None
        expected = self.known[key]
        self.expect(found == expected, f"{key!r} is {found!r}, and {expected!r} was acknowledged")

    async def check_all(self) -> None:
        for key in self.known:
            await self.check(key)


async def load(hands: StateHands) -> Any:
    while word(await hands.state(Get(GO))) == "NOT_FOUND":  # until init has seen all it asks for
        _ = await hands.server.step(await hands.ahead(20 * MS))
    client = Load(hands)
    result = await client.run()
    await ConsoleWrite(RESULT + hands.boot.name, json.dumps({"result": result}).encode())
    assert isinstance(await client.sure(put(DONE + hands.boot.name.encode())), Stored)
    return result


async def killing(hands: StateHands) -> Any:
    """Kill statefsd once per life, when it has answered again and worked a little."""
    pids = set()
    assert isinstance(await hands.state(put(GO)), Stored)
    for number in range(KILLS):
        begun = await Now()
        while word(await hands.state(Get(STOP), SECOND)) != "NOT_FOUND":
            assert await Now() < begun + 60 * SECOND, "statefsd does not come back"
            await hands.pause(MS)
        await hands.pause(LIFE_LEAST + number % 12 * LIFE_STEP)
        record = await hands.reply(GetService("statefsd"), ServiceRecord)
        pids.add(record.pid)
        await hands.kill("statefsd")
    while not isinstance(await hands.state(put(STOP), SECOND), Stored):
        await hands.pause(MS)
    record = await hands.reply(GetService("statefsd"), ServiceRecord)
    names = {name.encode() for name in CLIENTS}
    for name in names:  # they have looked at everything, and told what they have seen
        begun = await Now()
        while word(await hands.state(Get(DONE + name), SECOND)) != "Value":
            assert await Now() < begun + 60 * SECOND, f"{name!r} does not come to an end"
            await hands.pause(10 * MS)
    facts = await hands.facts()
    areas = {
        key.split(b"/")[2]
        for name in names
        for key in (await hands.state(ListKeys(b"/state/" + name + b"/", b"", 24))).keys
    }
    return {
        "killed": len(pids),
        "generation": record.generation,
        "facts": facts,
        "areas": len(areas),
    }


def test_200_sigkills_under_load_lose_nothing_acknowledged_and_apply_nothing_twice(
    monkeypatch: pytest.MonkeyPatch, directory: Path
) -> None:
    text = SYSTEM + "".join(client_text(name, "statefs.read", "statefs.write") for name in CLIENTS)

    run = boot_linux(
        monkeypatch,
        killing,
        directory=directory,
        text=text,
        clients=dict.fromkeys(CLIENTS, load),
        seconds=180,
    )

    result = run.result()
    assert result["killed"] == KILLS
    assert result["generation"] == KILLS + 1
    assert result["areas"] == len(CLIENTS)
    assert result["facts"]["quarantined_total"] == 0
    reports = [run.result(name) for name in CLIENTS]
    for report in reports:
        assert report["wrong"] == [], report
        assert report["changes"] > 0, report
    assert sum(report["changes"] for report in reports) > KILLS, "the load was real"
    assert sum(report["cut_off"] for report in reports) >= KILLS, "and met the kills"
    assert sum(report["repeated"] for report in reports) > 0, "some were applied and not answered"


# ------------------------------------------------------------------ restarts


def test_the_next_boot_finds_the_value_under_the_same_number(
    monkeypatch: pytest.MonkeyPatch, directory: Path
) -> None:
    key = b"/state/t/key"

    async def first(hands: StateHands) -> Any:
        _ = await hands.state(put(b"/state/t/other", b"accepted", A))
        return (await hands.state(put(key, b"value"))).sequence

    async def second(hands: StateHands) -> Any:
        value = await hands.state(Get(key))
        other = await hands.state(Get(b"/state/t/other"))
        store = await hands.state(GetStore())
        return value.value.decode(), value.sequence, other.value.decode(), store.backing

    written = boot_linux(monkeypatch, first, directory=directory).result()
    found = boot_linux(monkeypatch, second, directory=directory).result()

    assert found == ["value", written, "accepted", "file"]


def test_a_byte_changed_between_two_boots_is_quarantined_and_all_else_is_there(
    monkeypatch: pytest.MonkeyPatch, directory: Path
) -> None:
    """Injected: one byte of the image file is flipped while the system is down."""

    async def first(hands: StateHands) -> Any:
        for number in range(8):
            _ = await hands.state(put(b"/state/t/%d" % number, b"needle-%d" % number))

    async def second(hands: StateHands) -> Any:
        found = [word(await hands.state(Get(b"/state/t/%d" % number))) for number in range(8)]
        store = await hands.state(GetStore())
        return found, [each.key.decode() for each in store.lost]

    _ = boot_linux(monkeypatch, first, directory=directory)
    image = directory / "disk.img"
    data = bytearray(image.read_bytes())
    data[data.index(b"needle-5")] ^= 1
    _ = image.write_bytes(data)
    found, lost = boot_linux(monkeypatch, second, directory=directory).result()

    assert found == ["Value"] * 5 + ["CORRUPTED"] + ["Value"] * 2
    assert lost == ["/state/t/5"]


# ------------------------------------------------------------------ bad disks


async def filling(hands: StateHands) -> Any:
    """Write until it is refused; what was acknowledged is looked at then."""
    kept = []
    outcome: Any = None
    for number in range(600):
        key = b"/state/t/%d" % number
        outcome = await hands.state(put(key, b"%d" % number + bytes(6000)))
        if not isinstance(outcome, Stored):
            break
        kept.append(number)
    after = word(await hands.state(put(b"/state/t/after")))
    intact = 0
    for number in kept:
        value = await hands.state(Get(b"/state/t/%d" % number))
        intact += isinstance(value, Value) and value.value.startswith(b"%d" % number)
    facts = await hands.facts()
    record = await hands.reply(GetService("statefsd"), ServiceRecord)
    return {
        "refused": word(outcome),
        "after": after,
        "kept": len(kept),
        "intact": intact,
        "writable": facts["store_writable"],
        "generation": record.generation,
    }


def check_filled(result: Any) -> None:
    """The write itself met the end of the room, or the tidying up between two writes did."""
    assert result["refused"] in (StatefsdStatus.IO_ERROR.name, StatefsdStatus.READ_ONLY.name)
    assert result["after"] == StatefsdStatus.READ_ONLY.name
    assert result["kept"] > 3
    assert result["intact"] == result["kept"]
    assert result["writable"] == 0
    assert result["generation"] == 1, "it is healthy and was not restarted"


@contextmanager
def without_room(directory: Path) -> Iterator[Path]:
    """A sparse image of a disk on a tmpfs of 512 KiB."""
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(directory)],
        check=False,
        capture_output=True,
    )
    if mount.returncode:
        pytest.skip(f"mount: {mount.stderr.decode().strip()}")
    try:
        image = directory / "disk.img"
        with image.open("wb") as opened:
            _ = opened.truncate(4 << 20)
        yield image
    finally:
        _ = subprocess.run(["umount", "-l", str(directory)], check=True)


@pytest.mark.skipif(os.getuid() != 0, reason="a file system of one's own takes root")
def test_a_file_system_without_room_loses_nothing_acknowledged(
    monkeypatch: pytest.MonkeyPatch, directory: Path
) -> None:
    """Injected: the image is a sparse file on a tmpfs of 512 KiB."""
    with without_room(directory):
        result = boot_linux(monkeypatch, filling, directory=directory).result()

    check_filled(result)


@pytest.mark.skipif(os.getuid() != 0, reason="a block device of one's own takes root")
def test_a_block_device_that_fails_with_eio_loses_nothing_acknowledged(
    monkeypatch: pytest.MonkeyPatch, directory: Path
) -> None:
    """Injected: the disk is a loop device whose file has no room, so that the device itself fails
    with EIO when what was written to it is to be made durable."""
    (directory / "state").mkdir()
    (directory / "small").mkdir()
    with without_room(directory / "small") as image:
        attached = subprocess.run(
            ["losetup", "--find", "--show", str(image)],
            check=False,
            capture_output=True,
            text=True,
        )
        if attached.returncode:
            pytest.skip(f"losetup: {attached.stderr.strip()}")
        node = attached.stdout.strip()
        try:
            text = SYSTEM.replace('size = "4MiB"', f'size = "4MiB"\npath = "{node}"')
            run = boot_linux(monkeypatch, filling, directory=directory / "state", text=text)
        finally:
            _ = subprocess.run(["losetup", "--detach", node], check=True)

    check_filled(run.result())


def test_a_device_that_can_only_be_read_serves_what_is_there(
    monkeypatch: pytest.MonkeyPatch, directory: Path
) -> None:
    """Injected: the system file says read_only, so the image is opened for reading alone."""

    async def first(hands: StateHands) -> Any:
        return (await hands.state(put(b"/state/t/key", b"kept"))).sequence

    async def second(hands: StateHands) -> Any:
        value = await hands.state(Get(b"/state/t/key"))
        refused = word(await hands.state(put(b"/state/t/key", b"new")))
        gone = word(await hands.state(Delete(b"/state/t/key", D, 0)))
        store = await hands.state(GetStore())
        return value.value.decode(), refused, gone, store.writable

    _ = boot_linux(monkeypatch, first, directory=directory)
    before = (directory / "disk.img").read_bytes()
    reading = SYSTEM.replace('size = "4MiB"', 'size = "4MiB"\nread_only = true')
    found = boot_linux(monkeypatch, second, directory=directory, text=reading).result()

    assert found == ["kept", "READ_ONLY", "READ_ONLY", False]
    assert (directory / "disk.img").read_bytes() == before
