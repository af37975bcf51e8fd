import random  # noqa: TID251 (seeded; the fuzzer's own generator)
from typing import Any

import pytest

from fuzz.decoders import campaign, fuzz, main, mutate, targets
from nexus.init.desk import Desk, Refused
from nexus.protocols.init import PROTOCOL as INIT
from nexus.wire import HEADER_SIZE, RemoteProtocolError, ReplyStatus

SAMPLE_COUNT = 2_000  # frames per decoder in `make test`; a hundred times as many in the campaign


def test_every_decoder_and_server_loop_takes_mutated_frames() -> None:
    counts = campaign(SAMPLE_COUNT, seed=1)

    assert len(counts) > 20
    assert {sum(each) for each in counts.values()} == {SAMPLE_COUNT}
    assert [
        name for name, (accepted, refused) in counts.items() if not (accepted and refused)
    ] == []


def test_the_same_seed_gives_the_same_counts() -> None:
    assert campaign(50, seed=7) == campaign(50, seed=7)


def test_an_unexpected_exception_is_not_swallowed(capsys: pytest.CaptureFixture[str]) -> None:
    def broken(body: bytes) -> None:
        raise IndexError(len(body))

    with pytest.raises(IndexError):
        fuzz(broken, [b"seed"], random.Random(1), 10)
    assert "the input was" in capsys.readouterr().err


def test_a_decoder_that_refuses_nothing_is_a_fault(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fuzz.decoders.campaign", lambda *_: {"lenient": [5, 0], "good": [2, 3]})

    assert main(["--frames", "5"]) == 1
    assert "NOT TESTED" in capsys.readouterr().out


def test_mutations_reach_acceptance_and_refusal() -> None:
    rng = random.Random(3)

    def even(body: bytes) -> None:
        if len(body) % 2:
            raise RemoteProtocolError

    assert all(fuzz(even, [b"abcd", b"ef"], rng, 200))
    assert {mutate(rng, [b"abcd"]) for _ in range(100)} > {b"abcd"}


def _desk_fuzzed() -> list[int]:
    [(decoder, seeds)] = [
        (decoder, seeds) for name, decoder, seeds in targets(INIT) if name == "init desk"
    ]
    return fuzz(decoder, seeds, random.Random(1), 300)


def test_the_desk_of_init_answers_and_refuses() -> None:
    assert all(_desk_fuzzed())


def test_a_desk_that_lets_a_malformed_message_through_is_a_fault(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def decoded(_desk: Desk, _record: Any, message: Any, codec: Any) -> Any:
        if codec is None or codec.request_type not in INIT.codecs:
            raise Refused(ReplyStatus.MALFORMED)
        return codec.decode_request(message.data[HEADER_SIZE:])

    monkeypatch.setattr(Desk, "_decoded", decoded)

    with pytest.raises(AssertionError, match="ends the program"):
        _ = _desk_fuzzed()
    assert "the input was" in capsys.readouterr().err
