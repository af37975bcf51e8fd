"""`nexus run PROGRAM [ARGUMENTS]`: have execd start a program as operator, and wait for its end."""

from collections.abc import Sequence
from typing import Final

from nexus.cli.ask import Asked
from nexus.cli.client import OperatorClient, ServiceRefused, Unanswered
from nexus.cli.errors import EXIT_FAILED, CommandFailed, UsageError
from nexus.cli.output import say, say_json, tell
from nexus.cli.why import signal_name
from nexus.protocols.execd import (
    ARGUMENT_SIZE_MAX,
    ARGUMENTS_MAX,
    ENVIRONMENT_MAX,
    PROC_SPAWN,
    PROTOCOL,
    Ended,
    Exec,
    ExecdStatus,
    Kill,
    Restart,
    Started,
    Variable,
    Wait,
)
from nexus.protocols.operator import OperatorStatus
from nexus.wire import ReplyStatus

EXECD: Final = "execd"
OPERATOR: Final = "operator"
ASK_TIME: Final = 5.0  # seconds
WAIT_TIME: Final = 20.0  # seconds of one look at the end; operator passes on no longer ones
KEY: Final = "an environment variable is KEY=VALUE, the key in capitals, digits and _"
EXIT_CODES: Final = 256

EXPLAIN: Final = f"nexus explain operator execd {PROC_SPAWN}"

REFUSED: Final = {
    ReplyStatus.DENIED: f"operator may not start it: see `{EXPLAIN}`",
    ExecdStatus.NO_PROGRAM: 'no service with start = "demand" and by = "execd" has this name',
    ExecdStatus.RUNNING: "it runs already",
    ExecdStatus.BAD_DIGEST: "its files were changed since the system was started",
    ExecdStatus.FAILED: "init could not start it: see `nexus why`",
    ExecdStatus.OVER_LIMIT: "too many programs run, or its arguments are too long",
}


def run(
    asked: Asked,
    program: str,
    arguments: Sequence[str],
    variables: Sequence[str],
    *,
    restart: bool,
    detach: bool,
    as_json: bool,
) -> int:
    """Start it; unless detached wait, and the exit code is the program's. Raises CommandFailed."""
    request = _request(program, arguments, variables, restart=restart)
    with asked.client() as client:
        try:
            child = client.relay(EXECD, PROTOCOL, request, ASK_TIME)
        except ServiceRefused as error:
            why = REFUSED.get(error.status, "execd refused")
            raise CommandFailed(f"{program}: {why}") from error
        if detach:
            _say_started(program, child, as_json=as_json)
            return 0
        ended = _waited(client, program, child)
    if as_json:
        say_json(
            {"program": program, "pid": ended.pid, "generation": ended.generation}
            | {"code": ended.code, "signal": ended.signal, "report": ended.report or None}
        )
    elif ended.signal:
        tell(f"{program}: ended by {signal_name(ended.signal)}; `nexus why {program}` tells more")
    elif ended.code:
        tell(f"{program}: ended with {ended.code}; `nexus why {program}` tells more")
    if ended.signal:
        return EXIT_FAILED
    return ended.code % EXIT_CODES


def _request(
    program: str, arguments: Sequence[str], variables: Sequence[str], *, restart: bool
) -> Exec:
    """Raises UsageError for what execd does not take."""
    if len(arguments) > ARGUMENTS_MAX or len(variables) > ENVIRONMENT_MAX:
        raise UsageError(
            f"at most {ARGUMENTS_MAX} arguments and {ENVIRONMENT_MAX} variables, "
            f"each of {ARGUMENT_SIZE_MAX} characters"
        )
    environment = []
    for each in variables:
        key, equals, value = each.partition("=")
        if not equals or not key.isascii() or not key.replace("_", "A").isalnum():
            raise UsageError(KEY)
        environment.append(Variable(key, value))
    policy = Restart.ON_CRASH if restart else Restart.NEVER
    return Exec(program, OPERATOR, list(arguments), environment, policy)


def _say_started(program: str, child: Started, *, as_json: bool) -> None:
    if as_json:
        say_json({"program": program, "pid": child.pid, "generation": child.generation})
    else:
        say(f"{program}: process {child.pid}, generation {child.generation}")


def _waited(client: OperatorClient, program: str, child: Started) -> Ended:
    """How it ended. Ctrl-C ends the program, and is waited for as any end."""
    while True:
        try:
            return client.relay(EXECD, PROTOCOL, Wait(child.pid), WAIT_TIME)
        except Unanswered as error:
            if error.status is not OperatorStatus.TIMED_OUT:
                raise CommandFailed(
                    f"{program}: execd cannot be asked for its end now: see `nexus why {program}`"
                ) from error
        except KeyboardInterrupt:
            _ = client.relay(EXECD, PROTOCOL, Kill(child.pid), ASK_TIME)
