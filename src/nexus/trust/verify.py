"""Whether an update's metadata may be believed: the offline client of TUF.

The workflow is that of the TUF specification, section 5.3 to 5.6, with two differences. The files
come all at once, from an update file, and not from a network. And there is no clock: instead of
"now", what has ended is measured by the time floor, the latest moment that a trusted file says it
was signed at. Signatures, thresholds and file formats are tuf's; the order, the floors and the
bounds are ours. Nothing moves unless everything holds. Decision: docs/adr/0022.
"""

from collections.abc import Mapping
from dataclasses import replace
from hashlib import sha256
from typing import Final

from tuf.api.metadata import MetaFile, Root, Snapshot, TargetFile, Targets, Timestamp

from nexus.trust.limits import NAME_SIZE_MAX, NUMBER_MAX, ROOT_SIZE_MAX
from nexus.trust.metadata import (
    DEVELOPMENT,
    HASH,
    KEY_TYPE,
    SET_FLOOR,
    SET_VERSION,
    Document,
    load,
    whole,
)
from nexus.trust.state import DIGEST_SIZE, Anchor, Target, TrustState, decode_state
from nexus.trust.status import TrustStatus, Untrusted
from nexus.trust.update import (
    SNAPSHOT,
    TARGETS,
    TIMESTAMP,
    check_files,
    root_name,
    root_version,
)

SET_SUFFIX: Final = ".nxs"
PUBLIC_SIZE: Final = 64  # digits of an Ed25519 key
_DIGITS: Final = frozenset("0123456789abcdef")
_NAME: Final = frozenset("0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.+-_")


def resume(anchor: Anchor, kept: bytes | None, *, version_floor: int) -> TrustState:
    """What to begin with: what updated kept, unless the device was provisioned anew since.

    `version_floor` is the boot record's. A damaged state is not forgotten but refused: to forget
    is what an attacker would want.
    """
    if kept is not None:
        state = decode_state(kept)
        if state.anchor == anchor.digest:
            return state.raised(version_floor)
    root = _device_root(anchor.root)
    return TrustState(
        anchor=anchor.digest,
        root=anchor.root,
        time_floor=root.issued,
        version_floor=version_floor,
    )


def verify_metadata(
    state: TrustState, metadata: Mapping[str, bytes], *, release: bool
) -> tuple[TrustState, Target]:
    """What has been seen after this, and the set it names; or Untrusted, and nothing has moved.

    The same metadata is accepted again: staging may be interrupted. `release` is for a device that
    refuses keys for development.
    """
    check_files(metadata)
    roots = _roots(state.root, metadata, release=release)
    first, final = roots[0], roots[-1]
    timestamp = load(Timestamp, TIMESTAMP, metadata[TIMESTAMP])
    _check_signed(final.signed, timestamp)
    snapshot = load(Snapshot, SNAPSHOT, metadata[SNAPSHOT])
    _check_signed(final.signed, snapshot)
    targets = load(Targets, TARGETS, metadata[TARGETS])
    _check_signed(final.signed, targets)

    seen = _forgotten(state, first.signed, final.signed)
    digest = sha256(timestamp.payload).digest()
    if timestamp.signed.version < seen.timestamp:
        raise Untrusted(
            TrustStatus.REPLAYED,
            f"{TIMESTAMP} has version {timestamp.signed.version}; {seen.timestamp} was seen",
        )
    if timestamp.signed.version == seen.timestamp and digest != seen.timestamp_digest:
        raise Untrusted(
            TrustStatus.MIXED, f"another {TIMESTAMP} of version {seen.timestamp} was seen"
        )
    _check_named(timestamp.signed.snapshot_meta, snapshot, metadata[SNAPSHOT])
    _check_forward(snapshot, seen.snapshot)
    if set(snapshot.signed.meta) != {TARGETS}:
        raise Untrusted(TrustStatus.MALFORMED, f"{SNAPSHOT} names more than {TARGETS}")
    _check_named(snapshot.signed.meta[TARGETS], targets, metadata[TARGETS])
    _check_forward(targets, seen.targets)

    floor = max(
        state.time_floor,
        *(root.issued for root in roots),
        timestamp.issued,
        snapshot.issued,
        targets.issued,
    )
    for document in (final, timestamp, snapshot, targets):
        _check_fresh(document, floor)
    target = _target(targets.signed)
    if target.version < state.version_floor:
        raise Untrusted(
            TrustStatus.BELOW_FLOOR,
            f"set {target.name} has version {target.version}; the floor is {state.version_floor}",
        )
    moved = replace(
        state,
        root=state.root if final is first else metadata[final.name],
        timestamp=timestamp.signed.version,
        timestamp_digest=digest,
        snapshot=snapshot.signed.version,
        targets=targets.signed.version,
        time_floor=floor,
    )
    return moved, target


