"""Why an update is not trusted: a closed list, one status for each kind of attack."""

from enum import IntEnum


class TrustStatus(IntEnum):
    """Why metadata is refused. The numbers stand in histories and are never reused."""

    MALFORMED = 1  # not what the format says
    TRUNCATED = 2  # it ends too early
    TOO_LARGE = 3  # more bytes than a file of its kind may have
    TOO_MANY = 4  # more files, keys, signatures, roots or sets than may be
    DUPLICATE = 5  # the same name, key or signature twice
    WRONG_KEY = 6  # signed by no key of the role
    BAD_SIGNATURE = 7  # signed in the name of the role's keys, and none of it verifies
    THRESHOLD = 8  # signed by too few of the role's keys
    MIXED = 9  # each file is signed, and they are not of one release
    REPLAYED = 10  # a whole older release again
    ROLLED_BACK = 11  # newer on the outside, older inside than what was seen
    EXPIRED = 12  # it ended before a moment that somebody has signed since
    BELOW_FLOOR = 13  # the set's version is below the lowest that this device may run
    DEVELOPMENT_KEY = 14  # keys for development, on a device that is none
    NO_SET = 15  # the metadata names no set
    DEVICE = 16  # what the device keeps itself, anchor or state, is not whole


class Untrusted(Exception):
    """This metadata is refused; `detail` is one sentence for people and holds no bytes of keys."""

    def __init__(self, status: TrustStatus, detail: str) -> None:
        super().__init__(f"{status.name.replace('_', ' ').lower()}: {detail}")
        self.status = status
        self.detail = detail
