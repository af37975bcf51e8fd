"""`nexus run` and `nexus why` against real processes: crashes, denials, and a reboot between."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.fakes.machine import Machine, machine, python_of
from tests.linux.test_cli_system import eventually, pid_of

pytestmark = pytest.mark.linux

SYSTEM: Final = Path(__file__).parent / "crashes.toml"


@pytest.fixture
def host() -> Iterator[Machine]:
    python = python_of(os.getuid())
    assert python is not None
    with machine(os.getuid(), python) as made:
        yield made


def test_why_tells_a_crash_its_evidence_and_what_was_done_also_after_a_reboot(
    host: Machine,
) -> None:
    _ = host.ok("up", "-d", str(SYSTEM))

    assert host.ok("why", "timed").out.startswith("timed: up, health ok, process ")
    assert "nothing has happened to it" in host.ok("why", "timed").out
    assert host.ok("run", "demo.exit0").out == ""
    crashed = host.run("run", "demo.exit42", "one", "--env", "LEVEL=80")
    assert crashed.code == 42
    assert crashed.err == "demo.exit42: ended with 42; `nexus why demo.exit42` tells more\n"

    story = host.ok("why", "demo.exit42").out
    assert "demo.exit42 crashed: exit code 42" in story
    assert "it ended by itself with code 42" in story
    assert "error about to end with 42 code=42" in story
    assert "then       not started again" in story
    document = host.ok("why", "demo.exit42", "--json").json
    assert document["report"]["records"][-1]["text"] == "about to end with 42 code=42"
    assert document["report"]["kept"] is True

    pid = pid_of(host, "timed")
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    assert eventually(lambda: "SIGKILL" in host.ok("why", "timed").out)
    story = host.ok("why", "timed").out
    assert "timed: up, health" in story
    assert "killed from outside" in story
    assert "then       started again after 50 ms, restart 1" in story

    _ = host.ok("down")
    _ = host.ok("up", "-d", str(SYSTEM))
    story = host.ok("why", "timed").out
    assert "timed crashed: SIGKILL, in boot 1, before this one" in story
    assert "exit code 42, in boot 1, before this one" in host.ok("why", "demo.exit42").out
    _ = host.ok("down")


def test_why_tells_of_a_denied_start_and_where_that_is_decided(host: Machine) -> None:
    _ = host.ok("up", "-d", str(SYSTEM))

    denied = host.run("run", "demo.hello")
    assert denied.code == 1
    assert denied.err.startswith("nexus: demo.hello: operator may not start it: see `nexus explain")
    assert host.run("run", "timed").err.startswith("nexus: timed: ")

    def told() -> bool:
        return "operator may not start it, reason policy" in host.ok("why", "demo.hello").out

    assert eventually(told)
    story = host.ok("why", "demo.hello").out
    assert "a start was refused once, the last time: the policy denies it" in story
    assert "see `nexus explain operator execd proc.spawn:demo.hello`" in story
    explained = host.run("explain", "operator", "execd", "proc.spawn:demo.hello")
    assert explained.code == 1
    assert 'add "proc.spawn:demo.hello"' in explained.out
    unknown = host.run("why", "nobody")
    assert unknown.err.startswith("nexus: there is no service nobody in crashes")
    _ = host.ok("down")
