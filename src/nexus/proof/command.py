"""`nexus prove` and `nexus campaign`: what a person or a script starts.

Exit codes: 0 green, 1 red, 2 usage.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from nexus.proof import compare, report, sweep, worlds
from nexus.proof.lock import LockRefused, run_lock, runtime_dir
from nexus.proof.page import as_page
from nexus.proof.prove import Outcome, prove
from nexus.proof.record import MalformedEvent, RecordLost
from nexus.proof.request import Comparison, Request, Sweep, UsageError, parse
from nexus.proof.runner import NotRun
from nexus.proof.saboteurs import sample

GREEN, RED, USAGE = 0, 1, 2
COMPLAINT_MAX: Final = 1_000  # characters; what a person typed is quoted, however long it was


def main(argv: Sequence[str], environ: Mapping[str, str] | None = None) -> int:
    """Run `nexus prove` with these arguments."""
    environ = os.environ if environ is None else environ
    try:
        asked = parse(argv, environ)
        directory = runtime_dir(environ)
        with run_lock(directory):
            text, exit_code = _run(asked, directory)
    except (UsageError, LockRefused) as error:
        complain(f"nexus prove: {error}")
        return USAGE
    except RecordLost as error:
        complain(f"nexus prove: {error}; a run without its record is no evidence")
        return RED
    except NotRun as error:
        complain(f"nexus prove: not run: {error}")
        return USAGE
    except MalformedEvent as error:
        complain(f"nexus prove: what was booted says what is no evidence: {error}")
        return RED
    except KeyboardInterrupt:
        complain("nexus prove: interrupted; the boot was ended, nothing was decided")
        return RED
    say(text)  # only now: until the lock is given back the run may turn out not to count
    return exit_code


def _run(asked: Request | Sweep | Comparison, directory: Path) -> tuple[str, int]:
    """Do what was asked; what to print, and the exit code."""
    match asked:
        case Request():
            outcome = prove(asked, directory)
            if asked.report is not None:
                _write_page(asked.report, outcome)
            text = report.as_json(outcome) if asked.json else report.as_text(outcome)
            return text, outcome.verdict.exit_code
        case Sweep():
            numbers = sample(asked.base.ground) if asked.sample else None
            swept = sweep.sweep(asked.base, directory, tell=complain, numbers=numbers)
            text = sweep.as_json(swept) if asked.base.json else sweep.as_text(swept)
            return text, swept.exit_code
        case Comparison(scenario=worlds.SCENARIO):
            pairs = worlds.compare(asked, directory)
            text = worlds.as_json(pairs) if asked.json else worlds.as_text(pairs)
            return text, worlds.exit_code(pairs)
        case Comparison():
            found = compare.compare(asked)
            text = compare.as_json(found) if asked.json else compare.as_text(found)
            return text, compare.exit_code(found)


def _write_page(file: Path, outcome: Outcome) -> None:
    """Raises RecordLost: who asked for a page has no evidence without it."""
    try:
        _ = file.write_text(as_page(outcome), "utf-8")
    except OSError as error:
        raise RecordLost(f"the page {file} cannot be written: {error.strerror}") from error


def say(text: str) -> None:
    """Write to standard output what the caller asked for."""
    _ = sys.stdout.write(text)
    _ = sys.stdout.flush()


def complain(text: str) -> None:
    """Write a line for a person to standard error."""
    _ = sys.stderr.write(
        f"{text if len(text) <= COMPLAINT_MAX else text[:COMPLAINT_MAX] + '...'}\n"
    )
    _ = sys.stderr.flush()
