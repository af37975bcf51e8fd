"""Neither seed nor wrapping key nor entropy is in anything that a system on linux leaves or shows.

The secrets of the run are read as root from where they live; the scan then looks everywhere else:
events with console, journal and tracebacks, the state directory, what processes show of
themselves, what they print, and the core of a service that crashed, which there is none of. The
same scan finds what is planted.
"""

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest
from msgspec import structs

from nexus.abi import ConsoleWrite, EventKind
from nexus.ipc import Unknown
from nexus.kernel.core import EXIT_CRASH
from nexus.proof.leaks import Leaks
from nexus.protocols.keystored import (
    DeviceKey,
    Done,
    ExportPrivateKey,
    GenerateKey,
    Get,
    GetPublicKey,
    GetStore,
    Put,
    RotateWrapping,
    Sign,
    Store,
)
from nexus.protocols.logd import EVERY_RECORD, THIS_BOOT, Query, Records
from nexus.protocols.rngd import Entropy, GetEntropy
from nexus.services.keystored.ed25519 import SEED_SIZE, public_of
from nexus.services.keystored.sealing import (
    HEAD,
    OVERHEAD,
    VERSION,
    Unsealable,
    Wrapping,
    unpack,
    unseal,
)
from nexus.services.keystored.secret import Secret
from nexus.services.keystored.vault import DEVICE_PATH
from tests.fakes.initrig import SECOND
from tests.fakes.keyrig import DRAWING, LinuxMachine, asked
from tests.fakes.leaks import files_below, listing
from tests.fakes.policyrig import Hands
from tests.linux.crashing_keystored import BY_ABORT, BY_ADDRESS, BY_EXCEPTION

pytestmark = pytest.mark.linux

VALUE: Final = bytes(range(100, 160))
EXPORT: Final = "device.key.export"
CRASHES: Final = (BY_ADDRESS, BY_ABORT, BY_EXCEPTION)
PLACE: Final = "tests.linux.crashing_keystored:main"
CANARY: Final = bytes((11 * each + 5) % 256 for each in range(64))
PIPED: Final = Path("/proc/sys/kernel/core_pattern").read_text().startswith("|")


async def until_back(hands: Hands, generation: int) -> None:
    async def good() -> bool:
        outcome = await hands.client("keystored").call(GetStore(), await hands.ahead(SECOND))
        alive = hands.client("keystored").generation >= generation
        return isinstance(outcome, Store) and outcome.wrapping > 0 and alive

    _ = await hands.until(good, 20 * SECOND)


async def look(hands: Hands) -> None:
    """Have the test's process look at keystored, as init, while it lives."""
    await hands.outside("look keystored")


async def lived(hands: Hands) -> str:
    """Everything that touches a secret, and two crashes; what the driver drew, in reverse."""
    (made, *_) = await asked(
        hands, GenerateKey(), Put(b"name", VALUE), Sign(b"payload"), GetPublicKey(),
        ExportPrivateKey(), Get(b"name"),
    )  # fmt: skip
    assert isinstance(made, DeviceKey)
    drawn = await hands.call("rngd", GetEntropy(64))
    assert isinstance(drawn, Entropy)
    await look(hands)
    await asked(hands, RotateWrapping())
    await look(hands)
    for generation, name in enumerate(CRASHES, 2):
        outcome = await hands.client("keystored").call(Put(name, VALUE), await hands.ahead(SECOND))
        assert isinstance(outcome, Unknown), outcome
        await until_back(hands, generation)
        (put, _) = await asked(hands, Put(b"name", VALUE), Sign(b"payload"))
        assert put == Done()
    await look(hands)

    async def told() -> bool:
        wanted = structs.replace(EVERY_RECORD, key="action", value=EXPORT)
        page = await hands.call("logd", Query(THIS_BOOT, 1, 16, wanted))
        return isinstance(page, Records) and bool(page.records)

    _ = await hands.until(told)  # what was denied comes into the journal after the answer
    since = 1
    while True:
        page = await hands.call("logd", Query(THIS_BOOT, since, 16, EVERY_RECORD))
        assert isinstance(page, Records)
        for record in page.records:
            fields = [f"{field.key}={field.value}" for field in record.fields]
            evidence = json.dumps({"record": [record.text, *fields]})
            await ConsoleWrite("driver: journal", evidence.encode())
        if page.next > page.total:
            return drawn.data.hex()[::-1]
        since = page.next


def seed_on(image: bytes, wrapping: Wrapping) -> bytes:
    """The device key's seed: the one record on the disk that opens at its place."""
    head = HEAD.pack(VERSION, wrapping.current.number, bytes(12))[:5]
    found = set()
    start = image.find(head)
    while start >= 0:
        try:
            record = image[start : start + OVERHEAD + SEED_SIZE]
            found.add(bytes(unseal(wrapping, DEVICE_PATH, record).data))
        except Unsealable:
            pass
        start = image.find(head, start + 1)
    (seed,) = found
    return seed


