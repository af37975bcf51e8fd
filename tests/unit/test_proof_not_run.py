"""A machine that cannot be had is a run that was not made: a sentence, exit code 2, no verdict."""

import sys
from pathlib import Path
from typing import Final

import pytest

from nexus.proof import command, runner
from nexus.proof.runner import CHILD, HOST, NotRun, make_ready
from nexus.protocols.ladder import Ground

ROOT: Final = Path(__file__).resolve().parents[2]
HELP: Final = "there is no qemu-system-aarch64; try `apt-get install qemu-system-arm`"


def missing(text: str, code: int = 3) -> tuple[str, ...]:
    """A host's side that finds something missing."""
    program = f"import sys; sys.stderr.write('a warning\\n' + {text!r} + '\\n'); sys.exit({code})"
    return (sys.executable, "-c", program)


def test_the_command_that_would_help_is_told_and_nothing_is_green(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runner, "HOST", missing(HELP))
    runtime = tmp_path / "run"
    system = str(ROOT / "systems/minimal.toml")

    code = command.main(["--ground", "vm", "--system", system], {"NEXUS_RUNTIME_DIR": str(runtime)})

    told = capsys.readouterr()
    assert code == command.USAGE
    assert told.err == f"nexus prove: not run: {HELP}\n"
    assert told.out == ""
    assert not (runtime / "records").exists() or not list((runtime / "records").iterdir())


@pytest.mark.parametrize("scenario", ["ladder", "conformance"])
def test_a_comparison_with_a_machine_that_is_not_there_is_not_made(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    scenario: str,
) -> None:
    monkeypatch.setattr(runner, "HOST", missing(HELP))
    runtime = tmp_path / "run"
    asked = ["--compare", "sim,vm", "--scenario", scenario]

    code = command.main(asked, {"NEXUS_RUNTIME_DIR": str(runtime)})

    assert code == command.USAGE
    assert f"not run: {HELP}" in capsys.readouterr().err
    assert not list(runtime.glob("records/*"))


@pytest.mark.parametrize("code", [1, 2, 107])
def test_a_host_that_fails_in_its_own_way_is_a_bug_and_no_machine_that_is_missing(
    monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    monkeypatch.setattr(runner, "HOST", missing("NameError: name 'x' is not defined", code))

    with pytest.raises(RuntimeError, match=rf"(?s)ended with {code}: a warning.*NameError"):
        make_ready(Ground.VM)


def test_an_image_that_takes_too_long_is_told_with_the_command_that_waits_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runner, "HOST", (sys.executable, "-c", "import time; time.sleep(60)"))
    monkeypatch.setattr(runner, "READY_MAX", 0.1)

    with pytest.raises(NotRun, match="try `nexus vm build`"):
        make_ready(Ground.VM)


@pytest.mark.parametrize("ground", [Ground.SIM, Ground.LINUX])
def test_no_other_ground_needs_a_machine(monkeypatch: pytest.MonkeyPatch, ground: Ground) -> None:
    monkeypatch.setattr(runner, "HOST", ("/nonexistent",))

    make_ready(ground)


def test_a_boot_is_started_by_what_its_ground_is_made_of() -> None:
    assert CHILD[-1] == "nexus.proof.child"
    assert HOST[-1] == "nexus.vm.host"
