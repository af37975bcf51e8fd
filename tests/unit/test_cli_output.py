"""What the commands print, and how the command line itself behaves."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nexus.abi import INIT_NAME, Event, EventKind, Nanos, Pid
from nexus.cli import main
from nexus.cli.errors import EXIT_USAGE
from nexus.cli.new import new_system
from nexus.cli.output import counting, is_lively, say_table, table_lines
from nexus.cli.readiness import Readiness
from nexus.cli.sink import FILE_SIZE_MAX, WHY_SIZE_MAX, Sink, Told, told_of
from nexus.cli.status import span
from nexus.proof.request import parse

ROOT = Path(__file__).parents[2]
MINIMAL = ROOT / "systems" / "minimal.toml"
COMMANDS = (
    *("check", "up", "down", "status", "call", "logs", "explain", "doctor", "restart"),
    *("bugreport", "unit", "new system", "new service", "policy reload", "safe leave"),
    *("why", "ota stage", "ota switch", "ota status", "ota commit", "ota rollback"),
    *("ota provision", "bundle build", "bundle inspect", "bundle verify", "bundle sign"),
)


class Terminal(io.StringIO):
    """A stream that says it is one."""

    def isatty(self) -> bool:
        return True


def test_columns_are_as_wide_as_they_need_to_be() -> None:
    assert table_lines(("A", "LONG"), [("xyz", "1"), ("", "2")]) == [
        "A    LONG",
        "xyz  1",
        "     2",
    ]


def test_colour_is_for_terminals_and_no_color_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert is_lively(Terminal())
    assert not is_lively(io.StringIO())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not is_lively(Terminal())


@pytest.mark.parametrize("stream", [Terminal, io.StringIO])
def test_progress_is_for_terminals(
    stream: type[io.StringIO], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    errors = stream()
    monkeypatch.setattr(sys, "stderr", errors)

    with counting("staging 1.1.0", 2000) as count:
        count(1000)

    shown = errors.getvalue()
    assert ("staging 1.1.0" in shown) == (stream is Terminal)
    assert ("1.0/2.0 kB" in shown) == (stream is Terminal)


def test_a_piped_table_has_no_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    say_table(("STATE",), [("up",), ("failed",)])

    assert capsys.readouterr().out == "STATE\nup\nfailed\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_examples(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command.split(), "--help"]) == 0

    output = capsys.readouterr().out
    assert "Examples:" in output
    assert f"\n    nexus {command}" in output or f"\n  nexus {command}" in output
    assert "\x1b" not in output


@pytest.mark.parametrize("command", [each for each in COMMANDS if each != "unit"])
def test_every_command_can_answer_in_json(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command.split(), "--help"]) == 0
    assert "--json" in capsys.readouterr().out


def test_the_shell_can_complete_commands() -> None:
    answer = subprocess.run(
        [sys.executable, "-m", "nexus.cli"],
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT / "src"),
            "_NEXUS_COMPLETE": "complete_bash",
            "COMP_WORDS": "nexus bug",
            "COMP_CWORD": "1",
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert answer.stdout.split() == ["bugreport"]


def test_a_command_that_only_checks_loads_no_kernel_and_no_rich() -> None:
    code = (
        "import sys\n"
        "from nexus.cli import main\n"
        f"assert main(['check', {str(MINIMAL)!r}, '--digest']) == 0\n"
        "wrong = [n for n in sys.modules if n.split('.')[0] == 'rich' "
        "or n.startswith(('nexus.kernel.linux', 'nexus.kernel.sim', 'nexus.proof'))]\n"
        "print(wrong)\n"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert answer.stdout.splitlines()[-1] == "[]"


def test_the_process_that_becomes_init_has_no_typer_and_no_rich() -> None:
    code = (
        "import sys\n"
        "import nexus.cli.boot\n"
        "print([n for n in sys.modules if n.split('.')[0] in ('typer', 'rich', 'pydantic')])\n"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert answer.stdout == "[]\n"


def test_who_stops_reading_gets_no_complaint() -> None:
    answer = subprocess.run(
        f"{sys.executable} -m nexus.cli check --schema | head -c 1",
        shell=True,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert answer.stderr == ""


def test_a_fault_of_our_own_is_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fault(*_: object, **__: object) -> None:
        raise ZeroDivisionError("of ours")

    monkeypatch.delenv("NEXUS_TRACEBACK", raising=False)
    monkeypatch.setattr("nexus.cli.check.check", fault)

    assert main(["check", str(MINIMAL)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("nexus: a fault of nexus itself, ZeroDivisionError: of ours; please ")
    assert error.count("\n") == 1


def test_ctrl_c_is_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("nexus.cli.check.check", interrupted)

    assert main(["check", str(MINIMAL)]) == 1
    assert capsys.readouterr().err == "nexus: interrupted\n"


# ------------------------------------------------------------------ readiness and the console file


def console(name: str, text: str) -> Told:
    return Told(EventKind.CONSOLE, name, text)


def test_a_system_is_ready_when_it_is_linked_and_everybody_says_so() -> None:
    readiness = Readiness(["a", "b"])
    readiness.on_told(console("a", "a: ready"))
    readiness.on_told(console("init-lite", "init: ready"))
    assert not readiness.done
    readiness.on_told(console("a", "b: ready"))  # not its own word
    assert not readiness.done
    readiness.on_told(console("b", "b: ready again"))
    assert readiness.done


def test_what_lacks_is_told_with_what_is_known_of_it() -> None:
    readiness = Readiness(["a", "b"])
    readiness.on_told(Told(EventKind.EXIT, "a", "exit code 3"))
    assert readiness.lacking() == ["a: exit code 3", "b: has not said that it is ready"]
    assert readiness.ends == 1


def said(text: str, why: str = "") -> Told:
    return Told(EventKind.CONSOLE, INIT_NAME, text, why)


def test_a_service_that_is_given_up_ends_the_wait_with_the_reason() -> None:
    readiness = Readiness(["a", "b"])
    readiness.on_told(console("a", "a: ready"))
    readiness.on_told(Told(EventKind.EXIT, "a", "exit code 3"))
    assert not readiness.hopeless
    readiness.on_told(said("init: gave up on a", "a: more than 1 restarts"))
    assert readiness.hopeless
    assert not readiness.done
    assert readiness.lacking() == [
        "a: init gave up on it: a: more than 1 restarts; it ended with exit code 3",
    ]


def test_a_start_that_is_denied_ends_the_wait_and_one_that_is_undecided_does_not() -> None:
    readiness = Readiness(["a"])
    readiness.on_told(said("init: no start of a", "undecided"))
    assert not readiness.hopeless
    readiness.on_told(said("init: no start of a", "denied"))
    assert readiness.hopeless
    assert readiness.lacking() == [
        "a: not started, the policy does not allow what the system file grants it"
    ]


def test_what_a_service_says_of_others_does_not_end_the_wait() -> None:
    readiness = Readiness(["a", "b"])
    readiness.on_told(console("a", "init: gave up on b"))
    assert not readiness.hopeless


def test_init_s_reason_goes_with_its_line_and_nobody_else_s() -> None:
    evidence = {"why": "x" * 1_000, "links": 3}
    fields = {"name": INIT_NAME, "line": "init: gave up on a", "evidence": evidence}
    told = told_of(Event(Nanos(1), EventKind.CONSOLE, Pid(1), fields))
    assert told is not None
    assert (told.text, len(told.why)) == ("init: gave up on a", WHY_SIZE_MAX)
    told = told_of(Event(Nanos(1), EventKind.CONSOLE, Pid(1), {**fields, "name": "a"}))
    assert told is not None
    assert told.why == ""
    fields["evidence"] = {"reason": "denied", "grants": []}
    told = told_of(Event(Nanos(1), EventKind.CONSOLE, Pid(1), fields))
    assert told is not None
    assert told.why == "denied"


def test_a_start_without_its_device_is_tried_again_and_says_why() -> None:
    readiness = Readiness(["a"])
    evidence = {"reason": "device", "why": "device disk: not on the bus", "devices": []}
    fields = {"name": INIT_NAME, "line": "init: no start of a", "evidence": evidence}
    told = told_of(Event(Nanos(1), EventKind.CONSOLE, Pid(1), fields))
    assert told is not None

    readiness.on_told(told)

    assert not readiness.hopeless
    assert readiness.lacking() == ["a: not started: device disk: not on the bus"]


def test_safe_mode_ends_the_wait_and_is_not_ready() -> None:
    readiness = Readiness(["a"])
    readiness.on_told(console("init-lite", "init: safe mode"))
    assert readiness.done
    assert readiness.safe_mode


def event(line: str) -> Event:
    return Event(Nanos(1), EventKind.CONSOLE, Pid(1), {"name": "a", "line": line})


def test_the_console_file_is_bounded_and_keeps_one_predecessor(tmp_path: Path) -> None:
    path = tmp_path / "console.log"
    sink = Sink(path, None, None)
    for _ in range(3 * FILE_SIZE_MAX // 500):
        sink.record(event("x" * 500))
    assert sorted(each.name for each in tmp_path.iterdir()) == ["console.log", "console.log.1"]
    assert all(each.stat().st_size <= FILE_SIZE_MAX for each in tmp_path.iterdir())
    assert sink.lost == 0


def test_a_watcher_that_does_not_read_never_blocks_the_system(tmp_path: Path) -> None:
    import socket

    watch, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sink = Sink(tmp_path / "console.log", theirs, None)
    for _ in range(5_000):
        sink.record(event("x" * 400))
    assert sink.lost > 0
    watch.close()
    sink.record(event("after the watcher has gone"))
    assert "after the watcher" in (tmp_path / "console.log").read_text()


# ------------------------------------------------------------------ files that are made


def test_a_new_system_is_right_and_is_never_written_over(tmp_path: Path) -> None:
    (file,) = new_system("pump", tmp_path / "pump")
    assert main(["check", str(file)]) == 0
    before = file.read_bytes()
    assert main(["new", "system", "pump", "--into", str(file.parent)]) == 1
    assert file.read_bytes() == before


@pytest.mark.parametrize("name", ["", "1a", "a_b", "x" * 33, "../x"])
def test_a_system_has_a_plain_name(name: str, tmp_path: Path) -> None:
    assert main(["new", "system", name, "--into", str(tmp_path / "x")]) == 2
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0s"), (59.94, "59.9s"), (61, "1m 1s"), (3_700, "1h 1m"), (200_000, "2d 7h")],
)
def test_spans_are_told_in_two_units(seconds: float, text: str) -> None:
    assert span(seconds) == text


def test_a_plain_up_is_read_without_the_option_parser(tmp_path: Path) -> None:
    """Importing it takes as long as the rest of a start."""
    script = (
        "import sys\n"
        "from nexus.cli.command import main\n"
        f"code = main(['up', '-d', {str(tmp_path / 'none.toml')!r}])\n"
        "sys.exit(10 * code + ('typer' in sys.modules))\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 10 * EXIT_USAGE, ended.stderr
    assert "none.toml" in ended.stderr


def test_the_number_of_log_lines_is_n_and_the_system_is_named_in_full(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    called: list[tuple[str | None, int]] = []
    monkeypatch.setattr("nexus.cli.ask.asked", lambda name: name)
    monkeypatch.setattr(
        "nexus.cli.logs.logs", lambda system, wanted, *, last, **rest: called.append((system, last))
    )
    assert main(["logs", "-n", "2"]) == 0
    assert main(["logs", "--name", "pump", "--last", "3"]) == 0
    assert main(["logs", "-n", "pump"]) == EXIT_USAGE
    assert called == [(None, 2), ("pump", 3)]


def test_the_examples_of_prove_can_be_parsed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        _ = main(["prove", "--help"])
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    examples = [line.partition("#")[0].split()[2:] for line in lines if line[:12] == "nexus prove "]
    assert len(examples) >= 4
    for example in examples:
        _ = parse(example, {})


def test_what_a_plain_up_is_not_goes_to_the_option_parser(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["up", "-x", "system.toml"]) == EXIT_USAGE
    assert "see `nexus up --help`" in capsys.readouterr().err
