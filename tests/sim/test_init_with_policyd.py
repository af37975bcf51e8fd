"""init-lite and the tree's policyd: the first question, grants, and SIGHUP without a restart."""

from typing import Any, Final

import pytest

from nexus.abi import INIT_NAME, EventKind, PolicyRead, PolicyWord, Signal
from nexus.init import plan as plan_module
from nexus.init.programs import PROGRAMS, ProgramSource, load_program
from nexus.protocols.init import GetSystem, GetTasks, SystemInfo, TaskRows, TaskState
from nexus.protocols.policy import AUTHORITY, Policy, Right
from nexus.wire import ReplyStatus
from tests.fakes.initrig import MS, Driver, Run, boot_it, idle

TEXT: Final = """
[system]
name = "guarded"
total_size = "16MiB"
ends_with = "driver"

[service.policyd]
program = "policyd"
capabilities = ["policy.authority"]
health = { every = "100ms", answer = "100ms" }

[service.timed]
program = "timed"

[service.driver]
program = "driver"
capabilities = ["proof.control"]
health = { every = "0s" }

[service.a]
program = "a"
ports = ["door"]
capabilities = ["port.door"]
"""
NAMES: Final = ["policyd", "timed", "driver", "a"]


@pytest.fixture(autouse=True)
def programs(monkeypatch: pytest.MonkeyPatch) -> None:
    sources = {
        name: ProgramSource(
            name=name, module="nexus.services.timed", protocols=("nexus.protocols.testsvc",)
        )
        for name in ("driver", "a")
    }
    monkeypatch.setattr(plan_module, "PROGRAMS", {**PROGRAMS, **sources})


def guarded(driver: Any, **options: Any) -> Run:
    mains = {"a": idle, "policyd": load_program(PROGRAMS["policyd"]).main}
    return boot_it(driver, text=TEXT, mains=mains, **options)


def starts(run: Run) -> list[object]:
    return [event.fields["name"] for event in run.events if event.kind is EventKind.SPAWN]


def test_policyd_denies_what_nobody_has_and_allows_the_grants_of_the_plan() -> None:
    async def driver(_driver: Driver) -> PolicyWord:
        return await PolicyRead()

    run = guarded(driver)

    assert run.result == PolicyWord(1, True)
    evidence = run.evidence("init: mmio policy deny ok")
    assert (evidence["decision"], evidence["reason"], evidence["grants"]) == ("deny", "policy", 0)
    assert evidence["denied_after"] == evidence["denied_before"] + 1
    assert run.evidence("init: ready")["grants"] == [["a", "port.door", "door", "allow"]]
    assert run.ended.code == 0


def test_sighup_puts_a_policy_in_force_without_a_restart() -> None:
    now = Policy(
        services=NAMES,
        allow={
            "policyd": [Right(AUTHORITY, "new.toml", 1)],
            "a": [Right("port.door", "new.toml", 2)],
        },
    )

    async def driver(driver: Driver) -> tuple[Any, ...]:
        before = await driver.reply(GetSystem(), SystemInfo)
        while (await PolicyRead()).generation < 2:
            await driver.pause(10 * MS)
        await driver.pause(10 * MS)
        return before, await driver.ask(GetTasks()), await PolicyRead()

    run = guarded(driver, signals=[(400 * MS, Signal.HUP)], policy_source=lambda: now)

    before, after, word = run.result
    assert before.policy_digest == run.plan.policy.digest
    assert after.status is ReplyStatus.DENIED
    assert word == PolicyWord(2, True)
    assert run.evidence("init: policy set")["digest"] == now.digest
    assert starts(run) == [INIT_NAME, *NAMES]


def test_a_grant_ends_with_its_right_and_comes_back_with_it() -> None:
    """Without port.door the running a is ended and not started again; with it, it is."""
    less = Policy(
        services=NAMES,
        allow={
            "policyd": [Right(AUTHORITY, "f", 1)],
            "driver": [Right("proof.control", "f", 2)],
        },
    )
    full = Policy(services=NAMES, allow={**less.allow, "a": [Right("port.door", "f", 3)]})
    given = iter((less, full))

    async def driver(driver: Driver) -> tuple[Any, ...]:
        await driver.pause(800 * MS)
        denied = await driver.record("a")
        await driver.pause(600 * MS)
        assert isinstance(await driver.ask(GetTasks()), TaskRows)
        return denied, await driver.record("a")

    signals = [(500 * MS, Signal.HUP), (1_200 * MS, Signal.HUP)]
    run = guarded(driver, signals=signals, policy_source=lambda: next(given))

    denied, after = run.result
    assert (denied.state, denied.reason) == (TaskState.FAILED, "denied")
    assert (after.state, after.generation) == (TaskState.UP, 2)
    lost = run.evidence("init: grants of a revoked")
    assert lost == {"grants": [["port.door", "door"]]}
    ended = [
        event.time
        for event in run.events
        if event.kind is EventKind.EXIT and event.fields["name"] == "a"
    ]
    assert ended[0] - run.time("init: policy set") < 10 * MS
    assert run.evidence("init: end of a")["reason"] == "grant revoked"
    assert run.evidence("init: no start of a")["grants"] == [["a", "port.door", "door", "deny"]]
    assert starts(run) == [INIT_NAME, *NAMES, "a"]
