"""One metadata file: from bounded bytes to a checked object of `tuf.api`.

Bytes -> JSON (bounded, no name twice, no fractions, nothing unprintable) -> counts -> tuf's own
types. Signatures are verified by tuf over what was parsed, so there is nothing between them.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any, Final, Generic, TypeVar

import msgspec

# tuf imports this when it is first needed: updated is confined by then and may open no file.
import tuf.api.serialization.json  # noqa: F401
from securesystemslib.formats import encode_canonical
from securesystemslib.signer import Signature
from tuf.api.metadata import Metadata, Root, Snapshot, Targets, Timestamp
from tuf.api.serialization import SerializationError

from nexus.trust.limits import DEPTH_MAX, KEYS_MAX, NUMBER_MAX, SIGNATURES_MAX
from nexus.trust.status import TrustStatus, Untrusted

ISSUED: Final = "x-nexus-issued"
"""s since 1970 when this file was signed; a field of every signed part."""
DEVELOPMENT: Final = "x-nexus-development"
"""true in a root whose keys are for development; a release build refuses it."""
SET_VERSION: Final = "x-nexus-version"
SET_FLOOR: Final = "x-nexus-floor"
KEY_TYPE: Final = "ed25519"
HASH: Final = "sha256"

_Type = TypeVar("_Type", Root, Timestamp, Snapshot, Targets)
_KeyId = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]


class _Signature(msgspec.Struct, forbid_unknown_fields=True):
    keyid: _KeyId
    sig: Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{128}\Z")]


class _Envelope(msgspec.Struct, forbid_unknown_fields=True):
    """The outside of a file. A field that no signature covers is not accepted."""

    signatures: list[_Signature]
    signed: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Document(Generic[_Type]):
    """A metadata file of one kind. Nothing of it is trusted before its signatures are verified."""

    name: str
    signed: _Type
    payload: bytes
    signatures: Mapping[str, Signature]

    @property
    def issued(self) -> int:
        """When it was signed, as it says itself; s since 1970."""
        return whole(self.name, self.signed.unrecognized_fields, ISSUED)

    @property
    def expires(self) -> int:
        """s since 1970."""
        return int(self.signed.expires.timestamp())


def load(kind: type[_Type], name: str, data: bytes) -> Document[_Type]:
    """Parse one file. The caller has bounded its size."""
    plain = _parse(name, data)
    listed = plain.get("signatures")
    if isinstance(listed, list) and len(listed) > SIGNATURES_MAX:
        raise Untrusted(TrustStatus.TOO_MANY, f"{name} has {len(listed)} signatures")
    try:
        envelope = msgspec.convert(plain, _Envelope)
    except msgspec.ValidationError as error:
        raise Untrusted(TrustStatus.MALFORMED, f"{name}: {error}") from error
    if len({signature.keyid for signature in envelope.signatures}) < len(envelope.signatures):
        raise Untrusted(TrustStatus.DUPLICATE, f"{name} has two signatures of one key")
    if envelope.signed.get("_type") != kind.type:
        raise Untrusted(TrustStatus.MALFORMED, f"{name} holds no {kind.type}")
    keys = envelope.signed.get("keys")
    if isinstance(keys, dict) and len(keys) > KEYS_MAX:
        raise Untrusted(TrustStatus.TOO_MANY, f"{name} has {len(keys)} keys")
    written = encode_canonical(envelope.signed)
    try:
        metadata: Metadata[_Type] = Metadata.from_dict(plain)  # takes the values out of it
        payload = metadata.signed_bytes
    except (
        AttributeError,  # tuf asks a list for its items
        KeyError,
        TypeError,
        ValueError,
        SerializationError,
    ) as error:
        raise Untrusted(TrustStatus.MALFORMED, f"{name}: {error!r:.200}") from error
    if written is None or written.encode() != payload:  # as a date with a blank for its zero
        raise Untrusted(TrustStatus.MALFORMED, f"{name} is not in the form that is signed")
    if type(metadata.signed.version) is not int or metadata.signed.version > NUMBER_MAX:
        raise Untrusted(TrustStatus.MALFORMED, f"{name} has no version")
    document = Document(name, metadata.signed, payload, metadata.signatures)
    if document.issued >= document.expires:
        raise Untrusted(TrustStatus.MALFORMED, f"{name} ended before it was signed")
    return document


def whole(name: str, fields: Mapping[str, Any], field: str) -> int:
    """A number that has to be there."""
    value = fields.get(field)
    if type(value) is not int:
        raise Untrusted(TrustStatus.MALFORMED, f"{name} has no number {field}")
    return value


def _parse(name: str, data: bytes) -> dict[str, Any]:
    """An object of JSON with nothing in it that could be read in two ways."""
    try:
        plain = json.loads(
            data.decode("utf-8"), object_pairs_hook=_unique, parse_int=_number, parse_float=_number
        )
    except _DoubleError as error:
        raise Untrusted(TrustStatus.DUPLICATE, f"{name} has {error} twice") from error
    except (ValueError, RecursionError) as error:
        if _is_cut(data):
            raise Untrusted(TrustStatus.TRUNCATED, f"{name} ends too early") from error
        raise Untrusted(TrustStatus.MALFORMED, f"{name}: {error!s:.200}") from error
    if not isinstance(plain, dict):
        raise Untrusted(TrustStatus.MALFORMED, f"{name} is no object")
    level: list[Any] = [plain]
    for _ in range(DEPTH_MAX):
        level = [inner for outer in level for inner in _inside(name, outer)]
    if level:
        raise Untrusted(TrustStatus.MALFORMED, f"{name} is too deep")
    return plain


def _is_cut(data: bytes) -> bool:
    """Whether it could be the beginning of a file: it begins as one, and has no end."""
    stripped = data.strip()
    return not stripped or (stripped.startswith(b"{") and not stripped.endswith(b"}"))


def _inside(name: str, value: object) -> list[Any]:
    """What is in a list or an object."""
    match value:
        case dict():
            return [*value, *value.values()]
        case list():
            return value
        case str() if not value.isprintable():  # nor one half of a surrogate pair
            raise Untrusted(TrustStatus.MALFORMED, f"{name} has a text with control characters")
        case str() | bool() | int():
            return []
        case _:
            raise Untrusted(TrustStatus.MALFORMED, f"{name} has a value that TUF does not know")


class _DoubleError(Exception):
    """An object names a field twice."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _DoubleError(f"{twice!r:.60}")
    return found


def _number(text: str) -> int:
    """A whole number, not below zero."""
    if not (text.isdigit() and len(text) <= 19 and int(text) <= NUMBER_MAX):
        raise ValueError(f"a number {text:.30}")
    return int(text)


# datetime imports what reads dates when it first reads one: as above.
# test_verification_opens_no_file
_ = datetime.strptime("1970-01-01T00:00:00+0000", "%Y-%m-%dT%H:%M:%S%z")
