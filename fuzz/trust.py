"""Mutated update files and metadata against their readers.

Two kinds of mutation: bytes anywhere, and, since signatures stop almost all of those at the door,
metadata that are changed and then signed again by the right keys, so that whatever a signer could
write is looked at too. Whatever the bytes, the device ends in Untrusted with one printable line, or
moves forward; and each within SPAN_MAX.

    python -m fuzz.trust --updates 5000 --seed 1
"""

import argparse
import json
import random  # noqa: TID251 (a fuzzer has a seeded generator of its own)
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, Final

from securesystemslib.formats import encode_canonical

from fuzz.decoders import mutate as mutate_bytes
from nexus.drivers import finished
from nexus.trust import Anchor, Target, TrustState, TrustStatus, Untrusted, encode_update
from nexus.trust.metadata import DEVELOPMENT, ISSUED, SET_FLOOR, SET_VERSION
from nexus.trust.sign import (
    ROLES,
    RoleKeys,
    Signer,
    Term,
    first_root,
    newest,
    next_root,
    release,
    root_missing,
    signer_of,
)
from nexus.trust.update import SNAPSHOT, TARGETS, TIMESTAMP, read_update, root_name
from nexus.trust.verify import resume, verify_metadata

UPDATES_DEFAULT: Final = 5_000
SPAN_MAX: Final = 1.0  # s of CPU for one update; 32 roots with 16 signatures each take half of it
T0: Final = 1_600_000_000  # s since 1970 when everything begins; September 2020
DAY: Final = 86_400  # s
UNTIL: Final = 4_000_000_000  # in 2096: as good as never, also for a client that asks a clock
VALUES: Final[tuple[Any, ...]] = (
    0, 1, 2, -1, 1 << 62, 1 << 64, 10**30, 1.5, True, None, "", "x", "a" * 64, "0" * 128, "\x00",
    "\ud800", "ä", [], [[]], {}, {"x": {}}, "2020-01-01T00:00:00Z", "9999-12-31T23:59:59Z",
    "0001-01-01T00:00:00Z", "2020-13-01T00:00:00Z", "1.0", "2.0.0", "ed25519", "rsa", ["x", "x"],
    "2020-09-17T00:00:00Z",
)  # fmt: skip
"""What a value in metadata is replaced with."""


class Publisher:
    """Who signs: keys of every role made from a name, and the repository so far."""

    def __init__(
        self,
        name: str = "publisher",
        *,
        roots: tuple[int, int] = (1, 1),
        targets: tuple[int, int] = (1, 1),
        development: bool = False,
        expires: int = UNTIL,
    ) -> None:
        """`roots` and `targets`: how many of how many keys sign, the number needed first."""
        self._name = name
        self._made = 0
        self._issued = T0
        self.signers: dict[str, list[Signer]] = {}
        self._roots: list[Signer] = []  # of every root there was
        given = {role: self._keys(role, *(1, 1)) for role in ROLES[2:]}
        given |= {"root": self._keys("root", *roots), "targets": self._keys("targets", *targets)}
        self.files = first_root(
            given, self.signers["root"], Term(T0, expires), development=development
        )
        self.anchor = Anchor(self.files[root_name(1)])

    def _keys(self, role: str, threshold: int, count: int) -> RoleKeys:
        self.signers[role] = [self.new_signer() for _ in range(count)]
        if role == "root":
            self._roots += self.signers[role]
        return RoleKeys([each.public_key for each in self.signers[role]], threshold)

    def new_signer(self) -> Signer:
        """A key that nobody has yet."""
        self._made += 1
        return signer_of(sha256(f"{self._name} {self._made}".encode()).digest())

    def new_state(self, version_floor: int = 0) -> TrustState:
        """What a device knows that was provisioned with the first root."""
        return resume(self.anchor, None, version_floor=version_floor)

    def release(
        self,
        version: int,
        *,
        content: bytes = b"a set",
        floor: int = 0,
        issued: int | None = None,
        expires: int = UNTIL,
    ) -> dict[str, bytes]:
        """Sign a set as the latest release; what an update of it carries."""
        target = Target(
            name=f"1.{version}",
            length=len(content),
            sha256=sha256(content).digest(),
            version=version,
            floor=floor,
        )
        self._issued = T0 + version * DAY if issued is None else issued
        term = Term(self._issued, expires)
        signers = [each for role in ROLES[1:] for each in self.signers[role]]
        self.files = release(self.files, target, signers, term)
        return newest(self.files)

    def rotate(
        self,
        role: str,
        threshold: int = 1,
        count: int = 1,
        *,
        expires: int = UNTIL,
    ) -> str:
        """Give a role new keys; the name of the new root."""
        before = self.signers["root"]
        given = {role: self._keys(role, threshold, count)}
        signers = [*before, *(self.signers[role] if role == "root" else [])]
        name, data = next_root(self.files, given, signers, Term(self._issued, expires))
        missing = root_missing(self.files, name, data)
        assert not missing, missing
        self.files = {**self.files, name: data}
        return name

    def changed(
        self, files: Mapping[str, bytes], name: str, change: Callable[[Any], object]
    ) -> dict[str, bytes]:
        """One signed part changed and signed again by the keys of its role (a root by those of all
        roots there were), and whatever names the file made to name the new one."""
        found = {**files, name: self._signed(files[name], change)}
        if name == TARGETS:
            found[SNAPSHOT] = self._signed(found[SNAPSHOT], _names(TARGETS, found[TARGETS]))
        if name in (TARGETS, SNAPSHOT):
            found[TIMESTAMP] = self._signed(found[TIMESTAMP], _names(SNAPSHOT, found[SNAPSHOT]))
        return found

    def _signed(self, data: bytes, change: Callable[[Any], object]) -> bytes:
        signed = json.loads(data)["signed"]
        role = signed["_type"]
        _ = change(signed)
        return envelope(signed, self._roots if role == "root" else self.signers[role])


