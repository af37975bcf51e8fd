"""The runner outlives what it runs: a crash, a hang, a flood, processes left behind."""

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

import nexus
from nexus.abi import Event, EventKind, Nanos, Pid
from nexus.proof import runner
from nexus.proof.record import MalformedEvent, encode_event
from nexus.proof.runner import Boot, Job, run_boot
from nexus.proof.trace import Trace

JOB = Job(ground="sim", system="", smp=1, seed=1, limit=1)
PRELUDE = """
import os, sys, time, signal
events = int(sys.argv[1])
def event(text, kind="kernel"):
    os.write(events, ('{"t":1,"k":"%s","p":0,"f":{"line":"%s"}}\\n' % (kind, text)).encode())
def end():
    os.write(events, b'{"dropped":0}\\n')
"""


def _run(script: str, timeout: float = 20.0, stop_at: str = "") -> Trace:
    return run_boot(
        JOB,
        timeout=int(timeout * 1e9),
        watch=lambda event: bool(stop_at) and event.fields.get("line") == stop_at,
        command=(sys.executable, "-S", "-c", PRELUDE + script),
    )


def _gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


def _state(pid: int) -> str:
    """The process state letter of proc(5), X for one that has just gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return "X"
    return text.rpartition(")")[2].split()[0]


def test_events_and_output_come_home_and_a_clean_end_is_seen() -> None:
    trace = _run("event('one'); print('hello'); event('two'); end()")

    assert [line.text for line in trace.lines] == ["one", "two"]
    assert trace.output == "hello\n"
    assert (trace.ending.code, trace.ending.signal, trace.ending.told_end) == (0, 0, True)
    assert trace.ending.left_behind == 0


def test_an_exit_code_and_a_signal_are_told_apart() -> None:
    assert _run("end(); sys.exit(3)").ending.code == 3
    assert _run("os.kill(os.getpid(), signal.SIGABRT)").ending.signal == 6


def test_a_boot_that_dies_in_the_middle_did_not_tell_its_end() -> None:
    trace = _run("event('one'); os.kill(os.getpid(), signal.SIGKILL)")

    assert not trace.ending.told_end
    assert [line.text for line in trace.lines] == ["one"]


def test_a_boot_that_hangs_is_killed_at_its_deadline() -> None:
    start = time.monotonic_ns()

    trace = _run("event(str(os.getpid())); time.sleep(60)", timeout=1.0)

    assert trace.ending.code is None
    assert time.monotonic_ns() - start < 10e9
    assert _gone(int(trace.lines[0].text))


def test_a_boot_that_ignores_signals_and_closes_everything_is_killed_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runner, "EXIT_GRACE", 0.5)
    script = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
event(str(os.getpid()))
for fd in range(256):
    try: os.close(fd)
    except OSError: pass
time.sleep(60)
"""
    trace = _run(script, timeout=2.0)

    assert trace.ending.code is None
    assert _gone(int(trace.lines[0].text))


def test_the_processes_a_boot_leaves_behind_are_counted_and_ended() -> None:
    script = """
for _ in range(2):
    pid = os.fork()
    if pid == 0:
        time.sleep(60)
        os._exit(0)
    event(str(pid))
end()
os._exit(0)
"""
    trace = _run(script)

    assert trace.ending.code == 0
    assert trace.ending.left_behind == 2
    assert all(_gone(int(line.text)) for line in trace.lines)


def test_a_run_ends_at_the_watched_line() -> None:
    trace = _run("event('a'); event('b'); event('c'); time.sleep(60)", stop_at="b")

    assert trace.ending.stopped
    assert [line.text for line in trace.lines] == ["a", "b"]


