"""rngd as a process: what it draws from, and that no two services draw or guess the same."""

import json
import random  # noqa: TID251 (what services must not share)
from collections.abc import Callable
from typing import Any, Final

import pytest

from nexus.abi import BootImage, ConsoleWrite, EventKind
from nexus.testing.rig import reporting
from tests.fakes.policyrig import Hands, Outcome, Script, boot_linux
from tests.fakes.rngdrig import SYSTEM, draw, source

pytestmark = pytest.mark.linux

TELLS: Final = "tells"
TWO: Final = (
    SYSTEM
    + """
[service.third]
program = "guard"
capabilities = ["rng.entropy"]
uses = { rngd = {} }
health = { deadline = "20s", every = "0s" }
"""
)
Boot = Callable[..., Outcome]


@pytest.fixture
def boot(monkeypatch: pytest.MonkeyPatch) -> Boot:
    """Boots the system with a script."""

    def run(script: Script, **options: Any) -> Outcome:
        return boot_linux(monkeypatch, script, **options)

    return run


async def tells(boot: BootImage) -> int:
    """Says what the module `random` gives it, and what rngd does. Only a test may."""
    hands = Hands(boot)
    await hands.begin(ready=False)
    said = {"number": random.getrandbits(64), "drawn": await draw(hands, 32)}
    await ConsoleWrite(TELLS, json.dumps(said).encode())
    _ = await draw(hands, 1)  # by which the driver sees that it was said
    return await hands.server.run()


def test_rngd_names_its_source_and_counts_what_it_gave(boot: Boot) -> None:
    async def script(hands: Hands) -> list[Any]:
        drawn = [await draw(hands, size) for size in (32, 32, 256, 257)]
        told = await source(hands)
        return [drawn, told.backing, told.fit, told.delivered, told.given_to_caller]

    outcome = boot(script, mains={"guard": reporting(tells)}, text=SYSTEM)
    drawn, backing, fit, delivered, given = outcome.result

    assert [len(each) // 2 for each in drawn[:3]] == [32, 32, 256]
    assert drawn[3] == "OVERSIZED"
    assert len({*drawn}) == 4
    assert backing in ("hwrng", "getrandom")
    assert fit
    assert given == 320
    assert delivered >= 1024 + 320
    ready = [
        event.fields["evidence"]
        for event in outcome.events
        if event.kind is EventKind.CONSOLE and event.fields["line"] == "rngd: ready"
    ]
    assert [evidence_of(each)["source"] for each in ready] == [backing]
    assert "rngd: mmio window mapped ok" not in outcome.lines(), "there is no window here"
    assert outcome.lines().count("rngd: policy allow") == 1


def test_two_forked_services_share_no_random_state_and_no_draw(boot: Boot) -> None:
    state = random.getstate()  # what every fork begins with
    ahead = random.getrandbits(64)
    random.setstate(state)

    async def script(hands: Hands) -> list[Any]:
        async def both() -> bool:
            return [row.given for row in (await source(hands)).clients] == [33, 33]

        _ = await hands.until(both)
        return []

    outcome = boot(script, text=TWO, mains={"guard": reporting(tells)})

    said = [
        evidence_of(event.fields["evidence"])
        for event in outcome.events
        if event.kind is EventKind.CONSOLE and event.fields["line"] == TELLS
    ]
    assert len(said) == 2
    assert len({ahead, *(each["number"] for each in said)}) == 3
    assert len({each["drawn"] for each in said}) == 2
    assert {len(each["drawn"]) for each in said} == {64}


def evidence_of(evidence: Any) -> Any:
    """Evidence as JSON says it."""
    return json.loads(evidence) if isinstance(evidence, str | bytes) else evidence
