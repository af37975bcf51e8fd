"""What `nexus` was asked to do, and who does it."""

import argparse
import sys
from collections.abc import Sequence
from typing import Final, NoReturn

from nexus import __version__
from nexus.cli.check import add_check, check
from nexus.init.errors import SystemFileError

EXIT_USAGE: Final = 2

DESCRIPTION: Final = "Start, check and prove systems of Nexus services."
PROVE_HELP: Final = "climb the proof ladder on a ground (`nexus prove --help`)"


class UsageError(Exception):
    """The command line makes no sense; the text is one sentence."""


class _Parser(argparse.ArgumentParser):
    """Argparse, with one sentence on stderr instead of a page of usage."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see `{self.prog} --help`)")


def parser() -> argparse.ArgumentParser:
    """The command line of `nexus`. What follows `prove` is the proof runner's to read."""
    root = _Parser(prog="nexus", description=DESCRIPTION)
    _ = root.add_argument("--version", action="version", version=f"nexus {__version__}")
    commands = root.add_subparsers(
        dest="command", metavar="COMMAND", required=True, parser_class=_Parser
    )
    add_check(commands)
    _ = commands.add_parser("prove", help=PROVE_HELP, add_help=False)
    return root


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["prove"]:
        # Imported here: a system file is checked without loading any kernel.
        from nexus.proof.command import main as prove

        return prove(arguments[1:])
    try:
        return check(parser().parse_args(arguments))
    except (UsageError, SystemFileError) as error:
        print(f"nexus: {error}", file=sys.stderr)
        return EXIT_USAGE
