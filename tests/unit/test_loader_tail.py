"""What a boot that failed is remembered by."""

from nexus.bootctl import TAIL_SIZE_MAX
from nexus.loader.tail import FAILED, LINE_SIZE_MAX, OWN_SHARE, ConsoleLine, last_words


def lines(*texts: str) -> list[ConsoleLine]:
    return [ConsoleLine(text.split(":")[0], text) for text in texts]


def test_a_short_console_is_kept_whole_and_in_order() -> None:
    said = ("init: start", "pump: waiting", "init: up")

    assert last_words(lines(*said), "pump") == "\n".join(said)


def test_how_the_system_was_stopped_is_left_out() -> None:
    said = lines("pump: waiting", f"{FAILED} (slot a)", "init: end of pump", "init: stopped")

    assert last_words(said, "pump") == f"pump: waiting\n{FAILED} (slot a)"


def test_the_service_at_fault_keeps_its_share_however_much_the_others_say() -> None:
    others = [f"timed: line {number:04}" for number in range(1000)]

    kept = last_words(lines("pump: my last words", *others), "pump").splitlines()

    assert kept[0] == "pump: my last words"
    assert kept[-1] == others[-1]
    assert kept[1:] == others[-len(kept) + 1 :]


def test_a_service_that_says_much_leaves_room_for_the_others() -> None:
    own = [f"pump: line {number:04}" for number in range(1000)]

    kept = last_words(lines("init: start", *own, "init: up pump"), "pump").splitlines()

    assert kept[-1] == "init: up pump"
    assert own[-1] in kept


def test_without_a_service_at_fault_the_last_lines_are_kept() -> None:
    said = [f"timed: line {number:04}" for number in range(1000)]

    kept = last_words(lines(*said), "").splitlines()

    assert kept == said[-len(kept) :]


def test_what_is_kept_has_room_in_a_record_whatever_was_said() -> None:
    wide = ["pump: " + "ü" * 4000, "timed: " + "ß" * 4000] * 20

    kept = last_words(lines(*wide), "pump")

    assert 0 < len(kept.encode()) <= TAIL_SIZE_MAX
    assert all(len(line.encode()) <= LINE_SIZE_MAX for line in kept.splitlines())
    assert OWN_SHARE < TAIL_SIZE_MAX


def test_of_nothing_nothing_is_kept() -> None:
    assert last_words([], "pump") == ""
