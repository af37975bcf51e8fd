"""A sample of power cuts of a real machine; all of them are tried by `make campaign`."""

from pathlib import Path

import pytest

from nexus.vm import qemu
from nexus.vm.image import Image
from nexus.vm.writelog import Cut, Entry, Kind
from tests.vm import powercut
from tests.vm.powercut import COUNT, KEYS, Recorded, problem_of, problems, record

KEEPER = Path(__file__).parent / "keeper/src/keeper.py"


@pytest.mark.vm
@pytest.mark.slow
@pytest.mark.parametrize("by_linux", [False, True], ids=["by statefsd", "by Linux"])
def test_nothing_that_was_acknowledged_is_lost_at_any_flush_of_a_machine(
    by_linux: bool,
    image: Image,
    tmp_path: Path,
) -> None:
    recorded = record(image, tmp_path, by_linux=by_linux)

    assert len(recorded.kept) == COUNT, recorded.console
    tried, found = problems(recorded, every=5)
    assert found == []
    assert tried >= COUNT // 5


@pytest.mark.vm
@pytest.mark.slow
@pytest.mark.parametrize("by_linux", [False, True], ids=["by statefsd", "by Linux"])
def test_a_flush_that_is_missing_is_found(by_linux: bool, image: Image, tmp_path: Path) -> None:
    recorded = record(image, tmp_path, by_linux=by_linux, forgetful=True)

    assert len(recorded.kept) == COUNT, recorded.console
    _tried, found = problems(recorded, every=1)
    assert found != []


def test_the_system_under_the_cuts_keeps_what_is_looked_for() -> None:
    text = KEEPER.read_text("utf-8")

    assert f"KEYS: Final = {KEYS}\n" in text
    assert f"COUNT: Final = {COUNT}\n" in text


def test_a_word_counts_from_the_length_that_the_log_had_then() -> None:
    ended = qemu.Ended(0, timed_out=False, stopped=True, alarm="", lost=0)
    kept = [powercut.Kept(1, 2), powercut.Kept(2, 6)]
    recorded = Recorded(before=b"", entries=[], kept=kept, ended=ended, console=[])

    assert [recorded.durable(after) for after in (1, 2, 5, 6, 9)] == [0, 1, 1, 2, 2]


def test_a_disk_without_a_store_is_a_problem_once_something_was_durable() -> None:
    blank = Recorded(
        before=bytes(1024 * 1024),
        entries=[Entry(Kind.FLUSH, 0, 0, b"")],
        kept=[powercut.Kept(1, 1)],
        ended=qemu.Ended(0, timed_out=False, stopped=True, alarm="", lost=0),
        console=[],
    )

    tried, found = problems(blank, every=1)

    assert tried == 2
    assert found == ["after 1 entries without (): no store: nothing was ever written to the disk"]
    assert problem_of(Cut(0, (), blank.before), 0) == ""
