"""init's watchdog and its last resorts: whose answer counts, what is a miss, and what is given up.

Each test here falls with one line of nexus.init: see the name of what it guards.
"""

import json
from hashlib import sha256
from typing import Any, Final

import pytest

from nexus.abi import (
    BootImage,
    BootMemoryReplace,
    EventKind,
    Kill,
    Nanos,
    Now,
    Pid,
    PolicyRead,
    PolicyWord,
)
from nexus.init import instances, memory
from nexus.init.memory import ENDS_MAX, STORE_PAUSE, decode_memory
from nexus.init.stops import KILL_MAX
from nexus.init.watch import PROBE_PAUSE
from nexus.protocols.init import (
    GetSystem,
    LeaveSafeMode,
    Restart,
    SafeModeLeft,
    ServiceRecord,
    Shutdown,
    ShuttingDown,
    SystemInfo,
    SystemState,
    TaskState,
)
from nexus.protocols.meta import Health as Probe
from nexus.protocols.meta import Healthy
from nexus.protocols.policyd import PROTOCOL as POLICYD
from nexus.protocols.testsvc import PROTOCOL as TESTSVC
from nexus.runtime import Server
from nexus.wire import ReplyStatus, Request, encode
from tests.fakes.initrig import (
    DRIVER,
    MS,
    SECOND,
    SYSTEM,
    Boot,
    Driver,
    Main,
    Nothing,
    Run,
    boot,
    healthy,
    idle,
    play,
    status,
)

__all__ = ["boot"]  # the fixture

QUIET: Final = DRIVER + 'health = { every = "0s" }\n'  # the driver does not serve its endpoint
WATCHED: Final = 'health = { deadline = "200ms", every = "50ms", answer = "40ms", misses = 2 }'
WRONG_ANSWERS: Final = 3  # the first ones


def service(name: str, *rest: str, program: str = "", backoff: str = "20ms") -> str:
    lines = "\n".join(rest)
    restart = f'restart = {{ backoff = "{backoff}", backoff_max = "{backoff}" }}'
    return f'\n[service.{name}]\nprogram = "{program or name}"\n{restart}\n{lines}\n'


def living(span: int) -> Main:
    """A service that works for `span` ns and ends as it should not."""

    async def main(boot: BootImage) -> int:
        server = Server(Nothing(), TESTSVC, boot)
        until = Nanos(await Now() + span)
        while await Now() < until and not server.stopping:
            _ = await server.step(until)
        return 0 if server.stopping else 3

    return main


def crashing(times: int) -> Main:
    """A service whose first instances end soon after they are up."""

    async def main(boot: BootImage) -> int:
        kind = living(5 * MS) if boot.generation <= times else idle
        return int(await kind(boot) or 0)

    return main


async def stubborn(boot: BootImage) -> int:
    """Answers everything but Stop, which it ignores."""
    server = Server(Nothing(), TESTSVC, boot)
    while True:
        _ = await server.step(Nanos(await Now() + SECOND))


def reasons(run: Run, name: str) -> list[str]:
    """Why the instances of a service ended, in order."""
    found: list[Any] = [
        event.fields["evidence"]
        for event in run.events
        if event.fields.get("line") == f"init: end of {name}"
    ]
    return [str((json.loads(one) if isinstance(one, str) else one)["reason"]) for one in found]


async def one_second(driver: Driver) -> None:
    await driver.pause(SECOND)


# ---------------------------------------------------------------- whose answer counts


def another_generation(boot: BootImage) -> bytes:
    return encode(Healthy(boot.generation + 1, sha256(boot.argument).hexdigest(), 0, 0, 0, ""))


def another_argument(boot: BootImage) -> bytes:
    return encode(Healthy(boot.generation, sha256(b"of another start").hexdigest(), 0, 0, 0, ""))


def answering(*, wrong: Any, is_wrong: Any) -> Main:
    """A service whose health answers are `wrong` where `is_wrong(count)`."""

    async def main(boot: BootImage) -> int:
        def script(request: Request[Any], count: int) -> bytes | int | None:
            if not isinstance(request, Probe):
                return status(boot)
            given: bytes | None = (wrong if is_wrong(count) else healthy)(boot)
            return given

        return await play(boot, script)

    return main


@pytest.mark.parametrize("wrong", [another_generation, another_argument])
def test_a_first_answer_of_another_instance_or_another_start_is_not_health(
    boot: Boot, wrong: Any
) -> None:
    main = answering(wrong=wrong, is_wrong=lambda count: count <= WRONG_ANSWERS)
    text = SYSTEM + QUIET + service("a", 'health = { deadline = "500ms" }')

    run = boot(one_second, text=text, mains={"a": main})

    took = run.time("init: health a ok") - run.time("init: up a")
    assert WRONG_ANSWERS * PROBE_PAUSE <= took < (WRONG_ANSWERS + 2) * PROBE_PAUSE