def _roots(data: bytes, metadata: Mapping[str, bytes], *, release: bool) -> list[Document[Root]]:
    """The device's root and its successors, each signed by its predecessor's keys and its own."""
    roots = [_device_root(data)]
    _check_purpose(roots[0], release=release)
    while (name := root_name(roots[-1].signed.version + 1)) in metadata:
        root = _root(name, metadata[name])
        _check_keys_of(roots[-1].signed, Root.type, root)
        _check_keys_of(root.signed, Root.type, root)
        if root.signed.version != roots[-1].signed.version + 1:
            raise Untrusted(TrustStatus.ROLLED_BACK, f"{name} is version {root.signed.version}")
        _check_purpose(root, release=release)
        roots.append(root)
    last = roots[-1].signed.version
    for name in metadata:
        if name not in (TIMESTAMP, SNAPSHOT, TARGETS) and root_version(name) > last:
            raise Untrusted(TrustStatus.MIXED, f"{name} does not follow on root {last}")
    return roots


def _device_root(data: bytes) -> Document[Root]:
    """The root that the device keeps. It is signed by its own keys, or something broke it."""
    if len(data) > ROOT_SIZE_MAX:
        raise Untrusted(TrustStatus.DEVICE, f"the device's root has {len(data)} bytes")
    try:
        root = _root("the device's root", data)
        _check_keys_of(root.signed, Root.type, root)
    except Untrusted as error:
        raise Untrusted(TrustStatus.DEVICE, str(error)) from error
    return root


def _root(name: str, data: bytes) -> Document[Root]:
    """Parse a root; every role can be fulfilled, by different keys of the one kind we use."""
    root = load(Root, name, data)
    publics = []
    for key in root.signed.keys.values():
        public = key.keyval.get("public")
        if (
            (key.keytype, key.scheme) != (KEY_TYPE, KEY_TYPE)
            or not isinstance(public, str)
            or len(public) != PUBLIC_SIZE
            or not _DIGITS.issuperset(public)
        ):
            raise Untrusted(TrustStatus.MALFORMED, f"{name} has a key that is not Ed25519")
        publics.append(public)
    if len(set(publics)) < len(publics):  # one key under two names would count twice
        raise Untrusted(TrustStatus.DUPLICATE, f"{name} has a key twice")
    for title, role in root.signed.roles.items():
        if not set(role.keyids) <= set(root.signed.keys):
            raise Untrusted(TrustStatus.MALFORMED, f"{name}: {title} has keys that are not there")
        if type(role.threshold) is not int or role.threshold > len(role.keyids):
            raise Untrusted(TrustStatus.MALFORMED, f"{name}: nobody can sign {title}")
    return root


def _check_purpose(root: Document[Root], *, release: bool) -> None:
    mark = root.signed.unrecognized_fields.get(DEVELOPMENT, False)
    if type(mark) is not bool:
        raise Untrusted(TrustStatus.MALFORMED, f"{root.name}: {DEVELOPMENT} is no truth value")
    if mark and release:
        raise Untrusted(TrustStatus.DEVELOPMENT_KEY, f"{root.name} is for development")


def _check_signed(
    root: Root, document: Document[Timestamp] | Document[Snapshot] | Document[Targets]
) -> None:
    _check_keys_of(root, document.signed.type, document)


