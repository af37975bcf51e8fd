"""logd's settings: what core senders may more than others, and new ones while it serves."""

from typing import Any, Final

import msgspec
import pytest

from nexus.abi import INIT_NAME, Nanos, Now, SleepUntil
from nexus.ipc import Exchange, Refused
from nexus.protocols.logd import Appended, Drain, GetStats, LogdStatus
from nexus.protocols.meta import Configure, Configured, MetaStatus
from nexus.services.logd.config import SIZE_MIN
from nexus.services.logd.senders import CORE_STREAMS
from tests.fakes.pair import FAR, Pair
from tests.unit.test_logd_service import asked, line, pair
from tests.unit.test_logd_streams import SECOND, every, stream
from tests.unit.test_logd_streams import line as record

RATE: Final = 10  # records a second, of the streams of an ordinary sender
MANY: Final = (CORE_STREAMS + 1) * RATE


def told(**settings: Any) -> Configure:
    return Configure(msgspec.msgpack.encode(settings))


def drained(system: Pair, name: str, *, windows: int = 1) -> list[int]:
    """How many of MANY records are taken in so many windows of its rate, together."""

    async def body(link: Exchange) -> list[int]:
        ring = await stream(link)
        for number in range(MANY):
            ring.put(record(f"{number}"))
        found = []
        for _ in range(windows):
            found.append((await link.call(Drain(), FAR)).accepted)  # type: ignore[union-attr]
            _ = await SleepUntil(Nanos(await Now() + SECOND))
        return found

    counts: list[int] = system.client(body, name=name)
    return counts


@pytest.mark.parametrize(("name", "count"), [("pump", RATE), ("audit", CORE_STREAMS * RATE)])
def test_the_streams_of_a_core_sender_have_several_times_the_rate_of_others(
    name: str, count: int
) -> None:
    system = pair(core="audit", stream_rate=RATE)

    assert drained(system, name, windows=2) == [count, min(MANY, 2 * count)]


def test_who_becomes_a_core_sender_and_who_is_one_no_more_has_the_rate_at_once() -> None:
    system = pair(core="audit", stream_rate=RATE)
    before = drained(system, "pump"), drained(system, "audit")
    system.kernel.now = Nanos(system.kernel.now + 2 * SECOND)

    configured = asked(system, told(core="pump", stream_rate=RATE))
    after = drained(system, "pump"), drained(system, "audit")

    assert configured == [Configured()]
    assert before == ([RATE], [CORE_STREAMS * RATE])
    assert after == ([CORE_STREAMS * RATE], [RATE])


def test_new_settings_make_the_journal_smaller_and_the_oldest_go() -> None:
    system = pair(records=30, core=INIT_NAME, core_rate=1000)
    _ = asked(system, *[line(f"{number}") for number in range(30)])

    configured, stats = asked(
        system, told(records=8, size=SIZE_MIN, core=INIT_NAME, core_rate=1000), GetStats()
    )
    kept = system.client(every, name=INIT_NAME)
    again, later = asked(system, line("newer"), GetStats())

    assert configured == Configured()
    assert (stats.capacity_records, stats.capacity_size) == (8, SIZE_MIN)
    assert (stats.total, stats.dropped, stats.used_records) == (30, 22, 8)
    assert kept == [f"{number}" for number in range(22, 30)]
    assert again == Appended(31, 23)
    assert later.used_records == 8


def test_new_settings_make_the_journal_larger_and_more_is_kept() -> None:
    system = pair(records=8, core=INIT_NAME, core_rate=1000)
    _ = asked(system, *[line(f"{number}") for number in range(8)])

    _ = asked(system, told(records=30, size="64KiB", core=INIT_NAME, core_rate=1000))
    *_, stats = asked(system, *[line(f"{number}") for number in range(8, 30)], GetStats())

    assert (stats.capacity_records, stats.capacity_size) == (30, 64 * 1024)
    assert (stats.dropped, stats.used_records) == (0, 30)
    assert system.client(every, name=INIT_NAME) == [f"{number}" for number in range(30)]


def test_settings_that_make_no_sense_change_nothing() -> None:
    system = pair(records=8, core="audit", core_rate=5)
    bad = Refused(MetaStatus.BAD_SETTINGS)

    outcomes = asked(system, told(records=0), told(core_rate=0), told(recs=9), GetStats())

    assert outcomes[:3] == [bad] * 3
    assert outcomes[3].capacity_records == 8
    lines = asked(system, *[line()] * 6, name="audit")
    assert lines[4:] == [Appended(5, 0), Refused(LogdStatus.RATE_LIMITED)]
