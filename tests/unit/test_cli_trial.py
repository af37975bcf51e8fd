"""Importing a system's own modules changes no verdict and ends no command."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from nexus.cli import main, trial
from nexus.cli.trial import tried, tried_plan
from nexus.init.errors import SystemFileError
from nexus.init.plan import load_plan
from nexus.init.system import load
from tests.unit.test_init_programs import SERVICE, plant

ROOT = Path(__file__).parents[2]
MODULE_LINE = 6  # of the planted system file


def planted(folder: Path, before: str) -> Path:
    """A system whose module does `before` first, and is right otherwise."""
    file = plant(folder)
    _ = (folder / "code" / "probe_plant" / "valve.py").write_text(before + SERVICE)
    return file


def test_a_plan_made_apart_is_the_plan_and_nothing_was_imported_here(tmp_path: Path) -> None:
    file = plant(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "probe_plant"]:
        del sys.modules[name]

    plan = tried_plan(file)

    assert "probe_plant" not in sys.modules
    assert plan == load_plan(file)
    assert plan.digest == load_plan(file).digest


@pytest.mark.parametrize("name", ["minimal", "selftest"])
def test_a_system_without_modules_costs_no_process(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "fork")
    file = ROOT / "systems" / f"{name}.toml"

    assert tried_plan(file) == load_plan(file)


@pytest.mark.parametrize(
    ("does", "found"),
    [
        ("import os; os._exit(0)", "which ends the interpreter (exit code 0)"),
        ("import os; os._exit(7)", "which ends the interpreter (exit code 7)"),
        ("import os; os.kill(os.getpid(), 9)", "which ends the interpreter (signal 9)"),
        ("import os; os.closerange(3, 100); os._exit(0)", "which ends the interpreter"),
        ("raise KeyboardInterrupt", "which ends the interpreter (exit code 1)"),
        ("import sys; sys.exit(0)", "raised SystemExit at valve.py:1: 0"),
        ("import os; os.fork()", None),
        ("print('{}'); import os; os.write(1, b'x' * 9)", None),
    ],
)
def test_what_a_module_does_is_a_verdict_and_not_the_end(
    tmp_path: Path, does: str, found: str | None, capfd: pytest.CaptureFixture[str]
) -> None:
    file = planted(tmp_path, does)

    code = main(["check", str(file), "--digest"])

    out, err = capfd.readouterr()
    if found is None:
        assert (code, out, err) == (0, f"{tried_plan(file).digest}\n", "")
    else:
        assert (code, out) == (2, "")
        assert err.startswith(f"nexus: {file}:{MODULE_LINE}: expected a module that can be ")
        assert found in err
        assert err.count("\n") == 1


def test_the_command_itself_is_not_ended_by_a_module(tmp_path: Path) -> None:
    file = planted(tmp_path, "import os; os._exit(0)")

    ended = subprocess.run(
        [sys.executable, "-P", "-m", "nexus.cli", "check", str(file)],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )

    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith(f"nexus: {file}:{MODULE_LINE}: expected a module that can be")


@pytest.mark.parametrize(
    "does",
    [
        "import time; time.sleep(1000)",
        "import signal; signal.pthread_sigmask(0, signal.valid_signals()); signal.pause()",
        "while True: pass",
        "import os; os.fork() or os.setsid(); import time; time.sleep(3)",
    ],
)
def test_a_module_that_hangs_is_late(tmp_path: Path, does: str) -> None:
    system = load(planted(tmp_path, does))
    start = time.monotonic_ns()

    with pytest.raises(SystemFileError, match=r"within 0\.3 s, found .* still being") as caught:
        _ = tried(system, limit=300_000_000)

    assert caught.value.line == MODULE_LINE
    assert time.monotonic_ns() - start < 5 * 10**9


def test_what_an_import_started_is_ended_with_it(tmp_path: Path) -> None:
    noted = tmp_path / "pid"
    file = planted(
        tmp_path,
        "import os, time\n"
        "if os.fork() == 0:\n"
        f"    open({str(noted)!r} + '.new', 'w').write(str(os.getpid()))\n"
        f"    os.rename({str(noted)!r} + '.new', {str(noted)!r})\n"
        "    time.sleep(1000)\n"
        f"while not os.path.exists({str(noted)!r}): time.sleep(0.01)\n",
    )

    assert tried_plan(file).services

    pid = int(noted.read_text())
    until = time.monotonic_ns() + 5 * 10**9
    while _runs(pid) and time.monotonic_ns() < until:
        _ = threading.Event().wait(0.01)
    assert not _runs(pid)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
    except OSError:
        return False


@pytest.mark.parametrize(
    "does",
    [
        (
            "import threading, time\n"
            "threading.Thread(target=time.sleep, args=(2,), daemon=True, name='t').start()"
        ),
        "import threading; t = threading.Timer(2, int); t.name = 't'; t.daemon = True; t.start()",
    ],
)
def test_a_module_that_starts_a_thread_is_refused_apart_and_in_init(
    tmp_path: Path, does: str
) -> None:
    file = planted(tmp_path, does)

    for read in (tried_plan, load_plan):
        with pytest.raises(SystemFileError, match="starts no thread or timer") as caught:
            _ = read(file)
        assert caught.value.line == MODULE_LINE
        assert caught.value.found == '"probe_plant.valve", which started t'


def test_a_wrong_file_is_told_as_without_a_child(tmp_path: Path) -> None:
    file = plant(tmp_path)
    _ = (tmp_path / "code" / "probe_plant" / "valve.py").write_text("1 / 0\n")
    texts = []
    for read in (tried_plan, load_plan):
        with pytest.raises(SystemFileError) as caught:
            _ = read(file)
        texts.append((str(caught.value), caught.value.path, caught.value.line))
    assert texts[0] == texts[1]


def test_what_a_module_writes_into_the_pipe_is_no_plan(tmp_path: Path) -> None:
    file = planted(
        tmp_path,
        "import os\nfor fd in range(3, 64):\n"
        "    try: os.write(fd, b'{}\\n')\n    except OSError: pass\n",
    )

    with pytest.raises(SystemFileError, match="a module that can be imported"):
        _ = tried_plan(file)


def test_no_descriptor_and_no_child_is_left(tmp_path: Path) -> None:
    children = Path(f"/proc/self/task/{os.getpid()}/children")  # zombies among them
    before = len(list(Path("/proc/self/fd").iterdir())), children.read_text()
    _ = tried_plan(plant(tmp_path))
    assert (len(list(Path("/proc/self/fd").iterdir())), children.read_text()) == before
    assert trial.IMPORT_TIME == 20 * 10**9
