"""What the host tool signs: roots, their successors, and releases. No files, no clock, no prompt.

A repository is a mapping from file name to bytes, as in an update file: every root, and the latest
timestamp, snapshot and targets. Formats and signatures are tuf's and securesystemslib's. Signing
is deterministic (Ed25519): the same keys, moments and set give the same bytes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from typing import Final, TypeVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from securesystemslib.signer import CryptoSigner, Key
from securesystemslib.signer import Signer as Signer  # for who holds keys and knows no library
from tuf.api.metadata import (
    Metadata,
    MetaFile,
    Role,
    Root,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)

from nexus.trust.limits import ROOTS_MAX
from nexus.trust.metadata import DEVELOPMENT, HASH, ISSUED, SET_FLOOR, SET_VERSION, load
from nexus.trust.state import Target
from nexus.trust.update import SNAPSHOT, TARGETS, TIMESTAMP, check_files, root_name, root_version
from nexus.trust.verify import SET_SUFFIX

SPECIFICATION: Final = "1.0.31"  # of TUF; written down, or a new library would change our bytes
SEED_SIZE: Final = 32  # bytes: RFC 8032, 5.1.5
_SEALED: Final = b"-----BEGIN ENCRYPTED PRIVATE KEY-----"  # RFC 7468, 11
ROLES: Final = (Root.type, Targets.type, Snapshot.type, Timestamp.type)
_Type = TypeVar("_Type", Root, Timestamp, Snapshot, Targets)


class NotSigned(Exception):
    """Nothing was signed; the text is one sentence that says what is missing."""


@dataclass(frozen=True, slots=True)
class RoleKeys:
    """Who may sign for a role, and how many of them it takes."""

    keys: Sequence[Key]
    threshold: int


@dataclass(frozen=True, slots=True)
class Term:
    """From when to when something is signed; s since 1970."""

    issued: int
    expires: int


def signer_of(seed: bytes) -> Signer:
    """The signer of an Ed25519 seed (SEED_SIZE bytes)."""
    return CryptoSigner(Ed25519PrivateKey.from_private_bytes(seed))


def seal_key(seed: bytes, passphrase: bytes | None) -> bytes:
    """A key file: PKCS #8 in PEM, encrypted unless there is no passphrase."""
    lock: KeySerializationEncryption = (
        NoEncryption() if passphrase is None else BestAvailableEncryption(passphrase)
    )
    key = Ed25519PrivateKey.from_private_bytes(seed)
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, lock)


def open_key(data: bytes, passphrase: bytes | None) -> Signer:
    """The signer in a key file, for which an unneeded passphrase is no fault. Raises NotSigned."""
    is_sealed = data.startswith(_SEALED)
    if is_sealed and passphrase is None:
        raise NotSigned("the key is encrypted, and there is no passphrase")
    try:
        key = load_pem_private_key(data, passphrase if is_sealed else None)
    except (ValueError, TypeError) as error:
        why = "the passphrase is not its own" if is_sealed else "this is no key file"
        raise NotSigned(why) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise NotSigned("the key is not Ed25519")
    return CryptoSigner(key)


def first_root(
    roles: Mapping[str, RoleKeys], signers: Sequence[Signer], term: Term, *, development: bool
) -> dict[str, bytes]:
    """A repository with a first root and nothing released."""
    root = Root(
        version=1,
        spec_version=SPECIFICATION,
        expires=_moment(term.expires),
        consistent_snapshot=False,
    )
    if development:
        root.unrecognized_fields[DEVELOPMENT] = True
    _give_keys(root, roles)
    name, data = draft_root(root, term, signers)
    missing = root_missing({}, name, data)
    if missing:
        raise NotSigned(missing)
    return {name: data}


def next_root(
    files: Mapping[str, bytes],
    changes: Mapping[str, RoleKeys],
    signers: Sequence[Signer],
    term: Term,
) -> tuple[str, bytes]:
    """The successor of the last root, with other keys for some roles: its name and bytes.

    It counts once `root_missing` has nothing to say; until then more signatures may be added, on
    other machines (`more_signatures`).
    """
    last = last_root(files)
    _check_moment(files, term)
    root = Root(
        version=last.version + 1,
        spec_version=SPECIFICATION,
        expires=_moment(term.expires),
        consistent_snapshot=False,
        unrecognized_fields=dict(last.unrecognized_fields),
    )
    kept = {
        title: RoleKeys([last.keys[keyid] for keyid in role.keyids], role.threshold)
        for title, role in last.roles.items()
    }
    _give_keys(root, {**kept, **changes})
    return draft_root(root, term, signers)


