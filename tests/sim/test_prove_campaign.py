"""The campaign: a sample of it, and that it finds what it is there to find."""

from collections.abc import Iterator
from typing import Any

import pytest

from nexus.abi import Nanos, Recv, Status
from nexus.kernel.sim import FaultPoint, Forge, Plan
from nexus.kernel.sim.inject import FaultyIpc
from nexus.kernel.sim.ipc import Ipc
from nexus.kernel.sim.kernel import SimKernel
from nexus.proof import campaign
from nexus.proof.campaign import (
    CLIENTS,
    FAULTS_SPAN,
    SELDOM,
    STRANGER,
    SWEEP_SPAN,
    SWEPT,
    TRAPS,
    UNMADE,
    Campaign,
    RunReport,
    SweepRow,
    Witness,
    drawn_faults,
    run,
    seeds_campaign,
    sweep_campaign,
    sweep_rows,
    system_plan,
    unaccounted,
)
from nexus.services.timed import Timed

pytestmark = pytest.mark.sim

SAMPLE_SEEDS = 25  # of the 500 of `make campaign`
SAMPLE_NTH = 2


def _report(faults: Plan | None = None, seed: int = 1) -> RunReport:
    plan = Plan(span=SWEEP_SPAN) if faults is None else faults
    return run("test", system_plan(SWEEP_SPAN), plan, seed, 1)


def test_without_faults_every_call_is_answered_and_the_system_is_healthy() -> None:
    report = _report()

    assert report.problems == ()
    assert set(report.calls) == {"answered"}
    assert report.healthy_after is not None


def test_a_run_of_a_seed_is_repeated_to_the_last_count() -> None:
    plan = system_plan(FAULTS_SPAN)

    first, second = (run("test", plan, drawn_faults(3), 3, 2) for _ in range(2))

    assert first == second


def test_the_sweep_has_a_row_for_every_failure_that_a_task_can_meet() -> None:
    witness = Witness()
    _ = run("clean", system_plan(SWEEP_SPAN), Plan(span=SWEEP_SPAN), 1, 1, witness=witness)
    rows = sweep_rows(witness)

    planned = {(trap, status) for trap, statuses in SWEPT.items() for status in statuses}
    assert {(row.trap, row.status) for row in rows} == planned - UNMADE.keys()
    assert all(row.nths for row in rows)
    assert [name for name, tasks in witness.makers().items() if not tasks] == [
        trap.__name__ for trap in TRAPS if trap in SELDOM
    ]


def test_a_row_that_never_fires_is_red(monkeypatch: pytest.MonkeyPatch) -> None:
    late = SweepRow(
        task="timed", trap=Recv, status=Status.TIMED_OUT, nths=(10**9,), span=SWEEP_SPAN
    )
    monkeypatch.setattr(campaign, "sweep_rows", lambda _witness: [late])
    swept = Campaign()

    sweep_campaign(swept, 1, print)

    assert "sweep timed Recv TIMED_OUT" in swept.never
    assert any("never happened" in problem for problem in swept.problems)


def test_a_failure_that_no_task_can_meet_is_a_row_that_cannot_fire() -> None:
    rows = sweep_rows(Witness())

    assert {row.task for row in rows} == {"nobody"}
    assert not any(row.nths for row in rows)


