"""The rung about exportd: what comes out of it is what metricsd has."""

from typing import Final

import msgspec

from nexus.abi import ConsoleWrite, Nanos
from nexus.ipc import RetryBudget, RetryTokens, retry_until
from nexus.protocols.exportd import GetStats, Stats
from nexus.protocols.ladder import SELFTEST
from nexus.protocols.metricsd import SERIES_ROWS_MAX, GetSeries
from nexus.services.selftest.climb import Climb
from nexus.services.selftest.rung import Evidence, expect

EXPORTD_NAME: Final = "exportd"
COUNTER: Final = "selftest.counter"  # that rung 123 has made
SCRAPE_LINE: Final = f"{SELFTEST}: scrape now"  # the runner does, from outside, when it reads this
SCRAPE_WAIT: Final = Nanos(10_000_000_000)  # ns; the runner has other things to read before
LOOKS_MAX: Final = 12  # with doubling pauses: 2 ms to 4 s
LOOK_PAUSE: Final = Nanos(2_000_000)  # ns


async def export_scrape(climb: Climb) -> Evidence:
    """#130: the runner scrapes when it is told to, and exportd has counted one page; what was on it
    the runner compares."""
    wanted = GetSeries(1, SERIES_ROWS_MAX, climb.boot.service, COUNTER)
    found = (await climb.call(climb.client("metricsd"), wanted)).series
    expect([(each.name, each.live) for each in found], [(COUNTER, True)], "series of that name")
    (series,) = found
    before = await _stats(climb)

    await ConsoleWrite(SCRAPE_LINE, msgspec.json.encode({"counter": COUNTER}))
    budget = RetryBudget(
        attempts_max=LOOKS_MAX, backoff=LOOK_PAUSE, deadline=await climb.ahead(SCRAPE_WAIT)
    )
    after = await retry_until(
        lambda: _stats(climb),
        lambda seen: seen.scrapes == before.scrapes,
        budget,
        RetryTokens(),
    )

    expect(after.scrapes - before.scrapes, 1, "pages that exportd has served")
    expect(after.scrapes_refused, before.scrapes_refused, "requests that exportd refused")
    return {
        "counter": COUNTER,
        "value": series.value,
        "labels": {label.key: label.value for label in series.labels},
        "scrapes": [before.scrapes, after.scrapes],
    }


async def _stats(climb: Climb) -> Stats:
    return await climb.call(climb.client(EXPORTD_NAME), GetStats())
