"""`nexus prove` and `nexus campaign`: what a person or a script starts.

Exit codes: 0 green, 1 red, 2 usage.
"""

import os
import sys
from collections.abc import Mapping, Sequence

from nexus.proof import compare, report, sweep
from nexus.proof.lock import LockRefused, run_lock, runtime_dir
from nexus.proof.prove import prove
from nexus.proof.request import Comparison, Request, Sweep, UsageError, parse

GREEN, RED, USAGE = 0, 1, 2


def main(argv: Sequence[str], environ: Mapping[str, str] | None = None) -> int:
    """Run `nexus prove` with these arguments."""
    environ = os.environ if environ is None else environ
    try:
        asked = parse(argv, environ)
        directory = runtime_dir(environ)
        with run_lock(directory):
            match asked:
                case Request():
                    outcome = prove(asked, directory)
                    say(report.as_json(outcome) if asked.json else report.as_text(outcome))
                    return outcome.verdict.exit_code
                case Sweep():
                    swept = sweep.sweep(asked.base, directory, tell=complain)
                    say(sweep.as_json(swept) if asked.base.json else sweep.as_text(swept))
                    return swept.exit_code
                case Comparison():
                    found = compare.compare(asked)
                    say(compare.as_json(found) if asked.json else compare.as_text(found))
                    return found.exit_code
    except (UsageError, LockRefused) as error:
        complain(f"nexus prove: {error}")
        return USAGE


def say(text: str) -> None:
    """Write to standard output what the caller asked for."""
    _ = sys.stdout.write(text)
    _ = sys.stdout.flush()


def complain(text: str) -> None:
    """Write a line for a person to standard error."""
    _ = sys.stderr.write(f"{text}\n")
    _ = sys.stderr.flush()
