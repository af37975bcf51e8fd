"""The verdict on synthetic event streams: what is green, and every way to be red."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from nexus.abi import INIT_NAME, Event, EventKind, Nanos, Pid, service_id
from nexus.bootctl.handover import EXIT_ENDED, EXIT_STOPPED
from nexus.init.plan import Plan, load_plan
from nexus.proof.expected import Scope, boots_of, is_cut, last_boot_of, not_run
from nexus.proof.trace import Ending, Line, Trace
from nexus.proof.verdict import (
    Case,
    Mismatch,
    State,
    Verdict,
    failed_rung_of,
    judge,
    rung_of,
)
from nexus.protocols.ladder import (
    KERNEL,
    RUNGS,
    SELFTEST,
    Boot,
    Ground,
    Mechanism,
    Phase,
    boot_of,
    rung,
)

SERVICES = ("timed", "demo.testsvc", "demo.interactive", SELFTEST)
NAMES = (*SERVICES, "policyd", "logd", "statefsd")
PIDS = {INIT_NAME: Pid(1)} | {name: Pid(10 + at) for at, name in enumerate(NAMES)}
SCOPE = Scope(ground=Ground.LINUX, smp=1, services=SERVICES)
SLOTTED = load_plan(Path(__file__).parents[2] / "systems" / "selftest.toml")
PLAN = Plan(name="test", smp=1, total_size=0, root_size=0, ends_with=None, services=())


def _accept(_case: Case, _trace: Trace, _line: Line) -> None:
    """A check that finds nothing wrong."""


def _case(scope: Scope = SCOPE, until: str | None = None, **checks: Any) -> Case:
    accept_all = {row.number: _accept for row in RUNGS if row.printer != SELFTEST}
    mine = {int(name.removeprefix("rung")): check for name, check in checks.items()}
    return Case(scope=scope, plan=PLAN, checks=accept_all | mine, until=until)


class Stream:
    """An event stream in the making, one tick of the clock per event."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        for name in SERVICES:
            self.add(EventKind.SPAWN, PIDS[name], name=name, generation=1, program=name)

    def add(self, kind: EventKind, pid: int, **fields: object) -> None:
        self.events.append(Event(Nanos(len(self.events) * 1000), kind, Pid(pid), fields))

    def line(
        self,
        text: str,
        printer: str,
        evidence: Mapping[str, object] | None = None,
        *,
        pid: int | None = None,
        generation: int = 1,
    ) -> None:
        evidence = {"seen": 1} if evidence is None else evidence
        if printer == KERNEL:
            self.add(EventKind.KERNEL, 0, line=text, evidence=evidence)
            return
        stamped = PIDS[printer] if pid is None else pid
        fields = {"name": printer, "generation": generation, "line": text, "evidence": evidence}
        self.add(EventKind.CONSOLE, stamped, **fields)

    def climb(self, scope: Scope = SCOPE, *, without: tuple[int, ...] = ()) -> None:
        for row in _run(scope):
            if row not in without:
                self.line(rung(row).marker, rung(row).printer)


def _run(scope: Scope) -> Iterator[int]:
    outside = not_run(scope)
    return (row.number for row in RUNGS if row.number not in outside)


def _green(scope: Scope = SCOPE, *, without: tuple[int, ...] = ()) -> Stream:
    stream = Stream()
    stream.climb(scope, without=without)
    return stream


def _judge(stream: Stream, case: Case | None = None, output: str = "", **ending: Any) -> Verdict:
    return judge(case or _case(), Trace(tuple(stream.events), output, Ending(**ending)))


def _state(verdict: Verdict, number: int) -> State:
    return verdict.results[number - 1].state


def _red(verdict: Verdict) -> list[int]:
    return [result.number for result in verdict.of(State.RED)]


def test_a_full_climb_is_green_and_names_nothing_missing() -> None:
    verdict = _judge(_green())

    assert verdict.exit_code == 0
    assert verdict.first_failed_phase == ""
    assert verdict.missing_marker == ""
    assert {result.number for result in verdict.of(State.PASSED)} == set(_run(SCOPE))


def test_the_rungs_of_a_small_system_on_linux_are_those_of_the_issue() -> None:
    expected = {1, 2, 3, 5, 13, 14, 27, 28, 29, 32, *range(56, 74), 75, 76, 95, 96, 142, 143, 144}

    assert set(_run(SCOPE)) == expected


