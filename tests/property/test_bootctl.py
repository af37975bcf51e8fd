"""Any record comes back from both backends; any bytes are a record or a reason, never an error."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from nexus.bootctl import (
    COUNT_MAX,
    BootRecord,
    BootRefused,
    SlotInfo,
    attempt,
    commit,
    damaged,
    failed,
    problem_of,
    restored,
    rollback,
    staged,
    staging,
    switch,
)
from nexus.bootctl.anchor import ANCHOR_SIZE_MAX, decode_anchor, encode_anchor
from nexus.bootctl.block import COPY_SIZE, Other, decode_record, encode_record
from nexus.bootctl.environment import (
    DATA_SIZE,
    Copy,
    decode_environment,
    encode_environment,
)
from nexus.drivers import finished
from nexus.kernel.sim.disk import Disk
from nexus.proof.powercut import DiskDevice
from tests.fakes.bootrecords import BACKENDS, BOOT_BLOCKS, infos, reasons, records

Step = Callable[[BootRecord], BootRecord]


@given(records(counted=False))
def test_any_record_comes_back_from_a_copy(record: BootRecord) -> None:
    assert decode_record(encode_record(record)) == record


@pytest.mark.parametrize("backend", BACKENDS)
@given(data=st.data())
def test_any_record_comes_back_from_a_device(backend: str, data: st.DataObject) -> None:
    record = data.draw(records(counted=backend == "environment"))
    disk = Disk(BOOT_BLOCKS)

    stored = finished(BACKENDS[backend](DiskDevice(disk)).create(record))

    assert finished(BACKENDS[backend](DiskDevice(disk)).load()) == stored
    tails = tuple(replace(each, tail="") for each in record.reasons)
    found = tuple(replace(each, tail="") for each in stored.reasons)
    assert replace(stored, reasons=(), sequence=0) == replace(record, reasons=(), sequence=0)
    assert found == tails
    if backend == "block":
        assert stored.reasons == record.reasons


@given(records(counted=False), st.integers(0, COPY_SIZE - 1), st.integers(0, 7))
def test_a_flipped_bit_anywhere_in_a_copy_is_seen(record: BootRecord, at: int, bit: int) -> None:
    copy = bytearray(encode_record(record))
    copy[at] ^= 1 << bit

    assert isinstance(decode_record(bytes(copy)), Other)


@given(records(counted=False), records(counted=False), st.integers(0, COPY_SIZE))
def test_half_of_one_record_and_half_of_another_is_none(
    old: BootRecord, new: BootRecord, stop: int
) -> None:
    torn = encode_record(new)[:stop] + encode_record(old)[stop:]

    assert decode_record(torn) in (old, new) or isinstance(decode_record(torn), Other)


@given(st.binary(max_size=COPY_SIZE))
def test_any_bytes_are_a_record_or_a_reason(data: bytes) -> None:
    assert isinstance(decode_record(data.ljust(COPY_SIZE, b"\0")), Other)


@given(st.binary(min_size=1, max_size=ANCHOR_SIZE_MAX))
def test_any_anchor_comes_back(data: bytes) -> None:
    assert decode_anchor(encode_anchor(data)) == data


NAMES = st.text(st.characters(min_codepoint=1, max_codepoint=255, exclude_characters="="))
VALUES = st.text(st.characters(min_codepoint=1, max_codepoint=255))


@given(st.dictionaries(NAMES.filter(bool), VALUES), st.integers(0, 255))
def test_any_environment_comes_back(variables: dict[str, str], flags: int) -> None:
    assume(sum(len(name) + len(value) + 2 for name, value in variables.items()) < DATA_SIZE)

    assert decode_environment(encode_environment(flags, variables)) == Copy(flags, variables)


STEPS: st.SearchStrategy[Step] = st.one_of(
    st.just(staging),
    st.just(restored),
    st.integers(0, COUNT_MAX).map(lambda wall: lambda it: attempt(it, wall=wall)[0]),
    infos(st.sampled_from([SlotInfo().state]), tries=False).map(
        lambda info: partial(staged, info=info)
    ),
    st.builds(
        lambda tries, reason, snapshot: partial(
            switch, tries=tries, reason=reason, snapshot=snapshot
        ),
        st.integers(0, 9),
        reasons,
        st.integers(0, 9),
    ),
    reasons.map(lambda reason: partial(failed, reason=reason)),
    reasons.map(lambda reason: partial(commit, running=reason.slot, reason=reason)),
    reasons.map(lambda reason: partial(rollback, reason=reason)),
    reasons.map(lambda reason: partial(damaged, name=reason.slot, reason=reason)),
)


@given(records(counted=True), st.lists(STEPS, min_size=1, max_size=6))
def test_from_any_record_only_possible_ones_are_reached(
    record: BootRecord, steps: list[Step]
) -> None:
    for step in steps:
        before = record
        try:
            record = step(record)
        except BootRefused:
            assert record == before
        assert problem_of(record) is None
