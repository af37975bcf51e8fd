"""Bad sets on real processes: each one that is tried is left by itself, in time, and is explained.

One device for the whole file, set up once; its sets are one build with the system files of all, and
each is tried once. Afterwards `nexus why` names the service at fault and shows its last words, the
data and the slot that was good are as before, and what runs is the old set.

A slow machine is no bad set: what a good one has to keep takes a fraction of its limit on a machine
that is busy, and no bad one is committed because it is slow to fail.
"""

import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from nexus.bootctl import Cause, SlotName, SlotState
from nexus.bundle import package_folder
from nexus.cli.client import OperatorClient
from nexus.protocols.statefsd import LIST_MAX, Get, GetSnapshot, GetStore, ListKeys, SnapshotState
from nexus.protocols.statefsd import PROTOCOL as STATEFSD
from tests.fakes.machine import machine, python_of
from tests.linux.slotted import (
    SERVICES,
    SYSTEM,
    TITLE,
    Device,
    Set,
    Signer,
    changed,
    eventually,
    first_set,
    stamp_of,
)

pytestmark = pytest.mark.linux

AREA = "/state/app/"
DATA = {f"{AREA}limit": b"70", f"{AREA}name": b"boiler " * 40}
ALL = (*SERVICES, "app")
HEALTH = 60_000_000_000  # ns a trial has; a good one takes two seconds, on a machine that is idle
ASK = 15.0  # seconds for a question
UPDATES = 10  # in a row that leave nothing behind
HISTORY_SIZE = 12_000  # bytes; updated keeps its latest events, a few more for each update
DESCRIPTORS_OFF = 2  # of all processes: something may be on its way when they are counted

STATE_RIGHTS = f'"statefs.read:{AREA}", "statefs.write:{AREA}", "statefs.snapshot",\n'
APP = """
[service.app]
program = "demo.faulty"
capabilities = ["statefs.read:/state/app/", "statefs.write:/state/app/"]
uses = { statefsd = {} }
restart = { backoff = "50ms", backoff_max = "50ms" }
"""
PATIENT = 'health = { deadline = "60s", every = "200ms", answer = "20s" }'
"""Of whoever is not to be found faulty before it does what it is here for."""
SETTINGS = """
[service.app.settings]
failure = "{failure}"
area = "/state/app/"
keys = "{keys}"
"""


class Bad(NamedTuple):
    """How a set is bad, and what is to be known of it afterwards."""

    failure: str  # of demo.faulty
    cause: Cause
    words: str  # its own last ones
    detail: str  # what init says, as a pattern
    health: str = PATIENT
    schema: int = 1  # in which the set keeps the data


ENDED = r"app ended 3 times, the last by "
CRASHED = ENDED + "exit, code 70"
GAVE_UP = ENDED + "exit, code 3"
BAD = {
    "never ready": Bad(
        "never ready",
        Cause.NOT_READY,
        "waiting for a sensor that does not answer",
        r"app was not ready within its deadline of 3000 ms(: .*)?",
        'health = { deadline = "3s", every = "200ms", answer = "3s" }',
    ),
    "crashes": Bad("crashes", Cause.CRASHED, "KeyError: 'calibration'", CRASHED),
    "hangs": Bad(
        "hangs",
        Cause.HUNG,
        "waiting for a lock that nobody gives back",
        ENDED + "hang, signal 9",
        'health = { deadline = "60s", every = "100ms", answer = "800ms" }',
    ),
    "unhealthy": Bad(
        "unhealthy",
        Cause.UNHEALTHY,
        "the pressure is out of range",
        ENDED + "not ready, signal 9",
    ),
    "takes more objects than its budget": Bad(
        "memory", Cause.CRASHED, "NO_SPACE: budget of app", CRASHED
    ),
    "takes more memory than its limit": Bad(
        "private memory", Cause.CRASHED, "MemoryError", CRASHED
    ),
    "fills the disk": Bad("disk", Cause.CRASHED, "no room for more than", GAVE_UP, schema=2),
    "migrates and fails": Bad(
        "migration",
        Cause.CRASHED,
        "the migrated data do not fit each other",
        GAVE_UP,
        schema=2,
    ),
}
TRIAL = "python/nexus/init/trial.py"
CRASH = b"""

async def _crash(_self: Trial) -> None:
    raise ZeroDivisionError("init of a bad set")


Trial._report = _crash
"""
"""An init that starts everything, finds it well, and crashes then."""


