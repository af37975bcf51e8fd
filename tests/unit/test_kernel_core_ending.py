"""Exit codes, the end of a coroutine, and whose fault a failed trap is."""

import gc
import sys
from collections.abc import Generator
from contextlib import suppress
from inspect import CORO_CLOSED, getcoroutinestate
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nexus.abi import (
    AuditLog,
    Call,
    CapClone,
    CapDerive,
    ConsoleWrite,
    LinkCreate,
    LinkId,
    LinkTerms,
    Nanos,
    Now,
    QosClass,
    Recv,
    ReplyRecv,
    Rights,
    Send,
    SetTaskQos,
    SleepUntil,
    Slot,
    Spawn,
    SpawnSpec,
    Trap,
    VmoCreate,
    VmoWrite,
)
from nexus.kernel.core import EXIT_CODE_MAX, NoExitCode, end_coroutine, exit_code, well_typed


class Forever:
    """Awaited, it only ever waits."""

    def __await__(self) -> Generator[object, None, None]:
        yield self


@given(st.integers(0, EXIT_CODE_MAX))
def test_a_byte_is_its_own_exit_code(code: int) -> None:
    assert exit_code(code) == code


def test_no_value_is_a_clean_exit() -> None:
    assert exit_code(None) == 0


@pytest.mark.parametrize(
    "value", [-1, 256, pytest.param(10**5000, id="huge"), 1.0, "0", b"", (), object()]
)
def test_whatever_else_a_program_returns_is_no_exit_code(value: object) -> None:
    with pytest.raises(NoExitCode):
        _ = exit_code(value)


def test_a_coroutine_that_ignores_its_end_is_silent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", said.append)

    async def clings() -> None:
        while True:
            with suppress(BaseException):
                await Forever()

    async def clings_to_another() -> None:
        while True:
            with suppress(BaseException):
                await clings()

    for program in (clings, clings_to_another):
        coroutine = program()
        _ = coroutine.send(None)
        end_coroutine(coroutine)
        del coroutine
        _ = gc.collect()

    assert said == []
    assert sys.unraisablehook == said.append


@pytest.mark.parametrize("error", [ValueError, SystemExit, GeneratorExit])
def test_the_last_words_of_a_coroutine_are_dropped(error: type[BaseException]) -> None:
    async def protests() -> None:
        try:
            await Forever()
        finally:
            raise error

    coroutine = protests()
    _ = coroutine.send(None)
    end_coroutine(coroutine)

    assert getcoroutinestate(coroutine) == CORO_CLOSED


def test_what_is_about_more_than_the_task_comes_out_of_its_end() -> None:
    async def interrupted() -> None:
        try:
            await Forever()
        finally:
            raise KeyboardInterrupt

    coroutine = interrupted()
    _ = coroutine.send(None)

    with pytest.raises(KeyboardInterrupt):
        end_coroutine(coroutine)


ONE, LATE = Slot(1), Nanos(10)
SPEC = SpawnSpec("name", "program", ONE)
BAD: Any = [1]
NONE: Any = None
NUMBER: Any = 5
TEXT: Any = "a"


def _reply(slot: Any, data: Any) -> Trap[Any]:
    trap = ReplyRecv((ONE,), LATE)
    trap.slot, trap.data = slot, data
    return trap


class OwnSend(Send):
    """A send with arguments of its own."""

    def __init__(self, text: str) -> None:
        super().__init__(ONE, text.encode())


@pytest.mark.parametrize(
    "trap",
    [
        Now(), AuditLog(), SleepUntil(LATE), Recv((ONE, ONE), LATE, link=LinkId(3)),
        Send(ONE, b"x", move=ONE), Send(ONE, bytearray(b"x")), OwnSend("x"), VmoCreate(-1),
        Call(ONE, b"x", ONE, LinkId(1), LATE), _reply(None, b""), _reply(ONE, b"x"),
        CapDerive(ONE, Rights.SEND), SetTaskQos(None, QosClass.IDLE), SetTaskQos(None, 9),
        LinkCreate(ONE), Spawn(SPEC), Spawn(SPEC._replace(cpu=1)), ConsoleWrite("x", b"{}"),
    ],
)  # fmt: skip
def test_a_trap_as_declared_is_well_typed(trap: Trap[Any]) -> None:
    assert well_typed(trap)


@pytest.mark.parametrize(
    "trap",
    [
        SleepUntil(NONE), SleepUntil(TEXT), Recv(BAD, LATE), Recv((TEXT,), LATE),
        Recv((ONE,), NONE), Send(ONE, NUMBER), Send(ONE, TEXT), Send(BAD, b"x"), VmoCreate(TEXT),
        CapClone(BAD), ConsoleWrite(NUMBER, b""), ConsoleWrite("x", NONE), VmoWrite(ONE, 0, BAD),
        _reply(ONE, 5), _reply("a", b"x"), LinkCreate(ONE, BAD), VmoCreate(10**5000),
        LinkCreate(ONE, LinkTerms(TEXT)), Spawn(SPEC._replace(budget=NONE)), Spawn(NONE), 42,
    ],
)  # fmt: skip
def test_a_trap_with_a_value_of_the_wrong_type_is_not(trap: Any) -> None:
    assert not well_typed(trap)


def test_a_trap_without_one_of_its_fields_is_not_well_typed() -> None:
    trap = SleepUntil(LATE)
    del trap.deadline

    assert not well_typed(trap)
