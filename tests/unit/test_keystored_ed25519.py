from typing import Final

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from nexus.services.keystored.ed25519 import (
    FIELD,
    SMALL_ORDER,
    device_id_of,
    public_of,
    sign,
    verify,
)
from nexus.services.keystored.secret import Secret

# RFC 8032, 7.1, tests 1 and 3.
VECTORS: Final = (
    (
        "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
        "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
        "",
        (
            "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e06522490155"
            "5fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b"
        ),
    ),
    (
        "c5aa8df43f9f837bedb7442f31dcb7b166d38535076f094b85ce3a2e0b4458f7",
        "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025",
        "af82",
        (
            "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac"
            "18ff9b538d16f290ae67f760984dc6594a7c15e9716ed28dc027beceea1ec40a"
        ),
    ),
)
ORDER: Final = (1 << 252) + 27742317777372353535851937790883648493
CURVE: Final = -121665 * pow(121666, -1, FIELD) % FIELD


def multiplied(count: int, point: tuple[int, int]) -> tuple[int, int]:
    """By double and add, on edwards25519; slow, and as the RFC writes it."""
    result = (0, 1)
    while count:
        if count & 1:
            result = added(result, point)
        point = added(point, point)
        count >>= 1
    return result


def added(one: tuple[int, int], other: tuple[int, int]) -> tuple[int, int]:
    (a, b), (c, d) = one, other
    cross = CURVE * a * c * b * d % FIELD
    x = (a * d + b * c) * pow(1 + cross, -1, FIELD) % FIELD
    return x, (b * d + a * c) * pow(1 - cross, -1, FIELD) % FIELD


def x_of(y: int) -> int | None:
    """An x with which y is on the curve."""
    square = (y * y - 1) * pow(CURVE * y * y + 1, -1, FIELD) % FIELD
    root = pow(square, (FIELD + 3) // 8, FIELD)
    if root * root % FIELD != square:
        root = root * pow(2, (FIELD - 1) // 4, FIELD) % FIELD
    return root if root * root % FIELD == square else None


@pytest.mark.parametrize(("seed", "public", "payload", "signature"), VECTORS)
def test_the_vectors_of_the_rfc(seed: str, public: str, payload: str, signature: str) -> None:
    secret, message = Secret(bytes.fromhex(seed)), bytes.fromhex(payload)

    assert public_of(secret).hex() == public
    assert sign(secret, message).hex() == signature
    assert verify(bytes.fromhex(public), bytes.fromhex(signature), message)


def test_every_changed_bit_of_key_signature_and_payload_is_refused() -> None:
    secret = Secret(bytes(range(32)))
    public, payload = public_of(secret), b"payload"
    good = public + sign(secret, payload) + payload

    for index in range(8 * len(good)):
        changed = bytearray(good)
        changed[index // 8] ^= 1 << index % 8
        assert not verify(bytes(changed[:32]), bytes(changed[32:96]), bytes(changed[96:])), index


def test_a_signature_with_a_scalar_that_is_not_reduced_is_refused() -> None:
    secret = Secret(bytes(range(32)))
    signature = sign(secret, b"payload")
    larger = int.from_bytes(signature[32:], "little") + ORDER

    assert not verify(public_of(secret), signature[:32] + larger.to_bytes(32, "little"), b"payload")


def test_the_small_orders_are_those_whose_eightfold_is_nothing() -> None:
    for y in SMALL_ORDER:
        x = x_of(y)
        assert x is not None, "it is on the curve"
        assert multiplied(8, (x, y)) == (0, 1)
    assert len(SMALL_ORDER) == 5, "eight points: x = 0 for two of them, +-x for three"


def test_a_key_of_small_order_verifies_nothing_although_the_library_takes_it() -> None:
    public = (1).to_bytes(32, "little")  # the neutral element
    signature = public + bytes(32)  # R = 0 B + k A, for every payload
    Ed25519PublicKey.from_public_bytes(public).verify(signature, b"anything")

    assert not verify(public, signature, b"anything")


@pytest.mark.parametrize("y", sorted(SMALL_ORDER))
@pytest.mark.parametrize("sign_bit", [0, 1])
def test_no_key_and_no_r_of_small_order_is_taken(y: int, sign_bit: int) -> None:
    point = (y | sign_bit << 255).to_bytes(32, "little")
    secret = Secret(bytes(range(32)))

    assert not verify(point, point + bytes(32), b"")
    assert not verify(public_of(secret), point + bytes(32), b"")


@pytest.mark.parametrize("excess", range(19))
def test_a_key_that_is_not_reduced_is_refused(excess: int) -> None:
    for sign_bit in (0, 1):
        point = (FIELD + excess | sign_bit << 255).to_bytes(32, "little")

        assert not verify(point, point + bytes(32), b"")


def test_bytes_that_are_no_point_are_refused() -> None:
    y = next(y for y in range(2, 100) if x_of(y) is None)

    assert not verify(y.to_bytes(32, "little"), bytes(31) + b"\1" + bytes(32), b"")


def test_the_device_id_is_the_digest_of_the_public_key() -> None:
    # coreutils: printf '\0%.0s' {1..32} | sha256sum
    assert device_id_of(bytes(32)) == (
        "66687aadf862bd776c8fc18b8e9f8e20089714856ee233b3902a591d0d5f2925"
    )
