"""The campaign: a sample of it, and that it finds what it is there to find."""

from collections.abc import Iterator
from typing import Any

import pytest

from nexus.kernel.sim import FaultPoint, Plan
from nexus.kernel.sim.ipc import Ipc
from nexus.kernel.sim.kernel import SimKernel
from nexus.proof import campaign
from nexus.proof.campaign import (
    FAULTS_SPAN,
    SWEEP_SPAN,
    Campaign,
    RunReport,
    drawn_faults,
    run,
    seeds_campaign,
    sweep_campaign,
    system_plan,
    unaccounted,
)
from nexus.services.timed import Timed

pytestmark = pytest.mark.sim

SAMPLE_SEEDS = 50
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
        yield f"2 pid3 {what} link{link} {size}B"


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
    assert list(unaccounted(_lines(*entries), forged=False))


def test_messages_in_order_and_one_left_in_the_queue_are_accounted_for() -> None:
    entries = (("sent", 1, 5), ("sent", 2, 9), ("sent", 1, 6), ("took", 1, 5), ("took", 1, 6))

    assert not list(unaccounted(_lines(*entries), forged=False))


def test_the_event_log_of_a_run_has_the_messages_that_are_followed() -> None:
    seen: list[str] = []
    original = campaign.unaccounted

    def counting(lines: Iterator[str], *, forged: bool) -> Iterator[str]:
        kept = list(lines)
        seen.extend(line for line in kept if " took link" in line)
        return original(iter(kept), forged=forged)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(campaign, "unaccounted", counting)
        _ = _report()

    assert len(seen) > 100


def test_a_fault_that_never_fired_and_a_recovery_never_reached_are_red() -> None:
    empty = Campaign()

    assert empty.exit_code == 1
    assert FaultPoint.KILL.value in empty.never
    assert "healthy after the faults" in empty.never