@contextmanager
def cores_wanted() -> Iterator[None]:
    """As large as they like: it must not be the limit of whoever started the test that helps."""
    before = resource.getrlimit(resource.RLIMIT_CORE)
    most = resource.RLIM_INFINITY if os.getuid() == 0 else before[1]
    resource.setrlimit(resource.RLIMIT_CORE, (most, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_CORE, (before[0], most))


def cores_in(*folders: Path) -> set[Path]:
    return {path for folder in folders for path in folder.glob("core*") if path.is_file()}


class Seen:
    """What is to be seen of the system from outside while it runs."""

    def __init__(self, machine: LinuxMachine) -> None:
        self.machine = machine
        self.shown: list[tuple[str, bytes]] = []
        self.wrappings: list[Wrapping] = []
        self.folders = {Path.cwd(), Path("/"), machine.state}
        self.open: list[str] = []  # what is wrong with a process that keeps secrets

    def obey(self, what: str, pid: int) -> None:
        """An order of the driver."""
        assert what == "look"
        self.folders.add(Path("/proc", str(pid), "cwd").readlink())
        self.shown += listing()
        self.wrappings.append(unpack(self.machine.secret))
        limits = Path(f"/proc/{pid}/limits").read_text().splitlines()
        (core,) = [line.split()[4:6] for line in limits if line.startswith("Max core file size")]
        if core != ["0", "0"]:
            self.open.append(f"core limit {core}")
        # Linux gives what a process that is not dumpable shows to root.
        if os.getuid() == 0 and os.stat(f"/proc/{pid}/mem").st_uid != 0:  # noqa: PTH116
            self.open.append("dumpable")


def test_no_secret_is_in_anything_that_is_left_or_shown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    machine = LinuxMachine(monkeypatch, tmp_path / "state", DRAWING, entry=PLACE)
    seen = Seen(machine)
    before = cores_in(*seen.folders)

    with cores_wanted():
        outcome = machine.boot(lived, obey=seen.obey)

    old, new, _ = seen.wrappings
    image = (machine.state / "disk.img").read_bytes()
    seed = seed_on(image, new)
    leaks = Leaks(
        {
            "seed": seed,
            "old wrapping key": bytes(old.current.secret.data),
            "wrapping key": bytes(new.current.secret.data),
            "value": VALUE,
            "entropy": bytes.fromhex(outcome.result[::-1]),
        }
    )
    printed = capfd.readouterr()
    events = [
        (f"{event.kind} {number}", repr(dict(event.fields)).encode())
        for number, event in enumerate(outcome.events)
    ]
    places = [
        *events,
        *files_below(machine.state, but=machine.secret_path),
        *seen.shown,
        ("stdout", printed.out.encode()),
        ("stderr", printed.err.encode()),
    ]
    assert leaks.among(places) == {}
    assert seen.open == []
    assert cores_in(*seen.folders) == before, "a crashed service leaves no core"

    # What was looked for is what there was, it was looked for where things are, and it crashed.
    assert public_of(Secret(seed)).hex() in repr([event.fields for event in outcome.events])
    assert leaks.within(machine.secret) == {"wrapping key"}
    names = {name for name, _ in places}
    assert {"disk.img", "stderr", f"/proc/{os.getpid()}/environ"} <= names
    assert EXPORT.encode() in b"".join(data for _, data in events)
    ends = [
        (event.fields["signal"], event.fields["code"])
        for event in outcome.events
        if event.kind is EventKind.EXIT and event.fields["name"] == "keystored"
    ]
    by_address, by_abort, by_exception, _ = ends
    assert by_address == (signal.SIGSEGV, 0)
    assert by_abort[0] in (signal.SIGABRT, signal.SIGSEGV, signal.SIGSYS)
    assert by_exception == (0, EXIT_CRASH)
    assert "keystored: crashed, RuntimeError" in outcome.lines()


def test_the_scan_finds_what_is_planted_in_files_and_in_the_listing(tmp_path: Path) -> None:
    leaks = Leaks({"canary": CANARY})
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "new-secret").write_bytes(b"\0" * 100 + CANARY)
    # It is started before Linux has its arguments where /proc shows them.
    sleeper = [sys.executable, "-c", "import sys; print('up', flush=True); sys.stdin.read()"]

    with subprocess.Popen(
        [*sleeper, CANARY.hex()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={"KEY": CANARY.hex()},
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"up\n"
        shown = leaks.among(listing())
        child.communicate(timeout=30)

    assert leaks.among(files_below(tmp_path)) == {"state/new-secret": {"canary"}}
    assert {place: names for place, names in shown.items() if f"/{child.pid}/" in place} == {
        f"/proc/{child.pid}/cmdline": {"canary"},
        f"/proc/{child.pid}/environ": {"canary"},
    }


@pytest.mark.skipif(PIPED or os.getuid() != 0, reason="cores go elsewhere, or are limited, here")
def test_the_same_crash_without_the_walls_leaves_a_core_with_the_secret(tmp_path: Path) -> None:
    code = f"import os; canary = bytes.fromhex({CANARY.hex()!r}); os.abort()"

    with cores_wanted():
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, timeout=60, check=False)

    assert done.returncode == -signal.SIGABRT
    (core,) = cores_in(tmp_path)
    assert Leaks({"canary": CANARY}).among(files_below(tmp_path)) == {core.name: {"canary"}}
