"""init-lite's rules of supervision, each on a small system on the simulated kernel."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import pytest

from nexus.abi import (
    BOOT_MEMORY_SIZE_MAX,
    INIT_NAME,
    NEVER,
    SERVICE_NAME_SIZE_MAX,
    BootImage,
    BootMemoryReplace,
    EventKind,
    ExitInfo,
    Nanos,
    Now,
    Pid,
    PolicyRead,
    PolicyWord,
    Signal,
    SleepUntil,
    Slot,
    Status,
)
from nexus.init.errors import SystemFileError
from nexus.init.groups import Group
from nexus.init.instances import CONTROL_TERMS
from nexus.init.memory import ENDS_MAX, VERSION, End, Memory, decode_memory, encode_memory
from nexus.init.plan import PlannedGroup
from nexus.init.stops import SHUTDOWN_MAX
from nexus.init.system import Exceeded, Strategy
from nexus.ipc import Answer, Refused
from nexus.ipc.bulk import Bulk, accept_bulk, offer_bulk
from nexus.kernel.sim import kernel as sim_kernel
from nexus.kernel.sim.faults import Faults, NthFailure
from nexus.kernel.sim.faults import Plan as FaultPlan
from nexus.protocols.init import (
    REASON_SIZE_MAX,
    AwaitReady,
    GetPolicy,
    GetResources,
    GetSystem,
    GetTasks,
    Health,
    InitStatus,
    LeaveSafeMode,
    PolicyGiven,
    PolicyTaken,
    Ready,
    Restart,
    Route,
    SafeModeLeft,
    SetPolicy,
    Shutdown,
    ShuttingDown,
    SystemInfo,
    SystemState,
    TaskRows,
    TaskState,
)
from nexus.protocols.policy import Policy, Right, decode_policy
from nexus.protocols.policyd import PROTOCOL as POLICYD
from nexus.protocols.policyd import (
    CheckFor,
    Counts,
    Decision,
    GetCounts,
    Reason,
    Verdict,
)
from nexus.protocols.testsvc import PROTOCOL as TESTSVC
from nexus.protocols.testsvc import Echo
from nexus.runtime import Server, ServiceConfig, serve
from nexus.wire import ReplyStatus
from tests.fakes.initrig import (
    DRIVER,
    MS,
    SECOND,
    SYSTEM,
    Boot,
    Driver,
    Nothing,
    Run,
    boot,
    idle,
    nothing,
)

__all__ = ["boot"]  # the fixture

QUIET: Final = DRIVER + 'health = { every = "0s" }\n'  # the driver does not serve its endpoint
WATCHED: Final = 'health = { deadline = "100ms", every = "50ms", answer = "40ms" }'


def service(name: str, *rest: str) -> str:
    lines = "\n".join(rest)
    return f'\n[service.{name}]\nprogram = "{name}"\nrestart = {{ backoff = "20ms" }}\n{lines}\n'


def group(name: str, **keys: Any) -> str:
    rows = "\n".join(f"{key} = {json.dumps(value)}" for key, value in keys.items())
    return f"\n[group.{name}]\n{rows}\n"


async def crash(boot: BootImage) -> int:
    """Ends as soon as it is up."""
    server = Server(Nothing(), TESTSVC, boot)
    _ = await server.step(NEVER)
    return 3


def living(span: int, code: int = 3) -> Any:
    """A service that works for `span` ns and ends."""

    async def main(boot: BootImage) -> int:
        server = Server(Nothing(), TESTSVC, boot)
        until = Nanos(await Now() + span)
        while await Now() < until and not server.stopping:
            _ = await server.step(until)
        return 0 if server.stopping else code

    return main


def hanging(after: int, generations: int = 1) -> Any:
    """A service whose first instances do nothing any more some time after their start."""

    async def main(boot: BootImage) -> int:
        if boot.generation > generations:
            return await idle(boot)
        _ = await living(after)(boot)
        _ = await SleepUntil(NEVER)
        return 0

    return main


async def stubborn(boot: BootImage) -> int:
    """Answers everything but Stop, which it ignores."""
    server = Server(Nothing(), TESTSVC, boot)
    while True:
        _ = await server.step(NEVER)


def pause(span: int) -> Any:
    async def driver(driver: Driver) -> None:
        await driver.pause(span)

    return driver


def ends(run: Run, name: str) -> list[dict[str, Any]]:
    return [
        json.loads(str(event.fields["evidence"]))
        if isinstance(event.fields["evidence"], str)
        else dict(event.fields["evidence"])  # type: ignore[call-overload]
        for event in run.events
        if event.fields.get("line") == f"init: end of {name}"
    ]


def starts(run: Run, *names: str) -> list[tuple[str, int]]:
    return [
        (str(event.fields["name"]), int(event.fields["generation"]))  # type: ignore[call-overload]
        for event in run.events
        if event.kind is EventKind.SPAWN and event.fields["name"] in names
    ]


# ---------------------------------------------------------------- stages


def test_a_stage_begins_when_the_one_before_is_healthy(boot: Boot) -> None:
    text = SYSTEM + QUIET + service("a", 'stage = "core"') + service("b", 'stage = "core"')

    run = boot(text=text, mains={"a": idle, "b": idle})

    lines = run.lines()
    rest = lines.index("init: start timed")
    for name in "ab":
        assert lines.index(f"init: start {name}") < lines.index(f"init: health {name} ok") < rest


def test_a_stage_begins_when_one_before_has_missed_its_readiness_deadline(boot: Boot) -> None:
    never_ready = service("a", 'stage = "core"', 'health = { deadline = "100ms", every = "0s" }')

    class Unready(Nothing):
        def ready(self) -> bool:
            return False

    async def main(boot: BootImage) -> int:
        return await serve(Unready(), TESTSVC, boot)

    run = boot(text=SYSTEM + QUIET + never_ready, mains={"a": main})

    waited = run.time("init: start timed") - run.time("init: start a")
    assert 99 * MS <= waited < 105 * MS
    assert run.lines().count("init: health a late") == 1


def test_a_stage_does_not_wait_for_ever_for_one_that_crashes_at_its_start(boot: Boot) -> None:
    crashing = service("a", 'stage = "core"', 'health = { deadline = "100ms" }')

    run = boot(text=SYSTEM + QUIET + crashing, mains={"a": crash}, ready=False)

    waited = run.time("init: start timed") - run.time("init: start a")
    assert 99 * MS <= waited < 105 * MS


# ---------------------------------------------------------------- the watchdog


def test_a_service_that_dies_of_its_memory_is_said_to_also_where_init_killed_it_meanwhile(
    boot: Boot, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large one takes long to go: its links may be closed long before it is gone."""

    def over_memory(pid: Pid, code: int, signal: int) -> ExitInfo:
        return ExitInfo(pid, code, signal, over_memory=True)

    monkeypatch.setattr(sim_kernel, "ExitInfo", over_memory)
    text = SYSTEM + QUIET + service("a", WATCHED)

    run = boot(pause(600 * MS), text=text, mains={"a": hanging(200 * MS)})

    (end,) = ends(run, "a")
    assert (end["reason"], end["signal"]) == ("memory limit", 9)