@pytest.mark.parametrize("wrong", [another_generation, another_argument])
def test_a_later_answer_of_another_instance_or_another_start_is_a_miss(
    boot: Boot, wrong: Any
) -> None:
    main = answering(wrong=wrong, is_wrong=lambda count: count > 1)
    run = boot(one_second, text=SYSTEM + QUIET + service("a", WATCHED), mains={"a": main})

    assert reasons(run, "a")[0] == "not ready"


def test_misses_count_in_a_row_only(boot: Boot) -> None:
    """Every second probe goes unanswered, and two in a row would be the end."""
    main = answering(wrong=lambda _boot: None, is_wrong=lambda count: count % 2 == 0)

    run = boot(one_second, text=SYSTEM + QUIET + service("a", WATCHED), mains={"a": main})

    assert len(run.spawns("a")) == 1
    assert not run.lines("init: end of a")


# ---------------------------------------------------------------- what is given up


def test_starts_that_fail_are_counted_like_ends(boot: Boot) -> None:
    async def driver(driver: Driver) -> ServiceRecord:
        await driver.pause(SECOND)
        return await driver.record("a")

    group = '\n[group.g]\nrestarts = 3\nwithin = "10s"\nexceeded = "give-up"\n'
    text = SYSTEM + QUIET + group + service("a", 'group = "g"', program="absent")

    run = boot(driver, text=text, ready=False)

    assert (run.result.state, run.result.spawn_refused) == (TaskState.FAILED, 4)
    assert run.lines().count("init: gave up on a") == 1
    assert run.evidence("init: stopped")["dirty"] == ["a"]


def immortal(monkeypatch: pytest.MonkeyPatch, *, victim: int) -> None:
    """A task that is killed and does not end, as one that waits for a device may on Linux."""

    def kill(pid: Pid) -> Any:
        return Now() if pid == victim else Kill(pid)

    monkeypatch.setattr(instances, "Kill", kill)


PID_OF_A: Final = 4  # after init, timed and the driver


def test_a_killed_task_that_does_not_end_holds_no_shutdown_up(
    boot: Boot, monkeypatch: pytest.MonkeyPatch
) -> None:
    immortal(monkeypatch, victim=PID_OF_A)
    text = SYSTEM + QUIET + service("a", 'stop = "100ms"')

    run = boot(text=text, mains={"a": stubborn})

    assert [event.pid for event in run.spawns("a")] == [PID_OF_A]
    assert run.evidence("init: no end of a") == {"pid": PID_OF_A}
    exits = [event.time for event in run.events if event.kind is EventKind.EXIT]
    waited = 100 * MS + KILL_MAX
    assert waited <= run.time("init: no end of a") - exits[0] < waited + 50 * MS
    assert run.time("init: stopped") - run.time("init: no end of a") < 50 * MS
    assert run.evidence("init: stopped")["dirty"] == ["a"]
    assert run.ended.code == 1


def test_a_member_that_is_killed_and_does_not_end_is_given_up_and_the_others_come_back(
    boot: Boot, monkeypatch: pytest.MonkeyPatch
) -> None:
    immortal(monkeypatch, victim=PID_OF_A)
    group = '\n[group.g]\nstrategy = "all"\n'
    text = SYSTEM + QUIET + group + service("a", 'group = "g"', 'stop = "100ms"')
    text += service("b", 'group = "g"')

    async def driver(driver: Driver) -> tuple[ServiceRecord, ServiceRecord]:
        await driver.pause(3 * SECOND)
        return await driver.record("a"), await driver.record("b")

    async def b(boot: BootImage) -> int:
        return int(await (living(200 * MS) if boot.generation == 1 else idle)(boot) or 0)

    run = boot(driver, text=text, mains={"a": stubborn, "b": b})

    a, other = run.result
    assert a.state is TaskState.FAILED
    assert (other.state, other.generation) == (TaskState.UP, 2)
    assert "init: no end of a" in run.lines()


# ---------------------------------------------------------------- the policy page


class Undecided(Nothing):
    """A policy service that is healthy and decides nothing."""

    def handle(self, call: Any, _request: Any) -> Any:
        raise call.refuse(ReplyStatus.BUSY)


def deciding(span: int) -> Main:
    """A policyd whose first instance ends by itself `span` ns after its start."""

    async def main(boot: BootImage) -> int:
        server = Server(Undecided(), POLICYD, boot)
        if boot.generation > 1:
            return await server.run()
        until = Nanos(await Now() + span)
        while await Now() < until:
            _ = await server.step(until)
        return 3

    return main


def test_a_policyd_that_ends_by_itself_is_unavailable_until_the_next_one_answers(
    boot: Boot,
) -> None:
    async def driver(driver: Driver) -> list[PolicyWord]:
        words = [await PolicyRead()]
        for span in (500 * MS, 500 * MS):
            await driver.pause(span)
            words.append(await PolicyRead())
        return words

    text = SYSTEM + QUIET + service("policyd", backoff="500ms")
    run = boot(driver, text=text, mains={"policyd": deciding(300 * MS)})

    assert run.result == [PolicyWord(1, True), PolicyWord(2, False), PolicyWord(3, True)]


