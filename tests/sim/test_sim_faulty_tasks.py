"""A task's own bug ends that task; a bug of the simulated kernel ends the run."""

import gc
import os
import signal
import sys
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

import pytest

from nexus.abi import (
    NEVER,
    NO_WAIT,
    BootImage,
    Call,
    CapClone,
    ConsoleWrite,
    Event,
    EventKind,
    Exit,
    ExitInfo,
    Kill,
    LinkCreate,
    LinkId,
    Nanos,
    Now,
    Program,
    Recv,
    ReplyRecv,
    Send,
    SetTaskQos,
    SleepUntil,
    Slot,
    Spawn,
    SpawnSpec,
    Trap,
    VmoCreate,
    VmoWrite,
    Wait,
)
from nexus.kernel.core import EXIT_CRASH
from nexus.kernel.sim import SimKernel

Main = Callable[[BootImage], Coroutine[Trap[Any], Any, Any]]
MS = 1_000_000
ANY: Any = None
LIST: Any = [1]


def kernel_of(child: Main, recorder: Callable[[Event], None] = lambda _: None) -> SimKernel:
    program = Program(name="child", main=child, digest="d")
    return SimKernel({"child": program}, seed=1, recorder=recorder, cpu_count=2)


def end_of(child: Main, kernel: SimKernel, *, kill: bool = False) -> ExitInfo:
    """Run one child to its end, under a root that must live on."""
    ends: list[ExitInfo] = []

    async def main(boot: BootImage) -> int:
        spawned = await Spawn(SpawnSpec("child", "child", boot.endpoint))
        if kill:
            await SleepUntil(Nanos(await Now() + MS))
            await Kill(spawned.pid)
        ends.append(await Wait(spawned.pid, NEVER))
        await SleepUntil(Nanos(await Now() + MS))
        used, counted = kernel.heap_audit()
        assert used == counted
        return 3

    root = Program(name="root", main=main, digest="d")
    assert kernel.run(root, b"", until=Nanos(kernel.now + 1000 * MS)).code == 3
    assert set(kernel.resources().values()) == {0}
    return ends[0]


def reply(boot: BootImage) -> Trap[Any]:
    trap = ReplyRecv((boot.endpoint,), NEVER)
    trap.slot = boot.control
    trap.data = 5  # type: ignore[assignment]
    return trap


