"""Why a set is refused."""

from enum import IntEnum


class SetStatus(IntEnum):
    """What is wrong with a set, one number for each rule. Numbers are never reused."""

    NOT_A_SET = 1  # it does not begin as one
    VERSION = 2  # a format this reader does not know
    TRUNCATED = 3  # it ends before it should
    TRAILING = 4  # it goes on behind its end
    OVERSIZED = 5  # a limit of this reader
    MANIFEST = 6  # the manifest is not one the encoder produces
    PATH = 7  # a path that leads elsewhere, or that no file may have
    DUPLICATE = 8  # two files at one path, one digest twice in the table
    CLASH = 9  # a file where another needs a folder
    LAYOUT = 10  # the tables do not fit each other
    MISSING = 11  # a file that the manifest names is not in the set
    COMPRESSION = 12  # a chunk is not the frame it should be, or unpacks to another size
    CHECKSUM = 13  # bytes that are not those they were


class SetRefused(Exception):
    """A set cannot be used: the rule, and a sentence for people, which is never parsed."""

    def __init__(self, status: SetStatus, detail: str) -> None:
        super().__init__(f"{status.name.lower().replace('_', ' ')}: {detail}")
        self.status = status
        self.detail = detail
