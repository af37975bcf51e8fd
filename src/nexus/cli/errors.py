"""How a command ends when it does not end well: one sentence, and the exit code."""

from typing import Final

EXIT_OK: Final = 0
EXIT_FAILED: Final = 1
EXIT_USAGE: Final = 2


class CommandFailed(Exception):
    """What was asked for was not done; the text is one sentence that says what to do."""


class UsageError(Exception):
    """The command line makes no sense; the text is one sentence."""
