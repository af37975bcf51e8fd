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
from securesystemslib.signer import CryptoSigner, Key, Signer
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

from nexus.trust.metadata import DEVELOPMENT, HASH, ISSUED, SET_FLOOR, SET_VERSION, load
from nexus.trust.state import Target
from nexus.trust.update import SNAPSHOT, TARGETS, TIMESTAMP, check_files, root_name, root_version
from nexus.trust.verify import SET_SUFFIX

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


def signer_of(seed: bytes) -> CryptoSigner:
    """The signer of an Ed25519 seed (32 bytes)."""
    return CryptoSigner(Ed25519PrivateKey.from_private_bytes(seed))


def first_root(
    roles: Mapping[str, RoleKeys], signers: Sequence[Signer], term: Term, *, development: bool
) -> dict[str, bytes]:
    """A repository with a first root and nothing released."""
    root = Root(version=1, expires=_moment(term.expires), consistent_snapshot=False)
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


def more_signatures(data: bytes, signers: Sequence[Signer]) -> bytes:
    """The same root, signed by these as well."""
    document = load(Root, "the root", data)
    metadata = Metadata(document.signed, dict(document.signatures))
    return _signed(metadata, signers)


def root_missing(files: Mapping[str, bytes], name: str, data: bytes) -> str:
    """Which signatures a root still needs, as a sentence; empty if none."""
    document = load(Root, name, data)
    roots = [("its own keys", document.signed)]
    if document.signed.version > 1:
        roots.append(("the keys of the root before it", last_root(files)))
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
    targets = Targets(_next(files, Targets, TARGETS), expires=until, targets={file.path: file})
    targets_data = _by_role(root, targets, signers, term)
    snapshot = Snapshot(
        _next(files, Snapshot, SNAPSHOT),
        expires=until,
        meta={TARGETS: _named(targets.version, targets_data)},
    )
    snapshot_data = _by_role(root, snapshot, signers, term)
    timestamp = Timestamp(
        _next(files, Timestamp, TIMESTAMP),
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
    check_files(released)  # a device would refuse what is too large
    return released


def last_root(files: Mapping[str, bytes]) -> Root:
    """The root in force."""
    roots = [name for name in files if name not in (TIMESTAMP, SNAPSHOT, TARGETS)]
    if not roots:
        raise NotSigned("there is no root yet")
    name = max(roots, key=root_version)
    return load(Root, name, files[name]).signed


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