def test_a_service_that_hangs_is_killed_and_restarted(boot: Boot) -> None:
    text = SYSTEM + QUIET + service("a", WATCHED)

    run = boot(pause(600 * MS), text=text, mains={"a": hanging(200 * MS)})

    (end,) = ends(run, "a")
    assert (end["reason"], end["signal"]) == ("hang", 9)
    assert 200 * MS <= end["died"] - run.spawns("a")[0].time < 300 * MS
    assert run.lines().count("init: back a") == 1
    assert starts(run, "timed", "driver") == [("timed", 1), ("driver", 1)]
    assert run.ended.code == 0


def test_a_service_that_does_not_hang_is_left_alone(boot: Boot) -> None:
    run = boot(pause(SECOND), text=SYSTEM + QUIET + service("a", WATCHED), mains={"a": idle})

    assert starts(run, "a") == [("a", 1)]


def test_a_service_whose_queue_is_full_cannot_hide_in_it(boot: Boot) -> None:
    """Frozen, and init's link into it filled up, before the first later probe is due."""
    health = 'health = { deadline = "100ms", every = "500ms", answer = "200ms" }'
    frozen = (200 * MS, lambda kernel: kernel.freeze("a", Nanos(kernel.now + 20 * SECOND)))

    async def fill(driver: Driver) -> None:
        await driver.pause(250 * MS)
        for _ in range(CONTROL_TERMS.depth + 1):  # each makes init ask the service for its account
            _ = await driver.control.start(GetResources("a"), await driver.ahead(SECOND))
        await driver.pause(SECOND)

    text = SYSTEM + QUIET + service("a", health)
    run = boot(fill, text=text, mains={"a": idle}, at=[frozen], ready=False)

    (end,) = ends(run, "a")
    assert end["reason"] == "hang"
    well = run.time("init: health a ok")
    assert 700 * MS <= end["died"] - well < 720 * MS


def test_with_every_0_a_service_is_probed_once(boot: Boot) -> None:
    quiet = service("a", 'health = { deadline = "100ms", every = "0s" }')

    run = boot(pause(SECOND), text=SYSTEM + QUIET + quiet, mains={"a": hanging(200 * MS)})

    assert starts(run, "a") == [("a", 1)]


def test_as_many_probes_as_declared_may_be_missed(boot: Boot) -> None:
    patient = service(
        "a", 'health = { deadline = "100ms", every = "50ms", answer = "40ms", misses = 3 }'
    )

    run = boot(pause(SECOND), text=SYSTEM + QUIET + patient, mains={"a": hanging(200 * MS)})

    (end,) = ends(run, "a")
    silent = end["died"] - run.spawns("a")[0].time - 200 * MS
    assert 2 * 90 * MS <= silent < 4 * 90 * MS  # three probes of 40 ms, two pauses of 50


def test_a_service_in_whose_queue_requests_expire_is_restarted(boot: Boot) -> None:
    late = service(
        "other",
        'health = { deadline = "500ms", every = "100ms", answer = "400ms", late_max = 2 }',
    )
    uses = QUIET.replace('{ name = "timed" }', '{ name = "timed" }, { name = "other" }')

    class Slow(Nothing):
        """Needs 30 ms for whatever arrives, which is more than its callers wait."""

        async def handle(self, _call: Any, _request: Any) -> Any:
            _ = await SleepUntil(Nanos(await Now() + 30 * MS))
            raise _call.refuse(ReplyStatus.DENIED)

    async def main(boot: BootImage) -> int:
        return await serve(Slow(), TESTSVC, boot)

    async def driver(driver: Driver) -> None:
        peer = driver.clients["other"]
        for nth in range(80):
            _ = await peer.call(Echo(b"x"), await driver.ahead((nth % 2) * 100_000 + 100_000))
        await driver.pause(300 * MS)

    run = boot(driver, text=SYSTEM + uses + late, other=main)

    assert {end["reason"] for end in ends(run, "other")} == {"late"}


def test_a_service_that_never_gets_ready_is_killed_after_a_second_deadline(boot: Boot) -> None:
    class Unready(Nothing):
        def ready(self) -> bool:
            return False

    async def main(boot: BootImage) -> int:
        return await serve(Unready(), TESTSVC, boot)

    run = boot(pause(400 * MS), text=SYSTEM + QUIET + service("a", WATCHED), mains={"a": main})

    first, *_ = ends(run, "a")
    assert first["reason"] == "not ready"
    assert 200 * MS <= first["died"] - run.time("init: ready") < 215 * MS


@pytest.mark.parametrize("steps", [0, 1], ids=["never probed", "was well"])
def test_who_waits_for_the_system_is_neither_probed_nor_late(boot: Boot, steps: int) -> None:
    """a takes its planned link after 600 ms, and until then driver is deaf in AwaitReady."""
    eager = QUIET.replace('every = "0s"', 'deadline = "100ms", every = "50ms", answer = "40ms"')

    async def slow(boot: BootImage) -> int:
        hands = Driver(boot)
        _ = await hands.server.step(await hands.ahead(SECOND))
        until = await hands.ahead(600 * MS)
        while await Now() < until:
            _ = await hands.server.step(until)
        await hands.begin(ready=False)
        return await hands.server.run()

    async def driver(driver: Driver) -> Any:
        for _ in range(steps):  # the first probe
            _ = await driver.server.step(await driver.ahead(SECOND))
        return await driver.ask(AwaitReady(), 2 * SECOND)

    text = SYSTEM + eager + service("a", 'uses = [{ name = "timed" }]')
    run = boot(driver, text=text, mains={"a": slow}, ready=False)

    assert isinstance(run.result, Ready)
    assert run.time("init: ready") - run.time("init: up driver") >= 600 * MS
    assert starts(run, "driver") == [("driver", 1)]
    assert "init: health driver late" not in run.lines()


def test_an_asked_restart_during_a_shutdown_leaves_no_stain(boot: Boot) -> None:
    async def driver(driver: Driver) -> None:
        shutdown = await driver.control.start(Shutdown(), await driver.ahead(SECOND))
        _ = await driver.ask(Restart("a"))
        del shutdown
        _ = await driver.server.run()

    run = boot(driver, text=SYSTEM + QUIET + service("a"), mains={"a": stubborn})

    assert run.evidence("init: stopped")["dirty"] == []


