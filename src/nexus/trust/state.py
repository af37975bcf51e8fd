"""What a device knows of whom it trusts: the anchor, what it has seen since, and a verdict.

The anchor is the root.json that provisioning wrote to the boot device, outside every set. What
was seen since only moves forward; updated keeps it in statefs and hands it back.
"""

from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Annotated, Final

import msgspec

from nexus.trust.limits import ROOT_SIZE_MAX
from nexus.trust.status import TrustStatus, Untrusted

STATE_VERSION: Final = 1
STATE_SIZE_MAX: Final = ROOT_SIZE_MAX + 512  # bytes; the rest is seven numbers and two digests
DIGEST_SIZE: Final = 32  # bytes of SHA-256

Number = Annotated[int, msgspec.Meta(ge=0)]  # MessagePack has no more than u64
Digest = Annotated[bytes, msgspec.Meta(min_length=DIGEST_SIZE, max_length=DIGEST_SIZE)]


@dataclass(frozen=True, slots=True)
class Anchor:
    """The root.json that provisioning put on the boot device; where all trust begins."""

    root: bytes

    @property
    def digest(self) -> bytes:
        """SHA-256 of it. State that grew from another anchor counts for nothing."""
        return sha256(self.root).digest()


@dataclass(frozen=True, slots=True, kw_only=True)
class TrustState:
    """What has been seen so far. Every number only grows (test_what_was_seen_only_grows); only a
    root that takes keys away takes the versions along that those keys have signed.

    `timestamp_digest` tells a release that is tried again from another one of the same number.
    `time_floor` is s since 1970: the latest moment that somebody we trust has signed, and never
    the reading of a clock. `version_floor` is the lowest version of a set that may be staged.
    """

    anchor: bytes
    root: bytes
    timestamp: int = 0
    timestamp_digest: bytes = bytes(DIGEST_SIZE)
    snapshot: int = 0
    targets: int = 0
    time_floor: int = 0
    version_floor: int = 0

    def raised(self, version_floor: int) -> "TrustState":
        """The same with a version floor that is at least this one."""
        return replace(self, version_floor=max(self.version_floor, version_floor))

    def encode(self) -> bytes:
        """What updated keeps. At most STATE_SIZE_MAX bytes."""
        data = msgspec.msgpack.encode(
            _Kept(
                STATE_VERSION,
                self.anchor,
                self.root,
                self.timestamp,
                self.timestamp_digest,
                self.snapshot,
                self.targets,
                self.time_floor,
                self.version_floor,
            )
        )
        assert len(data) <= STATE_SIZE_MAX, "root.json has a limit, and so has the rest"
        return data


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The one set that trusted metadata names.

    `length` and `sha256` are of the whole set file. `floor` is the version floor that the device
    takes over when this set is committed: 0 asks for none.
    """

    name: str
    length: int
    sha256: bytes
    version: int
    floor: int


def decode_state(data: bytes) -> TrustState:
    """What TrustState.encode made; anything else is Untrusted(DEVICE)."""
    if len(data) > STATE_SIZE_MAX:
        raise Untrusted(TrustStatus.DEVICE, f"the kept state of trust has {len(data)} bytes")
    try:
        kept = _DECODER.decode(data)
    except msgspec.MsgspecError as error:
        raise Untrusted(TrustStatus.DEVICE, f"the kept state of trust: {error}") from error
    if kept.format != STATE_VERSION:
        raise Untrusted(TrustStatus.DEVICE, f"the kept state of trust has format {kept.format}")
    return TrustState(
        anchor=kept.anchor,
        root=kept.root,
        timestamp=kept.timestamp,
        timestamp_digest=kept.timestamp_digest,
        snapshot=kept.snapshot,
        targets=kept.targets,
        time_floor=kept.time_floor,
        version_floor=kept.version_floor,
    )


class _Kept(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """TrustState as it is kept: MessagePack, an array in this order."""

    format: Number
    anchor: Digest
    root: Annotated[bytes, msgspec.Meta(max_length=ROOT_SIZE_MAX)]
    timestamp: Number
    timestamp_digest: Digest
    snapshot: Number
    targets: Number
    time_floor: Number
    version_floor: Number


_DECODER: Final = msgspec.msgpack.Decoder(_Kept)
