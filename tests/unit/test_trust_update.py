"""The update file: header, metadata section, limits before allocation; and what is kept."""

import struct
import tracemalloc
from typing import Final

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuzz.trust import BytesSource, Publisher
from nexus.drivers import finished
from nexus.trust import (
    UPDATE_HEADER_SIZE,
    TrustState,
    TrustStatus,
    Untrusted,
    Update,
    decode_metadata,
    decode_state,
    encode_metadata,
    encode_update,
    metadata_size,
    read_update,
)
from nexus.trust.limits import METADATA_SIZE_MAX, NUMBER_MAX, ROOT_SIZE_MAX, ROOTS_MAX
from nexus.trust.state import STATE_SIZE_MAX
from nexus.trust.update import (
    FILES_MAX,
    SNAPSHOT,
    TARGETS,
    TIMESTAMP,
    UPDATE_MAGIC,
    root_name,
    root_version,
)

FILES: Final = {TARGETS: b"3", SNAPSHOT: b"2", TIMESTAMP: b"1", root_name(1): b"0"}
MEMORY_MAX: Final = 4 * 1024 * 1024  # bytes, for whatever a section says of itself


def read(data: bytes) -> Update:
    """Read an update file in memory."""
    return finished(read_update(BytesSource(data)))


def refused(data: bytes) -> TrustStatus:
    """Why an update file is refused."""
    with pytest.raises(Untrusted) as caught:
        _ = read(data)
    assert str(caught.value).isprintable()
    return caught.value.status


def section_refused(section: bytes) -> TrustStatus:
    """Why a section of metadata is refused."""
    with pytest.raises(Untrusted) as caught:
        _ = decode_metadata(section)
    assert str(caught.value).isprintable()
    return caught.value.status


def header(size: int, *, magic: bytes = UPDATE_MAGIC, version: int = 1) -> bytes:
    """A header as the format has it, written without the code under test."""
    return magic + struct.pack("<HI", version, size)


# ---------------------------------------------------------------- the file


def test_an_update_is_read_as_it_was_written() -> None:
    content = b"the set, whatever it is"

    update = read(encode_update(FILES) + content)

    assert update.metadata == FILES
    assert update.set_size == len(content)
    whole = encode_update(FILES) + content
    assert whole[update.set_offset :] == content


def test_the_bytes_are_those_that_the_format_names() -> None:
    head = encode_update(FILES)
    section = msgspec.msgpack.encode(dict(sorted(FILES.items())))

    assert head == header(len(section)) + section
    assert UPDATE_HEADER_SIZE == 12


def test_an_update_that_ends_too_early_is_refused_wherever_it_ends() -> None:
    head = encode_update(FILES)

    for size in range(len(head)):
        assert refused(head[:size]) is TrustStatus.TRUNCATED
    assert read(head).set_size == 0


def test_a_source_that_ends_earlier_than_it_said_is_refused() -> None:
    head = encode_update(FILES)
    source = BytesSource(head[:-1])
    source.size += 1

    with pytest.raises(Untrusted) as caught:
        _ = finished(read_update(source))

    assert caught.value.status is TrustStatus.TRUNCATED


def test_another_file_or_format_is_refused() -> None:
    assert refused(header(0, magic=b"NXSET\0")) is TrustStatus.MALFORMED
    assert refused(header(0, version=2)) is TrustStatus.MALFORMED
    assert refused(header(0, version=0)) is TrustStatus.MALFORMED


def test_a_section_that_says_it_is_too_large_is_not_read() -> None:
    class Never(BytesSource):
        async def read_at(self, offset: int, size: int) -> bytes:
            assert size <= UPDATE_HEADER_SIZE, "read before it was bounded"
            return await super().read_at(offset, size)

    source = Never(header(METADATA_SIZE_MAX + 1) + bytes(100))
    source.size = 1 << 40

    with pytest.raises(Untrusted) as caught:
        _ = finished(read_update(source))

    assert caught.value.status is TrustStatus.TOO_LARGE
    assert metadata_size(header(METADATA_SIZE_MAX)) == METADATA_SIZE_MAX


# ---------------------------------------------------------------- the section


def test_a_section_has_one_form() -> None:
    backwards = msgspec.msgpack.encode(dict(sorted(FILES.items(), reverse=True)))
    wide = b"\xde\x00\x04" + encode_metadata(FILES)[1:]
    twice = b"\x85" + encode_metadata(FILES)[1:] + msgspec.msgpack.encode(TARGETS) + b"\xc4\x013"

    assert section_refused(backwards) is TrustStatus.MALFORMED
    assert section_refused(wide) is TrustStatus.MALFORMED
    assert section_refused(twice) is TrustStatus.DUPLICATE
    assert section_refused(encode_metadata(FILES) + b"\0") is TrustStatus.MALFORMED
    assert section_refused(b"") is TrustStatus.MALFORMED
    assert section_refused(b"\x90") is TrustStatus.MALFORMED


