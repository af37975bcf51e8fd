"""The console: what a line may be, and who is said to have written it."""

from typing import Final

from nexus.abi import (
    CONSOLE_LINE_SIZE_MAX,
    EVIDENCE_SIZE_MAX,
    AbiError,
    BootImage,
    ConsoleWrite,
    EventKind,
    Nanos,
    Now,
    SleepUntil,
    Status,
    TaskStats,
)
from nexus.kernel.core import EVIDENCE_DEPTH_MAX
from nexus.testing.conformance.steps import ended_well, refused, start
from nexus.testing.rig import Rig

NESTED: Final = b'{"a": %s%s}'


def test_a_line_is_stamped_with_its_writer(rig: Rig) -> None:
    async def child(boot: BootImage) -> None:
        await ConsoleWrite("init-lite: I am init", b'{"count": 3, "name": "\\u00e9"}')
        await ConsoleWrite("second")

    async def root(boot: BootImage) -> list[int]:
        pids = []
        for _ in range(2):
            spawned = await start(boot, "writer")
            await ended_well(spawned)
            pids.append(spawned.pid)
        await ConsoleWrite("from root")
        return [*pids, boot.pid]

    run = rig.observe(root, programs={"writer": child})

    events = [event for event in run.events if event.kind is EventKind.CONSOLE]
    first, second, root_pid = run.result
    told = [(event.pid, event.fields["name"], event.fields["line"]) for event in events]
    assert told == [
        (first, "writer", "init-lite: I am init"),
        (first, "writer", "second"),
        (second, "writer", "init-lite: I am init"),
        (second, "writer", "second"),
        (root_pid, "init-lite", "from root"),
    ]
    assert [event.fields["generation"] for event in events] == [1, 1, 2, 2, 1]
    assert events[0].fields["evidence"] == {"count": 3, "name": "é"}
    assert events[1].fields["evidence"] == {}
    times = [event.time for event in events]
    assert times == sorted(times)


def test_lines_outside_the_limits_are_refused(rig: Rig) -> None:
    async def writer(boot: BootImage) -> None:
        before = await TaskStats()
        for line in (
            "x" * (CONSOLE_LINE_SIZE_MAX + 1),
            "é" * (CONSOLE_LINE_SIZE_MAX // 2 + 1),
            "two\nlines",
            "two\rlines",
            "bell\x07",
            "nul\x00",
            "escape\x1b[31m",
            "delete\x7f",
            "next line\x85",
            "line separator\u2028",
            "paragraph separator\u2029",
            *(f"embedding {chr(code)}" for code in range(0x202A, 0x202F)),
            *(f"isolate {chr(code)}" for code in range(0x2066, 0x206A)),
            "lone surrogate \ud800",
        ):
            await refused(ConsoleWrite(line), Status.INVALID_ARGUMENT)
        for evidence in (
            b"[]", b"1", b"null", b'"text"', b"{", b"{} {}", b"\xff", b'{"a": NaN}',
            b"{" + b" " * EVIDENCE_SIZE_MAX + b"}",
            NESTED % (b"[" * EVIDENCE_DEPTH_MAX, b"]" * EVIDENCE_DEPTH_MAX),
            NESTED % (b"[" * 970, b"]" * 970),  # json.loads takes it, json.dumps may not
        ):  # fmt: skip
            await refused(ConsoleWrite("line", evidence), Status.INVALID_ARGUMENT)
        assert await TaskStats() == before
        await ConsoleWrite("x" * CONSOLE_LINE_SIZE_MAX)
        await ConsoleWrite("é" * (CONSOLE_LINE_SIZE_MAX // 2))
        await ConsoleWrite("")
        deepest = EVIDENCE_DEPTH_MAX - 1
        await ConsoleWrite("deep", NESTED % (b"[" * deepest, b"]" * deepest))
        await ConsoleWrite("full", b"{" + b" " * (EVIDENCE_SIZE_MAX - 2) + b"}")

    async def root(boot: BootImage) -> None:
        await ended_well(await start(boot, "writer"))
        await writer(boot)

    run = rig.observe(root, programs={"writer": writer})

    lines = [str(fields["line"]) for fields in run.fields(EventKind.CONSOLE)]
    good = ["x" * CONSOLE_LINE_SIZE_MAX, "é" * (CONSOLE_LINE_SIZE_MAX // 2), "", "deep", "full"]
    assert lines == good * 2


def test_many_lines_in_a_row_are_all_printed_or_refused_with_queue_full(rig: Rig) -> None:
    async def writer(boot: BootImage) -> None:
        printed = 0
        for index in range(300):
            try:
                await ConsoleWrite(f"line {index} " + "x" * 400)
                printed += 1
            except AbiError as error:
                assert error.status is Status.QUEUE_FULL
        assert printed > 0
        while not await _printed(f"printed {printed}"):
            await SleepUntil(Nanos(await Now() + 20_000_000))

    async def _printed(line: str) -> bool:
        try:
            await ConsoleWrite(line)
        except AbiError as error:
            assert error.status is Status.QUEUE_FULL
            return False
        return True

    async def root(boot: BootImage) -> None:
        await ended_well(await start(boot, "writer"))

    run = rig.observe(root, programs={"writer": writer})

    lines = [str(fields["line"]) for fields in run.fields(EventKind.CONSOLE)]
    assert lines[-1] == f"printed {len(lines) - 1}"
