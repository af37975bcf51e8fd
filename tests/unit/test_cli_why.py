"""`nexus why` in words: the cause, what was done, and what cannot be known."""

import json
import signal
from typing import Any

import msgspec
import pytest

from nexus.abi import SpawnReason
from nexus.cli.why import REASONS, Story, cause, document, lines, signal_name
from nexus.init.reasons import Reason
from nexus.protocols.execd import Crash, LastRecord, LastSpan, Report
from nexus.protocols.init import (
    Health,
    ServiceRecord,
    SystemInfo,
    SystemState,
    TaskState,
    TrialState,
)
from nexus.protocols.logd import Field, Level, Record

SECOND = 1_000_000_000
WALL = 1_790_000_000 * SECOND


def record_of(**values: Any) -> ServiceRecord:
    well = ServiceRecord(
        state=TaskState.UP,
        health=Health.OK,
        pid=7,
        generation=1,
        restarts=0,
        died=0,
        exit_code=0,
        exit_signal=0,
        reason="",
        spawn_refused=0,
        spawn_reason=0,
        probe_nonce=0,
        program_digest="d",
    )
    return msgspec.structs.replace(well, **values)


def system_of(**values: Any) -> SystemInfo:
    ready = SystemInfo(
        name="plant",
        digest="d",
        state=SystemState.READY,
        why="",
        started=0,
        ready=1,
        now=100 * SECOND,
        boots=3,
        boot_id=bytes(16),
        policy_generation=1,
        policy_digest="d",
        policy_available=True,
        slot="",
        set_version=0,
        set_digest="",
        trial=TrialState.NONE,
    )
    return msgspec.structs.replace(ready, **values)


def crash_of(**values: Any) -> Crash:
    killed = Crash(
        report=4,
        boot=2,
        wall=WALL,
        name="pump",
        pid=7,
        generation=1,
        code=0,
        signal=9,
        duration=3 * SECOND,
        digest="0123456789abcdef0123",
        reason="exit",
        action="started again after 50 ms, restart 1",
    )
    return msgspec.structs.replace(killed, **values)


def report_of(crash: Crash, **values: Any) -> Report:
    plain = Report(crash, [], [], "", "", "", True)
    return msgspec.structs.replace(plain, **values)


def told(story: Story) -> str:
    return "\n".join(lines(story))


def test_a_service_that_is_well_is_said_to_be() -> None:
    story = Story("pump", record_of(), system_of())

    assert told(story) == "pump: up, health ok, process 7; nothing has happened to it"


def test_nothing_is_said_to_be_well_that_could_not_be_asked() -> None:
    story = Story(
        "pump", record_of(), system_of(), unknown=("crash reports: operator has no right",)
    )

    assert "nothing has happened" not in told(story)
    assert "not known: crash reports: operator has no right" in told(story)


@pytest.mark.parametrize(
    ("crash", "found"),
    [
        (crash_of(), "killed from outside: by somebody, or because the machine had no memory left"),
        (crash_of(signal=signal.SIGSYS), "it made a system call that its sandbox denies"),
        (crash_of(signal=signal.SIGPIPE), "SIGPIPE ended it"),
        (crash_of(signal=63), "signal 63 ended it"),
        (
            crash_of(reason="hang"),
            "it hung: it no longer answered its health probe, and was killed",
        ),
        (
            crash_of(reason="memory limit"),
            "it took more memory than it may, and was killed for it, alone",
        ),
        (crash_of(signal=0, code=3), "it ended by itself with code 3"),
    ],
)
def test_the_cause_of_a_crash(crash: Crash, found: str) -> None:
    assert cause(report_of(crash)) == found


def test_each_of_init_s_words_for_an_end_means_something_to_a_person() -> None:
    assert {*REASONS, Reason.EXIT} == {*Reason}


def test_an_error_with_its_traceback_is_the_cause() -> None:
    report = report_of(
        crash_of(signal=0, code=70),
        records=[LastRecord(WALL, 0, "ValueError: stuck at pump.py:7 turn")],
        traceback="pump.py:3 run > pump.py:7 turn",
    )
    story = Story("pump", record_of(), system_of(), (report.crash,), report)

    assert cause(report).startswith("an error that nobody expected: ValueError: stuck at")
    assert "traceback  pump.py:3 run\n               pump.py:7 turn" in told(story)


