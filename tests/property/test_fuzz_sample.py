import random  # noqa: TID251 (seeded; the fuzzer's own generator)

import pytest

from fuzz.decoders import campaign, fuzz, main, mutate
from nexus.wire import RemoteProtocolError

SAMPLE_COUNT = 5_000  # frames per decoder in `make test`


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
