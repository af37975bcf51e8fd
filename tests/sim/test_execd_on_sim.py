"""execd in a whole system on the simulated kernel: starting, waiting, denying, and crashes."""

import importlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import pytest

from nexus.abi import ConsoleWrite, EventKind, Nanos, Now, SleepUntil, SpawnReason
from nexus.init.programs import PROGRAMS
from nexus.ipc import Refused
from nexus.protocols.execd import (
    ARGUMENT_SIZE_MAX,
    ARGUMENTS_MAX,
    Ended,
    ExecdStatus,
    GetPrograms,
    Kill,
    Killed,
    ProgramRows,
    ReportExit,
    Restart,
    Started,
    Wait,
)
from nexus.protocols.hello import Greet, Greeting
from nexus.protocols.init import TaskState
from nexus.protocols.logd import EVERY_RECORD, Query, Records
from nexus.runtime.program import Context
from nexus.wire import ReplyStatus
from tests.fakes.execrig import DEMO_ENTRY, ExecHands, boot_sim, system, victim_of
from tests.fakes.initrig import MS, SECOND

pytestmark = pytest.mark.sim

LAST: Final = "the pump is at 80 percent"


async def _records(hands: ExecHands, key: str, value: str) -> list[dict[str, str]]:
    """The fields of every record of this boot with that field."""
    import msgspec

    wanted = msgspec.structs.replace(EVERY_RECORD, key=key, value=value)
    page = await hands.call("logd", Query(hands.boot_number, 1, 16, wanted))
    assert isinstance(page, Records), page
    return [
        {each.key: each.value for each in record.fields} | {"from": str(record.service)}
        for record in page.records
    ]


# ---------------------------------------------------------------- starting and waiting


def test_a_program_is_started_runs_and_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    async def script(hands: ExecHands) -> Any:
        child = await hands.started("demo.exit0")
        ended = await hands.ended(child.pid)
        again = await hands.ended(child.pid)
        assert again == ended
        return [child.pid, ended.pid, ended.code, ended.signal, ended.report]

    seen = boot_sim(monkeypatch, script)

    pid, ended_pid, code, signal, report = seen.result()
    assert pid == ended_pid
    assert (code, signal, report) == (0, 0, 0)
    line = f"execd: child exited pid={pid} code=0 name=demo.exit0 generation=1"
    assert seen.lines().count(line) == 1
    assert seen.lines().count("child: exit0 start") == 1
    assert not [each for each in seen.lines() if each.startswith("execd: crash report")]


def test_a_call_to_the_child_comes_back_with_its_pid_its_arguments_and_its_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def script(hands: ExecHands) -> Any:
        child = await hands.started("demo.hello", "one", "two words")
        await hands.find("demo.hello")
        greeting = await hands.once("demo.hello", Greet())
        assert isinstance(greeting, Greeting), greeting
        assert await hands.once("execd", Kill(child.pid)) == Killed()
        ended = await hands.ended(child.pid)
        pairs = [[each.key, each.value] for each in greeting.environment]
        return [child.pid, greeting.pid, greeting.arguments, pairs, ended.signal, ended.report]

    seen = boot_sim(monkeypatch, script)

    pid, greeted, arguments, pairs, signal, report = seen.result()
    assert greeted == pid
    assert arguments == ["one", "two words"]
    assert pairs == [["GREETING", "hello"]]
    assert (signal, report) == (9, 0), "an end that was asked for is no crash"
    (loaded,) = seen.evidence("execd: elf load ok")
    assert loaded["digest"] == loaded["planned"] == seen.plan.by_name["demo.hello"].program_digest
    assert loaded["pid"] == pid


def test_the_program_table_is_that_of_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    async def script(hands: ExecHands) -> Any:
        rows = await hands.once("execd", GetPrograms(0))
        assert isinstance(rows, ProgramRows), rows
        return [[row.name, row.digest] for row in rows.rows]

    seen = boot_sim(monkeypatch, script)

    planned = {each.name: each.program_digest for each in seen.plan.services if each.by}
    assert dict(seen.result()) == planned
    assert [each["programs"] for each in seen.evidence("execd: ready")] == [planned]