def test_messages_are_accounted_for_in_a_run_with_a_forgery(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forge = Forge(task=CLIENTS[0], nth=5, pid=STRANGER)
    assert _report(Plan(forge=(forge,), span=SWEEP_SPAN)).problems == ()

    original = FaultyIpc.send
    doubled: list[int] = []

    def twice(ipc: FaultyIpc, task: Any, slot: Any, data: Any, move: Any = None) -> None:
        """The kernel queues one message twice, and says it was sent once."""
        original(ipc, task, slot, data, move)
        if task.name == CLIENTS[0] and task.sent > 20 and move is None and not doubled:
            doubled.append(task.sent)
            ipc._forge(task.entries[slot].object, bytes(data), task.pid)

    monkeypatch.setattr(FaultyIpc, "send", twice)

    problems = _report(Plan(forge=(forge,), span=SWEEP_SPAN)).problems
    assert any("were received that were not next" in problem for problem in problems)


def test_a_message_dropped_for_its_sender_that_nobody_forged_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = FaultyIpc.stamp

    def blank(ipc: FaultyIpc, task: Any, link: Any) -> Any:
        stamped = original(ipc, task, link)
        return STRANGER if task.name == CLIENTS[0] and task.sent == 20 else stamped

    monkeypatch.setattr(FaultyIpc, "stamp", blank)

    problems = _report().problems
    assert any("dropped for their sender, 0 were forged" in problem for problem in problems)


@pytest.mark.slow
def test_a_sample_of_seeds_and_of_the_sweep_breaks_no_promise() -> None:
    sample = Campaign()

    seeds_campaign(sample, 1, SAMPLE_SEEDS, print)
    sweep_campaign(sample, SAMPLE_NTH, print)

    assert sample.problems == []
    assert sample.never == []


# ---------------------------------------------------------------- it finds what is broken


def test_a_lost_wakeup_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def deaf(_timed: Timed, _now: int) -> None:
        """Fire nothing."""

    # Long enough for a system that is well; what is lost stays lost, however long one waits.
    monkeypatch.setattr(campaign, "HEALTHY_WITHIN", Nanos(1_000_000_000))
    assert _report().problems == ()
    monkeypatch.setattr(Timed, "on_time", deaf)
    monkeypatch.setattr(Timed, "next_time", lambda _timed: None)

    assert any("not healthy" in problem for problem in _report().problems)


def test_an_answer_that_is_not_the_right_one_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Timed, "_pid_of", lambda _timed, _call, request: request.claimed_pid)

    assert any("whoami" in problem for problem in _report().problems)


def test_bytes_that_do_not_come_back_to_the_heap_are_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = SimKernel.release_endpoints

    def leaking(kernel: SimKernel, task: Any) -> Any:
        kernel.heap.account.used += 32
        return original(kernel, task)

    monkeypatch.setattr(SimKernel, "release_endpoints", leaking)

    assert any("left behind" in problem for problem in _report().problems)


def test_a_heap_that_differs_from_its_objects_is_found_while_it_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = Ipc.create_endpoint

    def charging(ipc: Ipc, *arguments: Any, **options: Any) -> Any:
        ipc.heap.account.used += 32
        return original(ipc, *arguments, **options)

    monkeypatch.setattr(Ipc, "create_endpoint", charging)

    assert any("heap holds" in problem for problem in _report().problems)


def _lines(*entries: tuple[str, int, int]) -> Iterator[str]:
    yield "1 cpu0 pid2 picked Recv OK"
    for what, link, size in entries:
        who = "cpu0 pid3 kept Recv" if what == "took" else "pid4"
        yield f"2 {who} {what} link{link} {size}B"


@pytest.mark.parametrize(
    "entries",
    [
        (("took", 1, 5),),
        (("sent", 1, 5), ("took", 1, 5), ("took", 1, 5)),
        (("sent", 1, 5), ("sent", 1, 6), ("took", 1, 6)),
        (("sent", 1, 5), ("took", 2, 5)),
    ],
)
def test_a_message_from_nowhere_twice_or_out_of_order_is_found(
    entries: tuple[tuple[str, int, int], ...],
) -> None:
    assert list(unaccounted(_lines(*entries)))


def test_messages_in_order_and_one_left_in_the_queue_are_accounted_for() -> None:
    entries = (("sent", 1, 5), ("sent", 2, 9), ("sent", 1, 6), ("took", 1, 5), ("took", 1, 6))

    assert not list(unaccounted(_lines(*entries)))


def test_the_event_log_of_a_run_has_the_messages_that_are_followed() -> None:
    seen: list[str] = []
    original = campaign.unaccounted

    def counting(lines: Iterator[str]) -> Iterator[str]:
        kept = list(lines)
        seen.extend(line for line in kept if " took link" in line)
        return original(iter(kept))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(campaign, "unaccounted", counting)
        _ = _report()

    assert len(seen) > 100


def test_a_fault_that_never_fired_and_a_recovery_never_reached_are_red() -> None:
    empty = Campaign()

    assert empty.exit_code == 1
    assert FaultPoint.KILL.value in empty.never
    assert "healthy after the faults" in empty.never
