"""keystored protocol: small values of one's own, and the device key that never leaves.

Values are kept per calling service, by the kernel's word of who calls: the same name at two
services is two entries. The device key is Ed25519; the device id is the SHA-256 of its public
key, 64 small hexadecimal digits.
"""

from enum import IntEnum
from typing import Annotated, Final, TypeAlias

from nexus.wire import U8, U32, U64, Blob, Bool, Message, Protocol, Request, Text

NAME_SIZE_MAX: Final = 64  # bytes of an entry's name (services.md 8.4)
VALUE_SIZE_MAX: Final = 256  # bytes of an entry's value
ENTRIES_MAX: Final = 32  # entries of a caller; two pages of statefsd's to count
SIGN_SIZE_MAX: Final = 4096  # bytes; sign a digest of what is longer
WIRE_NAME_MAX: Final = 256  # bytes a frame may carry, so that one too long has its own status
WIRE_VALUE_MAX: Final = 1024
WIRE_SIGN_MAX: Final = 7168
PUBLIC_KEY_SIZE: Final = 32
SIGNATURE_SIZE: Final = 64
DEVICE_ID_SIZE: Final = 64  # characters

KEYGEN_RIGHT: Final = "device.keygen"
PUBKEY_RIGHT: Final = "device.pubkey.read"
SIGN_RIGHT: Final = "crypto.sign"
ROTATE_RIGHT: Final = "device.key.rotate"


class KeystoredStatus(IntEnum):
    """Why keystored refuses. The numbers are wire format and are never reused."""

    NOT_FOUND = 16  # the caller has no entry of that name
    TOO_LARGE = 17  # the name, the value or the payload
    KEY_EXISTS = 18  # there is a device key already
    KEY_NOT_FOUND = 19  # there is no device key yet
    EXPORT_DENIED = 20  # the private key never leaves, whoever asks
    UNAVAILABLE = 21  # statefsd, rngd or the wrapping key cannot be had now, or not in time
    CORRUPTED = 22  # what is stored cannot be opened with the wrapping key
    OVER_LIMIT = 23  # the caller's entries


class Done(Message):
    """It is durable."""


class Put(Request[Done], op=1, idempotent=True, refuses=KeystoredStatus):
    """Keep a value under a name of the caller's own. Durable when answered.

    After UNAVAILABLE the entry has the old value or the new one.
    *Refuses*: TOO_LARGE, OVER_LIMIT, UNAVAILABLE, CORRUPTED.
    """

    name: Annotated[bytes, Blob(size_min=1, size_max=WIRE_NAME_MAX)]
    value: Annotated[bytes, Blob(size_max=WIRE_VALUE_MAX)]


class Value(Message):
    """The caller's value."""

    value: Annotated[bytes, Blob(size_max=VALUE_SIZE_MAX)]


class Get(Request[Value], op=2, idempotent=True, refuses=KeystoredStatus):
    """The caller's value of that name. *Refuses*: NOT_FOUND, TOO_LARGE, UNAVAILABLE, CORRUPTED."""

    name: Annotated[bytes, Blob(size_min=1, size_max=WIRE_NAME_MAX)]


class Delete(Request[Done], op=3, idempotent=True, refuses=KeystoredStatus):
    """Drop the caller's value, durably. *Refuses*: NOT_FOUND, TOO_LARGE, UNAVAILABLE, CORRUPTED."""

    name: Annotated[bytes, Blob(size_min=1, size_max=WIRE_NAME_MAX)]


class Verdict(Message):
    """Whether the signature is the key's over the payload."""

    valid: Annotated[bool, Bool()]


class Verify(Request[Verdict], op=4, idempotent=True, refuses=KeystoredStatus):
    """Strict Ed25519. *Refuses*: TOO_LARGE."""

    public_key: Annotated[bytes, Blob(size_min=PUBLIC_KEY_SIZE, size_max=PUBLIC_KEY_SIZE)]
    signature: Annotated[bytes, Blob(size_min=SIGNATURE_SIZE, size_max=SIGNATURE_SIZE)]
    payload: Annotated[bytes, Blob(size_max=WIRE_SIGN_MAX)]


