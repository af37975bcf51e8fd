"""Settings that change while the system runs: who is told, what they do, what is refused."""

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from nexus.ipc import Refused
from nexus.protocols.init import InitStatus, Reloading, ReloadOutcome, ReloadSettings
from nexus.protocols.meta import Configure
from nexus.protocols.metricsd import Add, Label, MetricsdStatus, Taken
from nexus.wire import ReplyStatus
from tests.fakes.initrig import MS
from tests.fakes.metricrig import MetricHands, SimMachine, lines_of, text_of

pytestmark = pytest.mark.sim


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> SimMachine:
    return SimMachine(monkeypatch)


async def reloaded(hands: MetricHands) -> dict[str, str]:
    done = await hands.reply(ReloadSettings(), Reloading)
    assert done.told == sum(row.outcome is not ReloadOutcome.AT_START for row in done.services)
    rows = {row.name: row.outcome.name for row in done.services}
    return {**rows, "ignored": str(done.ignored)}


def noise(number: int) -> Add:
    return Add("noise", [Label("n", str(number))], 1)


def test_a_lowered_cap_is_in_force_at_once_and_takes_nothing_away(machine: SimMachine) -> None:
    async def script(hands: MetricHands) -> Any:
        assert [await hands.metricsd(noise(each)) for each in range(3)] == [Taken()] * 3
        rows = await reloaded(hands)
        old = await hands.metricsd(noise(0))
        new = await hands.metricsd(noise(9))
        stats = await hands.stats()
        kept = len(await hands.series("noise"))
        return [
            rows,
            old == Taken(),
            new == Refused(MetricsdStatus.OVER_LIMIT),
            kept,
            [stats.series_per_metric_max, stats.settings_generation],
        ]

    result = machine.boot(script, files=[text_of("series_per_metric = 2")]).result()

    assert result == [{"metricsd": "IN_FORCE", "ignored": "0"}, True, True, 3, [2, 2]]


def test_settings_that_are_not_taken_change_nothing_and_are_told_again(
    machine: SimMachine,
) -> None:
    async def script(hands: MetricHands) -> Any:
        first, second = await reloaded(hands), await reloaded(hands)
        stats = await hands.stats()
        return [first, second, stats.series_max, stats.settings_generation]

    bad = text_of("series = 0")
    first, second, most, generation = machine.boot(script, files=[bad, bad]).result()

    assert first == second == {"metricsd": "REFUSED", "ignored": "0"}
    assert (most, generation) == (128, 1)


def test_the_next_instance_has_the_settings_that_were_taken(machine: SimMachine) -> None:
    async def script(hands: MetricHands) -> Any:
        rows = await reloaded(hands)
        await hands.kill("metricsd")
        await hands.nap(200 * MS)
        return [rows["metricsd"], (await hands.stats()).series_max]

    assert machine.boot(script, files=[text_of("series = 99")]).result() == ["IN_FORCE", 99]


def wrong(text: str) -> str:
    return text.replace('name = "metrics"', 'name = "another"')


def broken(text: str) -> str:
    return text.replace("[system]", "[systems]")


@pytest.mark.covers("init.BAD_SYSTEM_FILE")
@pytest.mark.parametrize("spoilt", [wrong, broken])
def test_another_system_and_no_system_at_all_are_refused(
    machine: SimMachine, spoilt: Callable[[str], str]
) -> None:
    async def script(hands: MetricHands) -> Any:
        refused = await hands.ask(ReloadSettings())
        return [refused == Refused(InitStatus.BAD_SYSTEM_FILE), (await hands.stats()).series_max]

    outcome = machine.boot(script, files=[spoilt(text_of("series = 99"))])

    assert outcome.result() == [True, 128]
    assert "init: settings not read" in lines_of(outcome)


def test_what_is_no_setting_takes_a_restart_of_the_system_and_is_counted(
    machine: SimMachine,
) -> None:
    async def script(hands: MetricHands) -> Any:
        return await reloaded(hands)

    changed = (
        text_of()
        .replace("[service.policyd]", "[service.policyd]\nmemory = '77MiB'")
        .replace('stage = "core"', 'stage = "rest"')
    )

    assert machine.boot(script, files=[changed]).result() == {"ignored": "2"}


def test_only_init_says_what_the_settings_are(machine: SimMachine) -> None:
    async def script(hands: MetricHands) -> Any:
        packed = msgspec.msgpack.encode({"series": 1})
        refused = await hands.metricsd(Configure(packed))
        return [refused == Refused(ReplyStatus.DENIED), (await hands.stats()).series_max]

    assert machine.boot(script).result() == [True, 128]


def test_a_service_that_cannot_change_them_says_so_and_has_them_next_time(
    machine: SimMachine,
) -> None:
    async def script(hands: MetricHands) -> Any:
        rows = await reloaded(hands)
        await hands.kill("statefsd")
        await hands.nap(200 * MS)
        return [rows, (await reloaded(hands))]

    changed = text_of().replace(
        "[service.metricsd]",
        '[service.statefsd.settings]\nquota = "3MiB 1000"\n\n[service.metricsd]',
    )

    first, second = machine.boot(script, files=[changed, changed]).result()

    assert first == {"statefsd": "NEEDS_RESTART", "ignored": "0"}
    assert second == {"ignored": "0"}
