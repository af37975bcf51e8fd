"""Supervision under a storm: services that crash, loop, hang, ignore Stop and leak, by seed.

After the storm the tree is what the plan declares, and init holds what it held without one.
"""

import random  # noqa: TID251 (a seeded generator makes the storm)
from collections.abc import Coroutine
from enum import StrEnum, auto
from typing import Any, Final

import pytest

from nexus.abi import (
    INIT_NAME,
    NEVER,
    AbiError,
    BootImage,
    EndpointCreate,
    LinkCreate,
    LinkTerms,
    Nanos,
    Now,
    SleepUntil,
    TaskCounters,
    Trap,
)
from nexus.init.memory import ENDS_MAX, decode_memory
from nexus.protocols.init import (
    GetResources,
    GetSystem,
    Health,
    LeaveSafeMode,
    Resources,
    Restart,
    SafeModeLeft,
    Shutdown,
    ShuttingDown,
    SystemInfo,
    SystemState,
    TaskState,
)
from nexus.protocols.testsvc import PROTOCOL as TESTSVC
from nexus.runtime import Server
from tests.fakes.initrig import MS, SECOND, Boot, Driver, Main, Nothing, Run, boot, idle

__all__ = ["boot"]  # the fixture

SEEDS: Final = range(50)
STORM: Final = 3 * SECOND  # from the start of the system
CALM: Final = 4 * SECOND  # the largest back-off, the watchdog's patience and a start
PROBES_OUT_MAX: Final = 2  # questions of init that may be out for one service: a probe, an account
WEATHERED: Final = ("a", "b", "c")
HEALTH: Final = 'health = { deadline = "200ms", every = "100ms", answer = "100ms" }'
RESTART: Final = 'restart = { backoff = "10ms", backoff_max = "500ms", reset = "1s" }'
SYSTEM: Final = f"""
[system]
name = "storm"
total_size = "8MiB"

[group.g]
strategy = "rest"
restarts = 1000
within = "1s"

[group.doomed]
restarts = 3
within = "60s"
exceeded = "give-up"

[service.timed]
program = "timed"
stage = "core"

[service.a]
program = "a"
group = "g"
stop = "50ms"
{HEALTH}
{RESTART}

[service.b]
program = "b"
group = "g"
stop = "50ms"
uses = [{{ name = "a" }}]
{HEALTH}
{RESTART}

[service.c]
program = "c"
uses = [{{ name = "timed" }}]
stop = "50ms"
{HEALTH}
restart = {{ backoff = "200ms", backoff_max = "500ms", reset = "300ms" }}

[service.d]
program = "d"
group = "doomed"
{HEALTH}
{RESTART}

[service.driver]
program = "driver"
capabilities = ["proof.control"]
health = {{ every = "0s" }}
"""


class Weather(StrEnum):
    """What an instance does."""

    FINE = auto()
    CRASH_AT_START = auto()
    CRASH_LATER = auto()
    END = auto()
    HANG = auto()
    HANG_AT_START = auto()
    IGNORE_STOP = auto()
    LEAK = auto()


async def leak() -> None:
    """Take endpoints and links until the kernel refuses."""
    try:
        while True:
            _ = await LinkCreate(await EndpointCreate(), LinkTerms(1, 64, 0))
    except AbiError:
        return


def weathered(rng: random.Random, begun: list[int], seen: list[tuple[str, Weather]]) -> Main:
    """A service whose instances behave by chance as long as the storm lasts, and then well."""

    def main(boot: BootImage) -> Coroutine[Trap[Any], Any, int | None]:
        if not begun:
            begun.append(boot.now)
        stormy = boot.now < begun[0] + STORM
        weather = rng.choice(list(Weather)) if stormy else Weather.FINE
        seen.append((boot.name, weather))
        return behave(boot, weather, rng.randrange(300) * MS)

    return main


async def behave(boot: BootImage, weather: Weather, span: int) -> int:
    """Live as the weather is; `span` ns after the start it changes, where it does."""
    if weather is Weather.CRASH_AT_START:
        return 3
    if weather is Weather.HANG_AT_START:
        _ = await SleepUntil(NEVER)
    server = Server(Nothing(), TESTSVC, boot)
    if weather is Weather.LEAK:
        await leak()
    if weather in (Weather.FINE, Weather.LEAK):
        return await server.run()
    until = Nanos(boot.now + span)
    while not server.stopping and await Now() < until:
        _ = await server.step(until)
    if weather is Weather.HANG:
        _ = await SleepUntil(NEVER)
    while weather is Weather.IGNORE_STOP:
        _ = await server.step(NEVER)
    return 0 if server.stopping or weather is Weather.END else 7


async def doomed(_boot: BootImage) -> int:
    """Crashes whenever it is started."""
    return 3


def weather_run(boot: Boot, seed: int, mains: dict[str, Main], calm: int) -> Run:
    async def driver(driver: Driver) -> tuple[Any, ...]:
        rng = random.Random(f"hands {seed}")
        until = await driver.ahead(calm - CALM)
        while await Now() < until:
            await driver.pause(rng.randrange(400) * MS)
            _ = await driver.ask(Restart(rng.choice(WEATHERED)))
        await driver.pause(CALM)
        records = {name: await driver.record(name) for name in (*WEATHERED, "d", "timed")}
        resources = await driver.reply(GetResources(INIT_NAME), Resources)
        _ = await driver.reply(Shutdown(), ShuttingDown)
        _ = await driver.server.run()
        return records, TaskCounters(*resources.now.counters)

    return boot(
        driver, text=SYSTEM, mains={**mains, "d": doomed}, ready=False, seed=seed, memory=b""
    )


