"""Supervision on real processes: a stopped service, one that ignores Stop, signals to init, a
crash loop over two boots with a state directory."""

import json
import os
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import pytest

from nexus.abi import NEVER, BootImage, Event, EventKind, Nanos, Program
from nexus.init import plan as plan_module
from nexus.init.ground import init_program, limits_of
from nexus.init.memory import decode_memory
from nexus.init.plan import Plan, make_plan
from nexus.init.programs import PROGRAMS, ProgramSource
from nexus.init.system import parse
from nexus.kernel.linux import LinuxKernel
from nexus.protocols.testsvc import PROTOCOL as TESTSVC
from nexus.runtime import Server
from tests.fakes.initrig import Main, Nothing, idle

pytestmark = pytest.mark.linux

PATIENCE: Final = 40.0  # seconds for anything, on a machine shared with other tests
SOON: Final = 15.0  # seconds for what takes one at most on a free machine
POLL: Final = 0.01  # seconds
SECOND: Final = 1_000_000_000
HEAD: Final = '[system]\nname = "test"\ntotal_size = "4MiB"\n'


def seconds() -> float:
    """The clock on the wall of the test, which is outside the system."""
    return time.monotonic()  # noqa: TID251 (see above)


def doze() -> None:
    """Let the system's process go on."""
    time.sleep(POLL)  # noqa: TID251 (another process is waited for)


def service(name: str, *rest: str) -> str:
    lines = "\n".join(rest)
    return f'\n[service.{name}]\nprogram = "{name}"\nrestart = {{ backoff = "20ms" }}\n{lines}\n'


async def crash(boot: BootImage) -> int:
    """Ends as soon as it is up."""
    server = Server(Nothing(), TESTSVC, boot)
    _ = await server.step(NEVER)
    return 3


async def stubborn(boot: BootImage) -> int:
    """Answers everything but Stop, which it ignores."""
    server = Server(Nothing(), TESTSVC, boot)
    while True:
        _ = await server.step(NEVER)


class Running:
    """A system in a process of its own, and what it has told so far."""

    def __init__(self, plan: Plan, mains: Mapping[str, Main], told: Path, state: Path) -> None:
        self._told = told
        self.code: int | None = None
        self.pid = os.fork()
        if not self.pid:
            code = 1
            try:
                code = run_system(plan, mains, told, state)
            finally:
                os._exit(code)

    def events(self) -> list[dict[str, Any]]:
        if not self._told.exists():
            return []
        whole = self._told.read_text().split("\n")[:-1]
        return [json.loads(each) for each in whole]

    def lines(self) -> list[str]:
        return [event["line"] for event in self.events() if event["kind"] == "console"]

    def evidence(self, line: str) -> list[dict[str, Any]]:
        found = [event for event in self.events() if event.get("line") == line]
        return [event["evidence"] for event in found]

    def pids(self, name: str) -> list[int]:
        spawns = [event for event in self.events() if event["kind"] == "spawn"]
        return [event["pid"] for event in spawns if event["name"] == name]

    def await_line(self, line: str, count: int = 1) -> None:
        until = seconds() + PATIENCE
        while self.lines().count(line) < count:
            assert seconds() < until, f"no {line!r}: {self.lines()}"
            assert self.code is None, f"ended without {line!r}: {self.lines()}"
            doze()

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def wait(self) -> float:
        """Wait for its end; how many seconds that took. The exit code is `code`."""
        begun = seconds()
        while seconds() < begun + PATIENCE:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
                return seconds() - begun
            doze()
        raise AssertionError(f"it did not end: {self.lines()}")


def run_system(plan: Plan, mains: Mapping[str, Main], told: Path, state: Path) -> int:
    """The system's process: run the plan, tell each event as a line of JSON; the exit code."""
    state.mkdir(mode=0o700, exist_ok=True)
    with told.open("w", buffering=1) as file:

        def record(event: Event) -> None:
            if event.kind not in (EventKind.CONSOLE, EventKind.SPAWN):
                return
            fields = dict(event.fields)
            evidence = fields.get("evidence")
            if isinstance(evidence, str | bytes):
                fields["evidence"] = json.loads(evidence or "{}")
            row = {"kind": event.kind.name.lower(), "pid": event.pid, **fields}
            _ = file.write(json.dumps(row, default=str) + "\n")

        programs = {name: Program(name=name, main=main, digest="") for name, main in mains.items()}
        kernel = LinuxKernel(programs, recorder=record, limits=limits_of(plan), state_dir=state)
        root = init_program(plan, 1)
        return kernel.run(root, b"", until=Nanos(kernel.now + 60 * SECOND)).code


