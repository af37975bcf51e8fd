"""The one error of a wrong system file."""

from pathlib import Path


class SystemFileError(Exception):
    """A system file says something it may not: where, what was expected, what was found.

    The text is one sentence that begins with file and line.
    """

    def __init__(self, path: Path, line: int, expected: str, found: str) -> None:
        super().__init__(f"{path}:{line}: expected {expected}, found {found}")
        self.path = path
        self.line = line
        self.expected = expected
        self.found = found