@pytest.fixture(scope="module")
def quiet() -> list[TaskCounters]:
    """What init holds without a storm; filled by the first test that needs it."""
    return []


@pytest.mark.parametrize("seed", SEEDS)
def test_after_a_storm_the_tree_is_as_declared_and_init_holds_what_it_held(
    boot: Boot, quiet: list[TaskCounters], seed: int
) -> None:
    if not quiet:
        run = weather_run(boot, 0, dict.fromkeys(WEATHERED, idle), CALM)
        quiet.append(run.result[1])
    rng = random.Random(seed)
    begun: list[int] = []
    seen: list[tuple[str, Weather]] = []
    mains = {name: weathered(rng, begun, seen) for name in WEATHERED}

    run = weather_run(boot, seed, mains, STORM + CALM)

    records, counters = run.result
    assert len({weather for _, weather in seen}) >= 5, "that was no storm"
    for name in (*WEATHERED, "timed"):
        assert (records[name].state, records[name].health) == (TaskState.UP, Health.OK), name
    assert records["timed"].generation == 1
    assert (records["d"].state, records["d"].generation) == (TaskState.FAILED, 4)
    assert run.lines().count("init: gave up on d") == 1
    assert sum(records[name].restarts for name in WEATHERED) >= 5
    (calm,) = quiet
    for held in ("slots", "endpoints", "links", "queued", "reserved_size", "vmo_size"):
        assert getattr(counters, held) == getattr(calm, held), held
    deaf = {name for name, weather in dict(seen).items() if weather is Weather.IGNORE_STOP}
    assert set(run.evidence("init: stopped")["dirty"]) == {"d", *deaf}
    assert_init_is_bounded(run)


def assert_init_is_bounded(run: Run) -> None:
    """Nothing in init grew with the number of instances there were."""
    init = run.init
    assert len(init.asking) <= PROBES_OUT_MAX * len(init.records)
    assert len(init.instances._by_control) <= len(init.records)
    assert len(init.instances._by_answers) <= len(init.records)
    assert len(init.stops) == 0
    assert not init.grants._deciding
    assert len(decode_memory(run.memory).ends) <= ENDS_MAX
    for group in init.groups._groups:
        assert len(group._ends) <= group.planned.restarts + 1
        assert not group.restarting


def test_one_seed_gives_one_storm(boot: Boot) -> None:
    def storm() -> Run:
        rng, begun = random.Random(7), list[int]()
        mains = {name: weathered(rng, begun, []) for name in WEATHERED}
        return weather_run(boot, 7, mains, STORM + CALM)

    assert storm().events == storm().events


LOOPING: Final = (
    SYSTEM.replace('name = "storm"', 'name = "storm"\nsafe_after = 1\nstable = "1s"')
    .replace('exceeded = "give-up"', 'exceeded = "safe-mode"')
    .replace('program = "timed"', 'program = "timed"\nsafe = true')
    .replace('program = "driver"', 'program = "driver"\nsafe = true')
)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_crash_loop_leads_to_safe_mode_over_two_boots_and_out_of_it(
    boot: Boot, seed: int
) -> None:
    """Boot 1 loops, falls into safe mode and loses its power; boot 2 is safe until it is left."""
    rng = random.Random(seed)
    mains = {name: weathered(rng, [], []) for name in WEATHERED}

    async def watch(driver: Driver) -> None:
        while (await driver.reply(GetSystem(), SystemInfo)).state is not SystemState.SAFE:
            await driver.pause(10 * MS)
        await driver.pause(60 * SECOND)

    async def repair(driver: Driver) -> tuple[Any, ...]:
        await driver.pause(SECOND)
        before = await driver.reply(GetSystem(), SystemInfo)
        safe = {name: (await driver.record(name)).state for name in (*WEATHERED, "d", "timed")}
        left = await driver.reply(LeaveSafeMode(), SafeModeLeft)
        await driver.pause(3 * SECOND)
        after = {name: (await driver.record(name)).state for name in (*WEATHERED, "d", "timed")}
        _ = await driver.reply(Shutdown(), ShuttingDown)
        _ = await driver.server.run()
        return before, safe, left, after

    well = {**dict.fromkeys(WEATHERED, idle), "d": idle}
    first = boot(
        watch,
        text=LOOPING,
        mains={**mains, "d": doomed},
        ready=False,
        seed=seed,
        memory=b"",
        cut=rng.randrange(2_000, 4_000) * MS,
    )
    second = boot(repair, text=LOOPING, mains=well, ready=False, seed=seed, memory=first.memory)
    third = boot(text=LOOPING, mains=well, seed=seed, memory=second.memory, cut=SECOND // 2)

    assert first.lines().count("init: safe mode") == 1
    assert second.evidence("init: safe mode")["ends"] != []
    before, safe, left, after = second.result
    out = dict.fromkeys((*WEATHERED, "d"), TaskState.LEFT_OUT)
    assert (before.state, before.boots) == (SystemState.SAFE, 2)
    assert before.why.startswith("d: more than 3 restarts of its group")
    assert safe == {**out, "timed": TaskState.UP}
    assert left.services == 4
    assert set(after.values()) == {TaskState.UP}
    kept = decode_memory(second.memory)
    assert (kept.unstable, kept.why, kept.ends) == (0, "", [])
    assert "init: safe mode" not in third.lines()
    assert second.ended.code == 0
