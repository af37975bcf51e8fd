"""metricsd between processes of the Linux kernel: floods, SIGKILL at random moments, two boots."""

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from random import Random  # noqa: TID251 (the moments of a test, from a seed)
from typing import Any, Final

import pytest

from nexus.abi import CapDerive, Event, EventKind, Now, Rights, Slot, VmoCreate, VmoShare
from nexus.ipc import Answer
from nexus.protocols.metricsd import (
    Add,
    CreateSeries,
    GetStats,
    Kind,
    Label,
    OpenPage,
    Resolution,
    SeriesCreated,
    Stats,
    Taken,
)
from nexus.telemetry import PageWriter
from tests.fakes.initrig import MS, SECOND
from tests.fakes.metricrig import DRIVER, MetricHands, boot_linux, text_of

pytestmark = [pytest.mark.linux, pytest.mark.slow]

FLOOD: Final = 100_000  # label sets
MEASURE: Final = "measure"
GROWTH_MAX: Final = 2048  # KiB of metricsd's memory, whatever comes
PAGE_SIZE: Final = 8 * 1024
KILLS: Final = 30
SEED: Final = 5


@pytest.fixture
def directory() -> Iterator[Path]:
    """A state directory."""
    made = Path(tempfile.mkdtemp(prefix="nx"))
    yield made
    shutil.rmtree(made)


async def flood(hands: MetricHands) -> Any:
    """As many label sets as there are, one after the other, once the system is ready."""
    until = await hands.ahead(2 * SECOND)
    while await Now() < until:
        _ = await hands.server.step(until)
    answers: dict[str, int] = {}
    for number in range(FLOOD):
        outcome = await hands.metricsd(Add("noise", [Label("n", str(number))], 1))
        word = getattr(getattr(outcome, "status", None), "name", "taken")
        answers[word] = answers.get(word, 0) + 1
    return answers


async def calm(hands: MetricHands) -> Any:
    """Somebody else, while the flood comes: the longest call (ns), and who was refused."""
    await hands.say(MEASURE)
    longest = 0
    while True:
        begun = await Now()
        assert await hands.metricsd(Add("hits", [], 1)) == Taken()
        longest = max(longest, await Now() - begun)
        rows = [row for row in (await hands.stats()).rows if row.service not in (0, DRIVER)]
        heard = sum(
            row.accepted + row.over_limit + row.rate_limited + row.invalid_args for row in rows
        )
        if heard >= FLOOD:
            break
        await hands.nap(20 * MS)
    await hands.say(MEASURE)
    return [longest, heard, len(await hands.series("noise")), (await hands.stats()).series]


def rss_of(pid: int) -> int:
    """Resident memory, KiB."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1])
    raise AssertionError("no VmRSS")


def test_a_flood_of_1e5_label_sets_stays_in_memory_and_holds_up_nobody(
    monkeypatch: pytest.MonkeyPatch, directory: Path
) -> None:
    sizes: list[int] = []

    def on_event(event: Event, pids: Mapping[str, int]) -> None:
        if event.kind is EventKind.CONSOLE and event.fields["line"] == MEASURE:
            sizes.append(rss_of(pids["metricsd"]))

    outcome = boot_linux(
        monkeypatch,
        calm,
        directory=directory,
        text=text_of("rate = 65536", ["flood"]),
        clients={"flood": flood},
        on_event=on_event,
        seconds=120,
    )

    longest, heard, kept, series = outcome.result()
    answers = outcome.result("flood")
    before, after = sizes
    assert sum(answers.values()) == heard == FLOOD
    assert answers["taken"] == kept == 16
    assert series == 17
    assert after - before < GROWTH_MAX
    assert longest < 2 * SECOND, "the others' calls meet their deadlines"


async def opened(hands: MetricHands, memory: Slot) -> int:
    """Show metricsd the page in `memory`, and the word of its counter."""
    moving = await CapDerive(memory, Rights.MAP)
    answer = await hands.client("metricsd").ask(OpenPage(), await hands.ahead(SECOND), move=moving)
    assert isinstance(answer, Answer), answer
    made = await hands.metricsd(CreateSeries(Kind.COUNTER, "paged", [], [], ""))
    assert isinstance(made, SeriesCreated), made
    return made.word


async def is_after(hands: MetricHands, generation: int) -> bool:
    """Whether an instance later than this one answers."""
    record = await hands.service("metricsd")
    return record.generation > generation and isinstance(await hands.metricsd(GetStats()), Stats)


async def killing(hands: MetricHands) -> Any:
    """Count in a page while metricsd is killed again and again."""
    moments = Random(SEED)
    memory = await VmoCreate(PAGE_SIZE)
    page = PageWriter(await VmoShare(memory))
    word = await opened(hands, memory)
    for _ in range(KILLS):
        for _ in range(moments.randrange(1, 12)):
            page.words[word] += 1
            await hands.nap(moments.randrange(1, 15) * MS)
        before = (await hands.service("metricsd")).generation
        await hands.kill("metricsd")
        page.words[word] += 1
        await hands.until(partial(is_after, hands, before))
        word = await opened(hands, memory)
    kept = await until_kept(hands, page.words[word])
    stats = await hands.stats()
    return [
        page.words[word],
        kept,
        stats.recovery_lost,
        stats.segments <= stats.segments_max and stats.windows_long <= stats.windows_max,
    ]


async def until_kept(hands: MetricHands, value: int) -> int:
    """What the history has of the counter, as soon as that is all of it."""
    kept = 0
    until = await hands.ahead(20 * SECOND)
    while kept != value and await Now() < until:
        await hands.nap(100 * MS)
        kept = sum(each.sum for each in await hands.history("paged", Resolution.LONG))
    return kept


async def looking(hands: MetricHands, value: int) -> Any:
    """What is known after the next boot."""
    return [await until_kept(hands, value), (await hands.stats()).recovery_lost]


def test_random_kills_lose_no_count_of_a_page_and_the_next_boot_knows_them(
    monkeypatch: pytest.MonkeyPatch, directory: Path
) -> None:
    text = text_of("windows = 64")

    value, counted, damaged, bounded = boot_linux(
        monkeypatch, killing, directory=directory, text=text, seconds=120
    ).result()
    again, lost = boot_linux(
        monkeypatch, partial(looking, value=value), directory=directory, text=text
    ).result()

    assert counted == value
    assert (damaged, bounded) == (0, True)
    assert (again, lost) == (value, 0)