@pytest.mark.parametrize(
    "name",
    ["", "x", "root.json", "01.root.json", "0.root.json", "-1.root.json", "1.root.JSON",
     "².root.json", "../1.root.json", "1/root.json", f"{10**19}.root.json", "1.targets.json",
     "mirrors.json"],
)  # fmt: skip
def test_a_file_of_another_name_is_refused(name: str) -> None:
    assert section_refused(encode_metadata({**FILES, name: b""})) is TrustStatus.MALFORMED


@pytest.mark.parametrize("name", [TIMESTAMP, SNAPSHOT, TARGETS])
def test_every_role_has_to_be_there(name: str) -> None:
    without = {each: data for each, data in FILES.items() if each != name}

    assert section_refused(encode_metadata(without)) is TrustStatus.MALFORMED


def test_files_are_counted_before_they_are_made() -> None:
    many = b"\xdf" + (1 << 31).to_bytes(4, "big") + bytes(METADATA_SIZE_MAX - 5)
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]

    assert section_refused(many) is TrustStatus.TOO_MANY

    assert tracemalloc.get_traced_memory()[1] - before < MEMORY_MAX
    tracemalloc.stop()
    roots = {root_name(number): b"" for number in range(1, ROOTS_MAX + 1)}
    assert len({**FILES, **roots}) == FILES_MAX
    assert decode_metadata(encode_metadata({**FILES, **roots}))
    beyond = encode_metadata({**FILES, **roots, root_name(99): b""})
    assert section_refused(beyond) is TrustStatus.TOO_MANY


def test_a_name_that_says_it_is_huge_takes_no_memory() -> None:
    huge = b"\x81\xdb" + (1 << 31).to_bytes(4, "big") + b"x" * 1000
    content = b"\x81\xa1x\xc6" + (1 << 31).to_bytes(4, "big") + b"x" * 1000
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]

    assert section_refused(huge) is TrustStatus.MALFORMED
    assert section_refused(content) is TrustStatus.MALFORMED

    assert tracemalloc.get_traced_memory()[1] - before < MEMORY_MAX
    tracemalloc.stop()


def test_a_section_and_each_of_its_files_are_bounded() -> None:
    largest = {root_name(2): bytes(ROOT_SIZE_MAX), **FILES}

    assert decode_metadata(encode_metadata(largest)) == largest
    larger = {**largest, root_name(2): bytes(ROOT_SIZE_MAX + 1)}
    assert section_refused(encode_metadata(larger)) is TrustStatus.TOO_LARGE
    assert section_refused(bytes(METADATA_SIZE_MAX + 1)) is TrustStatus.TOO_LARGE


def test_nothing_is_written_that_could_not_be_read() -> None:
    with pytest.raises(Untrusted):
        _ = encode_update({TARGETS: b""})


def test_the_number_of_a_root_is_in_its_name() -> None:
    for number in (1, 9, 10, NUMBER_MAX):
        assert root_version(root_name(number)) == number


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    for attempt in (data, header(len(data)) + data, encode_update(FILES)[:20] + data):
        try:
            _ = read(attempt)
        except Untrusted as error:
            assert str(error).isprintable()


# ---------------------------------------------------------------- what is kept

STATES = st.builds(
    TrustState,
    anchor=st.binary(min_size=32, max_size=32),
    root=st.binary(max_size=100),
    timestamp=st.integers(0, NUMBER_MAX),
    timestamp_digest=st.binary(min_size=32, max_size=32),
    snapshot=st.integers(0, NUMBER_MAX),
    targets=st.integers(0, NUMBER_MAX),
    time_floor=st.integers(0, NUMBER_MAX),
    version_floor=st.integers(0, NUMBER_MAX),
)


@given(STATES)
def test_what_is_kept_comes_back(state: TrustState) -> None:
    assert decode_state(state.encode()) == state


def test_what_is_kept_fits_a_value_of_statefs() -> None:
    largest = TrustState(
        anchor=bytes(32),
        root=bytes(ROOT_SIZE_MAX),
        timestamp=NUMBER_MAX,
        snapshot=NUMBER_MAX,
        targets=NUMBER_MAX,
        time_floor=NUMBER_MAX,
        version_floor=NUMBER_MAX,
    )

    assert len(largest.encode()) <= STATE_SIZE_MAX <= 64 * 1024


def test_a_state_of_a_later_format_is_refused() -> None:
    data = Publisher().new_state().encode()
    assert data[1] == 1

    with pytest.raises(Untrusted) as caught:
        _ = decode_state(data[:1] + b"\x02" + data[2:])

    assert caught.value.status is TrustStatus.DEVICE


def test_a_floor_is_only_raised() -> None:
    state = Publisher().new_state(5)

    assert state.raised(4) == state
    assert state.raised(6).version_floor == 6