def envelope(signed: object, signers: Sequence[Signer]) -> bytes:
    """A file with this signed part; what has no canonical form gets signatures of nothing."""
    try:
        text = encode_canonical(signed)  # type: ignore[arg-type] # any JSON
        payload = b"" if text is None else text.encode()
    except Exception:  # noqa: BLE001 (the library's own, and any other: there is no such form)
        payload = b""
    signatures = [each.sign(payload).to_dict() for each in signers]
    return json.dumps({"signatures": signatures, "signed": signed}).encode()


def _names(name: str, data: bytes) -> Callable[[Any], object]:
    """Have a file name another one as it is now."""

    def change(signed: Any) -> None:
        meta = {"length": len(data), "hashes": {"sha256": sha256(data).hexdigest()}}
        try:
            meta["version"] = json.loads(data)["signed"]["version"]
        except (KeyError, TypeError):
            meta["version"] = 1
        signed["meta"] = {name: meta}

    return change


class BytesSource:
    """A file in memory."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.size = len(data)

    async def read_at(self, offset: int, size: int) -> bytes:
        """As Source."""
        return self._data[offset : offset + size]


@dataclass(slots=True)
class Counts:
    """What became of the updates; `slowest` is s of CPU."""

    accepted: int = 0
    refused: int = 0
    slowest: float = 0.0
    statuses: set[TrustStatus] = field(default_factory=set)


def judge(state: TrustState, update: bytes) -> TrustState:
    """What a device makes of an update file: read it, verify it. Raises Untrusted."""
    found = finished(read_update(BytesSource(update)))
    moved, target = verify_metadata(state, found.metadata, release=True)
    assert target.version >= state.version_floor
    assert moved.timestamp >= state.timestamp
    assert moved.time_floor >= state.time_floor
    return moved


class Scenario:
    """A device that has seen a release, and updates of all kinds for it."""

    def __init__(self) -> None:
        self.publisher = Publisher(roots=(2, 3))
        self.older = self.publisher.release(2)
        first = self.publisher.release(3)
        self.state, _ = verify_metadata(self.publisher.new_state(2), first, release=True)
        _ = self.publisher.rotate("root", 2, 3)
        _ = self.publisher.rotate("targets")
        self.files = self.publisher.release(4)
        self.updates = [encode_update(files) + b"set" for files in (first, self.files, self.older)]

    def mutated(self, rng: random.Random) -> bytes:
        """An update that somebody may bring."""
        if rng.randrange(4) == 0:
            return mutate_bytes(rng, self.updates)
        name = rng.choice([root_name(2), root_name(3), TARGETS, SNAPSHOT, TIMESTAMP])
        change = _tweak if rng.randrange(4) else _attack
        files = self.publisher.changed(self.files, name, lambda signed: change(rng, signed))
        match rng.randrange(8):
            case 0 | 1:
                files[name] = mutate_bytes(rng, [files[name]])
            case 2:
                document = json.loads(files[name])
                document["signatures"] = _resigned(rng, document["signatures"])
                files[name] = json.dumps(document).encode()
            case 3:
                files |= rng.choice((self.older, {name: self.older.get(name, b"")}))
            case _:
                pass
        try:
            return encode_update(files) + b"set"
        except Untrusted:
            return self.updates[0]


def _attack(rng: random.Random, signed: Any) -> None:
    """What a thief of keys would change."""
    match rng.randrange(4):
        case 0:
            signed["version"] = 1
        case 1:
            signed |= {"expires": "2020-09-14T00:00:00Z", ISSUED: T0}
        case 2:
            signed[DEVELOPMENT] = True
        case _:
            for file in signed.get("targets", {}).values():
                file["custom"] |= {SET_VERSION: rng.choice((1, 2, 1 << 62)), SET_FLOOR: 1}


def _resigned(rng: random.Random, signatures: list[Any]) -> list[Any]:
    """Fewer signatures, more of them, or one of them twice."""
    match rng.randrange(4):
        case 0:
            return rng.sample(signatures, rng.randrange(len(signatures)))
        case 1:
            return signatures * 2
        case 2:
            more = [{**signatures[0], "keyid": f"{number:064x}"} for number in range(20)]
            return signatures + more[: rng.randrange(21)]
        case _:
            return [{**each, "sig": each["sig"][::-1]} for each in signatures]


def _tweak(rng: random.Random, signed: Any) -> None:
    """Change one value somewhere in a tree, or drop it, or add one."""
    at = signed
    while True:
        if not isinstance(at, dict | list) or not at:
            return
        keys = list(at) if isinstance(at, dict) else list(range(len(at)))
        key = rng.choice(keys)
        if isinstance(at[key], dict | list) and at[key] and rng.randrange(4):
            at = at[key]
            continue
        match rng.randrange(6):
            case 0:
                del at[key]
            case 1 if isinstance(at, dict):
                at[rng.choice(("x", "delegations", DEVELOPMENT, "meta"))] = rng.choice(VALUES)
            case 2 if isinstance(at[key], int):
                at[key] += rng.choice((-DAY * 10, -1, 1, DAY * 10))
            case 3 if isinstance(at, dict):
                for number in range(rng.choice((1, 40))):
                    at[f"{number:064x}"] = at[key]
            case _:
                at[key] = rng.choice(VALUES)
        return


def campaign(count: int, seed: int) -> Counts:
    """Judge `count` updates; what became of them."""
    scenario = Scenario()
    rng = random.Random(f"{seed} trust")
    counts = Counts()
    for _ in range(count):
        update = scenario.mutated(rng)
        before = time.process_time()
        try:
            _ = judge(scenario.state, update)
        except Untrusted as error:
            assert str(error).isprintable(), str(error)
            counts.refused += 1
            counts.statuses.add(error.status)
        except BaseException:
            print(f"fuzz: the update was {update.hex()}", file=sys.stderr)
            raise
        else:
            counts.accepted += 1
        counts.slowest = max(counts.slowest, time.process_time() - before)
        assert counts.slowest < SPAN_MAX, f"{counts.slowest:.1f} s for {update[:200].hex()}"
    return counts


def main(arguments: Sequence[str] | None = None) -> int:
    """Run and report; 1 if updates were never accepted or never refused."""
    parser = argparse.ArgumentParser(prog="fuzz.trust", description=__doc__)
    parser.add_argument("--updates", type=int, default=UPDATES_DEFAULT, help="how many")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    counts = campaign(options.updates, options.seed)
    fault = "" if counts.accepted and counts.refused else "  NOT TESTED"
    tally = f"accepted {counts.accepted:7d}  refused {counts.refused:7d}"
    names = " ".join(sorted(status.name for status in counts.statuses))
    slow = f"slowest {counts.slowest * 1000:.0f} ms"
    print(f"{'update metadata':44s} {tally}  {slow}  {names}{fault}")
    return 1 if fault else 0


if __name__ == "__main__":
    sys.exit(main())
