import pytest

from fuzz.boots import campaign, main, seeds, try_device
from nexus.bootctl import environment

SAMPLE_COUNT = 600  # devices in `make test`; 20 000 and more in `make fuzz`


def test_any_boot_device_is_read_or_refused_with_a_reason() -> None:
    counts = campaign(SAMPLE_COUNT, seed=1)

    assert counts.accepted + counts.refused == SAMPLE_COUNT
    assert min(counts.accepted, counts.refused) > SAMPLE_COUNT // 20


def test_the_devices_mutations_start_from_are_read() -> None:
    assert [try_device(image) for image in seeds()] == [False] + [True] * (len(seeds()) - 1)


def test_a_reader_that_ends_otherwise_is_not_swallowed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(environment, "problem_of", lambda _: None)

    with pytest.raises(AssertionError):
        _ = campaign(2_000, seed=1)
    assert "the device was" in capsys.readouterr().err


def test_a_reader_that_refuses_nothing_is_a_fault(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fuzz.boots.try_device", lambda _: True)

    assert main(["--devices", "5"]) == 1
    assert "NOT TESTED" in capsys.readouterr().out
