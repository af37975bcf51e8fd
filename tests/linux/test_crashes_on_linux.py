"""Processes that die: what they wrote last is in their crash reports, whatever ended them.

Each victim writes a record into its ring and dies before its doorbell: by SIGKILL from outside, by
an error, by a system call that its filter denies, by its limit of memory. What is compared is what
the kernel recorded of the very process.
"""

import ctypes
import mmap
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from nexus.abi import ConsoleWrite, EventKind, Nanos, Now, SleepUntil
from nexus.protocols.execd import Kill, Killed
from nexus.protocols.hello import Greet, Greeting
from nexus.runtime.program import Context
from tests.fakes.execrig import ExecHands, boot_linux, system, victim_of
from tests.fakes.initrig import SECOND

pytestmark = pytest.mark.linux

WORDS: Final = "the last that it wrote"
TOO_MUCH: Final = 1 << 30  # bytes; a service may take 64 MiB
OTHER_CALL: Final = b"\xb8\x14\x00\x00\x00\xcd\x80\xc3"  # i386's getpid: mov eax, 20; int 0x80; ret


def _machine_code() -> mmap.mmap | None:
    """A function that calls the kernel as another architecture does, which every filter answers
    with SIGSYS. It is made before the fork: no service may make memory executable."""
    if os.uname().machine != "x86_64":
        return None
    rights = mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
    code = mmap.mmap(-1, mmap.PAGESIZE, prot=rights)
    _ = code.write(OTHER_CALL)
    return code


CODE: Final = _machine_code()


@pytest.fixture
def directory() -> Iterator[Path]:
    """A state directory."""
    made = Path(tempfile.mkdtemp(prefix="nx"))
    yield made
    shutil.rmtree(made)


async def _is_killed(context: Context) -> None:
    context.log.info(WORDS, how="killed")
    with context.metrics.span("victim.Turn"):
        await ConsoleWrite("driver: outside kill killed")
        _ = await SleepUntil(Nanos(await Now() + 60 * SECOND))


async def _fails(context: Context) -> None:
    context.log.info(WORDS, how="failed")
    raise RuntimeError("the valve is stuck")


async def _calls(context: Context) -> None:
    context.log.info(WORDS, how="filtered")
    assert CODE is not None, "who has no such code is not started"
    address = ctypes.addressof(ctypes.c_char.from_buffer(CODE))
    _ = ctypes.CFUNCTYPE(ctypes.c_int)(address)()


async def _grows(context: Context) -> None:
    context.log.info(WORDS, how="limited")
    _ = bytearray(TOO_MUCH)


VICTIMS: Final = {"killed": _is_killed, "failed": _fails, "limited": _grows} | (
    {} if CODE is None else {"filtered": _calls}
)


def test_the_last_record_of_a_process_is_in_its_report_whatever_ended_it(
    monkeypatch: pytest.MonkeyPatch, directory: Path
) -> None:
    async def script(hands: ExecHands) -> Any:
        told = {}
        for name in VICTIMS:
            report = await hands.crash_of(name, wait=20 * SECOND)
            crash = report.crash
            texts = [each.text for each in report.records]
            ended = [crash.pid, crash.code, crash.signal]
            spans = [[each.name, each.end] for each in report.spans]
            told[name] = [ended, texts, report.traceback, report.missing, report.kept, spans]
        return told

    seen = boot_linux(
        monkeypatch,
        script,
        directory=directory,
        text=system(clients=dict.fromkeys(VICTIMS, ())),
        victims={name: victim_of(die) for name, die in VICTIMS.items()},
    )

    told = seen.result()
    ends = {
        (str(event.fields["name"]), event.fields["generation"]): [
            event.pid,
            event.fields["code"],
            event.fields["signal"],
        ]
        for event in seen.events
        if event.kind is EventKind.EXIT
    }
    for name, (ended, texts, traceback, missing, kept, _) in told.items():
        assert ended == ends[name, 1], name
        assert f"{WORDS} how={name}" in texts, (name, told)
        assert (missing, kept) == ("", True), name
        assert bool(traceback) is (name in ("failed", "limited")), name
    signals = {"killed": signal.SIGKILL, "failed": 0, "filtered": signal.SIGSYS, "limited": 0}
    assert {name: each[0][2] for name, each in told.items()} == {
        name: signals[name] for name in VICTIMS
    }
    for name in {"killed", "filtered"} & VICTIMS.keys():
        assert told[name][1][-1] == f"{WORDS} how={name}"
    assert told["failed"][1][-1].startswith("RuntimeError: the valve is stuck at ")
    assert told["limited"][1][-1].startswith("MemoryError at ")
    assert "_grows" in told["limited"][2]
    assert told["killed"][5][-1] == ["victim.Turn", 0], "the span that it was in"


def test_a_program_is_started_reaped_and_its_crash_is_there_after_a_reboot(
    monkeypatch: pytest.MonkeyPatch, directory: Path
) -> None:
    async def first(hands: ExecHands) -> Any:
        hello = await hands.started("demo.hello", "one")
        await hands.find("demo.hello")
        greeting = await hands.once("demo.hello", Greet())
        assert isinstance(greeting, Greeting), greeting
        assert await hands.once("execd", Kill(hello.pid)) == Killed()
        killed = await hands.ended(hello.pid)
        crashed = await hands.ended((await hands.started("demo.exit42")).pid)
        ends = [[killed.pid, killed.signal], [crashed.pid, crashed.code]]
        return [hello.pid, greeting.pid, ends, crashed.report]

    async def second(hands: ExecHands) -> Any:
        (crash,) = await hands.all_crashes()
        report = await hands.report(crash.report)
        return [crash.report, crash.pid, crash.code, report.records[-1].text, report.kept]

    before = boot_linux(monkeypatch, first, directory=directory)
    after = boot_linux(monkeypatch, second, directory=directory)

    pid, greeted, ends, number = before.result()
    assert greeted == pid
    assert ends[0] == [pid, signal.SIGKILL]
    assert after.result() == [number, ends[1][0], 42, "about to end with 42 code=42", True]
    recorded = [
        [event.pid, event.fields["code"]]
        for event in before.events
        if event.kind is EventKind.EXIT and event.fields["name"] == "demo.exit42"
    ]
    assert recorded == [[ends[1][0], 42]]
