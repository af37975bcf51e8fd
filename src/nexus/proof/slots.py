"""The sets of a run: what a device boots from, how it is updated, and what is left in its slots.

Before the first boot the runner makes keys that are thrown away, a first set, a good update and a
bad one, and updates that nobody may take; it provisions the device with the first one and puts the
others on a stick.
"""

import hashlib
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from nexus.abi import BLOCK_SIZE
from nexus.bootctl import BlockBoot, SlotInfo, SlotName
from nexus.bootctl.provision import provision
from nexus.bundle.build import Release, build
from nexus.bundle.gather import package_folder
from nexus.drivers import BlockDevice, finished
from nexus.init.plan import Plan
from nexus.proof.boot_remains import BOOT, SLOTS, Made, held_devices, slot_devices
from nexus.proof.remains import image_of
from nexus.protocols.ladder import Ground
from nexus.services.selftest.stick import (
    BAD,
    GOOD,
    INDEX_BLOCKS,
    LOW,
    STICK,
    Index,
    Update,
    encode_index,
)
from nexus.sets import BytesSource
from nexus.trust import Target, encode_metadata
from nexus.trust.sign import ROLES, RoleKeys, Signer, Term, first_root, release, signer_of
from nexus.trust.update import SNAPSHOT, TARGETS

SETS: Final = "sets"  # the folder of a run's bad system file
FIRST_VERSION: Final = 10
FLOOR: Final = 9  # what the device is provisioned with
LOW_VERSION: Final = 8
ISSUED: Final = 1_790_000_000  # s since 1970; no clock is asked
LASTS: Final = 365 * 86_400  # s until a release ends
HEALTH: Final = 30_000_000_000  # ns a trial has; a system is up in one or two
SIGNATURE: Final = b'"sig":"'  # in metadata as they are written, before hexadecimal digits
STUCK: Final = "demo.stuck"  # the service of the bad set that never becomes ready
STUCK_SAYS: Final = "waiting for a sensor that does not answer"
STUCK_DEADLINE: Final = "1s"
FIRST: Final = "first"
BAD_ENTRY: Final = f"""

[service."{STUCK}"]
program = "demo.faulty"
capabilities = ["ipc.core"]
uses = {{ logd = {{ sync = false }} }}
health = {{ deadline = "{STUCK_DEADLINE}" }}

[service."{STUCK}".settings]
failure = "never ready"
"""


# ---------------------------------------------------------------- before the first boot


def prepare(plan: Plan, system: Path, ground: Ground, seed: int, state: Path) -> Mapping[str, Made]:
    """Provision the device in `state` with its first set, and write the stick; the sets by name."""
    devices = slot_devices(plan)
    assert devices is not None, "the plan has slots"
    package = None if ground is Ground.SIM else package_folder()
    bad_file = _bad_system(system, state / SETS)
    contents = {
        FIRST: build(system, _release(0), package=package),
        GOOD: build(system, _release(1), package=package),
        BAD: build(bad_file, _release(2), package=package),
    }
    made = {name: _made(number, contents[name]) for number, name in enumerate(contents)}
    keys = Keys(f"{ground.value} {seed}")
    for device in devices.values():
        image = image_of(state, device)
        _ = image.write_bytes(b"")
        with image.open("r+b") as file:
            _ = file.truncate(device.size)
    info = SlotInfo(
        version=made[FIRST].version,
        name=made[FIRST].name,
        digest=bytes.fromhex(made[FIRST].digest),
        size=made[FIRST].size,
        floor=FLOOR,
    )
    with held_devices(state, devices) as held:
        source = BytesSource(contents[FIRST])
        control = BlockBoot(held[BOOT])
        anchor = keys.root()
        _ = finished(provision(control, held[SLOTS[SlotName.A]], source, info, anchor))
        if STICK in held:
            _write_stick(held[STICK], keys, contents, made)
    return made


def _release(number: int) -> Release:
    return Release(version=FIRST_VERSION + number, name=f"1.{number}.0", health=HEALTH)


