"""The readers of living memory against whoever writes into it."""

import pytest

from fuzz.memory import Counts, campaign, main

TURNS = 1_500  # in `make test`; 20 000 in `make campaign`


def test_no_writer_makes_a_reader_raise_or_lose_count() -> None:
    found = campaign(TURNS, seed=1)

    assert set(found) == {"ring", "page"}
    assert all(each.accepted > TURNS / 10 and each.refused > 10 for each in found.values())


def test_a_reader_that_refuses_nothing_is_a_fault(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fuzz.memory.campaign", lambda *_: {"ring": Counts()})

    assert main(["--turns", "5"]) == 1
    assert "NOT TESTED" in capsys.readouterr().out