def test_the_story_has_the_evidence_what_was_done_and_what_is_missing() -> None:
    report = report_of(
        crash_of(),
        records=[LastRecord(WALL, Level.WARN, "hot"), LastRecord(WALL, 99, "level nobody knows")],
        spans=[
            LastSpan("pump.Turn", WALL, WALL + 2_000_000),
            LastSpan("pump.Look", WALL, WALL + 43_210),
            LastSpan("pump.Stop", WALL, 0),
        ],
        trace="ab" * 16,
        missing="spans: metricsd, TimedOut",
        kept=False,
    )
    story = Story("pump", record_of(restarts=2), system_of(), (report.crash,), report)

    text = told(story)

    assert "pump: up, health ok, process 7, restarted 2 times in this boot" in text
    for part in (
        "pump crashed: SIGKILL\n",
        "generation 1, ran 3.0s",
        "warn  hot",
        "pump.Turn took 2.0 ms",
        "pump.Look took 43.2 us",
        "pump.Stop was open",
        f"trace      {'ab' * 16}",
        "build 0123456789abcdef",
        "missing    spans: metricsd, TimedOut",
        "then       started again after 50 ms, restart 1",
        "report     4, not yet durable",
    ):
        assert part in text


def test_a_crash_before_a_reboot_says_so_and_earlier_ones_are_listed() -> None:
    last, first = crash_of(boot=1), crash_of(report=1, boot=0, signal=0, code=5)
    story = Story("pump", record_of(), system_of(), (first, last), report_of(last))

    assert "SIGKILL, in boot 2, before this one" in told(story)
    assert "1 more on record" in told(story)
    assert "report 1: exit code 5; started again" in told(story)


def test_safe_mode_and_a_service_that_was_given_up_are_told() -> None:
    record = record_of(state=TaskState.LEFT_OUT, pid=0)
    system = system_of(state=SystemState.SAFE, why="pump: more than 5 restarts")

    assert "the system is in safe mode: pump: more than 5 restarts" in told(
        Story("valve", record, system)
    )
    denied = record_of(state=TaskState.FAILED, pid=0, reason="denied")
    assert "the policy denies it something that its entry asks for" in told(
        Story("valve", denied, system_of())
    )


def test_a_denied_start_names_who_was_denied_and_where_to_look() -> None:
    fields = {"subject": "operator", "reason": "policy", "target": "report", "decision": "deny"}
    audit = Record(
        record=9,
        boot=2,
        at=1,
        written=1,
        wall=WALL,
        trace=b"",
        span=b"",
        level=Level.WARN,
        service=1,
        pid=1,
        generation=1,
        scope="policyd.audit",
        text="audit",
        fields=[Field(key, value) for key, value in fields.items()],
    )
    record = record_of(
        state=TaskState.ON_DEMAND,
        pid=0,
        spawn_refused=2,
        spawn_reason=SpawnReason.DENIED_BY_POLICY,
    )
    text = told(Story("report", record, system_of(), denials=(audit,)))

    assert "a start was refused 2 times, the last time: the policy denies it" in text
    assert "operator may not start it, reason policy" in text
    assert "see `nexus explain operator execd proc.spawn:report`" in text


def test_the_story_as_json_says_the_same() -> None:
    report = report_of(crash_of(), records=[LastRecord(WALL, 0, "hot")])
    story = Story("pump", record_of(), system_of(), (report.crash,), report)

    found = json.loads(json.dumps(document(story), default=msgspec.structs.asdict))

    assert found["report"]["signal"] == "SIGKILL"
    assert found["report"]["records"] == [{"at": WALL, "level": 0, "text": "hot"}]
    assert (found["boot"], found["report"]["boot"]) == (3, 3)
    assert found["report"]["cause"].startswith("killed from outside")


def test_a_signal_without_a_name_keeps_its_number() -> None:
    assert [signal_name(9), signal_name(63)] == ["SIGKILL", "signal 63"]
