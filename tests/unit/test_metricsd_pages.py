"""The pages metricsd keeps open: so many and no more, and read between barriers."""

from typing import Any

import pytest

from nexus.abi import Fence, Nanos, Pid, SleepUntil, VmoCreate, VmoShare, service_id
from nexus.ipc import Answer, Exchange, Refused
from nexus.protocols.metricsd import (
    Add,
    CreateSeries,
    Kind,
    MetricsdStatus,
    OpenPage,
    PageOpened,
    SeriesCreated,
    Taken,
)
from nexus.runtime import BINDS_MAX
from nexus.services.metricsd import service as service_module
from nexus.services.metricsd.pages import Page, read_values
from nexus.services.metricsd.series import Instance
from nexus.telemetry import Group, PageWriter
from nexus.telemetry.page import BUCKETS, COUNT, SUM
from tests.fakes.pair import FAR
from tests.unit.test_metricsd_service import PAGE_SIZE, System, read


def test_one_page_more_than_there_may_be_is_refused_until_another_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(service_module, "PAGES_MAX", 3)
    system = System()
    answers: list[Any] = []

    async def body(link: Exchange) -> None:
        for _ in range(2):  # the second time in place of the first
            slot = await VmoCreate(PAGE_SIZE)
            _ = PageWriter(await VmoShare(slot))
            answer = await link.ask(OpenPage(), FAR, move=slot)
            answers.append(type(answer.reply) if isinstance(answer, Answer) else answer)
        _ = await SleepUntil(FAR)

    first, *_ = [system.add_client(body, name=name) for name in ("one", "two", "three")]
    system.kernel.settle()
    _ = system.add_client(body, name="four")
    system.kernel.settle()
    system.kernel.end(first)
    system.kernel.settle()
    _ = system.add_client(body, name="five")
    system.kernel.settle()

    refused = Refused(MetricsdStatus.OVER_LIMIT)
    assert answers == [*[PageOpened] * 6, refused, refused, PageOpened, PageOpened]


def test_whoever_comes_when_every_link_is_taken_is_refused_and_not_left_waiting() -> None:
    system = System()
    answers: list[Any] = []

    async def body(link: Exchange) -> None:
        slot = await VmoCreate(PAGE_SIZE)
        _ = PageWriter(await VmoShare(slot))
        answers.append(await link.ask(OpenPage(), FAR, move=slot))
        _ = await SleepUntil(FAR)

    first, *_ = [system.add_client(body, name=f"task{number}") for number in range(BINDS_MAX)]
    system.kernel.settle()
    _ = system.add_client(body, name="late")
    with pytest.raises(AssertionError, match="Closed"):  # what Bind's BUSY is to ipc
        system.kernel.settle()
    refused = system.server.account.refused_binds
    busy = [each.count for each in system.server.account.refusal_rows()]
    system.kernel.end(first)
    system.kernel.settle()
    _ = system.add_client(body, name="later")
    system.kernel.settle()

    assert (refused, busy) == (1, [1])
    assert len(answers) == BINDS_MAX + 1
    assert all(isinstance(each, Answer) for each in answers)


@pytest.mark.parametrize(
    ("said", "since"), [(400, 400), (0, 1_000), (1 << 63, 1_000)], ids=["early", "none", "late"]
)
def test_a_series_is_told_since_when_its_task_counts_and_not_since_a_time_to_come(
    said: int, since: int
) -> None:
    system = System()

    async def body(link: Exchange) -> Any:
        slot = await VmoCreate(PAGE_SIZE)
        PageWriter(await VmoShare(slot)).begin(said)
        _ = await link.ask(OpenPage(), FAR, move=slot)
        _ = await SleepUntil(Nanos(5_000))
        created = CreateSeries(Kind.COUNTER, "strokes", [], [], "")
        assert isinstance(await link.call(created, FAR), SeriesCreated)
        assert isinstance(await link.call(Add("hits", [], 3), FAR), Taken)
        _ = await SleepUntil(FAR)

    _ = system.add_client(body, name="pump")
    system.kernel.settle()
    system.kernel.now = Nanos(5_000)
    system.kernel.settle()
    found = {each.name: (each.since, each.at) for each in read(system)}

    assert found == {"strokes": (since, 5_000), "hits": (5_000, 5_000)}


def test_an_update_whose_count_is_seen_last_is_found_by_the_barrier_behind_the_copy() -> None:
    """As tests/property/test_telemetry_weak_memory.py has it, of the passes that metricsd makes."""
    memory = memoryview(bytearray(PAGE_SIZE))
    words = PageWriter(memory).words
    page = Page(Instance(service_id("alpha"), 1, Pid(7)), memory, Nanos(1))
    first = page.reader.allot_group(2)
    assert first is not None
    words[first + COUNT], words[first + SUM], words[first + BUCKETS] = 1, 5, 1
    buffered: list[tuple[int, int]] = []  # stores that were issued and are not visible yet
    barriers = 0

    work = read_values([page])
    try:
        while True:
            assert isinstance(work.send(None), Fence)
            barriers += 1
            for word, value in buffered:
                words[word] = value
            buffered.clear()
            if barriers == 1:  # between the mark and the copy a second update is made
                buffered += [(first + COUNT, 2), (first + BUCKETS + 1, 1)]
                words[first + SUM] = 20
    except StopIteration:
        pass

    assert page.reader.group(first) == Group(2, 20, [1, 1])
    assert (page.reader.torn, page.reader.given_up) == (1, 0)
    assert barriers == 4, "two for each pass"