def text_of(failure: str, health: str, settle: str) -> bytes:
    """The system file of a set whose app fails so."""
    text = SYSTEM.read_text()
    for old, new in (
        ('"300ms"', f'"{settle}"'),
        ("updated = { sync = false }\n", "updated = { sync = false }\napp = { sync = false }\n"),
        ('    "policy.reload",\n', f'    "policy.reload",\n    {STATE_RIGHTS}'),
    ):
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    settings = SETTINGS.format(failure=failure, keys=" ".join(DATA))
    return (text + APP + health + settings).encode()


def path_of(name: str) -> str:
    """Where a set has the system file of that name."""
    return f"system/{name.replace(' ', '-')}.toml"


@cache
def build() -> Set:
    """One set with the system files of all; which one it runs is in the manifest alone."""
    files = {path_of("good"): text_of("none", PATIENT, "300ms")}
    for name, bad in BAD.items():
        # Nobody commits one of these because it is about to fail.
        files[path_of(name)] = text_of(bad.failure, bad.health, "60s")
    return changed(first_set(), files)


def good_set(version: int) -> Set:
    return build().as_version(version, HEALTH, system=path_of("good"), schemas={AREA: 1})


def bad_set(name: str, version: int) -> Set:
    schemas = {AREA: BAD[name].schema}
    return build().as_version(version, HEALTH, system=path_of(name), schemas=schemas)


class Held(NamedTuple):
    """What a device holds on to while a good set runs: it is the same after any update."""

    files: frozenset[str]  # below its directories, but for the trees and the log's numbers
    processes: int
    descriptors: int
    objects: int  # of the kernel's memory: descriptors of memory files, all processes together
    size: int  # bytes in the store
    snapshot: SnapshotState


@dataclass
class Bench:
    """The device, and what was done to it."""

    device: Device
    running: Set  # the last good one
    version: int = 1
    updates: list[str] = field(default_factory=list)
    asked_at: int = 0  # ns, when the last trial was about to be asked for
    held: Held | None = None

    def next_version(self) -> int:
        self.version += 1
        return self.version

    def why(self, *words: str) -> Any:
        return self.device.host.ok("why", *words, "--json").json

    def try_set(self, made: Set, name: str) -> int:
        """Have a set tried, once; where the console ended before."""
        self.updates.append(name)
        before = self.device.size()
        path = self.device.write_update(made)
        _ = self.device.host.ok("ota", "stage", path)
        Path(path).unlink()
        self.asked_at = time.time_ns()
        _ = self.device.host.ok("ota", "switch", "--tries", "1", "--reboot")
        return before

    def commit(self, name: str) -> Set:
        """A good set is tried and kept."""
        made = good_set(self.next_version())
        before = self.try_set(made, name)
        _ = self.device.says("init: health ok", before)
        self.running = made
        return made

    def comes_back(self, before: int) -> None:
        """The set of before is up again."""
        version = self.running.manifest.version
        back = self.device.says(f", version {version} (", before)
        _ = self.device.says("updated: ready (statefs)", back)
        assert eventually(lambda: not self.device.record().restore), "the data are put back"

    def client(self) -> OperatorClient:
        """A person at the running system's door."""
        return OperatorClient(Path(self.device.running().runtime), TITLE, lambda: True)

    def data(self) -> dict[str, bytes]:
        """Every key of the app, and its value."""
        with self.client() as client:
            keys = client.relay(
                "statefsd", STATEFSD, ListKeys(AREA.encode(), b"", LIST_MAX), ASK
            ).keys
            return {
                key.decode(): client.relay("statefsd", STATEFSD, Get(key), ASK).value
                for key in keys
            }


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    python = python_of(os.getuid())
    assert python is not None
    with machine(os.getuid(), python) as host:
        first = good_set(1)
        device = Device(host, first)
        device.up()
        for key, value in DATA.items():
            _ = host.ok("state", "put", key, value.decode())
        made = Bench(device, first)
        made.held = held_by(made)
        try:
            yield made
        finally:
            for running in host.run("status", "--all", "--json").json or []:
                _ = host.run("down", "--name", running["system"])


