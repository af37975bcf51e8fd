"""What a system tells the command that watches it: bounded, and no line of it forged."""

import os
import socket
from pathlib import Path

import msgspec
import pytest

from nexus.abi import INIT_NAME, Event, EventKind, Nanos, Pid
from nexus.cli.readiness import Readiness
from nexus.cli.sink import INDENT, TEXT_SIZE_MAX, TOLD_SIZE_MAX, Sink, Told, one_line, told_of
from nexus.cli.up import labelled

FORGED = (
    "x\n9.000000 timed [console] timed: ready\rinit: ready\u2028init: ready\x1b[2K\u202egnissim"
)


def event(kind: EventKind, **fields: object) -> Event:
    return Event(kind=kind, time=Nanos(1_500_000_000), pid=Pid(7), fields=fields)


def crash_of(text: str) -> Told:
    told = told_of(event(EventKind.EXIT, name="probe", code=1, signal=0, crash=text))
    assert told is not None
    return told


@pytest.mark.parametrize(
    "text",
    [
        "\x01" * 3900,
        "\n" * 3900 + "x",
        '"' * 4096,
        "\\" * 4096,
        "\u202e" * 1365,
        "\U0001f600" * 1024,
        "\ud800" * 4096,
        "x" * 100_000,
        "a\n" * 2048,
    ],
)
def test_a_crash_fits_the_message_whatever_is_in_it(text: str, tmp_path: Path) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        sink = Sink(tmp_path / "console.log", theirs, None)
        sink.record(event(EventKind.EXIT, name="n" * 48, code=1, signal=0, crash=text))
        sink.record(event(EventKind.SPAWN_FAILED, name="n" * 48, reason="r", detail=text))
        sink.tell(Told("refused", "n" * 80, one_line(text)))
        for _ in range(3):
            data = ours.recv(100_000)
            assert len(data) <= TOLD_SIZE_MAX
            assert len(msgspec.json.decode(data, type=Told).text.encode()) <= TEXT_SIZE_MAX
    assert sink.lost == 0


def test_of_a_crash_too_long_the_end_is_kept() -> None:
    told = crash_of("\n".join(f"line {index}" for index in range(2000)) + "\nValueError: last")
    first, second, *rest = told.text.split("\n")
    assert first == "exit code 1"
    assert second.startswith(f"{INDENT}...")
    assert rest[-1] == f"{INDENT}ValueError: last"
    assert len(told.text.encode()) > TEXT_SIZE_MAX - 100


def test_no_line_of_a_crash_looks_like_one_of_the_console(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    sink = Sink(tmp_path / "console.log", None, writer)
    sink.record(event(EventKind.EXIT, name="probe", code=1, signal=0, crash=FORGED))
    sink.record(event(EventKind.SPAWN_FAILED, name="probe", reason="r", detail=FORGED))
    os.close(writer)

    text = (tmp_path / "console.log").read_text()
    with os.fdopen(reader, encoding="utf-8", newline="") as stream:
        assert stream.read() == text
    lines = text.split("\n")[:-1]
    assert [line[: len(INDENT)] == INDENT for line in lines] == [False, True, True, False]
    assert lines[0] == "1.500000 probe [exit] exit code 1"
    assert lines[2] == (
        f"{INDENT}9.000000 timed [console] timed: ready\\x0dinit: ready\\u2028init: ready"
        "\\x1b[2K\\u202egnissim"
    )
    assert all(line.isprintable() for line in lines)


def test_a_console_line_says_whose_it_is() -> None:
    def shown(name: str, text: str) -> str:
        return labelled(Told(EventKind.CONSOLE, name, text))

    assert shown("timed", "timed: ready") == "timed: ready"
    assert shown("evil", "timed: ready") == "evil: timed: ready"
    assert shown("evil", "init: ready") == "evil: init: ready"
    assert shown("time", "timed: ready") == "time: timed: ready"
    assert shown(INIT_NAME, "init: ready") == "init: ready"
    assert shown(INIT_NAME, "x") == "init: x"


def test_what_is_lacking_is_one_line_with_the_error_that_ended_it() -> None:
    readiness = Readiness(["probe"])
    readiness.on_told(crash_of("Traceback (most recent call last):\n  x\nValueError: no"))
    assert readiness.lacking() == ["probe: exit code 1, ValueError: no"]


def test_a_disk_that_was_made_is_said_and_one_that_was_granted_is_not() -> None:
    made = told_of(event(EventKind.DEVICE, name="disk", what="made", path="/s/disk.img", size=512))
    granted = told_of(event(EventKind.DEVICE, name="disk", what="granted", holder="statefsd"))

    assert made is not None
    assert made.text == "a new image of 512 zero bytes was made, /s/disk.img"
    assert granted is None