def test_a_service_is_not_killed_for_the_lateness_of_what_it_uses(boot: Boot) -> None:
    """b is ready with a, and a crashes on and on: that is no fault of b's."""
    uses = service("b", WATCHED, 'uses = [{ name = "a" }]')

    class Unready(Nothing):
        def ready(self) -> bool:
            return False

    async def main(boot: BootImage) -> int:
        return await serve(Unready(), TESTSVC, boot)

    text = SYSTEM + QUIET + service("a") + uses
    run = boot(pause(SECOND), text=text, mains={"a": crash, "b": main}, ready=False)

    assert starts(run, "b") == [("b", 1)]
    assert "init: health b late" in run.lines()


# ---------------------------------------------------------------- back-off and groups


def test_the_back_off_doubles_and_is_the_declared_one_again_after_a_long_life(boot: Boot) -> None:
    restart = 'restart = { backoff = "20ms", backoff_max = "60ms", reset = "100ms" }'
    spans = [1, 1, 1, 1, 150, 1, 1]

    async def main(boot: BootImage) -> int:
        span = spans[boot.generation - 1] if boot.generation <= len(spans) else 10_000
        return int(await living(span * MS)(boot))

    text = SYSTEM + QUIET + service("a").replace('restart = { backoff = "20ms" }', restart)
    run = boot(pause(SECOND), text=text, mains={"a": main}, ready=False)

    died = [end["died"] for end in ends(run, "a")]
    began = [event.time for event in run.spawns("a")][1:]
    waits = [(start - end) // (5 * MS) for end, start in zip(died, began, strict=True)]
    assert waits == [4, 8, 12, 12, 4, 8, 12]


def test_a_group_counts_what_lies_within_its_span_and_no_more() -> None:
    planned = PlannedGroup(
        name="g",
        strategy=Strategy.ONE,
        restarts=2,
        within=Nanos(100),
        exceeded=Exceeded.GIVE_UP,
        members=("a",),
    )
    often, seldom = Group(planned), Group(planned)

    assert [often.is_exceeded_by(Nanos(time)) for time in (0, 50, 100)] == [False, False, True]
    assert [seldom.is_exceeded_by(Nanos(time)) for time in (0, 50, 101, 151)] == [False] * 4


@pytest.mark.parametrize(
    ("strategy", "others"),
    [("one", []), ("all", ["a", "c"]), ("rest", ["c"])],
)
def test_who_is_restarted_with_a_member_that_ends(
    boot: Boot, strategy: str, others: list[str]
) -> None:
    declared = group("g", strategy=strategy)
    text = SYSTEM + QUIET + declared
    text += "".join(service(name, 'group = "g"') for name in "abc")

    async def main(boot: BootImage) -> int:
        return int(await living(200 * MS)(boot)) if boot.generation == 1 else await idle(boot)

    run = boot(pause(600 * MS), text=text, mains={"a": idle, "b": main, "c": idle})

    again = [(name, nth) for name, nth in starts(run, "a", "b", "c") if nth > 1]
    assert again == [(name, 2) for name in sorted(["b", *others])]
    assert {name: [end["reason"] for end in ends(run, name)] for name in others} == {
        name: ["group"] for name in others
    }
    exits = [event.fields["name"] for event in run.events if event.kind is EventKind.EXIT]
    stopped = exits[: len(others) + 1]
    assert stopped == ["b", *reversed(others)]  # in order, the last started first
    assert run.ended.code == 0


def test_of_a_group_one_that_ignores_stop_is_killed_and_restarted_too(boot: Boot) -> None:
    text = SYSTEM + QUIET + group("g", strategy="all")
    text += service("a", 'group = "g"', 'stop = "100ms"') + service("b", 'group = "g"')

    async def main(boot: BootImage) -> int:
        return int(await living(200 * MS)(boot)) if boot.generation == 1 else await idle(boot)

    async def ignores(boot: BootImage) -> int:
        return await stubborn(boot) if boot.generation == 1 else await idle(boot)

    run = boot(pause(SECOND), text=text, mains={"a": ignores, "b": main})

    (end,) = ends(run, "a")
    assert (end["reason"], end["signal"]) == ("stop deadline", 9)
    assert starts(run, "a", "b") == [("a", 1), ("b", 1), ("a", 2), ("b", 2)]
    (ended_b,) = ends(run, "b")
    assert run.spawns("b")[1].time - ended_b["died"] >= 100 * MS


def test_a_group_that_ends_too_often_is_given_up_and_said(boot: Boot) -> None:
    text = (
        SYSTEM + QUIET + group("g", strategy="rest", restarts=2, within="10s", exceeded="give-up")
    )
    text += "".join(service(name, 'group = "g"') for name in "ab")

    async def driver(driver: Driver) -> tuple[Any, Any, SystemInfo]:
        await driver.pause(SECOND)
        system = await driver.reply(GetSystem(), SystemInfo)
        return await driver.record("a"), await driver.record("b"), system

    run = boot(driver, text=text, mains={"a": crash, "b": idle}, ready=False)

    a, b, system = run.result
    assert (a.state, b.state) == (TaskState.FAILED, TaskState.FAILED)
    assert system.state is SystemState.STARTING
    assert len(starts(run, "a")) == 3
    assert {"init: gave up on a", "init: gave up on b"} <= set(run.lines())
    assert sorted(run.evidence("init: stopped")["dirty"]) == ["a", "b"]
    assert run.ended.code == 1


def test_a_group_may_shut_the_system_down(boot: Boot) -> None:
    text = SYSTEM + QUIET + group("g", restarts=1, within="10s", exceeded="shut-down")
    text += service("a", 'group = "g"')

    async def driver(driver: Driver) -> None:
        _ = await driver.server.run()

    run = boot(driver, text=text, mains={"a": crash}, ready=False)

    assert run.lines()[-1] == "init: stopped"
    assert run.ended.code == 1


def test_an_asked_restart_is_not_counted(boot: Boot) -> None:
    text = SYSTEM + QUIET + group("g", restarts=1, within="10s") + service("a", 'group = "g"')

    async def driver(driver: Driver) -> Any:
        for _ in range(4):
            _ = await driver.ask(Restart("a"))
            await driver.pause(100 * MS)
        return await driver.record("a")

    run = boot(driver, text=text, mains={"a": idle})

    assert (run.result.state, run.result.generation) == (TaskState.UP, 5)


# ---------------------------------------------------------------- safe mode and memory

LOOP: Final = group("g", restarts=2, within="10s", exceeded="safe-mode")
SAFE: Final = (
    SYSTEM.replace('ends_with = "driver"', 'safe_after = 2\nstable = "500ms"').replace(
        'program = "timed"', 'program = "timed"\nsafe = true'
    )
    + QUIET
    + "safe = true\n"
    + LOOP
    + service("a", 'group = "g"')
    + service("b")
)


def test_a_crash_loop_at_run_time_ends_in_safe_mode_and_is_left_on_request(boot: Boot) -> None:
    crashes = 3

    async def main(boot: BootImage) -> int:
        return await crash(boot) if boot.generation <= crashes else await idle(boot)

    async def driver(driver: Driver) -> tuple[Any, ...]:
        await driver.pause(400 * MS)
        system = await driver.reply(GetSystem(), SystemInfo)
        safe = [await driver.record(name) for name in ("a", "b", "timed")]
        left = await driver.reply(LeaveSafeMode(), SafeModeLeft)
        again = await driver.ask(LeaveSafeMode())
        await driver.pause(400 * MS)
        after = [await driver.record(name) for name in ("a", "b", "timed")]
        _ = await driver.reply(Shutdown(), ShuttingDown)
        return system, safe, left, again, after

    run = boot(driver, text=SAFE, mains={"a": main, "b": idle}, ready=False, memory=b"")

    system, safe, left, again, after = run.result
    assert system.state is SystemState.SAFE
    assert system.why.startswith("a: more than 2 restarts")
    states = [record.state for record in safe]
    assert states == [TaskState.LEFT_OUT, TaskState.LEFT_OUT, TaskState.UP]
    assert left.services == 2
    assert again == Refused(InitStatus.NOT_IN_SAFE_MODE)
    assert [record.state for record in after] == [TaskState.UP] * 3
    evidence = run.evidence("init: safe mode")
    assert evidence["left_out"] == ["a", "b"]
    assert [end[0] for end in evidence["ends"]] == ["a"] * 3
    assert starts(run, "timed") == [("timed", 1)]
    assert run.lines().count("init: up b") == run.lines().count("init: back b") == 1


def test_a_boot_in_which_a_group_ended_too_often_does_not_become_stable(boot: Boot) -> None:
    run = boot(
        pause(10 * SECOND),
        text=SAFE,
        mains={"a": crash, "b": idle},
        ready=False,
        memory=b"",
        cut=3 * SECOND,
    )

    assert run.plan.stable < SECOND
    assert decode_memory(run.memory).unstable == 1


def test_boots_that_crash_lead_to_safe_mode_which_lasts_until_it_is_left(boot: Boot) -> None:
    """Each boot is cut off, as by a power cut; the third finds two unstable ones."""

    async def hold(driver: Driver) -> None:
        await driver.pause(10 * SECOND)

    def cut(memory: bytes) -> Run:
        return boot(hold, text=SAFE, mains={"a": idle, "b": idle}, memory=memory, cut=200 * MS)

    async def leave(driver: Driver) -> SystemInfo:
        system = await driver.reply(GetSystem(), SystemInfo)
        _ = await driver.reply(LeaveSafeMode(), SafeModeLeft)
        await driver.pause(SECOND)
        _ = await driver.reply(Shutdown(), ShuttingDown)
        return system

    first = cut(b"")
    second = cut(first.memory)
    third = cut(second.memory)
    fourth = boot(leave, text=SAFE, mains={"a": idle, "b": idle}, memory=third.memory)
    fifth = boot(nothing, text=SAFE, mains={"a": idle, "b": idle}, memory=fourth.memory, cut=MS)

    assert [decode_memory(run.memory).unstable for run in (first, second, third)] == [1, 2, 2]
    assert "init: safe mode" not in first.lines() + second.lines() + fifth.lines()
    assert starts(third, "a", "b", "timed") == [("timed", 1)]
    assert third.evidence("init: safe mode")["why"] == "2 boots in a row did not become stable"
    system = fourth.result
    assert (system.state, system.boots) == (SystemState.SAFE, 4)
    assert starts(fourth, "a", "b") == [("a", 1), ("b", 1)]
    assert decode_memory(fourth.memory).unstable == 0
    assert decode_memory(fifth.memory).boots == 5


def test_services_and_init_say_which_boot_it_is(boot: Boot) -> None:
    told: list[ServiceConfig] = []

    async def note(image: BootImage) -> int:
        told.append(ServiceConfig.of(image))
        return await idle(image)

    async def driver(driver: Driver) -> SystemInfo:
        return await driver.reply(GetSystem(), SystemInfo)

    def booted(seed: int, memory: bytes | None) -> Run:
        text = SYSTEM + service("a") + QUIET
        return boot(driver, text=text, mains={"a": note}, memory=memory, seed=seed)

    first = booted(1, b"")
    second = booted(2, first.memory)
    _ = booted(3, None)
    _ = booted(4, None)

    assert [config.boot for config in told] == [0, 1, 0, 0]
    assert len({config.boot_id for config in told}) == len(told)
    assert (first.result.boots, second.result.boots) == (1, 2)
    assert [run.result.boot_id for run in (first, second)] == [each.boot_id for each in told[:2]]
    ready = [run.evidence("init: ready") for run in (first, second)]
    assert [each["boot"] for each in ready] == [0, 1]
    assert [each["boot_id"] for each in ready] == [each.boot_id.hex() for each in told[:2]]


def test_an_orderly_end_before_the_boot_is_stable_is_no_crash(boot: Boot) -> None:
    async def driver(driver: Driver) -> None:
        _ = await driver.reply(Shutdown(), ShuttingDown)

    memory = b'{"version":1,"boots":7,"unstable":1,"why":"","ends":[]}'
    run = boot(driver, text=SAFE, mains={"a": idle, "b": idle}, memory=memory)

    kept = decode_memory(run.memory)
    assert (kept.boots, kept.unstable) == (8, 1)


@pytest.mark.parametrize(
    "memory",
    [
        b"\xff\x00",
        b'{"version":1,"boots":1,"unstable":9,"why":"\xe9","ends":[]}',
        b"[]",
        b'{"version":2,"boots":1,"unstable":9,"why":"","ends":[]}',
        b'{"version":1,"boots":-1}',
    ],
)
def test_a_memory_that_cannot_be_understood_is_empty_and_said(boot: Boot, memory: bytes) -> None:
    run = boot(text=SYSTEM + QUIET, memory=memory)

    assert run.evidence("init: boot memory not understood")["size"] == len(memory)
    assert decode_memory(run.memory).boots == 1
    assert run.ended.code == 0


def test_a_boot_without_a_place_for_its_memory_keeps_nothing_and_says_nothing(boot: Boot) -> None:
    run = boot(text=SYSTEM + QUIET, memory=None)

    assert run.kernel.boot_memory is None
    assert not run.lines("init: boot memory")


@pytest.mark.parametrize("status", [Status.NO_SPACE, Status.UNSUPPORTED])
def test_a_memory_that_cannot_be_stored_is_said_and_counted_and_stops_nothing(
    boot: Boot, status: Status
) -> None:
    failure = NthFailure(trap=BootMemoryReplace, nth=1, status=status, task=INIT_NAME)

    run = boot(text=SYSTEM + QUIET, memory=b"", faults=Faults(FaultPlan(nth=(failure,))))

    assert run.evidence("init: boot memory not stored") == {"status": status.name}
    assert run.evidence("init: stopped")["memory_failed"] == 1
    assert run.ended.code == 0
    assert decode_memory(run.memory).boots == 1  # the next write has everything


def test_the_memory_is_bounded_however_often_a_service_ends(boot: Boot) -> None:
    text = (
        SYSTEM
        + QUIET
        + group("g", restarts=1000, within="10s")
        + service("a", 'group = "g"').replace('"20ms"', '"5ms", backoff_max = "5ms"')
    )

    run = boot(pause(2 * SECOND), text=text, mains={"a": crash}, ready=False, memory=b"")

    kept = decode_memory(run.memory)
    assert len(run.spawns("a")) > 10 * ENDS_MAX
    assert len(kept.ends) == ENDS_MAX
    assert kept.version == VERSION


def test_a_full_memory_stops_no_boot_and_makes_room_for_what_is_new(boot: Boot) -> None:
    """A valid one of four-byte characters, which fills the page to the last end."""
    name, reason = ("\U0001f980" * span for span in (SERVICE_NAME_SIZE_MAX, REASON_SIZE_MAX))
    ends = [End(name, each, reason, 0, 9) for each in range(ENDS_MAX)]
    memory = encode_memory(Memory(boots=7, why=name, ends=ends))
    before = len(decode_memory(memory).ends)
    text = SYSTEM + QUIET + service("a").replace('"20ms"', '"20ms", reset = "1ms"')

    run = boot(pause(3 * SECOND), text=text, mains={"a": living(500 * MS)}, memory=memory)

    assert 1 < before < ENDS_MAX
    assert not run.lines("init: boot memory")
    kept = decode_memory(run.memory)
    assert kept.boots == 8
    assert [end.service for end in kept.ends[-4:]] == ["a"] * 4
    assert len(run.memory) <= BOOT_MEMORY_SIZE_MAX


# ---------------------------------------------------------------- signals and shutdown


@pytest.mark.parametrize("signal", [Signal.TERM, Signal.INT])
def test_a_signal_ends_the_system_in_order(boot: Boot, signal: Signal) -> None:
    async def driver(driver: Driver) -> None:
        _ = await driver.server.run()

    text = SYSTEM + QUIET + service("a", 'stage = "core"')
    run = boot(driver, text=text, mains={"a": idle}, signals=[(300 * MS, signal)])

    exits = [event.fields["name"] for event in run.events if event.kind is EventKind.EXIT]
    assert exits == ["driver", "timed", "a", "init-lite"]
    assert run.ended.code == 0


def test_services_that_ignore_stop_end_together_and_not_one_after_another(boot: Boot) -> None:
    text = SYSTEM + QUIET + "".join(service(name, 'stop = "1s"') for name in "abcd")

    run = boot(text=text, mains=dict.fromkeys("abcd", stubborn))

    ended = next(event.time for event in run.events if event.kind is EventKind.EXIT)
    assert SECOND <= run.time("init: stopped") - ended < SECOND + 50 * MS
    assert run.ended.code == 1


def test_a_shutdown_ends_within_its_bound_whatever_the_services_declare(boot: Boot) -> None:
    chain = service("a", 'stop = "15s"')
    chain += service("b", 'stop = "15s"', 'uses = [{ name = "a" }]')

    run = boot(
        text=SYSTEM + QUIET + chain,
        mains={"a": stubborn, "b": stubborn},
        seconds=60,
        ready=False,
    )

    ended = next(event.time for event in run.events if event.kind is EventKind.EXIT)
    assert SHUTDOWN_MAX <= run.time("init: stopped") - ended < SHUTDOWN_MAX + SECOND


def test_a_second_signal_kills_at_once(boot: Boot) -> None:
    text = SYSTEM + QUIET + service("a", 'stop = "15s"')

    run = boot(
        pause(10 * SECOND),
        text=text,
        mains={"a": stubborn},
        signals=[(300 * MS, Signal.TERM), (500 * MS, Signal.TERM)],
    )

    begun = run.events[0].time
    assert run.time("init: stopped") - begun < 600 * MS
    assert run.lines().count("init: signal") == 2


# ---------------------------------------------------------------- the service manager


def test_the_service_manager_hears_when_all_is_well_what_goes_on_and_that_init_lives(
    boot: Boot,
) -> None:
    run = boot(pause(SECOND), text=SYSTEM + QUIET, watchdog=Nanos(200 * MS))

    notices = run.kernel.notices
    assert notices.count("READY=1") == notices.count("STOPPING=1") == 1
    assert notices.index("READY=1") < notices.index("STOPPING=1")
    assert 10 <= notices.count("WATCHDOG=1") <= 12
    assert "STATUS=ready, 2 of 2 services up" in notices


def test_the_service_manager_does_not_hear_of_readiness_before_it_is_true(boot: Boot) -> None:
    run = boot(pause(SECOND), text=SYSTEM + QUIET + service("a"), mains={"a": crash}, ready=False)

    assert "READY=1" not in run.kernel.notices
    assert "WATCHDOG=1" not in run.kernel.notices  # nobody asked for it


# ---------------------------------------------------------------- the policy

ASKS: Final = "capabilities = []\n"


class Fake:
    """A policy service that decides from a list of denied rights."""

    def __init__(self, denied: Sequence[str], *, takes: bool = True) -> None:
        self.denied = denied
        self.takes = takes
        self.asked: list[tuple[int, str, str]] = []
        self.denials = 0

    def handle(self, call: Any, request: Any) -> Any:
        match request:
            case CheckFor():
                self.asked.append((request.subject, request.right, request.target))
                denied = request.right in self.denied
                self.denials += denied
                verdict = Verdict.DENY if denied else Verdict.ALLOW
                return Decision(verdict, Reason.POLICY, 1, len(self.asked))
            case GetCounts():
                return Counts(1, "", 0, self.denials, 0, 0, 0, 0, 0, 0)
            case _:
                raise call.refuse(ReplyStatus.DENIED)


def policyd(*denied: str) -> Any:
    async def main(boot: BootImage) -> int:
        return await serve(Fake(denied), POLICYD, boot)

    return main


GUARDED: Final = (
    SYSTEM
    + QUIET
    + service("policyd")
    + service("a", 'ports = ["door"]', 'capabilities = ["port.door"]')
)


def test_before_any_grant_policyd_must_deny_what_nobody_has(boot: Boot) -> None:
    mains = {"policyd": policyd("device.mmio.blk"), "a": idle}

    run = boot(text=GUARDED, mains=mains)

    evidence = run.evidence("init: mmio policy deny ok")
    assert (evidence["decision"], evidence["reason"]) == ("deny", "policy")
    assert (evidence["subject"], evidence["target"]) == ("timed", "window blk")
    assert evidence["denied_after"] == evidence["denied_before"] + 1
    assert evidence["grants"] == 0
    assert evidence["nonce"]
    assert 0 < evidence["took_ns"] < SECOND
    assert run.time("init: mmio policy deny ok") < run.time("init: start timed")
    assert run.evidence("init: ready")["grants"] == [["a", "port.door", "door", "allow"]]


async def mute(boot: BootImage) -> int:
    """Answers meta requests, and nobody's questions."""

    class Mute(Nothing):
        def handle(self, call: Any, _request: Any) -> Any:
            return call.defer()

    return await serve(Mute(), POLICYD, boot)


@pytest.mark.parametrize(
    ("main", "fault"),
    [
        (policyd(), "deny FAIL allow, policy"),
        (mute, "deny FAIL no counters"),
        (crash, "not asked"),
    ],
    ids=["allows", "silent", "crashes"],
)
def test_a_policyd_that_allows_errs_or_is_silent_is_said_and_the_boot_goes_on(
    boot: Boot, main: Any, fault: str
) -> None:
    run = boot(text=GUARDED, mains={"policyd": main, "a": idle}, ready=False)

    (line,) = run.lines("init: mmio")
    assert line == f"init: mmio policy {fault}"
    assert "init: start timed" in run.lines()


def test_a_service_whose_grant_is_denied_is_not_started(boot: Boot) -> None:
    async def driver(driver: Driver) -> Any:
        await driver.pause(300 * MS)
        return await driver.record("a")

    mains = {"policyd": policyd("device.mmio.blk", "port.door"), "a": idle}
    run = boot(driver, text=GUARDED, mains=mains, ready=False)

    assert (run.result.state, run.result.reason) == (TaskState.FAILED, "denied")
    assert starts(run, "a") == []
    row = ["a", "port.door", "door", "deny"]
    assert run.evidence("init: no start of a")["grants"] == [row]


def test_without_policyd_the_policy_of_the_plan_decides_about_grants(boot: Boot) -> None:
    async def driver(driver: Driver) -> list[Any]:
        await driver.pause(100 * MS)
        return [await driver.record(name) for name in "ab"]

    text = SYSTEM + QUIET + service("a", 'ports = ["door"]', 'capabilities = ["port.door"]')
    text += service("b", 'ports = ["gate"]')
    run = boot(driver, text=text, mains={"a": idle, "b": idle}, ready=False)

    assert [record.state for record in run.result] == [TaskState.UP, TaskState.FAILED]


def test_no_decision_is_no_start_and_is_asked_again(boot: Boot) -> None:
    async def late(boot: BootImage) -> int:
        return await (mute(boot) if boot.generation == 1 else policyd("device.mmio.blk")(boot))

    async def driver(driver: Driver) -> Any:
        await driver.pause(2 * SECOND)
        before = await driver.record("a")
        _ = await driver.ask(Restart("policyd"))
        await driver.pause(3 * SECOND)
        return before, await driver.record("a")

    run = boot(driver, text=GUARDED, mains={"policyd": late, "a": idle}, ready=False)

    before, after = run.result
    assert (before.state, before.generation, before.reason) == (
        TaskState.WAITING if before.reason == "" else TaskState.BACKING_OFF,
        0,
        before.reason,
    )
    assert after.state is TaskState.UP


def test_a_member_whose_grants_are_being_decided_waits_for_its_group(boot: Boot) -> None:
    """a is about to start again, policyd is silent about it, and b takes it along."""
    text = SYSTEM + QUIET + service("policyd") + group("g", strategy="all", restarts=50)
    text += service("a", 'group = "g"', 'ports = ["door"]', 'capabilities = ["port.door"]')
    text += service("b", 'group = "g"')

    class Slow(Fake):
        async def handle(self, call: Any, request: Any) -> Any:
            if isinstance(request, CheckFor) and request.right == "port.door":
                _ = await SleepUntil(Nanos(await Now() + 40 * MS))
            return super().handle(call, request)

    async def slow(boot: BootImage) -> int:
        return await serve(Slow(["device.mmio.blk"]), POLICYD, boot)

    async def main(boot: BootImage) -> int:
        return await (living(20 * MS)(boot) if boot.generation < 4 else idle(boot))

    async def driver(driver: Driver) -> Any:
        await driver.pause(3 * SECOND)
        return [await driver.record(name) for name in "ab"]

    run = boot(driver, text=text, mains={"policyd": slow, "a": idle, "b": main}, ready=False)

    assert [record.state for record in run.result] == [TaskState.UP, TaskState.UP]
    assert run.result[1].generation == 4
    last = ends(run, "b")[2]["died"]
    begun = next(event.time for event in run.spawns("a") if event.time > last)
    assert begun - last >= 80 * MS  # the group's back-off by then, and not as soon as decided


def test_an_answer_about_the_former_policy_starts_nothing(boot: Boot) -> None:
    """policyd says yes, and before init hears it the policy is another: it is asked again."""
    text = GUARDED.replace('"proof.control"', '"proof.control", "policy.authority"')

    class Slow(Fake):
        async def handle(self, call: Any, request: Any) -> Any:
            reply = super().handle(call, request)
            if isinstance(request, CheckFor) and request.right == "port.door":
                self.denied = ["device.mmio.blk", "port.door"]
                _ = await SleepUntil(Nanos(await Now() + 200 * MS))
            return reply

    async def slow(boot: BootImage) -> int:
        return await serve(Slow(["device.mmio.blk"]), POLICYD, boot)

    async def driver(driver: Driver) -> Any:
        await set_rights(driver, "a")
        at = await Now()
        await driver.pause(SECOND)
        return at, await driver.record("a")

    run = boot(driver, text=text, mains={"policyd": slow, "a": idle}, ready=False)

    at, record = run.result
    assert (record.state, record.reason, record.generation) == (TaskState.FAILED, "denied", 0)
    assert run.time("init: no start of a") > at


def test_the_page_says_whether_policyd_answers(boot: Boot) -> None:
    async def driver(driver: Driver) -> list[PolicyWord]:
        words = [await PolicyRead()]
        _ = await driver.ask(Restart("policyd"))
        words.append(await PolicyRead())
        await driver.pause(300 * MS)
        words.append(await PolicyRead())
        return words

    mains = {"policyd": policyd("device.mmio.blk"), "a": idle}
    run = boot(driver, text=GUARDED, mains=mains)

    assert run.result == [PolicyWord(1, True), PolicyWord(2, False), PolicyWord(3, True)]


def test_a_policyd_that_hangs_is_unavailable_before_it_is_killed(boot: Boot) -> None:
    watched = GUARDED.replace(
        'program = "policyd"',
        'program = "policyd"\nhealth = { every = "100ms", answer = "100ms", misses = 3 }',
    )
    frozen = (500 * MS, lambda kernel: kernel.freeze("policyd", Nanos(kernel.now + 5 * SECOND)))

    async def driver(driver: Driver) -> tuple[Any, ...]:
        await driver.pause(300 * MS)
        while (await PolicyRead()).available:
            await driver.pause(10 * MS)
        doubted = await PolicyRead()
        at = await Now()
        record = await driver.record("policyd")
        await driver.pause(SECOND)
        return doubted, at, record, await PolicyRead()

    mains = {"policyd": policyd("device.mmio.blk"), "a": idle}
    run = boot(driver, text=watched, mains=mains, at=[frozen])

    doubted, at, record, after = run.result
    assert doubted == PolicyWord(2, False)
    assert (record.generation, record.health) == (1, Health.LATE)
    assert after == PolicyWord(3, True)
    (end,) = ends(run, "policyd")
    assert end["reason"] == "hang"
    assert end["died"] - at >= 300 * MS  # two more probes, each after a pause


KEEPER: Final = QUIET.replace('"proof.control"', '"proof.control", "policy.authority"')


async def give(driver: Driver, data: bytes, size: int | None = None) -> Any:
    slot = await offer_bulk(data)
    assert slot is not None
    return await set_policy(driver, slot, len(data) if size is None else size)


async def set_policy(driver: Driver, slot: Slot, size: int) -> Any:
    outcome = await driver.control.ask(SetPolicy(size), await driver.ahead(SECOND), move=slot)
    return outcome.reply if isinstance(outcome, Answer) else outcome


def test_the_policy_is_given_out_and_taken_and_decides_at_once(boot: Boot) -> None:
    async def driver(driver: Driver) -> tuple[Any, ...]:
        old = await held(driver)
        rights = [right for right in old.allow["driver"] if right.name == "policy.authority"]
        less = Policy(services=old.services, allow={**old.allow, "driver": rights})
        taken = await give(driver, less.encoded())
        denied = await driver.ask(GetTasks())
        back = await give(driver, old.encoded())
        return old, taken, denied, back, await driver.reply(GetSystem(), SystemInfo)

    run = boot(driver, text=SYSTEM + KEEPER)

    old, taken, denied, back, system = run.result
    assert old == run.plan.policy
    assert (taken, back) == (PolicyTaken(1), PolicyTaken(2))
    assert denied == Refused(ReplyStatus.DENIED)
    assert (system.policy_generation, system.policy_digest) == (2, old.digest)


async def held(driver: Driver) -> Policy:
    """The policy that init keeps."""
    answer = await driver.control.ask(GetPolicy(), await driver.ahead(SECOND))
    assert isinstance(answer, Answer), answer
    assert isinstance(answer.reply, PolicyGiven)
    bulk = await accept_bulk(answer.cap, 0, answer.reply.size)
    assert isinstance(bulk, Bulk)
    policy = decode_policy(bytes(bulk.view))
    await bulk.release()
    return policy


async def set_rights(driver: Driver, name: str, *rights: str) -> None:
    """Put a policy in force in which `name` has these rights; the others keep theirs."""
    old = await held(driver)
    given = [Right(right, "new.toml", line) for line, right in enumerate(rights, 1)]
    new = Policy(services=old.services, allow={**old.allow, name: given})
    assert isinstance(await give(driver, new.encoded()), PolicyTaken)


GRANTS: Final = {
    "port.door": 'ports = ["door"]',
    "device.serial": 'devices.serial = { path = "/dev/ttyS0" }',
    "net.listen.web": "listen.web = { port = 8080 }",
    "net.connect": "connect = [1883]",
    "device.mmio.blk": 'hardware = ["disk", "rng", "spare"]',
    "device.mmio.rng": "",  # these two are in the line before
    "device.mmio.empty": "",
    "secret.file": 'secret = "file"',
}
DEVICES: Final = """
[device.disk]
kind = "block"
size = "64KiB"

[device.rng]
kind = "entropy"

[device.spare]
kind = "empty"
"""


def test_in_safe_mode_a_right_starts_none_that_is_left_out(boot: Boot) -> None:
    """b was denied its port before; the policy that allows it does not end safe mode for it."""

    async def driver(driver: Driver) -> tuple[Any, ...]:
        await driver.pause(400 * MS)
        denied = await driver.record("b")
        await set_rights(driver, "b", "port.door")
        await driver.pause(400 * MS)
        safe = await driver.record("b")
        _ = await driver.reply(LeaveSafeMode(), SafeModeLeft)
        await driver.pause(300 * MS)
        after = await driver.record("b")
        _ = await driver.reply(Shutdown(), ShuttingDown)
        return denied.state, safe.state, after.state

    text = SAFE.replace('"proof.control"', '"proof.control", "policy.authority"')
    text = text.replace(service("b"), service("b", 'ports = ["door"]'))

    async def main(boot: BootImage) -> int:
        return await (crash(boot) if boot.generation <= 3 else idle(boot))

    run = boot(driver, text=text, mains={"a": main, "b": idle}, ready=False, memory=b"")

    assert "init: safe mode" in run.lines()
    assert run.result == (TaskState.FAILED, TaskState.LEFT_OUT, TaskState.UP)


@pytest.mark.parametrize("lost", GRANTS)
def test_a_service_that_holds_a_grant_ends_with_its_right(boot: Boot, lost: str) -> None:
    """At once, said, decided anew, and no crash; the others run on. With the right it is back."""

    async def driver(driver: Driver) -> tuple[Any, ...]:
        await set_rights(driver, "a", *(right for right in GRANTS if right != lost))
        at = await Now()
        await driver.pause(300 * MS)
        denied = await driver.record("a")
        await set_rights(driver, "a", *GRANTS)
        await driver.pause(300 * MS)
        return at, denied, [await driver.record(name) for name in ("a", "timed")]

    rights = f"capabilities = {json.dumps(list(GRANTS))}"
    entry = service("a", 'isolation = "exec"', *GRANTS.values(), rights)
    text = SYSTEM + DEVICES + KEEPER + entry
    run = boot(driver, text=text, mains={"a": idle}, memory=b"")

    at, denied, after = run.result
    assert (denied.state, denied.reason) == (TaskState.FAILED, "denied")
    assert [(each.state, each.generation) for each in after] == [
        (TaskState.UP, 2),
        (TaskState.UP, 1),
    ]
    (end,) = ends(run, "a")
    assert end["reason"] == "grant revoked"
    assert abs(end["died"] - at) < MS
    assert [row[0] for row in run.evidence("init: grants of a revoked")["grants"]] == [lost]
    assert decode_memory(run.memory).ends == []
    assert run.ended.code == 0


def test_a_service_that_keeps_the_rights_of_its_grants_runs_on(boot: Boot) -> None:
    async def driver(driver: Driver) -> Any:
        await set_rights(driver, "a", "port.door", "x.y")
        await driver.pause(300 * MS)
        return await driver.record("a")

    entry = service("a", 'ports = ["door"]', 'capabilities = ["port.door", "log.read"]')
    run = boot(driver, text=SYSTEM + KEEPER + entry, mains={"a": idle})

    assert (run.result.state, run.result.generation) == (TaskState.UP, 1)
    assert not run.lines("init: grants of")


def test_revoked_grants_are_not_counted_in_the_group(boot: Boot) -> None:
    """The group may restart once; its member loses its port three times."""

    async def driver(driver: Driver) -> Any:
        for _ in range(3):
            await set_rights(driver, "a")
            await driver.pause(200 * MS)
            await set_rights(driver, "a", "port.door")
            await driver.pause(200 * MS)
        return await driver.record("a")

    entry = service("a", 'group = "g"', 'ports = ["door"]', 'capabilities = ["port.door"]')
    text = SYSTEM + KEEPER + group("g", restarts=1, within="10s") + entry
    run = boot(driver, text=text, mains={"a": idle})

    assert (run.result.state, run.result.generation) == (TaskState.UP, 4)


def test_a_system_that_ends_with_a_revoked_service_has_not_crashed(boot: Boot) -> None:
    """The driver takes its own port: it is killed, the system ends with it, in order."""

    async def driver(driver: Driver) -> None:
        await set_rights(driver, "driver", "policy.authority")

    text = SYSTEM + KEEPER.replace("authority", 'authority", "port.door')
    text = text.replace('program = "driver"', 'program = "driver"\nports = ["door"]')
    memory = b'{"version":1,"boots":7,"unstable":1,"why":"","ends":[]}'
    run = boot(driver, text=text, ready=False, memory=memory)

    assert run.result is None
    assert run.evidence("init: stopped")["dirty"] == []
    assert decode_memory(run.memory).unstable == 1
    assert run.ended.code == 0


@pytest.mark.covers("init.BAD_POLICY")
@pytest.mark.parametrize("kind", ["garbage", "latin", "stranger", "few", "short", "link"])
def test_what_is_no_policy_of_this_system_is_refused_and_the_old_one_stays(
    boot: Boot, kind: str
) -> None:
    async def driver(driver: Driver) -> tuple[Any, TaskRows, PolicyWord]:
        services = ["timed", "driver"]
        good = Policy(services=services, allow={})
        if kind == "garbage":
            outcome = await give(driver, b"\xc1 no policy")
        elif kind == "latin":
            outcome = await give(driver, good.encoded().replace(b"timed", b"tim\xe9d"))
        elif kind == "stranger":
            right = Right("x.y", "f", 1)
            outcome = await give(
                driver, Policy(services=services, allow={"nobody": [right]}).encoded()
            )
        elif kind == "few":
            outcome = await give(driver, Policy(services=["driver"], allow={}).encoded())
        elif kind == "short":
            outcome = await give(driver, good.encoded(), 60_000)
        else:
            routed = await driver.control.ask(Route("timed"), await driver.ahead(SECOND))
            assert isinstance(routed, Answer), routed
            assert routed.cap is not None
            outcome = await set_policy(driver, routed.cap, len(good.encoded()))
        rows = await driver.reply(GetTasks(), TaskRows)
        return outcome, rows, await PolicyRead()

    run = boot(driver, text=SYSTEM + KEEPER)

    outcome, _rows, word = run.result
    assert outcome == Refused(InitStatus.BAD_POLICY)
    assert word == PolicyWord(0, False)
    assert run.ended.code == 0


def test_each_request_needs_its_own_right(boot: Boot) -> None:
    async def driver(driver: Driver) -> list[Any]:
        requests = [GetTasks(), GetSystem(), LeaveSafeMode(), Restart("nobody"), GetPolicy()]
        return [await driver.ask(request) for request in requests]

    def rights(*names: str) -> list[str]:
        text = SYSTEM + QUIET.replace('["proof.control"]', json.dumps(names))
        outcomes = boot(driver, text=text, ready=False).result
        denied = Refused(ReplyStatus.DENIED)
        return ["denied" if outcome == denied else "allowed" for outcome in outcomes]

    no, yes = "denied", "allowed"
    assert rights() == [no, no, no, no, no]
    assert rights("system.observe") == [yes, yes, no, no, no]
    assert rights("system.control") == [no, no, yes, yes, no]
    assert rights("policy.authority") == [no, no, no, no, yes]
    assert rights("proof.control") == [yes, yes, yes, yes, no]


@pytest.mark.covers("init.NOT_IN_SAFE_MODE")
def test_a_system_that_is_not_in_safe_mode_cannot_leave_it(boot: Boot) -> None:
    async def driver(driver: Driver) -> Any:
        return await driver.ask(LeaveSafeMode())

    assert boot(driver).result == Refused(InitStatus.NOT_IN_SAFE_MODE)


def test_sighup_puts_in_force_what_the_files_say_now(boot: Boot) -> None:
    now = Policy(services=["timed", "driver"], allow={})

    async def driver(driver: Driver) -> tuple[Any, Any, PolicyWord]:
        before = await driver.ask(GetTasks())
        await driver.pause(400 * MS)
        return before, await driver.ask(GetTasks()), await PolicyRead()

    signals = [(300 * MS, Signal.HUP)]
    run = boot(driver, text=SYSTEM + QUIET, signals=signals, policy_source=lambda: now)

    before, after, word = run.result
    assert isinstance(before, TaskRows)
    assert after == Refused(ReplyStatus.DENIED)
    assert word.generation == 1


def test_sighup_restarts_a_policyd_that_does_not_take_the_policy_by_itself(boot: Boot) -> None:
    names = ["policyd", "timed", "driver", "a"]
    now = Policy(services=names, allow={"driver": [Right("proof.control", "f", 1)]})

    async def driver(driver: Driver) -> tuple[Any, PolicyWord]:
        await driver.pause(600 * MS)
        return await driver.reply(GetSystem(), SystemInfo), await PolicyRead()

    mains = {"policyd": policyd("device.mmio.blk"), "a": idle}
    signals = [(300 * MS, Signal.HUP)]
    run = boot(driver, text=GUARDED, mains=mains, signals=signals, policy_source=lambda: now)

    system, word = run.result
    assert system.policy_digest == now.digest
    assert [end["reason"] for end in ends(run, "policyd")] == ["policy"]
    assert word == PolicyWord(4, True)  # up, doubted, changed, up again


def test_sighup_with_files_that_are_wrong_is_said_and_the_old_policy_stays(boot: Boot) -> None:
    def wrong() -> Policy:
        raise SystemFileError(Path("base.toml"), 3, "a right", '"X"')

    async def driver(driver: Driver) -> Any:
        await driver.pause(400 * MS)
        return await driver.ask(GetTasks())

    signals = [(300 * MS, Signal.HUP)]
    run = boot(driver, text=SYSTEM + QUIET, signals=signals, policy_source=wrong)

    assert isinstance(run.result, TaskRows)
    said = run.evidence("init: policy not read")["error"]
    assert said == 'base.toml:3: expected a right, found "X"'
