"""`nexus explain A B [OP]`: may A reach B, and why, with file and line."""

from pathlib import Path

from nexus.cli.errors import EXIT_FAILED, EXIT_OK, UsageError
from nexus.cli.output import say, say_json
from nexus.cli.trial import tried
from nexus.init.explain import UnknownName
from nexus.init.explain import explain as explained
from nexus.init.system import load


def explain(file: Path, a: str, b: str, right: str | None, *, as_json: bool) -> int:
    """Print the answer; 0 if it is yes, 1 if it is no. Raises UsageError and SystemFileError."""
    system = load(file)
    plan = tried(system)
    try:
        found = explained(plan, system, a, b, right)
    except UnknownName as error:
        raise UsageError(str(error)) from error
    if as_json:
        say_json(
            {
                "client": found.client,
                "server": found.server,
                "right": found.right,
                "request": found.request,
                "allowed": found.allowed,
                "answers": [
                    {
                        "layer": answer.label,
                        "allowed": answer.allowed,
                        "reason": answer.reason,
                        "where": answer.where or None,
                    }
                    for answer in found.answers
                ],
                "holders": dict(found.holders),
                "remedies": list(found.remedies),
            }
        )
    else:
        for line in found.lines:
            say(line)
    return EXIT_OK if found.allowed else EXIT_FAILED