class DeviceKey(Message):
    """The device's public key, and its id."""

    public_key: Annotated[bytes, Blob(size_min=PUBLIC_KEY_SIZE, size_max=PUBLIC_KEY_SIZE)]
    device_id: Annotated[
        str, Text(size_min=DEVICE_ID_SIZE, size_max=DEVICE_ID_SIZE, pattern=r"^[0-9a-f]{64}\Z")
    ]


class GenerateKey(Request[DeviceKey], op=10, idempotent=False, refuses=KeystoredStatus):
    """Make the device key, once in the device's life; durable when answered.

    After UNAVAILABLE there is the new key or none: asked again, KEY_EXISTS says which.
    The caller holds `device.keygen`, else DENIED. *Refuses*: KEY_EXISTS, UNAVAILABLE, CORRUPTED.
    """


class GetPublicKey(Request[DeviceKey], op=11, idempotent=True, refuses=KeystoredStatus):
    """The public half. The caller holds `device.pubkey.read`, else DENIED.

    *Refuses*: KEY_NOT_FOUND, UNAVAILABLE, CORRUPTED.
    """


class Signature(Message):
    """Ed25519, of the device key."""

    signature: Annotated[bytes, Blob(size_min=SIGNATURE_SIZE, size_max=SIGNATURE_SIZE)]


class Sign(Request[Signature], op=12, idempotent=True, refuses=KeystoredStatus):
    """Sign with the device key. The caller holds `crypto.sign`, else DENIED.

    *Refuses*: TOO_LARGE, KEY_NOT_FOUND, UNAVAILABLE, CORRUPTED.
    """

    payload: Annotated[bytes, Blob(size_max=WIRE_SIGN_MAX)]


class ExportPrivateKey(Request[Done], op=13, idempotent=True, refuses=KeystoredStatus):
    """Always refused, whoever asks, and audited by keystored itself. *Refuses*: EXPORT_DENIED."""


class Rotated(Message):
    """The number of the wrapping key in force, from 1."""

    wrapping: Annotated[int, U32(minimum=1)]


class RotateWrapping(Request[Rotated], op=14, idempotent=False, refuses=KeystoredStatus):
    """Make a new wrapping key and seal everything with it; a cut at any point is recovered from.

    The device key stays what it is. After UNAVAILABLE it may be half done: keystored finishes it by
    itself, or when asked again. The caller holds `device.key.rotate`, else DENIED.
    *Refuses*: UNAVAILABLE, CORRUPTED.
    """


class KeyState(IntEnum):
    """How it stands with the device key."""

    ABSENT = 0  # none was ever made
    PRESENT = 1
    DAMAGED = 2  # it does not open with the wrapping key there is, or one of the two is gone
    UNKNOWN = 3  # what keystored stands on cannot be had now


class Store(Message):
    """What keystored stands on. No secret is in it."""

    statefsd_generation: Annotated[int, U32()]  # of the instance that keeps its entries
    backend: Annotated[int, U8()]  # abi.SecretBackend of the wrapping key
    wrapping: Annotated[int, U32()]  # number of the wrapping key; 0 if there is or is known none
    keygens: Annotated[int, U64()]  # device keys made in this instance's life: 0 or 1
    device_key: KeyState


class GetStore(Request[Store], op=15, idempotent=True):
    """What keystored stands on."""


KeystoredRequest: TypeAlias = (
    Put
    | Get
    | Delete
    | Verify
    | GenerateKey
    | GetPublicKey
    | Sign
    | ExportPrivateKey
    | RotateWrapping
    | GetStore
)
PROTOCOL: Final = Protocol(
    "keystored",
    number=10,
    version=2,
    requests=(
        Put,
        Get,
        Delete,
        Verify,
        GenerateKey,
        GetPublicKey,
        Sign,
        ExportPrivateKey,
        RotateWrapping,
        GetStore,
    ),
)
