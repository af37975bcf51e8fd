"""A task that never reaches its next trap, and one that never stops making them."""

import contextlib
import signal

import pytest

from nexus.abi import BootImage, Event, EventKind, Nanos, Now, Program
from nexus.kernel.core import Hang, RunOver
from nexus.kernel.sim import SimKernel


async def spinning(boot: BootImage) -> None:
    await Now()
    while True:
        with contextlib.suppress(Exception):  # even this does not keep it alive
            pass


async def trapping(boot: BootImage) -> None:
    while True:
        await Now()


def test_a_task_that_never_traps_is_reported_as_a_hang() -> None:
    events: list[Event] = []
    kernel = SimKernel({}, seed=1, recorder=events.append, hang_limit_s=0.2)
    before = signal.getsignal(signal.SIGVTALRM)

    with pytest.raises(Hang) as hang:
        kernel.run(
            Program(name="r", main=spinning, digest=""), b"", until=Nanos(kernel.now + 10**9)
        )

    assert (hang.value.name, hang.value.pid) == ("init-lite", 1)
    assert [event.kind for event in events if event.kind is EventKind.HANG] == [EventKind.HANG]
    assert signal.getsignal(signal.SIGVTALRM) == before
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)
    assert set(kernel.resources().values()) == {0}


def test_endless_traps_keep_time_moving_so_that_the_run_ends() -> None:
    kernel = SimKernel({}, seed=1, recorder=lambda _: None, hang_limit_s=0.2)

    with pytest.raises(RunOver):
        kernel.run(
            Program(name="r", main=trapping, digest=""), b"", until=Nanos(kernel.now + 10**9)
        )


def test_the_guard_leaves_no_trace_in_the_log() -> None:
    def lines(limit: float) -> list[str]:
        kernel = SimKernel({}, seed=1, recorder=lambda _: None, hang_limit_s=limit)
        with pytest.raises(RunOver):
            kernel.run(
                Program(name="r", main=trapping, digest=""), b"", until=Nanos(kernel.now + 10**8)
            )
        return list(kernel.log_lines())

    assert lines(0.01) == lines(100.0)
