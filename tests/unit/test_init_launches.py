"""What init refuses a service that has others started: nothing is started, and nothing changes."""

from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, Final

import pytest

from nexus.abi import BootImage, SpawnReason, Trap
from nexus.init import plan as plan_module
from nexus.init.programs import ProgramSource, measured
from nexus.ipc import Refused
from nexus.protocols.init import (
    Ending,
    EndTask,
    GetLaunched,
    InitStatus,
    Launch,
    Launched,
    LaunchedRows,
    NoteDenied,
    ServiceRecord,
    Shutdown,
    ShuttingDown,
    TaskState,
)
from tests.fakes.initrig import MS, Boot, Driver, Main, Run, boot, idle

__all__ = ["boot"]  # the fixture

STARTER: Final = """
[system]
name = "test"
total_size = "8MiB"
owner_size = "256KiB"
ends_with = "{ends_with}"

[service.execd]
program = "execd"
capabilities = ["proof.control", "proc.spawn"]

[service.a]
program = "a"

[service.other]
program = "other"
start = "demand"
by = "execd"
"""
STRANGER: Final = """
[service.driver]
program = "driver"
capabilities = ["proof.control", "proc.spawn"]
"""
FILE: Final = b'"""A program."""\n\nSPEED = 1\n'
CHANGED: Final = FILE.replace(b"1", b"0")  # one bit of one byte

Script = Callable[[Driver, "Starts"], Coroutine[Trap[Any], Any, Any]]


class Starts:
    """What a script of the starter asks for."""

    def __init__(self, driver: Driver, digest: str) -> None:
        self._driver = driver
        self.digest = digest

    def of(self, name: str = "other") -> Launch:
        """With the digest of the plan, for the starter itself."""
        return Launch(name, self._driver.boot.name, self.digest, b"", restarts=False)

    async def seen(self, name: str = "other") -> tuple[ServiceRecord, LaunchedRows]:
        """What a refusal leaves as it is."""
        rows = await self._driver.reply(GetLaunched(), LaunchedRows)
        return await self._driver.record(name), rows


@pytest.fixture
def source(monkeypatch: pytest.MonkeyPatch, boot: Boot, tmp_path: Path) -> Path:
    """The one file of the program `other`. `execd` is a script's, and asks nobody."""
    file = tmp_path / "launched_by_a_test.py"
    assert file.write_bytes(FILE) == len(FILE)
    monkeypatch.syspath_prepend(tmp_path)
    known = vars(plan_module)["PROGRAMS"]
    assert boot is not None, "the fixture has put a copy there"
    for name, module in (("execd", "nexus.services.timed"), ("other", file.stem)):
        monkeypatch.setitem(known, name, ProgramSource(name=name, module=module))
    return file


def run_starter(
    boot: Boot, source: Path, script: Script, *, is_there: bool = True
) -> tuple[Run, Any]:
    """Run the script as the service that `other` is started by. `is_there`: the kernel has it."""
    told: list[Any] = []
    digest = measured(ProgramSource(name="other", module=source.stem))

    async def starter(image: BootImage) -> int:
        driver = Driver(image)
        await driver.begin()
        told.append(await script(driver, Starts(driver, digest)))
        return 0

    mains: dict[str, Main] = {"execd": starter, "a": idle}
    text = STARTER.format(ends_with="execd")
    if not is_there:
        text = text.replace('program = "other"', 'program = "absent"')
    run = boot(text=text, mains=mains)
    return run, told[0]


# ---------------------------------------------------------------- whose it is to start


def test_what_starts_with_the_system_is_not_started_on_demand(boot: Boot, source: Path) -> None:
    async def script(driver: Driver, starts: Starts) -> Any:
        before = await starts.seen("a")
        outcomes = [await driver.ask(starts.of("a")), await driver.ask(NoteDenied("a"))]
        return outcomes, before, await starts.seen("a")

    run, (outcomes, before, after) = run_starter(boot, source, script)

    assert outcomes == [Refused(InitStatus.NOT_ON_DEMAND)] * 2
    assert after == before
    assert (after[0].state, after[0].spawn_refused, after[1].rows) == (TaskState.UP, 0, [])
    assert len(run.spawns("a")) == 1


def test_what_another_starts_is_not_on_demand_of_this_one(boot: Boot, source: Path) -> None:
    digest = measured(ProgramSource(name="other", module=source.stem))

    async def stranger(driver: Driver) -> Any:
        starts = Starts(driver, digest)
        before = await starts.seen()
        outcomes = [await driver.ask(starts.of()), await driver.ask(NoteDenied("other"))]
        return outcomes, before, await starts.seen()

    text = STARTER.format(ends_with="driver") + STRANGER
    run = boot(stranger, text=text, mains={"execd": idle, "a": idle})
    outcomes, before, after = run.result

    assert outcomes == [Refused(InitStatus.NOT_ON_DEMAND)] * 2
    assert after == before
    assert (after[0].state, after[0].spawn_refused) == (TaskState.ON_DEMAND, 0)
    assert run.spawns("other") == []


# ---------------------------------------------------------------- what is not started