def test_the_rungs_of_a_small_system_on_two_simulated_cpus_add_the_smp_rows() -> None:
    scope = Scope(ground=Ground.SIM, smp=2, services=SERVICES)

    assert set(_run(scope)) == set(_run(SCOPE)) - {95} | {4, *range(39, 48)}


def test_every_reason_for_not_running_is_told_apart() -> None:
    scope = Scope(ground=Ground.LINUX, smp=1, services=SERVICES, phase=Phase.IPC)
    reasons = not_run(scope)

    assert reasons[4] == "not on ground linux"
    assert reasons[6] == "not in this system: policyd"
    assert reasons[9] == "not in this system: logd"
    assert reasons[144] == "behind RUN_PHASE=ipc"
    assert not_run(Scope(ground=Ground.SIM, smp=1, services=SERVICES))[39].startswith("SMP=1")


def test_a_mechanism_that_is_built_makes_its_rows_run() -> None:
    without = dataclasses.replace(SCOPE, built=frozenset())

    assert not_run(without)[96] == "not built yet: a watchdog for tasks that stop answering"
    assert 96 not in not_run(dataclasses.replace(without, built=frozenset({Mechanism.WATCHDOG})))


def test_a_rung_that_fails_behind_a_red_one_is_blocked() -> None:
    stream = _green(without=(61, 63))
    stream.line("SELFTEST: ipc forged identity refused FAIL of what came before", SELFTEST)
    verdict = _judge(stream)

    assert _red(verdict) == [61]
    assert _state(verdict, 63) is State.BLOCKED
    assert verdict.exit_code == 1


def test_a_missing_line_is_red_and_what_comes_behind_it_is_blocked() -> None:
    verdict = _judge(_green(without=(56, 61, 62, 63, 64)))

    assert _red(verdict) == [56]
    assert _state(verdict, 61) is State.BLOCKED
    assert _state(verdict, 64) is State.BLOCKED  # behind 63, behind 61
    assert _state(verdict, 65) is State.PASSED  # comes after 56 too, but was printed
    assert verdict.exit_code == 1
    assert verdict.missing_marker == "SELFTEST: ipc routing ok"
    assert verdict.first_failed_phase == "ipc"


def test_the_red_rung_with_the_lowest_number_is_named_whatever_came_first() -> None:
    verdict = _judge(_green(without=(75, 59)))

    assert _red(verdict) == [59, 75]
    assert verdict.missing_marker == rung(59).marker


def test_the_end_is_blocked_behind_any_red_rung_even_when_it_was_printed() -> None:
    verdict = _judge(_green(without=(75,)))

    assert _red(verdict) == [75]
    assert _state(verdict, 144) is State.BLOCKED


def test_a_selftest_line_from_another_sender_is_forged() -> None:
    stream = _green(without=(75,))
    stream.line("SELFTEST: qos ok", "demo.testsvc")

    verdict = _judge(stream)

    assert _red(verdict) == [75]
    assert "forged" in verdict.results[74].reason


def test_a_line_whose_pid_is_not_that_of_the_task_it_names_is_forged() -> None:
    stream = _green(without=(75,))
    stream.line("SELFTEST: qos ok", SELFTEST, pid=PIDS["demo.testsvc"])

    verdict = _judge(stream)

    assert _red(verdict) == [75]
    assert any("is not selftest-client" in finding for finding in verdict.findings)


def test_a_second_task_that_calls_itself_init_is_an_impostor() -> None:
    stream = _green(without=(29,))
    stream.line("init: ready", INIT_NAME, pid=99)

    assert _red(_judge(stream)) == [29]


def test_a_line_by_the_right_sender_does_not_heal_a_forged_one() -> None:
    stream = _green()
    stream.line("SELFTEST: qos ok", "demo.testsvc")

    assert _red(_judge(stream)) == [75]


def test_a_selftest_line_without_evidence_is_red() -> None:
    stream = _green(without=(75,))
    stream.line("SELFTEST: qos ok", SELFTEST, {})

    verdict = _judge(stream)

    assert _red(verdict) == [75]
    assert "no evidence" in verdict.results[74].reason


