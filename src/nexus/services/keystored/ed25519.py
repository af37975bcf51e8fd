"""Ed25519 (RFC 8032): the device key's public half and signatures, and strict verification.

Strict is what every other strict verifier answers too: the library refuses a scalar that is not
reduced and compares R byte by byte; what it lets through is refused here, a public key or an R
that is no canonical encoding, or of small order, with which one signature fits many messages.
"""

from hashlib import sha256
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from nexus.protocols.keystored import PUBLIC_KEY_SIZE, SIGNATURE_SIZE
from nexus.services.keystored.secret import Secret

SEED_SIZE: Final = 32  # bytes: RFC 8032, 5.1.5
FIELD: Final = (1 << 255) - 19
SIGN_BIT: Final = 1 << 255
ORDER_8: Final = 0x05FC536D880238B13933C6D305ACDFD5F098EFF289F4C345B027B2C28F95E826
SMALL_ORDER: Final = frozenset({0, 1, FIELD - 1, ORDER_8, FIELD - ORDER_8})
"""The y of the eight points whose order divides 8; with either sign of x."""


def public_of(seed: Secret) -> bytes:
    """The public half."""
    assert len(seed) == SEED_SIZE
    return Ed25519PrivateKey.from_private_bytes(seed.data).public_key().public_bytes_raw()


def sign(seed: Secret, payload: bytes) -> bytes:
    """The signature of the key over the payload."""
    assert len(seed) == SEED_SIZE
    return Ed25519PrivateKey.from_private_bytes(seed.data).sign(payload)


def verify(public_key: bytes, signature: bytes, payload: bytes) -> bool:
    """Whether the signature is the key's over the payload, strictly."""
    assert len(public_key) == PUBLIC_KEY_SIZE
    assert len(signature) == SIGNATURE_SIZE
    if not (_is_strict(public_key) and _is_strict(signature[:PUBLIC_KEY_SIZE])):
        return False
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, payload)
    except (InvalidSignature, ValueError):  # ValueError: the bytes are no point
        return False
    return True


def device_id_of(public_key: bytes) -> str:
    """The one device id: SHA-256 of the public key, hexadecimal."""
    return sha256(public_key).hexdigest()


def _is_strict(point: bytes) -> bool:
    """Whether this encoding is canonical and not of small order."""
    y = int.from_bytes(point, "little") & (SIGN_BIT - 1)
    return y < FIELD and y not in SMALL_ORDER