def test_what_runs_is_not_started_a_second_time(boot: Boot, source: Path) -> None:
    async def script(driver: Driver, starts: Starts) -> Any:
        first = await driver.reply(starts.of(), Launched)
        await driver.pause(50 * MS)
        before = await starts.seen()
        outcome = await driver.ask(starts.of())
        return first, outcome, before, await starts.seen()

    run, (first, outcome, before, after) = run_starter(boot, source, script)

    assert outcome == Refused(InitStatus.RUNS)
    assert after == before
    assert (after[0].state, after[0].pid, after[0].generation) == (TaskState.UP, first.pid, 1)
    assert [each.pid for each in run.spawns("other")] == [first.pid]


@pytest.mark.parametrize(
    "content", [CHANGED, FILE + b"\n", None], ids=["changed", "longer", "gone"]
)
def test_a_program_whose_file_is_no_longer_that_of_the_plan_is_not_started(
    boot: Boot, source: Path, content: bytes | None
) -> None:
    async def script(driver: Driver, starts: Starts) -> Any:
        before = await starts.seen()
        put(source, content)
        refused = [await driver.ask(starts.of()), await driver.ask(starts.of())]
        after = await starts.seen()
        put(source, FILE)
        return refused, before, after, await driver.ask(starts.of())

    run, (refused, before, after, restored) = run_starter(boot, source, script)

    assert refused == [Refused(InitStatus.BAD_PROGRAM)] * 2
    assert after == before
    assert (after[0].state, after[1].rows) == (TaskState.ON_DEMAND, [])
    assert isinstance(restored, Launched)
    assert [each.pid for each in run.spawns("other")] == [restored.pid], "only the checked one"


@pytest.mark.parametrize("digest", ["", "0" * 64])
def test_a_program_that_the_starter_knows_by_another_digest_is_not_started(
    boot: Boot, source: Path, digest: str
) -> None:
    async def script(driver: Driver, starts: Starts) -> Any:
        before = await starts.seen()
        starts.digest = digest
        outcome = await driver.ask(starts.of())
        return outcome, before, await starts.seen()

    run, (outcome, before, after) = run_starter(boot, source, script)

    assert outcome == Refused(InitStatus.BAD_PROGRAM)
    assert after == before
    assert run.spawns("other") == []


def test_a_start_that_the_kernel_refuses_is_over_and_its_record_says_why(
    boot: Boot, source: Path
) -> None:
    async def script(driver: Driver, starts: Starts) -> Any:
        starts.digest = (await starts.seen())[0].program_digest
        first = await driver.ask(starts.of())
        after = await starts.seen()
        await driver.pause(500 * MS)  # its back-off, had it one
        return first, after, await starts.seen(), await driver.ask(starts.of())

    run, (first, after, later, second) = run_starter(boot, source, script, is_there=False)

    assert first == Refused(InitStatus.SPAWN_REFUSED)
    assert second == Refused(InitStatus.SPAWN_REFUSED), "and not that it runs"
    record, rows = after
    assert (record.state, record.pid, record.generation) == (TaskState.ON_DEMAND, 0, 0)
    assert (record.spawn_refused, record.spawn_reason) == (1, SpawnReason.INVALID_PAYLOAD)
    assert rows.rows == []
    assert later == after, "it is not tried again"
    assert run.spawns("other") == []


def test_nothing_is_started_in_a_system_that_is_going_down(boot: Boot, source: Path) -> None:
    async def script(driver: Driver, starts: Starts) -> Any:
        _ = await driver.reply(Shutdown(), ShuttingDown)
        outcome = await driver.ask(starts.of())
        return outcome, await starts.seen()

    run, (outcome, (record, rows)) = run_starter(boot, source, script)

    assert outcome == Refused(InitStatus.SPAWN_REFUSED)
    assert (record.pid, record.generation, rows.rows) == (0, 0, [])
    assert run.spawns("other") == []


# ---------------------------------------------------------------- what is not ended


def test_only_the_child_that_is_meant_is_ended(boot: Boot, source: Path) -> None:
    async def script(driver: Driver, starts: Starts) -> Any:
        unborn = await driver.ask(EndTask("other", 0))
        child = await driver.reply(starts.of(), Launched)
        await driver.pause(50 * MS)
        before = await starts.seen()
        refused = [
            await driver.ask(EndTask(name, generation))
            for name, generation in (("other", 0), ("other", 2), ("a", 1), ("nobody", 1))
        ]
        kept = await starts.seen() == before and before[0].pid == child.pid
        _ = await driver.reply(EndTask("other", child.generation), Ending)
        await driver.pause(50 * MS)
        again = await driver.ask(EndTask("other", child.generation))
        return [unborn, *refused, again], kept, await starts.seen()

    run, (refused, kept, (record, rows)) = run_starter(boot, source, script)

    assert refused == [Refused(InitStatus.NO_SUCH_CHILD)] * 6
    assert kept, "the child runs on"
    assert (record.state, record.exit_signal, rows.rows) == (TaskState.ON_DEMAND, 9, [])
    assert (len(run.spawns("a")), len(run.spawns("other"))) == (1, 1)


def put(file: Path, content: bytes | None) -> None:
    """The program's file from now on; None is that there is none."""
    if content is None:
        file.unlink()
    else:
        assert file.write_bytes(content) == len(content)