def _made(number: int, content: bytes) -> Made:
    release = _release(number)
    digest = hashlib.sha256(content).hexdigest()
    return Made(version=release.version, name=release.name, digest=digest, size=len(content))


def _bad_system(system: Path, folder: Path) -> Path:
    """The same system with one more service, and the policy files that it names."""
    text = system.read_text("utf-8")
    folder.mkdir()
    for name in tomllib.loads(text)["system"].get("policy", ()):
        copy = folder / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        _ = copy.write_bytes((system.parent / name).read_bytes())
    file = folder / system.name
    _ = file.write_text(text + BAD_ENTRY, "utf-8")
    return file


class Keys:
    """The keys of a run: of its ground and seed, so that two runs of one seed are equal."""

    def __init__(self, seed: str) -> None:
        self._signers = {
            role: signer_of(hashlib.sha256(f"nexus.proof.key {seed} {role}".encode()).digest())
            for role in ROLES
        }
        roles = {role: RoleKeys([signer.public_key], 1) for role, signer in self._signers.items()}
        term = Term(ISSUED, ISSUED + LASTS)
        self.files = first_root(roles, self._all, term, development=False)

    @property
    def _all(self) -> list[Signer]:
        return list(self._signers.values())

    def root(self) -> bytes:
        """The trust anchor."""
        (root,) = self.files.values()
        return root

    def released(
        self, files: Mapping[str, bytes], made: Made, *, issued: int = ISSUED
    ) -> dict[str, bytes]:
        """The metadata with this set as the release after `files`."""
        target = Target(
            name=made.name,
            length=made.size,
            sha256=bytes.fromhex(made.digest),
            version=made.version,
            floor=min(FLOOR, made.version),
        )
        return release(files, target, self._all, Term(issued, issued + LASTS))


def _write_stick(
    device: BlockDevice, keys: Keys, contents: Mapping[str, bytes], made: Mapping[str, Made]
) -> None:
    low = Made(version=LOW_VERSION, name="0.8.0", digest=made[BAD].digest, size=made[BAD].size)
    lowest = keys.released(keys.files, low)  # older than the good one, and refused for its version
    good = keys.released(lowest, made[GOOD])
    bad = keys.released(good, made[BAD])
    strangers = Keys("of somebody else")
    foreign = strangers.released(strangers.files, made[BAD])
    at = bad[TARGETS].index(SIGNATURE) + len(SIGNATURE)
    flipped = bytearray(bad[TARGETS])
    flipped[at] = ord("0") if flipped[at] != ord("0") else ord("1")
    old = keys.files
    for _ in range(3):  # newer in number than the good one, and ended before it was signed
        old = keys.released(old, made[BAD], issued=ISSUED - 2 * LASTS)
    updates: dict[str, tuple[Made, Mapping[str, bytes], bytes, str]] = {
        GOOD: (made[GOOD], good, contents[GOOD], ""),
        BAD: (made[BAD], bad, contents[BAD], ""),
        "unknown key": (
            made[BAD],
            {**foreign, **keys.files},
            b"",
            "WRONG_KEY",
        ),
        "flipped byte": (made[BAD], {**bad, TARGETS: bytes(flipped)}, b"", "BAD_SIGNATURE"),
        LOW: (low, lowest, b"", "BELOW_FLOOR"),
        "mixed": (
            made[BAD],
            {**bad, SNAPSHOT: good[SNAPSHOT], TARGETS: good[TARGETS]},
            b"",
            "MIXED",
        ),
        "expired": (made[BAD], old, b"", "EXPIRED_METADATA"),
    }
    index: Index = {}
    block = INDEX_BLOCKS
    for name, (about, metadata, content, refused) in updates.items():
        places = []
        for data in (encode_metadata(metadata), content):
            finished(device.write(block, data + bytes(-len(data) % BLOCK_SIZE))) if data else None
            places.append((block, len(data)))
            block += -(-len(data) // BLOCK_SIZE)
        index[name] = Update(
            metadata=places[0],
            content=places[1],
            version=about.version,
            name=about.name,
            digest=about.digest,
            refused=refused,
        )
    finished(device.write(0, encode_index(index), durable=True))
