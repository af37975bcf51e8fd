"""What `nexus` was asked to do, and how it ends: an exit code, and one sentence if it failed."""

import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

from nexus.cli.defaults import WAIT_DEFAULT
from nexus.cli.errors import EXIT_FAILED, EXIT_OK, EXIT_USAGE, CommandFailed, UsageError
from nexus.cli.output import drop_answer, finish_answer

PROG: Final = "nexus"
TYPER_INTERRUPTED: Final = 130  # what typer makes of a KeyboardInterrupt
TRACEBACK_VARIABLE: Final = "NEXUS_TRACEBACK"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code: 0 done, 1 not done, 2 wrong usage or a wrong system file."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["prove"]:
        # What follows is the proof runner's to read, `--help` and wrong usage too.
        from nexus.proof.command import main as prove

        return prove(arguments[1:])
    from nexus.init.errors import SystemFileError

    _stand_in_for_closed()
    try:
        plain = _plain_up(arguments)
        code = _run(arguments) if plain is None else _up(plain)
        finish_answer()
    except (UsageError, SystemFileError) as error:
        return _end(str(error), EXIT_USAGE)
    except CommandFailed as error:
        return _end(str(error), EXIT_FAILED)
    except KeyboardInterrupt:
        return _end("interrupted", EXIT_FAILED)
    except BrokenPipeError:
        drop_answer()  # whoever read it has had enough
        return EXIT_FAILED
    except Exception as error:  # noqa: BLE001 (the outermost frame of the command)
        if os.environ.get(TRACEBACK_VARIABLE):
            traceback.print_exc()
        return _end(
            f"a fault of nexus itself, {type(error).__name__}: {error}; please report it with "
            f"`nexus bugreport`, and with what {TRACEBACK_VARIABLE}=1 prints",
            EXIT_FAILED,
        )
    return code


def _stand_in_for_closed() -> None:
    """Where a standard stream was closed by whoever started us, open one that refuses: otherwise
    the next file or connection would get its number. What is said on standard error is lost."""
    for number, flags in ((0, os.O_WRONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            _ = os.fstat(number)
        except OSError:
            taken = os.open(os.devnull, flags)
            assert taken == number, "the lowest free number is taken"
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w", encoding="utf-8")
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", encoding="utf-8")


class Plain(NamedTuple):
    """`up` with nothing but a file and the flags people use."""

    file: Path
    detach: bool
    as_json: bool


def _plain_up(words: Sequence[str]) -> Plain | None:
    """`up` in its plain form; None for typer to read, or to refuse. Importing typer takes as long
    as the rest of a start."""
    if words[:1] != ["up"]:
        return None
    flags = {word for word in words[1:] if word.startswith("-")}
    files = [word for word in words[1:] if not word.startswith("-")]
    if len(files) != 1 or not flags <= {"-d", "--detach", "--json"}:
        return None
    return Plain(Path(files[0]), bool(flags & {"-d", "--detach"}), "--json" in flags)


def _up(plain: Plain) -> int:
    """As the option parser calls it, with the defaults of the options that were not given."""
    from nexus.cli.up import up

    return up(
        plain.file,
        instance=None,
        detach=plain.detach,
        exec_=False,
        wait=WAIT_DEFAULT,
        as_json=plain.as_json,
    )


def _run(arguments: list[str]) -> int:
    """Hand the words to typer; what it finds wrong with them becomes a UsageError."""
    import typer
    from typer.exceptions import TyperException

    from nexus.cli.app import app

    command = typer.main.get_command(app)
    try:
        code = command.main(arguments, prog_name=PROG, standalone_mode=False)
    except typer.Exit as ended:
        return ended.exit_code
    except typer.Abort as error:
        raise KeyboardInterrupt from error
    except TyperException as error:
        context = getattr(error, "ctx", None)  # usage errors have one
        path = PROG if context is None else context.command_path
        text = error.format_message().rstrip(".").replace("\n", " ")
        raise UsageError(f"{text} (see `{path} --help`)") from error
    if code == TYPER_INTERRUPTED:
        raise KeyboardInterrupt
    return code if isinstance(code, int) else EXIT_OK


def _end(text: str, code: int) -> int:
    """One sentence on standard error."""
    try:
        print(f"{PROG}: {text}", file=sys.stderr)
    except BrokenPipeError:
        return code
    return code