def test_a_policyd_that_is_killed_is_unavailable_before_it_has_ended(
    boot: Boot, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def driver(driver: Driver) -> tuple[PolicyWord, PolicyWord, ServiceRecord]:
        before = await PolicyRead()
        record = await driver.record("policyd")
        immortal(monkeypatch, victim=record.pid)
        _ = await driver.ask(Restart("policyd"))
        return before, await PolicyRead(), await driver.record("policyd")

    text = SYSTEM + QUIET + service("policyd")
    run = boot(driver, text=text, mains={"policyd": deciding(20 * SECOND)})

    before, after, record = run.result
    assert (before, after) == (PolicyWord(1, True), PolicyWord(2, False))
    assert (record.state, record.generation) == (TaskState.UP, 1)


# ---------------------------------------------------------------- safe mode and memory

LOOP: Final = '\n[group.g]\nrestarts = 1\nwithin = "10s"\nexceeded = "safe-mode"\n'
SAFE: Final = (
    SYSTEM.replace('ends_with = "driver"', 'stable = "5s"').replace(
        'program = "timed"', 'program = "timed"\nsafe = true'
    )
    + QUIET
    + "safe = true\n"
    + LOOP
    + LOOP.replace("group.g", "group.h")
    + service("a", 'group = "g"')
    + service("b", 'group = "h"')
)


def test_leaving_safe_mode_every_group_begins_anew(boot: Boot) -> None:
    """b has ended as often as it may before a leads to safe mode; its next end is its first."""

    async def b(boot: BootImage) -> int:
        spans = {1: 5 * MS, 3: 100 * MS}  # the second is stopped, with the system
        if boot.generation in spans:
            return int(await living(spans[boot.generation])(boot) or 0)
        return int(await idle(boot) or 0)

    async def a(boot: BootImage) -> int:
        return int(await (living(150 * MS) if boot.generation <= 2 else idle)(boot) or 0)

    async def driver(driver: Driver) -> tuple[SystemInfo, SystemInfo, ServiceRecord]:
        await driver.pause(600 * MS)
        safe = await driver.reply(GetSystem(), SystemInfo)
        _ = await driver.reply(LeaveSafeMode(), SafeModeLeft)
        await driver.pause(400 * MS)
        after = await driver.reply(GetSystem(), SystemInfo)
        record = await driver.record("b")
        _ = await driver.reply(Shutdown(), ShuttingDown)
        return safe, after, record

    run = boot(driver, text=SAFE, mains={"a": a, "b": b}, ready=False, memory=b"")

    safe, after, record = run.result
    assert safe.state is SystemState.SAFE
    assert safe.why.startswith("a: ")
    assert after.state is SystemState.READY
    assert (record.state, record.generation) == (TaskState.UP, 4)
    assert run.lines().count("init: safe mode") == 1


def test_a_crash_loop_costs_one_write_of_the_memory_in_a_pause(
    boot: Boot, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[bytes] = []

    def replace(data: bytes) -> BootMemoryReplace:
        written.append(data)
        return BootMemoryReplace(data)

    monkeypatch.setattr(memory, "BootMemoryReplace", replace)
    group = '\n[group.g]\nrestarts = 1000\nwithin = "10s"\n'
    text = SYSTEM + QUIET + group + service("a", 'group = "g"', backoff="5ms")
    pauses = 3

    async def driver(driver: Driver) -> None:
        await driver.pause(20 * SECOND)

    run = boot(
        driver,
        text=text,
        mains={"a": living(MS)},
        ready=False,
        memory=b"",
        cut=pauses * STORE_PAUSE + 500 * MS,
    )

    assert len(run.spawns("a")) > 20 * pauses
    assert len(decode_memory(run.memory).ends) == ENDS_MAX
    assert len(written) == 1 + pauses  # the first one counts the boot


def test_an_orderly_end_of_a_boot_in_which_a_group_ended_too_often_counts_as_a_crash(
    boot: Boot,
) -> None:
    async def driver(driver: Driver) -> None:
        await driver.pause(600 * MS)
        _ = await driver.reply(Shutdown(), ShuttingDown)

    run = boot(driver, text=SAFE, mains={"a": crashing(9), "b": idle}, ready=False, memory=b"")

    assert "init: safe mode" in run.lines()
    assert decode_memory(run.memory).unstable == 1


def test_an_orderly_end_after_safe_mode_was_left_is_no_crash(boot: Boot) -> None:
    async def driver(driver: Driver) -> None:
        await driver.pause(600 * MS)
        _ = await driver.reply(LeaveSafeMode(), SafeModeLeft)
        await driver.pause(100 * MS)
        _ = await driver.reply(Shutdown(), ShuttingDown)

    run = boot(driver, text=SAFE, mains={"a": crashing(2), "b": idle}, ready=False, memory=b"")

    assert "init: safe mode left" in run.lines()
    assert decode_memory(run.memory).unstable == 0
