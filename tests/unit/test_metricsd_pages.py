"""The pages metricsd keeps open: so many and no more."""

from typing import Any

import pytest

from nexus.abi import SleepUntil, VmoCreate, VmoShare
from nexus.ipc import Answer, Exchange, Refused
from nexus.protocols.metricsd import MetricsdStatus, OpenPage, PageOpened
from nexus.services.metricsd import service as service_module
from nexus.telemetry import PageWriter
from tests.fakes.pair import FAR
from tests.unit.test_metricsd_service import PAGE_SIZE, System


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
