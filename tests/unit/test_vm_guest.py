"""What process 1 of a guest says of itself, over a socket that stands for its port."""

import json
import os
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from nexus.abi import Event, EventKind, Nanos, Pid
from nexus.bootctl.handover import EXIT_REBOOT, EXIT_SLOT_FAILED
from nexus.proof.notes import NOTE, NOTE_STAGE
from nexus.proof.sink import EventSink
from nexus.proof.trace import CRASH_PATTERNS
from nexus.vm import guest
from nexus.vm.contract import NOTE_CRASH, NOTE_OFF
from nexus.vm.guest import Evidence, crashed, service_crashed


class Host:
    """The other end."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end

    def lines(self) -> list[Any]:
        self._end.settimeout(1)
        text = self._end.recv(1 << 20)
        return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def ends() -> Iterator[tuple[Host, int]]:
    mine, its = socket.socketpair()
    with mine, its:
        yield Host(mine), its.fileno()


def test_the_machine_starts_again_where_init_says_so() -> None:
    assert {EXIT_REBOOT, EXIT_SLOT_FAILED} == guest.REBOOTS


def test_a_note_is_a_line_with_the_time(ends: tuple[Host, int]) -> None:
    host, port = ends

    Evidence(port).note(NOTE_STAGE, name="devices")

    (note,) = host.lines()
    assert (note[NOTE], note["name"]) == (NOTE_STAGE, "devices")
    assert note["t"] > 0


def test_the_last_word_comes_behind_everything_else(ends: tuple[Host, int]) -> None:
    host, port = ends
    evidence = Evidence(port)
    evidence.sink = EventSink(port)

    evidence.sink.record(Event(Nanos(7), EventKind.KERNEL, Pid(0), {"line": "KINIT: ok"}))
    evidence.note(NOTE_STAGE, name="behind it")
    evidence.off(3)

    event, note, dropped, off = host.lines()
    assert event["f"] == {"line": "KINIT: ok"}
    assert note["name"] == "behind it"
    assert dropped == {"dropped": 0}
    assert (off[NOTE], off["code"]) == (NOTE_OFF, 3)


def test_a_failure_in_process_1_is_told_on_the_console_and_to_the_host(
    ends: tuple[Host, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    host, port = ends
    reader, writer = os.pipe()
    monkeypatch.setattr(guest, "CONSOLE", writer)

    crashed("Traceback: no disk", Evidence(port))

    (note,) = host.lines()
    assert (note[NOTE], note["text"]) == (NOTE_CRASH, "Traceback: no disk")
    assert os.read(reader, 100) == b"\nTraceback: no disk"
    os.close(reader)
    os.close(writer)


def test_a_failure_before_there_is_a_port_is_told_on_the_console(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reader, writer = os.pipe()
    monkeypatch.setattr(guest, "CONSOLE", writer)

    crashed("no virtio-serial port", None)

    assert os.read(reader, 100) == b"\nno virtio-serial port"
    os.close(reader)
    os.close(writer)


def test_the_last_words_of_a_service_are_on_the_console_each_line_with_its_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An unmarked traceback is one of process 1, and of a boot that is red for it."""
    reader, writer = os.pipe()
    monkeypatch.setattr(guest, "CONSOLE", writer)

    service_crashed("pump", "Traceback (most recent call last):\nKeyError: 'valve'\n")

    words = os.read(reader, 200).decode()
    assert words == "pump: | Traceback (most recent call last):\npump: | KeyError: 'valve'\n"
    assert not any(pattern.search(words) for pattern in CRASH_PATTERNS)
    os.close(reader)
    os.close(writer)
