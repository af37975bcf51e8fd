"""Why keystored cannot do what it was asked for, on its way to being a status."""

from nexus.protocols.keystored import KeystoredStatus


class Unusable(Exception):
    """What keystored stands on fails it; `why` is for the log, and says nothing of a secret."""

    def __init__(self, status: KeystoredStatus, why: str) -> None:
        super().__init__(f"{status.name}: {why}")
        self.status = status
        self.why = why


def unavailable(why: str) -> Unusable:
    """It may be there later."""
    return Unusable(KeystoredStatus.UNAVAILABLE, why)


def corrupted(why: str) -> Unusable:
    """It is there and cannot be opened; no later attempt makes it better."""
    return Unusable(KeystoredStatus.CORRUPTED, why)