def draft_root(root: Root, term: Term, signers: Sequence[Signer]) -> tuple[str, bytes]:
    """A root with the signatures that are at hand; its name and bytes."""
    root.unrecognized_fields[ISSUED] = term.issued
    return root_name(root.version), _signed(Metadata(root), signers)


def more_signatures(data: bytes, files: Mapping[str, bytes], signers: Sequence[Signer]) -> bytes:
    """The same root, signed by these as well. Raises NotSigned for a key that it has no use for."""
    document = load(Root, "the root", data)
    useful = {*document.signed.roles[Root.type].keyids, *last_root(files).roles[Root.type].keyids}
    for signer in signers:
        if signer.public_key.keyid not in useful:
            raise NotSigned(f"the key {signer.public_key.keyid[:8]} is none of root")
    metadata = Metadata(document.signed, dict(document.signatures))
    return _signed(metadata, signers)


def root_missing(files: Mapping[str, bytes], name: str, data: bytes) -> str:
    """Which signatures a root still needs, as a sentence; empty if none. Raises NotSigned for one
    that is not the next."""
    document = load(Root, name, data)
    roots = [("its own keys", document.signed)]
    last = 0
    if files:
        before = last_root(files)
        last = before.version
        roots.append(("the keys of the root before it", before))
    if document.signed.version != last + 1 or name != root_name(last + 1):
        raise NotSigned(f"{name} does not follow on root {last}")
    for whose, root in roots:
        result = root.get_verification_result(
            Root.type, document.payload, dict(document.signatures)
        )
        if not result:
            return f"{name} has {len(result.signed)} of {result.threshold} signatures by {whose}"
    return ""


def release(
    files: Mapping[str, bytes], target: Target, signers: Sequence[Signer], term: Term
) -> dict[str, bytes]:
    """The repository with this set as its latest release, each file one version further.

    `signers` are those of targets, snapshot and timestamp together; each signs what its role is.
    Raises NotSigned if a role lacks signatures.
    """
    root = last_root(files)
    _check_moment(files, term)
    until = _moment(term.expires)
    file = TargetFile(
        target.length,
        {HASH: target.sha256.hex()},
        f"{target.name}{SET_SUFFIX}",
        {"custom": {SET_VERSION: target.version, SET_FLOOR: target.floor}},
    )
    targets = Targets(
        _next(files, Targets, TARGETS), SPECIFICATION, expires=until, targets={file.path: file}
    )
    targets_data = _by_role(root, targets, signers, term)
    snapshot = Snapshot(
        _next(files, Snapshot, SNAPSHOT),
        SPECIFICATION,
        expires=until,
        meta={TARGETS: _named(targets.version, targets_data)},
    )
    snapshot_data = _by_role(root, snapshot, signers, term)
    timestamp = Timestamp(
        _next(files, Timestamp, TIMESTAMP),
        SPECIFICATION,
        expires=until,
        snapshot_meta=_named(snapshot.version, snapshot_data),
    )
    timestamp_data = _by_role(root, timestamp, signers, term)
    released = {
        **files,
        TARGETS: targets_data,
        SNAPSHOT: snapshot_data,
        TIMESTAMP: timestamp_data,
    }
    check_files(newest(released))  # a device would refuse what is too large
    return released


