"""Silence is judged once all that came before a deadline was looked at, and not much later."""

from typing import Any, Final

import pytest

from nexus.abi import BootImage, Nanos
from nexus.init.hearing import Hearing
from nexus.init.supervisor import DRAIN_MAX
from nexus.protocols.meta import Health as Probe
from tests.fakes.initrig import (
    DRIVER,
    MS,
    SYSTEM,
    Boot,
    Driver,
    Main,
    boot,
    healthy,
    play,
    status,
)

__all__ = ["boot"]  # the fixture

QUEUED: Final = 3
WATCHED: Final = 'health = { deadline = "200ms", every = "50ms", answer = "40ms" }'
WORDS: Final = 600


def test_nothing_at_a_deadline_is_silence_up_to_it() -> None:
    hearing = Hearing(Nanos(10), QUEUED)

    hearing.on_nothing(Nanos(20))

    assert hearing.until == 20


def test_a_message_tells_nothing_of_those_that_wait_behind_it() -> None:
    hearing = Hearing(Nanos(10), QUEUED)

    for now in (30, 31, 32):
        hearing.on_taken(Nanos(now))

    assert hearing.until == 10


def test_more_than_can_have_waited_is_everything_that_came_before_the_first() -> None:
    hearing = Hearing(Nanos(10), QUEUED)

    for now in (30, 31, 32, 33):
        hearing.on_taken(Nanos(now))
    assert hearing.until == 30

    for now in (40, 41, 42):
        hearing.on_taken(Nanos(now))
    assert hearing.until == 30
    hearing.on_taken(Nanos(43))
    assert hearing.until == 40


def test_a_deadline_long_past_takes_nothing_back() -> None:
    hearing = Hearing(Nanos(10), 0)
    hearing.on_taken(Nanos(30))

    hearing.on_nothing(Nanos(20))

    assert hearing.until == 30


def deaf_after(count: int) -> Main:
    async def main(boot: BootImage) -> int:
        def script(request: Any, nth: int) -> bytes | None:
            if not isinstance(request, Probe):
                return status(boot)
            return healthy(boot) if nth <= count or boot.generation > 1 else None

        return await play(boot, script)

    return main


def test_a_queue_that_is_never_seen_empty_keeps_no_silent_one_alive(
    boot: Boot, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each word of the driver finds init with more to take, as under a flood."""
    monkeypatch.setattr(Hearing, "on_nothing", lambda _self, _deadline: None)
    text = SYSTEM + DRIVER + 'health = { every = "0s" }\n'
    text += f'\n[service.a]\nprogram = "a"\n{WATCHED}\n'

    async def driver(driver: Driver) -> None:
        for _ in range(WORDS):
            _ = await driver.record("timed")
            await driver.pause(MS)

    run = boot(driver, text=text, mains={"a": deaf_after(1)})

    assert run.evidence("init: end of a")["reason"] == "hang"
    due = run.time("init: health a ok") + 90 * MS  # 50 until it is asked, 40 for an answer
    assert due < run.time("init: end of a") < due + 2 * DRAIN_MAX * len(run.plan.services) * 2 * MS