class Booted(NamedTuple):
    """A boot, as the loader announces it on the console."""

    at: float  # seconds
    number: int
    slot: str
    version: int


def boots(device: Device, since: int) -> list[Booted]:
    text = device.console.read_bytes()[since:].decode("utf-8", "replace")
    found = re.findall(
        r"^(\d+\.\d+) loader \[booting\] boot (\d+): slot (\w), version (\d+)", text, re.MULTILINE
    )
    return [Booted(float(at), int(n), slot, int(version)) for at, n, slot, version in found]


def processes_of(device: Device) -> set[int]:
    """Every process that was started with the device's directories, or by one that was."""
    home = str(device.host.home).encode()
    parents: dict[int, int] = {}
    own: set[int] = set()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        pid = int(entry.name)
        try:
            stat = (entry / "stat").read_text("ascii", "replace").rpartition(")")[2].split()
        except OSError:
            continue  # it has ended meanwhile
        try:
            told = (entry / "environ").read_bytes() + (entry / "cmdline").read_bytes()
        except OSError:
            told = b""  # it shows nothing to us; its parent may
        if stat[0] == "Z":
            continue
        parents[pid] = int(stat[1])
        if home in told:
            own.add(pid)
    while more := {pid for pid, parent in parents.items() if parent in own} - own:
        own |= more
    return own


def held_by(bench: Bench) -> Held:
    """What a device holds on to now."""
    device = bench.device
    home = device.host.home
    files = {
        str(path.relative_to(home))
        for folder in ("s", "r", "l")
        for path in (home / folder).rglob("*")
        if device.state / "slots" not in path.parents
    }
    links: list[str] = []
    pids = processes_of(device)
    for pid in pids:
        links += descriptors_of(pid)
    with bench.client() as client:
        store = client.relay("statefsd", STATEFSD, GetStore(), ASK)
        kept = client.relay("statefsd", STATEFSD, GetSnapshot(), ASK)
    return Held(
        files=frozenset(files),
        processes=len(pids),
        descriptors=len(links),
        objects=sum("memfd:" in link for link in links),
        size=store.used,
        snapshot=kept.state,
    )


def descriptors_of(pid: int) -> list[str]:
    """What the descriptors of a process are; of one that has ended, none."""
    try:
        return [str(each.readlink()) for each in Path(f"/proc/{pid}/fd").iterdir()]
    except OSError:
        return []


def check_left(bench: Bench, bad: Set, before: int) -> dict[str, Any]:
    """The device is as it was before this set was tried, and got there in time by itself.

    What `nexus why` says of the one boot that there was.
    """
    device, good = bench.device, bench.running
    version = bad.manifest.version
    assert device.stamps(ALL).all == {stamp_of(good)}
    assert bench.data() == DATA

    trial, back = boots(device, before)
    assert (trial.version, back.version) == (version, good.manifest.version)
    assert (back.at - trial.at) * 10**9 < HEALTH

    record = device.record()
    assert (record.active, record.trying, record.snapshot) == (SlotName(back.slot), None, 0)
    kept, left = record.slot(record.active), record.slot(record.standby)
    assert (kept.state, kept.digest) == (SlotState.GOOD, good.digest)
    assert (left.state, left.digest) == (SlotState.BAD, bad.digest)
    assert device.content(record.active, len(good.data)) == good.data

    told = bench.why()
    assert told["refused"] is None
    assert told["unknown"] == []
    assert (told["end"]["cause"], told["end"]["version"]) == ("rolled_back", version)
    (evidence,) = told["evidence"]
    assert (evidence["version"], evidence["slot"], evidence["boot"]) == (
        version,
        trial.slot,
        trial.number,
    )
    (asked_for,) = [
        each
        for each in told["reasons"]
        if (each["cause"], each["version"]) == ("switched", version)
    ]
    assert bench.asked_at < asked_for["time"] < evidence["time"] <= told["end"]["time"]
    assert told["end"]["time"] < time.time_ns()
    result: dict[str, Any] = evidence
    return result