def newest(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """What of a repository an update carries: as many of the last roots as a device takes."""
    roots = sorted(_roots(files), key=root_version)[-ROOTS_MAX:]
    return {name: files[name] for name in (*roots, TIMESTAMP, SNAPSHOT, TARGETS) if name in files}


@dataclass(frozen=True, slots=True)
class SaidRole:
    """Who may sign for a role: the ids of its keys."""

    title: str
    threshold: int
    keys: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Said:
    """What a repository says of itself. `files`: name, version, and s since 1970 of its end."""

    version: int
    is_development: bool
    roles: tuple[SaidRole, ...]
    files: tuple[tuple[str, int, int], ...]

    def keys_of(self, title: str) -> tuple[str, ...]:
        """The ids of a role's keys."""
        return next(role.keys for role in self.roles if role.title == title)


def describe(files: Mapping[str, bytes]) -> Said:
    """For people: the root in force and what stands beside it. Nothing is verified."""
    root = last_root(files)
    found = [(root_name(root.version), root.version, int(root.expires.timestamp()))]
    for row in (
        _measured(Targets, TARGETS, files),
        _measured(Snapshot, SNAPSHOT, files),
        _measured(Timestamp, TIMESTAMP, files),
    ):
        found += row
    return Said(
        version=root.version,
        is_development=root.unrecognized_fields.get(DEVELOPMENT) is True,
        roles=tuple(
            SaidRole(title, root.roles[title].threshold, tuple(root.roles[title].keyids))
            for title in ROLES
        ),
        files=tuple(found),
    )


def _measured(
    kind: type[_Type], name: str, files: Mapping[str, bytes]
) -> list[tuple[str, int, int]]:
    """One row of Said.files, or none."""
    if name not in files:
        return []
    document = load(kind, name, files[name])
    return [(name, document.signed.version, document.expires)]


def last_root(files: Mapping[str, bytes]) -> Root:
    """The root in force."""
    roots = _roots(files)
    if not roots:
        raise NotSigned("there is no root yet")
    name = max(roots, key=root_version)
    return load(Root, name, files[name]).signed


def _roots(files: Mapping[str, bytes]) -> list[str]:
    return [name for name in files if name not in (TIMESTAMP, SNAPSHOT, TARGETS)]


def _give_keys(root: Root, roles: Mapping[str, RoleKeys]) -> None:
    """Exactly these keys; a key that no role has any more is gone."""
    assert set(roles) == set(ROLES)
    for title, given in roles.items():
        if not 1 <= given.threshold <= len(given.keys):
            raise NotSigned(
                f"{given.threshold} signatures for {title} cannot come from {len(given.keys)} keys"
            )
        root.roles[title] = Role([], given.threshold)
        for key in given.keys:
            root.add_key(key, title)
        if len(root.roles[title].keyids) < len(given.keys):
            raise NotSigned(f"{title} is given one key twice")


def _by_role(root: Root, signed: _Type, signers: Sequence[Signer], term: Term) -> bytes:
    """Signed by those signers who have the role."""
    signed.unrecognized_fields[ISSUED] = term.issued
    keyids = root.roles[signed.type].keyids
    chosen = [signer for signer in signers if signer.public_key.keyid in keyids]
    threshold = root.roles[signed.type].threshold
    if len({signer.public_key.keyid for signer in chosen}) < threshold:
        raise NotSigned(f"{signed.type} takes {threshold} keys of its own; {len(chosen)} are here")
    return _signed(Metadata(signed), chosen)


def _signed(metadata: Metadata[_Type], signers: Sequence[Signer]) -> bytes:
    for signer in sorted(signers, key=lambda one: one.public_key.keyid):
        _ = metadata.sign(signer, append=True)
    return metadata.to_bytes()


def _named(version: int, data: bytes) -> MetaFile:
    return MetaFile(version, len(data), {HASH: sha256(data).hexdigest()})


def _next(files: Mapping[str, bytes], kind: type[_Type], name: str) -> int:
    """The version after the last one."""
    return load(kind, name, files[name]).signed.version + 1 if name in files else 1


def _check_moment(files: Mapping[str, bytes], term: Term) -> None:
    """A host whose clock went back would sign what a device may find ended."""
    if TIMESTAMP not in files:
        return
    before = load(Timestamp, TIMESTAMP, files[TIMESTAMP]).issued
    if term.issued < before:
        raise NotSigned(
            f"this host's clock says {_moment(term.issued):%Y-%m-%d %H:%M}, and the last release "
            f"was signed {_moment(before):%Y-%m-%d %H:%M}; set the clock"
        )


def _moment(seconds: int) -> datetime:
    return datetime.fromtimestamp(seconds, tz=UTC)
