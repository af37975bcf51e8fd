"""metricsd in a system of its own on the simulated kernel: history over kills, boots and cuts."""

from functools import partial
from typing import Any, Final

import pytest

from nexus.abi import CapDerive, Rights, Slot, VmoCreate, VmoShare
from nexus.ipc import Answer
from nexus.kernel.sim.kernel import SimKernel
from nexus.kernel.sim.power import Cut, Moment
from nexus.protocols.metricsd import (
    Add,
    CreateSeries,
    GetStats,
    Kind,
    Label,
    MetricsdStatus,
    OpenPage,
    Resolution,
    SeriesCreated,
    SetGauge,
    Stats,
    Taken,
)
from nexus.protocols.statefsd import Get, Value
from nexus.services.metricsd.wal import segment_key
from nexus.telemetry import PageWriter
from tests.fakes.initrig import MS, SECOND
from tests.fakes.metricrig import DRIVER, MetricHands, SimMachine, lines_of, text_of

pytestmark = pytest.mark.sim

ACTIVE: Final = "[INFO metricsd] retention wal active"
BEGIN: Final = "begin"
PAGE_SIZE: Final = 8 * 1024


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> SimMachine:
    return SimMachine(monkeypatch)


async def add(hands: MetricHands, value: int = 1, name: str = "hits") -> None:
    assert await hands.metricsd(Add(name, [], value)) == Taken()


async def is_active(hands: MetricHands) -> bool:
    return (await hands.stats()).segments > 0


async def is_after(hands: MetricHands, generation: int) -> bool:
    """Whether an instance later than this one answers."""
    record = await hands.service("metricsd")
    return record.generation > generation and isinstance(await hands.metricsd(GetStats()), Stats)


async def killed(hands: MetricHands) -> None:
    """Kill metricsd, and wait for the next one."""
    before = (await hands.service("metricsd")).generation
    await hands.kill("metricsd")
    await hands.until(partial(is_after, hands, before))


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


async def counting(hands: MetricHands) -> Any:
    """One more every 10 ms, each told to the console when it is taken."""
    await add(hands)
    await hands.until(partial(is_active, hands))
    await hands.say(BEGIN)
    for number in range(2, 120):
        await add(hands)
        await hands.say(f"value {number}")
        await hands.nap(10 * MS)
    return 0


async def looking(hands: MetricHands) -> Any:
    """What is known of it after the next boot."""
    await add(hands, name="begun")
    await hands.nap(400 * MS)
    short = await hands.history("hits")
    long = await hands.history("hits", Resolution.LONG)
    stats = await hands.stats()
    return [
        sum(each.sum for each in short),
        sum(each.sum for each in long),
        [each.start for each in short],
        stats.recovery_lost,
        [stats.segments <= stats.segments_max, stats.windows_short <= stats.windows_max],
        sum(each.sum for each in await hands.history("begun")),
    ]


LOST_MAX: Final = 16
"""Counts that a cut may take: those of the WAL's interval (100 ms), of one reading (20 ms) and of
one write on its way, at one in 10 ms."""


@pytest.mark.parametrize(
    ("moment", "size"), [(Moment.BEFORE, 0), (Moment.INSIDE, 300), (Moment.AFTER, 0)]
)
def test_a_power_cut_at_any_write_loses_no_more_than_the_window_that_is_declared(
    monkeypatch: pytest.MonkeyPatch, moment: Moment, size: int
) -> None:
    reached = 0

    for write in range(1, 16):
        machine = SimMachine(monkeypatch)
        cut = Cut(write=write, moment=moment, size=size, task="driver", line=BEGIN)
        outcome = machine.boot(counting, on_machine=partial(SimKernel.cut_power, cut=cut))
        if not machine.off:
            break
        reached += 1
        taken = max(
            (int(line.split()[1]) for line in lines_of(outcome) if line.startswith("value ")),
            default=1,
        )
        short, long, starts, damaged, bounded, begun = machine.boot(looking).result()
        assert taken - LOST_MAX <= short <= taken + 1, (write, taken, short)
        assert long == short, (write, long, short)
        assert starts == sorted(set(starts))
        assert damaged == 0, "what the journal gives is whole"
        assert bounded == [True, True]
        assert begun == 1, "it serves, and counts on"

    assert reached > 5