def test_a_marker_printed_twice_is_red() -> None:
    stream = _green()
    stream.line("SELFTEST: qos ok", SELFTEST)

    verdict = _judge(stream)

    assert _red(verdict) == [75]
    assert "printed again" in verdict.results[74].reason


def test_a_restarted_service_may_say_again_that_it_is_ready() -> None:
    stream = _green()
    stream.add(EventKind.SPAWN, 50, name="timed", generation=2, program="timed")
    stream.line("timed: ready", "timed", pid=50, generation=2)

    assert _judge(stream).exit_code == 0


def test_a_service_that_says_twice_in_one_life_that_it_is_ready_is_red() -> None:
    stream = _green()
    stream.line("timed: ready", "timed")

    assert _red(_judge(stream)) == [32]


def test_a_broken_edge_turns_the_later_rung_red() -> None:
    stream = Stream()
    stream.line("SELFTEST: qos ok", SELFTEST)
    stream.climb(without=(75,))

    verdict = _judge(stream)

    assert _red(verdict) == [75]
    assert verdict.results[74].reason == "printed before #29"


def test_an_edge_to_a_red_rung_is_not_charged_to_the_later_one() -> None:
    def differ(_case: Case, _trace: Trace, _line: Line) -> None:
        raise Mismatch("printed after the readiness deadline")

    stream = _green(without=(32, 144))
    stream.line("timed: ready", "timed")
    stream.line("SELFTEST: end", SELFTEST)

    assert _red(_judge(stream, _case(rung32=differ))) == [32]


def test_order_is_not_checked_where_there_is_no_edge() -> None:
    stream = Stream()
    stream.climb(without=(75, 142, 143, 144))
    for number in (142, 75, 143, 144):
        stream.line(rung(number).marker, rung(number).printer)

    assert _judge(stream).exit_code == 0


def test_the_fail_form_of_a_line_turns_its_rung_red() -> None:
    stream = _green(without=(75,))
    stream.line("SELFTEST: qos FAIL own class: 2, expected 1", SELFTEST)

    verdict = _judge(stream)

    assert _red(verdict) == [75]
    assert "own class" in verdict.results[74].reason


def test_a_fail_line_that_begins_like_the_marker_is_never_taken_for_it() -> None:
    failing = "SELFTEST: statefs unauthorized access rejected FAIL status 0"

    assert rung_of(failing) is None
    assert failed_rung_of(failing) == rung(101)


def test_the_fail_line_of_one_rung_is_not_charged_to_another_with_the_same_beginning() -> None:
    assert failed_rung_of("SELFTEST: ipc routing FAIL why") == rung(56)
    assert failed_rung_of("SELFTEST: ipc routing policyd FAIL why") == rung(53)


def test_a_stray_fail_line_denies_the_end() -> None:
    stream = _green()
    stream.line("demo: something FAIL", "demo.testsvc")

    verdict = _judge(stream)

    assert _red(verdict) == [144]
    assert verdict.missing_marker == "SELFTEST: end"


def test_a_line_that_claims_a_rung_nobody_knows_is_red() -> None:
    stream = _green()
    stream.line("SELFTEST: everything is fine ok", SELFTEST)

    verdict = _judge(stream)

    assert _red(verdict) == [144]
    assert "unexpected line" in verdict.findings[0]


def test_a_marker_with_something_behind_it_is_no_marker() -> None:
    stream = _green(without=(75,))
    stream.line("SELFTEST: qos ok really", SELFTEST)

    assert _red(_judge(stream)) == [75]


def test_a_rung_printed_where_it_cannot_be_proved_makes_the_run_red() -> None:
    stream = _green()
    stream.line("KSELFTEST: work stealing ok", KERNEL)

    verdict = _judge(stream)

    assert verdict.exit_code == 1
    assert _state(verdict, 45) is State.NOT_RUN


def test_a_line_behind_the_last_phase_is_neither_a_pass_nor_red() -> None:
    scope = dataclasses.replace(SCOPE, phase=Phase.BRING_UP)

    verdict = _judge(_green(), _case(scope))

    assert verdict.exit_code == 0
    assert _state(verdict, 75) is State.NOT_RUN


def test_a_statement_that_no_check_compares_is_red() -> None:
    case = dataclasses.replace(_case(), checks={})

    assert 5 in _red(_judge(_green(), case))


