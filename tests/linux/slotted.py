"""A device with two slots on this machine: provisioned, updated and asked as a person would.

Its sets hold the package tree of this very source, so that what runs out of a slot is told from
what runs out of the source. One set is built; others are it with another version, or with files
changed. Needs no pytest: tests/linux/slot_kills.py uses it as a campaign.
"""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from threading import Event as Pause
from typing import Any

import msgspec

from nexus.abi import INIT_NAME
from nexus.bootctl import BootRecord, SlotInfo, SlotName, open_boot
from nexus.bootctl.block import BlockBoot
from nexus.bootctl.provision import provision
from nexus.bundle import Release, build, package_folder
from nexus.cli.client import OperatorClient
from nexus.cli.places import Running
from nexus.drivers import finished
from nexus.loader.devices import boot_path, opened, slot_path
from nexus.loader.main import MARGIN
from nexus.protocols.init import PROTOCOL as INIT
from nexus.protocols.init import GetTasks
from nexus.protocols.meta import PROTOCOL as META
from nexus.protocols.meta import Health
from nexus.sets import (
    About,
    BytesSource,
    Content,
    File,
    Manifest,
    encode_manifest,
    read_manifest,
    unpack,
    write,
)
from nexus.sets.reader import END, FORMAT, HEADER, MAGIC
from nexus.trust import Target, encode_update
from nexus.trust.sign import ROLES, RoleKeys, Term, first_root, newest, release, signer_of
from tests.fakes.machine import Machine

SYSTEM = Path(__file__).with_name("slotted.toml")
TITLE = "slotted"
SERVICES = ("policyd", "logd", "statefsd", "updated")  # whom operator may ask
HEALTH = 30_000_000_000  # ns; the machine that tests may be busy
TERM = Term(1_790_000_000, 1_890_000_000)
WAIT = 120.0  # seconds for anything that takes one or two; a machine may be that busy
LOOK = 0.02  # seconds between looks at a file


@dataclass(frozen=True)
class Set:
    """A set and what it says of itself."""

    data: bytes
    manifest: Manifest

    @property
    def digest(self) -> bytes:
        return sha256(self.data).digest()

    def as_version(self, version: int, health: int = HEALTH, **others: Any) -> "Set":
        """The same files as another version: only the manifest differs."""
        _, _, size, _ = HEADER.unpack_from(self.data)
        manifest = msgspec.structs.replace(
            self.manifest, version=version, name=f"{version}.0.0", health=health, **others
        )
        head = encode_manifest(manifest)
        chunks = self.data[HEADER.size + size : -len(END) - 32]
        whole = HEADER.pack(MAGIC, FORMAT, len(head), sha256(head).digest()) + head + chunks + END
        return Set(whole + sha256(whole).digest(), manifest)


@cache
def first_set() -> Set:
    """Version 1, of this source."""
    release = Release(version=1, name="1.0.0", health=HEALTH)
    return set_of(build(SYSTEM, release, package=package_folder()))


def set_of(data: bytes) -> Set:
    return Set(data, finished(read_manifest(BytesSource(data))))