def _check_keys_of(
    root: Root,
    role: str,
    document: Document[Root] | Document[Timestamp] | Document[Snapshot] | Document[Targets],
) -> None:
    """Enough of the role's keys have signed this, as this root names them."""
    result = root.get_verification_result(role, document.payload, dict(document.signatures))
    if result:
        return
    if result.signed:
        raise Untrusted(
            TrustStatus.THRESHOLD,
            f"{document.name} is signed by {len(result.signed)} of {result.threshold} keys",
        )
    if any(keyid in document.signatures for keyid in result.unsigned):
        raise Untrusted(
            TrustStatus.BAD_SIGNATURE, f"{document.name} is not what the keys of {role} signed"
        )
    raise Untrusted(TrustStatus.WRONG_KEY, f"{document.name} is signed by no key of {role}")


def _forgotten(state: TrustState, first: Root, final: Root) -> TrustState:
    """What was seen, without what keys that the root has since taken away may have counted up.

    TUF 5.3.11: else whoever stole a key could set a version to the largest number for good.
    """

    def taken(role: str) -> bool:
        return not set(first.roles[role].keyids) <= set(final.roles[role].keyids)

    if taken(Timestamp.type) or taken(Snapshot.type):
        state = replace(state, timestamp=0, timestamp_digest=bytes(DIGEST_SIZE), snapshot=0)
    if taken(Targets.type):
        state = replace(state, targets=0)
    return state


def _check_named(
    meta: MetaFile, document: Document[Snapshot] | Document[Targets], data: bytes
) -> None:
    """The file is the one that was named, by version, length and digest."""
    expected = (meta.hashes or {}).get(HASH)
    if expected is None or meta.length is None:
        raise Untrusted(TrustStatus.MALFORMED, f"{document.name} is named without its {HASH}")
    if (meta.version, meta.length, expected) != (
        document.signed.version,
        len(data),
        sha256(data).hexdigest(),
    ):
        raise Untrusted(
            TrustStatus.MIXED,
            f"version {meta.version} of {document.name} is named; this is another file, "
            f"of version {document.signed.version}",
        )


def _check_forward(document: Document[Snapshot] | Document[Targets], seen: int) -> None:
    if document.signed.version < seen:
        raise Untrusted(
            TrustStatus.ROLLED_BACK,
            f"{document.name} has version {document.signed.version}; {seen} was seen",
        )


def _check_fresh(
    document: Document[Root] | Document[Timestamp] | Document[Snapshot] | Document[Targets],
    floor: int,
) -> None:
    if document.expires <= floor:
        raise Untrusted(
            TrustStatus.EXPIRED,
            f"{document.name} ended {document.signed.expires:%Y-%m-%dT%H:%M:%SZ}, "
            f"{floor - document.expires} s before the time floor",
        )


def _target(targets: Targets) -> Target:
    """The one set."""
    if targets.delegations is not None:
        raise Untrusted(TrustStatus.MALFORMED, f"{TARGETS} delegates")
    if not targets.targets:
        raise Untrusted(TrustStatus.NO_SET, f"{TARGETS} names no set")
    if len(targets.targets) > 1:
        raise Untrusted(TrustStatus.TOO_MANY, f"{TARGETS} names {len(targets.targets)} sets")
    ((path, file),) = targets.targets.items()
    name = path.removesuffix(SET_SUFFIX)
    if name == path or not 0 < len(name) <= NAME_SIZE_MAX or not _NAME.issuperset(name):
        raise Untrusted(TrustStatus.MALFORMED, f"{TARGETS} names {path!r:.80}")
    custom = file.custom
    if not isinstance(custom, dict):
        raise Untrusted(TrustStatus.MALFORMED, f"{path} has no {SET_VERSION}")
    version, floor = (whole(TARGETS, custom, field) for field in (SET_VERSION, SET_FLOOR))
    if not floor <= version <= NUMBER_MAX:
        raise Untrusted(TrustStatus.MALFORMED, f"{path} asks for a floor above its own version")
    return Target(
        name=name, length=_length(file), sha256=_digest(file), version=version, floor=floor
    )


def _length(file: TargetFile) -> int:
    if type(file.length) is not int or file.length == 0:
        raise Untrusted(TrustStatus.MALFORMED, f"{file.path} has no length")
    return file.length


def _digest(file: TargetFile) -> bytes:
    digest = file.hashes.get(HASH, "")
    if len(digest) != 2 * DIGEST_SIZE or not _DIGITS.issuperset(digest):
        raise Untrusted(TrustStatus.MALFORMED, f"{file.path} has no {HASH}")
    return bytes.fromhex(digest)