def test_a_check_that_finds_a_difference_turns_its_rung_red() -> None:
    def differ(_case: Case, _trace: Trace, _line: Line) -> None:
        raise Mismatch("plan digest: 'a', expected 'b'")

    verdict = _judge(_green(), _case(rung5=differ))

    assert _red(verdict) == [5]
    assert _state(verdict, 13) is State.PASSED


def test_a_check_that_cannot_read_the_evidence_turns_its_rung_red() -> None:
    def stumble(_case: Case, _trace: Trace, line: Line) -> None:
        assert line.evidence["digest"]

    assert _red(_judge(_green(), _case(rung5=stumble))) == [5]


def test_one_cpu_line_per_further_cpu_is_expected_and_no_more() -> None:
    scope = Scope(ground=Ground.SIM, smp=3, services=SERVICES)
    stream = _green(scope)
    stream.line("KINIT: cpu2 online", KERNEL)
    assert _judge(stream, _case(scope)).exit_code == 0

    stream.line("KINIT: cpu3 online", KERNEL)
    assert _red(_judge(stream, _case(scope))) == [144]


@pytest.mark.parametrize(
    "output",
    [
        "Traceback (most recent call last):\n  File ...",
        "Fatal Python error: Segmentation fault",
        "kernel panic: no progress",
        "something FAIL",
    ],
)
def test_a_crash_anywhere_in_the_output_is_red(output: str) -> None:
    assert _red(_judge(_green(), output=output)) == [144]


@pytest.mark.parametrize(
    "ending",
    [
        {"code": 1},
        {"signal": 6},
        {"code": None},
        {"left_behind": 1},
        {"dropped": 1},
        {"told_end": False},
    ],
)
def test_a_boot_that_does_not_end_well_is_red(ending: dict[str, Any]) -> None:
    assert _red(_judge(_green(), **ending)) == [144]


@pytest.mark.parametrize(("plan", "clean"), [(PLAN, 0), (SLOTTED, EXIT_STOPPED)])
def test_the_end_of_an_init_is_that_of_one_out_of_a_slot_where_there_are_slots(
    plan: Plan, clean: int
) -> None:
    for code in (0, EXIT_ENDED, EXIT_STOPPED):
        case = dataclasses.replace(_case(), plan=plan)

        assert _red(_judge(_green(), case, code=code)) == ([] if code == clean else [144])


@pytest.mark.parametrize(("plan", "clean"), [(PLAN, 0), (SLOTTED, EXIT_STOPPED)])
def test_an_exit_of_init_is_judged_like_the_end_of_its_boot(plan: Plan, clean: int) -> None:
    case = dataclasses.replace(_case(), plan=plan)
    for code in (0, EXIT_STOPPED):
        stream = _green()
        stream.add(EventKind.EXIT, PIDS[INIT_NAME], name=INIT_NAME, code=code, signal=0)

        assert _red(_judge(stream, case, code=clean)) == ([] if code in {0, clean} else [144])


def test_how_a_boot_ends_whose_power_was_cut_is_not_inits_doing() -> None:
    case = dataclasses.replace(_case(), plan=SLOTTED)

    assert _red(_judge(_green(), case, code=0, cut=True)) == []


def test_a_service_that_exits_with_a_code_is_red_and_one_that_init_kills_is_not() -> None:
    stream = _green()
    stream.add(EventKind.EXIT, PIDS["timed"], name="timed", generation=1, code=0, signal=9)
    assert _judge(stream).exit_code == 0

    stream.add(EventKind.EXIT, PIDS["timed"], name="timed", generation=1, code=1, signal=0)
    assert _red(_judge(stream)) == [144]


def test_a_task_that_never_yields_is_red() -> None:
    stream = _green()
    stream.add(EventKind.HANG, PIDS["timed"], name="timed")

    assert _red(_judge(stream)) == [144]


def test_a_finding_without_the_end_rung_still_names_the_last_phase() -> None:
    scope = dataclasses.replace(SCOPE, phase=Phase.IPC)

    verdict = _judge(_green(), _case(scope), code=3)

    assert (verdict.exit_code, verdict.first_failed_phase, verdict.missing_marker) == (1, "ipc", "")


def test_a_run_stopped_at_a_marker_leaves_the_rungs_behind_it_undecided() -> None:
    later = tuple(number for number in _run(SCOPE) if number > 56)

    verdict = _judge(_green(without=later), stopped=True)

    assert verdict.exit_code == 0
    assert _state(verdict, 144) is State.NOT_RUN


