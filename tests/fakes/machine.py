"""The `nexus` command as a person runs it: own directories, as root or as an ordinary user."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
NOBODY = 65534
COMMAND_TIME = 90.0  # seconds; a machine with two busy cores


@dataclass(frozen=True)
class Answer:
    """What a command said, and how it ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The answer of `--json`."""
        return json.loads(self.out)


@dataclass(frozen=True)
class Machine:
    """Directories and a user. `home` is short: sockets have short names."""

    home: Path
    uid: int
    python: tuple[str, str]  # the interpreter, and its import path

    @property
    def environment(self) -> dict[str, str]:
        """Nothing of the tester's own but PATH."""
        return {
            "PATH": os.environ["PATH"],
            "HOME": str(self.home),
            "PYTHONPATH": self.python[1],
            "NEXUS_STATE_DIR": str(self.home / "s"),
            "NEXUS_RUNTIME_DIR": str(self.home / "r"),
            "NEXUS_LOG_DIR": str(self.home / "l"),
        }

    def command(self, *words: str) -> list[str]:
        """The words of a process that is the command."""
        return [self.python[0], "-P", "-m", "nexus.cli", *words]

    def start(self, *words: str, **options: Any) -> "subprocess.Popen[str]":
        """The command, running."""
        ids: dict[str, Any] = {}
        if self.uid != os.getuid():
            ids = {"user": self.uid, "group": self.uid, "extra_groups": []}
        return subprocess.Popen(
            self.command(*words),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=self.environment,
            cwd=self.home,
            **ids,
            **options,
        )

    def run(self, *words: str) -> Answer:
        """The command, to its end."""
        with self.start(*words) as process:
            out, err = process.communicate(timeout=COMMAND_TIME)
        return Answer(process.returncode, out, err)

    def ok(self, *words: str) -> Answer:
        """The command, which has to do what it was asked."""
        answer = self.run(*words)
        assert answer.code == 0, (words, answer)
        return answer

    def write(self, name: str, text: str) -> str:
        """A file of the user's."""
        path = self.home / name
        _ = path.write_text(text)
        os.chown(path, self.uid, self.uid)
        return str(path)


@cache
def python_of(uid: int) -> tuple[str, str] | None:
    """An interpreter that this user may run with our packages, and its path; None if there is none.

    A home directory of root's may hide the one that runs the tests.
    """
    import msgspec
    import typer

    packages = {str(Path(str(module.__file__)).parents[1]) for module in (msgspec, typer)}
    path = os.pathsep.join([str(ROOT / "src"), *sorted(packages)])
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    for python in (sys.executable, f"/usr/bin/{version}", f"/usr/local/bin/{version}"):
        ids = {"user": uid, "group": uid, "extra_groups": []} if uid != os.getuid() else {}
        try:
            tried = subprocess.run(
                [python, "-P", "-c", "import msgspec, typer, rich, nexus.cli.boot"],
                env={"PYTHONPATH": path},
                capture_output=True,
                timeout=COMMAND_TIME,
                check=False,
                cwd="/",
                **ids,  # type: ignore[call-overload]
            )
        except OSError:
            continue
        if tried.returncode == 0:
            return python, path
    return None


@contextmanager
def machine(uid: int, python: tuple[str, str]) -> Iterator[Machine]:
    """A machine for one test; what still runs at its end is killed."""
    home = Path(tempfile.mkdtemp(prefix="nx", dir="/tmp"))
    os.chown(home, uid, uid)
    made = Machine(home, uid, python)
    try:
        yield made
    finally:
        answer = made.run("status", "--all", "--json")
        running = answer.json if answer.code == 0 else []
        for each in running:
            subprocess.run(["kill", "-9", str(each["pid"])], check=False)
        shutil.rmtree(home)
    assert running == [], "a test leaves no system behind"