def test_a_good_set_is_kept_and_its_processes_are_what_runs(bench: Bench) -> None:
    old = bench.device.stamps(ALL)

    made = bench.commit("good")

    new = bench.device.stamps(ALL)
    assert new.all == {stamp_of(made)}
    assert not old.pids & new.pids
    assert bench.data() == DATA
    assert bench.why()["end"]["cause"] == "committed"


@pytest.mark.parametrize("name", BAD)
def test_a_bad_set_is_left_by_itself_and_why_names_the_true_cause(bench: Bench, name: str) -> None:
    bad = BAD[name]
    made = bad_set(name, bench.next_version())

    before = bench.try_set(made, name)
    bench.comes_back(before)

    evidence = check_left(bench, made, before)
    assert (evidence["cause"], evidence["service"]) == (bad.cause.name.lower(), "app")
    assert re.fullmatch(bad.detail, evidence["detail"])
    assert any(bad.words in line for line in evidence["console"]), evidence["console"]
    assert evidence["trace"] is not None
    reasons = bench.device.record().reasons
    assert [reason.cause for reason in reasons[-2:]] == [bad.cause, Cause.ROLLED_BACK]
    assert reasons[-2].trace.hex() == evidence["trace"]


def test_an_init_that_crashes_in_its_trial_leaves_a_word_too(bench: Bench) -> None:
    source = (package_folder() / "init" / "trial.py").read_bytes()
    broken = changed(build(), {TRIAL: source + CRASH})
    made = broken.as_version(
        bench.next_version(), HEALTH, system=path_of("good"), schemas={AREA: 1}
    )

    before = bench.try_set(made, "init crashes")
    bench.comes_back(before)

    evidence = check_left(bench, made, before)
    assert (evidence["cause"], evidence["service"]) == ("init_ended", None)
    assert evidence["detail"] == "init ended with exit code 1"
    assert any("ZeroDivisionError" in line for line in evidence["console"]), evidence["console"]


def test_an_update_that_nobody_trusted_has_signed_is_refused_and_why_says_so(
    bench: Bench,
) -> None:
    device = bench.device
    record, pids = device.record(), device.stamps(ALL).pids
    standby = record.slot(record.standby)
    content = device.content(record.standby, standby.size)
    made = good_set(bench.next_version())
    path = device.host.home / "stranger.nxu"
    _ = path.write_bytes(Signer("stranger").update(made))

    answer = device.host.run("ota", "stage", str(path))

    assert answer.code == 1
    assert answer.err.startswith("nexus: updated: WRONG_KEY, nobody whom this device trusts")
    text = device.host.ok("why").out
    assert "an update was refused\n    cause      WRONG_KEY, nobody whom this device trusts" in text
    assert "nothing was changed: what runs went on, and nothing is tried" in text
    assert device.record() == record
    assert device.content(record.standby, standby.size) == content
    assert device.stamps(ALL).pids == pids
    path.unlink()


def test_ten_updates_in_a_row_leave_nothing_behind(bench: Bench) -> None:
    """Good ones and bad ones: those of the tests before this one, and as many as are missing."""
    device = bench.device
    made = bench.commit("good")
    while len(bench.updates) < UPDATES:
        made = bench.commit("good")
    old = bench.held
    assert old is not None

    def is_as_before() -> bool:
        new = held_by(bench)
        return (
            new.processes == old.processes and new.descriptors <= old.descriptors + DESCRIPTORS_OFF
        )

    assert eventually(is_as_before, 30), (old, held_by(bench))
    new = held_by(bench)
    assert device.stamps(ALL).all == {stamp_of(made)}
    assert new.files == old.files
    assert new.objects <= old.objects
    assert new.snapshot is SnapshotState.NONE
    assert new.size - old.size < HISTORY_SIZE
    assert bench.data() == DATA
    record = device.record()
    trees = {f"{name}-{record.slot(name).digest.hex()[:12]}" for name in SlotName}
    assert set(device.trees()) <= trees

    device.down()

    assert processes_of(device) == set()