def test_a_run_stopped_at_a_marker_does_not_forgive_what_should_have_come_before() -> None:
    later = tuple(number for number in _run(SCOPE) if number > 56)

    assert _red(_judge(_green(without=(14, *later)), stopped=True)) == [14]


def test_a_marker_to_stop_at_that_never_came_is_red() -> None:
    assert _judge(_green(), _case(until="SELFTEST: never ok")).exit_code == 1


OOPS = "[    7.3] Internal error: Oops: 0000000096000005 [#1] SMP"


def test_a_console_that_tells_of_an_oops_is_red_also_where_the_run_was_stopped() -> None:
    scope = dataclasses.replace(SCOPE, ground=Ground.VM)
    later = tuple(number for number in _run(scope) if number > 56)
    stream = _green(scope, without=later)

    assert _judge(stream, _case(scope), stopped=True).exit_code == 0
    verdict = _judge(stream, _case(scope), f"hello\n{OOPS}\nbye\n", stopped=True)

    assert verdict.findings == (f"the console tells of {OOPS!r}",)
    assert verdict.exit_code == 1


def test_a_service_killed_over_its_own_limit_is_no_alarm() -> None:
    scope = dataclasses.replace(SCOPE, ground=Ground.VM)
    killed = "[    7.3] Memory cgroup out of memory: Killed process 70 (python3)"

    assert _judge(_green(scope), _case(scope), killed).findings == ()


def test_only_a_machine_has_a_console_that_its_kernel_writes_to() -> None:
    assert _judge(_green(), output="BUG: said by a service\n").exit_code == 0


def test_a_prefix_marker_may_come_once_per_rest_of_its_line() -> None:
    assert rung_of("execd: crash report pid=7 code=42 name=demo.exit42") == rung(91)
    assert rung_of("execd: crash report pid=") is None


def test_the_ladder_has_the_identity_of_the_selftest_client_in_words() -> None:
    assert f"{service_id(SELFTEST):#018x}" in rung(62).claim


# ---------------------------------------------------------------- several boots

STATE = Scope(
    ground=Ground.LINUX,
    smp=1,
    services=NAMES,
    devices=("block",),
)


def _boots(scope: Scope = STATE, *, without: tuple[tuple[int, int], ...] = ()) -> list[Trace]:
    """A whole run of three boots; `without` are (boot, rung) whose line does not come."""
    boots = boots_of(scope)
    streams = []
    for boot in range(3):
        stream = Stream()
        for name in ("policyd", "logd", "statefsd"):
            stream.add(EventKind.SPAWN, PIDS[name], name=name, generation=1, program=name)
        for row in _run(scope):
            again = rung(row).phase is Phase.BRING_UP or row == 143
            if (boots[row] == boot or again) and (boot, row) not in without:
                stream.line(rung(row).marker, rung(row).printer)
        streams.append(stream)
    return [Trace(tuple(each.events), "", number=at) for at, each in enumerate(streams)]


def _states(traces: list[Trace], case: Case | None = None) -> Verdict:
    return judge(case or _case(STATE), *traces)


def test_a_system_that_keeps_nothing_is_booted_once() -> None:
    assert last_boot_of(SCOPE) == 0
    assert set(boots_of(SCOPE).values()) == {0}


def test_the_boots_of_a_run_are_those_that_a_rung_needs() -> None:
    early = dataclasses.replace(STATE, phase=Phase.EXEC)
    without_restart = dataclasses.replace(STATE, built=frozenset({Mechanism.DISK}))

    assert last_boot_of(STATE) == 2
    assert last_boot_of(early) == 0
    assert last_boot_of(without_restart) == 0


def test_bring_up_is_met_in_the_first_boot_and_the_end_in_the_last() -> None:
    boots = boots_of(STATE)

    assert [boots[number] for number in (5, 29, 56, 103, 104, 106, 116, 142, 143, 144)] == [
        *(0, 0, 0, 0),
        *(1, 2, 2, 2, 2, 2),
    ]


def test_only_the_simulated_disk_loses_its_power() -> None:
    sim = dataclasses.replace(STATE, ground=Ground.SIM)

    assert [is_cut(sim, boot) for boot in range(3)] == [False, True, False]
    assert not any(is_cut(STATE, boot) for boot in range(3))


