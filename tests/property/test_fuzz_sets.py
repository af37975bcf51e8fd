import pytest

from fuzz.sets import campaign, main, seeds, try_set
from nexus.sets import Pass, SetStatus, reader

SAMPLE_COUNT = 600  # sets in `make test`; 20 000 in the campaign


def test_any_set_is_unpacked_or_refused_with_a_reason() -> None:
    counts = campaign(SAMPLE_COUNT, seed=1)

    assert counts.accepted + counts.refused == SAMPLE_COUNT
    assert counts.accepted > 10
    assert len(counts.statuses) > len(SetStatus) - 3


def test_the_sets_mutations_start_from_are_right() -> None:
    assert [try_set(data) for data in seeds()] == [None, None]


def test_a_reader_that_ends_otherwise_is_not_swallowed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> None:
        raise IndexError("beyond the set")

    monkeypatch.setattr(reader, "plain", broken)

    with pytest.raises(IndexError):
        _ = campaign(50, seed=1)
    assert "the set was" in capsys.readouterr().err


def test_a_reader_that_refuses_nothing_is_a_fault(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fuzz.sets.try_set", lambda _: None)

    assert main(["--sets", "5"]) == 1
    assert "NOT TESTED" in capsys.readouterr().out


def test_a_set_that_takes_too_much_memory_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[bytes] = []

    def greedy(self: Pass, data: bytes) -> None:
        held.append(bytes(32 << 20))

    monkeypatch.setattr(Pass, "_taken", greedy)

    with pytest.raises(AssertionError, match="bytes for one set"):
        _ = campaign(20, seed=1)
