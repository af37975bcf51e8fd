"""How values are sealed, and the wrapping keys they are sealed under. Pure but for the cipher.

A sealed record, as it stands in statefsd:

    version u8 | number of the wrapping key u32 | nonce 12 bytes | ciphertext and tag 16 bytes

ChaCha20-Poly1305 (RFC 8439). Authenticated along: the first two fields and the whole key it is
stored under, so that no record can stand in for another. What the kernel keeps for us:

    magic 4 bytes | version u8 | keys u8 | device u8 | public key 32 bytes |
    (number u32 | key 32 bytes) for each | SHA-256 over all of it

There is one wrapping key, and two while everything is being sealed with the new one, which is the
last. `device` is 1 once a device key was made, and `public key` is its public half: from then on a
missing or another device key is damage, and never a reason to make one.
"""

import struct
from dataclasses import dataclass
from hashlib import sha256
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from nexus.abi import SECRET_SIZE_MAX
from nexus.services.keystored.secret import Secret

WRAPPING_SIZE: Final = 32  # bytes of a wrapping key: RFC 8439
NONCE_SIZE: Final = 12  # bytes: RFC 8439
NONCE_PREFIX_SIZE: Final = 8  # bytes of a nonce that are fresh entropy; the others count
NONCES_MAX: Final = 1 << 32  # of one prefix
TAG_SIZE: Final = 16
PUBLIC_SIZE: Final = 32
KEYS_MAX: Final = 2  # old and new
NUMBER_MAX: Final = (1 << 32) - 1
VERSION: Final = 1
DOMAIN: Final = b"nexus keystored\0"
MAGIC: Final = b"NXWK"

HEAD: Final = struct.Struct(f"<BI{NONCE_SIZE}s")
BOUND_SIZE: Final = 5  # bytes of HEAD that are authenticated; the nonce is by its use
BLOB: Final = struct.Struct(f"<4sBBB{PUBLIC_SIZE}s")
NUMBERED: Final = struct.Struct(f"<I{WRAPPING_SIZE}s")
DIGEST_SIZE: Final = 32
OVERHEAD: Final = HEAD.size + TAG_SIZE  # bytes a record is longer than its value

assert NONCE_PREFIX_SIZE + 4 == NONCE_SIZE
assert BLOB.size + KEYS_MAX * NUMBERED.size + DIGEST_SIZE <= SECRET_SIZE_MAX


class Unsealable(Exception):
    """It is no record of this place under these keys. There is no more to say, so as not to."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WrappingKey:
    """A wrapping key and its number, from 1 on; numbers are not used again."""

    number: int
    secret: Secret


@dataclass(frozen=True, kw_only=True, slots=True)
class Wrapping:
    """The wrapping keys, the newest last, and the public half of the device key that was made."""

    keys: tuple[WrappingKey, ...]
    device: bytes | None

    @property
    def current(self) -> WrappingKey:
        """The key that seals."""
        return self.keys[-1]

    @property
    def rotating(self) -> bool:
        """Whether there may still be records under an old key."""
        return len(self.keys) > 1

    def wipe(self) -> None:
        """Overwrite the keys."""
        for key in self.keys:
            key.secret.wipe()


class Nonces:
    """Numbers used once: fresh entropy of this instance, and a counter.

    Two instances that seal under the same key differ in the prefix, one instance in the counter.
    """

    def __init__(self, prefix: bytes) -> None:
        assert len(prefix) == NONCE_PREFIX_SIZE
        self._prefix = prefix
        self._used = 0

    @property
    def spent(self) -> bool:
        """Whether a new prefix is needed."""
        return self._used >= NONCES_MAX

    def take(self) -> bytes:
        """The next one."""
        assert not self.spent, "a spent prefix is replaced"
        nonce = self._prefix + self._used.to_bytes(NONCE_SIZE - NONCE_PREFIX_SIZE, "little")
        self._used += 1
        return nonce


def seal(key: WrappingKey, nonce: bytes, path: bytes, value: bytes | bytearray) -> bytes:
    """The record that stands for `value` at `path`."""
    head = HEAD.pack(VERSION, key.number, nonce)
    cipher = ChaCha20Poly1305(key.secret.data)
    return head + cipher.encrypt(nonce, value, _bound(head, path))


def unseal(wrapping: Wrapping, path: bytes, record: bytes) -> Secret:
    """The value in a record. Raises Unsealable for anything that `seal` did not make for it."""
    number = number_of(record)
    key = next((each for each in wrapping.keys if each.number == number), None)
    if key is None:
        raise Unsealable
    nonce = record[BOUND_SIZE : HEAD.size]
    value = Secret(bytes(len(record) - OVERHEAD))
    try:
        _ = ChaCha20Poly1305(key.secret.data).decrypt_into(
            nonce, record[HEAD.size :], _bound(record, path), value.data
        )
    except InvalidTag:
        value.wipe()
        raise Unsealable from None
    return value


def number_of(record: bytes) -> int:
    """The number of the wrapping key a record was sealed with. Raises Unsealable."""
    if len(record) < OVERHEAD:
        raise Unsealable
    version, number, _ = HEAD.unpack_from(record)
    if version != VERSION:
        raise Unsealable
    return int(number)


def pack(wrapping: Wrapping) -> bytes:
    """What the kernel keeps."""
    assert 1 <= len(wrapping.keys) <= KEYS_MAX
    device = bytes(PUBLIC_SIZE) if wrapping.device is None else wrapping.device
    marked = wrapping.device is not None
    parts = [BLOB.pack(MAGIC, VERSION, len(wrapping.keys), marked, device)]
    parts += [NUMBERED.pack(each.number, bytes(each.secret.data)) for each in wrapping.keys]
    body = b"".join(parts)
    return body + sha256(body).digest()


def unpack(blob: bytes) -> Wrapping:
    """The opposite. Raises Unsealable for anything that `pack` cannot have made."""
    body, digest = blob[:-DIGEST_SIZE], blob[-DIGEST_SIZE:]
    if len(body) < BLOB.size or sha256(body).digest() != digest:
        raise Unsealable
    magic, version, count, marked, device = BLOB.unpack_from(body)
    if (magic, version) != (MAGIC, VERSION) or not 1 <= count <= KEYS_MAX or marked > 1:
        raise Unsealable
    if len(body) != BLOB.size + count * NUMBERED.size:
        raise Unsealable
    keys = tuple(
        WrappingKey(number=number, secret=Secret(key))
        for number, key in NUMBERED.iter_unpack(body[BLOB.size :])
    )
    numbers = [each.number for each in keys]
    if numbers[0] < 1 or numbers != list(range(numbers[0], numbers[0] + count)):
        raise Unsealable
    return Wrapping(keys=keys, device=device if marked else None)


def _bound(head: bytes, path: bytes) -> bytes:
    """What is authenticated beside the value."""
    return DOMAIN + head[:BOUND_SIZE] + path
