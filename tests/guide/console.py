"""Runs the `console` blocks of a page and compares what is shown with what comes.

A block is commands after `$ `, continued after `> `, each followed by its output. `...` in a line
is any text, `...` alone any lines, and `^C` sends SIGINT when all lines before it have come. The
info string may say `exit=N`, the exit code of the block's last command; otherwise all are 0.
"""

import os
import re
import select
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

FENCE: Final = re.compile(r"^```(\w*)\s*(.*)$")
EXIT: Final = re.compile(r"exit=(\d+)")
COMMAND_TIME: Final = 40.0  # seconds
INTERRUPT: Final = "^C"
ANY: Final = "..."


class WrongPage(AssertionError):
    """The page shows something else than what happens."""


@dataclass
class Step:
    """One command and the output that is shown for it."""

    line: int
    command: str
    shown: list[str] = field(default_factory=list)
    code: int = 0


def steps_of(text: str) -> list[Step]:
    """Every command of every console block, in order."""
    steps: list[Step] = []
    block: list[Step] | None = None
    fenced = False
    code = 0
    for number, line in enumerate(text.splitlines(), 1):
        fence = FENCE.match(line)
        if fence is not None and not fenced:
            fenced = True
            wanted = EXIT.search(fence[2])
            block = [] if fence[1] == "console" else None
            code = int(wanted[1]) if wanted is not None else 0
        elif line == "```":
            fenced = False
            if block:
                block[-1].code = code
                steps += block
            block = None
        elif block is not None:
            _read(block, number, line)
    return steps


def _read(block: list[Step], number: int, line: str) -> None:
    if line.startswith("$ "):
        block.append(Step(number, line[2:]))
    elif not block:
        raise WrongPage(f"line {number}: output before the first command")
    elif line == ">" or line.startswith("> "):
        block[-1].command += "\n" + line[2:]
    else:
        block[-1].shown.append(line)


def matches(shown: Sequence[str], came: Sequence[str]) -> bool:
    """Whether these lines are what the page shows."""
    if not shown:
        return not came
    if shown[0] == ANY:
        return any(matches(shown[1:], came[index:]) for index in range(len(came) + 1))
    return bool(came) and _line_matches(shown[0], came[0]) and matches(shown[1:], came[1:])


def _line_matches(shown: str, came: str) -> bool:
    """As text; how many spaces stand between columns does not matter."""
    parts = [re.escape(part) for part in " ".join(shown.split()).split(ANY)]
    return re.fullmatch(".*".join(parts), " ".join(came.split())) is not None


def run_page(page: Path, cwd: Path, environ: Mapping[str, str]) -> Iterator[Step]:
    """Run a page's commands in one directory; each step as it has passed. Raises WrongPage."""
    for step in steps_of(page.read_text("utf-8")):
        came, code = _run(step, cwd, environ)
        shown = [line for line in step.shown if line != INTERRUPT]
        if not matches(shown, came) or (INTERRUPT not in step.shown and code != step.code):
            raise WrongPage(
                f"{page}:{step.line}: $ {step.command}\nshown, exit {step.code}:\n"
                + "\n".join(step.shown)
                + f"\ncame, exit {code}:\n"
                + "\n".join(came)
            )
        yield step


def _run(step: Step, cwd: Path, environ: Mapping[str, str]) -> tuple[list[str], int]:
    with subprocess.Popen(
        ["sh", "-c", f"exec 2>&1\n{step.command}"],
        cwd=cwd,
        env=dict(environ),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        try:
            if INTERRUPT not in step.shown:
                out, _ = process.communicate(timeout=COMMAND_TIME)
                return out.splitlines(), process.returncode
            came = _until_shown(step, process.stdout.fileno())
            os.killpg(process.pid, signal.SIGINT)
            _ = process.wait(timeout=COMMAND_TIME)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        return came, process.returncode


def _until_shown(step: Step, output: int) -> list[str]:
    """The lines of a command that goes on, until those before ^C have come."""
    wanted = step.shown[: step.shown.index(INTERRUPT)]
    came = b""
    until = time.monotonic_ns() + int(COMMAND_TIME * 1e9)
    while not matches(wanted, came.decode().splitlines()) and time.monotonic_ns() < until:
        if select.select([output], [], [], 1.0)[0]:
            part = os.read(output, 4096)
            came += part
            if not part:
                break
    return came.decode().splitlines()
