"""metricsd in a system of its own on the simulated kernel: history over restarts, boots and cuts."""

from typing import Any, Final

import pytest

from nexus.protocols.metricsd import Add, Resolution, SetGauge, Taken
from nexus.protocols.statefsd import Get, Value
from nexus.services.metricsd.wal import segment_key
from tests.fakes.initrig import MS
from tests.fakes.metricrig import MetricHands, SimMachine, lines_of

pytestmark = pytest.mark.sim

ACTIVE: Final = "[INFO metricsd] retention wal active"
BEGIN: Final = "begin"


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> SimMachine:
    return SimMachine(monkeypatch)


async def add(hands: MetricHands, value: int = 1, name: str = "hits") -> None:
    assert await hands.metricsd(Add(name, [], value)) == Taken()


async def is_active(hands: MetricHands) -> bool:
    return (await hands.stats()).segments > 0


async def killed(hands: MetricHands) -> None:
    """Kill metricsd, and wait for the next one."""
    await hands.kill("metricsd")
    _ = await hands.stats()


async def total(hands: MetricHands, resolution: Resolution = Resolution.SHORT) -> int:
    return sum(each.sum for each in await hands.history("hits", resolution))


def test_the_wal_is_told_active_when_a_segment_was_read_back_equal(machine: SimMachine) -> None:
    async def script(hands: MetricHands) -> Any:
        await add(hands, 7)
        await hands.nap(400 * MS)
        found = [await hands.state(Get(segment_key(slot).encode())) for slot in range(4)]
        return [len(each.value) for each in found if isinstance(each, Value)]

    outcome = machine.boot(script)

    (evidence,) = outcome.evidence(ACTIVE)
    assert evidence["size"] in outcome.result()
    assert evidence["key"].startswith("/state/observability/metricsd/wal/seg_")


def test_history_goes_on_after_a_kill_and_after_a_boot(machine: SimMachine) -> None:
    async def first(hands: MetricHands) -> Any:
        await add(hands, 7)
        assert await hands.metricsd(SetGauge("level", [], -3)) == Taken()
        await hands.nap(350 * MS)
        await killed(hands)
        await add(hands, 4)
        await hands.nap(1200 * MS)
        stats = await hands.stats()
        gauge = await hands.history("level")
        return [
            await total(hands),
            await total(hands, Resolution.LONG),
            stats.recovered,
            [gauge[0].min, gauge[0].max, gauge[0].last],
        ]

    async def second(hands: MetricHands) -> Any:
        await add(hands, 5)
        await hands.nap(700 * MS)
        windows = await hands.history("hits")
        return [
            await total(hands),
            await total(hands, Resolution.LONG),
            [each.sum for each in windows],
            sorted({each.start for each in windows}) == [each.start for each in windows],
        ]

    outcome = machine.boot(first)
    short, long, recovered, level = outcome.result()
    again = machine.boot(second).result()

    assert (short, long) == (11, 11)
    assert level == [-3, -3, -3]
    assert again == [16, 16, [7, 4, 5], True]
    assert recovered >= 0
    assert lines_of(outcome).count(ACTIVE) == 1
    assert f"{ACTIVE} again" in lines_of(outcome)
