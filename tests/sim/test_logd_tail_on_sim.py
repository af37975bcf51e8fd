"""What was logged before a reboot, a power cut or the end of logd can be read after it."""

from pathlib import Path

import pytest

from nexus.ipc import Stale
from nexus.protocols.logd import GetStats, Record, Stats
from nexus.protocols.meta import LogProbe
from nexus.testing.device import Device, Run, simulate

pytestmark = pytest.mark.sim

MS = 1_000_000
EVERY = 2  # seconds between two writes of the tail, and what a cut may cost
SYSTEM = f"""
[system]
name = "tailed"
total_size = "8MiB"

[device.disk]
kind = "block"
size = "4MiB"

[service.policyd]
program = "policyd"
capabilities = ["ipc.core", "policy.authority"]
uses = {{ logd = {{ depth = 64, sync = false }} }}

[service.logd]
program = "logd"
stage = "core"
capabilities = [
    "ipc.core",
    "policy.delegate",
    "statefs.read:/state/observability/",
    "statefs.write:/state/observability/",
]
uses = {{ policyd = {{}}, statefsd = {{}} }}

[service.logd.settings]
core = "policyd"
tail_every = {EVERY}

[service.statefsd]
program = "statefsd"
stage = "core"
hardware = ["disk"]
capabilities = ["ipc.core", "policy.delegate", "device.mmio.blk:window disk"]
uses = {{ policyd = {{}}, logd = {{ sync = false }} }}

[service.timed]
program = "timed"
capabilities = ["ipc.core"]
uses = {{ logd = {{ sync = false }} }}
"""
OBSERVED = (
    SYSTEM.replace("sync = false } }", "sync = false }, metricsd = { sync = false } }").replace(
        "policyd = {}, statefsd = {}", "policyd = {}, statefsd = {}, metricsd = { sync = false }"
    )
    + """
[service.metricsd]
program = "metricsd"
capabilities = ["ipc.core", "policy.delegate"]
uses = { policyd = {}, logd = { sync = false } }
"""
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "system.toml"
    _ = file.write_text(SYSTEM)
    return file


def tokens(records: list[Record]) -> list[str]:
    return [field.value for record in records for field in record.fields if field.key == "token"]


async def say(device: Device, token: str) -> None:
    _ = await device.call("timed", LogProbe(token))


def looked(
    file: Path, run: Run, seed: int, boots_back: int = 1
) -> tuple[list[Record], list[Record], Stats]:
    """What the next boot can read of an earlier one, what it says itself, and its account."""
    found: list[tuple[list[Record], list[Record], Stats]] = []

    async def scenario(device: Device) -> None:
        await device.sleep("5s")
        before = await device.logs(boots_back=boots_back)
        found.append((before, await device.logs(), await device.call("logd", GetStats())))

    _ = simulate(file, scenario, seed=seed, after=run)
    return found[0]


def told(records: list[Record]) -> list[dict[str, str]]:
    """What logd itself said of earlier boots."""
    return [
        {field.key: field.value for field in record.fields}
        for record in records
        if record.text == "earlier records"
    ]


def test_after_an_orderly_end_everything_is_there_and_logd_says_so(file: Path) -> None:
    async def scenario(device: Device) -> None:
        await device.sleep("1s")
        for number in range(5):
            await say(device, f"token.{number}")

    run = simulate(file, scenario, seed=1)
    before, now, stats = looked(file, run, seed=2)

    assert tokens(before) == [f"token.{number}" for number in range(5)]
    assert {record.boot for record in before} == {0}
    assert {record.boot for record in now} == {1}
    (ended,) = told(now)
    assert (ended["boot"], ended["lost"], ended["end"]) == ("0", "0", "in order")
    assert int(ended["records"]) == len(before) <= stats.tail_records


def test_a_power_cut_costs_the_window_at_most_and_is_told(file: Path) -> None:
    async def scenario(device: Device) -> None:
        await say(device, "long.before")
        await device.sleep(f"{EVERY + 2}s")
        await say(device, "just.before")
        await device.cut_power()

    run = simulate(file, scenario, seed=3)
    before, now, _ = looked(file, run, seed=4)

    assert "long.before" in tokens(before)
    assert set(tokens(before)) <= {"long.before", "just.before"}
    (ended,) = told(now)
    assert (ended["end"], ended["lost"]) == ("cut off", "0")


def test_records_of_three_boots_stand_beside_each_other(file: Path) -> None:
    async def first(device: Device) -> None:
        await say(device, "first")

    async def second(device: Device) -> None:
        await device.sleep("1s")
        await say(device, "second")

    run = simulate(file, second, seed=6, after=simulate(file, first, seed=5))

    assert tokens(looked(file, run, seed=7, boots_back=1)[0]) == ["second"]
    assert tokens(looked(file, run, seed=7, boots_back=2)[0]) == ["first"]
    assert looked(file, run, seed=7, boots_back=3)[0] == []


def test_a_quiet_system_writes_nothing_to_its_device(file: Path) -> None:
    """statefsd's own records, policyd's about logd and metricsd's of the spans of both cause no
    write, which would cause them."""
    _ = file.write_text(OBSERVED)
    written: list[Stats] = []

    async def scenario(device: Device) -> None:
        await device.sleep("20s")
        written.append(await device.call("logd", GetStats()))
        await device.sleep("60s")
        written.append(await device.call("logd", GetStats()))

    _ = simulate(file, scenario, seed=8, within="5min")

    assert written[0].tail_written_today > 0, "the start was told"
    assert written[1].tail_written_today == written[0].tail_written_today


def test_a_killed_logd_starts_again_and_what_it_had_persisted_is_still_of_this_boot(
    file: Path,
) -> None:
    found: list[list[str]] = []

    async def scenario(device: Device) -> None:
        await say(device, "persisted")
        await device.sleep(f"{EVERY + 2}s")
        _ = await device.kill("logd")
        await device.sleep("3s")
        await say(device, "after")
        await device.sleep("3s")
        assert await device.ask("logd", GetStats()) == Stale(), "the link to the first one"
        records = await device.logs()
        assert [record.record for record in records] == sorted({each.record for each in records})
        found.append(tokens(records))

    _ = simulate(file, scenario, seed=9)

    assert found == [["persisted", "after"]]


@pytest.mark.parametrize("moment", [*range(1900, 2300, 40)])
def test_a_power_cut_at_any_moment_around_a_write_leaves_a_beginning(
    file: Path, moment: int
) -> None:
    """Every 40 ms around the time at which the first records are written."""

    async def scenario(device: Device) -> None:
        began = await device.now()
        for number in range(8):
            await say(device, f"token.{number}")
        spent = (await device.now() - began) // MS
        await device.sleep(f"{moment - spent}ms")
        await device.cut_power()

    run = simulate(file, scenario, seed=moment)
    before, now, stats = looked(file, run, seed=moment + 1)

    assert tokens(before) in ([], [f"token.{number}" for number in range(8)])
    assert stats.tail_lost == 0
    assert [ended["end"] for ended in told(now)] in ([], ["cut off"])
    assert bool(told(now)) is bool(before)


@pytest.mark.parametrize("moment", [*range(0, 2400, 300)])
def test_a_logd_killed_at_any_moment_finds_what_waits_in_the_rings(file: Path, moment: int) -> None:
    found: list[list[str]] = []

    async def scenario(device: Device) -> None:
        for number in range(4):
            await say(device, f"token.{number}")
        await device.sleep(f"{moment + 1}ms")
        _ = await device.kill("logd")
        await say(device, "while.away")
        await device.sleep("5s")
        assert await device.ask("logd", GetStats()) == Stale(), "the link to the first one"
        found.append(tokens(await device.logs()))

    _ = simulate(file, scenario, seed=moment + 1)

    (texts,) = found
    assert texts[-1] == "while.away"
    before = [f"token.{number}" for number in range(4)]
    kept = texts[:-1]
    assert kept == before[len(before) - len(kept) :], "the window's, which it had taken, is lost"
    if moment > 1000 * EVERY + 200:
        assert kept == before