WRONG: dict[str, Callable[[BootImage], Trap[Any]]] = {
    "sleep": lambda _: SleepUntil(ANY),
    "receive": lambda boot: Recv((boot.endpoint,), ANY),
    "receive no slot": lambda _: Recv(ANY, NO_WAIT),
    "send a number": lambda boot: Send(boot.control, 5),  # type: ignore[arg-type]
    "send text": lambda boot: Send(boot.control, "x"),  # type: ignore[arg-type]
    "send a mixed list": lambda boot: Send(boot.control, [1, "x"]),  # type: ignore[arg-type]
    "send a slot": lambda boot: Send(boot.control, b"x", move=LIST),  # type: ignore[arg-type]
    "call": lambda boot: Call(LIST, b"x", boot.endpoint, LinkId(1), NEVER),
    "reply": reply,
    "vmo": lambda _: VmoCreate("a"),  # type: ignore[arg-type]
    "clone": lambda _: CapClone(LIST),
    "terms": lambda boot: LinkCreate(boot.endpoint, ANY),
    "line": lambda _: ConsoleWrite(3, b""),  # type: ignore[arg-type]
    "evidence": lambda _: ConsoleWrite("x", ANY),
    "exit": lambda _: Exit("0"),  # type: ignore[arg-type]
    "exit in between": lambda _: Exit(1.5),  # type: ignore[arg-type]
    "a number too wide to print": lambda _: VmoCreate(10**5000),
    "class of a list": lambda _: SetTaskQos(LIST, 1),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_value_of_the_wrong_type_in_a_trap_is_a_crash_of_its_task(name: str) -> None:
    events: list[Event] = []

    async def child(boot: BootImage) -> None:
        await WRONG[name](boot)

    kernel = kernel_of(child, events.append)
    end = end_of(child, kernel)

    assert (end.code, end.signal) == (EXIT_CRASH, 0)
    assert len(kernel.crashes) == 1
    assert kernel.crashes[0].startswith("Traceback (most recent call last):")
    exits = [event.fields for event in events if event.kind is EventKind.EXIT]
    assert exits[0]["crash"] == kernel.crashes[0]


def test_a_write_of_the_wrong_type_is_a_crash_of_its_task() -> None:
    async def child(_boot: BootImage) -> None:
        slot = await VmoCreate(4096)
        await VmoWrite(slot, 0, "text")  # type: ignore[arg-type]

    assert end_of(child, kernel_of(child)).code == EXIT_CRASH


@pytest.mark.parametrize("error", [TypeError, AttributeError, ValueError, KeyError])
def test_a_bug_of_the_kernel_ends_the_run(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise error("of the kernel")

    async def child(boot: BootImage) -> None:
        await Send(Slot(0), b"well typed")

    kernel = kernel_of(child)
    monkeypatch.setattr(type(kernel.ipc), "deliver", broken)

    with pytest.raises(error, match="of the kernel"):
        _ = end_of(child, kernel)
    assert kernel.crashes == []


def test_an_assertion_and_a_fault_of_the_scheduler_end_the_run_whatever_a_task_passed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def child(boot: BootImage) -> None:
        await VmoCreate(ANY)

    def broken(*_: object) -> None:
        raise AssertionError("of the kernel")

    def no_pick(*_: object) -> None:
        raise TypeError("of the scheduler")

    kernel = kernel_of(child)
    monkeypatch.setitem(kernel.handlers, VmoCreate, (broken, 0))
    with pytest.raises(AssertionError, match="of the kernel"):
        _ = end_of(child, kernel)

    kernel = kernel_of(child)
    monkeypatch.setattr(type(kernel.scheduler), "tick", no_pick)
    with pytest.raises(TypeError, match="of the scheduler"):
        _ = end_of(child, kernel)


@pytest.mark.parametrize("error", [SystemExit(0), KeyboardInterrupt(), GeneratorExit()])
def test_no_exception_of_a_task_ends_more_than_the_task(error: BaseException) -> None:
    async def child(_boot: BootImage) -> None:
        raise error

    kernel = kernel_of(child)
    end = end_of(child, kernel)

    assert end.code == EXIT_CRASH
    assert type(error).__name__ in kernel.crashes[0]


def test_an_interrupt_of_the_host_ends_the_run() -> None:
    async def child(_boot: BootImage) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    kernel = kernel_of(child)
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            _ = end_of(child, kernel)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        _ = signal.signal(signal.SIGINT, former)

    assert kernel.crashes == []
    assert set(kernel.resources().values()) == {0}


@pytest.mark.parametrize(
    ("value", "code"),
    [(None, 0), (0, 0), (255, 255), (256, EXIT_CRASH), (-1, EXIT_CRASH), ("0", EXIT_CRASH)],
)
def test_what_main_returns_is_an_exit_code_or_a_crash(value: object, code: int) -> None:
    async def child(_boot: BootImage) -> object:
        return value

    kernel = kernel_of(child)

    assert end_of(child, kernel).code == code
    assert len(kernel.crashes) == (code == EXIT_CRASH)


def test_a_task_that_clings_to_life_is_ended_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", said.append)

    async def child(_boot: BootImage) -> None:
        while True:
            with suppress(BaseException):
                await SleepUntil(NEVER)

    end = end_of(child, kernel_of(child), kill=True)
    _ = gc.collect()

    assert (end.code, end.signal) == (0, 9)
    assert said == []


def test_any_exception_in_the_unwinding_of_a_killed_task_ends_with_it() -> None:
    class Odd(BaseException):
        pass

    async def child(_boot: BootImage) -> None:
        try:
            await SleepUntil(NEVER)
        finally:
            raise Odd

    assert end_of(child, kernel_of(child), kill=True).signal == 9