async def opened(hands: MetricHands, memory: Slot) -> int:
    """Show metricsd the page in `memory`, and the word of its counter."""
    link = hands.client("metricsd")
    moving = await CapDerive(memory, Rights.MAP)
    answer = await link.ask(OpenPage(), await hands.ahead(SECOND), move=moving)
    assert isinstance(answer, Answer), answer
    made = await hands.metricsd(CreateSeries(Kind.COUNTER, "paged", [], [], ""))
    assert isinstance(made, SeriesCreated), made
    return made.word


def test_a_kill_at_any_moment_loses_nothing_of_what_is_counted_in_a_page(
    machine: SimMachine,
) -> None:
    async def script(hands: MetricHands) -> Any:
        memory = await VmoCreate(PAGE_SIZE)
        page = PageWriter(await VmoShare(memory))
        word = await opened(hands, memory)
        for number in range(16):
            page.words[word] += 3
            await hands.nap((11 + 17 * number) * MS)
            page.words[word] += 1
            await killed(hands)
            word = await opened(hands, memory)
        page.words[word] += 1
        await hands.nap(600 * MS)
        short = await hands.history("paged")
        long = await hands.history("paged", Resolution.LONG)
        stats = await hands.stats()
        return [
            page.words[word],
            sum(each.sum for each in short),
            sum(each.sum for each in long),
            short[-1].last,
            stats.recovery_lost,
            stats.segments <= stats.segments_max,
        ]

    value, short, long, last, damaged, bounded = machine.boot(script).result()

    assert value == short == long == last == 16 * 4 + 1
    assert damaged == 0
    assert bounded


def test_the_budget_of_wear_stops_the_writes_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    async def script(hands: MetricHands) -> Any:
        for _ in range(150):
            await add(hands)
            await hands.nap(20 * MS)
        first = await hands.stats()
        for _ in range(50):
            await add(hands)
            await hands.nap(20 * MS)
        stats = await hands.stats()
        (series,) = await hands.series("nexus_retention_writes_refused_total")
        warned = await hands.logged("event", "retention.budget.v1")
        return [
            first.written_today,
            stats.written_today,
            stats.written_max,
            stats.write_refused,
            series.value,
            len(warned),
            await total(hands) > 0,
        ]

    machine = SimMachine(monkeypatch, text_of("writes_per_day = 240"))
    first, written, most, refused, told, warned, served = machine.boot(script).result()

    assert first == written, "nothing was written any more"
    assert written <= most
    assert 0 < told <= refused
    assert warned == 1
    assert served, "what is in memory is told all the same"

    async def look(hands: MetricHands) -> Any:
        await add(hands)
        await hands.nap(1000 * MS)
        return (await hands.stats()).written_today

    assert written <= machine.boot(look).result() <= most, "what was spent is spent in any boot"


def test_a_flood_of_label_sets_is_refused_counted_and_holds_up_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    floods = 2000  # of 1e5 on linux; the bounds are the same

    async def flood(hands: MetricHands) -> Any:
        answers: dict[str, int] = {}
        for number in range(floods):
            outcome = await hands.metricsd(Add("noise", [Label("n", str(number))], 1))
            word = getattr(getattr(outcome, "status", None), "name", "taken")
            answers[word] = answers.get(word, 0) + 1
        return answers

    async def script(hands: MetricHands) -> Any:
        await hands.nap(20 * MS)
        for _ in range(20):
            await add(hands)
            await hands.nap(MS)
        await hands.until(partial(is_told, hands))
        stats = await hands.stats()
        noise = await hands.series("noise")
        row = next(each for each in stats.rows if each.service not in (0, DRIVER))
        return [
            len(noise),
            stats.series,
            row.accepted + row.over_limit + row.rate_limited + row.invalid_args,
            row.over_limit,
        ]

    async def is_told(hands: MetricHands) -> bool:
        rows = (await hands.stats()).rows
        return any(each.over_limit + each.rate_limited >= floods - 16 for each in rows)

    text = text_of("rate = 65536", ["flood"])
    outcome = SimMachine(monkeypatch, text).boot(script, clients={"flood": flood})

    kept, series, counted, over = outcome.result()
    assert outcome.result("flood") == {"taken": 16, MetricsdStatus.OVER_LIMIT.name: floods - 16}
    assert (kept, series, counted, over) == (16, 17, floods, floods - 16)
