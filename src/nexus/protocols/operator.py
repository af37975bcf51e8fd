"""operator protocol: what a command of the person in charge asks of a running system.

Spoken from outside, by processes that are no service, over operator's port: one frame of
nexus.wire per packet, one request in flight per connection. Deadlines are the kernel's monotonic
clock. A service of the system gets DENIED for all of it.

*Source*: design.md section 5.
"""

from enum import IntEnum
from typing import Annotated, Final, TypeAlias

from nexus.abi import SERVICE_NAME_SIZE_MAX
from nexus.protocols.init import (
    GetAudit,
    GetLinks,
    GetResources,
    GetRouteCounts,
    GetService,
    GetSystem,
    GetTasks,
    LeaveSafeMode,
    ReloadSettings,
    Restart,
    Shutdown,
)
from nexus.protocols.policy import POLICY_SIZE_MAX
from nexus.wire import BODY_SIZE_MAX, HEADER_SIZE, U32, Blob, Message, Protocol, Request, Text

PORT: Final = "operator"  # the name of the port, and of its socket in the runtime directory
ENVELOPE_SIZE_MAX: Final = 64  # bytes of a Relay or a Relayed around the frame it carries
RELAY_FRAME_SIZE_MAX: Final = BODY_SIZE_MAX - ENVELOPE_SIZE_MAX
PART_SIZE_MAX: Final = 4 * 1024  # bytes of a policy in one request; 16 parts are the largest
RELAY_TIME_MAX_NS: Final = 60_000_000_000  # what a request may take at all

RELAYED_TO_INIT: Final = (
    GetTasks,
    GetLinks,
    GetRouteCounts,
    Restart,
    GetService,
    GetAudit,
    GetResources,
    Shutdown,
    GetSystem,
    LeaveSafeMode,
    ReloadSettings,
)
"""What operator passes on to init-lite: everything but what hands out links, or the policy."""

assert 1 + 1 + 1 + SERVICE_NAME_SIZE_MAX + 3 <= ENVELOPE_SIZE_MAX
assert HEADER_SIZE < RELAY_FRAME_SIZE_MAX


class OperatorStatus(IntEnum):
    """Why operator refuses. The numbers are wire format and are never reused."""

    NO_SERVICE = 16  # operator's entry in the system file uses no service of this name
    UNREACHABLE = 17  # it has no link to the service now, and nothing was sent
    TIMED_OUT = 18  # sent, and no answer by the deadline: whether it acted is not known
    CUT_OFF = 19  # the service ended after the request was sent: the same is not known
    BAD_FRAME = 20  # the frame is no single request that may be passed on
    BAD_ANSWER = 21  # the service answered with something that is no answer
    TOO_LARGE = 22  # the answer does not fit a Relayed; ask for less
    BAD_PART = 23  # the part does not continue what has been put together so far
    BAD_POLICY = 24  # policyd cannot read the policy, or it names a service that is not there
    POLICY_NOT_TAKEN = 25  # policyd could not put it in force; the old one is


class Relayed(Message):
    """The service's answer, a frame with the nonce of the one that was passed on; its status may
    be a refusal. A capability that came with it is closed and never leaves the system."""

    frame: Annotated[bytes, Blob(size_min=HEADER_SIZE, size_max=RELAY_FRAME_SIZE_MAX)]


class Relay(Request[Relayed], op=1, idempotent=False, refuses=OperatorStatus):
    """Pass a request frame on to `service`, as operator's own.

    The frame's nonce is replaced on the way and put back; its deadline is the earlier of its own
    and the envelope's. To `init-lite` only RELAYED_TO_INIT is passed on, of the meta protocol only
    Health and GetStatus, and no batch.

    *Refuses*: NO_SERVICE, UNREACHABLE, TIMED_OUT, CUT_OFF, BAD_FRAME, BAD_ANSWER, TOO_LARGE; BUSY
    when the service's queue is full.
    """

    service: Annotated[str, Text(size_min=1, size_max=SERVICE_NAME_SIZE_MAX)]
    frame: Annotated[bytes, Blob(size_min=HEADER_SIZE, size_max=RELAY_FRAME_SIZE_MAX)]


class PartTaken(Message):
    """So many bytes of the policy are put together."""

    size: Annotated[int, U32(maximum=POLICY_SIZE_MAX)]


class PutPolicyPart(Request[PartTaken], op=2, idempotent=True, refuses=OperatorStatus):
    """The next bytes of a new policy; offset 0 begins anew. Kept for this connection only.

    *Refuses*: BAD_PART (a gap, or more than POLICY_SIZE_MAX).
    """

    offset: Annotated[int, U32(maximum=POLICY_SIZE_MAX)]
    data: Annotated[bytes, Blob(size_min=1, size_max=PART_SIZE_MAX)]


class PolicyReloaded(Message):
    """The new policy is in force, under this generation; its digest as Policy.digest."""

    generation: Annotated[int, U32()]
    digest: Annotated[str, Text(size_max=64)]


class ReloadPolicy(Request[PolicyReloaded], op=3, idempotent=True, refuses=OperatorStatus):
    """Have policyd put in force the policy that was put together, which has `size` bytes.

    *Refuses*: BAD_PART (another size was put together), BAD_POLICY, POLICY_NOT_TAKEN; DENIED when
    operator has no `policy.reload`; NO_SERVICE, UNREACHABLE, TIMED_OUT, CUT_OFF and BAD_ANSWER of
    policyd.
    """

    size: Annotated[int, U32(minimum=1, maximum=POLICY_SIZE_MAX)]


OperatorRequest: TypeAlias = Relay | PutPolicyPart | ReloadPolicy
PROTOCOL: Final = Protocol(
    "operator", number=8, version=1, requests=(Relay, PutPolicyPart, ReloadPolicy)
)
