import pytest

from fuzz.images import campaign, main, seeds, try_image
from nexus.services.statefsd.engine import Store, journal

SAMPLE_COUNT = 150  # images in `make test`; 2 000 and more in `make fuzz`


def test_any_image_opens_or_is_refused_with_a_reason() -> None:
    counts = campaign(SAMPLE_COUNT, seed=1)

    assert counts.accepted + counts.refused == SAMPLE_COUNT
    assert counts.accepted > 10
    assert counts.refused > 10


def test_the_images_mutations_start_from_open() -> None:
    assert all(try_image(image) for image in seeds())


def test_an_opening_that_ends_otherwise_is_not_swallowed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> None:
        raise IndexError("beyond the image")

    monkeypatch.setattr(journal, "parse_footer", broken)

    with pytest.raises(IndexError):
        _ = campaign(2_000, seed=1)
    assert "the image was" in capsys.readouterr().err


def test_an_engine_that_refuses_nothing_is_a_fault(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fuzz.images.try_image", lambda _: True)

    assert main(["--images", "5"]) == 1
    assert "NOT TESTED" in capsys.readouterr().out


def test_an_image_that_takes_too_much_memory_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[bytes] = []

    def greedy(self: Store) -> bool:
        held.append(bytes(32 << 20))
        return True

    monkeypatch.setattr(Store, "writable", property(greedy))

    with pytest.raises(AssertionError, match="bytes for one image"):
        _ = campaign(20, seed=1)