class Collected:
    """sets.Sink: the files in memory."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self._parts: list[bytes] = []

    async def begin(self, file: File) -> None:
        self._parts = []

    async def write(self, data: bytes) -> None:
        self._parts.append(data)

    async def end(self, file: File) -> None:
        self.files[file.path] = b"".join(self._parts)


def changed(base: Set, files: Mapping[str, bytes]) -> Set:
    """The same set with other content in these files."""
    sink = Collected()
    _ = finished(unpack(BytesSource(base.data), sink))
    content = {path: Content(data=data) for path, data in {**sink.files, **files}.items()}
    about = base.manifest
    return set_of(
        write(
            About(
                version=about.version,
                name=about.name,
                system=about.system,
                sbom=about.sbom,
                health=about.health,
                base=about.base,
                services=about.services,
                schemas=about.schemas,
            ),
            content,
        )
    )


class Signer:
    """Who signs updates for the device: one release after the other. Another name, other keys."""

    def __init__(self, name: str = "") -> None:
        signers = {role: signer_of(sha256((name + role).encode()).digest()) for role in ROLES}
        self._all = list(signers.values())
        roles = {role: RoleKeys([signer.public_key], 1) for role, signer in signers.items()}
        self._files = first_root(roles, self._all, TERM, development=False)
        (self.root,) = self._files.values()

    def update(self, made: Set) -> bytes:
        """The update file with this set as the next release."""
        target = Target(
            name=made.manifest.name,
            length=len(made.data),
            sha256=made.digest,
            version=made.manifest.version,
            floor=0,
        )
        self._files = release(self._files, target, self._all, TERM)
        return encode_update(newest(self._files)) + made.data


@dataclass(frozen=True)
class Stamps:
    """What a running system answers: of init, and of each service that can be asked."""

    init: tuple[int, str]
    services: dict[str, tuple[int, str]]
    pids: set[int]

    @property
    def all(self) -> set[tuple[int, str]]:
        return {self.init, *self.services.values()}


class Device:
    """A device in a machine's directories: new, or a copy of the state of one that is down."""

    def __init__(self, host: Machine, first: Set, state: Path | None = None) -> None:
        self.host = host
        self.signer = Signer()
        self.state = host.home / "s" / TITLE
        if state is not None:
            _ = shutil.copytree(state, self.state)
            self.state.parent.chmod(0o700)
            return
        for folder in (self.state.parent, self.state):
            folder.mkdir(mode=0o700)
            os.chown(folder, host.uid, host.uid)
        for path, size in (
            (boot_path(self.state), 64 * 1024),
            (slot_path(self.state, SlotName.A), 4 << 20),
            (slot_path(self.state, SlotName.B), 4 << 20),
        ):
            with path.open("xb") as file:
                _ = file.truncate(size)
            os.chown(path, host.uid, host.uid)
        info = SlotInfo(
            version=first.manifest.version,
            name=first.manifest.name,
            digest=first.digest,
            size=len(first.data),
        )
        with (
            opened(boot_path(self.state), writable=True) as boot,
            opened(slot_path(self.state, SlotName.A), writable=True) as slot,
        ):
            source = BytesSource(first.data)
            _ = finished(provision(BlockBoot(boot), slot, source, info, self.signer.root))

    # ------------------------------------------------------------------ what is on it

    @property
    def console(self) -> Path:
        return self.host.home / "l" / TITLE / "console.log"

    def record(self) -> BootRecord:
        """The boot-control record, decoded here."""
        with opened(boot_path(self.state)) as boot:
            return finished(open_boot(boot))[1]

    def content(self, name: SlotName, size: int) -> bytes:
        """The first bytes of a slot."""
        with slot_path(self.state, name).open("rb") as file:
            return file.read(size)

    def trees(self) -> list[str]:
        """The folders of unpacked sets."""
        return sorted(path.name for path in (self.state / "slots").iterdir())

    # ------------------------------------------------------------------ what it does

    def write_update(self, made: Set) -> str:
        """A file with this set as the next update."""
        path = self.host.home / f"{made.manifest.version}.nxu"
        _ = path.write_bytes(self.signer.update(made))
        return str(path)

    def up(self) -> None:
        answer = self.host.run("up", "-d", "--slots", TITLE, "--wait", str(WAIT))
        assert answer.code == 0, f"{answer.err}\n{self.tail()}"

    def down(self) -> None:
        _ = self.host.ok("down", "--name", TITLE)

    def start(self) -> "subprocess.Popen[bytes]":
        """The loader and nothing else, in a process group with everything that it starts."""
        for folder in ("r", "l"):
            (self.host.home / folder / TITLE).mkdir(mode=0o700, parents=True, exist_ok=True)
            (self.host.home / folder).chmod(0o700)
        running = {"title": TITLE, "file": "", "digest": "", "pid": 0}
        places = {name: str(self.host.home / name[0] / TITLE) for name in ("runtime", "log")}
        job = {
            "running": {**running, **places, "state": str(self.state)},
            "home": places["runtime"],
            "smp": len(os.sched_getaffinity(0)),
            "watcher": -1,
            "leashed": False,
            "streams": False,
            "parent": os.getpid(),
            "loader": {"becomes": False, "margin": MARGIN},
        }
        with (self.host.home / "loader.err").open("ab") as errors:
            return subprocess.Popen(
                [self.host.python[0], "-P", "-m", "nexus.loader.main", json.dumps(job)],
                stdin=subprocess.DEVNULL,
                stdout=errors,
                stderr=errors,
                env=self.host.environment,
                cwd="/",
                start_new_session=True,
            )

    def says(self, text: str, since: int = 0) -> int:
        """Wait for a line on the console behind an offset; the offset behind it."""
        wanted = text.encode()
        found = 0

        def look() -> bool:
            nonlocal found
            data = self.console.read_bytes() if self.console.exists() else b""
            at = data.find(wanted, since)
            found = at + len(wanted)
            return at >= 0

        assert eventually(look), f"{text!r} is not on the console:\n{self.tail()}"
        return found

    def tail(self) -> str:
        return self.console.read_text("utf-8", "replace")[-3000:] if self.console.exists() else ""

    def size(self) -> int:
        """Where the console ends now."""
        return self.console.stat().st_size if self.console.exists() else 0

    def running(self) -> Running:
        path = self.host.home / "r" / TITLE / "system.json"
        return msgspec.json.decode(path.read_bytes(), type=Running)

    def stamps(self, names: Sequence[str] = SERVICES) -> Stamps:
        """Ask every process of the running system which set its code is of."""
        running = self.running()
        with OperatorClient(Path(running.runtime), TITLE, lambda: True) as client:
            answers = {name: client.relay(name, META, Health(), WAIT / 8) for name in names}
            tasks = client.relay(INIT_NAME, INIT, GetTasks(), WAIT / 8)
        return Stamps(
            init=(running.set_version, running.set_digest),
            services={name: (each.set_version, each.set_digest) for name, each in answers.items()},
            pids={running.pid, *(row.pid for row in tasks.rows)},
        )


def stamp_of(made: Set) -> tuple[int, str]:
    return made.manifest.version, made.digest.hex()


def eventually(holds: Callable[[], bool], seconds: float = WAIT) -> bool:
    """Whether it holds soon."""
    until = time.monotonic_ns() + int(seconds * 10**9)
    pause = Pause()
    while not holds():
        if time.monotonic_ns() >= until:
            return False
        _ = pause.wait(LOOK)
    return True
