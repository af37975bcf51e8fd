"""init's own words for why an instance ended or was not started: GetService and lines say them."""

from enum import StrEnum, unique
from typing import Final

from nexus.protocols.init import REASON_SIZE_MAX


@unique
class Reason(StrEnum):
    """At most REASON_SIZE_MAX characters each."""

    EXIT = "exit"  # by itself
    ASKED = "asked"  # Restart
    NO_ECHO = "no echo"  # its control link did not answer inside the readiness deadline
    NOT_READY = "not ready"  # two readiness deadlines passed, or a later probe was refused
    HANG = "hang"  # probes unanswered
    LATE = "late"  # too many requests expired in its queue between two probes
    CONTROL = "control link closed"
    ANSWERS = "answers link closed"
    STOP = "stop deadline"
    SIGNAL = "second signal"
    GROUP = "group"  # another one of its group ended
    SAFE = "safe mode"
    POLICY = "policy"  # policyd, to take a policy it did not take by itself
    DENIED = "denied"  # a grant of the plan is not allowed by the policy
    REVOKED = "grant revoked"  # a new policy takes away a right that a grant of it needs
    UNDECIDED = "undecided"  # policyd did not say whether its grants are allowed
    DEVICE = "device"  # one of its devices is not there, or not what the bus map says
    SPAWN = "spawn refused"
    ENDED = "ended"  # EndTask
    MEMORY = "memory limit"  # the kernel killed it for taking more than it may


UNCOUNTED: Final = frozenset({Reason.ASKED, Reason.POLICY, Reason.REVOKED})
"""Ends that say nothing against the service: no back-off grows, no restart is counted."""

assert all(len(reason) <= REASON_SIZE_MAX for reason in Reason)