def test_one_waits_for_a_child_and_another_is_served_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def script(hands: ExecHands) -> Any:
        hello = await hands.started("demo.hello")
        execd = hands.client("execd")
        waiting = await execd.start(Wait(hello.pid), await hands.ahead(5 * SECOND))
        rows = await hands.once("execd", GetPrograms(0))
        exited = await hands.started("demo.exit0")
        first = await hands.ended(exited.pid)
        assert await hands.once("execd", Kill(hello.pid)) == Killed()
        last = await execd.finish(waiting)
        assert isinstance(last, Ended), last
        return [isinstance(rows, ProgramRows), first.pid == exited.pid, last.pid == hello.pid]

    seen = boot_sim(monkeypatch, script)

    assert seen.result() == [True, True, True]


def test_what_execd_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    async def script(hands: ExecHands) -> Any:
        child = await hands.started("demo.hello")
        long = ["x" * ARGUMENT_SIZE_MAX] * ARGUMENTS_MAX
        forged = ReportExit(
            "demo.hello",
            child.pid,
            child.generation,
            code=1,
            signal=0,
            started=0,
            ended=0,
            digest="",
            reason="",
            action="",
            asked=False,
            again=False,
            lost=0,
        )
        outcomes = [
            await hands.start("demo.hello"),
            await hands.start("driver"),
            await hands.start("nobody"),
            await hands.start("demo.exit0", *long),
            await hands.once("execd", Wait(0xFFFF_FFF0)),
            await hands.once("execd", Kill(0xFFFF_FFF0)),
            await hands.once("execd", forged),
        ]
        assert all(isinstance(each, Refused) for each in outcomes), outcomes
        return [each.status.name for each in outcomes]

    seen = boot_sim(monkeypatch, script)

    assert seen.result() == [
        ExecdStatus.RUNNING.name,
        ExecdStatus.NO_PROGRAM.name,
        ExecdStatus.NO_PROGRAM.name,
        ExecdStatus.OVER_LIMIT.name,
        ExecdStatus.NOT_FOUND.name,
        ExecdStatus.NOT_FOUND.name,
        ReplyStatus.DENIED.name,
    ]


@pytest.fixture
def exit0_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """demo.exit0 is a copy of itself, and this is its file."""
    source = PROGRAMS["demo.exit0"]
    original = importlib.import_module(source.module).__file__
    assert original is not None
    file = tmp_path / "exit0_of_a_test.py"
    assert file.write_bytes(Path(original).read_bytes()) > 0
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(PROGRAMS, source.name, replace(source, module=file.stem))
    yield file
    _ = sys.modules.pop(file.stem, None)


def _change_one_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    assert file.write_bytes(content) == len(content)


def test_a_program_whose_file_has_one_byte_changed_is_not_started(
    monkeypatch: pytest.MonkeyPatch, exit0_file: Path
) -> None:
    async def script(hands: ExecHands) -> Any:
        before = await hands.record("demo.exit0")
        _change_one_bit(exit0_file)
        refused = await hands.start("demo.exit0")
        after = await hands.record("demo.exit0")
        _change_one_bit(exit0_file)
        child = await hands.started("demo.exit0")
        return [refused.status.name, after == before, after.state, child.pid, child.generation]

    seen = boot_sim(monkeypatch, script)

    status, is_unchanged, state, pid, generation = seen.result()
    assert status == ExecdStatus.BAD_DIGEST.name
    assert is_unchanged
    assert (state, generation) == (TaskState.ON_DEMAND, 1)
    assert _pids(seen.events, "demo.exit0") == [pid], "only the one of the plan"