class Bench:
    """Starts systems, and leaves none behind."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.started: list[Running] = []

    @property
    def memory(self) -> Path:
        (file,) = (self._folder / "state").iterdir()
        return file

    def __call__(self, text: str, mains: Mapping[str, Main]) -> Running:
        plan = make_plan(parse((HEAD + text).encode(), Path("test.toml")))
        told = self._folder / f"told-{len(self.started)}"
        running = Running(plan, mains, told, self._folder / "state")
        self.started.append(running)
        return running


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    """Starts a system of own programs in a process of its own; what is left is killed."""
    sources = {
        name: ProgramSource(
            name=name, module="nexus.services.timed", protocols=("nexus.protocols.testsvc",)
        )
        for name in "abc"
    }
    monkeypatch.setattr(plan_module, "PROGRAMS", {**PROGRAMS, **sources})
    bench = Bench(tmp_path)
    yield bench
    for running in bench.started:
        if running.code is None:
            os.kill(running.pid, signal.SIGKILL)
            _ = running.wait()


WATCHED: Final = 'health = { deadline = "10s", every = "100ms", answer = "2s" }'


def test_a_stopped_service_is_noticed_killed_and_restarted(start: Bench) -> None:
    system = start(service("a", WATCHED) + service("b", WATCHED), {"a": idle, "b": idle})
    system.await_line("init: ready")
    system.await_line("init: health a ok")
    (pid,) = system.pids("a")
    begun = seconds()

    os.kill(pid, signal.SIGSTOP)
    system.await_line("init: back a")

    assert seconds() - begun < SOON
    (end,) = system.evidence("init: end of a")
    assert (end["reason"], end["signal"]) == ("hang", signal.SIGKILL)
    assert len(system.pids("a")) == 2
    assert len(system.pids("b")) == 1
    system.send(signal.SIGTERM)
    _ = system.wait()
    assert system.code == 0


def test_a_signal_to_init_ends_the_system_in_order_and_cleanly(start: Bench) -> None:
    text = service("a", 'stage = "core"') + service("b", 'uses = [{ name = "a" }]') + service("c")
    system = start(text, dict.fromkeys("abc", idle))
    system.await_line("init: health c ok")

    system.send(signal.SIGTERM)
    took = system.wait()

    assert took < SOON
    assert system.code == 0
    (stopped,) = system.evidence("init: stopped")
    assert stopped["exits"] == {"a": [0, 0], "b": [0, 0], "c": [0, 0]}
    assert (stopped["dirty"], stopped["tasks"], stopped["links"]) == ([], 1, 0)


def test_a_service_that_ignores_stop_is_killed_and_the_end_has_its_bound(start: Bench) -> None:
    text = "".join(service(name, 'stop = "2s"') for name in "abc")
    system = start(text, {"a": stubborn, "b": stubborn, "c": idle})
    system.await_line("init: health c ok")
    system.await_line("init: health a ok")
    system.await_line("init: health b ok")

    system.send(signal.SIGINT)
    took = system.wait()

    assert 2.0 <= took < 4.0, "not one grace after another"
    assert system.code == 1
    (stopped,) = system.evidence("init: stopped")
    assert sorted(stopped["dirty"]) == ["a", "b"]


def test_a_second_signal_kills_at_once(start: Bench) -> None:
    system = start(service("a", 'stop = "30s"'), {"a": stubborn})
    system.await_line("init: health a ok")

    system.send(signal.SIGTERM)
    system.await_line("init: signal")
    system.send(signal.SIGTERM)
    took = system.wait()

    assert took < SOON
    (stopped,) = system.evidence("init: stopped")
    assert stopped["exits"] == {"a": [0, signal.SIGKILL]}


def test_a_crash_loop_and_a_killed_init_lead_to_safe_mode_in_the_next_boot(start: Bench) -> None:
    text = 'safe_after = 1\nstable = "1min"\n[group.g]\nrestarts = 2\nwithin = "10s"\n'
    text += service("a", 'group = "g"') + service("b", "safe = true")
    first = start(text, {"a": crash, "b": idle})
    first.await_line("init: safe mode")
    first.await_line("init: health b ok")
    first.send(signal.SIGKILL)
    _ = first.wait()

    second = start(text, {"a": crash, "b": idle})
    second.await_line("init: health b ok")
    second.send(signal.SIGTERM)
    _ = second.wait()

    (safe,) = second.evidence("init: safe mode")
    assert (safe["boots"], safe["left_out"]) == (2, ["a"])
    assert safe["why"].startswith("a: more than 2 restarts of its group")
    assert second.pids("a") == []
    assert second.code == 0
    kept = decode_memory(start.memory.read_bytes())
    assert (kept.boots, kept.unstable) == (2, 1)
    assert start.memory.stat().st_mode & 0o077 == 0
