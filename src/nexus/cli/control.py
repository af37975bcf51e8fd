"""Small acts on a running system: restart a service, leave safe mode, reload the policy."""

from pathlib import Path
from typing import Final

from nexus.abi import INIT_NAME
from nexus.cli.ask import Asked
from nexus.cli.client import ServiceRefused, Unanswered
from nexus.cli.errors import CommandFailed
from nexus.cli.output import progress, say, say_json
from nexus.cli.trial import tried_plan
from nexus.protocols.init import PROTOCOL as INIT
from nexus.protocols.init import InitStatus, LeaveSafeMode, Restart
from nexus.protocols.operator import (
    PART_SIZE_MAX,
    OperatorStatus,
    PutPolicyPart,
    ReloadPolicy,
)
from nexus.wire import ReplyStatus

ASK_TIME: Final = 5.0  # seconds

RELOAD_WHY: Final = {
    ReplyStatus.DENIED: "operator has no right policy.reload: give it in the system file",
    OperatorStatus.BAD_POLICY: "policyd cannot read it, or it names a service the system has not",
    OperatorStatus.POLICY_NOT_TAKEN: "init did not take it; the old one is still in force",
    OperatorStatus.NO_SERVICE: "operator does not use policyd: add it to its uses",
}


def restart(asked: Asked, service: str, *, as_json: bool) -> None:
    """Kill the instance that runs; init starts the next one. Raises CommandFailed."""
    with asked.client() as client:
        try:
            ended = client.relay(INIT_NAME, INIT, Restart(service), ASK_TIME)
        except ServiceRefused as error:
            if error.status is InitStatus.ROUTE_DOWN:
                raise CommandFailed(f"{service} does not run now: see `nexus status`") from error
            if error.status is InitStatus.ROUTE_NOT_FOUND:
                raise CommandFailed(
                    f"there is no service {service} in {asked.running.title}: see `nexus status`"
                ) from error
            raise
    if as_json:
        say_json({"service": service, "pid": ended.pid, "generation": ended.generation})
    else:
        say(f"{service}: generation {ended.generation} (process {ended.pid}) was killed")


def leave_safe_mode(asked: Asked, *, as_json: bool) -> None:
    """Start what safe mode left out. Raises CommandFailed."""
    with asked.client() as client:
        try:
            left = client.relay(INIT_NAME, INIT, LeaveSafeMode(), ASK_TIME)
        except ServiceRefused as error:
            if error.status is InitStatus.NOT_IN_SAFE_MODE:
                raise CommandFailed(f"{asked.running.title} is not in safe mode") from error
            raise
    if as_json:
        say_json({"system": asked.running.title, "services": left.services})
    else:
        say(f"{asked.running.title} leaves safe mode: {left.services} services are being started")


def reload_policy(asked: Asked, file: Path | None, *, as_json: bool) -> None:
    """Put in force the policy of a system file, by default the running system's own.

    Raises CommandFailed, and SystemFileError when the file is wrong: nothing was sent then.
    """
    source = Path(asked.running.file) if file is None else file
    policy = tried_plan(source).policy.encoded()
    with asked.client() as client, progress("reloading the policy"):
        for offset in range(0, len(policy), PART_SIZE_MAX):
            part = policy[offset : offset + PART_SIZE_MAX]
            _ = client.ask(PutPolicyPart(offset, part), ASK_TIME)
        try:
            done = client.ask(ReloadPolicy(len(policy)), ASK_TIME)
        except Unanswered as error:
            why = RELOAD_WHY.get(error.status)
            if why is None:
                raise
            raise CommandFailed(
                f"the policy of {source} is not in force: {error.status.name}, {why}"
            ) from error
    if as_json:
        say_json({"file": str(source), "generation": done.generation, "digest": done.digest})
    else:
        say(
            f"the policy of {source} is in force, generation {done.generation}, "
            f"digest {done.digest[:12]}"
        )