def test_observe_runs_in_the_last_boot_before_ota() -> None:
    assert [boot_of(rung(116), last) for last in (0, 1, 2, 5)] == [0, 1, 2, 2]
    assert [boot_of(rung(143), last) for last in (0, 2, 5)] == [0, 2, 5]
    assert rung(136).boot is Boot.BACK_IN_B


def test_a_run_of_three_boots_is_green() -> None:
    verdict = _states(_boots())

    assert verdict.exit_code == 0, [*verdict.of(State.RED), *verdict.findings]


def test_the_line_of_another_boot_is_neither_a_pass_nor_a_duplicate() -> None:
    verdict = _states(_boots(without=((0, 20),)))  # boots 1 and 2 have it

    assert _red(verdict) == [20]
    assert verdict.results[19].reason == "its line was not printed"


def test_a_line_twice_in_a_boot_is_red_also_where_its_rung_is_not_met() -> None:
    traces = _boots()
    again = [event for event in traces[1].events if event.fields.get("line") == "init: ready"]
    traces[1] = dataclasses.replace(traces[1], events=(*traces[1].events, *again))

    assert _red(_states(traces)) == [29]


def test_a_failure_in_any_boot_turns_its_rung_red() -> None:
    traces = _boots(without=((0, 143),))
    fields = {"name": SELFTEST, "generation": 1, "evidence": {}}
    text = "SELFTEST: no resource left behind FAIL slots"
    failed = Event(Nanos(1), EventKind.CONSOLE, PIDS[SELFTEST], {**fields, "line": text})
    traces[0] = dataclasses.replace(traces[0], events=(*traces[0].events, failed))

    assert _red(_states(traces)) == [143]


def test_a_check_is_given_the_boot_of_its_line() -> None:
    seen = []

    def look(_case: Case, trace: Trace, line: Line) -> None:
        seen.append((trace.number, line.boot))

    assert _states(_boots(), _case(STATE, rung5=look, rung104=look, rung144=look)).exit_code == 0
    assert seen == [(0, 0), (1, 1), (2, 2)]


def test_the_rungs_of_a_boot_that_was_not_made_are_blocked_not_red() -> None:
    traces = _boots(without=((0, 103),))[:1]
    traces[0] = dataclasses.replace(traces[0], ending=Ending(code=None))

    verdict = _states(traces)

    assert _red(verdict) == [103]
    assert _state(verdict, 106) is State.BLOCKED
    assert _state(verdict, 142) is State.BLOCKED
    assert "boot 2 was not made" in verdict.results[141].reason


def test_a_run_stopped_in_its_first_boot_leaves_the_later_ones_undecided() -> None:
    traces = _boots()[:1]
    traces[0] = dataclasses.replace(traces[0], ending=Ending(stopped=True))

    verdict = _states(traces)

    assert verdict.exit_code == 0, verdict.of(State.RED)
    assert _state(verdict, 104) is State.NOT_RUN


def test_a_dirty_exit_says_in_which_boot() -> None:
    traces = _boots()
    traces[1] = dataclasses.replace(traces[1], ending=Ending(code=1))

    assert _states(traces).findings == ("boot 1: dirty exit: code 1, signal 0",)


def test_a_power_cut_that_did_not_come_is_red() -> None:
    scope = dataclasses.replace(STATE, ground=Ground.SIM)
    traces = _boots(scope)
    assert any("power" in finding for finding in _states(traces, _case(scope)).findings)

    traces[1] = dataclasses.replace(traces[1], ending=Ending(cut=True))
    verdict = _states(traces, _case(scope))
    assert verdict.exit_code == 0, [*verdict.of(State.RED), *verdict.findings]


def test_a_console_that_tells_of_an_oops_is_red_also_where_the_power_was_cut() -> None:
    scope = dataclasses.replace(STATE, ground=Ground.VM)
    traces = _boots(scope)
    traces[1] = dataclasses.replace(traces[1], ending=Ending(cut=True))
    assert _states(traces, _case(scope)).exit_code == 0

    traces[1] = dataclasses.replace(traces[1], output=f"{OOPS}\n")
    verdict = _states(traces, _case(scope))

    assert verdict.findings == (f"boot 1: the console tells of {OOPS!r}",)
    assert verdict.exit_code == 1
