"""policyd protocol: may this subject do that? Deny by default.

A decision is an answer, not a refusal of the request: DENY comes as `Decision`, so that a caller
can tell "denied" from "could not be asked". A right that is bound to a target allows that target
alone. The subject is what the kernel stamped on the request;
only a holder of `policy.delegate`, or init, may ask for somebody else. Silence, lateness and
nonsense are DENY with reason UNAVAILABLE on the caller's side (nexus.runtime.Authority).
"""

from enum import IntEnum
from typing import Annotated, Final, TypeAlias

from nexus.abi import SERVICE_NAME_SIZE_MAX
from nexus.protocols.policy import POLICY_SIZE_MAX, RIGHT_SIZE_MAX
from nexus.protocols.policy import TARGET_SIZE_MAX as TARGET_SIZE_MAX
from nexus.wire import U8, U16, U32, U64, Blob, Message, Protocol, Request, Text

ACTION_SIZE_MAX: Final = 48  # characters; an action is the name of a right, or an operation
INLINE_POLICY_SIZE_MAX: Final = 7 * 1024  # bytes; a larger policy travels as a VMO
PROGRAM_SIZE_MAX: Final = 48  # characters


class Verdict(IntEnum):
    """The decision. The numbers are wire format and are never reused."""

    ALLOW = 0
    DENY = 1


class Reason(IntEnum):
    """Why it was decided so. Audit records give the name in small letters."""

    POLICY = 0  # the policy has, or does not have, the right
    IDENTITY = 1  # the subject is not who may be asked for, or was never issued by init
    MALFORMED = 2  # what was asked or answered made no sense
    UNAVAILABLE = 3  # policyd did not answer in time; only a caller says this


class PolicydStatus(IntEnum):
    """Why policyd refuses a request. The numbers are wire format and are never reused."""

    BAD_POLICY = 16  # the new policy cannot be read, or has a subject init does not know
    INIT_REFUSED = 17  # init did not take the new policy; the old one is still in force


class Decision(Message):
    """The decision, the generation of the policy page it was made under, and its number.

    Decisions are numbered from 1 in the life of one policyd instance.
    """

    verdict: Verdict
    reason: Reason
    generation: Annotated[int, U32()]
    number: Annotated[int, U64()]


class Check(Request[Decision], op=1, idempotent=True):
    """May the caller itself do `right` to `target`?"""

    right: Annotated[str, Text(size_min=1, size_max=RIGHT_SIZE_MAX)]
    target: Annotated[str, Text(size_max=TARGET_SIZE_MAX)]


class Route(Request[Decision], op=2, idempotent=True):
    """May `requester` reach `target`? The requester is the caller itself, or the caller is init."""

    requester: Annotated[str, Text(size_min=1, size_max=SERVICE_NAME_SIZE_MAX)]
    target: Annotated[str, Text(size_min=1, size_max=SERVICE_NAME_SIZE_MAX)]


class Exec(Request[Decision], op=3, idempotent=True):
    """May `requester` start `program`? The requester is the caller, or the caller is init."""

    requester: Annotated[str, Text(size_min=1, size_max=SERVICE_NAME_SIZE_MAX)]
    program: Annotated[str, Text(size_min=1, size_max=PROGRAM_SIZE_MAX)]


class CheckFor(Request[Decision], op=5, idempotent=True):
    """A delegated check: may the service with id `subject` do `right` to `target`?

    The caller holds `policy.delegate` or is init; else DENY, reason IDENTITY.
    """

    subject: Annotated[int, U64()]
    right: Annotated[str, Text(size_min=1, size_max=RIGHT_SIZE_MAX)]
    target: Annotated[str, Text(size_max=TARGET_SIZE_MAX)]


class Reloaded(Message):
    """The new policy is in force: its generation, and its digest as Policy.digest."""

    generation: Annotated[int, U32()]
    digest: Annotated[str, Text(size_max=64)]


class Reload(Request[Reloaded], op=6, idempotent=True, refuses=PolicydStatus):
    """Put a new policy in force: the bytes of a protocols.policy.Policy, inline.

    Answered when the next request of anybody meets the new policy. The caller holds
    `policy.reload`, else DENIED. *Refuses*: BAD_POLICY, INIT_REFUSED.
    """

    policy: Annotated[bytes, Blob(size_min=1, size_max=INLINE_POLICY_SIZE_MAX)]


class ReloadBulk(Request[Reloaded], op=7, idempotent=True, refuses=PolicydStatus, moves=True):
    """As Reload, the first `size` bytes of the sealed VMO that moves with the request."""

    size: Annotated[int, U32(maximum=POLICY_SIZE_MAX)]


class Counts(Message):
    """What this instance has decided, by reason, and what became of the audit.

    allowed + denied = audited + audit_dropped + audit_waiting. Dropped are the decisions without a
    record of their own: what exceeds an asker's places or rate is summed up in one record of that
    asker and second, op `suppressed`, with the count, the first and last number, and how many were
    allowed and denied. It stands for the asker's decisions in that range that have no record.
    `malformed` requests are refused as such and audited too, but are no decisions; they are
    counted in none of the four.
    """

    generation: Annotated[int, U32()]
    digest: Annotated[str, Text(size_max=64)]
    allowed: Annotated[int, U64()]
    denied_policy: Annotated[int, U64()]
    denied_identity: Annotated[int, U64()]
    malformed: Annotated[int, U64()]
    audited: Annotated[int, U64()]
    audit_dropped: Annotated[int, U64()]
    audit_waiting: Annotated[int, U16()]
    subjects: Annotated[int, U8()]


class GetCounts(Request[Counts], op=8, idempotent=True):
    """The counters."""


PolicydRequest: TypeAlias = Check | Route | Exec | CheckFor | Reload | ReloadBulk | GetCounts
PROTOCOL: Final = Protocol(
    "policyd",
    number=6,
    version=1,
    requests=(Check, Route, Exec, CheckFor, Reload, ReloadBulk, GetCounts),
)
