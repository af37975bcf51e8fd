import pytest

from fuzz.trust import Scenario, campaign, judge, main
from nexus.trust import TrustStatus, verify

SAMPLE_COUNT = 1_000  # updates in `make test`; 20 000 in the campaign


def test_any_update_is_taken_or_refused_with_a_reason() -> None:
    counts = campaign(SAMPLE_COUNT, seed=1)

    assert counts.accepted + counts.refused == SAMPLE_COUNT
    assert counts.accepted > 10
    assert len(counts.statuses) > len(TrustStatus) - 4  # DEVICE is not of an update


def test_the_update_that_mutations_start_from_is_taken() -> None:
    scenario = Scenario()

    assert judge(scenario.state, scenario.updates[1]).timestamp == scenario.state.timestamp + 1


def test_a_verdict_that_ends_otherwise_is_not_swallowed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scenario = Scenario()
    monkeypatch.setattr("fuzz.trust.Scenario", lambda: scenario)

    def broken(*_: object) -> None:
        raise IndexError("beyond the update")

    monkeypatch.setattr(verify, "_target", broken)

    with pytest.raises(IndexError):
        _ = campaign(200, seed=1)
    assert "the update was" in capsys.readouterr().err


def test_a_verifier_that_refuses_nothing_is_a_fault(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fuzz.trust.judge", lambda *_: None)

    assert main(["--updates", "5"]) == 1
    assert "NOT TESTED" in capsys.readouterr().out
