"""How the loader of a run learns how the boot before ended: from the runner, or from init alone."""

import json
from pathlib import Path
from typing import Final

import msgspec

from nexus.bootctl import TrialFailure
from nexus.loader.choose import Ended
from nexus.proof.loading import BOOT_MEMORY_NAME, ENDED, end_before

FAILURE: Final = TrialFailure(
    slot="b",
    version=2,
    attempt=1,
    boot=1,
    at=5,
    trace="11" * 16,
    service="app",
    reason="not ready",
    detail="not ready after 5 s",
)


def remember(state: Path) -> None:
    _ = (state / BOOT_MEMORY_NAME).write_bytes(msgspec.json.encode({"trial": FAILURE}))


def test_before_the_first_boot_nothing_is_known(tmp_path: Path) -> None:
    assert end_before(tmp_path) is None


def test_on_a_board_without_a_runner_the_word_of_init_is_known(tmp_path: Path) -> None:
    remember(tmp_path)

    assert end_before(tmp_path) == Ended(failure=FAILURE)


def test_what_the_runner_saw_is_known_beside_the_word_of_init(tmp_path: Path) -> None:
    remember(tmp_path)
    seen = {"code": 4, "signal": 0, "is_hung": False, "lines": [["init", "init: app is late"]]}
    _ = (tmp_path / ENDED).write_text(json.dumps(seen), "utf-8")

    ended = end_before(tmp_path)

    assert ended is not None
    assert (ended.code, ended.failure) == (4, FAILURE)
    assert "init: app is late" in ended.tail
