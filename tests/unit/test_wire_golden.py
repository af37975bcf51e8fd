from pathlib import Path
from typing import Annotated

import pytest

from nexus.testing.golden import check, drift, is_complete, lines, protocols
from nexus.wire import I64, U32, Message, Protocol, Request
from tests.fakes.adder import ADDER, Add

GOLDEN = Path(__file__).resolve().parent.parent / "golden"


class Sum2(Message):
    """Sum with a field more."""

    value: Annotated[int, I64()]
    more: Annotated[int, U32()]


class Add2(Request[Sum2], op=1, idempotent=True):
    """Add with another reply."""

    a: Annotated[int, U32()]
    b: Annotated[int, U32()]


def test_the_frames_of_every_protocol_are_the_recorded_ones() -> None:
    assert check(GOLDEN, write=False) == []


def test_every_protocol_has_a_number_and_a_name_of_its_own() -> None:
    found = protocols()

    assert len({protocol.number for protocol in found}) == len(found)
    assert len({protocol.name for protocol in found}) == len(found)


def test_a_changed_frame_without_a_new_version_is_refused(tmp_path: Path) -> None:
    before = Protocol("adder", number=900, version=1, requests=(Add,))
    after = Protocol("adder", number=900, version=1, requests=(Add2,))
    assert check(tmp_path, write=True, declared=[before]) == []

    faults = check(tmp_path, write=True, declared=[after])

    assert len(faults) >= 3
    assert "the version is still 1" in faults[0]
    assert (tmp_path / "adder.txt").read_text("ascii").splitlines() == list(lines(before))


def test_a_removed_request_without_a_new_version_is_refused() -> None:
    fewer = Protocol("adder", number=900, version=1, requests=(Add,))

    assert drift(fewer, list(lines(ADDER)))


def test_a_changed_frame_with_a_new_version_is_written(tmp_path: Path) -> None:
    before = Protocol("adder", number=900, version=1, requests=(Add,))
    after = Protocol("adder", number=900, version=2, requests=(Add2,))
    assert check(tmp_path, write=True, declared=[before]) == []

    assert check(tmp_path, write=False, declared=[after]) != []
    assert check(tmp_path, write=True, declared=[after]) == []
    assert check(tmp_path, write=False, declared=[after]) == []


def test_a_new_request_keeps_the_version_and_has_to_be_recorded() -> None:
    before = list(lines(Protocol("adder", number=900, version=1, requests=(Add,))))

    assert drift(ADDER, before) == []
    assert not is_complete(ADDER, before)


@pytest.mark.parametrize("protocol", protocols(), ids=lambda protocol: protocol.name)
def test_golden_frames_are_accepted_by_their_own_decoders(protocol: Protocol) -> None:
    for line in list(lines(protocol))[1:]:
        name, _, data = line.rpartition(" ")
        body = bytes.fromhex(data)[48:]
        codec = next(
            c for c in protocol.codecs.values() if c.request_type.__name__ == name.split()[0]
        )
        decode = codec.decode_reply if name.endswith("reply") else codec.decode_request
        decode(body)
