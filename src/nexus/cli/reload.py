"""`nexus reload`: a running system reads its file again, and services take their new settings."""

from typing import Final

from nexus.abi import INIT_NAME
from nexus.cli.ask import Asked
from nexus.cli.client import ServiceRefused
from nexus.cli.errors import CommandFailed
from nexus.cli.output import progress, say, say_json, tell
from nexus.protocols.init import PROTOCOL as INIT
from nexus.protocols.init import InitStatus, ReloadOutcome, ReloadSettings

ASK_TIME: Final = 10.0  # seconds; init gives a service two to take its settings
SENTENCES: Final = {
    ReloadOutcome.IN_FORCE: "the new settings are in force",
    ReloadOutcome.NEEDS_RESTART: "cannot change them while it runs: `nexus restart {name}`",
    ReloadOutcome.REFUSED: "does not take them; the old ones are in force: `nexus logs -s {name}`",
    ReloadOutcome.NO_ANSWER: "did not answer; it has them when it starts again",
    ReloadOutcome.AT_START: "does not run; it has them when it starts",
}


def reload(asked: Asked, *, as_json: bool) -> int:
    """Say per service what happened; 1 if one refused its new settings. Raises CommandFailed, and
    SystemFileError when the file is wrong: nothing was asked then."""
    _ = asked.plan  # whoever has just edited the file hears here what is wrong with it
    with asked.client() as client, progress("reading the system file again"):
        try:
            done = client.relay(INIT_NAME, INIT, ReloadSettings(), ASK_TIME)
        except ServiceRefused as error:
            if error.status is InitStatus.BAD_SYSTEM_FILE:
                raise CommandFailed(
                    f"{asked.running.file} is not the file of {asked.running.title} any more: "
                    f"nothing was changed"
                ) from error
            raise
    if as_json:
        say_json(
            {
                "system": asked.running.title,
                "told": done.told,
                "ignored": done.ignored,
                "services": {row.name: row.outcome.name.lower() for row in done.services},
            }
        )
    else:
        for row in done.services:
            say(f"{row.name}: {SENTENCES[row.outcome].format(name=row.name)}")
        if not done.services:
            say("no settings have changed")
    if done.ignored:
        tell(
            f"nexus: {done.ignored} other changes in the file take a restart of the system: "
            f"`nexus down`, `nexus up`"
        )
    return int(any(row.outcome is ReloadOutcome.REFUSED for row in done.services))