@pytest.mark.parametrize(
    ("ground", "is_waited_for"), [("sim", True), ("vm", True), ("linux", False)]
)
def test_a_machine_that_is_stopped_leaves_what_is_on_its_disks(
    tmp_path: Path, ground: str, *, is_waited_for: bool
) -> None:
    file = tmp_path / "disk"
    script = f"""
def leave(*_):
    time.sleep(0.2)
    open({str(file)!r}, "w").close()
    os._exit(0)
signal.signal(signal.SIGTERM, leave)
event("seen")
time.sleep(60)
"""

    trace = run_boot(
        replace(JOB, ground=ground),
        timeout=20 * 10**9,
        watch=lambda _event: True,
        command=(sys.executable, "-S", "-c", PRELUDE + script),
    )

    assert trace.ending.stopped
    assert file.exists() is is_waited_for


def test_output_without_end_is_cut_and_does_not_block_the_boot() -> None:
    trace = _run("sys.stdout.write('x' * (3 << 20)); event('after'); end()")

    assert len(trace.output) == runner.OUTPUT_SIZE_MAX
    assert trace.ending.code == 0


def test_events_beyond_the_bound_are_counted_as_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "EVENTS_MAX", 3)

    trace = _run("for _ in range(5): event('x')\nend()")

    assert len(trace.events) == 3
    assert trace.ending.dropped == 2


def test_a_line_that_is_no_event_is_refused_and_nothing_stays_behind() -> None:
    with pytest.raises(MalformedEvent):
        _run("os.write(events, b'nonsense\\n'); time.sleep(60)")


def test_a_boot_dies_with_its_runner() -> None:
    child = "import os, sys, time; from nexus.proof.runner import die_with_parent; "
    child += "die_with_parent(os.getppid()); print(os.getpid(), flush=True); time.sleep(60)"
    script = (
        "import os, signal, subprocess, sys; "
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}], stdout=subprocess.PIPE); "
        "print(child.stdout.readline().decode(), flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": str(Path(nexus.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    pid = int(ran.stdout)

    deadline = time.monotonic_ns() + 5 * 10**9
    while not _gone(pid) and time.monotonic_ns() < deadline:
        assert _state(pid) in {"Z", "R", "S", "X", "D"}
        if _state(pid) == "Z":
            break
    assert _gone(pid) or _state(pid) in {"Z", "X"}


def test_every_event_kind_passes_the_pipe() -> None:
    events = [Event(Nanos(1), kind, Pid(2), {"name": "x"}) for kind in EventKind]
    lines = b"".join(encode_event(event) + b"\n" for event in events)

    assert list(_run(f"os.write(events, {lines!r}); end()").events) == events


AHEAD = replace(JOB, ahead=True)
WAITING = """
time.sleep(1)
with open({file!r}, "w") as told:
    told.write(str(os.getpid()))
event("up")
print(sys.stdin.readline().strip())
event("went on")
end()
"""


def _ahead(tmp_path: Path) -> tuple[Boot, int]:
    """A boot that was started ahead a second ago and waits, and the process of it."""
    fifo = tmp_path / "pid"
    os.mkfifo(fifo)
    script = PRELUDE + WAITING.format(file=str(fifo))
    boot = Boot(AHEAD, (sys.executable, "-S", "-c", script))
    return boot, int(fifo.read_text())


def test_a_boot_that_is_started_ahead_waits_until_it_is_run(tmp_path: Path) -> None:
    boot, pid = _ahead(tmp_path)
    assert not _gone(pid)

    trace = boot.run(timeout=20 * 10**9, watch=lambda _event: False)

    assert [line.text for line in trace.lines] == ["up", "went on"]
    assert trace.output == "go\n"
    assert trace.ending.code == 0


def test_the_time_it_waited_is_none_of_its_own(tmp_path: Path) -> None:
    boot, _pid = _ahead(tmp_path)

    trace = boot.run(timeout=20 * 10**9, watch=lambda event: event.fields.get("line") == "up")

    assert trace.ending.stopped
    assert trace.ending.wall < 10**9


def test_a_boot_that_was_started_ahead_and_is_not_run_leaves_no_process(tmp_path: Path) -> None:
    boot, pid = _ahead(tmp_path)

    boot.drop()

    assert _gone(pid)
