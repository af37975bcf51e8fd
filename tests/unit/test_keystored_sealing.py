import copy
import pickle
from dataclasses import replace
from hashlib import sha256
from typing import Final

import pytest
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from hypothesis import given
from hypothesis import strategies as st

from nexus.services.keystored.sealing import (
    DIGEST_SIZE,
    HEAD,
    NONCES_MAX,
    OVERHEAD,
    Nonces,
    Unsealable,
    Wrapping,
    WrappingKey,
    number_of,
    pack,
    seal,
    unpack,
    unseal,
)
from nexus.services.keystored.secret import HIDDEN, Secret

KEY: Final = bytes(range(32))
OTHER: Final = bytes(range(1, 33))
NONCE: Final = bytes(12)
PATH: Final = b"/state/keystore/device.signing"


def wrapping(*keys: bytes, first: int = 1, device: bytes | None = None) -> Wrapping:
    made = (
        WrappingKey(number=number, secret=Secret(key)) for number, key in enumerate(keys, first)
    )
    return Wrapping(keys=tuple(made), device=device)


# ------------------------------------------------------------------ records


@given(st.binary(max_size=300), st.binary(max_size=64))
def test_what_is_sealed_is_unsealed_at_its_own_place(value: bytes, path: bytes) -> None:
    keys = wrapping(KEY)

    record = seal(keys.current, NONCE, path, value)

    assert bytes(unseal(keys, path, record).data) == value
    assert len(record) == len(value) + OVERHEAD


def test_a_record_is_what_the_rfc_makes_of_the_documented_layout() -> None:
    record = seal(wrapping(KEY, first=7).current, NONCE, PATH, b"value")

    bound = b"nexus keystored\0" + b"\1" + (7).to_bytes(4, "little") + PATH
    assert record == HEAD.pack(1, 7, NONCE) + ChaCha20Poly1305(KEY).encrypt(NONCE, b"value", bound)


def test_a_record_does_not_open_at_another_place() -> None:
    record = seal(wrapping(KEY).current, NONCE, b"/state/keystore/1/61", b"value")

    with pytest.raises(Unsealable):
        unseal(wrapping(KEY), b"/state/keystore/2/61", record)


def test_a_record_does_not_open_under_another_key_or_another_number() -> None:
    record = seal(wrapping(KEY).current, NONCE, PATH, b"value")

    for keys in (wrapping(OTHER), wrapping(KEY, first=2), wrapping(OTHER, KEY)):
        with pytest.raises(Unsealable):
            unseal(keys, PATH, record)


def test_both_keys_of_a_rotation_open_what_they_have_sealed() -> None:
    both = wrapping(KEY, OTHER, first=4)
    old = seal(both.keys[0], NONCE, PATH, b"old")
    new = seal(both.current, NONCE, PATH, b"new")

    opened = [bytes(unseal(both, PATH, record).data) for record in (old, new)]

    assert opened == [b"old", b"new"]
    assert [number_of(old), number_of(new)] == [4, 5]


def test_every_changed_bit_and_every_cut_of_a_record_is_noticed() -> None:
    record = seal(wrapping(KEY).current, NONCE, PATH, b"value")

    for index in range(8 * len(record)):
        changed = bytearray(record)
        changed[index // 8] ^= 1 << index % 8
        with pytest.raises(Unsealable):
            unseal(wrapping(KEY), PATH, bytes(changed))
    for size in range(len(record)):
        with pytest.raises(Unsealable):
            unseal(wrapping(KEY), PATH, record[:size])


def test_nonces_differ_within_a_prefix_and_between_prefixes() -> None:
    one, other = Nonces(b"01234567"), Nonces(b"01234568")

    taken = [source.take() for _ in range(1000) for source in (one, other)]

    assert len(set(taken)) == len(taken)
    assert {len(nonce) for nonce in taken} == {12}


def test_a_spent_prefix_gives_no_nonce_twice() -> None:
    nonces = Nonces(bytes(8))
    nonces._used = NONCES_MAX - 1

    last = nonces.take()

    assert last[8:] == b"\xff\xff\xff\xff"
    assert nonces.spent
    with pytest.raises(AssertionError):
        nonces.take()


# ------------------------------------------------------------------ the kernel's blob


@pytest.mark.parametrize("device", [None, bytes(range(32))])
@pytest.mark.parametrize("keys", [(KEY,), (KEY, OTHER)])
def test_the_blob_gives_back_the_keys_and_the_mark(
    keys: tuple[bytes, ...], device: bytes | None
) -> None:
    found = unpack(pack(wrapping(*keys, first=9, device=device)))

    assert [(each.number, bytes(each.secret.data)) for each in found.keys] == list(
        enumerate(keys, 9)
    )
    assert found.device == device
    assert found.rotating is (len(keys) == 2)


def test_every_changed_bit_and_every_cut_of_the_blob_is_noticed() -> None:
    blob = pack(wrapping(KEY, OTHER))

    for index in range(8 * len(blob)):
        changed = bytearray(blob)
        changed[index // 8] ^= 1 << index % 8
        with pytest.raises(Unsealable):
            unpack(bytes(changed))
    for size in range(len(blob)):
        with pytest.raises(Unsealable):
            unpack(blob[:size])


@pytest.mark.parametrize(
    ("offset", "content"),
    [
        (4, b"\2"),  # another version of the format
        (5, b"\0"),  # no key
        (5, b"\3"),  # three of them
        (6, b"\2"),  # neither marked nor not
        (39, b"\0\0\0\0"),  # a key without a number
        (75, b"\1\0\0\0"),  # the same number twice
        (75, b"\3\0\0\0"),  # a gap
    ],
)
def test_a_blob_that_is_whole_and_makes_no_sense_is_refused(offset: int, content: bytes) -> None:
    body = bytearray(pack(wrapping(KEY, OTHER))[:-DIGEST_SIZE])
    body[offset : offset + len(content)] = content

    with pytest.raises(Unsealable):
        unpack(bytes(body) + sha256(body).digest())


@given(st.binary(max_size=200))
def test_no_bytes_are_a_blob_by_chance(data: bytes) -> None:
    with pytest.raises(Unsealable):
        unpack(data)


# ------------------------------------------------------------------ secrets


def test_a_secret_has_no_text() -> None:
    secret = Secret(KEY)
    keys = replace(wrapping(KEY), device=bytes(32))

    texts = [repr(secret), str(secret), f"{secret}", f"{secret!r:>10}", repr([secret]), repr(keys)]

    for text in texts:
        assert HIDDEN in text
        assert KEY.hex() not in text
        assert repr(KEY)[2:-1] not in text


def test_a_secret_is_not_copied_by_pickle_or_copy() -> None:
    for act in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError):
            act(Secret(KEY))


def test_a_secret_is_wiped_in_place_and_at_the_end_of_its_block() -> None:
    secret = Secret(KEY)
    kept = secret.data

    with secret:
        assert bytes(kept) == KEY

    assert bytes(kept) == bytes(32), "the very bytes, not a new object"
    assert kept is secret.data


def test_wiping_the_wrapping_keys_wipes_every_one() -> None:
    both = wrapping(KEY, OTHER)

    both.wipe()

    assert [bytes(key.secret.data) for key in both.keys] == [bytes(32)] * 2