def test_a_program_that_init_cannot_start_has_failed_and_another_can_be_started(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def script(hands: ExecHands) -> Any:
        refused = [await hands.start("lost"), await hands.start("lost")]
        record = await hands.record("lost")
        other = await hands.started("demo.exit0")
        _ = await hands.ended(other.pid)
        return [
            [each.status.name for each in refused],
            record.state,
            record.pid,
            record.spawn_reason,
        ]

    text = system() + DEMO_ENTRY.format(name="lost")
    seen = boot_sim(monkeypatch, script, text=text, absent=["lost"])

    refused, state, pid, reason = seen.result()
    assert refused == [ExecdStatus.FAILED.name] * 2, "and not that it runs"
    assert (state, pid, reason) == (TaskState.ON_DEMAND, 0, SpawnReason.INVALID_PAYLOAD)
    assert _pids(seen.events, "lost") == []


def _pids(events: Any, name: str) -> list[int]:
    return [
        each.pid for each in events if each.kind is EventKind.SPAWN and each.fields["name"] == name
    ]


def _spawns(events: Any) -> list[str]:
    return [str(each.fields["name"]) for each in events if each.kind is EventKind.SPAWN]


# ---------------------------------------------------------------- who may


def test_a_start_in_anothers_name_is_denied_and_nothing_is_started(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def script(hands: ExecHands) -> Any:
        refused = await hands.start("demo.exit0", requester="statefsd")
        record = await hands.record("demo.exit0")
        await hands.pause(50 * MS)
        audits = await _records(hands, "action", "proc.spawn")
        denied = [each for each in audits if each["decision"] == "deny"]
        told = [[each["reason"], each["subject"], each["target"]] for each in denied]
        return [refused.status.name, record.spawn_reason, record.spawn_refused, record.state, told]

    seen = boot_sim(monkeypatch, script)

    status, reason, count, state, denied = seen.result()
    assert (status, reason, count) == ("DENIED", SpawnReason.DENIED_BY_POLICY, 1)
    assert state == TaskState.ON_DEMAND
    assert denied == [["identity", "execd", "demo.exit0"]]
    assert "demo.exit0" not in _spawns(seen.events)


def test_a_service_without_the_right_for_this_program_is_denied(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = system(clients={}).replace('"proc.spawn", "crash.read",\n', '"proc.spawn:demo.exit0",\n')
    assert '"proc.spawn:demo.exit0"' in text

    async def script(hands: ExecHands) -> Any:
        allowed = await hands.started("demo.exit0")
        denied = await hands.start("demo.exit42")
        record = await hands.record("demo.exit42")
        return [isinstance(allowed, Started), denied.status.name, record.spawn_reason]

    seen = boot_sim(monkeypatch, script, text=text)

    assert seen.result() == [True, "DENIED", SpawnReason.DENIED_BY_POLICY]
    assert "demo.exit42" not in _spawns(seen.events)


# ---------------------------------------------------------------- crashes


def test_a_crash_is_one_record_and_a_durable_report_with_the_last_words(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def script(hands: ExecHands) -> Any:
        child = await hands.started("demo.exit42")
        ended = await hands.ended(child.pid)
        report = await hands.report(ended.report)
        await hands.pause(100 * MS)
        found = await _records(hands, "event", "crash.v1")
        crash = report.crash
        return {
            "pid": [child.pid, ended.pid, crash.pid],
            "code": [ended.code, crash.code],
            "who": [crash.name, crash.generation, crash.digest, crash.action, crash.reason],
            "duration": crash.duration,
            "last": [each.text for each in report.records],
            "kept": report.kept,
            "records": found,
            "report": ended.report,
        }

    seen = boot_sim(monkeypatch, script)

    told = seen.result()
    pid = told["pid"][0]
    digest = seen.plan.by_name["demo.exit42"].program_digest
    assert told["pid"] == [pid] * 3
    assert told["code"] == [42, 42]
    assert told["who"] == ["demo.exit42", 1, digest, "not started again", "exit"]
    assert told["last"][-1] == "about to end with 42 code=42"
    assert told["kept"] is True
    assert told["report"] == 1
    (record,) = told["records"]
    assert record["from"] == str(seen.plan.by_name["execd"].service)
    assert (record["pid"], record["code"], record["name"]) == (str(pid), "42", "demo.exit42")
    assert record["build"] == digest
    assert record["report"] == "1"
    assert record["last"] == told["last"][-1]
    line = f"execd: crash report pid={pid} code=42 name=demo.exit42 generation=1"
    assert seen.lines().count(line) == 1


def test_a_child_that_is_to_be_restarted_comes_back_until_it_crashes_too_often(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def script(hands: ExecHands) -> Any:
        child = await hands.started("demo.exit42", restart=Restart.ON_CRASH)
        _ = await hands.ended(child.pid)

        async def given_up() -> bool:
            return (await hands.record("demo.exit42")).state is TaskState.FAILED

        _ = await hands.until(given_up)
        record = await hands.record("demo.exit42")

        async def told() -> bool:
            return len(await hands.all_crashes("demo.exit42")) == record.generation

        _ = await hands.until(told)
        crashes = await hands.all_crashes("demo.exit42")
        again = await hands.start("demo.exit42")
        return [record.generation, [each.action for each in crashes], type(again).__name__]

    seen = boot_sim(monkeypatch, script)

    generation, actions, again = seen.result()
    assert generation == 11
    assert actions[0] == "started again after 10 ms, restart 1"
    assert actions[1] == "started again after 20 ms, restart 2"
    assert actions[-1] == "given up after 11 restarts"
    assert again == "Started", "who wants it may have it started anew"


def test_a_child_that_is_killed_while_it_is_to_be_started_again_can_be_started_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def script(hands: ExecHands) -> Any:
        child = await hands.started("demo.exit42", restart=Restart.ON_CRASH)
        _ = await hands.ended(child.pid)

        killed = await hands.once("execd", Kill(child.pid))
        record = await hands.record("demo.exit42")
        again = await hands.start("demo.exit42")
        return [type(killed).__name__, record.state is TaskState.ON_DEMAND, type(again).__name__]

    seen = boot_sim(monkeypatch, script)

    assert seen.result() == ["Killed", True, "Started"]


async def _fails(context: Context) -> None:
    context.log.info(LAST, pump=1)
    raise RuntimeError("the valve is stuck")


async def _is_killed(context: Context) -> None:
    context.log.info(LAST, pump=1)
    await ConsoleWrite("driver: outside kill victim")
    _ = await SleepUntil(Nanos(await Now() + 60 * SECOND))


@pytest.mark.parametrize(("die", "code", "signal"), [(_fails, 70, 0), (_is_killed, 0, 9)])
def test_the_last_record_of_a_service_that_dies_is_in_its_report(
    monkeypatch: pytest.MonkeyPatch, die: Any, code: int, signal: int
) -> None:
    async def script(hands: ExecHands) -> Any:
        report = await hands.crash_of("victim")
        texts = [each.text for each in report.records]
        crash = report.crash
        return [texts, crash.code, crash.signal, crash.action, report.traceback]

    seen = boot_sim(
        monkeypatch,
        script,
        text=system(clients={"victim": ()}, without=("metricsd",)),
        victims={"victim": victim_of(die)},
        crashes=True,
    )

    texts, found_code, found_signal, action, traceback = seen.result()
    assert (found_code, found_signal) == (code, signal)
    assert f"{LAST} pump=1" in texts
    assert action.startswith("started again after 500 ms")
    if signal:
        assert texts[-1] == f"{LAST} pump=1"
        assert traceback == ""
    else:
        assert texts[-1].startswith("RuntimeError: the valve is stuck at ")
        assert "_fails" in traceback


def test_reports_are_there_after_a_reboot_and_numbers_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def script(hands: ExecHands) -> Any:
        before = await hands.all_crashes()
        child = await hands.started("demo.exit42")
        ended = await hands.ended(child.pid)
        texts = []
        for crash in before:
            report = await hands.report(crash.report)
            texts.append([report.records[-1].text, report.kept])
        return [[each.report for each in before], texts, ended.report]

    first = boot_sim(monkeypatch, script)
    second = boot_sim(monkeypatch, script, disk=first.disk)

    assert first.result() == [[], [], 1]
    assert second.result() == [[1], [["about to end with 42 code=42", True]], 2]


def test_a_report_without_journal_metrics_and_store_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = system(without=("metricsd", "statefsd")).replace(
        'uses = { "policyd" = {}, "logd" = {} }\nrestart', 'uses = { "policyd" = {} }\nrestart', 1
    )

    async def script(hands: ExecHands) -> Any:
        child = await hands.started("demo.exit42")
        ended = await hands.ended(child.pid)
        report = await hands.report(ended.report)
        return [report.crash.code, report.records, report.missing, report.kept]

    seen = boot_sim(monkeypatch, script, text=text)

    code, records, missing, kept = seen.result()
    assert (code, records, kept) == (42, [], False)
    assert missing == "records: logd, not in its uses; spans: metricsd, not in its uses"


def test_an_execd_that_was_killed_knows_its_children_again_and_has_its_own_report(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def script(hands: ExecHands) -> Any:
        hello = await hands.started("demo.hello")
        await hands.outside("kill execd")
        report = await hands.crash_of("execd")
        waiting = await hands.client("execd").start(Wait(hello.pid), await hands.ahead(SECOND))
        killed = await hands.once("execd", Kill(hello.pid))
        ended = await hands.client("execd").finish(waiting)
        assert isinstance(ended, Ended), ended
        return [report.crash.signal, killed == Killed(), ended.pid == hello.pid, ended.signal]

    seen = boot_sim(monkeypatch, script)

    assert seen.result() == [9, True, True, 9]


def test_a_child_that_hangs_is_killed_and_its_report_says_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def hangs(context: Context) -> None:
        context.log.info(LAST)
        _ = await SleepUntil(Nanos(await Now() + 60 * SECOND))

    async def script(hands: ExecHands) -> Any:
        report = await hands.crash_of("victim", wait=10 * SECOND)
        texts = [each.text for each in report.records]
        return [report.crash.signal, report.crash.reason, texts[-1]]

    text = system(clients={"victim": ()}, without=("metricsd",)).replace(
        'health = { deadline = "20s", every = "0s" }\nrestart',
        'health = { deadline = "2s", every = "100ms", answer = "200ms" }\nrestart',
    )
    seen = boot_sim(monkeypatch, script, text=text, victims={"victim": victim_of(hangs)})

    assert seen.result() == [9, "hang", LAST]


def test_spans_that_were_open_and_the_trace_are_in_the_report(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def dies_inside(context: Context) -> None:
        with context.metrics.span("pump.Before"):
            pass
        _ = context.metrics.span("pump.Turn").__enter__()  # never left: here a killed task unwinds
        await ConsoleWrite("driver: outside kill victim")
        _ = await SleepUntil(Nanos(await Now() + 60 * SECOND))

    async def script(hands: ExecHands) -> Any:
        report = await hands.crash_of("victim")
        spans = [[each.name, each.end > 0] for each in report.spans]
        return [spans, report.missing]

    seen = boot_sim(
        monkeypatch,
        script,
        text=system(clients={"victim": ()}),
        victims={"victim": victim_of(dies_inside)},
    )

    spans, missing = seen.result()
    assert missing == ""
    assert [each for each in spans if each[0].startswith("pump.")] == [
        ["pump.Before", True],
        ["pump.Turn", False],
    ]


def test_a_policyd_that_is_away_denies_every_start(monkeypatch: pytest.MonkeyPatch) -> None:
    async def script(hands: ExecHands) -> Any:
        await hands.outside("kill policyd")
        denied = await hands.start("demo.exit0")
        return denied.status.name

    seen = boot_sim(monkeypatch, script)

    assert seen.result() == "DENIED"
    assert "demo.exit0" not in _spawns(seen.events)
