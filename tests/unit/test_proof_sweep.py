"""What a saboteur must do, where a watched run ends, and how two logs are compared."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nexus.abi import Event, EventKind, Nanos, Pid
from nexus.init.plan import Plan, load_plan
from nexus.proof import compare, sabotage, saboteurs, sweep
from nexus.proof.compare import Allowed, Seen, compare_logs, normalise
from nexus.proof.expected import Scope, not_run, scope_of
from nexus.proof.prove import Watcher
from nexus.proof.report import spans
from nexus.proof.request import Request
from nexus.proof.sabotage import NoSuchSaboteur, Saboteur
from nexus.proof.saboteurs import SABOTEURS, SAMPLE, find, sample
from nexus.proof.sweep import problem_of
from nexus.proof.trace import Trace
from nexus.proof.verdict import Case, RungResult, State, Verdict
from nexus.protocols.ladder import KERNEL, RUNGS, Ground, Phase, rung

PLAN = Plan(name="test", smp=1, total_size=0, root_size=0, ends_with="timed", services=())
SIM_LINUX = (Ground.SIM, Ground.LINUX)


def _verdict(red: Sequence[int], blocked: Sequence[int] = ()) -> Verdict:
    def state(number: int) -> State:
        if number in red:
            return State.RED
        return State.BLOCKED if number in blocked else State.PASSED

    results = tuple(RungResult(number=row.number, state=state(row.number)) for row in RUNGS)
    return Verdict(results=results, findings=(), last_phase=Phase.END)


def test_a_saboteur_that_turns_exactly_its_rung_red_is_a_good_one() -> None:
    assert problem_of(13, _verdict([13], blocked=[14, 29, 144])) == ""


@pytest.mark.parametrize("red", [[], [14], [13, 14]])
def test_a_saboteur_that_does_less_or_more_is_not(red: list[int]) -> None:
    assert problem_of(13, _verdict(red)) != ""


def test_a_saboteur_is_found_by_rung_and_ground(monkeypatch: pytest.MonkeyPatch) -> None:
    sim = Saboteur(rung=1, grounds=frozenset({Ground.SIM}), plant=lambda: None)
    monkeypatch.setattr(saboteurs, "SABOTEURS", (sim,))

    assert find(1, Ground.SIM) is sim
    with pytest.raises(NoSuchSaboteur, match="none can be planted on linux"):
        find(1, Ground.LINUX)
    with pytest.raises(NoSuchSaboteur, match="no such rung"):
        find(145, Ground.SIM)


def test_a_saboteur_of_something_that_was_renamed_is_refused() -> None:
    with pytest.raises(AssertionError, match="aims at nothing"):
        sabotage.replace(Plan, "no_such_method", None)


def test_a_rung_has_at_most_one_saboteur_per_ground() -> None:
    planted = [(saboteur.rung, ground) for saboteur in SABOTEURS for ground in saboteur.grounds]

    assert len(planted) == len(set(planted))


SELFTEST_SYSTEM = Path(__file__).parents[2] / "systems" / "selftest.toml"


@pytest.mark.parametrize("ground", SIM_LINUX)
def test_every_rung_that_a_run_of_the_selftest_system_climbs_has_a_saboteur(ground: Ground) -> None:
    outside = not_run(scope_of(load_plan(SELFTEST_SYSTEM), ground, 2))

    climbed = {row.number for row in RUNGS} - outside.keys()
    sabotaged = {each.rung for each in SABOTEURS if ground in each.grounds}

    assert len(climbed) > len(RUNGS) // 3, "the selftest system climbs what is built"
    assert sabotaged == climbed


def test_the_sample_for_a_slow_ground_has_every_phase_of_it() -> None:
    in_the_vm = {each.rung for each in SABOTEURS if Ground.VM in each.grounds}

    assert set(SAMPLE) <= in_the_vm
    assert sample(Ground.VM) == SAMPLE
    assert 39 not in sample(Ground.LINUX)
    assert {rung(number).phase for number in SAMPLE} == set(Phase)


def _swept(monkeypatch: pytest.MonkeyPatch, passed: int, **options: Any) -> tuple[Any, list[Any]]:
    """A sweep in which every saboteur turns its rung red, and the runs that it made."""
    runs: list[Any] = []

    def run(request: Request, _directory: Path) -> Any:
        runs.append((request.saboteur, request.phase, request.until))
        red = [] if request.saboteur is None else [request.saboteur]
        results = _verdict(red).results[:passed]
        verdict = Verdict(results=results, findings=(), last_phase=Phase.END)
        return SimpleNamespace(verdict=verdict, wall=0)

    monkeypatch.setattr(sweep, "prove", run)
    base = Request(ground=Ground.SIM, system=SELFTEST_SYSTEM, smp=2, seed=1)
    return sweep.sweep(base, Path(), tell=lambda _line: None, **options), runs


def test_a_sweep_of_all_makes_whole_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    swept, runs = _swept(monkeypatch, 2)

    assert swept.exit_code == 0
    assert runs == [(number, Phase.END, None) for number in (None, 1, 2)]


def test_a_sample_is_run_as_far_as_each_phase_and_all_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    swept, runs = _swept(monkeypatch, 59, numbers=(39, 59, 60))

    assert runs == [(None, Phase.END, None), (39, Phase.SMP, ""), (59, Phase.IPC, "")]
    assert [bool(finding.problem) for finding in swept.findings] == [False, False, True]
    assert "not climbed" in swept.findings[2].problem
    assert swept.exit_code == 1


def _line(text: str) -> Event:
    return Event(Nanos(0), EventKind.KERNEL, Pid(0), {"line": text, "evidence": {}})


def _watcher(until: str | None, phase: Phase = Phase.END) -> Watcher:
    scope = Scope(ground=Ground.LINUX, smp=1, services=("timed",), phase=phase)
    return Watcher(Case(scope=scope, plan=PLAN, checks={}, until=until))


def _expected(phase: Phase = Phase.END) -> list[str]:
    outside = not_run(Scope(ground=Ground.LINUX, smp=1, services=("timed",), phase=phase))
    return [row.marker for row in RUNGS if row.number not in outside]


def test_a_run_without_a_stop_marker_goes_on_after_the_last_rung() -> None:
    watcher = _watcher(None)

    assert not any(watcher(_line(marker)) for marker in _expected())


def test_a_run_stops_where_the_last_expected_rung_is_decided_failed_ones_included() -> None:
    watcher = _watcher("")
    *others, last = _expected()

    assert not any(watcher(_line(marker)) for marker in others)
    assert watcher(_line(f"{last.removesuffix(' ok')} FAIL why"))


def test_a_statement_is_decided_by_inits_line_about_it() -> None:
    watcher = _watcher("timed: ready")

    assert not watcher(_line("timed: ready"))
    assert watcher(_line("init: health timed ok"))


def test_a_run_of_a_phase_stops_when_the_rungs_up_to_it_are_decided() -> None:
    watcher = _watcher(None, Phase.BRING_UP)

    assert not any(watcher(_line(marker)) for marker in _expected(Phase.BRING_UP))
    assert watcher(_line("init: health timed ok"))


def test_a_system_that_never_ends_is_stopped_when_all_is_decided() -> None:
    scope = Scope(ground=Ground.LINUX, smp=1, services=("timed",))
    plan = dataclasses.replace(PLAN, ends_with=None)
    watcher = Watcher(Case(scope=scope, plan=plan, checks={}))

    lines = [*_expected(), "init: health timed ok"]

    assert [watcher(_line(line)) for line in lines][-2:] == [False, True]


def test_a_run_stops_at_a_whole_line_only() -> None:
    watcher = _watcher("init: ready")

    assert not watcher(_line("init: ready now"))
    assert watcher(_line("init: ready"))


def test_spans_of_numbers() -> None:
    assert spans([1, 2, 3, 7, 9, 10]) == "1-3, 7, 9-10"


# ---------------------------------------------------------------- compare


def _trace(*traps: tuple[str, str, int], killed: bool = False) -> Trace:
    spawn = Event(Nanos(0), EventKind.SPAWN, Pid(5), {"name": "server", "generation": 1})
    events = [
        Event(Nanos(at), EventKind.TRAP, Pid(5), {"trap": trap, "status": status, "size": size})
        for at, (trap, status, size) in enumerate(traps)
    ]
    ended = {"name": "server", "code": 0, "signal": 9 if killed else 0}
    return Trace((spawn, *events, Event(Nanos(99), EventKind.EXIT, Pid(5), ended)))


def _log(*traps: tuple[str, str, int], killed: bool = False) -> compare.Log:
    return normalise(_trace(*traps, killed=killed))


def test_two_equal_logs_are_the_same_whatever_the_times_and_pids() -> None:
    left = _trace(("Send", "OK", 3))
    moved = [
        event._replace(time=Nanos(event.time + 7), pid=Pid(event.pid + 4)) for event in left.events
    ]

    result = compare_logs(normalise(left), normalise(Trace(tuple(moved))), SIM_LINUX)

    assert result.exit_code == 0


@pytest.mark.parametrize("other", [("Send", "QUEUE_FULL", 3), ("Send", "OK", 4), ("Recv", "OK", 3)])
def test_a_different_status_size_or_trap_fails_the_comparison(other: tuple[str, str, int]) -> None:
    result = compare_logs(_log(("Send", "OK", 3)), _log(other), SIM_LINUX)

    assert result.exit_code == 1
    assert "server generation 1" in compare.as_text([result])


def test_a_different_end_fails_the_comparison() -> None:
    left, right = _log(("Send", "OK", 3)), _log(("Send", "OK", 3), killed=True)

    assert compare_logs(left, right, SIM_LINUX).exit_code == 1


def test_a_task_that_exists_on_one_ground_only_fails_the_comparison() -> None:
    assert compare_logs(_log(("Send", "OK", 3)), {}, SIM_LINUX).exit_code == 1


PROVEN = (
    Event(Nanos(1), EventKind.QOS, Pid(5), {"line": "QOS-AUDIT caller_pid=5 target_pid=5"}),
    Event(Nanos(2), EventKind.REFUSED, Pid(5), {"reason": "identity", "owner": "server"}),
    Event(
        Nanos(3),
        EventKind.LINK,
        Pid(5),
        {"owner": "server", "holder": "init-lite", "depth": 8, "size": 4096},
    ),
    Event(Nanos(4), EventKind.SPAWN_FAILED, Pid(1), {"name": "nobody", "reason": "oom"}),
)


def _proven(*events: Event) -> compare.Log:
    return normalise(Trace((*_trace().events, *events)))


@pytest.mark.parametrize("missing", PROVEN, ids=[event.kind.value for event in PROVEN])
def test_an_event_that_one_side_does_not_have_fails_the_comparison(missing: Event) -> None:
    others = [event for event in PROVEN if event is not missing]

    assert compare_logs(_proven(*PROVEN), _proven(*PROVEN), SIM_LINUX).exit_code == 0
    assert compare_logs(_proven(*PROVEN), _proven(*others), SIM_LINUX).exit_code == 1


@pytest.mark.parametrize(
    ("event", "name", "value"),
    [
        (PROVEN[0], "line", "QOS-AUDIT caller_pid=5 target_pid=6"),
        (PROVEN[1], "reason", "oversize"),
        (PROVEN[2], "owner", "timed"),
        (PROVEN[2], "depth", 4),
        (PROVEN[2], "size", 100),
        (PROVEN[2], "unheard", "of"),
    ],
)
def test_a_field_that_differs_fails_the_comparison(event: Event, name: str, value: object) -> None:
    other = event._replace(fields={**event.fields, name: value})

    assert compare_logs(_proven(event), _proven(other), SIM_LINUX).exit_code == 1


def test_the_pids_of_an_audit_line_are_names() -> None:
    left, right = (
        [
            Event(Nanos(0), EventKind.SPAWN, Pid(pid), {"name": "server", "generation": 1}),
            Event(Nanos(1), EventKind.QOS, Pid(pid), {"line": f"caller_pid={pid} target_pid=0"}),
        ]
        for pid in (5, 77)
    )

    logs = [normalise(Trace(tuple(events))) for events in (left, right)]

    assert logs[0] == logs[1]
    assert "caller_pid=server#1 target_pid=nobody#0" in logs[0]["server", 1].classes[0]


def test_what_is_left_out_is_printed_and_nothing_else_is() -> None:
    report = compare.as_text([compare_logs(_log(), _log(), SIM_LINUX)])

    assert all(f"left out {entry.id}: " in report for entry in compare.LEFT_OUT)
    unheard = [
        kind
        for kind in EventKind
        if kind not in compare.KINDS_LEFT_OUT and kind not in compare._PLACES
    ]
    assert unheard == []


def test_an_allowed_difference_is_counted_and_one_never_seen_is_reported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def without_traps(left: Seen, right: Seen) -> tuple[Seen, Seen]:
        return left._replace(traps=()), right._replace(traps=())

    allowed = Allowed(what="other traps", why="a test", settle=without_traps)
    monkeypatch.setattr(compare, "ALLOWED", (allowed,))
    one, other = _log(("Send", "OK", 3)), _log(("Send", "OK", 4))

    needed = compare_logs(one, other, SIM_LINUX)
    idle = compare_logs(_log(), _log(), SIM_LINUX)

    assert (needed.exit_code, needed.used) == (0, {"other traps": 1})
    assert (idle.exit_code, idle.unused) == (1, ("other traps",))


def test_the_smp_rows_are_all_the_kernels_own() -> None:
    assert {row.printer for row in RUNGS if row.phase is Phase.SMP} == {KERNEL}
