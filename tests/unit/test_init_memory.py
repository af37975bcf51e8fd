"""What init remembers from boot to boot, and the policy as it travels: any bytes are read or
refused with one error, and whatever is remembered fits the page."""

from typing import Any

import hypothesis.strategies as st
import msgspec
import pytest
from hypothesis import given

from nexus.abi import BOOT_MEMORY_SIZE_MAX, SERVICE_NAME_SIZE_MAX
from nexus.bootctl.handover import (
    FAILED_DETAIL_SIZE_MAX,
    FAILED_REASON_SIZE_MAX,
    SPAN_MAX,
    TRACE_SIZE,
    TrialFailure,
    read_failure,
)
from nexus.init.memory import (
    COUNT_MAX,
    ENDS_MAX,
    End,
    Memory,
    decode_memory,
    encode_memory,
)
from nexus.protocols.init import REASON_SIZE_MAX, REASON_TEXT_SIZE_MAX
from nexus.protocols.policy import POLICY_SIZE_MAX, Policy, Right, decode_policy

POLICY = Policy(
    services=["timed", "driver"],
    allow={"timed": [Right("a.b", "base.toml", 3)]},
    routes={"timed": "time.use"},
)
MEMORY = Memory(boots=7, unstable=2, why="crashes", ends=[End("timed", 6, "hang", 0, 9)])


def longest(character: str) -> Memory:
    """Every field at its bound, every character this one."""
    end = End(
        character * SERVICE_NAME_SIZE_MAX,
        COUNT_MAX,
        character * REASON_SIZE_MAX,
        -(2**63),
        0xFFFF,
    )
    return Memory(
        boots=COUNT_MAX,
        unstable=COUNT_MAX,
        why=character * REASON_TEXT_SIZE_MAX,
        ends=[msgspec.structs.replace(end, boot=boot) for boot in range(ENDS_MAX)],
        trial=TrialFailure(
            slot="b",
            version=2**64 - 1,
            attempt=COUNT_MAX,
            boot=COUNT_MAX,
            at=SPAN_MAX,
            trace=character * TRACE_SIZE,
            service=character * SERVICE_NAME_SIZE_MAX,
            reason=character * FAILED_REASON_SIZE_MAX,
            detail=character * FAILED_DETAIL_SIZE_MAX,
        ),
    )


def mutations(data: bytes) -> st.SearchStrategy[bytes]:
    """Any bytes, and these with some of them replaced."""

    def mutated(edits: list[tuple[int, int, bytes]]) -> bytes:
        found = data
        for start, span, fresh in edits:
            at = start % (len(found) + 1)
            found = found[:at] + fresh + found[at + span :]
        return found

    edit = st.tuples(st.integers(0, 10_000), st.integers(0, 8), st.binary(max_size=8))
    return st.binary() | st.lists(edit, min_size=1, max_size=4).map(mutated)


@given(data=mutations(POLICY.encoded()))
def test_any_bytes_are_a_policy_or_its_one_error(data: bytes) -> None:
    try:
        policy = decode_policy(data)
    except msgspec.DecodeError:
        return
    assert decode_policy(policy.encoded()) == policy


@given(data=mutations(encode_memory(MEMORY)))
def test_any_bytes_are_a_memory_or_its_one_error(data: bytes) -> None:
    try:
        memory = decode_memory(data)
    except msgspec.DecodeError:
        return
    assert isinstance(memory, Memory)
    _ = decode_memory(encode_memory(memory))


@pytest.mark.parametrize(
    "data",
    [
        POLICY.encoded().replace(b"timed", b"tim\xe9d"),
        POLICY.encoded().replace(b"base.toml", b"bas\xff.toml"),
        b"\x91" * 60_000,
        b"\x81" * 60_000,
        b"\xdd\xff\xff\xff\xff",
        bytes(POLICY_SIZE_MAX + 1),
        b"",
    ],
    ids=["name", "file", "lists", "maps", "length", "large", "empty"],
)
def test_what_is_no_policy_has_one_error(data: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        _ = decode_policy(data)


@pytest.mark.parametrize(
    "data",
    [
        b'{"version":1,"why":"\xe9"}',
        b'{"version":1,"why":"\\ud800"}',
        b'{"version":1,"ends":' + b"[" * 4000,
        b'{"version":1,"boots":' + b"9" * 4000 + b"}",
        b'{"version":1,"boots":1e999}',
        b"\xef\xbb\xbf{}",
        b"",
    ],
    ids=["text", "surrogate", "nested", "number", "float", "mark", "empty"],
)
def test_what_is_no_memory_has_one_error(data: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        _ = decode_memory(data)


@pytest.mark.parametrize("character", ["x", "é", "\u20ac", "\U0001f980", '"', "\x01"])
def test_a_memory_at_every_bound_fits_and_keeps_the_latest_ends(character: str) -> None:
    memory = longest(character)

    data = encode_memory(memory)

    assert len(data) <= BOOT_MEMORY_SIZE_MAX
    kept = decode_memory(data)
    assert (kept.boots, kept.unstable, kept.why) == (COUNT_MAX, COUNT_MAX, memory.why)
    assert read_failure(data) == memory.trial
    assert kept.ends
    assert kept.ends == memory.ends[-len(kept.ends) :]
    one_more = msgspec.structs.replace(memory, ends=memory.ends[-len(kept.ends) - 1 :])
    if len(kept.ends) < ENDS_MAX:
        assert len(msgspec.json.encode(one_more)) > BOOT_MEMORY_SIZE_MAX
    assert memory == longest(character)  # what runs on is not cut


def test_in_ascii_every_end_fits() -> None:
    assert len(decode_memory(encode_memory(longest("x"))).ends) == ENDS_MAX


def test_a_sentence_without_bound_is_cut_when_no_end_is_left() -> None:
    """Nobody stores one; it is cut all the same, and what counts is kept."""
    memory: Any = msgspec.structs.replace(longest("x"), why="\x01" * 10_000)

    kept = msgspec.json.decode(encode_memory(memory))

    assert (kept["boots"], kept["unstable"], kept["ends"]) == (COUNT_MAX, COUNT_MAX, [])
    assert 0 < len(kept["why"]) < 10_000
